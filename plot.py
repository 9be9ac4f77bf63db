"""How did it train, and what do the studies show? Figures, for whoever has matplotlib.

Reads log.jsonl of trained folders, or the lines that ablate.py leaves. Writes a PNG:

    python plot.py                                              # out/gap/curves.png
    python plot.py --runs=out/gap,out/text --out=curves.png     # runs side by side
    python plot.py --results=results/gap                        # accuracy against examples
    python plot.py --results=results/toy --figure=systems       # each run's seeds
    python plot.py --results=results/toy --figure=critics       # with other latents than its own
    python plot.py --results=results/toy --figure=edits         # of edited questions
    python plot.py --results=results/toy --figure=sparse        # latents on fewer questions
    python plot.py --results=results/toy --figure=valr          # what VaLR needs to learn a chain
    python plot.py --results=results/toy --figure=subspace      # more of the variance
    python plot.py --results=results/toy --figure=drift         # R2 along the chain
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from files import check_fields, check_there, read_lines, write_then_rename
from launch import check_choices, names_in, start
from report import SYSTEMS, latest, lines_of, longest, mean_interval, value

# --------------------------------------------------------------------------------------------------
runs = "out/gap"  # folders of train.py or their log.jsonl, with commas between
out = ""  # a PNG; "": curves.png in the first folder, or <results>.png, <results>-systems.png
results = ""  # what ablate.py wrote: a figure of it instead of curves
figure = "examples"  # or drift systems critics edits sparse subspace valr
methods = "text,output,LH,LH+PCA,LH+DA,GAP"  # the runs in figure examples
easy = "1 moves"  # the category that needs no latents, left out of accuracies
# --------------------------------------------------------------------------------------------------

PERFECT = "1 is perfect"
# a panel each, of what shares a unit; a run has the fields of its method. A field of a method that
# is not here has a panel of its own
PANELS = {
    "loss, as minimised": ("loss",),
    "cross-entropy, nats per token": ("ce", "ce_prior"),
    "leakage, nats per token": ("leakage_ce",),
    "latent loss": ("latent",),
    "KL, nats per question": ("kl_forward", "kl_reverse"),
    PERFECT: ("r2", "cosine", "right_posterior", "right_prior", "leakage"),
    "error of the rollout": ("rollout_error",),
    "length of latents": ("norm_predicted", "norm_target"),
    "gradient norm": ("grad_norm",),
}
NO_CURVE = ("step", "lr", "peak_gib", "tokens_per_s", "flops", "mfu", "seconds")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's
STYLES = ("-", "--", ":", "-.", (0, (1, 3)))
WORST = -1  # R2 of the first steps can be hugely negative, and would flatten what follows
# inches: of a panel, of the room for names beside it, of what is above, below and to the left
PANEL, BESIDE, BETWEEN, LEFT, LEGEND = (2.2, 1.6), 1.4, 0.55, 0.5, 0.3
WINDOWS = 50  # a curve is the mean of so many windows of steps, over what each step was


def pyplot():
    """matplotlib, drawing without a screen. Raises SystemExit where it is not installed."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's shell names one that is not installed here
    try:
        import matplotlib
    except ImportError:
        advice = "pip install matplotlib"
        raise SystemExit(f"no picture: matplotlib is not installed; {advice}") from None
    matplotlib.use("Agg")  # where another one is in use already
    from matplotlib import pyplot

    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    return pyplot


def save(fig, path):
    write_then_rename(path, lambda tmp: fig.savefig(tmp, format="png", dpi=110))
    print(f"wrote {path}")


def where_possible(draw, *args):
    """Draw, or say why there is no picture: matplotlib is optional, and the work is done."""
    try:
        draw(*args)
    except SystemExit as e:
        print(e)


def check_number(names, what):
    """Raise SystemExit where two of them would have one colour."""
    if len(names) > len(COLOURS):
        raise SystemExit(
            f"{len(names)} {what}: there are colours for {len(COLOURS)}, draw fewer at once"
        )


