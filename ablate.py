r"""Which variants are run, and how? The papers' tables in miniature, with controls and seeds.

For each run and seed of a study: fit_pca.py (GAP's), train.py, eval.py for each of its evaluations,
probe.py. One line per run is appended to <results>.jsonl, and what has a line is not run again: a
table grows over as many calls as it takes. Then report.py writes <results>.md from the lines alone.

    T="--longest=8 --n_train=4200"
    python toy.py data $T --data_folder=out/ablate/toy
    python toy.py data $T --data_folder=out/ablate/toy-steps --form=steps
    python toy.py data $T --data_folder=out/ablate/toy-named --form=named
    python toy.py edits $T --data_folder=out/ablate/toy
    python ablate.py                    # goes on where it stopped
    python ablate.py --only="GAP,LH+DA" --seeds=4,5
    python ablate.py --study=fresh --seeds=6,7,8,9,10,11,12,13
    python ablate.py --report=1         # only rewrite the tables
    python ablate.py --study=valr ...   # and amvl, gap: docs/valr-amvl.md, docs/ablations.md
    python ablate.py --launch="torchrun --nproc-per-node 8" \
        --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl ...
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from data import is_list, load_examples
from files import append, check_there, key_of, open_append, read_json, read_lines, write_then_rename
from launch import Progress, check_choices, end_with_parent, lock, names_in, start, use_idle_cores
from report import Study, latest, lines_of, write_tables

# --------------------------------------------------------------------------------------------------
study = "main"  # or fresh: what main left open; gap valr amvl: a paper's own tables
base = "toy/base"  # what every run starts from
data = "out/ablate/toy/train.jsonl"  # a run trains on its first `examples` lines
val_data = "out/ablate/toy/val.jsonl"  # for R2, at the end of training
test_data = "out/ablate/toy/test.jsonl"  # for every evaluation, and for probe.py
out = "out/ablate"  # working files, a folder per base; targets and PCA stay, checkpoints do not
results = ""  # the tables' path without .jsonl or .md; "": results/<study>; for main results/toy
edit_data = ""  # pairs for edits.py; "": edits.jsonl beside test_data, if there is one
examples = 1250  # few enough to be off the ceiling, enough to be off the floor
seeds = "1,2,3,4,5"
only = ""  # names of runs, with commas between
report = False  # only rewrite the tables, run nothing
interventions_at = 1000  # study gap: intervene on the run of this many examples; 0: of `examples`
easy = "1 moves"  # the category reported apart, which needs no latents; "" for none
launch = ""  # "": this python; 7B: torchrun --nproc-per-node 8
sample_args = ""  # further --key=value of sample_difficulty.py; the README has those for 7B
fit_args = ""  # of fit_pca.py
train_args = "--max_steps=800 --global_batch=16 --save_every=0"  # of train.py
eval_args = ""  # of eval.py
probe_args = ""  # of probe.py
# --------------------------------------------------------------------------------------------------

# What a run changes of the defaults of train.py and, for the names in FIT, of fit_pca.py (of
# train.py where a method has no PCA).
FIT = ("K", "mode", "retained", "basis", "centre")
NO_DA = {"difficulty": ""}  # every example with latents, as without difficulty-aware data
# further numbers of examples, for each main run but the base
SIZES = {"main": (2500,), "fresh": (), "gap": (500, 1000, 4000, 16000), "valr": (), "amvl": ()}

# fmt: off
MAIN = {
    "text":   {"method": "text"},
    "output": {"method": "output"} | NO_DA,
    "LH":     {"method": "lh"} | NO_DA,
    "LH+DA":  {"method": "lh"},
    "LH+PCA": NO_DA,
    "GAP":    {},
}
# a panel is one token of the tower; the toy needs more alignment than the paper's 0.5
VALR = {"method": "valr", "K": 4, "fed_gradient": True, "lambda_align": 2.0}
AMVL = {"method": "amvl", "K": 4}
# beside the others: VaLR's data have a picture per move, and two passes of up to eight roll it out;
# AMVL has eight slots and learns slowly
OTHERS = {
    "VaLR": VALR | {"K": 1, "layout": "steps", "min_pixels": 784, "rollout": 2},
    "AMVL": AMVL | {"K": 8, "lr": 3e-4, "write_parser": False},
}
# output as input that is fed its own states in training, too, where the text alone trains them:
# VaLR without alignment on the others' data, Coconut without its curriculum. "output" is as LVR's:
# it is fed the real features, and regressed on them
OWN_STATES = {"method": "valr", "K": 4, "lambda_align": 0.0, "whole_gradient": True}
# where VaLR learns: each move is named before its picture, the rollout is exact, gradients go
# through all of it, and psi learns more slowly
LONG = {"layout": "named", "min_pixels": 784, "max_steps": 1600}
LONG_RUNS = {
    "long VaLR": VALR | LONG | {"K": 1, "whole_gradient": True, "lr_head": 3e-4},
    "long text": LONG | {"method": "text"},
}
# fmt: on


AT_99 = {"retained": 0.99}

# the latent methods first: they are what scarce data is about
SCARCE = {name: MAIN[name] for name in ("GAP", "LH+DA", "LH+PCA", "LH", "text", "output")}


def at_sizes(runs, sizes):
    """A group for each number of examples: the runs on so many."""
    return [{f"{name} n={n}": runs[name] | {"examples": n} for name in runs} for n in sizes]


# By study groups, the most important first: each is run for all seeds before the next. None: not
# trained.
# fmt: off
RUNS = {"main": [
    {"base": None} | MAIN,
    OTHERS,
    {"own states": OWN_STATES},
    *at_sizes(SCARCE, SIZES["main"]),
    # do the span's two tokens help, or a vector that says nothing?
    {
        "markers": NO_DA | {"method": "markers"},
        "dummy":   NO_DA | {"method": "dummy"},
    },
    # why does difficulty-aware data cost here, and what that the paper leaves open mends it?
    {
        "easy 10%":       {"easy_latents": 0.1},
        "easy 25%":       {"easy_latents": 0.25},
        "first 200":      {"latents_first": 200},
        "parser dropped": {"keep_parser": False},
        "tau=0.5":        {"tau": 0.5},
        "LH+PCA n=750":   NO_DA | {"examples": 750},  # about as many with latents as GAP has
    },
    # where questions are many, does the PCA head lack what its subspace leaves out?
    *at_sizes({"LH+PCA 99%": NO_DA | AT_99}, SIZES["main"]),
    *at_sizes(OTHERS | {"own states": OWN_STATES}, SIZES["main"]),
    {"LH+PCA 99%": NO_DA | AT_99},
    # and where few have latents?
    {"GAP 99%": AT_99},
    *at_sizes({"GAP 99%": AT_99}, SIZES["main"]),
    # does a full head gain what the PCA head does, if it too starts about mu or has as few weights?
    {
        "LH from mu":        NO_DA | {"method": "lh_mu"},
        "matched from mu":   NO_DA | {"method": "matched_mu"},
        "matched full head": NO_DA | {"method": "matched"},
    },
    # do twice the data change what the two tokens are worth, or what a first phase mends?
    *at_sizes({
        "first 200": {"latents_first": 200},
        "markers":   NO_DA | {"method": "markers"},
        "dummy":     NO_DA | {"method": "dummy"},
    }, SIZES["main"]),
    # what does VaLR need to learn a chain, and is that more than text?
    *at_sizes(LONG_RUNS, (4200,)),
], "fresh": [
    # what the main study left open, for seeds that had no part in raising the question; one group,
    # so that a seed is done before the next
    {
        "LH":         MAIN["LH"],
        "LH+PCA":     NO_DA,
        "LH+PCA 99%": NO_DA | AT_99,
        "GAP":        {},
        "first 200":  {"latents_first": 200},
    } | at_sizes({
        "LH":         MAIN["LH"],
        "LH+DA":      MAIN["LH+DA"],
        "LH+PCA":     NO_DA,
        "LH+PCA 99%": NO_DA | AT_99,
    }, SIZES["main"])[0],
    # and a question that was raised later
    {"LH from mu": NO_DA | {"method": "lh_mu"}},
], "gap": [
    {"base": None} | MAIN,
    # what asks about the head is asked of LH+PCA: with latents everywhere, seeds differ least
    {
        "random basis":       NO_DA | {"basis": "random"},
        "no mean":            NO_DA | {"centre": False},
        "matched full head":  NO_DA | {"method": "matched"},
        "frozen linear head": NO_DA | {"method": "frozen"},
        "wide head":          NO_DA | {"method": "wide"},
    },
    {
        "retained 85%":  NO_DA | {"retained": 0.85},
        "retained 90%":  NO_DA | {"retained": 0.90},
        "retained 99%":  NO_DA | {"retained": 0.99},
        "wide head 99%": NO_DA | {"method": "wide", "retained": 0.99},
    },
    *at_sizes(SCARCE, SIZES["gap"]),
    {
        "K=1":     NO_DA | {"K": 1},
        "K=9":     NO_DA | {"K": 9},
        "K=16":    NO_DA | {"K": 16},
        "K=36":    NO_DA | {"K": 36},
        "LH K=16": MAIN["LH"] | {"K": 16},
        "LH K=36": MAIN["LH"] | {"K": 36},
    },
    # the toy's pictures are 2 x 2 tokens, for which both modes are one; with more latents pool
    # repeats these four, and resize draws the picture larger
    {
        "resize K=16":        NO_DA | {"mode": "resize", "K": 16},
        "scheduled sampling": NO_DA | {"scheduled_sampling": True},
        "no parser text":     NO_DA | {"write_parser": False},
        "parser dropped":     {"keep_parser": False},
    },
    {
        "lambda=0.1": NO_DA | {"lambda_latent": 0.1},
        "lambda=10":  NO_DA | {"lambda_latent": 10.0},
    },
    # the toy has no options, but a guess is right once in 72: the guess-aware rule asks for two
    # right answers of eight, which is tau = 1/8
    {
        "guess-aware": {"tau": 0.125},
        "tau=0.25":    {"tau": 0.25},
        "tau=0.5":     {"tau": 0.5},
    },
],
# a base that writes chains of thought without latents, "stage 1"; data whose steps have a picture
"valr": [
    {
        "stage 1":  None,
        "text":     {"method": "text"},  # the same steps, without latents
        "VaLR":     VALR,
        "lambda=0": VALR | {"lambda_align": 0.0},
    },
    {
        "lambda=0.5":  VALR | {"lambda_align": 0.5},
        "four passes": VALR | {"rollout": 4},
        "block 1":     VALR | {"align_layer": 1},
    },
    {
        "stopped gradient": VALR | {"fed_gradient": False},
        "block 4":          VALR | {"align_layer": 4},  # the last
        "one pass":         VALR | {"rollout": 1},
        "K=1":              VALR | {"K": 1},
    },
],
"amvl": [
    {
        "base":      None,
        "text":      {"method": "text"},
        "NTP":       AMVL | {"beta": 0.0, "gamma": 0.0},
        "+ forward": AMVL | {"gamma": 0.0},
        "+ reverse": AMVL | {"beta": 0.0},
        "AMVL":      AMVL,
    },
    {
        "gamma=1e-6": AMVL | {"gamma": 1e-6},
        "gamma=1e-5": AMVL | {"gamma": 1e-5},
    },
]}

# what a line keeps of probe.json
PROBED = ("growth", "predicted", "real", "agreement", "along")

# What an evaluation changes of the defaults of eval.py.
EVALS = {
    "clean":          {"save_latents": True},
    "zero":           {"intervention": "zero"},
    "noise":          {"intervention": "noise"},
    "mean":           {"intervention": "mean"},
    "shuffle":        {"intervention": "shuffle"},  # of the latents that "clean" saved
    "oracle":         {"intervention": "oracle"},
    "oracle_pca":     {"intervention": "oracle_pca"},
    "markers":        {"intervention": "markers"},
    "edits":          {"save_latents": True, "limit": 0},  # of pairs_file: both of each pair
    "EMA":            {"ema_beta": 0.9},
    "parser skipped": {"after_latents": " </think> <answer>"},
    "one by one":     {"batch": 1, "limit": 50},  # for the time an answer takes
}

# Evaluations beside "clean" and "one by one". Those of study gap are also those of a run's other
# sizes; GAP*: at interventions_at. edits: of pairs that differ in one thing, by edits.py.
TESTS = ("markers", "mean", "noise", "shuffle", "oracle", "edits")
VALR_TESTS = ("markers", "noise", "shuffle", "edits")
MORE = {"main": {
    "text":   ("edits",),
    "output": TESTS,
    "LH":     TESTS,
    "LH+DA":  TESTS,
    "LH+PCA": TESTS,
    "GAP":    TESTS,
    "VaLR":   VALR_TESTS,
    "own states": ("markers", "noise", "shuffle"),
    "long VaLR n=4200": VALR_TESTS,
    "AMVL":   ("zero", "noise", "shuffle", "edits"),
}, "fresh": {}, "gap": {
    "LH":     ("oracle",),
    "LH+DA":  ("oracle",),
    "LH+PCA": ("oracle",),
    "GAP":    ("oracle",),
    "output": ("EMA", "oracle"),
    "GAP*":   ("zero", "noise", "mean", "shuffle", "oracle", "oracle_pca", "parser skipped"),
}, "valr": {
    "VaLR":   ("zero", "noise", "shuffle"),
}, "amvl": {
    "AMVL":   ("zero", "noise", "shuffle"),
}}
# fmt: on

# --------------------------------------------------------------------------------------------------
# what determines a run


def star():
    """What a star in the name of a run stands for: the size at which latents are intervened on."""
    return f" n={interventions_at}" if study == "gap" and interventions_at else ""


def evals_of(name):
    """The evaluations of a run: clean, what MORE has for it, and the timed one."""
    if study == "gap":
        name = "GAP*" if name == "GAP" + star() else name.partition(" n=")[0]
    return ["clean", *MORE[study].get(name, ()), "one by one"]


def pairs_file():
    """The pairs for edits.py; None where none are given and none lie beside test_data."""
    if edit_data:
        return Path(edit_data)
    beside = Path(test_data).with_name("edits.jsonl")
    return beside if beside.is_file() else None


def settings_for(name, pairs=True):
    """What determines a run beside seed and files; pairs=False leaves out what edits.py asks."""
    run = next(group[name] for group in RUNS[study] if name in group)
    # left out where empty: the setting is newer than some lines, whose keys stay so
    probing = {"probe_args": probe_args} if probe_args else {}
    return probing | {
        "run": run,
        "examples": (run or {}).get("examples", examples),
        "evals": [kind for kind in evals_of(name) if pairs or kind != "edits"],
        "sample_args": sample_args,
        "fit_args": fit_args,
        "train_args": train_args,
        "eval_args": eval_args,
    }


# --------------------------------------------------------------------------------------------------
# one run


def call(script, extra, **settings):
    """Run a script of this folder; raises SystemExit with the end of its output if it fails.

    Another sitting may be making the same targets or counts: it is waited for.
    """
    python = [sys.executable]
    if launch and script not in ("probe.py", "edits.py"):  # which are one process
        python = shlex.split(launch)
    command = [*python, str(Path(__file__).parent / script), *shlex.split(extra)]
    command += [f"--{name}={value}" for name, value in settings.items()]
    while True:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            preexec_fn=end_with_parent,
        )
        if "another process is writing here" not in done.stdout:
            break
        time.sleep(5)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")


def laid_out(file, run):
    """A data file in a run's layout: the same questions, in the folder beside with "-<layout>"."""
    layout, path = (run or {}).get("layout", ""), Path(file)
    folder = path.parent.with_name(f"{path.parent.name}-{layout}") if layout else path.parent
    return folder / path.name


