"""What would a judge say? A local endpoint that first fails, and what is made of its replies."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from conftest import run, send_completion
from huggingface_hub.errors import HTTPError
from official_files import args_of, plant

import judge
from endpoint import hidden, with_retries
from files import read_lines
from resume import Refused, Unanswered
from scores import check_mathvision, check_yesno

ONLINE = {"HF_HUB_OFFLINE": "0"}  # which also keeps the client from a local endpoint


class Endpoint(BaseHTTPRequestHandler):
    """A chat-completions endpoint that first refuses, then is cut off, then answers."""

    asked = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        n = len(self.asked)
        if n <= 2:
            self.send_response((429, 500)[n - 1])
            self.end_headers()
            return
        if n == 3:
            self.connection.close()
            return
        send_completion(self, [self.reply_to(body["messages"][0]["content"])])

    def reply_to(self, prompt):
        if "Rate an answer" in prompt:
            return "It is fine.\nRating: 5"
        return "D" if "the last" in prompt else "Z"

    def log_message(self, *args):
        pass


def test_judge(tmp_path, base, bench_root):
    """Only what the rule cannot decide is judged; both scores stand side by side; no reply is
    asked for twice."""
    root, _ = bench_root
    out = tmp_path / "out"

    def args(**change):
        settings = {"benchmarks": "MMStar,MMHal-Bench", "judge_model": "m", "judge_workers": 1}
        return args_of(base, root, out, **settings | change)

    def metrics(name):
        return json.loads((out / name / "metrics.json").read_text())

    run("eval.py", *args())
    said = ["<answer>A</answer>", "cannot say", "I take the last one, or the first", "<think> A"]
    plant(out, "MMStar", said)  # golds A, B, D, A
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    Endpoint.asked.clear()
    text = run("eval.py", *args(score_only=1, judge_url=url), env=ONLINE)
    mmstar = metrics("MMStar")
    assert mmstar["scores"]["overall"]["accuracy"] == 0.25
    assert mmstar["scores_judged"]["overall"]["accuracy"] == 0.5
    assert mmstar["judge"]["judged"] == 2
    assert len(Endpoint.asked) == 3 + 3  # three failures, two letters, one rating
    assert metrics("MMHal-Bench")["scores_judged"]["rating"]["accuracy"] == 5
    assert "not comparable" in text

    run("eval.py", *args(score_only=1, judge_url=url), env=ONLINE)
    assert len(Endpoint.asked) == 6
    server.shutdown()
    server.server_close()
    (out / "MMStar/judge.jsonl").unlink()
    last = args(score_only=1, judge_url=url, judge_tries=2)
    rules = metrics("MMStar")["scores"]
    (out / "MMStar/metrics.json").unlink()
    assert "without a judgement (" in run("eval.py", *last, ok=False, env=ONLINE)
    assert metrics("MMStar")["scores"] == rules  # which a judge that is away takes from nobody


def test_paid_judgements_are_kept_whatever_becomes_of_others(tmp_path, monkeypatch):
    """The first answer's never comes; another's the judge refuses, which is no judgement."""
    asked = []

    def ask(prompt, endpoint):
        asked.append(prompt)
        if prompt in ("p0", "p3"):
            raise (Refused if prompt == "p3" else Unanswered)("HTTPError")
        return "B"

    monkeypatch.setattr(judge, "ask_judge", ask)
    test = SimpleNamespace(name="MMStar", out=tmp_path)
    prompts = {f"{n}": f"p{n}" for n in range(40)}
    where = judge.Judge("http://localhost:1/v1", "m", "none", 2, 1, 20)
    for _ in range(2):
        with pytest.raises(SystemExit, match="1 answers without a judgement"):
            judge.replies_to(test, prompts, prompts, where)
        kept = {line["id"]: line["reply"] for line in read_lines(tmp_path / "judge.jsonl")}
        assert kept == {f"{n}": "" if n == 3 else "B" for n in range(1, 40)}
    assert len(asked) == 40 + 1


@pytest.mark.parametrize("refused", ["p1 p2", "p2"])
def test_a_judge_that_answers_nothing_is_asked_again(tmp_path, monkeypatch, refused):
    def refuse(prompt, endpoint):
        raise (Refused if prompt in refused else Unanswered)("HTTPError: 422")

    monkeypatch.setattr(judge, "ask_judge", refuse)
    test, prompts = SimpleNamespace(name="MMStar", out=tmp_path), {"1": "p1", "2": "p2"}
    where = judge.Judge("http://localhost:1/v1", "m", "none", 1, 1, 20)
    with pytest.raises(SystemExit, match="2 answers without a judgement .*422"):
        judge.replies_to(test, prompts, prompts, where)
    assert read_lines(tmp_path / "judge.jsonl") == []


@pytest.mark.parametrize(
    "reply, rating",
    [("It is.\nRating: 5", 5), ("**Rating:** 4", 4), ("Rating: **3**", 3), ("rating: 2", 2)]
    + [("Rating: 1 or Rating: 2", 0), ("Rating: 7", 0), ("I cannot say", 0)],
)
def test_a_rating_is_read_as_people_write_it(reply, rating):
    assert judge.rated({}, reply)["rating"] == rating


@pytest.mark.parametrize("reply, right", [("14", True), ("15", False), ("Z", False)])
def test_a_value_that_a_judge_read_is_checked(reply, right):
    """Of MathVision, whose free-form answers are of no one kind."""
    row = {"raw": "Fourteen, I think", "answer": "14", "options": None, "kind": "text"}
    again = judge.read_again(row, reply, judge.JUDGED["MathVision"], check_mathvision)
    assert again["correct"] == right and again["method"] == "judge"


@pytest.mark.parametrize("reply, right", [("No.", True), ("yes", False), ("Z", False)])
def test_a_yes_or_no_that_a_judge_read_is_checked(reply, right):
    row = {"raw": "There is nothing of the kind", "answer": "No", "options": None, "kind": "yesno"}
    again = judge.read_again(row, reply, judge.JUDGED["POPE"], check_yesno)
    assert again["correct"] == right and again["method"] == "judge"


def test_a_key_that_is_echoed_is_not_shown():
    """Neither in what an endpoint says nor in why it says nothing."""
    assert hidden("Bearer sk-12345 is wrong", "sk-12345") == "Bearer *** is wrong"
    assert hidden("none of them", "none") == "none of them"  # what stands for no key
    assert hidden("in a box", "x") == "in a box"  # a dummy for a server of one's own

    class NoSuchKey(HTTPError):
        def __init__(self):
            self.response = SimpleNamespace(status_code=401, headers={})

        def __str__(self):
            return "no such key: sk-12345"

    def call():
        raise NoSuchKey

    with pytest.raises(SystemExit) as e:
        with_retries(call, "http://localhost", 3, key="sk-12345")
    assert "401" in str(e.value) and "sk-12345" not in str(e.value)


def test_a_prompt_that_rows_share_is_paid_for_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(judge, "ask_judge", lambda prompt, *_: asked.append(prompt) or "B")
    test = SimpleNamespace(name="MMStar", out=tmp_path)
    prompts = {f"{n}": f"p{n % 2}" for n in range(10)}
    where = judge.Judge("http://localhost:1/v1", "m", "none", 2, 1, 20)
    assert judge.replies_to(test, prompts, prompts, where) == {"p0": "B", "p1": "B"}
    assert sorted(asked) == ["p0", "p1"]


def test_an_answer_that_was_not_given_is_rated_nothing(tmp_path):
    """MMHal-Bench's mean is over all questions."""
    test = SimpleNamespace(name="MMHal-Bench", out=tmp_path, benchmark=None)
    graded = [
        {"id": "1", "truncated": True, "raw": "<think> It shows a dog and"},
        {"id": "2", "truncated": False, "raw": "", "error": "x"},
        {"id": "3", "truncated": False, "raw": "<think> It shows a dog"},
    ]
    where = judge.Judge("http://localhost:1/v1", "m", "none", 1, 1, 20)
    assert [row["rating"] for row in judge.judge(test, graded, where)] == [0, 0, 0]
