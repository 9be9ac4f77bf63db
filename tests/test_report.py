"""The statistics against scipy; the verdicts of the tables on lines with known differences."""

import math
import random
import re

import numpy as np
import pytest
from scipy import stats

import ablate
import report
from files import write_lines
from report import Difference, Study


def test_interval_against_scipy():
    rng = random.Random(0)
    for n in (2, 3, 5, 10, 13):
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
        if isinstance(table, str):
            assert table in report.SECTIONS
            continue
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
        "key": name,
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
    return Study(
        "gap", lines, tuple(ablate.MAIN), ablate.SIZES["gap"], 250, ablate.star(), "1 moves", ""
    )


def test_what_is_read_of_a_line(study):
    second = study.lines["GAP"][2]
    assert report.right(second, "clean", "category:3 moves", "1 moves") == [
        0,
        1,
        1,
        1,
    ]  # leading zero kept
    assert report.values(study, "GAP") == {1: 6 / 8, 2: 5 / 8, 3: 5 / 8}
    assert report.values(study, "GAP", "easy") == {1: 0.5, 2: 0.5, 3: 0.5}
    assert report.values(study, "GAP/noise") == {}


def test_differences_and_verdicts(study):
    mean, low, high, n, p = report.difference(study, "GAP", "LH+DA")  # seeds 1, 2: 5/8 and 3/8
    assert (mean, n) == (0.5, 2)
    interval = stats.t.interval(0.95, 1, loc=0.5, scale=0.125)
    assert (low, high) == pytest.approx(interval, abs=1e-3)
    assert p == pytest.approx(stats.ttest_1samp([5 / 8, 3 / 8], 0).pvalue)
    # of eight questions three differ in both seeds and two in one; two more, one each way
    x = [1, 1, 1, 0.5, 0.5, 0, 0, 0, 1, -1]
    z = np.mean(x) / (np.std(x) / math.sqrt(10))
    p = report.paired_p(study, "GAP", "LH+DA")
    assert p == pytest.approx(2 * stats.norm.sf(z))
    up, down = Difference(0.2, 0.1, 0.3, 3, 0.02), Difference(-0.2, -0.3, -0.1, 3, 0.02)
    one = Difference(0.2, -math.inf, math.inf, 1, 1.0)
    assert report.verdicts([up]) == ["yes"] and report.verdicts([down]) == ["no"]
    # what holds alone may not hold among others that are read with it
    assert report.verdicts([up, None, one]) == ["yes", "not run yet", "undecided"]
    assert report.verdicts([up, up, up]) == ["undecided"] * 3


