"""Speed as ratios, measured side by side in one run.

(a) 8 samples a question: ours against HF generate(num_return_sequences=8), on the same prompts and temperature
(b) a training step: ours against HF's labels= forward with auxiliary images encoded in the step and padding to the
    longest, on a narrow model with Qwen's vocabulary of 152,064; and the peak memory of both
(c) a decode step in latent mode against one in text mode
(d) the vision tower on a 4K image: ours against the stock SDPA path, one call a window; and the peak memory of both
With --shape=7b on a CUDA machine: the same loops on a 7B-shaped model with random weights, in absolute numbers.

    python bench.py                 # toy shapes, CPU or GPU; about 10 minutes on two quiet cores
    python bench.py --shape=7b      # needs an 80 GB GPU; 7b-smoke runs the same code, small, anywhere
"""

import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
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

import toy
import train
from answers import extract_answer, is_correct
from data import load_examples, open_image, pick_device, start
from generate import generate, make_prompts, to_text
from method import cross_entropy
from model import (
    IGNORE,
    LATENT_PAD,
    LATENT_START,
    TOWER_ATTENTION,
    PCAHead,
    add_latent_tokens,
    embed,
    encode,
    encode_images,
    grid_features,
    load_processor,
    load_vlm,
    positions,
    tower_attention,
)

# ---------------------------------------------------------------------------------------------------
base = "toy/base"
data = "out/toy/train.jsonl"
only = ""  # a, b, c or d; "" for all
shape = "toy"  # or 7b, 7b-smoke
repeats = 5  # of each measurement, ours and theirs in turn; the median counts
questions = 16  # a batch
new_tokens = 32
threads = 2
side = ""  # set by (b) and (d) for their subprocesses
# ---------------------------------------------------------------------------------------------------

device = pick_device()


def clock():
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def versus(name, ours, theirs):
    """Run both in turn and print the ratio of their median times."""
    times = ([], [])
    for i in range(repeats + 1):
        for f, t in zip((ours, theirs), times):
            start = clock()
            f()
            if i:  # the first is a warm-up
                t.append(clock() - start)
    a, b = map(statistics.median, times)
    print(f"{name:58} ours {a:8.3f} s   HF {b:8.3f} s   {b / a:5.2f} x")
    return b / a


def in_processes(part, name):
    """Run both sides of a part, each alone in a process so that its peak memory is its own, and print both ratios."""
    found = []
    for s in ("ours", "hf"):
        done = subprocess.run(
            [sys.executable, __file__, f"--only={part}", f"--side={s}", f"--threads={threads}"],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    a, b = found
    print(f"{name:58} ours {a['s']:8.3f} s   HF {b['s']:8.3f} s   {b['s'] / a['s']:5.2f} x")
    print(
        f"{f'({part}) peak memory':58} ours {a['gib']:8.2f} GiB HF {b['gib']:8.2f} GiB {a['gib'] / b['gib']:5.2f} of it"
    )


def report_side(f, n, where):
    """Run f n times on a device; print its median seconds and this process's peak GiB as JSON."""
    times = []
    for _ in range(n):
        start = clock()
        f()
        times.append(clock() - start)
    print(json.dumps({"s": statistics.median(times), "gib": train.peak_memory(where) / 2**30}))


# --- (a) sampling


def hf_batch(vlm, tokenizer, processor, rows):
    """Left-padded inputs for HF generate."""
    examples = [encode(vlm, tokenizer, processor, row) for row in rows]
    T = max(len(e["ids"]) for e in examples)
    left = lambda x, v: torch.cat([torch.full((T - len(x),), v), x])  # noqa: E731
    ids = torch.stack([left(e["ids"], tokenizer.pad_token_id) for e in examples])
    mask = torch.stack([left(torch.ones_like(e["ids"]), 0) for e in examples])
    images = processor(
        images=[open_image(p) for row in rows for p in row["images"]], return_tensors="pt"
    )
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == vlm.config.image_token_id).int(),
        **images,
    }
    return {k: v.to(device) for k, v in batch.items()}


