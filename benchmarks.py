"""What is each public test set? Its files, prompts, checks and aggregates, as its own harness has them."""

import ast
import base64
import csv
import hashlib
import json
import math
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from answers import (
    check_letter,
    check_yesno,
    extract_answer,
    find_kind,
    is_correct,
    letter_of,
    lettered,
    levenshtein,
    math_equal,
    tagged,
)
from data import RESERVED

csv.field_size_limit(sys.maxsize)

NA = {
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "-1.#IND",
    "-1.#QNAN",
    "-NaN",
    "-nan",
    "1.#IND",
    "1.#QNAN",
    "<NA>",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
}  # what pandas reads as missing: VLMEvalKit drops an option that says so, and so do we


class Cell(NamedTuple):
    """An image in a table: `item` of the list (or the only one) in `column` of the row that begins at byte `offset`."""

    path: str
    offset: int
    column: int
    item: int


def check_mathvista(row, strict=False):
    """MathVista's normaliser: the choice of a letter, else (not strict) the choice nearest to the answer's text; str(int)
    of an integer answer, rounding to its precision of a float one."""
    answer, gold = row["extracted"], str(row["answer"]).strip()
    if row["question_type"] == "multi_choice":
        if answer is None and not strict:
            text = extract_answer(row["raw"])[0]
            return (
                text is not None
                and min(row["options"].values(), key=lambda c: levenshtein(text, c)) == gold
            )
        return answer is not None and row["options"][answer] == gold
    if answer is None or row["answer_type"] not in ("integer", "float"):
        return answer == gold
    value = float(answer)
    if not math.isfinite(value):
        return False
    if row["answer_type"] == "integer":
        return str(int(value)) == gold
    return (
        str(round(value, int(float(row.get("precision") or len(gold.partition(".")[2]))))) == gold
    )


def check_mathvision(row):
    """The letter or, as officially, the option's value; of free-form answers also the last number of an untagged one."""
    answer, gold = row["extracted"], row["answer"]
    if options := row["options"]:
        value = options.get(letter_of(gold)) or gold
        return (
            answer == letter_of(gold)
            or answer is None
            and math_equal(tagged(row["raw"])[1] or "", value)
        )
    if answer is None:
        return False
    number = find_kind(answer, "number") if row["method"] in ("declared", "last line") else None
    return math_equal(answer, gold) or number is not None and math_equal(number, gold)


def mean_relative_accuracy(predicted, gold):
    """MRA of VSI-Bench: the share of the ten thresholds theta with |p - t| / t <= 1 - theta."""
    if gold == 0:
        return float(predicted == 0)
    return float(np.mean(abs(predicted - gold) / abs(gold) <= 1 - np.linspace(0.5, 0.95, 10)))


def check_vsi(row):
    if row["options"]:
        return check_letter(row)
    return (
        mean_relative_accuracy(float(row["extracted"]), float(row["answer"]))
        if row["extracted"] is not None
        else 0.0
    )


def by(rows, field, name=str):
    """Rows grouped by a field, in the order of their first appearance."""
    groups = defaultdict(list)
    for row in rows:
        if row.get(field) not in (None, ""):
            groups[name(row[field])].append(row)
    return dict(groups)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def accuracy(rows):
    return mean(float(row["correct"]) for row in rows)


def macro(groups):
    """The unweighted mean of the groups' accuracies."""
    return mean(accuracy(rows) for rows in groups.values())


def score_categories(*fields):
    return lambda rows: (
        {"overall": rows} | {k: v for field in fields for k, v in by(rows, field).items()}
    )


def score_hrbench(rows):
    """The mean over cycles of each cycle's accuracy; with cycles of one size that is the mean over rows."""

    def over_cycles(part):
        cycles = by(part, "cycle_category")
        return part if len({len(v) for v in cycles.values()}) <= 1 else macro(cycles)

    return {"overall": over_cycles(rows)} | {
        k: over_cycles(v) for k, v in by(rows, "category").items()
    }


