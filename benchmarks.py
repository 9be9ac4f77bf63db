"""What is each public test set? Its files, prompt, check and score, as its own harness has them.

BENCHMARKS is the table. One adds a benchmark by an entry there and a function that turns a row of
its file into one of ours; where no check or score of scores.py fits, by one there. PUBLISHED is
what papers print of them.
"""

import ast
import json
import re
import string
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data import RESERVED
from launch import names_in, rank_and_world
from options import hidden_options, letter_of, lettered
from scores import (
    check_answer,
    check_letter,
    check_mathvision,
    check_mathvista,
    check_nothing,
    check_vsi,
    check_yesno,
    score_blink,
    score_categories,
    score_cvbench,
    score_hrbench,
    score_mathvista,
    score_mme,
    score_mmhal,
    score_mmstar,
    score_mmvp,
    score_pope,
    score_vsi,
    score_wemath,
)
from tables import NA, Cell, read_json_rows, read_table

# --------------------------------------------------------------------------------------------------
# options, as the files write them

IN_THE_IMAGE = dict.fromkeys("ABCD", "")  # a choice whose options no text names


def options_in_one_text(text):
    """{letter: text} of We-Math's options, "A. 12; B. 15; C. none".

    Its letters count in their order only: "A. turn it to get Shape ;C.; B. ..." has a stray one.
    """
    texts, rest = [], ";" + " ".join(text.split())
    for letter in string.ascii_uppercase[:8]:
        mark = rf"{letter}\s*[.．、:]\s*+"
        said = rf"{mark}(?![;；]|\Z)"  # and its text
        # after a semicolon, or where that lacks: "A. 45° B. 60°"; at last, without a text
        for pattern in (rf"[;；]\s*{said}", rf"\s{said}", rf"[;；]\s*{mark}"):
            before, *after = re.split(pattern, rest, maxsplit=1)
            if after:
                break
        else:
            break
        texts.append(before)
        rest = after[0]
    # the stray piece is the end of a name, "Shape C."
    texts = [re.sub(r"\s*[;；]\s*(?=[A-H]\.)", " ", text) for text in [*texts[1:], rest]]
    return {letter: text.strip(" ;；\n") for letter, text in zip(string.ascii_uppercase, texts)}


def option_list(texts):
    """{letter: text} of options that may begin with their letters: "(A) x", "A. x" or just "x"."""
    # each on its own: files letter some options and not others
    bare = []
    for letter, text in zip(string.ascii_uppercase, texts):
        bare.append(re.sub(rf"^\s*\(?{letter}[).．、:]\s*", "", str(text)))
    return lettered(bare)


def literal(cell):
    """A list that is one already, or is written as Python writes it; [] of a missing cell."""
    if isinstance(cell, list):
        return cell
    if cell is None or str(cell) in NA:
        return []
    # numpy writes no commas, and Python would join the texts. VLMEvalKit takes what stands between
    # quotes, which breaks on an apostrophe in an option
    return list(ast.literal_eval(re.sub(r"""(?<=['"])\s+(?=['"])""", ", ", cell)))


# --------------------------------------------------------------------------------------------------
# the benchmarks' rows: each function takes an official row and its file's folder, and returns what
# it adds to the row or replaces of it. "question" is the whole prompt, as the harness puts it


# the space and the line break at its end are VLMEvalKit's
SELECT = "Please select the correct answer from the options above. \n"


def mcq(r, folder, ask=SELECT):
    """VLMEvalKit's default prompt, of its TSV files; `ask` ends it where there are options."""
    # pandas drops a cell that reads as missing, and so the harness drops the option
    options = {letter: r[letter] for letter in "ABCDEFGH" if r.get(letter, "") not in NA}
    prompt = f"Question: {r['question']}\n"
    if r.get("hint", "") not in NA:
        prompt = f"Hint: {r['hint']}\n" + prompt
    if options:
        listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
        prompt += f"Options:\n{listed}{ask}"
    # some files write the options into the question itself; the last resort is A to D
    return {
        "question": prompt,
        "options": options or hidden_options(r["question"]) or IN_THE_IMAGE,
    }


