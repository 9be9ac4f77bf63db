"""Every script as a user runs it, on a tiny random model; kills and resumes; what is said of bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file, save_file

import answers
import eval as evaluate
from data import load_examples, read_lines
from sample_difficulty import is_solved, needs_latents


@pytest.fixture(scope="module")
def stages(tmp_path_factory, base, world):
    """fit_pca.py and a short training run: {base, world, pca, gap}."""
    folder = tmp_path_factory.mktemp("stages")
    run(
        "fit_pca.py",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--out={folder}/pca",
    )
    run(
        "train.py",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        "--val_data=",
        f"--pca={folder}/pca",
        "--difficulty=",
        f"--out={folder}/gap",
        "--max_steps=25",
        "--global_batch=16",
        "--lr=3e-3",
    )
    return {"base": base, "world": world, "pca": folder / "pca", "gap": folder / "gap"}


def training(stages, **change):
    settings = {
        "base": stages["base"],
        "data": stages["world"] / "train.jsonl",
        "val_data": "",
        "pca": stages["pca"],
        "difficulty": "",
        "max_steps": 1,
        "global_batch": 4,
    } | change
    return [f"--{k}={v}" for k, v in settings.items()]


# --- sampling


TOY = ROOT / "toy" / "base"  # at temperature 2 it solves some questions, sometimes


def sampling(base, world, out, **change):
    settings = {
        "base": base,
        "data": world / "train.jsonl",
        "out": out,
        "batch": 5,
        "max_new_tokens": 16,
        "temperature": 2.0,
    } | change
    return [f"--{k}={v}" for k, v in settings.items()]


def test_early_stop_ranks_and_kills_change_no_assignment(tmp_path, world):
    """Full counting, early stop, 2 ranks and a killed run agree on every question, for every tau and rule."""
    run("sample_difficulty.py", *sampling(TOY, world, tmp_path / "full", early_stop=0))
    full = read_lines(tmp_path / "full")
    assert len({r["correct"] for r in full}) > 2 and any(r["correct"] == 0 for r in full)
    assert not any(r["lower_bound"] for r in full) and all(len(r["answers"]) == 8 for r in full)
    for tau in (0.0, 0.125):
        out = tmp_path / f"early-{tau}"
        run("sample_difficulty.py", *sampling(TOY, world, out, early_stop=1, tau=tau, batch=7))
        early = read_lines(out)
        assert [needs_latents(r, tau, "paper") for r in early] == [
            needs_latents(r, tau, "paper") for r in full
        ]
        assert all(
            e["correct"] <= f["correct"] and (e["lower_bound"] or e["correct"] == f["correct"])
            for e, f in zip(early, full)
        )
    assert any(r["lower_bound"] for r in early)

    text = run(
        "sample_difficulty.py", *sampling(TOY, world, tmp_path / "ranks", early_stop=0), ranks=2
    )
    assert read_lines(tmp_path / "ranks") == full and not list(tmp_path.glob("ranks.rank*"))
    share = sum(needs_latents(r, 0.0, "paper") for r in full) / len(full)
    assert f"({share:.1%})" in text

    # a kill in the middle, with a half-written last line
    out = tmp_path / "killed"
    kill_when(
        ["sample_difficulty.py", *sampling(TOY, world, out, early_stop=0, batch=2)],
        tmp_path / "killed.rank000",
        6,
    )
    done = len(read_lines(tmp_path / "killed.rank000"))
    assert 0 < done < 48
    with open(tmp_path / "killed.rank000", "a") as f:
        f.write('{"id": "train-')
    text = run("sample_difficulty.py", *sampling(TOY, world, out, early_stop=0))
    assert read_lines(out) == full
    assert f"{48 - done}/{48 - done}" in text  # nothing done twice


def test_sampling_refuses_other_settings(tmp_path, base, world):
    out = tmp_path / "difficulty.jsonl"
    run("sample_difficulty.py", *sampling(base, world, out))
    text = run("sample_difficulty.py", *sampling(base, world, out, n_samples=4), ok=False)
    assert "difficulty.jsonl:1" in text and "other settings" in text


def kill_when(args, path, lines):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / args[0]), *args[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, f"{args[0]} ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_rules():
    # four options: one of eight is what guessing gives, five of eight is not (binomial tail .027)
    assert is_solved(1, 8, 4, 0.0, "paper") and not is_solved(1, 8, 4, 0.0, "guess")
    assert is_solved(5, 8, 4, 0.0, "guess") and not is_solved(4, 8, 4, 0.0, "guess")
    assert is_solved(1, 8, 0, 0.0, "guess") and not is_solved(0, 8, 0, 0.0, "guess")
    assert not is_solved(4, 8, 0, 0.5, "paper") and is_solved(5, 8, 0, 0.5, "paper")


def test_guess_rule_against_scipy():
    from scipy.stats import binom

    for n_options in (2, 3, 4, 9):
        for c in range(9):
            assert is_solved(c, 8, n_options, 0.0, "guess") == (
                binom.sf(c - 1, 8, 1 / n_options) < 0.05
            )


def test_early_stop_at_another_tau_is_refused(tmp_path, world, stages):
    out = tmp_path / "early"
    run("sample_difficulty.py", *sampling(TOY, world, out))
    assert any(r["lower_bound"] for r in read_lines(out))
    text = run("train.py", *training(stages, difficulty=out, tau=0.9, out=tmp_path / "x"), ok=False)
    assert "stopped early" in text and "tau=0.9" in text


# --- evaluation


def evaluation(stages, out, **change):
    settings = {
        "model": stages["gap"],
        "data": stages["world"] / "test.jsonl",
        "out": out,
        "batch": 5,
        "max_new_tokens": 30,
    } | change
    return [f"--{k}={v}" for k, v in settings.items()]


def strip(predictions):
    return {
        p["id"]: {k: v for k, v in p.items() if k not in ("key", "seconds")} for p in predictions
    }


def test_eval_ranks_kills_and_scores(tmp_path, stages):
    run("eval.py", *evaluation(stages, tmp_path / "one"))
    one = strip(read_lines(tmp_path / "one" / "predictions.rank0.jsonl"))
    run("eval.py", *evaluation(stages, tmp_path / "two"), ranks=2)
    two = [p for r in (0, 1) for p in read_lines(tmp_path / "two" / f"predictions.rank{r}.jsonl")]
    assert len(two) == len(one) == 12 and strip(two) == one
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())["scores"]
    two = read_lines(tmp_path / "two" / "scored.jsonl")
    assert (
        metrics["overall"]["n"] == 12
        and sum(metrics[f"{m} moves"]["n"] for m in (1, 2, 3, 4)) == 12
    )
    assert metrics["overall"]["accuracy"] == sum(p["correct"] for p in two) / 12
    assert metrics["overall"]["tokens"] == pytest.approx(sum(p["tokens"] for p in two) / 12)

    out = tmp_path / "killed"
    kill_when(["eval.py", *evaluation(stages, out, batch=1)], out / "predictions.rank0.jsonl", 3)
    text = run("eval.py", *evaluation(stages, out, score_only=1), ok=False)
    assert "answers are missing" in text
    run("eval.py", *evaluation(stages, out), ranks=2)
    lines = [p for f in out.glob("predictions.rank*") for p in read_lines(f)]
    assert len(lines) == 12 and strip(lines) == one

    # another setting does not reuse these answers
    run("eval.py", *evaluation(stages, out, intervention="zero"))
    assert sum(len(read_lines(f)) for f in out.glob("predictions.rank*")) == 24


def test_interventions_by_eval(tmp_path, stages):
    run("eval.py", *evaluation(stages, tmp_path / "clean", save_latents=1))
    clean = {p["id"]: p for p in read_lines(tmp_path / "clean" / "predictions.rank0.jsonl")}
    saved = {f.name: load_file(f)["latents"] for f in (tmp_path / "clean" / "latents").iterdir()}
    names = {evaluate.latents_name(i): i for i in clean}
    assert len(saved) >= 2 and all(
        len(v) == clean[names[f]]["latents"] // 4 * 4 for f, v in saved.items()
    )
    for kind in ("zero", "noise", "mean", "shuffle", "oracle", "oracle_pca"):
        run(
            "eval.py",
            *evaluation(
                stages,
                tmp_path / kind,
                intervention=kind,
                save_latents=1,
                donor=tmp_path / "clean" / "latents" if kind == "shuffle" else "",
            ),
        )
        opened = json.loads((tmp_path / kind / "metrics.json").read_text())["scores"]["overall"][
            "latents"
        ]
        assert (opened == 0) == (kind == "zero")
        if kind == "shuffle":  # another example's latents: the next in the order of file names
            order = sorted(saved)
            for name in order:
                fed = load_file(tmp_path / kind / "latents" / name)["latents"]
                donor = saved[order[(order.index(name) + 1) % len(order)]]
                n = min(len(donor), len(fed))
                assert (fed[:n] == donor[:n]).all() and not torch.equal(donor[:4], saved[name][:4])
    assert "donor" in run(
        "eval.py", *evaluation(stages, tmp_path / "x", intervention="shuffle"), ok=False
    )
    assert "no latent_head" in run(
        "eval.py",
        *evaluation(stages, tmp_path / "x", model=stages["base"], intervention="noise"),
        ok=False,
    )


def test_infer_shows_and_saves(tmp_path, stages):
    image = stages["world"] / "test" / "2.png"
    args = [f"--model={stages['gap']}", f"--images={image}", "--max_new_tokens=30"]
    text = run("infer.py", *args, f"--show={tmp_path}/a.png", f"--latents={tmp_path}/a.safetensors")
    assert "Start at" in text and "⟨latent x4⟩" in text
    assert load_file(tmp_path / "a.safetensors")["latents"].shape[1] == 128
    from PIL import Image

    assert Image.open(tmp_path / "a.png").width > 2 * 140
    aux = stages["world"] / "test" / "2-aux.png"
    run(
        "infer.py",
        *args,
        "--intervention=oracle",
        f"--aux={aux}",
        f"--latents={tmp_path}/o.safetensors",
    )
    run(
        "infer.py",
        *args,
        "--intervention=shuffle",
        f"--donor={tmp_path}/o.safetensors",
        f"--latents={tmp_path}/s.safetensors",
    )
    o, s = (load_file(tmp_path / f"{x}.safetensors")["latents"] for x in "os")
    assert (o[:4] == s[:4]).all()
    # two images, a question of one's own, the base model
    run(
        "infer.py",
        f"--model={stages['base']}",
        f"--images={image},{aux}",
        "--question=What is this?",
        "--max_new_tokens=5",
    )


# --- the answer check


@pytest.mark.parametrize(
    "text,answer",
    [
        ("<think> a </think> <answer> red circle, blue ring </answer>", "red circle, blue ring"),
        ("<think> a <answer>no</answer> </think>\n<answer>B", "B"),
        (r"<think>A or D?</think> so \boxed{\text{B}}", "B"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("<think> never closed", None),
        ("Well.\nThe answer is 12 cm.", "12 cm."),
        ("<latent></latent> <parser> the answer is C </parser> <answer>D</answer>", "D"),
        ("", None),
    ],
)
def test_extraction(text, answer):
    assert answers.extract_answer(text)[0] == answer


@pytest.mark.parametrize(
    "answer,gold,options,right",
    [
        ("Red  Circle, blue ring.", "red circle, blue ring", [], True),
        ("red circle", "red circle, blue ring", [], False),
        ("<", ">", [], False),
        (">", ">", [], True),
        ("1000001", "1000000", [], False),
        ("1,000", "1000.0", [], True),
        ("0.5", ".50", [], True),
        ("12", "13", [], False),
        ("-3", "3", [], False),
        ("(b)", "B", ["4", "5"], True),
        ("B. 5", "B", ["4", "5"], True),
        ("5", "B", ["4", "5"], True),
        ("A", "B", ["4", "5"], False),
        ("E", "B", ["4", "5"], False),
        (None, "x", [], False),
        ("", "B", ["4", "5"], False),
    ],
)
def test_check(answer, gold, options, right):
    assert answers.is_correct(answer, {"answer": gold, "options": options}) == right


def test_wilson_against_scipy():
    from scipy.stats import binomtest

    for k, n in ((0, 10), (3, 10), (10, 10), (170, 384)):
        ci = binomtest(k, n).proportion_ci(method="wilson")
        assert evaluate.wilson(k, n) == pytest.approx((ci.low, ci.high), abs=1e-4)


# --- bad input: one sentence with file, line and field, no traceback, nothing half-written


def broken(world, tmp_path, change):
    """A copy of the training file whose second line is changed."""
    for name in ("train", "val", "test"):
        (tmp_path / name).symlink_to(world / name)
    lines = (world / "train.jsonl").read_text().splitlines()[:4]
    row = json.loads(lines[1])
    lines[1] = change(row)
    if not isinstance(lines[1], str):
        lines[1] = json.dumps(lines[1])
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda r: "{", ["not JSON"]),
        (lambda r: "[1]", ["JSON object"]),
        (lambda r: r | {"id": "train-0"}, ["train-0", "repeats line 1"]),
        (lambda r: r | {"answer": 3}, ["'answer'", "found 3"]),
        (lambda r: r | {"images": ["no.png"]}, ["no.png"]),
        (lambda r: r | {"images": [3]}, ["'images'", "found 3"]),
        (lambda r: r | {"options": [3]}, ["'options'", "found 3"]),
        (lambda r: r | {"aux_images": []}, ["1 <latent></latent>", "0 aux_images"]),
        (lambda r: r | {"response": r["response"].replace("</think>", "")}, ["tags"]),
        (
            lambda r: r | {"response": "<answer> x </answer> <think> <latent></latent> </think>"},
            ["tags"],
        ),
        (
            lambda r: (
                r | {"response": r["response"].replace("<latent></latent>", "<latent> x </latent>")}
            ),
            ["nothing inside"],
        ),
        (lambda r: r | {"question": "what is <|image_pad|>?"}, ["'question'", "<|image_pad|>"]),
    ],
)
def test_bad_data_names_the_line(tmp_path, world, change, words):
    with pytest.raises(SystemExit) as e:
        load_examples(broken(world, tmp_path, change))
    for word in ["broken.jsonl:2", *words]:
        assert word in str(e.value)


def test_stages_refuse_what_does_not_belong_together(tmp_path, base, world, stages):
    out = tmp_path / "out"
    # a PCA of another tower
    other = tmp_path / "other"
    other.mkdir()
    for f in base.iterdir():
        if f.name != "model.safetensors":
            (other / f.name).symlink_to(f)
    weights = load_file(base / "model.safetensors")
    save_file(
        {k: v + 0.1 if "merger" in k else v for k, v in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    text = run("train.py", *training(stages, base=other, out=out), ok=False)
    assert "pca.safetensors" in text and "vision tower" in text and str(other) in text
    # another K
    mixed = tmp_path / "mixed"
    run(
        "fit_pca.py",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        "--val_data=",
        f"--out={mixed}",
        "--K=1",
    )
    (mixed / "pca.safetensors").unlink()
    (mixed / "pca.safetensors").symlink_to(stages["pca"] / "pca.safetensors")
    text = run("train.py", *training(stages, pca=mixed, out=out), ok=False)
    assert "index.json has K = 1" in text and "pca.safetensors has 4" in text
    # targets missing for an example that needs them
    text = run(
        "train.py", *training(stages, data=world / "val.jsonl", pca=mixed, out=out), ok=False
    )
    text = run(
        "train.py",
        *training(stages, val_data=broken(world, tmp_path, lambda r: r | {"id": "new"}), out=out),
        ok=False,
    )
    assert "'new'" in text and "index.json" in text
    # difficulty of other data
    (tmp_path / "difficulty.jsonl").write_text("")
    text = run(
        "train.py", *training(stages, difficulty=tmp_path / "difficulty.jsonl", out=out), ok=False
    )
    assert "difficulty.jsonl lacks 48 examples" in text
    # targets of other settings
    text = run(
        "fit_pca.py",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        "--val_data=",
        f"--out={stages['pca']}",
        "--K=9",
        ok=False,
    )
    assert "made_by.json" in text and "'K': (4, 9)" in text
    assert not out.exists()


def test_unknown_settings_and_folders(tmp_path, world):
    assert "unknown setting '--lrr'" in run("train.py", "--lrr=1", ok=False)
    assert "is not int" in run("train.py", "--epochs=two", ok=False)
    assert "config.json" in run(
        "fit_pca.py",
        f"--base={tmp_path}",
        f"--data={world}/train.jsonl",
        "--val_data=",
        f"--out={tmp_path}/o",
        ok=False,
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in run(
        "fit_pca.py",
        f"--base={tmp_path}",
        f"--data={world}/train.jsonl",
        "--val_data=",
        f"--out={tmp_path}/o",
        ok=False,
    )
    assert "not a square" in run("fit_pca.py", "--K=5", ok=False)
    (tmp_path / "bad.png").write_text("no image")
    text = run(
        "infer.py", f"--images={tmp_path}/bad.png", "--question=x", f"--model={TOY}", ok=False
    )
    assert "bad.png: not a usable image" in text


def test_degenerate_images_are_rejected(tmp_path, base, world):
    """A blank auxiliary image is named and left out of the PCA and of training."""
    from PIL import Image

    Image.new("RGB", (56, 56), "white").save(tmp_path / "blank.png")
    path = broken(world, tmp_path, lambda r: r | {"aux_images": [str(tmp_path / "blank.png")]})
    args = [f"--base={base}", f"--data={path}", "--val_data=", f"--out={tmp_path}/pca"]
    text = run("fit_pca.py", *args, "--degenerate=0.02")
    assert "rejected as degenerate: 1" in text and "train-1" in text
    text = run(
        "train.py",
        f"--base={base}",
        f"--data={path}",
        "--val_data=",
        f"--pca={tmp_path}/pca",
        "--difficulty=",
        f"--out={tmp_path}/gap",
        "--max_steps=1",
        "--global_batch=2",
    )
    assert "3 examples, 3 with latents, 1 rejected" in text


def test_fit_pca_ranks_and_resume(tmp_path, base, world):
    """Two ranks, and a run that finds half of its shards, give the PCA of one process."""
    args = [
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        "--shard=10",
    ]
    run("fit_pca.py", *args, f"--out={tmp_path}/one")
    run("fit_pca.py", *args, f"--out={tmp_path}/two", ranks=2)
    one, two = (load_file(tmp_path / x / "pca.safetensors") for x in ("one", "two"))
    for k in ("mean", "eigenvalues"):
        assert (one[k] - two[k]).abs().max() < 1e-4 * one[k].abs().max()
    shard = tmp_path / "one" / "targets" / "train-00001.safetensors"
    stamp = shard.stat().st_mtime_ns
    (tmp_path / "one" / "targets" / "train-00002.safetensors").unlink()
    (tmp_path / "one" / "pca.safetensors").unlink()
    run("fit_pca.py", *args, f"--out={tmp_path}/one")
    assert shard.stat().st_mtime_ns == stamp
    assert (load_file(tmp_path / "one" / "pca.safetensors")["mean"] == one["mean"]).all()