def score_mmstar(rows):
    fine = by(rows, "l2_category") or by(rows, "l2-category")
    return {"overall": rows, "mean of l2": macro(fine)} | by(rows, "category")


def score_mme(rows):
    def l2(row):
        return re.sub(r"^([^/]*).*attribute.*", r"\1/attribute", row["l2-category"].lower())

    merged = [
        row | {"task": row["category"].partition("/")[0], "l2": f"{row['category']}/{l2(row)}"}
        for row in rows
    ]
    return {"overall": rows} | by(merged, "task") | by(merged, "category") | by(merged, "l2")


def score_mathvista(rows):
    strict = [row | {"correct": check_mathvista(row, strict=True)} for row in rows]
    return {"overall": rows, "strict": strict} | by(rows, "task")


def score_wemath(rows):
    """Per problem: insufficient knowledge (IK), inadequate generalisation (IG), mastery (CM), rote memory (RM); the score is
    (CM + IG / 2) / problems. Strict: mastery needs every step right; loose: one of them. A problem that lacks a row (of a
    partial run) is left out."""
    count, steps = defaultdict(int), defaultdict(list)
    problems = {
        id: part for id, part in by(rows, "ID").items() if len(part) == int(part[0]["step"][0]) + 1
    }
    for problem in problems.values():
        right = {row["step"].partition("_")[2]: bool(row["correct"]) for row in problem}
        multi, single = right.pop("multi"), list(right.values())
        steps[f"S{len(single)}"].append(multi)
        steps["S1"] += single
        if not multi:
            count["IG" if all(single) else "IK"] += 1
        else:
            count["strict CM" if all(single) else "strict RM"] += 1
            count["loose CM" if any(single) else "loose RM"] += 1
    n = max(1, len(problems))
    found = {kind: (count[f"{kind} CM"] + count["IG"] / 2) / n for kind in ("strict", "loose")}
    shares = ("IK", "IG", "strict CM", "strict RM", "loose CM", "loose RM")
    return (
        found
        | {k: count[k] / n for k in shares}
        | {k: mean(steps[k]) for k in sorted(steps)}
        | {"all rows": rows}
    )


def score_pope(rows):
    """F1 of "yes", over all rows and by split; a question that several splits share counts in each, as in VLMEvalKit."""

    def f1(part, only=None):
        hits = sum(row["correct"] for row in part if row["answer"].lower() == "yes")
        said, gold = (
            sum(row[f].lower() == "yes" for row in part if row[f]) for f in ("extracted", "answer")
        )
        precision, recall = hits / max(said, 1), hits / max(gold, 1)
        return {"precision": precision, "recall": recall}.get(
            only, 2 * precision * recall / max(precision + recall, 1e-12)
        )

    spread = [
        row | {"category": c.strip()}
        for row in rows
        for c in str(row.get("category", "")).split(",")
    ]
    return {
        "overall": f1(spread),
        "accuracy": spread,
        "precision": f1(spread, "precision"),
        "recall": f1(spread, "recall"),
    } | {name: f1(part) for name, part in by(spread, "category").items()}


def score_vsi(rows):
    """The mean over eight tasks, the three difficulties of relative direction being one."""
    tasks = by(rows, "question_type")
    direction = {k: v for k, v in tasks.items() if k.startswith("object_rel_direction")}
    eight = [accuracy(v) for k, v in tasks.items() if k not in direction] + [
        macro(direction)
    ] * bool(direction)
    return {"overall": mean(eight), "object_rel_direction": macro(direction)} | tasks


def score_blink(rows):
    tasks = by(rows, "sub_task") or by(rows, "category")
    return {"overall": macro(tasks), "micro": rows} | tasks


