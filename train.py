"""How is it trained? A hand-written FSDP2 loop that knows no method by name.

Reads the base model, a data file, and what the method asks for: GAP the targets and PCA of
fit_pca.py, and difficulty.jsonl. Writes <out>/: a folder that plain `from_pretrained` loads,
latent_head.safetensors, log.jsonl, and sharded checkpoints under ckpt/ to resume from.

    python train.py                                              # one CPU process or one GPU
    torchrun --nproc-per-node 8 train.py --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl ...

method: gap (PCA head), lh (full head), output (output as input: the post-norm state is fed back and
regressed), text (dense-caption SFT: latents stripped everywhere, the parser text kept).
Controls: frozen, matched, wide, lh_mu, matched_mu, dummy, markers (model.HEADS). Other papers:
valr, amvl (files of their own).
"""

import math
import os
import re
import resource
import secrets
import shutil
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from amvl import AMVL
from data import LATENT_SPAN, example_key, load_examples
from files import (
    append,
    check_fields,
    check_there,
    file_digest,
    folder_digest,
    hash_file,
    key_of,
    naming,
    open_append,
    read_json,
    read_lines,
    versions,
    write_json,
    write_lines,
)
from flops import amounts, flops_each, rates
from gap import GAP
from images import usable_rows
from launch import (
    Progress,
    check_choices,
    check_same_everywhere,
    check_shared,
    claim,
    clock,
    errno_of,
    gathered,
    join_ranks,
    leave_ranks,
    pick_device,
    rank_and_world,
    settings_of,
    show_files,
    start,
)
from method import Method
from model import HEAD_FILE, HEADS, LatentHead, check_head, load_processor, load_vlm
from plot import draw_curves, where_possible
from threads import in_order
from valr import VaLR

METHODS = {
    "text": Method,
    **dict.fromkeys(HEADS, GAP),  # gap lh output frozen matched wide ...: a head each
    "valr": VaLR,
    "amvl": AMVL,
}

# --------------------------------------------------------------------------------------------------
# The toy's values. "7B:" is for Qwen2.5-VL-7B, where it differs; [paper] where the paper says so,
# [summary] where a summary of AMVL's does.
method = "gap"  # gap lh output text valr amvl, or a control
base = "toy/base"  # 7B: Qwen2.5-VL-7B-Instruct
data = "out/toy/train.jsonl"  # what it trains on
val_data = "out/toy/val.jsonl"  # "" for none
pca = "out/pca"  # written by fit_pca.py
difficulty = "out/difficulty.jsonl"  # "": every example keeps its latents (no DA)
out = "out/gap"  # the model folder to write
tau = 0.0  # accuracy above tau: train as text only [paper]
rule = "paper"  # "guess" [ours]: with options no tau, but a count improbable under guessing
easy_latents = 0.0  # share of the solved examples that keep their latents all the same [ours]
latents_first = 0  # for this many first steps every example keeps its latents [ours]
keep_parser = True  # False: an example that loses its latents loses its parser text, too [ours]
write_parser = True  # False, a control: no example at all has parser text
lambda_latent = 1.0  # weight of the latent loss [paper]
latent_loss = "relative"  # 1 - R^2; 7B: "mean" over d [both ours]; "sum": the equation literally
scheduled_sampling = False  # second pass on the model's own decoded latents [paper: an ablation]
# valr and amvl
K = 4  # latents per span; 7B: 16 for valr, 8 for amvl (GAP's K is that of its targets)
encoders = "own"  # of valr: "own" and folders, with commas between; the paper: DINOv3's ViT-L
align_layer = 2  # of valr: the block whose output is aligned; 7B: 12 [paper]
lambda_align = 0.5  # of valr: weight of the alignment [paper]
rollout = 0  # of valr: passes before the trained one; 0: latent after latent, which is exact
fed_gradient = False  # of valr: gradients go through the last of these passes [ours: not stated]
whole_gradient = False  # of valr: ... through all of an exact rollout, read once (rollout = 0)
query_span = False  # of valr: a row of one image and no span gets one first; target: the image
slot_dim = 16  # of amvl: dimensions of a z; 7B: 512 [summary]
beta = 1e-5  # of amvl: weight of KL(sg[q] || p) [ours]
gamma = 3e-6  # of amvl: weight of KL(sg[p] || q), smaller [ours]
free_bits = 0.0  # of amvl: nats of a slot that both terms leave alone, in the log too [ours]
# all methods
epochs = 2  # [paper]
global_batch = 16  # examples per step; 7B: 128 [paper]
lr = 1e-3  # peak, of the decoder; 7B: 1e-5 [paper]
lr_head = 3e-3  # peak, of what the method adds to it; 7B: 1e-5 [paper]
weight_decay = 0.01  # of matrices [paper]
beta1 = 0.9  # of AdamW [ours]
beta2 = 0.95  # [ours]
warmup_ratio = 0.03  # share of the steps [paper]
grad_clip = 1.0  # largest norm of the gradient [ours]; 0: any
token_budget = 8192  # padded tokens per micro-batch; 7B on 80 GB: 4096
loader_threads = 2  # per rank, to read the next steps' images; 7B: 8
skip_unusable = False  # leave out rows with a broken image instead of refusing them
min_pixels = 56 * 56  # smaller images are scaled up
max_pixels = 1280 * 28 * 28  # larger ones are scaled down: 1,280 embeddings per image
dtype = "float32"  # of the forward; 7B: bfloat16 (masters, optimizer, reductions stay float32)
activation_checkpointing = False  # 7B: True
cpu_offload = False  # shards and optimizer on the host, where GPUs are small
eval_every = 500  # steps between validations; 0: only after the last
save_every = 500  # steps between checkpoints; 0: only after the last
curves = True  # draw <out>/curves.png in the end (plot.py), where matplotlib is installed
wandb_project = ""  # also log to this project of wandb, where it is installed
max_steps = 0  # > 0: stop here, where the schedule ends, too
seed = 12345  # of the order of examples, and of the head's first weights
# --------------------------------------------------------------------------------------------------

