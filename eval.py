"""How good is it? Answers test questions with a model folder and scores them as the harnesses do.

Reads a model folder and either a JSONL test set (`data`) or the official files of public benchmarks
under `data_root` (`benchmarks`, names of BENCHMARKS in benchmarks.py; nothing is downloaded).
Writes, for a JSONL set to <out>/ and for a benchmark to <out>/<name>/: predictions.rank*.jsonl
(append-only, one line per answer, resumed after a kill with any number of ranks), and once all
answers are there scored.jsonl (one line per question) and metrics.json. Ranks share nothing while
they answer; scoring is a separate pass over the files (`--score_only=1`).

    python eval.py                                        # the toy's test set
    torchrun --nproc-per-node 8 eval.py --model=out/7b/gap --benchmarks=HRBench4K,MMStar \\
        --out=out/7b/eval --dtype=bfloat16
    python eval.py --url=http://localhost:8000/v1 --served_model=NAME \\
        --model=Qwen2.5-VL-7B-Instruct --benchmarks=MMStar    # text, by vLLM, SGLang or the like
    python eval.py --compare out/eval/gap out/eval/text   # paired difference of two finished runs
"""

import bisect
import time
from itertools import count, zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from answers import extract_answer, extract_final
from benchmarks import (
    BENCHMARKS,
    JSONL,
    PUBLISHED,
    Benchmark,
    benchmarks_named,
    load_benchmark,
    missing_files,
)
from data import Rows, check_prompt_texts, load_examples, question_text
from endpoint import check_url, key_in
from files import (
    append,
    check_fields,
    check_there,
    file_digest,
    file_md5,
    folder_digest,
    is_made,
    key_of,
    open_append,
    read_json,
    read_lines,
    seed_of,
    versions,
    write_json,
    write_lines,
)
from generate import (
    INTERVENTIONS,
    check_intervention,
    latents_name,
    load_latents_file,
    save_latents_file,
    see,
    span_unit,
    stream,
    to_text,
)
from images import open_image, usable_rows
from imagine import bank_of, imagine
from judge import JUDGED, Judge, judge
from launch import (
    Progress,
    check_choices,
    claim,
    clock,
    folder_of,
    hold,
    hold_alone,
    hold_together,
    is_machines,
    pick_device,
    rank_and_world,
    show_files,
    start,
)
from model import (
    HEAD_FILE,
    encode,
    load_head,
    load_processor,
    load_vlm,
    real_features,
    say_other_limits,
)
from pages import card, figure, write_page
from scores import mean
from served import Served, ask_all, draw_answers, served_messages
from standings import beside, compare, in_percent, print_scores, summaries
from tables import Cell, images_of

# --------------------------------------------------------------------------------------------------
model = "out/gap"  # a folder from train.py, or any Qwen2.5-VL folder
data = "out/toy/test.jsonl"  # a JSONL test set, used when `benchmarks` is empty
benchmarks = ""  # e.g. "HRBench4K,MMStar"; "gap", "valr", "amvl": all of a paper's table
data_root = "data/benchmarks"  # where the official files lie
out = ""  # "": eval/<the model's name>, beside the model where that lies below out/
system = ""  # system prompt; "" is the chat template's own, as the harnesses leave it
instruction = ""  # put after every question, e.g. "\nPut your final answer in <answer> </answer>."
min_pixels = 0  # an image; 0: 56*56 for a JSONL set (the toy's), else what BENCHMARKS names
max_pixels = 0  # an image; 0: 1280*28*28 for a JSONL set, else what BENCHMARKS names
max_new_tokens = 0  # 0: 128 for a JSONL set, 2048 for a benchmark
batch = 100  # questions at once, at most
prompt_tokens = 40_000  # of their prompts, padded, at most: two 4K images
temperature = 0.0  # 0 is greedy
top_p = 1.0
seed = 12345
intervention = "clean"  # clean zero markers noise mean shuffle oracle oracle_pca
donor = ""  # for shuffle: the latents/ folder of a clean run with save_latents=1
save_latents = False  # also write <out>/latents/*.safetensors, a file per answer
after_latents = ""  # forced after every span, e.g. " </think> <answer>": no parser text is written
latent_size = 10  # most latents per span with Monet's tokens and no head file [Monet: 10 to 16]
ema_beta = 0.0  # > 0: EMA norm calibration of output-as-input latents [paper; 0.9 ours]
dtype = "float32"  # 7B: bfloat16
limit = 0  # > 0: only the first rows
skip_unusable = False  # of a JSONL set: leave out rows with a broken image, do not refuse them
score_only = False
sheet = ""  # page.html: answers to look at, with what the model imagined (needs save_latents=1)
n_sheet = 40  # answers on it
sheet_order = "wrong"  # wrong: those first; category: by category
bank = ""  # what imagined pictures are made of; "": where the model folder says
allow_partial = False  # score what is there although answers are missing
url = ""  # http://localhost:8000/v1, OpenAI-compatible: a server of `model` that answers
served_model = ""  # its name there
served_key = "SERVED_KEY"  # the environment variable with its key, if it wants one
workers = 64  # questions that it is asked at once
tries = 7  # of a request
give_up = 20  # questions in a row without an answer, or judgement: the server is down
judge_url = ""  # http://localhost:8000/v1, OpenAI-compatible: also judge what no rule can decide
judge_model = ""
judge_key = "JUDGE_API_KEY"  # the environment variable with the endpoint's key, if it wants one
judge_workers = 8  # questions to the judge at once
judge_tries = 7  # of each question
# --------------------------------------------------------------------------------------------------

