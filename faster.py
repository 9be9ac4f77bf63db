"""How do the same weights run faster?

Modules that take the place of stock ones in a model that is loaded. They hold its own parameters
under the names that these had: a folder that is written is stock.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

# "flash" in the name is how transformers knows to pass all windows in one call
TOWER_ATTENTION = "flash_windows"
CHUNK = {"cpu": 2**19, "cuda": 2**23}  # elements of q per call: fit a cache, fill a GPU
SMALL_WINDOW = 256  # patches up to which two large products beat SDPA's CPU kernel


def quicken(vlm):
    """Give a stock model modules that are faster, of the same weights: nothing of it is saved."""
    quicken_tower(vlm.model.visual)
    norms_of_one_kernel(vlm.model.language_model)


def quicken_tower(tower):
    """Our attention, patch embedding and norms."""
    from transformers import AttentionInterface

    AttentionInterface.register(TOWER_ATTENTION, tower_attention)
    tower.config._attn_implementation = TOWER_ATTENTION
    tower.patch_embed.proj = PatchEmbedding(tower.patch_embed.proj)
    norms_of_one_kernel(tower)


def norms_of_one_kernel(module):
    """Put torch's RMSNorm, with the same weights, in place of the stock one, which is eight.

    On an H200 that is 7 % of a decode step at 7B's shape, and 5 % of a training step.
    """
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    Norm = modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, Norm):
                one = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                one.weight = norm.weight
                setattr(parent, name, one)


class PatchEmbedding(nn.Module):
    """The tower's convolution. A patch is as large as its kernel: one product of all patches.

    The weight is the convolution's own parameter, under the name and in the shape that it had.
    """

    def __init__(self, conv):
        super().__init__()
        self.weight = conv.weight  # (d, 3, 2, 14, 14)

    def forward(self, patches):
        """(N, d) of pixels (N, 3, 2, 14, 14)."""
        # 9,216 patches, d = 1,280, two cores: a quarter of what conv3d takes
        return F.linear(patches.flatten(1), self.weight.flatten(1))


# The stock SDPA path of the tower calls attention once per window, over a thousand times per layer
# for a 4K image. Nearly all windows are of one length, so ours takes those of a length in one call.


@lru_cache(maxsize=2)  # a forward has two of them, its windows and its images: a device sync each
def equal_windows(cu_seqlens, most):
    """Batches of windows of one length, from the bounds of all windows (windows + 1).

    Returns [(length, at)]: `at` picks whole windows of at most `most` patches together (one window,
    where that is longer), as a slice where they are neighbours, else as indices.
    """
    bounds = cu_seqlens.cpu()
    starts, lengths = bounds[:-1], bounds.diff()
    batches = []
    for length in lengths.unique().tolist():
        per_call = max(1, most // length)
        for part in starts[lengths == length].split(per_call):
            # neighbours: a view; windows of other lengths between them: a copy
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
    """Attention within each window of q, k, v (1, heads, N, D).

    Returns (1, N, heads, D) and no weights. Attention over a whole image is one window of it.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    on_cpu = q.device.type == "cpu" and q.dtype == torch.float32 and not dropout
    out = torch.empty_like(q)
    for length, at in equal_windows(cu_seq_lens_q, CHUNK[q.device.type] // q[0].numel()):
        # (windows, heads, length, D)
        q_w, k_w, v_w = (x[at].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        if on_cpu and length <= SMALL_WINDOW:
            o = ((q_w * scaling) @ k_w.mT).softmax(-1) @ v_w
        else:
            o = F.scaled_dot_product_attention(q_w, k_w, v_w, scale=scaling, dropout_p=dropout)
        out[at] = o.transpose(1, 2).flatten(0, 1)
    return out[None], None
