"""How is training data made? From public data or with a teacher: the paper's data-level alignment.

A command per step; each reads what the one before it wrote (`convert` alone reads others' files):

    python build_data.py convert --source=monet --files='Monet-SFT-125K/*/train.json' \\
        --root=Monet-SFT-125K              <out>/monet.jsonl, <out>/rejects.monet.jsonl
    python build_data.py synthesise --data=data/viscot.jsonl
                                           an image model draws, a teacher writes:
                                           <out>/synthesised.jsonl
    python build_data.py filter --data=data/monet.jsonl,data/synthesised.jsonl
                                           <out>/filtered.jsonl, <out>/rejects.jsonl
    python build_data.py audit --data=data/filtered.jsonl --benchmarks=MMStar,POPE
                                           <out>/audited.jsonl, <out>/audit.html
    python build_data.py split --data=data/audited.jsonl
                                           <out>/train.jsonl, <out>/val.jsonl, the composition table
    python build_data.py sheet --data=data/train.jsonl --sheet=data/sheet.html
                                           a page to look at with one's own eyes

Everything that is written lies in one folder, `out` (but for the sheet); images are copied to
<out>/images once, named by their content. A killed command goes on where it stopped: each finished
item is a line under <out>/work, used again while neither the item nor the command's settings
change. Nothing is ever fetched but from the two endpoints of `synthesise`.
"""

import errno
import glob
import hashlib
import html
import io
import os
import random
import re
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from checks import (
    check_auxiliary,
    check_described,
    check_example,
    check_gold,
    check_parser,
    check_reasoned,
    parser_texts,
)
from contamination import FINDINGS, find_copies, images_of_tests, load_tests, write_pairs
from data import IMAGE_FIELDS, LATENT_SPAN, in_one_form, load_examples, place_marks, question_text
from duplicates import fingerprints, groups_of
from endpoint import check_url, key_in
from files import (
    file_digest,
    folder_digest,
    hash_file,
    open_append,
    read_json,
    read_lines,
    write_json,
    write_lines,
    write_then_rename,
)
from images import FORMATS, MOST_NARROW, BadImage, decode_image, orientation, other_kind, png_of
from launch import Progress, check_apart, check_choices, claim, names_in, pick_device, start
from model import grid_features, load_processor, load_vlm, spread
from pages import card, figure, write_page
from resume import Reject, Unanswered, clean, run_stage
from sources import (
    COMPOSITION,
    FIELDS,
    NEEDED,
    SECOND_RELEASE,
    SOURCES,
    in_our_tags,
    picture_of,
    read_items,
    source_of,
    wrapped,
)
from teacher import PaidServer, Replies, ask_teacher, edit_image, until_usable

# --------------------------------------------------------------------------------------------------
out = "data"  # the folder that everything is written to
data = ""  # files in `out` that a command reads, with commas between
workers = 2  # items at a time: CPU cores, or requests that the teacher answers at once
seed = 12345  # of every random choice: `limit`, the split, the sheet
limit = 0  # > 0: only this many items, drawn by the seed

# convert
source = ""  # gap monet viscot lvr zebra chat teacher qa
files = ""  # the source's JSON or JSONL; a pattern with * may name several
root = ""  # the folder that its image paths start from, and may not leave; "": that of each file
label = ""  # name of the output file and row of the composition table; "": the source's own
draw = "crop"  # a box becomes: crop, its part enlarged; outline, the query with it drawn on
crop_margin = 0.2  # of the box's sides, added on each side
crop_side = 448  # pixels: the long side of a smaller crop is enlarged to this
max_bytes = 64_000_000  # of an image file
bomb_pixels = 50_000_000  # an image with more is taken for a decompression bomb
follow_links = False  # image paths may be links that lead out of root
min_side = 8  # pixels: smaller shows nothing; what is small is enlarged by the processor [ours]

# synthesise
teacher_url = "http://localhost:8000/v1"  # + /chat/completions
teacher_model = "Qwen2.5-VL-72B-Instruct"  # its name there
teacher_key = "TEACHER_KEY"  # the *name* of the key's variable
image_url = "http://localhost:8001/v1"  # + /images/edits
image_model = "Qwen-Image-Edit"  # its name there
image_key = "IMAGE_KEY"  # the *name* of the key's variable
tries = 6  # of a request; pauses double from first_pause to 60 s, or are the server's Retry-After
first_pause = 1.0  # seconds
give_up = 20  # items in a row without an answer: the endpoint is down
timeout = 300.0  # seconds
max_tokens = 2048  # that the teacher may write
temperature = 0.7  # above 0: a retry of an unusable answer can differ
send_side = 1536  # pixels: larger images are scaled down for the teacher
image_prompt = """Edit this image so that it shows what one has to see to answer the question \
below: mark, enlarge, draw or rearrange the decisive parts. Keep what is true of the image. Do not \
write the answer into it.

Question: {question}"""
teacher_prompt = """The first image or images belong to the question. The last image is an \
auxiliary image: a picture in the mind of someone who reasons about the question. You know the \
answer; write the reasoning that leads to it, in this form:

<think> What the question asks, and why a closer look is needed. <latent></latent> <parser> What \
the auxiliary image shows, in one to five sentences: objects, places, numbers, text; neither the \
question again nor the answer. </parser> What follows from it. </think> <answer> The answer, \
exactly as given. </answer>

Write each tag as it stands here and once only, leave <latent></latent> empty, use the language of \
the question, and write nothing before or after. Do not mention the auxiliary image outside \
<parser>, nor that you were given the answer.

Question: {question}
Answer: {answer}"""