# what changes an answer, beside the limits, the weights and the test set itself
# fmt: off
ANSWER_SETTINGS = (
    "model", "system", "instruction", "temperature", "top_p", "seed", "intervention", "ema_beta",
    "dtype", "donor", "save_latents", "after_latents", "latent_size",
)
LATENT_SETTINGS = {  # and their values where nothing is done with latents
    "intervention": "clean", "donor": "", "save_latents": False, "after_latents": "",
    "ema_beta": 0.0,
}
SCORED_COLUMNS = (  # of scored.jsonl
    "id", "category", "answer", "extracted", "method", "correct", "truncated", "tokens",
    "latents", "error", "raw", "key",
)
MMHAL_COLUMNS = (  # of MMHal-Bench's own response file
    "question_type", "question_topic", "image_id", "image_src", "image_content", "question",
    "gt_answer",
)
# fmt: on

ANSWER_FIELDS = {"raw": str, "truncated": bool, "tokens": int, "latents": int}

# --------------------------------------------------------------------------------------------------
# test sets, and the answers that are there


class TestSet(NamedTuple):
    name: str
    rows: Rows | list
    out: Path
    benchmark: Benchmark
    settings: dict  # for metrics.json: what changes an answer, and what a reader must know
    key: str  # of all that changes an answer but the question, by content


def load_test_set(name):
    """The questions of a benchmark, or of the JSONL file `data` if the name is empty."""
    if name:
        benchmark, folder = BENCHMARKS[name], Path(out) / name
        rows, md5 = load_benchmark(name, data_root)
    else:
        benchmark, folder = JSONL, Path(out)
        fields = ["images"]
        if sheet or intervention.startswith("oracle"):  # they are shown, or fed
            fields.append("aux_images")
        rows = usable_rows(load_examples(data, training=False), skip_unusable, fields)
        md5 = file_md5(data)
    # all that a reader of the score must know
    settings = settings_for(benchmark) | {"data": name or data, "md5": md5}
    low, high = settings["min_pixels"], settings["max_pixels"]
    if low > high:  # of which one may be the benchmark's own
        raise SystemExit(f"{name or data}: min_pixels={low} is above max_pixels={high}; give both")
    # after the whole file was read: a short run finds the same faults in it as a full one
    return TestSet(
        name=name or Path(data).stem,
        rows=rows[:limit] if limit else rows,
        out=folder,
        benchmark=benchmark,
        settings=settings,
        key=run_key(name, settings),
    )


def run_key(name, settings):
    """The key of all that changes an answer but the question: by content, never by a path."""
    # of a data file only the question itself counts, in row_key; what only keeps more of an answer
    # changes none
    others = ("model", "donor", "data", "md5", "save_latents")
    made_by = {k: v for k, v in settings.items() if k not in others}
    made_by["weights"] = folder_digest(model)
    if donor:
        made_by["donor"] = folder_digest(donor)
    if name:
        made_by["md5"] = settings["md5"]  # its pictures lie in the file
    return key_of(made_by)


