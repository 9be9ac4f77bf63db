"""How does Qwen2.5-VL see and read, and what is a latent?

The model folder, the prompt, the inputs, and the latent heads with the paper's equations.

Symbols are the paper's (arXiv 2605.12374): v a vision embedding, mu and P_k the PCA of auxiliary
embeddings, h_bar a decoder state after the final norm, c = F(h_bar) its coefficients,
v_hat = P_k c + mu the next input embedding.
Shape letters: B rows, T positions, d model width, k components, K latents per span, M latents
in all.
"""

import hashlib
import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from data import IMAGE_MARK, LATENT_SPAN, question_text
from faster import quicken
from files import check_finite, check_there, read_json, read_safetensors, write_then_rename
from images import image_size, open_image
from launch import rank_and_world

# Transformers is imported in the functions that use it: that takes seconds, and a mistyped setting
# or a wrong folder is said before.

LATENT_START, LATENT_PAD, LATENT_END = "<|latent_start|>", "<|latent_pad|>", "<|latent_end|>"
# the same three in a Monet checkpoint
MONET_TOKENS = "<abs_vis_token>", "<abs_vis_token_pad>", "</abs_vis_token>"
HEAD_FILE = "latent_head.safetensors"
IGNORE = -100  # label of a position without cross-entropy
MOST_LATENTS = 4096  # of a span: more is a damaged file

# --------------------------------------------------------------------------------------------------
# the latent head: h_bar -> v_hat


class LatentHead(nn.Module):
    """A map from a post-final-norm state h_bar (M, d) to the next input embedding v_hat (M, d).

    A head that is trained on targets holds their PCA: P_k (d, k), mu (d), eigenvalues (k), float32;
    the others have k = 0. `generate` asks for head(h), K and what stands below, interventions for
    the PCA.
    """

    fixed_length = True  # a span is K latents; False: at most K, the model may end it before
    before_answer = False  # True: the one span stands before the answer, the model opens none
    square = True  # K latents are a grid
    targets_fed = True  # in training; False: the head's own latents, which learn from the text loss
    fewest = 1  # the least K that a head file may have
    # what a head file holds beside the head's own weights
    tensors, fields = ("mean", "basis", "eigenvalues"), ("total_variance", "mode")

    def __init__(self, pca, K):
        super().__init__()
        self.K = K
        self.total_variance = pca["total_variance"]
        # buffers: they move, shard and save with the head, and are never trained
        for name in ("basis", "mean", "eigenvalues"):
            self.register_buffer(name, pca[name].float(), persistent=name in self.tensors)

    @classmethod
    def of_file(cls, tensors, meta, d, K):
        """A head of the shapes that the tensors and metadata of its file have; its weights follow.

        Raises ValueError for metadata that is no number.
        """
        pca = tensors | {"total_variance": float(meta["total_variance"])}
        if not 0 < pca["total_variance"] < math.inf:
            raise ValueError(f"total_variance is {meta['total_variance']}")
        return cls(pca, K)

    def reconstruct(self, c):
        """v_hat = P_k c + mu for coefficients c (M, k). No whitening."""
        P_k, mu = self.basis, self.mean
        return c.float() @ P_k.T + mu

    def squared_error(self, h, v):
        """||v_hat - v||^2 of each latent (M), for states h (M, d) and targets v (M, d)."""
        v_hat = self(h).float()
        return (v_hat - v.float()).pow(2).sum(-1)


class SubspaceHead(LatentHead):
    """v_hat = P_k c + mu: a head says what `coefficients` c (M, k) it predicts of h (M, d)."""

    def forward(self, h):
        return self.reconstruct(self.coefficients(h))

    def squared_error(self, h, v):
        """As above, with a gradient of k numbers per latent instead of d.

        P_k is orthonormal: ||P_k c + mu - v||^2 = ||c - P_k^T (v - mu)||^2 + a constant, which is
        what the subspace cannot reach of v.
        """
        P_k, mu = self.basis, self.mean
        centred = v.float() - mu  # (M, d)
        target = centred @ P_k  # (M, k)
        within = (self.coefficients(h).float() - target).pow(2).sum(-1)
        beyond = (centred - target @ P_k.T).pow(2).sum(-1)
        return within + beyond