def mme_realworld(r, folder):
    # the official prompt as it is, though "only the letter" is hard on a model that thinks first
    listed = literal(r["multi-choice options"])
    return {
        "options": option_list(listed),
        "question": (
            f"{r['question']} The choices are listed below:\n" + "\n".join(listed) + "\n"
            "Select the best answer to the above multiple-choice question based on the image. "
            "Respond with only the letter (A, B, C, D, or E) of the correct option. \n"
            "The best answer is:"
        ),
    }


@cache
def mathvista_prompts(folder):
    """The official prompts by problem id; read once."""
    path = folder / "query.json"
    if not path.is_file():
        raise SystemExit(
            f"{path}: no such file; MathVista's prompts are data/query.json of "
            "github.com/lupantech/MathVista"
        )
    return json.loads(path.read_text(encoding="utf-8-sig"))


def mathvista(r, folder):
    """The official testmini.json with the prompts of query.json, or VLMEvalKit's TSV."""
    choice = r["question_type"] == "multi_choice"
    choices = literal(r["choices"]) if choice else []
    # what the prompt's hint asks for, which decides how an answer is read and compared
    kinds = {"integer": "number", "float": "number", "list": "list"}
    row = {
        "options": lettered(choices),
        "kind": kinds.get(r["answer_type"], "text"),
    }
    # the official file, whose 6,141 prompts are read rather than built anew; a table holds pictures
    if "images" not in r:
        row["question"] = mathvista_prompts(folder)[str(r["pid"])]
        row["images"] = [folder / r["image"]]
        row["task"] = r["metadata"]["task"]
        if r["answer"] in choices:  # with the letter that some choices have, "B. Jones"
            row["answer"] = list(row["options"].values())[choices.index(r["answer"])]
        return row
    row["asked"] = asked_in(r["question"])
    # a table has no column for the decimals that its prompts ask for
    decimals = re.search(r"with (one|two|three) decimal places?", r["question"])
    if decimals:
        row["precision"] = "zero one two three".split().index(decimals[1])
    # the official gold is the option's text, which may be a letter itself
    if choice and r.get("answer_option", "") in row["options"]:
        row["answer"] = row["options"][r["answer_option"]]
    elif choice and r["answer"] not in row["options"].values():
        row["answer"] = row["options"].get(r["answer"], r["answer"])
    return row


def asked_in(prompt):
    """The question itself, of a TSV whose questions are whole prompts."""
    asked = re.search(r"Question:\s*(.*?)\s*(?:\(Unit:|\nChoices:|\Z)", prompt, re.DOTALL)
    return asked[1] if asked else prompt


def wemath(r, folder):
    # a problem has several rows: only its ID and the step's key together name one
    row = {"id": f"{r['ID']}/{r['key']}", "step": r["key"]}
    if "images" in r:  # VLMEvalKit's TSV
        return mcq(r, folder, ask="") | row
    options = options_in_one_text(r["option"])
    listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    # no instruction after the options: VLMEvalKit has none here
    return row | {
        "options": options,
        "images": [folder / r["image_path"]],
        "question": f"Question: {r['question']}\nOptions:\n{listed}",
    }


def pope(r, folder):
    return {"question": r["question"], "kind": "yesno"}


def vsi(r, folder):
    """test.jsonl and 32 frames per video, linspace(0, N - 1, 32).

    The frames are frames/<dataset>/<scene_name>/000.jpg to 031.jpg.
    """
    # the official prompt, which lmms-eval has too; VLMEvalKit words it otherwise
    options = option_list(r["options"] or [])
    if options:
        listed = "\n".join(r["options"])
        ask = "Answer with the option's letter from the given choices directly."
        tail = f"Options:\n{listed}\n{ask}"
    else:
        tail = "Please answer the question using a single word or phrase."
    # 32 is the official number of frames; VLMEvalKit's may be 16 to 128
    frames = folder / "frames" / r["dataset"] / str(r["scene_name"])
    return {
        "question": f"These are frames of a video.\n{r['question']}\n{tail}",
        "answer": str(r["ground_truth"]),
        "options": options,
        "kind": "number",
        "images": [frames / f"{i:03}.jpg" for i in range(32)],
    }


