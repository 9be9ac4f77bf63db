"""The paper's tables in miniature: every variant and control with seeds, and what the numbers carry.

Runs train.py, eval.py and probe.py once for each run and seed of RUNS, and appends a line to <results>.jsonl; a line that is
there is not run again, so the table grows over several sittings. Then writes <results>.md, from the lines alone.

    python toy.py data --data_folder=out/ablate/toy --n_train=16000
    python ablate.py                                        # goes on where it stopped; --only="GAP,LH+DA" --seeds=4,5
    python ablate.py --report=1                             # only rewrite the tables
    python ablate.py --launch="torchrun --nproc-per-node 8" --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl ...
"""

import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from data import append, key_of, load_examples, open_append, read_lines, start, write_then_rename
from eval import mcnemar

# ---------------------------------------------------------------------------------------------------
base = "toy/base"
data = "out/ablate/toy/train.jsonl"  # a run trains on its first `examples` lines
val_data = "out/ablate/toy/val.jsonl"
test_data = "out/ablate/toy/test.jsonl"
out = "out/ablate"  # working files, a folder a base: targets and PCA are kept, checkpoints and answers deleted after each run
results = "results/toy"  # .jsonl and .md
examples = (
    250  # few enough to be off the ceiling: with 1,000 every latent method solves nearly everything
)
seeds = "1,2,3"
only = ""  # names of runs, with commas between
report = False  # run nothing
interventions_at = (
    1000  # training examples of the GAP run whose latents are intervened on; 0: the main one (7B)
)
easy = "1 moves"  # the category reported apart, which needs no latents; "" for none
launch = ""  # "": this python; 7B: torchrun --nproc-per-node 8
sample_args = ""  # further --key=value of sample_difficulty.py; 7B: --dtype=bfloat16 --max_new_tokens=2048 --batch=16
fit_args = ""  # of fit_pca.py
train_args = "--max_steps=800 --global_batch=16"  # of train.py
eval_args = ""  # of eval.py
probe_args = ""  # of probe.py
# ---------------------------------------------------------------------------------------------------

FIT = (
    "K",
    "mode",
    "retained",
    "basis",
    "centre",
)  # settings of fit_pca.py; the others are train.py's
NO_DA = {"difficulty": ""}
MAIN = {
    "text": {"method": "text"},
    "output": {"method": "output"} | NO_DA,
    "LH": {"method": "lh"} | NO_DA,
    "LH+DA": {"method": "lh"},
    "LH+PCA": NO_DA,
    "GAP": {},
}
SIZES = (500, 1000, 4000, 16000)
RUNS = [  # groups, most important first: settings of train.py and fit_pca.py; None is no training
    {"base": None} | MAIN,
    # what asks about the head is asked of LH + PCA: with latents everywhere, seeds differ least
    {
        name: NO_DA | run
        for name, run in {
            "random basis": {"basis": "random"},
            "no mean": {"centre": False},
            "matched full head": {"method": "matched"},
            "frozen linear head": {"method": "frozen"},
            "wide head": {"method": "wide"},
        }.items()
    },
    {f"retained {share:.0%}": NO_DA | {"retained": share} for share in (0.85, 0.90, 0.99)}
    | {"wide head 99%": NO_DA | {"method": "wide", "retained": 0.99}},
    *(
        {
            f"{name} n={n}": MAIN[name] | {"examples": n}
            for name in ("GAP", "LH+DA", "LH+PCA", "LH", "text", "output")
        }
        for n in SIZES
    ),
    {f"K={K}": NO_DA | {"K": K} for K in (1, 9, 16, 36)}
    | {f"LH K={K}": MAIN["LH"] | {"K": K} for K in (16, 36)},
    # the toy's pictures are 2 x 2 tokens: with K = 4 both modes are one, with more pool repeats them and resize draws them larger
    {
        "resize K=16": NO_DA | {"mode": "resize", "K": 16},
        "scheduled sampling": NO_DA | {"scheduled_sampling": True},
        "no parser text": NO_DA | {"write_parser": False},
        "parser dropped": {"keep_parser": False},
    },
    {"lambda=0.1": NO_DA | {"lambda_latent": 0.1}, "lambda=10": NO_DA | {"lambda_latent": 10.0}},
    # the toy has no options, but a guess is right once in 72: the guess-aware rule wants two of eight, which is tau = 1/8
    {"guess-aware": {"tau": 0.125}, "tau=0.25": {"tau": 0.25}, "tau=0.5": {"tau": 0.5}},
]
EVALS = {
    kind: {"intervention": kind}
    for kind in ("zero", "noise", "mean", "shuffle", "oracle", "oracle_pca")
} | {
    "clean": {"save_latents": True},
    "EMA": {"ema_beta": 0.9},
    "parser skipped": {"after_latents": " </think> <answer>"},
    "one by one": {"batch": 1, "limit": 50},
}  # the last is timed
MORE = dict.fromkeys(("LH", "LH+DA", "LH+PCA", "GAP"), ("oracle",)) | {
    "output": ("EMA", "oracle"),
    "GAP*": ("zero", "noise", "mean", "shuffle", "oracle", "oracle_pca", "parser skipped"),
}

