r"""Where do real vision embeddings live?

Fits the PCA that keeps latents among them on the auxiliary images of the training
data, which it encodes once: training reads the targets, and checks that the images are the same.

Reads the base model and data files. Writes, under <out>:
  targets/*.safetensors   the latent targets of each example, (m, K, d) bfloat16, m spans
  targets/index.json      which file holds which example (made_by.json: by which settings)
  pca.safetensors         mean (d), basis (d, k), eigenvalues (all d), and how they were made
  bank.safetensors        some targets and their patches: what latents are drawn with (imagine.py)

    python fit_pca.py
    torchrun --nproc-per-node 8 fit_pca.py \
        --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl --K=36

1. Encode the auxiliary images to target files. A file is written once and kept, so a killed run
   goes on with the next.
2. Stream mean and covariance from the files: the PCA is of the very bfloat16 vectors that are the
   targets.
3. Fit, report and write the PCA and the bank.
"""

import json
import math
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from data import Rows, load_examples
from files import (
    check_finite,
    check_there,
    file_digest,
    is_made,
    key_of,
    metadata_of,
    read_json,
    tensors_digest,
    write_json,
    write_then_rename,
)
from images import open_image, usable_rows
from imagine import save_bank
from launch import (
    Progress,
    check_choices,
    check_each,
    check_same_everywhere,
    check_shared,
    claim,
    gathered,
    join_ranks,
    leave_ranks,
    pick_device,
    rank_and_world,
    show_files,
    start,
)
from model import encode_images, grid_features, load_processor, load_vlm, spread, tower_fingerprint

# --------------------------------------------------------------------------------------------------
base = "toy/base"  # a Qwen2.5-VL folder
data = "out/toy/train.jsonl"  # the PCA is fitted on these auxiliary images ...
val_data = "out/toy/val.jsonl"  # ... and these only get targets ("" for none)
out = "out/pca"  # a folder
K = 4  # latents per span, a square; the paper's 36
mode = "pool"  # an image's sqrt(K) grid: "pool" its merged tokens, or "resize" the image [ours]
retained = 0.95  # k is the smallest number of components with this share of the variance [paper]
basis = "pca"  # or "random", a control: a random orthonormal basis of the same k
centre = True  # False, a control: mu = 0 in v_hat = P_k c + mu
n_bank = 2000  # examples in the bank, evenly over `data`; 7B: about 0.7 GB at K = 36
degenerate = 1e-3  # rejects an image with var(v) / mean ||v||^2 over its latents below this [ours]
batch = 64  # images a tower call
shard = 512  # examples per file
min_pixels = 56 * 56  # smaller images are scaled up
max_pixels = 1280 * 28 * 28  # larger ones are scaled down: 1,280 embeddings per image
skip_unusable = False  # leave out rows with a broken image instead of refusing them
dtype = "float32"  # of the tower; 7B: bfloat16
# --------------------------------------------------------------------------------------------------


# The v in R^d are what the tower and its merger make of auxiliary images, N in all.
#
#   mu        = 1/N sum v
#   Sigma     = 1/N sum (v - mu)(v - mu)^T, with eigenvalues lambda_1 >= lambda_2 >= ...
#   P_k       = the eigenvectors of the k largest eigenvalues, (d, k)
#   k         = the smallest with sum_{j<=k} lambda_j / sum_j lambda_j >= 95 %
#   RelMSE(k) = 1 - sum_{j<=k} lambda_j / sum_j lambda_j, what a projection on P_k loses


def moments(paths, d, device):
    """sum v (d), sum v v^T (d, d) and N over target files, streamed in float64."""
    total = torch.zeros(d, dtype=torch.float64, device=device)
    outer = torch.zeros(d, d, dtype=torch.float64, device=device)
    n = 0
    for path in Progress(paths, desc="covariance", unit="shard", disable=rank_and_world()[0] > 0):
        with safe_open(path, "pt") as f:
            rejected = set(json.loads(f.metadata()["rejected"]))
            kept = [f.get_tensor(name) for name in f.keys() if name not in rejected]  # (m, K, d)
        if not kept:
            continue
        for part in kept:
            if part.ndim != 3 or part.shape[2] != d:
                shape = tuple(part.shape)
                raise SystemExit(f"{path}: targets of shape {shape}, expected (spans, K, {d})")
            check_finite(part, str(path))
        v = torch.cat([part.flatten(0, 1) for part in kept])  # (vectors of this file, d)
        v = v.to(device, torch.float64)
        total += v.sum(0)
        outer += v.T @ v
        n += len(v)
    return total, outer, n


def mean_and_covariance(total, outer, n):
    """mu (d) and Sigma (d, d) from the moments."""
    mean = total / n
    covariance = outer / n - mean[:, None] * mean  # Sigma = 1/N sum v v^T - mu mu^T
    return mean, covariance