# filter
need_reasoning = True  # text between <think> and </think>; `qa` has none until a teacher writes it
need_parser = True  # after each latent span, a text that says what it means
parser_words_min = 5  # [ours; the paper filters by length and names no bounds]
parser_words_max = 200  # [ours]
parser_repeats = 0.8  # of this Jaccard overlap with the question's words, it only repeats it
blank = 2.0  # grey levels: an auxiliary image with a smaller standard deviation is blank
same_as_query = 8.0  # grey levels: one that differs less on a 64 x 64 grid is the query image again
base = ""  # a Qwen2.5-VL folder, to reject what its tower sees as flat; "": fit_pca.py does that
degenerate = 1e-3  # var(v) / mean ||v||^2, as in fit_pca.py
K = 36  # latents per image
mode = "pool"  # how the tower's tokens become K: pool, resize
min_pixels = 56 * 56  # of an image that the tower sees
max_pixels = 1280 * 28 * 28  # of an image that the tower sees

# audit
benchmarks = ""  # test sets with commas between: names of benchmarks.py, or JSONL files
data_root = "data/benchmarks"  # where the benchmarks' official files lie
near = 52  # near-duplicates differ in at most this many of 255 bits
drop = "pixels,question"  # findings whose examples are left out: pixels question template near
max_pairs = 500  # near pairs on the page, the nearest first

# split, sheet
own_split = False  # split as the sources' items or file names say, instead of at random
val_share = 0.1  # of the examples; a group of shared images stays on one side
sheet = "data/sheet.html"  # the page
n_sheet = 40  # examples on it
# --------------------------------------------------------------------------------------------------

LOCK = threading.Lock()
MOST_SHARE = 1.1  # of a box in shares of the sides; they reach 1.002 in Visual-CoT, and are clipped
MOST_OF_PICTURE = 0.8  # of its area in a crop with a margin: the whole picture again shows nothing


# --------------------------------------------------------------------------------------------------
# rows: what a command reads, and how it works through them


def data_files():
    """The files that `data` names. Image paths are relative to the file, so all lie in `out`."""
    paths = [Path(name) for name in names_in(data)]
    if not paths:
        raise SystemExit("data='' names no file; give --data=FILE or several with commas between")
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; data names files with their folder")
        if path.parent.resolve() != Path(out).resolve():
            raise SystemExit(
                f"{path}: not in out={out!r}; give --out={path.parent}, or bring it in by `convert`"
            )
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise SystemExit(f"data={data!r} names {path} twice")
    return paths


def check_outputs(paths, *names):
    """Raise SystemExit if a command would write over one of the files that it reads."""
    check_apart(paths, [Path(out) / name for name in names])


def load_data():
    """The checked examples of all `data` files, image paths relative to `out`; ids occur once."""
    rows, seen = [], set()
    for path in data_files():
        for row in load_examples(path):
            row["id"] = distinct(row["id"], path, seen)
            for field in ("images", "aux_images"):
                row[field] = [os.path.relpath(p, out) for p in row[field]]
            rows.append(row)
    return pick_rows(rows)


def distinct(id, path, seen):
    """The id, or <file>/<id> where an earlier file has it, too; it is added to `seen`."""
    if id in seen:
        id = f"{path.stem}/{id}"
    seen.add(id)
    return id


def pick_rows(rows):
    """At most `limit` of the rows, drawn by the seed, in their old order."""
    return [rows[i] for i in picked(len(rows))]


def picked(n):
    """The places of at most `limit` of n rows, drawn by the seed, in their order."""
    if not limit or limit >= n:
        return range(n)
    return sorted(random.Random(seed).sample(range(n), limit))


def digests_of(row):
    """The digest of each picture in `out` that a row names; None for one that is not there."""
    paths = [os.path.join(out, name) for field in IMAGE_FIELDS for name in row[field]]
    return [file_digest(path) if os.path.isfile(path) else None for path in paths]