def sampling():
    vlm, tokenizer = load_vlm(base, device=device)
    stock, _ = load_vlm(base, device=device)
    stock.model.visual.config._attn_implementation = "sdpa"
    rows = load_examples(data)
    small = load_processor(base, 56 * 56, 1280 * 28 * 28)
    large = load_processor(base, 448 * 448, 448 * 448)  # 16 x 16 = 256 image tokens
    kwargs = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=8)
    no_stop = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    for name, processor in (("short prompts", small), ("256 image tokens", large)):
        part = rows[:questions]

        def ours():
            generate(
                vlm,
                None,
                tokenizer,
                make_prompts(vlm, tokenizer, processor, part),
                max_new_tokens=new_tokens,
                n_samples=8,
                temperature=1.0,
                seeds=list(range(8 * questions)),
                suppress=no_stop,
            )

        def theirs():
            out = stock.generate(
                **hf_batch(vlm, tokenizer, processor, part),
                max_new_tokens=new_tokens,
                suppress_tokens=no_stop,
                **kwargs,
            )
            assert out.shape[0] == 8 * questions

        versus(f"(a) 8 samples, {new_tokens} tokens each, {name}", ours, theirs)

    job = rows[: 4 * questions]

    def ours_job():
        for i in range(0, len(job), questions):
            part = job[i : i + questions]
            generate(
                vlm,
                None,
                tokenizer,
                make_prompts(vlm, tokenizer, small, part),
                max_new_tokens=24,
                n_samples=8,
                temperature=1.0,
                seeds=list(range(8 * len(part))),
                on_finish=lambda q, s, ids: is_correct(
                    extract_answer(to_text(tokenizer, ids))[0], part[q]
                ),
            )  # noqa: B023

    def theirs_job():
        for i in range(0, len(job), questions):
            part = job[i : i + questions]
            batch = hf_batch(vlm, tokenizer, small, part)
            out = stock.generate(**batch, max_new_tokens=24, **kwargs)[
                :, batch["input_ids"].shape[1] :
            ]
            for j, ids in enumerate(out.tolist()):
                is_correct(extract_answer(to_text(tokenizer, ids))[0], part[j // 8])

    versus("(a) the whole job: natural stops, early stop", ours_job, theirs_job)


# --- (b) a training step


def narrow():
    """A model of width 256 with Qwen's real vocabulary, and a batch of 8 examples of uneven length with K = 36."""
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    at = tokenizer.convert_tokens_to_ids
    vlm = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=152064,
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                rope_parameters=dict(
                    rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]
                ),
            ),
            vision_config=dict(
                depth=4,
                hidden_size=128,
                intermediate_size=344,
                num_heads=4,
                out_hidden_size=256,
                window_size=112,
                fullatt_block_indexes=[3],
            ),
            image_token_id=at("<|image_pad|>"),
            video_token_id=at("<|video_pad|>"),
            vision_start_token_id=at("<|vision_start|>"),
            vision_end_token_id=at("<|vision_end|>"),
        )
    )
    add_latent_tokens(vlm, tokenizer)
    vlm.model.visual.requires_grad_(False)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=1280 * 28 * 28)
    pca = {
        "basis": torch.linalg.qr(torch.randn(256, 64))[0],
        "mean": torch.zeros(256),
        "eigenvalues": torch.ones(64),
        "total_variance": 64.0,
    }
    rng = random.Random(0)
    noise = lambda: Image.effect_noise(
        (28 * rng.randrange(6, 20), 28 * rng.randrange(6, 20)), 60
    ).convert("RGB")  # noqa: E731
    images, aux = [noise() for _ in range(8)], [noise() for _ in range(8)]
    examples = []
    for image in images:
        n = image.width * image.height // 784
        ids = (
            [at("<|vision_start|>")]
            + [at("<|image_pad|>")] * n
            + [at("<|vision_end|>")]
            + [rng.randrange(20, 400) for _ in range(40)]
        )
        before, after = (
            [rng.randrange(20, 400) for _ in range(rng.randrange(20, 100))] for _ in range(2)
        )
        answer = [*before, at(LATENT_START), *[at(LATENT_PAD)] * 36, at("<|latent_end|>"), *after]
        ids, labels = (
            torch.tensor(ids + answer),
            torch.tensor(
                [IGNORE] * len(ids) + [IGNORE if t == at(LATENT_PAD) else t for t in answer]
            ),
        )
        examples.append((ids, labels, image))
    return vlm.train(), tokenizer, processor, PCAHead(pca, 36), examples, aux


