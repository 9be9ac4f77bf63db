"""Answer test questions with a model folder and score them as the benchmarks' own harnesses do.

Reads a model folder and either a JSONL test set (`data`) or the official files of public benchmarks under `data_root`
(`benchmarks`, names of BENCHMARKS below; nothing is downloaded). Writes, for a JSONL set to <out>/ and for a benchmark to
<out>/<name>/: predictions.rank*.jsonl (append-only, one line an answer, resumed after a kill with any number of ranks), and
once all answers are there scored.jsonl (one line a question) and metrics.json. Ranks share nothing while they answer; scoring
is a separate pass over the files (`--score_only=1`).

    python eval.py                                                # the toy's test set
    torchrun --nproc-per-node 8 eval.py --model=out/7b/gap --benchmarks=HRBench4K,MMStar --out=out/7b/eval --dtype=bfloat16
    python eval.py --compare out/eval/gap out/eval/text           # paired difference of two finished runs
"""

import ast
import base64
import bisect
import csv
import hashlib
import json
import math
import os
import random
import re
import string
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from tqdm import tqdm

from model import (HEAD_FILE, INTERVENTIONS, LATENT_SPAN, RESERVED, append, check_choices, clock, encode, generate,
                   grid_features, key_of, load_examples, load_head, load_latents_file, load_processor, load_vlm, open_append,
                   open_image, override, pick_device, rank_and_world, read_lines, read_safetensors, save_latents_file, see,
                   seed_of, to_text, versions, weight_stamps, write_lines, write_then_rename)

# ---------------------------------------------------------------------------------------------------
model = "out/gap"  # a folder from train.py, or any Qwen2.5-VL folder
data = "out/toy/test.jsonl"  # a JSONL test set, used when `benchmarks` is empty
benchmarks = ""  # e.g. "HRBench4K,MMStar"; "gap" for the paper's table
data_root = "data/benchmarks"  # where the official files lie
out = "out/eval/gap"
system = ""  # system prompt; "" is the chat template's own, as the harnesses leave it
instruction = ""  # appended to every question, e.g. "\nPut your final answer in <answer> </answer>."
# 0: 56*56, 1280*28*28 and 128 for a JSONL set (the toy's); for a benchmark what it names in BENCHMARKS, and 2048
min_pixels, max_pixels, max_new_tokens = 0, 0, 0
batch = 100  # questions a batch, at most
prompt_tokens = 40_000  # padded prompt tokens a batch, at most: two 4K images
temperature = 0.0  # 0 is greedy
top_p = 1.0
seed = 12345
intervention = "clean"  # clean zero noise mean shuffle oracle oracle_pca
donor = ""  # for shuffle: the latents/ folder of a clean run with save_latents=1
save_latents = False  # also write <out>/latents/*.safetensors, a file an answer
after_latents = ""  # text forced after every span, e.g. " </think> <answer>": no parser text is written
latent_size = 10  # most latents a span of a checkpoint with Monet's tokens and no head file [Monet: 10 to 16]
ema_beta = 0.0  # > 0: EMA norm calibration of output-as-input latents [paper; 0.9 ours]
dtype = "float32"  # 7B: bfloat16
limit = 0  # > 0: only the first rows
score_only = False
allow_partial = False  # score what is there although answers are missing
judge_url = ""  # an OpenAI-compatible endpoint, http://localhost:8000/v1: also judge what no rule can decide
judge_model = ""
judge_key = "JUDGE_API_KEY"  # the environment variable that holds the endpoint's key, if it wants one
judge_workers, judge_tries = 8, 7
# ---------------------------------------------------------------------------------------------------

# answer extraction: one rule for every model and every benchmark, tagged or not; never a guess

SPANS = re.compile(r"<(latent|parser|observation)>.*?</\1>|<abs_vis_token>.*?</abs_vis_token>", re.DOTALL)
DECLARED = re.compile(r"answer\s*(?:is|:)\s*(.+)", re.IGNORECASE)
NUMBER = re.compile(r"(?:(?<![\w.^)])-)?(?<![\w.^])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.^])-?\.\d+")
COUNT_WORDS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())}


def boxed(text):
    r"""The content of the last balanced \boxed{...}, or None."""
    for at in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(at, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", text[at:i])
    return None


def tagged(text):
    """(what follows the last </think>, the content of its last <answer> or box or None, how it was found)."""
    open_think = text.rfind("<think>") > text.rfind("</think>")
    text = SPANS.sub(" ", text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text)
    _, tag, inside = text.rpartition("<answer>")
    inside = inside.split("</answer>")[0]
    box = boxed(inside)
    if tag:
        return text, (inside if box is None else box).strip(), "answer"
    if box is not None:
        return text, box.strip(), "boxed"
    return text, None, "truncated" if open_think else ""


def find_letter(text, options):
    """(the letter of `options` {letter: text} that a text chooses, how it was found), or (None, "none")."""
    capital = f"[{''.join(options)}]"
    either = f"[{''.join(options)}{''.join(options).lower()}]"
    article = r"(?!A\s+[a-z])"  # "A dog" chooses nothing

    def only(letters):
        found = {x.upper() for x in letters}
        return found.pop() if len(found) == 1 else None

    if m := re.fullmatch(rf"[\s*_(\[]*({either})[\s*_)\].:,]*", text):
        return m[1].upper(), "letter"
    if letter := only(k for k, v in options.items() if v and normalise(v) == normalise(text)):
        return letter, "option text"
    declares = r"(?i:\b(?:answer|option|choice)\b[\s*_]*(?:is|:)[\s*_:(\[]*(?:option\s+)?[(*]*)(?!a\s+\w)"
    if said := re.findall(rf"{declares}({either})(?![\w'])", text):
        return said[-1].upper(), "declared"
    last = ([line for line in text.splitlines() if line.strip()] or [""])[-1]
    bare = rf"(?<![\w'])({article}{capital})(?![\w'])"
    if letter := only(re.findall(rf"\(({either})\)", last)) or only(re.findall(bare, last)):
        return letter, "last line"
    if letter := only(re.findall(rf"\(({either})\)", text)):
        return letter, "(X)"
    if m := re.match(rf"\s*\(?({either})[).:](?:\s|$)", text):
        return m[1].upper(), "leading"
    if letter := only(re.findall(bare, text)):
        return letter, "stands alone"
    if len(text) <= 2 * sum(map(len, options.values())):  # VLMEvalKit's cap: no option is read into a long answer
        held = [k for k, v in options.items() if (len(v) > 1 or v.isdigit())
                and re.search(rf"(?<!\w){re.escape(v.lower())}(?!\w)", text.lower())]
        if len(held) == 1:
            return held[0], "contains option"
    return None, "none"


def find_kind(text, kind):
    """The last number, the last [list], or the yes or no of a text; None if it has none (or both)."""
    if kind == "number":
        text = re.sub(r"[a-z]+", lambda m: COUNT_WORDS.get(m[0], m[0]), text.lower())
        found = NUMBER.findall(text)
        return found[-1].replace(",", "") if found else None
    if kind == "list":
        found = re.findall(r"\[[^\[\]]*\]", text)
        return found[-1] if found else None
    found = set(re.findall(r"\b(?:yes|no)\b", text.lower()))
    return found.pop() if len(found) == 1 else None


def extract_answer(text, options=None, kind="text"):
    """(answer or None, how it was found) of a model's whole output.

    options {letter: text} (or a list of texts): the answer is a letter. Else `kind` says what it is: text, number, list, yesno.
    """
    text, inside, method = tagged(text)
    if method == "truncated":
        return None, method
    source = text if inside is None else inside
    if options:
        letter, how = find_letter(source, lettered(options) if isinstance(options, list) else options)
        return letter, method or how
    if kind != "text":
        return find_kind(source, kind), method or kind
    if method:
        return inside or None, method
    if declared := DECLARED.findall(text):
        return declared[-1].strip() or None, "declared"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1], "last line") if lines else (None, "empty")