def first_lines(n, file):
    """A data file of the first n examples of a file; all of them for 0.

    It lies beside that, to which image paths are relative. Raises SystemExit if there are fewer.
    """
    check_there(file)
    if is_list(file):
        raise SystemExit(f"{file}: a JSON list; expected JSON lines: a run takes the first")
    lines = file.read_bytes().splitlines(keepends=True)
    if n > len(lines):
        raise SystemExit(f"{file} has {len(lines)} examples; a run needs {n}")
    if not n:
        return str(file)
    path = file.with_name(f"{file.stem}-{n}.jsonl")
    text = b"".join(lines[:n])
    if not path.exists() or path.read_bytes() != text:
        write_then_rename(path, lambda tmp: tmp.write_bytes(text))
    return str(path)


def fitted(work, file, fit):
    """The folder of targets and PCA for a data file and settings of fit_pca.py, made once."""
    # val_data's targets are made, too
    files = [file, *([val_data] if val_data else [])]
    folder = work / f"pca-{key_of(fit | {'args': fit_args}, *files)}"
    if not (folder / "pca.safetensors").exists():
        call("fit_pca.py", fit_args, base=base, data=file, val_data=val_data, out=folder, **fit)
    return folder


def read_by(run):
    """Names of train.py's settings with the files that a run's training reads beside the data."""
    from train import METHODS  # slow: FSDP, which a report and a usage error do without

    return () if run is None else METHODS[run.get("method", "gap")].reads