class PCAHead(SubspaceHead):
    """GAP: c = F(h_bar), v_hat = P_k c + mu.

    F is a linear d -> k that starts as P_k^T, then a residual SwiGLU on the k coefficients. The
    adapter's output starts at zero, so that F(h_bar) = P_k^T h_bar exactly at the start [ours].
    """

    kind = "gap"

    def __init__(self, pca, K):
        super().__init__(pca, K)
        d, k = self.basis.shape
        self.proj = nn.Linear(d, k, bias=False)
        self.gate = nn.Linear(k, k, bias=False)
        self.up = nn.Linear(k, k, bias=False)
        self.down = nn.Linear(k, k, bias=False)
        with torch.no_grad():
            self.proj.weight.copy_(self.basis.T)  # c = P_k^T h_bar ...
            self.down.weight.zero_()  # ... and nothing from the adapter

    def coefficients(self, h):
        """c = F(h_bar), (M, k)."""
        c = self.proj(h)
        # 3 k^2 weights beside the projection's d k
        swiglu = F.silu(self.gate(c)) * self.up(c)
        return c + self.down(swiglu)


class FullHead(LatentHead):
    """LH, the paper's baseline: an MLP d -> d -> d predicts v_hat itself (about 2 d^2 weights).

    SiLU, biases and torch's first weights are [ours]: v_hat starts near 0, GAP's near mu;
    FullFromMeanHead separates that from the subspace.
    """

    kind = "lh"

    def __init__(self, pca, K):
        super().__init__(pca, K)
        # a control below narrows it
        d, width = self.basis.shape[0], self.width()
        self.hidden = nn.Linear(d, width)
        self.out = nn.Linear(width, d)

    def width(self):
        """Units of the hidden layer."""
        return self.basis.shape[0]

    def forward(self, h):
        return self.out(F.silu(self.hidden(h)))


class OutputHead(LatentHead):
    """Output as input: the post-final-norm state itself is fed back.

    As LVR's it is trained on real features, but on the auxiliary image's, and with this loss.
    """

    kind = "output"

    def forward(self, h):
        return h


class FrozenHead(SubspaceHead):
    """A control: c = P_k^T h_bar, where GAP's head starts, with nothing to learn."""

    kind = "frozen"

    def coefficients(self, h):
        return h.float() @ self.basis


class WideHead(FrozenHead):
    """A control: the full head's capacity in GAP's subspace, c = P_k^T h_bar + MLP d -> d -> k."""

    kind = "wide"

    def __init__(self, pca, K):
        super().__init__(pca, K)
        d, k = self.basis.shape
        self.hidden, self.out = nn.Linear(d, d), nn.Linear(d, k)
        # zero at the start, as GAP's adapter
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def coefficients(self, h):
        mlp = self.out(F.silu(self.hidden(h)))
        return super().coefficients(h) + mlp.float()


class MatchedHead(FullHead):
    """A control: the full head d -> m -> d with about as many weights as GAP's head of this k."""

    kind = "matched"

    def width(self):
        d, k = self.basis.shape
        gap_weights = d * k + 3 * k * k
        return max(1, round((gap_weights - d) / (2 * d + 1)))  # m (2d + 1) + d of them here


class FullFromMeanHead(FullHead):
    """A control: the full head starts about mu, as GAP's does. Is it the start, or the subspace?"""

    kind = "lh_mu"

    def __init__(self, pca, K):
        super().__init__(pca, K)
        with torch.no_grad():
            self.out.bias += self.mean


class MatchedFromMeanHead(MatchedHead, FullFromMeanHead):
    """A control: both, as many weights as GAP's head and a start about mu."""

    kind = "matched_mu"


class DummyHead(LatentHead):
    """A control: one learned vector K times, whatever the state. What do markers and time give?"""

    kind = "dummy"
    targets_fed = False

    def __init__(self, pca, K):
        super().__init__(pca, K)
        self.vector = nn.Parameter(self.mean.clone())

    def forward(self, h):
        return self.vector.expand(*h.shape[:-1], -1)


class MarkersHead(LatentHead):
    """A control: a span opens and ends at once. What do its two tokens give?"""

    kind = "markers"
    targets_fed = False
    fewest = 0

    def __init__(self, pca, K):
        super().__init__(pca, 0)

    def forward(self, h):
        return h  # of no position


# --------------------------------------------------------------------------------------------------
# the heads of other papers: VaLR, Monet, AMVL


