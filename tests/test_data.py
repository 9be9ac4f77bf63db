"""Bad input ends in one sentence; a script starts and stops as its user expects."""

import json
import os
import shutil

import pytest
import torch
from conftest import broken
from safetensors.torch import save_file

from data import load_examples, question_key, question_text, read_lines, weights_digest, write_json

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
    ({"options": [1, 2.5, "x"]}, {"options": ["1", "2.5", "x"]}),
    ({"options": ["A. red", "B. blue"]}, {"options": ["red", "blue"]}),
    ({"options": ["(a) red", "(b) blue"]}, {"options": ["red", "blue"]}),
    ({"options": ["A. red", "blue"]}, {"options": ["A. red", "blue"]}),
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


# --- files that we wrote, and what belongs to what


@pytest.mark.parametrize(
    "line, words",
    [
        ("7", "JSON object"),
        ("[1]", "JSON object"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"n": 8}', "'id' must be str, found nothing"),
        ('{"id": ["a"], "n": 8}', "'id'"),
        ('{"id": "a", "n": "8"}', "'n' must be int"),
        ('{"id": "a", "n": true}', "'n' must be int"),
        ('{"id": "a", "n": 8, "x": NaN}', "'x'"),
    ],
)
def test_state_of_another_kind_is_named(tmp_path, line, words):
    path = tmp_path / "state.jsonl"
    path.write_text('{"id": "b", "n": 1, "x": 0.5}\n' + line + '\n{"id": "half')
    with pytest.raises(SystemExit) as e:
        read_lines(path, id=str, n=int, x=(float, int))
    assert f"{path}:2" in str(e.value) and words in str(e.value)
    path.write_text('{"id": "b", "n": 1, "x": 0.5}\n{"id": "half')
    assert read_lines(path, id=str, n=int, x=(float, int)) == [{"id": "b", "n": 1, "x": 0.5}]


def test_no_nan_is_written(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())  # and no temporary file is left


def test_identity_is_content(tmp_path):
    """Copies, moves, touches and the order of a header change nothing; other bytes do."""
    a, b = torch.arange(6.0), torch.ones(2, 3)
    for name, tensors, meta in (
        ("one", {"a": a, "b": b}, {"x": "1", "y": "2"}),
        ("two", {"b": b, "a": a}, {"y": "2", "x": "1"}),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", meta)
    one = weights_digest(tmp_path / "one")
    assert weights_digest(tmp_path / "two") == one
    os.utime(tmp_path / "one" / "model.safetensors", (1e9, 1e9))
    assert weights_digest(tmp_path / "one") == one
    shutil.move(tmp_path / "one", tmp_path / "moved")
    assert weights_digest(tmp_path / "moved") == one
    save_file({"a": a, "b": b + 1}, tmp_path / "two" / "model.safetensors", {"x": "1", "y": "2"})
    assert weights_digest(tmp_path / "two") != one

    (tmp_path / "p.png").write_bytes(b"1")
    (tmp_path / "q.png").write_bytes(b"1")
    row = {"question": "Q", "answer": "A", "images": [tmp_path / "p.png"]}
    key = question_key(row)
    assert question_key(row | {"images": [tmp_path / "q.png"]}) == key
    (tmp_path / "q.png").write_bytes(b"2")
    assert question_key(row | {"images": [tmp_path / "q.png"]}) != key
    for change in ({"question": "R"}, {"answer": "B"}, {"options": ["A"]}):
        assert question_key(row | change) != key