def fit(covariance, share):
    """Eigenvalues (d), falling; eigenvectors (d, d) in columns; and k for a retained share."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)  # rising
    eigenvalues = eigenvalues.flip(0).clamp(min=0)  # rounding can leave -1e-18
    vectors = vectors.flip(1)
    return eigenvalues, vectors, components(eigenvalues, share)


def components(eigenvalues, share):
    """k, the smallest number of components with this share of the variance."""
    explained = eigenvalues.cumsum(0) / eigenvalues.sum()  # (d)
    # by rounding alone the sum of all may miss 1, and what adds nothing be counted
    k = int((explained < share - 1e-9).sum()) + 1
    return min(k, len(eigenvalues))  # rounding can leave the last share below 1


def rel_mse(eigenvalues, k):
    """The share of the variance outside of the first k components."""
    return 1 - float(eigenvalues[:k].sum() / eigenvalues.sum())


def random_basis(covariance):
    """A control: the variances (d) along random orthonormal directions, and the directions (d, d).

    The variances sum to the total variance, as the eigenvalues do.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(covariance.shape, dtype=covariance.dtype, generator=generator)
    vectors = torch.linalg.qr(draws)[0]
    variances = (vectors * (covariance @ vectors)).sum(0)  # u^T Sigma u of each direction u
    return variances, vectors


# --------------------------------------------------------------------------------------------------
# targets: the same vectors v, K an auxiliary image, in files of `shard` examples


class TargetFile(NamedTuple):
    """A file of targets, of some examples of a split."""

    path: Path
    rows: Rows  # the examples that it is of
    key: str  # of their pictures and of the settings

    @property
    def is_train(self):
        return self.path.name.startswith("train-")


def split_to_shards(splits, made_by):
    """The TargetFiles of all splits."""
    shards = []
    for split, rows in splits.items():
        for i in range(0, len(rows), shard):
            path = Path(out) / "targets" / f"{split}-{i // shard:05}.safetensors"
            part = rows[i : i + shard]
            pictures = [(row["id"], pictures_of(row)) for row in part]
            shards.append(TargetFile(path, part, key_of([made_by, pictures])))
    return shards


def pictures_of(row):
    """What an example's targets are made of: its auxiliary images, by content."""
    return [file_digest(path) for path in row["aux_images"]]


def check_indexed():
    """Refuse, on every rank, a target file whose content is not what index.json says."""
    index = Path(out) / "targets" / "index.json"
    digests = read_json(index, shards=dict)["shards"] if index.exists() else {}

    def fault(name):
        path = index.with_name(name)
        if path.exists() and tensors_digest(path) != digests[name]:
            return f"{path}: damaged or exchanged since it was made; delete it"
        return ""

    check_each(sorted(digests), fault)


def check_unchanged(shards, now):
    """Raise SystemExit, on every rank, if a picture was replaced while targets were made."""
    changed = [before.path for before, after in zip(shards, now) if before.key != after.key]
    for path in changed:  # of the old picture, or of the new one
        path.unlink(missing_ok=True)
    if any(gathered(changed)):
        said = changed[0] if changed else out
        raise SystemExit(f"{said}: pictures changed while their targets were made; run again")


def forget_index(shards):
    """Remove the index where a file is to be made anew: a killed run leaves no wrong one."""
    if not all(is_made(file.path, file.key) for file in shards):
        (Path(out) / "targets" / "index.json").unlink(missing_ok=True)


def encode_shard(path, rows, key, vlm, processor):
    """Write the targets of `rows` to one file.

    Its metadata names the examples with a degenerate image, and holds norms as (sum, count).
    """
    v = encode_targets(rows, vlm, processor)  # (images, K, d)
    check_finite(v, f"{path}: the targets that {base} makes of {rows[0].where} and after")
    flat = spread(v) < degenerate  # (images)
    # with fewer embeddings than cells of the grid, some are the same
    thin = [len(image.unique(dim=0)) < K for image in v[~flat]]
    tensors, rejected = {}, []
    at = 0
    for row in rows:
        m = len(row["aux_images"])
        if m == 0:
            continue
        tensors[row["id"]] = v[at : at + m].contiguous()
        if flat[at : at + m].any():
            rejected.append(row["id"])
        at += m

    target_norm = [float(v.float().norm(dim=-1).sum()), v.shape[0] * K]
    query_norm = query_norms(rows[:batch], vlm, processor)  # a sample is enough to print
    meta = {
        "key": key,
        "rejected": json.dumps(rejected),
        "thin": str(sum(thin)),
        "target_norm": json.dumps(target_norm),
        "query_norm": json.dumps([float(query_norm.sum()), len(query_norm)]),
    }
    write_then_rename(path, lambda tmp: save_file(tensors, tmp, meta))


