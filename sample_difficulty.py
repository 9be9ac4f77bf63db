r"""What can the base solve already?

Draws N answers a question from the base model and counts the right ones (section 4.3). train.py
strips the latents of what the base solves.

Reads the base model and a data file. Writes <out>, `difficulty.jsonl`, one line a question: id, n,
correct, accuracy, answers, and whether the count is a lower bound because sampling stopped early.

    python sample_difficulty.py
    torchrun --nproc-per-node 8 sample_difficulty.py \
        --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl
    python sample_difficulty.py --url=http://localhost:8000/v1 --served_model=NAME \
        --base=Qwen2.5-VL-7B-Instruct --data=data/train.jsonl     # by vLLM, SGLang or the like

A killed run goes on where it stopped: each rank appends to a file of its own, and once all have
finished, rank 0 merges them.
"""

from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from answers import extract_answer, is_correct
from data import (
    append,
    check_there,
    key_of,
    load_examples,
    open_append,
    question_key,
    seed_of,
    weights_digest,
    write_lines,
)
from endpoint import key_in
from gap import RULES, is_solved, needs_latents, read_count_lines
from generate import generate, read_ahead, see, to_text
from images import usable_rows
from launch import Progress, check_choices, claim, pick_device, rank_and_world, show_files, start
from model import encode, load_processor, load_vlm
from resume import in_order
from served import Served, ask_all, draw, served_messages

# --------------------------------------------------------------------------------------------------
base = "toy/base"  # a Qwen2.5-VL folder
data = "out/toy/train.jsonl"  # the questions
out = "out/difficulty.jsonl"  # one line a question
instruction = ""  # ends every question; 7B: "\nPut your final answer in <answer> </answer>."
n_samples = 8  # N [paper]
temperature = 1.0  # [ours]
top_p = 1.0  # 1: draw from the whole distribution [ours]
tau = 0.0  # solved if accuracy > tau [paper]
rule = "paper"  # or "guess": solved only if the count is improbable under guessing [ours]
early_stop = True  # stop at a question once it is solved: the same assignment, a lower-bound count
batch = 64  # questions a batch; 7B on 80 GB: 16
max_new_tokens = 24  # 7B: 2048
min_pixels = 56 * 56  # smaller images are scaled up
max_pixels = 1280 * 28 * 28  # larger ones are scaled down: 1,280 embeddings an image
skip_unusable = False  # leave out rows with a broken image instead of refusing them
dtype = "float32"  # 7B: bfloat16
seed = 12345  # of the draws
url = ""  # http://localhost:8000/v1, OpenAI-compatible: a server of `base` that draws the answers
served_model = ""  # its name there
served_key = "SERVED_KEY"  # the environment variable with its key, if it wants one
workers = 64  # questions that it is asked at once
tries = 7  # of a request
give_up = 20  # questions in a row without an answer: the server is down
# --------------------------------------------------------------------------------------------------


class Tally:
    """The answers to a batch of questions as they come in, and how many are right."""

    def __init__(self, rows):
        self.rows = rows
        self.answers = [{} for _ in rows]  # by number of the sample: they end in any order
        # of the answers that have come in
        self.correct = [0 for _ in rows]

    def add(self, q, s, text):
        """Take sample s of question q. True where the question's other samples can be dropped."""
        row = self.rows[q]
        answer = extract_answer(text, row.get("options"))[0]
        self.answers[q][s] = answer
        self.correct[q] += is_correct(answer, row)
        # further samples only raise the count, and so change no assignment
        return early_stop and is_solved(self.correct[q], n_samples, n_options(row), tau, rule)

    def line(self, q, key):
        """The line of difficulty.jsonl for question q."""
        answers = self.answers[q]
        return {
            "id": self.rows[q]["id"],
            "key": key,
            "base": weights_digest(base),
            "row": question_key(self.rows[q]),
            # N, not how many were drawn: where sampling stopped, the accuracy is a lower bound
            "n": n_samples,
            "correct": self.correct[q],
            "accuracy": self.correct[q] / n_samples,
            "lower_bound": len(answers) < n_samples,
            "n_options": n_options(self.rows[q]),
            "answers": [answers[s] for s in sorted(answers)],
        }


def waves():
    """How many samples are drawn at a time: at first as few as can solve a question."""
    few = n_samples
    if early_stop:
        few = sum(not is_solved(c, n_samples, 0, tau, rule) for c in range(n_samples))
    return [few, n_samples - few] if few < n_samples else [n_samples]


def n_options(row):
    return len(row.get("options") or [])


def run_key():
    """The key of this run's counts: the base's weights and the settings that change them."""
    # not the path of the base: its weights are in the key
    names = [
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
    ]
    if url:
        names.append("served_model")
    if early_stop:  # a full count fits every tau and rule
        names += ["tau", "rule"]
    settings = {name: globals()[name] for name in names}
    return key_of(settings | {"weights": weights_digest(base)})


def part_files():
    """The files that ranks append to, until they are merged into `out`."""
    return sorted(Path(out).parent.glob(Path(out).name + ".rank*"))


def finished(rows, key):
    """{id: line} of the questions that a file has, as they are now.

    Raises SystemExit for lines of another base or other settings. A question that has changed since
    is sampled again.
    """
    # by what is asked now
    wanted = {row["id"]: question_key(row) for row in rows}
    done = {}
    for path in [out, *part_files()]:
        for n, line in enumerate(read_count_lines(path), 1):
            if line["key"] != key:
                raise SystemExit(
                    f"{path}:{n}: sampled with other settings or another base than this run's; "
                    "choose another `out`, or delete it to start over"
                )
            # a question that changed between two sittings has a line of each
            if wanted.get(line["id"]) == line["row"]:
                done[line["id"]] = line
    return done