# settings that may change on resume: those that change no number, and paths, whose contents count
FREE = (
    "eval_every",
    "save_every",
    "token_budget",
    "cpu_offload",
    "activation_checkpointing",
    "loader_threads",
    "skip_unusable",  # the rows that it leaves count
    "curves",
    "wandb_project",
)
PATHS = ("base", "data", "val_data", "pca", "difficulty", "encoders", "out")
WRITTEN = settings_of(globals())  # the values above, before those of the command line

# --------------------------------------------------------------------------------------------------
# batches


def batch_of(step, n):
    """Indices of a step's examples among n.

    `step` is the whole data state: a resumed run sees what it would have seen.
    """
    per_epoch = n // global_batch
    epoch, at = step // per_epoch, step % per_epoch
    # an epoch's order depends on nothing but the seed; its incomplete last batch is left out
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))
    return order[at * global_batch : (at + 1) * global_batch].tolist()


def micro_batches(lengths, world, budget):
    """Split rows into micro-batches of at most `budget` padded tokens, a multiple of `world`.

    Returns lists of row indices, the longest first; micro-batch i belongs to rank i % world. Rows
    of like length share one, so little is padding. A list is empty only where there are fewer rows
    than lists.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts = []
    for i in longest_first:
        if parts:
            padded_to = lengths[parts[-1][0]]
            if padded_to * (len(parts[-1]) + 1) <= budget:
                parts[-1].append(i)
                continue
        parts.append([i])
    while len(parts) % world:  # every rank runs the same number of forwards
        fullest = max(range(len(parts)), key=lambda j: (len(parts[j]), -j))
        part = parts[fullest]
        half = (len(part) + 1) // 2
        parts[fullest : fullest + 1] = [part[:half], part[half:]]
    return parts


def load_batch(model, rows):
    """Of a global batch of rows: this rank's micro-batches; the counts and amounts of *all*."""
    rank, world = rank_and_world()
    # every rank encodes all rows (text only), so the counts need no communication;
    # it opens the images and reads the targets of its own
    examples = [model.encode(row) for row in rows]
    lengths = [len(example["ids"]) for example in examples]
    counts = Counter()
    for example in examples:
        counts.update(model.counts(example))
    batches = []
    for part in micro_batches(lengths, world, token_budget)[rank::world]:
        # more ranks than rows: this rank runs some row with weight 0
        batch = model.collate([examples[i] for i in part or [0]])
        batches.append(batch | {"weight": 1.0 if part else 0.0})
    return batches, dict(counts), amounts(examples, model.vlm)