# BLINK's own, before the prompts of three subtasks
DISCLAIMED = ("Forensic_Detection", "Jigsaw", "Art_Style")
DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you "
    "just need to give your assessment on this question. You don't need to identify the real "
    "people. You just need to analyze based on the information I gave you.\n\n"
)


def blink(r, folder):
    """The official rows as JSON lines, image_1 to image_4 being file names."""
    before = DISCLAIMER if r["sub_task"] in DISCLAIMED else ""
    # subtasks have one to four images, and their order is part of the question
    names = [r[f"image_{i}"] for i in (1, 2, 3, 4) if r.get(f"image_{i}")]
    return {
        "question": before + r["prompt"],
        "options": option_list(r["choices"]),
        "images": [folder / name for name in names],
    }


def vstar(r, folder):
    # not from the .json beside each image: there the right option is always the first one
    return {
        "question": r["text"],
        "asked": re.split(r"\s*\(A\)", r["text"])[0],
        "answer": r["label"],
        "options": hidden_options(r["text"]) or IN_THE_IMAGE,
        "images": [folder / r["image"]],
    }


def mmvp(r, folder):
    # letters are small in this file; hidden_options and check_letter take them as capitals
    return {
        "question": f"{r['Question']} {r['Options']}",
        "answer": r["Correct Answer"],
        "options": hidden_options(r["Options"]),
        # of its two revisions one spells the column with a small L
        "images": [folder / "MMVP Images" / f"{r.get('Index') or r['lndex']}.jpg"],
    }


def mmhal(r, folder):
    # image_src is an address on the web: its last part is the name of the file
    return {"images": [folder / "images" / Path(r["image_src"]).name], "answer": r["gt_answer"]}


def cvbench(r, folder):
    # the prompt of the set itself, options and all, which the harness leaves as it is
    return mcq(r, folder) | {"question": r["prompt"]}


def mathvision(r, folder):
    """The official JSON lines with lmms-eval's prompt, or VLMEvalKit's TSV, which holds its own."""
    options = option_list(literal(r.get("options", r.get("choices"))))
    if "images" in r:
        return {"options": options, "asked": asked_in(r["question"])}
    ask = 'Please solve the problem step by step and put your answer in one "\\boxed{}".'
    prompt = ask + r["question"]
    if options:
        listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
        ask = "Answer the question with the option's letter from the given choices directly."
        prompt += f"\nChoices: {listed}\n{ask}"
    # one file an item, even where a question has several <imageN>
    return {"options": options, "question": prompt, "images": [folder / r["image"]]}


def visualpuzzles(r, folder):
    # the harness's prompt, which asks for thoughts; lmms-eval has one without them, too
    options = option_list(literal(r["options"]))
    if options:
        listed = "Options:" + "".join(f"\n({letter}) {text}" for letter, text in options.items())
    else:
        listed = "Options: Choose from (A) (B) (C) (D) in the image."
    return {
        "options": options or IN_THE_IMAGE,
        "question": (
            f"{r['question']}\n{listed}\n"
            "Solve the multiple-choice question and then answer with the option letter from the "
            "given choices. The last line of your response should be of the following "
            "format:'Answer: $LETTER' (without quotes) where LETTER is one of options. "
            "Think step by step before answering."
        ),
    }


# --------------------------------------------------------------------------------------------------
# the table


class File(NamedTuple):
    """An official file: where it is, how it is known, and how a row of it becomes one of ours."""

    path: str  # below data_root
    md5: str  # "" if unknown
    source: str  # where a user finds it
    columns: str  # that it must have
    row: object  # one of the functions above


