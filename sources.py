"""What does each public training set look like? Its files, columns, marks and boxes, in our format.

One function per source. It takes an item as the source publishes it and returns a dict of
`question`, `answer`, `response` (in our tags), `category`, perhaps `options`, and the pictures,
which are cells that picture_of() understands:

    images    of the question
    aux       of the latent spans, in their order; a Box is a part of the first image

An item of another layout ends in a KeyError, TypeError, ValueError or the like, one that lacks what
we need in a Reject. `build_data.py convert` makes a line of the rejects of either.
"""

import ast
import base64
import html
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from answers import boxed, extract_answer, tagged
from data import LATENT_SPAN, is_list
from files import SURROGATE, seed_of
from images import image_bytes, other_kind
from launch import is_machines
from resume import Reject

# --------------------------------------------------------------------------------------------------
# tables of facts

# gap, teacher and qa: the columns that a field is looked for in; the first that is there counts.
# Of the release (gap) only `data_source` is known: put its real names here.
# fmt: off
FIELDS = {
    "images": ("images", "image", "image_path", "query_image", "query_images"),
    "question": ("question", "query", "problem", "prompt"),
    "answer": ("answer", "gold_answer", "gold", "ground_truth", "solution"),
    "response": ("response", "teacher_response", "structured_response", "raw", "output",
                 "completion"),
    "aux_images": ("aux_images", "auxiliary_images", "aux_image", "auxiliary_image",
                   "latent_images", "latent_image"),
    "options": ("options", "choices"),
    "category": ("data_source", "category", "dataset", "source"),
}
SHORT_SOLUTION = 5  # words: of a longer one only what a tag or a box holds is the answer
NEEDED = {  # without a column for each of these a file is not what its source says
    "gap": ("images", "question", "response", "category"),
    "teacher": ("images", "question", "response"),
    "qa": ("images", "question", "answer"),
}

# The paper's Fig. 5, in its order: candidates after filtering, then of the release: train,
# validation, and how many of both have latents.
COMPOSITION = [
    ("Visual CoT",              20000, 16449, 1812, 13608),
    ("chart",                    7282,  6187,  671,  5831),
    ("GEOQA",                    7057,  3760,  401,  1174),
    ("MM Math",                  5345,  1988,  246,   730),
    ("Zebra-CoT count",          2766,   832,   91,   134),
    ("Zebra-CoT visual search",  2687,  2236,  280,   910),
    ("MathVision",               2032,   393,   44,   233),
    ("Geometry3K",               1082,   656,   79,   253),
    ("CogCoM",                    567,   401,   43,   376),
    ("ReFocus",                   426,   358,   38,   282),
    ("Zebra-CoT geometry",         65,    19,    1,    17),
]
SECOND_RELEASE = ("The authors' later release has 45,702 rows, with WeMath2_SFT and repeats on "
                  "purpose; what each of its sources gives is not published.")
# fmt: on


def source_of(category):
    """A category's row of COMPOSITION: monet_Visual_CoT, Visual_CoT and "Visual CoT" are one."""
    for name, *_ in COMPOSITION:
        if plain_name(name) == plain_name(category):
            return name
    return category


def plain_name(category):
    """A category's name without what differs between the sources' spellings."""
    # Monet has taken in other sets, and calls them monet_X
    letters = re.sub(r"[^a-z0-9]", "", category.lower().removeprefix("monet_"))
    return letters.replace("geo3k", "geometry3k")


# --------------------------------------------------------------------------------------------------
# its files, whole or damaged

PARQUET = b"PAR1"  # how such a table begins


def read_items(path):
    """Yield (line or position, item or None, error) of a file: JSONL, a JSON list, parquet.

    Of a file that is one JSON object, the items are in a list of it, or it is the item. A list is
    read as far as it can be: past damage it is not known where the next item starts. Only a file
    that is one JSON value is held whole.
    """
    with open(path, "rb") as f:
        begins = f.read(64)
    if begins.startswith(PARQUET):
        yield from read_parquet(path)
    elif kind := other_kind(begins):
        yield 1, None, f"{kind}; expected JSON or JSON lines"
    elif is_list(path):
        yield from read_list(Path(path).read_bytes().decode("utf-8-sig", "surrogateescape"))
    elif may_be_one_object(path):
        yield from read_object(path)
    else:
        yield from read_json_lines(path)


