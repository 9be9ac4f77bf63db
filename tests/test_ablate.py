"""The settings of the runs; a table that is killed, resumed and reported from its lines alone."""

import json
import shlex

import pytest
from conftest import run
from scipy import stats

import ablate
import toy
import train
from files import read_lines
from gap import is_solved
from launch import override, settings_of


def test_guess_aware_is_an_eighth_on_the_toy():
    """A blind answer is right once in 72: the binomial tail then decides as tau = 1/8 does."""
    for correct in range(9):
        by_tail = stats.binom.sf(correct - 1, 8, 1 / 72) < 0.05
        assert is_solved(correct, 8, 72, 0.0, "guess") == by_tail
        assert is_solved(correct, 8, 72, 0.0, "guess") == is_solved(correct, 8, 0, 0.125, "paper")


def test_a_run_is_trained_with_what_it_is_named_for(tmp_path, monkeypatch):
    """Every setting of a run reaches the script that has it: K is fit_pca.py's or train.py's."""
    calls, file = [], tmp_path / "f.jsonl"
    file.touch()
    monkeypatch.setattr(
        ablate, "call", lambda script, extra, **given: calls.append((script, given))
    )
    monkeypatch.setattr(ablate, "read_lines", lambda path: [])
    monkeypatch.setattr(ablate, "val_data", str(file))
    for name in ablate.RUNS:
        monkeypatch.setattr(ablate, "study", name)
        for changes in [x for group in ablate.RUNS[name] for x in group.values() if x]:
            calls.clear()
            with pytest.raises(SystemExit, match="holds no steps"):
                ablate.trained(tmp_path / "work" / "run", changes, 1, file)
            given = {script: settings for script, settings in calls}
            of_train = settings_of(vars(train)).keys()
            assert given["train.py"].keys() <= of_train
            for setting, value in changes.items():
                if setting in ("examples", "layout"):
                    continue
                script = "fit_pca.py" if setting not in of_train else "train.py"
                if setting == "K" and "pca" in ablate.read_by(changes):
                    script = "fit_pca.py"
                assert given[script][setting] == value, (name, changes, setting)


def test_untrained_base_counts_for_every_seed(tmp_path, monkeypatch):
    """Also where it was run twice, under the first seed of two calls."""
    monkeypatch.setattr(ablate, "results", str(tmp_path / "r"))
    made = [("base", 1), ("base", 4), ("GAP", 4), ("GAP", 1), ("GAP", 5)]
    lines = [{"name": n, "seed": s, "settings": ablate.settings_for(n)} for n, s in made]
    lines.append({"name": "GAP", "seed": 6, "settings": {}})  # of other settings
    lines.append({"name": "no such run", "seed": 7, "settings": {}})
    lines = [line | {"world": "this", "key": line["name"], "evals": {}} for line in lines]
    lines.insert(0, lines[2] | {"seed": 8, "world": "of another base"})
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = ablate.read_results()
    assert {name: list(by_seed) for name, by_seed in found.items()} == {
        "base": [1, 4, 5],
        "GAP": [1, 4, 5],
    }
    assert all(line == lines[1] for line in found["base"].values())


@pytest.mark.parametrize("n_files", [0, 1, 2])
def test_a_run_that_opened_no_span_has_nothing_to_shuffle(tmp_path, monkeypatch, n_files):
    """With one answer's latents a question might be fed its own; and the study goes on."""
    latents = tmp_path / "clean" / "latents"
    latents.mkdir(parents=True)
    for n in range(n_files):
        (latents / f"{n}.safetensors").touch()
    monkeypatch.setattr(ablate, "evaluated", lambda folder, kind, model: folder / kind)
    monkeypatch.setattr(ablate, "read_answers", lambda folder, rows: folder.name)
    monkeypatch.setattr(ablate, "probed", lambda folder, model: {})
    settings = {"run": None, "evals": ["clean", "shuffle", "noise"]}
    found = ablate.one_run(tmp_path, settings, 1, "", [])["evals"]
    assert list(found) == ["clean", *["shuffle"] * (n_files == 2), "noise"]