class Benchmark(NamedTuple):
    """A test set. The first of its `files` that is there is read."""

    files: tuple
    check: object = check_letter  # of one answered row: how right is it?
    score: object = score_categories("category")  # of all of them: {name: rows or number}
    pixels: tuple = (1280 * 28 * 28, 16384 * 28 * 28)  # VLMEvalKit's for Qwen2.5-VL
    max_new_tokens: int = 2048
    n: int = 0  # its questions; 0 where not known for sure


class Published(NamedTuple):
    """A table of a paper, in percent."""

    paper: str
    systems: tuple  # its columns
    rows: tuple  # (our metric, its name here, a number or None for each system)


HF = "https://huggingface.co/datasets/"
OC = "https://opencompass.openxlab.space/utils/VLMEval/"
MATH_V = "github.com/mathllm/MATH-V, data/; images.zip: " + HF + "MathLLMs/MathVision"

# fmt: off
BENCHMARKS = {
    # each question in several orders of its options: the score is a mean over these
    "HRBench4K": Benchmark(
        (File("hr_bench_4k.tsv", "f6b041b03d49543494b8a56d2e35be65", HF + "DreamMr/HR-Bench",
              "index, question, answer, category, cycle_category, image", mcq),),
        score=score_hrbench, n=800),
    "HRBench8K": Benchmark(
        (File("hr_bench_8k.tsv", "274c9c7f89329b804a4723178a00219c", HF + "DreamMr/HR-Bench",
              "index, question, answer, category, cycle_category, image", mcq),),
        score=score_hrbench, n=800),
    "MMStar": Benchmark(
        (File("MMStar.tsv", "e1ecd2140806c1b1bbf54b43372efb9e",
              OC + "MMStar.tsv or " + HF + "Lin-Chen/MMStar",
              "index, question, answer, category, image", mcq),),
        score=score_mmstar, n=1500),
    "MME-RealWorld-Lite": Benchmark(
        (File("mme_realworld_lite.tsv", "4c17057d7d3b6c4a0d4397c3dae0881c",
              HF + "yifanzhang114/MME-RealWorld-Base64",
              "index, image, question, multi-choice options, answer, category, l2-category",
              mme_realworld),),
        score=score_mme, n=1919),
    "MathVista": Benchmark(
        (File("MathVista/testmini.json", "",
              "github.com/lupantech/MathVista, data/, with query.json; images.zip: "
              + HF + "AI4Math/MathVista",
              "pid, image, choices, answer, question_type, answer_type, metadata", mathvista),
         File("MathVista_MINI.tsv", "f199b98e178e5a2a20e7048f5dcb0464", OC + "MathVista_MINI.tsv",
              "index, image, question, answer, choices, question_type, answer_type", mathvista)),
        check=check_mathvista, score=score_mathvista, n=1000),
    "WeMath": Benchmark(
        (File("WeMath/testmini.json", "", "github.com/We-Math/We-Math, data/",
              "ID, key, question, option, answer, image_path", wemath),
         File("WeMath.tsv", "b5e969a075f01290a542411fb7766388", OC + "WeMath.tsv",
              "ID, key, question, answer, image, A", wemath)),
        score=score_wemath, n=1740),
    "POPE": Benchmark(
        (File("POPE.tsv", "c12f5acb142f2ef1f85a26ba2fbe41d5", OC + "POPE.tsv",
              "index, image, question, answer, category", pope),),
        check=check_yesno, score=score_pope),
    # the JSON lines, since no parquet reader is among the dependencies
    "VSI-Bench": Benchmark(
        (File("VSI-Bench/test.jsonl", "",
              HF + "nyu-visionx/VSI-Bench; extract 32 frames per video yourself",
              "id, dataset, scene_name, question_type, question, ground_truth, options", vsi),),
        check=check_vsi, score=score_vsi, n=5130,
        pixels=(128 * 28 * 28, 768 * 28 * 28)),  # a frame [ours]
    "BLINK": Benchmark(
        (File("BLINK/val.jsonl", "",
              HF + "BLINK-Benchmark/BLINK, its parquet rows as JSON lines with image files",
              "idx, sub_task, prompt, choices, answer, image_1", blink),
         File("BLINK.tsv", "d5e8af148b10ac69f535ff7b23f3f989", OC + "BLINK.tsv",
              "index, image, question, answer, category", mcq)),
        score=score_blink, n=1901),
    "VStar": Benchmark(
        (File("vstar_bench/test_questions.jsonl", "", HF + "craigwu/vstar_bench",
              "question_id, image, text, label, category", vstar),
         File("VStarBench.tsv", "b18854d7075574be06b631cd5f7d2d6a", HF + "xjtupanda/VStar_Bench",
              "index, image, question, answer, category", mcq)), n=191),
    "MMVP": Benchmark(
        (File("MMVP/Questions.csv", "", HF + "MMVP/MMVP",
              "Question, Options, Correct Answer", mmvp),
         File("MMVP.tsv", "8cb732b141a0cba5b42159df2839e557", OC + "MMVP.tsv",
              "index, image, question, answer", mcq)),
        score=score_mmvp, n=300),
    # two test sets to the harness; AVERAGES and POOLED make one number of both
    "CV-Bench-2D": Benchmark(
        (File("CV-Bench-2D.tsv", "a7cff4cc2857cc237ee2b89e62bccb2d", OC + "CV-Bench-2D.tsv",
              "index, image, question, prompt, answer, source, A", cvbench),),
        score=score_cvbench, n=1438),
    "CV-Bench-3D": Benchmark(
        (File("CV-Bench-3D.tsv", "bb94c0d568d652d15b60e001ac40a170", OC + "CV-Bench-3D.tsv",
              "index, image, question, prompt, answer, source, A", cvbench),),
        score=score_cvbench, n=1200),
    # VaLR does not say which of the two splits its numbers are of
    "MathVision": Benchmark(
        (File("MathVision/test.jsonl", "", MATH_V,
              "id, question, options, image, answer, level, subject", mathvision),
         File("MathVision.tsv", "93f6de14f7916e598aa1b7165589831e", OC + "MathVision.tsv",
              "index, image, question, choices, answer, category", mathvision)),
        check=check_mathvision, score=score_categories("subject", "level", "category"), n=3040),
    "MathVision-testmini": Benchmark(
        (File("MathVision/testmini.jsonl", "", MATH_V,
              "id, question, options, image, answer, level, subject", mathvision),
         File("MathVision_MINI.tsv", "060fe4fa5d868987ce179307bd5f8a33", OC + "MathVision_MINI.tsv",
              "index, image, question, choices, answer, category", mathvision)),
        check=check_mathvision, score=score_categories("subject", "level", "category"), n=304),
    # no rule grades it: eval.py writes the response file for its own judge
    "MMHal-Bench": Benchmark(
        (File("MMHal-Bench/response_template.json", "",
              HF + "Shengcao1006/MMHal-Bench, and the images that image_src names",
              "question_type, image_src, image_content, question, gt_answer", mmhal),),
        check=check_nothing, score=score_mmhal, n=96),
    "VisualPuzzles": Benchmark(
        (File("VisualPuzzles.tsv", "12bcc3f6dd7a11b33ffcd526b5601076", OC + "VisualPuzzles.tsv",
              "index, image, question, options, answer, category", visualpuzzles),),
        score=score_categories("category", "difficulty"), n=1168),
}
# a JSONL file of one's own, the toy's test set for one
JSONL = Benchmark(
    (), check=check_answer, pixels=(56 * 56, 1280 * 28 * 28), max_new_tokens=128)

