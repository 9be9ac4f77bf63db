r"""Do a checkpoint's latents live where its input vision embeddings live?

Reads a model folder (ours, a Monet checkpoint or any Qwen2.5-VL) and a data file. Answers the
questions, runs each once more with its answer through the whole decoder, and writes
<out>/probe.json and, where matplotlib is installed, two figures as the paper's of norms:
norms.png (by layer) and latents.png (what is fed back against what the decoder is used to).

    python probe.py                                             # out/gap on the toy's test set
    python probe.py --model=Monet-7B --data=data/test.jsonl \
        --dtype=bfloat16 --max_new_tokens=2048 --batch=8

Norms are natural logarithms of L2. The state after the last layer is what the final norm reads (the
paper's 546x and 8.7x; here a ratio of geometric means [ours]); the state after the final norm is
what output-as-input systems feed back.
"""

import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from data import load_examples
from decoder import followed_by
from files import check_there, write_json
from generate import calibrate, ema_norm, generate, make_prompts
from images import open_image, usable_rows
from launch import (
    Progress,
    check_choices,
    claim,
    folder_of,
    pick_device,
    settings_of,
    show_files,
    start,
)
from model import (
    embed,
    latent_ids,
    load_head,
    load_pca,
    load_processor,
    load_vlm,
    real_features,
    say_other_limits,
)
from plot import pyplot, save, where_possible

# --------------------------------------------------------------------------------------------------
model = "out/gap"  # a checkpoint folder
data = "out/toy/test.jsonl"  # questions, and auxiliary images to compare with
out = ""  # for probe.json and two figures; "": out/probe/gap for out/gap
pca = ""  # a folder of fit_pca.py, for a checkpoint that has none; "": the checkpoint's own
limit = 200  # questions; 0: all
skip_unusable = False  # leave out rows with a broken image instead of refusing them
batch = 50  # questions per batch of generation; 7B on 80 GB: 16
max_new_tokens = 128  # latents count; 7B: 2048
latent_size = 10  # most latents per span of a checkpoint with Monet's tokens [Monet: 10 to 16]
ema_beta = 0.0  # > 0: EMA norm calibration
min_pixels = 56 * 56  # of an image, as in training
max_pixels = 1280 * 28 * 28  # of an image, as in training
dtype = "float32"  # 7B: bfloat16
# --------------------------------------------------------------------------------------------------

KINDS = ("text", "image", "latent")  # of positions
TEXT, IMAGE, LATENT = range(3)

# --------------------------------------------------------------------------------------------------
# what is measured


def log_norms(vlm, x, pos):
    """log ||.|| of the states of one sequence x (1, T, d): (L + 2, T).

    The rows are the inputs, the states after each of L layers, and those after the final norm.
    """
    lm = vlm.model.language_model
    logs = []

    def keep(state):
        # (T), in float32: bfloat16 keeps two to three digits of a norm
        logs.append(state[0].float().norm(dim=-1).log())

    def hook(module, args, state):
        keep(state)

    keep(x)  # not by a hook: the decoder is called with embeddings, not with ids
    hooks = [layer.register_forward_hook(hook) for layer in lm.layers]
    # pos is (3, T), and (3, 1, T) for the one sequence
    out = lm(inputs_embeds=x, position_ids=pos[:, None], use_cache=False)
    keep(out.last_hidden_state)
    # else the next answer would call these hooks, too
    for handle in hooks:
        handle.remove()
    return torch.stack(logs)


def mean_and_std(moments):
    """Mean and standard deviation, both (...), from count, sum and sum of squares (..., 3)."""
    n, total, squares = moments.unbind(-1)
    mean = total / n
    # rounding can leave a little less than nothing
    return mean, (squares / n - mean**2).clamp(min=0).sqrt()


def inside(v, mean, basis):
    """The share (M) of the energy of v - mu that lies in the subspace of P_k (d, k); v (M, d)."""
    r = v - mean  # (M, d)
    # P_k is orthonormal: coefficients have the energy of what they rebuild
    return (r @ basis).pow(2).sum(-1) / r.pow(2).sum(-1)


def effective_rank(v):
    """exp of the entropy of the normalised singular values of latents v (K, d).

    1 if they lie on one line, at most K.
    """
    s = torch.linalg.svdvals(v)  # (at most K)
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def pairwise_cosine(v):
    """Mean cosine between two different latents of v (K, d), K > 1: 1 if they have collapsed."""
    u = F.normalize(v, dim=-1)  # (K, d)
    K = len(v)
    others = (u @ u.T).sum() - (u * u).sum()  # without the cosine of each with itself
    return float(others / (K * (K - 1)))


