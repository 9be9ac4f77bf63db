"""What is each public test set? Prompts and options from the official layouts, and broken files."""

import pytest
from conftest import run
from official_files import args_of, b64, picture

from benchmarks import BENCHMARKS, load_benchmark
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

    # two rows refer to row 0
    assert [images_of(r) for r in rows["HRBench4K"]] == [[picture(i)] for i in (0, 1, 0, 0)]
    two_each = [[picture(i), picture(i + 1)] for i in range(4)]
    assert [images_of(r) for r in rows["BLINK"]] == two_each
    options = [r["options"] for r in rows["VisualPuzzles"]]
    assert options == [{"A": "it's", "B": "b", "C": "c", "D": "d"}, dict.fromkeys("ABCD", "")]
    in_the_question = {"A": "one", "B": "two", "C": "three", "D": "four"}
    assert rows["MMStar"][0]["options"] == in_the_question


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
