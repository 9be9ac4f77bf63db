"""What does a served model answer to our prompts? A local server that fails in every way it can."""

import base64
import io
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import TOY, run, sampling, send_completion
from PIL import Image

import endpoint
import served
from data import load_examples
from endpoint import check_url
from files import read_lines, write_lines
from gap import needs_latents
from model import image_grid, load_processor
from resume import Unanswered
from served import Served, ask_all, served_messages

ONLINE = {"HF_HUB_OFFLINE": "0"}  # which also keeps the client from a local endpoint


class Server(BaseHTTPRequestHandler):
    """Chat completions: the right answer to the questions in `solved`, one of 8 to `rare`."""

    rows, solved, rare = {}, set(), set()
    faults, refused, cut, lock = [], set(), set(), threading.Lock()
    silent = False
    asked, said = [], Counter()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"][-1]["text"]
        row = self.rows[text.removesuffix(" Tag it.")]
        with self.lock:
            self.asked.append((row["id"], body))
            fault = self.faults.pop() if self.faults else None
            first = self.said[row["id"]]
            # many servers draw one answer whatever is asked for
            n = body["n"] if row["id"][-1] in "02468" else 1
            self.said[row["id"]] += 0 if fault else n
        if row["id"] in self.refused:
            fault = 400
        if fault == "cut":
            self.connection.close()
            return
        right = f"<answer> {row['answer']} </answer>"
        answers = []
        for s in range(first, first + n):
            good = row["id"] in self.solved or row["id"] in self.rare and s == 5
            answers.append(right if good else "<answer> no idea </answer>")
        status = fault if isinstance(fault, int) else 200
        sent = [] if fault == "empty" else answers
        reason = "length" if row["id"] in self.cut else "stop"
        send_completion(self, sent, status, [("Retry-After", "0")], reason, not self.silent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(world, tmp_path):
    """(url, folder with train.jsonl, {id: row}): questions that the server can tell apart."""
    rows = load_examples(world / "train.jsonl", training=False)
    rows = [dict(row, question=f"{n}. {row['question']}") for n, row in enumerate(rows)]
    write_lines(tmp_path / "train.jsonl", rows)
    ids = [row["id"] for row in rows]
    Server.rows = {row["question"]: row for row in rows}
    Server.solved, Server.rare = set(ids[::3]), set(ids[1::6])
    Server.faults, Server.refused, Server.cut, Server.silent = [], set(), set(), False
    Server.asked.clear()
    Server.said.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", tmp_path, dict(zip(ids, rows))
    server.shutdown()


def args_of(world, out, url, **change):
    more = {"url": url, "served_model": "m", "instruction": " Tag it.", "workers": 4}
    return sampling(TOY, world, out, **more | change)


def test_counts_are_the_servers(server):
    """Through refusals, cuts and servers that ignore n; early stop changes no assignment."""
    url, folder, rows = server
    Server.faults = [429, 500, "cut", "empty", 503]
    run("sample_difficulty.py", *args_of(folder, folder / "full", url, early_stop=0), env=ONLINE)
    full = read_lines(folder / "full")
    assert [line["id"] for line in full] == list(rows)
    for line in full:
        want = 8 if line["id"] in Server.solved else int(line["id"] in Server.rare)
        assert line["correct"] == want and len(line["answers"]) == 8
    n_full = sum(Server.said.values())
    seeds = Counter((id, body["seed"]) for id, body in Server.asked)
    assert len(seeds) >= len(Server.asked) - 5  # only what failed is asked again

    Server.said.clear()
    run("sample_difficulty.py", *args_of(folder, folder / "early", url), env=ONLINE)
    early = read_lines(folder / "early")
    for a, b in zip(early, full, strict=True):
        assert needs_latents(a, 0.0, "paper") == needs_latents(b, 0.0, "paper")
    assert sum(Server.said.values()) == n_full - 7 * len(Server.solved)


def test_what_has_no_answer_is_asked_for_by_the_next_run(server):
    """And nothing else is; until then there is no difficulty.jsonl."""
    url, folder, rows = server
    out = folder / "d"
    Server.refused = set(list(rows)[3:5])
    text = run("sample_difficulty.py", *args_of(folder, out, url), env=ONLINE, ok=False)
    assert "2 questions without an answer" in text and not out.exists()
    Server.asked.clear()
    Server.refused = set()
    run("sample_difficulty.py", *args_of(folder, out, url), env=ONLINE)
    assert {id for id, _ in Server.asked} == set(list(rows)[3:5])
    assert len(read_lines(out)) == len(rows)
    # a server that is down, or has no such model, is left in a sentence
    for status, said in ((404, "answers 404"), (402, "answers 402"), (400, "without an answer")):
        Server.faults = [status] * 10_000
        more = {"tries": 1, "give_up": 3}
        other = args_of(folder, folder / f"e{status}", url, **more)
        assert said in run("sample_difficulty.py", *other, env=ONLINE, ok=False)
        assert len(Server.faults) > 10_000 - 3 - 2 * 4  # no try that cannot help


def test_a_test_set_is_answered_by_the_server(server):
    """As by the model here: errors are kept and tried again, cut answers are counted."""
    url, folder, rows = server
    ids, out = list(rows), folder / "e"
    Server.refused, Server.cut = {ids[0]}, {ids[2], ids[3]}
    Server.faults = [429, 500, "cut", "empty", 503]
    args = [f"--model={TOY}", f"--data={folder}/train.jsonl", f"--out={out}", "--workers=4"]
    args += [f"--url={url}", "--instruction= Tag it."]
    text = run("eval.py", *args, "--served_model=m", env=ONLINE)
    assert "1 questions failed" in text
    lines = {line["id"]: line for line in read_lines(out / "predictions.rank0.jsonl")}
    scored = {line["id"]: line for line in read_lines(out / "scored.jsonl")}
    for id in ids[1:]:
        assert scored[id]["correct"] == (id in Server.solved)
        assert lines[id]["truncated"] == (id in Server.cut)
        assert lines[id]["tokens"] == len(lines[id]["raw"].split())
    assert "Bad request" in scored[ids[0]]["error"] and not scored[ids[0]]["correct"]

    Server.refused = set()
    Server.asked.clear()
    Server.silent = True  # of how many tokens it wrote
    run("eval.py", *args, "--served_model=m", env=ONLINE)
    assert {id for id, _ in Server.asked} == {ids[0]}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["scores"]["overall"]["accuracy"] == len(Server.solved) / len(ids)
    assert metrics["settings"]["served_model"] == "m"
    run("eval.py", *args, "--served_model=other", env=ONLINE)  # of which there is no answer yet
    assert len(Server.asked) == 1 + len(ids)

    said = run("eval.py", *args, "--served_model=m", "--save_latents=1", env=ONLINE, ok=False)
    assert "a server writes no latents" in said
    Server.faults = [400] * 10_000
    down = [*args, "--served_model=down", "--give_up=3"]
    assert "3 questions in a row" in run("eval.py", *down, env=ONLINE, ok=False)


def test_a_fault_of_ours_is_no_missing_answer():
    """What the server did not do ends the run, whatever it is called."""
    server = Served("http://localhost:1/v1", "m", "none", 1, 9, 1.0, 1.0)

    def work(row):
        if row["id"] == "unanswered":
            raise Unanswered("HTTPError: 500")
        return row["ours"]

    ((row, found, e),) = ask_all(work, [{"id": "unanswered"}], 1, 9, server.url)
    assert (row["id"], found, str(e)) == ("unanswered", None, "HTTPError: 500")
    with pytest.raises(KeyError):
        list(ask_all(work, [{"id": "ours"}], 1, 9, server.url))


def test_what_is_refused_does_not_hold_the_others_up(server):
    """A server that has answered is not down; and what failed before is asked for last."""
    url, folder, rows = server
    ids, out = list(rows), folder / "e"
    Server.refused = set(ids[:6])
    args = [f"--model={TOY}", f"--data={folder}/train.jsonl", f"--out={out}", "--workers=1"]
    args += [f"--url={url}", "--instruction= Tag it.", "--served_model=m", "--give_up=4"]
    assert "4 questions in a row" in run("eval.py", *args, env=ONLINE, ok=False)
    for _ in range(2):  # at last it is asked for nothing but what it refuses
        assert "6 questions failed" in run("eval.py", *args, env=ONLINE)
    assert len(read_lines(out / "scored.jsonl")) == len(ids)


def test_an_address_is_one():
    check_url("http://localhost:8000/v1")
    for url in ("localhost:8000/v1", "Qwen/Qwen2.5-VL-7B-Instruct", ""):
        with pytest.raises(SystemExit, match="is not an endpoint: expected http"):
            check_url(url)


def test_a_password_is_no_part_of_an_address():
    with pytest.raises(SystemExit) as e:
        check_url("http://user:secret@localhost:8000/v1")
    assert "secret" not in str(e.value)


def test_an_answer_that_shows_the_key_does_not(monkeypatch):
    """Nor does what is said of one without text, of which a part is shown."""
    key = "sk-0123456789abcdef"
    message = SimpleNamespace(content=f"your key is {key}")
    choice = SimpleNamespace(message=message, finish_reason="stop")

    class Client:
        def __init__(self, **_):
            pass

        def chat_completion(self, *_, **__):
            return SimpleNamespace(choices=[choice], usage=None, more="x" * 100 + key)

    monkeypatch.setattr(endpoint, "InferenceClient", Client)
    asked = Served("http://localhost", "m", key, 1, 9, 1.0, 1.0)
    (reply,) = served.ask(asked, [], 1, 0)
    assert reply.text == "your key is ***"
    message.content = None
    for more in range(180):
        choice.finish_reason = "x" * more
        with pytest.raises(ValueError, match="without text") as e:
            served.ask(asked, [], 1, 0)
        assert key[:6] not in str(e.value)


def test_images_go_at_the_size_that_our_tower_sees(world):
    rows = load_examples(world / "train.jsonl", training=False)
    for low, high in ((56 * 56, 1280 * 28 * 28), (200_000, 400_000), (784, 3136)):
        processor = load_processor(TOY, low, high)
        content = served_messages(rows[0], processor)[-1]["content"]
        parts = [part for part in content if part["type"] == "image_url"]
        assert len(parts) == len(rows[0]["images"])
        for part, source in zip(parts, rows[0]["images"]):
            _, encoded = part["image_url"]["url"].split(",")
            image = Image.open(io.BytesIO(base64.b64decode(encoded)))
            _, h, w = image_grid(processor, source)
            assert image.size == (14 * w, 14 * h) and low <= image.width * image.height <= high
        assert content[-1] == {"type": "text", "text": rows[0]["question"]}
