"""What tests share: a tiny Qwen2.5-VL of random weights, a few examples of the toy world, and ways
to run a script as a user does."""

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = tempfile.TemporaryDirectory()  # digests of files are remembered here, not at home
os.environ["XDG_CACHE_HOME"] = CACHE.name
torch.set_num_threads(1)

import huggingface_hub.constants
from official_files import official
from safetensors.torch import load_file
from transformers import Qwen2VLImageProcessorPil

import build_data
import toy
from data import load_examples, question_key
from decoder import Decoder
from files import folder_digest, read_lines, write_lines
from generate import stream
from images import open_image
from model import PCAHead, add_latent_tokens, latent_ids, load_processor, load_vlm

PIXELS = (56 * 56, 1280 * 28 * 28)


@pytest.fixture(autouse=True)
def one_thread():
    """Of a test that set another number the next ones would wait: two processes share two cores."""
    yield
    torch.set_num_threads(1)


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
    Qwen2VLImageProcessorPil(min_pixels=PIXELS[0], max_pixels=PIXELS[1]).save_pretrained(folder)
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


@functools.cache
def warm(offline):
    """warm.py, started once for all scripts that this process runs with or without HF_HUB_OFFLINE,
    which the client reads when it is imported."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).parent / "warm.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": offline},
    )


def begin_warm(argv, environ, ranks, folder):
    """Start a script in a process that has its imports already: (warm.py, the script's own pid).

    Its output goes to stdout and stderr in the folder.
    """
    files = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
    for path in files.values():
        Path(path).touch()
    job = files | {
        "argv": argv,
        "environ": environ,
        "cwd": os.getcwd(),
        "ranks": ranks,
        "limit": 300,
    }
    process = warm(environ["HF_HUB_OFFLINE"])
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return process, int(process.stdout.readline())


def run_warm(argv, environ, ranks):
    """(exit code, output) of a script in a process that has its imports already."""
    with tempfile.TemporaryDirectory() as folder:
        process, _ = begin_warm(argv, environ, ranks, folder)
        code = int(process.stdout.readline())
        assert code >= 0, f"ended by signal {-code}"
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        return code, "".join(path.read_text(errors="replace") for path in files)


def run(script, *args, ranks=1, ok=True, env=None, torchrun=False):
    """Run a script as a user starts it, in forks of a process that has its imports already.

    torchrun: several ranks in processes of their own. Returns its output; asserts how it ended.
    """
    if script == "train.py":  # a second for each of many small runs
        args = ("--curves=0", *args)
    argv = [str(ROOT / script), *map(str, args)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    # another variable may be read by an import; a GPU cannot be used in a fork of who looked at it
    forked = (env or {}).keys() <= {"HF_HUB_OFFLINE", "PYTHONPATH"} and not torchrun
    if forked and (ranks == 1 or not torch.cuda.is_available()):
        code, text = run_warm(argv, environ, ranks)
    else:
        done = subprocess.run(
            [*launcher(ranks), *argv],
            capture_output=True,
            text=True,
            timeout=300,
            env=environ,
            check=False,
        )
        code, text = done.returncode, done.stdout + done.stderr
    assert code == (0 if ok else 1), text[-4000:]
    if not ok:
        assert "Traceback" not in text, text[-4000:]
    return text


def send_completion(request, answers, status=200, headers=(), reason="stop", counted=True):
    """Answer a request to a local endpoint as OpenAI's servers do, a choice for each answer."""
    choices = [
        {
            "index": n,
            "finish_reason": reason,
            "message": {"role": "assistant", "content": answer},
        }
        for n, answer in enumerate(answers)
    ]
    reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    tokens = sum(len(answer.split()) for answer in answers)
    if counted:  # some servers do not
        usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
        reply["usage"] = usage
    text = json.dumps(reply | {"choices": choices}).encode()
    request.send_response(status)
    for name, value in headers:
        request.send_header(name, value)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(text)))
    request.end_headers()
    request.wfile.write(text)


def examples(world, n=6):
    return list(load_examples(world / "train.jsonl")[:n])


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
        h = torch.cat([Decoder(vlm, 0).read([p]).last for p in prompts])
        want = torch.tensor([60.0 if i in opens else -60.0 for i in range(len(prompts))])
        vlm.lm_head.weight[latent_ids(tokenizer)[0]] = torch.linalg.lstsq(
            h, want[:, None]
        ).solution[:, 0]


