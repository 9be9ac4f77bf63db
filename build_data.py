"""Make the JSONL that the other stages read, from public data or with a teacher (the paper's data-level alignment).

Everything that is written lies in one folder, `out`; images are copied to <out>/images once, named by their content.

    python build_data.py convert --source=monet --files='Monet-SFT-125K/*/train.json' --root=Monet-SFT-125K
    python build_data.py synthesise --data=data/viscot.jsonl     an image model draws, a teacher writes: <out>/synthesised.jsonl
    python build_data.py filter --data=data/monet.jsonl,data/synthesised.jsonl         <out>/filtered.jsonl, <out>/rejects.jsonl
    python build_data.py audit --data=data/filtered.jsonl --benchmarks=MMStar,POPE     <out>/audited.jsonl, <out>/audit.html
    python build_data.py split --data=data/audited.jsonl         <out>/train.jsonl, <out>/val.jsonl, the composition table
    python build_data.py sheet --data=data/train.jsonl --sheet=sheet.html              a page to look at with one's own eyes

A killed stage goes on where it stopped: each finished item is a line under <out>/work, used again while neither the item nor
the stage's settings change. Nothing is ever fetched but from the two endpoints of `synthesise`.
"""

import base64
import glob
import hashlib
import html
import io
import json
import os
import random
import re
import sys
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status
from PIL import Image, ImageDraw
from tqdm import tqdm

from answers import extract_answer, is_correct, normalise
from benchmarks import BENCHMARKS, images_of, load_benchmark
from data import (
    LATENT_SPAN,
    RESERVED,
    TAG_ORDER,
    TAGS,
    append,
    check_choices,
    key_of,
    load_examples,
    open_append,
    open_image,
    pick_device,
    read_lines,
    start,
    write_lines,
    write_then_rename,
)
from endpoint import answered, is_refusal
from model import grid_features, load_processor, load_vlm, spread
from pages import coloured, write_page
from sources import (
    COMPOSITION,
    FIELDS,
    NEEDED,
    SOURCES,
    SURROGATE,
    Reject,
    Unanswered,
    clean,
    in_our_tags,
    source_of,
    wrapped,
)

# ---------------------------------------------------------------------------------------------------
out = "data"
data = ""  # files in `out` that a stage reads, with commas between
workers = 2  # items at a time: CPU cores, or requests that the teacher answers at once
seed = 12345
limit = 0  # > 0: only so many items, drawn by the seed

# convert
source = ""  # gap monet viscot lvr zebra teacher qa
files = ""  # the source's JSON or JSONL; a pattern with * may name several
root = ""  # the folder that its image paths start from, and may not leave; "": that of each file
label = ""  # the name of the output file and its row of the composition table; "": the source's own
draw = "crop"  # where a source has boxes, the auxiliary image is the enlarged crop, or the query with the box's outline
crop_margin = 0.2  # of the box's sides, added on each side
crop_side = 448  # pixels: a smaller crop's long side is enlarged to this
max_bytes = 64_000_000  # of an image file
bomb_pixels = 50_000_000  # an image of more is taken for a decompression bomb
min_side = 28  # pixels: one merged vision token

# synthesise
teacher_url = os.environ.get(
    "TEACHER_URL", "http://localhost:8000/v1"
)  # /chat/completions is appended
teacher_model = os.environ.get("TEACHER_MODEL", "Qwen2.5-VL-72B-Instruct")
teacher_key = os.environ.get(
    "TEACHER_KEY_NAME", "TEACHER_KEY"
)  # the *name* of the environment variable that holds the key
image_url = os.environ.get("IMAGE_URL", "http://localhost:8001/v1")  # /images/edits is appended
image_model = os.environ.get("IMAGE_MODEL", "Qwen-Image-Edit")
image_key = os.environ.get("IMAGE_KEY_NAME", "IMAGE_KEY")
tries = 6  # of a request; the pauses between them double from first_pause to a minute, or are the server's Retry-After
first_pause = 1.0  # seconds
give_up = 20  # items in a row without an answer: the endpoint is down
timeout = 300.0  # seconds
max_tokens = 2048
temperature = 0.7  # above 0: a retry of an unusable answer can differ
send_side = 1536  # pixels: larger images are scaled down for the teacher
image_prompt = """Edit this image so that it shows what one has to see to answer the question below: mark, enlarge, \
draw or rearrange the decisive parts. Keep what is true of the image. Do not write the answer into it.

Question: {question}"""
teacher_prompt = """The first image or images belong to the question. The last image is an auxiliary image: a picture in the \
mind of someone who reasons about the question. You know the answer; write the reasoning that leads to it, in this form:

<think> What the question asks, and why a closer look is needed. <latent></latent> <parser> What the auxiliary image shows, \
in one to five sentences: objects, places, numbers, text; neither the question again nor the answer. </parser> \
What follows from it. </think> <answer> The answer, exactly as given. </answer>

Write each tag as it stands here and once only, leave <latent></latent> empty, use the language of the question, and write \
nothing before or after. Do not mention the auxiliary image outside <parser>, nor that you were given the answer.

Question: {question}
Answer: {answer}"""

