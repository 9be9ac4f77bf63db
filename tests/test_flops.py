"""The arithmetic of a step, against torch's own count of it."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flops import amounts, flops_each, rates
from model import IGNORE


def test_flops_are_what_torch_counts(loaded):
    """The formula, against torch's count of every product of a forward and backward."""
    vlm, _, _ = loaded
    vlm.set_attn_implementation("eager")  # products that are counted one by one
    vlm.model.visual.requires_grad_(False)
    each, config = flops_each(vlm), vlm.config
    T = 40
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(T)[None]
        vlm(input_ids=ids, labels=ids).loss.backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    # every token has logits here, and eager attention computes the masked half as well
    assert counted["aten.mm"] + counted.get("aten.addmm", 0) == T * (
        each["tokens"] + each["labels"]
    )
    assert counted["aten.bmm"] == 2 * T * T * each["pairs"]

    m, vision = config.vision_config.spatial_merge_size, config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    with FlopCounterMode(display=False) as counter:
        vlm.model.visual(torch.zeros(64, width), grid_thw=torch.tensor([[1, 8, 8]]))
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = counted.get("aten.mm", 0) + counted.get("aten.addmm", 0)
    assert products == 64 / m**2 * each["image_tokens"]


def test_amounts_are_those_of_all_examples():
    vlm = SimpleNamespace(config=SimpleNamespace(image_token_id=7))
    ids, labels = torch.tensor([7, 7, 1, 2, 3]), torch.tensor([IGNORE] * 3 + [2, 3])
    examples = [{"ids": ids, "labels": labels}, {"ids": ids[:2], "labels": labels[:2]}]
    found = amounts(examples, vlm)
    assert found == {"tokens": 7, "pairs": 29, "labels": 2, "image_tokens": 4}


@pytest.mark.parametrize(
    "gpu, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 0),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GB200", 0),
        ("Tesla T4", 0),
    ],
)
def test_mfu_is_of_a_known_gpus_peak(monkeypatch, gpu, peak):
    """Over all ranks, in bfloat16; of another GPU, another dtype or a CPU there is none."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    monkeypatch.setenv("WORLD_SIZE", "8")
    amount, each = {"tokens": 1000, "pairs": 10}, {"tokens": 2e12, "pairs": 0}
    cuda = torch.device("cuda")
    found = rates(amount, each, 0.5, cuda, "bfloat16")
    assert found["tokens_per_s"] == 2000 and found["flops"] == 2e15
    assert found.get("mfu", 0) == (4e15 / (8 * peak) if peak else 0)
    assert "mfu" not in rates(amount, each, 0.5, torch.device("cpu"), "bfloat16")
    assert "mfu" not in rates(amount, each, 0.5, cuda, "float32")