def lettered(options):
    """{letter: text} of a list of option texts; None if there are none."""
    return dict(zip(string.ascii_uppercase, options)) or None


# ---------------------------------------------------------------------------------------------------
# is it right? Checks take a question and its answer in one row: {"answer" (gold), "extracted", "raw", "options", ...}


def normalise(text):
    """Lower case without outer punctuation, articles and extra spaces; numbers in one form (1,000.0 is 1000)."""
    whole = " ".join(text.lower().replace("$", " ").split())
    text = whole.rstrip(string.punctuation + " ").lstrip(string.punctuation.replace("-", "").replace(".", "") + " ")
    text = text or whole  # "<" and ">" are answers, -3 and .5 are numbers
    text = re.sub(r"^(?:the|an?) (?=\w)", "", text)
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return f"{float(plain):.15g}" if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", plain) else text


def letter_of(text):
    """The option letter that an answer starts with, as in "B", "(b)", "B. 12 cm", or None."""
    m = re.match(r"\s*\(?([A-Za-z])(?:\)|[.:)]|\s*$)", text)
    return m[1].upper() if m else None


def is_correct(answer, row):
    """Does an extracted answer agree with a row's gold answer, by letter or by option text where it has `options`?"""
    if answer is None:
        return False
    if normalise(answer) == normalise(row["answer"]):
        return True
    options = row.get("options") or []
    if not options:
        return False

    def index(text):
        if (letter := letter_of(text)) and ord(letter) - 65 < len(options):
            return ord(letter) - 65
        same = [i for i, option in enumerate(options) if normalise(option) == normalise(text)]
        return same[0] if len(same) == 1 else None

    return index(answer) is not None and index(answer) == index(row["answer"])


def check_letter(row):
    return row["extracted"] is not None and row["extracted"] == letter_of(row["answer"])


def check_yesno(row):
    return row["extracted"] == row["answer"].strip().lower()


def levenshtein(a, b):
    """Edit distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def check_mathvista(row, strict=False):
    """MathVista's normaliser: the choice of a letter, else (not strict) the choice nearest to the answer's text; str(int)
    of an integer answer, rounding to its precision of a float one."""
    answer, gold = row["extracted"], str(row["answer"]).strip()
    if row["question_type"] == "multi_choice":
        if answer is None and not strict:
            text = extract_answer(row["raw"])[0]
            return text is not None and min(row["options"].values(), key=lambda c: levenshtein(text, c)) == gold
        return answer is not None and row["options"][answer] == gold
    if answer is None or row["answer_type"] not in ("integer", "float"):
        return answer == gold
    value = float(answer)
    if not math.isfinite(value):
        return False
    if row["answer_type"] == "integer":
        return str(int(value)) == gold
    return str(round(value, int(float(row.get("precision") or len(gold.partition(".")[2]))))) == gold


def latex_value(text):
    r"""The number that a LaTeX expression of + - * / ^ \frac \sqrt \pi stands for; None for anything else."""
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\times", "*").replace("\\cdot", "*")
    text = re.sub(r"\\(?:left|right|,|;|!|\s)|\s|\$|(?<=\d),(?=\d{3}(?!\d))", "", text.replace("\\div", "/").replace("π", "\\pi"))
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    tokens = re.findall(r"\d+\.?\d*|\.\d+|\\(?:frac|sqrt|pi)|[-+*/^(){}\[\]]", text, re.ASCII)
    if "".join(tokens) != text or not 0 < len(tokens) <= 100:
        return None
    tokens.append("")

    def take(expected):
        if tokens[0] != expected:
            raise ValueError(f"{expected!r} is missing")
        tokens.pop(0)

    def total():
        value = product()
        while tokens[0] in ("+", "-"):
            value += product() if tokens.pop(0) == "+" else -product()
        return value

    def product():
        value = power()
        while tokens[0] in ("*", "/") or tokens[0] and tokens[0] not in "+-)}]^":
            divide = tokens[0] == "/"
            if tokens[0] in ("*", "/"):
                tokens.pop(0)
            value = value / power() if divide else value * power()
        return value

    def power():
        if tokens[0] == "-":
            tokens.pop(0)
            return -power()
        value = atom()
        if tokens[0] == "^":
            tokens.pop(0)
            value = math.pow(value, power())
        return value

    def group(left, right):
        take(left)
        value = total()
        take(right)
        return value

    def atom():
        if tokens[0] == "(" or tokens[0] == "{":
            return group(tokens[0], {"(": ")", "{": "}"}[tokens[0]])
        token = tokens.pop(0)
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            return group("{", "}") / group("{", "}")
        if token == "\\sqrt":
            degree = group("[", "]") if tokens[0] == "[" else 2
            return math.pow(atom(), 1 / degree)
        return float(token)

    try:
        value = total()
        take("")
    except (ValueError, ArithmeticError, RecursionError):  # not an expression, or one without a value
        return None
    return value if math.isfinite(value) else None


def math_equal(a, b):
    """Equal as strings without spaces and outer punctuation, or as values rounded to two decimals (MathVision)."""
    plain = lambda s: re.sub(r"\s|\\[,;! ]", "", s).strip("$.").lower()  # noqa: E731
    if plain(a) == plain(b):
        return True
    x, y = latex_value(a.strip(" .")), latex_value(b.strip(" ."))
    return x is not None and y is not None and round(x, 2) == round(y, 2)


def check_mathvision(row):
    """The letter or, as officially, the option's value; of free-form answers also the last number of an untagged one."""
    answer, gold = row["extracted"], row["answer"]
    if options := row["options"]:
        value = options.get(letter_of(gold)) or gold
        return answer == letter_of(gold) or answer is None and math_equal(tagged(row["raw"])[1] or "", value)
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
    return mean_relative_accuracy(float(row["extracted"]), float(row["answer"])) if row["extracted"] is not None else 0.0


def wilson(correct, n, z=1.96):
    """The 95 % Wilson interval of an accuracy, as (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, q = correct / n, z * z / n
    mid, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return mid - half, mid + half


def mcnemar(a, b):
    """Exact two-sided p-value of the paired scores a and b of the same questions: a sign test on the pairs that differ."""
    plus, minus = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    n, least = plus + minus, min(plus, minus)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


# ---------------------------------------------------------------------------------------------------
# scores: graded rows in, {name: rows whose mean counts, or a number} out; the first is the headline


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
    return lambda rows: {"overall": rows} | {k: v for field in fields for k, v in by(rows, field).items()}


def score_hrbench(rows):
    """The mean over cycles of each cycle's accuracy; with cycles of one size that is the mean over rows."""
    def over_cycles(part):
        cycles = by(part, "cycle_category")
        return part if len({len(v) for v in cycles.values()}) <= 1 else macro(cycles)
    return {"overall": over_cycles(rows)} | {k: over_cycles(v) for k, v in by(rows, "category").items()}


