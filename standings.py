"""What do scores look like: in a table, beside a paper's, beside another run's?"""

from pathlib import Path
from statistics import fmean

from benchmarks import AVERAGES, POOLED, PUBLISHED
from data import LATENT_SPAN
from files import read_json, read_lines
from intervals import paired_difference, wilson
from scores import mean

# --------------------------------------------------------------------------------------------------
# one run


def summary(rows):
    """Accuracy with its interval, and what else a reader needs to trust it."""
    n, correct = len(rows), sum(row["correct"] for row in rows)
    found = {"n": n, "accuracy": correct / n}
    # the interval is one of counts, which VSI-Bench's relative accuracies are not
    if all(row["correct"] in (0, 1) for row in rows):
        found["interval"] = wilson(correct, n)
    # what no rule reads counts as wrong, and is counted; VLMEvalKit puts a random option there
    return found | {
        "n_unparsed": sum(row["extracted"] is None for row in rows),
        "n_truncated": sum(row["truncated"] for row in rows),
        "n_error": sum("error" in row for row in rows),
        "opened_latents": mean(LATENT_SPAN in row["raw"] for row in rows),
        "tokens": mean(row["tokens"] for row in rows),
        "latents": mean(row["latents"] for row in rows),
    }


def summaries(groups):
    """A summary of each group of rows {name: rows or a number}; empty groups are left out."""
    found = {}
    for name, group in groups.items():
        if not isinstance(group, list):
            found[name] = {"accuracy": group}
        elif group:
            found[name] = summary(group)
    return found


def print_scores(title, scores):
    """A line per group: the accuracy, and where it is one of rows what `summary` says of them."""
    # long names of subtasks widen the column
    width = max([16, *(len(name) + 1 for name in scores)])
    print(
        f"\n{title}\n{'':{width}}{'n':>6}{'accuracy':>10}{'95 % interval':>16}{'unparsed':>10}"
        f"{'truncated':>10}{'errors':>8}{'latent':>8}{'tokens':>8}{'latents':>8}"
    )
    for name, m in scores.items():
        interval = "{:.3f} - {:.3f}".format(*m["interval"]) if "interval" in m else ""
        line = f"{name:{width}}{m.get('n', ''):>6}{m['accuracy']:10.3f}{interval:>16}"
        if "n" in m:
            line += f"{m['n_unparsed']:10}{m['n_truncated']:10}{m['n_error']:8}"
            line += f"{m['opened_latents']:8.2f}{m['tokens']:8.1f}{m['latents']:8.1f}"
        print(line)


# --------------------------------------------------------------------------------------------------
# beside a paper's


def in_percent(found):
    """{metric: percent} of summaries {metric: summary}, with the averages that papers report."""
    ours = {metric: 100 * m["accuracy"] for metric, m in found.items()}
    for name, parts in (AVERAGES | POOLED).items():
        # over fewer benchmarks than the paper's, an average would compare with nothing
        if all(part in ours for part in parts):
            # a question weighs as much as another, or a score does
            shares = [found[part]["n"] if name in POOLED else 1 for part in parts]
            ours[name] = fmean([ours[part] for part in parts], shares)
    return ours


def beside(ours, table):
    """Print our numbers {metric: percent} beside those of a published table."""

    # a dash: we have not run it, or the paper does not say
    def cell(percent):
        return f"{'-' if percent is None else f'{percent:.2f}':>9}"

    systems = "".join(f"{system:>9}" for system in table.systems)
    print(f"\n{'':14}{'ours':>9}  |{systems}   ({table.paper}, Qwen2.5-VL-7B)")
    for metric, name, theirs in table.rows:
        print(f"{name:14}{cell(ours.get(metric))}  |" + "".join(map(cell, theirs)))


# --------------------------------------------------------------------------------------------------
# beside another run's


def compare(a, b):
    """Print the paired difference of two finished runs, and what settings they differ in.

    a, b: folders with scored.jsonl, of one test set or of several.
    """
    names = sorted(path.relative_to(a) for path in Path(a).glob("**/scored.jsonl"))
    others = sorted(path.relative_to(b) for path in Path(b).glob("**/scored.jsonl"))
    if not names:
        raise SystemExit(
            f"{a}: no scored.jsonl below it; eval.py writes one when all answers are there"
        )
    print(f"A: {a}\nB: {b}\nover questions:")
    for name in others:
        if name not in names:
            print(f"{name.parent}: B's alone")
    for name in names:
        if name.parent.name == "MMHal-Bench":
            print(f"{name.parent}: has no score but a judge's")
            continue
        one, two = read_grades(Path(a) / name), read_grades(Path(b) / name)
        # of other questions the difference would be the questions', not the models'
        if one.keys() != two.keys() or not one:
            raise SystemExit(
                f"{Path(a) / name} and {Path(b) / name} hold other questions ({len(one)} and "
                f"{len(two)}, {len(one.keys() & two.keys())} of them shared)"
            )
        # paired: the difference of two means would be far wider
        in_order_of_one = [two[id] for id in one]
        title = "" if name.parent == Path() else f"{name.parent}: "
        print(f"{title}{paired_difference(list(one.values()), in_order_of_one)}")
        records = [(Path(x) / name).with_name("metrics.json") for x in (a, b)]
        if all(path.exists() for path in records):  # a scored.jsonl alone may have been copied
            print_records(*(read_json(path, settings=dict, scores=dict) for path in records))


def print_records(a, b):
    """Print what two records of one test set differ in: the benchmark's own scores, settings."""
    one, two = a["settings"], b["settings"]
    # which may be no mean over questions: WeMath's are over problems, MMVP's over pairs
    printed = {metric for table in PUBLISHED.values() for metric, *_ in table.rows}
    for name in a["scores"].keys() & b["scores"].keys():
        if f"{one.get('data')}/{name}" in printed:
            x, y = (record["scores"][name]["accuracy"] for record in (a, b))
            print(f"  the benchmark's {name}: A {x:.3f}, B {y:.3f}")
    for name in one | two:
        if one.get(name) != two.get(name):
            print(f"  {name}: A {one.get(name)!r}, B {two.get(name)!r}")


def read_grades(path):
    """{id: correct} of a scored.jsonl."""
    rows = read_lines(path, id=(str, int), correct=(bool, int, float))
    return {row["id"]: float(row["correct"]) for row in rows}
