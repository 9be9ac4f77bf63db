"""The training loop: the global batch, not how it is split, decides a step; a resumed run is the
uninterrupted one."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PIXELS, ROOT, has_lines, launcher, logged, method_args, run
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import launch
import train
from files import file_digest, write_json
from model import HEAD_FILE, load_processor, load_vlm

close = torch.testing.assert_close


def state(folder, step):
    """Weights and first Adam moments of a checkpoint (of step 1: a tenth of its gradient)."""
    path = folder / f"state-{step}.pt"
    dcp_to_torch_save(folder / "ckpt" / f"step-{step:07}", path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("method", ["gap", "lh", "output", "text"])
def test_split_of_the_batch_does_not_matter(tmp_path, gap_args, method):
    """Batch 4 in one process, 2 ranks with batch 2, one row a micro-batch: the same gradients and
    next weights."""
    ways = {"one": (1, 100000), "accumulate": (1, 1)} | (
        {"ranks": (2, 170)} if method in ("gap", "text") else {}
    )
    for name, (ranks, budget) in ways.items():
        said = run(
            "train.py",
            *gap_args,
            f"--method={method}",
            f"--out={tmp_path}/{name}",
            f"--token_budget={budget}",
            "--max_steps=1",
            ranks=ranks,
        )
        assert said.count(f"{name}: 100% 1/1 ") == 1  # one rank shows how far it is
    one, log = state(tmp_path / "one", 1), logged(tmp_path / "one")[1]
    assert log["grad_norm"] > 1e-2 and (method == "text") == ("r2" not in log)
    for name in list(ways)[1:]:
        other, row = state(tmp_path / name, 1), logged(tmp_path / name)[1]
        for field in ("loss", "ce", "grad_norm", "val_ce") + (
            ("latent", "val_r2", "norm_predicted") if "r2" in log else ()
        ):
            assert row[field] == pytest.approx(log[field], rel=1e-4), field
        moments = [k for k in one["optimizer"]["state"]]
        assert len(moments) > 40
        for k in moments:
            close(
                other["optimizer"]["state"][k]["exp_avg"],
                one["optimizer"]["state"][k]["exp_avg"],
                rtol=1e-3,
                atol=1e-6,
            )
        for k, v in one["model"].items():
            close(other["model"][k], v, rtol=0.0, atol=2e-4)


def start_and_kill(args, out, step, ranks=1):
    """Start a training run and kill the whole group as soon as a checkpoint stands."""
    process = subprocess.Popen(
        [*launcher(ranks), str(ROOT / "train.py"), *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (out / "ckpt" / f"step-{step:07}").exists():
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)
    started = running(f"--out={out}")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # its ranks, each a process group of its own, end with it: train.py sees to that
    deadline = time.monotonic() + 30
    while any(map(lives, started)) or running(f"--out={out}"):
        assert time.monotonic() < deadline, "a rank lives on without its launcher"
        time.sleep(0.01)
    assert not (out / "model.safetensors").exists(), "a rank trained on without its launcher"


def running(argument):
    """The folders in /proc of processes with this argument (on Linux; else they are not known)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if argument.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(folder)
        except OSError:  # it ended as we looked
            continue
    return found


def lives(folder):
    """Whether a process may have files open still: until all of its threads are at most zombies."""
    for thread in folder.glob("task/*/stat"):
        try:
            if thread.read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_equals_an_uninterrupted_run(tmp_path, gap_args, ranks):
    """Killed at a checkpoint and started again: bit-equal on as many ranks, equal from 2 to 1."""
    args = [*gap_args, "--max_steps=12", "--save_every=3"]
    run("train.py", *args, f"--out={tmp_path}/whole")
    out = tmp_path / "killed"
    start_and_kill([*args, f"--out={out}"], out, 3, ranks)
    # a save cut off by a kill leaves only a temporary folder
    (out / "ckpt" / ".tmp").mkdir(exist_ok=True)
    (out / "ckpt" / "step-0000003-mine").mkdir()  # a user's copy, which is none of ours
    run("train.py", *args, f"--out={out}")
    whole, again = (load_file(f / "model.safetensors") for f in (tmp_path / "whole", out))
    for k in whole:
        close(again[k], whole[k], rtol=0.0, atol=0.0 if ranks == 1 else 2e-3)
    log = logged(out)[1:]
    assert [r["step"] for r in log] == list(range(1, 13))
    # the rate that each step was taken with: one step of warm-up, then half a cosine to 0
    wanted = [1.0, *(0.5 + 0.5 * math.cos(math.pi * i / 11) for i in range(11))]
    assert [r["lr"] / log[0]["lr"] for r in log] == pytest.approx(wanted)
    assert all(0.05 < r["peak_gib"] < 20 for r in log)
    left = ["step-0000003-mine", "step-0000009", "step-0000012"]
    assert sorted(p.name for p in (out / "ckpt").glob("step-*")) == left


