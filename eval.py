"""Answer test questions with a model folder and score them as the benchmarks' own harnesses do.

Reads a model folder and either a JSONL test set (`data`) or the official files of public benchmarks under `data_root`
(`benchmarks`, names of BENCHMARKS below; nothing is downloaded). Writes, for a JSONL set to <out>/ and for a benchmark to
<out>/<name>/: predictions.rank*.jsonl (append-only, one line an answer, resumed after a kill with any number of ranks), and
once all answers are there scored.jsonl (one line a question) and metrics.json. Ranks share nothing while they answer; scoring
is a separate pass over the files (`--score_only=1`).

    python eval.py                                                # the toy's test set
    torchrun --nproc-per-node 8 eval.py --model=out/7b/gap --benchmarks=HRBench4K,MMStar --out=out/7b/eval --dtype=bfloat16
    python eval.py --compare out/eval/gap out/eval/text           # paired difference of two finished runs
"""

import bisect
import hashlib
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError
from tqdm import tqdm

from answers import extract_answer, extract_final, find_kind, find_letter
from benchmarks import (
    AVERAGES,
    BENCHMARKS,
    GAP_TABLE,
    JSONL,
    PAPER,
    PAPER_SYSTEMS,
    Benchmark,
    images_of,
    load_benchmark,
    mean,
)
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
    read_safetensors,
    seed_of,
    start,
    versions,
    weight_stamps,
    write_lines,
    write_then_rename,
)
from endpoint import answered
from generate import INTERVENTIONS, generate, load_latents_file, save_latents_file, see, to_text
from model import HEAD_FILE, encode, grid_features, load_head, load_processor, load_vlm

# ---------------------------------------------------------------------------------------------------
model = "out/gap"  # a folder from train.py, or any Qwen2.5-VL folder
data = "out/toy/test.jsonl"  # a JSONL test set, used when `benchmarks` is empty
benchmarks = ""  # e.g. "HRBench4K,MMStar"; "gap" for the paper's table
data_root = "data/benchmarks"  # where the official files lie
out = "out/eval/gap"
system = ""  # system prompt; "" is the chat template's own, as the harnesses leave it
instruction = (
    ""  # appended to every question, e.g. "\nPut your final answer in <answer> </answer>."
)
# 0: 56*56, 1280*28*28 and 128 for a JSONL set (the toy's); for a benchmark what it names in BENCHMARKS, and 2048
min_pixels, max_pixels, max_new_tokens = 0, 0, 0
batch = 100  # questions a batch, at most
prompt_tokens = 40_000  # padded prompt tokens a batch, at most: two 4K images
temperature = 0.0  # 0 is greedy
top_p = 1.0
seed = 12345
intervention = "clean"  # clean zero noise mean shuffle oracle oracle_pca
donor = ""  # for shuffle: the latents/ folder of a clean run with save_latents=1
save_latents = False  # also write <out>/latents/*.safetensors, a file an answer
after_latents = (
    ""  # text forced after every span, e.g. " </think> <answer>": no parser text is written
)
latent_size = (
    10  # most latents a span of a checkpoint with Monet's tokens and no head file [Monet: 10 to 16]
)
ema_beta = 0.0  # > 0: EMA norm calibration of output-as-input latents [paper; 0.9 ours]
dtype = "float32"  # 7B: bfloat16
limit = 0  # > 0: only the first rows
score_only = False
allow_partial = False  # score what is there although answers are missing
judge_url = ""  # an OpenAI-compatible endpoint, http://localhost:8000/v1: also judge what no rule can decide
judge_model = ""
judge_key = (
    "JUDGE_API_KEY"  # the environment variable that holds the endpoint's key, if it wants one
)
judge_workers, judge_tries = 8, 7
# ---------------------------------------------------------------------------------------------------