def retrieval(predicted, real):
    """Share of spans whose nearest real span (L2) is their own; both (N, K d). And chance's share.

    Real spans of one picture (the toy repeats its storyboards) are equal up to rounding and count
    as one.
    """
    same = distances(real, real) <= 1e-3 * real.norm(dim=-1).mean()  # (N, N): of one picture
    nearest = distances(predicted, real).argmin(1)  # (N)
    found = same[torch.arange(len(real)), nearest]
    # a span drawn at random is a span's own as often as real spans equal each other
    return float(found.float().mean()), float(same.float().mean())


def distances(a, b):
    """L2 between rows, exactly: equal rows are at zero."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def geometry(spans, mean, basis):
    """What a list of latent spans, each (K, d), looks like.

    Ranks and cosines are about mu, which all latents share; None where no span has two latents.
    """
    v = torch.cat(spans)  # (M, d)
    logs = v.norm(dim=-1).log()
    about_mu = [span - mean for span in spans if len(span) > 1]
    return {
        "latents": len(v),
        "mean_log": float(logs.mean()),
        "std_log": float(logs.std(correction=0)),
        # without a PCA there is no subspace to lie in
        "inside": float(inside(v, mean, basis).mean()) if basis.numel() else None,
        "effective_rank": average([effective_rank(span) for span in about_mu]),
        "cosine": average([pairwise_cosine(span) for span in about_mu]),
    }


def average(numbers):
    return sum(numbers) / len(numbers) if numbers else None


def agreement(predicted, real):
    """How well latents (N, K, d) predict the real features of their own auxiliary images."""
    at_1, chance = retrieval(predicted.flatten(1), real.flatten(1))
    # the mean is that of all real latents: what a head would say that knows nothing of the image
    error = (predicted - real).pow(2).sum()
    total = (real - real.mean((0, 1))).pow(2).sum()
    return {
        "spans": len(real),
        "retrieval_at_1": at_1,
        "chance": chance,
        "r2": float(1 - error / total),
    }


def along(chains):
    """Where on its way does a chain of latents leave the real features?

    chains: (predicted, said of real ones, real) of a question each, (m, d) all: what was written
    with its own latents before it, and what the head says with the real ones before it. Returns R2
    by place, of the questions with most latents.
    """
    most = max(len(real) for _, _, real in chains)
    longest = [chain for chain in chains if len(chain[2]) == most]
    own, forced, real = (torch.stack(spans) for spans in zip(*longest))  # (N, m, d)
    variance = (real - real.mean((0, 1))).pow(2).sum(-1).mean()

    def r2(said):
        error = (said - real).pow(2).sum(-1).mean(0)  # (m)
        return (1 - error / variance).tolist()

    return {"questions": len(longest), "own": r2(own), "forced": r2(forced)}


# --------------------------------------------------------------------------------------------------
# answering, and reading the states


def spans_of(ids, latents, pad):
    """Split an answer's latents (m, d) into its spans by the runs of latent pads in its ids."""
    # two spans never touch: the tokens that end and begin one stand between them
    runs = [len(list(run)) for token, run in itertools.groupby(ids) if token == pad]
    return list(latents.split(runs)) if runs else []


def kinds_of(ids, image, pad):
    """TEXT, IMAGE or LATENT for each of ids (T); `pad` is None for a model without latents."""
    kinds = torch.full_like(ids, TEXT)
    kinds[ids == image] = IMAGE
    if pad is not None:
        kinds[ids == pad] = LATENT
    return kinds


def inputs_of(vlm, prompt, answer_ids, latents, pad):
    """Ids (T), embeddings (1, T, d) and positions (3, T) of a prompt with its answer, in whose pads
    latents (m, d) stand."""
    whole = followed_by(prompt, answer_ids)
    fed = latents.to(vlm.device) if len(latents) else None
    x = embed(vlm, whole["ids"][None].to(vlm.device), prompt["vision"], fed, pad)
    return whole["ids"], x, whole["pos"].to(vlm.device)


def norms_of_answer(vlm, prompt, answer, pad):
    """Ids (T) of a prompt with its answer, and the log norms (L + 2, T) of their states.

    The latents are fed as they were written: one forward gives the states of generation.
    """
    ids, x, pos = inputs_of(vlm, prompt, answer["ids"], answer["latents"], pad)
    return ids, log_norms(vlm, x, pos)