def moved_apart(heights, gap, top):
    """Heights moved apart to be `gap` from each other, as little as may be, none above `top`.

    Their order stays.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for below, i in zip(order, order[1:]):
        moved[i] = max(moved[i], moved[below] + gap)
    for above, i in zip([None, *reversed(order)], reversed(order)):
        moved[i] = min(moved[i], top if above is None else moved[above] - gap)
    return moved


def label(ax, names, at, side, size=8):
    """Write names [(text, height in data, colour)] beside their curves, none on another.

    To the right or left, as `side` says, of `at`, a share of the axis's width.
    """
    points = 72 * ax.figure.get_size_inches()[1] * ax.get_position().height
    x = ax.get_xlim()[0]
    to_axes = ax.transScale + ax.transLimits
    heights = [to_axes.transform((x, y))[1] for _, y, _ in names]
    where = {
        "transform": ax.transAxes,
        "ha": "left" if side == "right" else "right",
        "va": "center",
    }
    for (text, _, colour), height in zip(names, moved_apart(heights, 1.2 * size / points, 1)):
        ax.text(at, height, text, color=colour, fontsize=size, **where)


# --------------------------------------------------------------------------------------------------
# training curves


def log_of(run):
    """The log.jsonl of a run, which is given as a folder or as that file."""
    path = Path(run)
    return path if path.suffix == ".jsonl" else path / "log.jsonl"


def read_log(run):
    """{field: (steps, values)} of a run's log.jsonl, numbers that are finite only.

    Says which fields were not finite. Raises SystemExit if there is nothing to draw.
    """
    path = log_of(run)
    check_there(path)
    settings, *rows = read_lines(path) or [{}]
    if "step" in settings:
        raise SystemExit(f"{path}:1: expected the settings of the run, found a step")
    if not rows:
        raise SystemExit(f"{path}: no steps yet")
    kept = []
    for n, row in enumerate(rows, 2):
        check_fields(row, {"step": int}, f"{path}:{n}")
        # a run that goes on from a checkpoint takes the steps after it again
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)

    found, broken = {}, {}
    for row in kept:
        for field, x in row.items():
            # not isinstance, which takes True for a number
            if type(x) not in (int, float) or field.removeprefix("val_") in NO_CURVE:
                continue
            if not math.isfinite(x):
                broken.setdefault(field, []).append(row["step"])
                continue
            steps, values = found.setdefault(field, ([], []))
            steps.append(row["step"])
            values.append(x)
    for field, steps in broken.items():
        print(f"{path}: {field} is not a finite number at {len(steps)} steps, the first {steps[0]}")
    if not found:
        raise SystemExit(f"{path}: no finite number to draw in {len(kept)} steps")
    return found


def panels_of(logs):
    """{title: fields} of the panels that these logs fill."""
    there = {field.removeprefix("val_"): None for log in logs for field in log}  # in their order
    known = {field for fields in PANELS.values() for field in fields}
    own = {field: (field,) for field in there if field not in known}
    panels = {
        title: [field for field in fields if field in there]
        for title, fields in (PANELS | own).items()
    }
    return {title: fields for title, fields in panels.items() if fields}


def names_of(folders):
    """What each run is called in a picture: its folder's name, the path where two share that."""
    names = [log_of(folder).absolute().parent.name for folder in folders]
    return [
        name if names.count(name) == 1 else str(log_of(folder).parent)
        for name, folder in zip(names, folders)
    ]


def windows(steps, values, n=WINDOWS):
    """The means of at most n windows of equally many neighbouring values: (steps, means)."""
    size = math.ceil(len(values) / n)
    parts = range(0, len(values), size)
    middle = [sum(steps[i : i + size]) / len(steps[i : i + size]) for i in parts]
    return middle, [sum(values[i : i + size]) / len(values[i : i + size]) for i in parts]