def score_mmstar(rows):
    fine = by(rows, "l2_category") or by(rows, "l2-category")
    return {"overall": rows, "mean of l2": macro(fine)} | by(rows, "category")


def score_mme(rows):
    def l2(row):
        return re.sub(r"^([^/]*).*attribute.*", r"\1/attribute", row["l2-category"].lower())
    merged = [row | {"task": row["category"].partition("/")[0], "l2": f"{row['category']}/{l2(row)}"} for row in rows]
    return {"overall": rows} | by(merged, "task") | by(merged, "category") | by(merged, "l2")


def score_mathvista(rows):
    strict = [row | {"correct": check_mathvista(row, strict=True)} for row in rows]
    return {"overall": rows, "strict": strict} | by(rows, "task")


def score_wemath(rows):
    """Per problem: insufficient knowledge (IK), inadequate generalisation (IG), mastery (CM), rote memory (RM); the score is
    (CM + IG / 2) / problems. Strict: mastery needs every step right; loose: one of them. A problem that lacks a row (of a
    partial run) is left out."""
    count, steps = defaultdict(int), defaultdict(list)
    problems = {id: part for id, part in by(rows, "ID").items() if len(part) == int(part[0]["step"][0]) + 1}
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
    return found | {k: count[k] / n for k in shares} | {k: mean(steps[k]) for k in sorted(steps)} | {"all rows": rows}


def score_pope(rows):
    """F1 of "yes", over all rows and by split; a question that several splits share counts in each, as in VLMEvalKit."""
    def f1(part, only=None):
        hits = sum(row["correct"] for row in part if row["answer"].lower() == "yes")
        said, gold = (sum(row[f].lower() == "yes" for row in part if row[f]) for f in ("extracted", "answer"))
        precision, recall = hits / max(said, 1), hits / max(gold, 1)
        return {"precision": precision, "recall": recall}.get(only, 2 * precision * recall / max(precision + recall, 1e-12))
    spread = [row | {"category": c.strip()} for row in rows for c in str(row.get("category", "")).split(",")]
    return ({"overall": f1(spread), "accuracy": spread, "precision": f1(spread, "precision"), "recall": f1(spread, "recall")}
            | {name: f1(part) for name, part in by(spread, "category").items()})


def score_vsi(rows):
    """The mean over eight tasks, the three difficulties of relative direction being one."""
    tasks = by(rows, "question_type")
    direction = {k: v for k, v in tasks.items() if k.startswith("object_rel_direction")}
    eight = [accuracy(v) for k, v in tasks.items() if k not in direction] + [macro(direction)] * bool(direction)
    return {"overall": mean(eight), "object_rel_direction": macro(direction)} | tasks


def score_blink(rows):
    tasks = by(rows, "sub_task") or by(rows, "category")
    return {"overall": macro(tasks), "micro": rows} | tasks


def score_mmvp(rows):
    """Pairs (1, 2), (3, 4), ... of which both must be right. Corrected: the golds of 99/100 and of 279/280 exchanged."""
    rows = sorted(rows, key=lambda row: int(row["id"]))
    swap = {98: 99, 99: 98, 278: 279, 279: 278} if len(rows) == 300 else {}
    fixed = [row | {"correct": check_letter(row | {"answer": rows[swap.get(i, i)]["answer"]})} for i, row in enumerate(rows)]
    pairs = lambda r: [a | {"correct": bool(a["correct"] and b["correct"])} for a, b in zip(r[::2], r[1::2])]  # noqa: E731
    return {"overall": pairs(rows), "single": rows} | ({"corrected gold": pairs(fixed)} if swap else {})


def score_mmhal(rows):
    """With a judge: its mean rating, 0 to 6, and the share of answers rated below 3. Without: nothing."""
    rated = [row for row in rows if row.get("rating") is not None]
    found = {"rating": mean(row["rating"] for row in rated), "hallucination": mean(row["rating"] < 3 for row in rated)}
    return found if rated else {}


# ---------------------------------------------------------------------------------------------------
# official files. A raw row is what its file holds; images stay on the disk until they are asked for

NA = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
      "NaN", "None", "n/a", "nan", "null"}  # what pandas reads as missing: VLMEvalKit drops an option that says so, and so do we
csv.field_size_limit(sys.maxsize)


class Cell(NamedTuple):
    """An image in a table: `item` of the list (or the only one) in `column` of the row that begins at byte `offset`."""
    path: str
    offset: int
    column: int
    item: int


def cell_items(cell):
    """The base64 images, or indices of rows that hold them, in an image cell: one, or a list written as Python does."""
    return [str(x) for x in ast.literal_eval(cell)] if cell.startswith("[") else [cell] if cell else []


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
                    raise SystemExit(f"{path}:{line_number}: {len(cells)} cells where the header names {len(columns)}: {columns}")
                row = dict(zip(columns, cells))
                if image is not None:
                    row["images"] = [x if len(x) <= 64 else Cell(str(path), start, image, i)
                                     for i, x in enumerate(cell_items(row.pop("image")))]
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
            raise SystemExit(f"{path}: an image cell holds {x!r}, which is neither an image nor the index of a row with one")
        return resolve(index[x]["images"][0], (*seen, x))

    if image is not None:
        resolved = [[resolve(x) for x in row["images"]] for row in rows]
        rows = [row | {"images": found} for row, found in zip(rows, resolved) if found]  # VLMEvalKit skips rows without
    return rows, digest.hexdigest()


def read_json(path):
    """(rows, MD5) of a JSON list, a JSON object of rows, or JSON lines."""
    raw = Path(path).read_bytes()
    try:
        rows = [json.loads(x) for x in raw.splitlines() if x.strip()] if path.suffix == ".jsonl" else json.loads(raw)
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
            run = [m] if m[1].upper() == "A" else run + [m] if run and ord(m[1].upper()) == 65 + len(run) else run
        if len(run) > 1:
            ends = [m.start() for m in run[1:]] + [len(text)]
            return {m[1].upper(): text[m.end() : end].strip(" ,;\n") for m, end in zip(run, ends)}
    return {}


def option_list(texts):
    """{letter: text} of options that may begin with their letters, as "(A) x", "A. x" or just "x"."""
    return lettered([re.sub(rf"^\s*\(?{chr(65 + i)}[).．、:]\s*", "", str(x)) for i, x in enumerate(texts)])


def literal(cell):
    """A list that is one already, or is written as Python writes it; [] of a missing cell."""
    return cell if isinstance(cell, list) else [] if cell is None or str(cell) in NA else list(ast.literal_eval(cell))


# each takes a raw row and its file's folder; returns the prompt as `question`, and what a row needs and the file names otherwise


def mcq(r, folder):
    """VLMEvalKit's default prompt, of its TSV files."""
    options = {k: r[k] for k in "ABCDEFGH" if r.get(k, "") not in NA}
    hint = f"Hint: {r['hint']}\n" if r.get("hint", "") not in NA else ""
    text = f"{hint}Question: {r['question']}\n"
    if options:
        text += "Options:\n" + "".join(f"{k}. {v}\n" for k, v in options.items())
        text += "Please select the correct answer from the options above. \n"
    return {"question": text, "options": options or hidden_options(r["question"]) or dict.fromkeys("ABCD", "")}