def said_of_real(vlm, head, prompt, ids, real, pad):
    """The latents (m, d) that the head predicts where all earlier ones are the real ones (m, d)."""
    ids, x, pos = inputs_of(vlm, prompt, ids, real, pad)
    out = vlm.model.language_model(inputs_embeds=x, position_ids=pos[:, None], use_cache=False)
    before = (ids == pad).nonzero()[:, 0] - 1
    v = head(out.last_hidden_state[0, before].float())
    if ema_beta:  # as what is fed is, where it writes by itself
        v = calibrate(v, torch.tensor([ema_norm(prompt["vision"], ema_beta)], device=v.device))
    return v.cpu()


def moments_of(logs):
    """Count, sum and sum of squares (L + 2, 3) of log norms (L + 2, positions)."""
    return torch.stack([torch.ones_like(logs).sum(1), logs.sum(1), logs.pow(2).sum(1)], -1)


@torch.inference_mode()
def measure(rows, vlm, head, tokenizer, processor):
    """Answer the questions and look at every answer.

    Returns the moments (L + 2, kinds, 3) of the log norms, the spans (m, d) that were written,
    pairs of predicted and real spans (K, d), and the chains that `along` compares.
    """
    # the inputs, the states after each of L layers, and those after the final norm
    n_states = len(vlm.model.language_model.layers) + 2
    # in float64: a variance is the small difference of two large sums
    moments = torch.zeros(n_states, len(KINDS), 3, dtype=torch.float64)
    written, pairs, chains = [], [], []
    _, pad, _ = latent_ids(tokenizer)
    features = real_features(model, vlm)
    bar = Progress(total=len(rows), unit="question", desc="probe")
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        prompts = make_prompts(vlm, tokenizer, processor, part)
        answers = generate(
            vlm, head, tokenizer, prompts, max_new_tokens=max_new_tokens, ema_beta=ema_beta
        )
        for row, prompt, (answer,) in zip(part, prompts, answers):
            ids, logs = norms_of_answer(vlm, prompt, answer, pad)
            logs = logs.double().cpu()
            kinds = kinds_of(ids, vlm.config.image_token_id, pad)
            for kind in (TEXT, IMAGE, LATENT):
                moments[:, kind] += moments_of(logs[:, kinds == kind])
            spans = spans_of(answer["ids"], answer["latents"], pad)
            written += spans
            # the k-th span is held against the k-th auxiliary image
            if features and spans and row.get("aux_images"):
                real = features([open_image(path) for path in row["aux_images"][: len(spans)]])
                # the token limit may cut a last span
                whole = [(span, v) for span, v in zip(spans, real) if len(span) == head.K]
                pairs += whole
                if len(whole) == len(spans) == len(real) and not head.before_answer:
                    v = real.flatten(0, 1)
                    forced = said_of_real(vlm, head, prompt, answer["ids"], v, pad)
                    chains.append((answer["latents"], forced, v))
            bar.update()
    bar.close()
    return moments, written, pairs, chains


# --------------------------------------------------------------------------------------------------
# what is shown


def norms_by_stage(moments):
    """{kind: {stage: {n, mean_log, std_log}}}, from moments (L + 2, kinds, 3)."""
    n_layers = len(moments) - 2
    stages = ["input", *(f"layer {i + 1}" for i in range(n_layers)), "final norm"]
    means, stds = mean_and_std(moments)
    norms = {}
    for j, kind in enumerate(KINDS):
        if not moments[0, j, 0]:  # no position of this kind
            continue
        norms[kind] = {}
        for i, stage in enumerate(stages):
            norms[kind][stage] = {
                "n": int(moments[i, j, 0]),
                "mean_log": float(means[i, j]),
                "std_log": float(stds[i, j]),
            }
    return norms


def growth_of(stages):
    """How many times its input's norm a state has before and after the final norm."""
    first, *_, last, normed = (stage["mean_log"] for stage in stages.values())
    # of mean logs: a ratio of geometric means, which a few huge states do not rule
    return {"before": math.exp(last - first), "after": math.exp(normed - first)}


def show(found):
    """Print what was found."""
    norms = found["norms"]
    print(f"\n{model} on {data}: {found['questions']} questions; log L2 norms")
    print(f"{'':10}" + "".join(f"{kind:>18}" for kind in norms))
    for stage in norms["text"]:
        line = f"{stage:10}"
        for stages in norms.values():
            mean, std = stages[stage]["mean_log"], stages[stage]["std_log"]
            line += f"{f'{mean:.2f} +- {std:.2f}':>18}"
        print(line)
    for kind, g in found["growth"].items():
        before, after = f"{g['before']:.1f}x", f"{g['after']:.1f}x"
        print(f"{kind}: {before} its input before the final norm, {after} after it")
    for name in ("predicted", "real", "agreement", "along"):
        if name not in found:
            continue
        numbers = []
        for k, v in found[name].items():
            if isinstance(v, list):
                v = " ".join(f"{x:.3f}" for x in v)
            numbers.append(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}")
        print(f"{name}: {', '.join(numbers)}")