def trained(folder, run, seed, file):
    """Train a run into folder/model. Returns what its log says."""
    work, model = folder.parent, folder / "model"
    reads = read_by(run)
    # K and the like are fit_pca.py's where its PCA is read, else train.py's
    fit = {k: v for k, v in run.items() if "pca" in reads and k in FIT}
    own = {k: v for k, v in run.items() if k not in (*fit, "examples", "layout")}
    settings = {
        "base": base,
        "data": file,
        "val_data": val_data and laid_out(val_data, run),
        "out": model,
        "seed": seed,
        "eval_every": 0,  # validate at the end only
        "curves": 0,  # the folder is deleted
    }
    if "pca" in reads:
        settings["pca"] = fitted(work, file, fit)
    if "difficulty" in reads:
        settings["difficulty"] = work / "difficulty.jsonl"
    call("train.py", train_args, **(settings | own))

    log = read_lines(model / "log.jsonl")
    if len(log) < 2:
        raise SystemExit(
            f"{model / 'log.jsonl'} holds no steps of this run; delete {folder} to train it again"
        )
    first, *steps = log
    return {
        "git": first["git"],
        "torch": first["torch"],
        **{name: value for name, value in steps[-1].items() if name.startswith("val_")},
        "steps_per_s": 1 / statistics.median(step["seconds"] for step in steps),
    }


