"""A tiny Qwen2.5-VL with random weights, a few examples of the toy world, and a way to run a script as a user does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

import toy  # noqa: E402
from model import PCAHead, add_latent_tokens, load_processor, load_vlm  # noqa: E402

PIXELS = (56 * 56, 1280 * 28 * 28)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a random tiny Qwen2.5-VL, its tower's embeddings of about unit scale."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = toy.make_tokenizer()
    vlm = toy.make_vlm(tokenizer)
    with torch.no_grad():
        for p in vlm.parameters():
            if p.ndim > 1:
                p.mul_(3)
    vlm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    toy.Qwen2VLImageProcessorPil(min_pixels=PIXELS[0], max_pixels=PIXELS[1]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with train, val and test JSONL of the toy world; one training example has two images and two spans."""
    folder = tmp_path_factory.mktemp("world")
    for split, n in (("train", 48), ("val", 8), ("test", 12)):
        toy.write_split(folder, split, n)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    two = rows[3]
    two["images"] += rows[4]["images"]
    two["aux_images"] += rows[4]["aux_images"]
    two["response"] = two["response"].replace(
        "</parser>", "</parser> <latent></latent> <parser> again </parser>"
    )
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def loaded(base):
    """(vlm, tokenizer, processor) with the latent tokens added."""
    vlm, tokenizer = load_vlm(base)
    add_latent_tokens(vlm, tokenizer)
    return vlm, tokenizer, load_processor(base, *PIXELS)


def random_pca(d=128, k=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, k, generator=g))[0]
    eigenvalues = torch.arange(k, 0, -1).float() * 4
    return {
        "basis": basis,
        "mean": torch.randn(d, generator=g),
        "eigenvalues": eigenvalues,
        "total_variance": float(eigenvalues.sum()) + 1.0,
    }


@pytest.fixture
def head():
    """A PCA head away from its start, so that the adapter counts."""
    torch.manual_seed(1)
    head = PCAHead(random_pca(), K=4)
    torch.nn.init.normal_(head.down.weight, std=0.3)
    return head.eval()


def run(script, *args, ranks=1, ok=True, env=None, timeout=300):
    """Run a script in a subprocess, under torchrun for several ranks. Returns its output; asserts how it ended."""
    launch = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else [sys.executable]
    )
    done = subprocess.run(
        [*launch, str(ROOT / script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {}),
        check=False,
    )
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, text[-4000:]
    if not ok:
        assert "Traceback" not in text, text[-4000:]
    return text


# --------------------------------------------------------------------------------------------------
# what several files of tests share: a trained model, a run that is killed, a broken data file

TOY = ROOT / "toy" / "base"  # at temperature 2 it solves some questions, sometimes


@pytest.fixture(scope="session")
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


def sampling(base, world, out, **change):
    """The arguments of a run of sample_difficulty.py."""
    settings = {
        "base": base,
        "data": world / "train.jsonl",
        "out": out,
        "batch": 5,
        "max_new_tokens": 16,
        "temperature": 2.0,
    } | change
    return [f"--{k}={v}" for k, v in settings.items()]


def kill_when(args, path, lines):
    """Start a script, and kill it once a file has this many lines."""
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