def settings_for(benchmark):
    """{setting: value} of what changes an answer to a benchmark's questions in this run."""
    settings = {setting: globals()[setting] for setting in ANSWER_SETTINGS}
    if url:  # whose kernels are others, and whose latents are text
        settings["served_model"] = served_model
    return settings | {
        "min_pixels": min_pixels or benchmark.pixels[0],
        "max_pixels": max_pixels or benchmark.pixels[1],
        "max_new_tokens": max_new_tokens or benchmark.max_new_tokens,
    }


def row_key(key, row):
    """The key of one answer: the run's settings, the question as it is put, and its pictures."""
    # a Cell counts by its place in the table, whose MD5 is in `key`; a file by what it holds
    pictures = [x[1:] if isinstance(x, Cell) else file_digest(x) for x in row["images"]]
    asked = [key, row["id"], question_text(row), pictures]
    if row.get("system"):
        asked.append(row["system"])
    if intervention.startswith("oracle"):  # which feeds what these show
        asked.append([file_digest(path) for path in row["aux_images"]])
    return key_of(asked)


def keys_of(test):
    """{id: key} of the answers to a test set, as its pictures are now."""
    return {row["id"]: row_key(test.key, row) for row in test.rows}


def read_predictions(test, keys=None):
    """The predictions of these settings by id, from the files of all ranks.

    An answer stands; an error stands only where there is no answer. keys: those of `keys_of`, if
    they are known.
    """
    # an answer to another wording, picture or setting is not this question's
    keys = keys or keys_of(test)
    answers, errors = {}, {}
    for path in sorted(test.out.glob("predictions.rank*.jsonl")):
        for line in read_lines(path, id=str, key=str):
            # a line of an error has a message in place of an answer
            if "error" not in line:
                check_fields(line, ANSWER_FIELDS, path)
            if keys.get(line["id"]) == line["key"]:
                kept = errors if "error" in line else answers
                kept[line["id"]] = line
    return errors | answers


# --------------------------------------------------------------------------------------------------
# answering


def failure(e):
    """What the line says of a question that failed. Raises what is no fault of the question."""
    if is_machines(e):
        raise e
    # cut, since some libraries quote all that they were given
    return {"error": f"{type(e).__name__}: {e}"[:1000]}


def donor_files():
    """The latents files of `donor`, in the order of their names."""
    return sorted(Path(donor).glob("*.safetensors")) if donor else []


def check_feed(test):
    """Raise SystemExit if what the intervention feeds in place of a row's latents is not there."""
    donors = donor_files()
    # with one file a question might be fed its own latents, and nothing would be shuffled
    if intervention == "shuffle" and len(donors) < 2:
        raise SystemExit(
            f"shuffle feeds other examples' latents: donor={donor!r} must be the latents/ folder "
            f"of a clean run with save_latents=1; it holds {len(donors)} files"
        )
    if intervention.startswith("oracle"):
        # an oracle feeds the real features: every question needs its picture
        bare = [row["id"] for row in test.rows if not row.get("aux_images")]
        if bare:
            raise SystemExit(
                f"{test.settings['data']}: example {bare[0]!r} has no aux_images, "
                f"which {intervention} feeds"
            )


class Waiting:
    """Questions (row, encoded prompt) that wait for room."""

    def __init__(self, questions):
        self.questions = iter(questions)
        self.next = []  # the one that did not fit

    def fitting(self, n, held):
        """Up to n of them that fit into prompt_tokens beside the `held` ones in use; and the
        length of the longest, to which each is padded."""
        # padding costs as much as tokens: the longest prompt counts for all
        longest, part = 0, []
        while len(part) < n:
            question = self.next.pop() if self.next else next(self.questions, None)
            if question is None:
                break
            length = max(longest, len(question[1]["ids"]))
            # a prompt that is longer than all of the limit is still answered, alone
            if (held or part) and held + length * (len(part) + 1) > prompt_tokens:
                self.next.append(question)
                break
            longest = length
            part.append(question)
        return part, longest


