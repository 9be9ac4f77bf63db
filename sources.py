"""What does each public training set look like? Its columns, marks and boxes, read into our format."""

import base64
import json
import math
import re

from answers import boxed, extract_answer
from data import LATENT_SPAN

FIELDS = {  # for gap, teacher and qa: the columns that a field is looked for in, the first that is there counts.
    # Of the release only `data_source` is known; put its real names here.
    "images": ("images", "image", "image_path", "query_image", "query_images"),
    "question": ("question", "query", "problem", "prompt"),
    "answer": ("answer", "gold_answer", "gold", "ground_truth"),
    "response": (
        "response",
        "teacher_response",
        "structured_response",
        "raw",
        "output",
        "completion",
    ),
    "aux_images": (
        "aux_images",
        "auxiliary_images",
        "aux_image",
        "auxiliary_image",
        "latent_images",
        "latent_image",
    ),
    "options": ("options", "choices"),
    "category": ("data_source", "category", "dataset", "source"),
}
NEEDED = {
    "gap": ("images", "question", "response", "category"),
    "teacher": ("images", "question", "response"),
    "qa": ("images", "question", "answer"),
}
COMPOSITION = [  # the paper's Fig. 5, in its order: candidates after filtering; the release's train, validation, with latents
    ("Visual CoT", 20000, 16449, 1812, 13608),
    ("chart", 7282, 6187, 671, 5831),
    ("GEOQA", 7057, 3760, 401, 1174),
    ("MM Math", 5345, 1988, 246, 730),
    ("Zebra-CoT count", 2766, 832, 91, 134),
    ("Zebra-CoT visual search", 2687, 2236, 280, 910),
    ("MathVision", 2032, 393, 44, 233),
    ("Geometry3K", 1082, 656, 79, 253),
    ("CogCoM", 567, 401, 43, 376),
    ("ReFocus", 426, 358, 38, 282),
    ("Zebra-CoT geometry", 65, 19, 1, 17),
]
SURROGATE = re.compile("[\ud800-\udfff]")  # what is left of bytes that are no UTF-8


class Reject(Exception):
    """Why an item is left out: (reason, number, detail). The number is what a threshold was held against."""


class Unanswered(Reject):
    """An endpoint failed: the item is left out of this run, and tried again by the next."""


def clean(text):
    """One line of text that any file can hold."""
    return " ".join(str(text).encode("utf-8", "replace").decode().split())[:500]


MARKS = re.compile(
    r"(?:<latent>\s*)?<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>(?:\s*</latent>)?"  # the teacher
    r"|<abs_vis_token>\s*</abs_vis_token>|<lvr>|<latent>\s*</latent>"
)  # Monet, LVR, ours
ROI = re.compile(
    r"\s*Please (?:think step by step and )?provide the bounding box coordinate of the region that can help you "
    r"answer the question better\.\s*$"
)
BOXED_SUFFIX = re.compile(r"\s*Put your final answer within \\boxed\{\}\.?\s*$")


def box_of(values):
    """(x1, y1, x2, y2), finite floats. Raises ValueError or TypeError for anything else."""
    x1, y1, x2, y2 = map(float, values)
    if not math.isfinite(x1 + y1 + x2 + y2):
        raise ValueError("a box with a number that is not finite")
    return x1, y1, x2, y2


def text_of(value):
    """A field that must hold text; numbers are text too."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"expected text, found {type(value).__name__}")
    return str(value).strip()


def in_our_tags(text):
    """A tagged response with its source's marks as spans; what stands around <think> ... </answer> is cut off."""
    text = (
        MARKS.sub(LATENT_SPAN, text)
        .replace("<observation>", "<parser>")
        .replace("</observation>", "</parser>")
    )
    whole = re.search(r"<think>.*</answer>", text, re.DOTALL)
    return whole[0] if whole else text


def wrapped(text, answer):
    """A response from a source that has no tags of its own but an answer's."""
    text = re.sub(
        r"</?think>|<answer>.*?(?:</answer>|$)", "", in_our_tags(text), flags=re.DOTALL
    ).strip()
    return f"<think> {text} </think> <answer> {answer} </answer>"


def listed(value):
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def from_table(item):
    """gap (the authors' release), teacher (raw responses) and qa (questions to synthesise for): columns found by FIELDS."""
    row = {
        field: next((item[c] for c in columns if item.get(c) is not None), None)
        for field, columns in FIELDS.items()
    }
    answer = text_of(
        row["answer"] if row["answer"] is not None else extract_answer(text_of(row["response"]))[0]
    )
    return {
        "images": listed(row["images"]),
        "question": text_of(row["question"]),
        "answer": answer,
        "response": wrapped("", answer)
        if row["response"] is None
        else in_our_tags(text_of(row["response"])),
        "aux": listed(row["aux_images"]),
        "category": text_of(row["category"] or ""),
        **({"options": [text_of(o) for o in listed(row["options"])]} if row["options"] else {}),
    }


