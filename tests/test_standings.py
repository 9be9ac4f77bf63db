"""What do scores look like beside another run's?"""

import json
import random
import shutil

from conftest import ROOT, run
from scipy.stats import binomtest

from intervals import difference_interval


def test_compare(tmp_path):
    """Names both runs, what they differ in, and the interval and test of test_intervals.py."""
    rng = random.Random(0)
    a, b = ([rng.random() < p for _ in range(200)] for p in (0.5, 0.65))
    for name, right in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"id": i, "correct": c}) + "\n" for i, c in enumerate(right)]
        (tmp_path / name / "scored.jsonl").write_text("".join(lines))
        settings = {"model": f"out/{name}", "seed": 1, "data": "WeMath"}
        scores = {"strict": {"accuracy": len(name) / 4}, "IK": {"accuracy": 0.5}}
        record = json.dumps({"settings": settings, "scores": scores})
        (tmp_path / name / "metrics.json").write_text(record)
    both = (tmp_path / "a", tmp_path / "b")
    text = run("eval.py", "--compare", *both)
    assert f"A: {both[0]}\nB: {both[1]}\nover questions:\n" in text
    # the benchmark's own score of a paper's table, which is no mean over questions
    assert "the benchmark's strict: A 0.250, B 0.250" in text and "IK" not in text
    assert "model: A 'out/a', B 'out/b'" in text and "seed:" not in text
    wins, losses = sum(y and not x for x, y in zip(a, b)), sum(x and not y for x, y in zip(a, b))
    test = binomtest(wins, wins + losses)
    low, high = difference_interval([float(y) - float(x) for x, y in zip(a, b)])
    assert (
        f"B - A {(wins - losses) / 200:+.3f} (95 % interval {low:+.3f} to {high:+.3f}); "
        f"B wins {wins}, loses {losses}, McNemar p = {test.pvalue:.3g}"
    ) in text
    for name in ("a/MMHal-Bench", "b/MMHal-Bench", "b/POPE"):
        shutil.copytree(tmp_path / "a", tmp_path / name, ignore=lambda *_: ["MMHal-Bench"])
    text = run("eval.py", "--compare", *both)
    assert "MMHal-Bench: has no score but a judge's" in text and "POPE: B's alone" in text
    (tmp_path / "b/scored.jsonl").write_text(json.dumps({"id": 7, "correct": True}) + "\n")
    assert "hold other questions" in run("eval.py", "--compare", *both, ok=False)
    assert "no scored.jsonl" in run("eval.py", "--compare", ROOT / "toy", both[1], ok=False)
