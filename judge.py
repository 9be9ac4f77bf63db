"""What would a judge say of the answers that no rule reads?

A judge is a language model behind an OpenAI-compatible endpoint. It is asked which option or value
someone chose, or whether they said yes or no, where extraction found none, and of MMHal-Bench for
the rating that is its score. It grades beside the rule, never in its place: eval.py prints both.
"""

import re
from typing import NamedTuple

from answers import extract_final
from data import RESERVED
from endpoint import complete, hidden, with_retries
from files import append, key_of, open_append, read_lines
from launch import Progress
from options import find_letter
from resume import Refused
from served import ask_all
from stated import find_kind
from values import plain

# what our judge is asked for, of benchmarks whose own harness, or VLMEvalKit, has a judge
LETTERS = "HRBench4K HRBench8K MMStar WeMath BLINK VStar MMVP CV-Bench-2D CV-Bench-3D".split()
VALUES = "MathVista MathVision MathVision-testmini".split()
JUDGED = dict.fromkeys(LETTERS, "letter") | dict.fromkeys(VALUES, "value")
JUDGED |= {"POPE": "yesno", "MMHal-Bench": "rating"}
JUDGE_PROMPTS = {
    "letter": (
        "Below are a multiple-choice question and what someone answered. Which option did they "
        "choose? Reply with its letter alone, or with Z if they chose none or more than one.\n\n"
        "{question}\n\nTheir answer:\n{said}"
    ),
    "value": (
        "Below are a question and what someone answered. Reply with the final value they gave, "
        "alone and in the form that the question asks for, or with Z if they gave none.\n\n"
        "{question}\n\nTheir answer:\n{said}"
    ),
    "yesno": (
        "Below are a question and what someone answered. Did they say yes, or no? Reply with yes "
        "or no alone, or with Z if they said neither.\n\n{question}\n\nTheir answer:\n{said}"
    ),
    "rating": (
        "Rate an answer to a question about an image that you can not see. The image holds: "
        "{image_content}\nQuestion: {question}\nA correct answer: {answer}\n"
        "The answer to rate: {said}\n\n"
        "Does it say things of the image that are not so, and does it help? 6: true and very "
        "informative; 5: true and informative; 4: true, little information; 3: true, no "
        "information; 2, 1, 0: says what is not so, yet is very informative, a little, not at "
        'all. Explain briefly and end with one line, "Rating: " and the number.'
    ),
}
# as VLMEvalKit has it: no benchmark's options go so far
NO_ANSWER = "Z"
LONGEST_REPLY = 512  # tokens
TIMEOUT = 120  # seconds for a reply


class Judge(NamedTuple):
    """Where a judge is served, and how it is asked."""

    url: str  # http://localhost:8000/v1
    model: str  # "" is the endpoint's own
    key: str  # or endpoint.NO_KEY
    workers: int  # questions at once
    tries: int  # of each
    give_up: int  # so many in a row without a reply: the judge is down


def judge(test, graded, endpoint):
    """The graded rows, those that no rule decided graded again by the judge's reading of them.

    test: has the `name` of a benchmark in JUDGED, the folder `out` and the `benchmark` itself.
    Replies are kept in <out>/judge.jsonl and never asked for twice; a failed answer stays wrong,
    and one that was cut off, unless it is rated. Raises SystemExit when the judge gives no reply.
    """
    kind = JUDGED[test.name]
    # by id, and only of rows that are open: the rule's reading stands where it has one
    prompts, keys = {}, {}
    for row in graded:
        if is_open(row, kind):
            # without the reasoning: the judge is not to solve the question by it
            said = RESERVED.sub("", extract_final(row["raw"]))
            prompt = JUDGE_PROMPTS[kind].format(**row | {"said": said})
            asked = {"judge": endpoint.model, "url": endpoint.url, "prompt": prompt}
            prompts[row["id"]] = prompt
            keys[row["id"]] = key_of(asked)
    replies = replies_to(test, prompts, keys, endpoint)

    judged = []
    for row in graded:
        if row["id"] in keys:
            reply = replies[keys[row["id"]]].strip()
            if kind == "rating":
                row = rated(row, reply)
            else:
                row = read_again(row, reply, kind, test.benchmark.check)
        elif kind == "rating":
            row = row | {"rating": 0}
        judged.append(row)
    return judged