# filter
need_parser = True  # an example with latents has a text that says what they mean
parser_words_min, parser_words_max = (
    5,
    200,
)  # [ours; the paper filters by length and names no bounds]
parser_repeats = 0.8  # Jaccard overlap of the parser's and the question's words from which it only repeats the question
blank = 2.0  # grey levels: an auxiliary image whose standard deviation is below this is blank
same_as_query = 8.0  # grey levels: the largest difference on a 64 x 64 grid below which it is the query image again
base = ""  # a Qwen2.5-VL folder: also reject flat embeddings by its tower ("": leave that to fit_pca.py, which always does)
degenerate = 1e-3  # var(v) / mean ||v||^2, as in fit_pca.py
K = 36
mode = "pool"
min_pixels, max_pixels = 56 * 56, 1280 * 28 * 28  # the tower's pixel limits

# audit
benchmarks = ""  # test sets with commas between: names of eval.py's benchmarks, or JSONL files
data_root = "data/benchmarks"  # where the benchmarks' official files lie
near = 52  # of 255 bits: at most so many differ between near-duplicates
drop = "pixels,question"  # kinds of finding whose examples are left out: pixels question near
max_pairs = 500  # near pairs on the page, the nearest first

# split, sheet
val_share = 0.1
sheet = "data/sheet.html"
n_sheet = 40
# ---------------------------------------------------------------------------------------------------

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # decoded in this process; EPS would start another program
LOCK = threading.Lock()


def read_items(path):
    """Yield (line or position, item or None, error) of a JSON list or a JSONL file, as far as it can be read."""
    text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    if not text.lstrip().startswith("["):
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield n, *parse(json.loads, line)
        return
    decoder, at, n = json.JSONDecoder(), text.index("[") + 1, 0
    gap = re.compile(r"[\s,]*")
    while not text.startswith("]", at := gap.match(text, at).end()):
        n, end = n + 1, 0

        def load(text):
            nonlocal end
            value, end = decoder.raw_decode(text, at)
            return value

        yield n, *parse(load, text)
        if not end:  # where the next item would start is not known
            return
        at = end