def score_mmvp(rows):
    """Pairs (1, 2), (3, 4), ... of which both must be right. Corrected: the golds of 99/100 and of 279/280 exchanged."""
    rows = sorted(rows, key=lambda row: int(row["id"]))
    swap = {98: 99, 99: 98, 278: 279, 279: 278} if len(rows) == 300 else {}
    fixed = [
        row | {"correct": check_letter(row | {"answer": rows[swap.get(i, i)]["answer"]})}
        for i, row in enumerate(rows)
    ]
    pairs = lambda r: [
        a | {"correct": bool(a["correct"] and b["correct"])} for a, b in zip(r[::2], r[1::2])
    ]  # noqa: E731
    return {"overall": pairs(rows), "single": rows} | (
        {"corrected gold": pairs(fixed)} if swap else {}
    )


def score_mmhal(rows):
    """With a judge: its mean rating, 0 to 6, and the share of answers rated below 3. Without: nothing."""
    rated = [row for row in rows if row.get("rating") is not None]
    found = {
        "rating": mean(row["rating"] for row in rated),
        "hallucination": mean(row["rating"] < 3 for row in rated),
    }
    return found if rated else {}


def cell_items(cell):
    """The base64 images, or indices of rows that hold them, in an image cell: one, or a list written as Python does."""
    return (
        [str(x) for x in ast.literal_eval(cell)] if cell.startswith("[") else [cell] if cell else []
    )


def images_of(row):
    """A row's images as paths or encoded bytes, read from the disk now."""

    def read(image):
        if not isinstance(image, Cell):
            return image
        with open(image.path, "rb") as f:
            f.seek(image.offset)
            cells = next(csv.reader((line.decode() for line in f), delimiter="\t"))
        return base64.b64decode(cell_items(cells[image.column])[image.item])

    return [read(image) for image in row["images"]]


def read_table(path, delimiter="\t"):
    """(rows, MD5) of a TSV or CSV file with a header, in one pass. An `image` column becomes `images`, a list of Cells:
    what the file holds is never in memory at once. Raises SystemExit naming file and line."""
    digest, at, line_number, rows = hashlib.md5(), 0, 0, []

    def lines(f):
        nonlocal at, line_number
        for line in f:
            digest.update(line)
            at, line_number = at + len(line), line_number + 1
            yield line.decode("utf-8-sig" if line_number == 1 else "utf-8")

    try:
        with open(path, "rb") as f:
            reader = csv.reader(lines(f), delimiter=delimiter)
            columns = next(reader, [])
            image = columns.index("image") if "image" in columns else None
            start = at
            for cells in reader:
                if len(cells) != len(columns):
                    raise SystemExit(
                        f"{path}:{line_number}: {len(cells)} cells where the header names {len(columns)}: {columns}"
                    )
                row = dict(zip(columns, cells))
                if image is not None:
                    row["images"] = [
                        x if len(x) <= 64 else Cell(str(path), start, image, i)
                        for i, x in enumerate(cell_items(row.pop("image")))
                    ]
                rows.append(row)
                start = at
    except (csv.Error, ValueError, SyntaxError, RecursionError, MemoryError) as e:
        raise SystemExit(f"{path}:{line_number}: not readable as a table ({e})") from None

    # a short cell names the row (by its `index`) whose image it shares
    index = {row.get("index"): row for row in rows}

    def resolve(x, seen=()):
        if isinstance(x, Cell):
            return x
        if x in seen or x not in index or not index[x]["images"]:
            raise SystemExit(
                f"{path}: an image cell holds {x!r}, which is neither an image nor the index of a row with one"
            )
        return resolve(index[x]["images"][0], (*seen, x))

    if image is not None:
        resolved = [[resolve(x) for x in row["images"]] for row in rows]
        rows = [
            row | {"images": found} for row, found in zip(rows, resolved) if found
        ]  # VLMEvalKit skips rows without
    return rows, digest.hexdigest()


def read_json(path):
    """(rows, MD5) of a JSON list, a JSON object of rows, or JSON lines."""
    raw = Path(path).read_bytes()
    try:
        rows = (
            [json.loads(x) for x in raw.splitlines() if x.strip()]
            if path.suffix == ".jsonl"
            else json.loads(raw)
        )
    except ValueError as e:
        raise SystemExit(f"{path}: not JSON ({e})") from None
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{path}: expected a list of JSON objects")
    return rows, hashlib.md5(raw).hexdigest()


