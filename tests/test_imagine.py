"""What picture did the latents draw? The patch whose target is nearest, where it stands."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import noise, run, saved
from PIL import Image
from safetensors.torch import load_file, save_file

from data import load_examples
from files import read_safetensors
from imagine import TILE, bank_of, imagine, load_bank, nearest, save_bank, tiles_of
from model import HEAD_FILE


def colours(side):
    """A picture of side x side fields, each of its own colour."""
    picture = Image.new("RGB", (side, side))
    picture.putdata([(40 * x, 40 * y, 200) for y in range(side) for x in range(side)])
    return picture


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_tiles_are_the_fields_in_reading_order(side):
    big = colours(side).resize((side * TILE, side * TILE), Image.NEAREST)
    tiles = tiles_of(big, side * side)
    assert tiles.shape == (side * side, TILE, TILE, 3)
    for i, tile in enumerate(tiles):
        colour = colours(side).getpixel((i % side, i // side))
        assert (tile == torch.tensor(colour)).all()


def test_nearest_is_the_nearest_of_a_loop(monkeypatch):
    """Whatever lies in one chunk; a latent of no length has no nearest, and no NaN."""
    torch.manual_seed(0)
    v, latents = torch.randn(37, 5).bfloat16(), torch.randn(6, 5)
    latents[2] = 0
    for chunk in (1, 5, 64):
        monkeypatch.setattr("imagine.CHUNK", chunk)
        cosine, at = nearest(latents, v)
        for n, latent in enumerate(latents):
            every = [float(torch.cosine_similarity(latent, x.float(), dim=0)) for x in v]
            assert cosine[n] == pytest.approx(max(every), abs=1e-6)
            assert every[at[n]] == pytest.approx(max(every), abs=1e-6)


def test_a_pictures_own_targets_draw_it(stages):
    """Latents that are the targets of a picture draw this picture, in its shape and colours."""
    bank = bank_of(stages["gap"])
    assert len(bank["pictures"]) == len(bank["v"])
    rows = {row["id"]: row for row in load_examples(stages["world"] / "train.jsonl")}
    every = [[id, i] for id, row in rows.items() for i in range(len(row["aux_images"]))]
    assert bank["pictures"] == every  # the toy has fewer examples than n_bank
    for i in (0, len(bank["v"]) // 2, -1):
        picture, cosine = imagine(bank["v"][i].float() * 3, bank)  # length does not count
        assert cosine.min() > 0.999
        id, span = bank["pictures"][i]
        real = Image.open(rows[id]["aux_images"][span])
        assert picture.width / picture.height == real.width / real.height
        # patch by patch: two equal panels have equal targets
        want = tiles_of(real.convert("RGB"), len(cosine)).float()
        assert (tiles_of(picture, len(cosine)).float() - want).abs().mean() < 8


def test_a_drawing_has_the_shape_of_its_pictures():
    v = torch.eye(8).view(2, 4, 8).bfloat16()
    tiles = torch.zeros(2, 4, TILE, TILE, 3, dtype=torch.uint8)
    bank = {"v": v, "tiles": tiles, "aspect": torch.tensor([3.0, 1 / 3])}
    for latents, (width, height) in ((v[0], (6, 2)), (v[1], (2, 6)), (v[:, :2], (2, 2))):
        picture, _ = imagine(latents.reshape(4, 8), bank)
        assert picture.width / picture.height == pytest.approx(width / height, rel=0.05)


def test_a_bank_is_found_where_both_were_moved(stages, tmp_path, monkeypatch):
    """A copy of model and PCA is whole; the model alone takes the one that it was made with."""
    monkeypatch.setattr(
        sys.modules["imagine"], "load_bank", lambda path, targets: Path(path).resolve()
    )
    shutil.copytree(stages["gap"], tmp_path / "gap")
    assert bank_of(tmp_path / "gap") == stages["pca"] / "bank.safetensors"
    shutil.copytree(stages["pca"], tmp_path / "pca")
    assert bank_of(tmp_path / "gap") == tmp_path / "pca" / "bank.safetensors"
    # another run's lies beside the model now: its own is where it was
    tensors, meta = read_safetensors(stages["pca"] / "bank.safetensors")
    save_file(tensors, tmp_path / "pca" / "bank.safetensors", meta | {"targets": "others"})
    assert bank_of(tmp_path / "gap") == stages["pca"] / "bank.safetensors"


def test_a_bank_that_does_not_belong(stages, tmp_path):
    """Not there, of other targets, or of another shape: one sentence, before weights are loaded."""
    args = [f"--model={stages['gap']}", "--show=x.png", "--question=?", "--images=toy/base"]
    args[-1] = f"--images={stages['world']}/test/0.png"
    text = run("infer.py", *args, f"--bank={tmp_path}/bank.safetensors", ok=False)
    assert f"{tmp_path}/bank.safetensors: no such file; fit_pca.py leaves it" in text
    tensors = load_file(stages["pca"] / "bank.safetensors")
    meta = {"targets": "others", "pictures": "[]"}
    save_file(tensors, tmp_path / "others", meta)
    with pytest.raises(SystemExit, match="a bank of other targets than the model was trained on"):
        bank_of(stages["gap"], tmp_path / "others")
    save_file(load_file(stages["gap"] / HEAD_FILE), tmp_path / "head")
    with pytest.raises(SystemExit, match="head: lacks"):
        bank_of(stages["gap"], tmp_path / "head")
    with pytest.raises(SystemExit, match="no bank goes with them"):
        bank_of(stages["base"], tmp_path / "others")


def test_a_bank_knows_how_wide_a_picture_is(tmp_path):
    saved(tmp_path / "wide.png", noise(0, (112, 56)))
    row = {"id": "a", "aux_images": [str(tmp_path / "wide.png")]}
    save_bank(tmp_path / "bank", [(row, torch.randn(1, 4, 8))], 4, {"targets": "t"})
    assert load_bank(tmp_path / "bank", "t")["aspect"].tolist() == [2.0]