def parse(load, text):
    """(value, "") or (None, what is wrong)."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(
        limit // 2
    )  # of a thousand brackets in each other; what passes can be written again from anywhere
    try:
        value = load(text)
        if SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            return None, "not UTF-8"
        return value, ""
    except (ValueError, RecursionError) as e:
        return None, f"not JSON: {e}"
    finally:
        sys.setrecursionlimit(limit)


def each(work, items):
    """Yield work(item) as they end, `workers` at a time; few items are held, so they may be read as they are needed."""
    pool, running = ThreadPoolExecutor(workers), set()
    try:
        for item in items:
            running.add(pool.submit(work, item))
            if len(running) >= 2 * workers:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ended)
        yield from (future.result() for future in as_completed(running))
    finally:
        pool.shutdown(cancel_futures=True)


def run_stage(name, rows, work, settings, rejects="rejects.jsonl"):
    """Run work(row) -> row on all rows, `workers` at a time. Writes <out>/<name>.jsonl and the rejects with their reasons.

    A finished item is a line of <out>/work/<name>.jsonl at once. Its key is a hash of the row and the settings named.
    """
    settings = {k: globals()[k] for k in settings}
    keys = [key_of(settings | {"row": row}) for row in rows]
    path = Path(out) / "work" / f"{name}.jsonl"
    wanted, unanswered, in_a_row = set(keys), {}, 0
    done = {line["key"]: line for line in read_lines(path) if line["key"] in wanted}

    def one(item):
        key, row = item
        try:
            return {"key": key, "row": work(row)}
        except Reject as e:
            reason, number, detail = (*e.args, None, "")[:3]
            line = {
                "key": key,
                "reject": {
                    "id": clean(row["id"]),
                    "reason": reason,
                    "number": number,
                    "detail": clean(detail),
                },
            }
            return line | {"again": True} if isinstance(e, Unanswered) else line

    todo = [(k, row) for k, row in zip(keys, rows) if k not in done]
    with open_append(path) as f:
        for line in tqdm(
            each(one, todo), total=len(rows), initial=len(rows) - len(todo), desc=name, unit="item"
        ):
            if "again" not in line:
                append(f, line)
                done[line["key"]], in_a_row = line, 0
                continue
            unanswered[line["key"]], in_a_row = line, in_a_row + 1
            if in_a_row == give_up:
                reject = line["reject"]
                raise SystemExit(
                    f"{give_up} items in a row had no answer ({reject['reason']}: {reject['detail']}); what is "
                    "finished is kept: mend the endpoint and run the same command again"
                )
    lines = [done.get(k) or unanswered[k] for k in keys]
    kept, rejected = (
        [line["row"] for line in lines if "row" in line],
        [line["reject"] for line in lines if "reject" in line],
    )
    write_lines(Path(out) / rejects, rejected)
    write_lines(Path(out) / f"{name}.jsonl", kept)
    print(f"{name}: kept {len(kept)} of {len(rows)}, rejected {len(rejected)}")
    for reason, n in Counter(r["reason"] for r in rejected).most_common():
        print(
            f"  {n:7} {reason:34} e.g. {next(r['id'] for r in rejected if r['reason'] == reason)}"
        )
    if unanswered:
        print(
            f"  run the same command again to ask once more for the {len(unanswered)} without an answer"
        )
    return kept


def data_files():
    """The files that `data` names. Image paths are relative to the file, so all of them lie in `out`."""
    paths = [Path(p.strip()) for p in data.split(",") if p.strip()]
    if not paths:
        raise SystemExit("data='' names no file; give --data=FILE or several with commas between")
    for path in paths:
        if not path.is_file() or path.resolve().parent != Path(out).resolve():
            raise SystemExit(
                f"{path}: no such file in out={out!r}; a file from elsewhere comes in by `convert`"
            )
    return paths


def load_data():
    """The checked examples of all `data` files, image paths relative to `out`; an id occurs once."""
    rows, seen = [], set()
    for path in data_files():
        for row in load_examples(path):
            if row["id"] in seen:
                raise SystemExit(f"{path}: id {row['id']!r} occurs in several of {data}")
            seen.add(row["id"])
            rows.append(
                row
                | {f: [os.path.relpath(p, out) for p in row[f]] for f in ("images", "aux_images")}
            )
    return draw_rows(rows)


def draw_rows(rows):
    """At most `limit` of the rows, drawn by the seed, in their old order."""
    if not limit or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def read_inside(folder, name):
    """The bytes of a file in `folder`. Raises Reject for any path, link included, that leaves it."""
    try:
        path = (Path(folder) / name).resolve()
        if not path.is_relative_to(Path(folder).resolve()):
            raise Reject("path leaves the data folder", None, name)
        if not path.is_file():
            raise Reject("no such image", None, name)
        if (size := path.stat().st_size) > max_bytes:
            raise Reject("image file too large", size, name)
        return path.read_bytes()
    except (
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
    ) as e:  # NUL bytes, endless names, links in circles, no string at all
        raise Reject("unreadable path", None, f"{clean(name)}: {e}") from None


def decode(content):
    """(RGB image, suffix) of an encoded image; the suffix is "" where the bytes have to be written anew to look like this."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > bomb_pixels:
            raise Reject("image has too many pixels", width * height, f"{width} x {height}")
        if image.format != "MPO" and getattr(
            image, "is_animated", False
        ):  # MPO: a phone's photo with a preview
            raise Reject("animated image")
        image.load()
        kind = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}.get(image.format, "")
        as_is = kind and image.mode in ("RGB", "L") and not image.has_transparency_data
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif (
            image.has_transparency_data
        ):  # on white, as a reader sees it; RGB alone would show what lies beneath
            layer = image.convert("RGBA")
            image = Image.new("RGB", image.size, "white")
            image.paste(layer, mask=layer.getchannel("A"))
        image = image.convert("RGB")
    except Reject:
        raise
    except Exception as e:  # decoders of hostile bytes raise nearly anything
        raise Reject("unreadable image", None, f"{type(e).__name__}: {e}") from None
    return check_size(image), kind if as_is else ""


def check_size(image):
    """The image, if the processor can take it. Raises Reject."""
    low, high = sorted(image.size)
    if low < min_side:
        raise Reject("image too small", low, f"{image.width} x {image.height}")
    if high > 200 * low:
        raise Reject(
            "image too narrow for the processor", high // low, f"{image.width} x {image.height}"
        )
    return image


