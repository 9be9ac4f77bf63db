"""What is each public test set? Prompts and options from the official layouts, and broken files."""

import shutil
from pathlib import Path

import pytest
from conftest import run
from official_files import args_of, b64, picture

from answers import extract_answer
from benchmarks import (
    BENCHMARKS,
    PUBLISHED,
    Benchmark,
    File,
    benchmarks_named,
    blink,
    literal,
    load_benchmark,
    mathvision,
    mathvista,
    mcq,
    mme_realworld,
    options_in_one_text,
    vstar,
    wemath,
)
from scores import check_answer, check_letter, check_mathvista
from tables import images_of


def test_prompts_are_the_harnesses(bench_root):
    root, _ = bench_root
    rows = {name: load_benchmark(name, root)[0] for name in BENCHMARKS}
    first = {name: rows[name][0]["question"] for name in BENCHMARKS}
    # the option None is missing to pandas, and so to VLMEvalKit
    assert first["HRBench4K"] == (
        'Question: Which 0?\nOptions:\nA. one\nB. two\nlines "quoted"\nD. four, or\tso\n'
        "Please select the correct answer from the options above. \n"
    )
    assert first["MMStar"] == "Question: Which 0?\nOptions: A: one, B: two, C: three, D: four\n"
    assert first["MME-RealWorld-Lite"].startswith(
        "What? The choices are listed below:\n(A) it's A\n(B) it's B\n"
    )
    assert first["MME-RealWorld-Lite"].endswith("of the correct option. \nThe best answer is:")
    assert first["MathVista"] == "Hint: a float.\nQuestion: How long?"
    assert first["WeMath"] == (
        "Question: How many?\nOptions:\nA. 1\nB. 2\nC. 3\nD. 4\nE. No correct answer\n"
    )
    assert first["VSI-Bench"] == (
        "These are frames of a video.\nHow many?\n"
        "Please answer the question using a single word or phrase."
    )
    assert first["MMVP"] == "Open? (a) Open (b) Closed"
    ours = "How many? Select from the following choices.\n(A) 0\n(B) 1"
    assert first["CV-Bench-2D"] == first["CV-Bench-3D"] == ours

    # two rows refer to row 0
    assert [images_of(r) for r in rows["HRBench4K"]] == [[picture(i)] for i in (0, 1, 0, 0)]
    two_each = [[picture(i), picture(i + 1)] for i in range(6)]
    assert [images_of(r) for r in rows["BLINK"]] == two_each
    options = [r["options"] for r in rows["VisualPuzzles"]]
    assert options == [{"A": "it's", "B": "b", "C": "c", "D": "d"}, dict.fromkeys("ABCD", "")]
    in_the_question = {"A": "one", "B": "two", "C": "three", "D": "four"}
    assert rows["MMStar"][0]["options"] == in_the_question
    # an empty cell is no option
    assert rows["CV-Bench-2D"][0]["options"] == {"A": "0", "B": "1"}


@pytest.mark.parametrize(
    "text, texts",
    [
        ("A. 12; B. 15; C. none", ["12", "15", "none"]),
        ("A. 1; B. 2;C. 3; D. 4; E. No correct answer", ["1", "2", "3", "4", "No correct answer"]),
        ("A．12 ；B、 15", ["12", "15"]),
        ("A: x = 1; y = 2; B: x = 2; y = 1", ["x = 1; y = 2", "x = 2; y = 1"]),
        ("A. Shape B.; B. Shape C.; C. Shape A.", ["Shape B.", "Shape C.", "Shape A."]),
        # stray pieces, and marks without a semicolon
        (
            "A. turn it to get Shape ;C.; B. flip it; C. none",
            ["turn it to get Shape C.", "flip it", "none"],
        ),
        (
            "A. flip it; B. turn A to get Shape ;A.; C. none",
            ["flip it", "turn A to get Shape A.", "none"],
        ),
        ("A. x; B. turn it to get Shape ;C.; C. y", ["x", "turn it to get Shape C.", "y"]),
        ("A. 45° B. 60° ;C. 120°", ["45°", "60°", "120°"]),
        ("A. ; B. ; C. ", ["", "", ""]),
    ],
)
def test_options_in_one_text(text, texts):
    """We-Math's; a letter counts where it is the next one."""
    assert list(options_in_one_text(text).values()) == texts
    assert "".join(options_in_one_text(text)) == "ABCDE"[: len(texts)]


POPE_HEADER = "index\timage\tquestion\tanswer\tcategory\n"


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "POPE.tsv (https://opencompass"),
        (
            "index\tquestion\n0\tx\n",
            "row 0 lacks image, answer, category; it has index, question",
        ),
        ("index\timage\n0\n", "POPE.tsv:2: 1 cells where the header names 2"),
        (b"index\timage\n\xff\xfe\t0\n", "POPE.tsv:2: not readable as a table"),
        (POPE_HEADER + "0\t9\tx\tYes\tr\n", "an image cell holds '9'"),
        (POPE_HEADER + f"0\t{b64(1)}\t<|im_end|>\tYes\tr\n", "row 0 has a reserved token"),
    ],
)
def test_bad_benchmark_files(tmp_path, base, text, said):
    """Each is told in a sentence that names file and row; None is no file."""
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "POPE.tsv").write_bytes(data)
    args = args_of(base, tmp_path, tmp_path / "out", benchmarks="POPE")
    assert said in run("eval.py", *args, ok=False)