# means over these scores, whatever the number of their questions
AVERAGES = {
    # GAP: MME-RealWorld-Lite as a whole is perception, not its Perception part
    "Avg-P": ("HRBench4K/overall", "MMStar/overall", "MME-RealWorld-Lite/overall"),
    "Avg-R": ("MathVista/overall", "WeMath/strict", "WeMath/loose"),
    "CV-Bench": ("CV-Bench-2D/overall", "CV-Bench-3D/overall"),  # as Cambrian, which made it
}
# means over all questions of these scores
POOLED = {"CV-Bench rows": ("CV-Bench-2D/micro", "CV-Bench-3D/micro")}

# what papers print, all of Qwen2.5-VL-7B; to eval.py a name here stands for its benchmarks
PUBLISHED = {
    "gap": Published(
        "GAP, arXiv 2605.12374",
        ("Qwen2.5", "caption", "Monet", "LVR", "LH", "LH+DA", "LH+PCA", "GAP"),
        (("HRBench4K/overall", "HRBench4K",
          (68.12, 69.88, 70.75, 70.75, 70.63, 71.50, 72.25, 73.25)),
         ("HRBench4K/single", "FSP",
          (84.50, 85.50, 90.50, 84.25, 85.00, 85.00, 87.75, 86.50)),
         ("HRBench4K/cross", "FCP",
          (52.75, 53.25, 51.00, 57.25, 56.25, 58.75, 54.75, 60.00)),
         ("MMStar/overall", "MMStar",
          (60.46, 60.50, 60.80, 62.07, 61.20, 61.80, 62.10, 63.40)),
         ("MME-RealWorld-Lite/overall", "MME-RW-Lite",
          (44.39, 47.73, 47.20, 49.45, 45.25, 45.75, 46.85, 47.31)),
         ("Avg-P", "Avg-P",
          (57.66, 59.40, 59.58, 60.75, 59.03, 59.68, 60.40, 61.32)),
         ("MathVista/overall", "MathVista",
          (68.50, 67.70, 61.30, 67.00, 68.60, 68.90, 70.20, 71.00)),
         ("WeMath/strict", "WeMath-S",
          (36.29, 28.60, 32.67, 26.95, 30.00, 31.26, 35.24, 36.33)),
         ("WeMath/loose", "WeMath-L",
          (53.06, 45.43, 50.00, 49.05, 48.86, 50.00, 52.00, 54.57)),
         ("Avg-R", "Avg-R",
          (52.62, 47.24, 47.99, 47.66, 49.15, 50.05, 52.48, 53.97)),
         ("POPE/overall", "POPE",
          (86.25, None, None, None, None, 86.02, None, 86.30)))),
    # VaLR-S is aligned to DINOv3, at lambda = 0 to nothing; VaLR-M to three encoders
    "valr": Published(
        "VaLR, arXiv 2602.04476",
        ("Qwen2.5", "lambda=0", "VaLR-S", "VaLR-M"),
        (("VSI-Bench/overall", "VSI-Bench", (33.0, 34.0, 41.5, 52.9)),
         # of VLMEvalKit, whose BLINK is over rows and whose MMVP is over pairs
         ("BLINK/micro", "BLINK", (55.7, 57.1, 63.1, 64.7)),
         # though 60.3 is 181 of 300 questions, and no number of 150 pairs
         ("MMVP/overall", "MMVP", (56.0, None, 60.3, 60.3)),
         ("MMVP/single", "- questions", (None, None, None, None)),
         ("MMStar/overall", "MMStar", (67.1, None, 70.8, 72.3)),
         ("VStar/overall", "V*", (76.4, 75.9, 86.4, 86.9)),
         # VaLR does not say which number of CV-Bench it prints, so all of ours stand here
         ("CV-Bench", "CV-Bench", (74.5, None, 83.1, 87.6)),
         ("CV-Bench-2D/overall", "- 2D", (None, None, None, None)),
         ("CV-Bench-3D/overall", "- 3D", (None, None, None, None)),
         ("CV-Bench rows", "- all rows", (None, None, None, None)))),
    # read in summaries of the paper; NTP has neither KL term, or the forward or the reverse one
    "amvl": Published(
        "AMVL, arXiv 2607.00461",
        ("Qwen2.5", "NTP", "NTP+fwd", "NTP+rev", "AMVL"),
        (("VStar/overall", "V*", (76.44, 81.15, 82.72, 82.20, 84.29)),
         ("HRBench4K/overall", "HRBench4K", (68.00, 70.50, 72.12, 71.75, 72.12)),
         ("HRBench8K/overall", "HRBench8K", (63.75, 67.38, 67.75, 67.25, 68.50)),
         # over rows: 1,066 and 1,272 of 1,901
         ("BLINK/micro", "BLINK", (56.08, None, None, None, 66.91)),
         ("BLINK/IQ_Test", "- IQ", (20.00, None, None, None, 32.67)),
         ("BLINK/Jigsaw", "- Jigsaw", (45.33, None, None, None, 77.33)),
         ("BLINK/Object_Localization", "- Obj. Loc.", (49.18, None, None, None, 54.92)),
         ("BLINK/Multi-view_Reasoning", "- Multi-view", (41.35, None, None, None, 55.64)),
         ("BLINK/Visual_Similarity", "- Vis. Sim.", (82.96, None, None, None, 88.89)),
         ("BLINK/Spatial_Relation", "- Spat. Rel.", (88.81, None, None, None, 88.81)),
         ("VisualPuzzles/overall", "VisualPuzzles", (None, None, None, None, 33.90)))),
}
# fmt: on