def mme_realworld(r, folder):
    options = option_list(literal(r["multi-choice options"]))
    listed = "\n".join(f"({k}) {v}" for k, v in options.items())
    return {"options": options, "question": (
        f"{r['question']} The choices are listed below:\n{listed}\nSelect the best answer to the above multiple-choice question "
        "based on the image. Respond with only the letter (A, B, C, D, or E) of the correct option. \nThe best answer is:")}


@cache
def mathvista_prompts(folder):
    path = folder / "query.json"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; MathVista's prompts are data/query.json of github.com/lupantech/MathVista")
    return json.loads(path.read_text())


def mathvista(r, folder):
    """The official testmini.json with the prompts of query.json, or VLMEvalKit's TSV, whose question is the prompt."""
    row = {"options": lettered(literal(r["choices"])) if r["question_type"] == "multi_choice" else None,
           "kind": "number" if r["answer_type"] in ("integer", "float") else "list" if r["answer_type"] == "list" else "text"}
    if "pid" in r:
        row |= {"question": mathvista_prompts(folder)[str(r["pid"])], "images": [folder / r["image"]],
                "task": r["metadata"]["task"]}
    elif r["question_type"] == "multi_choice" and len(r["answer"]) == 1 and r["answer"] in row["options"]:
        row["answer"] = row["options"][r["answer"]]
    return row


def wemath(r, folder):
    if "option" not in r:
        return mcq(r, folder) | {"id": f"{r['ID']}/{r['key']}", "step": r["key"]}
    options = dict(re.findall(r"([A-H])\s*[.．、:]\s*(.*?)\s*(?=;\s*[A-H]\s*[.．、:]|$)", r["option"], re.DOTALL))
    listed = "".join(f"{k}. {v}\n" for k, v in options.items())
    return {"id": f"{r['ID']}/{r['key']}", "step": r["key"], "options": options, "images": [folder / r["image_path"]],
            "question": f"Question: {r['question']}\nOptions:\n{listed}"}


def pope(r, folder):
    return {"question": r["question"], "kind": "yesno"}


def vsi(r, folder):
    """test.jsonl, and 32 frames a video, linspace(0, N - 1, 32), as frames/<dataset>/<scene_name>/000.jpg to 031.jpg."""
    options = option_list(r["options"] or [])
    tail = ("Options:\n" + "\n".join(r["options"]) + "\nAnswer with the option's letter from the given choices directly."
            if options else "Please answer the question using a single word or phrase.")
    frames = folder / "frames" / r["dataset"] / r["scene_name"]
    return {"question": f"These are frames of a video.\n{r['question']}\n{tail}", "answer": str(r["ground_truth"]),
            "options": options, "kind": "number", "images": [frames / f"{i:03}.jpg" for i in range(32)]}


DISCLAIMER = ("Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your "
              "assessment on this question. You don't need to identify the real people. You just need to analyze based on the "
              "information I gave you.\n\n")  # BLINK's own, before the prompts of three subtasks


def blink(r, folder):
    """The official rows as JSON lines, image_1 to image_4 being file names."""
    before = DISCLAIMER if r["sub_task"] in ("Forensic_Detection", "Jigsaw", "Art_Style") else ""
    return {"question": before + r["prompt"], "options": option_list(r["choices"]),
            "images": [folder / r[f"image_{i}"] for i in (1, 2, 3, 4) if r.get(f"image_{i}")]}


def vstar(r, folder):
    return {"question": r["text"], "answer": r["label"], "options": hidden_options(r["text"]) or dict.fromkeys("ABCD", ""),
            "images": [folder / r["image"]]}


def mmvp(r, folder):
    return {"question": f"{r['Question']} {r['Options']}", "answer": r["Correct Answer"],
            "options": hidden_options(r["Options"]), "images": [folder / "MMVP Images" / f"{r['Index']}.jpg"]}


def mmhal(r, folder):
    return {"images": [folder / "images" / Path(r["image_src"]).name], "answer": r["gt_answer"]}


def mathvision(r, folder):
    options = option_list(literal(r.get("options", r.get("choices"))))
    listed = "".join(f"\n{k}. {v}" for k, v in (options or {}).items())
    row = {"options": options, "question": "Please solve the problem step by step and put your answer in one \"\\boxed{}\"."
           + r["question"] + (f"\nChoices:{listed}" if options else "")}
    return row if "images" in r else row | {"images": [folder / r["image"]]}


