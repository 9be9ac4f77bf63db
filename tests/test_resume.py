"""What becomes of each item of a long run: one process at a time writes it down."""

import fcntl
import json

import pytest

from duplicates import fingerprints
from resume import run_stage


def test_a_stage_has_one_writer(tmp_path):
    """The lines of two would be mixed, and all asked for twice; stages of other names may run."""
    settings = dict(settings={}, folder=tmp_path, workers=1, give_up=3, rejects="rejects.jsonl")

    def stage(name):
        return run_stage(name, [{"id": "a"}], dict, contents=lambda row: [], **settings)

    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / ".first.jsonl.lock", "w") as others:
        fcntl.flock(others, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process is writing here"):
            stage("first")
    assert not (tmp_path / "first.jsonl").exists()
    assert stage("second") == stage("second") == [{"id": "a"}]


def test_a_line_of_another_kind_is_named(tmp_path):
    """Of what earlier runs have finished; none is left out without a word."""
    settings = dict(settings={}, folder=tmp_path, workers=1, give_up=3, rejects="rejects.jsonl")

    def stage():
        return run_stage("first", [{"id": "a"}], dict, contents=lambda row: [], **settings)

    stage()
    path = tmp_path / "work" / "first.jsonl"
    (line,) = map(json.loads, path.read_text().splitlines())
    for bad, field in (({}, "key"), ({"key": 7}, "key"), ({"key": line["key"]}, "reject")):
        path.write_text(json.dumps(bad) + "\n")
        with pytest.raises(SystemExit, match=f"first.jsonl.*'{field}'"):
            stage()
    for bad in ({}, {"key": "a", "print": 5}):
        (tmp_path / "work" / "fingerprints.jsonl").write_text(json.dumps(bad) + "\n")
        with pytest.raises(SystemExit, match="fingerprints.jsonl:1"):
            fingerprints([], 0, "x", tmp_path, 1, None)