def encode_targets(rows, vlm, processor):
    """The targets (n, K, d) of the n auxiliary images of `rows`, in order, bfloat16 on the CPU."""
    paths = [path for row in rows for path in row["aux_images"]]
    if not paths:
        return torch.zeros(0, K, 1)
    parts = []
    for i in range(0, len(paths), batch):
        images = [open_image(path) for path in paths[i : i + batch]]
        parts.append(grid_features(vlm, processor, images, K, mode).cpu())
    return torch.cat(parts).bfloat16()


def query_norms(rows, vlm, processor):
    """||v|| of every embedding of each row's first query image, as the decoder is fed them."""
    images = [open_image(path) for row in rows for path in row["images"][:1]]
    if not images:
        return torch.zeros(0)
    v, _ = encode_images(vlm, processor, images)
    return torch.cat(v).float().norm(dim=-1)


def provenance(vlm):
    """What all targets depend on; it is kept beside them."""
    return {
        "tower": tower_fingerprint(vlm),
        "K": K,
        "mode": mode,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "d": vlm.config.text_config.hidden_size,
        "shard": shard,
        "degenerate": degenerate,
        "dtype": dtype,
    }


def check_provenance(note, made_by):
    """Raise SystemExit if targets are there already and were made in another way."""
    if not note.exists():
        return
    old = read_json(note)
    if old != made_by:
        differ = {name: (old.get(name), x) for name, x in made_by.items() if old.get(name) != x}
        raise SystemExit(
            f"{note} and this run's settings disagree on (there, here): {differ}; "
            "choose another `out`, or delete it to start over"
        )


# --------------------------------------------------------------------------------------------------
# the report and the files that training reads


def read_shards(shards):
    """All targets as {id: file name}, the rejected ids, a count of thin images, and mean norms."""
    files, rejected, thin = {}, [], 0
    norms = {"target_norm": [], "query_norm": []}  # of (sum, count), one per file
    for path in (file.path for file in shards):
        with safe_open(path, "pt") as f:
            meta = f.metadata()
            files |= dict.fromkeys(f.keys(), path.name)
        rejected += json.loads(meta["rejected"])
        thin += int(meta["thin"])
        for name, pairs in norms.items():
            pairs.append(json.loads(meta[name]))

    means = {}
    for name, pairs in norms.items():
        count = sum(count for _, count in pairs)
        means[name] = sum(total for total, _ in pairs) / max(1, count)
    return files, rejected, thin, means


def report(n, d, n_examples, rejected, thin, norms, eigenvalues):
    """Print what there is to know about the vectors and their PCA."""
    print(f"{n:,} vectors of the training data; K = {K}, {mode}, d = {d}")
    print(
        f"rejected as degenerate: {len(rejected)} of {n_examples:,} examples, validation data "
        f"included ({len(rejected) / max(n_examples, 1):.2%}) {' '.join(rejected[:20])}"
    )
    if thin:
        side = math.isqrt(K)
        print(f"too thin for {side} x {side} cells: {thin} images, whose latents repeat")
    print(
        f"mean norm of targets {norms['target_norm']:.2f}, "
        f"of query-image embeddings {norms['query_norm']:.2f}"
    )
    for share in (0.85, 0.90, 0.95, 0.99):
        k = components(eigenvalues, share)
        print(f"  retained {share:.0%}: k = {k:4}, RelMSE = {rel_mse(eigenvalues, k):.4f}")


def finish(shards, total, outer, n, made_by):
    """Fit the PCA, report, and write it and the index of the targets."""
    files, rejected, thin, norms = read_shards(shards)
    if n < 2:
        raise SystemExit(
            f"{data}: {n} usable auxiliary vectors, and a PCA needs at least 2; of {len(files)} "
            f"examples with auxiliary images {len(rejected)} were rejected as flat (degenerate)"
        )
    mean, covariance = mean_and_covariance(total, outer, n)
    if not covariance.trace() > 0:
        raise SystemExit(f"{data}: all {n} auxiliary vectors are one and the same: no PCA")
    eigenvalues, vectors, k = fit(covariance, retained)
    check_finite(eigenvalues, f"{out}: the eigenvalues of the fit")
    report(n, len(mean), len(files), rejected, thin, norms, eigenvalues)
    if basis == "random":
        eigenvalues, vectors = random_basis(covariance)

    folder = Path(out)
    index_path = folder / "targets" / "index.json"
    index = made_by | {
        "rejected": rejected,
        "files": files,
        "pictures": {row["id"]: pictures_of(row) for file in shards for row in file.rows},
        "shards": {file.path.name: tensors_digest(file.path) for file in shards},
    }
    write_json(index_path, index)

    tensors = {
        "mean": mean.float() * centre,
        "basis": vectors[:, :k].float().contiguous(),  # P_k
        "eigenvalues": eigenvalues.float(),
    }
    meta = made_by | {"retained": retained, "k": k, "n": n, "basis": basis, "centre": centre}
    meta["targets"] = key_of(index)  # a PCA belongs to the targets that it was fitted on
    meta = {name: str(x) for name, x in meta.items()}  # safetensors keeps strings only
    path = folder / "pca.safetensors"
    # a fit to the same is the same but for rounding, and what was trained on it can go on
    if metadata_of(path) != meta:
        write_then_rename(path, lambda tmp: save_file(tensors, tmp, meta))
    examples = sample_targets(shards, set(rejected))
    save_bank(folder / "bank.safetensors", examples, K, meta)
    print(f"wrote {folder}/pca.safetensors (k = {k}), bank.safetensors ({len(examples)} examples)")
    print(f"and {index_path}")