def visualpuzzles(r, folder):
    options = option_list(literal(r["options"]))
    listed = ("Options:" + "".join(f"\n({k}) {v}" for k, v in options.items()) if options
              else "Options: Choose from (A) (B) (C) (D) in the image.")
    return {"options": options or dict.fromkeys("ABCD", ""), "question": (
        f"{r['question']}\n{listed}\nSolve the multiple-choice question and then answer with the option letter from the given "
        "choices. The last line of your response should be of the following format:'Answer: $LETTER' (without quotes) where "
        "LETTER is one of options. Think step by step before answering.")}


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
    "HRBench4K": Benchmark((
        File("hr_bench_4k.tsv", "f6b041b03d49543494b8a56d2e35be65", HF + "DreamMr/HR-Bench",
             "index, question, answer, category, cycle_category, image", mcq),), score=score_hrbench),
    "HRBench8K": Benchmark((
        File("hr_bench_8k.tsv", "274c9c7f89329b804a4723178a00219c", HF + "DreamMr/HR-Bench",
             "index, question, answer, category, cycle_category, image", mcq),), score=score_hrbench),
    "MMStar": Benchmark((
        File("MMStar.tsv", "e1ecd2140806c1b1bbf54b43372efb9e", OC + "MMStar.tsv or " + HF + "Lin-Chen/MMStar",
             "index, question, answer, category, image", mcq),), score=score_mmstar),
    "MME-RealWorld-Lite": Benchmark((
        File("mme_realworld_lite.tsv", "4c17057d7d3b6c4a0d4397c3dae0881c", HF + "yifanzhang114/MME-RealWorld-Base64",
             "index, image, question, multi-choice options, answer, category, l2-category", mme_realworld),), score=score_mme),
    "MathVista": Benchmark((
        File("MathVista/testmini.json", "", "github.com/lupantech/MathVista, data/, with query.json; images.zip: " + HF
             + "AI4Math/MathVista", "pid, image, choices, answer, question_type, answer_type, metadata", mathvista),
        File("MathVista_MINI.tsv", "f199b98e178e5a2a20e7048f5dcb0464", OC + "MathVista_MINI.tsv",
             "index, image, question, answer, choices, question_type, answer_type", mathvista)),
        check=check_mathvista, score=score_mathvista),
    "WeMath": Benchmark((
        File("WeMath/testmini.json", "", "github.com/We-Math/We-Math, data/",
             "ID, key, question, option, answer, image_path", wemath),
        File("WeMath.tsv", "b5e969a075f01290a542411fb7766388", OC + "WeMath.tsv", "ID, key, question, answer, image, A", wemath)),
        score=score_wemath),
    "POPE": Benchmark((
        File("POPE.tsv", "c12f5acb142f2ef1f85a26ba2fbe41d5", OC + "POPE.tsv", "index, image, question, answer, category", pope),),
        check=check_yesno, score=score_pope),
    "VSI-Bench": Benchmark((
        File("VSI-Bench/test.jsonl", "", HF + "nyu-visionx/VSI-Bench; extract 32 frames a video yourself",
             "id, dataset, scene_name, question_type, question, ground_truth, options", vsi),),
        check=check_vsi, score=score_vsi, pixels=(128 * 28 * 28, 768 * 28 * 28)),  # of each frame [ours]
    "BLINK": Benchmark((
        File("BLINK/val.jsonl", "", HF + "BLINK-Benchmark/BLINK, its parquet rows as JSON lines with image files",
             "idx, sub_task, prompt, choices, answer, image_1", blink),
        File("BLINK.tsv", "d5e8af148b10ac69f535ff7b23f3f989", OC + "BLINK.tsv", "index, image, question, answer, category", mcq)),
        score=score_blink),
    "VStar": Benchmark((
        File("vstar_bench/test_questions.jsonl", "", HF + "craigwu/vstar_bench",
             "question_id, image, text, label, category", vstar),
        File("VStarBench.tsv", "b18854d7075574be06b631cd5f7d2d6a", HF + "xjtupanda/VStar_Bench",
             "index, image, question, answer, category", mcq))),
    "MMVP": Benchmark((
        File("MMVP/Questions.csv", "", HF + "MMVP/MMVP", "Index, Question, Options, Correct Answer", mmvp),
        File("MMVP.tsv", "8cb732b141a0cba5b42159df2839e557", OC + "MMVP.tsv", "index, image, question, answer", mcq)),
        score=score_mmvp),
    "MathVision": Benchmark((
        File("MathVision/test.jsonl", "", "github.com/mathllm/MATH-V, data/; images.zip: " + HF + "MathLLMs/MathVision",
             "id, question, options, image, answer, level, subject", mathvision),
        File("MathVision.tsv", "93f6de14f7916e598aa1b7165589831e", OC + "MathVision.tsv",
             "index, image, question, choices, answer, category", mathvision)),
        check=check_mathvision, score=score_categories("subject", "level", "category")),
    "MathVision-testmini": Benchmark((
        File("MathVision/testmini.jsonl", "", "github.com/mathllm/MATH-V, data/; images.zip: " + HF + "MathLLMs/MathVision",
             "id, question, options, image, answer, level, subject", mathvision),
        File("MathVision_MINI.tsv", "060fe4fa5d868987ce179307bd5f8a33", OC + "MathVision_MINI.tsv",
             "index, image, question, choices, answer, category", mathvision)),
        check=check_mathvision, score=score_categories("subject", "level", "category")),
    "MMHal-Bench": Benchmark((
        File("MMHal-Bench/response_template.json", "", HF + "Shengcao1006/MMHal-Bench, and the images that image_src names",
             "question_type, image_src, image_content, question, gt_answer", mmhal),),
        check=lambda row: False, score=score_mmhal),
    "VisualPuzzles": Benchmark((
        File("VisualPuzzles.tsv", "12bcc3f6dd7a11b33ffcd526b5601076", OC + "VisualPuzzles.tsv",
             "index, image, question, options, answer, category", visualpuzzles),),
        score=score_categories("category", "difficulty")),
}
GAP_TABLE = "HRBench4K,MMStar,MME-RealWorld-Lite,MathVista,WeMath,POPE"
JSONL = Benchmark((), check=lambda row: is_correct(row["extracted"], row), pixels=(56 * 56, 1280 * 28 * 28), max_new_tokens=128)

# the paper's numbers, percent: our metric, its name there, then the columns of PAPER_SYSTEMS
PAPER_SYSTEMS = ("Qwen2.5", "caption", "Monet", "LVR", "LH", "LH+DA", "LH+PCA", "GAP")
PAPER = (
    ("HRBench4K/overall", "HRBench4K", (68.12, 69.88, 70.75, 70.75, 70.63, 71.50, 72.25, 73.25)),
    ("HRBench4K/single", "FSP", (84.50, 85.50, 90.50, 84.25, 85.00, 85.00, 87.75, 86.50)),
    ("HRBench4K/cross", "FCP", (52.75, 53.25, 51.00, 57.25, 56.25, 58.75, 54.75, 60.00)),
    ("MMStar/overall", "MMStar", (60.46, 60.50, 60.80, 62.07, 61.20, 61.80, 62.10, 63.40)),
    ("MME-RealWorld-Lite/overall", "MME-RW-Lite", (44.39, 47.73, 47.20, 49.45, 45.25, 45.75, 46.85, 47.31)),
    ("Avg-P", "Avg-P", (57.66, 59.40, 59.58, 60.75, 59.03, 59.68, 60.40, 61.32)),
    ("MathVista/overall", "MathVista", (68.50, 67.70, 61.30, 67.00, 68.60, 68.90, 70.20, 71.00)),
    ("WeMath/strict", "WeMath-S", (36.29, 28.60, 32.67, 26.95, 30.00, 31.26, 35.24, 36.33)),
    ("WeMath/loose", "WeMath-L", (53.06, 45.43, 50.00, 49.05, 48.86, 50.00, 52.00, 54.57)),
    ("Avg-R", "Avg-R", (52.62, 47.24, 47.99, 47.66, 49.15, 50.05, 52.48, 53.97)),
    ("POPE/overall", "POPE", (86.25, None, None, None, None, 86.02, None, 86.30)),
)
AVERAGES = {"Avg-P": ("HRBench4K/overall", "MMStar/overall", "MME-RealWorld-Lite/overall"),
            "Avg-R": ("MathVista/overall", "WeMath/strict", "WeMath/loose")}


def load_benchmark(name, data_root):
    """Rows {"id", "question" (the whole prompt), "asked", "images", "answer", "options", "kind", ...} of a public benchmark,
    and its file's MD5. Raises SystemExit naming the file and where it comes from, or the columns found."""
    benchmark = BENCHMARKS[name]
    here = [f for f in benchmark.files if (Path(data_root) / f.path).is_file()]
    if not here:
        wanted = " or ".join(f"{Path(data_root) / f.path} ({f.source})" for f in benchmark.files)
        raise SystemExit(f"{name}: no such file: {wanted}")
    path, file = Path(data_root) / here[0].path, here[0]
    raw, md5 = read_table(path, "," if path.suffix == ".csv" else "\t") if path.suffix in (".tsv", ".csv") else read_json(path)
    if file.md5 and md5 != file.md5:
        print(f"warning: {path} has MD5 {md5}, the official file {file.md5}", file=sys.stderr)
    rows, seen = [], set()
    for n, r in enumerate(raw):
        if lacks := [c for c in file.columns.split(", ") if c not in r and not (c == "image" and "images" in r)]:
            raise SystemExit(f"{path}: row {n} lacks {', '.join(lacks)}; it has {', '.join(map(str, r))}")
        try:
            row = {"options": None, "kind": "text"} | r | file.row(r, path.parent)
        except (LookupError, ValueError, SyntaxError, TypeError, AttributeError) as e:
            raise SystemExit(f"{path}: row {n} is not as {name} has it ({type(e).__name__}: {e})") from None
        row["id"] = str(next((row[k] for k in ("id", "index", "pid", "idx", "question_id", "Index") if k in row), n))
        row["asked"] = str(r.get("question") or r.get("text") or r.get("Question") or "")  # without the prompt around it
        row |= {"answer": str(row["answer"]), "images": [x if isinstance(x, Cell) else str(x) for x in row["images"]]}
        missing = [x for x in row["images"] if isinstance(x, str) and not Path(x).is_file()]
        for wrong, what in ((row["id"] in seen, f"repeats the id {row['id']!r}"),
                            (missing, f"names {missing[:1]}, which is not there"),
                            (RESERVED.search(row["question"]), "has a reserved token in its question")):
            if wrong:
                raise SystemExit(f"{path}: row {n} {what} ({file.source})")
        seen.add(row["id"])
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: no questions")
    return rows, md5