def hidden_options(text):
    """{letter: text} of options written into a question, as "(A) x (B) y", "A. x\\nB. y" or "A: x, B: y"; {} if none."""
    for style in (r"\(([A-Ha-h])\)\s*", r"(?<![A-Za-z])([A-H])[.:]\s+"):
        found, run = list(re.finditer(style, text)), []
        for m in found:  # the last run of A, B, C, ...
            run = (
                [m]
                if m[1].upper() == "A"
                else run + [m]
                if run and ord(m[1].upper()) == 65 + len(run)
                else run
            )
        if len(run) > 1:
            ends = [m.start() for m in run[1:]] + [len(text)]
            return {m[1].upper(): text[m.end() : end].strip(" ,;\n") for m, end in zip(run, ends)}
    return {}


def option_list(texts):
    """{letter: text} of options that may begin with their letters, as "(A) x", "A. x" or just "x"."""
    return lettered(
        [re.sub(rf"^\s*\(?{chr(65 + i)}[).．、:]\s*", "", str(x)) for i, x in enumerate(texts)]
    )


def literal(cell):
    """A list that is one already, or is written as Python writes it; [] of a missing cell."""
    return (
        cell
        if isinstance(cell, list)
        else []
        if cell is None or str(cell) in NA
        else list(ast.literal_eval(cell))
    )


def mcq(r, folder):
    """VLMEvalKit's default prompt, of its TSV files."""
    options = {k: r[k] for k in "ABCDEFGH" if r.get(k, "") not in NA}
    hint = f"Hint: {r['hint']}\n" if r.get("hint", "") not in NA else ""
    text = f"{hint}Question: {r['question']}\n"
    if options:
        text += "Options:\n" + "".join(f"{k}. {v}\n" for k, v in options.items())
        text += "Please select the correct answer from the options above. \n"
    return {
        "question": text,
        "options": options or hidden_options(r["question"]) or dict.fromkeys("ABCD", ""),
    }


def mme_realworld(r, folder):
    options = option_list(literal(r["multi-choice options"]))
    listed = "\n".join(f"({k}) {v}" for k, v in options.items())
    return {
        "options": options,
        "question": (
            f"{r['question']} The choices are listed below:\n{listed}\nSelect the best answer to the above multiple-choice question "
            "based on the image. Respond with only the letter (A, B, C, D, or E) of the correct option. \nThe best answer is:"
        ),
    }


@cache
def mathvista_prompts(folder):
    path = folder / "query.json"
    if not path.is_file():
        raise SystemExit(
            f"{path}: no such file; MathVista's prompts are data/query.json of github.com/lupantech/MathVista"
        )
    return json.loads(path.read_text())


def mathvista(r, folder):
    """The official testmini.json with the prompts of query.json, or VLMEvalKit's TSV, whose question is the prompt."""
    row = {
        "options": lettered(literal(r["choices"]))
        if r["question_type"] == "multi_choice"
        else None,
        "kind": "number"
        if r["answer_type"] in ("integer", "float")
        else "list"
        if r["answer_type"] == "list"
        else "text",
    }
    if "pid" in r:
        row |= {
            "question": mathvista_prompts(folder)[str(r["pid"])],
            "images": [folder / r["image"]],
            "task": r["metadata"]["task"],
        }
    elif (
        r["question_type"] == "multi_choice"
        and len(r["answer"]) == 1
        and r["answer"] in row["options"]
    ):
        row["answer"] = row["options"][r["answer"]]
    return row


def wemath(r, folder):
    if "option" not in r:
        return mcq(r, folder) | {"id": f"{r['ID']}/{r['key']}", "step": r["key"]}
    options = dict(
        re.findall(
            r"([A-H])\s*[.．、:]\s*(.*?)\s*(?=;\s*[A-H]\s*[.．、:]|$)", r["option"], re.DOTALL
        )
    )
    listed = "".join(f"{k}. {v}\n" for k, v in options.items())
    return {
        "id": f"{r['ID']}/{r['key']}",
        "step": r["key"],
        "options": options,
        "images": [folder / r["image_path"]],
        "question": f"Question: {r['question']}\nOptions:\n{listed}",
    }