# --------------------------------------------------------------------------------------------------
# the names of benchmarks


def benchmarks_of(table):
    """The names of the benchmarks whose scores a published table compares, in its order."""
    names = []
    for metric, _, _ in table.rows:
        parts = (AVERAGES | POOLED).get(metric, (metric,))
        names += [part.partition("/")[0] for part in parts]
    return list(dict.fromkeys(names))


def expanded(names):
    """The names, a published table's replaced by its benchmarks'; each once."""
    found = []
    for name in names:
        found += benchmarks_of(PUBLISHED[name]) if name in PUBLISHED else [name]
    return list(dict.fromkeys(found))


def benchmarks_named(text):
    """The benchmarks that a setting names, "gap,VStar". Raises SystemExit for an unknown name."""
    names = expanded(names_in(text))
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        known = ", ".join([*PUBLISHED, *BENCHMARKS])
        raise SystemExit(f"benchmarks: {unknown[0]!r} is not one of: {known}")
    return names


# --------------------------------------------------------------------------------------------------
# reading a benchmark


def load_benchmark(name, data_root):
    """A public benchmark's rows, and its file's MD5.

    A row is the official one with "id", "question" (the whole prompt), "asked" (the question
    alone), "images" (paths or Cells), "answer", "options" ({letter: text} or None) and "kind".
    Raises SystemExit naming the file and where it comes from, or the columns found.
    """
    path, file = find_file(name, Path(data_root))
    if path.suffix == ".tsv":
        # the MD5 is taken while the file is read: 4 GB are not read twice
        raw, md5 = read_table(path)
    elif path.suffix == ".csv":
        raw, md5 = read_table(path, ",")
    else:
        raw, md5 = read_json_rows(path)
    if not raw:
        raise SystemExit(f"{path}: no questions")
    if rank_and_world()[0] == 0:
        # not refused: mirrors repack files, and the answers stay comparable among themselves
        if file.md5 and md5 != file.md5:
            warn(f"{path} has MD5 {md5}, the official file {file.md5}")
        # a table's rows without a picture are left out, as by the harness
        if BENCHMARKS[name].n not in (0, len(raw)):
            warn(f"{path} has {len(raw)} questions, {name} has {BENCHMARKS[name].n}")
    rows, ids = [], set()
    for n, official in enumerate(raw):
        row = our_row(name, path, file, n, official)
        # refused, not left out: a score of fewer questions would pass for the benchmark's
        wrong = what_is_wrong(row, ids, BENCHMARKS[name].check)
        if wrong:
            raise SystemExit(f"{path}: row {n} {wrong} ({file.source})")
        ids.add(row["id"])
        rows.append(row)
    if BENCHMARKS[name].check is check_letter and rank_and_world()[0] == 0:
        warn_of_lost(path, rows)
    return rows, md5