JUDGE_PROMPTS = {
    "letter": "Below are a multiple-choice question and what someone answered. Which option did they choose? Reply with its "
    "letter alone, or with Z if they chose none or more than one.\n\n{question}\n\nTheir answer:\n{said}",
    "value": "Below are a question and what someone answered. Reply with the final value they gave, alone and in the form that "
    "the question asks for, or with Z if they gave none.\n\n{question}\n\nTheir answer:\n{said}",
    "rating": "Rate an answer to a question about an image that you can not see. The image holds: {image_content}\n"
    "Question: {question}\nA correct answer: {answer}\nThe answer to rate: {said}\n\nDoes it say things of the image "
    "that are not so, and does it help? 6: true and very informative; 5: true and informative; 4: true, little "
    "information; 3: true, no information; 2, 1, 0: says what is not so, yet is very informative, a little, not at "
    'all. Explain briefly and end with one line, "Rating: " and the number.',
}
JUDGED = {"MMStar": "letter", "WeMath": "letter", "MathVista": "value", "MMHal-Bench": "rating"}


def ask_judge(client, prompt):
    """One reply of the judge. Raises SystemExit when it gives none: no rule takes its place."""

    def call():
        reply = client.chat_completion(
            [{"role": "user", "content": prompt}],
            model=judge_model or None,
            temperature=0,
            max_tokens=512,
        )
        return reply.choices[0].message.content or ""

    try:
        return answered(call, judge_url, judge_tries)
    except (HTTPError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise SystemExit(
            f"{judge_url}: no judgement ({type(e).__name__}: {e}); the finished ones are kept, run eval.py again"
        ) from None


def judge(test, graded):
    """The graded rows, those that no rule decided graded again by the judge's reading of them. Replies are kept in judge.jsonl
    and never asked for twice; a truncated or failed answer stays wrong."""
    kind, path = JUDGED[test.name], test.out / "judge.jsonl"
    kept = {r["key"]: r["reply"] for r in read_lines(path)}
    open_rows = [
        row
        for row in graded
        if "error" not in row
        and row["method"] not in ("truncated", "empty")
        and (kind == "rating" or row["extracted"] is None)
    ]
    prompts = {
        row["id"]: JUDGE_PROMPTS[kind].format(**row | {"said": extract_final(row["raw"])})
        for row in open_rows
    }
    keys = {
        id: key_of({"judge": judge_model, "url": judge_url, "prompt": text})
        for id, text in prompts.items()
    }
    client = InferenceClient(
        base_url=judge_url, api_key=os.environ.get(judge_key) or "none", timeout=120
    )
    todo = [id for id in prompts if keys[id] not in kept]
    with open_append(path) as f, ThreadPoolExecutor(judge_workers) as pool:
        replies = pool.map(lambda id: ask_judge(client, prompts[id]), todo)
        for id in tqdm(todo, desc=f"judge {test.name}", unit="answer"):
            kept[keys[id]] = next(replies)
            append(f, {"id": id, "key": keys[id], "reply": kept[keys[id]]})

    def again(row):
        reply = kept[keys[row["id"]]].strip()
        if kind == "rating":
            said = set(re.findall(r"Rating: ([0-6])\b", reply))
            return row | {
                "judgement": reply,
                "rating": int(said.pop()) if len(said) == 1 else 0,
            }  # as the official script
        if kind == "letter" or row["options"]:
            answer = find_letter(reply, row["options"])[0] if reply != "Z" else None
        else:
            answer = find_kind(reply, row["kind"]) if reply != "Z" else None
        row = row | {"judgement": reply, "extracted": answer, "method": "judge"}
        return row | {"correct": answer is not None and bool(test.benchmark.check(row))}

    return [again(row) if row["id"] in keys else row for row in graded]


def wilson(correct, n, z=1.96):
    """The 95 % Wilson interval of an accuracy, as (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, q = correct / n, z * z / n
    mid, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return mid - half, mid + half


def mcnemar(a, b):
    """Exact two-sided p-value of the paired scores a and b of the same questions: a sign test on the pairs that differ."""
    plus, minus = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    n, least = plus + minus, min(plus, minus)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)


class TestSet(NamedTuple):
    name: str
    rows: list
    out: Path
    benchmark: Benchmark
    settings: (
        dict  # everything that changes an answer but the question, and what a reader must know
    )
    key: str  # its hash


ANSWER_SETTINGS = (
    "model",
    "system",
    "instruction",
    "temperature",
    "top_p",
    "seed",
    "intervention",
    "ema_beta",
    "dtype",
    "donor",
    "save_latents",
    "after_latents",
    "latent_size",
)


def load_test_set(name):
    """The questions of a benchmark, or of the JSONL file `data` if the name is empty."""
    if name:
        benchmark, folder, (rows, md5) = (
            BENCHMARKS[name],
            Path(out) / name,
            load_benchmark(name, data_root),
        )
    else:
        benchmark, folder, rows = JSONL, Path(out), load_examples(data, training=False)
        md5 = hashlib.md5(Path(data).read_bytes()).hexdigest()
    limits = {
        "min_pixels": min_pixels or benchmark.pixels[0],
        "max_pixels": max_pixels or benchmark.pixels[1],
        "max_new_tokens": max_new_tokens or benchmark.max_new_tokens,
    }
    settings = (
        {k: globals()[k] for k in ANSWER_SETTINGS} | limits | {"data": name or data, "md5": md5}
    )
    stamps = weight_stamps(model) + (weight_stamps(donor) if donor else [])
    return TestSet(
        name or Path(data).stem,
        rows[:limit] if limit else rows,
        folder,
        benchmark,
        settings,
        key_of(settings | {"files": stamps}),
    )


def row_key(key, row):
    """The key of one answer: the run's settings and the question as it is put."""
    return f"{seed_of(key, row['id'], row['question']):016x}"


def latents_name(id):
    """The file name of an example's latents."""
    return f"{seed_of(id):016x}.safetensors"


def read_predictions(test):
    """The predictions of these settings by id, from the files of all ranks; an answer stands, an error only without one."""
    keys = {row["id"]: row_key(test.key, row) for row in test.rows}
    found = [p for f in sorted(test.out.glob("predictions.rank*.jsonl")) for p in read_lines(f)]
    found = [p for p in found if keys.get(p["id"]) == p["key"]]
    return {p["id"]: p for p in sorted(found, key=lambda p: "error" not in p)}


def fed_latents(rows, vlm, processor, head, donors):
    """What shuffle and oracle feed, (m, K, d) a row: another example's latents, or the real auxiliary features."""
    if intervention == "shuffle":  # the next file in the order of names, which are hashes of ids
        names = [latents_name(r["id"]) for r in rows]
        return [
            load_latents_file(
                donors[bisect.bisect_right(donors, Path(donor) / n) % len(donors)], head
            )
            for n in names
        ]
    if not intervention.startswith("oracle"):
        return None
    mode = read_safetensors(Path(model) / HEAD_FILE, ())[1]["mode"]
    images = [open_image(p) for r in rows for p in r["aux_images"]]
    with torch.inference_mode():
        v = grid_features(vlm, processor, images, head.K, mode)
    return list(v.cpu().split([len(r["aux_images"]) for r in rows]))


def batches(rows, prepare, failed):
    """Lists of (row, encoded prompt), at most `batch` of them and `prompt_tokens` padded tokens; a row that can not be
    prepared goes to `failed`."""
    part, longest = [], 0
    for row in rows:
        try:
            prompt = prepare(row)
        except (
            Exception,
            SystemExit,
        ) as e:  # this question's failure, recorded by `failed`, must not stop the others
            failed(row, e)
            continue
        n = max(longest, len(prompt["ids"]))
        if part and (len(part) == batch or n * (len(part) + 1) > prompt_tokens):
            yield part
            part, n = [], len(prompt["ids"])
        part.append((row, prompt))
        longest = n
    if part:
        yield part


def answer_all(test, vlm, tokenizer, head, device):
    """Answer this rank's share of the rows that have no answer yet; what fails is recorded, and tried again by the next run."""
    rank, world = rank_and_world()
    done = {id for id, p in read_predictions(test).items() if "error" not in p}
    # by position in the file, not among the missing: ranks that start at different moments still split alike
    todo = [row for i, row in enumerate(test.rows) if i % world == rank and row["id"] not in done]
    limits = test.settings
    processor = load_processor(model, limits["min_pixels"], limits["max_pixels"])
    donors = sorted(Path(donor).glob("*.safetensors")) if donor else []
    if intervention == "shuffle" and len(donors) < 2:
        raise SystemExit(
            f"shuffle feeds other examples' latents: donor={donor!r} must be the latents/ folder of a clean run "
            f"with save_latents=1; it holds {len(donors)} files"
        )
    if intervention.startswith("oracle") and (
        bare := [r["id"] for r in test.rows if not r.get("aux_images")]
    ):
        raise SystemExit(
            f"{limits['data']}: example {bare[0]!r} has no aux_images, which {intervention} feeds"
        )
    bar = tqdm(total=len(todo), unit="question", desc=test.name, disable=rank > 0)
    with open_append(test.out / f"predictions.rank{rank}.jsonl") as f:

        def prepare(row):
            asked = row | {
                "question": row["question"] + instruction,
                "images": images_of(row),
                "system": system,
            }
            return encode(vlm, tokenizer, processor, asked)

        def failed(row, e):
            append(
                f,
                {
                    "id": row["id"],
                    "key": row_key(test.key, row),
                    "error": f"{type(e).__name__}: {e}"[:1000],
                },
            )
            bar.update()

        def answer(part):
            rows, start = [row for row, _ in part], clock(device)
            answers = generate(
                vlm,
                head,
                tokenizer,
                see(vlm, processor, [prompt for _, prompt in part]),
                max_new_tokens=limits["max_new_tokens"],
                temperature=temperature,
                top_p=top_p,
                seeds=[seed_of(seed, row["id"]) for row in rows],
                intervention=intervention,
                fed=fed_latents(rows, vlm, processor, head, donors),
                ema_beta=ema_beta,
                after=after_latents,
            )
            seconds = (clock(device) - start) / len(part)
            for row, (a,) in zip(rows, answers):
                if save_latents:  # before the line that says it is done
                    save_latents_file(
                        test.out / "latents" / latents_name(row["id"]), a["latents"], head
                    )
                append(
                    f,
                    {
                        "id": row["id"],
                        "key": row_key(test.key, row),
                        "raw": to_text(tokenizer, a["ids"]),
                        "truncated": not a["finished"],
                        "tokens": len(a["ids"]),
                        "latents": len(a["latents"]),
                        "seconds": seconds,
                    },
                )
            bar.update(len(part))

        for part in batches(todo, prepare, failed):
            try:
                answer(part)
            except (Exception, SystemExit):
                for one in (
                    part
                ):  # find out whose failure it is; a batch too large for the memory also ends here
                    try:
                        answer([one])
                    except (Exception, SystemExit) as e:
                        failed(one[0], e)
    bar.close()


def grade(test, predictions):
    """The test set's rows with their answers: raw, extracted, method, correct. A failed question counts as wrong."""
    graded = []
    for row in test.rows:
        if (p := predictions.get(row["id"])) is None:
            continue
        p = {"raw": "", "truncated": False, "tokens": 0, "latents": 0} | p
        answer, method = extract_answer(p["raw"], row.get("options"), row.get("kind", "text"))
        if "error" in p:
            method = "error"
        row = row | p | {"extracted": answer, "method": method}
        graded.append(
            row | {"correct": bool(c) if (c := test.benchmark.check(row)) in (0, 1) else c}
        )
    return graded


def summary(rows):
    """Accuracy with its interval, and what else a reader needs to trust it."""
    n, correct = len(rows), sum(row["correct"] for row in rows)
    share = {"accuracy": correct / n} | (
        {"interval": wilson(correct, n)} if all(r["correct"] in (0, 1) for r in rows) else {}
    )
    return (
        {"n": n}
        | share
        | {
            "n_unparsed": sum(row["extracted"] is None for row in rows),
            "n_truncated": sum(row["truncated"] for row in rows),
            "n_error": sum("error" in row for row in rows),
            "opened_latents": mean(LATENT_SPAN in row["raw"] for row in rows),
            "tokens": mean(row["tokens"] for row in rows),
            "latents": mean(row["latents"] for row in rows),
        }
    )


def summaries(groups):
    return {
        name: summary(g) if isinstance(g, list) else {"accuracy": g}
        for name, g in groups.items()
        if g != []
    }


def print_scores(title, scores):
    width = max(16, *(len(name) + 1 for name in scores)) if scores else 16
    print(
        f"\n{title}\n{'':{width}}{'n':>6}{'accuracy':>10}{'95 % interval':>16}{'unparsed':>10}{'truncated':>10}{'errors':>8}"
        f"{'latent':>8}{'tokens':>8}{'latents':>8}"
    )
    for name, m in scores.items():
        interval = "{:.3f} - {:.3f}".format(*m["interval"]) if "interval" in m else ""
        print(
            f"{name:{width}}{m.get('n', ''):>6}{m['accuracy']:10.3f}{interval:>16}"
            + (
                f"{m['n_unparsed']:10}{m['n_truncated']:10}{m['n_error']:8}{m['opened_latents']:8.2f}{m['tokens']:8.1f}"
                f"{m['latents']:8.1f}"
                if "n" in m
                else ""
            )
        )


def score(test, predictions):
    """Write scored.jsonl and metrics.json and print the table. Raises SystemExit if answers are missing."""
    missing = [row["id"] for row in test.rows if row["id"] not in predictions]
    if missing and (not allow_partial or not predictions):
        raise SystemExit(
            f"{test.out}: {len(missing)} of {len(test.rows)} answers are missing (the first is {missing[0]!r}); "
            "run eval.py again to fill them in, or score what is there with allow_partial=1"
        )
    graded = grade(test, predictions)
    failures = [row for row in graded if "error" in row]
    if len(failures) == len(graded):
        raise SystemExit(
            f"{test.out}: all {len(graded)} questions failed, the first with {failures[0]['error']}"
        )
    scores = {"scores": summaries(test.benchmark.score(graded))}
    if test.name in JUDGED and judge_url:
        judged = judge(test, graded)
        scores["scores_judged"] = summaries(test.benchmark.score(judged))
        scores["judge"] = {
            "url": judge_url,
            "model": judge_model,
            "judged": sum("judgement" in row for row in judged),
        }

    fields = (
        "id",
        "category",
        "answer",
        "extracted",
        "method",
        "correct",
        "truncated",
        "tokens",
        "latents",
        "error",
        "raw",
    )
    write_lines(
        test.out / "scored.jsonl", [{k: row[k] for k in fields if k in row} for row in graded]
    )
    record = {
        "settings": test.settings,
        "key": test.key,
        "missing": len(missing),
        "versions": versions(),
    } | scores
    write_then_rename(
        test.out / "metrics.json", lambda p: p.write_text(json.dumps(record, indent=1))
    )
    s = test.settings
    print_scores(
        f"{model} on {s['data']}, {intervention}; {s['min_pixels']} to {s['max_pixels']} pixels, at most "
        f"{s['max_new_tokens']} tokens, system {system!r}, instruction {instruction!r}"
        + f"; {len(missing)} MISSING"
        * bool(missing),
        scores["scores"],
    )
    if "scores_judged" in scores:
        print_scores(
            f"with {scores['judge']['judged']} answers judged by {judge_model}",
            scores["scores_judged"],
        )
    if test.name == "MMHal-Bench":
        official = [
            {
                k: row[k]
                for k in (
                    "question_type",
                    "question_topic",
                    "image_id",
                    "image_src",
                    "image_content",
                    "question",
                    "gt_answer",
                )
                if k in row
            }
            | {"model_answer": extract_final(row["raw"])}
            for row in graded
        ]
        write_then_rename(
            test.out / "response.json", lambda p: p.write_text(json.dumps(official, indent=1))
        )
        print(
            f"wrote {test.out}/response.json, MMHal-Bench's own response file. Its score is defined by a judge (gpt-4-0314)"
            + (
                "; the one above is another judge's and not comparable"
                if judge_url
                else ": no score here"
            )
        )
    if failures:
        print(
            f"{len(failures)} questions failed and count as wrong; run eval.py again to retry them. "
            f"The first, {failures[0]['id']!r}: {failures[0]['error']}"
        )


def paper_table():
    """Our headline numbers, in percent, beside the paper's; of the benchmarks that <out> holds for this model and setting."""
    ours = {}
    for path in sorted(Path(out).glob("*/metrics.json")):
        record = json.loads(path.read_text())
        if (
            all(
                record["settings"][k] == globals()[k] for k in ("model", "intervention", "ema_beta")
            )
            and not record["missing"]
        ):
            ours |= {
                f"{path.parent.name}/{k}": 100 * v["accuracy"] for k, v in record["scores"].items()
            }
    for name, parts in AVERAGES.items():
        if all(part in ours for part in parts):
            ours[name] = mean(ours[part] for part in parts)
    if any(key in ours for key, _, _ in PAPER):
        print(
            f"\n{'':14}{'ours':>9}  |"
            + "".join(f"{x:>9}" for x in PAPER_SYSTEMS)
            + "   (the paper, Qwen2.5-VL-7B)"
        )
        for key, name, theirs in PAPER:
            mine = f"{ours[key]:9.2f}" if key in ours else f"{'-':>9}"
            print(
                f"{name:14}{mine}  |"
                + "".join(f"{'-' if x is None else f'{x:.2f}':>9}" for x in theirs)
            )


def compare(a, b):
    """Print the paired difference of two finished runs (folders with scored.jsonl, of one test set or of several)."""
    found = sorted(p.relative_to(a) for p in Path(a).glob("**/scored.jsonl"))
    if not found:
        raise SystemExit(
            f"{a}: no scored.jsonl below it; eval.py writes one when all answers are there"
        )
    for name in found:
        one, two = (
            {r["id"]: float(r["correct"]) for r in read_lines(Path(x) / name)} for x in (a, b)
        )
        if one.keys() != two.keys() or not one:
            raise SystemExit(
                f"{Path(a) / name} and {Path(b) / name} hold other questions ({len(one)} and {len(two)}, "
                f"{len(one.keys() & two.keys())} of them shared)"
            )
        n, two_in_order = len(one), [two[id] for id in one]
        differences = [y - x for x, y in zip(one.values(), two_in_order)]
        d, wins, losses = (
            mean(differences),
            sum(x > 0 for x in differences),
            sum(x < 0 for x in differences),
        )
        half = 1.96 * math.sqrt(max(0.0, mean(x * x for x in differences) - d * d) / n)
        print(
            f"{name.parent}: n = {n}, A {mean(one.values()):.3f}, B {mean(two.values()):.3f}, B - A {d:+.3f} "
            f"(95 % interval {d - half:+.3f} to {d + half:+.3f}); B wins {wins}, loses {losses}, "
            f"McNemar p = {mcnemar(two_in_order, one.values()):.3g}"
        )


def main():
    check_choices(globals(), intervention=INTERVENTIONS, dtype=("float32", "bfloat16"))
    names = (GAP_TABLE if benchmarks == "gap" else benchmarks).split(",")
    if unknown := [name for name in names if name and name not in BENCHMARKS]:
        raise SystemExit(f"benchmarks: {unknown[0]!r} is not one of: gap, {', '.join(BENCHMARKS)}")
    tests = [load_test_set(name) for name in names]
    rank, world = rank_and_world()
    if not score_only:
        device = pick_device()
        vlm, tokenizer = load_vlm(model, getattr(torch, dtype), device)
        head = load_head(model, vlm, tokenizer, latent_size)
        if head is None and intervention != "clean":
            raise SystemExit(
                f"{model} has no {HEAD_FILE}: the intervention {intervention!r} needs a model with latents"
            )
        for test in tests:
            answer_all(test, vlm, tokenizer, head, device)
    for test in tests:
        predictions = read_predictions(test)
        # the rank that finishes last sees all answers and scores them; no rank waits for another
        if len(predictions) == len(test.rows) or score_only or world == 1:
            score(test, predictions)
        else:
            print(
                f"rank {rank} is done; {len(test.rows) - len(predictions)} answers to {test.name} are left to other ranks"
            )
    if benchmarks and rank == 0:
        paper_table()


if __name__ == "__main__":
    start(main, compare=compare)