def wants_log(values):
    """Is a log axis what shows these numbers? All above 0, and over two orders of magnitude."""
    return min(values) > 0 and max(values) > 100 * min(values)


def draw_curves(folders, path):
    """A panel per unit, a colour per run, a style per field; dots are validation data."""
    plt = pyplot()
    check_number(folders, "runs")
    logs = [read_log(folder) for folder in folders]
    panels = panels_of(logs)
    fig, axes = grid(plt, len(panels))
    last = max(steps[-1] for log in logs for steps, _ in log.values())
    for ax, (title, fields) in zip(axes, panels.items()):
        ax.set_xlim(0, 1.02 * last)  # the same in each panel, whatever a run has of it
        draw_panel(ax, title, fields, logs)
    validated = any(field.startswith("val_") for log in logs for field in log)
    legend(fig, names_of(folders), validated)
    save(fig, path)
    plt.close(fig)


def grid(plt, n):
    """A figure of n panels of one size, at most three in a row, and their axes."""
    columns = min(3, n)
    rows = math.ceil(n / columns)
    (width, height), step = PANEL, PANEL[1] + BETWEEN
    whole = (LEFT + columns * (width + BESIDE), LEGEND + rows * step + 0.2)
    fig = plt.figure(figsize=whole)
    axes = []
    for i in range(n):
        x = LEFT + i % columns * (width + BESIDE)
        y = whole[1] - LEGEND - 0.25 - height - i // columns * step
        inches = zip((x, y, width, height), whole * 2)
        axes.append(fig.add_axes([inch / of for inch, of in inches]))
        if i + columns >= n:  # none below it
            axes[-1].set_xlabel("step", fontsize=8)
        axes[-1].tick_params(labelsize=8)
    return fig, axes


def legend(fig, names, validated):
    """One line above the panels: the colours of the runs, and what a dot is."""
    from matplotlib.lines import Line2D

    lines, words = [], []
    if len(names) > 1:
        lines = [Line2D([], [], lw=2, color=colour) for colour in COLOURS[: len(names)]]
        words = list(names)
    if validated:
        lines.append(Line2D([], [], ls="", marker="o", ms=4, color="0.4"))
        words.append("validation data")
    if lines:
        left = 0.2 / fig.get_size_inches()[0]
        where = {"loc": "upper left", "bbox_to_anchor": (left, 1), "borderaxespad": 0.3}
        fig.legend(lines, words, ncols=len(words), frameon=False, fontsize=8, **where)


def draw_panel(ax, title, fields, logs):
    """The fields of a panel for all runs, on an axis that fits them."""
    drawn, ends = [], []
    for i, log in enumerate(logs):
        for j, field in enumerate(fields):
            look = curve_look(i, j, len(logs))
            shown = draw_field(ax, log, field, look)
            if shown:
                ends.append((field, shown[-1], look["color"]))
            drawn += shown
    low, high = min(drawn), max(drawn)
    if title == PERFECT:
        ax.set_ylim(max(WORST, min(0, 1.05 * low)), 1.05)
        if low < WORST:
            title += f", cut off at {WORST}"
            ends = [(field, max(WORST, y), colour) for field, y, colour in ends]
    elif wants_log(drawn):
        ax.set_yscale("log")
    elif low == high:  # an error that there is none of, or validation once
        ax.set_ylim(low - 0.05, low + 1)
    ax.set_title(title, loc="left", fontsize=9)
    # a field alone is what the title says
    if len(fields) > 1 or title.startswith(PERFECT):
        label(ax, ends, 1.01, "right")


def curve_look(run, field, n_runs):
    """Colour and line style: a run alone has a colour a field."""
    if n_runs == 1:
        return {"color": COLOURS[field % len(COLOURS)]}
    return {"color": COLOURS[run % len(COLOURS)], "linestyle": STYLES[field % len(STYLES)]}