def answers_that_end(vlm, head, tokenizer, prompts, at_once, on_step=None, waves=(1, 7)):
    """{q: answers}, in waves, with spans, which end at various lengths: at any of many tokens."""
    vlm.generation_config.eos_token_id = list(range(0, len(tokenizer), 20))
    rest = iter(p | {"seeds": range(8 * q, 8 * q + 8)} for q, p in enumerate(prompts))

    def more(n):
        assert 0 < n <= at_once
        return list(islice(rest, n))

    kwargs = dict(max_new_tokens=40, n_samples=sum(waves), waves=waves, temperature=1.0)
    found = dict(stream(vlm, head, tokenizer, more, at_once, on_step=on_step, **kwargs))
    assert sorted(found) == list(range(len(prompts)))
    answers = [a for q in found for a in found[q]]
    assert len({len(a["ids"]) for a in answers}) > 3 and any(len(a["latents"]) for a in answers)
    return found


def assert_same(ours, theirs):
    """Are {q: answers} the same?"""
    for q in ours.keys() | theirs.keys():
        for a, b in zip(ours[q], theirs[q], strict=True):
            assert a["ids"] == b["ids"]
            torch.testing.assert_close(a["latents"], b["latents"], rtol=1e-3, atol=1e-3)


def record(calls):
    def on_step(rows, tokens, x, h):
        with torch.inference_mode(False):  # clones that autograd may touch
            calls.extend(zip(rows.tolist(), tokens.tolist(), x.clone(), h.clone()))

    return on_step


@pytest.fixture(scope="session")
def pca(tmp_path_factory, base, world):
    """The folder of fit_pca.py: targets and PCA."""
    out = tmp_path_factory.mktemp("fit") / "pca"
    run(
        "fit_pca.py",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--out={out}",
    )
    return out


@pytest.fixture(scope="session")
def gap_args(tmp_path_factory, base, world, pca):
    """Settings of train.py, with a difficulty file in which every third example is solved."""
    folder = tmp_path_factory.mktemp("inputs")
    counts = []
    for i, row in enumerate(load_examples(world / "train.jsonl")):
        correct = int(i % 3 == 0)
        line = {"id": row["id"], "key": "", "base": folder_digest(base), "row": question_key(row)}
        line |= {"n": 8, "correct": correct, "accuracy": correct / 8}
        counts.append(line | {"lower_bound": False, "n_options": 0, "answers": []})
    write_lines(folder / "difficulty.jsonl", counts)
    return [
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--pca={pca}",
        f"--difficulty={folder}/difficulty.jsonl",
        "--global_batch=4",
        "--lr=1e-3",
        "--eval_every=2",
    ]


def logged(folder):
    """The lines of a training log: the configuration, then one a step."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def method_args(method, base, data, out, *more):
    """Settings of a short run of train.py, so slow that what is rounded otherwise stays small."""
    return [
        f"--method={method}",
        f"--base={base}",
        f"--data={data}/train.jsonl",
        f"--val_data={data}/val.jsonl",
        f"--out={out}",
        "--global_batch=4",
        "--max_steps=4",
        "--eval_every=2",
        "--save_every=2",
        "--lr=1e-4",
        "--lr_head=1e-4",
        *more,
    ]


def check_other_ways(trained, tmp_path, args_for, fields):
    """One row a micro-batch, 2 ranks with activation checkpointing, and a run that was stopped
    half-way come to what one process came to in `trained`. args_for(out, *more): its settings."""
    one = logged(trained)[1:]
    ways = {
        "rows": (1, ["--token_budget=1"]),
        "ranks": (2, ["--token_budget=300", "--activation_checkpointing=1"]),
    }
    files = ("model.safetensors", "latent_head.safetensors")
    for name, (ranks, more) in ways.items():
        run("train.py", *args_for(tmp_path / name, *more), ranks=ranks)
        for a, b in zip(one, logged(tmp_path / name)[1:]):
            for field in fields:
                if field in a:
                    assert b[field] == pytest.approx(a[field], rel=2e-3, abs=1e-4), (name, field)
        for file in files:
            there = load_file(trained / file)
            for k, v in load_file(tmp_path / name / file).items():
                torch.testing.assert_close(v, there[k], rtol=0.0, atol=1e-3)

    # forget the last checkpoint and what came after it, as a kill would
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "ckpt" / "step-0000004")
    (again / "model.safetensors").unlink()
    run("train.py", *args_for(again))
    for file in files:
        torch.testing.assert_close(
            load_file(again / file), load_file(trained / file), rtol=0.0, atol=0.0
        )
    return again


# --------------------------------------------------------------------------------------------------
# what several files of tests share: a trained model, a run that is killed, a broken data file

TOY = ROOT / "toy" / "base"  # at temperature 2 it solves some questions, sometimes


@pytest.fixture(scope="session")
def stages(base, world, pca):
    """fit_pca.py and a short training run: {base, world, pca, gap}."""
    gap = pca.with_name("gap")  # beside it, as by default
    run(
        "train.py",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        "--val_data=",
        f"--pca={pca}",
        "--difficulty=",
        f"--out={gap}",
        "--max_steps=25",
        "--global_batch=16",
        "--lr=3e-3",
    )
    return {"base": base, "world": world, "pca": pca, "gap": gap}


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


def kill_when(until, script, *args, env=None):
    """Start a script, and kill it once until() holds."""
    argv = [str(ROOT / script), *map(str, args)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    with tempfile.TemporaryDirectory() as folder:
        process, pid = begin_warm(argv, environ, 1, folder)
        try:
            while not until():
                assert Path(f"/proc/{pid}").exists(), f"{script} ended before it could be killed"
                time.sleep(0.005)
        finally:  # the next job's lines come after this one's
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = int(process.stdout.readline())
        assert code == -signal.SIGKILL


def has_lines(path, n):
    """Whether a file has n lines or more."""
    return path.exists() and path.read_bytes().count(b"\n") >= n


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


# what the tests of build_data.py's rooms share

PARSER = "a red bar that reaches twice as high as the blue one"
RESPONSE = (
    f"<think> Compare the bars. <latent></latent> <parser> {PARSER} </parser> So red. </think> "
    "<answer> red </answer>"
)


def noise(seed, size=(64, 48), smooth=4):
    """An image of random blobs that stays itself under mild edits."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (size[1] // smooth, size[0] // smooth, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.BICUBIC)