def pope(r, folder):
    return {"question": r["question"], "kind": "yesno"}


def vsi(r, folder):
    """test.jsonl, and 32 frames a video, linspace(0, N - 1, 32), as frames/<dataset>/<scene_name>/000.jpg to 031.jpg."""
    options = option_list(r["options"] or [])
    tail = (
        "Options:\n"
        + "\n".join(r["options"])
        + "\nAnswer with the option's letter from the given choices directly."
        if options
        else "Please answer the question using a single word or phrase."
    )
    frames = folder / "frames" / r["dataset"] / r["scene_name"]
    return {
        "question": f"These are frames of a video.\n{r['question']}\n{tail}",
        "answer": str(r["ground_truth"]),
        "options": options,
        "kind": "number",
        "images": [frames / f"{i:03}.jpg" for i in range(32)],
    }


DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your "
    "assessment on this question. You don't need to identify the real people. You just need to analyze based on the "
    "information I gave you.\n\n"
)  # BLINK's own, before the prompts of three subtasks


def blink(r, folder):
    """The official rows as JSON lines, image_1 to image_4 being file names."""
    before = DISCLAIMER if r["sub_task"] in ("Forensic_Detection", "Jigsaw", "Art_Style") else ""
    return {
        "question": before + r["prompt"],
        "options": option_list(r["choices"]),
        "images": [folder / r[f"image_{i}"] for i in (1, 2, 3, 4) if r.get(f"image_{i}")],
    }


def vstar(r, folder):
    return {
        "question": r["text"],
        "answer": r["label"],
        "options": hidden_options(r["text"]) or dict.fromkeys("ABCD", ""),
        "images": [folder / r["image"]],
    }


def mmvp(r, folder):
    return {
        "question": f"{r['Question']} {r['Options']}",
        "answer": r["Correct Answer"],
        "options": hidden_options(r["Options"]),
        "images": [folder / "MMVP Images" / f"{r['Index']}.jpg"],
    }


def mmhal(r, folder):
    return {"images": [folder / "images" / Path(r["image_src"]).name], "answer": r["gt_answer"]}


def mathvision(r, folder):
    options = option_list(literal(r.get("options", r.get("choices"))))
    listed = "".join(f"\n{k}. {v}" for k, v in (options or {}).items())
    row = {
        "options": options,
        "question": 'Please solve the problem step by step and put your answer in one "\\boxed{}".'
        + r["question"]
        + (f"\nChoices:{listed}" if options else ""),
    }
    return row if "images" in r else row | {"images": [folder / r["image"]]}


def visualpuzzles(r, folder):
    options = option_list(literal(r["options"]))
    listed = (
        "Options:" + "".join(f"\n({k}) {v}" for k, v in options.items())
        if options
        else "Options: Choose from (A) (B) (C) (D) in the image."
    )
    return {
        "options": options or dict.fromkeys("ABCD", ""),
        "question": (
            f"{r['question']}\n{listed}\nSolve the multiple-choice question and then answer with the option letter from the given "
            "choices. The last line of your response should be of the following format:'Answer: $LETTER' (without quotes) where "
            "LETTER is one of options. Think step by step before answering."
        ),
    }


class File(NamedTuple):
    """An official file below data_root: its MD5 ("" if unknown), its source, the columns that it must have, its row function."""

    path: str
    md5: str
    source: str
    columns: str
    row: object


class Benchmark(NamedTuple):
    """The first of `files` that is there is read. Pixels are VLMEvalKit's for Qwen2.5-VL."""

    files: tuple
    check: object = check_letter
    score: object = score_categories("category")
    pixels: tuple = (1280 * 28 * 28, 16384 * 28 * 28)
    max_new_tokens: int = 2048


