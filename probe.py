"""Diagnose a checkpoint: do its latents live where its input vision embeddings live?

Reads a model folder (ours, a Monet checkpoint or any Qwen2.5-VL) and a data file. Answers the questions, runs each once
more with its answer through the whole decoder, and writes <out>/probe.json and, where matplotlib is installed, the two
figures of the paper's Fig. 2: norms.png (by layer) and latents.png (what is fed back against what the decoder is used to).

    python probe.py                                                           # out/gap on the toy's test set
    python probe.py --model=Monet-7B --data=data/test.jsonl --dtype=bfloat16 --max_new_tokens=2048 --batch=8

Norms are natural logarithms of L2. The state after the last layer is what the final norm reads (the paper's 546x and
8.7x); the state after the final norm is what output-as-input systems feed back. Both are here.
"""

import importlib.util
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    check_choices,
    load_examples,
    open_image,
    pick_device,
    read_safetensors,
    settings_of,
    start,
    write_then_rename,
)
from generate import generate, make_prompts
from model import (
    HEAD_FILE,
    embed,
    grid_features,
    latent_ids,
    load_head,
    load_pca,
    load_processor,
    load_vlm,
)

# ---------------------------------------------------------------------------------------------------
model = "out/gap"
data = "out/toy/test.jsonl"
out = "out/probe/gap"
pca = ""  # "": the checkpoint's own; a pca.safetensors to judge a checkpoint that has none
limit = 200  # questions; 0: all
batch = 50  # questions a batch of generation; 7B on 80 GB: 16
max_new_tokens = 128  # latents count; 7B: 2048
latent_size = (
    10  # most latents a span of a checkpoint with Monet's tokens and no head file [Monet: 10 to 16]
)
ema_beta = 0.0  # > 0: EMA norm calibration
min_pixels, max_pixels = 56 * 56, 1280 * 28 * 28
dtype = "float32"  # 7B: bfloat16
# ---------------------------------------------------------------------------------------------------

KINDS = ("text", "image", "latent")


def layer_norms(vlm, x, pos):
    """log ||.|| (L + 2, T) of one sequence: its inputs x (1, T, d), the state after each layer, and after the final norm."""
    lm, seen = vlm.model.language_model, []
    keep = lambda state: seen.append(state[0].float().norm(dim=-1).log())  # noqa: E731
    keep(x)
    hooks = [
        layer.register_forward_hook(lambda module, args, state: keep(state)) for layer in lm.layers
    ]
    keep(lm(inputs_embeds=x, position_ids=pos[:, None], use_cache=False).last_hidden_state)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def mean_and_std(moments):
    """Mean and standard deviation (both ...) of numbers from their count, sum and sum of squares (..., 3)."""
    n, total, squares = moments.unbind(-1)
    mean = total / n
    return mean, (squares / n - mean**2).clamp(min=0).sqrt()


def inside(v, mean, basis):
    """The share (M) of the energy of v - mu, v (M, d), that lies in the subspace of P_k (d, k)."""
    r = v - mean
    return (r @ basis).pow(2).sum(-1) / r.pow(2).sum(-1)


def effective_rank(v):
    """exp of the entropy of the normalised singular values of v (K, d): 1 if all latents lie on one line, at most K."""
    s = torch.linalg.svdvals(v)
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def pairwise_cosine(v):
    """Mean cosine between two different latents of v (K, d), K > 1: 1 if they have collapsed."""
    u = F.normalize(v, dim=-1)
    K = len(v)
    return float(((u @ u.T).sum() - (u * u).sum()) / (K * (K - 1)))


def retrieval(predicted, real):
    """Share of spans whose nearest real span (L2) is their own, and the share that chance gives; both (N, K d).

    Real spans of one picture (the toy repeats its storyboards) are equal up to rounding and count as one.
    """
    near = lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # noqa: E731
    same = near(real, real) <= 1e-3 * real.norm(dim=-1).mean()
    nearest = near(predicted, real).argmin(1)
    return float(same[torch.arange(len(real)), nearest].float().mean()), float(same.float().mean())


