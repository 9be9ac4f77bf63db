"""What do frozen vision encoders see in a picture?

Patch features of local Hugging Face folders (DINOv3, DINOv2 with and without registers, SigLIP,
fixed-size SigLIP 2, CLIP), or of `own`, the model's own vision tower, which needs nothing beside
the checkpoint. Class tokens and registers are left out.

Shape letters: n pictures, P patches, z encoder width.
"""

from pathlib import Path

import numpy as np
import torch
from PIL.Image import Resampling

from files import check_finite, read_json
from model import encode_pixels, read_weights, said_of

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# fmt: off
# by model_type: mean and deviation of its pixels and how it is resized, where the folder's
# preprocessor_config.json does not say, and the side of the square that it sees (0: the only one
# that it takes, its config's)
KINDS = {
    "dinov3_vit":            (IMAGENET, Resampling.BILINEAR, 224),
    "dinov2":                (IMAGENET, Resampling.BICUBIC, 224),
    "dinov2_with_registers": (IMAGENET, Resampling.BICUBIC, 224),
    "siglip":                (HALF, Resampling.BICUBIC, 0),  # of a whole model its vision part
    "siglip_vision_model":   (HALF, Resampling.BICUBIC, 0),
    "clip":                  (CLIP, Resampling.BICUBIC, 0),
    "clip_vision_model":     (CLIP, Resampling.BICUBIC, 0),
}
# fmt: on


class FolderEncoder:
    """A frozen encoder from a folder. Not a submodule: no optimizer, shard or export meets it."""

    def __init__(self, folder, dtype, device):
        """Raises SystemExit if the model type is not in KINDS, or if weights are missing."""
        config = Path(folder) / "config.json"
        if not config.is_file():
            raise SystemExit(f"{config}: no such file; expected `own` or a folder of an encoder")
        kind = read_json(config).get("model_type")
        if kind not in KINDS:
            there = ", ".join(KINDS)
            raise SystemExit(f"{config}: model_type is {kind!r}, expected one of: {there}")
        from transformers import AutoModel

        with said_of(folder, "not a usable encoder"):
            whole, found = read_weights(AutoModel, folder, dtype)
        lacking = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
        if lacking:  # transformers fills what is missing with random numbers and goes on
            raise SystemExit(f"{folder}: lacks weights, the first {lacking[0]}")
        # .eval(): DINOv3 rescales its positions at random in training
        vision = getattr(whole, "vision_model", whole).eval().requires_grad_(False)
        for name, weight in vision.named_parameters():
            check_finite(weight, f"{folder}: {name}")
        self.module = vision.to(device)
        own = getattr(whole.config, "vision_config", whole.config)
        self.width, self.patch = own.hidden_size, own.patch_size
        (mean, std), resample, side = KINDS[kind]
        self.side = (side or own.image_size) // self.patch * self.patch
        file = Path(folder) / "preprocessor_config.json"
        if file.is_file():
            written = read_json(file)
            mean, std = written.get("image_mean", mean), written.get("image_std", std)
            resample = written.get("resample") or resample
        with said_of(folder, "no usable preprocessor_config.json"):
            self.resample = Resampling(resample)
        self.mean, self.std = np.array(mean), np.array(std)

    def pixels(self, images):
        """What `features` reads of n PIL images, on the CPU: (n, 3, side, side)."""
        # the whole picture, squeezed to a square as REPA's are: patches keep to their places
        squares = [image.resize((self.side, self.side), self.resample) for image in images]
        x = np.stack([np.asarray(square) for square in squares]) / 255
        x = (x - self.mean) / self.std
        return torch.from_numpy(x).float().permute(0, 3, 1, 2)

    @torch.no_grad()
    def features(self, pixels):
        """[(h, w, z)] of n pictures, patches in their places, without class token and registers."""
        weight = next(self.module.parameters())
        x = self.module(pixel_values=pixels.to(weight.device, weight.dtype)).last_hidden_state
        n_side = self.side // self.patch
        # in all of KINDS what is no patch stands before the patches
        patches = x[:, x.shape[1] - n_side**2 :]
        return list(patches.unflatten(1, (n_side, n_side)))


class OwnEncoder:
    """The model's own vision tower, which is frozen: merged embeddings at their own resolution."""

    def __init__(self, vlm, processor):
        self.vlm, self.processor = vlm, processor
        self.width = vlm.config.text_config.hidden_size

    def pixels(self, images):
        """What `features` reads of n PIL images, on the CPU."""
        return self.processor(images=images, return_tensors="pt")

    @torch.no_grad()
    def features(self, pixels):
        """[(h, w, z)] of n pictures in reading order; grids differ, z is the decoder's width."""
        grids, m = pixels["image_grid_thw"], self.processor.merge_size
        vision = encode_pixels(self.vlm, self.processor, pixels["pixel_values"], grids)
        return [v.view(h // m, w // m, -1) for v, (_, h, w) in zip(vision, grids.tolist())]