class Answerer:
    """The model here: turns questions into prompts, and prompts into answers."""

    def __init__(self, test, vlm, tokenizer, processor, head, donors):
        self.test = test
        self.vlm = vlm
        self.tokenizer = tokenizer
        self.processor = processor
        self.head = head
        self.donors = donors  # latents files, in the order of their names
        self.real = None  # the features that an oracle feeds
        if intervention.startswith("oracle"):
            self.real = real_features(model, vlm)

    def answers(self, rows, keys, has_answered):
        """Yield (row, what its line of the predictions says); one that failed has an error.

        keys: {id: key} of the answers. has_answered: read by ServedAnswerer alone.
        """
        self.keys, failed = keys, []
        questions = Waiting(self.prepared(rows, failed))
        while True:
            under_way = {}  # {number: (row, prompt, padded tokens, when it began)}
            try:
                for answered in self.answer_together(questions, under_way):
                    yield answered
                    yield from failed
                    failed.clear()
                yield from failed
                return
            except (Exception, SystemExit) as e:
                if not under_way:
                    raise
                n = len(under_way)
                print(f"{failure(e)['error']}: the {n} questions under way are asked one by one")
            # one by one, so that only the faulty one fails. Not in the `except`: its traceback
            # holds the tensors of a batch that was too large for the memory
            for row, prompt, *_ in under_way.values():
                try:
                    yield from list(self.answer_together(Waiting([(row, prompt)]), {}))
                except (Exception, SystemExit) as e:
                    yield row, failure(e)

    def prepared(self, rows, failed):
        """Yield (row, encoded prompt); what cannot be encoded joins the failed."""
        for row in rows:
            try:
                prompt = encode(self.vlm, self.tokenizer, self.processor, as_asked(row))
            except (Exception, SystemExit) as e:  # one question must not stop the others
                failed.append((row, failure(e)))
                continue
            yield row, prompt

    def answer_together(self, questions, under_way):
        """Answer questions, as many at once as fit. Yields (row, its line) as they end.

        `under_way` is filled as questions begin and emptied as they end.
        """
        numbers, device = count(), self.vlm.device

        def more(n):
            held = sum(tokens for _, _, tokens, _ in under_way.values())
            part, padded = questions.fitting(n, held)
            if not part:
                return []
            for (row, prompt), number in zip(part, numbers):
                under_way[number] = row, prompt, padded, clock(device)
            rows = [row for row, _ in part]
            seen = see(self.vlm, self.processor, [prompt for _, prompt in part])
            # draws are of the question, not of those beside it or the rank that it falls to
            return [
                prompt | {"seeds": [seed_of(seed, row["id"])], "fed": fed}
                for row, prompt, fed in zip(rows, seen, self.fed_latents(rows))
            ]

        answered = stream(
            self.vlm,
            self.head,
            self.tokenizer,
            more,
            batch,
            max_new_tokens=self.test.settings["max_new_tokens"],
            temperature=temperature,
            top_p=top_p,
            intervention=intervention,
            ema_beta=ema_beta,
            after=after_latents,
        )
        for number, (answer,) in answered:  # one sample per question
            row, *_, began = under_way[number]
            seconds = clock(device) - began  # among others; its own where batch=1
            if save_latents:  # before the line that says it is done
                path = self.test.out / "latents" / latents_name(row["id"])
                save_latents_file(path, answer["latents"], self.head, self.keys[row["id"]])
            line = {
                "raw": to_text(self.tokenizer, answer["ids"]),
                "truncated": not answer["finished"],
                "tokens": len(answer["ids"]),
                "latents": len(answer["latents"]),
                "seconds": seconds,
            }
            del under_way[number]
            yield row, line

    def is_whole(self, id, line):
        """Are the latents of an answer where they are to be kept?"""
        if not save_latents or line["latents"] < span_unit(self.head):
            return True
        return is_made(self.test.out / "latents" / latents_name(id), line["key"])

    def fed_latents(self, rows):
        """What shuffle and oracle feed, (m, K, d) a row; None each for the other interventions.

        Another example's latents, or the features of the m real auxiliary images.
        """
        if intervention == "shuffle":
            return [self.donated(row) for row in rows]
        if not intervention.startswith("oracle"):
            return [None] * len(rows)
        images = [open_image(path) for row in rows for path in row["aux_images"]]
        # (M, K, d): the M images of all rows, as grids of K features
        return list(self.real(images).split([len(row["aux_images"]) for row in rows]))

    def donated(self, row):
        """The latents of another example: of the next file by name. Names are hashes of ids."""
        # fixed by the ids: a resumed run feeds the same
        own = Path(donor) / latents_name(row["id"])
        after = bisect.bisect_right(self.donors, own)
        return load_latents_file(self.donors[after % len(self.donors)], self.head)