def sample(rows):
    """Draw the answers to batches of questions with the base itself. Yields a Tally a batch.

    The prompt and its image are run once a question; its samples share the cache.
    """
    vlm, tokenizer = load_vlm(base, getattr(torch, dtype), pick_device())
    processor = load_processor(base, min_pixels, max_pixels)

    def prepared(tally):
        asked = [row | {"instruction": instruction} for row in tally.rows]
        prompts = [encode(vlm, tokenizer, processor, row) for row in asked]
        return tally, [read_ahead(processor, prompt) for prompt in prompts]

    tallies = (Tally(list(rows[i : i + batch])) for i in range(0, len(rows), batch))
    # a batch's images are read while the batch before it is answered
    for tally, prompts in in_order(prepared, tallies, 1):
        # one a sample: its draws depend on no batch, no rank and no kill
        seeds = [seed_of(seed, row["id"], s) for row in tally.rows for s in range(n_samples)]
        generate(
            vlm,
            None,  # no latent head: the base writes text only
            tokenizer,
            see(vlm, processor, prompts),
            n_samples=n_samples,
            waves=waves(),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            on_finish=lambda q, s, ids, tally=tally: tally.add(q, s, to_text(tokenizer, ids)),
            seeds=seeds,
        )
        yield tally


def sample_served(rows):
    """The same by a server, several questions at once. Yields a Tally a question, as they end.

    Raises SystemExit in the end where some have no answer: the next run asks for those alone.
    """
    processor = load_processor(base, min_pixels, max_pixels)
    key = key_in(served_key)
    server = Served(url, served_model, key, tries, max_new_tokens, temperature, top_p)

    def tally(row):
        return ask_server(server, processor, row)

    unanswered = {}
    for row, found, said in ask_all(tally, rows, workers, give_up, server):
        if found:
            yield found
        else:
            unanswered[row["id"]] = said
    if unanswered:
        id, said = next(iter(unanswered.items()))
        raise SystemExit(
            f"{url}: {len(unanswered)} questions without an answer, the first {id!r}: {said}; run "
            "again to ask for what is missing"
        )


def ask_server(server, processor, row):
    """The Tally of one question."""
    tally = Tally([row])
    messages = served_messages(row | {"instruction": instruction}, processor)
    for wave in waves():
        first = len(tally.answers[0])
        replies = draw(server, messages, wave, seed_of(seed, row["id"], first))
        ended = [tally.add(0, s, reply.text) for s, reply in enumerate(replies, first)]
        if any(ended):
            break
    return tally


def sample_all(rows):
    """Sample this rank's share of the questions that no file has yet."""
    rank, world = rank_and_world()
    key = run_key()
    done = finished(rows, key)
    if world > 1:
        dist.barrier()  # every rank has read the files before one appends
    # the ranks take turns, so that long questions spread
    left = rows.keep(i for i, row in enumerate(rows) if row["id"] not in done)
    mine = left[rank::world]

    bar = Progress(total=len(mine), unit="question", desc="difficulty", disable=rank > 0)
    # a file a rank: no two processes append to one
    with open_append(f"{out}.rank{rank:03}") as f:
        for tally in sample_served(mine) if url else sample(mine):
            # once the whole batch has ended: a kill costs one batch
            for q in range(len(tally.rows)):
                append(f, tally.line(q, key))
            bar.update(len(tally.rows))
    bar.close()


def merge(rows):
    """Merge the ranks' files into `out`, in the order of the data, and remove them."""
    # of all ranks, this launch's and earlier ones'
    found = finished(rows, run_key())
    merged = [found[row["id"]] for row in rows]
    write_lines(out, merged)
    # a kill before this costs nothing: a line that stands in two files is one line, by its id
    for path in part_files():
        path.unlink()
    return merged


def report(merged):
    """Print the histogram of counts, and the share that gets latents by both rules."""
    total = len(merged)
    note = " (counts above tau are lower bounds)" if early_stop else ""
    print(f"\n{total} questions, {n_samples} samples each{note}")

    counts = Counter(line["correct"] for line in merged)
    for c in range(n_samples + 1):
        bar = "#" * round(50 * counts[c] / total)
        print(f"  {c} of {n_samples} {counts[c]:7} {bar}")

    # both, whichever is used: who guesses among four is right once in eight tries with p = .90
    for name, title in (("paper", "paper rule"), ("guess", "guess-aware rule")):
        n = sum(needs_latents(line, tau, name) for line in merged)
        used = "  <- used" if name == rule else ""
        print(f"  latents by the {title:17} {n:7} ({n / total:.1%}){used}")


def main():
    check_choices(globals(), rule=RULES, dtype=("float32", "bfloat16"))
    show_files(reads=[base, data], writes=[out])
    check_there(Path(base) / "config.json")
    rank, world = rank_and_world()
    claim(Path(out).parent, f".{Path(out).name}.lock")
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
    rows = usable_rows(load_examples(data, training=False), skip_unusable)
    sample_all(rows)
    if world > 1:
        dist.barrier()  # every rank's file is complete
    if rank == 0:
        merged = merge(rows)
        report(merged)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    start(main)
