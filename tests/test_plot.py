"""How did it train, and what does data buy? What is drawn is what the files say."""

import json
import math

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image
from scipy import stats

import plot
from files import write_lines
from plot import Number
from report import mean_interval


def write_log(folder, rows):
    folder.mkdir(parents=True)
    lines = [{"method": "gap"}, *rows]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows_of(n, **fields):
    return [{"step": i + 1} | {k: f(i) for k, f in fields.items()} for i in range(n)]


def test_a_log_is_read_by_field(tmp_path):
    rows = rows_of(7, ce=lambda i: 1.0 / (i + 1), r2=lambda i: i / 10)
    rows[3]["val_ce"] = 0.5
    del rows[5]["r2"]  # a batch without latents
    rows[6]["ce"] = None
    found = plot.read_log(write_log(tmp_path / "a", rows))
    assert found["ce"] == ([1, 2, 3, 4, 5, 6], [1 / i for i in range(1, 7)])
    assert found["val_ce"] == ([4], [0.5])
    assert found["r2"][0] == [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("n", [1, 2, 49, 50, 51, 777])
def test_windows_keep_the_mean(n):
    """A slow loop over what falls into each; nothing is left out."""
    x = list(np.random.default_rng(n).normal(size=n))
    steps, means = plot.windows(list(range(n)), x)
    size = math.ceil(n / 50)
    assert len(means) == math.ceil(n / size) <= 50
    for k, mean in enumerate(means):
        assert mean == pytest.approx(np.mean(x[k * size : (k + 1) * size]))
        assert steps[k] == pytest.approx(np.mean(range(n)[k * size : (k + 1) * size]))


def test_curves_of_runs_of_different_methods(tmp_path):
    """A log axis for what falls over decades; each run in its colour; a panel for each unit."""
    a = write_log(tmp_path / "a", rows_of(90, ce=lambda i: 10 ** (-i / 30), r2=lambda i: i / 90))
    kl = {"ce": lambda i: 2.0, "kl_forward": lambda i: 3.0, "val_ce": lambda i: 2.0}
    b = write_log(tmp_path / "b", rows_of(40, **kl))
    plot.draw_curves([a, b], tmp_path / "c.png")
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).reshape(-1, 3)
    for colour in plot.COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture - np.array(rgb)).sum(-1) < 10).sum() > 100
    assert plot.wants_log(plot.read_log(a)["ce"][1])
    assert not plot.wants_log(plot.read_log(a)["r2"][1]) and not plot.wants_log([1.0, 99.0])