def encode_image(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def store(content, image, suffix):
    """Write an image to <out>/images, named by its content, unless it is there; returns its path in `out`."""
    content, suffix = (content, suffix) if suffix else (encode_image(image), ".png")
    digest = hashlib.sha256(content).hexdigest()
    name = f"images/{digest[:2]}/{digest[2:34]}{suffix}"
    with LOCK:  # two workers may hold the same picture
        if not (Path(out) / name).exists():
            write_then_rename(Path(out) / name, lambda p: p.write_bytes(content))
    return name


def stand_in(image, box):
    """The auxiliary image that a box gives, by the rule `draw`. The box (x1, y1, x2, y2) is in pixels or in shares of 1."""
    size = np.tile(image.size, 2)
    inside = np.clip(
        np.array(box) * (size if max(box) <= 1.1 else 1), 0, size
    )  # shares reach 1.002 in Visual-CoT
    if (inside[2:] - inside[:2]).min() < 2:
        raise Reject(
            "box is empty or outside the image", None, f"{box} in {image.width} x {image.height}"
        )
    margin = (
        crop_margin * np.tile(inside[2:] - inside[:2], 2) * (-1, -1, 1, 1) if draw == "crop" else 0
    )
    low, high = np.clip(np.rint(inside + margin), 0, size).astype(int).reshape(2, 2)
    if draw == "outline":
        image = image.copy()
        ImageDraw.Draw(image).rectangle(
            (*low, *(high - 1)), outline="red", width=max(2, max(image.size) // 200)
        )
        return image
    part = image.crop((*low, *high))
    scale = max(1, crop_side / max(part.size), min_side / min(part.size))
    return check_size(
        part.resize((round(part.width * scale), round(part.height * scale)), Image.BICUBIC)
    )


def check_example(row):
    """The checks of load_examples on one row. Raises Reject."""
    for field, kind in [(f, str) for f in ("id", "question", "answer", "response")] + [
        (f, list) for f in ("images", "aux_images", "options") if f != "options" or f in row
    ]:
        if not isinstance(row.get(field), kind) or (
            kind is list and not all(isinstance(x, str) for x in row[field])
        ):
            raise Reject(
                "field of another type",
                None,
                f"{field}: {row.get(field)!r}, expected {kind.__name__}",
            )
    for field in ("question", "answer", "images"):
        if not row[field]:
            raise Reject(f"{field} is empty")
    for field in ("question", "response"):
        if found := RESERVED.search(row[field]):
            raise Reject("reserved token in the text", None, f"{found[0]} in {field}")
    tags = "".join(TAGS.findall(row["response"]))
    if not TAG_ORDER.fullmatch(tags) or not re.fullmatch(
        r"<think>.*</think>\s*<answer>.*</answer>", row["response"], re.DOTALL
    ):
        raise Reject("tags missing or out of order", None, tags)
    if (spans := row["response"].count(LATENT_SPAN)) != tags.count("<latent>"):
        raise Reject("text inside a latent span", None, tags)
    if spans != len(row["aux_images"]):
        raise Reject(
            "spans and auxiliary images differ",
            spans - len(row["aux_images"]),
            f"{spans} spans, {len(row['aux_images'])} images",
        )


def convert_one(row):
    """One item of a source as an example whose images are in <out>/images."""
    if row["error"]:
        raise Reject("unreadable line", None, row["error"])
    try:
        example = SOURCES[source](row["item"])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as e:
        raise Reject("another layout than the source's", None, f"{type(e).__name__}: {e}") from None
    names, aux = example.pop("images"), example.pop("aux")
    example["question"] = example["question"].replace("<image>", "").strip()
    example = (
        {"id": row["id"]} | example | {"images": ["?"] * len(names), "aux_images": ["?"] * len(aux)}
    )
    check_example(example)  # before an image is written

    def picture(name):
        content = name if isinstance(name, bytes) else read_inside(row["root"], name)
        return content, *decode(content)

    pictures = [picture(name) for name in names]
    drawn = [
        (b"", stand_in(pictures[0][1], a), "") if isinstance(a, tuple) else picture(a) for a in aux
    ]
    return example | {
        "images": [store(*p) for p in pictures],
        "aux_images": [store(*p) for p in drawn],
        "category": label or example["category"] or source,
    }


def convert():
    check_choices(globals(), source=tuple(SOURCES), draw=("crop", "outline"))
    if Path(label).name != label:
        raise SystemExit(f"label={label!r} is no name for a file in {out}")
    paths = [path for path in sorted(glob.glob(files, recursive=True)) if os.path.isfile(path)]
    if not paths:
        raise SystemExit(
            f"files={files!r} matches no file; give --files=FILE, or a pattern in quotes"
        )
    rows = []
    for path in tqdm(paths, desc="reading", unit="file"):
        folder = root or os.path.dirname(path) or "."
        name = os.path.relpath(path, folder)
        rows += [
            {
                "id": clean(f"{label or source}/{name}:{n}"),
                "root": folder,
                "item": item,
                "error": error,
            }
            for n, item, error in read_items(path)
        ]
    columns = {c for row in rows if isinstance(row["item"], dict) for c in row["item"]}
    for field in NEEDED.get(source, ()):
        if columns and not columns & set(FIELDS[field]):
            raise SystemExit(
                f"{files}: no column for {field!r}: looked for {', '.join(FIELDS[field])}; found "
                f"{', '.join(sorted(map(clean, columns)))}. Add its name to FIELDS in build_data.py"
            )
    changes = (
        "source",
        "label",
        "draw",
        "crop_margin",
        "crop_side",
        "max_bytes",
        "bomb_pixels",
        "min_side",
    )
    run_stage(
        label or source, draw_rows(rows), convert_one, changes, f"rejects.{label or source}.jsonl"
    )


def ask(call, url):
    """call() until it gives something usable. Raises Reject when only unusable answers come, Unanswered when none does."""
    for n in range(tries):
        try:
            return answered(call, url, tries - n, first_pause)
        except Reject as e:  # the server is well, its answer is not: draw another
            last = e
        except HTTPError as e:
            response = getattr(e, "response", None)
            status = response.status_code if response is not None else 0
            if is_refusal(status):
                raise Reject("refused by the endpoint", status, str(e)) from None
            raise Unanswered(
                "no answer from the endpoint", status or None, f"{type(e).__name__}: {e}"
            ) from None
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
        ) as e:  # no JSON, or JSON of another protocol
            raise Unanswered(
                "answer of another protocol", None, f"{type(e).__name__}: {e}"
            ) from None
    raise last


def log_cost(model, start, usage=None):
    """A line a request in <out>/work/cost.jsonl: what was paid is known after a kill, too."""
    line = {"model": model, "seconds": round(time.monotonic() - start, 3)}
    line |= {k: getattr(usage, k, None) or 0 for k in ("prompt_tokens", "completion_tokens")}
    with LOCK, open(Path(out) / "work" / "cost.jsonl", "ab") as f:
        append(f, line)


def data_url(path):
    """An image of <out> as the teacher gets it, at most send_side large."""
    image = open_image(Path(out) / path)
    image.thumbnail((send_side, send_side))
    return {
        "type": "image_url",
        "image_url": {
            "url": f"data:image/png;base64,{base64.b64encode(encode_image(image)).decode()}"
        },
    }


def draw_image(row):
    """A row with an auxiliary image: its own, or one that the image model makes of the first query image (/images/edits)."""
    if row["aux_images"]:
        return row

    def call():
        start = time.monotonic()
        try:
            response = get_session().post(
                f"{image_url.rstrip('/')}/images/edits",
                timeout=timeout,
                headers={"Authorization": f"Bearer {os.environ.get(image_key) or 'none'}"},
                data={
                    "model": image_model,
                    "prompt": image_prompt.format(question=row["question"]),
                    "n": "1",
                },
                files={
                    "image": (
                        "query.png",
                        encode_image(open_image(Path(out) / row["images"][0])),
                        "image/png",
                    )
                },
            )
        finally:
            log_cost(image_model, start)
        hf_raise_for_status(response)
        content = base64.b64decode(response.json()["data"][0]["b64_json"], validate=True)
        return content, *decode(content)

    drawn = store(*ask(call, image_url))
    return row | {"aux_images": [drawn], "response": wrapped(LATENT_SPAN, row["answer"])}


def write_response(row):
    """A row with the teacher's response; the teacher sees the query images, the auxiliary image, question and answer."""
    if len(row["aux_images"]) != 1:
        raise Reject("teacher writes for one auxiliary image", len(row["aux_images"]))
    # without a key the client would send the user's own hub token to this endpoint
    client = InferenceClient(
        base_url=teacher_url, api_key=os.environ.get(teacher_key) or "none", timeout=timeout
    )
    prompt = teacher_prompt.format(question=row["question"], answer=row["answer"])
    content = [data_url(p) for p in row["images"] + row["aux_images"]] + [
        {"type": "text", "text": prompt}
    ]

    def call():
        start, usage = time.monotonic(), None
        try:
            reply = client.chat_completion(
                [{"role": "user", "content": content}],
                model=teacher_model,
                max_tokens=max_tokens,
                temperature=temperature,
            )
            usage = reply.usage
        finally:
            log_cost(teacher_model, start, usage)
        if reply.choices[0].finish_reason == "length":
            raise Reject("teacher was cut off", max_tokens)
        text = reply.choices[0].message.content
        if not isinstance(text, str) or SURROGATE.search(text):
            raise Reject("teacher wrote no text")
        written = row | {"response": in_our_tags(text)}
        check_example(written)
        return written

    return ask(call, teacher_url)


def synthesise():
    start = time.monotonic()
    for url in (teacher_url, image_url):
        if not url.startswith(
            ("http://", "https://")
        ):  # the client would take it for the name of a model on the hub
            raise SystemExit(
                f"{url!r} is no endpoint: expected http://... or https://..., up to and with /v1"
            )
    open_append(
        Path(out) / "work" / "cost.jsonl"
    ).close()  # a line that a kill cut in two is gone before the next is written
    drawn = run_stage(
        "drawn",
        load_data(),
        draw_image,
        ("image_url", "image_model", "image_prompt"),
        "rejects.drawn.jsonl",
    )
    changes = (
        "teacher_url",
        "teacher_model",
        "teacher_prompt",
        "max_tokens",
        "temperature",
        "send_side",
    )
    run_stage("synthesised", drawn, write_response, changes, "rejects.synthesised.jsonl")
    lines = read_lines(Path(out) / "work" / "cost.jsonl")
    total = {
        k: sum(line[k] for line in lines) for k in ("prompt_tokens", "completion_tokens", "seconds")
    }
    print(
        f"cost, all runs: {len(lines):,} requests, {total['prompt_tokens']:,} prompt and {total['completion_tokens']:,} "
        f"written tokens, {total['seconds']:,.0f} s of requests; this run took {time.monotonic() - start:,.0f} s"
    )


def script(text):
    """The script that most letters of a text are in, by their Unicode names: LATIN, CJK, CYRILLIC ...; "" without letters."""
    counts = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    name = counts.most_common(1)[0][0] if counts else ""
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name


def check_parser(text, row):
    """Length and coherence of one <parser> text. Raises Reject."""
    lines, count = (
        [line.strip() for line in re.split(r"\n|(?<=[.!?])\s+", text.strip())],
        len(text.split()),
    )
    if script(text) == "CJK":  # written without spaces; about two signs a word
        count = len(re.findall(r"\w", text)) // 2
    if count < parser_words_min:
        raise Reject("parser too short", count, text)
    if count > parser_words_max:
        raise Reject("parser too long", count)
    if empty := lines.count(""):
        raise Reject("parser has empty lines", empty)
    if again := len(lines) - len(set(lines)):
        raise Reject("parser repeats lines", again)
    if script(row["question"]) and script(text) != script(row["question"]):
        raise Reject(
            "parser in another script than the question",
            None,
            f"{script(text)}, {script(row['question'])}",
        )
    mine, asked = (set(re.findall(r"\w+", t.lower())) for t in (text, row["question"]))
    if (overlap := len(mine & asked) / max(1, len(mine | asked))) >= parser_repeats:
        raise Reject("parser repeats the question", round(overlap, 3), text)
    answer, method = extract_answer(text)
    if normalise(text) == normalise(row["answer"]) or (
        method in ("declared", "boxed") and is_correct(answer, row)
    ):
        raise Reject("parser states the answer", None, text)


def grey(image, side):
    return np.asarray(image.convert("L").resize((side, side), Image.BOX), dtype=float)


def check_auxiliary(image, queries):
    """An auxiliary image must show something, and something else than the query. Raises Reject."""
    if (deviation := float(np.asarray(image, dtype=float).std(axis=(0, 1)).max())) < blank:
        raise Reject("auxiliary image is blank", round(deviation, 3))
    for query in queries:
        scaled = query.resize(
            image.size, Image.BICUBIC
        )  # first to one size, so that both fall on the grid alike
        if (difference := float(np.abs(grey(image, 64) - grey(scaled, 64)).max())) < same_as_query:
            raise Reject("auxiliary image is the query image", round(difference, 3))


def filter_one(row, tower=None):
    """All checks of one example, cheapest first."""
    if row["error"] or not isinstance(row["item"], dict):
        raise Reject(
            "unreadable or repeated",
            None,
            row["error"] or f"a {type(row['item']).__name__}, expected an object",
        )
    row = row["item"]
    check_example(row)
    answer = extract_answer(row["response"])[0]
    if not is_correct(answer, row):
        raise Reject(
            "answer differs from the gold answer", None, f"{answer!r}, gold {row['answer']!r}"
        )
    described = "".join(TAGS.findall(row["response"])).count("<latent></latent><parser>")
    if need_parser and described < len(row["aux_images"]):
        raise Reject("span without a parser text after it", len(row["aux_images"]) - described)
    for text in re.findall(r"<parser>(.*?)</parser>", row["response"], re.DOTALL):
        check_parser(text, row)
    queries, aux = (
        [decode(read_inside(out, p))[0] for p in row[f]] for f in ("images", "aux_images")
    )
    for image in aux:
        check_auxiliary(image, queries)
    if tower and aux and K > 1:  # one latent an image has no spread to judge by
        with torch.inference_mode():
            flat = float(spread(grid_features(*tower, aux, K, mode)).min())
        if flat < degenerate:
            raise Reject("auxiliary embeddings hardly vary", flat)
    return row


def filter_data():
    check_choices(globals(), mode=("pool", "resize"))
    rows, seen = [], set()
    for path in data_files():
        for n, item, error in read_items(path):
            id = (
                item["id"]
                if isinstance(item, dict) and isinstance(item.get("id"), str)
                else f"{path.name}:{n}"
            )
            if id in seen and not error:
                error = f"id {id!r} occurs before"
            seen.add(id)
            rows.append({"id": id, "item": item, "error": error})
    tower = None
    if base:
        vlm, _ = load_vlm(
            base, torch.bfloat16 if torch.cuda.is_available() else torch.float32, pick_device()
        )
        tower = vlm, load_processor(base, min_pixels, max_pixels)
    changes = (
        "need_parser",
        "parser_words_min",
        "parser_words_max",
        "parser_repeats",
        "blank",
        "same_as_query",
        "base",
        "degenerate",
        "K",
        "mode",
        "min_pixels",
        "max_pixels",
        "max_bytes",
        "bomb_pixels",
        "min_side",
    )
    run_stage("filtered", draw_rows(rows), lambda row: filter_one(row, tower), changes)


SIDE, LOW = (
    32,
    16,
)  # the perceptual hash: signs of the LOW x LOW slowest cosines of a SIDE x SIDE grey image
COSINES = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5) * np.arange(LOW)[:, None])


