"""Ask a trained model about images, watch the answer come, and look at what its latents resemble.

Needs only the model folder. A latent span prints as ⟨latent xK⟩. `--show file.png` draws, for each latent, where in the
query images its nearest vision embeddings are (cosine, each panel from its lowest to its highest); `--latents
file.safetensors` saves what was fed.

    python infer.py --images=board.png --question="Start at nw. Moves: mirror. ..." --show=out/latents.png
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from data import (
    RESERVED,
    check_choices,
    load_examples,
    open_image,
    pick_device,
    read_safetensors,
    start,
    write_then_rename,
)
from generate import INTERVENTIONS, generate, load_latents_file, make_prompts, save_latents_file
from model import (
    HEAD_FILE,
    encode_images,
    grid_features,
    latent_ids,
    load_head,
    load_processor,
    load_vlm,
)

# ---------------------------------------------------------------------------------------------------
model = "out/gap"
images = "out/toy/test/3.png"  # several: a.png,b.png
question = ""  # "": the question of out/toy/test.jsonl that goes with the image
show = ""  # file.png: where the latents look
latents = ""  # file.safetensors: the latents
max_new_tokens = 256
temperature, top_p = 0.0, 1.0
seed = 12345
intervention = "clean"  # clean zero noise mean shuffle oracle oracle_pca
aux = ""  # for oracle: the auxiliary image(s), a.png,b.png
donor = ""  # for shuffle: a latents.safetensors of another example
latent_size = (
    10  # most latents a span of a checkpoint with Monet's tokens and no head file [Monet: 10 to 16]
)
ema_beta = 0.0  # > 0: EMA norm calibration
min_pixels, max_pixels = 56 * 56, 1280 * 28 * 28
dtype = "float32"  # 7B: bfloat16
# ---------------------------------------------------------------------------------------------------


def heat_map(latent, vision, grid, size):
    """Cosine of a latent (d) with an image's merged embeddings (h*w, d) as an (size) greyscale image, 0 to 255."""
    cosine = F.cosine_similarity(latent[None], vision.float(), dim=-1).view(1, 1, *grid)
    cosine = (cosine - cosine.min()) / (cosine.max() - cosine.min()).clamp(min=1e-6)
    up = F.interpolate(cosine, size=size[::-1], mode="bicubic", align_corners=False).clamp(0, 1)
    return Image.fromarray((up[0, 0] * 255).byte().numpy())


def draw_latents(path, found, pictures, visions, grids, K):
    """Write a grid of panels, one a latent: the query images, darkened where the cosine is low."""
    height = 140
    pictures = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    width, columns = sum(p.width for p in pictures) + 8, math.isqrt(K)
    canvas = Image.new(
        "RGB", (columns * width + 8, math.ceil(len(found) / columns) * (height + 22) + 8), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for i, latent in enumerate(found):
        x, y = 8 + (i % columns) * width, 4 + (i // columns) * (height + 22)
        best = max(
            float(F.cosine_similarity(latent[None], v.float(), dim=-1).max()) for v in visions
        )
        draw.text((x, y), f"latent {i + 1}: max cosine {best:.2f}", fill="black")
        for picture, v, grid in zip(pictures, visions, grids):
            dark = Image.blend(picture, Image.new("RGB", picture.size, "black"), 0.75)
            canvas.paste(
                Image.composite(picture, dark, heat_map(latent, v, grid, picture.size)), (x, y + 14)
            )
            x += picture.width
    write_then_rename(path, lambda p: canvas.save(p, format="PNG"))


def toy_question(path):
    """The question of a toy image, from the JSONL beside its folder."""
    data = Path(path).parent.parent / f"{Path(path).parent.name}.jsonl"
    for row in load_examples(data, training=False) if data.exists() else ():
        if Path(row["images"][0]).resolve() == Path(path).resolve():
            return row["question"]
    raise SystemExit("infer.py needs --question")


def main():
    check_choices(globals(), intervention=INTERVENTIONS, dtype=("float32", "bfloat16"))
    device = pick_device()
    vlm, tokenizer = load_vlm(model, getattr(torch, dtype), device)
    processor, head = (
        load_processor(model, min_pixels, max_pixels),
        load_head(model, vlm, tokenizer, latent_size),
    )
    if head is None and (intervention != "clean" or show or latents):
        raise SystemExit(f"{model} has no {HEAD_FILE}: it writes no latents")
    paths = [p for p in images.split(",") if p]
    asked = question or toy_question(paths[0] if paths else "")
    if found := RESERVED.search(asked):
        raise SystemExit(f"--question contains the reserved token {found[0]!r}")
    prompts = make_prompts(vlm, tokenizer, processor, [{"images": paths, "question": asked}])

    fed = None
    if intervention.startswith("oracle"):
        if not aux:
            raise SystemExit(f"{intervention} feeds the features of --aux=image.png")
        mode = read_safetensors(Path(model) / HEAD_FILE, ())[1]["mode"]
        with torch.inference_mode():
            fed = [
                grid_features(
                    vlm, processor, [open_image(p) for p in aux.split(",")], head.K, mode
                ).cpu()
            ]
    if intervention == "shuffle":
        if not donor:
            raise SystemExit(
                "shuffle feeds the latents of --donor=latents.safetensors, another example's"
            )
        fed = [load_latents_file(donor, head)]

    start, pad, end = latent_ids(tokenizer)
    text, printed, written = [], 0, 0

    def stream(rows, tokens, x, h):
        nonlocal printed, written
        t = int(tokens[0])
        if t == pad:
            written += 1
        elif t == end:
            print(f"⟨latent x{written}⟩", end="", flush=True)
            written = 0
        elif t not in (start, tokenizer.eos_token_id, tokenizer.pad_token_id):
            text.append(t)
            so_far = tokenizer.decode(text)
            if not so_far.endswith("\ufffd"):  # half of a character: wait for the rest
                print(so_far[printed:], end="", flush=True)
                printed = len(so_far)

    print(f"{asked}\n")
    ((answer,),) = generate(
        vlm,
        head,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seeds=[seed],
        intervention=intervention,
        fed=fed,
        ema_beta=ema_beta,
        on_step=stream,
    )
    print()
    found = answer["latents"]
    if (show or latents) and not len(found):
        print("the model opened no latent span here: nothing to show or save")
        return
    if latents:
        save_latents_file(latents, found, head)
        print(f"wrote {latents}: {len(found)} latents")
    if show:
        if not paths:
            raise SystemExit("--show needs a query image")
        pictures = [open_image(p) for p in paths]
        with torch.inference_mode():
            visions, grids = encode_images(vlm, processor, pictures)
        grids = [
            (h // processor.merge_size, w // processor.merge_size) for _, h, w in grids.tolist()
        ]
        draw_latents(show, found, pictures, [v.cpu() for v in visions], grids, head.K)
        print(f"wrote {show}")


if __name__ == "__main__":
    start(main)
