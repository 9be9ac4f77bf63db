r"""What can the base solve already?

Draws N answers per question from the base model and counts the right ones. train.py
strips the latents of what the base solves.

Reads the base model and a data file. Writes <out>, `difficulty.jsonl`, one line per question: id,
n, correct, accuracy, answers, and whether the count is a lower bound: sampling stopped early.

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
from glob import escape
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from answers import extract_answer, is_correct
from data import check_prompt_texts, load_examples, question_key
from endpoint import check_url, key_in
from files import append, check_there, folder_digest, key_of, open_append, seed_of, write_lines
from gap import RULES, is_solved, n_options, needs_latents, read_count_lines
from generate import see, stop_ids, stream, to_text, with_pixels
from images import usable_rows
from launch import (
    Progress,
    check_choices,
    check_shared,
    claim,
    join_ranks,
    leave_ranks,
    pick_device,
    rank_and_world,
    show_files,
    start,
)
from model import encode, load_processor, load_vlm
from served import Served, ask_all, draw_answers, served_messages
from threads import in_order

# --------------------------------------------------------------------------------------------------
base = "toy/base"  # a Qwen2.5-VL folder
data = "out/toy/train.jsonl"  # the questions
out = "out/difficulty.jsonl"  # one line per question
instruction = ""  # ends every question; 7B: "\nPut your final answer in <answer> </answer>."
n_samples = 8  # N [paper]
temperature = 1.0  # [ours]
top_p = 1.0  # 1: draw from the whole distribution [ours]
tau = 0.0  # solved if accuracy > tau [paper]
rule = "paper"  # "guess" [ours]: with options no tau, but a count improbable under guessing
early_stop = True  # stop at a question once it is solved: the same assignment, a lower-bound count
batch = 64  # questions at once; 7B on 80 GB: 16
max_new_tokens = 24  # 7B: 2048
min_pixels = 56 * 56  # smaller images are scaled up
max_pixels = 1280 * 28 * 28  # larger ones are scaled down: 1,280 embeddings per image
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
    """The answers to a question as they come in, and how many are right."""

    def __init__(self, row):
        self.row = row
        self.asked = question_key(row)  # before its pictures are opened: they may be replaced
        self.answers = {}  # by number of the sample: they end in any order
        self.correct = 0
        self.n_options = n_options(row)

    def add(self, s, text, finished):
        """Take sample s. True where the other samples can be dropped."""
        answer = extract_answer(text, self.row.get("options"), finished=finished)[0]
        self.answers[s] = answer
        self.correct += is_correct(answer, self.row)
        # further samples only raise the count, and so change no assignment
        return early_stop and is_solved(self.correct, n_samples, self.n_options, tau, rule)

    def line(self, key):
        """The question's line of difficulty.jsonl."""
        return {
            "id": self.row["id"],
            "key": key,
            "base": folder_digest(base),
            "row": self.asked,
            # N, not how many were drawn: where sampling stopped, the accuracy is a lower bound
            "n": n_samples,
            "correct": self.correct,
            "accuracy": self.correct / n_samples,
            "lower_bound": len(self.answers) < n_samples,
            "n_options": self.n_options,
            "answers": [self.answers[s] for s in sorted(self.answers)],
        }


def waves():
    """How many samples are drawn at a time: at first as few as can solve a question."""
    few = n_samples
    if early_stop:
        # without options both rules are the paper's, which at a small tau needs the fewest
        few = sum(not is_solved(c, n_samples, 0, tau, rule) for c in range(n_samples))
    return [few, n_samples - few] if few < n_samples else [n_samples]


def run_key():
    """The key of this run's counts: the base's weights and the settings that change them."""
    # not the path of the base: its weights are in the key
    names = (
        "instruction n_samples temperature top_p early_stop max_new_tokens min_pixels max_pixels "
        "dtype seed"
    ).split()
    if url:
        names.append("served_model")
    if early_stop:  # a full count fits every tau and rule
        names += ["tau", "rule"]
    settings = {name: globals()[name] for name in names}
    if early_stop and rule == "guess":  # older counts knew a row's own options alone
        settings["options"] = "those that a question lists, too"
    return key_of(settings | {"weights": folder_digest(base)})


def part_files():
    """The files that ranks append to, until they are merged into `out`."""
    return sorted(Path(out).parent.glob(escape(Path(out).name) + ".rank[0-9][0-9][0-9]"))


def counted(rows, key):
    """{id: line} of the questions that a file has, as they are now.

    Raises SystemExit for lines of another base or other settings, and where all questions by these
    ids are others: of another data file. A question that has changed since is sampled again.
    """
    # by what is asked now
    wanted = {row["id"]: question_key(row) for row in rows}
    done, changed = {}, set()
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
            elif line["id"] in wanted:
                changed.add(line["id"])
    if not done and len(changed) > 1:  # their counts would be lost
        raise SystemExit(
            f"{out} has counts of {len(changed)} other questions by the ids of {data}; choose "
            "another `out`, or delete it to start over"
        )
    return done