def test_more_ranks_than_rows(tmp_path, gap_args):
    """A rank without a row runs one with weight 0, and changes nothing."""
    args = [*gap_args, "--val_data=", "--max_steps=2", "--global_batch=1"]
    for name, ranks in (("one", 1), ("two", 2)):
        run("train.py", *args, f"--out={tmp_path}/{name}", ranks=ranks)
    for a, b in zip(logged(tmp_path / "one")[1:], logged(tmp_path / "two")[1:]):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4
        )


def test_an_accelerator_that_is_not_used(tmp_path, gap_args):
    """A Mac's, which torch names as the machine's: training is on the CPU all the same."""
    script = (
        "import runpy, sys, torch\n"
        "torch._C._get_accelerator = lambda *_: torch.device('mps')\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    args = [str(ROOT), *gap_args, f"--out={tmp_path}", "--max_steps=1", "--curves=0"]
    subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, check=True)
    assert logged(tmp_path)[1]["step"] == 1


def test_a_clip_of_zero_clips_nothing(tmp_path, gap_args):
    for clip in ("0", "1e9"):
        args = [*gap_args, "--val_data=", "--max_steps=2", f"--grad_clip={clip}"]
        run("train.py", *args, f"--out={tmp_path}/{clip}")
    none, large = (logged(tmp_path / clip)[1:] for clip in ("0", "1e9"))
    assert [row["loss"] for row in none] == [row["loss"] for row in large]


def test_vectors_are_not_decayed():
    """Neither the decoder's nor those that the method adds, which have a rate of their own."""
    model = nn.ModuleDict({"vlm": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    model.vlm = model["vlm"]
    groups = train.make_optimizer(model).param_groups
    assert len(groups) == 4
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] == 0) == (p.ndim == 1)
            assert group["peak"] == (train.lr_head if len(p) == 2 else train.lr)


def test_ranks_that_read_other_files_do_not_train(monkeypatch):
    monkeypatch.setattr(launch, "rank_and_world", lambda: (1, 2))

    def gather(values, value):
        values[:] = ["a", value]

    monkeypatch.setattr(launch.dist, "all_gather_object", gather)
    launch.check_same_everywhere("the inputs", "a")
    with pytest.raises(SystemExit, match="the inputs of ranks 0 and 1 differ"):
        launch.check_same_everywhere("the inputs", "b")


def test_resume_refuses_other_settings(tmp_path, gap_args):
    run("train.py", *gap_args, f"--out={tmp_path}/a", "--max_steps=1")
    text = run("train.py", *gap_args, f"--out={tmp_path}/a", "--max_steps=2", "--lr=5e-4", ok=False)
    assert "settings.json" in text and "'lr': (0.001, 0.0005)" in text