# ---------------------------------------------------------------------------------------------------
# answering


class TestSet(NamedTuple):
    name: str
    rows: list
    out: Path
    benchmark: Benchmark
    settings: dict  # everything that changes an answer but the question, and what a reader must know
    key: str  # its hash


ANSWER_SETTINGS = ("model", "system", "instruction", "temperature", "top_p", "seed", "intervention", "ema_beta", "dtype",
                   "donor", "save_latents", "after_latents", "latent_size")


def load_test_set(name):
    """The questions of a benchmark, or of the JSONL file `data` if the name is empty."""
    if name:
        benchmark, folder, (rows, md5) = BENCHMARKS[name], Path(out) / name, load_benchmark(name, data_root)
    else:
        benchmark, folder, rows = JSONL, Path(out), load_examples(data, training=False)
        md5 = hashlib.md5(Path(data).read_bytes()).hexdigest()
    limits = {"min_pixels": min_pixels or benchmark.pixels[0], "max_pixels": max_pixels or benchmark.pixels[1],
              "max_new_tokens": max_new_tokens or benchmark.max_new_tokens}
    settings = {k: globals()[k] for k in ANSWER_SETTINGS} | limits | {"data": name or data, "md5": md5}
    stamps = weight_stamps(model) + (weight_stamps(donor) if donor else [])
    return TestSet(name or Path(data).stem, rows[:limit] if limit else rows, folder, benchmark, settings,
                   key_of(settings | {"files": stamps}))


def row_key(key, row):
    """The key of one answer: the run's settings and the question as it is put."""
    return f"{seed_of(key, row['id'], row['question']):016x}"


def latents_name(id):
    """The file name of an example's latents."""
    return f"{seed_of(id):016x}.safetensors"


def read_predictions(test):
    """The predictions of these settings by id, from the files of all ranks; an answer stands, an error only without one."""
    keys = {row["id"]: row_key(test.key, row) for row in test.rows}
    found = [p for f in sorted(test.out.glob("predictions.rank*.jsonl")) for p in read_lines(f)]
    found = [p for p in found if keys.get(p["id"]) == p["key"]]
    return {p["id"]: p for p in sorted(found, key=lambda p: "error" not in p)}


def fed_latents(rows, vlm, processor, head, donors):
    """What shuffle and oracle feed, (m, K, d) a row: another example's latents, or the real auxiliary features."""
    if intervention == "shuffle":  # the next file in the order of names, which are hashes of ids
        names = [latents_name(r["id"]) for r in rows]
        return [load_latents_file(donors[bisect.bisect_right(donors, Path(donor) / n) % len(donors)], head) for n in names]
    if not intervention.startswith("oracle"):
        return None
    mode = read_safetensors(Path(model) / HEAD_FILE, ())[1]["mode"]
    images = [open_image(p) for r in rows for p in r["aux_images"]]
    with torch.inference_mode():
        v = grid_features(vlm, processor, images, head.K, mode)
    return list(v.cpu().split([len(r["aux_images"]) for r in rows]))


def batches(rows, prepare, failed):
    """Lists of (row, encoded prompt), at most `batch` of them and `prompt_tokens` padded tokens; a row that can not be
    prepared goes to `failed`."""
    part, longest = [], 0
    for row in rows:
        try:
            prompt = prepare(row)
        except (Exception, SystemExit) as e:  # this question's failure, recorded by `failed`, must not stop the others
            failed(row, e)
            continue
        n = max(longest, len(prompt["ids"]))
        if part and (len(part) == batch or n * (len(part) + 1) > prompt_tokens):
            yield part
            part, n = [], len(prompt["ids"])
        part.append((row, prompt))
        longest = n
    if part:
        yield part


def answer_all(test, vlm, tokenizer, head, device):
    """Answer this rank's share of the rows that have no answer yet; what fails is recorded, and tried again by the next run."""
    rank, world = rank_and_world()
    done = {id for id, p in read_predictions(test).items() if "error" not in p}
    # by position in the file, not among the missing: ranks that start at different moments still split alike
    todo = [row for i, row in enumerate(test.rows) if i % world == rank and row["id"] not in done]
    limits = test.settings
    processor = load_processor(model, limits["min_pixels"], limits["max_pixels"])
    donors = sorted(Path(donor).glob("*.safetensors")) if donor else []
    if intervention == "shuffle" and len(donors) < 2:
        raise SystemExit(f"shuffle feeds other examples' latents: donor={donor!r} must be the latents/ folder of a clean run "
                         f"with save_latents=1; it holds {len(donors)} files")
    if intervention.startswith("oracle") and (bare := [r["id"] for r in test.rows if not r.get("aux_images")]):
        raise SystemExit(f"{limits['data']}: example {bare[0]!r} has no aux_images, which {intervention} feeds")
    bar = tqdm(total=len(todo), unit="question", desc=test.name, disable=rank > 0)
    with open_append(test.out / f"predictions.rank{rank}.jsonl") as f:

        def prepare(row):
            asked = row | {"question": row["question"] + instruction, "images": images_of(row), "system": system}
            return encode(vlm, tokenizer, processor, asked)

        def failed(row, e):
            append(f, {"id": row["id"], "key": row_key(test.key, row), "error": f"{type(e).__name__}: {e}"[:1000]})
            bar.update()

        def answer(part):
            rows, start = [row for row, _ in part], clock(device)
            answers = generate(
                vlm, head, tokenizer, see(vlm, processor, [prompt for _, prompt in part]),
                max_new_tokens=limits["max_new_tokens"], temperature=temperature, top_p=top_p,
                seeds=[seed_of(seed, row["id"]) for row in rows], intervention=intervention,
                fed=fed_latents(rows, vlm, processor, head, donors), ema_beta=ema_beta, after=after_latents)
            seconds = (clock(device) - start) / len(part)
            for row, (a,) in zip(rows, answers):
                if save_latents:  # before the line that says it is done
                    save_latents_file(test.out / "latents" / latents_name(row["id"]), a["latents"], head)
                append(f, {"id": row["id"], "key": row_key(test.key, row), "raw": to_text(tokenizer, a["ids"]),
                           "truncated": not a["finished"], "tokens": len(a["ids"]), "latents": len(a["latents"]),
                           "seconds": seconds})
            bar.update(len(part))

        for part in batches(todo, prepare, failed):
            try:
                answer(part)
            except (Exception, SystemExit):
                for one in part:  # find out whose failure it is; a batch too large for the memory also ends here
                    try:
                        answer([one])
                    except (Exception, SystemExit) as e:
                        failed(one[0], e)
    bar.close()