def evaluated(folder, kind, model):
    """Answer the test set under one of EVALS, into folder/kind, which is returned."""
    change = dict(EVALS[kind])
    if kind == "shuffle":
        change["donor"] = folder / "clean" / "latents"
    questions = pairs_file() if kind == "edits" else test_data
    settings = {"model": model, "data": questions, "out": folder / kind}
    call("eval.py", eval_args, **(settings | change))
    return folder / kind


def read_answers(folder, rows):
    """What eval.py left in a folder: which questions were right, and the mean costs.

    The right ones are {category: [questions, hexadecimal number of a bit per question]}.
    """
    scored = read_lines(folder / "scored.jsonl", id=(str, int), correct=(bool, int, float))
    correct = {row["id"]: row["correct"] for row in scored}
    bits = {}
    for row in rows:
        if row["id"] not in correct:  # --eval_args=--limit=N: not asked
            continue
        category = str(row.get("category", ""))
        bit = "1" if correct[row["id"]] else "0"
        bits[category] = bits.get(category, "") + bit
    overall = read_json(folder / "metrics.json")["scores"]["overall"]
    failed = overall["n_error"]
    if failed:  # the line would keep them as wrong answers, and nobody would ask again
        raise SystemExit(f"{folder}: {failed} questions failed; mend that, and run it again")
    right = {category: [len(b), f"{int(b, 2):x}"] for category, b in bits.items()}
    costs = {k: overall[k] for k in ("tokens", "latents", "opened_latents", "n_truncated")}
    return {"right": right} | costs