def draw_field(ax, log, field, look):
    """Draw a field of a run, and its validation. Returns what the axis must show.

    The last of it is where the curve ends.
    """
    shown = []
    if f"val_{field}" in log:
        steps, values = log[f"val_{field}"]
        ax.plot(steps, values, "o", ms=4, color=look["color"])
        shown += values
    if field in log:
        steps, values = log[field]
        ax.plot(steps, values, lw=0.5, alpha=0.2, color=look["color"])
        middle, means = windows(steps, values)
        # a step alone has no line
        ax.plot(middle, means, lw=1.4, marker="" if len(means) > 1 else "_", **look)
        shown += means
    return shown


# --------------------------------------------------------------------------------------------------
# the ablation's main figure


def read_runs(path_of_lines):
    """The lines of ablate.py that go together."""
    check_there(path_of_lines)
    lines = lines_of(path_of_lines)
    used = latest(lines)
    if len(used) < len(lines):
        why = "earlier settings, other data or another base than the last line by that name has"
        print(f"{path_of_lines}: {len(lines) - len(used)} lines left out: {why}")
    return used


def accuracies(lines, file=""):
    """{method: {examples: [accuracy on hard questions, one per seed]}} of ablate.py's lines."""
    wanted = names_in(methods)
    for number, line in enumerate(lines, 1):
        check_fields(line["settings"], {"examples": int}, f"{file}:{number}")
    # examples=0: all that there were, which is no number
    used = [line for line in lines if line["settings"]["examples"]]
    if len(used) < len(lines):
        print(f"{file}: {len(lines) - len(used)} lines left out: of examples=0, no known number")
    by_seed = {}
    for line in used:
        name, _, _ = line["name"].partition(" n=")
        accuracy = value(line, "clean", "hard", easy)
        if name in wanted and accuracy is not None:
            by_seed.setdefault((name, line["settings"]["examples"]), {})[line["seed"]] = accuracy
    found = {name: {} for name in wanted}
    for (name, examples), seeds in sorted(by_seed.items()):
        found[name][examples] = [seeds[seed] for seed in sorted(seeds)]
    return {name: sizes for name, sizes in found.items() if sizes}


def draw_accuracies(path_of_lines, path):
    """Accuracy against examples: means with 95 % t-intervals over seeds, each seed a faint dot."""
    plt = pyplot()
    found = accuracies(read_runs(path_of_lines), path_of_lines)
    check_found(found, path_of_lines, names_in(methods))
    check_number(found, "methods")
    fig = plt.figure(figsize=(6.4, 3.6))
    ax = fig.add_axes([0.09, 0.13, 0.9, 0.85])
    names = []
    for i, (name, sizes) in enumerate(found.items()):
        colour = COLOURS[i]
        shift = 1.035 ** (i - (len(found) - 1) / 2)  # side by side: many are at the ceiling
        at = [n * shift for n in sizes]
        stats = [mean_interval(seeds) for seeds in sizes.values()]
        means = [mean for mean, _, _ in stats]
        ax.plot(at, means, "o-", ms=4, lw=1.2, color=colour)
        for x, seeds, (_, low, high) in zip(at, sizes.values(), stats):
            beside = [x * 1.013] * len(seeds)
            ax.plot(beside, seeds, "o", ms=3, mew=0, alpha=0.4, color=colour)
            if len(seeds) > 1:  # one seed says nothing of what another would give
                ax.plot([x, x], [max(0, low), min(1, high)], lw=0.8, color=colour)
        names.append((name, means[0], colour))
    every = sorted({n for sizes in found.values() for n in sizes})
    ax.set(xscale="log", xlabel="training examples", ylabel="accuracy, hard questions")
    ax.set_xticks(every, [f"{n:,}" for n in every], minor=False)
    ax.set_xticks([], minor=True)
    # beside the fewest examples, where methods differ most, is room for their names
    width = math.log(max(2.0, every[-1] / every[0]))
    first = every[0] / math.exp(0.08 + 0.02 * width)
    ax.set_xlim(every[0] / math.exp(0.08 + 0.17 * width), every[-1] * math.exp(0.08 + 0.02 * width))
    ax.set_ylim(-0.02, 1.02)
    to_axes = ax.transScale + ax.transLimits
    label(ax, names, to_axes.transform((first, 0))[0], "left", size=9)
    what = "mean and 95 % t-interval over seeds;\nfaint: each seed"
    ax.text(0.98, 0.3, what, transform=ax.transAxes, ha="right", color="0.4", fontsize=8)
    save(fig, path)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------
