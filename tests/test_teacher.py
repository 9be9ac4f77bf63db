"""A teacher and an image model that misbehave in every way, and what is sent, kept and paid for."""

import base64
import io
import json
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from conftest import (
    RESPONSE,
    encoded,
    example,
    has_lines,
    kill_when,
    noise,
    pixels,
    run,
    write_data,
)
from PIL import Image

import build_data as b
import teacher
from data import load_examples
from endpoint import key_in
from files import read_lines, write_lines


class Endpoint:
    """A local server of /v1/chat/completions and /v1/images/edits that misbehaves as `plan` says.

    plan maps (path's last word, question) to a list of faults, one a request; then it answers well.
    """

    def __init__(self, plan=(), delay=0.0):
        self.plan = {key: list(faults) for key, faults in dict(plan).items()}
        self.delay = delay
        self.seen, self.lock = [], threading.Lock()
        self.running = self.most = 0  # requests at a time
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                endpoint.answer(self, self.rfile.read(int(self.headers["content-length"])))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request, body):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            kind = request.path.removeprefix("/v1/")
            if kind == "chat/completions":
                body = json.loads(body)
                parts = body["messages"][0]["content"]
                prompt = next(p["text"] for p in parts if p["type"] == "text")
                images = [
                    base64.b64decode(p["image_url"]["url"].split(",")[1])
                    for p in parts
                    if p["type"] == "image_url"
                ]
            else:
                assert kind == "images/edits"
                assert "multipart/form-data" in request.headers["content-type"]
                prompt = body.decode("latin-1")
                images = [body[body.index(b"\x89PNG") :].split(b"\r\n--")[0]]
            question = prompt.split("Question: ")[1].split("\n")[0].strip("\r")
            key = kind.split("/")[0], question
            seen = {"key": key, "body": body, "prompt": prompt, "images": images}
            with self.lock:
                self.seen.append(seen | {"headers": dict(request.headers)})
                fault = self.plan[key].pop(0) if self.plan.get(key) else ""
            time.sleep(self.delay)
            self.send(request, key[0], question, fault)
        finally:
            with self.lock:
                self.running -= 1

    def chat_reply(self, question, fault):
        text = RESPONSE.replace("Compare", f"{question} Compare")
        texts = {
            "no tags": "It is red.",
            "no text": None,
            "swapped": text.replace("<think>", "</think>", 1),
        }
        choice = {
            "index": 0,
            "finish_reason": "length" if fault == "cut off" else "stop",
            "message": {"role": "assistant", "content": texts.get(fault, text)},
        }
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }

    def image_reply(self, question, fault):
        image = b"not an image" if fault == "no image" else encoded(noise(len(question)))
        return {"created": 1, "data": [{"b64_json": base64.b64encode(image).decode()}]}

    def send(self, request, kind, question, fault):
        status, headers = 200, {"content-type": "application/json"}
        reply = self.chat_reply if kind == "chat" else self.image_reply
        content = json.dumps(reply(question, fault)).encode()
        if fault in ("429", "500", "503", "400", "401", "402", "403"):
            status, content = int(fault), b'{"error": {"message": "no"}}'
            headers["retry-after"] = "0"
        content = {
            "no json": b"<html>gateway</html>",
            "other json": b'[{"a": 1}]',
            "no choices": b'{"choices": []}',
            "link": b'{"data": [{"url": "https://a.b/c.png"}]}',
        }.get(fault, content)
        if fault == "time-out":
            with self.lock:  # the client is off after a second
                self.running -= 1
            time.sleep(1.5)
            with self.lock:
                self.running += 1
            return
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("content-length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if fault == "cut connection" else content)
        request.close_connection = True

    def count(self, kind):
        return [s["key"][1] for s in self.seen if s["key"][0] == kind]


def questions(tmp_path, names, aux=False):
    """A data file of questions, with their auxiliary images or without."""
    change = {"aux_images": [], "response": "<think> </think> <answer> red </answer>"}
    if aux:
        change = {}
    rows = [example(n, question=name, **change) for n, name in enumerate(names)]
    return write_data(tmp_path, rows)


def endpoints(server):
    """The settings that ask a server, quickly."""
    return {
        "teacher_url": server.url,
        "image_url": server.url,
        "tries": 3,
        "first_pause": 0.01,
        "timeout": 1.0,
    }


def test_synthesise_with_an_endpoint_that_misbehaves(stage, tmp_path, monkeypatch, capsys):
    """Every fault is survived or is one reject with its reason; the cost is what was asked for."""
    monkeypatch.setenv("HF_TOKEN", "hf_the_users_own")
    monkeypatch.setenv("TEACHER_KEY", "key for the teacher")
    faults = ["429", "500", "503", "time-out", "cut connection"]
    faults += ["no json", "other json", "no choices"]
    chat_faults = [*faults, "no tags", "no text", "swapped", "cut off"]
    plan = {("chat", f"chat {f}"): [f] for f in chat_faults}
    plan |= {("images", f"images {f}"): [f] for f in [*faults, "no image"]}
    hopeless = {"refused": ["400"], "always down": ["500"] * 3, "always untagged": ["no tags"] * 3}
    plan |= {("chat", q): f for q, f in hopeless.items()}
    server = Endpoint(plan)
    names = ["plain", *(q for _, q in plan)]
    settings = endpoints(server) | {"workers": 3, "send_side": 32}
    settings["data"] = questions(tmp_path, names)
    kept = stage("synthesise", "synthesised", **settings)
    assert [row["question"] for row in kept] == [q for q in names if q not in hopeless]
    load_examples(tmp_path / "out/synthesised.jsonl")
    for row in kept:
        assert row["response"] == RESPONSE.replace("Compare", f"{row['question']} Compare")
        drawn = pixels(tmp_path / "out" / row["aux_images"][0])
        assert (drawn == pixels(noise(len(row["question"])))).all()
    rejects = {r["id"]: r for r in read_lines(tmp_path / "out/rejects.synthesised.jsonl")}
    assert {names[int(i[1:])]: (r["reason"], r["number"]) for i, r in rejects.items()} == {
        "refused": ("refused by the endpoint", 400),
        "always down": ("no answer from the endpoint", 500),
        "always untagged": ("tags missing or out of order", None),
    }

    # what was sent: the image model sees the query image, the teacher both images, question and
    # answer; each gets its own key
    (drawn,) = (s for s in server.seen if s["key"] == ("images", "plain"))
    (asked,) = (s for s in server.seen if s["key"] == ("chat", "plain"))
    assert b'name="model"\r\n\r\nQwen-Image-Edit\r\n' in drawn["body"]
    assert (pixels(io.BytesIO(drawn["images"][0])) == pixels(noise(0))).all()
    assert [Image.open(io.BytesIO(i)).size for i in asked["images"]] == [(32, 24)] * 2
    assert asked["body"]["model"] == b.teacher_model
    assert asked["prompt"] == b.teacher_prompt.format(question="plain", answer="red")
    auth = {}
    for s in server.seen:
        headers = {name.lower(): value for name, value in s["headers"].items()}
        auth[s["key"][0]] = headers["authorization"]
    assert auth == {"chat": "Bearer key for the teacher", "images": "Bearer none"}
    assert server.most <= 3

    # one request for each fault and one that succeeded; three for the hopeless, one where a
    # repetition cannot help
    tried = {q: server.count("chat").count(q) for q in names}
    wanted = {q: 2 if q.startswith("chat ") else 1 for q in names}
    assert tried == wanted | {"always down": 3, "always untagged": 3}
    # replies of the protocol, and so with a count of tokens: not the refused, not the faults
    well = sum(tried.values()) - 1 - 3 - len(faults)
    cost = f"{len(server.seen):,} requests, {100 * well:,} prompt and {10 * well:,} written tokens"
    assert cost in capsys.readouterr().out

    # again: only what had no answer is asked for, and the image model is left in peace
    n = len(server.seen)
    kept = stage("synthesise", "synthesised", **settings)
    again = {("chat", "always down"), ("chat", "refused")}
    assert {s["key"] for s in server.seen[n:]} == again and len(server.seen) == n + 2
    assert [row["question"] for row in kept] == [q for q in names if q != "always untagged"]
    # a server that has moved is paid for nothing again
    moved = Endpoint()
    assert stage("synthesise", "synthesised", **settings | endpoints(moved)) == kept
    assert not moved.seen


def test_a_full_disk_is_named_by_the_costs():
    with pytest.raises(OSError, match="/dev/full"):
        teacher.log_cost(SimpleNamespace(model="m", costs="/dev/full"), 0.0)


def test_a_broken_picture_is_one_rows_fault(stage, tmp_path):
    server = Endpoint()
    data = questions(tmp_path, ["a", "b", "c"], aux=True)
    (tmp_path / "out" / read_lines(data)[1]["aux_images"][0]).write_bytes(b"no picture")
    # a prompt's own braces stay
    prompt = 'Reply as {"a": 1}. Question: {question}\nAnswer: {answer}'
    settings = {"data": data, "teacher_prompt": prompt} | endpoints(server)
    kept = stage("synthesise", "synthesised", **settings)
    assert [row["question"] for row in kept] == ["a", "c"] == sorted(server.count("chat"))
    assert all('Reply as {"a": 1}.' in seen["prompt"] for seen in server.seen)
    (reject,) = read_lines(tmp_path / "out" / "rejects.synthesised.jsonl")
    assert (reject["id"], reject["reason"]) == ("x1", "unreadable image")


def test_synthesise_keeps_crops_and_stops_early(stage, tmp_path, monkeypatch):
    server = Endpoint()
    data = questions(tmp_path, ["a", "b"], aux=True)
    kept = stage("synthesise", "synthesised", data=data, **endpoints(server))
    assert len(kept) == 2 and not server.count("images") and len(server.count("chat")) == 2
    assert (pixels(tmp_path / "out" / kept[1]["aux_images"][0]) == pixels(noise(1001))).all()

    names = [f"q{n}" for n in range(40)]
    down = Endpoint({("chat", q): ["500"] * 9 for q in names})
    data = questions(tmp_path, names, aux=True)
    with pytest.raises(SystemExit, match="5 items in a row had no answer.*500"):
        stage("synthesise", data=data, **endpoints(down), give_up=5, workers=1)
    assert len(down.seen) < 3 * 10
    locked = Endpoint({("chat", "q0"): ["401"]})
    with pytest.raises(SystemExit, match="answers 401.*key"):
        stage("synthesise", **endpoints(locked))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(b, "teacher_url", locked.url)
    with pytest.raises(SystemExit, match="HF_HUB_OFFLINE"):
        stage("synthesise", data=questions(tmp_path, ["new"], aux=True))


def test_what_was_answered_is_never_paid_for_again(stage, tmp_path):
    """Not under another id, in another order, nor in another category."""
    server = Endpoint()
    data = questions(tmp_path, ["aaa", "bbbb"])
    kept = stage("synthesise", "synthesised", data=data, **endpoints(server))
    rows = [row | {"id": f"new {row['id']}", "category": "new"} for row in read_lines(data)[::-1]]
    write_lines(data, rows)
    again = stage("synthesise", "synthesised", data=data, **endpoints(server))
    assert sorted(server.count("chat")) == sorted(server.count("images")) == ["aaa", "bbbb"]
    assert [row["id"] for row in again] == ["new x1", "new x0"]
    assert [row["response"] for row in again] == [row["response"] for row in kept[::-1]]
    assert {row["category"] for row in again} == {"new"}

    # a picture that was thrown away is drawn anew; another answer wants another response
    (tmp_path / "out" / again[0]["aux_images"][0]).unlink()
    write_lines(data, [rows[0] | {"id": "last"}, rows[1] | {"answer": "blue"}])
    stage("synthesise", "synthesised", data=data, **endpoints(server))
    assert sorted(server.count("images")) == ["aaa", "bbbb", "bbbb"]
    assert sorted(server.count("chat")) == ["aaa", "aaa", "bbbb"]


def test_what_an_endpoint_refuses_is_asked_again(stage, tmp_path):
    """A limit of the server that refuses all can be mended; one flagged item stops no other."""
    names = [f"q{n}" for n in range(6)]
    data = questions(tmp_path, names, aux=True)
    strict = Endpoint({("chat", q): ["400"] * 9 for q in names})
    settings = {"data": data, "give_up": 4, "workers": 1}
    with pytest.raises(SystemExit, match="4 items in a row had no answer.*refused.*mend"):
        stage("synthesise", **settings | endpoints(strict))
    assert len(strict.seen) < len(names)
    flagged = Endpoint({("chat", "q4"): ["403"] * 9})
    kept = stage("synthesise", "synthesised", **settings | endpoints(flagged))
    assert [row["question"] for row in kept] == [q for q in names if q != "q4"]
    (reject,) = read_lines(tmp_path / "out/rejects.synthesised.jsonl")
    assert (reject["id"], reject["number"]) == ("x4", 403)
    # more than give_up of them, and nothing else left: the endpoint is known to answer others
    refuses = Endpoint({("chat", q): ["403"] * 9 for q in names[1:]})
    some = questions(tmp_path, names, aux=True)
    settings["data"] = some
    for give_up in (6, 2):
        settings["give_up"] = give_up
        change = {"teacher_prompt": "Reply. Question: {question}\nAnswer: {answer}"}
        kept = stage("synthesise", "synthesised", **settings | change | endpoints(refuses))
        assert [row["question"] for row in kept] == ["q0"]
    settings = {"data": data, "give_up": 4, "workers": 1}
    assert len(stage("synthesise", "synthesised", **settings | endpoints(Endpoint()))) == 6


def test_answers_under_way_when_a_run_ends_are_kept(stage, tmp_path):
    names = [f"q{n}" for n in range(8)]
    data = questions(tmp_path, names, aux=True)
    unpaid = Endpoint({("chat", "q3"): ["402"]}, delay=0.05)
    with pytest.raises(SystemExit, match="answers 402"):
        stage("synthesise", data=data, workers=3, **endpoints(unpaid))
    stage("synthesise", "synthesised", data=data, workers=3, **endpoints(unpaid))
    asked = unpaid.count("chat")
    assert sorted(asked) == sorted([*names, "q3"])


def test_an_answer_of_another_protocol_is_bought_twice_at_most(stage, tmp_path):
    server = Endpoint({("images", "a"): ["link"] * 9})
    data = questions(tmp_path, ["a", "b"])
    settings = endpoints(server) | {"tries": 6}
    kept = stage("synthesise", "synthesised", data=data, **settings)
    assert [row["question"] for row in kept] == ["b"] and server.count("images").count("a") == 2
    (reject,) = read_lines(tmp_path / "out/rejects.drawn.jsonl")
    assert "no b64_json in the answer; there is url" in reject["detail"]


def test_options_are_part_of_the_question_that_is_sent(stage, tmp_path):
    server = Endpoint()
    data = questions(tmp_path, ["a"])
    write_lines(data, [read_lines(data)[0] | {"options": ["blue", "red"], "answer": "B"}])
    stage("synthesise", data=data, **endpoints(server))
    for seen in server.seen:
        text = seen["prompt"].replace("\r\n", "\n")
        assert "Question: a\nA. blue\nB. red" in text


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://localhost:8000v1", "https:///v1", "ftp://a/v1"]
)
def test_an_address_that_is_none_is_said_at_once(stage, url):
    with pytest.raises(SystemExit, match="is not an endpoint"):
        stage("synthesise", teacher_url=url)