def median_ms(folder):
    """Median milliseconds an answer, of what eval.py left in a folder."""
    files = folder.glob("predictions.rank*.jsonl")
    lines = [line for file in files for line in read_lines(file)]
    times = [line["seconds"] for line in lines if "seconds" in line]  # one that failed has none
    return 1000 * statistics.median(times)


def probed(folder, model):
    """What the line keeps of probe.py's diagnosis."""
    call("probe.py", probe_args, model=model, data=test_data, out=folder / "probe")
    found = read_json(folder / "probe" / "probe.json")
    return {k: found[k] for k in PROBED if k in found}


def one_run(folder, settings, seed, file, rows):
    """Train, answer under every evaluation, probe, all in `folder`: what a line says of the run."""
    model, line = base, {}
    if settings["run"] is not None:
        line |= trained(folder, settings["run"], seed, file)
        model = folder / "model"
    line["evals"] = {}
    for kind in settings["evals"]:
        # a run that opened no span has nothing to give to others
        if kind == "shuffle" and len([*(folder / "clean" / "latents").glob("*.safetensors")]) < 2:
            continue
        answered = evaluated(folder, kind, model)
        if kind == "one by one":
            line["ms_per_answer"] = median_ms(answered)
        elif kind == "edits":
            call("edits.py", "", model=model, data=pairs_file(), answers=answered)
            line["edits"] = read_json(answered / "edits.json")
        else:
            line["evals"][kind] = read_answers(answered, rows)
    line["probe"] = probed(folder, model)
    return line