class StateHead(LatentHead):
    """Output as input without a PCA beside it (VaLR): h_bar is fed back as it is.

    The interventions that need a PCA refuse such a head.
    """

    kind = "valr"
    tensors = fields = ()

    def __init__(self, d, K):
        # in no file: a subspace of nothing
        no_pca = {"basis": torch.zeros(d, 0), "mean": torch.zeros(d), "eigenvalues": torch.zeros(0)}
        super().__init__(no_pca | {"total_variance": 0.0}, K)

    @classmethod
    def of_file(cls, tensors, meta, d, K):
        return cls(d, K)

    def forward(self, h):
        return h


class MonetHead(StateHead):
    """Output as input in a checkpoint that has Monet's tokens and no head file."""

    fixed_length = False


MAX_LOG_VARIANCE = 10.0  # of a z, and its negative the least: no KL term may hold it [ours]


class Gaussian(NamedTuple):
    """Diagonal Gaussians, their mean and log-variance (..., m)."""

    mean: torch.Tensor
    log_variance: torch.Tensor

    def sample(self, noise):
        """Reparameterised, from standard normal draws (..., m)."""
        return self.mean + (self.log_variance / 2).exp() * noise

    def detach(self):
        """sg[.]"""
        return Gaussian(self.mean.detach(), self.log_variance.detach())


def gaussian(parameters):
    """The Gaussians of a linear head's output (..., 2 m), in float32."""
    mean, log_variance = parameters.float().chunk(2, dim=-1)
    return Gaussian(mean, log_variance.clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE))


class SlotHead(StateHead):
    """AMVL: K slots before the answer are filled from a distribution over z in R^m.

    `prior` reads the mean and log-variance of p(z | x) off a slot's state, `decode` maps a z to the
    embedding that is fed in the slot.
    """

    kind = "amvl"
    before_answer = True
    square = False

    def __init__(self, d, K, m):
        super().__init__(d, K)
        self.m = m
        self.prior = nn.Linear(d, 2 * m)
        self.decode = nn.Linear(m, d)

    @classmethod
    def of_file(cls, tensors, meta, d, K):
        return cls(d, K, m=tensors["decode.weight"].shape[1])

    def forward(self, h, noise=None):
        """Latents (..., d) of slots with states h (..., d): the prior's mean, or its sample.

        noise (..., m): standard normal draws times a temperature.
        """
        p = gaussian(self.prior(h))
        z = p.mean if noise is None else p.sample(noise)
        return self.into_slots(z)

    def into_slots(self, z):
        """The embeddings (..., d) that z (..., m) stands for."""
        # z is float32, the map's weights may be bfloat16 while FSDP holds them together
        return self.decode(z.to(self.decode.weight.dtype))


# a line per head: what train.py's `method` names, and what a head file says it holds
HEADS = {
    head.kind: head
    for head in (
        PCAHead,
        FullHead,
        OutputHead,
        FrozenHead,
        MatchedHead,
        FullFromMeanHead,
        MatchedFromMeanHead,
        WideHead,
        DummyHead,
        MarkersHead,
    )
}
OTHER_HEADS = {head.kind: head for head in (StateHead, SlotHead)}  # without a PCA


def load_pca(path):
    """(tensors with total_variance, metadata) of pca.safetensors. SystemExit if it is not ours."""
    names, fields = ("mean", "basis", "eigenvalues"), ("tower", "K", "mode")
    tensors, meta = read_safetensors(path, names, fields)
    check_pca(path, tensors)
    # all d eigenvalues are kept: their sum is the total variance, which 1 - R^2 is relative to
    all_eigenvalues, k = tensors["eigenvalues"], tensors["basis"].shape[1]
    if not all_eigenvalues.sum() > 0:
        raise SystemExit(f"{path}: the eigenvalues sum to 0; expected the variance of a fit")
    pca = {
        "mean": tensors["mean"],
        "basis": tensors["basis"],
        "eigenvalues": all_eigenvalues[:k],
        "total_variance": float(all_eigenvalues.double().sum()),
    }
    return pca, meta


