"""How do the same weights run faster? Each module against the stock one that it stands for."""

from copy import deepcopy

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import faster
from model import load_vlm

close = torch.testing.assert_close


SIZES = {  # (t, h, w) in patches: windows are 8 x 8
    "one": [(1, 16, 24)],  # whole windows only
    "small": [(1, 2, 2)],
    "ragged": [
        (1, 18, 26),
        (1, 6, 6),
        (1, 2, 40),
        (1, 2, 2),
        (1, 26, 18),
        (1, 16, 16),
        (1, 34, 2),
        (1, 6, 6),
    ],
    "frames": [(3, 10, 14), (1, 10, 14)],
}


def two_towers(base, sizes, dtype=torch.float32):
    """Our tower and the stock one, pixels of noise and their grids."""
    grids = torch.tensor(SIZES[sizes])
    towers = load_vlm(base, dtype)[0].model.visual, stock_vlm(base, dtype).model.visual
    return (
        *towers,
        torch.randn(grids.prod(1).sum(), 1176, generator=torch.Generator().manual_seed(0)),
        grids,
    )


def stock_vlm(base, dtype=torch.float32):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=dtype).eval()


# 6,400 numbers are 100 patches: a group of windows takes several calls
@pytest.mark.parametrize("numbers", [faster.CHUNK["cpu"], 6400])
@pytest.mark.parametrize("sizes", SIZES)
def test_tower_equals_stock(base, sizes, numbers, monkeypatch):
    """Embeddings and all gradients, for sizes that are no multiples of a window, or smaller."""
    monkeypatch.setitem(faster.CHUNK, "cpu", numbers)
    ours, stock, pixels, grids = two_towers(base, sizes)
    found = []
    for tower in (ours, stock):
        x = pixels.clone().requires_grad_()
        v = tower(x, grid_thw=grids).pooler_output
        found.append((v, *torch.autograd.grad(v.sin().sum(), [x, *tower.parameters()])))
    for a, b in zip(*found):
        close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def test_tower_is_as_exact_as_stock_in_bfloat16(base):
    """It rounds elsewhere: both are equally far from the stock tower in float64."""
    ours, stock, pixels, grids = two_towers(base, "ragged", torch.bfloat16)
    pixels = pixels.bfloat16()
    a, b = (tower(pixels, grid_thw=grids).pooler_output for tower in (ours, stock))
    exact = stock.double()(pixels.double(), grid_thw=grids).pooler_output
    assert a.dtype == torch.bfloat16
    far, stock_far = ((x.double() - exact).norm().item() for x in (a, b))
    assert far < 1.05 * stock_far < 0.01 * exact.norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_embedded_as_by_the_convolution(base, dtype):
    """At 7B's width, pixels and weights of the order of the real ones; and its gradients."""
    torch.manual_seed(0)
    tower = stock_vlm(base).model.visual
    conv = torch.nn.Conv3d(3, 1280, (2, 14, 14), stride=(2, 14, 14), bias=False).to(dtype)
    tower.patch_embed.proj = conv
    faster.quicken_tower(tower)
    ours = tower.patch_embed.proj
    assert ours.weight is conv.weight and not isinstance(ours, torch.nn.Conv3d)
    pixels = torch.randn(50, 3, 2, 14, 14, dtype=dtype, requires_grad=True)
    found = []
    for embedding in (ours, conv):
        v = embedding(pixels).view(50, 1280)
        found.append((v, *torch.autograd.grad(v.float().sin().sum(), [pixels, conv.weight])))
    for a, b in zip(*found):
        one_rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
        close(a, b, rtol=0.0, atol=one_rounding * float(b.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_one_kernel_is_the_norm(base, dtype):
    """With its weights, and its gradients, no further from the exact ones than the stock norm's."""
    torch.manual_seed(0)
    stock = stock_vlm(base).model.language_model.norm
    torch.nn.init.normal_(stock.weight)
    holder = torch.nn.ModuleDict({"norm": deepcopy(stock).to(dtype)})
    weight = holder.norm.weight
    faster.norms_of_one_kernel(holder)
    assert holder.norm.weight is weight and type(holder.norm) is torch.nn.RMSNorm

    x, exact = 30 * torch.randn(7, len(weight), dtype=dtype), []
    for norm in (holder.norm, deepcopy(stock).to(dtype), deepcopy(stock).to(dtype).double()):
        y = x.to(norm.weight.dtype).requires_grad_()
        out = norm(y)
        exact.append((out, *torch.autograd.grad(out.double().sin().sum(), [y, norm.weight])))
    for ours, theirs, true in zip(*exact):
        far, stock_far = ((a.double() - true).norm().item() for a in (ours, theirs))
        assert far < 1.1 * stock_far + 1e-6 * true.norm().item()
        assert far < 0.05 * true.norm().item()


def test_windows_share_a_call(base, monkeypatch):
    """A window layer makes a call a length, not a window; so does a layer of whole images."""
    ours, stock, pixels, grids = two_towers(base, "ragged", torch.bfloat16)
    pixels = pixels.bfloat16()
    attention, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(q, *args, **kwargs):
        calls.append(q.shape)
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    stock(pixels, grid_thw=grids)
    one_by_one, n = (
        calls[:],
        sum(-(-h // 8) * -(-w // 8) for _, h, w in SIZES["ragged"]),
    )  # n windows, then 8 images
    calls.clear()
    ours(pixels, grid_thw=grids)
    assert sum(s[0] for s in calls) == len(one_by_one) == n + 8
    assert len(calls) == len({s[2] for s in one_by_one[:n]}) + len({s[2] for s in one_by_one[n:]})


def test_windows_are_taken_once():
    """Every patch is in one batch, in a window of its own bounds; neighbours are a slice."""
    lengths = torch.tensor([64] * 70 + [16, 64, 16, 5000, 4, 64, 64])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    patches, window = (
        torch.arange(int(bounds[-1])),
        torch.arange(len(lengths)).repeat_interleave(lengths),
    )
    seen = []
    for length, at in faster.equal_windows(bounds, 4096):
        taken = patches[at].view(-1, length)
        assert (window[taken] == window[taken[:, :1]]).all() and (
            lengths[window[taken[:, 0]]] == length
        ).all()
        assert len(taken) == 1 or taken.numel() <= 4096
        assert isinstance(at, slice) == bool((taken.flatten().diff() == 1).all())
        seen += taken.flatten().tolist()
    assert sorted(seen) == patches.tolist()


def test_saved_config_is_stock(base, tmp_path):
    """What quickens the tower is this process's: neither in a saved folder nor on the decoder."""
    vlm, stock = load_vlm(base)[0], stock_vlm(base)
    assert vlm.model.visual.config._attn_implementation == faster.TOWER_ATTENTION
    assert (
        vlm.model.language_model.config._attn_implementation
        == vlm.config._attn_implementation
        == "sdpa"
    )
    vlm.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert (tmp_path / "ours" / "config.json").read_text() == (
        tmp_path / "stock" / "config.json"
    ).read_text()
    again = stock_vlm(tmp_path / "ours")
    assert again.model.visual.config._attn_implementation == "sdpa"
    ours, theirs = vlm.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    pixels, grids = torch.randn(36, 1176), torch.tensor([[1, 6, 6]])
    close(*(m.model.visual(pixels, grid_thw=grids).pooler_output for m in (vlm, again)))
