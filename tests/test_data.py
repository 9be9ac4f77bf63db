"""Rows as people write them: put into one form, or refused with file, line and field."""

import json
import math
import os
import re
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
from conftest import broken
from PIL import Image

import data
from answers import extract_answer, is_correct
from data import (
    OURS,
    TAG_ORDER,
    Row,
    Rows,
    example_key,
    in_one_form,
    load_examples,
    question_text,
    strip_parser,
)
from files import write_lines
from options import option_named

# --- a data file: the sentence names file, line and field


def answer_first(row):
    return row | {"response": "<answer> x </answer> <think> <latent></latent> </think>"}


def no_end_of_thought(row):
    return row | {"response": row["response"].replace("</think>", "")}


def words_in_span(row):
    return row | {"response": row["response"].replace("<latent></latent>", "<latent> x </latent>")}


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda r: "{", ["not JSON"]),
        (lambda r: "[1]", ["JSON object"]),
        (lambda r: r | {"id": "train-0"}, ["train-0", "repeats", "broken.jsonl:1"]),
        (lambda r: r | {"answer": [3]}, ["'answer'", "found [3]"]),
        (lambda r: {"qestion": r.pop("question")} | r, ["'question' is missing", "'qestion'"]),
        (lambda r: r | {"images": ["no.png"]}, ["no.png"]),
        (lambda r: r | {"images": [3]}, ["'images'", "found 3"]),
        (lambda r: r | {"options": [[3]]}, ["'options'", "found [3]"]),
        (lambda r: r | {"aux_images": []}, ["1 <latent></latent>", "0 aux_images"]),
        (no_end_of_thought, ["tags"]),
        (answer_first, ["tags"]),
        (words_in_span, ["nothing inside"]),
        (lambda r: r | {"question": "what is <|image_pad|>?"}, ["'question'", "<|image_pad|>"]),
    ],
)
def test_bad_data_names_the_line(tmp_path, world, change, words):
    with pytest.raises(SystemExit) as e:
        load_examples(broken(world, tmp_path, change))
    for word in ["broken.jsonl:2", *words]:
        assert word in str(e.value)


# --- a row is what people write

PLAIN = "<think> It is plain. </think> <answer> 3 </answer>"
ROW = {"id": "a", "images": ["a.png"], "question": "What?", "answer": "3", "response": PLAIN}
EVERYDAY = [  # a row as written, and what it is read as
    ({"id": 17}, {"id": "17"}),
    ({"id": "tränen/图 7"}, {"id": "tränen/图 7"}),
    ({"answer": 3}, {"answer": "3"}),
    ({"answer": 2.5}, {"answer": "2.5"}),
    ({"images": "a.png"}, {"question": "What?"}),
    ({"aux_images": None}, {"aux_images": []}),
    ({"options": None}, {"question": "What?"}),
    ({"options": [1, 2.5, 3]}, {"options": ["1", "2.5", "3"]}),
    ({"options": ["A. 3", "B. blue"]}, {"options": ["3", "blue"]}),
    ({"options": ["(a) red", "(b) 3"]}, {"options": ["red", "3"]}),
    ({"options": ["A. red", "3"]}, {"options": ["A. red", "3"]}),
    ({"question": "<image>\nWhat?"}, {"question": "What?"}),
    ({"question": "Is <image> red?"}, {"question": "Is <image> red?"}),
    ({"category": None, "system": 5}, {"system": "5"}),
]


@pytest.mark.parametrize("change, read", EVERYDAY)
@pytest.mark.parametrize("form", ["lines", "list", "bom", "windows"])
def test_rows_are_read_as_people_write_them(tmp_path, change, read, form):
    (tmp_path / "a.png").touch()
    text = json.dumps(ROW | change, ensure_ascii=False)
    if form == "list":
        text = json.dumps([ROW | change], indent=1)
    text = {"bom": "\ufeff" + text + "\n", "windows": text + "\r\n"}.get(form, text + "\n")
    (tmp_path / "data.jsonl").write_bytes(text.encode())
    (row,) = load_examples(tmp_path / "data.jsonl")
    assert row["images"] == [str(tmp_path / "a.png")] and None not in row.values()
    assert {name: row[name] for name in read} == read
    assert row.where.endswith("item 1" if form == "list" else ":1")