def read_json_lines(path):
    """read_items for JSON lines."""
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            text = line.decode("utf-8" if n > 1 else "utf-8-sig", "surrogateescape")
            if text.strip():
                item, _, error = parse(read_line, text)
                yield n, item, error


def may_be_one_object(path):
    """Is a file's first line no JSON, or its only one? JSON lines may be damaged there, too."""
    with open(path, "rb") as f:
        lines = (line for line in f if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    return not second or bool(parse(read_line, first.decode("utf-8-sig", "surrogateescape"))[2])


def read_object(path):
    """read_items for a file that may be one JSON object."""
    text = Path(path).read_bytes().decode("utf-8-sig", "surrogateescape")
    if not text.strip():
        return
    whole, _, error = parse(read_line, text)
    if isinstance(whole, dict):
        for n, item in enumerate(items_of(whole), 1):
            yield n, item, ""
    elif any(isinstance(item, dict) for _, item, _ in read_json_lines(path)):
        yield from read_json_lines(path)
    else:  # an object that is cut off, over many lines, is one fault
        yield 1, whole, error


def items_of(whole):
    """The items of a file that is one JSON object: of {"data": [...]}, of {id: item}, or it."""
    for name in ("data", "rows", "examples", "items", "annotations"):
        inside = whole.get(name)
        # the turns of one chat are no items
        first = inside[0] if isinstance(inside, list) and inside else None
        if isinstance(first, dict) and not {"role", "from"} & set(first):
            return inside
    if len(whole) > 1 and all(isinstance(value, dict) for value in whole.values()):
        return [{"id": id} | item for id, item in whole.items()]
    return [whole]


def read_parquet(path):
    """read_items for a parquet table, where pyarrow is installed."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        yield 1, None, other_kind(PARQUET)
        return
    n = 0
    try:
        file = ParquetFile(path, pre_buffer=False)  # else what was read stays until the end
        for table in file.iter_batches(16):  # rows, whose pictures lie in memory
            for item in table.to_pylist():
                n += 1
                yield n, as_json(item), ""
    except (ArrowException, OSError) as e:
        if is_machines(e):
            raise
        yield n + 1, None, f"not readable parquet: {e}"


def as_json(value):
    """A cell as a JSON export has it: bytes as base64, times and decimals as text."""
    if isinstance(value, dict):
        return {name: as_json(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [as_json(inside) for inside in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def read_list(text):
    """read_items for the text of a JSON list."""
    separator = re.compile(r"[\s,]*")  # lenient: what is between two items is not looked at
    # (text, start) -> (item, end); lenient: a line may break within a text
    read_one = json.JSONDecoder(strict=False).raw_decode
    end, n = text.index("[") + 1, 0
    while end:
        start = separator.match(text, end).end()
        if text.startswith("]", start):
            return
        n += 1
        item, end, error = parse(read_one, text, start)
        if error and not end:
            error += "; what comes after it is not read"
        yield n, item, error


def read_line(line):
    """(the line's JSON, where it ends)."""
    return json.loads(line), len(line)


def parse(read, *place):
    """(item, end, "") of read(*place), or (None, end, what is wrong); an end of 0 is not known."""
    end, depth = 0, sys.getrecursionlimit()
    # against a thousand brackets in each other; what passes half of the stack that there is can be
    # written again from anywhere
    sys.setrecursionlimit(depth // 2)
    try:
        item, end = read(*place)
        if SURROGATE.search(json.dumps(item, ensure_ascii=False)):
            return None, end, "not UTF-8"
        return item, end, ""
    except (ValueError, RecursionError) as e:
        return None, end, f"not JSON: {e}"
    finally:
        sys.setrecursionlimit(depth)


# --------------------------------------------------------------------------------------------------
# how a source's text becomes a response in our tags

MARKS = re.compile(  # where a source says "here is a picture"
    r"(?:<latent>\s*)?<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>(?:\s*</latent>)?"
    r"|<abs_vis_token>\s*</abs_vis_token>"  # Monet; the line above: the teacher
    r"|<lvr>"
    r"|<latent>\s*</latent>"  # ours
)


def in_our_tags(text):
    """A tagged response with a span for each mark; what is around <think> ... </answer> goes."""
    text = MARKS.sub(LATENT_SPAN, text)
    text = text.replace("<observation>", "<parser>").replace("</observation>", "</parser>")
    # code fences, an end-of-turn token, a greeting
    whole = re.search(r"<think>.*</answer>", text, re.DOTALL)
    return whole[0] if whole else text


def wrapped(text, answer):
    """A response from a source that has no tags of its own but an answer's."""
    text = in_our_tags(text)
    # an answer that is never closed goes, too
    text = re.sub(r"</?think>|<answer>.*?(?:</answer>|$)", "", text, flags=re.DOTALL)
    return f"<think> {text.strip()} </think> <answer> {answer} </answer>"


def text_of(value):
    """A field that must hold text; numbers are text too. Raises TypeError."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"expected text, found {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"expected text, found {value}")
    return str(value).strip()


class Box(NamedTuple):
    """A part of the first image: finite floats, in pixels or as shares of the image's sides."""

    x1: float
    y1: float
    x2: float
    y2: float
    shares: bool


def box_of(values, shares):
    """The Box of four numbers. Raises ValueError or TypeError for anything else."""
    # the source says which they are: a share above 1 is a fault of its, and no pixel
    x1, y1, x2, y2 = map(float, values)
    if not math.isfinite(x1 + y1 + x2 + y2):
        raise ValueError("a box with a number that is not finite")
    return Box(x1, y1, x2, y2, shares)


def picture_of(cell):
    """An image cell of any source as a path, encoded bytes or a Box.

    A cell is a path, a data URI, {"bytes": base64, "path": ...} or, of `aux`, a Box.
    """
    if not isinstance(cell, dict):
        return image_bytes(cell) if str(cell).startswith("data:") else cell
    if cell.get("bytes"):  # as parquet exports have it
        return image_bytes(cell["bytes"])
    return cell["path"]


def listed(value):
    """A column that holds one thing, a list of them, or nothing, as a list."""
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def with_options(example, options):
    """An example with its options as texts, if there are any.

    They are a list, one as Python writes it, as in MMMU's tables, or {"A": ..., "B": ...}.
    """
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options.strip() or "[]")
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"options that are not a list: {options[:80]!r}") from None
    if isinstance(options, dict):
        options = [options[letter] for letter in sorted(options)]
    options = list(options or ())
    while options and options[-1] is None:  # as a table has it where others have more options
        options.pop()
    texts = [text_of(option) for option in options]
    if len(texts) == 1:
        raise ValueError(f"a single option: {texts[0]!r}")
    return example | ({"options": texts} if texts else {})


# --------------------------------------------------------------------------------------------------
# the sources


def from_table(item, questions_alone=False):
    """gap (the authors' release), teacher (raw responses), qa (questions alone): see FIELDS."""
    row, taken = {}, {}
    for field, columns in FIELDS.items():
        # a table export's NaN, which is unlike itself, is no value either
        there = [c for c in columns if item.get(c) is not None and item[c] == item[c]]
        filled = [c for c in there if item[c] not in ("", [])]
        taken[field] = next(iter(filled or there), None)
        row[field] = item.get(taken[field])
    if row["response"] is None and not questions_alone:
        raise Reject("no response")

    answer = row["answer"]
    if answer is not None:
        answer = text_of(answer)
        inside = tagged(answer)[1]
        if inside is not None:  # "<answer> 145° </answer>", or a solution that ends in a box
            answer = inside
        elif taken["answer"] == "solution" and len(answer.split()) > SHORT_SOLUTION:
            answer = None
    if answer is None and row["response"] is not None:  # the gold answer is the teacher's own
        answer, _ = extract_answer(text_of(row["response"]))
    if answer is None:
        raise Reject("no answer", None, text_of(row["answer"] or "")[-200:])
    question = text_of(row["question"])
    if row["response"] is None:  # questions alone: `synthesise` writes one
        response = wrapped("", answer)
    else:
        response = in_our_tags(text_of(row["response"]))

    example = {
        "images": listed(row["images"]),
        "question": question,
        "answer": answer,
        "response": response,
        "aux": listed(row["aux_images"]),
        "category": text_of(row["category"] or ""),
    }
    return with_options(example, row["options"])


# how Monet asks for a box, where our responses have a tag
ASKS_FOR_BOXED = re.compile(
    r"\s*(?:Put your final answer within|Put the letter of your choice within"
    r"|Given the answer in a single word and put it within) \\boxed\{\}\.?"
    r"(?: If you cannot see [^.]*\\boxed\{None\}[^.]*\.?)?"
)


def from_monet(item):
    """Monet-SFT-125K: chat turns; a mark stands before each image of the assistant."""

    def parts_of(role):
        return [part for turn in item["data"] if turn["role"] == role for part in turn["content"]]

    def images_in(parts):
        # the paths are those of the authors' disk, where this folder is the release's root
        paths = [part["image"] for part in parts if part["type"] == "image"]
        return [path.replace("created_dataset/filtered_data/", "") for path in paths]

    def text_in(parts):
        return "\n".join(part["text"] for part in parts if part["type"] == "text")

    asked, replied = parts_of("user"), parts_of("assistant")
    images, aux = images_in(asked), images_in(replied)
    # of a question with several images, a mark in the place of each
    question, text = MARKS.sub("<image>", text_in(asked)), text_in(replied)
    answer = boxed(text)
    if answer is None:
        raise Reject("no \\boxed answer", None, text[-200:])
    answer = answer.strip()
    # what is observed before a picture is no reading of one
    thought, *rest = re.split(r"(?=<abs_vis_token>)", text, maxsplit=1)
    text = re.sub("</?observation>", "", thought) + "".join(rest)
    return {
        "images": images,
        "question": ASKS_FOR_BOXED.sub("", question).strip(),
        "answer": answer,
        "response": wrapped(text, answer),
        "aux": aux,
        "category": f"monet_{item['metadata']['dataset_name']}",
    }


ASKS_FOR_BOX = re.compile(
    r"\s*Please (?:think step by step and )?provide the bounding box coordinate of the region "
    r"that can help you answer the question better\.\s*$"
)


# where a part's pictures lie, if not in a folder of its name
VISCOT_FOLDERS = {"textcap": "textvqa", "visual7w": "v7w"}


def from_viscot(item):
    """Visual-CoT in its two layouts: viscot_363k.json, or metadata/*_cot_train.jsonl."""
    if "conversations" in item:
        # question, box, "<image>", answer; the box, in pixels, stands in the second path after ###
        turns = [turn["value"] for turn in item["conversations"]]
        path, question, answer = item["image"][0], turns[0], turns[3]
        box = box_of(json.loads(item["image"][1].partition("###")[2]), shares=False)
    else:
        folder = VISCOT_FOLDERS.get(item["dataset"], item["dataset"])
        path, question, answer = f"cot/{folder}/{item['image']}", item["question"], item["answer"]
        width, height = item["width"], item["height"]
        boxes = [box_of(corners, shares=False) for corners in item["bboxs"] if any(corners)]
        x1, y1, x2, y2, _ = zip(*boxes)
        # of several their hull, which the other layout has
        hull = min(x1) / width, min(y1) / height, max(x2) / width, max(y2) / height
        box = box_of(hull, shares=True)
    answer = text_of(answer)
    example = {
        "images": [path],
        "question": ASKS_FOR_BOX.sub("", question),
        "answer": answer,
        "response": wrapped(LATENT_SPAN, answer),
        "aux": [box],
        "category": "Visual_CoT",
    }
    # visual7w's: the wrong options, among which the right one gets a place by its question
    options = list(item.get("multiple_choices") or ())
    if options and answer not in options:
        place = seed_of(path, question) % (len(options) + 1)
        options.insert(place, answer)
    return with_options(example, options)


def from_lvr(item):
    """LVR: LLaVA's conversations, <lvr> for each box in `bboxes` (shares of the image's sides)."""
    question = text_of(item["conversations"][0]["value"])
    text = item["conversations"][1]["value"]
    answer = extract_answer(text)[0] or ""
    return {
        "images": listed(item["image"]),
        "question": question,
        "answer": answer,
        "response": wrapped(text, answer),
        "aux": [box_of(box, shares=True) for box in item["bboxes"]],
        "category": f"lvr_{item['dataset']}",
    }


ZEBRA_MARK = re.compile(
    r"(?:<image_start>\s*)?\[(problem|reasoning)_image_(\d+)\](?:\s*<image_end>)?"
)
# where a trace has these, a name alone is a word of it
ZEBRA_TAGGED = re.compile(r"<image_start>\s*\[(problem|reasoning)_image_(\d+)\]\s*<image_end>")


def from_zebra(item):
    """Zebra-CoT as JSONL: the trace names its images, and a column of that name holds each."""

    def span_or_nothing(mark):
        return LATENT_SPAN if mark[1] == "reasoning" else ""

    trace = re.sub(r"THOUGHT\s+\d+:\s*", "", item["Text Reasoning Trace"])
    tagged_too = any(kind == "reasoning" for kind, _ in ZEBRA_TAGGED.findall(trace))
    mark = ZEBRA_TAGGED if tagged_too else ZEBRA_MARK
    drawn = [f"reasoning_image_{k}" for kind, k in mark.findall(trace) if kind == "reasoning"]
    aux = [item[column] for column in drawn]
    for column in item:
        if re.fullmatch(r"reasoning_image_\d+", column) and item[column] and column not in drawn:
            raise Reject("image that the trace does not name", None, column)
    trace = mark.sub(span_or_nothing, trace)
    answer = text_of(item["Final Answer"])
    columns = [c for c in item if re.fullmatch(r"problem_image_\d+", c) and item[c]]
    columns.sort(key=lambda c: int(c.removeprefix("problem_image_")))
    question = ZEBRA_MARK.sub(lambda mark: "<image>" * (mark[1] == "problem"), item["Question"])
    asked = [f"problem_image_{k}" for kind, k in ZEBRA_MARK.findall(item["Question"])]
    # a picture that is named within the text stands there, the others before it
    inside = re.search(r"[^\s>]\s*<image>.*[^\s>]", question.strip(), re.DOTALL)
    if inside and sorted(asked) == sorted(set(asked) & set(columns)):
        before = [c for c in columns if c not in asked]
        columns, question = before + asked, "<image>" * len(before) + question
    else:
        question = question.replace("<image>", "")
    return {
        "images": [item[c] for c in columns],
        "question": question,
        "answer": answer,
        "response": wrapped(trace, answer),
        "aux": aux,
        "category": "Zebra_CoT",
    }


ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
IMAGE_IN_TEXT = re.compile(
    r"""<img\s+src=(?:"(?P<in_two>[^">]+)"|'(?P<in_one>[^'>]+)'|(?P<bare>[^"'>\s]+?))\s*/?>"""
    r"|<img>(?P<path>[^<]+)</img>|<(?:output_)?image>"
)


def from_chat(item):
    """Chats as training frameworks have them, the last reply being the response.

    `conversations` (ShareGPT, LLaVA), `messages` (OpenAI, ms-swift, LLaMA-Factory), query, response
    and history (ms-swift), or Mirage's text_input and text_output. A picture of a reply is a latent
    span's; earlier turns are part of the question.
    """
    turns = [(role, *pulled_out(text)) for role, text in turns_of(item)]
    while turns and turns[-1][0] != "assistant":
        turns.pop()  # a question without a reply
    if len(turns) < 2:
        raise Reject("no question and reply", None, " ".join(role for role, *_ in turns))

    *asked, (_, text, in_reply) = turns
    in_question = [picture for _, _, found in asked for picture in found]
    named = ("images", "image", "image_input", "image_output")
    pictures = [cell for column in named for cell in listed(item.get(column))]
    # a mark without a name is the next picture of the columns, in the order of the text
    unnamed = (in_question + in_reply).count(None)
    extra = len(pictures) - unnamed
    if extra > 0 and None not in in_question:  # what no mark stands for belongs to the question
        in_question, pictures = pictures[:extra] + in_question, pictures[extra:]
    if len(pictures) != unnamed:
        raise Reject("image marks and images differ", len(pictures), f"{unnamed} marks")
    left = iter(pictures)
    images, aux = (
        [next(left) if picture is None else picture for picture in part]
        for part in (in_question, in_reply)
    )

    thought, _, reply = text.rpartition("</think>")
    answer = item.get("answer")  # the file's own is what the reply's is held against
    if answer is None and ("<answer>" in reply or "\\boxed" in reply):
        answer, _ = extract_answer(reply)
    answer = text_of(reply.replace("<image>", "") if answer is None else answer)
    response = text.replace("<image>", LATENT_SPAN)
    if "<think>" in response and "</answer>" in response:
        response = in_our_tags(response)
    else:  # a reply that is the answer is no reasoning
        same = reply.strip() == answer
        response = wrapped(thought.replace("<image>", LATENT_SPAN) if same else response, answer)
    example = {
        "images": images,
        "question": told(asked),
        "answer": answer,
        "response": response,
        "aux": aux,
        "category": text_of(item.get("category") or item.get("dataset") or ""),
    }
    return with_options(example, item.get("options") or item.get("choices"))


def turns_of(item):
    """[(role, text)] of a chat; a picture within a list of parts stands as <img src=...> in it."""
    if "text_output" in item:  # Mirage
        return [("user", text_of(item["text_input"])), ("assistant", text_of(item["text_output"]))]
    if "query" in item:
        past = [text for asked, reply in item.get("history") or [] for text in (asked, reply)]
        texts = [*past, item["query"], item["response"]]
        return [(("user", "assistant")[n % 2], text_of(text)) for n, text in enumerate(texts)]
    turns = []
    for turn in item.get("conversations") or item["messages"]:
        role = turn.get("role", turn.get("from"))
        content = turn["content"] if "content" in turn else turn["value"]
        if isinstance(content, list):
            content = "".join(map(text_of_part, content))
        if role != "system":  # the run's own prompt says how to answer
            turns.append((ROLES.get(role, role), text_of(content)))
    return turns


def text_of_part(part):
    """A part of a message as text."""
    if part["type"] == "text":
        return part["text"]
    source = part.get("image") or part.get("image_url") or part.get("url") or ""
    source = source["url"] if isinstance(source, dict) else source
    return f'<img src="{html.escape(source)}">' if source else "<image>"


def pulled_out(text):
    """(text with <image> for each picture, [what it names, or None]): of a turn."""
    names = []
    for mark in IMAGE_IN_TEXT.finditer(text):
        source = mark["in_two"] or mark["in_one"] or mark["bare"]
        name = html.unescape(source) if source else mark["path"]
        names.append(name.strip() if name else None)
    return IMAGE_IN_TEXT.sub("<image>", text), names


def told(turns):
    """The question that turns (role, text, pictures) ask: of several, who said what."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role.capitalize()}: {text}" for role, text, _ in turns)


SOURCES = {
    "gap": from_table,
    "teacher": from_table,
    "qa": partial(from_table, questions_alone=True),
    "monet": from_monet,
    "viscot": from_viscot,
    "lvr": from_lvr,
    "zebra": from_zebra,
    "chat": from_chat,
}