def load_test_rows(name):
    """Rows of a public benchmark, by its name in eval.py, or of a JSONL test set."""
    return (
        load_benchmark(name, data_root)[0]
        if name in BENCHMARKS
        else load_examples(name, training=False)
    )


def fingerprint(image):
    """(SHA-256 of the decoded pixels, perceptual hash of 256 bits) as hex; the hash has a bit 0 in place of the mean."""
    pixels = hashlib.sha256(str(image.size).encode() + image.tobytes()).hexdigest()
    waves = COSINES @ grey(image, SIDE) @ COSINES.T
    bits = waves.flatten() > 1e-6  # a flat image gives zeros, not the signs of rounding errors
    bits[0] = False
    return pixels, np.packbits(bits).tobytes().hex()


def fingerprints(sources, total, name):
    """{where: (pixels, hash)} of (where, path or bytes) pairs, one image in memory a worker; the rest could not be decoded.

    Kept under <out>/work by the file's name, size and time, or by the bytes.
    """
    path = Path(out) / "work" / "fingerprints.jsonl"
    known, found = {line["key"]: line["print"] for line in read_lines(path)}, {}

    def one(item):
        where, content = item
        if isinstance(content, bytes):
            key = hashlib.sha256(content).hexdigest()[:16]
        else:
            stat = os.stat(content)
            key = key_of(
                {"path": os.path.realpath(content), "size": stat.st_size, "time": stat.st_mtime_ns}
            )
        if key in known:
            return where, key, known[key]
        try:
            return (
                where,
                key,
                fingerprint(
                    decode(content if isinstance(content, bytes) else Path(content).read_bytes())[0]
                ),
            )
        except Reject as e:
            return where, key, [e.args[0], ""]

    with open_append(path) as f:
        for where, key, print_ in tqdm(each(one, sources), total=total, desc=name, unit="image"):
            if key not in known:
                known[key] = print_
                append(f, {"key": key, "print": print_})
            found[where] = print_
    unread = [where for where, (_, hash_) in found.items() if not hash_]
    if unread:
        print(
            f"{name}: {len(unread)} images could not be compared, e.g. {unread[0]}: {found[unread[0]][0]}"
        )
    return {where: print_ for where, print_ in found.items() if print_[1]}


