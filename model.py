"""How does Qwen2.5-VL see and read, and what is a latent? Folder, prompt, inputs, and the latent heads.

Symbols are the paper's (arXiv 2605.12374): v a vision embedding, mu and P_k the PCA of auxiliary embeddings,
h_bar a decoder state after the final norm, c = F(h_bar) its coefficients, v_hat = P_k c + mu the next input.
Shape letters: B rows, T positions, d model width, k components, K latents a span, M latents in all,
Q questions, S samples a question, V vocabulary rows.
"""

import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from data import LATENT_SPAN, image_file, read_safetensors, write_then_rename

LATENT_START, LATENT_PAD, LATENT_END = "<|latent_start|>", "<|latent_pad|>", "<|latent_end|>"
MONET_TOKENS = (
    "<abs_vis_token>",
    "<abs_vis_token_pad>",
    "</abs_vis_token>",
)  # the same three in a Monet checkpoint
HEAD_FILE = "latent_head.safetensors"
TOWER_ATTENTION = (
    "flash_windows"  # "flash" in the name is how transformers knows to pass all windows in one call
)
CHUNK = {
    "cpu": 2**19,
    "cuda": 2**23,
}  # numbers in q of an attention call of the tower: fit a cache, fill a GPU
IGNORE = -100  # label of a position without cross-entropy


@lru_cache(
    maxsize=2
)  # a forward of the tower has two of them, its windows and its images: one device sync each
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


def tower_attention(
    module, query, key, value, attention_mask, scaling, dropout, cu_seq_lens_q, **_
):
    """Attention within each window of q, k, v (1, heads, N, D); returns (1, N, heads, D) and no weights.

    The stock SDPA path calls once a window, over a thousand times a layer for a 4K image. Attention over a whole image is one
    window of it, a view.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    out = torch.empty_like(q)
    for length, at in equal_windows(cu_seq_lens_q, CHUNK[q.device.type] // q[0].numel()):
        a, b, c = (
            x[at].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)
        )  # (windows, heads, length, D)
        if q.device.type == "cpu" and q.dtype == torch.float32 and length <= 256 and not dropout:
            o = ((a * scaling) @ b.mT).softmax(
                -1
            ) @ c  # two large products beat SDPA's kernel, which walks over windows
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
        raise SystemExit(
            f"{config}: no such file; expected a Qwen2.5-VL folder in the Hugging Face layout"
        )
    try:
        if (kind := json.loads(config.read_text()).get("model_type")) != "qwen2_5_vl":
            raise SystemExit(f"{config}: model_type is {kind!r}, expected 'qwen2_5_vl'")
        vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (
        OSError,
        ValueError,
    ) as e:  # what transformers raises for a folder that lacks or breaks a file
        raise SystemExit(f"{folder}: not a usable Qwen2.5-VL folder: {e}") from None
    vlm.model.visual.config._attn_implementation = (
        TOWER_ATTENTION  # of this process only: it is never saved
    )
    return vlm.to(device).eval(), tokenizer


def load_processor(folder, min_pixels, max_pixels):
    """The image processor with our pixel limits; without torchvision there is no AutoProcessor."""
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(
            folder,
            size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
            local_files_only=True,
        )
    except (OSError, ValueError) as e:
        raise SystemExit(f"{folder}: no usable preprocessor_config.json: {e}") from None


@torch.no_grad()
def add_latent_tokens(vlm, tokenizer):
    """Add the three latent tokens; their input and output rows start at the mean of the existing ones [ours].

    Uses the spare embedding rows that Qwen2.5-VL has. Raises SystemExit if there are too few.
    """
    new = [t for t in (LATENT_START, LATENT_PAD, LATENT_END) if t not in tokenizer.get_vocab()]
    used = len(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": new}, replace_extra_special_tokens=False
    )
    rows = vlm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SystemExit(
            f"the model has {rows} embedding rows for {len(tokenizer)} tokens: no spare row for {new}"
        )
    for table in {vlm.get_input_embeddings().weight, vlm.get_output_embeddings().weight}:
        table[used : len(tokenizer)] = table[:used].float().mean(0).to(table.dtype)


def encode(vlm, tokenizer, processor, row, K=0, response=None):
    """Token ids, labels and positions of one example; a prompt alone when `response` is None.

    Returns {"ids" (T), "labels" (T), "pos" (3, T), "grids" [(t, h, w)], "images"}; each `<latent></latent>` becomes start,
    K pads, end. Cross-entropy falls on the response, never on latent pads [ours, as Mirage]. Without `system` in the row
    the chat template's own system prompt stands.
    """
    content = [{"type": "image"} for _ in row["images"]] + [
        {"type": "text", "text": row["question"]}
    ]
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    text = tokenizer.apply_chat_template(
        messages + [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=False,
    )
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
    return {
        "ids": ids,
        "labels": torch.tensor(labels),
        "pos": positions(vlm, ids, grids),
        "grids": grids,
        "images": row["images"],
    }


def image_grid(processor, source):
    """The (t, h, w) patch grid that the processor will make of an image, from its header alone."""
    file, name = image_file(source)
    try:
        with Image.open(file) as image:
            width, height = image.size
        h, w = smart_resize(
            height,
            width,
            processor.patch_size * processor.merge_size,
            processor.size["shortest_edge"],
            processor.size["longest_edge"],
        )
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
    v = tower(
        out["pixel_values"].to(tower.device, tower.dtype), grid_thw=grids.to(tower.device)
    ).pooler_output
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
        total = total + checkpoint(
            one, h[i : i + chunk], labels[i : i + chunk], use_reentrant=False
        )
    return total


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
        return (self.coefficients(h).float() - b).pow(2).sum(-1) + (r - b @ self.basis.T).pow(
            2
        ).sum(-1)


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
        super().__init__(
            {
                "basis": torch.zeros(d, 0),
                "mean": torch.zeros(d),
                "eigenvalues": torch.zeros(0),
                "total_variance": 0.0,
            },
            K,
        )


HEADS = {
    head.kind: head for head in (PCAHead, FullHead, OutputHead, FrozenHead, MatchedHead, WideHead)
}


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
    pca = {
        "mean": tensors["mean"],
        "basis": tensors["basis"],
        "eigenvalues": tensors["eigenvalues"][:k],
        "total_variance": float(tensors["eigenvalues"].double().sum()),
    }
    return pca, meta


def save_head(folder, head, weights, meta):
    """Write latent_head.safetensors beside a checkpoint: the head's weights, its PCA, and how it was made."""
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in weights.items()}
    meta = meta | {"kind": head.kind, "K": head.K, "total_variance": head.total_variance}
    write_then_rename(
        Path(folder) / HEAD_FILE,
        lambda p: save_file(tensors, p, {k: str(v) for k, v in meta.items()}),
    )