def draw(folder, norms):
    """The two figures: log norms by layer, and of what may be fed back."""
    plt = pyplot()
    # norms.png: what the layers add to a state, kind by kind
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind, stages in norms.items():
        *layers, _ = stages.values()  # without the state after the final norm
        mean = torch.tensor([stage["mean_log"] for stage in layers])
        std = torch.tensor([stage["std_log"] for stage in layers])
        ax.plot(range(len(mean)), mean, label=kind)
        ax.fill_between(range(len(mean)), mean - std, mean + std, alpha=0.2)
    ax.set(
        xticks=range(len(mean)),
        xlabel="decoder layer (0: the input embedding)",
        ylabel="log L2 norm, before the final norm",
    )
    ax.legend()
    save(fig, folder / "norms.png")

    # latents.png: what a system could feed back, beside what the decoder is used to
    bars = {}
    for kind, stages in norms.items():
        first, *_, last, normed = stages.values()
        bars[f"{kind}, input"] = first
        bars[f"{kind}, before final norm"] = last
        bars[f"{kind}, after final norm"] = normed
    means = [stage["mean_log"] for stage in bars.values()]
    stds = [stage["std_log"] for stage in bars.values()]
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.barh(list(bars), means, xerr=stds)
    ax.invert_yaxis()
    ax.set(xlabel="log L2 norm, mean and standard deviation")
    save(fig, folder / "latents.png")


# --------------------------------------------------------------------------------------------------


def subspace(head, d):
    """mu (d) and P_k (d, k) by which latents are judged: those of `pca`, else the checkpoint's own.

    k = 0 where there is neither. Raises SystemExit for a PCA of another width.
    """
    # one PCA for several checkpoints makes their numbers comparable, output-as-input's too
    if pca:
        space, _ = load_pca(Path(pca) / "pca.safetensors" if Path(pca).is_dir() else pca)
        mean, basis = space["mean"], space["basis"]
    elif head:
        mean, basis = head.mean, head.basis
    else:
        mean, basis = torch.zeros(d), torch.zeros(d, 0)
    if len(mean) != d:
        raise SystemExit(f"{pca}: made for d = {len(mean)}, but {model} has d = {d}")
    return mean.cpu(), basis.cpu()


def main():
    global out
    out = out or folder_of("probe", model)
    check_choices(globals(), dtype=("float32", "bfloat16"))
    show_files(reads=[model, data], writes=[out])
    check_there(Path(model) / "config.json")
    claim(out)
    rows = load_examples(data, training=False)
    if limit:
        # the first ones, so that all checkpoints are probed on the same questions
        rows = rows[:limit]
    # opens all pictures, before hours of answers
    rows = usable_rows(rows, skip_unusable, ("images", "aux_images"))
    vlm, tokenizer = load_vlm(model, getattr(torch, dtype), pick_device())
    say_other_limits(model, min_pixels, max_pixels)
    processor = load_processor(model, min_pixels, max_pixels)
    head = load_head(model, vlm, tokenizer, latent_size)
    mean, basis = subspace(head, vlm.config.text_config.hidden_size)

    moments, written, pairs, chains = measure(rows, vlm, head, tokenizer, processor)

    norms = norms_by_stage(moments)
    found = {
        "settings": settings_of(globals()),
        "questions": len(rows),
        "norms": norms,
        "growth": {kind: growth_of(stages) for kind, stages in norms.items()},
    }
    if written:
        found["predicted"] = geometry(written, mean, basis)
    if pairs:
        predicted, real = (torch.stack(spans).double() for spans in zip(*pairs))
        found["real"] = geometry(list(real.float()), mean, basis)
        found["agreement"] = agreement(predicted, real)
    if chains:
        found["along"] = along(chains)

    show(found)
    # a ratio to nothing (latents that are all mu) has no number: null, as JSON knows no NaN
    found = json.loads(json.dumps(found), parse_constant=lambda name: None)
    write_json(Path(out) / "probe.json", found, indent=1)
    where_possible(draw, Path(out), norms)


if __name__ == "__main__":
    start(main)
