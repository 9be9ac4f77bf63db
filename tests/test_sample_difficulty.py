"""What can the base solve already? The rules, and counts that no kill or early stop changes."""

import json
import shutil

from conftest import TOY, kill_when, run, sampling

from data import read_lines, write_lines
from sample_difficulty import needs_latents


def test_early_stop_ranks_and_kills_change_no_assignment(tmp_path, world):
    """Full counting, early stop, 2 ranks and a killed run agree on every question and tau."""
    run("sample_difficulty.py", *sampling(TOY, world, tmp_path / "full", early_stop=0))
    full = read_lines(tmp_path / "full")
    assert len({r["correct"] for r in full}) > 2 and any(r["correct"] == 0 for r in full)
    assert not any(r["lower_bound"] for r in full) and all(len(r["answers"]) == 8 for r in full)
    for tau in (0.0, 0.125):
        out = tmp_path / f"early-{tau}"
        run("sample_difficulty.py", *sampling(TOY, world, out, early_stop=1, tau=tau, batch=7))
        early = read_lines(out)
        for e, f in zip(early, full, strict=True):
            assert needs_latents(e, tau, "paper") == needs_latents(f, tau, "paper")
            assert e["correct"] <= f["correct"]
            assert e["lower_bound"] or e["correct"] == f["correct"]
    assert any(r["lower_bound"] for r in early)

    args = sampling(TOY, world, tmp_path / "ranks", early_stop=0)
    text = run("sample_difficulty.py", *args, ranks=2)
    assert read_lines(tmp_path / "ranks") == full and not list(tmp_path.glob("ranks.rank*"))
    share = sum(needs_latents(r, 0.0, "paper") for r in full) / len(full)
    assert f"({share:.1%})" in text

    # a kill in the middle, with a half-written last line
    out, part = tmp_path / "killed", tmp_path / "killed.rank000"
    args = sampling(TOY, world, out, early_stop=0, batch=2)
    kill_when(["sample_difficulty.py", *args], part, 6)
    done = len(read_lines(part))
    assert 0 < done < 48
    with open(part, "a") as f:
        f.write('{"id": "train-')
    text = run("sample_difficulty.py", *sampling(TOY, world, out, early_stop=0))
    assert read_lines(out) == full
    assert f"{48 - done}/{48 - done}" in text  # nothing done twice


def test_sampling_refuses_other_settings(tmp_path, base, world):
    out = tmp_path / "difficulty.jsonl"
    run("sample_difficulty.py", *sampling(base, world, out))
    text = run("sample_difficulty.py", *sampling(base, world, out, n_samples=4), ok=False)
    assert "difficulty.jsonl:1" in text and "other settings" in text


def test_only_new_and_changed_questions_are_asked_again(tmp_path, world):
    """And a base that was copied and touched is the same base."""
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    shutil.copytree(TOY, tmp_path / "base")
    rows = [json.loads(line) for line in (copy / "train.jsonl").read_text().splitlines()]
    write_lines(copy / "train.jsonl", rows[:6])
    out = tmp_path / "d.jsonl"
    run("sample_difficulty.py", *sampling(TOY, copy, out, n_samples=2))
    before = {line["id"]: line for line in read_lines(out)}

    rows[1]["answer"] = "another answer"
    shutil.copy(copy / "train/0.png", copy / "train/2.png")  # redrawn under the old name
    write_lines(copy / "train.jsonl", [rows[6], *rows[:6]])
    text = run("sample_difficulty.py", *sampling(tmp_path / "base", copy, out, n_samples=2))
    after = {line["id"]: line for line in read_lines(out)}
    assert "3/3" in text  # the new one, the changed answer, the changed picture
    assert [*after] == ["train-6"] + [f"train-{i}" for i in range(6)]
    assert {i for i in before if after[i] != before[i]} == {"train-1", "train-2"}