def check_pca(path, tensors):
    """Raise SystemExit unless mean (d), basis (d, k) and eigenvalues (k or more) fit together."""
    shapes = {name: tuple(tensors[name].shape) for name in ("mean", "basis", "eigenvalues")}
    mean, basis, eigenvalues = shapes.values()
    vectors = len(mean) == len(eigenvalues) == 1 and len(basis) == 2
    if not vectors or basis[0] != mean[0] or not 1 <= basis[1] <= eigenvalues[0]:
        raise SystemExit(f"{path}: tensors of shapes {shapes}; expected (d), (d, k), (k or more)")


def save_head(folder, head, weights, meta):
    """Write latent_head.safetensors: the head's weights, its PCA if any, and how it was made."""
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in weights.items()}
    # all that load_head needs to build it again without train.py
    own = {name: getattr(head, name) for name in head.fields if hasattr(head, name)}
    meta = meta | {"kind": head.kind, "K": head.K} | own
    meta = {k: str(v) for k, v in meta.items()}
    write_then_rename(Path(folder) / HEAD_FILE, lambda tmp: save_file(tensors, tmp, meta))


def load_head(folder, vlm, tokenizer, latent_size=10):
    """The latent head of a checkpoint folder, in float32; None where it has none (base, text).

    A folder without a head file whose tokenizer has Monet's tokens feeds back its own states, at
    most `latent_size` of them a span. Raises SystemExit if the file is no head of this model's.
    """
    path = Path(folder) / HEAD_FILE
    if not path.exists():
        if not set(MONET_TOKENS) <= tokenizer.get_vocab().keys():
            return None
        d = vlm.config.text_config.hidden_size
        return MonetHead(d, latent_size).to(vlm.device).eval()
    _, meta = read_safetensors(path, fields=("K", "kind", "tower"))
    kind, K, heads = meta["kind"], meta["K"], HEADS | OTHER_HEADS
    if kind not in heads:
        raise SystemExit(f"{path}: head kind is {kind!r}, expected one of {sorted(heads)}")
    Head = heads[kind]
    tensors, meta = read_safetensors(path, Head.tensors, Head.fields)
    if "basis" in tensors:
        check_pca(path, tensors)
    check_K(path, K, Head)
    d = vlm.config.text_config.hidden_size
    if "mean" in tensors and len(tensors["mean"]) != d:
        width = len(tensors["mean"])
        raise SystemExit(f"{path}: latents of width {width}, but the model's is {d}")
    if meta["tower"] != tower_fingerprint(vlm):
        raise SystemExit(f"{path} was made with another vision tower than {folder} has")
    if None in latent_ids(tokenizer):
        raise SystemExit(f"{path}: a latent head, but the tokenizer has no {LATENT_START}")
    try:
        head = Head.of_file(tensors, meta, d, int(K))
        head.load_state_dict(tensors)
    except (RuntimeError, ValueError, LookupError) as e:  # a weight missing, unknown or misshapen
        reason = " ".join(str(e).split())[:300]
        raise SystemExit(f"{path}: not a whole head of kind {kind!r}: {reason}") from None
    return head.to(vlm.device).eval()


def check_head(head):
    """Raise ValueError for a head that `load_head` will not make again of its file."""
    if (HEADS | OTHER_HEADS).get(head.kind) is not type(head):
        raise ValueError(
            f"{type(head).__name__} of kind {head.kind!r} is in neither HEADS nor OTHER_HEADS"
        )
    check_K("its head", str(head.K), type(head))


def check_K(path, K, Head):
    """Raise SystemExit for a K (text) that is no number of latents of such a head's span."""
    fits = K.isdecimal() and Head.fewest <= int(K) <= MOST_LATENTS
    if not fits or Head.square and math.isqrt(int(K)) ** 2 != int(K):
        wanted = "a square up to" if Head.square else "a number up to"
        raise SystemExit(f"{path}: K is {K!r}, expected {wanted} {MOST_LATENTS}")


# --------------------------------------------------------------------------------------------------
# the model folder


