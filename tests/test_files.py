"""Files on a disk: whole or not there, read by their fields, known by their contents."""

import errno
import math
import os
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

import files
from data import question_key
from files import (
    append,
    check_fields,
    folder_digest,
    memory,
    memory_file,
    open_append,
    read_json,
    read_lines,
    read_safetensors,
    remembered,
    seed_of,
    tensors_digest,
    write_json,
    write_lines,
    write_then_rename,
)


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
    one = folder_digest(tmp_path / "one")
    assert folder_digest(tmp_path / "two") == one
    os.utime(tmp_path / "one" / "model.safetensors", (1e9, 1e9))
    assert folder_digest(tmp_path / "one") == one
    shutil.move(tmp_path / "one", tmp_path / "moved")
    assert folder_digest(tmp_path / "moved") == one
    save_file({"a": a, "b": b + 1}, tmp_path / "two" / "model.safetensors", {"x": "1", "y": "2"})
    assert folder_digest(tmp_path / "two") != one

    (tmp_path / "p.png").write_bytes(b"1")
    (tmp_path / "q.png").write_bytes(b"1")
    row = {"question": "Q", "answer": "A", "images": [tmp_path / "p.png"]}
    key = question_key(row)
    assert question_key(row | {"images": [tmp_path / "q.png"]}) == key
    (tmp_path / "q.png").write_bytes(b"2")
    assert question_key(row | {"images": [tmp_path / "q.png"]}) != key
    for change in ({"question": "R"}, {"answer": "B"}, {"options": ["A"]}):
        assert question_key(row | change) != key


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (str, ["", "7", "é"], [7, None, ["7"], True, {}]),
        (int, [0, -3, 2**70], [0.0, "0", True, None, [0]]),
        (float, [0.5, -1e300], [math.nan, math.inf, -math.inf, "0.5", 1, None]),
        ((int, float), [3, 0.5], [math.nan, True, "3"]),
        (bool, [True, False], [0, 1, "true", None]),
        (list, [[], [1]], [{}, "[]", None]),
        (dict, [{}, {"a": 1}], [[], "{}", None]),
    ],
)
def test_a_field_is_of_its_type(kind, good, bad):
    for value in good:
        check_fields({"x": value}, {"x": kind}, "f:1")
    for row in [{"x": value} for value in bad] + [{}]:
        with pytest.raises(SystemExit, match="f:1: field 'x' must be"):
            check_fields(row, {"x": kind}, "f:1")


@pytest.mark.parametrize(
    "text", ["", "7", "[]", "{", "[" * 100_000, '{"K": "4"}', '{"J": 4}', "\xff"]
)
def test_a_json_file_of_another_kind_is_named(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(SystemExit, match="state.json"):
        read_json(path, K=int)


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": {"b": math.nan}}])
def test_json_stays_json(tmp_path, value):
    (tmp_path / "a.json").write_text("{}")
    for write in (write_json, lambda path, x: write_lines(path, [{"a": 1}, {"x": x}])):
        with pytest.raises(ValueError):
            write(tmp_path / "a.json", value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]  # as it was, and alone


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (half, "not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (
            lambda path: path.write_text("version https://git-lfs"),
            "not a readable safetensors file",
        ),
        (lambda path: path.unlink(), "a.safetensors: no such file"),
        (lambda path: save_file({"b": torch.ones(2)}, path, {"K": "4"}), "lacks ['a']"),
        (lambda path: save_file({"a": torch.ones(2)}, path), "lacks ['K']"),
        (
            lambda path: save_file({"a": torch.tensor([1, math.nan])}, path, {"K": "4"}),
            "not finite",
        ),
        (lambda path: save_file({"a": torch.tensor(-math.inf)}, path, {"K": "4"}), "not finite"),
    ],
)
def test_tensors_that_are_not_ours_are_named(tmp_path, spoil, words):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(6), "b": torch.tensor(True)}, path, {"K": "4"})
    assert read_safetensors(path, ["a"], ["K"])[1] == {"K": "4"}
    spoil(path)
    with pytest.raises(SystemExit) as e:
        read_safetensors(path, ["a"], ["K"])
    assert str(path) in str(e.value) and words in str(e.value)


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


@pytest.mark.parametrize(
    "tensors, meta",
    [
        (TENSORS | {"a": TENSORS["a"].view(3, 2)}, {"x": "1"}),
        (TENSORS | {"b": torch.ones(4, dtype=torch.int32)}, {"x": "1"}),
        (TENSORS | {"b": torch.tensor([1, 1, 1, 1.0000001])}, {"x": "1"}),
        ({"b": TENSORS["a"], "a": TENSORS["b"]}, {"x": "1"}),
        ({"a": TENSORS["a"]}, {"x": "1"}),
        (TENSORS | {"c": torch.zeros(0)}, {"x": "1"}),
        (TENSORS, {"x": "2"}),
        (TENSORS, None),
    ],
)
def test_other_tensors_have_another_digest(tmp_path, tensors, meta):
    save_file(TENSORS, tmp_path / "one", {"x": "1"})
    save_file(tensors, tmp_path / "two", meta)
    assert tensors_digest(tmp_path / "one") != tensors_digest(tmp_path / "two")