def nearest(ours, theirs, block=128):
    """For each fingerprint of ours the smallest Hamming distance to theirs, and where: two (n); block x m pairs at a time."""
    ours, theirs = (
        np.array([np.frombuffer(bytes.fromhex(bits), np.uint64) for _, bits in prints])
        for prints in (ours, theirs)
    )
    distance, index = np.zeros(len(ours), int), np.zeros(len(ours), int)
    for i in tqdm(range(0, len(ours), block), desc="near-duplicates", unit="block"):
        part = ours[i : i + block]
        bits = sum(
            np.bitwise_count(part[:, None, w] ^ theirs[None, :, w]) for w in range(4)
        )  # at most 255: uint8 holds it
        index[i : i + block] = bits.argmin(1)
        distance[i : i + block] = bits.min(1)
    return distance, index


def audit():
    """Write the findings (audit.jsonl), the near pairs (audit.html) and the rows without findings of `drop` (audited.jsonl)."""
    dropped = {kind.strip() for kind in drop.split(",") if kind.strip()}
    if unknown := dropped - {"pixels", "question", "near"}:
        raise SystemExit(f"drop={drop!r}: {sorted(unknown)} is none of pixels, question, near")
    if not benchmarks:
        raise SystemExit(
            "benchmarks='' names no test set; give --benchmarks=FILE or several with commas between"
        )
    rows = load_data()
    tests = {
        (name.strip(), row["id"]): row
        for name in benchmarks.split(",")
        for row in load_test_rows(name.strip())
    }
    names = list(dict.fromkeys(p for row in rows for p in row["images"] + row["aux_images"]))
    ours = fingerprints(((name, Path(out) / name) for name in names), len(names), "our images")
    theirs = fingerprints(
        (
            (key + (i,), image)
            for key, row in tests.items()
            for i, image in enumerate(images_of(row))
        ),
        None,
        "benchmark images",
    )
    by_pixels = {pixels: where for where, (pixels, _) in theirs.items()}
    asked = lambda row: normalise(unicodedata.normalize("NFKC", row.get("asked", row["question"])))  # noqa: E731
    by_question = {asked(row): key for key, row in tests.items()}
    near_to = {}
    if ours and theirs:
        distance, index = nearest(ours.values(), theirs.values())
        where = list(theirs)
        near_to = {
            name: (int(d), where[j]) for name, d, j in zip(ours, distance, index) if d <= near
        }
    findings = []
    for row in rows:
        note = (
            lambda kind, image, key, d: findings.append(  # noqa: E731
                {
                    "kind": kind,
                    "id": row["id"],
                    "image": image,
                    "benchmark": key[0],
                    "benchmark_id": key[1],
                    "benchmark_image": key[2] if key[2:] else None,
                    "distance": d,
                }
            )
        )
        if key := by_question.get(asked(row)):
            note("question", None, key, None)
        for name in row["images"] + row["aux_images"]:
            if name in ours and (key := by_pixels.get(ours[name][0])):
                note("pixels", name, key, 0)
            elif name in near_to:
                note("near", name, near_to[name][1], near_to[name][0])
    write_lines(Path(out) / "audit.jsonl", findings)
    gone = {f["id"] for f in findings if f["kind"] in dropped}
    write_lines(Path(out) / "audited.jsonl", [row for row in rows if row["id"] not in gone])
    pairs = sorted((f for f in findings if f["kind"] == "near"), key=lambda f: f["distance"])[
        :max_pairs
    ]
    cards = [
        f"<p>{f['distance']} of 255 bits differ</p>"
        + figure(Path(out) / f["image"], f["id"])
        + figure(
            images_of(tests[f["benchmark"], f["benchmark_id"]])[f["benchmark_image"]],
            f"{f['benchmark']} {f['benchmark_id']}",
        )
        for f in pairs
    ]
    write_page(Path(out) / "audit.html", f"{len(pairs)} near pairs: ours, theirs", cards)
    counts = Counter(f["kind"] for f in findings)
    print(
        f"audit: {len(ours):,} images of {len(rows):,} examples against {len(theirs):,} of {len(tests):,} test rows: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in ("pixels", "question", "near"))
        + f"; left out {len(gone)} examples (drop={drop}); judge the near pairs in {Path(out) / 'audit.html'}"
    )


