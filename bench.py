"""How fast is it? Beside Hugging Face's own code, as ratios measured in one run.

(a) 8 samples per question: ours against HF generate(num_return_sequences=8), on the same prompts
    and temperature
(b) a training step: ours against HF's labels= forward with auxiliary images encoded in the step and
    padding to the longest, on a narrow model with Qwen's vocabulary of 152,064; and the peak memory
    of both
(c) a decode step in latent mode against one in text mode
(d) the vision tower on a 4K image: ours against the stock SDPA path, one call per window; and the
    peak memory of both
(e) one answer at a time with Qwen's vocabulary: ours against HF generate, by the size of the image
(f) what a decode step costs by rows, by image tokens and by position
(g) a data file of a million rows: seconds to check it, and the memory of the process
(h) the prefill of 16 prompts with 1,024 image tokens, from their features on; and the peak memory
    of both

With --shape=7b on a CUDA machine: the same loops on a 7B-shaped model with random weights, in
absolute numbers.

    python bench.py               # toy shapes, CPU or GPU; about 15 minutes on two quiet cores
    python bench.py --shape=7b    # needs an 80 GB GPU; 7b-smoke runs the same code, small, anywhere
"""

import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

import decoder
import sample_difficulty
import toy
import train
from answers import extract_answer, is_correct
from data import load_examples
from decoder import left_padded
from faster import quicken, quicken_tower, tower_attention
from files import json_line
from flops import amounts, flops_each, rates
from generate import generate, make_prompts, pick, stream, to_text
from images import open_image, png_of
from launch import check_choices, pick_device, start
from method import cross_entropy
from model import (
    IGNORE,
    LATENT_PAD,
    LATENT_START,
    PCAHead,
    add_latent_tokens,
    embed,
    encode,
    encode_images,
    grid_features,
    load_processor,
    load_vlm,
    positions,
)

# --------------------------------------------------------------------------------------------------
base = "toy/base"  # the model of (a) and (c)
data = "out/toy/train.jsonl"  # their questions
only = ""  # a to h; "" for all
shape = "toy"  # or 7b, 7b-smoke: absolute numbers
repeats = 5  # runs of each side, in turn, in this process; the median counts
questions = 16  # per batch
new_tokens = 32  # per answer of (a) and (e)
threads = 2  # of the CPU
side = ""  # internal: (b), (d), (g) and (h) set it for their subprocesses
# --------------------------------------------------------------------------------------------------

VOCABULARY = 152064  # rows of Qwen2.5-VL's embedding
PIXELS = (56 * 56, 1280 * 28 * 28)
SPAN = 36  # latents of a span in (b)
device = pick_device()


# --------------------------------------------------------------------------------------------------
# measuring


def clock():
    # a GPU works on after the call has returned: without this, only the launch is timed
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


TABLE = []  # (what, ours, theirs, ratio), as text


def note(what, ours, theirs="", ratio=""):
    """Print a line, and keep it for the table."""
    TABLE.append((what, ours, theirs, ratio))
    print(f"{what:66} {ours:>12} {theirs:>12} {ratio:>12}", flush=True)


def print_table():
    """The lines as the table of docs/speed.md, with the machine."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", cpu.read_text()) if cpu.exists() else []
    machine = f"{(names or ['a CPU'])[0]}, {threads} threads"
    if device.type == "cuda":  # (b), (g) and (h) are of the CPU there, too
        machine = f"{torch.cuda.get_device_name()}; (b), (g), (h): {machine}"
    print(f"\n{machine}, torch {torch.__version__}\n")
    for row in (("", "ours", "Hugging Face", "ratio"), ("---",) * 4, *TABLE):
        print("| " + " | ".join(row) + " |")


def ms(seconds):
    return f"{1e3 * seconds:.2f} ms"


def median_seconds(f):
    """The median time of `repeats` calls, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        f()
        times.append(clock() - began)
    return statistics.median(times[1:])


def versus(name, ours, theirs):
    """Run both in turn and note the ratio of their median times."""
    times = {ours: [], theirs: []}
    for i in range(repeats + 1):
        # in turn, so that a machine that slows down slows both
        for f in (ours, theirs):
            began = clock()
            f()
            if i > 0:  # the first is a warm-up
                times[f].append(clock() - began)
    # medians: one hiccup of a shared machine does not count
    a, b = statistics.median(times[ours]), statistics.median(times[theirs])
    note(name, f"{a:.3f} s", f"{b:.3f} s", f"{b / a:.2f} x")


ROUNDS = 3  # of a measurement in processes of its own


