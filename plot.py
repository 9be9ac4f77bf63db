"""How did it train, and what does data buy? Two figures, for whoever has matplotlib.

Reads log.jsonl of trained folders, or the lines that ablate.py leaves. Writes a PNG:

    python plot.py                                       # out/gap/curves.png
    python plot.py --runs=out/gap,out/text --out=curves.png     # runs side by side
    python plot.py --results=results/toy --out=results/toy.png  # accuracy against examples
"""

import math
from pathlib import Path

from data import check_fields, check_there, read_lines, write_then_rename
from launch import start
from report import mean_interval, value

# --------------------------------------------------------------------------------------------------
runs = "out/gap"  # folders of train.py, with commas between
out = ""  # a PNG; "": curves.png in the first folder, or <results>.png
results = ""  # what ablate.py wrote: its main figure instead of curves
methods = "text,output,LH,LH+PCA,LH+DA,GAP"  # of that figure, by the names of their runs
easy = "1 moves"  # the category that needs no latents and is left out of it
# --------------------------------------------------------------------------------------------------

# a panel each, of what shares a unit; a run has the fields of its method
PANELS = {
    "cross-entropy, nats a token": ("ce", "ce_prior", "leakage_ce"),
    "latent loss": ("latent",),
    "KL, nats a question": ("kl_forward", "kl_reverse"),
    "1 is perfect": ("r2", "cosine", "right_posterior", "right_prior", "leakage"),
    "error of the rollout": ("rollout_error",),
    "length of latents": ("norm_predicted", "norm_target"),
    "gradient norm": ("grad_norm",),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's
STYLES = ("-", "--", ":", "-.", (0, (1, 3)))
WINDOWS = 50  # a curve is the mean of so many windows of steps, over what each step was


def pyplot():
    """matplotlib, drawing without a screen. Raises SystemExit where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "no picture: matplotlib is not installed; pip install matplotlib, and run plot.py"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    return pyplot


def save(fig, path):
    write_then_rename(path, lambda tmp: fig.savefig(tmp, format="png", dpi=110))
    print(f"wrote {path}")


# --------------------------------------------------------------------------------------------------
# training curves


def read_log(folder):
    """{field: (steps, values)} of a run's log.jsonl, numbers that are finite only.

    Raises SystemExit if it has no step yet.
    """
    path = Path(folder) / "log.jsonl"
    check_there(path)
    _, *rows = read_lines(path) or [None]  # the first line has the settings
    if not rows:
        raise SystemExit(f"{path}: no steps yet")
    found = {}
    for row in rows:
        check_fields(row, {"step": int}, path)
        for field, x in row.items():
            if isinstance(x, (int, float)) and math.isfinite(x):
                steps, values = found.setdefault(field, ([], []))
                steps.append(row["step"])
                values.append(x)
    return found


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
    """A panel a unit; a colour a run, a style a field; dots are validation data."""
    plt = pyplot()
    logs = {folder: read_log(folder) for folder in folders}
    panels = {
        title: [field for field in fields if any(field in log for log in logs.values())]
        for title, fields in PANELS.items()
    }
    panels = {title: fields for title, fields in panels.items() if fields}
    if not panels:  # a run that has diverged at once holds no finite number
        raise SystemExit(f"{', '.join(map(str, folders))}: log.jsonl holds nothing to draw")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (3.4 * columns, 2.5 * lines)
    fig, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for ax, (title, fields) in zip(axes.flat, panels.items()):
        drawn = []
        for i, (folder, log) in enumerate(logs.items()):
            for j, field in enumerate(fields):
                drawn += draw_field(ax, log, field, curve_look(i, j, len(logs)), Path(folder).name)
        if wants_log(drawn):
            ax.set_yscale("log")
        ax.set_title(title, loc="left", fontsize=9)
        ax.legend(frameon=False, fontsize=7)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("step")
    if any(field.startswith("val_") for log in logs.values() for field in log):
        fig.supxlabel("dots: validation data", fontsize=7, x=0.99, ha="right")
    save(fig, path)
    plt.close(fig)


def curve_look(run, field, n_runs):
    """Colour and line style: a run alone has a colour a field."""
    if n_runs == 1:
        return {"color": COLOURS[field % len(COLOURS)]}
    return {"color": COLOURS[run % len(COLOURS)], "linestyle": STYLES[field % len(STYLES)]}


def draw_field(ax, log, field, look, run):
    """Draw a field of a run, and its validation. Returns the numbers that the axis must show."""
    shown = []
    if field in log:
        steps, values = log[field]
        ax.plot(steps, values, lw=0.5, alpha=0.2, color=look["color"])
        middle, means = windows(steps, values)
        ax.plot(middle, means, lw=1.4, label=f"{run}: {field}", **look)
        shown += means
    if f"val_{field}" in log:
        steps, values = log[f"val_{field}"]
        ax.plot(steps, values, "o", ms=4, color=look["color"])
        shown += values
    return shown


# --------------------------------------------------------------------------------------------------
# the ablation's main figure


def accuracies(lines):
    """{method: {examples: [accuracy on hard questions, one a seed]}} of ablate.py's lines."""
    found = {name.strip(): {} for name in methods.split(",")}
    for line in lines:
        name, _, _ = line["name"].partition(" n=")
        accuracy = value(line, "clean", "hard", easy)
        if name in found and accuracy is not None:
            found[name].setdefault(line["settings"]["examples"], []).append(accuracy)
    return {name: dict(sorted(sizes.items())) for name, sizes in found.items() if sizes}


def draw_accuracies(path_of_lines, path):
    """Accuracy against examples: means with 95 % t-intervals over seeds, each seed a faint dot."""
    plt = pyplot()
    lines = read_lines(path_of_lines, name=str, settings=dict, evals=dict)
    found = accuracies(lines)
    if not found:
        raise SystemExit(f"{path_of_lines}: no runs of {methods}")
    fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for i, (name, sizes) in enumerate(found.items()):
        colour = COLOURS[i % len(COLOURS)]
        shift = 1.03 ** (i - len(found) / 2)  # side by side, where many are at the ceiling
        at = [n * shift for n in sizes]
        stats = [mean_interval(seeds) for seeds in sizes.values()]
        means = [mean for mean, _, _ in stats]
        ax.plot(at, means, "o-", ms=4, lw=1.4, color=colour, label=name)
        for x, seeds, (_, low, high) in zip(at, sizes.values(), stats):
            ax.plot([x] * len(seeds), seeds, "o", ms=3, alpha=0.35, color=colour)
            if len(seeds) > 1:  # one seed says nothing of what another would give
                ax.plot([x, x], [max(0, low), min(1, high)], lw=0.8, color=colour)
    every = sorted({n for sizes in found.values() for n in sizes})
    ax.set(xscale="log", xlabel="training examples", ylabel="accuracy, hard questions")
    ax.set_xticks(every, [f"{n:,}" for n in every], minor=False)
    ax.set_xticks([], minor=True)
    ax.set_ylim(-0.02, 1.02)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(fig, path)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------


def main():
    if results:
        stem = results.removesuffix(".jsonl")
        draw_accuracies(f"{stem}.jsonl", out or f"{stem}.png")
        return
    folders = [name.strip() for name in runs.split(",") if name.strip()]
    if not folders:
        raise SystemExit("plot.py needs --runs=FOLDER,... or --results=results/toy")
    draw_curves(folders, out or Path(folders[0]) / "curves.png")


if __name__ == "__main__":
    start(main)