def digests_of_item(item):
    """The same of an item that `filter` has still to check, as far as it would read pictures."""
    if not isinstance(item, dict):
        return []
    lists = [item[field] for field in IMAGE_FIELDS if isinstance(item.get(field), list)]
    digests = []
    for name in (name for names in lists for name in names):
        try:
            digests.append(file_digest(path_inside(out, name)))
        except (Reject, OSError):
            digests.append(None)
    return digests


def work_through(name, rows, work, uses, rejects, contents=digests_of, has_answered=False):
    """work(row) on all rows, kept in <out>/<name>.jsonl; those that raise Reject go to `rejects`.

    uses: the names of the settings that `work` depends on; a change of one, or of what
    contents(row) says of the row's pictures, does the work anew.
    """
    settings = {setting: globals()[setting] for setting in uses}
    if settings.get("base"):
        settings["base"] = folder_digest(base)
    return run_stage(
        name, rows, work, settings, out, workers, give_up, rejects, contents, has_answered
    )


# --------------------------------------------------------------------------------------------------
# images: the one way from bytes that may be anything to RGB, and into <out>/images

KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # others become PNG


def read_inside(folder, name):
    """The bytes of a file in `folder`. Raises Reject for a path or a link that leaves it."""
    path = path_inside(folder, name)
    try:
        return path.read_bytes()
    except OSError as e:  # a disk that is away may come
        raise Unanswered("unreadable path", None, f"{clean(name)}: {e}") from None


def path_inside(folder, name):
    """The path of a file in `folder` that is no larger than allowed. Raises Reject."""
    try:
        path = Path(folder) / name
        root, here = Path(folder).resolve(), path.resolve()
        if follow_links:  # a link may lead anywhere, ".." may not
            root, here = Path(os.path.abspath(folder)), Path(os.path.abspath(path))
        if not here.is_relative_to(root):
            advice = "" if follow_links else "; links are followed with --follow_links=1"
            raise Reject("path leaves the data folder", None, f"{name}{advice}")
        if not path.is_file():
            raise Reject("no such image", None, name)
        size = path.stat().st_size
        if size > max_bytes:
            raise Reject("image file too large", size, name)
        return path
    except (OSError, ValueError, RuntimeError, TypeError) as e:
        # NUL bytes, endless names, links in circles, no string at all
        for_good = not isinstance(e, OSError) or e.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        # a right that is missing or a disk that is away may come
        kind = Reject if for_good else Unanswered
        raise kind("unreadable path", None, f"{clean(name)}: {e}") from None


def decode(content):
    """(RGB image, suffix) of an encoded image. Raises Reject.

    The suffix is "" where the bytes have to be written anew to look like this to every reader.
    """
    if kind := other_kind(content):
        raise Reject("no image", None, kind)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > bomb_pixels:
                raise Reject("image has too many pixels", width * height, f"{width} x {height}")
            # MPO, a phone's photo with a preview, counts as animated
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise Reject("animated image")
            check_size(image)
            # bytes are kept where they can be shown in one way only: 8 bits, upright, no palette,
            # nothing to see through
            plain = image.mode in ("RGB", "L") and not image.has_transparency_data
            upright = orientation(image) == 1
            suffix = KEPT.get(image.format, "") if plain and upright else ""
        return decode_image(content), suffix
    except Reject:
        raise
    except MemoryError:  # the machine's fault: there may be more of it the next time
        raise Unanswered("no memory for an image", len(content)) from None
    except Exception as e:  # decoders of hostile bytes raise nearly anything
        said = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(e))
        raise Reject("unreadable image", None, f"{type(e).__name__}: {said}") from None


def decode_rgb(content):
    """The RGB image alone of an encoded image. Raises Reject."""
    image, _ = decode(content)
    return image


