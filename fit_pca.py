"""Encode the auxiliary images once, and fit the PCA that keeps latents in their space (section 4.1).

Reads the base model and data files. Writes, under <out>:
  targets/*.safetensors, targets/index.json   the latent targets of each example, (m, K, d) bfloat16, m spans
  pca.safetensors                             mean (d), basis (d, k), eigenvalues (all d), and how they were made
Training then never encodes an auxiliary image. A shard is written once and kept, so a killed run goes on with the
next; the PCA is fitted on the very bfloat16 vectors that are the targets, streamed from the shards.

    python fit_pca.py
    torchrun --nproc-per-node 8 fit_pca.py --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl --K=36
"""

import json
import math
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import (
    check_choices,
    key_of,
    load_examples,
    open_image,
    pick_device,
    rank_and_world,
    start,
    write_then_rename,
)
from model import encode_images, grid_features, load_processor, load_vlm, spread, tower_fingerprint

# ---------------------------------------------------------------------------------------------------
base = "toy/base"
data = "out/toy/train.jsonl"  # the PCA is fitted on these auxiliary images ...
val_data = "out/toy/val.jsonl"  # ... and these only get targets ("" for none)
out = "out/pca"
K = 4  # latents a span, a square; the paper's 36
mode = "pool"  # how an image becomes a sqrt(K) grid: pool its merged tokens, or resize the image [ours]
retained = 0.95  # k is the smallest number of components with this share of the variance [paper]
basis = "pca"  # or "random", a control: a random orthonormal basis of the same k
centre = True  # False, a control: mu = 0 in v_hat = P_k c + mu
degenerate = (
    1e-3  # an image is rejected if var(v) / mean ||v||^2 over its latents is below this [ours]
)
batch = 64  # images a tower call
shard = 512  # examples a file
min_pixels, max_pixels = 56 * 56, 1280 * 28 * 28
dtype = "float32"  # of the tower; 7B: bfloat16
# ---------------------------------------------------------------------------------------------------


def components(eigenvalues, share):
    """k, the smallest number of components with this share of the variance."""
    explained = eigenvalues.cumsum(0) / eigenvalues.sum()
    return min(int((explained < share).sum()) + 1, len(eigenvalues))