REFUSED = [
    (json.dumps(ROW | {"question": "<image> or <image>?"}), "2 <image> marks for 1 images"),
    (json.dumps(ROW | {"answer": True}), "'answer'"),
    (json.dumps(ROW | {"answer": {}}), "'answer'"),
    (json.dumps(ROW | {"id": None}), "'id'"),
    (json.dumps(ROW | {"options": "red"}), "'options'"),
    (json.dumps(ROW | {"options": ["<|image_pad|>", "b"], "answer": "A"}), "'options'"),
    (json.dumps(ROW | {"options": [f"option {i}" for i in range(27)]}), "27 options"),
    (json.dumps(ROW | {"options": ["cat", "dog"], "answer": 1}), "answer '1' is none of the 2"),
    (json.dumps(ROW | {"images": ["x" * 300 + ".png"]}), "no such image"),
    (json.dumps(ROW | {"images": ["no\0.png"]}), "no such image"),
    (json.dumps(ROW | {"answer": "x"}).replace('"x"', "NaN"), "'answer'"),
    (json.dumps(ROW | {"answer": "x"}).replace('"x"', '"\\ud800"'), "not Unicode"),
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ("7", "JSON object"),
    (b'{"id": "\xff"}', "not Unicode"),
]


@pytest.mark.parametrize("line, words", REFUSED)
def test_what_can_not_be_a_row_is_named(tmp_path, line, words):
    (tmp_path / "a.png").touch()
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(ROW | {"id": "first"}).encode() + b"\n" + line + b"\n")
    with pytest.raises(SystemExit) as e:
        load_examples(path)
    assert f"{path}:2" in str(e.value) and words in str(e.value)