def check_size(image):
    """The image, if the processor can take it. Raises Reject."""
    low, high = sorted(image.size)
    size = f"{image.width} x {image.height}"
    if low < min_side:
        raise Reject("image too small", low, size)
    if high > MOST_NARROW * low:
        raise Reject("image too narrow for the processor", high // low, size)
    return image


def store(content, image, suffix):
    """Write an image to <out>/images, named by its content, unless it is there.

    content: encoded bytes; image, suffix: what decode() gives for them. Returns the path in `out`.
    """
    if not suffix:
        content, suffix = png_of(image), ".png"
    # 128 bits tell any two images apart; 256 folders keep each of them small
    digest = hashlib.sha256(content).hexdigest()
    name = f"images/{digest[:2]}/{digest[2:34]}{suffix}"
    with LOCK:  # two workers may hold the same picture
        if not (Path(out) / name).exists():
            write_then_rename(Path(out) / name, lambda p: p.write_bytes(content))
    return name


# --------------------------------------------------------------------------------------------------
# convert

CODE = hash_file(Path(__file__).with_name("sources.py"))
CONVERT_USES = (
    "source label draw crop_margin crop_side max_bytes bomb_pixels min_side follow_links"
).split()
SPLITS = {"train": "train", "training": "train"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


def convert():
    """The items of a source as checked examples: <out>/<label>.jsonl and rejects.<label>.jsonl."""
    check_choices(globals(), source=tuple(SOURCES), draw=("crop", "outline"))
    if Path(label).name != label:
        raise SystemExit(f"label={label!r} is not a name for a file in {out}")
    paths = [path for path in sorted(glob.glob(files, recursive=True)) if os.path.isfile(path)]
    if os.path.isfile(files):  # a name may hold what a pattern does
        paths = [files]
    if not paths:
        raise SystemExit(
            f"files={files!r} matches no file; give --files=FILE, or a pattern in quotes"
        )
    name = label or source
    rejects = f"rejects.{name}.jsonl"
    check_outputs(paths, f"{name}.jsonl", rejects)
    items = Items(paths, name)
    check_columns(items.columns)
    check_name(name, paths)
    uses = [*CONVERT_USES, "CODE"]  # another converter makes other rows
    uses += ["FIELDS"] * (source in NEEDED)  # where columns are found by it
    # whose pictures lie elsewhere yet: what has arrived, changed or gone is converted anew
    work_through(name, items, convert_one, uses, rejects, stamps_of)


def check_name(name, paths):
    """Raise SystemExit if <out>/<name>.jsonl was made of other files than any of these."""
    note = Path(out) / "work" / f"{name}.files.json"
    now = [[os.path.abspath(path), file_digest(path)] for path in paths]
    if note.exists() and read_lines(Path(out) / f"{name}.jsonl"):
        before = read_json(note, files=list)["files"]
        # a file may have been mended, or moved
        if not {x for pair in before for x in pair} & {x for pair in now for x in pair}:
            raise SystemExit(
                f"{out}/{name}.jsonl was made of other files ({before[0][0]}); --label=NAME gives "
                "these a file of their own, or delete it"
            )
    write_json(note, {"files": now})


class Items:
    """The items of a source's files, each with an id, the folder of its images, and its error.

    They are read anew each time they are gone through: where they hold their pictures, as
    Zebra-CoT's do, no memory holds them all. The id is the item's own, or its place where it has
    none or shares it with another.
    """

    def __init__(self, paths, name):
        self.paths, self.name = paths, name
        self.columns, own = set(), Counter()
        for _, _, item, _ in self.read(Progress(paths, desc="reading", unit="file")):
            own[own_id(item)] += 1
            if isinstance(item, dict):
                self.columns |= item.keys()
        self.shared = {id for id, n in own.items() if n > 1 or not id}
        self.picked = set(picked(own.total()))

    def read(self, paths):
        """Yield (file, line or position, item or None, error)."""
        for path in paths:
            for n, item, error in read_items(path):
                yield path, n, item, error

    def __len__(self):
        return len(self.picked)

    def __iter__(self):
        for i, (path, n, item, error) in enumerate(self.read(self.paths)):
            if i in self.picked:
                folder = root or os.path.dirname(path) or "."
                inside = os.path.relpath(path, folder)
                id = own_id(item)
                if id in self.shared:
                    id = clean(f"{self.name}/{inside}:{n}")
                row = {"id": id, "root": folder, "item": item, "error": error}
                yield row | {"split": split_of(item, inside)}


def own_id(item):
    """The id that an item brings along, as text; "" for none."""
    id = item.get("id") if isinstance(item, dict) else None
    return clean(id) if isinstance(id, (str, int)) and not isinstance(id, bool) else ""


def split_of(item, file):
    """train or val, as an item or the name of its file or folder says; "" if none does."""
    said = item.get("split") if isinstance(item, dict) else None
    names = re.findall("[a-z]+", str(said or file).lower())
    # the item's own alone, if it has one: a row of `test` in train.json is no training data. Else
    # the nearest, the file's before the folder's
    return next((SPLITS[name] for name in reversed(names) if name in SPLITS), "")


def stamps_of(row):
    """(size, times) of each picture file that an item names; None where it is not."""
    try:
        example = read_one(row)
    except Reject:  # convert_one says it
        return []
    stamps = []
    for cell in example["images"] + example["aux"]:
        # what holds the picture itself is not decoded for this
        in_a_file = isinstance(cell, dict) and not cell.get("bytes")
        name = cell.get("path") if in_a_file else cell
        if isinstance(name, str):
            try:
                found = os.stat(os.path.join(row["root"], name))
                # archives and copies may keep the time of a change, but not that of the inode
                stamps.append((found.st_size, found.st_mtime_ns, found.st_ctime_ns))
            except (OSError, ValueError):
                stamps.append(None)
    return stamps


def check_columns(columns):
    """Where columns are found by FIELDS: no needed field lacks one. Raises SystemExit."""
    for field in NEEDED.get(source, ()):
        if columns and not columns & set(FIELDS[field]):
            there = ", ".join(sorted(map(clean, columns)))
            raise SystemExit(
                f"{files}: no column for {field!r}: looked for {', '.join(FIELDS[field])}; found "
                f"{there}. Add its name to FIELDS in sources.py"
            )


def read_one(row):
    """An item of a source as its function in sources.py gives it. Raises Reject."""
    if row["error"]:
        raise Reject("unreadable line", None, row["error"])
    with in_layout():
        return SOURCES[source](row["item"])


@contextmanager
def in_layout():
    """Raise Reject where an item is not what its source promises."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as e:
        raise Reject("another layout than the source's", None, f"{type(e).__name__}: {e}") from None


def convert_one(row):
    """One item of a source as an example whose images are in <out>/images."""
    example = read_one(row)
    with in_layout():
        images = [picture_of(cell) for cell in example.pop("images")]
        aux = [picture_of(cell) for cell in example.pop("aux")]
    try:
        example["question"] = place_marks(example["question"], len(images), "").strip()
    except SystemExit as e:
        raise Reject("image marks and images differ", None, str(e).lstrip(": ")) from None
    example = {"id": row["id"]} | example
    example["images"], example["aux_images"] = ["?"] * len(images), ["?"] * len(aux)
    check_example(example)  # before an image is read or written

    def to_store(name):
        """What store() takes, of a path or encoded bytes."""
        content = name if isinstance(name, bytes) else read_inside(row["root"], name)
        try:
            return content, *decode(content)
        except Reject as e:  # which of an item's pictures it is
            if isinstance(name, str):
                e.detail = f"{name}: {e.detail}".removesuffix(": ")
            raise

    pictures = [to_store(name) for name in images]
    aux_pictures = []
    for part in aux:
        if isinstance(part, tuple):  # a box in the first image
            _, query, _ = pictures[0]
            aux_pictures.append((b"", stand_in(query, part), ""))  # no bytes yet: they become a PNG
        else:
            aux_pictures.append(to_store(part))
    example["images"] = [store(*p) for p in pictures]
    example["aux_images"] = [store(*p) for p in aux_pictures]
    example["category"] = label or example["category"] or source
    if row["split"]:
        example["split"] = row["split"]
    return example


def stand_in(image, box):
    """The auxiliary image that a Box gives, by the rule `draw`. Raises Reject."""
    size = np.tile(image.size, 2)  # (width, height, width, height)
    corners = np.array(box[:4])
    detail = f"{corners.tolist()} in {image.width} x {image.height}"
    if box.shares:
        if np.abs(corners).max() > MOST_SHARE:
            raise Reject("box reaches beyond the image", float(np.abs(corners).max()), detail)
        corners = corners * size
    inside = np.clip(corners, 0, size)
    if (inside[2:] - inside[:2]).min() < 2:
        raise Reject("box is empty or outside the image", None, detail)

    edges = widened(inside, size) if draw == "crop" else np.rint(inside).astype(int)
    x1, y1, x2, y2 = edges
    if draw == "outline":
        image = image.copy()
        width = max(2, max(image.size) // 200)
        outline = (x1, y1, x2 - 1, y2 - 1)  # Pillow draws the last pixel, too
        ImageDraw.Draw(image).rectangle(outline, outline="red", width=width)
        return image
    part = image.crop((x1, y1, x2, y2))
    # enlarged to crop_side, and more where the short side is no token yet; never shrunk
    scale = max(1, crop_side / max(part.size), min_side / min(part.size))
    larger = (round(part.width * scale), round(part.height * scale))
    return check_size(part.resize(larger, Image.BICUBIC))


def widened(inside, size):
    """A box (x1, y1, x2, y2) with crop_margin around it, or less where it would be the picture."""
    sides = np.tile(inside[2:] - inside[:2], 2) * (-1, -1, 1, 1)
    for margin in (crop_margin, crop_margin / 2, 0):
        edges = np.clip(np.rint(inside + margin * sides), 0, size).astype(int)
        width, height = edges[2:] - edges[:2]
        if width * height <= MOST_OF_PICTURE * size[0] * size[1]:
            break
    return edges


# --------------------------------------------------------------------------------------------------
# synthesise

# a model is known by its name: what it gave stays paid for when its server moves
DRAWN_USES = "image_model image_prompt bomb_pixels min_side".split()
WRITTEN_USES = "teacher_model teacher_prompt max_tokens temperature send_side".split()


def synthesise():
    """An auxiliary image for each row without one, then a response of the teacher for each row."""
    began = time.monotonic()
    for url in (teacher_url, image_url):
        check_url(url)
    check_outputs(data_files(), "drawn.jsonl", "synthesised.jsonl")
    rows = load_data()
    claim(cost_file().parent, cost_file().name)
    open_append(cost_file()).close()  # a line that a kill cut in two is gone before the next
    # a row that has another id, place or category now is asked for nothing again
    replies = Replies(cost_file().with_name("replies.jsonl"))
    draw_one, write_one = partial(draw_image, replies), partial(write_response, replies)
    ever = {"has_answered": bool(replies.known)}
    rows = work_through("drawn", rows, draw_one, DRAWN_USES, "rejects.drawn.jsonl", **ever)
    rejects = "rejects.synthesised.jsonl"
    work_through("synthesised", rows, write_one, WRITTEN_USES, rejects, **ever)

    numbers = dict.fromkeys(("prompt_tokens", "completion_tokens", "seconds"), (int, float))
    lines = read_lines(cost_file(), **numbers)
    asked = sum(line["prompt_tokens"] for line in lines)
    written = sum(line["completion_tokens"] for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    print(
        f"cost, all runs: {len(lines):,} requests, {asked:,} prompt and {written:,} written "
        f"tokens, {seconds:,.0f} s of requests; this run took {time.monotonic() - began:,.0f} s"
    )


def cost_file():
    """Where each request leaves a line."""
    return Path(out) / "work" / "cost.jsonl"


def paid_server(url, model, key_name):
    """A server that is asked as the settings say."""
    return PaidServer(url, model, key_in(key_name), tries, first_pause, timeout, cost_file())


def draw_image(replies, row):
    """The row with an auxiliary image: its own, or one that is drawn over the first query image."""
    if row["aux_images"]:
        return row
    image_server = paid_server(image_url, image_model, image_key)
    prompt = filled(image_prompt, row)

    def draw_anew():
        query = png_of(picture(row["images"][0]))

        def call():
            content = edit_image(image_server, prompt, query)
            return content, *decode(content)

        return store(*until_usable(image_server, call))

    def is_there(name):
        return (Path(out) / name).is_file()

    sent = [image_model, prompt, *digests_of(row)[:1]]  # of the query image
    name = replies.to(sent, draw_anew, is_there)
    response = wrapped(LATENT_SPAN, row["answer"])  # to be written by the teacher
    return row | {"aux_images": [name], "response": response}


def picture(name):
    """An image in `out`. Raises Reject."""
    try:
        return decode_image(Path(out) / name)
    except BadImage as e:
        raise Reject("unreadable image", None, f"{name}: {e}") from None


def filled(prompt, row):
    """A prompt with a row's question, its options too, and answer; other braces are its own."""
    values = {"question": question_text(row), "answer": row["answer"]}
    return re.sub(r"\{(question|answer)\}", lambda name: values[name[1]], prompt)


def write_response(replies, row):
    """The row with a response of the teacher, who sees all its images, question and answer."""
    if len(row["aux_images"]) != 1:
        raise Reject("teacher writes for one auxiliary image", len(row["aux_images"]))
    teacher = paid_server(teacher_url, teacher_model, teacher_key)
    prompt = filled(teacher_prompt, row)

    def write_anew():
        pngs = []
        for path in row["images"] + row["aux_images"]:
            image = picture(path)
            image.thumbnail((send_side, send_side))
            pngs.append(png_of(image))

        def call():
            text = ask_teacher(teacher, prompt, pngs, max_tokens, temperature)
            check_example(row | {"response": in_our_tags(text)})
            return text

        return until_usable(teacher, call)

    asked = [teacher_model, prompt, max_tokens, temperature, send_side]
    # the answer: a prompt may not hold it, and a response must
    text = replies.to([*asked, row["answer"], *digests_of(row)], write_anew)
    return row | {"response": in_our_tags(text)}


# --------------------------------------------------------------------------------------------------
# filter

FILTER_USES = (
    "need_reasoning need_parser parser_words_min parser_words_max parser_repeats blank "
    "same_as_query base degenerate K mode min_pixels max_pixels max_bytes bomb_pixels min_side "
    "follow_links"
).split()


def filter_data():
    """The examples that pass all checks: filtered.jsonl; the others and why: rejects.jsonl."""
    check_choices(globals(), mode=("pool", "resize"))
    check_outputs(data_files(), "filtered.jsonl", "rejects.jsonl")
    rows = pick_rows(read_unchecked())
    tower = None
    if base:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        vlm, _ = load_vlm(base, dtype, pick_device())
        tower = vlm, load_processor(base, min_pixels, max_pixels)

    def work(row):
        return filter_one(row, tower)

    def contents(row):
        return digests_of_item(row["item"])

    work_through("filtered", rows, work, FILTER_USES, "rejects.jsonl", contents)


def read_unchecked():
    """The items of all `data` files as they are, an id that comes again as an error."""
    rows, seen = [], set()
    for path in data_files():
        here = set()
        for n, item, error in read_items(path):
            id = f"{path.name}:{n}"
            if own_id(item):
                id = own_id(item)
                if id in here:
                    error = error or f"id {id!r} occurs before"
                else:
                    here.add(id)
                    id = distinct(id, path, seen)
                    item = item | {"id": id}
            rows.append({"id": id, "item": item, "error": error})
    return rows


def filter_one(row, tower):
    """All checks of one example, cheapest first. tower: (vlm, processor), or None."""
    row, error = row["item"], row["error"]
    if not error and not isinstance(row, dict):
        error = f"a {type(row).__name__}, expected an object"
    if error:
        raise Reject("unreadable or repeated", None, error)
    try:
        row = in_one_form(row, training=True, where="")
    except SystemExit as e:
        raise Reject("not in the form of an example", None, str(e).lstrip(": ")) from None
    check_example(row)
    check_gold(row)
    if need_parser:
        check_described(row)
    if need_reasoning:
        check_reasoned(row)
    for text in parser_texts(row):
        check_parser(text, row, parser_words_min, parser_words_max, parser_repeats)

    queries = [decode_rgb(read_inside(out, path)) for path in row["images"]]
    aux = [decode_rgb(read_inside(out, path)) for path in row["aux_images"]]
    for image in aux:
        check_auxiliary(image, queries, blank, same_as_query)
    if tower and aux:
        with torch.inference_mode():
            flattest = float(spread(grid_features(*tower, aux, K, mode)).min())
        if flattest < degenerate:
            raise Reject("auxiliary embeddings hardly vary", flattest)
    return row


# --------------------------------------------------------------------------------------------------
# audit


def files_of(rows):
    """[(name in `out`, file)] of all images of the rows, each once, in their order."""
    names = dict.fromkeys(p for row in rows for p in row["images"] + row["aux_images"])
    return [(name, Path(out) / name) for name in names]


def prints_of(images, total, title):
    """{where: fingerprint} of the pairs (where, path or encoded bytes) that `images` yields."""
    return fingerprints(images, total, title, out, workers, decode_rgb)


def audit():
    """What of the test sets is in our data? Each finding: audit.jsonl; near pairs: audit.html.

    The rows without a finding of `drop`: audited.jsonl.
    """
    dropped = set(names_in(drop))
    unknown = dropped - set(FINDINGS)
    if unknown:
        raise SystemExit(f"drop={drop!r}: {sorted(unknown)[0]!r} is none of {', '.join(FINDINGS)}")
    if not benchmarks:
        raise SystemExit(
            "benchmarks='' names no test set; give --benchmarks=FILE or several with commas between"
        )
    check_outputs(data_files(), "audit.jsonl", "audited.jsonl")
    rows = load_data()
    tests = load_tests(names_in(benchmarks), data_root)
    files = files_of(rows)
    ours = prints_of(files, len(files), "our images")
    theirs = prints_of(images_of_tests(tests), None, "benchmark images")
    findings = find_copies(rows, tests, ours, theirs, near)
    left_out = {f["id"] for f in findings if f["kind"] in dropped}
    write_lines(Path(out) / "audit.jsonl", findings)
    write_lines(Path(out) / "audited.jsonl", [r for r in rows if r["id"] not in left_out])
    page = Path(out) / "audit.html"
    write_pairs(page, findings, tests, out, max_pairs, shown)

    counts = Counter(f["kind"] for f in findings)
    found = ", ".join(f"{counts[kind]} {kind}" for kind in FINDINGS)
    print(
        f"audit: {len(ours):,} images of {len(rows):,} examples against {len(theirs):,} of "
        f"{len(tests):,} test rows: {found}; left out {len(left_out)} examples (drop={drop}); "
        f"judge the near pairs in {page}"
    )


# --------------------------------------------------------------------------------------------------
# split


def split():
    """Write train.jsonl and val.jsonl without a shared image, and print what they are made of."""
    check_outputs(data_files(), "train.jsonl", "val.jsonl")
    rows = load_data()
    files = files_of(rows)
    groups = groups_of(rows, prints_of(files, len(files), "images"))
    held_out = own_held_out(rows, groups) if own_split else pick_held_out(rows, groups)
    train = [row for row in rows if row["id"] not in held_out]
    val = [row for row in rows if row["id"] in held_out]
    if not train and own_split:
        raise SystemExit(f"{data}: own_split=1, but all {len(rows)} examples are validation data")
    if not train:
        raise SystemExit(
            f"{data}: val_share={val_share} leaves none to train on: {len(rows)} examples in "
            f"{len(groups)} groups that share no image; give --val_share=0, or more examples"
        )
    if not own_split and len(val) > 2 * val_share * len(rows) + 1:
        print(f"val has {len(val)} of {len(rows)} rows: the smallest group that shares images")
    val_file = Path(out) / "val.jsonl"
    if val_file.exists() and not val:
        print(f"no validation data: removed {val_file}, of an earlier split")
    val_file.unlink(missing_ok=True)  # first: its pictures may be in train.jsonl now
    write_lines(Path(out) / "train.jsonl", train)
    if val:
        write_lines(val_file, val)
    print_composition(train, val)


def pick_held_out(rows, groups):
    """The ids of about val_share of the rows: whole groups of those that share images."""
    random.Random(seed).shuffle(groups)
    wanted = round(val_share * len(rows))
    if val_share > 0:
        wanted = max(wanted, min(map(len, groups)))  # of few rows still one group
    held_out = set()
    for group in groups:  # one that is too large for what is left goes to train
        if len(held_out) + len(group) <= wanted:
            held_out |= {row["id"] for row in group}
    return held_out


def own_held_out(rows, groups):
    """The ids of the rows that came as validation data. Raises SystemExit if some say no split."""
    silent = [row["id"] for row in rows if row.get("split") not in ("train", "val")]
    if silent:
        raise SystemExit(
            f"{data}: own_split=1, but {len(silent)} of {len(rows)} examples say no split, the "
            f"first {silent[0]!r}: neither a column `split` nor their file's name had one"
        )
    shared = sum(len({row["split"] for row in group}) > 1 for group in groups)
    if shared:
        print(f"own_split: {shared} groups of examples with a shared image lie on both sides")
    return {row["id"] for row in rows if row["split"] == "val"}


def print_composition(train, val):
    """The table in the order of the paper's Fig. 5: theirs, and ours beside it."""
    ours = defaultdict(lambda: [0, 0, 0])  # train, val, of both with latents
    for column, part in enumerate((train, val)):
        for row in part:
            counts = ours[source_of(str(row.get("category", "no category")))]
            counts[column] += 1
            counts[2] += bool(row["aux_images"])
    of_paper = {name for name, *_ in COMPOSITION}
    of_ours = [(name, 0, 0, 0, 0) for name in sorted(set(ours) - of_paper)]
    total = [sum(row[i] for row in COMPOSITION) for i in range(1, 5)]
    ours["all"] = [sum(counts[i] for counts in ours.values()) for i in range(3)]

    print(
        f"\n{'':26}{'paper':>8}{'release: train':>16}{'val':>7}{'latent':>8}"
        f"{'ours: train':>14}{'val':>7}{'latent':>8}"
    )
    for name, paper, *release in [*COMPOSITION, *of_ours, ("all", *total)]:
        theirs = f"{paper:8}{release[0]:16}{release[1]:7}{release[2]:8}"
        mine = f"{ours[name][0]:14}{ours[name][1]:7}{ours[name][2]:8}"
        print(f"{name[:25]:26}{theirs}{mine}")
    print(SECOND_RELEASE)


# --------------------------------------------------------------------------------------------------
# sheet


def contact_sheet():
    """A page of n_sheet random examples: query image, auxiliary image, question, response."""
    rows = load_data()
    some = random.Random(seed).sample(rows, min(n_sheet, len(rows)))
    cards = [card_of(row) for row in Progress(some, desc="sheet", unit="example")]
    write_page(sheet, f"{len(some)} of {len(rows)} examples of {data}", cards)
    print(f"wrote {sheet}: open it in a browser")


def shown(content, caption):
    """Encoded bytes as a figure in HTML, or why there is none."""
    try:
        return figure(decode_rgb(content), caption)
    except Reject as e:
        return f"<p>{html.escape(f'{caption}: {e.reason} {e.detail}')}</p>"


def card_of(row):
    """An example as HTML."""
    pictures = []
    for field, kind in (("images", "query"), ("aux_images", "auxiliary")):
        for i, path in enumerate(row[field]):
            pictures.append(shown((Path(out) / path).read_bytes(), f"{kind} {i}"))
    gold = f"gold answer: {row['answer']}"
    return card(row["id"], row.get("category"), pictures, question_text(row), row["response"], gold)


COMMANDS = {
    "convert": convert,
    "synthesise": synthesise,
    "filter": filter_data,
    "audit": audit,
    "split": split,
    "sheet": contact_sheet,
}


if __name__ == "__main__":
    Image.MAX_IMAGE_PIXELS = None  # decode() has a limit of its own, checked before a pixel is read
    start(**COMMANDS)