def fit(covariance, share):
    """Eigenvalues (d) in falling order, eigenvectors (d, d), and k for a retained share of the variance."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)
    return eigenvalues, vectors, components(eigenvalues, share)


def random_basis(covariance):
    """The variances (d) along random orthonormal directions, and the directions (d, d); their sum is the total variance."""
    draws = torch.randn(
        covariance.shape, dtype=covariance.dtype, generator=torch.Generator().manual_seed(0)
    )
    vectors = torch.linalg.qr(draws)[0]
    return (vectors * (covariance @ vectors)).sum(0), vectors


def moments(shards, d, device):
    """Sum (d), sum of outer products (d, d) and number of the vectors in target files, streamed in float64."""
    total, outer, n = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64), 0
    total, outer = total.to(device), outer.to(device)
    for path in tqdm(shards, desc="covariance", unit="shard", disable=rank_and_world()[0] > 0):
        with safe_open(path, "pt") as f:
            rejected = set(json.loads(f.metadata()["rejected"]))
            v = [f.get_tensor(k).flatten(0, 1) for k in f.keys() if k not in rejected]
        if v:
            v = torch.cat(v).to(device, torch.float64)
            total, outer, n = total + v.sum(0), outer + v.T @ v, n + len(v)
    return total, outer, n


def encode_shard(path, rows, vlm, processor):
    """Write the targets of `rows` to one file; its metadata names degenerate examples and the mean query norm."""
    paths = [p for row in rows for p in row["aux_images"]]
    v = [
        grid_features(vlm, processor, [open_image(p) for p in paths[i : i + batch]], K, mode).cpu()
        for i in range(0, len(paths), batch)
    ]
    v = torch.cat(v).bfloat16() if v else torch.zeros(0, K, 1)
    flat = spread(v) < degenerate
    tensors, rejected, at = {}, [], 0
    for row in rows:
        if m := len(row["aux_images"]):
            tensors[row["id"]] = v[at : at + m].contiguous()
            if flat[at : at + m].any():
                rejected.append(row["id"])
            at += m
    queries = [open_image(p) for row in rows[:batch] for p in row["images"][:1]]
    query = (
        torch.cat(encode_images(vlm, processor, queries)[0]).float().norm(dim=-1)
        if queries
        else torch.zeros(0)
    )
    norms = {
        "target_norm": [float(v.float().norm(dim=-1).sum()), v.shape[0] * K],
        "query_norm": [float(query.sum()), len(query)],
    }  # sums and counts
    meta = {"rejected": json.dumps(rejected), **{k: json.dumps(x) for k, x in norms.items()}}
    write_then_rename(path, lambda p: save_file(tensors, p, meta))


@torch.inference_mode()
def main():
    rank, world = rank_and_world()
    if math.isqrt(K) ** 2 != K or K < 1:
        raise SystemExit(f"K={K} is not a square: latents are a sqrt(K) x sqrt(K) grid")
    check_choices(
        globals(), mode=("pool", "resize"), basis=("pca", "random"), dtype=("float32", "bfloat16")
    )
    if not 0 < retained <= 1:
        raise SystemExit(f"retained={retained} is not a share in (0, 1]")
    device = pick_device()
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", timeout=timedelta(days=1)
        )  # shards take unequal times
    splits = {"train": load_examples(data)} | ({"val": load_examples(val_data)} if val_data else {})
    if len({row["id"] for rows in splits.values() for row in rows}) < sum(
        map(len, splits.values())
    ):
        raise SystemExit(f"{data} and {val_data} share an id: every example needs its own")
    vlm, _ = load_vlm(base, getattr(torch, dtype), device)
    processor = load_processor(base, min_pixels, max_pixels)
    d = vlm.config.text_config.hidden_size
    made_by = {
        "tower": tower_fingerprint(vlm),
        "K": K,
        "mode": mode,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "d": d,
        "shard": shard,
        "degenerate": degenerate,
        "dtype": dtype,
        "data": key_of({}, data, *([val_data] if val_data else [])),
    }

    # 1. targets: files that exist are finished; another setting would not fit them
    folder = Path(out) / "targets"
    note = folder / "made_by.json"
    if note.exists() and (old := json.loads(note.read_text())) != made_by:
        differ = {k: (old.get(k), v) for k, v in made_by.items() if old.get(k) != v}
        raise SystemExit(
            f"{note} and this run's settings disagree on (there, here): {differ}; choose another `out`, "
            "or delete it to start over"
        )
    if rank == 0:
        write_then_rename(note, lambda p: p.write_text(json.dumps(made_by)))
    jobs = [
        (folder / f"{split}-{i // shard:05}.safetensors", rows[i : i + shard])
        for split, rows in splits.items()
        for i in range(0, len(rows), shard)
    ]
    for path, rows in tqdm(jobs[rank::world], desc="targets", unit="shard", disable=rank > 0):
        if not path.exists():
            encode_shard(path, rows, vlm, processor)
    if world > 1:
        dist.barrier()

    # 2. mean and covariance, summed over ranks
    train = [path for path, _ in jobs if path.name.startswith("train-")]
    total, outer, n = moments(train[rank::world], d, device)
    n = torch.tensor(float(n), dtype=torch.float64, device=device)
    if world > 1:
        for x in (total, outer, n):
            dist.all_reduce(x)
    if rank == 0:
        finish(jobs, total.cpu(), outer.cpu(), int(n), made_by)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def finish(jobs, total, outer, n, made_by):
    """Write the index and the PCA, and print what there is to know about them."""
    index, rejected, norms = {}, [], {"target_norm": [], "query_norm": []}
    for path, rows in jobs:
        with safe_open(path, "pt") as f:
            if set(f.keys()) != (wanted := {row["id"] for row in rows if row["aux_images"]}):
                raise SystemExit(
                    f"{path} holds other examples than {data} has there "
                    f"({len(set(f.keys()) - wanted)} too many, {len(wanted - set(f.keys()))} missing); "
                    f"delete {path.parent}"
                )
            index |= dict.fromkeys(f.keys(), path.name)
            rejected += json.loads(f.metadata()["rejected"])
            for name, seen in norms.items():
                seen.append(json.loads(f.metadata()[name]))
    if n < 2:
        raise SystemExit(f"{data}: {n} usable auxiliary vectors; a PCA needs at least 2")
    mean = total / n
    covariance = outer / n - mean[:, None] * mean
    eigenvalues, vectors, k = fit(covariance, retained)
    print(f"{n:,} vectors of {len(index):,} examples; K = {K}, {mode}, d = {len(mean)}")
    print(
        f"rejected as degenerate: {len(rejected)} ({len(rejected) / max(len(index), 1):.2%}) {' '.join(rejected[:20])}"
    )
    target, query = (
        sum(s for s, _ in seen) / max(1, sum(n for _, n in seen)) for seen in norms.values()
    )
    print(f"mean norm of targets {target:.2f}, of query-image embeddings {query:.2f}")
    for share in (0.85, 0.90, 0.95, 0.99):
        at = components(eigenvalues, share)
        print(
            f"  retained {share:.0%}: k = {at:4}, RelMSE = {1 - float(eigenvalues[:at].sum() / eigenvalues.sum()):.4f}"
        )
    if basis == "random":
        eigenvalues, vectors = random_basis(covariance)
    folder = Path(out) / "targets"
    text = json.dumps(made_by | {"rejected": rejected, "files": index})
    write_then_rename(folder / "index.json", lambda p: p.write_text(text))
    meta = {
        k_: str(v)
        for k_, v in (
            made_by | {"retained": retained, "k": k, "n": n, "basis": basis, "centre": centre}
        ).items()
    }
    tensors = {
        "mean": mean.float() * centre,
        "basis": vectors[:, :k].float().contiguous(),
        "eigenvalues": eigenvalues.float(),
    }
    write_then_rename(Path(out) / "pca.safetensors", lambda p: save_file(tensors, p, meta))
    print(f"wrote {os.path.join(out, 'pca.safetensors')} (k = {k}) and {folder / 'index.json'}")


if __name__ == "__main__":
    start(main)