class ServedAnswerer:
    """A server of the model, which is asked `workers` questions at once."""

    def __init__(self, test, processor):
        self.processor = processor
        key, most = key_in(served_key), test.settings["max_new_tokens"]
        self.server = Served(url, served_model, key, tries, most, temperature, top_p)

    def answers(self, rows, keys, has_answered):
        """As Answerer's, in the order in which the server answers; has it ever answered?"""
        asked = ask_all(self.answer, rows, workers, give_up, self.server.url, has_answered)
        for row, line, e in asked:
            yield row, line or {"error": str(e)}

    def is_whole(self, id, line):
        return True  # without latents

    def answer(self, row):
        """What a question's line of the predictions says."""
        began = time.perf_counter()
        try:
            messages = served_messages(as_asked(row), self.processor)
        except (Exception, SystemExit) as e:  # one broken picture must not stop the others
            return failure(e)
        (reply,) = draw_answers(self.server, messages, 1, seed_of(seed, row["id"]))
        return {
            "raw": reply.text,
            "truncated": not reply.finished,
            "tokens": reply.tokens,
            "latents": 0,
            "seconds": time.perf_counter() - began,  # of the request, among others
        }


def as_asked(row):
    """A row as it is put to the model, its images read now."""
    asked = {"instruction": instruction, "images": images_of(row)}
    return row | asked | {"system": system or row.get("system", "")}


def answer_all(test, answerer):
    """Answer this rank's share of the rows that have no answer yet, a line each to its file.

    What fails is recorded, and tried again by the next run.
    """
    rank, world = rank_and_world()
    keys = keys_of(test)  # before its pictures are opened: they may be replaced
    # a failed question is tried again, and one whose latents are gone or another run's
    found = read_predictions(test, keys)
    failed = {id for id, line in found.items() if "error" in line}
    done = {id for id in found.keys() - failed if answerer.is_whole(id, found[id])}
    # by position in the file, not among the missing: ranks that start late still split alike
    todo = [row for row in test.rows[rank::world] if row["id"] not in done]
    todo.sort(key=lambda row: row["id"] in failed)  # last: they may fail again
    bar = Progress(total=len(todo), unit="question", desc=test.name, disable=rank > 0)
    with open_append(test.out / f"predictions.rank{rank}.jsonl") as file, bar:
        for row, line in answerer.answers(todo, keys, bool(found.keys() - failed)):
            append(file, {"id": row["id"], "key": keys[row["id"]]} | line)
            bar.update()


# --------------------------------------------------------------------------------------------------
# scoring


def grade(test, predictions):
    """The test set's rows with their answers: raw, extracted, method, correct.

    A failed question counts as wrong; one without a prediction is left out.
    """
    empty = {"raw": "", "truncated": False, "tokens": 0, "latents": 0}  # of a failure
    graded = []
    for row in test.rows:
        if row["id"] not in predictions:
            continue
        line = empty | predictions[row["id"]]
        # a column of this name in a file of one's own is no kind of answer
        kind = row.get("kind", "text") if test.benchmark is not JSONL else "text"
        options = row.get("options")
        # one reading for every model and benchmark
        answer, method = extract_answer(line["raw"], options, kind, not line["truncated"])
        if "error" in line:
            method = "error"
        row = row | line | {"extracted": answer, "method": method}
        correct = test.benchmark.check(row)
        if correct in (0, 1):  # VSI-Bench's numbers may lie between
            correct = bool(correct)
        graded.append(row | {"correct": correct})
    return graded


