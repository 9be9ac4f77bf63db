"""Do the latents and the answer follow an edit of the input?

Reads a model folder, a data file of pairs of questions that differ in one thing (two rows of one
`pair`; `python toy.py edits` writes the toy's), and the folder of eval.py's answers to them with
--save_latents=1. Writes <answers>/edits.json and prints, for each category of pairs:

  followed     of the pairs whose gold answers differ, those whose answers do; of the others, those
               whose answers are one
  both_right   those whose answers are both right
  cosine       between the two rows' latents, one by one (1: they are blind to the edit)
  pooled       between their means, as the field's critics measure it
  own          where the pairs' auxiliary images differ: the share of latents that lie nearer to
               their own image's features than to the other's (1/2: chance)

    python toy.py edits
    python eval.py --data=out/toy/edits.jsonl --out=out/eval/edits --save_latents=1
    python edits.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from answers import is_correct
from data import as_text, load_examples
from files import (
    check_fields,
    check_there,
    file_md5,
    folder_digest,
    is_made,
    read_json,
    read_lines,
    read_safetensors,
    write_json,
)
from generate import latents_name
from images import open_image
from launch import Progress, pick_device, show_files, start
from model import load_vlm, meta_of_targets, real_features
from options import lettered, option_named
from scores import mean
from values import same_text

# --------------------------------------------------------------------------------------------------
model = "out/gap"  # the folder that answered
data = "out/toy/edits.jsonl"  # the pairs
answers = "out/eval/edits"  # eval.py's `out`
# --------------------------------------------------------------------------------------------------

NUMBERS = ("followed", "both_right", "cosine", "pooled", "own")  # of a pair
SAME = 0.1  # features that differ by no more of their norm are of one place


def pairs_of(rows):
    """[(row, row)] of a data file. Raises SystemExit for a `pair` that is not of two rows."""
    by_pair = {}
    for row in rows:
        row["pair"] = as_text(row.get("pair"), "pair", row.where)
        row["category"] = row.get("category") or "all"
        check_fields(row, {"category": str}, row.where)
        by_pair.setdefault(row["pair"], []).append(row)
    for name, members in by_pair.items():
        if len(members) != 2:
            raise SystemExit(f"{data}: pair {name!r} has {len(members)} rows, expected 2")
    return list(by_pair.values())


def read_answers():
    """{id: line of scored.jsonl}. Raises SystemExit where another model answered, or other data."""
    path, record = Path(answers) / "scored.jsonl", Path(answers) / "metrics.json"
    for file in (path, record):
        check_there(file, "eval.py writes it, with --save_latents=1")
    made = read_json(record, settings=dict)
    settings = made["settings"]
    if made.get("weights") != folder_digest(model):
        raise SystemExit(f"{answers} has the answers of another model than {model}")
    if settings.get("md5") != file_md5(data):
        raise SystemExit(f"{answers} has no answers to {data} as it is now; run eval.py on it")
    fields = {"id": str, "extracted": (str, type(None)), "correct": (bool, int, float)}
    fields |= {"key": str, "latents": int}
    lines = read_lines(path, **fields)
    if any(line["latents"] for line in lines) and not settings.get("save_latents"):
        raise SystemExit(f"{answers}: the latents were not kept; eval.py has --save_latents=1")
    return {line["id"]: line for line in lines}


def latents_of(line):
    """What an answer was written with, (m, d); None for an answer without a whole span."""
    path = Path(answers) / "latents" / latents_name(line["id"])
    if not is_made(path, line["key"]):
        return None
    return read_safetensors(path, ("latents",))[0]["latents"]


def follows(a, b, said):
    """Did the answer change where it should, and stay where it should not?"""
    line_a, line_b = said[a["id"]], said[b["id"]]
    if line_a["extracted"] is None or line_b["extracted"] is None:  # unread: no answer
        return False
    gold_a, gold_b = in_words(a, a["answer"]), in_words(b, b["answer"])
    # a right answer is the gold one, however it was put
    one = gold_a if line_a["correct"] == 1 else in_words(a, line_a["extracted"])
    two = gold_b if line_b["correct"] == 1 else in_words(b, line_b["extracted"])
    if a.get("options") or b.get("options"):
        same = same_text(one, two)
    else:
        same = is_correct(one, {"answer": two}) or is_correct(two, {"answer": one})
    return same == same_text(gold_a, gold_b)


def in_words(row, answer):
    """An answer as a text: that of the option whose letter it is, for their order may differ."""
    options = lettered(row.get("options") or []) or {}
    return options.get(option_named(answer, options), answer) if answer else answer


def nearer_to_own(v_a, v_b, real_a, real_b):
    """Share of the latents of both rows that are nearer to their own real features, all (m, d).

    None where the features are the same at all places.
    """
    # a tower that attends to the whole image changes all of it a little
    differ = (real_a - real_b).norm(dim=-1) > SAME * real_a.norm(dim=-1)  # (m)
    if not differ.any():
        return None

    def nearer(v, own, other):
        return (v - own).norm(dim=-1) < (v - other).norm(dim=-1)

    both = torch.cat([nearer(v_a, real_a, real_b)[differ], nearer(v_b, real_b, real_a)[differ]])
    return float(both.float().mean())


def load_features():
    """real_features of the model; None where no latent was trained to be one."""
    if not meta_of_targets(model):
        return None
    vlm, _ = load_vlm(model, device=pick_device())
    return real_features(model, vlm)


def compare(a, b, said, features):
    """What became of one pair: numbers by name, None where there is none."""
    found = {
        "followed": follows(a, b, said),
        "both_right": all(said[row["id"]]["correct"] == 1 for row in (a, b)),
        "cosine": None,
        "pooled": None,
        "own": None,
    }
    v_a, v_b = (latents_of(said[row["id"]]) for row in (a, b))
    if v_a is None or v_b is None or v_a.shape != v_b.shape:
        return found
    found["cosine"] = float(F.cosine_similarity(v_a, v_b, dim=-1).mean())
    # the critics' measure, which the order of the latents does not change
    found["pooled"] = float(F.cosine_similarity(v_a.mean(0), v_b.mean(0), dim=0))
    if features and a.get("aux_images") and b.get("aux_images"):
        real_a, real_b = (
            features([open_image(path) for path in row["aux_images"]]).flatten(0, 1)
            for row in (a, b)
        )
        if real_a.shape == v_a.shape == real_b.shape:
            found["own"] = nearer_to_own(v_a, v_b, real_a, real_b)
    return found


def summary(found):
    """The means of the pairs' numbers, of those that have one."""
    numbers = {name: [x[name] for x in found if x[name] is not None] for name in NUMBERS}
    means = {name: mean(map(float, x)) if x else None for name, x in numbers.items()}
    return {"pairs": len(found)} | means


def main():
    show_files(reads=[model, data, answers], writes=[Path(answers) / "edits.json"])
    check_there(Path(model) / "config.json")
    pairs = pairs_of(load_examples(data, training=False))
    said = read_answers()
    missing = [row["id"] for pair in pairs for row in pair if row["id"] not in said]
    if missing:
        raise SystemExit(f"{answers}: no answer to {missing[0]!r}; run eval.py on {data}")
    features = load_features()
    by_category = {}
    for a, b in Progress(pairs, desc="edits", unit="pair"):
        by_category.setdefault(a["category"], []).append(compare(a, b, said, features))
    summaries = {category: summary(found) for category, found in by_category.items()}
    print(f"\n{'':12}{'pairs':>8}" + "".join(f"{name:>12}" for name in NUMBERS))
    for category, numbers in summaries.items():
        cells = ["-" if numbers[x] is None else f"{numbers[x]:.3f}" for x in NUMBERS]
        print(f"{category:12}{numbers['pairs']:8}" + "".join(f"{cell:>12}" for cell in cells))
    write_json(Path(answers) / "edits.json", summaries, indent=1)
    print(f"wrote {Path(answers) / 'edits.json'}")


if __name__ == "__main__":
    start(main)
