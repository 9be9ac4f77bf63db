"""What the stages share: the data format, the prompt, the latent head (GAP) and generation.

Symbols are the paper's (arXiv 2605.12374): v a vision embedding, mu and P_k the PCA of auxiliary embeddings,
h_bar a decoder state after the final norm, c = F(h_bar) its coefficients, v_hat = P_k c + mu the next input.
Shape letters: B rows, T positions, d model width, k components, K latents a span, M latents in all,
Q questions, S samples a question, V vocabulary rows.
"""

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

LATENT_START, LATENT_PAD, LATENT_END = "<|latent_start|>", "<|latent_pad|>", "<|latent_end|>"
MONET_TOKENS = "<abs_vis_token>", "<abs_vis_token_pad>", "</abs_vis_token>"  # the same three in a Monet checkpoint
LATENT_SPAN = "<latent></latent>"  # how a span is written in `response`
HEAD_FILE = "latent_head.safetensors"
TOWER_ATTENTION = "flash_windows"  # "flash" in the name is how transformers knows to pass all windows in one call
CHUNK = {"cpu": 2**19, "cuda": 2**23}  # numbers in q of an attention call of the tower: fit a cache, fill a GPU
IGNORE = -100  # label of a position without cross-entropy
TOWER_PATCHES = 65_536  # a tower call without gradients: one image of 16,384 tokens

# ---------------------------------------------------------------------------------------------------
# settings, files, ranks


def settings_of(namespace):
    """The hyperparameters among a script's globals: plain values, not CONSTANTS (K and N are hyperparameters)."""
    return {k: v for k, v in namespace.items() if type(v) in (int, float, str, bool)
            and not k.startswith("_") and (len(k) == 1 or not k.isupper())}


def override(settings, argv=None):
    """Apply `--key=value` (or `--key value`) to a script's global settings, cast to the default's type."""
    known = settings_of(settings)
    args = list(sys.argv[1:] if argv is None else argv)
    while args:
        key, eq, value = args.pop(0).partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or name not in known:
            raise SystemExit(f"unknown setting {key!r}; this script has: {', '.join(sorted(known))}")
        if not eq:
            if not args:
                raise SystemExit(f"{key} needs a value, as in {key}=value")
            value = args.pop(0)
        kind = type(known[name])
        if kind is bool:
            if value not in ("0", "1", "True", "False", "true", "false"):
                raise SystemExit(f"{key}={value!r} is not a bool; use 0 or 1")
            settings[name] = value in ("1", "True", "true")
        else:
            try:
                settings[name] = kind(value)
            except ValueError:
                raise SystemExit(f"{key}={value!r} is not {kind.__name__}") from None


def check_choices(settings, **choices):
    """Raise SystemExit for a setting that is not one of its choices."""
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            raise SystemExit(f"{name}={settings[name]!r} is not one of: {', '.join(allowed)}")


def rank_and_world():
    """This process's rank and the number of processes, as torchrun sets them (0 and 1 without it)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device():
    """The CUDA device of this local rank, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def clock(device):
    """Seconds for timing work: of this process alone on a CPU, which others may share; of the wall where a GPU works."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def write_then_rename(path, write):
    """Call `write(tmp_path)` and rename the result to `path`, so that `path` is never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(tmp)
    os.replace(tmp, path)


def write_lines(path, rows):
    """Write a JSONL file at once."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_then_rename(path, lambda p: p.write_bytes(text.encode()))


def read_lines(path):
    """Rows of an append-only JSONL file; a last line cut off by a kill (no newline) is left out."""
    rows = []
    if Path(path).exists():
        for n, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except ValueError as e:
                raise SystemExit(f"{path}:{n}: not JSON ({e})") from None
    return rows


def open_append(path):
    """Open an append-only JSONL file, cutting off a half-written last line first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "ab+")
    f.seek(0)
    f.truncate(f.read().rfind(b"\n") + 1)
    return f


def append(f, row):
    """Write one row and flush it to the disk: a finished row survives a kill."""
    f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    f.flush()
    os.fsync(f.fileno())


def seed_of(*parts):
    """A 63-bit seed that depends on nothing but `parts`: not on ranks, batches or order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def key_of(settings, *files):
    """A hash of settings and of the content of files: results made under another key are not reused."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def weight_stamps(folder):
    """Name, size and time of a model folder's weight files: tells one model from the next without reading 16 GB."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def versions():
    """Of python, torch, transformers and this repository, for the record of a run."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
            "git": git.stdout.strip() or "unknown"}


# ---------------------------------------------------------------------------------------------------
# data: {"id", "images": [...], "question", "answer", "response", "aux_images": [...]}

TAGS = re.compile(r"</?(?:think|latent|parser|answer)>")
TAG_ORDER = re.compile(
    r"<think>(?:(?:<latent></latent>)?(?:<parser></parser>)?)*</think><answer></answer>"
)
RESERVED = re.compile(r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad|latent_\w+)\|>")


