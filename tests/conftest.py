"""What tests share: a tiny Qwen2.5-VL of random weights, a few examples of the toy world, and ways
to run a script as a user does."""

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

import toy
from data import load_examples, open_image, write_lines
from generate import Decoder
from model import PCAHead, add_latent_tokens, latent_ids, load_processor, load_vlm

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
    """A folder of train, val and test JSONL of the toy world; one row has two images and spans."""
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


def launcher(ranks):
    """The command that starts a script on so many ranks."""
    if ranks == 1:
        return [sys.executable]
    torchrun = "torch.distributed.run"
    return [sys.executable, "-m", torchrun, "--standalone", f"--nproc-per-node={ranks}"]


def run(script, *args, ranks=1, ok=True, env=None, timeout=300):
    """Run a script in a subprocess, under torchrun for several ranks.

    Returns its output; asserts how it ended.
    """
    done = subprocess.run(
        [*launcher(ranks), str(ROOT / script), *map(str, args)],
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


def examples(world, n=6):
    return load_examples(world / "train.jsonl")[:n]


def hf_inputs(vlm, processor, ids, paths):
    image = processor(images=[open_image(p) for p in paths], return_tensors="pt") if paths else {}
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "mm_token_type_ids": (ids == vlm.config.image_token_id).int()[None],
        **image,
    }


def make_open(vlm, tokenizer, prompts, opens):
    """Turn the LM head so that prompts[opens] begin with a latent span, and the others do not."""
    with torch.no_grad():
        h = torch.cat([Decoder(vlm, [p], 1, 0).h[:, 0] for p in prompts])
        want = torch.tensor([60.0 if i in opens else -60.0 for i in range(len(prompts))])
        vlm.lm_head.weight[latent_ids(tokenizer)[0]] = torch.linalg.lstsq(
            h, want[:, None]
        ).solution[:, 0]


def record(calls):
    def on_step(rows, tokens, x, h):
        with torch.inference_mode(False):  # clones that autograd may touch
            calls.extend(zip(rows.tolist(), tokens.tolist(), x.clone(), h.clone()))

    return on_step


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, base, world):
    """Targets and a difficulty file in which every third example is solved."""
    folder = tmp_path_factory.mktemp("inputs")
    run(
        "fit_pca.py",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--out={folder}/pca",
    )
    counts = []
    for i, row in enumerate(load_examples(world / "train.jsonl")):
        correct = int(i % 3 == 0)
        line = {"id": row["id"], "n": 8, "correct": correct, "accuracy": correct / 8}
        counts.append(line | {"lower_bound": False, "n_options": 0, "answers": []})
    write_lines(folder / "difficulty.jsonl", counts)
    return [
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--pca={folder}/pca",
        f"--difficulty={folder}/difficulty.jsonl",
        "--global_batch=4",
        "--lr=1e-3",
        "--eval_every=2",
    ]


def logged(folder):
    """The lines of a training log: the configuration, then one a step."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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