def to_device(batch, vlm, device):
    """A micro-batch on the device, "vision" (N, d) or None in place of its images' pixels."""
    # a new one: what is on the device goes with it, and not with the batch
    there = {}
    for name, value in batch.items():
        there[name] = value.to(device, non_blocking=True) if torch.is_tensor(value) else value
    pixels, grids = there.pop("pixels"), there.pop("grids")
    there["vision"] = None
    if pixels is not None:
        tower = vlm.model.visual  # frozen
        with torch.no_grad():
            there["vision"] = tower(pixels.to(tower.dtype), grid_thw=grids).pooler_output
    return there


def run_batch(model, batches, counts, device, weights=None):
    """Run a global batch; returns the global mean of each sum that has a count.

    With `weights` also backward through their losses.
    """
    world = rank_and_world()[1]
    n = {name: max(count, 1) for name, count in counts.items()}
    logged = torch.zeros(len(n), device=device)
    for batch in batches:
        sums = model(to_device(batch, model.vlm, device))
        sums = {name: sums[name] * batch["weight"] for name in n}
        if weights is not None:
            # FSDP averages over ranks: world / count over the whole global batch
            loss = sum(weight * sums[name] / n[name] for name, weight in weights.items())
            (world * loss).backward()
        logged += torch.stack([x.detach() for x in sums.values()])
    dist.all_reduce(logged)  # once a batch
    means = (logged / torch.tensor(list(n.values()), device=device)).tolist()
    return {name: mean for name, mean in zip(n, means) if counts[name]}


def validate(model, rows, device):
    """What the method reports of a file's rows, each field as val_<field>."""
    model.vlm.eval()  # without dropout, where a base has some
    totals, counts = Counter(), Counter()
    for i in range(0, len(rows), global_batch):
        batches, count, _ = load_batch(model, rows[i : i + global_batch])
        with torch.no_grad():
            means = run_batch(model, batches, count, device)
        counts.update(count)
        totals.update({name: mean * count[name] for name, mean in means.items()})
    model.vlm.train()
    # means over all rows, not means of the batches' means
    means = {name: total / counts[name] for name, total in totals.items()}
    return {f"val_{name}": value for name, value in model.report(means).items()}


# --------------------------------------------------------------------------------------------------
# optimizer and shards


def lr_at(step, total, peak):
    """Linear warm-up over warmup_ratio of the steps, then cosine to 0."""
    warm = max(1, round(warmup_ratio * total))
    done, left = max(0, step - warm), max(1, total - warm)
    cosine = 0.5 * (1 + math.cos(math.pi * done / left))
    return peak * min((step + 1) / warm, cosine)


def make_optimizer(model):
    """AdamW with `lr` for the decoder, `lr_head` for what the method adds."""
    body = [p for p in model.vlm.parameters() if p.requires_grad]
    added = [p for name, p in model.named_parameters() if not name.startswith("vlm.")]
    groups = []
    for parameters, peak in ((body, lr), (added, lr_head)):
        # vectors (norms, biases) are not decayed; the learning rates are set at each step
        matrices = {"params": [p for p in parameters if p.ndim > 1], "peak": peak}
        vectors = {"params": [p for p in parameters if p.ndim == 1], "peak": peak}
        groups += [matrices, vectors | {"weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = beta1, beta2
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def shard(model, device):
    """FSDP2: float32 shards of every decoder layer, then of the root; the tower is replicated."""
    tower = model.vlm.model.visual.requires_grad_(False).to(device)
    precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, dtype),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # latent targets stay float32
    )
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    # else FSDP takes whatever accelerator the machine has, a Mac's too
    mesh = init_device_mesh(device.type, (rank_and_world()[1],))
    policies = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}

    layers = model.vlm.model.language_model.layers
    for i, layer in enumerate(layers):
        # one at a time: a GPU never holds more than its shards and one whole float32 layer
        layer = layer.to(device, torch.float32)
        layers[i] = checkpoint_wrapper(layer) if activation_checkpointing else layer
        fully_shard(layers[i], **policies)
    # what is left: embeddings, final norm, LM head, the method's own weights
    placed = ("vlm.model.visual", "vlm.model.language_model.layers.")
    for name, module in model.named_modules():
        if name.startswith(placed):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device, torch.float32)
        for buffer in module.buffers(recurse=False):
            buffer.data = buffer.data.to(device)
    # one group, gathered while the root's forward runs
    fully_shard(model, ignored_params=set(tower.parameters()), **policies)