def warn_of_lost(path, rows):
    """Say which questions no letter can answer, if there are any."""
    # not refused: VLMEvalKit drops an option that says "None" or "NA", and so do we
    lost = [r for r in rows if r["options"] and letter_of(r["answer"]) not in r["options"]]
    if lost:
        first = lost[0]
        warn(
            f"{path}: {len(lost)} questions whose answer is none of the options that were found, "
            f"the first {first['id']!r}: {first['answer']!r} of {', '.join(first['options'])}"
        )


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def find_file(name, data_root):
    """(path, File) of the first file of a benchmark that is there."""
    for file in BENCHMARKS[name].files:
        path = data_root / file.path
        if path.is_file():
            return path, file
    raise SystemExit(missing_files([name], data_root))


def missing_files(names, data_root):
    """A line for each of these benchmarks that has no file, with what is wanted; "" for none."""
    lines = []
    for name in names:
        paths = [(Path(data_root) / file.path, file.source) for file in BENCHMARKS[name].files]
        if not any(path.is_file() for path, _ in paths):
            wanted = " or ".join(f"{path} ({source})" for path, source in paths)
            lines.append(f"{name}: no such file: {wanted}")
    return "\n".join(lines)


# a question's own name, by the first of these columns that a file has; else the row's number
ID_COLUMNS = ("id", "index", "pid", "idx", "question_id", "Index", "lndex")