def test_folder_loads_with_plain_transformers(tmp_path, gap_args):
    """What train.py writes is a stock folder: same weights, no key missing, tower untouched."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    run(
        "train.py",
        *gap_args,
        f"--out={tmp_path}/gap",
        "--max_steps=2",
        "--dtype=bfloat16",
        "--activation_checkpointing=1",
    )
    vlm, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "gap", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and vlm.dtype == torch.bfloat16
    assert "<|latent_pad|>" in AutoTokenizer.from_pretrained(tmp_path / "gap").get_vocab()
    assert (
        "flash" not in (tmp_path / "gap" / "config.json").read_text()
    )  # the tower's attention is not saved
    trained = state(tmp_path / "gap", 2)["model"]
    for k, v in vlm.state_dict().items():
        close(trained["vlm." + k].bfloat16(), v, rtol=0.0, atol=0.0)
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        gap_args[0].split("=")[1]
    ).model.visual.state_dict()
    for k, v in vlm.model.visual.state_dict().items():
        close(v, before[k].bfloat16(), rtol=0.0, atol=0.0)


def test_options_run(tmp_path, gap_args):
    """Scheduled sampling, the summed loss, dropped parser text."""
    run(
        "train.py",
        *gap_args,
        f"--out={tmp_path}/a",
        "--max_steps=2",
        "--scheduled_sampling=1",
        "--latent_loss=sum",
        "--keep_parser=0",
        "--cpu_offload=1",
        "--token_budget=1",
        ranks=2,
    )
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in logged(tmp_path / "a")[1:])


def test_micro_batches():
    for lengths, world, budget in (
        ([5, 9, 9, 3, 2, 7], 1, 18),
        ([5] * 7, 2, 10),
        ([4], 3, 100),
        ([100, 1, 1], 2, 50),
    ):
        parts = train.micro_batches(lengths, world, budget)
        assert sorted(i for p in parts for i in p) == list(range(len(lengths)))
        assert len(parts) % world == 0
        assert all(len(p) <= 1 or max(lengths[i] for i in p) * len(p) <= budget for p in parts)


def test_every_example_once_an_epoch():
    n, train.global_batch = 23, 5
    try:
        seen = [i for step in range(n // 5) for i in train.batch_of(step, n)]
        assert len(set(seen)) == len(seen) == 20
        assert train.batch_of(4, n) != train.batch_of(0, n)  # another order in the next epoch
    finally:
        train.global_batch = 32


def test_schedule():
    lrs = [train.lr_at(s, 1000, 1.0) for s in range(1000)]
    assert lrs[29] == pytest.approx(1.0) and lrs[0] == pytest.approx(1 / 30) and lrs[-1] < 1e-5
    assert max(lrs) == pytest.approx(1.0) and lrs[515] == pytest.approx(0.5, abs=0.01)


def test_a_damaged_checkpoint_is_noticed(tmp_path, gap_args):
    """A flipped bit in the newest: the one before is used, and the end is the same."""
    args = [*gap_args, "--val_data=", "--max_steps=6", "--save_every=2", f"--out={tmp_path}/a"]
    run("train.py", *args)
    whole = load_file(tmp_path / "a" / "model.safetensors")
    checkpoints = tmp_path / "a" / "ckpt"
    (shard,) = (checkpoints / "step-0000006").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0x40
    changed = shard.stat().st_mtime_ns
    shard.write_bytes(content)
    os.utime(shard, ns=(changed, changed))  # as a disk flips it
    text = run("train.py", *args)
    assert f"{shard}: damaged or missing" in text and "6 steps, from 4" in text
    again = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(again[k], v) for k, v in whole.items())


def test_a_loss_that_is_not_finite_stops(tmp_path, gap_args):
    """With step and cause; nothing broken is exported or logged, the checkpoints are finite."""
    args = [*gap_args, "--val_data=", "--max_steps=9", "--save_every=1", "--warmup_ratio=0"]
    text = run("train.py", *args, "--lr=1e30", f"--out={tmp_path}/a", ok=False)
    assert "not finite" in text and "step " in text
    assert not (tmp_path / "a" / "model.safetensors").exists()
    assert all(math.isfinite(row["loss"]) for row in logged(tmp_path / "a")[1:])


def test_a_run_goes_on_where_its_files_went(tmp_path, gap_args, world):
    """Moved, copied and touched it is the same run; fed another picture it is not."""
    args = dict(arg.split("=", 1) for arg in gap_args) | {"--val_data": "", "--max_steps": "4"}
    copy = tmp_path / "copy"
    shutil.copytree(world, copy / "world")
    shutil.copytree(args["--base"], copy / "base")

    def train(**change):
        settings = args | {f"--{name}": str(value) for name, value in change.items()}
        return [f"{name}={value}" for name, value in settings.items()]

    run("train.py", *train(out=tmp_path / "a", save_every=2))
    shutil.rmtree(tmp_path / "a" / "ckpt" / "step-0000004")
    (tmp_path / "a").rename(tmp_path / "b")
    elsewhere = {"base": copy / "base", "data": copy / "world" / ".." / "world" / "train.jsonl"}
    text = run("train.py", *train(out=tmp_path / "b", save_every=2, **elsewhere))
    assert "4 steps, from 2" in text

    shutil.rmtree(tmp_path / "b" / "ckpt" / "step-0000004")
    shutil.copy(copy / "world/train/1.png", copy / "world/train/4.png")
    rest = {"difficulty": "", "method": "text"}
    run("train.py", *train(out=tmp_path / "c", save_every=2, **rest))
    shutil.rmtree(tmp_path / "c" / "ckpt" / "step-0000004")
    text = run("train.py", *train(out=tmp_path / "c", save_every=2, **rest, **elsewhere), ok=False)
    assert "the contents of data" in text


# --- a checkpoint's files, and the run that it is of


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as save_checkpoint leaves it, of two ranks' shards."""
    folder = tmp_path / "step-0000004"
    folder.mkdir()
    names = {
        "0": ["__0_0.distcp", "__0_1.distcp"],
        "1": ["__1_0.distcp"],
        "metadata": [".metadata"],
    }
    for part, files in names.items():
        for n, name in enumerate(files):
            (folder / name).write_bytes(bytes(range(256)) * (n + 1))
        sums = {name: file_digest(folder / name) for name in files}
        write_json(folder / f"checksums.{part}.json", sums)
    write_json(folder / "settings.json", {"lr": 1e-3, "out": "a", "inputs": {"data": "1"}})
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["__0_0.distcp", "__0_1.distcp", "__1_0.distcp", ".metadata"])
@pytest.mark.parametrize(
    "spoil",
    [flip, Path.unlink, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:-1])],
)
def test_every_file_of_a_checkpoint_counts(checkpoint, file, spoil):
    assert train.checkpoint_fault(checkpoint) == ""
    spoil(checkpoint / file)
    assert file in train.checkpoint_fault(checkpoint)


