"""Train GAP or a baseline: L = L_LM + lambda * L_latent, one teacher-forced forward a step (sections 4.1 to 4.3).

Reads the base model, the data, the targets and PCA of fit_pca.py, and difficulty.jsonl. Writes <out>/: a folder that
plain `from_pretrained` loads, latent_head.safetensors, log.jsonl, and sharded checkpoints under ckpt/ to resume from.

    python train.py                                                     # one CPU process or one GPU
    torchrun --nproc-per-node 8 train.py --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl ...

method: gap (PCA head), lh (full head), output (output as input: the post-norm state is fed back and regressed),
text (dense-caption SFT: latents stripped everywhere, the parser text kept). Controls: frozen, matched, wide (model.HEADS).
"""

import json
import math
import os
import re
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from tqdm import tqdm

from data import (
    LATENT_SPAN,
    append,
    check_choices,
    clock,
    key_of,
    load_examples,
    open_append,
    open_image,
    pick_device,
    rank_and_world,
    read_lines,
    settings_of,
    start,
    strip_latents,
    versions,
    weight_stamps,
    write_lines,
)
from model import (
    HEAD_FILE,
    HEADS,
    IGNORE,
    LATENT_PAD,
    add_latent_tokens,
    cross_entropy,
    embed,
    encode,
    load_pca,
    load_processor,
    load_vlm,
    save_head,
    tower_fingerprint,
)
from sample_difficulty import RULES, needs_latents

# ---------------------------------------------------------------------------------------------------
# The toy's values; the paper's 7B values stand in the comments.
method = "gap"  # gap lh output text
base = "toy/base"  # Qwen2.5-VL-7B-Instruct
data = "out/toy/train.jsonl"
val_data = "out/toy/val.jsonl"  # "" for none
pca = "out/pca"  # written by fit_pca.py
difficulty = "out/difficulty.jsonl"  # "": every example keeps its latents (no DA)
out = "out/gap"
tau = 0.0  # accuracy above tau: train as text only [paper]
rule = "paper"  # or "guess": solved only if the count is improbable under guessing [ours]
keep_parser = True  # of a stripped example [ours]
write_parser = True  # False, a control: no example has parser text
lambda_latent = 1.0
latent_loss = (
    "relative"  # mean over d (7B), sum (the paper's equation literally), relative (1 - R^2) [ours]
)
scheduled_sampling = False  # second pass on the model's own decoded latents
epochs = 2  # 2
global_batch = 16  # 128
lr = 1e-3  # 1e-5
lr_head = 3e-3  # 1e-5
weight_decay = 0.01
beta1, beta2 = 0.9, 0.95  # [ours]
warmup_ratio = 0.03
grad_clip = 1.0  # [ours]
token_budget = 8192  # padded tokens a micro-batch; 7B on 80 GB: 4096
min_pixels, max_pixels = 56 * 56, 1280 * 28 * 28
dtype = "float32"  # of the forward; bfloat16 (masters, optimizer and reductions stay float32)
activation_checkpointing = False  # True
cpu_offload = False
eval_every, save_every = 500, 500  # steps
max_steps = 0  # > 0: stop (and let the schedule end) here
seed = 12345
# ---------------------------------------------------------------------------------------------------

FREE = (
    "eval_every",
    "save_every",
    "token_budget",
    "cpu_offload",
    "activation_checkpointing",
)  # may change on resume


class Model(nn.Module):
    """The decoder and the latent head under one forward, so that FSDP gathers the root's weights around the loss."""

    def __init__(self, vlm, head, latent_id):
        super().__init__()
        self.vlm, self.head, self.latent_id = vlm, head, latent_id

    def states(self, batch, latents):
        x = embed(self.vlm, batch["ids"], batch["vision"], latents, self.latent_id)
        return self.vlm.model.language_model(
            inputs_embeds=x, position_ids=batch["pos"], use_cache=False
        ).last_hidden_state[:, :-1]

    def forward(self, batch):
        """Sums over a micro-batch: cross-entropy, ||v_hat - v||^2, and the norms of v_hat and v.

        The state at <|latent_start|> predicts latent 1, the state at latent i predicts latent i + 1: both losses
        are read one position early.
        """
        on, at = batch["labels"][:, 1:] != IGNORE, batch["ids"][:, 1:] == self.latent_id
        v = fed = batch["latents"]
        if (
            scheduled_sampling and self.head is not None
        ):  # on every rank, with latents or not: FSDP gathers twice
            with torch.no_grad():
                fed = self.head(self.states(batch, v)[at])
        h = self.states(batch, fed)
        ce = cross_entropy(h[on], batch["labels"][:, 1:][on], self.vlm.lm_head)
        if not len(v):
            # keep the head in the graph: FSDP wants the same gradients on every rank
            idle = sum(p.sum() for p in self.head.parameters()) * 0.0 if self.head else 0.0
            return ce + idle, ce.new_zeros(()), ce.new_zeros(2)
        with torch.no_grad():
            norms = torch.stack(
                [self.head(h[at]).float().norm(dim=-1).sum(), v.float().norm(dim=-1).sum()]
            )
        return ce, self.head.squared_error(h[at], v).sum(), norms