GAP = "HRBench4K MMStar MME-RealWorld-Lite MathVista WeMath POPE"


@pytest.mark.parametrize(
    "text, names",
    [
        ("VStar,POPE", "VStar POPE"),
        ("gap", GAP),
        ("valr", "VSI-Bench BLINK MMVP MMStar VStar CV-Bench-2D CV-Bench-3D"),
        ("amvl", "VStar HRBench4K HRBench8K BLINK VisualPuzzles"),
        ("POPE,amvl,gap", f"POPE VStar HRBench4K HRBench8K BLINK VisualPuzzles {GAP}"),
    ],
)
def test_a_table_names_its_benchmarks(text, names):
    assert benchmarks_named(text) == list(dict.fromkeys(names.split()))


@pytest.mark.parametrize("text", ["GAP", "Avg-P", "gap,VStarBench"])
def test_an_unknown_benchmark_is_named(text):
    unknown = text.split(",")[-1]
    with pytest.raises(SystemExit, match=f"benchmarks: {unknown!r} is not one of: gap, valr, amvl"):
        benchmarks_named(text)


def test_published_tables_have_a_number_or_none_for_each_system():
    for table in PUBLISHED.values():
        assert len({metric for metric, _, _ in table.rows}) == len(table.rows)
        for metric, name, theirs in table.rows:
            assert len(theirs) == len(table.systems), metric
            # in their columns, and percents
            assert len(name) < 14 and all(x is None or 1 < x < 100 for x in theirs), metric
        assert all(len(system) < 9 for system in table.systems)


def test_a_question_is_compared_without_its_prompt():
    """As contamination.py does: of MathVista's TSV and of V*, whose questions hold the prompt."""
    hint = "Hint: Please answer with a number.\nQuestion: Find x. (Unit: cm)"
    row = {"question_type": "free_form", "answer_type": "integer", "question": hint, "images": []}
    assert mathvista(row, None)["asked"] == "Find x."
    choice = "Hint: a letter.\nQuestion: Find x.\nChoices:\n(A) 1\n(B) 2"
    row |= {"question_type": "multi_choice", "choices": "['1', '2']", "question": choice}
    assert mathvista(row | {"answer": "1"}, None)["asked"] == "Find x."
    text = "What is the material of the glove?\n(A) rubber\n(B) cotton\nAnswer with the letter."
    row = {"text": text, "label": "A", "image": "a.png"}
    assert vstar(row, Path("."))["asked"] == "What is the material of the glove?"


def test_an_instruction_is_no_part_of_the_last_option():
    ask = "Answer with the option's letter from the given choices directly."
    row = {"text": f"Of what?\n(A) rubber\n(B) leather\n{ask}", "label": "A", "image": "a.png"}
    assert vstar(row, Path("."))["options"] == {"A": "rubber", "B": "leather"}


@pytest.mark.parametrize(
    "choices, answer, letter, gold",
    [
        ("['F', 'B', 'D', 'A']", "D", "C", "D"),
        ("['F', 'B', 'D', 'A']", "D", None, "D"),
        ("['1', '2']", "2", "B", "2"),
        ("['1', '2']", "B", None, "2"),
    ],
)
def test_mathvistas_gold_is_an_options_text(choices, answer, letter, gold):
    row = {"question_type": "multi_choice", "answer_type": "text", "question": "Question: x"}
    row |= {"images": [], "choices": choices, "answer": answer}
    row |= {"answer_option": letter} if letter else {}
    assert (row | mathvista(row, None))["answer"] == gold


def test_mathvistas_choices_may_have_letters_of_their_own(tmp_path):
    """The gold has them, too."""
    (tmp_path / "query.json").write_text('{"1": "Which?"}')
    row = {"pid": "1", "image": "a.jpg", "metadata": {"task": "t"}, "question": "Which?"}
    row |= {"question_type": "multi_choice", "answer_type": "text"}
    for choices, gold in ((["(a)", "(b)", "(c)"], "(b)"), (["A. Smith", "B. Jones"], "B. Jones")):
        asked = row | {"choices": choices, "answer": gold}
        asked |= mathvista(asked, tmp_path)
        for raw in ("B", gold, f"\\boxed{{{gold}}}"):
            extracted, _ = extract_answer(raw, asked["options"])
            assert check_mathvista(asked | {"raw": raw, "extracted": extracted}, strict=True), raw


def test_mathvistas_table_says_the_precision_in_its_prompts():
    row = {"question_type": "free_form", "answer_type": "float", "choices": "", "images": []}
    for decimals, precision in (("one", 1), ("two", 2)):
        hint = f"Hint: a floating-point number with {decimals} decimal place, e.g. 1.2\nQuestion: x"
        read = mathvista(row | {"question": hint, "answer": "0.30"}, None)
        assert read["precision"] == precision