def test_ranks_share_the_files_of_a_checkpoint(checkpoint, monkeypatch):
    flip(checkpoint / "__1_0.distcp")
    faults = []
    for rank in range(3):
        monkeypatch.setattr(train, "rank_and_world", partial(tuple, (rank, 3)))
        faults.append(train.checkpoint_fault(checkpoint))
    assert sorted(fault != "" for fault in faults) == [False, False, True]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "settings.json").unlink(),
        lambda folder: (folder / "settings.json").write_text('{"lr": 1e-3, "inp'),
        lambda folder: (folder / "checksums.1.json").write_text(""),
        lambda folder: (folder / "checksums.1.json").write_text("[]"),
        lambda folder: (folder / "checksums.0.json").write_text('{"__0_0.distcp": 7}'),
        lambda folder: [path.unlink() for path in folder.glob("checksums.*")],
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named(checkpoint, spoil):
    spoil(checkpoint)
    fault = train.checkpoint_fault(checkpoint)
    assert str(checkpoint) in fault and "\n" not in fault


def test_a_copied_checkpoint_is_whole(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (0, 0))
    assert train.checkpoint_fault(tmp_path / "copy") == ""


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        ({"out": "b"}, ""),  # a path; what lies there is in `inputs`
        ({"save_every": 7, "token_budget": 1}, ""),
        ({"K": 36}, ""),  # GAP's is that of its targets
        ({"lr": 2e-3}, "'lr': (0.001, 0.002)"),
        ({"tau": 0.5}, "'tau': (None, 0.5)"),
        ({"tau": 0.0}, ""),  # the checkpoint is of a version that had no tau
        ({"inputs": {"data": "2"}}, "the contents of data"),
        ({"inputs": {"data": "1", "pca": "3"}}, "the contents of pca"),
        ({"inputs": {}}, "the contents of data"),
    ],
)
def test_a_run_is_its_settings_and_contents(checkpoint, change, words):
    settings = {"lr": 1e-3, "out": "a", "inputs": {"data": "1"}} | change
    if not words:
        train.check_same_run(checkpoint, settings)
        return
    with pytest.raises(SystemExit) as e:
        train.check_same_run(checkpoint, settings)
    assert "settings.json" in str(e.value) and words in str(e.value)


def test_what_an_older_version_did_not_have_is_said(checkpoint, capsys):
    settings = {"lr": 1e-3, "tau": train.tau, "inputs": {"data": "1"}}
    train.check_same_run(checkpoint, settings)
    assert "is of a version without tau" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inputs": []}', "nonsense"])
def test_settings_of_a_checkpoint_are_read_by_their_fields(checkpoint, text):
    (checkpoint / "settings.json").write_text(text)
    with pytest.raises(SystemExit, match="settings.json"):
        train.check_same_run(checkpoint, {"inputs": {}})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["ce", "latent", "grad_norm"])