def score(test, predictions):
    """Write scored.jsonl and metrics.json and print the table. Returns the graded rows.

    Raises SystemExit if answers are missing.
    """
    missing = [row["id"] for row in test.rows if row["id"] not in predictions]
    if missing and (not allow_partial or not predictions):
        raise SystemExit(
            f"{test.out}: {len(missing)} of {len(test.rows)} answers are missing (the first is "
            f"{missing[0]!r}); run eval.py again to fill them in, or score what is there with "
            "allow_partial=1"
        )
    # from the files alone: --score_only=1 comes here directly
    graded = grade(test, predictions)
    failures = [row for row in graded if "error" in row]
    # all of them failed: that is a fault of the set-up, not a model that scores zero
    if len(failures) == len(graded):
        raise SystemExit(
            f"{test.out}: all {len(graded)} questions failed, the first with {failures[0]['error']}"
        )
    scores = {"scores": summaries(test.benchmark.score(graded))}
    write_scores(test, graded, scores, len(missing))
    if judge_url and is_judged(test):
        scores |= judged_scores(test, graded)
        write_scores(test, graded, scores, len(missing))

    print_scores(title_of(test, len(missing)), scores["scores"])
    if "scores_judged" in scores:
        title = f"with {scores['judge']['judged']} answers judged by {judge_model}"
        print_scores(title, scores["scores_judged"])
    if test.benchmark is BENCHMARKS["MMHal-Bench"]:
        write_mmhal_responses(test, graded)
    print(f"wrote {test.out / 'scored.jsonl'} and metrics.json")
    if all(row["truncated"] for row in graded):
        most = test.settings["max_new_tokens"]
        print(f"every answer was cut off: raise max_new_tokens={most}, or look at `raw` for why")
    if failures:
        print(
            f"{len(failures)} questions failed and count as wrong; run eval.py again to retry "
            f"them. The first, {failures[0]['id']!r}: {failures[0]['error']}"
        )
    return graded


def is_judged(test):
    """Has a benchmark's own harness a judge? A file of one's own may have its name."""
    return test.benchmark is not JSONL and test.name in JUDGED


def judged_scores(test, graded):
    """The scores with a judge's reading of what no rule could read."""
    # beside the rule's scores, not in their place: another judge gives other numbers
    key = key_in(judge_key)
    asked = Judge(judge_url, judge_model, key, judge_workers, judge_tries, give_up)
    judged = judge(test, graded, asked)
    return {
        "scores_judged": summaries(test.benchmark.score(judged)),
        "judge": {
            "url": judge_url,
            "model": judge_model,
            "judged": sum("judgement" in row for row in judged),
        },
    }


def columns_of(row, names):
    """A row's columns of these names, as far as it has them."""
    return {name: row[name] for name in names if name in row}


def write_scores(test, graded, scores, n_missing):
    path = test.out / "metrics.json"
    record = {
        "settings": test.settings,
        "key": test.key,
        "weights": folder_digest(model),
        "questions": len(test.rows),
        "missing": n_missing,
        "limit": limit,
        "versions": versions(),
    }
    if path.exists():
        before = read_json(path)
        if any(before.get(name) != record[name] for name in ("key", "limit")):
            print(f"{path}: in place of the scores of other settings, whose answers stay")
        path.unlink()  # a kill leaves no scores beside the answers of others
    write_lines(test.out / "scored.jsonl", [columns_of(row, SCORED_COLUMNS) for row in graded])
    write_json(path, record | scores, indent=1)


def write_mmhal_responses(test, graded):
    """MMHal-Bench's own response file, for the judge that defines its score."""
    responses = []
    for row in graded:
        # the final text alone: the judge is not to rate thoughts and parser texts
        said = {"model_answer": extract_final(row["raw"])}
        responses.append(columns_of(row, MMHAL_COLUMNS) | said)
    path = test.out / "response.json"
    write_json(path, responses, indent=1)
    if judge_url:
        note = "; the one above is another judge's and not comparable"
    else:
        note = ": no score here"
    print(
        f"wrote {path}, MMHal-Bench's own response file. Its score is defined by a judge "
        f"(gpt-4-0314){note}"
    )


# --------------------------------------------------------------------------------------------------
# tables


def title_of(test, n_missing):
    """What was answered, and all that a number depends on."""
    s = test.settings
    title = (
        f"{model} on {s['data']}, {intervention}; {s['min_pixels']} to {s['max_pixels']} pixels, "
        f"at most {s['max_new_tokens']} tokens, system {system!r}, instruction {instruction!r}"
    )
    if n_missing:
        title += f"; {n_missing} MISSING"
    return title


