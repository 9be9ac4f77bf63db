"""What can the base solve already? The rules, and counts that no kill or early stop changes."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from conftest import TOY, has_lines, kill_when, run, sampling

import sample_difficulty
from data import load_examples, question_key
from files import read_lines, write_lines
from gap import needs_latents
from model import encode


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
    text = run("sample_difficulty.py", *args, ranks=2, torchrun=True)
    assert read_lines(tmp_path / "ranks") == full and not list(tmp_path.glob("ranks.rank*"))
    share = sum(needs_latents(r, 0.0, "paper") for r in full) / len(full)
    assert f"({share:.1%})" in text

    # a kill in the middle, with a half-written last line
    out, part = tmp_path / "killed", tmp_path / "killed.rank000"
    args = sampling(TOY, world, out, early_stop=0, batch=2)
    kill_when(lambda: has_lines(part, 6), "sample_difficulty.py", *args)
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

    # as a kill leaves it: the lines still in the rank's own file, which is appended to
    out.rename(f"{out}.rank000")
    rows[1]["answer"] = "another answer"
    shutil.copy(copy / "train/0.png", copy / "train/2.png")  # redrawn under the old name
    write_lines(copy / "train.jsonl", [rows[6], *rows[:6]])
    text = run("sample_difficulty.py", *sampling(tmp_path / "base", copy, out, n_samples=2))
    after = {line["id"]: line for line in read_lines(out)}
    assert "3/3" in text  # the new one, the changed answer, the changed picture
    assert [*after] == ["train-6"] + [f"train-{i}" for i in range(6)]
    assert {i for i in before if after[i] != before[i]} == {"train-1", "train-2"}


@pytest.fixture
def sampled(tmp_path, monkeypatch, world):
    """(rows, a way to write lines of them to a file, the output's path)."""
    out = tmp_path / "d.jsonl"
    monkeypatch.setattr(sample_difficulty, "out", str(out))
    rows = list(load_examples(world / "train.jsonl")[:4])

    def write(name, *lines):
        found = []
        for row, change in lines:
            line = {"id": row["id"], "key": "k", "base": "b", "row": question_key(row), "n": 8}
            line |= {"correct": 0, "n_options": 0, "lower_bound": False}
            found.append(line | change)
        write_lines(tmp_path / name, found)

    return rows, write


def test_counts_of_all_files_are_found(sampled):
    rows, write = sampled
    assert sample_difficulty.counted(rows, "k") == {}
    write("d.jsonl", (rows[0], {}), (rows[1], {"correct": 3}))
    write("d.jsonl.rank000", (rows[2], {}))
    write("d.jsonl.rank001", (rows[3], {}))
    found = sample_difficulty.counted(rows, "k")
    assert sorted(found) == sorted(row["id"] for row in rows)
    assert found[rows[1]["id"]]["correct"] == 3
    # rows that are gone are forgotten
    assert list(sample_difficulty.counted(rows[1:2], "k")) == [rows[1]["id"]]


def test_ranks_files_are_those_of_the_output_alone(tmp_path, monkeypatch):
    """Whatever its name; another output may be called like a rank's file."""
    for name in ("d.jsonl", "d[a]*.jsonl"):
        monkeypatch.setattr(sample_difficulty, "out", str(tmp_path / name))
        mine = [tmp_path / f"{name}.rank{rank:03}" for rank in (0, 1)]
        for path in [*mine, tmp_path / f"{name}.ranked"]:
            path.touch()
        assert sample_difficulty.part_files() == mine


def test_counts_of_other_questions_are_kept(sampled, monkeypatch, capsys):
    """A subset of the data takes no finished work away, from either file."""
    rows, write = sampled
    monkeypatch.setattr(sample_difficulty, "run_key", lambda: "k")
    write("d.jsonl", (rows[0], {}), (rows[1], {"correct": 3}))
    write("d.jsonl.rank000", (rows[2], {}), (rows[3], {"correct": 8}))
    assert [line["id"] for line in sample_difficulty.merge(rows[2:3])] == [rows[2]["id"]]
    assert not sample_difficulty.part_files()
    assert [line["correct"] for line in sample_difficulty.merge(rows)] == [0, 3, 0, 8]


def test_a_picture_that_is_replaced_meanwhile(sampled, monkeypatch, tmp_path):
    """What was drawn belongs to what was there before it was opened."""
    rows, write = sampled
    row = dict(rows[0])
    monkeypatch.setattr(sample_difficulty, "run_key", lambda: "k")
    row["images"] = [shutil.copy(row["images"][0], tmp_path / "a.png")]
    tally = sample_difficulty.Tally(row)
    shutil.copy(rows[1]["images"][0], tmp_path / "a.png")
    assert tally.line("k")["row"] == question_key(rows[0]) != question_key(row)
    write("d.jsonl.rank000", (rows[0], {"row": question_key(row)}), (rows[1], {}))
    with pytest.raises(SystemExit, match="1 questions, .* changed while they were sampled"):
        sample_difficulty.merge(rows[:2])


def test_a_rule_is_told_only_what_decides_it(monkeypatch, capsys):
    """Stopped at one right answer of eight: guessing among four options may have given it."""
    line = {"correct": 1, "n": 8, "n_options": 4, "lower_bound": True}
    monkeypatch.setattr(sample_difficulty, "rule", "paper")
    sample_difficulty.report([line] * 3 + [line | {"correct": 0, "lower_bound": False}])
    said = capsys.readouterr().out
    assert re.search(r"paper rule +1 \(25.0%\)  <- used\n", said)
    assert re.search(r"guess-aware rule +4 \(100.0%\)  at most: 3 were stopped too early", said)


def test_samples_that_all_agree_are_told(capsys):
    """A server that takes top_k=1 from the model's folder draws one answer eight times."""
    one = {"answers": ["A"] * 8}
    sample_difficulty.check_drawn([one] * 30 + [{"answers": ["A"]}])
    assert "all samples of each of 30 questions agree" in capsys.readouterr().out
    sample_difficulty.check_drawn([one] * 30 + [{"answers": ["A", "B"]}])
    sample_difficulty.check_drawn([one] * 5)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("field", ["question", "answer", "options", "system", "images"])
def test_only_a_changed_row_is_new(sampled, field):
    rows, write = sampled
    write("d.jsonl", *[(row, {}) for row in rows])
    rows[1][field] = {"options": ["x"], "images": rows[2]["images"]}.get(field, "another")
    found = sample_difficulty.counted(rows, "k")
    assert sorted(found) == sorted(row["id"] for row in rows if row is not rows[1])
    write("d.jsonl.rank000", (rows[1], {"correct": 8}))  # asked again: the new line counts
    assert sample_difficulty.counted(rows, "k")[rows[1]["id"]]["correct"] == 8


def test_counts_of_another_data_file_are_not_lost(sampled):
    """Whose questions have the same ids, as those of train and val often do."""
    rows, write = sampled
    write("d.jsonl", *[(row, {"row": "another"}) for row in rows])
    with pytest.raises(SystemExit, match="counts of 4 other questions by the ids of"):
        sample_difficulty.counted(rows, "k")


@pytest.mark.parametrize("file", ["d.jsonl", "d.jsonl.rank000"])
def test_counts_of_other_settings_are_named(sampled, file):
    rows, write = sampled
    write(file, (rows[0], {}), (rows[1], {"key": "another"}))
    with pytest.raises(SystemExit, match=f"{file}:2: sampled with other settings"):
        sample_difficulty.counted(rows, "k")


CHANGED = {"instruction": "x", "n_samples": 4, "temperature": 0.5, "top_p": 0.9, "seed": 1}
CHANGED |= {"max_new_tokens": 25, "min_pixels": 4000, "max_pixels": 5000, "dtype": "bfloat16"}
CHANGED |= {"early_stop": False, "tau": 0.5, "rule": "guess"}


def test_the_key_is_of_what_changes_a_count(tmp_path, monkeypatch):
    """Every setting of the sampling and the weights; not the batch, and not the folder's name."""
    monkeypatch.setattr(sample_difficulty, "base", str(TOY))
    key = sample_difficulty.run_key()
    seen = {key}
    for name, value in CHANGED.items():
        with monkeypatch.context() as m:
            m.setattr(sample_difficulty, name, value)
            seen.add(sample_difficulty.run_key())
    assert len(seen) == len(CHANGED) + 1
    shutil.copytree(TOY, tmp_path / "copy")
    monkeypatch.setattr(sample_difficulty, "base", str(tmp_path / "copy"))
    monkeypatch.setattr(sample_difficulty, "batch", 3)
    assert sample_difficulty.run_key() == key
    monkeypatch.setattr(sample_difficulty, "early_stop", False)  # a full count fits every tau
    full = sample_difficulty.run_key()
    monkeypatch.setattr(sample_difficulty, "tau", 0.5)
    assert sample_difficulty.run_key() == full


def test_samples_are_drawn_as_the_settings_say(monkeypatch, loaded, world):
    """The instruction ends the prompt, and top_p goes to the draws."""
    asked, given = [], {}

    def stream(*args, **settings):
        given.update(settings)
        args[3](2)  # more(n) of generate.stream
        return iter(())

    def recorded(vlm, tokenizer, processor, row):
        asked.append(row["instruction"])
        return encode(vlm, tokenizer, processor, row)

    for name, value in {"instruction": " Tag it.", "top_p": 0.5}.items():
        monkeypatch.setattr(sample_difficulty, name, value)
    monkeypatch.setattr(sample_difficulty, "stream", stream)
    monkeypatch.setattr(sample_difficulty, "encode", recorded)
    list(sample_difficulty.sample(load_examples(world / "train.jsonl")[:2], *loaded))
    assert set(asked) == {" Tag it."} and given["top_p"] == 0.5


def test_what_was_cut_off_solves_nothing_by_a_weak_rule():
    row = {"id": "a", "images": [], "answer": "A", "options": ["red", "blue"]}
    for finished, correct in ((True, 1), (False, 0)):
        tally = sample_difficulty.Tally(row)
        tally.add(0, "Looking closely, A seems", finished)
        assert tally.correct == correct


def test_each_sample_has_a_seed_of_its_own(monkeypatch, loaded, world):
    """And is finished only where its last token stops it."""
    seeds, ended = [], []

    def stream(*args, **settings):
        seeds.extend(s for p in args[3](2) for s in p["seeds"])
        settings["on_finish"](0, 0, [5, 6])
        settings["on_finish"](1, 0, [5, args[2].eos_token_id])
        return iter(())

    def add(self, s, text, finished):
        ended.append(finished)

    monkeypatch.setattr(sample_difficulty.Tally, "add", add)
    monkeypatch.setattr(sample_difficulty, "stream", stream)
    list(sample_difficulty.sample(load_examples(world / "train.jsonl")[:2], *loaded))
    assert len(set(seeds)) == len(seeds) == 16 and ended == [False, True]


def test_each_wave_asks_with_a_seed_of_its_own(monkeypatch, world):
    seeds = []

    def draw(server, messages, n, seed):
        seeds.append(seed)
        return [SimpleNamespace(text="no", finished=True)] * n

    monkeypatch.setattr(sample_difficulty, "draw_answers", draw)
    monkeypatch.setattr(sample_difficulty, "served_messages", lambda row, processor: [])
    for row in load_examples(world / "train.jsonl")[:2]:
        sample_difficulty.ask_server(None, None, row)
    assert len(set(seeds)) == len(seeds) == 4