def load_vlm(folder, dtype=torch.float32, device="cpu"):
    """Load a Qwen2.5-VL folder, to run faster as below (`quicken`). Returns (vlm, tokenizer).

    Raises SystemExit if it is not such a folder, or not a whole one: a tensor that is missing,
    unknown, of another shape or not finite, a pointer or half a download in place of weights.
    """
    folder = Path(folder)
    check_folder(folder)
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    with said_of(folder, "not a usable Qwen2.5-VL folder"):
        vlm, found = read_weights(Qwen2_5_VLForConditionalGeneration, folder, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # transformers fills what is missing with random numbers and goes on
    check_whole(folder, vlm, found)
    # called tied, but two in the file, as a merged LoRA's may be: transformers loads both, and an
    # export by the config would drop one
    if vlm.get_output_embeddings().weight is not vlm.get_input_embeddings().weight:
        for config in (vlm.config, vlm.config.text_config):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
    check_usable(folder, vlm, tokenizer)
    if not tokenizer.chat_template:
        tokenizer.chat_template = read_chat_template(folder)
    check_prompt(folder, vlm, tokenizer)
    quicken(vlm)
    return vlm.to(device).eval(), tokenizer


def check_folder(folder):
    """Raise SystemExit, before anything large is read, for a folder that holds something else."""
    if (folder / "adapter_config.json").is_file():
        raise SystemExit(
            f"{folder}/adapter_config.json: a LoRA adapter is not read: merge it first"
        )
    config = folder / "config.json"
    check_there(config)
    found = read_json(config)
    # Qwen2-VL and Qwen3-VL have other towers and other positions
    kind = found.get("model_type")
    if kind != "qwen2_5_vl":
        raise SystemExit(f"{config}: model_type is {kind!r}, expected 'qwen2_5_vl'")
    if found.get("quantization_config"):
        raise SystemExit(f"{config}: quantization_config: expected the weights before quantisation")
    # a clone without LFS leaves a text of three lines in place of 5 GB
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as f:
            if f.read(8) == b"version ":
                raise SystemExit(f"{file}: a Git LFS pointer, not weights; run `git lfs pull`")


def check_usable(folder, vlm, tokenizer):
    """Raise SystemExit for a decoder or a tokenizer that could not train or answer."""
    if vlm.model.language_model.has_sliding_layers:
        wanted = "text_config.layer_types: expected full_attention in every layer"
        raise SystemExit(f"{folder}/config.json: {wanted}; sliding windows are not implemented")
    text, head_dim = vlm.config.text_config, vlm.model.language_model.layers[0].self_attn.head_dim
    sections = text.rope_parameters.get("mrope_section") or []
    if 2 * sum(sections) != head_dim:
        wanted = f"expected a sum of {head_dim / 2:g}, half the width of a head"
        raise SystemExit(f"{folder}/config.json: mrope_section is {sections}; {wanted}")
    n_tokens, n_rows = len(tokenizer), len(vlm.get_input_embeddings().weight)
    if n_tokens > n_rows:
        raise SystemExit(f"{folder}: {n_tokens} tokens, but only {n_rows} have an embedding")
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise SystemExit(f"{folder}: the tokenizer has no {name}")
    if tokenizer.pad_token_id == vlm.config.image_token_id:
        raise SystemExit(
            f"{folder}: the tokenizer's pad_token is the image's, {tokenizer.pad_token}"
        )


def read_weights(kind, folder, dtype):
    """(a model of a class of transformers, what its folder lacked or had too much)."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and writing weights: a stage has one bar, its own
    return kind.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,  # a pickle may run code when it is read
        output_loading_info=True,
    )


@contextmanager
def said_of(folder, what):
    """Turn whatever a broken folder makes transformers raise into one sentence, a SystemExit."""
    try:
        yield
    except Exception as e:  # anything may come; the sentence keeps what it was
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:500]
        raise SystemExit(f"{folder}: {what}: {reason}") from None


def check_whole(folder, vlm, found):
    """Raise SystemExit if transformers filled a tensor with random numbers, or left one out."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, found[what]))
        if names:
            kind = what.removesuffix("_keys")
            raise SystemExit(
                f"{folder}: {len(names)} {kind} tensors, the first {names[0]}; expected all the "
                "weights of a Qwen2.5-VL and no others"
            )
    for name, weight in vlm.named_parameters():
        check_finite(weight, f"{folder}: {name}")


def check_prompt(folder, vlm, tokenizer):
    """Raise SystemExit unless the chat template has a place for an image, the model's own."""
    messages = chat_messages({"question": "?", "images": ["?"]})
    with said_of(folder, "no usable chat template"):  # a program: it may raise anything
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    places = tokenizer(text)["input_ids"].count(vlm.config.image_token_id)
    if places != 1:
        token = vlm.config.image_token_id
        raise SystemExit(f"{folder}: {places} places for an image (token {token}) in the prompt")


def read_chat_template(folder):
    """The template of an older folder, which keeps it in a file of its own."""
    path = folder / "chat_template.json"
    if not path.is_file():
        raise SystemExit(f"{folder}: no chat template, in tokenizer_config.json or beside it")
    return read_json(path, chat_template=str)["chat_template"]


def load_processor(folder, min_pixels, max_pixels):
    """The image processor with our pixel limits, whatever its file says.

    Without torchvision there is no AutoProcessor. Raises SystemExit for a file that is none.
    """
    if min_pixels > max_pixels:
        raise SystemExit(f"min_pixels={min_pixels} is above max_pixels={max_pixels}")
    from transformers import Qwen2_5_VLConfig, Qwen2VLImageProcessorPil

    with said_of(folder, "no usable preprocessor_config.json"):
        # mean, deviation and patch sizes are the folder's
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        # set on the object: limits in the file (the released ones allow 16,384 tokens per image)
        # would win over an argument, in silence. The names are of pixels, not of edges
        limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        processor.size = type(processor.size)(**limits)
        here = processor.size["shortest_edge"], processor.size["longest_edge"]
        tower = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True).vision_config
    sizes = {
        "patch_size": tower.patch_size,
        "temporal_patch_size": tower.temporal_patch_size,
        "merge_size": tower.spatial_merge_size,
    }
    for name, size in sizes.items():
        if getattr(processor, name) != size:
            found = f"{name} is {getattr(processor, name)}, but {size} in config.json"
            raise SystemExit(f"{folder}/preprocessor_config.json: {found}")
    if here != (min_pixels, max_pixels):
        raise SystemExit(f"{folder}: pixel limits {here} in force, not {min_pixels}, {max_pixels}")
    with said_of(folder, "no usable preprocessor_config.json"):
        processor(images=[Image.new("RGB", (56, 56))], do_resize=False)  # a trial of all the rest
    return processor