def latent_weight(head):
    """What multiplies the mean over latents of ||v_hat - v||^2: 1/d, 1, or 1/total variance of the targets."""
    return {"mean": 1 / head.basis.shape[0], "sum": 1.0, "relative": 1 / head.total_variance}[
        latent_loss
    ]


def micro_batches(lengths, world, budget):
    """Split rows into micro-batches of at most `budget` padded tokens, a multiple of `world` of them.

    Returns lists of row indices, the longest first; micro-batch i belongs to rank i % world. Rows of like length
    share one, so little is padding. A list is empty only where there are fewer rows than ranks.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts = []
    for i in order:
        if parts and lengths[parts[-1][0]] * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    while len(parts) % world:  # every rank runs the same number of forwards
        big = max(range(len(parts)), key=lambda j: (len(parts[j]), -j))
        half = (len(parts[big]) + 1) // 2
        parts[big : big + 1] = [parts[big][:half], parts[big][half:]]
    return parts


class Data:
    """Examples of one file, assigned to text or latent format, with their targets on disk."""

    def __init__(self, path, vlm, tokenizer, processor, solved, index):
        self.vlm, self.tokenizer, self.processor, self.index = vlm, tokenizer, processor, index
        self.rows, self.n_latent, self.n_rejected, self.open = [], 0, 0, {}
        for row in load_examples(path):
            if not write_parser or (row["id"] in solved and not keep_parser):
                row["response"] = re.sub(
                    r" ?<parser>.*?</parser>", "", row["response"], flags=re.DOTALL
                )
            if method == "text" or row["id"] in solved or not row["aux_images"]:
                row["response"] = strip_latents(row["response"])
            elif row["id"] in index["rejected"]:
                self.n_rejected += 1
                continue
            elif row["id"] not in index["files"]:
                raise SystemExit(
                    f"{path}: example {row['id']!r} needs latent targets, which {pca}/targets/index.json "
                    "does not have; run fit_pca.py on this data file"
                )
            else:
                self.n_latent += 1
            self.rows.append(row)

    def targets(self, row):
        """The (m * K, d) targets of an example."""
        name = self.index["files"][row["id"]]
        if name not in self.open:
            self.open[name] = safe_open(Path(pca) / "targets" / name, "pt")
        v = self.open[name].get_tensor(row["id"])
        if len(v) != row["response"].count(LATENT_SPAN):
            raise SystemExit(
                f"{pca}/targets/{name}: {len(v)} spans for example {row['id']!r}, whose response has "
                f"{row['response'].count(LATENT_SPAN)}; run fit_pca.py again"
            )
        return v.flatten(0, 1)

    def load(self, picked, rank, world):
        """This rank's micro-batches of the global batch `picked`, and the label and latent counts of *all* of it."""
        examples = [
            encode(
                self.vlm,
                self.tokenizer,
                self.processor,
                self.rows[i],
                self.index["K"],
                self.rows[i]["response"],
            )
            for i in picked
        ]
        parts = micro_batches([len(e["ids"]) for e in examples], world, token_budget)
        spans = [self.rows[i]["response"].count(LATENT_SPAN) for i in picked]
        counts = {
            "labels": sum(int((e["labels"] != IGNORE).sum()) for e in examples),
            "latents": sum(spans) * self.index["K"],
            "tokens": sum(len(e["ids"]) for e in examples),
        }
        mine = []
        for part in parts[rank::world]:
            rows = part or [0]  # more ranks than rows: this rank runs some row with weight 0
            batch = collate([examples[i] for i in rows], self.processor) | {
                "weight": float(bool(part))
            }
            v = [self.targets(self.rows[picked[i]]) for i in rows if spans[i]]
            batch["latents"] = torch.cat(v) if v else torch.zeros(0, self.index["d"])
            mine.append(batch)
        return mine, counts


