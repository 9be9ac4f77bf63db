"""Patch features of every class of encoder, against slices by hand."""

import json
import shutil

import pytest
import torch
from conftest import PIXELS, noise
from PIL.Image import Resampling
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from encoders import CLIP, HALF, IMAGENET, FolderEncoder, OwnEncoder
from images import open_image
from model import encode_images, load_processor, load_vlm

close = torch.testing.assert_close
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = SIZE | {"intermediate_size": 64}
VISION = {"siglip": SMALL | {"image_size": 64, "patch_size": 16}}
VISION["clip"] = SMALL | {"image_size": 56, "patch_size": 14}
TEXT = SMALL | {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}

# by name: a model, the tokens before its patches, its grid's side, its pixels' mean and deviation
ENCODERS = {
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SMALL, num_register_tokens=4)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZE, image_size=518, patch_size=14)),
    "dinov2 with registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZE, image_size=518, patch_size=14)
    ),
    "siglip vision": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION["siglip"])),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION["siglip"])),
    "clip vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION["clip"])),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION["clip"])),
}
FACTS = {
    "dinov3": (5, 14, IMAGENET),
    "dinov2": (1, 16, IMAGENET),
    "dinov2 with registers": (5, 16, IMAGENET),
    "siglip vision": (0, 4, HALF),
    "siglip": (0, 4, HALF),
    "clip vision": (1, 4, CLIP),
    "clip": (1, 4, CLIP),
}


def saved_encoder(folder, name):
    torch.manual_seed(0)
    model = ENCODERS[name]().eval()
    model.save_pretrained(folder)
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_the_patches_in_their_places(tmp_path, name):
    model = saved_encoder(tmp_path, name)
    encoder = FolderEncoder(tmp_path, torch.float32, "cpu")
    first, side, (mean, std) = FACTS[name]
    images = [noise(1, size=(90, 70)), noise(2, size=(40, 120))]
    x = encoder.pixels(images)

    # the pixels, one by one: a squeezed square, scaled and normalised by channel
    size = encoder.side
    for i, image in enumerate(images):
        kind = Resampling.BILINEAR if name == "dinov3" else Resampling.BICUBIC
        square = image.resize((size, size), kind)
        for row, column, channel in ((0, 0, 0), (size - 1, 3, 1), (7, size - 2, 2)):
            level = square.getpixel((column, row))[channel] / 255
            wanted = (level - mean[channel]) / std[channel]
            assert float(x[i, channel, row, column]) == pytest.approx(wanted, abs=1e-5)

    with torch.no_grad():
        states = model(pixel_values=x).last_hidden_state
    assert states.shape[1] == first + side * side
    features = encoder.features(x)
    assert encoder.width == 32
    for i in range(2):
        assert features[i].shape == (side, side, 32)
        for row in range(side):
            for column in range(side):
                close(features[i][row, column], states[i, first + row * side + column])
    assert not features[0].requires_grad
    close(encoder.features(x), features)  # no randomness of a training mode


def test_a_folders_own_pixel_statistics_win(tmp_path):
    saved_encoder(tmp_path, "dinov2")
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    encoder = FolderEncoder(tmp_path, torch.float32, "cpu")
    image = noise(1)
    red = image.resize((224, 224), Resampling.BILINEAR).getpixel((5, 9))[0] / 255
    x = encoder.pixels([image])
    assert float(x[0, 0, 9, 5]) == pytest.approx((red - 0.1) / 0.5, abs=1e-5)


def test_own_features_are_the_towers(base, world):
    vlm, _ = load_vlm(base)
    processor = load_processor(base, *PIXELS)
    encoder = OwnEncoder(vlm, processor)
    images = [open_image(world / "train" / name) for name in ("0.png", "0-aux.png", "1.png")]
    with torch.no_grad():
        vision, grids = encode_images(vlm, processor, images)
    features = encoder.features(encoder.pixels(images))
    assert [x.shape[:2] for x in features] == [(3, 3), (2, 2), (3, 3)]
    for x, v, (_, h, w) in zip(features, vision, grids.tolist()):
        for row in range(h // 2):
            for column in range(w // 2):
                close(x[row, column], v[row * (w // 2) + column])


def without(folder, names):
    weights = load_file(folder / "model.safetensors")
    for name in list(weights):
        if names in name:
            del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_kind(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))


def with_nan(folder):
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BROKEN = {
    "a weight gone": (lambda p: without(p, "layer.1.norm1"), "lacks weights"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "not a usable encoder"),
    "cut off": (lambda p: (p / "model.safetensors").write_bytes(b"abc"), "not a usable encoder"),
    "another kind": (lambda p: with_kind(p, "siglip2_vision_model"), "siglip2_vision_model"),
    "a NaN": (with_nan, "not finite"),
    "no config": (lambda p: (p / "config.json").unlink(), "no such file"),
    "half a preprocessor_config.json": (
        lambda p: (p / "preprocessor_config.json").write_text('{"image_mean": ['),
        "not JSON",
    ),
    "no folder": (shutil.rmtree, "no such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_named(tmp_path, name):
    folder = tmp_path / "encoder"
    saved_encoder(folder, "dinov2")
    spoil, said = BROKEN[name]
    spoil(folder)
    with pytest.raises(SystemExit, match=said) as e:
        FolderEncoder(folder, torch.float32, "cpu")
    assert str(folder) in str(e.value) and "\n" not in str(e.value)