def say_other_limits(folder, min_pixels, max_pixels):
    """Print a line if a model of train.py that is to answer was trained with other pixel limits."""
    config = Path(folder) / "preprocessor_config.json"
    # the limits of a downloaded folder are nobody's choice
    if not config.exists() or not (Path(folder) / "log.jsonl").exists() or rank_and_world()[0] > 0:
        return
    size = read_json(config).get("size") or {}
    trained, here = (size.get("shortest_edge"), size.get("longest_edge")), (min_pixels, max_pixels)
    if trained != here:
        print(f"{folder}: trained with pixel limits {trained}, here {here}")


@torch.no_grad()
def add_latent_tokens(vlm, tokenizer):
    """Add the three latent tokens; their rows start at the mean of the existing ones [ours].

    Uses the spare embedding rows that Qwen2.5-VL has, or adds some. Returns the id of the pad, at
    whose places latents stand.
    """
    vocabulary = tokenizer.get_vocab()
    new = [t for t in (LATENT_START, LATENT_PAD, LATENT_END) if t not in vocabulary]
    # rows from here on hold what pretraining left there
    used = len(tokenizer)
    # special tokens, so that text is never split into them and decoding can skip them
    tokens = {"additional_special_tokens": new}
    tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    if len(tokenizer) > vlm.get_input_embeddings().weight.shape[0]:
        # a folder that was cut to its tokenizer, as fine-tuning tools do
        vlm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = vlm.get_input_embeddings().weight  # (V, d)
    for table in {embeddings, vlm.get_output_embeddings().weight}:  # one, where they are tied
        mean = table[:used].float().mean(0)
        table[used : len(tokenizer)] = mean.to(table.dtype)
    return tokenizer.convert_tokens_to_ids(LATENT_PAD)


def latent_ids(tokenizer):
    """Ids (start, pad, end) of a tokenizer's latent tokens, ours or Monet's, or None thrice."""
    # asked for each answer: get_vocab() would copy all of Qwen's 151,665 entries every time
    for names in ((LATENT_START, LATENT_PAD, LATENT_END), MONET_TOKENS):
        ids = tokenizer.convert_tokens_to_ids(list(names))
        if not {None, tokenizer.unk_token_id} & set(ids):
            return ids
    return None, None, None