def test_a_file_is_read_once(tmp_path):
    """Until it changes, whatever its path's spelling; a torn memory costs nothing."""
    calls = []

    def size(path):
        calls.append(path)
        return len(path.read_bytes())

    path = tmp_path / "a b.bin"
    path.write_bytes(b"123")
    (tmp_path / "link").symlink_to(path)
    for name in ("a b.bin", "./a b.bin", "../" + tmp_path.name + "/a b.bin", "link"):
        assert remembered(tmp_path / name, "size", size) == 3
    assert len(calls) == 1
    with open(memory_file(), "ab") as f:
        f.write(b'["half a li\n\xff\n7\n[]\n[["a"], 1]\n')
    memory.cache_clear()  # as the next run finds it
    assert remembered(path, "size", size) == 3 and len(calls) == 1
    path.write_bytes(b"1234")
    assert remembered(path, "size", size) == 4
    path.write_bytes(b"5678")
    os.utime(path, ns=(0, 10**18))
    assert remembered(path, "size", size) == 4 and len(calls) == 3
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:  # which some systems count in milliseconds
        path.write_bytes(b"9876")  # of one size, and an archive may set the time
        os.utime(path, ns=(0, 10**18))
    assert remembered(path, "size", size) == 4 and len(calls) == 4


def test_threads_read_the_memory_once(tmp_path, monkeypatch):
    calls = []
    (tmp_path / "a").touch()

    def read():
        calls.append(1)
        time.sleep(0.05)
        return {}

    monkeypatch.setattr(files, "memory", cache(read))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: remembered(tmp_path / "a", "size", os.path.getsize), range(8)))
    assert len(calls) == 1


@pytest.mark.parametrize("last", ["", '{"id": "cu', '{"id": "' + "c" * 3_000_000])
def test_a_half_written_line_is_cut_off_however_long(tmp_path, last):
    path = tmp_path / "a.jsonl"
    for whole in ("", '{"id": "a"}\n', '{"id": "a"}\n' * 300_000):
        path.write_text(whole + last)
        with open_append(path) as f:
            append(f, {"id": "b"})
        assert path.read_text() == whole + '{"id": "b"}\n'


def test_all_files_are_as_readable_as_others(tmp_path):
    """safetensors makes its own for their owner alone."""
    (tmp_path / "usual").write_text("")
    write_then_rename(tmp_path / "a", lambda tmp: save_file({"v": torch.zeros(2)}, tmp))
    write_lines(tmp_path / "b", [{"id": "a"}])
    modes = {(tmp_path / name).stat().st_mode for name in ("usual", "a", "b")}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "merges.txt"])
def test_what_is_read_of_a_folder_makes_a_base(base, tmp_path, name):
    shutil.copytree(base, tmp_path / "base")
    before = folder_digest(tmp_path / "base")
    (tmp_path / "base" / "my-notes.json").write_text("{}")
    assert folder_digest(tmp_path / "base") == before
    with open(tmp_path / "base" / name, "a") as f:
        f.write(" ")
    assert folder_digest(tmp_path / "base") != before


def test_what_another_process_adds_is_not_cut_off(tmp_path, monkeypatch):
    """Though the last line was half-written when this one looked."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"')
    fstat = os.fstat

    def added_to(file):
        with open(path, "ab") as f:
            f.write(b": 2}\n")
        return fstat(file)

    monkeypatch.setattr(files.os, "fstat", added_to)
    open_append(path).close()
    monkeypatch.undo()
    assert [row["a"] for row in read_lines(path)] == [1, 2]
    path.write_bytes(b'{"a": 1}\n{"a"')
    open_append(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_full_disk_is_named():
    """By what fails, and not by a file that is closed afterwards."""
    with pytest.raises(OSError) as e, open_append("/dev/full") as f:
        append(f, {"a": 1})
    assert (e.value.filename, e.value.errno) == ("/dev/full", errno.ENOSPC)


def test_a_file_that_was_removed_is_not_written_on(tmp_path):
    path = tmp_path / "out" / "a.jsonl"
    with open_append(path) as f:
        append(f, {"a": 1})
        shutil.rmtree(path.parent)
        with pytest.raises(FileNotFoundError) as e:
            append(f, {"a": 2})
    assert e.value.filename == str(path)
    with open_append(path) as f:  # nor one that another has made anew since
        path.unlink()
        path.write_text("")
        with pytest.raises(FileNotFoundError):
            append(f, {"a": 3})


def test_half_of_a_line_is_taken_back(tmp_path):
    """Another thread may go on to write to the file where the disk has room again."""
    path = tmp_path / "a.jsonl"
    with open_append(path) as f:
        append(f, {"a": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (14, limits[1]))
            with pytest.raises(OSError, match="a.jsonl"):
                append(f, {"a": 2, "b": "longer"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        append(f, {"a": 3})
    assert [row["a"] for row in read_lines(path)] == [1, 3]


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    """safetensors writes under one more temporary name."""

    def write(tmp):
        save_file({"v": torch.zeros(2)}, tmp)
        (tmp.parent / ".tmpAbCdEf").touch()
        raise OSError(errno.ENOSPC, "full")

    (tmp_path / "a").write_text("before")
    with pytest.raises(OSError) as e:
        write_then_rename(tmp_path / "a", write)
    assert e.value.filename == str(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (
        tmp_path / "a"
    ).read_text() == "before"


def test_parts_of_a_seed_do_not_run_together():
    assert len({seed_of("a", 12), seed_of("a1", 2), seed_of("a", 1, 2)}) == 3