def geometry(spans, mean, basis):
    """What a list of latent spans, each (K, d), looks like; ranks and cosines are about mu, which all latents share."""
    v = torch.cat(spans)
    norms, many = v.norm(dim=-1).log(), [s - mean for s in spans if len(s) > 1]
    average = lambda xs: sum(xs) / len(xs) if xs else None  # noqa: E731
    return {
        "latents": len(v),
        "mean_log": float(norms.mean()),
        "std_log": float(norms.std(correction=0)),
        "inside": float(inside(v, mean, basis).mean()) if basis.numel() else None,
        "effective_rank": average([effective_rank(s) for s in many]),
        "cosine": average([pairwise_cosine(s) for s in many]),
    }


def spans_of(ids, latents, pad):
    """Split an answer's latents (m, d) into its spans by the runs of latent pads in its ids."""
    runs, before = [], None
    for t in ids:
        if t == pad:
            runs += [0] * (before != pad)
            runs[-1] += 1
        before = t
    return list(latents.split(runs)) if runs else []


@torch.inference_mode()
def measure(rows, vlm, head, tokenizer, processor):
    """Moments (L + 2, kinds, 3) of the log norms, the spans that were written, and pairs of predicted and real spans (K, d)."""
    moments = torch.zeros(
        len(vlm.model.language_model.layers) + 2, len(KINDS), 3, dtype=torch.float64
    )
    pad, image, written, pairs = latent_ids(tokenizer)[1], vlm.config.image_token_id, [], []
    mode = (
        read_safetensors(Path(model) / HEAD_FILE, ())[1].get("mode")
        if (Path(model) / HEAD_FILE).exists()
        else None
    )
    bar = tqdm(total=len(rows), unit="question", desc="probe")
    for i in range(0, len(rows), batch):
        prompts = make_prompts(vlm, tokenizer, processor, rows[i : i + batch])
        answers = generate(
            vlm, head, tokenizer, prompts, max_new_tokens=max_new_tokens, ema_beta=ema_beta
        )
        for row, p, (a,) in zip(rows[i : i + batch], prompts, answers):
            ids = torch.cat([p["ids"], torch.tensor(a["ids"])])
            pos = torch.cat(
                [p["pos"], p["pos"].max() + 1 + torch.arange(len(a["ids"])).expand(3, -1)], 1
            )
            fed = a["latents"].to(vlm.device) if len(a["latents"]) else None
            x = embed(vlm, ids[None].to(vlm.device), p["vision"], fed, -1 if pad is None else pad)
            logs = layer_norms(vlm, x, pos.to(vlm.device)).double().cpu()
            kind = torch.where(
                ids == image, 1, torch.where(ids == pad, 2, 0) if pad is not None else 0
            )
            for j in range(len(KINDS)):
                mine = logs[:, kind == j]
                moments[:, j] += torch.stack(
                    [torch.ones_like(mine).sum(1), mine.sum(1), mine.pow(2).sum(1)], -1
                )
            spans = spans_of(a["ids"], a["latents"], pad)
            written += spans
            if mode and spans and row.get("aux_images"):
                images = [open_image(path) for path in row["aux_images"][: len(spans)]]
                real = grid_features(vlm, processor, images, head.K, mode).cpu()
                pairs += [(s, v) for s, v in zip(spans, real) if len(s) == head.K]
            bar.update()
    bar.close()
    return moments, written, pairs


