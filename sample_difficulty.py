"""Draw N answers a question from the base model and count the correct ones (section 4.3).

Reads the base model and a data file. Appends one line a question to <out>, `difficulty.jsonl`: id, n, correct,
accuracy, answers, and whether the count is a lower bound because sampling stopped early. train.py strips the latents of
what the base solves. The prompt and its image are run once a question; its samples share the cache.

    python sample_difficulty.py
    torchrun --nproc-per-node 8 sample_difficulty.py --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl

A killed run goes on where it stopped: each rank appends to its own file, and the last to finish merges them.
"""

from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from answers import extract_answer, is_correct
from data import (
    append,
    check_choices,
    key_of,
    load_examples,
    open_append,
    pick_device,
    rank_and_world,
    read_lines,
    seed_of,
    start,
    weight_stamps,
    write_lines,
)
from gap import RULES, is_solved, needs_latents
from generate import generate, make_prompts, to_text
from model import load_processor, load_vlm

# ---------------------------------------------------------------------------------------------------
base = "toy/base"
data = "out/toy/train.jsonl"
out = "out/difficulty.jsonl"
instruction = ""  # appended to every question; 7B: "\nPut your final answer in <answer> </answer>."
n_samples = 8  # N [paper]
temperature, top_p = 1.0, 1.0  # [ours]
tau = 0.0  # solved if accuracy > tau [paper]
rule = "paper"  # or "guess": solved only if the count is improbable under guessing [ours]
early_stop = True  # skip a question's other samples once it is solved: the same assignment, a lower-bound count
batch = 64  # questions a batch; 7B on 80 GB: 16
max_new_tokens = 24  # 7B: 2048
min_pixels, max_pixels = 56 * 56, 1280 * 28 * 28
dtype = "float32"  # 7B: bfloat16
seed = 12345
# ---------------------------------------------------------------------------------------------------


def run_key():
    """The key of this run's counts: the settings that change them, the weights and the data."""
    names = (
        "base",
        "instruction",
        "n_samples",
        "temperature",
        "top_p",
        "early_stop",
        "max_new_tokens",
        "min_pixels",
        "max_pixels",
        "dtype",
        "seed",
    ) + ("tau", "rule") * early_stop
    return key_of(
        {name: globals()[name] for name in names} | {"weights": weight_stamps(base)}, data
    )


def part_files():
    return sorted(Path(out).parent.glob(Path(out).name + ".rank*"))


def sample_all(rows):
    """Sample this rank's share of the questions that no file has yet."""
    rank, world = rank_and_world()
    device = pick_device()
    key, done = run_key(), set()
    for p in [out, *part_files()]:
        for n, r in enumerate(read_lines(p), 1):
            if r.get("key") != key:
                raise SystemExit(
                    f"{p}:{n}: sampled with other settings or other data than this run's; choose another `out`, "
                    "or delete it to start over"
                )
            done.add(r["id"])
    if world > 1:
        dist.barrier()  # every rank has read the files before one appends
    todo = [row for row in rows if row["id"] not in done][rank::world]
    vlm, tokenizer = load_vlm(base, getattr(torch, dtype), device)
    processor = load_processor(base, min_pixels, max_pixels)
    bar = tqdm(total=len(todo), unit="question", desc="difficulty", disable=rank > 0)
    with open_append(f"{out}.rank{rank:03}") as f:
        for i in range(0, len(todo), batch):
            part = todo[i : i + batch]
            answers, correct = [{} for _ in part], Counter()

            def on_finish(q, s, ids):
                answers[q][s] = extract_answer(to_text(tokenizer, ids), part[q].get("options"))[0]
                correct[q] += is_correct(answers[q][s], part[q])
                return early_stop and is_solved(
                    correct[q], n_samples, len(part[q].get("options") or []), tau, rule
                )

            asked = [row | {"question": row["question"] + instruction} for row in part]
            generate(
                vlm,
                None,
                tokenizer,
                make_prompts(vlm, tokenizer, processor, asked),
                n_samples=n_samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                on_finish=on_finish,
                seeds=[seed_of(seed, row["id"], s) for row in part for s in range(n_samples)],
            )
            for q, row in enumerate(part):
                append(
                    f,
                    {
                        "id": row["id"],
                        "key": key,
                        "n": n_samples,
                        "correct": correct[q],
                        "accuracy": correct[q] / n_samples,
                        "lower_bound": len(answers[q]) < n_samples,
                        "n_options": len(row.get("options") or []),
                        "answers": [answers[q][s] for s in sorted(answers[q])],
                    },
                )
            bar.update(len(part))
    bar.close()


def merge(rows):
    """Merge the ranks' files into `out`, in the order of the data, and remove them."""
    found = {r["id"]: r for p in [out, *part_files()] for r in read_lines(p)}
    merged = [found[row["id"]] for row in rows]
    write_lines(out, merged)
    for p in part_files():
        p.unlink()
    return merged


def report(merged):
    """The histogram of accuracies, and the share that gets latents by both rules."""
    counts = Counter(r["correct"] for r in merged)
    print(
        f"\n{len(merged)} questions, {n_samples} samples each"
        + (" (counts above tau are lower bounds)" if early_stop else "")
    )
    for c in range(n_samples + 1):
        print(f"  {c} of {n_samples} {counts[c]:7} {'#' * round(50 * counts[c] / len(merged))}")
    for name in ("paper", "guess"):
        n = sum(needs_latents(r, tau, name) for r in merged)
        print(
            f"  latents by the {name + (' rule' if name == 'paper' else '-aware rule'):17} {n:7} ({n / len(merged):.1%})"
            + ("  <- used" if name == rule else "")
        )


def main():
    check_choices(globals(), rule=RULES, dtype=("float32", "bfloat16"))
    rank, world = rank_and_world()
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
    rows = load_examples(data)
    sample_all(rows)
    if world > 1:
        dist.barrier()
    if rank == 0:
        report(merge(rows))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    start(main)