def headlines():
    """{metric: percent} of the benchmarks that <out> holds for this model and setting."""
    found, digest = {}, folder_digest(model)
    for name, benchmark in BENCHMARKS.items():
        path = Path(out) / name / "metrics.json"
        if not path.exists():
            continue
        record = read_json(path, settings=dict, missing=int, scores=dict)
        # the folder may hold runs of other models, or made in other ways
        there, here = record["settings"], settings_for(benchmark)
        same_way = all(there.get(name) == here[name] for name in here if name != "model")
        same_way = same_way and ("served_model" in there) == bool(url)
        # a score of some of the answers is no headline
        whole = not record["missing"] and not record.get("limit")
        if record.get("weights") == digest and same_way and whole:
            found |= {f"{name}/{metric}": m for metric, m in record["scores"].items()}
            n = record.get("questions", benchmark.n)
            if benchmark.n not in (0, n):
                print(f"{name}: of {n} questions, where the benchmark has {benchmark.n}")
    return in_percent(found)


def published_tables():
    """Print our headline numbers beside each paper's that has one of them."""
    ours = headlines()
    for table in PUBLISHED.values():
        if any(metric in ours for metric, _, _ in table.rows):
            beside(ours, table)


# --------------------------------------------------------------------------------------------------
# a page to look at


class Imaginer:
    """Shows the latents that a run kept as pictures, beside the real ones."""

    def __init__(self, test, vlm, head, bank):
        self.folder = test.out / "latents"
        self.head = head
        self.bank = bank  # of imagine.py; None: no picture goes with these latents
        self.features = real_features(model, vlm) if bank else None

    def figures(self, row):
        """An answer's spans as HTML: what each imagined, beside the real auxiliary images."""
        real = [open_image(path) for path in row.get("aux_images", [])]
        figures = []
        for i, (latents, picture) in enumerate(zip_longest(self.spans(row), real), 1):
            if latents is not None:
                drawn, cosine = imagine(latents, self.bank)
                caption = f"imagined {i}: cosine {mean(cosine.tolist()):.2f} with its patches"
                if picture is not None:
                    (v,) = self.features([picture])
                    match = F.cosine_similarity(latents, v, dim=-1)
                    caption += f", {float(match.mean()):.2f} with the real features"
                figures.append(figure(drawn, caption))
            if picture is not None:
                figures.append(figure(picture, f"real {i}"))
        return "".join(figures)

    def spans(self, row):
        """The kept latents of an answer, (m, K, d); none where it opened no whole span."""
        path = self.folder / latents_name(row["id"])
        if self.bank is None or not is_made(path, row.get("key")):
            return []
        return load_latents_file(path, self.head)


def answer_sheet(test, graded, imaginer):
    """Write a page of n_sheet answers: the images, the question, what was imagined and said."""
    order = {"wrong": lambda row: row["correct"], "category": lambda row: str(row.get("category"))}
    shown = sorted(graded, key=order[sheet_order])[:n_sheet]
    path = Path(sheet)
    if benchmarks:  # a page each
        path = path.with_stem(f"{path.stem}-{test.name}")
    cards = [card_of(row, imaginer) for row in Progress(shown, desc="sheet", unit="answer")]
    right = sum(row["correct"] for row in graded)
    title = f"{model} on {test.name}: {right:g} of {len(graded)} right, {len(shown)} shown"
    write_page(path, title, cards)
    print(f"wrote {path}: open it in a browser")


def card_of(row, imaginer):
    """An answer as HTML."""
    images = []
    if "error" not in row:  # which may have been one of its pictures
        images = [figure(open_image(x), f"image {i}") for i, x in enumerate(images_of(row), 1)]
    verdict = "right" if row["correct"] == 1 else "wrong"
    read = f"read as {row['extracted']!r} ({row['method']}), gold answer {row['answer']!r}"
    title = f"{row['id']}: {verdict}"
    figures = [*images, imaginer.figures(row)]
    return card(title, row.get("category"), figures, question_text(row), row["raw"], read)


# --------------------------------------------------------------------------------------------------


def check_served():
    """Raise SystemExit for a setting that a server, which writes text only, cannot follow."""
    check_url(url)
    for name, plain in LATENT_SETTINGS.items():
        if globals()[name] != plain:
            raise SystemExit(f"{name}={globals()[name]!r}: a server writes no latents; drop `url`")
    if (Path(model) / HEAD_FILE).is_file():
        raise SystemExit(f"{model} has latents, which no server writes; drop `url`")


