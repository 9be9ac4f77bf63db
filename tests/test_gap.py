"""GAP as a method: which rows keep what, and what belongs together."""

import pytest
from conftest import PIXELS

from data import load_examples
from gap import GAP
from model import load_processor, load_vlm


@pytest.mark.parametrize("keep, write", [(True, True), (False, True), (True, False)])
def test_who_keeps_the_parser_text(base, world, inputs, keep, write):
    """keep_parser=0 drops it from stripped rows, write_parser=0 from all; spans stay put."""
    given = dict(arg.removeprefix("--").split("=", 1) for arg in inputs)
    settings = {"method": "gap", "tau": 0.0, "rule": "paper", "keep_parser": keep}
    settings |= {"write_parser": write, "pca": given["pca"], "difficulty": given["difficulty"]}
    method = GAP(*load_vlm(base), load_processor(base, *PIXELS), settings | {"base": str(base)})
    ids = [row["id"] for row in load_examples(world / "train.jsonl")]
    solved = set(ids[::3])

    rows, left_out = method.rows(world / "train.jsonl", training=True)
    assert [row["id"] for row in rows] == ids and not left_out
    for row in rows:
        assert ("<parser>" in row["response"]) == (write and (keep or row["id"] not in solved))
        assert ("<latent>" in row["response"]) == (row["id"] not in solved)
        assert row["response"].endswith(f"</think> <answer> {row['answer']} </answer>")
    for row in method.rows(world / "val.jsonl", training=False)[0]:  # validation assigns nothing
        assert "<latent>" in row["response"] and ("<parser>" in row["response"]) == write