def test_a_number_that_is_not_finite_is_named_with_its_step(bad, name):
    numbers = {"ce": 1.0, "latent": 0.0, "grad_norm": 1e30}
    train.check_step(6, numbers)
    with pytest.raises(SystemExit) as e:
        train.check_step(6, numbers | {name: bad})
    assert str(e.value).startswith(f"step 7: {name} not finite")


def test_an_interval_of_0_is_never():
    assert not any(train.is_due(step, 0) for step in range(100))
    assert [step for step in range(9) if train.is_due(step, 3)] == [2, 5, 8]


# --- wandb

FAKE_WANDB = """
import json, sys

class Error(Exception):
    pass

class init:
    def __init__(self, **run):
        self.say("init", run)
    def say(self, what, value):
        print("wandb:" + json.dumps([what, value]), flush=True)
    def log(self, row, step):
        self.say("log", row | {"at": step})
    def finish(self):
        self.say("finish", 0)
"""


def calls(text):
    """What the stand-in for wandb was asked, in order."""
    lines = [line for line in text.splitlines() if line.startswith("wandb:")]
    return [json.loads(line.removeprefix("wandb:")) for line in lines]


def test_wandb_gets_the_log_from_one_rank(tmp_path, gap_args):
    """Each line once; what resumes is the same run, and what starts over is another."""
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    env = {"PYTHONPATH": str(tmp_path)}
    args = [*gap_args, "--wandb_project=latents", "--max_steps=3", f"--out={tmp_path}/gap"]
    (what, run_), *logs, end = calls(run("train.py", *args, env=env, ranks=2))
    assert what == "init" and end == ["finish", 0]
    assert run_["project"] == "latents" and run_["name"] == "gap" and run_["config"]["K"] == 4
    sent = [row for what, row in logs if what == "log"]
    assert sent == [row | {"at": row["step"]} for row in logged(tmp_path / "gap")[1:]]

    again = calls(run("train.py", *args, env=env))
    assert [what for what, _ in again] == ["init", "finish"] and again[0][1]["id"] == run_["id"]
    shutil.rmtree(tmp_path / "gap")
    assert calls(run("train.py", *args, env=env))[0][1]["id"] != run_["id"]


def test_wandb_that_is_not_installed(tmp_path, gap_args):
    """Training goes on, with a sentence."""
    (tmp_path / "wandb.py").write_text("raise ImportError")
    args = [*gap_args, "--max_steps=1", f"--out={tmp_path}/gap", "--wandb_project=latents"]
    text = run("train.py", *args, env={"PYTHONPATH": str(tmp_path)})
    assert text.count("wandb is not installed") == 1 and len(logged(tmp_path / "gap")) == 2


def test_wandb_offline(tmp_path, gap_args):
    """The real one, where it is installed: a run that `wandb sync` can send, with our fields."""
    pytest.importorskip("wandb")
    args = [*gap_args, "--max_steps=2", f"--out={tmp_path}/gap", "--wandb_project=latents"]
    env = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    run("train.py", *args, env=env)
    (file,) = (tmp_path / "gap" / "wandb").glob("offline-run-*/*.wandb")
    sent = file.read_bytes()
    for field in (b"latents", b"tokens_per_s", b"grad_norm", b"val_ce"):
        assert field in sent, field


@pytest.mark.parametrize(
    "there, first, save_every, most",
    [
        (0, 0, 10, 36_012_000),  # three checkpoints at a time, more than two and the model
        (0, 0, 0, 16_008_000),  # one and the model
        (1, 10, 10, 24_008_000),
        (2, 80, 10, 12_004_000),
        (0, 90, 10, 16_008_000),
        (1, 100, 10, 4_004_000),  # the model alone
    ],
)
def test_a_disk_too_small_is_named_before_the_first_step(
    tmp_path, monkeypatch, there, first, save_every, most
):
    """Of a run of 100 steps: room for what will lie on the disk at a time, not for all it saves."""
    for name, value in {"out": str(tmp_path), "save_every": save_every}.items():
        monkeypatch.setattr(train, name, value)
    for step in range(there):
        (tmp_path / f"ckpt/step-{step:07}").mkdir(parents=True)
    model = torch.nn.Linear(1000, 1000)
    model.bias.requires_grad_(False)
    (tmp_path / "ckpt/.tmp").mkdir(parents=True)
    (tmp_path / "ckpt/.tmp/__0_0.distcp").write_bytes(b"x" * 1000)  # a killed save's
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    free = most - 1000
    train.check_space(model, first, 100)
    free -= 1
    with pytest.raises(SystemExit, match="GB are free; .* GB will be needed"):
        train.check_space(model, first, 100)