def test_a_key_is_what_a_header_can_carry(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret\r\n")
    assert key_in("TEACHER_KEY") == "sk-secret"
    for key in ("sk\rsecret", "sk-secr\u00e9t"):
        monkeypatch.setenv("TEACHER_KEY", key)
        with pytest.raises(SystemExit, match="TEACHER_KEY: the key in it has characters") as e:
            key_in("TEACHER_KEY")
        assert "sk" not in str(e.value)


def test_synthesise_resumes_after_a_kill(tmp_path, monkeypatch):
    """A killed run loses at most what was under way; what was finished is not paid for twice."""
    monkeypatch.setattr(b, "out", str(tmp_path / "out"))
    names = [f"q{n}" for n in range(24)]
    server = Endpoint(delay=0.1)
    args = [
        "synthesise",
        f"--data={questions(tmp_path, names)}",
        f"--out={tmp_path / 'out'}",
        f"--teacher_url={server.url}",
        f"--image_url={server.url}",
        "--workers=2",
    ]
    online = {"HF_HUB_OFFLINE": "0"}
    for name in ("drawn", "synthesised"):  # a kill while drawing, one while writing
        path = tmp_path / "out/work" / f"{name}.jsonl"
        kill_when(partial(has_lines, path, 8), "build_data.py", *args, env=online)
        assert not (tmp_path / "out" / f"{name}.jsonl").exists()
        with open(path, "a") as f:
            f.write('{"key": "cut')
    run("build_data.py", *args, env=online)
    rows = load_examples(tmp_path / "out/synthesised.jsonl")
    assert [row["question"] for row in rows] == names
    for kind in ("images", "chat"):
        assert set(server.count(kind)) == set(names)
        # a kill costs what two workers had under way, and what they had not yet written down
        assert len(server.count(kind)) <= len(names) + 4