def train_step(model, optimizer, batches, counts, step, total, device):
    """One optimizer step. Returns the batch's means and its gradient's norm before the clip."""
    means = run_batch(model, batches, counts, device, model.weights(step, total))
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # a collective: on every rank
    check_step(step, means | {"grad_norm": float(norm)})
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, total, group["peak"])
    optimizer.step()
    optimizer.zero_grad()
    return means, float(norm)


def check_step(step, numbers):
    """Raise SystemExit at a loss or gradient that is not finite, before it reaches a weight."""
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise SystemExit(
            f"step {step + 1}: {', '.join(bad)} not finite; lr={lr} may be too high. The last "
            f"checkpoint in {out}/ckpt, if there is one, is finite"
        )


# --------------------------------------------------------------------------------------------------
# checkpoints and export


def is_due(step, every):
    """Is it time, every so many steps? 0 is never."""
    return every > 0 and (step + 1) % every == 0


def is_saved(step, total):
    """Is a checkpoint written after this step? After the last one always is."""
    return step + 1 == total or is_due(step, save_every)


def check_weights(model, step):
    """Raise SystemExit, on every rank, if a weight is not finite: it reaches no checkpoint."""
    n_bad = torch.zeros(1, device=next(model.parameters()).device)
    for parameter in model.parameters():
        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        n_bad += (~here.isfinite()).sum().to(n_bad)
    dist.all_reduce(n_bad)
    if n_bad:
        raise SystemExit(
            f"step {step}: {int(n_bad)} weights are not finite; lr={lr} may be too high. The last "
            f"checkpoint in {out}/ckpt, if there is one, is finite"
        )


def check_space(model, first, total):
    """Raise SystemExit if the disk cannot hold what steps `first` to `total` will write."""
    size = exported = 0  # bytes of a checkpoint, and of the model in the end
    for p in model.parameters():
        # a trained weight and its two moments are float32
        size += p.numel() * (3 * 4 if p.requires_grad else p.element_size())
        exported += p.numel() * getattr(torch, dtype).itemsize
    folder = Path(out) / "ckpt"
    there = len(checkpoints())
    coming = sum(is_saved(step, total) for step in range(first, total))
    # two are kept while a third is written; in the end there are these two and the model
    while_saving = min(coming, max(1, 3 - there)) * size
    in_the_end = max(0, min(2, there + coming) - there) * size + exported
    room = max(while_saving, in_the_end)
    # what a killed save has left is deleted by the next
    left = sum(file.stat().st_size for file in folder.glob(".tmp/*"))
    free = shutil.disk_usage(out).free + left
    if free < room:
        raise SystemExit(
            f"{out}: {free / 1e9:.1f} GB are free; {room / 1e9:.1f} GB will be needed, for "
            f"checkpoints of {size / 1e9:.1f} GB and a model of {exported / 1e9:.1f} GB"
        )


def checkpoints():
    """The folders ckpt/step-N, the oldest first; a user's copies by other names are none."""
    found = (Path(out) / "ckpt").glob("step-*")
    numbered = (path for path in found if path.name.removeprefix("step-").isdecimal())
    return sorted(path for path in numbered if path.is_dir())


def save_checkpoint(model, optimizer, step, settings):
    """Write ckpt/step-N under a temporary name, rename it, keep the last two."""
    check_weights(model, step)
    folder = Path(out) / "ckpt"
    tmp, final = folder / ".tmp", folder / f"step-{step:07}"
    rank, _ = rank_and_world()
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    dist.barrier()
    # each rank writes its own shards; any number of ranks can read them
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=tmp)
    except CheckpointException as e:
        if any(isinstance(error, KeyboardInterrupt) for error, _ in e.failures.values()):
            raise KeyboardInterrupt from None
        raise SystemExit(f"{tmp}: no checkpoint could be written ({reason_of(e)})") from None
    # torch would not notice a flipped bit
    sums = {file.name: hash_file(file) for file in tmp.glob(f"__{rank}_*")}
    write_json(tmp / f"checksums.{rank}.json", sums)
    dist.barrier()
    if rank == 0:
        # the rename makes it a checkpoint: a killed save leaves only .tmp
        write_json(tmp / "checksums.metadata.json", {".metadata": hash_file(tmp / ".metadata")})
        write_json(tmp / "settings.json", settings)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
        # those above this one were damaged, else it had begun there
        kept = [path for path in checkpoints() if path.name <= final.name][-2:]
        for old in checkpoints():
            if old not in kept:
                shutil.rmtree(old)
    dist.barrier()