# ---------------------------------------------------------------------------------------------------
# running


def call(script, extra, **settings):
    """Run a script of this folder; raises SystemExit with the end of its output if it fails."""
    start = (
        shlex.split(launch) if launch and script != "probe.py" else [sys.executable]
    )  # probe.py is one process
    command = [*start, str(Path(__file__).parent / script), *shlex.split(extra)]
    done = subprocess.run(
        command + [f"--{k}={v}" for k, v in settings.items()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} with {settings} failed:\n{done.stdout[-3000:]}")


def sized(name):
    """The run that a name in SCORES or MORE means: a star stands for `interventions_at` examples."""
    return name.replace("*", f" n={interventions_at}" if interventions_at else "")


def evals_of(name):
    """The evaluations of a run: clean, what MORE has for it or for its method at any size, and the timed one."""
    more = MORE["GAP*"] if name == sized("GAP*") else MORE.get(name.partition(" n=")[0], ())
    return ["clean", *more, "one by one"]


def settings_for(name):
    """What determines a run, its seed and files apart."""
    run = next(group[name] for group in RUNS if name in group)
    return {
        "run": run,
        "examples": (run or {}).get("examples", examples),
        "evals": evals_of(name),
        "sample_args": sample_args,
        "fit_args": fit_args,
        "train_args": train_args,
        "eval_args": eval_args,
    }


def first_lines(n):
    """The data file of the first n examples, beside `data`, to which image paths are relative; the whole file for 0."""
    lines = Path(data).read_bytes().splitlines(keepends=True)
    if n > len(lines):
        raise SystemExit(f"{data} has {len(lines)} examples; a run needs {n}")
    if not n:
        return data
    path, text = Path(data).with_name(f"{Path(data).stem}-{n}.jsonl"), b"".join(lines[:n])
    if not path.exists() or path.read_bytes() != text:
        write_then_rename(path, lambda p: p.write_bytes(text))
    return str(path)


def fitted(work, file, fit):
    """The folder in `work` of targets and PCA for a data file and settings of fit_pca.py, made once."""
    folder = work / f"pca-{key_of(fit | {'args': fit_args}, file)}"
    if not (folder / "pca.safetensors").exists():
        call("fit_pca.py", fit_args, base=base, data=file, val_data=val_data, out=folder, **fit)
    return folder


def answers(folder, rows):
    """What eval.py left: which questions were right, a hexadecimal number of bits a category, and the mean costs."""
    metrics = json.loads((folder / "metrics.json").read_text())
    found = {row["id"]: row for row in read_lines(folder / "scored.jsonl")}
    bits = {}
    for row in rows:
        bits.setdefault(row.get("category", ""), []).append("01"[found[row["id"]]["correct"]])
    every = metrics["scores"]["overall"]
    return {"right": {c: [len(b), f"{int(''.join(b), 2):x}"] for c, b in bits.items()}} | {
        field: every[field] for field in ("tokens", "latents", "opened_latents", "n_truncated")
    }


def one_run(folder, settings, seed, file, rows):
    """Train, answer under every evaluation, probe, all under `folder`: what a line of results says of the run."""
    work, model, line, run = folder.parent, folder / "model", {}, settings["run"]
    if run is None:
        model = base
    else:
        own = {k: v for k, v in run.items() if k not in FIT and k != "examples"}
        pca = fitted(work, file, {k: v for k, v in run.items() if k in FIT})
        call(
            "train.py",
            train_args,
            **{
                "base": base,
                "data": file,
                "val_data": val_data,
                "pca": pca,
                "out": model,
                "seed": seed,
                "difficulty": work / "difficulty.jsonl",
                "eval_every": 10**9,
            }
            | own,
        )
        first, *log = read_lines(model / "log.jsonl") or [{}]
        if not log:
            raise SystemExit(
                f"{model / 'log.jsonl'} holds no steps of this run; delete {folder} to train it again"
            )
        line |= {
            "git": first["git"],
            "torch": first["torch"],
            "val_r2": log[-1].get("val_r2"),
            "val_ce": log[-1]["val_ce"],
            "steps_per_s": 1 / statistics.median(step["seconds"] for step in log),
        }
    line["evals"] = {}
    for kind in settings["evals"]:
        change = EVALS[kind] | (
            {"donor": folder / "clean" / "latents"} if kind == "shuffle" else {}
        )
        call(
            "eval.py",
            eval_args,
            **{"model": model, "data": test_data, "out": folder / kind} | change,
        )
        if kind == "one by one":
            times = [
                p["seconds"]
                for f in (folder / kind).glob("predictions.rank*.jsonl")
                for p in read_lines(f)
            ]
            line["ms_per_answer"] = 1000 * statistics.median(times)
        else:
            line["evals"][kind] = answers(folder / kind, rows)
    call("probe.py", probe_args, model=model, data=test_data, out=folder / "probe")
    found = json.loads((folder / "probe" / "probe.json").read_text())
    line["probe"] = {
        k: found[k] for k in ("growth", "predicted", "real", "agreement") if k in found
    }
    return line


def run_all():
    """Every run that has no line yet, group by group and, in a group, seed by seed."""
    rows, weights = (
        load_examples(test_data, training=False),
        key_of({}, *sorted(Path(base).glob("*.safetensors"))),
    )
    names = [name for group in RUNS for name in group]
    if wrong := [s for s in seeds.split(",") if not s.isdigit()]:
        raise SystemExit(
            f"seeds={seeds!r}: expected numbers with commas between, as in 1,2,3; found {wrong[0]!r}"
        )
    wanted = only.split(",") if only else names
    if unknown := set(wanted) - set(names):
        raise SystemExit(
            f"only={only!r}: no such run {sorted(unknown)[0]!r}; there are: {', '.join(names)}"
        )
    done = lambda: {
        (line["name"], line["seed"], line["key"]) for line in read_lines(results + ".jsonl")
    }  # noqa: E731
    work = Path(out) / weights  # another base, other targets and difficulties
    difficulty = work / "difficulty.jsonl"
    if not difficulty.exists():  # whole counts, which decide every tau
        call(
            "sample_difficulty.py",
            sample_args,
            base=base,
            data=data,
            out=difficulty,
            early_stop=False,
        )
    todo = []
    for group in RUNS:
        for seed in seeds.split(","):
            for name in group:
                if name in wanted and (group[name] is not None or seed == seeds.split(",")[0]):
                    file = first_lines(settings_for(name)["examples"])
                    key = key_of(settings_for(name) | {"weights": weights}, file, test_data)
                    todo += [(name, int(seed), file, key)] * ((name, int(seed), key) not in done())
    with open_append(results + ".jsonl") as f:
        bar = tqdm(todo, unit="run", desc="ablate")
        for name, seed, file, key in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            if (name, seed, key) in done():  # by another sitting, meanwhile
                continue
            line = {"name": name, "seed": seed, "key": key, "settings": settings_for(name)}
            folder = work / f"{key}-{seed}"
            line |= one_run(folder, settings_for(name), seed, file, rows)
            append(
                f, json.loads(json.dumps(line), parse_float=lambda x: float(f"{float(x):.4g}"))
            )  # four digits are enough
            shutil.rmtree(folder)
            write_report()


# ---------------------------------------------------------------------------------------------------
# what the numbers carry

T975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # Student's t for 1 to 9 degrees of freedom and more


def mean_interval(x):
    """The mean of a few numbers, one a seed, and its 95 % t-interval; infinitely wide for one."""
    mean = sum(x) / len(x)
    if len(x) == 1:
        return mean, -math.inf, math.inf
    half = T975[min(len(x) - 2, 8)] * statistics.stdev(x) / math.sqrt(len(x))
    return mean, mean - half, mean + half


def read_results():
    """{run: {seed: line}} of the lines that were made with today's settings; the untrained base counts for every seed."""
    lines = {}
    for line in read_lines(results + ".jsonl"):
        if any(line["name"] in group for group in RUNS) and line["settings"] == settings_for(
            line["name"]
        ):
            lines.setdefault(line["name"], {})[line["seed"]] = line
    if "base" in lines:
        lines["base"] = dict.fromkeys(
            sorted({s for found in lines.values() for s in found}), *lines["base"].values()
        )
    return lines


def right(line, kind, wanted):
    """Right (1) and wrong (0) answers under an evaluation, in the test set's order; `wanted`: hard, easy, all or a category."""
    chosen = [
        x
        for c, x in line["evals"][kind]["right"].items()
        if wanted in (c, "easy" if c == easy else "hard", "all")
    ]
    return [int(b) for n, digits in chosen for b in f"{int(digits, 16):0{n}b}"]


def value(line, kind, measure):
    """A number of a line, or None: an accuracy (hard, easy, all, a category), a mean cost, or a path as probe.real.cosine."""
    at = line["evals"].get(kind, {})
    if measure in at:
        return at[measure]
    if answers := right(line, kind, measure) if at else []:
        return sum(answers) / len(answers)
    x = line
    for field in measure.split("."):
        x = x.get(field) if x else None
    return x


def values(lines, what, measure="hard"):
    """{seed: number} of a `run`, or of `run/evaluation`."""
    name, _, kind = what.partition("/")
    found = {
        seed: value(line, kind or "clean", measure) for seed, line in lines.get(name, {}).items()
    }
    return {seed: x for seed, x in found.items() if x is not None}


def difference(lines, a, b, measure="hard"):
    """The mean of a - b, paired by seed, its interval and the number of seeds; None where no seed has both."""
    a, b = values(lines, a, measure), values(lines, b, measure)
    seeds = sorted(a.keys() & b.keys())
    return (*mean_interval([a[s] - b[s] for s in seeds]), len(seeds)) if seeds else None


def paired_p(lines, a, b, measure="hard"):
    """McNemar's p of two runs' answers, the questions of all common seeds together."""
    both = []
    for what in (a, b):
        name, _, kind = what.partition("/")
        both.append(
            {s: right(line, kind or "clean", measure) for s, line in lines.get(name, {}).items()}
        )
    seeds = sorted(both[0].keys() & both[1].keys())
    return mcnemar(*([x for s in seeds for x in found[s]] for found in both))


def shown(d):
    """A difference with its interval as text."""
    mean, low, high, n = d
    return f"{mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if n > 1 else " (one seed)")


def mean_sd(x, digits=3):
    """Numbers, one a seed, as mean and standard deviation."""
    x = list(x)
    if not x:
        return ""
    return f"{sum(x) / len(x):.{digits}f}" + (
        f" ± {statistics.stdev(x):.{digits}f}" if len(set(x)) > 1 else ""
    )


def verdict(d):
    """Does a claim that a - b > 0 hold here, as far as the interval of the difference tells?"""
    return "not run yet" if d is None else "yes" if d[1] > 0 else "no" if d[2] < 0 else "undecided"


def sentences(lines, claims, paper):
    """One sentence over claims (text, more, less, measure), a line each, and the claims with their intervals."""
    found = [(text, difference(lines, a, b, measure)) for text, a, b, measure in claims]
    n = {
        word: sum(verdict(d) == word for _, d in found)
        for word in ("yes", "no", "undecided", "not run yet")
    }
    whole = (
        f"The toy agrees with the paper on {n['yes']} of {len(found)} findings, disagrees on {n['no']}"
        if paper
        else f"Of {len(found)} expectations {n['yes']} hold here, {n['no']} do not"
    )
    whole += f"; {n['undecided']} undecided" + f", {n['not run yet']} not run yet" * bool(
        n["not run yet"]
    )
    return [
        whole + ".",
        "",
        *(f"- {text}: **{verdict(d)}**, {shown(d)}, seeds: {d[3]}" for text, d in found if d),
    ]


def markdown(head, rows):
    return [
        "",
        *("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]),
        "",
    ]


def not_run(names):
    return [f"Not run yet: {', '.join(names)}.", ""] * bool(names)


def accuracy_table(lines, rows, reference, paper):
    """Rows {run or run/evaluation: the paper's number}: accuracies, and the difference on hard questions to a reference."""
    cells, absent = [], [what for what in rows if what.partition("/")[0] not in lines]
    for what, number in rows.items():
        if what in absent:
            continue
        d = difference(lines, what, reference) if what != reference else None
        p = paired_p(lines, what, reference) if d else None
        p = "" if p is None else f"{p:.2g}" if p > 1e-99 else "< 1e-99"
        cells.append(
            [
                what,
                len(lines[what.partition("/")[0]]),
                *(mean_sd(values(lines, what, m).values()) for m in ("hard", "easy", "val_r2")),
                shown(d) if d else "",
                p,
                number,
            ]
        )
    return [
        *markdown(
            ["run", "seeds", "hard", easy or "easy", "R2", f"hard, minus {reference}", "p", paper],
            cells,
        ),
        *not_run(absent),
    ]


SCORES = [  # (title, the paper's column, {run: the paper's number}, reference, [(finding or expectation, more, less)])
    (
        "Main table",
        "7B: Avg-P, Avg-R",
        {
            "base": "57.66, 52.62",
            "text": "59.40, 47.24",
            "output": "Monet 59.58, 47.99; LVR 60.75, 47.66",
            "output/EMA": "",
            "LH": "59.03, 49.15",
            "LH+DA": "59.68, 50.05",
            "LH+PCA": "60.40, 52.48",
            "GAP": "61.32, 53.97",
        },
        "GAP",
        [
            ("GAP beats the base", "GAP", "base"),
            ("GAP beats dense-caption SFT", "GAP", "text"),
            ("GAP beats output-as-input", "GAP", "output"),
            ("GAP beats LH", "GAP", "LH"),
            ("difficulty-aware data helps the full head", "LH+DA", "LH"),
            ("the PCA head helps without it", "LH+PCA", "LH"),
            ("the PCA head helps with it", "GAP", "LH+DA"),
            ("difficulty-aware data helps the PCA head", "GAP", "LH+PCA"),
            ("EMA calibration helps output-as-input", "output/EMA", "output"),
            ("difficulty-aware data helps the full head, all questions", "LH+DA", "LH", "all"),
            ("difficulty-aware data helps the PCA head, all questions", "GAP", "LH+PCA", "all"),
        ],
    ),
    (
        "Retained variance (here without difficulty-aware data)",
        "7B: Avg-3",
        {
            "LH": "67.40",
            "retained 85%": "67.63",
            "retained 90%": "67.69",
            "LH+PCA": "69.22",
            "retained 99%": "",
            "wide head": "",
            "wide head 99%": "",
        },
        "LH+PCA",
        [
            ("95 % beats 85 %", "LH+PCA", "retained 85%"),
            ("95 % beats 90 %", "LH+PCA", "retained 90%"),
            ("85 % beats the full head", "retained 85%", "LH"),
        ],
    ),
    (
        "Interventions on GAP's latents",
        "7B: mean of two",
        {
            "base": "68.31",
            "text*": "68.79",
            "GAP*/zero": "70.33",
            "GAP*/noise": "69.69",
            "GAP*": "72.13",
            "GAP*/mean": "",
            "GAP*/shuffle": "",
            "GAP*/oracle": "",
            "GAP*/oracle_pca": "",
        },
        "GAP*",
        [
            ("clean beats noise", "GAP*", "GAP*/noise"),
            ("clean beats zero", "GAP*", "GAP*/zero"),
            ("zero beats noise", "GAP*/zero", "GAP*/noise"),
            ("zero beats dense-caption SFT", "GAP*/zero", "text*"),
        ],
    ),
    (
        "The real auxiliary features in place of the latents",
        "",
        {
            "output/oracle": "",
            "LH/oracle": "",
            "LH+DA/oracle": "",
            "LH+PCA/oracle": "",
            "GAP": "",
            "GAP/oracle": "",
        },
        "GAP",
        [
            ("better latents would help GAP", "GAP/oracle", "GAP"),
            ("better latents would help LH+PCA", "LH+PCA/oracle", "LH+PCA"),
            ("GAP reads real features as well as LH+PCA", "GAP/oracle", "LH+PCA/oracle"),
        ],
    ),
    (
        "Latent budget (the toy's picture has four cells: 36 is too many; here without difficulty-aware data)",
        "7B: Avg-3 at 0, 4, 16, 36, 64, 144",
        {
            "text": "66.03",
            "K=1": "",
            "LH+PCA": "67.56",
            "K=9": "",
            "K=16": "69.11",
            "resize K=16": "",
            "K=36": "69.22; 64: 68.68; 144: 67.91",
            "LH": "",
            "LH K=16": "",
            "LH K=36": "",
        },
        "LH+PCA",
        [
            ("four latents beat none", "LH+PCA", "text"),
            ("four beat one", "LH+PCA", "K=1"),
            ("too many cost", "LH+PCA", "K=36"),
        ],
    ),
    (
        "Controls that the paper lacks (without difficulty-aware data)",
        "what differs from LH+PCA",
        {
            "LH+PCA": "",
            "random basis": "a random orthonormal basis of the same k",
            "no mean": "mu = 0",
            "matched full head": "d -> m -> d with as many weights as the PCA head",
            "LH": "d -> d -> d",
            "wide head": "c = P_k^T h + an MLP d -> d -> k",
            "frozen linear head": "c = P_k^T h, nothing trained in it",
        },
        "LH+PCA",
        [
            ("the PCA basis beats a random one", "LH+PCA", "random basis"),
            ("the mean helps", "LH+PCA", "no mean"),
            ("the PCA head beats a full head of as many weights", "LH+PCA", "matched full head"),
            ("training the head helps", "LH+PCA", "frozen linear head"),
            ("at the full head's capacity, the subspace helps", "wide head", "LH"),
            ("the same with 99 % of the variance", "wide head 99%", "LH"),
            ("a full head beats output-as-input", "LH", "output"),
            ("with 500 examples a full head beats output-as-input", "LH n=500", "output n=500"),
            ("with 16 latents the PCA head beats the full one", "K=16", "LH K=16"),
            ("with 36 latents the PCA head beats the full one", "K=36", "LH K=36"),
            ("16 latents of a larger picture beat four cells repeated", "resize K=16", "K=16"),
        ],
    ),
    (
        "Which questions get latents",
        "",
        {
            "GAP": "tau = 0",
            "guess-aware": "tau = 1/8 here",
            "tau=0.25": "",
            "tau=0.5": "",
            "LH+PCA": "tau = 1: all",
            "parser dropped": "of the stripped examples",
            "GAP n=500": "tau = 0, about as many latent spans as LH+PCA",
        },
        "GAP",
        [
            ("the guess-aware rule beats tau = 0", "guess-aware", "GAP"),
            (
                "the guess-aware rule beats tau = 0 on the easy questions",
                "guess-aware",
                "GAP",
                "easy",
            ),
            ("keeping the parser text helps", "GAP", "parser dropped"),
            (
                "with as many latent spans, GAP is ahead of latents everywhere",
                "GAP n=500",
                "LH+PCA",
            ),
        ],
    ),
    (
        "Training choices (without difficulty-aware data)",
        "",
        {
            "LH+PCA": "lambda = 1, pool, teacher forcing",
            "lambda=0.1": "",
            "lambda=10": "",
            "scheduled sampling": "",
            "no parser text": "neither in training nor after",
            "GAP*": "",
            "GAP*/parser skipped": "at inference only",
        },
        "LH+PCA",
        [
            ("lambda = 1 beats 0.1", "LH+PCA", "lambda=0.1"),
            ("lambda = 1 beats 10", "LH+PCA", "lambda=10"),
            ("scheduled sampling helps", "scheduled sampling", "LH+PCA"),
            ("the parser text helps", "LH+PCA", "no parser text"),
            (
                "a model trained with the parser text needs it at inference",
                "GAP*",
                "GAP*/parser skipped",
            ),
        ],
    ),
]


def diagnosis(lines):
    """The paper's Fig. 2 in numbers, from probe.py."""
    rows = []
    for name in ("base", "text", "output", "LH", "LH+DA", "LH+PCA", "GAP"):
        cell = lambda path, digits: mean_sd(values(lines, name, f"probe.{path}").values(), digits)  # noqa: B023, E731
        beside = lambda a, b, digits: (
            f"{cell(a, digits)} ({cell(b, digits)})" if cell(a, digits) else ""
        )  # noqa: B023, E731
        rows.append(
            [
                name,
                *(
                    f"{cell(f'growth.{x}.before', 1)}; {cell(f'growth.{x}.after', 1)}"
                    for x in ("text", "image")
                ),
                cell("predicted.mean_log", 2),
                cell("real.mean_log", 2),
                cell("predicted.inside", 3),
                *(beside(f"predicted.{x}", f"real.{x}", 2) for x in ("effective_rank", "cosine")),
                cell("agreement.r2", 3),
                beside("agreement.retrieval_at_1", "agreement.chance", 3),
            ]
        )
    rows.append(["paper, 7B", "546; -", "8.7; -", "3.53", "3.94 (query)", "1", "", "", "", ""])
    return [
        "## Diagnosis",
        "",
        "Norms as multiples of the input embeddings' before and after the final norm; natural "
        "logarithms of L2 norms; the share of the latents' energy in the PCA subspace; rank and cosine of an example's "
        "latents about mu (in brackets: of the real features).",
        *markdown(
            [
                "run",
                "text state / input",
                "image state / input",
                "log norm of latents",
                "of real features",
                "in the subspace",
                "effective rank",
                "pairwise cosine",
                "R2",
                "retrieval at 1 (chance)",
            ],
            rows,
        ),
        *sentences(
            lines,
            [
                (
                    "GAP's latents lie deeper in the subspace than the full head's",
                    "GAP",
                    "LH+DA",
                    "probe.predicted.inside",
                ),
                (
                    "GAP's latents find their own picture more often",
                    "GAP",
                    "LH+DA",
                    "probe.agreement.retrieval_at_1",
                ),
                (
                    "output-as-input latents are longer than GAP's",
                    "output",
                    "GAP",
                    "probe.predicted.mean_log",
                ),
            ],
            True,
        ),
        "",
    ]


def scarcity(lines):
    """Accuracy by number of training examples, and where the PCA head pays."""
    at = lambda name, n: name if n == examples else f"{name} n={n}"  # noqa: E731
    sizes = [n for n in sorted({*SIZES, examples}) if any(at(name, n) in lines for name in MAIN)]
    rows = [[name, *(mean_sd(values(lines, at(name, n)).values()) for n in sizes)] for name in MAIN]
    where_it_pays = []
    for a, b in (("GAP", "LH+DA"), ("LH+PCA", "LH")):
        gaps = {n: difference(lines, at(a, n), at(b, n)) for n in sizes}
        rows.append([f"{a} minus {b}", *(shown(d) if d else "" for d in gaps.values())])
        where = {
            word: [f"{n:,}" for n, d in gaps.items() if d and test(d)]
            for word, test in (
                ("pays", lambda d: d[1] > 0),
                ("costs", lambda d: d[2] < 0),
                ("is undecided", lambda d: d[1] <= 0 <= d[2]),
            )
        }
        found = "; ".join(
            f"{word} at {', '.join(at_n) or 'no size'}" for word, at_n in where.items()
        )
        found = found if any(gaps.values()) else "has not been run"
        where_it_pays.append(f"- The PCA head in place of the full one ({a} against {b}) {found}.")
    return [
        "## Scarce data",
        "",
        "Hard questions by the number of training examples, at the same number of steps.",
        *markdown(["run", *(f"{n:,}" if n else "all" for n in sizes)], rows),
        *not_run([at(name, n) for n in SIZES for name in MAIN if at(name, n) not in lines]),
        *where_it_pays,
    ]


def by_category(lines):
    """Longer chains feed back more of their own latents: does the subspace stop the drift?"""
    names = ("text", "output", "LH", "LH+DA", "LH+PCA", "GAP")
    categories = sorted(
        {
            c
            for name in names
            for line in lines.get(name, {}).values()
            for c in line["evals"]["clean"]["right"]
        }
    )
    return [
        "## Longer chains",
        *markdown(
            ["run", *categories],
            [
                [name, *(mean_sd(values(lines, name, c).values()) for c in categories)]
                for name in names
            ],
        ),
        *sentences(
            lines,
            [
                (f"{a} beats {b} on {c}", a, b, c)
                for a, b in (("GAP", "LH+DA"), ("LH+PCA", "LH"))
                for c in categories
            ],
            False,
        ),
    ]


def costs(lines):
    """Speed against the text run of the same seed; tokens and latents an answer."""
    rows = []
    for name in (
        "text",
        "output",
        "LH",
        "LH+PCA",
        "GAP",
        "K=1",
        "K=9",
        "K=16",
        "K=36",
        sized("GAP*/parser skipped"),
        "no parser text",
    ):
        run = name.partition("/")[0]
        if run not in lines:
            continue
        pairs = [
            (line, lines["text"][s]) for s, line in lines[run].items() if s in lines.get("text", {})
        ]
        ratio = lambda f: mean_sd([f(a) / f(b) for a, b in pairs], 2)  # noqa: E731
        rows.append(
            [
                name,
                ratio(lambda x: x["steps_per_s"]) if run == name else "",
                ratio(lambda x: x["ms_per_answer"]) if run == name else "",
                *(mean_sd(values(lines, name, m).values(), 1) for m in ("tokens", "latents")),
            ]
        )
    return [
        "## Cost",
        "",
        "Ratios to dense-caption SFT of the same seed, one question at a time, in seconds on a shared "
        "machine: the counts are exact, the ratios are not. Paper: 36 latents take 1.61 times as long.",
        *markdown(
            [
                "run",
                "steps a second, ratio",
                "time an answer, ratio",
                "positions an answer",
                "of them latents",
            ],
            rows,
        ),
    ]


def write_report():
    """Write <results>.md from <results>.jsonl alone."""
    lines = read_results()
    some = list(
        {
            line["key"] + str(line["seed"]): line
            for found in lines.values()
            for line in found.values()
        }.values()
    )
    if not some:
        raise SystemExit(f"{results}.jsonl has no run with these settings yet; run ablate.py first")
    n = {w: len(right(some[0], "clean", w)) for w in ("hard", "easy")}
    revisions = sorted({line["git"][:7] for line in some if "git" in line})
    sections = []
    for title, column, rows, reference, claims in SCORES:
        rows, claims = (
            {sized(what): x for what, x in rows.items()},
            [(text, *map(sized, c)) for text, *c in claims],
        )
        sections.append(
            [
                "",
                f"## {title}",
                *accuracy_table(lines, rows, sized(reference), column),
                *sentences(lines, [(*c, "hard")[:4] for c in claims], column.startswith("7B")),
            ]
        )
    main, variance, interventions, budget, *beyond = sections
    text = [
        "# The toy's tables",
        "",
        "Written by `ablate.py` from the lines beside it; do not edit.",
        "",
        f"{len(some)} runs: {examples or 'all'} examples unless said, `{train_args}`, {n['hard']} hard and {n['easy']} easy test "
        "questions, greedy. Accuracies are means over seeds ± their standard deviation. R2 is that of the latents on validation "
        "data, teacher-forced. A difference is paired by seed; its 95 % t-interval is over seeds, on this test set. p is "
        'McNemar\'s, exact, over the questions of all seeds, not corrected for the number of tests. "Yes" and "no" mean that '
        'the interval excludes zero, "undecided" that it does not. '
        + f"Revisions: {', '.join(revisions)}."
        * bool(revisions),
        "",
        *diagnosis(lines),
        *main,
        "",
        *by_category(lines),
        *variance,
        *interventions,
        *budget,
        "",
        *costs(lines),
        *[x for section in beyond for x in section],
        "",
        *scarcity(lines),
        "",
    ]
    write_then_rename(results + ".md", lambda p: p.write_text("\n".join(text)))
    print(f"wrote {results}.md: {len(some)} runs")


def main():
    if not report:
        run_all()
    write_report()


if __name__ == "__main__":
    start(main)