def is_open(row, kind):
    """Is there an answer that no rule could read, or one whose score is a rating?"""
    if "error" in row or not extract_final(row["raw"]):
        return False
    # of what was not said to the end a judge could only guess the end
    return kind == "rating" or row["extracted"] is None and not row["truncated"]


def replies_to(test, prompts, keys, endpoint):
    """{key: reply} of all prompts {id: text}; those that judge.jsonl lacks are asked and added.

    "" where the judge refuses. Raises SystemExit where it gives no reply.
    """
    # paid replies are kept at once, under what was asked
    path = test.out / "judge.jsonl"
    replies = {line["key"]: line["reply"] for line in read_lines(path, key=str, reply=str)}
    # one of the rows that ask the same: the prompt holds no picture
    asking = {keys[id]: id for id in prompts}
    todo = [{"id": id} for key, id in asking.items() if key not in replies]

    def ask(row):
        return ask_judge(prompts[row["id"]], endpoint)

    failed, refused = [], []
    bar = Progress(total=len(todo), desc=f"judge {test.name}", unit="answer")
    with open_append(path) as f, bar:

        def keep(row, reply):
            replies[keys[row["id"]]] = reply
            append(f, {"id": row["id"], "key": keys[row["id"]], "reply": reply})

        for row, reply, e in ask_all(ask, todo, endpoint.workers, endpoint.give_up, endpoint.url):
            bar.update()
            if e is None:
                keep(row, reply)
            elif isinstance(e, Refused):
                refused.append((row, e))
            else:
                failed.append(e)
        if len(failed) + len(refused) < len(todo):  # else the judge may be set up wrongly
            for row, e in refused:
                bar.write(f"{row['id']!r}: the judge refuses, which is no judgement ({e})")
                keep(row, "")
        else:
            failed += [e for _, e in refused]
    if failed:
        raise SystemExit(
            f"{endpoint.url}: {len(failed)} answers without a judgement ({failed[0]}); the "
            "finished ones are kept, run eval.py again"
        )
    return replies


def ask_judge(prompt, endpoint):
    """One reply of the judge. Raises Unanswered when it gives none: no rule takes its place."""
    messages = [{"role": "user", "content": prompt}]
    # greedy: who asks again should read the same
    settings = {"temperature": 0, "max_tokens": LONGEST_REPLY}

    def call():
        reply = complete(endpoint, messages, TIMEOUT, **settings)
        # a judge that refuses may send none; an empty reply chooses nothing
        return reply.choices[0].message.content or ""

    reply = with_retries(call, endpoint.url, endpoint.tries, key=endpoint.key)
    return hidden(reply, endpoint.key)


def rated(row, reply):
    """The row with the rating of a reply; 0 where it gives none or several, as officially."""
    # a judge that repeats its rating gives one; two ratings give none
    ratings = set(re.findall(r"rating:\s*([0-6])\b", plain(reply).lower()))
    rating = int(ratings.pop()) if len(ratings) == 1 else 0
    return row | {"judgement": reply, "rating": rating}


def read_again(row, reply, kind, check):
    """The row graded by what the judge read: the letter of an option, a value, or yes or no."""
    # the judge may say that nothing was chosen: it is not asked to guess
    if reply == NO_ANSWER:
        answer = None
    # of a benchmark of values the choices are letters all the same
    elif kind == "letter" or row["options"]:
        answer, _ = find_letter(reply, row["options"])
    elif row.get("kind", "text") == "text":
        answer = reply
    else:
        answer = find_kind(reply, row["kind"])
    row = row | {"judgement": reply, "extracted": answer, "method": "judge"}
    # no answer is wrong before the check, which of MathVista would take the nearest choice
    return row | {"correct": answer is not None and bool(check(row))}