def sample_targets(shards, rejected):
    """[(row, its targets (m, K, d))] of n_bank training examples, evenly spread over them."""
    places = [  # not the rows, which stay on the disk
        (file, i)
        for file in shards
        if file.is_train
        for i, row in enumerate(file.rows)
        if row["aux_images"] and row["id"] not in rejected
    ]
    n = min(n_bank, len(places))
    examples = []
    for j in range(n):
        file, i = places[j * len(places) // n]
        row = file.rows[i]
        with safe_open(file.path, "pt") as f:  # reads a header and these targets, not all of it
            examples.append((row, f.get_tensor(row["id"])))
    return examples


# --------------------------------------------------------------------------------------------------


def check_settings():
    """Raise SystemExit for a setting that makes no sense."""
    if math.isqrt(K) ** 2 != K:
        raise SystemExit(f"K={K} is not a square: latents are a sqrt(K) x sqrt(K) grid")
    check_choices(
        globals(), mode=("pool", "resize"), basis=("pca", "random"), dtype=("float32", "bfloat16")
    )
    if retained == 0:
        raise SystemExit(f"retained={retained} is not a share in (0, 1]")


def load_splits():
    """{"train": rows, "val": rows}. Raises SystemExit if two examples share an id."""
    splits = {"train": load_examples(data)}
    if val_data:
        splits["val"] = load_examples(val_data)
    ids = [row["id"] for rows in splits.values() for row in rows]
    if len(set(ids)) < len(ids):
        shared = next(id for id, n in Counter(ids).items() if n > 1)
        raise SystemExit(
            f"{data} and {val_data} share an id, {shared!r} for one: every example needs its own"
        )
    if "__metadata__" in ids:
        raise SystemExit(f"{data}: the id '__metadata__' is safetensors' own; give another")
    fields = ("images", "aux_images")
    return {name: usable_rows(rows, skip_unusable, fields) for name, rows in splits.items()}


@torch.inference_mode()
def main():
    rank, world = rank_and_world()
    show_files(reads=[base, data, val_data], writes=[out])
    check_settings()
    check_there(Path(base) / "config.json")
    claim(out)
    device = pick_device()
    join_ranks(device, timedelta(days=1))  # files take unequal times
    check_shared(out)
    splits = load_splits()
    vlm, _ = load_vlm(base, getattr(torch, dtype), device)
    processor = load_processor(base, min_pixels, max_pixels)
    made_by = provenance(vlm)

    # 1. targets: a file that is there, of the same examples, pictures and settings, is kept
    shards = split_to_shards(splits, made_by)
    check_same_everywhere("the data", [file.key for file in shards])
    note = Path(out) / "targets" / "made_by.json"
    check_provenance(note, made_by)
    check_indexed()
    if rank == 0:
        write_json(note, made_by)
        forget_index(shards)
    dist.barrier()
    mine = shards[rank::world]
    for path, rows, key in Progress(mine, desc="targets", unit="shard", disable=rank > 0):
        if is_made(path, key):
            continue
        if path.exists():
            Progress.write(f"{path}: of other examples, pictures or settings; made anew")
        encode_shard(path, rows, key, vlm, processor)
    dist.barrier()  # every file is there
    check_unchanged(shards, split_to_shards(splits, made_by))

    # 2. moments of the training split, summed over ranks
    train = [file.path for file in shards if file.is_train]
    total, outer, n = moments(train[rank::world], made_by["d"], device)
    n = torch.tensor(float(n), dtype=torch.float64, device=device)
    for x in (total, outer, n):
        dist.all_reduce(x)

    # 3. the PCA
    if rank == 0:
        finish(shards, total.cpu(), outer.cpu(), int(n), made_by)
    leave_ranks()


if __name__ == "__main__":
    start(main)