def reason_of(failed):
    """Why torch could not write a checkpoint: what the disk said on the first rank that says it."""
    for error, _ in failed.failures.values():
        while error is not None:
            if errno_of(error):
                return os.strerror(errno_of(error))
            error = error.__cause__ or error.__context__
    # of its own writer's faults torch keeps no number; the last line of a whole traceback
    return f"{str(failed).strip().splitlines()[-1]}; full disk?"


def load_checkpoint(model, optimizer, settings):
    """Load the newest whole checkpoint, if any, on any number of ranks; returns finished steps."""
    for folder in reversed(checkpoints()):
        faults = [fault for fault in gathered(checkpoint_fault(folder)) if fault]
        if faults:
            if rank_and_world()[0] == 0:
                advice = "the checkpoint before it is used, if there is one"
                print(f"{faults[0]}; {advice}", file=sys.stderr)
            continue
        check_same_run(folder, settings)
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return int(folder.name.removeprefix("step-"))
    return 0


def checkpoint_fault(folder):
    """What is wrong with a checkpoint's files, of which each rank reads a share; "" for nothing."""
    checksums = sorted(folder.glob("checksums.*.json"))
    if not checksums:
        return f"{folder}: no checksums"
    sums = {}
    try:
        read_json(folder / "settings.json", inputs=dict)
        for file in checksums:
            sums |= read_json(file)
    except (SystemExit, OSError) as e:
        return str(e)
    for path in [*folder.glob("__*"), folder / ".metadata"]:
        if path.name not in sums:
            return f"{path}: no checksum"
    rank, world = rank_and_world()
    for name in sorted(sums)[rank::world]:
        path = folder / name
        # read now: a bit that flips changes no time by which a digest is remembered
        if not path.is_file() or hash_file(path) != sums[name]:
            return f"{path}: damaged or missing"
    return ""


def check_same_run(folder, settings):
    """Raise SystemExit if a checkpoint is of another run: other settings, or fed other data."""
    path = folder / "settings.json"
    saved = read_json(path, inputs=dict)
    advice = "choose another `out`, or delete it to start over"
    free = (*FREE, *PATHS, *METHODS[method].reads, *METHODS[method].free, "inputs")
    mine = {name: value for name, value in settings.items() if name not in free}
    newer = [name for name in mine if name not in saved and mine[name] == WRITTEN.get(name)]
    if newer and rank_and_world()[0] == 0:
        print(f"{path} is of a version without {', '.join(newer)}: taken for what it did")
    differ = {
        name: (saved.get(name), value)
        for name, value in mine.items()
        if name not in newer and saved.get(name) != value
    }
    if differ:
        raise SystemExit(f"{path} and this run disagree on (there, here): {differ}; {advice}")
    there, here = saved["inputs"], settings["inputs"]
    changed = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
    if changed:
        files = settings | {"targets": pca}  # inputs that are no setting come from the data
        names = ", ".join(f"{name} ({files.get(name, data)})" for name in sorted(changed))
        raise SystemExit(f"{path}: the contents of {names} are not what they were; {advice}")


def row_key(model, row):
    """(a hash of what a row teaches, digests of what else is read of it at every step)."""
    return example_key(row), *map(file_digest, model.also_reads(row))


def check_unchanged(model, rows, keys):
    """Raise SystemExit, on every rank, for a row whose key is not what it was.

    All else that training reads it has read before its first step, or holds open.
    """
    rank, world = rank_and_world()
    changed = ""
    for i in range(rank, len(rows), world):
        row = rows[i]
        try:
            same = row_key(model, row) == keys[i]
        except FileNotFoundError:  # a picture that has gone
            same = False
        if not same:
            changed = f"{row.where}: example {row['id']!r} or a picture of it"
            break
    changed = next(filter(None, gathered(changed)), "")
    if changed:
        raise SystemExit(
            f"{changed} changed while this run trained on it; no checkpoint is written: put back "
            "what was there, and it goes on from the last one, or from the start"
        )