def in_processes(part, name):
    """Run both sides of a part in turn, in processes of their own: so is their peak memory."""
    found = {"ours": [], "hf": []}
    for _ in range(ROUNDS):
        for one, runs in found.items():
            runs.append(in_process(part, one))
    a, b = (statistics.median(run["s"] for run in runs) for runs in found.values())
    note(name, f"{a:.3f} s", f"{b:.3f} s", f"{b / a:.2f} x")
    a, b = (max(run["gib"] for run in runs) for runs in found.values())
    note(f"({part}) its peak memory", f"{a:.2f} GiB", f"{b:.2f} GiB", f"{a / b:.2f} of it")


def in_process(part, one):
    """What a side of a part reports, run alone in a process."""
    same = {name: globals()[name] for name in ("threads", "data", "questions")}
    settings = [f"--{name}={value}" for name, value in same.items()]
    settings += [f"--only={part}", f"--side={one}"]
    done = subprocess.run([sys.executable, __file__, *settings], capture_output=True, text=True)
    # the last lines: libraries may print warnings before them
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def report_side(f, n, where):
    """Run f n times on a device; print its median seconds and this process's peak GiB as JSON."""
    times = []
    for _ in range(n):
        began = clock()
        f()
        times.append(clock() - began)
    gib = train.peak_memory(where) / 2**30
    print(json.dumps({"s": statistics.median(times), "gib": gib}))


def random_pca(d, k):
    """A PCA of k random components of width d."""
    return {
        # numbers do not matter for time, but columns are orthonormal, as a PCA's are
        "basis": torch.linalg.qr(torch.randn(d, k))[0],
        "mean": torch.zeros(d),
        "eigenvalues": torch.ones(k),
        "total_variance": float(k),
    }


# --------------------------------------------------------------------------------------------------
# (a) sampling

BATCH = sample_difficulty.batch  # questions of the whole job
# top_k=0 and top_p=1: from the whole distribution, as ours
HF_SAMPLING = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=8)


def sampling():
    vlm, tokenizer = load_vlm(base, device=device)
    # not by load_vlm, which gives the vision tower our attention and patch embedding
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    stock.to(device).eval()
    rows = load_examples(data)
    small = load_processor(base, *PIXELS)
    large = load_processor(base, 448 * 448, 448 * 448)  # 16 x 16 = 256 image tokens
    ours = {"n_samples": 8, "temperature": 1.0, "seeds": list(range(8 * questions))}
    # the longer the prompt, the more it saves to run it once for eight samples
    for name, processor in (("short prompts", small), ("256 image tokens", large)):
        batch = (tokenizer, processor, rows[:questions])
        versus(
            f"(a) 8 samples, {new_tokens} tokens each, {name}",
            partial(our_answers, vlm, *batch, **ours),
            partial(their_answers, stock, *batch, **HF_SAMPLING),
        )
    job = (tokenizer, small, rows[: 16 * questions])
    versus(
        f"(a) {len(job[2])} questions: natural stops, early stop, {BATCH} a batch",
        partial(our_job, vlm, *job),
        partial(their_job, stock, *job),
    )


def our_answers(vlm, tokenizer, processor, rows, **sampling):
    """The prompt's cache is made once a question, and shared by its samples."""
    prompts = make_prompts(vlm, tokenizer, processor, rows)
    never = stops(tokenizer)
    generate(vlm, None, tokenizer, prompts, max_new_tokens=new_tokens, suppress=never, **sampling)


def their_answers(stock, tokenizer, processor, rows, num_return_sequences=1, **sampling):
    """Every sample has a prompt, and a picture, of its own."""
    out = stock.generate(
        **hf_batch(stock, tokenizer, processor, rows),
        max_new_tokens=new_tokens,
        suppress_tokens=stops(tokenizer),
        num_return_sequences=num_return_sequences,
        **sampling,
    )
    assert out.shape[0] == num_return_sequences * len(rows)


def stops(tokenizer):
    """What would end an answer: suppressed, so that all rows run to the end."""
    return [tokenizer.eos_token_id, tokenizer.pad_token_id]


def our_job(vlm, tokenizer, processor, rows):
    """The stage itself, by its defaults."""
    tallies = list(sample_difficulty.sample(rows, vlm, tokenizer, processor))
    assert len(tallies) == len(rows)


