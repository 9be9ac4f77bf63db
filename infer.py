"""What does it answer, and what did it imagine?

Asks a trained model about images and prints the answer as it comes, a latent span as ⟨latent xK⟩.

Reads a model folder and images. Writes, if asked:
  --show=file.png             the picture that each span's latents draw (imagine.py), beside the
                              real one (--aux) and where in the query images they are found; it is
                              made of the bank that fit_pca.py left (--bank, if that has moved)
  --latents=file.safetensors  the latents that were fed, (m * K, d), m spans

    python infer.py
    python infer.py --images=board.png --question="Start at nw. Moves: mirror. ..." --show=where.png
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from data import Row, check_prompt_texts, check_text, load_examples, place_marks, question_text
from files import check_there, write_then_rename
from generate import (
    INTERVENTIONS,
    check_intervention,
    generate,
    load_latents_file,
    make_prompts,
    save_latents_file,
)
from images import open_image
from imagine import bank_of, imagine
from launch import check_apart, check_choices, names_in, pick_device, show_files, start
from model import (
    HEAD_FILE,
    encode_images,
    latent_ids,
    load_head,
    load_processor,
    load_vlm,
    real_features,
    say_other_limits,
)

# --------------------------------------------------------------------------------------------------
model = "out/gap"  # a folder written by train.py
images = "out/toy/test/3.png"  # several: a.png,b.png
question = ""  # "": the row that goes with the image, of <folder of images>.jsonl
system = ""  # the prompt's system text; "": the row's, or Qwen's own
show = ""  # file.png: what the latents look like
bank = ""  # for show; "": where the model folder says
latents = ""  # file.safetensors: the latents
max_new_tokens = 256  # text and latents
temperature = 0.0  # 0: greedy
top_p = 1.0  # 1: draw from the whole distribution
seed = 12345  # of the draws
intervention = "clean"  # clean zero markers noise mean shuffle oracle oracle_pca
aux = ""  # the real auxiliary image(s), a.png,b.png: for oracle, and beside what is shown
donor = ""  # for shuffle: a latents.safetensors of another example
latent_size = 10  # most latents per span, for Monet's tokens without a head file [Monet: 10 to 16]
ema_beta = 0.0  # > 0: EMA norm calibration
min_pixels = 56 * 56  # smaller images are scaled up
max_pixels = 1280 * 28 * 28  # larger ones are scaled down: 1,280 embeddings per image
dtype = "float32"  # 7B: bfloat16
# --------------------------------------------------------------------------------------------------

# the drawing, in pixels
BOX = (400, 200)  # a picture is as large as fits
CAPTION = 16  # height of the line above it
SPACE = 8  # between pictures


# --------------------------------------------------------------------------------------------------
# what it answers


class Printer:
    """Prints an answer as it comes: text in whole characters, a latent span as ⟨latent xK⟩."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.span_start, self.latent, self.span_end = latent_ids(tokenizer)
        self.silent = (tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.text = []  # ids of the text so far
        self.printed = 0  # characters of it that are on the screen
        self.latents = None  # how many the open span has; None: no span is open

    def on_step(self, rows, tokens, x, h):
        """Print the token of the only row. `generate` calls this at every step."""
        token = int(tokens[0])
        if token == self.span_start:
            self.latents = 0
        elif token == self.latent:
            self.latents += 1
        elif token == self.span_end:
            print(f"⟨latent x{self.latents}⟩", end="", flush=True)
            self.latents = None
        elif token not in self.silent:
            self.text.append(token)
            self.print_text()

    def print_text(self):
        """Print what is new of the text."""
        # decoded as a whole: a character may be several tokens, and spaces depend on what is before
        text = self.tokenizer.decode(self.text)
        if text.endswith("\ufffd"):  # half of a character: wait for the rest
            return
        print(text[self.printed :], end="", flush=True)
        self.printed = len(text)

    def end(self):
        """End the line, with a span that the token limit has cut off."""
        print("" if self.latents is None else f"⟨latent x{self.latents}, cut off⟩")


def paths_of(text):
    """The files that a setting names, with commas between; a file's own name may have one, too.

    Raises SystemExit for one that is not there.
    """
    # not Path.is_file(), which raises where the whole list is longer than a name may be
    if os.path.isfile(text):
        return [text]
    paths = names_in(text)
    for path in paths:
        if not os.path.isfile(path):
            raise SystemExit(f"{path}: no such image")
    return paths


def row_to_ask(paths):
    """The row to ask. Raises SystemExit if there is none, or if it holds a reserved token."""
    if question:
        row = Row(images=paths, question=place_marks(question, len(paths), "--question"))
        row.where = "infer.py"
    else:
        row = row_of(paths[0] if paths else "")
        if len(paths) > 1 and len(paths) != len(row["images"]):
            raise SystemExit(f"infer.py needs --question: {row.where} has other images")
    row |= {"system": system or row.get("system", "")}
    check_text(row)
    return row


def row_of(path):
    """The row whose first image a file is, of the JSONL beside its folder, as the toy's lie."""
    folder = Path(path).parent
    data = folder.parent / f"{folder.name}.jsonl"
    if data.exists():
        for row in load_examples(data, training=False):
            if Path(path).resolve() in [Path(image).resolve() for image in row["images"][:1]]:
                return row
    raise SystemExit(f"{path} is the first image of no row of {data}: give --question")


def check_feed():
    """Raise SystemExit if what an intervention feeds is not given, or not there."""
    real = paths_of(aux)
    if intervention.startswith("oracle") and not real:
        raise SystemExit(f"{intervention} feeds the features of --aux=image.png")
    if intervention == "shuffle":
        if not donor:
            raise SystemExit(
                "shuffle feeds the latents of --donor=latents.safetensors, another example's"
            )
        check_there(donor, "infer.py --latents=FILE writes one")


def latents_to_feed(vlm, head):
    """What an intervention feeds in place of the model's own latents: [(m, K, d)], or None.

    oracle: the features of the real auxiliary images. shuffle: another example's latents.
    """
    if intervention.startswith("oracle"):
        pictures = [open_image(path) for path in paths_of(aux)]
        return [real_features(model, vlm)(pictures)]
    if intervention == "shuffle":
        return [load_latents_file(donor, head)]
    return None


# --------------------------------------------------------------------------------------------------
# what it imagined


def embed_pictures(vlm, processor, pictures):
    """Merged embeddings (h*w, d) of each picture, on the CPU, and their grids (h, w)."""
    with torch.inference_mode():
        visions, patches = encode_images(vlm, processor, pictures)
    m = processor.merge_size  # patches a side of a merged token
    grids = [(h // m, w // m) for _, h, w in patches.tolist()]
    return [v.cpu() for v in visions], grids


def whole_spans(latents, head):
    """The spans (K, d) of an answer's latents (n, d), without one that the token limit cut off."""
    if not head.fixed_length:
        return [latents]  # Monet's: where one span ends is not kept
    return [span for span in latents.split(head.K) if len(span) == head.K]


def cosines(latents, vision):
    """The highest cosine of each embedding of a picture (h*w, d) with any latent (K, d): (h*w)."""
    return (F.normalize(vision.float(), dim=-1) @ F.normalize(latents, dim=-1).T).amax(1)


def lit(picture, cosine, grid):
    """A picture, dark where its cosines (h*w) with the latents are lowest."""
    low, high = cosine.min(), cosine.max()
    light = ((cosine - low) / (high - low).clamp(min=1e-6)).view(1, 1, *grid)
    size = (picture.height, picture.width)
    light = F.interpolate(light, size=size, mode="bicubic", align_corners=False)
    light = light.clamp(0, 1)  # bicubic overshoots
    mask = Image.fromarray((light[0, 0] * 255).byte().numpy())
    dark = Image.blend(picture, Image.new("RGB", picture.size, "black"), 0.75)
    return Image.composite(picture, dark, mask)


def fitted(picture):
    """A picture as large as fits the BOX, wide, tall or small as it may be."""
    scale = min(BOX[0] / picture.width, BOX[1] / picture.height)
    return picture.resize([max(1, round(x * scale)) for x in picture.size])


def line_of(latents, bank, pictures, visions, grids, real):
    """What is shown of one span, [(caption, picture)]: imagined, real, and where in each image."""
    panels = []
    if bank is not None:
        drawn, cosine = imagine(latents, bank)
        panels.append((f"imagined, cosine {cosine.min():.2f} to {cosine.max():.2f}", drawn))
    if real is not None:
        panels.append(("real", real))
    for picture, vision, grid in zip(pictures, visions, grids):
        cosine = cosines(latents, vision)
        caption = f"where, cosine {cosine.min():.2f} to {cosine.max():.2f}"
        panels.append((caption, lit(fitted(picture), cosine, grid)))
    return [(caption, fitted(picture)) for caption, picture in panels]


def draw(path, lines):
    """Write a picture of lines of (caption, picture), one below the other, as PNG."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def width(caption, picture):
        return SPACE + max(picture.width, round(measure.textlength(caption)))

    row = CAPTION + BOX[1] + SPACE
    widest = max(sum(width(*panel) for panel in panels) for panels in lines)
    canvas = Image.new("RGB", (widest + SPACE, len(lines) * row + SPACE), "white")
    pen = ImageDraw.Draw(canvas)
    for i, panels in enumerate(lines):
        x, y = SPACE, SPACE + i * row
        for caption, picture in panels:
            pen.text((x, y), caption, fill="black")
            canvas.paste(picture, (x, y + CAPTION))
            x += width(caption, picture)
    write_then_rename(path, lambda tmp: canvas.save(tmp, format="PNG"))


def show_spans(path, vlm, processor, spans, pictures, bank):
    """Draw each span's latents (K, d): what they imagine, the real picture, and where they look."""
    visions, grids = embed_pictures(vlm, processor, pictures)
    real = [open_image(path) for path in paths_of(aux)]
    real += [None] * len(spans)  # of none, or of fewer spans than the model opened
    lines = [line_of(s, bank, pictures, visions, grids, r) for s, r in zip(spans, real)]
    draw(path, lines)


# --------------------------------------------------------------------------------------------------


def main():
    check_choices(globals(), intervention=INTERVENTIONS, dtype=("float32", "bfloat16"))
    show_files(reads=[model, images, aux, donor, bank], writes=[show, latents])
    check_there(Path(model) / "config.json")
    check_prompt_texts(system=system)
    check_apart([*paths_of(images), *paths_of(aux)], [show, latents])
    check_feed()
    row = row_to_ask(paths_of(images))
    if show and not row["images"]:
        raise SystemExit("--show needs a query image")
    its_bank = bank_of(model, bank) if show else None  # before the weights: it may not be there

    vlm, tokenizer = load_vlm(model, getattr(torch, dtype), pick_device())
    say_other_limits(model, min_pixels, max_pixels)
    processor = load_processor(model, min_pixels, max_pixels)
    head = load_head(model, vlm, tokenizer, latent_size)
    if head is None and (intervention != "clean" or show or latents):
        raise SystemExit(f"{model} has no {HEAD_FILE}: it writes no latents")
    check_intervention(intervention, head)

    prompts = make_prompts(vlm, tokenizer, processor, [row])
    fed = latents_to_feed(vlm, head)

    print(f"{question_text(row)}\n")
    printer = Printer(tokenizer)
    answers = generate(
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
        on_step=printer.on_step,
    )
    printer.end()

    answer = answers[0][0]  # the only sample of the only question
    if not answer["finished"]:
        print(f"cut off: raise max_new_tokens={max_new_tokens}")
    found = answer["latents"]  # (m * K, d)
    if not (show or latents):
        return
    if not len(found):
        print("the model opened no latent span here: nothing to show or save")
        return
    spans = whole_spans(found, head)
    if not spans:
        raise SystemExit(
            f"the token limit cut the latents off: {len(found)} of {head.K}; raise "
            f"max_new_tokens={max_new_tokens}"
        )
    if latents:
        save_latents_file(latents, found, head)
        print(f"wrote {latents}: {sum(map(len, spans))} latents")
    if show:
        pictures = [open_image(path) for path in row["images"]]
        show_spans(show, vlm, processor, spans, pictures, its_bank)
        print(f"wrote {show}")


if __name__ == "__main__":
    start(main)
