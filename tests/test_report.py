"""The statistics against scipy; the verdicts of the tables on lines with known differences."""

import random

import pytest
from scipy import stats

import ablate
import report
from report import Difference, Study


def test_interval_against_scipy():
    rng = random.Random(0)
    for n in (2, 3, 5, 10):
        x = [rng.gauss(0.1, 0.05) for _ in range(n)]
        low, high = stats.t.interval(0.95, n - 1, loc=stats.tmean(x), scale=stats.sem(x))
        assert report.mean_interval(x) == pytest.approx((stats.tmean(x), low, high), abs=1e-4)
    assert report.mean_interval([0.3]) == (0.3, -float("inf"), float("inf"))


@pytest.mark.parametrize("name", ablate.RUNS)
def test_every_row_and_claim_names_a_run(monkeypatch, name):
    monkeypatch.setattr(ablate, "study", name)
    names = [name for group in ablate.RUNS[name] for name in group]
    assert len(names) == len(set(names))
    for table in report.TABLES[name]:
        compared = [what for claim in table.claims for what in claim[1:3]]
        for what in (*table.rows, table.reference, *compared):
            name, kind = report.run_and_evaluation(what.replace("*", ablate.star()))
            assert name in names and kind in ablate.evals_of(name)


def line(name, seed, right):
    """A line of results for questions of some categories; `right`: a string of bits for each."""
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


@pytest.fixture
def study():
    """GAP and LH+DA with seeds 1 and 2 in common, one easy and two hard categories."""
    gap = {1: "1111", 2: "0111", 3: "1110"}
    lh = {1: "0000", 2: "0001", 4: "1111"}
    lines = {
        "GAP": {
            s: line("GAP", s, {"1 moves": "01", "2 moves": "0011", "3 moves": x})
            for s, x in gap.items()
        },
        "LH+DA": {
            s: line("LH+DA", s, {"1 moves": "11", "2 moves": "0001", "3 moves": x})
            for s, x in lh.items()
        },
    }
    return Study("gap", lines, tuple(ablate.MAIN), ablate.SIZES, 250, ablate.star(), "1 moves", "")


def test_what_is_read_of_a_line(study):
    second = study.lines["GAP"][2]
    assert report.right(second, "clean", "3 moves", "1 moves") == [0, 1, 1, 1]  # leading zero kept
    assert report.values(study, "GAP") == {1: 6 / 8, 2: 5 / 8, 3: 5 / 8}
    assert report.values(study, "GAP", "easy") == {1: 0.5, 2: 0.5, 3: 0.5}
    assert report.values(study, "GAP/noise") == {}


def test_differences_and_verdicts(study):
    mean, low, high, n = report.difference(study, "GAP", "LH+DA")  # seeds 1 and 2: 5/8 and 3/8
    assert (mean, n) == (0.5, 2)
    interval = stats.t.interval(0.95, 1, loc=0.5, scale=0.125)
    assert (low, high) == pytest.approx(interval, abs=1e-3)
    p = report.paired_p(study, "GAP", "LH+DA")
    assert p == pytest.approx(stats.binomtest(8, 8).pvalue)  # eight pairs differ, one way
    inf = float("inf")
    verdicts = {
        "yes": Difference(0.2, 0.1, 0.3, 3),
        "no": Difference(-0.2, -0.3, -0.1, 3),
        "not run yet": None,
        "undecided": Difference(0.2, -inf, inf, 1),
    }
    assert all(report.verdict(d) == word for word, d in verdicts.items())


def test_sentences(study):
    claims = [
        ("x", "GAP", "LH+DA", "hard"),
        ("y", "GAP", "LH", "hard"),
        ("z", "GAP", "LH+DA", "easy"),
    ]
    said = report.sentences(study, claims, True)
    assert said[0] == (
        "The toy agrees with the paper on 0 of 3 findings, disagrees on 1; "
        "1 undecided, 1 not run yet."
    )
    assert said[2].startswith("- x: **undecided**, +0.500 [")
    assert said[3].startswith("- z: **no**")
    assert len(said) == 4