def groups_of(rows, prints):
    """Lists of rows such that no image, by its pixels, occurs in two of them."""
    leader = list(range(len(rows)))

    def find(i):
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first = {}
    for i, row in enumerate(rows):
        for name in row["images"] + row["aux_images"]:
            leader[find(i)] = find(first.setdefault(prints.get(name, [name])[0], i))
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[find(i)].append(row)
    return list(groups.values())


def split():
    """Write train.jsonl and val.jsonl without a shared image, and print what they are made of."""
    rows = load_data()
    names = list(dict.fromkeys(p for row in rows for p in row["images"] + row["aux_images"]))
    groups = groups_of(
        rows, fingerprints(((name, Path(out) / name) for name in names), len(names), "images")
    )
    random.Random(seed).shuffle(groups)
    held_out = set()
    for group in groups:
        if len(held_out) + len(group) <= round(val_share * len(rows)):
            held_out |= {row["id"] for row in group}
    parts = {
        "train": [row for row in rows if row["id"] not in held_out],
        "val": [row for row in rows if row["id"] in held_out],
    }
    for name, part in parts.items():
        write_lines(Path(out) / f"{name}.jsonl", part)
    print_composition(**parts)


def print_composition(train, val):
    """The table in the order of the paper's Fig. 5."""
    counts = defaultdict(lambda: [0, 0, 0])
    for column, part in enumerate((train, val)):
        for row in part:
            mine = counts[source_of(str(row.get("category", "no category")))]
            mine[column] += 1
            mine[2] += bool(row["aux_images"])
    table = COMPOSITION + [
        (name, 0, 0, 0, 0) for name in sorted(set(counts) - {name for name, *_ in COMPOSITION})
    ]
    table.append(("all", *(sum(row[i] for row in COMPOSITION) for i in range(1, 5))))
    counts["all"] = [sum(c[i] for c in counts.values()) for i in range(3)]
    print(
        f"\n{'':26}{'paper':>8}{'release: train':>16}{'val':>7}{'latent':>8}{'ours: train':>14}{'val':>7}{'latent':>8}"
    )
    for name, paper, *release in table:
        ours = counts[name]
        print(
            f"{name[:25]:26}{paper:8}{release[0]:16}{release[1]:7}{release[2]:8}{ours[0]:14}{ours[1]:7}{ours[2]:8}"
        )