def latent_token(tokenizer):
    token = tokenizer.convert_tokens_to_ids(LATENT_PAD)
    return -1 if token is None else token


def collate(examples, processor):
    """Right-padded ids (B, T), labels (B, T), pos (3, B, T), pixels and grids. Causal attention needs no mask."""
    pad = lambda xs, value: nn.utils.rnn.pad_sequence(xs, batch_first=True, padding_value=value)  # noqa: E731
    images = [open_image(p) for e in examples for p in e["images"]]
    out = processor(images=images, return_tensors="pt") if images else {}
    return {
        "ids": pad([e["ids"] for e in examples], 0),
        "labels": pad([e["labels"] for e in examples], IGNORE),
        "pos": pad([e["pos"].T for e in examples], 0).permute(2, 0, 1),
        "pixels": out.get("pixel_values"),
        "grids": out.get("image_grid_thw"),
    }


def to_device(batch, vlm, device):
    """Move a micro-batch and run the frozen tower on its images."""
    batch = {
        k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()
    }
    batch["vision"] = None
    if batch["pixels"] is not None:
        tower = vlm.model.visual
        with torch.no_grad():
            batch["vision"] = tower(
                batch["pixels"].to(tower.dtype), grid_thw=batch["grids"]
            ).pooler_output
    return batch


def lr_at(step, total, peak):
    """Linear warm-up over warmup_ratio of the steps, then cosine to 0."""
    warm = max(1, round(warmup_ratio * total))
    return peak * min(
        (step + 1) / warm,
        0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, total - warm))),
    )


def batch_of(step, n):
    """The examples of a step: `step` is the whole data state, so a resumed run sees what it would have seen."""
    per_epoch = n // global_batch
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + step // per_epoch))
    at = step % per_epoch * global_batch
    return order[at : at + global_batch].tolist()


def read_difficulty(path):
    """Ids that the difficulty rule trains as text, and all ids in the file.

    Raises SystemExit where early-stopped counts can not tell.
    """
    solved, known = set(), set()
    for n, row in enumerate(read_lines(path), 1):
        if missing := {"id", "n", "correct", "n_options", "lower_bound"} - row.keys():
            raise SystemExit(
                f"{path}:{n}: lacks {sorted(missing)}; expected a line written by sample_difficulty.py"
            )
        known.add(row["id"])
        if not needs_latents(row, tau, rule):
            solved.add(row["id"])
        elif row["lower_bound"]:
            raise SystemExit(
                f"{path}:{n}: {row['id']!r} was stopped early at {row['correct']} correct, which does not "
                f"decide tau={tau} under rule={rule!r}; sample again with early_stop=0 or this tau and rule"
            )
    return solved, known


def check_inputs(vlm, index, meta):
    """Refuse a PCA, targets and base that do not belong together."""
    ours = tower_fingerprint(vlm)
    for name, there in ((f"{pca}/pca.safetensors", meta), (f"{pca}/targets/index.json", index)):
        if there["tower"] != ours:
            raise SystemExit(
                f"{name} was made with vision tower {there['tower']}, but {base} has tower {ours}"
            )
    for field in ("K", "mode"):
        if str(index[field]) != meta[field]:
            raise SystemExit(
                f"{pca}/targets/index.json has {field} = {index[field]}, "
                f"but {pca}/pca.safetensors has {meta[field]}"
            )


def shard(model, device):
    """FSDP2: float32 shards of every decoder layer, then of the root; the frozen tower is replicated."""
    tower = model.vlm.model.visual.requires_grad_(False).to(device)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    kwargs = {"mp_policy": policy, "offload_policy": offload}
    layers = model.vlm.model.language_model.layers
    for i, layer in enumerate(layers):
        # one layer at a time: at no moment does a GPU hold more than its shards and one whole float32 layer
        layer = layer.to(device, torch.float32)
        layers[i] = checkpoint_wrapper(layer) if activation_checkpointing else layer
        fully_shard(layers[i], **kwargs)
    for name, module in model.named_modules():
        if not name.startswith(("vlm.model.visual", "vlm.model.language_model.layers.")):
            for p in list(module.parameters(recurse=False)):
                p.data = p.data.to(device, torch.float32)
            for b in list(module.buffers(recurse=False)):
                b.data = b.data.to(device)
    fully_shard(model, ignored_params=set(tower.parameters()), **kwargs)