def tower_fingerprint(vlm):
    """SHA-256 of the vision tower's bfloat16 weights: targets and PCA belong to one tower."""
    digest = hashlib.sha256()
    for name, weight in sorted(vlm.model.visual.named_parameters()):
        digest.update(name.encode())
        # bfloat16 as released: a tower loaded as float32 has the same fingerprint
        raw = weight.detach().bfloat16().cpu().contiguous().view(torch.uint8)
        digest.update(raw.numpy())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# the prompt


def encode(vlm, tokenizer, processor, row, K=0, response=None):
    """Token ids, labels and positions of one example; a prompt alone when `response` is None.

    Returns {"ids" (T), "labels" (T), "pos" (3, T), "grids" [(t, h, w)], "images"}. Each
    `<latent></latent>` becomes start, K pads, end. Cross-entropy falls on the response, never on
    latent pads [ours, as Mirage].
    """
    # from the headers: no pixel is decoded to build a prompt
    grids = [image_grid(processor, image) for image in row["images"]]
    ids = prompt_ids(vlm, tokenizer, processor, row, grids)
    labels = [IGNORE] * len(ids)
    if response is not None:
        # K pads, which `embed` fills with latents
        span = LATENT_START + LATENT_PAD * K + LATENT_END
        text = response.replace(LATENT_SPAN, span) + tokenizer.eos_token
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        # what a pad stands for is no word: the latent loss is its target
        latent = tokenizer.convert_tokens_to_ids(LATENT_PAD)
        ids += answer
        labels += [IGNORE if t == latent else t for t in answer]
    ids = torch.tensor(ids)
    return {
        "ids": ids,
        "labels": torch.tensor(labels),
        "pos": positions(vlm, ids, grids),
        "grids": grids,
        "images": row["images"],
    }


def chat_messages(row):
    """A row's question as a chat; without `system` in the row the template's own stands."""
    content = []
    for n, piece in enumerate(text_between_images(row)):
        if n > 0:
            content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece})
    messages = [{"role": "user", "content": content}]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def text_between_images(row):
    """The pieces of a row's text, some of them empty: an image stands between each two."""
    text, n_images = question_text(row), len(row["images"])
    # in an option a mark is text, "A. <image>", unless all images are options
    options_are_images = n_images > 1 and text.count(IMAGE_MARK) == n_images
    marked = text if options_are_images else row["question"]
    pieces = marked.split(IMAGE_MARK)
    if len(pieces) != n_images + 1:  # no marks, or some that are text: images before the text
        pieces = [""] * n_images + [marked]
    after = text[len(marked) :]  # options and instruction, which follow the question
    return [*pieces[:-1], pieces[-1] + after]


