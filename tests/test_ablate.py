"""The statistics against scipy and slow counts; a table of runs that is killed, resumed and reported from its lines alone."""

import random

import pytest
from conftest import run
from scipy import stats

import ablate
from data import read_lines
from gap import is_solved


def test_paired_test_against_scipy():
    rng = random.Random(0)
    for n in (1, 7, 60, 1800):
        a, b = ([int(rng.random() < p) for _ in range(n)] for p in (0.7, 0.6))
        plus, minus = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
        want = stats.binomtest(plus, plus + minus).pvalue if plus + minus else 1.0
        assert ablate.mcnemar(a, b) == pytest.approx(want, rel=1e-9)
        assert ablate.mcnemar(b, a) == pytest.approx(want, rel=1e-9)
    assert ablate.mcnemar([1, 0, 1], [1, 0, 1]) == 1.0


def test_interval_against_scipy():
    rng = random.Random(0)
    for n in (2, 3, 5, 10):
        x = [rng.gauss(0.1, 0.05) for _ in range(n)]
        low, high = stats.t.interval(0.95, n - 1, loc=stats.tmean(x), scale=stats.sem(x))
        assert ablate.mean_interval(x) == pytest.approx((stats.tmean(x), low, high), abs=1e-4)
    assert ablate.mean_interval([0.3]) == (0.3, -float("inf"), float("inf"))


def test_guess_aware_is_an_eighth_on_the_toy():
    """A blind answer is right once in 72: the binomial tail calls a question solved exactly where accuracy > 1/8 does."""
    for correct in range(9):
        assert is_solved(correct, 8, 72, 0.0, "guess") == (
            stats.binom.sf(correct - 1, 8, 1 / 72) < 0.05
        )
        assert is_solved(correct, 8, 72, 0.0, "guess") == is_solved(correct, 8, 0, 0.125, "paper")


def test_every_row_and_claim_names_a_run():
    names = [name for group in ablate.RUNS for name in group]
    assert len(names) == len(set(names))
    for _, _, rows, reference, claims in ablate.SCORES:
        for what in (*rows, reference, *(x for claim in claims for x in claim[1:3])):
            name, _, kind = ablate.sized(what).partition("/")
            assert name in names and (kind or "clean") in ablate.evals_of(name)


def line(name, seed, right):
    """A line of results for questions of two categories, right a string of 0 and 1 a category."""
    packed = {c: [len(b), f"{int(b, 2):x}"] for c, b in right.items()}
    cost = {"tokens": 40.0, "latents": 4.0, "opened_latents": 1.0, "n_truncated": 0}
    return {
        "name": name,
        "seed": seed,
        "key": f"{name}{seed}",
        "settings": ablate.settings_for(name),
        "git": "0123456",
        "steps_per_s": 2.0,
        "ms_per_answer": 10.0,
        "probe": {},
        "evals": {"clean": {"right": packed} | cost},
    }


def test_differences_and_verdicts():
    gap, lh = {1: "1111", 2: "0111", 3: "1110"}, {1: "0000", 2: "0001", 4: "1111"}
    gap = {
        s: line("GAP", s, {"1 moves": "01", "2 moves": "0011", "3 moves": x})
        for s, x in gap.items()
    }
    lh = {
        s: line("LH+DA", s, {"1 moves": "11", "2 moves": "0001", "3 moves": x})
        for s, x in lh.items()
    }
    lines = {"GAP": gap, "LH+DA": lh}
    assert ablate.right(gap[2], "clean", "3 moves") == [0, 1, 1, 1]  # the leading zero is kept
    assert ablate.values(lines, "GAP") == {1: 6 / 8, 2: 5 / 8, 3: 5 / 8}
    assert (
        ablate.values(lines, "GAP", "easy") == {1: 0.5, 2: 0.5, 3: 0.5}
        and ablate.values(lines, "GAP/noise") == {}
    )
    mean, low, high, n = ablate.difference(lines, "GAP", "LH+DA")  # seeds 1 and 2: 5/8 and 3/8
    assert (mean, n) == (0.5, 2) and (low, high) == pytest.approx(
        stats.t.interval(0.95, 1, loc=0.5, scale=0.125), abs=1e-3
    )
    assert ablate.paired_p(lines, "GAP", "LH+DA") == pytest.approx(
        stats.binomtest(8, 8).pvalue
    )  # eight pairs differ, one way
    inf = float("inf")
    verdicts = {
        "yes": (0.2, 0.1, 0.3, 3),
        "no": (-0.2, -0.3, -0.1, 3),
        "not run yet": None,
        "undecided": (0.2, -inf, inf, 1),
    }
    assert all(ablate.verdict(d) == word for word, d in verdicts.items())
    claims = [
        ("x", "GAP", "LH+DA", "hard"),
        ("y", "GAP", "LH", "hard"),
        ("z", "GAP", "LH+DA", "easy"),
    ]
    said = ablate.sentences(lines, claims, True)
    assert (
        said[0]
        == "The toy agrees with the paper on 0 of 3 findings, disagrees on 1; 1 undecided, 1 not run yet."
    )
    assert (
        said[2].startswith("- x: **undecided**, +0.500 [")
        and said[3].startswith("- z: **no**")
        and len(said) == 4
    )


def test_table_grows_over_sittings(tmp_path, base, world):
    """Two runs; one more seed later; another setting beside them; a report from the lines alone; a name that is none."""
    args = [
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--test_data={world}/test.jsonl",
        f"--out={tmp_path}/out",
        f"--results={tmp_path}/r/toy",
        "--examples=32",
        "--train_args=--max_steps=1 --global_batch=4",
        "--eval_args=--max_new_tokens=8",
        "--probe_args=--limit=3 --max_new_tokens=8",
        "--sample_args=--n_samples=1",
    ]
    run("ablate.py", *args, "--only=base,text", "--seeds=1")
    lines = read_lines(tmp_path / "r" / "toy.jsonl")
    assert [(r["name"], r["seed"]) for r in lines] == [("base", 1), ("text", 1)]
    sizes = {c: n for c, (n, _) in lines[0]["evals"]["clean"]["right"].items()}
    assert sizes == {"1 moves": 5, "2 moves": 3, "3 moves": 2, "4 moves": 2}
    assert (
        lines[1]["settings"]["examples"] == 32
        and len((world / "train-32.jsonl").read_text().splitlines()) == 32
    )
    (work,) = (tmp_path / "out").iterdir()  # one base
    assert not [
        f for f in work.iterdir() if f.is_dir() and not f.name.startswith("pca-")
    ]  # no checkpoint stays
    (tmp_path / "r" / "toy.jsonl").open("a").write('{"name": "te')  # killed while it wrote
    text = run("ablate.py", *args, "--only=text", "--seeds=1,2")
    again = read_lines(tmp_path / "r" / "toy.jsonl")
    assert (
        again[:2] == lines
        and [(r["name"], r["seed"]) for r in again[2:]] == [("text", 2)]
        and "1/1" in text
    )
    table = (tmp_path / "r" / "toy.md").read_text()
    assert "3 runs" in table and "| text | 2 |" in table
    (tmp_path / "r" / "toy.md").unlink()
    run("ablate.py", "--report=1", *args, "--data=none", "--test_data=none")  # from the lines alone
    assert (tmp_path / "r" / "toy.md").read_text() == table
    assert "no such run 'gpa'" in run("ablate.py", *args, "--only=gpa", ok=False)
    assert "needs 99" in run("ablate.py", *args, "--only=GAP", "--examples=99", ok=False)