@pytest.mark.parametrize("script", ["plot.py", "train.py"])
def test_without_matplotlib(tmp_path, stages, script):
    """A sentence; what is trained is written all the same."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none')")
    if script == "plot.py":
        args = [f"--runs={stages['gap']}"]
    else:
        args = ["--method=text", f"--base={stages['base']}", "--max_steps=1", "--val_data="]
        args += [f"--data={stages['world']}/train.jsonl", f"--out={tmp_path}/m", "--curves=1"]
    text = run(script, *args, ok=script == "train.py", env={"PYTHONPATH": str(tmp_path)})
    assert "no picture: matplotlib is not installed; pip install matplotlib" in text
    assert (tmp_path / "m" / "model.safetensors").exists() == (script == "train.py")


def test_a_notebooks_shell_names_a_backend_that_is_not_here(tmp_path):
    folder = write_log(tmp_path / "a", rows_of(3, ce=float))
    picture = tmp_path / "curves.png"
    backend = {"MPLBACKEND": "module://no_such_backend"}
    run("plot.py", f"--runs={folder}", f"--out={picture}", env=backend)
    assert Image.open(picture).size[0] > 0


def test_logs_that_can_not_be_drawn(tmp_path):
    for folder, said in (
        (tmp_path, "no such file; train.py writes it"),
        (write_log(tmp_path / "a", []), "no steps yet"),
        (write_log(tmp_path / "b", [{"loss": 1}]), "'step'"),
    ):
        with pytest.raises(SystemExit) as e:
            plot.read_log(folder)
        assert str(folder / "log.jsonl") in str(e.value) and said in str(e.value)
    diverged = write_log(tmp_path / "c", rows_of(3, ce=lambda i: math.nan, lr=lambda i: 0.1))
    with pytest.raises(SystemExit, match="no finite number to draw"):
        plot.draw_curves([diverged], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_the_main_figure_is_of_the_lines(tmp_path):
    """Counted bit by bit from results/gap.jsonl; intervals as scipy has them."""
    lines = [json.loads(line) for line in open(ROOT / "results" / "gap.jsonl")]
    found = plot.accuracies(lines)
    assert list(found) == plot.methods.split(",")
    for name, sizes in found.items():
        assert list(sizes) == [250, 500, 1000]
        for n, seeds in sizes.items():
            label = name if n == 250 else f"{name} n={n}"
            mine = []
            for line in lines:
                if line["name"] == label:
                    hard = line["evals"]["clean"]["right"]
                    bits = [int(digits, 16).bit_count() for c, (_, digits) in hard.items()]
                    mine.append((sum(bits) - int(hard["1 moves"][1], 16).bit_count()) / 600)
            assert sorted(seeds) == pytest.approx(sorted(mine)) and len(seeds) >= 3
            mean, low, high = mean_interval(seeds)
            if low != high:
                scale = stats.sem(seeds)
                want = stats.t.interval(0.95, len(seeds) - 1, loc=mean, scale=scale)
                assert (low, high) == pytest.approx(want, abs=1e-3)
    run("plot.py", f"--results={ROOT}/results/gap", f"--out={tmp_path}/toy.png")
    assert len(Image.open(tmp_path / "toy.png").convert("RGB").getcolors(1 << 20)) > 50


def test_steps_taken_again_replace_those_before(tmp_path):
    """As train.py goes on from a checkpoint: what came after it in the first sitting is gone."""
    rows = [{"step": n, "ce": ce} for n, ce in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 1.0))]
    folder = write_log(tmp_path / "a", rows)
    assert plot.read_log(folder) == {"ce": ([1, 2], [5.0, 1.0])}
    assert plot.read_log(folder / "log.jsonl") == plot.read_log(folder)


def test_numbers_that_are_not_finite_are_named(tmp_path, capsys):
    rows = rows_of(3, ce=lambda i: math.nan, r2=lambda i: i / 2)
    assert plot.read_log(write_log(tmp_path / "a", rows)) == {"r2": ([1, 2, 3], [0, 0.5, 1])}
    assert "ce is not a finite number at 3 steps, the first 1" in capsys.readouterr().out
    for row in rows:
        del row["r2"]
    with pytest.raises(SystemExit, match="no finite number to draw"):
        plot.read_log(write_log(tmp_path / "b", rows))


def test_names_are_moved_apart():
    moved = plot.moved_apart([0.9, 0.1, 0.95, 0.12], 0.1, 1)
    assert moved == pytest.approx([0.9, 0.1, 1.0, 0.2])


def test_the_main_studys_figures_are_of_the_lines(tmp_path):
    """The latest settings of a run, seed by seed; what lacks the number is no row of the figure."""
    lines = []
    for name, seed, bits, examples in (
        ("GAP", 2, "1100", 9),  # of earlier settings
        ("output", 3, "1111", 10),  # of another base
        ("GAP", 2, "0111", 10),
        ("GAP", 1, "0001", 10),
        ("output", 1, "1111", 10),
        ("output", 2, "1111", 10),
        ("GAP n=20", 1, "1111", 10),
        ("no such", 1, "1111", 10),
    ):
        right = {"1 moves": [2, "1"], "2 moves": [4, f"{int(bits, 2):x}"]}
        along = {"own": [0.9, 0.1 * seed], "forced": [0.9, 0.8]}
        if seed == 2:  # a run that wrote no second span
            along = {"own": [0.9], "forced": [0.9]}
        line = {"name": name, "seed": seed, "settings": {"examples": examples}}
        line["key"] = f"{name}, {examples}"
        line |= {"evals": {"clean": {"right": right}}}
        line["world"] = "old" if seed == 3 else "new"
        lines.append(line | {"probe": {"along": along} if name == "output" else {}})
    write_lines(tmp_path / "r.jsonl", lines)

    lines = plot.latest(plot.read_runs(tmp_path / "r.jsonl"))
    found = plot.by_run(lines, ("text", "output", "GAP"), Number("clean", "hard"))
    assert found == {"output": [1.0, 1.0], "GAP": [0.25, 0.75]}
    more = Number("clean", "hard", " n=20")
    assert plot.by_run(lines, ("output", "GAP"), more) == {"GAP": [1.0]}
    for figure in ("systems", "critics", "drift"):
        out = tmp_path / f"{figure}.png"
        run("plot.py", f"--results={tmp_path}/r", f"--figure={figure}", f"--out={out}")
        assert Image.open(out).width > 500
    with pytest.raises(SystemExit, match="no runs of text, output"):
        plot.FIGURES["edits"](tmp_path / "r.jsonl", tmp_path / "edits.png")