def prompt_ids(vlm, tokenizer, processor, row, grids):
    """Ids of the chat prompt, an image pad for each embedding of an image."""
    chat = chat_messages(row)
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    # the template writes one pad per image; the tower's merger leaves t * h * w / 4 embeddings
    pad, merged = vlm.config.image_token_id, processor.merge_size**2
    n_tokens = iter([math.prod(grid) // merged for grid in grids])
    ids = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        ids += [pad] * next(n_tokens) if token == pad else [token]
    return ids


def image_grid(processor, source):
    """The (t, h, w) patch grid that the processor will make of an image, from its header alone."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    patch, cell = processor.patch_size, processor.patch_size * processor.merge_size
    limits = processor.size["shortest_edge"], processor.size["longest_edge"]
    width, height = image_size(source)
    h, w = smart_resize(height, width, cell, *limits)
    return 1, h // patch, w // patch


def positions(vlm, ids, grids):
    """mRoPE positions (3, T) by HF's own rule; latent pads count as text [ours, as Mirage]."""
    if not grids:
        return torch.arange(len(ids)).expand(3, -1)
    # 1: image, 0: text. Without this argument HF gives images 1-D positions, and no error.
    # Consecutive image positions are one image: the template puts a text token between two
    is_image = (ids == vlm.config.image_token_id).int()  # (T)
    pos, _ = vlm.model.get_rope_index(ids[None], is_image[None], torch.tensor(grids))
    return pos[:, 0]


def embed(vlm, ids, vision=None, latents=None, latent_id=None):
    """Input embeddings (B, T, d) of ids (B, T).

    `vision` (N, d) stands at image pads, `latents` (M, d) at latent pads, both in reading order.
    """
    x = vlm.model.language_model.embed_tokens(ids)
    for token, v in ((vlm.config.image_token_id, vision), (latent_id, latents)):
        if v is not None:
            # filled row by row, in the order of v
            at = (ids == token)[..., None]  # (B, T, 1)
            x = x.masked_scatter(at, v.to(x.dtype))
    return x


# --------------------------------------------------------------------------------------------------
# what the tower sees


def pixels_of(processor, image):
    """The pixels (patches, 1176) that the tower reads, of what `open_image` takes."""
    return processor(images=[open_image(image)], return_tensors="pt")["pixel_values"]


def encode_pixels(vlm, processor, pixels, grids):
    """Merged embeddings, a list of (h*w/4, d) in reading order, of n images: grids (n, 3)."""
    tower = vlm.model.visual
    pixels = pixels.to(tower.device, tower.dtype)
    # pooler_output is in reading order; last_hidden_state would be in the order of windows
    v = tower(pixels, grid_thw=grids.to(tower.device)).pooler_output
    # the merger makes one embedding of each 2 x 2 patches
    sizes = grids.prod(-1) // processor.merge_size**2
    return list(v.split(sizes.tolist()))


def encode_images(vlm, processor, images, do_resize=True):
    """Merged embeddings of PIL images, as above, and grids (n, 3).

    do_resize: to whole 28 px cells within the processor's pixel limits; False: they are whole.
    """
    inputs = processor(images=images, do_resize=do_resize, return_tensors="pt")
    grids = inputs["image_grid_thw"]
    return encode_pixels(vlm, processor, inputs["pixel_values"], grids), grids


def grid_features(vlm, processor, images, K, mode):
    """The auxiliary features v of PIL images: (n, K, d) in reading order, K a square [ours].

    pool: encode each at its own resolution, arrange the merged tokens as their h x w grid,
    average-pool to the square.
    resize: resize the image so that its merged grid is the square already.
    """
    side, m = math.isqrt(K), processor.merge_size
    if mode == "resize":
        pixels = side * processor.patch_size * m
        images = [image.resize((pixels, pixels), Image.BICUBIC) for image in images]
    vision, grids = encode_images(vlm, processor, images, do_resize=mode != "resize")
    features = []
    for v, (_, h, w) in zip(vision, grids.tolist()):
        # the grid counts patches; the merger made one embedding of m x m of them
        plane = v.float().T.view(1, -1, h // m, w // m)  # (1, d, h, w)
        square = F.adaptive_avg_pool2d(plane, side)[0]  # (d, side, side)
        features.append(square.flatten(1).T)
    return torch.stack(features)


def real_features(folder, vlm):
    """A function of PIL images that gives their features (n, K, d), on the CPU.

    They are made as the targets of the folder's head were: fit_pca.py's mode and pixel limits,
    which may differ from those of the questions' images. None for a head without targets.
    """
    meta = meta_of_targets(folder)
    if not meta:
        return None
    processor = load_processor(folder, int(meta["min_pixels"]), int(meta["max_pixels"]))
    K = int(meta["K"])

    @torch.inference_mode()
    def features(images):
        return grid_features(vlm, processor, images, K, meta["mode"]).cpu()

    return features


def meta_of_targets(folder):
    """What a folder's head file says of the targets that its head was trained on; {} without.

    That is, beside what `save_head` writes: how fit_pca.py made them (mode, min_pixels,
    max_pixels), and where the bank of their pictures lies (bank, targets).
    """
    path = Path(folder) / HEAD_FILE
    if not path.exists():
        return {}
    meta = read_safetensors(path)[1]
    head = HEADS.get(meta.get("kind"))
    known = {"mode", "min_pixels", "max_pixels"} <= meta.keys()
    return meta if known and head and head.targets_fed else {}


def spread(v):
    """Variance over mean squared norm of each image's features v (n, K, d): 0 for a blank image."""
    if v.shape[1] == 1:
        return torch.ones(len(v))  # one latent per image has no spread to judge by
    # in bfloat16 the spread of nearly equal features is lost
    v = v.float()
    variance = (v - v.mean(1, keepdim=True)).pow(2).sum(-1).mean(1)
    energy = v.pow(2).sum(-1).mean(1)
    return (variance / energy).nan_to_num(0)
