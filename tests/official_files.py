"""A small file of each benchmark in its official layout, and eval.py over them."""

import base64
import csv
import io
import json

from PIL import Image

from benchmarks import BENCHMARKS
from files import read_lines

ABCD = {"A": "one", "B": 'two\nlines "quoted"', "C": "None", "D": "four, or\tso"}
LETTERS = "ABDA"  # the golds of four choices


def picture(i, size=(56, 56)):
    """A PNG of one colour, encoded."""
    file = io.BytesIO()
    Image.new("RGB", size, (37 * i % 256, 91 * i % 256, 53 * i % 256)).save(file, format="PNG")
    return file.getvalue()


def b64(i):
    return base64.b64encode(picture(i)).decode()


def save(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(i))


def write_table(path, rows, delimiter="\t"):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def choices(root):
    """HRBench, MMStar and MME-RealWorld-Lite."""
    mcq = []
    for i, letter in enumerate(LETTERS):
        image = b64(i) if i < 2 else "0"  # the last two refer to the first
        row = {"index": str(i), "image": image, "question": f"Which {i}?", "answer": letter}
        mcq.append(row | ABCD)

    cycles = []
    for i, row in enumerate(mcq):
        category = ("single", "cross")[i % 2]
        cycles.append(row | {"category": category, "cycle_category": str(i // 2)})
    write_table(root / "hr_bench_4k.tsv", cycles)
    write_table(root / "hr_bench_8k.tsv", cycles)

    mmstar, mme = [], []
    for i, letter in enumerate(LETTERS):
        question = f"Which {i}?\nOptions: A: one, B: two, C: three, D: four"
        row = {"index": str(i), "question": question, "image": b64(i), "answer": letter}
        mmstar.append(row | {"category": "math", "l2_category": f"l{i % 3}"})
        row = {"index": i, "image": b64(i), "question": "What?"}
        row["multi-choice options"] = str([f"({k}) it's {k}" for k in "ABCDE"])
        row["answer"] = letter
        row["category"] = f"{'Perception' if i else 'Reasoning'}/Remote Sensing"
        mme.append(row | {"l2-category": "Object/Attribute/color"})
    write_table(root / "MMStar.tsv", mmstar)
    write_table(root / "mme_realworld_lite.tsv", mme)


# of its 14 subtasks those of which a paper prints numbers
SUBTASKS = "IQ_Test Jigsaw Object_Localization Multi-view_Reasoning Visual_Similarity"
SUBTASKS = [*SUBTASKS.split(), "Spatial_Relation"]


def blink(root):
    rows = []
    for i, subtask in enumerate(SUBTASKS):
        row = {"index": i, "image": str([b64(i), b64(i + 1)]), "question": "Which?"}
        rows.append(row | {"answer": "B", "category": subtask} | ABCD)
    write_table(root / "BLINK.tsv", rows)


def cvbench(root):
    for split, sources in (("2D", ("ADE20K", "ADE20K", "ADE20K", "COCO")), ("3D", ["Omni3D"] * 3)):
        rows = []
        for i, source in enumerate(sources):
            row = {"index": i, "image": b64(i), "question": "How many?", "answer": "B"}
            row["prompt"] = "How many? Select from the following choices.\n(A) 0\n(B) 1"
            rows.append(row | {"A": "0", "B": "1", "C": "", "split": split, "source": source})
        write_table(root / f"CV-Bench-{split}.tsv", rows)


def mathvista(root):
    folder = root / "MathVista"
    for i in (1, 2):
        save(folder / f"images/{i}.jpg", i)
    meta = {"metadata": {"task": "geometry problem solving"}}
    free = {"question_type": "free_form", "answer_type": "float", "answer": "1.2"}
    free |= {"choices": None, "precision": 1.0}
    choice = {"question_type": "multi_choice", "answer_type": "text", "answer": "blue"}
    choice |= {"choices": ["red", "blue"], "precision": None}
    rows = {
        "1": {"pid": "1", "question": "How long?", "image": "images/1.jpg"} | free | meta,
        "2": {"pid": "2", "question": "Which?", "image": "images/2.jpg"} | choice | meta,
    }
    (folder / "testmini.json").write_text(json.dumps(rows))
    prompts = {"1": "Hint: a float.\nQuestion: How long?", "2": "Hint: a letter.\nQuestion: Which?"}
    (folder / "query.json").write_text(json.dumps(prompts))


def mathvision(root):
    folder = root / "MathVision"
    save(folder / "images/1.jpg", 1)
    free = {"id": "1", "question": "How much? <image1>", "options": [], "level": 1}
    free |= {"image": "images/1.jpg", "answer": "\\frac{1}{2}", "subject": "algebra"}
    choice = {"id": "2", "question": "Which? <image1>", "options": list("ABCDE"), "level": 2}
    choice |= {"image": "images/1.jpg", "answer": "C", "subject": "logic"}
    for name in ("test", "testmini"):
        write_jsonl(folder / f"{name}.jsonl", [free, choice])


def wemath(root):
    folder = root / "WeMath"
    save(folder / "2steps/image/1.png", 3)
    rows = []
    for problem in (1, 2):
        for key in ("2steps_1", "2steps_2", "2steps_multi"):
            row = {"ID": f"2steps_{problem}", "key": key, "question": "How many?"}
            row["option"] = "A. 1; B. 2;C. 3; D. 4; E. No correct answer"
            rows.append(row | {"answer": "E", "image_path": "2steps/image/1.png"})
    (folder / "testmini.json").write_text(json.dumps(rows))


def pope(root):
    rows = []
    for i, answer in enumerate(("Yes", "No")):
        row = {"index": i, "image": b64(i), "question": "Is there a dog?", "answer": answer}
        rows.append(row | {"category": "random,popular"})
    write_table(root / "POPE.tsv", rows)


def vsi(root):
    folder = root / "VSI-Bench"
    for i in range(32):
        save(folder / f"frames/scannet/s1/{i:03}.jpg", i)
    scene = {"dataset": "scannet", "scene_name": "s1"}
    count = {"question_type": "object_counting", "question": "How many?", "ground_truth": "4"}
    route = {"question_type": "route_planning", "question": "Where?", "ground_truth": "B"}
    rows = [
        {"id": 0} | scene | count | {"options": None},
        {"id": 1} | scene | route | {"options": ["A. left", "B. right"]},
    ]
    write_jsonl(folder / "test.jsonl", rows)


def vstar(root):
    folder = root / "vstar_bench"
    save(folder / "direct_attributes/a.jpg", 5)
    row = {"question_id": 0, "image": "direct_attributes/a.jpg", "label": "B"}
    row["text"] = "What colour?\n(A) red\n(B) blue\nAnswer with the letter."
    write_jsonl(folder / "test_questions.jsonl", [row | {"category": "direct_attributes"}])


def mmvp(root):
    folder = root / "MMVP"
    rows = []
    for i, answer in ((1, "(a)"), (2, "(b)")):
        save(folder / f"MMVP Images/{i}.jpg", i)
        row = {"Index": i, "Question": "Open?", "Options": "(a) Open (b) Closed"}
        rows.append(row | {"Correct Answer": answer})
    write_table(folder / "Questions.csv", rows, ",")


def mmhal(root):
    folder = root / "MMHal-Bench"
    save(folder / "images/x.jpg", 7)
    row = {"question_type": "attribute", "question_topic": "t", "image_id": "x"}
    row |= {"image_src": "https://host/x.jpg", "image_content": ["dog"], "question": "What?"}
    row |= {"gt_answer": "a dog", "model_answer": ""}
    (folder / "response_template.json").write_text(json.dumps([row]))


def visualpuzzles(root):
    rows = []
    for i, (options, letter) in enumerate(((["it's", "b", "c", "d"], "A"), ("", "D"))):
        row = {"index": i, "image": b64(i), "question": "Next?", "options": str(options)}
        rows.append(row | {"answer": letter, "category": "spatial", "difficulty": "easy"})
    write_table(root / "VisualPuzzles.tsv", rows)


# fmt: off
WRITERS = (
    choices, mathvista, mathvision, wemath, pope, vsi, blink, vstar, mmvp, cvbench, mmhal,
    visualpuzzles,
)
# fmt: on


def official(root):
    """Write all of them. Returns {name: [(a right output, a wrong one)] by row}."""
    root.mkdir()
    for write in WRITERS:
        write(root)

    def outputs(*golds):
        return [(f"<answer>{gold}</answer>", "<answer>77</answer>") for gold in golds]

    four = [(f"<answer>{letter}</answer>", "<answer>Z</answer>") for letter in LETTERS]
    return {
        "HRBench4K": four,
        "HRBench8K": four,
        "MMStar": four,
        "MME-RealWorld-Lite": four,
        "MathVista": outputs("1.24", "B"),
        "WeMath": outputs(*"EEEEEE"),
        "POPE": outputs("yes", "no"),
        "VSI-Bench": outputs("4", "B"),
        "BLINK": outputs(*"BBBBBB"),
        "VStar": outputs("B"),
        "MMVP": outputs("a", "b"),
        "CV-Bench-2D": outputs(*"BBBB"),
        "CV-Bench-3D": outputs(*"BBB"),
        "MathVision": outputs("0.5", "C"),
        "MathVision-testmini": outputs("0.5", "C"),
        "MMHal-Bench": outputs("a dog"),
        "VisualPuzzles": outputs("A", "D"),
    }


def args_of(base, root, out, **change):
    """The arguments of eval.py over all of them."""
    settings = {
        "model": base,
        "data_root": root,
        "benchmarks": ",".join(BENCHMARKS),
        "out": out,
        "max_new_tokens": 4,
        "min_pixels": 56 * 56,
        "max_pixels": 56 * 56,
        "batch": 8,
    } | change
    return [f"--{name}={value}" for name, value in settings.items()]


def plant(out, name, outputs):
    """Replace the raw answers in a benchmark's prediction files, in the order of the files."""
    outputs = iter(outputs)
    for path in sorted((out / name).glob("predictions.rank*.jsonl")):
        said = {"truncated": False}
        rows = [row | said | {"raw": next(outputs)} for row in read_lines(path)]
        write_jsonl(path, rows)