def their_job(stock, tokenizer, processor, rows):
    """Sample and check a batch after another, 8 answers to every question."""
    for i in range(0, len(rows), BATCH):
        part = list(rows[i : i + BATCH])
        batch = hf_batch(stock, tokenizer, processor, part)
        out = stock.generate(**batch, max_new_tokens=24, **HF_SAMPLING)
        # (8 a question, new tokens): HF returns the prompts, too
        new = out[:, batch["input_ids"].shape[1] :]
        # the samples of a question are neighbours
        for j, ids in enumerate(new.tolist()):
            is_right(tokenizer, part[j // 8], ids)


def is_right(tokenizer, row, ids):
    answer, _ = extract_answer(to_text(tokenizer, ids))
    return is_correct(answer, row)


def hf_batch(vlm, tokenizer, processor, rows):
    """Left-padded inputs for HF generate."""
    examples = [encode(vlm, tokenizer, processor, row) for row in rows]
    ids, _, mask = left_padded(examples, tokenizer.pad_token_id)
    images = [open_image(path) for row in rows for path in row["images"]]
    batch = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "mm_token_type_ids": (ids == vlm.config.image_token_id).int(),
        **processor(images=images, return_tensors="pt"),
    }
    return {k: v.to(device) for k, v in batch.items()}


# --------------------------------------------------------------------------------------------------
# (b) a training step


class Training(NamedTuple):
    """What a step trains, and on what: 8 examples of uneven length, each with a span of latents."""

    vlm: nn.Module
    processor: object
    head: nn.Module
    latent: int  # the id of a latent pad
    ids: list  # (T) an example
    labels: list  # (T) an example
    images: list
    aux: list  # auxiliary images
    targets: torch.Tensor  # (8, SPAN, d) their features, as fit_pca.py leaves them on the disk


def training():
    in_processes("b", "(b) a training step, V = 152,064, K = 36")


def training_side():
    """One side of (b). Prints JSON."""
    backward = our_backward if side == "ours" else their_backward
    job = narrow_job()
    # all that train.py trains: the decoder, its embeddings and LM head, and the latent head
    params = [p for p in [*job.vlm.parameters(), *job.head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)

    def step():
        backward(job)
        optimizer.step()
        optimizer.zero_grad()

    report_side(step, 3, torch.device("cpu"))


def our_backward(job):
    """As train.py: micro-batches of rows of like length, targets at hand, logits in chunks."""
    # both losses are divided by their counts over the whole batch
    n = sum(int((labels != IGNORE).sum()) for labels in job.labels)
    lengths = [len(ids) for ids in job.ids]
    for part in train.micro_batches(lengths, 1, 2048):  # for one rank, of 2,048 padded tokens
        ids = pad([job.ids[i] for i in part], 0)  # (B, T)
        labels = pad([job.labels[i] for i in part], IGNORE)
        # the vision tower is frozen, here and in train.py
        with torch.no_grad():
            v, grids = encode_images(job.vlm, job.processor, [job.images[i] for i in part])
        rows = zip(part, grids.tolist())
        # each (3, T); padded along T, it must be (T, 3)
        pos = pad([positions(job.vlm, job.ids[i], [grid]).T for i, grid in rows], 0)
        t = job.targets[part].flatten(0, 1)  # (M, d)
        x = embed(job.vlm, ids, torch.cat(v), t, job.latent)
        out = job.vlm.model.language_model(
            inputs_embeds=x, position_ids=pos.permute(2, 0, 1), use_cache=False
        )
        h = out.last_hidden_state[:, :-1]  # the state at t predicts the token at t + 1
        ids, labels = ids[:, 1:], labels[:, 1:]
        on = labels != IGNORE
        ce = cross_entropy(h[on], labels[on], job.vlm.lm_head) / n
        error = job.head.squared_error(h[ids == job.latent], t).sum()
        # at once, so that a micro-batch's activations are gone before the next one's
        (ce + error / job.targets.numel()).backward()


def their_backward(job):
    """HF's own loss on the whole batch, padded to the longest; targets encoded in the step."""
    ids, labels = pad(job.ids, 0), pad(job.labels, IGNORE)
    # 1 where a token stands: HF's attention needs to be told of the padding
    mask = pad([torch.ones_like(x) for x in job.ids], 0)
    with torch.no_grad():
        v, grids = encode_images(job.vlm, job.processor, job.images)
        # as a trainer does that keeps no targets on the disk
        t = grid_features(job.vlm, job.processor, job.aux, SPAN, "pool").flatten(0, 1)
    is_image = (ids == job.vlm.config.image_token_id).int()
    pos, _ = job.vlm.model.get_rope_index(ids, is_image, grids, attention_mask=mask)
    out = job.vlm(
        inputs_embeds=embed(job.vlm, ids, torch.cat(v), t, job.latent),
        position_ids=pos,
        attention_mask=mask,
        labels=labels,
        use_cache=False,
        output_hidden_states=True,
    )
    h = out.hidden_states[-1][:, :-1][ids[:, 1:] == job.latent]  # (M, d), after the final norm
    (out.loss + F.mse_loss(job.head(h), t)).backward()


def pad(rows, value):
    return pad_sequence(rows, batch_first=True, padding_value=value)


def narrow_job():
    """A Training of width 256 with Qwen's vocabulary on noise."""
    tokenizer = toy.make_tokenizer()
    # both processes make the same weights and examples
    torch.manual_seed(0)
    vlm = narrow_vlm(tokenizer)
    add_latent_tokens(vlm, tokenizer)
    vlm.model.visual.requires_grad_(False)
    if side == "ours":
        quicken(vlm)
    processor = Qwen2VLImageProcessorPil(min_pixels=PIXELS[0], max_pixels=PIXELS[1])
    pca = random_pca(256, 64)
    rng = random.Random(0)
    images = [noise(rng) for _ in range(8)]
    aux = [noise(rng) for _ in range(8)]
    all_ids, all_labels = zip(*(random_example(image, tokenizer, rng) for image in images))
    return Training(
        vlm=vlm.train(),
        processor=processor,
        head=PCAHead(pca, SPAN),
        latent=tokenizer.convert_tokens_to_ids(LATENT_PAD),
        ids=all_ids,
        labels=all_labels,
        images=images,
        aux=aux,
        targets=grid_features(vlm, processor, aux, SPAN, "pool").detach().bfloat16(),
    )


def narrow_vlm(tokenizer):
    """Random weights: 4 layers of width 256 below a head of VOCABULARY rows."""
    at = tokenizer.convert_tokens_to_ids
    # narrow, so that the 152,064 logits per token weigh as they do nowhere else: what (b) is about
    text = dict(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        # the sections add up to half of a head's 64 dims
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]),
    )
    vision = dict(
        depth=4,
        hidden_size=128,
        intermediate_size=344,
        num_heads=4,
        out_hidden_size=256,
        window_size=112,
        fullatt_block_indexes=[3],
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=at("<|image_pad|>"),
        video_token_id=at("<|video_pad|>"),
        vision_start_token_id=at("<|vision_start|>"),
        vision_end_token_id=at("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def noise(rng):
    """An image of 6 to 19 merged tokens a side."""
    size = (28 * rng.randrange(6, 20), 28 * rng.randrange(6, 20))
    return Image.effect_noise(size, 60).convert("RGB")


def random_example(image, tokenizer, rng):
    """Ids and labels (T): the image, 40 tokens of question, an answer with a span of latents."""
    at = tokenizer.convert_tokens_to_ids
    n = image.width * image.height // 28**2
    vision = [at("<|vision_start|>"), *[at("<|image_pad|>")] * n, at("<|vision_end|>")]
    prompt = vision + random_words(rng, 40)
    before = random_words(rng, rng.randrange(20, 100))
    after = random_words(rng, rng.randrange(20, 100))
    span = [at(LATENT_START), *[at(LATENT_PAD)] * SPAN, at("<|latent_end|>")]
    answer = [*before, *span, *after]
    # latents are regressed, not classified; the question is not learned
    labels = [IGNORE if t == at(LATENT_PAD) else t for t in answer]
    return torch.tensor(prompt + answer), torch.tensor([IGNORE] * len(prompt) + labels)


def random_words(rng, n):
    return [rng.randrange(20, 400) for _ in range(n)]  # ids of ordinary text


# --------------------------------------------------------------------------------------------------
# (c) latent mode


def latent_mode():
    vlm, tokenizer = load_vlm(base, device=device)
    add_latent_tokens(vlm, tokenizer)
    processor = load_processor(base, *PIXELS)
    rows = load_examples(data)[: 4 * questions]
    prompts = make_prompts(vlm, tokenizer, processor, rows)
    pca = random_pca(vlm.config.text_config.hidden_size, 8)
    head = PCAHead(pca, 128).to(device).eval()  # one span fills the answer
    latent_start = tokenizer.convert_tokens_to_ids(LATENT_START)
    # suppressed: all that would end a span of latents, or that would open one
    all_but_start = [t for t in range(len(tokenizer)) if t != latent_start]
    text_only = stops(tokenizer)

    run = partial(step_times, vlm, head, tokenizer, prompts, max_new_tokens=128)
    latent, text = [], []
    for i in range(repeats + 1):
        # latents from the first token to the last, against text alone: zero never opens a span
        of_latent = run(suppress=all_but_start, intervention="clean")
        of_text = run(suppress=text_only, intervention="zero")
        if i > 0:  # the first is a warm-up
            latent += of_latent[2:]  # without the step that opens the span
            text += of_text[2:]
    a, b = statistics.median(latent), statistics.median(text)
    name = f"(c) a decode step of {len(prompts)} rows in latent mode, against text mode"
    note(name, ms(a), f"{ms(b)} (text)", f"{a / b:.2f} of it")


def step_times(*args, **settings):
    """Seconds of each decode step of generate(...), from one to the next."""
    stamps = []
    generate(*args, on_step=lambda *_: stamps.append(clock()), **settings)
    return [after - before for before, after in zip(stamps, stamps[1:])]


# --------------------------------------------------------------------------------------------------
# (d) the vision tower

GRID_4K = (1, 250, 288)  # patches of an image of 4024 x 3503 px: 1,152 windows
# the last window of each row is narrower: windows of one length are no neighbours
GRID_RAGGED = (1, 250, 286)


def vision():
    # the toy's tower, then 7B's
    for heads, dim in ((4, 16), (16, 80)):
        for name, grid in (("4K", GRID_4K), ("4K, ragged", GRID_RAGGED)):
            versus(
                f"(d) window attention alone, {name}, {heads} heads of {dim}",
                *window_attention(heads, dim, grid),
            )
    versus(
        "(d) 4 window layers, 4K, 4 heads of 16",
        *forwards(make_tower(4, 16, 4, []).to(device), GRID_4K),
    )
    versus(
        "(d) 3 window layers + 1 full, 640 tokens, 16 heads of 80",
        *forwards(make_tower(16, 80, 4, [3]).to(device), (1, 32, 80)),
    )
    in_processes("d", "(d) 3 window layers + 1 full, 4K, 4 heads of 16, once")


def tower_side():
    """One side of (d): one forward over a 4K image. Prints JSON.

    The layer of full attention takes nearly all of the time.
    """
    # once, without a warm-up: it is the peak memory that this side is for
    ours, theirs = forwards(make_tower(4, 16, 4, [3]).to(device), GRID_4K)
    report_side(ours if side == "ours" else theirs, 1, device)


def make_tower(heads, dim, depth, full):
    """A tower of random weights, full attention in the layers `full`; 7B's has 16 heads of 80."""
    config = Qwen2_5_VLVisionConfig(
        hidden_size=heads * dim,
        num_heads=heads,
        intermediate_size=heads * dim * 171 // 64,  # as wide as 7B's: 3,420 for 1,280
        depth=depth,
        fullatt_block_indexes=[*full],
        out_hidden_size=64,
    )
    return Qwen2_5_VisionTransformerPretrainedModel(config).eval()


def forwards(tower, grid):
    """Two functions that run a tower over one image of noise: quickened, and as it is."""
    grids = torch.tensor([grid], device=device)
    # (patches, 1176): 3 colours, 2 frames, 14 x 14 pixels
    pixels = torch.randn(grids.prod(), 3 * 2 * 14 * 14, device=device, dtype=tower.dtype)

    ours = deepcopy(tower)
    quicken_tower(ours)

    @torch.inference_mode()
    def forward(tower):
        tower(pixels, grid_thw=grids)

    return partial(forward, ours), partial(forward, tower)


def window_attention(heads, dim, grid):
    """The attention of one layer alone, without its projections: ours and the stock SDPA loop."""
    grids = torch.tensor([grid], device=device)
    cu_seqlens = get_vision_window_index(grids, 2, 112, 14)[1]  # bounds of windows of 8 patches
    size = (3, 1, cu_seqlens[-1], heads, dim)
    q, k, v = torch.randn(size, device=device).transpose(2, 3)  # each (1, heads, N, D)
    layer = nn.Identity()
    scaling = dim**-0.5
    sdpa = AttentionInterface()["sdpa"]

    def ours():
        return tower_attention(layer, q, k, v, None, scaling, 0.0, cu_seqlens)

    # as transformers does it without a flash kernel: split, one call per window, join
    def theirs():
        lengths = cu_seqlens.diff().tolist()
        windows = zip(*(x.split(lengths, 2) for x in (q, k, v)))
        out = [sdpa(layer, *w, None, scaling=scaling, is_causal=False)[0] for w in windows]
        return torch.cat(out, 1)

    return ours, theirs


# --------------------------------------------------------------------------------------------------
# (e) one answer at a time, (f) growth

SIDES = (8, 32, 64)  # merged tokens of an image's side: 64 to 4,096 image tokens


def one_by_one():
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    stock = narrow_vlm(tokenizer).eval().to(device)
    ours = deepcopy(stock)
    quicken(ours)
    processor = Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=16384 * 28 * 28)
    for cells in SIDES:
        rows = [question_of_noise(cells)]
        versus(
            f"(e) an answer of {new_tokens} tokens, {cells**2:,} image tokens, V = {VOCABULARY:,}",
            partial(our_answers, ours, tokenizer, processor, rows),
            partial(their_answers, stock, tokenizer, processor, rows, do_sample=False),
        )


def question_of_noise(cells):
    """A row with one image of cells x cells merged tokens."""
    image = Image.effect_noise((28 * cells, 28 * cells), 60).convert("RGB")
    return {"id": "1", "images": [png_of(image)], "question": "Which two pieces?"}


def growth():
    """A step beside one of more rows, image tokens or positions."""
    vlm, tokenizer = load_vlm(base, device=device)
    rows = load_examples(data)

    def steps(n, image_tokens, length):
        processor = load_processor(base, image_tokens * 784, image_tokens * 784)
        prompts = make_prompts(vlm, tokenizer, processor, rows[:n])
        settings = {"max_new_tokens": length, "n_samples": 8, "suppress": stops(tokenizer)}
        return step_times(vlm, None, tokenizer, prompts, **settings)

    def compared(what, one, two):
        a, b = map(statistics.median, (one, two))
        note(f"(f) a decode step, {what}", ms(a), ms(b), f"{b / a:.2f} x")

    compared("64 rows, then 128", steps(8, 64, 64), steps(16, 64, 64))
    compared("128 rows with 121 image tokens, then 484", steps(16, 121, 64), steps(16, 484, 64))
    long = steps(16, 64, 1024)
    compared("128 rows, its 250th token, then its 1,000th", long[240:260], long[990:1010])
    note("(f) the slowest of these 1,024 steps", ms(max(long[8:])))


# --------------------------------------------------------------------------------------------------
# (g) a million rows

MILLION = 1_000_000


def million_rows():
    found = in_process("g", "ours")
    note(
        f"(g) {MILLION:,} rows checked, and held", f"{found['s']:.1f} s", f"{found['gib']:.2f} GiB"
    )


def million_side():
    """Check a file of a million rows, those of `data` over and over. Prints JSON."""
    rows = [dict(row) for row in load_examples(Path(data).resolve())]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with open(path, "w") as f:
            for n in range(MILLION):
                f.write(json_line(rows[n % len(rows)] | {"id": f"{n}"}))
        report_side(lambda: load_examples(path), 1, torch.device("cpu"))


# --------------------------------------------------------------------------------------------------
# (h) prefill


def prefill():
    in_processes("h", "(h) prefill, 16 prompts of 1,024 image tokens")


def prefill_side():
    """One side of (h). Prints JSON."""
    vlm = narrow_vlm(toy.make_tokenizer()).eval()
    ids = torch.randint(20, 400, (1060,))
    ids[10:1034] = vlm.config.image_token_id
    vision = torch.randn(1024, 256)  # of the tower, at hand on both sides
    pos = torch.arange(1060).expand(3, -1)  # what positions they are does not matter here
    prompts = [{"ids": ids, "pos": pos, "vision": vision}] * questions
    lm = vlm.model.language_model

    @torch.inference_mode()
    def ours():
        vlm.lm_head(decoder.Decoder(vlm, pad_id=0).read(prompts).last)

    # as generate() calls it: all states, the logits of the last, a cache
    @torch.inference_mode()
    def theirs():
        at = (ids == vlm.config.image_token_id).expand(questions, -1)
        x = lm.embed_tokens(ids.expand(questions, -1))
        x = x.masked_scatter(at[..., None].expand_as(x), vision.repeat(questions, 1))
        out = lm(
            inputs_embeds=x,
            attention_mask=torch.ones_like(at, dtype=torch.long),
            position_ids=pos[:, None].expand(-1, questions, -1),
            use_cache=True,
        )
        vlm.lm_head(out.last_hidden_state[:, -1:])

    report_side(ours if side == "ours" else theirs, 3, torch.device("cpu"))


# --------------------------------------------------------------------------------------------------
# 7B shapes

# fmt: off
TEXT = {
    "7b": dict(
        hidden_size=3584, intermediate_size=18944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    ),
    "7b-smoke": dict(
        hidden_size=256, intermediate_size=512,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    ),
}
# fmt: on


def seven_b():
    """Random weights in bfloat16: decoding, training, and the vision tower."""
    if shape == "7b" and device.type != "cuda":
        raise SystemExit(
            "--shape=7b needs a CUDA GPU; this machine has none "
            "(7b-smoke runs the same code, small)"
        )
    vlm = shaped_vlm()
    # other modules of the same weights: 7B does not fit twice
    stock = deepcopy(vlm, {id(p): p for p in vlm.parameters()})
    quicken(vlm)
    decoding(vlm, stock, toy.make_tokenizer())
    making_room(vlm, toy.make_tokenizer())
    forward_and_backward(vlm)
    del vlm, stock
    # 7b-smoke: eight layers, of which one has full attention
    heads, dim, depth, grid = 4, 16, 8, (1, 50, 62)
    if shape == "7b":
        heads, dim, depth, grid = 16, 80, 32, GRID_4K
    every_eighth = range(7, depth, 8)  # has full attention, as in 7B's tower
    for name, full in (("", every_eighth), (", window layers alone", [])):
        tower = make_tower(heads, dim, depth, full).to(device, torch.bfloat16)
        sides = forwards(tower, grid)
        versus(f"vision tower, {depth} layers, {grid[1] * grid[2] // 4:,} tokens{name}", *sides)


def shaped_vlm():
    """A Qwen2.5-VL whose decoder has the shape TEXT[shape], on the device, in bfloat16."""
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    text = TEXT[shape] | {"vocab_size": VOCABULARY, "rope_parameters": rope}
    vision = dict(  # not used: as small as it can be
        depth=2,
        hidden_size=64,
        num_heads=4,
        intermediate_size=64,
        out_hidden_size=text["hidden_size"],
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    # made where and as it stays: a copy of 7B in float32 alone would take 30 GB
    torch.set_default_dtype(torch.bfloat16)
    with device:
        vlm = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return vlm


NO_TOKENS = range(151643, VOCABULARY)  # ids that Qwen's tokenizer lacks
PROMPT = 512  # tokens
LENGTH = 64  # of an answer


def decoding(vlm, stock, tokenizer):
    """A decode step by rows beside the time to read the weights; one answer beside HF's."""
    # all the decoder's weights, once; not the embedding, of which a step reads one row per token
    read = [*vlm.model.language_model.layers.parameters(), *vlm.lm_head.parameters()]
    size = sum(p.numel() * p.element_size() for p in read)  # bytes
    bandwidth = copied_per_s()
    note(
        f"reading {size / 1e9:.1f} GB at the {bandwidth / 1e12:.2f} TB/s of a copy",
        ms(size / bandwidth),
    )
    ids = torch.randint(20, 400, (PROMPT,))
    prompt = prompt_of(ids)
    settings = {"max_new_tokens": LENGTH, "suppress": [*stops(tokenizer), *NO_TOKENS]}
    for n_prompts, n_samples in ((1, 1), (4, 1), (4, 8), (4, 32)):
        for way in ("captured", "eager") if device.type == "cuda" else ("eager",):
            decoder.CAPTURE = "cuda" if way == "captured" else ""
            prompts = [prompt] * n_prompts
            times = step_times(vlm, None, tokenizer, prompts, n_samples=n_samples, **settings)
            s = statistics.median(times[8:])  # the first steps warm up
            rows = n_prompts * n_samples
            found, share = f"{ms(s)}, {rows / s:.0f} tokens/s", f"{size / bandwidth / s:.2f}"
            note(f"a decode step of {rows} rows, {way}; ratio: of that", found, ratio=share)

    decoder.CAPTURE = "cuda"
    answer = f"{LENGTH} tokens to {PROMPT}"
    for n, n_samples, what in ((1, 1, f"an answer, {answer}"), (4, 8, f"8 answers to 4, {answer}")):
        ours = partial(generate, vlm, None, tokenizer, [prompt] * n, **settings)
        theirs = partial(hf_generate, stock, ids.expand(n, -1).to(device), n_samples)
        seeds = list(range(n * n_samples))
        versus(what, partial(ours, n_samples=n_samples, temperature=1.0, seeds=seeds), theirs)


def prompt_of(ids):
    """A prompt of text alone."""
    return {"ids": ids, "pos": torch.arange(len(ids)).expand(3, -1), "vision": None}


# questions, and how many at once; tokens of an answer on average, and at most
ROOM = {"7b": (48, 16, 100, 1024), "7b-smoke": (6, 2, 10, 40)}


def making_room(vlm, tokenizer):
    """8 answers to questions that begin as others end, beside those of whole batches; once each."""
    n, at_once, average, most = ROOM[shape]
    lengths = [PROMPT - 7 * (i % 13) for i in range(n)]
    prompts = [prompt_of(torch.randint(20, 400, (T,))) for T in lengths]
    prompts = [p | {"seeds": range(8 * i, 8 * i + 8)} for i, p in enumerate(prompts)]
    settings = dict(max_new_tokens=most, suppress=[*NO_TOKENS], n_samples=8, temperature=1.0)

    # random weights do not end an answer: chance does, and so lengths are geometric
    def pick_or_end(logits, temperature, top_p, u):
        drawn = pick(logits, temperature, top_p, u)
        return torch.where(u.to(drawn.device) < 1 / average, tokenizer.eos_token_id, drawn)

    def one_after_another(prompts):
        rest = iter(prompts)
        answered = stream(
            vlm, None, tokenizer, lambda n: list(islice(rest, n)), at_once, **settings
        )
        assert len(list(answered)) == len(prompts)

    def in_batches(prompts):
        for i in range(0, len(prompts), at_once):
            part = prompts[i : i + at_once]
            seeds = [seed for p in part for seed in p["seeds"]]
            generate(vlm, None, tokenizer, part, seeds=seeds, **settings)

    seconds = []
    with mock.patch("generate.pick", pick_or_end):
        for way in (one_after_another, in_batches):
            way(prompts[:at_once])  # a warm-up
            began = clock()
            way(prompts)
            seconds.append(clock() - began)
    a, b = seconds
    what = f"8 answers to {n} questions, {at_once} at once, making room; whole batches"
    note(what, f"{a:.2f} s", f"{b:.2f} s", f"{b / a:.2f} x")


def hf_generate(vlm, ids, n_samples):
    vlm.model.rope_deltas = None
    # one length for all, and all tokens are possible
    vlm.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=LENGTH,
        max_new_tokens=LENGTH,
        **HF_SAMPLING | {"num_return_sequences": n_samples},
    )


def copied_per_s():
    """Bytes that the device reads and writes in a second of a large copy."""
    a = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / median_seconds(lambda: b.copy_(a))


def forward_and_backward(vlm):
    """4 rows of 1,024 tokens, a quarter of them labels, checkpointed; no optimizer.

    The gradients are in bfloat16.
    """
    lm = vlm.train().model.language_model
    ids = torch.randint(20, 400, (4, 1024), device=device)
    labels = ids.clone()
    labels[:, :768] = IGNORE
    examples = [{"ids": row, "labels": y} for row, y in zip(ids, labels)]
    each, amount = flops_each(vlm), amounts(examples, vlm)
    for i, layer in enumerate(lm.layers):
        # as train.py wraps them: a layer's activations are computed again in the backward
        lm.layers[i] = checkpoint_wrapper(layer)
    pos = torch.arange(1024, device=device).expand(3, 4, -1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of decoding

    def step():
        # the last 256 tokens of each row are predicted, by the states before them
        out = lm(inputs_embeds=lm.embed_tokens(ids), position_ids=pos, use_cache=False)
        h = out.last_hidden_state[:, 767:-1].flatten(0, 1)
        cross_entropy(h, ids[:, 768:].flatten(), vlm.lm_head).backward()
        vlm.zero_grad()

    s = median_seconds(step)
    rate = rates(amount, each, s, device, "bfloat16")
    found = f"{rate['tokens_per_s']:.0f} tokens/s, {train.peak_memory(device) / 2**30:.1f} GiB"
    if "mfu" in rate:
        found += f", MFU {rate['mfu']:.2f}"
    note("training forward and backward", found)


# --------------------------------------------------------------------------------------------------


def main():
    check_choices(globals(), shape=("toy", *TEXT))
    torch.set_num_threads(threads)
    # in_processes starts this file anew, once a side
    if side:
        sides = {"b": training_side, "d": tower_side, "g": million_side, "h": prefill_side}
        if only not in sides or side not in ("ours", "hf"):
            raise SystemExit(f"side={side!r}: expected ours or hf, with --only=b, d, g or h")
        sides[only]()
    elif shape != "toy":
        seven_b()
        print_table()
    else:
        if not Path(data).exists():
            raise SystemExit(f"{data}: no such file; run `python toy.py data` first")
        parts = {"a": sampling, "b": training, "c": latent_mode, "d": vision}
        parts |= {"e": one_by_one, "f": growth, "g": million_rows, "h": prefill}
        if not set(only) <= set(parts):
            raise SystemExit(f"only={only!r}: expected some of {''.join(parts)}")
        for name, part in parts.items():
            if not only or name in only:
                part()
        print_table()


if __name__ == "__main__":
    start(main)
