"""What becomes of each item of a long run: one process at a time writes it down."""

import fcntl

import pytest

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