# the main study's figures


class Number(NamedTuple):
    """What is drawn of a run: report.py's `value` of an evaluation by a measure."""

    kind: str
    measure: str
    size: str = ""  # " n=2500": of the run by this name with this behind it


class RowFigure(NamedTuple):
    """A figure with a row per run and, in each, a colour per number."""

    runs: tuple  # in the order in which they are drawn, from above
    numbers: dict  # {what it is: Number}
    unit: str


HARD = "accuracy on hard questions"
BOTH_SIZES = {
    "1,250 examples": Number("clean", "hard"),
    "2,500 examples": Number("clean", "hard", " n=2500"),
}
# fmt: off
ROWS = {
    "systems": RowFigure(("base", *SYSTEMS), BOTH_SIZES, HARD),
    "subspace": RowFigure(
        ("LH", "LH+PCA", "LH+PCA 99%", "LH+DA", "GAP", "GAP 99%"), BOTH_SIZES, HARD),
    "critics": RowFigure(("markers", "dummy", *SYSTEMS), {
        "as trained":        Number("clean",   "hard"),
        "real features":     Number("oracle",  "hard"),
        "another example's": Number("shuffle", "hard"),
        "noise":             Number("noise",   "hard"),
        "the span is empty": Number("markers", "hard"),
    }, HARD),
    "edits": RowFigure(SYSTEMS, {
        "another start":        Number("", "edits.start.followed"),
        "another move":         Number("", "edits.move.followed"),
        "another last piece":   Number("", "edits.piece.followed"),
        "nothing that matters": Number("", "edits.elsewhere.followed"),
    }, "pairs answered as the edit asks"),
    "sparse": RowFigure(
        ("LH+PCA", "LH+PCA n=750", "GAP", "GAP n=2500", "tau=0.5", "easy 10%", "easy 25%",
         "first 200", "parser dropped"), {HARD: Number("clean", "hard")}, HARD),
    "valr": RowFigure(("VaLR", "VaLR n=2500", "long text n=4200", "long VaLR n=4200"), {
        "as trained":        Number("clean",   "hard"),
        "another example's": Number("shuffle", "hard"),
        "noise":             Number("noise",   "hard"),
    }, HARD),
}
# fmt: on
DRIFT = ("output", "LH", "LH+PCA")


def by_run(lines, names, number):
    """{name: [its Number, one per seed]} of the runs that have it."""
    found = {}
    for name in names:
        mine = [line for line in lines if line["name"] == name + number.size]
        by_seed = {line["seed"]: value(line, number.kind, number.measure, easy) for line in mine}
        seeds = [by_seed[s] for s in sorted(by_seed) if by_seed[s] is not None]
        if seeds:
            found[name] = seeds
    return found


def check_found(found, path_of_lines, names):
    """Raise SystemExit where there is nothing to draw."""
    if not found:
        raise SystemExit(f"{path_of_lines}: no runs of {', '.join(names)}")