BROKEN = {
    "no name": ({"name": None}, "field 'name' must be str"),
    "no evaluations": ({"evals": [1]}, "field 'evals' must be dict"),
    "an evaluation of another kind": ({"evals": {"clean": 1}}, "evals.clean: expected a JSON obj"),
    "nothing right": ({"evals": {"clean": {}}}, "evals.clean: field 'right' must be dict"),
    "no bits": (
        {"evals": {"clean": {"right": {"x": [2]}}}},
        "evals.clean: 'x' must be the number of quest",
    ),
    "too many": (
        {"evals": {"clean": {"right": {"x": [1, "3"]}}}},
        r"evals.clean: 'x' .* found \[1, '3'\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_of_another_kind_is_named(tmp_path, name):
    change, said = BROKEN[name]
    good = line("GAP", 1, {"1 moves": "01"}) | {"settings": {}}
    write_lines(tmp_path / "r.jsonl", [good, good])
    assert report.lines_of(tmp_path / "r.jsonl") == [good, good]
    write_lines(tmp_path / "r.jsonl", [good, good | change])
    with pytest.raises(SystemExit, match=rf"r.jsonl:2: {said}"):
        report.lines_of(tmp_path / "r.jsonl")


def test_runs_on_other_data_do_not_go_together():
    """Of equal settings, but of another key: those of the last line stay."""
    old, new, last = (line("GAP", seed, {"2 moves": "01"}) for seed in (1, 2, 3))
    assert report.latest([old | {"key": "of another data file"}, new, last]) == [new, last]
    # nor runs of another name, where both say what they were trained on
    other = line("LH", 1, {"2 moves": "01"})
    said = [other | {"data": "before"}, other | {"seed": 2, "data": "now"}, last | {"data": "now"}]
    assert report.latest(said) == said[1:] and report.latest([other, said[2]]) == [other, said[2]]


def test_a_run_may_lack_an_evaluation(study):
    """One that opened no span has no answers with another example's latents."""
    for name, seed in (("GAP", 1), ("GAP", 2), ("LH+DA", 1), ("LH+DA", 2)):
        evals = study.lines[name][seed]["evals"]
        if (name, seed) != ("GAP", 2):
            evals["shuffle"] = evals["clean"]
    made = report.difference(study, "GAP", "GAP/shuffle")
    assert (made.mean, made.seeds) == (0.0, 1) and report.paired_p(study, "GAP", "GAP/shuffle") == 1
    assert report.paired_p(study, "GAP/shuffle", "LH+DA/shuffle") < 1


def test_a_category_may_be_called_as_a_group_is():
    made = line("GAP", 1, {"easy": "11", "hard": "00", "all": "01"})
    read = [report.value(made, "clean", x, "") for x in ("hard", "category:hard", "category:easy")]
    assert read == [0.5, 0.0, 1.0] and report.value(made, "clean", "category:all", "") == 0.5


def test_seeds_that_find_the_same_questions_hard_are_not_more_questions(study):
    """The same answers again and again: no seed adds to what one says."""
    for name, by_seed in study.lines.items():
        study.lines[name] = {1: by_seed[1]}
    alone = report.paired_p(study, "GAP", "LH+DA")
    for name, by_seed in study.lines.items():
        study.lines[name] = dict.fromkeys(range(10), by_seed[1])
    assert report.paired_p(study, "GAP", "LH+DA") == pytest.approx(alone)


def test_without_an_easy_category_all_questions_are_hard():
    """Rows that name no category are none of it."""
    made = line("GAP", 1, {"": "0111"})
    assert report.value(made, "clean", "hard", "") == 0.75
    assert report.value(made, "clean", "easy", "") is None


def test_every_seed_is_shown():
    assert report.each_seed({3: 0.5, 1: 0.25}) == "0.375 (.50 .25)"
    assert report.each_seed({1: 0.5, 2: 0.5}) == "0.500" and report.each_seed({}) == ""


def test_power_is_that_of_the_t_test(study):
    """The seeds that it asks for tell .05 in about four of five draws of its own spread."""
    rng = random.Random(0)
    for name in study.lines:
        for seed in range(1, 9):
            bits = "".join(str(int(rng.random() < 0.5)) for _ in range(400))
            study.lines[name][seed] = line(name, seed, {"1 moves": "01", "2 moves": bits})
    said = report.power(study)
    sd = float(re.search(r"deviation of (\d.\d+)", said)[1])
    accuracies = [list(report.values(study, name).values()) for name in study.lines]
    assert sd == pytest.approx(math.sqrt(sum(map(stats.tvar, accuracies)) / 2), abs=6e-4)
    assert "(14 degrees of freedom)" in said
    n = int(re.search(r"with (\d+) seeds per run", said)[1])
    told = 0
    for _ in range(400):  # a single test
        gaps = [rng.gauss(0.05, sd * math.sqrt(2)) for _ in range(n)]
        told += stats.ttest_1samp(gaps, 0).pvalue < 0.05
    assert 0.65 < told / 400 < 0.92


def test_drift_and_edits_are_read_of_the_lines():
    """R2 at the last place with the real latents before it, minus that with its own."""
    lines = {"LH": {}, "output": {}}
    for seed in (1, 2, 3):
        for name, own in (("LH", 0.875), ("output", 0.25)):
            made = line(name, seed, {"1 moves": "01", "2 moves": "0011"})
            made["probe"] = {"along": {"own": [0.9, own + seed / 64], "forced": [0.9, 0.875]}}
            made["edits"] = {
                kind: {"pairs": 9, "followed": 0.5 + seed / 64, "both_right": 0.25}
                | {"cosine": None, "own": None}
                for kind, _ in report.EDIT_KINDS
            }
            lines[name][seed] = made
    study = Study("main", lines, tuple(ablate.MAIN), (), 2500, "", "1 moves", "")
    d = report.drift_of(study, "output")
    assert d.mean == pytest.approx(0.625 - 2 / 64) and d.seeds == 3
    said = "\n".join(report.drift(study))
    assert "| output, fed its own latents | 0.90 | 0.28 |" in said
    assert "- output loses by its own latents: **yes**" in said
    assert "- LH loses by its own latents: **undecided**" in said
    # one that writes too few spans has no last place
    for made in lines["output"].values():
        made["probe"]["along"] = {"own": [0.9], "forced": [0.9]}
    said = "\n".join(report.drift(study))
    assert "Too few spans: output." in said and "output, fed" not in said
    table = "\n".join(report.edits(study))
    assert "| LH | 0.53 ± 0.02 |" in table and "| both right |" in table
    assert "cosine |" not in table


def test_sentences(study):
    claims = [
        ("x", "GAP", "LH+DA", "hard"),
        ("y", "GAP", "LH", "hard"),
        ("z", "GAP", "LH+DA", "easy"),
    ]
    said = report.sentences(study, claims, True)
    assert said[0] == (
        "These runs agree with the paper on 0 of 3 findings, disagree on 0; "
        "2 undecided, 1 not run yet."
    )
    assert said[2].startswith("- x: **undecided**, +0.500 [")
    assert said[3].startswith("- z: **undecided**, -0.500 [")  # of two seeds that are equal
    assert len(said) == 4


def study_of(runs):
    """A study of {run: {seed: bits}}."""
    lines = {
        name: {seed: line(name, seed, {"2 moves": bits}) for seed, bits in by_seed.items()}
        for name, by_seed in runs.items()
    }
    sizes = ablate.SIZES["gap"]
    return Study("gap", lines, tuple(ablate.MAIN), sizes, 250, ablate.star(), "1 moves", "")


def test_what_no_seed_changes_says_nothing_of_their_spread():
    """Runs at the floor, and the base, which is not trained."""
    middle, floor = {1: "0110", 2: "0111"}, {1: "0" * 40, 2: "0" * 39 + "1"}
    said = {
        report.power(study_of({"GAP": middle} | others))
        for others in ({}, {"LH+DA": floor}, {"base": middle})
    }
    assert len(said) == 1


def test_costs_are_shares_of_texts():
    study = study_of({"GAP": {1: "01"}, "text": {1: "01"}})
    study.lines["GAP"][1]["steps_per_s"] = 1.0  # text's is 2
    assert report.ratio_to_text(study, "GAP", "steps_per_s") == {1: 0.5}


def test_a_cell_may_hold_anything():
    assert report.markdown(["a|b"], [["c\nd"]])[1:4] == [r"| a\|b |", "| --- |", "| c d |"]


def test_differences_are_a_runs_minus_the_references(study):
    table = next(t for t in report.TABLES["gap"] if not isinstance(t, str))
    table = table._replace(rows={"GAP": "", "LH+DA": ""}, reference="LH+DA", claims=())
    text = "\n".join(report.accuracy_table(study, table))
    assert "| GAP |" in text and "+0.500 [" in text and "-0.500" not in text
    row = next(line for line in text.splitlines() if line.startswith("| GAP |"))
    # over the questions, not over two seeds
    assert row.split(" | ")[-2] == report.p_shown(report.paired_p(study, "GAP", "LH+DA"))


def test_a_head_pays_where_it_is_ahead(study):
    up, down = Difference(0.2, 0.1, 0.3, 3, 0.001), Difference(-0.2, -0.3, -0.1, 3, 0.001)
    assert (
        report.where_it_pays({500: up, 0: down})
        == "pays at 500; costs at all; is undecided at no size"
    )


def test_scarcity_is_the_pca_heads_minus_the_full_ones(study):
    study.lines["LH"] = {s: line("LH", s, {"2 moves": "0000"}) for s in (1, 2)}
    study.lines["LH+PCA"] = {s: line("LH+PCA", s, {"2 moves": "1111"}) for s in (1, 2)}
    text = "\n".join(report.scarcity(study))
    assert "LH+PCA minus LH | +1.000" in text


def test_predicted_and_real_norms_keep_their_columns(study):
    for run in study.lines["GAP"].values():
        run["probe"] = {"predicted": {"mean_log": 1.5}, "real": {"mean_log": 2.5}}
    row = dict(zip(report.DIAGNOSIS_HEAD, report.diagnosis_row(study, "GAP")))
    assert row["log norm of latents"] == "1.50" and row["of real features"] == "2.50"