def test_a_step_is_adamw_written_out(monkeypatch):
    """Clip, decay of matrices, a learning rate each for decoder and head, and both betas."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"vlm": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    model.vlm, model.weights = model["vlm"], lambda step, total: {}
    settings = {"lr": 0.01, "lr_head": 0.05, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1}
    for name, value in (settings | {"grad_clip": 1.0, "warmup_ratio": 0.0}).items():
        monkeypatch.setattr(train, name, value)
    parameters = dict(model.named_parameters())
    want = {name: p.detach().double().clone() for name, p in parameters.items()}
    m, s = dict.fromkeys(parameters, 0.0), dict.fromkeys(parameters, 0.0)
    optimizer = train.make_optimizer(model)
    for t, size in enumerate((0.01, 3.0, 1.0), 1):
        g = {name: torch.randn_like(p) * size for name, p in parameters.items()}

        def planted(model, batches, counts, device, weights, g=g):
            for name, p in model.named_parameters():
                p.grad = g[name].clone()
            return {"ce": 1.0}

        monkeypatch.setattr(train, "run_batch", planted)
        train.train_step(model, optimizer, [], {}, t - 1, 10, torch.device("cpu"))
        norm = math.sqrt(sum(float(x.double().pow(2).sum()) for x in g.values()))
        for name in parameters:
            x = g[name].double() * min(1.0, 1.0 / norm)
            rate = train.lr_at(t - 1, 10, 0.01 if name.startswith("vlm") else 0.05)
            if want[name].ndim > 1:
                want[name] *= 1 - rate * 0.1
            m[name], s[name] = 0.8 * m[name] + 0.2 * x, 0.9 * s[name] + 0.1 * x**2
            deviation = (s[name] / (1 - 0.9**t)).sqrt() + 1e-8
            want[name] -= rate * m[name] / (1 - 0.8**t) / deviation
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach().double(), want[name], rtol=1e-4, atol=1e-6)


def test_validation_is_a_mean_over_rows(monkeypatch):
    """Not over batches, which differ in what they count; and without dropout."""
    rows = [(1, 5.0), (2, 1.0), (10, 3.0)]  # (count, sum) each

    def load_batch(model, rows):
        return rows, {"ce": sum(n for n, _ in rows)}, None

    def run_batch(model, rows, count, device):
        assert not model.vlm.training
        return {"ce": sum(x for _, x in rows) / count["ce"]}

    monkeypatch.setattr(train, "global_batch", 2)
    monkeypatch.setattr(train, "load_batch", load_batch)
    monkeypatch.setattr(train, "run_batch", run_batch)
    model = SimpleNamespace(report=lambda means: means, vlm=torch.nn.Linear(1, 1))
    assert train.validate(model, rows, "cpu") == {"val_ce": pytest.approx(9 / 13)}
    assert model.vlm.training


def test_seeds_have_orders_of_their_own(monkeypatch):
    monkeypatch.setattr(train, "global_batch", 5)
    orders = set()
    for seed in (1, 100):
        monkeypatch.setattr(train, "seed", seed)
        orders.add(tuple(train.batch_of(0, 40)))
    assert len(orders) == 2


def test_what_was_not_counted_is_not_reported(monkeypatch):
    """A batch without latents has no R2 of 1."""
    monkeypatch.setattr(train.dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(train, "to_device", lambda batch, vlm, device: batch)

    def model(batch):
        return {"ce": torch.tensor(6.0), "latent": torch.tensor(0.0)}

    model.vlm = None
    found = train.run_batch(model, [{"weight": 1.0}], {"ce": 3, "latent": 0}, "cpu")
    assert found == {"ce": 2.0}


def test_the_schedule_is_its_formula():
    """Linear, then a cosine that the last step has not reached the end of."""
    total = 20
    for s in range(total):
        warm = max(1, round(train.warmup_ratio * total))
        want = min((s + 1) / warm, (1 + math.cos(math.pi * max(0, s - warm) / (total - warm))) / 2)
        assert train.lr_at(s, total, 2.0) == pytest.approx(2 * want)
    assert train.lr_at(total - 1, total, 1.0) > 0


def test_no_head_of_an_earlier_run_stays_beside_a_text_model(tmp_path, gap_args, monkeypatch):
    out = tmp_path / "a"
    args = [*gap_args, "--val_data=", "--max_steps=1", "--save_every=0"]
    run("train.py", *args, f"--out={out}")
    assert (out / HEAD_FILE).exists()
    shutil.rmtree(out / "ckpt")
    run("train.py", *args, f"--out={out}", "--method=text", "--difficulty=")
    assert not (out / HEAD_FILE).exists()


def test_an_export_is_a_model_only_once_it_is_whole(tmp_path, base, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    vlm, tokenizer = load_vlm(base)
    model = SimpleNamespace(vlm=vlm, save=lambda folder, trained: None)
    weights = {f"vlm.{k}": v for k, v in vlm.state_dict().items()}
    monkeypatch.setattr(train, "get_model_state_dict", lambda model, options: weights)
    monkeypatch.setattr(train, "out", str(tmp_path))
    moved = []

    def replace(a, b):  # a kill at any time leaves no config.json beside half of the files
        assert not (tmp_path / "config.json").exists()
        moved.append(Path(os.rename(a, b) or b).name)

    monkeypatch.setattr(train, "os", SimpleNamespace(replace=replace))
    train.export(model, tokenizer, load_processor(base, *PIXELS))
    assert moved[-1] == "config.json" and "model.safetensors" in moved


def test_a_resume_needs_the_same_base_and_validation_data(tmp_path, base, world):
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(world, tmp_path / "world")
    args = method_args(
        "text", tmp_path / "base", tmp_path / "world", tmp_path / "out", "--max_steps=1"
    )
    run("train.py", *args)
    rows = (tmp_path / "world/val.jsonl").read_text()
    (tmp_path / "world/val.jsonl").write_text("".join(rows.splitlines(True)[:-1]))
    assert "the contents of val_data" in run("train.py", *args, ok=False)
    (tmp_path / "world/val.jsonl").write_text(rows)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, tmp_path / "base/model.safetensors", {"format": "pt"})
    assert "the contents of base" in run("train.py", *args, ok=False)


def test_a_picture_that_is_replaced_while_it_trains(tmp_path, base, world):
    """No checkpoint is written of it; put back, the run goes on and ends as if nothing had been."""
    shutil.copytree(world, tmp_path / "world")
    args = "--max_steps=40", "--save_every=20", "--eval_every=0", "--loader_threads=1"
    whole, out = (
        method_args("text", base, tmp_path / "world", tmp_path / name, *args)
        for name in ("whole", "out")
    )
    picture, other = (tmp_path / "world/train" / f"{n}.png" for n in (0, 1))
    content = picture.read_bytes()

    def replace():
        while not has_lines(tmp_path / "out/log.jsonl", 23):
            time.sleep(0.005)
        picture.write_bytes(other.read_bytes())

    thread = threading.Thread(target=replace)
    thread.start()
    said = run("train.py", *out, ok=False)
    thread.join()
    assert "train.jsonl:1: example" in said and "changed while this run trained on it" in said
    assert [path.name for path in (tmp_path / "out/ckpt").glob("step-*")] == ["step-0000020"]
    picture.write_bytes(content)
    assert "wrote" in run("train.py", *out) and "wrote" in run("train.py", *whole)
    (again, once) = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_a_resume_needs_the_same_order(tmp_path, base, world):
    shutil.copytree(world, tmp_path / "world")
    args = method_args("text", base, tmp_path / "world", tmp_path / "out", "--max_steps=1")
    run("train.py", *args)
    path = tmp_path / "world/train.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[::-1]))
    assert "the contents of data" in run("train.py", *args, ok=False)


def test_no_checkpoint_of_weights_that_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "out", str(tmp_path))
    monkeypatch.setattr(train.dist, "all_reduce", lambda x: None)
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = torch.nan
    with pytest.raises(SystemExit, match="step 3: 1 weights are not finite"):
        train.save_checkpoint(model, None, 3, {})


def test_what_changes_a_number_may_not_change_on_resume():
    bound = "max_steps epochs global_batch lr lr_head warmup_ratio weight_decay seed tau dtype"
    assert not set(bound.split()) & {*train.FREE, *train.PATHS}