def load_head(folder, vlm, tokenizer, latent_size):
    """The latent head of a checkpoint folder, in float32, or None where the folder has none (base, text method).

    A folder without a head file whose tokenizer has Monet's tokens feeds back its own states, at most `latent_size` a span.
    """
    path = Path(folder) / HEAD_FILE
    if not path.exists():
        monet = set(MONET_TOKENS) <= tokenizer.get_vocab().keys()
        return MonetHead(vlm, latent_size).to(vlm.device).eval() if monet else None
    tensors, meta = read_safetensors(
        path, ("mean", "basis", "eigenvalues"), ("K", "kind", "total_variance")
    )
    if meta.get("kind") not in HEADS:
        raise SystemExit(
            f"{path}: head kind is {meta.get('kind')!r}, expected one of {sorted(HEADS)}"
        )
    head = HEADS[meta["kind"]](
        tensors | {"total_variance": float(meta["total_variance"])}, int(meta["K"])
    )
    head.load_state_dict(tensors)
    return head.to(vlm.device).eval()


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


def spread(v):
    """Variance over mean squared norm of the features v (n, K, d) of each image: 0 for a blank image."""
    if v.shape[1] == 1:
        return torch.ones(len(v))  # one latent an image has no spread to judge by
    v = v.float()
    return (
        (v - v.mean(1, keepdim=True)).pow(2).sum(-1).mean(1) / v.pow(2).sum(-1).mean(1)
    ).nan_to_num(0)