def test_questions_that_failed_are_no_wrong_answers(tmp_path):
    (tmp_path / "scored.jsonl").write_text('{"id": "1", "correct": false}\n')
    (tmp_path / "metrics.json").write_text('{"scores": {"overall": {"n_error": 1}}}')
    with pytest.raises(SystemExit, match="1 questions failed; mend that"):
        ablate.read_answers(tmp_path, [{"id": "1"}])


def test_counts_of_the_base_are_asked_for_whenever_a_run_is_due(tmp_path, monkeypatch):
    """sample_difficulty.py keeps what is counted and refuses other sample_args; none of it here."""
    calls = []
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    changes = {"base": str(tmp_path), "results": str(tmp_path / "r"), "out": str(tmp_path / "o")}
    changes |= {"data": str(tmp_path / "train.jsonl"), "test_data": str(tmp_path / "test.jsonl")}
    for name, value in changes.items():
        monkeypatch.setattr(ablate, name, value)
    monkeypatch.setattr(ablate, "load_examples", lambda path, training: [])
    monkeypatch.setattr(ablate, "call", lambda script, extra, **given: calls.append(script))
    todo = []
    monkeypatch.setattr(ablate, "jobs", lambda *args: todo)
    ablate.run_all()
    assert calls == []
    monkeypatch.setattr(ablate, "lock", lambda path: False)  # another process is at it
    for method in ("text", "valr", "amvl"):  # which read no counts
        todo[:] = [ablate.Job(method, 1, "", {"run": {"method": method}}, "k")]
        ablate.run_all()
    assert calls == []
    todo.append(ablate.Job("GAP", 1, "", {}, "k"))
    (tmp_path / "o" / ablate.key_of({})).mkdir(parents=True)
    (tmp_path / "o" / ablate.key_of({}) / "difficulty.jsonl").touch()
    ablate.run_all()
    assert calls == ["sample_difficulty.py"]


def sitting(monkeypatch, *args):
    """A call of ablate.py with these settings, whose scripts have their imports already."""
    with monkeypatch.context() as patch:
        for name in settings_of(vars(ablate)):
            patch.setattr(ablate, name, getattr(ablate, name))  # as written again afterwards
        patch.setattr(ablate, "call", warm_call)
        override(vars(ablate), args)
        ablate.main()


def warm_call(script, extra, **settings):
    given = [f"--{name}={value}" for name, value in settings.items()]
    run(script, *shlex.split(extra), *given)


def test_a_script_that_fails_ends_a_call_with_what_it_said():
    with pytest.raises(SystemExit, match="plot.py --runs=none failed:(.|\n)*none/log.jsonl"):
        ablate.call("plot.py", "", runs="none")