def export(model, tokenizer, processor):
    """Write the folder that from_pretrained, infer.py and eval.py load, file by file."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)  # a collective: on every rank
    if rank_and_world()[0] > 0:
        return
    tmp = Path(out) / ".export"
    shutil.rmtree(tmp, ignore_errors=True)

    vlm = model.vlm
    for config in (vlm.config, vlm.config.text_config, vlm.config.vision_config):
        config.dtype = getattr(torch, dtype)  # else bfloat16 weights load as float32
    decoder = {}
    for name, weight in weights.items():
        if name.startswith("vlm."):
            decoder[name.removeprefix("vlm.")] = weight.to(getattr(torch, dtype))
    if vlm.config.tie_word_embeddings:  # 3B: the LM head is the embedding table, stored once
        decoder.pop("lm_head.weight", None)
    with naming(tmp):
        vlm.save_pretrained(tmp, state_dict=decoder)
        tokenizer.save_pretrained(tmp)
        processor.save_pretrained(tmp)
        model.save(tmp, weights)

    if not (tmp / HEAD_FILE).exists():  # no head of an earlier run beside these weights
        (Path(out) / HEAD_FILE).unlink(missing_ok=True)
    mode = (tmp / "config.json").stat().st_mode
    # what a kill leaves half-moved has no config.json, and so is no model
    (Path(out) / "config.json").unlink(missing_ok=True)
    for file in sorted(tmp.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
        file.chmod(mode)  # safetensors makes files that their owner alone may read
        os.replace(file, Path(out) / file.name)
    tmp.rmdir()


# --------------------------------------------------------------------------------------------------
# the log


def open_log(first, settings):
    """log.jsonl from step `first` on: line 1 is the configuration, then a line per step."""
    path = Path(out) / "log.jsonl"
    kept = []  # steps after the checkpoint are run again
    if first:
        rows = read_lines(path)
        for row in rows[1:]:
            check_fields(row, {"step": int}, path)
        kept = rows[:1] + [row for row in rows[1:] if row["step"] <= first]
    if not kept:
        ran = {"world": rank_and_world()[1], "threads": torch.get_num_threads()}
        kept = [settings | versions() | ran]
    write_lines(path, kept)
    return open_append(path)


def open_wandb(settings):
    """A run of wandb_project named for <out>; None without a project, or without wandb."""
    if not wandb_project:
        return None
    try:
        from wandb import Error, init
    except ImportError:
        print(f"wandb_project={wandb_project!r}: wandb is not installed; log.jsonl has all of it")
        return None
    # with the checkpoints: who resumes from them goes on in the same run, who deletes them does not
    note = Path(out) / "ckpt" / "wandb.json"
    if not note.exists():
        write_json(note, {"id": secrets.token_hex(4)})
    run = {"name": Path(out).name, "id": read_json(note, id=str)["id"], "resume": "allow"}
    try:
        return init(project=wandb_project, dir=out, config=settings, **run)
    except Error as e:
        advice = "WANDB_MODE=offline keeps the run here"
        raise SystemExit(f"wandb_project={wandb_project!r}: {e} {advice}") from None


def peak_memory(device):
    """Most bytes held so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which begins at what the parent process held
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:  # some sandboxes do not say
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --------------------------------------------------------------------------------------------------