def figure(image, caption):
    """An image (path or bytes) as part of a page, at most 320 pixels large."""
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    picture = decode(content)[0]
    picture.thumbnail((320, 320))
    content = base64.b64encode(encode_image(picture, "JPEG", quality=90, subsampling=0)).decode()
    return (
        f'<figure><img alt="" src="data:image/jpeg;base64,{content}">'
        f"<figcaption>{html.escape(str(caption))}</figcaption></figure>"
    )


def contact_sheet():
    """n_sheet random examples: query image, auxiliary image, question, response."""
    rows = load_data()
    picked = random.Random(seed).sample(rows, min(n_sheet, len(rows)))
    cards = []
    for row in tqdm(picked, desc="sheet", unit="example"):
        pictures = [
            figure(Path(out) / p, f"{kind} {i}")
            for field, kind in (("images", "query"), ("aux_images", "auxiliary"))
            for i, p in enumerate(row[field])
        ]
        cards.append(
            f"<p><b>{html.escape(row['id'])}</b> {html.escape(str(row.get('category', '')))}</p>"
            + "".join(pictures)
            + f"<pre>{html.escape(row['question'])}</pre><pre>{coloured(row['response'])}</pre>"
            f"<p>gold answer: {html.escape(row['answer'])}</p>"
        )
    write_page(sheet, f"{len(picked)} of {len(rows)} examples of {data}", cards)
    print(f"wrote {sheet}: open it in a browser")


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