def save_checkpoint(model, optimizer, step, settings, rank):
    """Write ckpt/step-N under a temporary name, rename it, keep the last two."""
    folder = Path(out) / "ckpt"
    tmp, final = folder / ".tmp", folder / f"step-{step:07}"
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=tmp)
    if rank == 0:
        (tmp / "settings.json").write_text(json.dumps(settings))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(model, optimizer, settings):
    """Load the newest checkpoint, if any, on any number of ranks. Returns the number of finished steps."""
    found = sorted((Path(out) / "ckpt").glob("step-*"))
    if not found:
        return 0
    saved = json.loads((found[-1] / "settings.json").read_text())
    differ = {
        k: (saved.get(k), v) for k, v in settings.items() if k not in FREE and saved.get(k) != v
    }
    if differ:
        raise SystemExit(
            f"{found[-1]}/settings.json and this run disagree on (there, here): {differ}; "
            "choose another `out`, or delete it to start over"
        )
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=found[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(found[-1].name.removeprefix("step-"))


def export(model, tokenizer, processor, meta, rank):
    """Write the folder that from_pretrained, infer.py and eval.py load: to a temporary name, then file by file."""
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank:
        return
    tmp, kind = Path(out) / ".export", getattr(torch, dtype)
    shutil.rmtree(tmp, ignore_errors=True)
    vlm = model.vlm
    vlm.config.dtype = vlm.config.text_config.dtype = vlm.config.vision_config.dtype = kind
    weights_out = {k[4:]: v.to(kind) for k, v in weights.items() if k.startswith("vlm.")}
    if vlm.config.tie_word_embeddings:  # 3B: the LM head is the embedding table, stored once
        weights_out.pop("lm_head.weight", None)
    vlm.save_pretrained(tmp, state_dict=weights_out)
    tokenizer.save_pretrained(tmp)
    processor.save_pretrained(tmp)
    if model.head is None:
        (Path(out) / HEAD_FILE).unlink(missing_ok=True)
    else:
        save_head(
            tmp, model.head, {k[5:]: v for k, v in weights.items() if k.startswith("head.")}, meta
        )
    for file in sorted(tmp.iterdir()):
        os.replace(file, Path(out) / file.name)
    tmp.rmdir()


def peak_memory(device):
    """Most bytes held so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if (
        status := Path("/proc/self/status")
    ).exists():  # not ru_maxrss, which begins at what the parent process held
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main():
    settings = settings_of(globals())
    rank, world = rank_and_world()
    check_choices(
        globals(),
        method=(*HEADS, "text"),
        latent_loss=("mean", "sum", "relative"),
        rule=RULES,
        dtype=("float32", "bfloat16"),
    )
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = {} if world > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
        timeout=timedelta(hours=2),
        **store,
    )
    torch.manual_seed(seed)

    # model
    vlm, tokenizer = load_vlm(base, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    processor = load_processor(base, min_pixels, max_pixels)
    head, meta, index = None, {}, {"K": 0, "d": 1, "rejected": [], "files": {}}
    if method != "text":
        add_latent_tokens(vlm, tokenizer)
        components, meta = load_pca(Path(pca) / "pca.safetensors")
        path = Path(pca) / "targets" / "index.json"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; run fit_pca.py first")
        index = json.loads(path.read_text())
        check_inputs(vlm, index, meta)
        head = HEADS[method](components, index["K"])
    model = Model(vlm, head, latent_token(tokenizer))
    vlm.train()
    shard(model, device)

    # data
    assigned = bool(difficulty) and method != "text"
    solved, known = read_difficulty(difficulty) if assigned else (set(), set())
    train = Data(data, vlm, tokenizer, processor, solved, index)
    if assigned:
        if missing := [row["id"] for row in train.rows if row["id"] not in known]:
            raise SystemExit(
                f"{difficulty} lacks {len(missing)} examples of {data} (the first is {missing[0]!r}); "
                "run sample_difficulty.py again, it goes on where it stopped"
            )
    val = Data(val_data, vlm, tokenizer, processor, set(), index) if val_data else None
    if len(train.rows) < global_batch:
        raise SystemExit(
            f"{data}: {len(train.rows)} usable examples are fewer than global_batch={global_batch}"
        )
    total = max_steps or epochs * (len(train.rows) // global_batch)

    # what a resumed run must have been fed
    files = [data]
    if method != "text":
        files += [Path(pca) / "pca.safetensors", Path(pca) / "targets" / "index.json"] + [
            difficulty
        ] * bool(difficulty)
    settings["inputs"] = key_of({"base": weight_stamps(base)}, *files)

    # optimizer
    body = [p for p in vlm.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in body if p.ndim > 1], "peak": lr},
        {"params": [p for p in body if p.ndim == 1], "peak": lr, "weight_decay": 0.0},
    ]
    if head is not None and list(head.parameters()):
        groups.append({"params": list(head.parameters()), "peak": lr_head})
    optimizer = torch.optim.AdamW(
        groups, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, fused=True
    )
    first = load_checkpoint(model, optimizer, settings)
    if rank == 0:
        print(
            f"{method}: {len(train.rows)} examples, {train.n_latent} with latents, {train.n_rejected} rejected; "
            f"{total} steps, from {first}; {world} rank(s) on {device}"
        )
        log = Path(out) / "log.jsonl"
        old = [row for row in read_lines(log) if row.get("step", 0) <= first] if first else []
        write_lines(log, old or [settings | versions() | {"world": world}])
        log = open_append(log)

    def sums(batches, counts, backward):
        """Run micro-batches; returns global means (loss, ce, latent loss, R^2, norm of v_hat, norm of v)."""
        seen = torch.zeros(4, device=device)
        n, m = max(counts["labels"], 1), max(counts["latents"], 1)
        weight = latent_weight(head) if head is not None else 0.0
        for batch in batches:
            ce, squared, norms = (x * batch["weight"] for x in model(to_device(batch, vlm, device)))
            if backward:  # FSDP averages over ranks: world / count over the whole global batch
                (world * (ce / n + lambda_latent * weight * squared / m)).backward()
            seen += torch.stack([ce.detach(), squared.detach(), *norms])
        dist.all_reduce(seen)
        ce, squared, predicted, target = (seen / torch.tensor([n, m, m, m], device=device)).tolist()
        row = {"loss": ce + lambda_latent * weight * squared, "ce": ce}
        if counts["latents"]:
            row |= {
                "latent": weight * squared,
                "r2": 1 - squared / head.total_variance,
                "norm_predicted": predicted,
                "norm_target": target,
            }
        return row

    def validate():
        batches = [
            list(range(i, min(i + global_batch, len(val.rows))))
            for i in range(0, len(val.rows), global_batch)
        ]
        with torch.no_grad():
            found = [
                (sums(*(loaded := val.load(b, rank, world)), False), loaded[1]) for b in batches
            ]

        def mean(field, count):
            pairs = [(row[field], c[count]) for row, c in found if field in row]
            return sum(x * w for x, w in pairs) / max(1, sum(w for _, w in pairs))

        fields = {"ce": "labels"} | ({"latent": "latents", "r2": "latents"} if val.n_latent else {})
        return {f"val_{field}": mean(field, count) for field, count in fields.items()}

    loader = ThreadPoolExecutor(1)  # images of the next step are read while this one runs
    ahead = loader.submit(train.load, batch_of(first, len(train.rows)), rank, world)
    bar = tqdm(
        total=total,
        initial=first,
        unit="step",
        desc=Path(out).name,
        disable=rank > 0,
        mininterval=1,
    )
    for step in range(first, total):
        start, began = time.time(), clock(device)
        batches, counts = ahead.result()
        if step + 1 < total:
            ahead = loader.submit(train.load, batch_of(step + 1, len(train.rows)), rank, world)
        row = {"step": step + 1} | sums(batches, counts, True)
        norm = nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], grad_clip
        )
        norm = float(
            norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        )  # a collective: on every rank
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total, group["peak"])
        optimizer.step()
        optimizer.zero_grad()
        row |= {
            "grad_norm": norm,
            "lr": lr_at(step, total, lr),
            "peak_gib": peak_memory(device) / 2**30,
            "tokens_per_s": counts["tokens"] / (time.time() - start),
            "seconds": clock(device) - began,
        }
        last = step + 1 == total
        if val and (last or (step + 1) % eval_every == 0):
            row |= validate()
        if rank == 0:
            append(log, row)
            bar.set_postfix_str(" ".join(f"{k} {row[k]:.3f}" for k in ("ce", "r2") if k in row))
            if "val_ce" in row:
                bar.write("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
        bar.update()
        if last or (step + 1) % save_every == 0:
            save_checkpoint(model, optimizer, step + 1, settings, rank)
    bar.close()
    export(model, tokenizer, processor, meta, rank)
    if rank == 0:
        print(f"wrote {out}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    start(main)