def photo(seed, size=(200, 150)):
    """An image with the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    n = max(size)
    f = np.fft.fftfreq(n)
    radius = np.hypot(f[:, None], f[None])
    radius[0, 0] = 1
    grey = rng.normal(size=(n, n))
    x = [
        np.fft.ifft2(np.fft.fft2(grey + 0.3 * rng.normal(size=(n, n))) / radius).real
        for _ in range(3)
    ]
    x = np.stack([c / c.std() * 50 + 128 for c in x], -1)[: size[1], : size[0]]
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    return np.asarray(image.convert("RGB"))


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Run a command in this process with settings; returns the rows of <out>/<name>.jsonl."""
    monkeypatch.setattr(build_data, "out", str(tmp_path / "out"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    def call(command, name="", **changes):
        for key, value in changes.items():
            assert type(getattr(build_data, key)) is type(value), key
            monkeypatch.setattr(build_data, key, value)
        build_data.COMMANDS[command]()
        return read_lines(tmp_path / "out" / f"{name}.jsonl") if name else None

    return call


def convert(stage, tmp_path, source, items, name="items.json", **changes):
    """Convert items written in the source's layout; returns kept rows and rejects."""
    path = tmp_path / "src" / name
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(items)
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(item) + "\n" for item in items)
    path.write_text(text)
    changes |= {"source": source, "files": str(path), "root": str(tmp_path / "src")}
    name, out = changes.get("label") or source, tmp_path / "out"
    (out / f"{name}.jsonl").unlink(missing_ok=True)  # one that was made of other files is kept
    kept = stage("convert", name, **changes)
    if kept:
        load_examples(out / f"{name}.jsonl")  # what the other stages demand
    return kept, read_lines(out / f"rejects.{name}.jsonl")


def write_data(tmp_path, rows, name="rows"):
    """Rows with PIL images as a data file of `out`; returns its path."""

    def stored(image):
        if isinstance(image, str):
            return image
        return build_data.store(encoded(image), image, ".png")

    path = tmp_path / "out" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as f:
        for row in rows:
            for field in ("images", "aux_images"):
                row = row | {field: [stored(image) for image in row[field]]}
            f.write(json.dumps(row) + "\n")
    return str(path)


def example(n=0, **change):
    return {
        "id": f"x{n}",
        "images": [noise(n)],
        "question": "Which bar is higher?",
        "answer": "red",
        "response": RESPONSE,
        "aux_images": [noise(n + 1000)],
    } | change


# --------------------------------------------------------------------------------------------------
# what the tests of the benchmarks, of eval.py and of the judge share


@pytest.fixture(scope="session")
def bench_root(tmp_path_factory):
    """(a folder with a small file of each benchmark, its right and wrong outputs); read only."""
    root = tmp_path_factory.mktemp("bench") / "root"
    return root, official(root)