HF, OC = "https://huggingface.co/datasets/", "https://opencompass.openxlab.space/utils/VLMEval/"
BENCHMARKS = {
    "HRBench4K": Benchmark(
        (
            File(
                "hr_bench_4k.tsv",
                "f6b041b03d49543494b8a56d2e35be65",
                HF + "DreamMr/HR-Bench",
                "index, question, answer, category, cycle_category, image",
                mcq,
            ),
        ),
        score=score_hrbench,
    ),
    "HRBench8K": Benchmark(
        (
            File(
                "hr_bench_8k.tsv",
                "274c9c7f89329b804a4723178a00219c",
                HF + "DreamMr/HR-Bench",
                "index, question, answer, category, cycle_category, image",
                mcq,
            ),
        ),
        score=score_hrbench,
    ),
    "MMStar": Benchmark(
        (
            File(
                "MMStar.tsv",
                "e1ecd2140806c1b1bbf54b43372efb9e",
                OC + "MMStar.tsv or " + HF + "Lin-Chen/MMStar",
                "index, question, answer, category, image",
                mcq,
            ),
        ),
        score=score_mmstar,
    ),
    "MME-RealWorld-Lite": Benchmark(
        (
            File(
                "mme_realworld_lite.tsv",
                "4c17057d7d3b6c4a0d4397c3dae0881c",
                HF + "yifanzhang114/MME-RealWorld-Base64",
                "index, image, question, multi-choice options, answer, category, l2-category",
                mme_realworld,
            ),
        ),
        score=score_mme,
    ),
    "MathVista": Benchmark(
        (
            File(
                "MathVista/testmini.json",
                "",
                "github.com/lupantech/MathVista, data/, with query.json; images.zip: "
                + HF
                + "AI4Math/MathVista",
                "pid, image, choices, answer, question_type, answer_type, metadata",
                mathvista,
            ),
            File(
                "MathVista_MINI.tsv",
                "f199b98e178e5a2a20e7048f5dcb0464",
                OC + "MathVista_MINI.tsv",
                "index, image, question, answer, choices, question_type, answer_type",
                mathvista,
            ),
        ),
        check=check_mathvista,
        score=score_mathvista,
    ),
    "WeMath": Benchmark(
        (
            File(
                "WeMath/testmini.json",
                "",
                "github.com/We-Math/We-Math, data/",
                "ID, key, question, option, answer, image_path",
                wemath,
            ),
            File(
                "WeMath.tsv",
                "b5e969a075f01290a542411fb7766388",
                OC + "WeMath.tsv",
                "ID, key, question, answer, image, A",
                wemath,
            ),
        ),
        score=score_wemath,
    ),
    "POPE": Benchmark(
        (
            File(
                "POPE.tsv",
                "c12f5acb142f2ef1f85a26ba2fbe41d5",
                OC + "POPE.tsv",
                "index, image, question, answer, category",
                pope,
            ),
        ),
        check=check_yesno,
        score=score_pope,
    ),
    "VSI-Bench": Benchmark(
        (
            File(
                "VSI-Bench/test.jsonl",
                "",
                HF + "nyu-visionx/VSI-Bench; extract 32 frames a video yourself",
                "id, dataset, scene_name, question_type, question, ground_truth, options",
                vsi,
            ),
        ),
        check=check_vsi,
        score=score_vsi,
        pixels=(128 * 28 * 28, 768 * 28 * 28),
    ),  # of each frame [ours]
    "BLINK": Benchmark(
        (
            File(
                "BLINK/val.jsonl",
                "",
                HF + "BLINK-Benchmark/BLINK, its parquet rows as JSON lines with image files",
                "idx, sub_task, prompt, choices, answer, image_1",
                blink,
            ),
            File(
                "BLINK.tsv",
                "d5e8af148b10ac69f535ff7b23f3f989",
                OC + "BLINK.tsv",
                "index, image, question, answer, category",
                mcq,
            ),
        ),
        score=score_blink,
    ),
    "VStar": Benchmark(
        (
            File(
                "vstar_bench/test_questions.jsonl",
                "",
                HF + "craigwu/vstar_bench",
                "question_id, image, text, label, category",
                vstar,
            ),
            File(
                "VStarBench.tsv",
                "b18854d7075574be06b631cd5f7d2d6a",
                HF + "xjtupanda/VStar_Bench",
                "index, image, question, answer, category",
                mcq,
            ),
        )
    ),
    "MMVP": Benchmark(
        (
            File(
                "MMVP/Questions.csv",
                "",
                HF + "MMVP/MMVP",
                "Index, Question, Options, Correct Answer",
                mmvp,
            ),
            File(
                "MMVP.tsv",
                "8cb732b141a0cba5b42159df2839e557",
                OC + "MMVP.tsv",
                "index, image, question, answer",
                mcq,
            ),
        ),
        score=score_mmvp,
    ),
    "MathVision": Benchmark(
        (
            File(
                "MathVision/test.jsonl",
                "",
                "github.com/mathllm/MATH-V, data/; images.zip: " + HF + "MathLLMs/MathVision",
                "id, question, options, image, answer, level, subject",
                mathvision,
            ),
            File(
                "MathVision.tsv",
                "93f6de14f7916e598aa1b7165589831e",
                OC + "MathVision.tsv",
                "index, image, question, choices, answer, category",
                mathvision,
            ),
        ),
        check=check_mathvision,
        score=score_categories("subject", "level", "category"),
    ),
    "MathVision-testmini": Benchmark(
        (
            File(
                "MathVision/testmini.jsonl",
                "",
                "github.com/mathllm/MATH-V, data/; images.zip: " + HF + "MathLLMs/MathVision",
                "id, question, options, image, answer, level, subject",
                mathvision,
            ),
            File(
                "MathVision_MINI.tsv",
                "060fe4fa5d868987ce179307bd5f8a33",
                OC + "MathVision_MINI.tsv",
                "index, image, question, choices, answer, category",
                mathvision,
            ),
        ),
        check=check_mathvision,
        score=score_categories("subject", "level", "category"),
    ),
    "MMHal-Bench": Benchmark(
        (
            File(
                "MMHal-Bench/response_template.json",
                "",
                HF + "Shengcao1006/MMHal-Bench, and the images that image_src names",
                "question_type, image_src, image_content, question, gt_answer",
                mmhal,
            ),
        ),
        check=lambda row: False,
        score=score_mmhal,
    ),
    "VisualPuzzles": Benchmark(
        (
            File(
                "VisualPuzzles.tsv",
                "12bcc3f6dd7a11b33ffcd526b5601076",
                OC + "VisualPuzzles.tsv",
                "index, image, question, options, answer, category",
                visualpuzzles,
            ),
        ),
        score=score_categories("category", "difficulty"),
    ),
}
GAP_TABLE = "HRBench4K,MMStar,MME-RealWorld-Lite,MathVista,WeMath,POPE"
JSONL = Benchmark(
    (),
    check=lambda row: is_correct(row["extracted"], row),
    pixels=(56 * 56, 1280 * 28 * 28),
    max_new_tokens=128,
)
# the paper's numbers, percent: our metric, its name there, then the columns of PAPER_SYSTEMS
PAPER_SYSTEMS = ("Qwen2.5", "caption", "Monet", "LVR", "LH", "LH+DA", "LH+PCA", "GAP")
PAPER = (
    ("HRBench4K/overall", "HRBench4K", (68.12, 69.88, 70.75, 70.75, 70.63, 71.50, 72.25, 73.25)),
    ("HRBench4K/single", "FSP", (84.50, 85.50, 90.50, 84.25, 85.00, 85.00, 87.75, 86.50)),
    ("HRBench4K/cross", "FCP", (52.75, 53.25, 51.00, 57.25, 56.25, 58.75, 54.75, 60.00)),
    ("MMStar/overall", "MMStar", (60.46, 60.50, 60.80, 62.07, 61.20, 61.80, 62.10, 63.40)),
    (
        "MME-RealWorld-Lite/overall",
        "MME-RW-Lite",
        (44.39, 47.73, 47.20, 49.45, 45.25, 45.75, 46.85, 47.31),
    ),
    ("Avg-P", "Avg-P", (57.66, 59.40, 59.58, 60.75, 59.03, 59.68, 60.40, 61.32)),
    ("MathVista/overall", "MathVista", (68.50, 67.70, 61.30, 67.00, 68.60, 68.90, 70.20, 71.00)),
    ("WeMath/strict", "WeMath-S", (36.29, 28.60, 32.67, 26.95, 30.00, 31.26, 35.24, 36.33)),
    ("WeMath/loose", "WeMath-L", (53.06, 45.43, 50.00, 49.05, 48.86, 50.00, 52.00, 54.57)),
    ("Avg-R", "Avg-R", (52.62, 47.24, 47.99, 47.66, 49.15, 50.05, 52.48, 53.97)),
    ("POPE/overall", "POPE", (86.25, None, None, None, None, 86.02, None, 86.30)),
)
AVERAGES = {
    "Avg-P": ("HRBench4K/overall", "MMStar/overall", "MME-RealWorld-Lite/overall"),
    "Avg-R": ("MathVista/overall", "WeMath/strict", "WeMath/loose"),
}