def load_examples(path, training=True):
    """Read and check a JSONL data file; image paths come back absolute.

    `training` also demands `response` and `aux_images`, the k-th `<latent></latent>` belonging to aux_images[k].
    Raises SystemExit naming file, line and field.
    """
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"{path}: no such data file (for the toy, run `python toy.py data` first)")
    rows, seen = [], {}
    for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{n}"
        try:
            row = json.loads(line)
        except ValueError as e:
            raise SystemExit(f"{where}: not JSON ({e})") from None
        if not isinstance(row, dict):
            raise SystemExit(f"{where}: expected a JSON object, found {type(row).__name__}")
        texts = ["id", "question", "answer"] + ["response"] * training
        lists = ["images"] + ["aux_images"] * (training or "aux_images" in row) + ["options"] * ("options" in row)
        for field, kind in [(f, str) for f in texts] + [(f, list) for f in lists]:
            if not isinstance(row.get(field), kind):
                raise SystemExit(f"{where}: field {field!r} must be a {kind.__name__}, found {row.get(field)!r}")
        for field in lists:
            if other := [x for x in row[field] if not isinstance(x, str)]:
                raise SystemExit(f"{where}: field {field!r} must hold strings only, found {other[0]!r}")
        if row["id"] in seen:
            raise SystemExit(f"{where}: id {row['id']!r} repeats line {seen[row['id']]}")
        seen[row["id"]] = n
        for field in set(lists) - {"options"}:
            row[field] = [str(path.parent / p) for p in row[field]]
            for p in row[field]:
                if not Path(p).is_file():
                    raise SystemExit(f"{where}: {field}: no such image {p}")
        for field in {"question", "response"} & set(texts):
            if found := RESERVED.search(row[field]):
                raise SystemExit(f"{where}: field {field!r} contains the reserved token {found[0]!r}")
        if training:
            tags = "".join(TAGS.findall(row["response"]))
            if not TAG_ORDER.fullmatch(tags):
                raise SystemExit(
                    f"{where}: response has tags {tags!r}; expected <think>, then any number of <latent></latent> "
                    "and <parser></parser>, then </think><answer></answer>"
                )
            spans = row["response"].count(LATENT_SPAN)
            if spans != tags.count("<latent>"):
                raise SystemExit(f"{where}: a latent span must be written {LATENT_SPAN!r} with nothing inside")
            if spans != len(row["aux_images"]):
                raise SystemExit(f"{where}: {spans} {LATENT_SPAN} in response but {len(row['aux_images'])} aux_images")
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: no examples")
    return rows


def strip_latents(response):
    """Remove every latent span from a response; the `<parser>` text stays (difficulty-aware assignment, section 4.3)."""
    return re.sub(r" ?<latent></latent>", "", response)


def image_file(source):
    """What PIL opens, and its name in messages, for a path or the encoded bytes of an image."""
    return (io.BytesIO(source), "an embedded image") if isinstance(source, bytes) else (source, source)