# --------------------------------------------------------------------------------------------------
# all runs


class Job(NamedTuple):
    """A run that is to be made."""

    name: str
    seed: int
    file: str  # its training data
    settings: dict
    key: str  # a hash of its settings, its base's weights and its files


def finished():
    """(name, seed, key) of the runs that have a line."""
    return {(line["name"], line["seed"], line["key"]) for line in lines_of(results + ".jsonl")}


def wanted_runs():
    """The names and the seeds that are asked for. Raises SystemExit for what is neither."""
    for seed in seeds.split(","):
        if not seed.isdigit():
            expected = "expected numbers with commas between, as in 1,2,3"
            raise SystemExit(f"seeds={seeds!r}: {expected}; found {seed!r}")
    names = [name for group in RUNS[study] for name in group]
    wanted = names_in(only) or names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        there = ", ".join(names)
        raise SystemExit(f"only={only!r}: no such run {unknown[0]!r}; there are: {there}")
    return wanted, [int(seed) for seed in seeds.split(",")]


def jobs(names, numbers, weights):
    """Those of the named runs that have no line: by group and, in a group, seed by seed."""
    pairs = pairs_file()
    if pairs:
        check_there(pairs)
    else:
        print(f"no edits.jsonl beside {test_data}: no pairs of questions are asked")
    done, todo = finished(), []
    for group in RUNS[study]:
        for seed in numbers:
            for name in group:
                if name not in names:
                    continue
                if group[name] is None and seed != numbers[0]:
                    continue  # not trained, so the same for every seed
                settings = settings_for(name, pairs=bool(pairs))
                file = first_lines(settings["examples"], laid_out(data, group[name]))
                files = [file, test_data]
                if "edits" in settings["evals"]:
                    files.append(pairs)
                key = key_of(settings | {"weights": weights}, *files)
                # one that is not trained has one line, whatever its seed
                made = {s for n, s, k in done if (n, k) == (name, key)}
                if seed in made or made and group[name] is None:
                    continue
                todo.append(Job(name, seed, file, settings, key))
    return todo