def training_side():
    """One side of (b). Prints JSON."""
    vlm, tokenizer, processor, head, examples, aux = narrow()
    vlm.model.visual.config._attn_implementation = {"ours": TOWER_ATTENTION, "hf": "sdpa"}[side]
    latent = tokenizer.convert_tokens_to_ids(LATENT_PAD)
    targets = (
        grid_features(vlm, processor, aux, 36, "pool").detach().bfloat16()
    )  # what fit_pca.py leaves on the disk
    params = [p for p in [*vlm.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
    pad = lambda xs, v: pad_sequence(xs, batch_first=True, padding_value=v)  # noqa: E731

    def ours():
        n = sum(int((labels != IGNORE).sum()) for _, labels, _ in examples)
        for part in train.micro_batches([len(ids) for ids, _, _ in examples], 1, 2048):
            ids, labels = (
                pad([examples[i][0] for i in part], 0),
                pad([examples[i][1] for i in part], IGNORE),
            )
            with torch.no_grad():
                v, grids = encode_images(vlm, processor, [examples[i][2] for i in part])
            pos = pad(
                [positions(vlm, examples[i][0], [g]).T for i, g in zip(part, grids.tolist())], 0
            ).permute(2, 0, 1)
            t = targets[part].flatten(0, 1)
            x = embed(vlm, ids, torch.cat(v), t, latent)
            h = vlm.model.language_model(
                inputs_embeds=x, position_ids=pos, use_cache=False
            ).last_hidden_state[:, :-1]
            on = labels[:, 1:] != IGNORE
            ce = cross_entropy(h[on], labels[:, 1:][on], vlm.lm_head) / n
            (ce + head.squared_error(h[ids[:, 1:] == latent], t).sum() / (36 * 8 * 256)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def theirs():
        ids, labels = pad([e[0] for e in examples], 0), pad([e[1] for e in examples], IGNORE)
        mask = pad([torch.ones_like(e[0]) for e in examples], 0)
        with torch.no_grad():
            v, grids = encode_images(vlm, processor, [e[2] for e in examples])
            t = grid_features(vlm, processor, aux, 36, "pool").flatten(0, 1)
        pos, _ = vlm.model.get_rope_index(
            ids, (ids == vlm.config.image_token_id).int(), grids, attention_mask=mask
        )
        x = embed(vlm, ids, torch.cat(v), t, latent)
        out = vlm(
            inputs_embeds=x,
            position_ids=pos,
            attention_mask=mask,
            labels=labels,
            use_cache=False,
            output_hidden_states=True,
        )
        h = out.hidden_states[-1][:, :-1][ids[:, 1:] == latent]
        (out.loss + nn.functional.mse_loss(head(h), t)).backward()
        optimizer.step()
        optimizer.zero_grad()

    report_side({"ours": ours, "hf": theirs}[side], 3, torch.device("cpu"))


def training():
    in_processes("b", "(b) a training step, V = 152,064, K = 36")


# --- (c) latent mode


def latent_mode():
    vlm, tokenizer = load_vlm(base, device=device)
    add_latent_tokens(vlm, tokenizer)
    processor = load_processor(base, 56 * 56, 1280 * 28 * 28)
    rows = load_examples(data)[: 4 * questions]
    prompts = make_prompts(vlm, tokenizer, processor, rows)
    d = vlm.config.text_config.hidden_size
    pca = {
        "basis": torch.linalg.qr(torch.randn(d, 8))[0],
        "mean": torch.zeros(d),
        "eigenvalues": torch.ones(8),
        "total_variance": 8.0,
    }
    head = PCAHead(pca, 128).to(device).eval()
    text_only = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    all_but_start = [
        t for t in range(len(tokenizer)) if t != tokenizer.convert_tokens_to_ids(LATENT_START)
    ]

    def steps(suppress, intervention):
        stamps = []
        generate(
            vlm,
            head,
            tokenizer,
            prompts,
            max_new_tokens=128,
            suppress=suppress,
            intervention=intervention,
            on_step=lambda *_: stamps.append(clock()),
        )
        return [b - a for a, b in zip(stamps[2:], stamps[3:])]

    both = {"latent": [], "text": []}
    for i in range(repeats + 1):
        for name, times in (
            ("latent", steps(all_but_start, "clean")),
            ("text", steps(text_only, "zero")),
        ):
            both[name] += times if i else []
    a, b = (statistics.median(both[k]) for k in ("latent", "text"))
    name = f"(c) a decode step of {len(prompts)} rows, latent against text mode"
    print(f"{name:58} latent {1e3 * a:6.2f} ms   text {1e3 * b:6.2f} ms   {a / b:5.2f} x")


# --- (d) the vision tower


GRID_4K = (1, 250, 288)  # patches of an image of 4024 x 3503 px: 1,152 windows


def make_tower(heads, dim, depth, full):
    """A tower of random weights with full attention in the layers `full`; 7B's has 16 heads of 80."""
    config = Qwen2_5_VLVisionConfig(
        hidden_size=heads * dim,
        num_heads=heads,
        intermediate_size=heads * dim * 171 // 64,
        depth=depth,
        fullatt_block_indexes=[*full],
        out_hidden_size=64,
    )
    return Qwen2_5_VisionTransformerPretrainedModel(config).eval()


def forwards(tower, grid):
    """Two functions that run a tower over one image of noise: with our attention, with the stock one."""
    grids = torch.tensor([grid], device=device)
    pixels = torch.randn(grids.prod(), 3 * 2 * 14 * 14, device=device, dtype=tower.dtype)

    @torch.inference_mode()
    def forward(implementation):
        tower.config._attn_implementation = implementation
        tower(pixels, grid_thw=grids)

    return lambda: forward(TOWER_ATTENTION), lambda: forward("sdpa")


def window_attention(heads, dim, grid):
    """The attention of one layer alone, without its projections: ours and the loop of the stock SDPA path."""
    grids, sdpa = torch.tensor([grid], device=device), AttentionInterface()["sdpa"]
    cu_seqlens = get_vision_window_index(grids, 2, 112, 14)[1]
    q, k, v = torch.randn(3, 1, cu_seqlens[-1], heads, dim, device=device).transpose(2, 3)
    layer = nn.Identity()

    def theirs():
        windows = zip(*(x.split(cu_seqlens.diff().tolist(), 2) for x in (q, k, v)))
        return torch.cat(
            [sdpa(layer, *w, None, scaling=dim**-0.5, is_causal=False)[0] for w in windows], 1
        )

    return lambda: tower_attention(layer, q, k, v, None, dim**-0.5, 0.0, cu_seqlens)[0], theirs


def tower_side():
    """One side of (d): one forward over a 4K image, in which a full-attention layer takes nearly all the time. Prints JSON."""
    ours, theirs = forwards(make_tower(4, 16, 4, [3]).to(device), GRID_4K)
    report_side({"ours": ours, "hf": theirs}[side], 1, device)


def vision():
    ragged = (
        1,
        250,
        286,
    )  # the last window of each row is narrower: windows of one length are no neighbours
    for heads, dim in ((4, 16), (16, 80)):
        for name, grid in (("4K", GRID_4K), ("4K, ragged", ragged)):
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


# --- 7B shapes


TEXT = {
    "7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "7b-smoke": dict(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
}


def seven_b():
    """Absolute numbers of a model with random weights in bfloat16: decoding, and a training forward and backward."""
    if shape == "7b" and device.type != "cuda":
        raise SystemExit(
            "--shape=7b needs a CUDA GPU; this machine has none (7b-smoke runs the same code, small)"
        )
    tokenizer = toy.make_tokenizer()
    text = TEXT[shape] | {"vocab_size": 152064}
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    vision = dict(
        depth=2,
        hidden_size=64,
        num_heads=4,
        intermediate_size=64,
        out_hidden_size=text["hidden_size"],
    )  # unused
    torch.set_default_dtype(torch.bfloat16)
    with device:
        vlm = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision)
        ).eval()
    torch.set_default_dtype(torch.float32)
    lm = vlm.model.language_model
    size = sum(
        p.numel() * p.element_size() for p in [*lm.layers.parameters(), *vlm.lm_head.parameters()]
    )

    prompts = [
        {
            "ids": torch.randint(20, 400, (512,)),
            "pos": torch.arange(512).expand(3, -1),
            "vision": None,
        }
    ] * 4
    no_stop = [tokenizer.eos_token_id, tokenizer.pad_token_id, *range(151643, 152064)]
    for n_samples in (1, 8, 32):
        stamps = []
        generate(
            vlm,
            None,
            tokenizer,
            prompts,
            max_new_tokens=64,
            n_samples=n_samples,
            suppress=no_stop,
            on_step=lambda *_: stamps.append(clock()),
        )  # noqa: B023
        s = statistics.median(b - a for a, b in zip(stamps[8:], stamps[9:]))
        print(
            f"decode, {4 * n_samples:4} rows: {1e3 * s:8.2f} ms a step, {4 * n_samples / s:8.0f} tokens/s, "
            f"weights read at {size / s / 1e12:.3f} TB/s"
        )

    # 4 rows of 1,024 tokens, a quarter of them labels, checkpointed; gradients in bfloat16, no optimizer
    vlm.train()
    for i, layer in enumerate(lm.layers):
        lm.layers[i] = checkpoint_wrapper(layer)
    ids, pos, times = (
        torch.randint(20, 400, (4, 1024), device=device),
        torch.arange(1024, device=device).expand(3, 4, -1),
        [],
    )
    for _ in range(repeats + 1):
        start = clock()
        h = lm(
            inputs_embeds=lm.embed_tokens(ids), position_ids=pos, use_cache=False
        ).last_hidden_state
        cross_entropy(h[:, 767:-1].flatten(0, 1), ids[:, 768:].flatten(), vlm.lm_head).backward()
        vlm.zero_grad()
        times.append(clock() - start)
    print(f"training forward and backward: {4096 / statistics.median(times[1:]):8.0f} tokens/s")
    heads, dim, depth, grid = (16, 80, 32, GRID_4K) if shape == "7b" else (4, 16, 8, (1, 50, 62))
    tower = make_tower(heads, dim, depth, range(7, depth, 8)).to(device, torch.bfloat16)
    versus(f"the vision tower, {grid[1] * grid[2] // 4} tokens", *forwards(tower, grid))
    if device.type == "cuda":
        print(
            f"{torch.cuda.get_device_name()}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )


def main():
    torch.set_num_threads(threads)
    if side:
        {"b": training_side, "d": tower_side}[only]()
    elif shape in TEXT:
        seven_b()
    elif shape == "toy":
        if not Path(data).exists():
            raise SystemExit(f"{data}: no such file; run `python toy.py data` first")
        for name, f in (("a", sampling), ("b", training), ("c", latent_mode), ("d", vision)):
            if only in ("", name):
                f()
    else:
        raise SystemExit(f"shape={shape!r} is not one of: toy, {', '.join(TEXT)}")


if __name__ == "__main__":
    start(main)