def our_row(name, path, file, n, r):
    """The n-th official row r as one of ours. Raises SystemExit if it lacks a column or value."""
    # named all at once, so that a file of another version is told at the first row
    columns = set(r)
    if "images" in r:  # what read_table makes of the column image
        columns.add("image")
    lacks = [column for column in file.columns.split(", ") if column not in columns]
    if lacks:
        there = ", ".join(map(str, r))
        raise SystemExit(f"{path}: row {n} lacks {', '.join(lacks)}; it has {there}")
    try:
        # what is asked for is the function's to say, whatever the file's own columns are called
        row = r | {"options": None, "kind": "text"} | file.row(r, path.parent)
    except (LookupError, ValueError, SyntaxError, TypeError, AttributeError) as e:
        raise SystemExit(
            f"{path}: row {n} is not as {name} has it ({type(e).__name__}: {e})"
        ) from None
    # each benchmark has its own name for it
    ids = [row[column] for column in ID_COLUMNS if column in row]
    row["id"] = str(ids[0] if ids else n)
    # without the prompt around it: contamination.py compares questions
    row.setdefault("asked", str(r.get("question") or r.get("Question") or ""))
    row["answer"] = str(row["answer"])
    row["images"] = [x if isinstance(x, Cell) else str(x) for x in row["images"]]
    return row


def what_is_wrong(row, ids, check):
    """A reason to refuse a row beside those with `ids`, or ""."""
    # nothing that a model says would be right
    if check is check_letter and letter_of(row["answer"]) is None:
        return f"has the answer {row['answer']!r}, where the letter of an option is expected"
    # images in a table lie in the file itself
    paths = [x for x in row["images"] if isinstance(x, str)]
    missing = [path for path in paths if not Path(path).is_file()]
    if row["id"] in ids:
        return f"repeats the id {row['id']!r}"
    if missing:
        return f"names {missing[0]}, which is not there"
    # the tokenizer would make an image or a latent of it
    if RESERVED.search(row["question"]):
        return "has a reserved token in its question"
    return ""