def from_monet(item):
    """Monet-SFT-125K: chat turns in which <abs_vis_token></abs_vis_token> stands before each image of the assistant."""
    turns = {
        role: [part for turn in item["data"] if turn["role"] == role for part in turn["content"]]
        for role in ("user", "assistant")
    }
    images = {
        role: [
            part["image"].replace("created_dataset/filtered_data/", "")
            for part in parts
            if part["type"] == "image"
        ]
        for role, parts in turns.items()
    }
    question, text = (
        "\n".join(part["text"] for part in turns[role] if part["type"] == "text") for role in turns
    )
    if (answer := boxed(text)) is None:
        raise Reject("no \\boxed answer", None, text[-200:])
    return {
        "images": images["user"],
        "question": BOXED_SUFFIX.sub("", question),
        "answer": answer.strip(),
        "response": wrapped(text, answer.strip()),
        "aux": images["assistant"],
        "category": f"monet_{item['metadata']['dataset_name']}",
    }


def from_viscot(item):
    """Visual-CoT: viscot_363k.json (the box after ### in the second image path) or metadata/*_cot_train.jsonl (bboxs)."""
    if "conversations" in item:
        turns = [turn["value"] for turn in item["conversations"]]
        path, question, answer = item["image"][0], turns[0], turns[3]
        box = json.loads(item["image"][1].partition("###")[2])
    else:
        folder = (
            "textvqa" if item["dataset"] == "textcap" else item["dataset"]
        )  # the two share their images
        path, question, answer = f"cot/{folder}/{item['image']}", item["question"], item["answer"]
        width, height = item["width"], item["height"]
        box = [
            v / side
            for v, side in zip(item["bboxs"][0], (width, height, width, height), strict=True)
        ]
    answer = text_of(answer)
    return {
        "images": [path],
        "question": ROI.sub("", question),
        "answer": answer,
        "response": wrapped(LATENT_SPAN, answer),
        "aux": [box_of(box)],
        "category": "Visual_CoT",
    }


def from_lvr(item):
    """LVR: LLaVA's conversations, <lvr> for each box in `bboxes` (shares of the image's sides)."""
    question, text = (item["conversations"][i]["value"] for i in (0, 1))
    answer = extract_answer(text)[0] or ""
    return {
        "images": listed(item["image"]),
        "question": question,
        "answer": answer,
        "response": wrapped(text, answer),
        "aux": [box_of(box) for box in item["bboxes"]],
        "category": f"lvr_{item['dataset']}",
    }


def from_zebra(item):
    """Zebra-CoT as JSONL: the trace names its images; image columns hold a path, or {"bytes": base64} as parquet exports do."""

    def picture(name):
        cell = item[name]
        if isinstance(cell, dict):
            return (
                base64.b64decode(cell["bytes"], validate=True)
                if cell.get("bytes")
                else cell["path"]
            )
        return cell

    mark = re.compile(
        r"(?:<image_start>\s*)?\[(problem|reasoning)_image_(\d+)\](?:\s*<image_end>)?"
    )
    trace = re.sub(r"THOUGHT\s+\d+:\s*", "", item["Text Reasoning Trace"])
    aux = [
        picture(f"reasoning_image_{k}") for kind, k in mark.findall(trace) if kind == "reasoning"
    ]
    trace = mark.sub(lambda m: LATENT_SPAN if m[1] == "reasoning" else "", trace)
    answer = text_of(item["Final Answer"])
    columns = sorted(
        (c for c in item if re.fullmatch(r"problem_image_\d+", c) and item[c]),
        key=lambda c: int(c[14:]),
    )
    return {
        "images": [picture(c) for c in columns],
        "question": mark.sub("", item["Question"]),
        "answer": answer,
        "response": wrapped(trace, answer),
        "aux": aux,
        "category": "Zebra_CoT",
    }


SOURCES = {
    "gap": from_table,
    "teacher": from_table,
    "qa": from_table,
    "monet": from_monet,
    "viscot": from_viscot,
    "lvr": from_lvr,
    "zebra": from_zebra,
}


def source_of(category):
    """A category's row of COMPOSITION: monet_Visual_CoT, Visual_CoT and "Visual CoT" are one."""
    plain = lambda text: re.sub(r"[^a-z0-9]", "", text.lower().removeprefix("monet_")).replace(
        "geo3k", "geometry3k"
    )  # noqa: E731
    return next((name for name, *_ in COMPOSITION if plain(name) == plain(category)), category)