def test_a_folder_and_links(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "data.jsonl").write_text(json.dumps(ROW) + "\n")
    with pytest.raises(SystemExit, match="a folder"):
        load_examples(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("a.png", "data.jsonl"):
        (elsewhere / name).symlink_to(tmp_path / name)
    assert load_examples(elsewhere / "data.jsonl")[0]["id"] == "a"


@pytest.mark.parametrize(
    "row, text",
    [
        ({"question": "Which?"}, "Which?"),
        ({"question": "Which?", "options": []}, "Which?"),
        ({"question": "Which?", "options": ["red", "a"]}, "Which?\nA. red\nB. a"),
        ({"question": "A red one?", "options": ["red", "a"]}, "A red one?\nA. red\nB. a"),
        ({"question": "(A) red (B) a?", "options": ["red", "a"]}, "(A) red (B) a?"),
        ({"question": "Q\nA. red\nB. a", "options": ["red", "a"]}, "Q\nA. red\nB. a"),
        ({"question": "Q", "options": {"A": "red"}}, "Q"),  # a benchmark's whole prompt
        ({"question": "Q", "options": ["x"], "instruction": "\nThink."}, "Q\nA. x\nThink."),
    ],
)
def test_options_reach_the_prompt_once(row, text):
    assert question_text(row) == text


# --- what a row holds


@pytest.mark.parametrize(
    "change, read",
    [
        ({"images": ["a.png", "a.png"], "question": "<image> <image>\n Same?"}, "Same?"),
        (
            {"images": ["a.png", "a.png"], "question": "<image>Is it <image>?"},
            "<image>Is it <image>?",
        ),
        ({"images": [], "question": "What is 2 + 2?"}, "What is 2 + 2?"),
        ({"question": "<image>"}, ""),
        ({"question": "one\u2028two\x85three\fend"}, "one\u2028two\x85three\fend"),
        ({"question": "\U0001f600 <image> 字"}, "\U0001f600 <image> 字"),
        ({"question": 5}, "5"),
    ],
)
@pytest.mark.parametrize("ascii", [True, False])
def test_questions_are_read_with_their_marks(tmp_path, change, read, ascii):
    (tmp_path / "a.png").touch()
    line = json.dumps(ROW | change, ensure_ascii=ascii)
    (tmp_path / "data.jsonl").write_bytes(f"\n\n{line}".encode())  # no newline at the end
    (row,) = load_examples(tmp_path / "data.jsonl")
    assert row["question"] == read and row.where.endswith(":3")


def test_joined_files_of_windows_editors(tmp_path):
    """Each part brought its byte order mark along."""
    (tmp_path / "a.png").touch()
    lines = ["\ufeff" + json.dumps(ROW | {"id": n}) + "\r\n" for n in range(3)]
    (tmp_path / "data.jsonl").write_bytes("".join(lines).encode())
    assert [row["id"] for row in load_examples(tmp_path / "data.jsonl")] == ["0", "1", "2"]


SPAN = "<think> <latent></latent> </think> <answer> 3 </answer>"


@pytest.mark.parametrize("aux", ["a.png", ["a.png"]])
def test_one_auxiliary_image_may_be_a_string(tmp_path, aux):
    (tmp_path / "a.png").touch()
    (tmp_path / "data.jsonl").write_text(json.dumps(ROW | {"response": SPAN, "aux_images": aux}))
    (row,) = load_examples(tmp_path / "data.jsonl")
    assert row["aux_images"] == [str(tmp_path / "a.png")]


def test_a_question_needs_no_response(tmp_path):
    (tmp_path / "a.png").touch()
    asked = {name: ROW[name] for name in ("id", "images", "question", "answer")}
    (tmp_path / "data.jsonl").write_text(json.dumps(asked) + "\n")
    (row,) = load_examples(tmp_path / "data.jsonl", training=False)
    assert "response" not in row and "aux_images" not in row
    with pytest.raises(SystemExit, match="'response'"):
        load_examples(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["no examples"]),
        ("\n \n", ["no examples"]),
        ("[]", ["no examples"]),
        ("[1]", ["item 1", "JSON object"]),
        (json.dumps([ROW, [ROW]]), ["item 2", "JSON object"]),
        (json.dumps([ROW | {"id": 17}, ROW | {"id": "17"}]), ["item 2", "'17'", "item 1"]),
        (
            json.dumps([ROW, ROW | {"id": "b", "question": "<image> <image>"}]),
            ["item 2", "2 <image>"],
        ),
        (json.dumps([ROW])[:-1], ["not JSON"]),
        ("\ufeff{", [":1", "not JSON"]),
        (json.dumps(ROW | {"id": "\udc80"}), [":1", "not Unicode"]),
        (json.dumps(ROW | {"\ud800": 1}), [":1", "not Unicode"]),
        (json.dumps(ROW | {"note": ["x", {"y": "\udfff"}]}), [":1", "not Unicode"]),
        (json.dumps(ROW | {"answer": False}), [":1", "'answer'", "False"]),
        (json.dumps(ROW | {"response": None}), [":1", "'response'", "null"]),
        (json.dumps(ROW | {"images": None}), [":1", "'images'"]),
        (json.dumps(ROW | {"images": {"a": 1}}), [":1", "'images'"]),
        (json.dumps(ROW | {"options": {"A": "x"}}), [":1", "'options'"]),
        (json.dumps(ROW | {"options": ["x", True]}), [":1", "'options'", "True"]),
        (json.dumps(ROW | {"options": ["x", None]}), [":1", "'options'", "None"]),
        (json.dumps(ROW | {"system": ["x"]}), [":1", "'system'"]),
        (json.dumps(ROW | {"system": "<|im_end|>"}), [":1", "'system'", "<|im_end|>"]),
        (json.dumps(ROW | {"question": "<|endoftext|>"}), [":1", "'question'", "<|endoftext|>"]),
        (json.dumps(ROW | {"question": "</abs_vis_token>"}), [":1", "</abs_vis_token>"]),
        (json.dumps(ROW | {"options": ["3", "<|box_end|>"]}), [":1", "'options'", "<|box_end|>"]),
        # it comes together where a text is stripped
        (
            json.dumps(ROW | {"system": "<|im_<parser>z</parser>end|>"}),
            [":1", "'system'", "<|im_end|>"],
        ),
        (json.dumps(ROW | {"images": [""]}), [":1", "no such image"]),
        (json.dumps(ROW | {"aux_images": "gone.png", "response": SPAN}), [":1", "gone.png"]),
    ],
)
def test_files_that_are_no_data_are_refused_with_their_place(tmp_path, text, words):
    (tmp_path / "a.png").touch()
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode("utf-8"))
    with pytest.raises(SystemExit) as e:
        load_examples(path)
    for word in [str(path), *words]:
        assert word in str(e.value)


@pytest.mark.parametrize(
    "options, bare",
    [
        (["A) x", "B) y"], ["x", "y"]),
        (["A: x", "B: y", "C: z"], ["x", "y", "z"]),
        (["(A)x", "(B)y"], ["x", "y"]),
        (["B. x", "A. y"], ["B. x", "A. y"]),  # not in order: texts that begin so
        (["A. x\nmore", "B. y"], ["x\nmore", "y"]),
        (["Apple", "Banana"], ["Apple", "Banana"]),
        ([1.5, "2"], ["1.5", "2"]),
        ([], []),
    ],
)
def test_letters_of_options_are_no_part_of_them(tmp_path, options, bare):
    (tmp_path / "a.png").touch()
    (tmp_path / "data.jsonl").write_text(json.dumps(ROW | {"options": options, "answer": "A"}))
    assert load_examples(tmp_path / "data.jsonl")[0]["options"] == bare


