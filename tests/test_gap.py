"""GAP as a method: which rows keep what, and what belongs together."""

import pytest
from conftest import PIXELS
from scipy.stats import binom

from data import load_examples
from gap import GAP, is_solved
from model import load_processor, load_vlm


@pytest.mark.parametrize("keep, write", [(True, True), (False, True), (True, False)])
def test_who_keeps_the_parser_text(base, world, inputs, keep, write):
    """keep_parser=0 drops it from stripped rows, write_parser=0 from all; spans stay put."""
    given = dict(arg.removeprefix("--").split("=", 1) for arg in inputs)
    settings = {"method": "gap", "tau": 0.0, "rule": "paper", "keep_parser": keep}
    settings |= {
        "data": "x",
        "write_parser": write,
        "pca": given["pca"],
        "difficulty": given["difficulty"],
    }
    method = GAP(*load_vlm(base), load_processor(base, *PIXELS), settings | {"base": str(base)})
    ids = [row["id"] for row in load_examples(world / "train.jsonl")]
    solved = set(ids[::3])

    rows, left_out = method.rows(load_examples(world / "train.jsonl"), training=True)
    assert [row["id"] for row in rows] == ids and not left_out
    for row in rows:
        assert ("<parser>" in row["response"]) == (write and (keep or row["id"] not in solved))
        assert ("<latent>" in row["response"]) == (row["id"] not in solved)
        assert row["response"].endswith(f"</think> <answer> {row['answer']} </answer>")
    for row in method.rows(load_examples(world / "val.jsonl"), training=False)[
        0
    ]:  # validation assigns nothing
        assert "<latent>" in row["response"] and ("<parser>" in row["response"]) == write


def test_rules():
    # four options: one of eight is what guessing gives, five of eight is not (binomial tail .027)
    assert is_solved(1, 8, 4, 0.0, "paper") and not is_solved(1, 8, 4, 0.0, "guess")
    assert is_solved(5, 8, 4, 0.0, "guess") and not is_solved(4, 8, 4, 0.0, "guess")
    assert is_solved(1, 8, 0, 0.0, "guess") and not is_solved(0, 8, 0, 0.0, "guess")
    assert not is_solved(4, 8, 0, 0.5, "paper") and is_solved(5, 8, 0, 0.5, "paper")


def test_guess_rule_against_scipy():
    for n_options in (2, 3, 4, 9):
        for c in range(9):
            improbable = binom.sf(c - 1, 8, 1 / n_options) < 0.05
            assert is_solved(c, 8, n_options, 0.0, "guess") == improbable