def draw(path, found):
    """The two figures: log norms by layer, and of what may be fed back."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind, at in found["norms"].items():
        mean, std = (
            torch.tensor([s[field] for s in at.values()][:-1]) for field in ("mean_log", "std_log")
        )
        ax.plot(range(len(mean)), mean, label=kind)
        ax.fill_between(range(len(mean)), mean - std, mean + std, alpha=0.2)
    ax.set(
        xticks=range(len(mean)),
        xlabel="decoder layer (0: the input embedding)",
        ylabel="log L2 norm, before the final norm",
    )
    ax.legend()
    write_then_rename(path / "norms.png", lambda p: fig.savefig(p, format="png", dpi=150))

    bars = {
        f"{kind}, {name}": at[where]
        for kind, at in found["norms"].items()
        for name, where in (
            ("input", "input"),
            ("before final norm", list(at)[-2]),
            ("after final norm", "final norm"),
        )
    }
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.barh(
        list(bars),
        [b["mean_log"] for b in bars.values()],
        xerr=[b["std_log"] for b in bars.values()],
    )
    ax.invert_yaxis()
    ax.set(xlabel="log L2 norm, mean and standard deviation")
    write_then_rename(path / "latents.png", lambda p: fig.savefig(p, format="png", dpi=150))


def main():
    check_choices(globals(), dtype=("float32", "bfloat16"))
    device = pick_device()
    rows = load_examples(data, training=False)
    rows = rows[:limit] if limit else rows
    vlm, tokenizer = load_vlm(model, getattr(torch, dtype), device)
    processor, head = (
        load_processor(model, min_pixels, max_pixels),
        load_head(model, vlm, tokenizer, latent_size),
    )
    d = vlm.config.text_config.hidden_size
    space = load_pca(pca)[0] if pca else {"mean": head.mean, "basis": head.basis} if head else {}
    mean, basis = (space[name].cpu() if space else torch.zeros(d, 0) for name in ("mean", "basis"))
    if space and len(mean) != d:
        raise SystemExit(f"{pca}: made for d = {len(mean)}, but {model} has d = {d}")
    moments, written, pairs = measure(rows, vlm, head, tokenizer, processor)

    stages = ["input", *(f"layer {i + 1}" for i in range(len(moments) - 2)), "final norm"]
    means, stds = mean_and_std(moments)
    norms = {
        kind: {
            stage: {
                "n": int(moments[i, j, 0]),
                "mean_log": float(means[i, j]),
                "std_log": float(stds[i, j]),
            }
            for i, stage in enumerate(stages)
        }
        for j, kind in enumerate(KINDS)
        if moments[0, j, 0]
    }
    growth = {
        kind: {
            "before": math.exp(at[stages[-2]]["mean_log"] - at["input"]["mean_log"]),
            "after": math.exp(at["final norm"]["mean_log"] - at["input"]["mean_log"]),
        }
        for kind, at in norms.items()
    }
    found = {
        "settings": settings_of(globals()),
        "questions": len(rows),
        "norms": norms,
        "growth": growth,
    }
    if written:
        found["predicted"] = geometry(written, mean, basis)
    if pairs:
        predicted, real = (torch.stack(x).double() for x in zip(*pairs))
        at_1, chance = retrieval(predicted.flatten(1), real.flatten(1))
        r2 = 1 - (predicted - real).pow(2).sum() / (real - real.mean((0, 1))).pow(2).sum()
        found |= {
            "real": geometry(list(real.float()), mean, basis),
            "agreement": {
                "spans": len(pairs),
                "retrieval_at_1": at_1,
                "chance": chance,
                "r2": float(r2),
            },
        }

    print(f"\n{model} on {data}: {len(rows)} questions; log L2 norms")
    print(f"{'':10}" + "".join(f"{kind:>18}" for kind in norms))
    for stage in stages:
        cells = (
            f"{at[stage]['mean_log']:.2f} +- {at[stage]['std_log']:.2f}" for at in norms.values()
        )
        print(f"{stage:10}" + "".join(f"{cell:>18}" for cell in cells))
    for kind, g in growth.items():
        print(
            f"{kind}: {g['before']:.1f}x its input before the final norm, {g['after']:.1f}x after it"
        )
    for name in ("predicted", "real", "agreement"):
        if name in found:
            print(
                f"{name}: "
                + ", ".join(
                    f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in found[name].items()
                )
            )
    write_then_rename(Path(out) / "probe.json", lambda p: p.write_text(json.dumps(found, indent=1)))
    if importlib.util.find_spec("matplotlib"):
        draw(Path(out), found)


if __name__ == "__main__":
    start(main)