def test_what_stages_add_to_a_row_is_no_column_of_a_file(tmp_path, world):
    """An Alpaca-style `instruction` would be in the prompt of some stages alone."""
    rows = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    for row in rows:
        row |= dict.fromkeys(OURS, "<|im_end|>")
        row |= {"images": [str(world / row["images"][0])], "aux_images": []}
    write_lines(tmp_path / "test.jsonl", rows)
    for row in load_examples(tmp_path / "test.jsonl", training=False):
        assert not set(OURS) & row.keys() and question_text(row) == row["question"]


def test_numbers_that_json_has_not_can_be_written_again(tmp_path, world):
    row = json.loads((world / "test.jsonl").read_text().splitlines()[0])
    row |= {"images": [str(world / row["images"][0])], "aux_images": []}
    row["x"] = {"y": [1, math.nan, "z"]}
    (tmp_path / "test.jsonl").write_text(json.dumps(row | {"score": -math.inf}))
    (found,) = load_examples(tmp_path / "test.jsonl", training=False)
    assert found["x"] == {"y": [1, None, "z"]} and "score" not in found
    write_lines(tmp_path / "again.jsonl", [found])
    # how deep is too deep differs between Pythons
    refused = []
    for n in (900, 2000, 100_000):
        deep = json.dumps(row | {"x": 0}).replace('"x": 0', '"x": ' + "[" * n + "]" * n)
        (tmp_path / "test.jsonl").write_text(deep)
        try:
            write_lines(
                tmp_path / "again.jsonl", load_examples(tmp_path / "test.jsonl", training=False)
            )
        except SystemExit as e:
            refused.append(re.search("test.jsonl.*nested too deeply", str(e))[0])
    assert len(refused) >= 2


def test_tags_out_of_order_are_found_in_linear_time():
    pairs = "<latent></latent><parser></parser>" * 3000
    assert TAG_ORDER.fullmatch(f"<think>{pairs}</think><answer></answer>")
    assert not TAG_ORDER.fullmatch(f"<think>{pairs}</think><answer>")


def test_a_nan_in_a_column_of_ones_own_is_a_cell_without_a_value(tmp_path, world):
    """As pandas writes it; what a row is made of may be none."""
    row = json.loads((world / "train.jsonl").read_text().splitlines()[0])
    row["images"] = [str(world / path) for path in row["images"]]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row | {"aux_images": [], "response": "x", "score": math.nan}) + "\n")
    (found,) = load_examples(path, training=False)
    assert "score" not in found
    write_lines(tmp_path / "b.jsonl", [found])
    path.write_text(json.dumps(row | {"answer": math.nan}) + "\n")
    with pytest.raises(SystemExit, match="a.jsonl:1: field 'answer' must be a str, found nan"):
        load_examples(path, training=False)