def test_table_grows_over_sittings(tmp_path, base, world, monkeypatch, capsys):
    """A run; one more seed later; a report from the lines alone; a name that is none."""
    args = [
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--test_data={world}/test.jsonl",
        f"--edit_data={tmp_path}/pairs/edits.jsonl",
        f"--out={tmp_path}/out",
        f"--results={tmp_path}/r/toy",
        "--examples=32",
        "--train_args=--max_steps=1 --global_batch=4",
        "--eval_args=--max_new_tokens=8 --limit=10",  # of questions, not of pairs
        "--probe_args=--limit=3 --max_new_tokens=8",
        "--sample_args=--n_samples=1",
    ]
    run("toy.py", "edits", f"--data_folder={tmp_path}/pairs", "--n_edits=2")
    results, tables = tmp_path / "r" / "toy.jsonl", tmp_path / "r" / "toy.md"
    sitting(monkeypatch, *args, "--only=text", "--seeds=1")
    lines = read_lines(results)
    assert [(r["name"], r["seed"]) for r in lines] == [("text", 1)]
    sizes = {c: n for c, (n, _) in lines[0]["evals"]["clean"]["right"].items()}
    assert sizes == {"1 moves": 4, "2 moves": 2, "3 moves": 2, "4 moves": 2}
    assert lines[0]["settings"]["examples"] == 32
    edits = lines[0]["edits"]
    assert {kind: x["pairs"] for kind, x in edits.items()} == dict.fromkeys(toy.EDITS, 2)
    assert len((world / "train-32.jsonl").read_text().splitlines()) == 32
    (work,) = (tmp_path / "out").iterdir()  # one base
    folders = [f.name for f in work.iterdir() if f.is_dir()]
    assert not [name for name in folders if not name.startswith("pca-")]  # no checkpoint stays

    results.open("a").write('{"name": "te')  # killed while it wrote
    capsys.readouterr()
    sitting(monkeypatch, *args, "--only=text", "--seeds=1,2")
    text = capsys.readouterr().err
    again = read_lines(results)
    assert again[:1] == lines
    assert [(r["name"], r["seed"]) for r in again[1:]] == [("text", 2)]
    assert "1/1" in text
    table = tables.read_text()
    assert "2 runs" in table and "| text | 2 |" in table

    tables.unlink()
    run("ablate.py", "--report=1", *args, "--data=none", "--test_data=none")  # from the lines alone
    assert tables.read_text() == table
    assert "no such run 'gpa'" in run("ablate.py", *args, "--only=gpa", ok=False)
    text = run("ablate.py", *args, f"--edit_data={tmp_path}/none.jsonl", ok=False)
    assert "none.jsonl: no such file" in text
    assert "needs 99" in run("ablate.py", *args, "--only=GAP", "--examples=99", ok=False)
    assert "makes no sense" in run("ablate.py", *args, "--examples=-1", ok=False)
    text = run("ablate.py", *args, "--study=gap", "--interventions_at=2000", ok=False)
    assert "interventions_at=2000 is none of 0, 500, 1000" in text
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    (world / "list.json").write_text(json.dumps(rows))
    assert "a JSON list" in run("ablate.py", *args, f"--data={world}/list.json", ok=False)


@pytest.mark.parametrize("study, results", [("main", "toy"), ("gap", "gap"), ("fresh", "fresh")])
def test_a_study_has_tables_of_its_own(monkeypatch, study, results):
    """By whatever name its file is given."""
    for given, wanted in (("", f"results/{results}"), ("out/x.jsonl", "out/x"), ("out/x", "out/x")):
        monkeypatch.setattr(ablate, "study", study)
        monkeypatch.setattr(ablate, "results", given)
        monkeypatch.setattr(ablate, "report", True)
        monkeypatch.setattr(ablate, "write_report", lambda: None)
        ablate.main()
        assert ablate.results == wanted


def test_a_run_without_validation_data_has_none(tmp_path, monkeypatch):
    calls, file = {}, tmp_path / "f.jsonl"
    file.touch()
    monkeypatch.setattr(ablate, "call", lambda script, _, **given: calls.update({script: given}))
    monkeypatch.setattr(ablate, "read_lines", lambda path: [])
    monkeypatch.setattr(ablate, "val_data", "")
    with pytest.raises(SystemExit, match="holds no steps"):
        ablate.trained(tmp_path / "work" / "run", {"layout": "named"}, 1, file)
    assert calls["train.py"]["val_data"] == calls["fit_pca.py"]["val_data"] == ""


def test_a_study_of_another_paper(tmp_path, base, world, monkeypatch):
    """No targets and no difficulty are made for it; its table shows what its method logs."""
    sitting(
        monkeypatch,
        "--study=amvl",
        "--only=base,+ forward",
        "--seeds=1",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--test_data={world}/test.jsonl",
        f"--out={tmp_path}/out",
        f"--results={tmp_path}/amvl",
        "--examples=0",
        "--train_args=--max_steps=1 --global_batch=4",
        "--eval_args=--max_new_tokens=8",
        "--probe_args=--limit=3 --max_new_tokens=8",
    )
    untrained, forward = read_lines(tmp_path / "amvl.jsonl")
    assert untrained["settings"]["run"] is None and forward["settings"]["run"]["gamma"] == 0
    gap = forward["val_right_posterior"] - forward["val_right_prior"]
    assert abs(forward["val_leakage"] - gap) < 1e-6
    table = (tmp_path / "amvl.md").read_text()
    assert "# AMVL\n" in table and "| + forward | 1 |" in table and "KL(q, p)" in table
    assert not list((tmp_path / "out").glob("*/pca-*"))
