"""How much arithmetic does a training step need, and what share of a GPU's peak is that?"""

import re
from collections import Counter

import torch

from launch import rank_and_world
from model import IGNORE

# bfloat16 FLOP/s of a GPU without sparsity (NVIDIA's data sheets), by what stands in its name
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def amounts(examples, vlm):
    """What the FLOPs of a step depend on, summed over its examples."""
    found = Counter()
    for example in examples:
        ids = example["ids"]  # (T)
        found["tokens"] += len(ids)
        found["pairs"] += len(ids) ** 2
        found["labels"] += int((example["labels"] != IGNORE).sum())
        found["image_tokens"] += int((ids == vlm.config.image_token_id).sum())
    return found


def flops_each(vlm):
    """{amount: FLOPs that a step of training needs for each of it}; a product and a sum are two.

    These are model FLOPs: what is run twice (activation checkpointing, a method's other passes)
    counts once. The tower's attention, about 1 % at 7B, and all vectors are left out.
    """

    def weights(module):
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    text, tower = vlm.config.text_config, vlm.model.visual
    patches = vlm.config.vision_config.spatial_merge_size**2  # an image token
    patchwise = weights(tower.patch_embed) + weights(tower.blocks)
    trained = 3  # a backward is two forwards: by the weights, and by the inputs
    return {
        "tokens": trained * 2 * weights(vlm.model.language_model.layers),
        # q k^T and the sum of v: four a pair and dimension, and half the pairs are masked
        "pairs": trained * 2 * text.hidden_size * text.num_hidden_layers,
        "labels": trained * 2 * vlm.lm_head.weight.numel(),
        "image_tokens": 2 * (patches * patchwise + weights(tower.merger)),  # the tower is frozen
    }


def peak_flops(gpu):
    """The bfloat16 FLOP/s that a GPU of this name can do; 0 for one that is not known."""
    for name, peak in PEAKS.items():
        if re.search(rf"\b{name}\b", gpu):
            return peak
    return 0


def rates(amount, each, seconds, device, dtype):
    """Tokens per second and model FLOPs of a step, over all ranks; on a known GPU, its MFU."""
    flops = sum(each[name] * amount[name] for name in each)
    found = {"tokens_per_s": amount["tokens"] / seconds, "flops": flops}
    # the peak is bfloat16's
    if device.type == "cuda" and dtype == "bfloat16":
        peak = rank_and_world()[1] * peak_flops(torch.cuda.get_device_name(device))
        if peak:
            found["mfu"] = flops / seconds / peak
    return found