# ---------------------------------------------------------------------------------------------------
# scoring


def grade(test, predictions):
    """The test set's rows with their answers: raw, extracted, method, correct. A failed question counts as wrong."""
    graded = []
    for row in test.rows:
        if (p := predictions.get(row["id"])) is None:
            continue
        p = {"raw": "", "truncated": False, "tokens": 0, "latents": 0} | p
        answer, method = extract_answer(p["raw"], row.get("options"), row.get("kind", "text"))
        if "error" in p:
            method = "error"
        row = row | p | {"extracted": answer, "method": method}
        graded.append(row | {"correct": bool(c) if (c := test.benchmark.check(row)) in (0, 1) else c})
    return graded


def summary(rows):
    """Accuracy with its interval, and what else a reader needs to trust it."""
    n, correct = len(rows), sum(row["correct"] for row in rows)
    share = {"accuracy": correct / n} | ({"interval": wilson(correct, n)} if all(r["correct"] in (0, 1) for r in rows) else {})
    return {"n": n} | share | {
        "n_unparsed": sum(row["extracted"] is None for row in rows), "n_truncated": sum(row["truncated"] for row in rows),
        "n_error": sum("error" in row for row in rows), "opened_latents": mean(LATENT_SPAN in row["raw"] for row in rows),
        "tokens": mean(row["tokens"] for row in rows), "latents": mean(row["latents"] for row in rows)}


def summaries(groups):
    return {name: summary(g) if isinstance(g, list) else {"accuracy": g} for name, g in groups.items() if g != []}


def print_scores(title, scores):
    width = max(16, *(len(name) + 1 for name in scores)) if scores else 16
    print(f"\n{title}\n{'':{width}}{'n':>6}{'accuracy':>10}{'95 % interval':>16}{'unparsed':>10}{'truncated':>10}{'errors':>8}"
          f"{'latent':>8}{'tokens':>8}{'latents':>8}")
    for name, m in scores.items():
        interval = "{:.3f} - {:.3f}".format(*m["interval"]) if "interval" in m else ""
        print(f"{name:{width}}{m.get('n', ''):>6}{m['accuracy']:10.3f}{interval:>16}" + (
              f"{m['n_unparsed']:10}{m['n_truncated']:10}{m['n_error']:8}{m['opened_latents']:8.2f}{m['tokens']:8.1f}"
              f"{m['latents']:8.1f}" if "n" in m else ""))


def score(test, predictions):
    """Write scored.jsonl and metrics.json and print the table. Raises SystemExit if answers are missing."""
    missing = [row["id"] for row in test.rows if row["id"] not in predictions]
    if missing and (not allow_partial or not predictions):
        raise SystemExit(f"{test.out}: {len(missing)} of {len(test.rows)} answers are missing (the first is {missing[0]!r}); "
                         "run eval.py again to fill them in, or score what is there with allow_partial=1")
    graded = grade(test, predictions)
    failures = [row for row in graded if "error" in row]
    if len(failures) == len(graded):
        raise SystemExit(f"{test.out}: all {len(graded)} questions failed, the first with {failures[0]['error']}")
    scores = {"scores": summaries(test.benchmark.score(graded))}
    if test.name in JUDGED and judge_url:
        judged = judge(test, graded)
        scores["scores_judged"] = summaries(test.benchmark.score(judged))
        scores["judge"] = {"url": judge_url, "model": judge_model, "judged": sum("judgement" in row for row in judged)}

    fields = ("id", "category", "answer", "extracted", "method", "correct", "truncated", "tokens", "latents", "error", "raw")
    write_lines(test.out / "scored.jsonl", [{k: row[k] for k in fields if k in row} for row in graded])
    record = {"settings": test.settings, "key": test.key, "missing": len(missing), "versions": versions()} | scores
    write_then_rename(test.out / "metrics.json", lambda p: p.write_text(json.dumps(record, indent=1)))
    s = test.settings
    print_scores(f"{model} on {s['data']}, {intervention}; {s['min_pixels']} to {s['max_pixels']} pixels, at most "
                 f"{s['max_new_tokens']} tokens, system {system!r}, instruction {instruction!r}"
                 + f"; {len(missing)} MISSING" * bool(missing), scores["scores"])
    if "scores_judged" in scores:
        print_scores(f"with {scores['judge']['judged']} answers judged by {judge_model}", scores["scores_judged"])
    if test.name == "MMHal-Bench":
        official = [{k: row[k] for k in ("question_type", "question_topic", "image_id", "image_src", "image_content", "question",
                     "gt_answer") if k in row} | {"model_answer": extract_final(row["raw"])} for row in graded]
        write_then_rename(test.out / "response.json", lambda p: p.write_text(json.dumps(official, indent=1)))
        print(f"wrote {test.out}/response.json, MMHal-Bench's own response file. Its score is defined by a judge (gpt-4-0314)"
              + ("; the one above is another judge's and not comparable" if judge_url else ": no score here"))
    if failures:
        print(f"{len(failures)} questions failed and count as wrong; run eval.py again to retry them. "
              f"The first, {failures[0]['id']!r}: {failures[0]['error']}")


def extract_final(text):
    """What a reader of the answer sees: the tagged answer, else the text without its reasoning."""
    text, inside, _ = tagged(text)
    return (text if inside is None else inside).strip()


def paper_table():
    """Our headline numbers, in percent, beside the paper's; of the benchmarks that <out> holds for this model and setting."""
    ours = {}
    for path in sorted(Path(out).glob("*/metrics.json")):
        record = json.loads(path.read_text())
        if all(record["settings"][k] == globals()[k] for k in ("model", "intervention", "ema_beta")) and not record["missing"]:
            ours |= {f"{path.parent.name}/{k}": 100 * v["accuracy"] for k, v in record["scores"].items()}
    for name, parts in AVERAGES.items():
        if all(part in ours for part in parts):
            ours[name] = mean(ours[part] for part in parts)
    if any(key in ours for key, _, _ in PAPER):
        print(f"\n{'':14}{'ours':>9}  |" + "".join(f"{x:>9}" for x in PAPER_SYSTEMS) + "   (the paper, Qwen2.5-VL-7B)")
        for key, name, theirs in PAPER:
            mine = f"{ours[key]:9.2f}" if key in ours else f"{'-':>9}"
            print(f"{name:14}{mine}  |" + "".join(f"{'-' if x is None else f'{x:.2f}':>9}" for x in theirs))


# ---------------------------------------------------------------------------------------------------
# an optional judge, for what no rule can decide

JUDGE_PROMPTS = {
    "letter": "Below are a multiple-choice question and what someone answered. Which option did they choose? Reply with its "
              "letter alone, or with Z if they chose none or more than one.\n\n{question}\n\nTheir answer:\n{said}",
    "value": "Below are a question and what someone answered. Reply with the final value they gave, alone and in the form that "
             "the question asks for, or with Z if they gave none.\n\n{question}\n\nTheir answer:\n{said}",
    "rating": "Rate an answer to a question about an image that you can not see. The image holds: {image_content}\n"
              "Question: {question}\nA correct answer: {answer}\nThe answer to rate: {said}\n\nDoes it say things of the image "
              "that are not so, and does it help? 6: true and very informative; 5: true and informative; 4: true, little "
              "information; 3: true, no information; 2, 1, 0: says what is not so, yet is very informative, a little, not at "
              "all. Explain briefly and end with one line, \"Rating: \" and the number.",
}
JUDGED = {"MMStar": "letter", "WeMath": "letter", "MathVista": "value", "MMHal-Bench": "rating"}