def load_benchmark(name, data_root):
    """Rows {"id", "question" (the whole prompt), "asked", "images", "answer", "options", "kind", ...} of a public benchmark,
    and its file's MD5. Raises SystemExit naming the file and where it comes from, or the columns found."""
    benchmark = BENCHMARKS[name]
    here = [f for f in benchmark.files if (Path(data_root) / f.path).is_file()]
    if not here:
        wanted = " or ".join(f"{Path(data_root) / f.path} ({f.source})" for f in benchmark.files)
        raise SystemExit(f"{name}: no such file: {wanted}")
    path, file = Path(data_root) / here[0].path, here[0]
    raw, md5 = (
        read_table(path, "," if path.suffix == ".csv" else "\t")
        if path.suffix in (".tsv", ".csv")
        else read_json(path)
    )
    if file.md5 and md5 != file.md5:
        print(f"warning: {path} has MD5 {md5}, the official file {file.md5}", file=sys.stderr)
    rows, seen = [], set()
    for n, r in enumerate(raw):
        if lacks := [
            c
            for c in file.columns.split(", ")
            if c not in r and not (c == "image" and "images" in r)
        ]:
            raise SystemExit(
                f"{path}: row {n} lacks {', '.join(lacks)}; it has {', '.join(map(str, r))}"
            )
        try:
            row = {"options": None, "kind": "text"} | r | file.row(r, path.parent)
        except (LookupError, ValueError, SyntaxError, TypeError, AttributeError) as e:
            raise SystemExit(
                f"{path}: row {n} is not as {name} has it ({type(e).__name__}: {e})"
            ) from None
        row["id"] = str(
            next(
                (row[k] for k in ("id", "index", "pid", "idx", "question_id", "Index") if k in row),
                n,
            )
        )
        row["asked"] = str(
            r.get("question") or r.get("text") or r.get("Question") or ""
        )  # without the prompt around it
        row |= {
            "answer": str(row["answer"]),
            "images": [x if isinstance(x, Cell) else str(x) for x in row["images"]],
        }
        missing = [x for x in row["images"] if isinstance(x, str) and not Path(x).is_file()]
        for wrong, what in (
            (row["id"] in seen, f"repeats the id {row['id']!r}"),
            (missing, f"names {missing[:1]}, which is not there"),
            (RESERVED.search(row["question"]), "has a reserved token in its question"),
        ):
            if wrong:
                raise SystemExit(f"{path}: row {n} {what} ({file.source})")
        seen.add(row["id"])
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: no questions")
    return rows, md5