def report_lengths(model, rows):
    """Say how many rows are longer than a micro-batch or the model's context, and the longest."""
    # a million rows take minutes: each rank has a share
    rank, world = rank_and_world()
    mine = range(rank, len(rows), world)
    bar = Progress(mine, desc="lengths", unit="example", leave=False, delay=5, disable=rank > 0)
    # as in the first step, where rows may be longer than later (latents_first)
    parts = gathered([len(model.encode(rows[i] | {"step": 0})["ids"]) for i in bar])
    lengths = [parts[i % world][i // world] for i in range(len(rows))]
    longest = max(lengths)
    row = rows[lengths.index(longest)]
    context = model.vlm.config.text_config.max_position_embeddings
    for what, limit in {"token_budget": token_budget, "the model's context": context}.items():
        n = sum(length > limit for length in lengths)
        if n and rank == 0:
            print(
                f"{n} rows are longer than {what}={limit}; the longest, {row['id']!r} at "
                f"{row.where}, has {longest} tokens"
            )


def main():
    settings = settings_of(globals())
    check_choices(globals(), method=METHODS, dtype=("float32", "bfloat16"))
    others = [settings[name] for name in METHODS[method].reads]
    show_files(reads=[base, data, val_data, *others], writes=[out])
    check_there(Path(base) / "config.json")
    METHODS[method].check(settings)
    if not max_steps and not epochs:
        raise SystemExit("epochs=0 and max_steps=0: nothing to train")
    rank, world = rank_and_world()
    claim(out)
    device = pick_device()
    join_ranks(device, timedelta(hours=2))
    check_shared(out)
    torch.manual_seed(seed)

    # the data, before 16 GB of weights: what is wrong with it is said in seconds
    examples = load_examples(data)
    val_examples = load_examples(val_data) if val_data else []
    examples = usable_rows(examples, skip_unusable)  # opens all pictures
    val_examples = usable_rows(val_examples, skip_unusable)

    # the model, and the rows as its method trains on them
    vlm, tokenizer = load_vlm(base, getattr(torch, dtype))
    processor = load_processor(base, min_pixels, max_pixels)
    model = METHODS[method](vlm, tokenizer, processor, settings)
    if isinstance(getattr(model, "head", None), LatentHead):
        check_head(model.head)  # now, and not when a trained one is loaded
    vlm.train()
    rows, left_out = model.rows(examples, training=True)
    val_rows, _ = model.rows(val_examples, training=False)
    if len(rows) < global_batch:
        raise SystemExit(
            f"{data}: {len(rows)} usable examples are fewer than global_batch={global_batch}"
        )
    report_lengths(model, rows)
    total = max_steps or epochs * (len(rows) // global_batch)

    # the optimizer, and where an earlier run stopped that was fed the same
    each = flops_each(vlm)
    shard(model, device)
    keys = [row_key(model, row) for row in rows]
    settings["inputs"] = {
        "base": folder_digest(base),
        "data": key_of([taught for taught, *_ in keys]),
        "val_data": key_of([example_key(row) for row in val_rows]),
        **model.inputs(),
    }
    check_same_everywhere("the inputs", settings["inputs"])
    optimizer = make_optimizer(model)
    first = load_checkpoint(model, optimizer, settings)
    check_space(model, first, total)
    if rank == 0:
        n_latent = sum(LATENT_SPAN in row["response"] for row in rows)
        print(
            f"{method}: {len(rows)} examples, {n_latent} with latents, {len(left_out)} rejected; "
            f"{total} steps, from {first}; {world} rank(s) on {device}"
        )
        log, wandb_run = open_log(first, settings), open_wandb(settings)

    # the loop
    def load(step):
        # with their step: what a method draws for a row depends on nothing else
        return load_batch(model, [rows[i] | {"step": step} for i in batch_of(step, len(rows))])

    # images of the next steps are read while this one runs
    loaded = in_order(load, range(first, total), loader_threads)
    bar = Progress(
        total=total,
        initial=first,
        unit="step",
        desc=Path(out).name,
        disable=rank > 0,
        mininterval=1,
    )
    for step in range(first, total):
        started, began = time.perf_counter(), clock(device)
        batches, counts, amount = next(loaded)
        means, norm = train_step(model, optimizer, batches, counts, step, total, device)
        weights, reported = model.weights(step, total), model.report(means)
        line = {  # of log.jsonl
            "step": step + 1,
            "loss": sum(weight * means.get(name, 0.0) for name, weight in weights.items()),
            **reported,
            "grad_norm": norm,
            "lr": lr_at(step, total, lr),
            "peak_gib": peak_memory(device) / 2**30,
            # on a CPU that others share, seconds are this process's own; rates are of all ranks
            **rates(amount, each, time.perf_counter() - started, device, dtype),
            "seconds": clock(device) - began,
        }
        last = step + 1 == total
        if val_rows and (last or is_due(step, eval_every)):
            validated = validate(model, val_rows, device)
            check_step(step, validated)
            line |= validated
        if rank == 0:
            append(log, line)
            if wandb_run:
                wandb_run.log(line, step=step + 1)
            bar.set_postfix_str("  ".join(f"{k} {v:.3g}" for k, v in list(reported.items())[:3]))
            if "val_ce" in line:
                bar.write("  ".join(f"{k} {v:.4g}" for k, v in line.items()))
        bar.update()
        if is_saved(step, total):
            check_unchanged(model, rows, keys)
            save_checkpoint(model, optimizer, step + 1, settings)
    bar.close()

    export(model, tokenizer, processor)
    if rank == 0:
        print(f"wrote {out}")
        if wandb_run:
            wandb_run.finish()
        if curves:
            where_possible(draw_curves, [out], Path(out) / "curves.png")
    leave_ranks()


if __name__ == "__main__":
    start(main)