def sample(rows, vlm, tokenizer, processor):
    """Draw the answers with the base itself. Yields a Tally per question, as they end.

    The prompt and its image are run once a question; its samples share the cache.
    """

    def prepared(row):
        tally = Tally(row)
        prompt = encode(vlm, tokenizer, processor, row | {"instruction": instruction})
        # one seed per sample: its draws depend on no batch, no rank and no kill
        seeds = [seed_of(seed, row["id"], s) for s in range(n_samples)]
        return tally, with_pixels(processor, prompt) | {"seeds": seeds}

    # beside a GPU images are read while questions before them are answered; on a CPU, whose cores
    # are busy, a thread more makes the toy's job 7 % slower
    on_gpu = vlm.device.type == "cuda"
    questions = enumerate(in_order(prepared, rows, 1, batch) if on_gpu else map(prepared, rows))
    tallies, stops = {}, set(stop_ids(vlm, tokenizer).tolist())

    def more(n):
        part = list(islice(questions, n))
        tallies.update((q, tally) for q, (tally, _) in part)
        return see(vlm, processor, [prompt for _, (_, prompt) in part])

    def add(q, s, ids):
        return tallies[q].add(s, to_text(tokenizer, ids), ids[-1] in stops)

    answered = stream(
        vlm,
        None,  # no latent head: the base writes text only
        tokenizer,
        more,
        batch,
        n_samples=n_samples,
        waves=waves(),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        on_finish=add,
    )
    for q, _ in answered:
        yield tallies.pop(q)


def sample_served(rows, processor):
    """The same by a server, several questions at once.

    Raises SystemExit in the end where some have no answer: the next run asks for those alone.
    """
    key = key_in(served_key)
    server = Served(url, served_model, key, tries, max_new_tokens, temperature, top_p)

    def tally(row):
        return ask_server(server, processor, row)

    unanswered = {}
    for row, found, e in ask_all(tally, rows, workers, give_up, url):
        if found:
            yield found
        else:
            unanswered[row["id"]] = e
    if unanswered:
        id, e = next(iter(unanswered.items()))
        raise SystemExit(
            f"{url}: {len(unanswered)} questions without an answer, the first {id!r}: {e}; run "
            "again to ask for what is missing; what the server refuses has to leave the data"
        )


def ask_server(server, processor, row):
    """The Tally of one question."""
    tally = Tally(row)
    messages = served_messages(row | {"instruction": instruction}, processor)
    for wave in waves():
        first = len(tally.answers)
        replies = draw_answers(server, messages, wave, seed_of(seed, row["id"], first))
        ended = [tally.add(s, reply.text, reply.finished) for s, reply in enumerate(replies, first)]
        if any(ended):
            break
    return tally


def sample_all(rows):
    """Sample this rank's share of the questions that no file has yet."""
    rank, world = rank_and_world()
    key = run_key()
    done = counted(rows, key)
    dist.barrier()  # every rank has read the files before one appends
    # the ranks take turns, so that long questions spread
    left = rows.keep(i for i, row in enumerate(rows) if row["id"] not in done)
    mine = left[rank::world]

    processor = load_processor(base, min_pixels, max_pixels)
    if url:
        tallies = sample_served(mine, processor)
    else:
        vlm, tokenizer = load_vlm(base, getattr(torch, dtype), pick_device())
        tallies = sample(mine, vlm, tokenizer, processor)
    bar = Progress(total=len(mine), unit="question", desc="difficulty", disable=rank > 0)
    # a file per rank: no two processes append to one
    with open_append(f"{out}.rank{rank:03}") as f:
        for tally in tallies:
            append(f, tally.line(key))
            bar.update()
    bar.close()


def merge(rows):
    """Merge the ranks' files into `out`, in the order of the data, and remove them.

    Lines of questions that the data no longer has are kept, after these. Returns those of `rows`.
    Raises SystemExit for rows that have changed since they were sampled.
    """
    # of all ranks, this launch's and earlier ones'
    found = counted(rows, run_key())
    changed = [row["id"] for row in rows if row["id"] not in found]
    if changed:
        raise SystemExit(
            f"{data}: {len(changed)} questions, {changed[0]!r} for one, changed while they were "
            "sampled; run again to sample these"
        )
    merged = [found[row["id"]] for row in rows]
    asked = {line["id"] for line in merged}
    # work that is done: another data file may ask for it again
    files = [out, *part_files()]
    others = {line["id"]: line for path in files for line in read_count_lines(path)}
    write_lines(out, [*merged, *(line for id, line in others.items() if id not in asked)])
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
        unsolved = [line for line in merged if needs_latents(line, tau, name)]
        undecided = sum(line["lower_bound"] for line in unsolved)
        remark = "  <- used" if name == rule else ""
        if undecided:  # solved by the rule that was used, and sampled no further
            remark = f"  at most: {undecided} were stopped too early to tell (early_stop=0 does)"
        n = len(unsolved)
        print(f"  latents by the {title:17} {n:7} ({n / total:.1%}){remark}")


def check_drawn(merged):
    """Say so where a server's samples of a question are one answer, whatever the question."""
    drawn = [line["answers"] for line in merged if len(line["answers"]) > 1]
    if temperature and len(drawn) > 20 and all(len(set(answers)) == 1 for answers in drawn):
        print(
            f"all samples of each of {len(drawn)} questions agree: does the server draw them? "
            "By vLLM's default it takes top_k from the model's folder: --generation-config vllm"
        )


def main():
    check_prompt_texts(instruction=instruction)
    check_choices(globals(), rule=RULES, dtype=("float32", "bfloat16"))
    show_files(reads=[base, data], writes=[out])
    check_there(Path(base) / "config.json")
    if url:
        check_url(url)
    claim(Path(out).parent, Path(out).name)
    # ranks share files alone, and may finish hours apart: no GPU waits for another
    join_ranks(torch.device("cpu"), timedelta(days=7))
    check_shared(Path(out).parent)
    rows = usable_rows(load_examples(data, training=False), skip_unusable)
    sample_all(rows)
    dist.barrier()  # every rank's file is complete
    if rank_and_world()[0] == 0:
        merged = merge(rows)
        report(merged)
        if url:
            check_drawn(merged)
    leave_ranks()


if __name__ == "__main__":
    start(main)
