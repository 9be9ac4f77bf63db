"""What picture did the latents draw? The nearest patches of training pictures, laid out as a grid.

A span's K latents stand for a sqrt(K) x sqrt(K) grid over an auxiliary image. For each we look up
the training target nearest to it by cosine, and show the patch that this target was made of.

The targets and patches that are searched are a *bank*, which fit_pca.py leaves beside its PCA:
  v       (p, K, d) bfloat16            the targets of p auxiliary images
  tiles   (p, K, TILE, TILE, 3) uint8   the patch of the image that each is of
  aspect  (p)                           width / height of the images
Its metadata names the targets that it is of, and the example and span of each image.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from files import check_there, metadata_of, read_safetensors, write_then_rename
from images import open_image
from model import meta_of_targets

TILE = 32  # pixels a side of a patch
CHUNK = 4096  # targets that are searched at once: 59 MB in float32 at d = 3584


# --------------------------------------------------------------------------------------------------
# the bank


def save_bank(path, examples, K, meta):
    """Write a bank of [(row, v)], the targets v (m, K, d) of a row's m auxiliary images."""
    tiles, aspect = [], []
    for row, _ in examples:
        for name in row["aux_images"]:
            picture = open_image(name)  # one at a time: two thousand photos would take 40 GB
            tiles.append(tiles_of(picture, K))
            aspect.append(picture.width / picture.height)
    tensors = {
        "v": torch.cat([v for _, v in examples]).contiguous(),
        "tiles": torch.stack(tiles),
        "aspect": torch.tensor(aspect),
    }
    names = [[row["id"], i] for row, _ in examples for i in range(len(row["aux_images"]))]
    meta = meta | {"pictures": json.dumps(names)}
    write_then_rename(path, lambda tmp: save_file(tensors, tmp, meta))


def bank_of(model, path=""):
    """The bank of a model folder: at `path`, or where the head file says that it lies.

    None for a head that was trained without targets: no picture goes with its latents. Raises
    SystemExit for a bank that is not there, or not its.
    """
    meta = meta_of_targets(model)
    if not meta:
        if path:
            raise SystemExit(f"{model}: its latents had no targets, so no bank goes with them")
        return None
    if not path:
        if "bank" not in meta:
            raise SystemExit(f"{model}: its head file names no bank; --bank=FILE does")
        # moved with the model, or left where it was, and another run's now lies beside the model
        beside = Path(model) / meta.get("bank_beside", meta["bank"])
        is_its = metadata_of(beside).get("targets") == meta.get("targets")
        path = beside if is_its else meta["bank"]
    check_there(path, "fit_pca.py leaves it beside its PCA; --bank=FILE names another place")
    return load_bank(path, meta.get("targets"))


def load_bank(path, targets):
    """The tensors of a bank, with `pictures`, the [id, span] that each picture is of.

    Raises SystemExit if it is not there, no bank, or of other targets than the head was trained on.
    """
    tensors, meta = read_safetensors(path, ("v", "tiles", "aspect"), ("targets", "pictures"))
    if meta["targets"] != targets:
        raise SystemExit(
            f"{path}: a bank of other targets than the model was trained on; run fit_pca.py again, "
            "or name the right one with --bank"
        )
    v, tiles, aspect = tensors["v"], tensors["tiles"], tensors["aspect"]
    if v.ndim != 3 or tiles.shape != (*v.shape[:2], TILE, TILE, 3) or aspect.shape != v.shape[:1]:
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        raise SystemExit(
            f"{path}: tensors of shapes {shapes}; expected v (p, K, d), tiles (p, K, {TILE}, "
            f"{TILE}, 3) and aspect (p)"
        )
    return tensors | {"pictures": json.loads(meta["pictures"])}


def tiles_of(picture, K):
    """The K patches (K, TILE, TILE, 3) that the K targets of a picture are of, in reading order."""
    side = math.isqrt(K)
    square = picture.resize((side * TILE, side * TILE), Image.BICUBIC)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    grid = pixels.view(side, TILE, side, TILE, 3)  # row of tiles, y, column of tiles, x, colour
    return grid.transpose(1, 2).reshape(K, TILE, TILE, 3)


# --------------------------------------------------------------------------------------------------
# what latents look like


def nearest(latents, v):
    """(cosine, index) of the vector of v (N, d) that is nearest to each latent (n, d)."""
    unit = F.normalize(latents.float(), dim=-1)
    best = torch.full((len(latents),), -math.inf)
    at = torch.zeros(len(latents), dtype=torch.long)
    # a bank of 7B is half a gigabyte: it is never whole in float32
    for start in range(0, len(v), CHUNK):
        part = F.normalize(v[start : start + CHUNK].float(), dim=-1)
        cosine, i = (unit @ part.T).max(1)
        nearer = cosine > best
        best[nearer], at[nearer] = cosine[nearer], start + i[nearer]
    return best, at


def imagine(latents, bank):
    """The picture that a span's K latents (K, d) draw, and the cosine of each with its patch (K).

    It has the shape of the pictures that its patches are of, in the mean.
    """
    v, tiles = bank["v"], bank["tiles"]
    cosine, at = nearest(latents, v.flatten(0, 1))
    side = math.isqrt(len(latents))
    found = tiles.flatten(0, 1)[at].view(side, side, TILE, TILE, 3)
    pixels = found.transpose(1, 2).reshape(side * TILE, side * TILE, 3)
    picture = Image.fromarray(pixels.numpy())
    aspect = bank["aspect"][at // v.shape[1]].log().mean().exp()  # of 2 and 1/2: 1
    width = max(1, round(float(aspect) * picture.height))
    return picture.resize((width, picture.height), Image.BICUBIC), cosine