def draw_rows(rows, path_of_lines, path):
    """A RowFigure: a dot per seed, a line for the mean, a bar for its 95 % t-interval."""
    plt = pyplot()
    names, numbers, unit = rows
    lines = read_runs(path_of_lines)
    columns = [by_run(lines, names, number) for number in numbers.values()]
    there = [name for name in names if any(name in column for column in columns)]
    check_found(there, path_of_lines, names)
    height = 0.6 + 0.3 * len(there)
    fig = plt.figure(figsize=(6.4, height))
    left = max(0.2, 0.0155 * max(map(len, there)))  # room for the names
    width = 0.98 - left
    ax = fig.add_axes([left, 0.5 / height, width, 1 - 0.75 / height])
    heading = {"xy": (0, 1.02), "xycoords": "axes fraction"}  # where the next one begins
    for i, (what, column, colour) in enumerate(zip(numbers, columns, COLOURS)):
        for name, seeds in column.items():
            y = there.index(name) + 0.7 * ((i + 0.5) / len(columns) - 0.5)
            mean, low, high = mean_interval(seeds)
            if len(seeds) > 1:
                ax.plot([max(0, low), min(1, high)], [y, y], lw=2.5, alpha=0.25, color=colour)
            ax.plot([mean, mean], [y - 0.12, y + 0.12], lw=1.6, color=colour)
            ax.plot(seeds, [y] * len(seeds), "o", ms=3, mew=0, alpha=0.7, color=colour)
        if len(columns) > 1:
            said = ax.annotate(what, **heading, color=colour, va="bottom")
            heading = {"xy": (1, 0), "xycoords": said, "xytext": (12, 0)}
            heading["textcoords"] = "offset points"
    ax.set_yticks(range(len(there)), there)
    ax.invert_yaxis()
    ax.set(xlim=(-0.02, 1.02), xlabel=f"{unit}: seeds, mean, 95 % t-interval")
    save(fig, path)
    plt.close(fig)


def draw_drift(path_of_lines, path):
    """R2 of the i-th latent, fed with the model's own before it (lines) and real ones (dashes)."""
    plt = pyplot()
    found = by_run(read_runs(path_of_lines), DRIFT, Number("", "probe.along"))
    check_found(found, path_of_lines, DRIFT)
    fig = plt.figure(figsize=(6.4, 2.6))
    ax = fig.add_axes([0.1, 0.17, 0.76, 0.8])
    names = []
    for (name, seeds), colour in zip(found.items(), COLOURS):
        for kind, style in (("own", "-"), ("forced", "--")):
            curves = [chain[kind] for chain in longest(seeds)]
            places = range(1, len(curves[0]) + 1)
            means = [sum(at) / len(at) for at in zip(*curves)]
            ax.plot(places, means, style, lw=1.6, color=colour)
            for curve in curves:
                ax.plot(places, curve, style, lw=0.6, alpha=0.3, color=colour)
            if kind == "own":
                names.append((name, means[-1], colour))
    ax.set(ylim=(-1, 1.05), xlabel="place of the latent", ylabel="R2 with its real feature")
    label(ax, names, 1.01, "right", size=9)
    ax.text(0.02, 0.06, "lines: fed its own; dashes: fed real ones", transform=ax.transAxes)
    save(fig, path)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------

FIGURES = {
    "examples": draw_accuracies,
    "drift": draw_drift,
    **{name: partial(draw_rows, rows) for name, rows in ROWS.items()},
}


def main():
    check_choices(globals(), figure=FIGURES)
    if results:
        stem = results.removesuffix(".jsonl")
        name = "" if figure == "examples" else f"-{figure}"
        FIGURES[figure](f"{stem}.jsonl", out or f"{stem}{name}.png")
        return
    if figure != "examples":
        raise SystemExit(
            f"--figure={figure} is of a study: give --results=results/toy, or the like"
        )
    folders = names_in(runs)
    if not folders:
        raise SystemExit("plot.py needs --runs=FOLDER,... or --results=results/toy")
    draw_curves(folders, out or log_of(folders[0]).with_name("curves.png"))


if __name__ == "__main__":
    start(main)