def answered(call, url, tries, first_pause=0.5):
    """call(), which asks an endpoint, with growing pauses between tries or the server's Retry-After.

    Raises SystemExit where no try can help (offline, 401, 403, 404), else the last error: HTTPError, or whatever reading an
    answer of another protocol raised.
    """
    for n in range(tries):
        try:
            return call()
        except OfflineModeIsEnabled:
            raise SystemExit(f"HF_HUB_OFFLINE is set, and the client then does not ask {url}; unset it") from None
        except (HTTPError, ValueError, TypeError, LookupError, AttributeError) as e:
            response = getattr(e, "response", None)
            status = response.status_code if response is not None else 0
            if status in (401, 403, 404):
                raise SystemExit(f"{url} answers {status}: {' '.join(str(e).split())}; check endpoint, model name and key") \
                    from None
            if n + 1 == tries or is_refusal(status):
                raise
            told = response.headers.get("retry-after", "") if response is not None else ""
            pause = float(told) if told.isdigit() else first_pause * 2**n
            time.sleep(min(pause, 60) * random.uniform(1, 1.2))  # not all at the same moment


def is_refusal(status):
    """An HTTP status that says of a request that it will never be answered."""
    return 400 <= status < 500 and status not in (408, 409, 425, 429)


def ask_judge(client, prompt):
    """One reply of the judge. Raises SystemExit when it gives none: no rule takes its place."""
    def call():
        reply = client.chat_completion([{"role": "user", "content": prompt}], model=judge_model or None, temperature=0,
                                       max_tokens=512)
        return reply.choices[0].message.content or ""
    try:
        return answered(call, judge_url, judge_tries)
    except (HTTPError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise SystemExit(f"{judge_url}: no judgement ({type(e).__name__}: {e}); the finished ones are kept, run eval.py again") \
            from None


def judge(test, graded):
    """The graded rows, those that no rule decided graded again by the judge's reading of them. Replies are kept in judge.jsonl
    and never asked for twice; a truncated or failed answer stays wrong."""
    kind, path = JUDGED[test.name], test.out / "judge.jsonl"
    kept = {r["key"]: r["reply"] for r in read_lines(path)}
    open_rows = [row for row in graded if "error" not in row and row["method"] not in ("truncated", "empty")
                 and (kind == "rating" or row["extracted"] is None)]
    prompts = {row["id"]: JUDGE_PROMPTS[kind].format(**row | {"said": extract_final(row["raw"])}) for row in open_rows}
    keys = {id: key_of({"judge": judge_model, "url": judge_url, "prompt": text}) for id, text in prompts.items()}
    client = InferenceClient(base_url=judge_url, api_key=os.environ.get(judge_key) or "none", timeout=120)
    todo = [id for id in prompts if keys[id] not in kept]
    with open_append(path) as f, ThreadPoolExecutor(judge_workers) as pool:
        replies = pool.map(lambda id: ask_judge(client, prompts[id]), todo)
        for id in tqdm(todo, desc=f"judge {test.name}", unit="answer"):
            kept[keys[id]] = next(replies)
            append(f, {"id": id, "key": keys[id], "reply": kept[keys[id]]})

    def again(row):
        reply = kept[keys[row["id"]]].strip()
        if kind == "rating":
            said = set(re.findall(r"Rating: ([0-6])\b", reply))
            return row | {"judgement": reply, "rating": int(said.pop()) if len(said) == 1 else 0}  # as the official script
        if kind == "letter" or row["options"]:
            answer = find_letter(reply, row["options"])[0] if reply != "Z" else None
        else:
            answer = find_kind(reply, row["kind"]) if reply != "Z" else None
        row = row | {"judgement": reply, "extracted": answer, "method": "judge"}
        return row | {"correct": answer is not None and bool(test.benchmark.check(row))}
    return [again(row) if row["id"] in keys else row for row in graded]


# ---------------------------------------------------------------------------------------------------
# comparing two runs


def compare(a, b):
    """Print the paired difference of two finished runs (folders with scored.jsonl, of one test set or of several)."""
    found = sorted(p.relative_to(a) for p in Path(a).glob("**/scored.jsonl"))
    if not found:
        raise SystemExit(f"{a}: no scored.jsonl below it; eval.py writes one when all answers are there")
    for name in found:
        one, two = ({r["id"]: float(r["correct"]) for r in read_lines(Path(x) / name)} for x in (a, b))
        if one.keys() != two.keys() or not one:
            raise SystemExit(f"{Path(a) / name} and {Path(b) / name} hold other questions ({len(one)} and {len(two)}, "
                             f"{len(one.keys() & two.keys())} of them shared)")
        n, two_in_order = len(one), [two[id] for id in one]
        differences = [y - x for x, y in zip(one.values(), two_in_order)]
        d, wins, losses = mean(differences), sum(x > 0 for x in differences), sum(x < 0 for x in differences)
        half = 1.96 * math.sqrt(max(0.0, mean(x * x for x in differences) - d * d) / n)
        print(f"{name.parent}: n = {n}, A {mean(one.values()):.3f}, B {mean(two.values()):.3f}, B - A {d:+.3f} "
              f"(95 % interval {d - half:+.3f} to {d + half:+.3f}); B wins {wins}, loses {losses}, "
              f"McNemar p = {mcnemar(two_in_order, one.values()):.3g}")


def main():
    if "--compare" in sys.argv:
        at = sys.argv.index("--compare")
        if len(sys.argv) < at + 3:
            raise SystemExit("--compare takes two folders of finished runs, A and B")
        return compare(*sys.argv[at + 1 : at + 3])
    override(globals())
    check_choices(globals(), intervention=INTERVENTIONS, dtype=("float32", "bfloat16"))
    names = (GAP_TABLE if benchmarks == "gap" else benchmarks).split(",")
    if unknown := [name for name in names if name and name not in BENCHMARKS]:
        raise SystemExit(f"benchmarks: {unknown[0]!r} is not one of: gap, {', '.join(BENCHMARKS)}")
    tests = [load_test_set(name) for name in names]
    rank, world = rank_and_world()
    if not score_only:
        device = pick_device()
        vlm, tokenizer = load_vlm(model, getattr(torch, dtype), device)
        head = load_head(model, vlm, tokenizer, latent_size)
        if head is None and intervention != "clean":
            raise SystemExit(f"{model} has no {HEAD_FILE}: the intervention {intervention!r} needs a model with latents")
        for test in tests:
            answer_all(test, vlm, tokenizer, head, device)
    for test in tests:
        predictions = read_predictions(test)
        # the rank that finishes last sees all answers and scores them; no rank waits for another
        if len(predictions) == len(test.rows) or score_only or world == 1:
            score(test, predictions)
        else:
            print(f"rank {rank} is done; {len(test.rows) - len(predictions)} answers to {test.name} are left to other ranks")
    if benchmarks and rank == 0:
        paper_table()


if __name__ == "__main__":
    main()