def open_image(source):
    """Open a path or encoded bytes as RGB. Raises SystemExit naming the file if it is not an image that the processor takes."""
    file, name = image_file(source)
    try:
        image = Image.open(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # what PIL raises for a broken file
        raise SystemExit(f"{name}: not a usable image ({e})") from None
    if max(image.size) > 200 * min(image.size):
        raise SystemExit(f"{name}: not a usable image ({image.width} x {image.height}: aspect ratio above 200)")
    return image


# ---------------------------------------------------------------------------------------------------
# model folder, prompt, inputs


@lru_cache(maxsize=2)  # a forward of the tower has two of them, its windows and its images: one device sync each
def equal_windows(cu_seqlens, most):
    """Batches of windows of one length, from the bounds of all windows (windows + 1).

    Returns [(length, at)]: `at` picks whole windows of at most `most` patches together (one window, where that is longer),
    as a slice where they are neighbours, else as indices.
    """
    bounds, batches = cu_seqlens.cpu(), []
    starts, lengths = bounds[:-1], bounds.diff()
    for length in lengths.unique().tolist():
        for part in starts[lengths == length].split(max(1, most // length)):
            first, end = int(part[0]), int(part[-1]) + length
            if end - first == len(part) * length:
                at = slice(first, end)
            else:
                at = (part[:, None] + torch.arange(length)).flatten().to(cu_seqlens.device)
            batches.append((length, at))
    return batches


def tower_attention(module, query, key, value, attention_mask, scaling, dropout, cu_seq_lens_q, **_):
    """Attention within each window of q, k, v (1, heads, N, D); returns (1, N, heads, D) and no weights.

    The stock SDPA path calls once a window, over a thousand times a layer for a 4K image. Attention over a whole image is one
    window of it, a view.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    out = torch.empty_like(q)
    for length, at in equal_windows(cu_seq_lens_q, CHUNK[q.device.type] // q[0].numel()):
        a, b, c = (x[at].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))  # (windows, heads, length, D)
        if q.device.type == "cpu" and q.dtype == torch.float32 and length <= 256 and not dropout:
            o = ((a * scaling) @ b.mT).softmax(-1) @ c  # two large products beat SDPA's kernel, which walks over windows
        else:
            o = F.scaled_dot_product_attention(a, b, c, scale=scaling, dropout_p=dropout)
        out[at] = o.transpose(1, 2).flatten(0, 1)
    return out[None], None


AttentionInterface.register(TOWER_ATTENTION, tower_attention)


def load_vlm(folder, dtype=torch.float32, device="cpu"):
    """Load a Qwen2.5-VL folder, its tower to run `tower_attention`. Returns (vlm, tokenizer).

    Raises SystemExit if it is not such a folder.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise SystemExit(f"{config}: no such file; expected a Qwen2.5-VL folder in the Hugging Face layout")
    try:
        if (kind := json.loads(config.read_text()).get("model_type")) != "qwen2_5_vl":
            raise SystemExit(f"{config}: model_type is {kind!r}, expected 'qwen2_5_vl'")
        vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as e:  # what transformers raises for a folder that lacks or breaks a file
        raise SystemExit(f"{folder}: not a usable Qwen2.5-VL folder: {e}") from None
    vlm.model.visual.config._attn_implementation = TOWER_ATTENTION  # of this process only: it is never saved
    return vlm.to(device).eval(), tokenizer


def load_processor(folder, min_pixels, max_pixels):
    """The image processor with our pixel limits; without torchvision there is no AutoProcessor."""
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(
            folder, size={"shortest_edge": min_pixels, "longest_edge": max_pixels}, local_files_only=True)
    except (OSError, ValueError) as e:
        raise SystemExit(f"{folder}: no usable preprocessor_config.json: {e}") from None


@torch.no_grad()
def add_latent_tokens(vlm, tokenizer):
    """Add the three latent tokens; their input and output rows start at the mean of the existing ones [ours].

    Uses the spare embedding rows that Qwen2.5-VL has. Raises SystemExit if there are too few.
    """
    new = [t for t in (LATENT_START, LATENT_PAD, LATENT_END) if t not in tokenizer.get_vocab()]
    used = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    rows = vlm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SystemExit(f"the model has {rows} embedding rows for {len(tokenizer)} tokens: no spare row for {new}")
    for table in {vlm.get_input_embeddings().weight, vlm.get_output_embeddings().weight}:
        table[used : len(tokenizer)] = table[:used].float().mean(0).to(table.dtype)


def encode(vlm, tokenizer, processor, row, K=0, response=None):
    """Token ids, labels and positions of one example; a prompt alone when `response` is None.

    Returns {"ids" (T), "labels" (T), "pos" (3, T), "grids" [(t, h, w)], "images"}; each `<latent></latent>` becomes start,
    K pads, end. Cross-entropy falls on the response, never on latent pads [ours, as Mirage]. Without `system` in the row
    the chat template's own system prompt stands.
    """
    content = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": row["question"]}]
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    text = tokenizer.apply_chat_template(
        messages + [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    pad = vlm.config.image_token_id
    grids = [image_grid(processor, p) for p in row["images"]]
    ids, images = [], iter(grids)
    for t in tokenizer(text)["input_ids"]:
        ids += [pad] * (math.prod(next(images)) // processor.merge_size**2) if t == pad else [t]
    labels = [IGNORE] * len(ids)
    if response is not None:
        span = LATENT_START + LATENT_PAD * K + LATENT_END
        answer = tokenizer(response.replace(LATENT_SPAN, span) + tokenizer.eos_token)["input_ids"]
        latent = tokenizer.convert_tokens_to_ids(LATENT_PAD)
        ids, labels = ids + answer, labels + [IGNORE if t == latent else t for t in answer]
    ids = torch.tensor(ids)
    return {"ids": ids, "labels": torch.tensor(labels), "pos": positions(vlm, ids, grids), "grids": grids,
            "images": row["images"]}


def image_grid(processor, source):
    """The (t, h, w) patch grid that the processor will make of an image, from its header alone."""
    file, name = image_file(source)
    try:
        with Image.open(file) as image:
            width, height = image.size
        h, w = smart_resize(height, width, processor.patch_size * processor.merge_size,
                            processor.size["shortest_edge"], processor.size["longest_edge"])
    # ValueError: an aspect ratio above 200
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise SystemExit(f"{name}: not a usable image ({e})") from None
    return 1, h // processor.patch_size, w // processor.patch_size


def positions(vlm, ids, grids):
    """mRoPE positions (3, T) of one sequence, by HF's own rule; latent pads count as text [ours, as Mirage]."""
    if not grids:
        return torch.arange(len(ids)).expand(3, -1)
    is_image = (ids == vlm.config.image_token_id).int()
    return vlm.model.get_rope_index(ids[None], is_image[None], torch.tensor(grids))[0][:, 0]


def encode_images(vlm, processor, images):
    """Merged vision embeddings of PIL images in reading order: a list of (h*w/4, d), and the grids (n, 3)."""
    tower = vlm.model.visual
    out = processor(images=images, return_tensors="pt")
    grids = out["image_grid_thw"]
    v = tower(out["pixel_values"].to(tower.device, tower.dtype), grid_thw=grids.to(tower.device)).pooler_output
    return list(v.split((grids.prod(-1) // processor.merge_size**2).tolist())), grids


def embed(vlm, ids, vision=None, latents=None, latent_id=-1):
    """Input embeddings (B, T, d): `vision` (N, d) at image pads, `latents` (M, d) at latent pads, in reading order."""
    x = vlm.model.language_model.embed_tokens(ids)
    for token, v in ((vlm.config.image_token_id, vision), (latent_id, latents)):
        if v is not None:
            x = x.masked_scatter((ids == token)[..., None], v.to(x.dtype))
    return x


def cross_entropy(h, labels, lm_head, chunk=512):
    """Summed cross-entropy of states h (N, d) against labels (N), in checkpointed chunks.

    Logits exist for `chunk` rows at a time: at V = 152,064 the full (T, V) float32 matrix is what runs out of memory.
    """
    def one(h, labels):
        return F.cross_entropy(lm_head(h).float(), labels, reduction="sum")

    total = h.new_zeros((), dtype=torch.float32)
    for i in range(0, len(h), chunk):
        total = total + checkpoint(one, h[i : i + chunk], labels[i : i + chunk], use_reentrant=False)
    return total


# ---------------------------------------------------------------------------------------------------
# the latent head (section 4.1): h_bar -> v_hat


class LatentHead(nn.Module):
    """What every head holds: the PCA of auxiliary embeddings. P_k (d, k), mu (d), eigenvalues (k), all float32.

    A head maps a post-final-norm state h_bar (M, d) to the next input embedding v_hat (M, d).
    """

    def __init__(self, pca, K):
        super().__init__()
        self.K, self.total_variance = K, pca["total_variance"]
        for name in ("basis", "mean", "eigenvalues"):
            self.register_buffer(name, pca[name].float())

    def reconstruct(self, c):
        """v_hat = P_k c + mu for coefficients c (M, k). No whitening."""
        return c.float() @ self.basis.T + self.mean

    def squared_error(self, h, v):
        """||v_hat - v||^2 of each latent (M), for states h (M, d) and targets v (M, d)."""
        return (self(h).float() - v.float()).pow(2).sum(-1)


class PCAHead(LatentHead):
    """GAP: c = F(h_bar), v_hat = P_k c + mu. F is a linear d -> k that starts as P_k^T, then a residual SwiGLU.

    The adapter's output projection starts at zero, so that F(h_bar) = P_k^T h_bar exactly at the start [ours].
    """

    kind = "gap"

    def __init__(self, pca, K):
        super().__init__(pca, K)
        d, k = self.basis.shape
        self.proj = nn.Linear(d, k, bias=False)
        self.gate, self.up, self.down = (nn.Linear(k, k, bias=False) for _ in range(3))
        with torch.no_grad():
            self.proj.weight.copy_(self.basis.T)
            self.down.weight.zero_()

    def coefficients(self, h):
        """c = F(h_bar), (M, k)."""
        c = self.proj(h)
        return c + self.down(F.silu(self.gate(c)) * self.up(c))

    def forward(self, h):
        return self.reconstruct(self.coefficients(h))

    def squared_error(self, h, v):
        # P_k is orthonormal: ||P_k c + mu - v||^2 = ||c - P_k^T (v - mu)||^2 + (what the basis can not reach)
        r = v.float() - self.mean
        b = r @ self.basis
        return (self.coefficients(h).float() - b).pow(2).sum(-1) + (r - b @ self.basis.T).pow(2).sum(-1)


class FullHead(LatentHead):
    """LH, the paper's baseline head: a two-layer MLP d -> d -> d that predicts v_hat directly (about 2 d^2 weights)."""

    kind = "lh"

    def __init__(self, pca, K):
        super().__init__(pca, K)
        d, m = self.basis.shape[0], self.width()
        self.hidden, self.out = nn.Linear(d, m), nn.Linear(m, d)

    def width(self):
        return self.basis.shape[0]

    def forward(self, h):
        return self.out(F.silu(self.hidden(h)))


class FrozenHead(PCAHead):
    """A control: c = P_k^T h_bar, where GAP's head starts, with nothing to learn."""

    kind = "frozen"

    def __init__(self, pca, K):
        LatentHead.__init__(self, pca, K)

    def coefficients(self, h):
        return h.float() @ self.basis


class WideHead(FrozenHead):
    """A control: the capacity of the full head inside GAP's subspace, c = P_k^T h_bar + a two-layer MLP d -> d -> k."""

    kind = "wide"

    def __init__(self, pca, K):
        super().__init__(pca, K)
        d, k = self.basis.shape
        self.hidden, self.out = nn.Linear(d, d), nn.Linear(d, k)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def coefficients(self, h):
        return super().coefficients(h) + self.out(F.silu(self.hidden(h))).float()


class MatchedHead(FullHead):
    """A control: the full head d -> m -> d, m such that it has as many weights as GAP's head of this k."""

    kind = "matched"

    def width(self):
        d, k = self.basis.shape  # m (2d + 1) + d against d k + 3 k^2
        return max(1, round((d * k + 3 * k * k - d) / (2 * d + 1)))


class OutputHead(LatentHead):
    """Output as input (Coconut, Monet, LVR): the post-final-norm state itself is fed back, and regressed."""

    kind = "output"

    def forward(self, h):
        return h


class MonetHead(OutputHead):
    """Output as input in a checkpoint that has Monet's tokens and no head file: no PCA, and a span of at most K latents."""

    def __init__(self, vlm, K):
        d = vlm.config.text_config.hidden_size
        super().__init__({"basis": torch.zeros(d, 0), "mean": torch.zeros(d), "eigenvalues": torch.zeros(0),
                          "total_variance": 0.0}, K)


HEADS = {head.kind: head for head in (PCAHead, FullHead, OutputHead, FrozenHead, MatchedHead, WideHead)}


def latent_ids(tokenizer):
    """The ids (start, pad, end) of a tokenizer's latent tokens, ours or Monet's; three times None where it has neither."""
    for names in ((LATENT_START, LATENT_PAD, LATENT_END), MONET_TOKENS):
        if None not in (ids := [tokenizer.get_vocab().get(name) for name in names]):
            return ids
    return None, None, None


def load_pca(path):
    """Read pca.safetensors: (tensors and total_variance, metadata). Raises SystemExit if it is not ours."""
    tensors, meta = read_safetensors(path, ("mean", "basis", "eigenvalues"), ("tower", "K", "mode"))
    k = tensors["basis"].shape[1]
    pca = {"mean": tensors["mean"], "basis": tensors["basis"], "eigenvalues": tensors["eigenvalues"][:k],
           "total_variance": float(tensors["eigenvalues"].double().sum())}
    return pca, meta


def save_head(folder, head, weights, meta):
    """Write latent_head.safetensors beside a checkpoint: the head's weights, its PCA, and how it was made."""
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in weights.items()}
    meta = meta | {"kind": head.kind, "K": head.K, "total_variance": head.total_variance}
    write_then_rename(Path(folder) / HEAD_FILE, lambda p: save_file(tensors, p, {k: str(v) for k, v in meta.items()}))


def load_head(folder, vlm, tokenizer, latent_size):
    """The latent head of a checkpoint folder, in float32, or None where the folder has none (base, text method).

    A folder without a head file whose tokenizer has Monet's tokens feeds back its own states, at most `latent_size` a span.
    """
    path = Path(folder) / HEAD_FILE
    if not path.exists():
        monet = set(MONET_TOKENS) <= tokenizer.get_vocab().keys()
        return MonetHead(vlm, latent_size).to(vlm.device).eval() if monet else None
    tensors, meta = read_safetensors(path, ("mean", "basis", "eigenvalues"), ("K", "kind", "total_variance"))
    if meta.get("kind") not in HEADS:
        raise SystemExit(f"{path}: head kind is {meta.get('kind')!r}, expected one of {sorted(HEADS)}")
    head = HEADS[meta["kind"]](tensors | {"total_variance": float(meta["total_variance"])}, int(meta["K"]))
    head.load_state_dict(tensors)
    return head.to(vlm.device).eval()


def read_safetensors(path, names, fields=()):
    """All tensors and the metadata of a safetensors file. Raises SystemExit if it lacks a name or a metadata field."""
    try:
        with safe_open(path, "pt") as f:
            tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise SystemExit(f"{path}: not a readable safetensors file ({e})") from None
    if missing := [n for n in names if n not in tensors] + [n for n in fields if n not in meta]:
        raise SystemExit(f"{path}: lacks {missing}, has {sorted(tensors)} and metadata {sorted(meta)}")
    return tensors, meta


def span_unit(head):
    """Latents are kept in multiples of this: whole spans; a Monet span may be shorter than K."""
    return 1 if head is None or isinstance(head, MonetHead) else head.K


def save_latents_file(path, latents, head):
    """Write the whole spans of generated latents (m * K, d), if any; a span that the token limit cut off is left out."""
    if whole := len(latents) // span_unit(head) * span_unit(head):
        write_then_rename(path, lambda p: save_file({"latents": latents[:whole].contiguous()}, p))


def load_latents_file(path, head):
    """Latents (m, K, d) to feed to a model with this head. Raises SystemExit if they do not fit it."""
    latents, unit = read_safetensors(path, ("latents",))[0]["latents"], span_unit(head)
    d = head.mean.shape[0]
    if not len(latents) or latents.shape[1] != d or len(latents) % unit:
        raise SystemExit(f"{path}: latents of shape {tuple(latents.shape)}; the model's head writes spans of {unit} x {d}")
    return latents.view(-1, unit, d)


def tower_fingerprint(vlm):
    """SHA-256 over the vision tower's bfloat16 weights: targets and PCA belong to one tower."""
    digest = hashlib.sha256()
    for name, p in sorted(vlm.model.visual.named_parameters()):
        digest.update(name.encode())
        digest.update(p.detach().bfloat16().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def grid_features(vlm, processor, images, K, mode):
    """The auxiliary features v of PIL images: (n, K, d) in reading order, K a square [ours: both modes].

    pool: encode each at its own resolution, arrange the merged tokens as their h x w grid, average-pool to the square.
    resize: resize the image so that its merged grid is the square already.
    """
    side = math.isqrt(K)
    if mode == "resize":
        cell = processor.patch_size * processor.merge_size
        images = [image.resize((side * cell, side * cell), Image.BICUBIC) for image in images]
    v, grids = encode_images(vlm, processor, images)
    m, rows = processor.merge_size, []
    for x, (_, h, w) in zip(v, grids.tolist()):
        x = x.float().T.view(1, -1, h // m, w // m)
        rows.append(F.adaptive_avg_pool2d(x, side)[0].flatten(1).T)
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------
# generation: every row is in text or in latent mode on its own

INTERVENTIONS = ("clean", "zero", "noise", "mean", "shuffle", "oracle", "oracle_pca")


def intervene(kind, head, v_hat, noise=None, fed=None):
    """What is fed in place of the predicted latents v_hat (M, d) (section 5).

    noise (M, k): standard normal draws, scaled to the training coefficients' own standard deviations, reconstructed
    and rescaled to the predicted norm. fed (M, d): another example's latents (shuffle) or the real features (oracle).
    """
    if kind == "mean":
        return head.mean.expand_as(v_hat)
    if kind == "noise":
        w = head.reconstruct(noise * head.eigenvalues.clamp(min=0).sqrt())
        return w * v_hat.norm(dim=-1, keepdim=True) / w.norm(dim=-1, keepdim=True)
    if kind in ("shuffle", "oracle"):
        return fed
    if kind == "oracle_pca":
        return head.reconstruct((fed - head.mean) @ head.basis)
    return v_hat


def ema_norm(vision, beta):
    """n_bar, an exponential moving average of ||v|| over a query's vision embeddings (N, d), token by token."""
    norms = vision.float().norm(dim=-1).tolist()
    n_bar = norms[0]
    for n in norms[1:]:
        n_bar = beta * n_bar + (1 - beta) * n
    return n_bar


def pick(logits, temperature, top_p, u):
    """Tokens (R) from logits (R, V): greedy at temperature 0, else by inverse CDF at the uniforms u (R).

    A row's draw depends on its own u alone, not on the batch it is in.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        p_sorted, order = p.sort(-1, descending=True)
        p_sorted[p_sorted.cumsum(-1) - p_sorted >= top_p] = 0
        p = torch.zeros_like(p).scatter(-1, order, p_sorted)
    cdf = p.cumsum(-1)
    # the last column is the total: u < 1 keeps the index on a token of non-zero probability
    return torch.searchsorted(cdf, (u.to(cdf) * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=p.shape[-1] - 1)


class Decoder:
    """One prefill for Q prompts, then one position at a time for Q x S rows.

    The S samples of a question attend to *one* prompt cache (Q, H_kv, T, D) and each to its own new positions
    (Q, H_kv, S, t, D): the prompt is neither run nor stored nor read once per sample.
    """

    def __init__(self, vlm, prompts, n_samples, pad_id):
        self.lm = vlm.model.language_model
        if self.lm.has_sliding_layers:
            raise SystemExit("generation has no sliding-window attention; set use_sliding_window to false")
        device, T = vlm.device, max(len(p["ids"]) for p in prompts)
        ids = torch.full((len(prompts), T), pad_id)
        pos = torch.zeros(3, len(prompts), T, dtype=torch.long)
        mask = torch.zeros(len(prompts), T, dtype=torch.bool)
        for i, p in enumerate(prompts):  # left-padded: every prompt ends at the same column
            n = len(p["ids"])
            ids[i, T - n :], pos[:, i, T - n :], mask[i, T - n :] = p["ids"], p["pos"], True
        vision = [p["vision"] for p in prompts if p["vision"] is not None]
        x = embed(vlm, ids.to(device), torch.cat(vision) if vision else None)
        out = self.lm(inputs_embeds=x, position_ids=pos.to(device), use_cache=True,
                      attention_mask=None if mask.all() else mask.to(device))
        self.prompt = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        self.bias = None if mask.all() else torch.where(mask, 0.0, -torch.inf).to(x)[:, None, None, None]
        self.h = out.last_hidden_state[:, -1:].expand(-1, n_samples, -1)  # (Q, S, d)
        self.next_pos = (pos.amax(dim=(0, 2)) + 1).to(device)  # (Q): the same on all three axes from here on
        a = self.lm.layers[0].self_attn
        self.heads = (a.num_key_value_heads, a.num_key_value_groups, a.head_dim)
        self.new, self.t = [None] * len(self.lm.layers), 0

    def step(self, x):
        """Feed x (Q, S, d), one embedding a row. Returns the states after the final norm, h_bar (Q, S, d)."""
        (Q, S, _), (H, G, D), t = x.shape, self.heads, self.t
        cos, sin = self.lm.rotary_emb(x, (self.next_pos + t)[None, :, None].expand(3, Q, 1))
        cos, sin = cos[:, None], sin[:, None]  # (Q, 1, 1, D)
        for i, layer in enumerate(self.lm.layers):
            a, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (proj(y).view(Q, S, H, -1, D).transpose(1, 2) for proj in (a.q_proj, a.k_proj, a.v_proj))
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # (Q, H, S, G or 1, D)
            k_new, v_new = self._write(i, k, v)
            k_prompt, v_prompt = self.prompt[i]
            s_prompt = (q.reshape(Q, H, S * G, D) @ k_prompt.mT).view(Q, H, S, G, -1)
            if self.bias is not None:
                s_prompt = s_prompt + self.bias
            w = torch.cat([s_prompt, q @ k_new.mT], -1).mul(a.scaling)
            w = w.softmax(-1, dtype=torch.float32).to(x.dtype)
            w_prompt, w_new = w.split([k_prompt.shape[2], t + 1], -1)
            o = (w_prompt.reshape(Q, H, S * G, -1) @ v_prompt).view(Q, H, S, G, D) + w_new @ v_new
            x = x + a.o_proj(o.transpose(1, 2).reshape(Q, S, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.t += 1
        return self.lm.norm(x)

    def _write(self, i, k, v):
        """Store position t of layer i; returns all new keys and values so far, (Q, H, S, t + 1, D)."""
        t, shape = self.t, list(k.shape)
        if self.new[i] is None or self.new[i][0].shape[3] == t:  # room for twice as many
            shape[3] = max(32, t)
            room = [k.new_empty(shape), v.new_empty(shape)]
            self.new[i] = room if t == 0 else [torch.cat(pair, 3) for pair in zip(self.new[i], room)]
        k_new, v_new = self.new[i]
        k_new[:, :, :, t], v_new[:, :, :, t] = k[:, :, :, 0], v[:, :, :, 0]
        return k_new[:, :, :, : t + 1], v_new[:, :, :, : t + 1]

    def keep(self, q, s):
        """Keep questions q (Q') and, of each, samples s (Q', S')."""
        q, s = q.to(self.next_pos.device), s.to(self.next_pos.device)
        self.next_pos = self.next_pos[q]
        self.bias = None if self.bias is None else self.bias[q]
        self.prompt = [(k[q], v[q]) for k, v in self.prompt]
        self.new = [[x[q[:, None], :, s].transpose(1, 2).contiguous() for x in kv] for kv in self.new]


@torch.inference_mode()
def generate(vlm, head, tokenizer, prompts, *, max_new_tokens, n_samples=1, temperature=0.0, top_p=1.0, seeds=None,
             intervention="clean", fed=None, ema_beta=0.0, suppress=(), after="", on_step=None, on_finish=None):
    """Answer a batch of prompts, each {"ids" (T), "pos" (3, T), "vision" (N, d) or None}.

    Text positions use the LM head. After `<|latent_start|>` exactly K latents follow, each the head's output for the
    state before it, then `<|latent_end|>` and the text `after` are forced (section 3.4; forced end [ours]); a Monet
    model may also end its span itself. With no head, or under `zero`, a span can not open. `seeds` (Q * n_samples ints)
    fix each row's draws; `fed` (a (m, K, d) tensor a question) feeds `shuffle` and `oracle`; ema_beta > 0 rescales each
    latent to n_bar (EMA norm calibration); tokens in `suppress` are never written.
    on_step(rows, tokens, x, h) sees what each living row is fed, and from which state; on_finish(q, s, ids) is called
    as a row ends and may return True to drop the question's other rows.
    Returns per question a list of {"ids", "latents" (m, d), "finished"}.
    """
    if intervention not in INTERVENTIONS:
        raise SystemExit(f"intervention {intervention!r} is not one of {', '.join(INTERVENTIONS)}")
    if intervention in ("noise", "mean", "oracle_pca") and head and not head.basis.numel():
        raise SystemExit(f"the intervention {intervention!r} needs the PCA of a {HEAD_FILE}, which this model does not have")
    device, S0 = vlm.device, n_samples
    start, pad, end = latent_ids(tokenizer)
    closed = head is None or intervention == "zero"
    never = [t for t in (pad, end, *suppress) + (start,) * closed if t is not None]
    eos = vlm.generation_config.eos_token_id  # an int, a list, or None
    stops = torch.tensor([tokenizer.eos_token_id, *([eos] if isinstance(eos, int) else eos or ())])
    n_bar = [ema_norm(p["vision"], ema_beta) if ema_beta and p["vision"] is not None else 0 for p in prompts]
    rng = [torch.Generator().manual_seed(s) for s in seeds] if seeds else None
    u = torch.stack([torch.rand(max_new_tokens, generator=g) for g in rng]) if temperature else None

    # what a span forces after its start; `left` counts down to its last position
    then = [end, *tokenizer(after, add_special_tokens=False)["input_ids"]]
    forced = torch.tensor([] if closed else [pad] * head.K + then)

    decoder = Decoder(vlm, prompts, S0, tokenizer.pad_token_id)
    h = decoder.h
    rows = torch.arange(len(prompts) * S0).view(-1, S0)  # which row of the result a slot holds
    alive, left = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows)  # left: forced positions to come
    ids, latents = [[] for _ in range(rows.numel())], [[] for _ in range(rows.numel())]
    for n in range(max_new_tokens):
        text, inside = alive & (left == 0), alive & (left > len(then))
        if inside.any() and isinstance(head, MonetHead):
            ended = pick(vlm.lm_head(h[inside]).float(), temperature, top_p, u[rows[inside], n] if temperature else None) == end
            left[inside] = torch.where(ended.cpu(), len(then), left[inside])
            inside = alive & (left > len(then))
        token = torch.full_like(rows, tokenizer.pad_token_id)
        if (on := alive & (left > 0)).any():
            token[on] = forced[-left[on]]
        if text.any():
            logits = vlm.lm_head(h[text]).float()
            logits[:, never] = -torch.inf
            logits[:, len(tokenizer) :] = -torch.inf  # spare rows are no tokens
            token[text] = pick(logits, temperature, top_p, u[rows[text], n] if temperature else None).cpu()
        x = vlm.model.language_model.embed_tokens(token.to(device))
        if inside.any():
            r = rows[inside].tolist()
            noise = torch.stack([torch.randn(head.basis.shape[1], generator=rng[i]) for i in r]).to(device) \
                if intervention == "noise" else None
            given = torch.stack([(f := fed[i // S0].flatten(0, 1))[len(latents[i]) % len(f)] for i in r]).to(device) \
                if intervention in ("shuffle", "oracle", "oracle_pca") else None
            v = intervene(intervention, head, head(h[inside].float()), noise, given)
            if ema_beta:
                scale = torch.tensor([n_bar[i // S0] for i in r], device=device)[:, None] / v.norm(dim=-1, keepdim=True)
                v = torch.where(scale > 0, v * scale, v)
            x[inside] = v.to(x.dtype)
            for i, latent in zip(r, v.cpu()):
                latents[i].append(latent)
        for i, t in zip(rows[alive].tolist(), token[alive].tolist()):
            ids[i].append(t)
        if on_step:
            on_step(rows[alive], token[alive], x[alive], h[alive])
        left = torch.where(text & (token == start), len(forced), (left - 1).clamp(min=0)) if not closed else left
        done = text & torch.isin(token, stops) | (alive if n + 1 == max_new_tokens else False)
        alive = alive & ~done
        for slot in done.nonzero().tolist() if on_finish else ():
            i = int(rows[tuple(slot)])
            if on_finish(i // S0, i % S0, ids[i]):
                alive[slot[0]] = False
        if not alive.any():
            break
        live, most = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
        if len(live) * most <= 0.75 * alive.numel() and decoder.t:  # finished rows leave the batch
            s = alive[live].int().argsort(dim=1, descending=True, stable=True)[:, :most]
            decoder.keep(live, s)
            rows, alive, left, x = (a[live[:, None], s] for a in (rows, alive, left, x))
        h = decoder.step(x)
    result = [{"ids": i, "latents": torch.stack(v) if v else torch.zeros(0), "finished": i[-1] in stops.tolist()}
              for i, v in zip(ids, latents)]
    return [result[i : i + S0] for i in range(0, len(result), S0)]


def to_text(tokenizer, ids):
    """Decode generated ids, each latent span written `<latent></latent>` as in the data."""
    start, pad, end = latent_ids(tokenizer)
    drop = {pad, end, tokenizer.eos_token_id, tokenizer.pad_token_id}
    pieces, run = [], []
    for t in ids + [start]:
        if t == start:
            pieces.append(tokenizer.decode(run))
            run = []
        elif t not in drop:
            run.append(t)
    return LATENT_SPAN.join(pieces)


def see(vlm, processor, prompts):
    """Add "vision" (N, d) or None to encoded prompts, the tower taking at most TOWER_PATCHES patches a call (or one image)."""
    todo = [(image, math.prod(grid)) for p in prompts for image, grid in zip(p["images"], p["grids"])]
    v = []
    while todo:
        n = next((i for i, total in enumerate(accumulate(size for _, size in todo)) if total > TOWER_PATCHES), len(todo))
        part, todo = todo[: max(n, 1)], todo[max(n, 1) :]
        with torch.inference_mode():
            v += encode_images(vlm, processor, [open_image(image) for image, _ in part])[0]
    rest = iter(v)
    for p in prompts:
        mine = [next(rest) for _ in p["images"]]
        p["vision"] = torch.cat(mine) if mine else None
    return prompts


def make_prompts(vlm, tokenizer, processor, rows):
    """Encode data rows for `generate`."""
    return see(vlm, processor, [encode(vlm, tokenizer, processor, row) for row in rows])