def four_digits(line):
    """A line with its fractions cut to four digits, which are enough."""
    return json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.4g}"))


def run_all():
    """Every run that has no line yet; the tables are rewritten after each."""
    names, numbers = wanted_runs()
    if not launch:  # as many threads for all runs of this call: sums in another order are others
        use_idle_cores()
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    rows = load_examples(test_data, training=False)
    weights = key_of({}, *sorted(Path(base).glob("*.safetensors")))
    world = key_of({"weights": weights}, test_data)
    todo = jobs(names, numbers, weights)
    work = Path(out) / weights  # another base has other targets and difficulties
    if any("difficulty" in read_by(job.settings.get("run", {})) for job in todo):
        # whole counts, without early stop: they serve every tau. What is counted is kept; counts of
        # other sample_args are refused
        files = {"base": base, "data": data, "out": work / "difficulty.jsonl"}
        call("sample_difficulty.py", sample_args, **files, early_stop=False)
    with open_append(results + ".jsonl") as f:
        bar = Progress(todo, unit="run", desc="ablate")
        for job in bar:
            bar.set_postfix_str(f"{job.name}, seed {job.seed}")
            if (job.name, job.seed, job.key) in finished():  # by another process, meanwhile
                continue
            folder = work / f"{job.key}-{job.seed}"
            if not lock(work / f".{folder.name}.lock"):  # another process is at it
                continue
            line = {"name": job.name, "seed": job.seed, "key": job.key, "settings": job.settings}
            line |= {"world": world, "data": key_of({}, job.file)}
            line |= one_run(folder, job.settings, job.seed, job.file, rows)
            append(f, four_digits(line))
            shutil.rmtree(folder, ignore_errors=True)
            write_report()


# --------------------------------------------------------------------------------------------------
# the report


def read_results():
    """{run: {seed: line}} of the lines that were made with today's settings, by one base."""
    names = {name for group in RUNS[study] for name in group}
    made = [
        line
        for line in lines_of(results + ".jsonl")
        if line["name"] in names
        and line["settings"] in (settings_for(line["name"]), settings_for(line["name"], False))
    ]
    lines = {}
    for line in latest(made):
        lines.setdefault(line["name"], {})[line["seed"]] = line
    every_seed = sorted({seed for by_seed in lines.values() for seed in by_seed})
    for name, by_seed in lines.items():
        the_line = next(iter(by_seed.values()))
        if the_line["settings"].get("run") is None:  # not trained: its one line is every seed's
            lines[name] = dict.fromkeys(every_seed, the_line)
    return {name: dict(sorted(by_seed.items())) for name, by_seed in lines.items()}


def write_report():
    """Write <results>.md from <results>.jsonl alone."""
    lines = read_results()
    if not lines:
        others = len(lines_of(results + ".jsonl"))
        if others:
            why = f"but {others} with others; give the settings that those were made with"
        else:
            why = "and no others; run ablate.py without --report first"
        raise SystemExit(f"{results}.jsonl has no run with these settings, {why}")
    found = Study(
        name=study,
        lines=lines,
        methods=tuple(MAIN),
        sizes=SIZES[study],
        examples=examples,
        star=star(),
        easy=easy,
        train_args=train_args,
    )
    n = write_tables(results + ".md", found)
    print(f"wrote {results}.md: {n} runs")


def main():
    global results
    check_choices(globals(), study=RUNS)
    if study == "gap" and interventions_at not in (0, *SIZES["gap"]):
        there = ", ".join(map(str, SIZES["gap"]))
        raise SystemExit(f"interventions_at={interventions_at} is none of 0, {there}")
    results = results.removesuffix(".jsonl") or f"results/{'toy' if study == 'main' else study}"
    if not report:
        run_all()
    write_report()


if __name__ == "__main__":
    start(main)