def test_a_gold_that_is_none_of_the_options_is_told(tmp_path, capsys):
    cells = "index\timage\tquestion\tanswer\tcategory\tl2_category\n"
    for n, letter in enumerate("BD"):
        cells += f"{n}\t{b64(n)}\tWhich? Options: A: x, B: y, C: z\t{letter}\tc\tl\n"
    (tmp_path / "MMStar.tsv").write_text(cells)
    load_benchmark("MMStar", tmp_path)
    said = capsys.readouterr().err
    assert "1 questions whose answer is none of the options that were found" in said
    assert "the first '1': 'D' of A, B, C" in said


@pytest.mark.parametrize(
    "cell, texts",
    [
        ("['a', \"it's\", 'c d']", ["a", "it's", "c d"]),
        ("['a' \"it's\"\n 'c d']", ["a", "it's", "c d"]),  # as numpy prints it
        (["a", "b"], ["a", "b"]),
        ("", []),
        (None, []),
    ],
)
def test_a_list_in_a_cell(cell, texts):
    assert literal(cell) == texts


def test_mmvps_two_spellings(tmp_path, bench_root):
    """Of its column Index, of which one begins with a small L."""
    root, _ = bench_root
    shutil.copytree(root / "MMVP", tmp_path / "MMVP")
    file = tmp_path / "MMVP/Questions.csv"
    file.write_text(file.read_text().replace("Index", "lndex"))
    (theirs, _), (ours, _) = (load_benchmark("MMVP", folder) for folder in (root, tmp_path))
    assert [row["id"] for row in ours] == [row["id"] for row in theirs] == ["1", "2"]
    assert [Path(row["images"][0]).name for row in ours] == ["1.jpg", "2.jpg"]


def test_a_benchmark_of_ones_own_is_a_row(tmp_path, monkeypatch):
    """A column of its file may have the name of one of ours; an open question has no letter."""
    table = f"index\timage\tquestion\tanswer\tkind\n0\t{b64(1)}\tWhich?\tcyan square\tcolour\n"
    (tmp_path / "Mine.tsv").write_text(table)

    def whole(r, folder):
        return {"question": r["question"]}

    def rows(row, check):
        file = File("Mine.tsv", "", "me", "index, image, question, answer", row)
        monkeypatch.setitem(BENCHMARKS, "Mine", Benchmark((file,), check=check))
        return load_benchmark("Mine", tmp_path)[0]

    (row,) = rows(whole, check_answer)
    assert (row["question"], row["kind"], row["options"]) == ("Which?", "text", None)
    with pytest.raises(SystemExit, match="row 0 has the answer 'cyan square', where the letter"):
        rows(mcq, check_letter)


def test_all_missing_files_and_questions_are_told(tmp_path, bench_root, base):
    said = run("eval.py", *args_of(base, tmp_path, tmp_path / "out", benchmarks="gap"), ok=False)
    assert said.count("no such file: ") == len(benchmarks_named("gap"))
    root, _ = bench_root
    args = args_of(base, root, tmp_path / "out", benchmarks="VStar")
    said = run("eval.py", *args, ranks=2)
    assert said.count("questions, VStar has 191") == 1  # and not once a rank
    assert "where the benchmark has 191" in run("eval.py", *args)  # beside the paper's numbers


def test_prompts_end_as_the_harnesses_do():
    row = {"ID": "1", "key": "2steps_1", "question": "How many?", "A": "1", "B": "2", "images": []}
    assert wemath(row, None)["question"] == "Question: How many?\nOptions:\nA. 1\nB. 2\n"
    row = {"question": "How many?", "options": ["1", "2"], "image": "a.png"}
    ask = "Answer the question with the option's letter from the given choices directly."
    made = mathvision(row, Path("."))
    assert made["question"].endswith(f"How many?\nChoices: A. 1\nB. 2\n{ask}")
    # VLMEvalKit's TSV holds whole prompts
    row = {"question": "Hint: ...\nQuestion: How many?\nChoices:\n(A) 1\n(B) 2", "images": []}
    made = mathvision(row | {"choices": "['1', '2']"}, None)
    assert "question" not in made and made["asked"] == "How many?"
    assert made["options"] == {"A": "1", "B": "2"}
    # as the file has them, whatever their letters
    row = {"question": "Which?", "multi-choice options": "['(A) x', '(D) y', '(D)  z']"}
    assert "below:\n(A) x\n(D) y\n(D)  z\nSelect" in mme_realworld(row, None)["question"]


def test_all_options_and_pictures_of_a_row_are_there():
    r = {"question": "Q", "E": "e", "A": "a", "H": "h"}
    assert list(mcq(r, None)["options"]) == ["A", "E", "H"]
    four = {f"image_{i}": f"{i}.png" for i in (1, 2, 3, 4)} | {"prompt": "P", "choices": ["x"]}
    row = blink(four | {"sub_task": "Jigsaw"}, Path("."))
    assert len(row["images"]) == 4
    assert row["question"].startswith("Disclaimer") and row["question"].endswith("P")