def test_what_a_row_teaches_is_its_content(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    row = ROW | {"images": [str(tmp_path / "a.png")]}
    (tmp_path / "elsewhere").mkdir()
    moved = row | {"images": [str(shutil.copy(tmp_path / "a.png", tmp_path / "elsewhere/b.png"))]}
    assert example_key(moved) == example_key(row)
    for name in ("id", "question", "answer", "response"):
        assert example_key(row | {name: "another"}) != example_key(row)
    assert example_key(row | {"images": row["images"] * 2}) != example_key(row)
    assert example_key(row | {"note": "to myself"}) == example_key(row)


# --- rows stay on the disk


def big_file(folder, n, line=json.dumps):
    """A data file of n rows of one picture, some lines blank, some with a carriage return."""
    Image.new("RGB", (28, 28)).save(folder / "a.png")
    with open(folder / "big.jsonl", "w", newline="") as f:
        for i in range(n):
            row = {"id": i, "images": "a.png", "question": f"é {i}\u2028?", "answer": i % 7}
            f.write(line(row) + ("\r\n\n" if i % 3 == 0 else "\n"))
    return folder / "big.jsonl"


def test_rows_are_those_of_a_plain_reader(tmp_path):
    """By index, slice and choice, in any order; with changes, which touch no other row."""
    path = big_file(tmp_path, 50)
    want = [
        json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
    ]
    rows = load_examples(path, training=False)
    assert len(rows) == 50
    assert [row["question"] for row in rows] == [row["question"] for row in want]
    assert [row["id"] for row in rows[40:2:-7]] == [str(i) for i in range(40, 2, -7)]
    assert rows[-1]["id"] == "49" and rows[5:8][1]["answer"] == "6"
    lines = path.read_bytes().split(b"\n")
    for row in rows:
        assert json.loads(lines[int(row.where.rpartition(":")[2]) - 1])["id"] == int(row["id"])

    odd = rows.keep(i for i, row in enumerate(rows) if int(row["id"]) % 2)
    changed = odd.then(lambda row: row.update(question=row["question"].upper()))
    changed = changed.then(lambda row: row.update(question=row["question"] + "!"))
    assert [row["id"] for row in changed] == [str(i) for i in range(1, 50, 2)]
    assert changed[2:4][0]["question"] == "É 5\u2028?!" and odd[2]["question"] == "é 5\u2028?"
    rows[3]["answer"] = "of a copy"
    assert rows[3]["answer"] == "3"
    with pytest.raises(IndexError):
        rows[50]


def test_rows_of_a_list_are_copies():
    plain = [Row(id="a", n=1), Row(id="b", n=2)]
    plain[1].where = "f:2"
    rows = Rows.of(plain).then(lambda row: row.update(n=row["n"] + 1))
    assert [row["n"] for row in rows] == [row["n"] for row in rows] == [2, 3]
    assert rows[1].where == "f:2" and plain[1]["n"] == 2 and Rows.of(rows) is rows


def test_a_file_that_changes_while_it_is_read(tmp_path):
    """A replaced or longer one changes nothing; one that was cut is named, never misread."""
    path = big_file(tmp_path, 20)
    rows = load_examples(path, training=False)
    with open(path, "a") as f:
        f.write("no json\n")
    assert rows[19]["id"] == "19"
    other = path.with_name("other")
    other.write_text("nothing\n")
    os.replace(other, path)
    assert [row["id"] for row in rows] == [str(i) for i in range(20)]
    path = big_file(tmp_path, 20)
    rows = load_examples(path, training=False)
    os.truncate(path, 500)
    with pytest.raises(SystemExit, match="big.jsonl:.*shorter"):
        rows[19]


def test_threads_read_rows_of_one_file(tmp_path):
    rows = load_examples(big_file(tmp_path, 300), training=False)
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda i: rows[i]["id"], list(range(300)) * 5))
    assert ids == [str(i) for i in range(300)] * 5


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Of 20,000 rows of 2 KB, 40 MB as text, less than a tenth is held."""
    path = big_file(tmp_path, 20_000, lambda row: json.dumps(row | {"system": "x" * 2000}))
    tracemalloc.start()
    rows = load_examples(path, training=False)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 20_000 and held < 4e6


def test_what_is_taught_at_first_counts(world):
    row = load_examples(world / "train.jsonl")[0]
    assert example_key(row | {"at_first": "a"}) != example_key(row | {"at_first": "b"})


@pytest.mark.parametrize(
    "answers, options, right",
    [
        (["0", "1", "4", "5", "E", "v", "A, C", "none", ""], "wxyz", False),
        (["A", "(b)", "D. z", "y", " Y. "], "wxyz", True),
        (["7", "3cm", "C"], ["2 cm", "3 cm", "7 cm"], True),
        (["x", "2"], ["x", "x", "2 cm"], False),
        (["anything"], [], True),
    ],
)
def test_a_gold_answer_names_an_option(answers, options, right):
    """Else no output would ever be right, not even the gold answer's own letter."""
    row = {"id": "1", "question": "?", "images": [], "options": list(options)}
    for answer in answers:
        with nullcontext() if right else pytest.raises(SystemExit, match="is none of the"):
            assert in_one_form(row | {"answer": answer}, False, "f:1")["answer"] == answer
        said = [extract_answer(letter, list(options))[0] for letter in "ABCD"]
        assert right == (not options or any(is_correct(x, row | {"answer": answer}) for x in said))


def test_a_number_of_many_digits_is_no_place_of_an_option():
    for digits in ("9" * 5000, "٣" * 5000):
        assert option_named(digits, {"A": "red", "B": "blue"}) is None
        assert not is_correct("A", {"answer": digits, "options": ["red", "blue"]})


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>"])
def test_no_setting_brings_a_token_into_every_prompt(token):
    data.check_prompt_texts(system="", instruction="\nThink <tool> | <|x|>.")
    with pytest.raises(SystemExit, match=r"instruction=.* contains the reserved token"):
        data.check_prompt_texts(system="", instruction=f"Go {token}")


def test_there_are_26_letters():
    row = {"id": "1", "question": "?", "images": [], "answer": "x1"}
    in_one_form(row | {"options": [f"x{i}" for i in range(26)]}, False, "f:1")
    with pytest.raises(SystemExit, match="26 letters"):
        in_one_form(row | {"options": [f"x{i}" for i in range(27)]}, False, "f:1")


def test_each_parser_text_is_stripped_alone():
    text = "a <latent></latent> <parser> x </parser> b <latent></latent> <parser>\n</parser> c"
    assert strip_parser(text) == "a <latent></latent> b <latent></latent> c"