def bank_to_show():
    """The bank of imagined pictures that the page needs (imagine.py); None where it needs none."""
    if url or not sheet or not (Path(model) / HEAD_FILE).is_file():
        return None
    if not save_latents:
        raise SystemExit("--sheet draws the latents that a run keeps: give --save_latents=1")
    return bank_of(model, bank)


def claim_rank():
    """Keep other launches out of <out>, and of this rank's files: rank 0 may end before others."""
    claim(out)
    rank, _ = rank_and_world()
    if not hold(Path(out) / f".rank{rank}.lock"):
        raise SystemExit(f"{out}: rank {rank} of another launch is still answering here; wait")


def names_asked():
    """The names of `benchmarks`, or "" for the JSONL file. Raises SystemExit if one has no file."""
    names = benchmarks_named(benchmarks) if benchmarks else [""]
    missing = missing_files(filter(None, names), data_root)
    if missing:
        raise SystemExit(missing)
    return names


def load_test_sets(names):
    """All of them first: a fault is told now, and not after hours of the first benchmark."""
    tests = [load_test_set(name) for name in names]
    if judge_url and not any(map(is_judged, tests)):
        raise SystemExit(f"judge_url: of these none has a judge; {', '.join(JUDGED)} have one")
    if not score_only:
        for test in tests:
            check_feed(test)
    return tests


def answer_tests(tests, vlm, tokenizer, head):
    """Answer this rank's share of all test sets."""
    if not url:
        if head is None and intervention != "clean":
            raise SystemExit(
                f"{model} has no {HEAD_FILE}: the intervention {intervention!r} needs a model "
                "with latents"
            )
        check_intervention(intervention, head)
    for test in tests:
        # one per test set: their pixel limits differ, and change HRBench and V* most
        limits = test.settings["min_pixels"], test.settings["max_pixels"]
        say_other_limits(model, *limits)
        processor = load_processor(model, *limits)
        if url:
            answerer = ServedAnswerer(test, processor)
        else:
            answerer = Answerer(test, vlm, tokenizer, processor, head, donor_files())
        answer_all(test, answerer)


def score_tests(tests, vlm, head, bank):
    """Score the test sets that are answered, and write the page and the tables."""
    rank, world = rank_and_world()
    scored = False
    for test in tests:
        predictions = read_predictions(test)
        left = len(test.rows) - len(predictions)
        if left and not score_only and world > 1:  # of a rank that has not begun
            print(f"rank {rank} is done; {left} answers to {test.name} are left to other ranks")
            continue
        graded = score(test, predictions)
        if sheet:
            answer_sheet(test, graded, Imaginer(test, vlm, head, bank))
        scored = True
    if benchmarks and scored:
        published_tables()


def main():
    global out
    out = out or folder_of("eval", model)
    check_choices(
        globals(),
        intervention=INTERVENTIONS,
        dtype=("float32", "bfloat16"),
        sheet_order=("wrong", "category"),
    )
    check_prompt_texts(system=system, instruction=instruction, after_latents=after_latents)
    show_files(reads=[model, data_root if benchmarks else data, donor, bank], writes=[out, sheet])
    check_there(Path(model) / "config.json")
    if url:
        check_served()
    if judge_url:
        check_url(judge_url)
    its_bank, names = bank_to_show(), names_asked()
    claim_rank()
    tests = load_test_sets(names)

    answering = hold_together(Path(out) / ".answering.lock")
    vlm = tokenizer = head = None  # not needed to score, nor for a page without imagined pictures
    if its_bank or not (score_only or url):
        vlm, tokenizer = load_vlm(model, getattr(torch, dtype), pick_device())
        head = load_head(model, vlm, tokenizer, latent_size)
    if not score_only:
        answer_tests(tests, vlm, tokenizer, head)

    # the rank that finishes last sees all answers and scores them; no rank waits for another
    if hold_alone(answering):
        score_tests(tests, vlm, head, its_bank)
    else:
        print(f"rank {rank_and_world()[0]} is done; the last one scores")


if __name__ == "__main__":
    start(main, compare=compare)
