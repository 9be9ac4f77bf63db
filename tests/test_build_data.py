"""Converters on each source's real layout, hostile input, a teacher that misbehaves, filters, audit, split and sheet."""

import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import zlib
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import build_data as b
import sources
from data import load_examples, read_lines

PARSER = "a red bar that reaches twice as high as the blue one"
RESPONSE = f"<think> Compare the bars. <latent></latent> <parser> {PARSER} </parser> So red. </think> <answer> red </answer>"


def noise(seed, size=(64, 48), smooth=4):
    """An image of random blobs that stays itself under mild edits."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (size[1] // smooth, size[0] // smooth, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.BICUBIC)


def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(
        (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
    )


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Run a command in this process with settings; returns the rows that it wrote to <out>/<name>.jsonl."""
    monkeypatch.setattr(b, "out", str(tmp_path / "out"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    def call(command, name="", **changes):
        for key, value in changes.items():
            assert type(getattr(b, key)) is type(value), key
            monkeypatch.setattr(b, key, value)
        b.COMMANDS[command]()
        return read_lines(tmp_path / "out" / f"{name}.jsonl") if name else None

    return call


def convert(stage, tmp_path, source, items, name="items.json", **changes):
    """Convert items written in the source's layout; returns kept rows and rejects."""
    path = tmp_path / "src" / name
    path.parent.mkdir(exist_ok=True)
    text = (
        json.dumps(items)
        if name.endswith(".json")
        else "".join(json.dumps(i) + "\n" for i in items)
    )
    path.write_text(text)
    kept = stage(
        "convert", source, source=source, files=str(path), root=str(tmp_path / "src"), **changes
    )
    if kept:
        load_examples(tmp_path / "out" / f"{source}.jsonl")  # what the other stages demand
    return kept, read_lines(tmp_path / "out" / f"rejects.{source}.jsonl")


def write_data(tmp_path, rows, name="rows"):
    """Rows with PIL images as a data file of `out`; returns its path."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    with open(out / f"{name}.jsonl", "w") as f:
        for row in rows:
            row = dict(row)
            for field in ("images", "aux_images"):
                row[field] = [
                    p if isinstance(p, str) else b.store(encoded(p), p, ".png") for p in row[field]
                ]
            f.write(json.dumps(row) + "\n")
    return str(out / f"{name}.jsonl")


def example(n=0, **change):
    return {
        "id": f"x{n}",
        "images": [noise(n)],
        "question": "Which bar is higher?",
        "answer": "red",
        "response": RESPONSE,
        "aux_images": [noise(n + 1000)],
    } | change


# --- convert


def test_monet(stage, tmp_path):
    query, aux = (
        saved(tmp_path / "src/images/q.jpg", noise(1)),
        saved(tmp_path / "src/images/a.png", noise(2)),
    )

    def item(n, spans=1, final="So \\boxed{\\text{B}}."):
        return {
            "metadata": {"dataset_name": "Zebra_CoT_count", "sample_id": n},
            "data": [
                {"role": "system", "content": [{"type": "text", "text": "You are helpful."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "created_dataset/filtered_data/images/q.jpg"},
                        {
                            "type": "text",
                            "text": "How many?\nPut your final answer within \\boxed{}.",
                        },
                    ],
                },
                {
                    "role": "assistant",
                    "content": [
                        {
                            "type": "text",
                            "text": "Look closer. " + "<abs_vis_token></abs_vis_token>" * spans,
                        },
                        {"type": "image", "image": "images/a.png"},
                        {"type": "text", "text": f"<observation>two of them</observation> {final}"},
                    ],
                },
            ],
        }

    kept, rejects = convert(
        stage,
        tmp_path,
        "monet",
        [item(0), item(1, spans=2), item(2, final="no box"), {"data": 5}],
        name="train.json",
    )
    assert len(kept) == 1 and kept[0]["question"] == "How many?" and kept[0]["answer"] == "B"
    assert (
        kept[0]["category"] == "monet_Zebra_CoT_count"
        and sources.source_of(kept[0]["category"]) == "Zebra-CoT count"
    )
    assert kept[0]["response"] == (
        "<think> Look closer. <latent></latent>\n<parser>two of them</parser> So \\boxed{\\text{B}}. "
        "</think> <answer> B </answer>"
    )
    assert (tmp_path / "out" / kept[0]["images"][0]).read_bytes() == query.read_bytes()
    assert (tmp_path / "out" / kept[0]["aux_images"][0]).read_bytes() == aux.read_bytes()
    assert [(r["reason"], r["number"]) for r in rejects] == [
        ("spans and auxiliary images differ", 1),
        ("no \\boxed answer", None),
        ("another layout than the source's", None),
    ]


def test_boxes(stage, tmp_path, monkeypatch):
    """Visual-CoT in both of its layouts, and LVR, give the crop that the box says."""
    image = noise(3, (200, 100))
    saved(tmp_path / "src/cot/flickr30k/1.png", image)
    monkeypatch.setattr(b, "crop_side", 1)  # nothing is enlarged
    ask = " Please provide the bounding box coordinate of the region that can help you answer the question better."
    box = [40, 20, 120, 80]  # with a fifth of 80 x 60 around it: 24, 8, 136, 92
    path = "cot/flickr30k/1.png"
    talk = [
        {"from": "human", "value": "<image>\nWhich colour?" + ask},
        {"from": "gpt", "value": "[0.200, 0.200, 0.600, 0.800]"},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "It is red."},
    ]
    llava = {
        "dataset": "flickr30k",
        "split": "train",
        "question_id": 5,
        "image": [path, f"{path}###{box}"],
        "conversations": talk,
    }
    meta = {
        "question": "Which colour?",
        "answer": "It is red.",
        "image": "1.png",
        "width": 400,
        "height": 200,
        "bboxs": [[80, 40, 240, 160], [0, 0, 1, 1]],
        "dataset": "flickr30k",
        "split": "train",
    }
    for items, name in (([llava], "viscot_363k.json"), ([meta], "flickr30k_cot_train.jsonl")):
        (row,), rejects = convert(stage, tmp_path, "viscot", items, name)
        assert (
            not rejects and row["question"] == "Which colour?" and row["category"] == "Visual_CoT"
        )
        assert row["response"] == "<think> <latent></latent> </think> <answer> It is red. </answer>"
        assert (
            pixels(tmp_path / "out" / row["aux_images"][0]) == pixels(image)[8:92, 24:136]
        ).all()
    monkeypatch.setattr(b, "crop_side", 224)
    (row,), _ = convert(stage, tmp_path, "viscot", [llava])
    assert Image.open(tmp_path / "out" / row["aux_images"][0]).size == (224, 168)
    (row,), _ = convert(stage, tmp_path, "viscot", [llava], draw="outline")
    drawn, change = tmp_path / "out" / row["aux_images"][0], np.zeros((100, 200), bool)
    change[20:80, 40:120] = True
    change[22:78, 42:118] = False
    assert (pixels(drawn)[change] == (255, 0, 0)).all() and (
        pixels(drawn)[~change] == pixels(image)[~change]
    ).all()

    lvr = {
        "dataset": "gqa",
        "image": [path],
        "bboxes": [[0.2, 0.2, 0.6, 0.8]],
        "conversations": [
            {"from": "human", "value": "<image>\nWhich colour?\nShort."},
            {"from": "gpt", "value": "<lvr>\n<answer> red </answer>"},
        ],
    }
    bad = [
        lvr | {"bboxes": x}
        for x in (
            [[0.2, 0.2, 0.6]],
            [[0.5, 0.5, 0.5, 0.5]],
            [[float("nan")] * 4],
            [["a"] * 4],
            [5],
            5,
            [],
            [[0, 0, 0.5, 0.5]] * 2,
            [[1e300, 5, 1e301, 9]],
            [[True, None, 1, 1]],
        )
    ]
    kept, rejects = convert(stage, tmp_path, "lvr", [lvr, *bad], draw="crop", crop_side=1)
    assert len(kept) == 1 and len(rejects) == len(bad) and kept[0]["answer"] == "red"
    assert kept[0]["response"] == "<think> <latent></latent> </think> <answer> red </answer>"
    assert (
        pixels(tmp_path / "out" / kept[0]["aux_images"][0]) == pixels(image)[8:92, 24:136]
    ).all()


def test_zebra(stage, tmp_path):
    saved(tmp_path / "src/p1.png", noise(1))
    bytes_cell = {"bytes": base64.b64encode(encoded(noise(2))).decode(), "path": "elsewhere.png"}
    item = {
        "Question": "Where? <image_start>[problem_image_1]<image_end>",
        "Final Answer": "C",
        "Text Reasoning Trace": "THOUGHT 0: Draw it.\n<image_start>[reasoning_image_1]<image_end>\nTHOUGHT 1: And again "
        "<image_start>[reasoning_image_2]<image_end> so C.",
        "problem_image_1": "p1.png",
        "problem_image_2": bytes_cell,
        "problem_image_3": None,
        "reasoning_image_1": bytes_cell,
        "reasoning_image_2": "p1.png",
    }
    kept, rejects = convert(
        stage,
        tmp_path,
        "zebra",
        [item, item | {"reasoning_image_2": None}, {"Question": "x"}],
        "z.jsonl",
    )
    assert len(kept) == 1 and len(rejects) == 2
    assert kept[0]["question"] == "Where?" and kept[0]["answer"] == "C"
    assert [
        (pixels(tmp_path / "out" / p) == pixels(noise(n))).all()
        for n, p in enumerate(kept[0]["images"], 1)
    ] == [True, True]
    assert kept[0]["response"] == (
        "<think> Draw it.\n<latent></latent>\nAnd again <latent></latent> so C. </think> "
        "<answer> C </answer>"
    )
    first, second = (pixels(tmp_path / "out" / p) for p in kept[0]["aux_images"])
    assert (first == pixels(noise(2))).all() and (second == pixels(noise(1))).all()


def test_gap_release_and_teacher_text(stage, tmp_path):
    for n in range(2):
        saved(tmp_path / f"src/{n}.png", noise(n))
    raw = RESPONSE.replace("<latent></latent>", "<|vision_start|><|image_pad|><|vision_end|>")
    item = {
        "data_source": "monet_CogCoM",
        "image": "0.png",
        "query": "Which?",
        "answer": "red",
        "response": raw,
        "aux_image": "1.png",
    }
    text_only = item | {
        "response": "<think> Easy. </think> <answer> red </answer>",
        "aux_image": None,
    }
    kept, rejects = convert(stage, tmp_path, "gap", [item, text_only])
    assert [row["response"] for row in kept] == [RESPONSE, text_only["response"]] and not rejects
    assert kept[0]["category"] == "monet_CogCoM" and kept[1]["aux_images"] == []
    with pytest.raises(
        SystemExit,
        match="'response': looked for .*teacher_response.*found data_source, image, question, th",
    ):
        convert(
            stage,
            tmp_path,
            "gap",
            [{"data_source": "x", "image": "0.png", "question": "?", "thoughts": 1}],
            name="o.json",
        )

    texts = [
        "```\n" + raw + "\n```<|im_end|>",
        raw.replace("<|vision_start|>", "<latent> <|vision_start|>").replace(
            "<|vision_end|>", "<|vision_end|> </latent>"
        ),
        raw.replace("</think>", ""),
        raw.replace("<answer>", "<answer> <think>"),
        RESPONSE.replace("<latent></latent>", "<latent>words</latent>"),
        "just words",
        raw + " <|im_start|>user</answer>",
        "",
    ]
    kept, rejects = convert(
        stage,
        tmp_path,
        "teacher",
        [
            {
                "images": ["0.png"],
                "question": "Which?",
                "answer": "red",
                "raw": t,
                "aux_images": ["1.png"],
            }
            for t in texts
        ],
        "t.jsonl",
    )
    assert [row["response"] for row in kept] == [RESPONSE, RESPONSE]
    assert [r["reason"] for r in rejects] == [
        "tags missing or out of order",
        "tags missing or out of order",
        "text inside a latent span",
        "tags missing or out of order",
        "reserved token in the text",
        "tags missing or out of order",
    ]


def test_options_and_questions_alone(stage, tmp_path):
    saved(tmp_path / "src/0.png", noise(0))
    item = {"image": "0.png", "problem": "Which?", "answer": 12, "choices": ["a", 12]}
    (row,), _ = convert(stage, tmp_path, "qa", [item], "q.jsonl")
    assert row["options"] == ["a", "12"] and row["answer"] == "12" and row["aux_images"] == []
    assert row["response"] == "<think>  </think> <answer> 12 </answer>"


# --- hostile input


def tree(folder):
    return {
        str(p.relative_to(folder)): p.lstat().st_mtime_ns
        for p in folder.rglob("*")
        if "out" not in p.parts
    }


def test_hostile_images_and_paths(stage, tmp_path, monkeypatch):
    """Each bad image is one reject with its reason; usable oddities become plain RGB; nothing outside `out` changes."""
    src = tmp_path / "src"
    good = encoded(noise(1))
    secret = saved(tmp_path / "secret.png", noise(9))
    saved(src / "ok.png", noise(1))
    (src / "link.png").symlink_to(secret)
    (src / "dir.png").mkdir()
    os.mkfifo(src / "pipe.png")
    frames = [noise(i) for i in range(3)]
    bomb = bytearray(good)
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's width and height, and its checksum
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    bad = {
        "empty.png": b"",
        "text.png": b"<html>no image</html>",
        "cut.png": good[: len(good) // 2],
        "cut.jpg": encoded(noise(1), "JPEG")[:-400],
        "bomb.png": bytes(bomb),
        "tiny.png": encoded(noise(1, (20, 20))),
        "narrow.png": encoded(Image.new("RGB", (28 * 201, 28))),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moving.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "code.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n",
        "big.png": b"x" * 200_000,
    }
    for name, content in bad.items():
        (src / name).write_bytes(content)
    cmyk = Image.new("CMYK", (40, 40), (0, 255, 255, 0))  # red
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # nothing, on white
    palette = noise(4, (40, 40)).convert("P")
    deep = Image.fromarray(np.full((40, 40), 257 * 100, dtype=np.uint16))
    fine = {
        "cmyk.jpg": (encoded(cmyk, "JPEG", quality=100), Image.new("RGB", (40, 40), "red")),
        "clear.png": (encoded(clear), Image.new("RGB", (40, 40), "white")),
        "palette.png": (encoded(palette), palette.convert("RGB")),
        "still.gif": (encoded(palette, "GIF"), palette),
        "deep.png": (encoded(deep), Image.new("RGB", (40, 40), (100, 100, 100))),
    }
    for name, (content, _) in fine.items():
        (src / name).write_bytes(content)
    paths = [
        "../secret.png",
        str(secret),
        "link.png",
        "dir.png",
        "pipe.png",
        "a\0b",
        "x" * 5000,
        "none.png",
        5,
        {"path": "ok.png"},
    ]
    item = {
        "question": "Which?",
        "answer": "red",
        "response": "<think> x </think> <answer> red </answer>",
    }
    before = tree(tmp_path)
    kept, rejects = convert(
        stage,
        tmp_path,
        "teacher",
        [item | {"images": [p]} for p in [*fine, *bad, *paths]],
        "h.jsonl",
        max_bytes=150_000,
    )
    reasons = [r["reason"] for r in rejects]
    assert reasons == ["unreadable image"] * 4 + [
        "image has too many pixels",
        "image too small",
        "image too narrow for the processor",
        "animated image",
        "animated image",
        "unreadable image",
        "image file too large",
    ] + ["path leaves the data folder"] * 3 + ["no such image"] * 2 + [
        "unreadable path",
        "unreadable path",
        "no such image",
        "unreadable path",
        "unreadable path",
    ]
    assert (
        rejects[4]["number"] == 60_000**2
        and rejects[5]["number"] == 20
        and rejects[10]["number"] == 200_000
    )
    for row, (_, wanted) in zip(kept, fine.values(), strict=True):
        assert (
            np.abs(pixels(tmp_path / "out" / row["images"][0]).astype(int) - pixels(wanted)).max()
            <= 2
        ), row["id"]
        assert Image.open(tmp_path / "out" / row["images"][0]).mode == "RGB"
    after = tree(tmp_path)
    assert {k for k in after if after[k] != before.get(k)} <= {".", "src", "src/h.jsonl"}


def test_hostile_text(stage, tmp_path):
    """Truncated JSON, other encodings, endless brackets: what is whole before the damage is kept."""
    saved(tmp_path / "src/ok.png", noise(1))
    item = {
        "images": ["ok.png"],
        "question": "Which?",
        "answer": "red",
        "response": "<think> x </think> <answer> red </answer>",
    }
    line = json.dumps(item)

    def outcome(content, name):
        (tmp_path / "src" / name).write_bytes(content)
        kept = stage(
            "convert", "teacher", source="teacher", files=str(tmp_path / "src" / name), root=""
        )
        return len(kept), [
            r["id"].split("/")[1] for r in read_lines(tmp_path / "out/rejects.teacher.jsonl")
        ]

    assert outcome(f"[{line},\n {line[:-30]}".encode(), "cut.json") == (1, ["cut.json:2"])
    assert outcome(f"[{line}, {line}".encode(), "open.json") == (2, ["open.json:3"])
    assert outcome(f"\ufeff{line}\n{line[:40]}\n{line}".encode(), "cut.jsonl") == (
        2,
        ["cut.jsonl:2"],
    )
    latin = line.encode().replace(b"Which?", b"O\xf9?")
    assert outcome(latin + b"\n" + line.encode(), "latin.jsonl") == (1, ["latin.jsonl:1"])
    assert outcome(b"[" + latin + b"," + line.encode() + b"]", "latin.json") == (
        1,
        ["latin.json:1"],
    )
    assert outcome(line.encode("utf-16"), "utf16.jsonl")[0] == 0
    assert outcome(
        line.replace("Which", "\\ud800").encode() + b"\n" + line.encode(), "half.jsonl"
    ) == (1, ["half.jsonl:1"])
    deep = "\n".join('{"a":' + "[" * n + "]" * n + "}" for n in (400, 490, 900, 980, 10**5))
    assert outcome(f"{deep}\n{line}".encode(), "deep.jsonl")[0] == 1
    assert outcome(b'{"question": NaN}\n5\nnull\n[]\n"x"\n' + line.encode(), "types.jsonl") == (
        1,
        [f"types.jsonl:{n}" for n in range(1, 6)],
    )
    with pytest.raises(SystemExit, match="matches no file"):
        stage("convert", source="teacher", files=str(tmp_path / "none*"))
    with pytest.raises(SystemExit, match="no name for a file"):
        stage("convert", label="../elsewhere")
    with pytest.raises(SystemExit, match="source=''"):
        stage("convert", source="")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_damaged_images_never_crash(kind, data):
    content = bytearray(encoded(noise(1, (32, 32)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image, _ = b.decode(bytes(content[: data.draw(st.integers(0, len(content)))]))
        assert image.mode == "RGB" and min(image.size) >= b.min_side
    except sources.Reject:
        pass


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"[", b'[{"a": 1}, ', b'{"a": 1}\n']))
def test_damaged_text_never_crashes(tmp_path_factory, tail, head):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(head + tail)
    for _, item, error in b.read_items(path):
        assert error or json.dumps(item, ensure_ascii=False).encode() is not None


def test_paths_of_later_stages(stage, tmp_path):
    """A data file in `out` may not name an image outside it, and a data file outside it is refused."""
    secret = saved(tmp_path / "secret.png", noise(9))
    data = write_data(
        tmp_path,
        [example(0, images=["../secret.png"]), example(1, images=[str(secret)]), example(2)],
    )
    assert [row["id"] for row in stage("filter", "filtered", data=data)] == ["x2"]
    assert {r["reason"] for r in read_lines(tmp_path / "out/rejects.jsonl")} == {
        "path leaves the data folder"
    }
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="convert"):
        stage("filter", data=str(tmp_path / "other.jsonl"))


# --- synthesise


class Endpoint:
    """A local server that speaks /v1/chat/completions and /v1/images/edits, and misbehaves as `plan` says.

    plan maps (path's last word, question) to a list of faults, one a request; then it answers well.
    """

    def __init__(self, plan=(), delay=0.0):
        self.plan, self.delay, self.seen, self.lock = (
            {k: list(v) for k, v in dict(plan).items()},
            delay,
            [],
            threading.Lock(),
        )
        self.running = self.most = 0
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
                assert (
                    kind == "images/edits"
                    and "multipart/form-data" in request.headers["content-type"]
                )
                prompt, images = (
                    body.decode("latin-1"),
                    [body[body.index(b"\x89PNG") :].split(b"\r\n--")[0]],
                )
            question = prompt.split("Question: ")[1].split("\n")[0].strip("\r")
            key = kind.split("/")[0], question
            with self.lock:
                self.seen.append(
                    {
                        "key": key,
                        "body": body,
                        "prompt": prompt,
                        "images": images,
                        "headers": dict(request.headers),
                    }
                )
                fault = self.plan[key].pop(0) if self.plan.get(key) else ""
            time.sleep(self.delay)
            self.send(request, key[0], question, fault)
        finally:
            with self.lock:
                self.running -= 1

    def send(self, request, kind, question, fault):
        status, headers = 200, {"content-type": "application/json"}
        if kind == "chat":
            text = RESPONSE.replace("Compare", f"{question} Compare")
            text = {"no tags": "It is red.", "swapped": text.replace("<think>", "</think>", 1)}.get(
                fault, text
            )
            reply = {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "length" if fault == "cut off" else "stop",
                        "message": {
                            "role": "assistant",
                            "content": None if fault == "no text" else text,
                        },
                    }
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
        else:
            image = b"not an image" if fault == "no image" else encoded(noise(len(question)))
            reply = {"created": 1, "data": [{"b64_json": base64.b64encode(image).decode()}]}
        content = json.dumps(reply).encode()
        if fault in ("429", "500", "503", "400", "401"):
            status, content = int(fault), b'{"error": {"message": "no"}}'
            headers["retry-after"] = "0"
        content = {
            "no json": b"<html>gateway</html>",
            "other json": b'[{"a": 1}]',
            "no choices": b'{"choices": []}',
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
    return write_data(
        tmp_path,
        [
            example(
                n,
                question=q,
                **(
                    {}
                    if aux
                    else {"aux_images": [], "response": "<think> </think> <answer> red </answer>"}
                ),
            )
            for n, q in enumerate(names)
        ],
    )


def endpoints(server):
    return {
        "teacher_url": server.url,
        "image_url": server.url,
        "tries": 3,
        "first_pause": 0.01,
        "timeout": 1.0,
    }


def test_synthesise_with_an_endpoint_that_misbehaves(stage, tmp_path, monkeypatch, capsys):
    """Every fault is survived or is one reject with its reason; the cost is what the server was asked."""
    monkeypatch.setenv("HF_TOKEN", "hf_the_users_own")
    monkeypatch.setenv("TEACHER_KEY", "key for the teacher")
    faults = [
        "429",
        "500",
        "503",
        "time-out",
        "cut connection",
        "no json",
        "other json",
        "no choices",
    ]
    plan = {
        ("chat", f"chat {f}"): [f] for f in [*faults, "no tags", "no text", "swapped", "cut off"]
    }
    plan |= {("images", f"images {f}"): [f] for f in [*faults, "no image"]}
    hopeless = {"refused": ["400"], "always down": ["500"] * 3, "always untagged": ["no tags"] * 3}
    plan |= {("chat", q): f for q, f in hopeless.items()}
    server = Endpoint(plan)
    names = ["plain", *(q for _, q in plan)]
    settings = endpoints(server) | {
        "data": questions(tmp_path, names),
        "workers": 3,
        "send_side": 32,
    }
    kept = stage("synthesise", "synthesised", **settings)
    assert [row["question"] for row in kept] == [q for q in names if q not in hopeless]
    load_examples(tmp_path / "out/synthesised.jsonl")
    for row in kept:
        assert row["response"] == RESPONSE.replace("Compare", f"{row['question']} Compare")
        assert (
            pixels(tmp_path / "out" / row["aux_images"][0]) == pixels(noise(len(row["question"])))
        ).all()
    rejects = {r["id"]: r for r in read_lines(tmp_path / "out/rejects.synthesised.jsonl")}
    assert {names[int(i[1:])]: (r["reason"], r["number"]) for i, r in rejects.items()} == {
        "refused": ("refused by the endpoint", 400),
        "always down": ("no answer from the endpoint", 500),
        "always untagged": ("tags missing or out of order", None),
    }

    # what was sent: the model sees the query image; the teacher sees both images, question and answer; each its own key
    drawn, asked = (
        [s for s in server.seen if s["key"] == (kind, "plain")] for kind in ("images", "chat")
    )
    assert (
        len(drawn) == len(asked) == 1
        and b'name="model"\r\n\r\nQwen-Image-Edit\r\n' in drawn[0]["body"]
    )
    assert (pixels(io.BytesIO(drawn[0]["images"][0])) == pixels(noise(0))).all()
    assert [Image.open(io.BytesIO(i)).size for i in asked[0]["images"]] == [(32, 24)] * 2
    assert asked[0]["body"]["model"] == b.teacher_model
    assert asked[0]["prompt"] == b.teacher_prompt.format(question="plain", answer="red")
    auth = {
        s["key"][0]: {k.lower(): v for k, v in s["headers"].items()}["authorization"]
        for s in server.seen
    }
    assert auth == {"chat": "Bearer key for the teacher", "images": "Bearer none"}
    assert server.most <= 3

    # one request for each fault and one that succeeded; three for the hopeless, one where a repetition can not help
    tried = {q: server.count("chat").count(q) for q in names}
    assert tried == {
        q: 2 if q.startswith("chat ") else {"always down": 3, "always untagged": 3}.get(q, 1)
        for q in names
    }
    well = (
        sum(tried.values()) - 1 - 3 - len(faults)
    )  # replies of the protocol, and so with a count of tokens
    assert (
        f"{len(server.seen):,} requests, {100 * well:,} prompt and {10 * well:,} written tokens"
        in capsys.readouterr().out
    )

    # again: only what had no answer is asked for, and the image model is left in peace
    n = len(server.seen)
    kept = stage("synthesise", "synthesised", **settings)
    assert [s["key"] for s in server.seen[n:]] == [("chat", "always down")]
    assert [row["question"] for row in kept] == [
        q for q in names if q not in hopeless or q == "always down"
    ]


def test_synthesise_keeps_crops_and_stops_early(stage, tmp_path, monkeypatch):
    server = Endpoint()
    kept = stage(
        "synthesise",
        "synthesised",
        data=questions(tmp_path, ["a", "b"], aux=True),
        **endpoints(server),
    )
    assert len(kept) == 2 and not server.count("images") and len(server.count("chat")) == 2
    assert (pixels(tmp_path / "out" / kept[1]["aux_images"][0]) == pixels(noise(1001))).all()

    names = [f"q{n}" for n in range(40)]
    down = Endpoint({("chat", q): ["500"] * 9 for q in names})
    with pytest.raises(SystemExit, match="5 items in a row had no answer.*500"):
        stage(
            "synthesise",
            data=questions(tmp_path, names, aux=True),
            **endpoints(down),
            give_up=5,
            workers=1,
        )
    assert len(down.seen) < 3 * 10
    locked = Endpoint({("chat", "q0"): ["401"]})
    with pytest.raises(SystemExit, match="answers 401.*key"):
        stage("synthesise", **endpoints(locked))
    with pytest.raises(SystemExit, match="'localhost:8000' is no endpoint"):
        stage("synthesise", teacher_url="localhost:8000")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(b, "teacher_url", locked.url)
    with pytest.raises(SystemExit, match="HF_HUB_OFFLINE"):
        stage("synthesise", data=questions(tmp_path, ["new"], aux=True))


def test_synthesise_resumes_after_a_kill(tmp_path, monkeypatch):
    """A killed run loses at most what was under way, and what was finished is not paid for twice."""
    monkeypatch.setattr(b, "out", str(tmp_path / "out"))
    names = [f"q{n}" for n in range(24)]
    server = Endpoint(delay=0.1)
    args = [
        sys.executable,
        str(ROOT / "build_data.py"),
        "synthesise",
        f"--data={questions(tmp_path, names)}",
        f"--out={tmp_path / 'out'}",
        f"--teacher_url={server.url}",
        f"--image_url={server.url}",
        "--workers=2",
    ]
    env = os.environ | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    for name, lines in (
        ("drawn", 8),
        ("synthesised", 8),
    ):  # a kill while drawing, one while writing
        process = subprocess.Popen(
            args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        path = tmp_path / "out/work" / f"{name}.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not (tmp_path / "out" / f"{name}.jsonl").exists()
        with open(path, "a") as f:
            f.write('{"key": "cut')
    done = subprocess.run(args, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = load_examples(tmp_path / "out/synthesised.jsonl")
    assert [row["question"] for row in rows] == names
    for kind in (
        "images",
        "chat",
    ):  # a kill costs what two workers had under way, and what they had not yet written down
        assert set(server.count(kind)) == set(names) and len(server.count(kind)) <= len(names) + 4


# --- filter


@pytest.mark.parametrize(
    "change, reason, number",
    [
        ({}, "", None),
        ({"response": RESPONSE.replace("<answer> red", "<answer> \\boxed{Red.}")}, "", None),
        ({"answer": "A", "options": ["red", "blue"]}, "", None),
        ({"answer": "blue"}, "answer differs from the gold answer", None),
        ({"response": RESPONSE.replace("</parser>", "")}, "tags missing or out of order", None),
        ({"response": RESPONSE + " <answer> red </answer>"}, "tags missing or out of order", None),
        ({"aux_images": []}, "spans and auxiliary images differ", 1),
        ({"aux_images": [noise(5), noise(6)]}, "spans and auxiliary images differ", -1),
        ({"question": ""}, "question is empty", None),
        ({"images": []}, "images is empty", None),
        ({"options": "ab"}, "field of another type", None),
        ({"answer": 5}, "field of another type", None),
        ({"question": "Which? <|im_end|>"}, "reserved token in the text", None),
        ({"response": "<think> Easy. </think> <answer> red </answer>", "aux_images": []}, "", None),
        (
            {"response": "<think> <latent></latent> </think> <answer> red </answer>"},
            "span without a parser text after it",
            1,
        ),
        (
            {
                "response": f"<think> <parser> {PARSER} </parser> <latent></latent> </think> <answer> red </answer>"
            },
            "span without a parser text after it",
            1,
        ),
        ({"parser": "a red bar"}, "parser too short", 3),
        ({"parser": "a red bar of five words"}, "", None),
        ({"parser": "bar " * 201}, "parser too long", 201),
        ({"parser": "first a red bar stands\n\nthen a blue one"}, "parser has empty lines", 1),
        ({"parser": "first a red bar stands\nthen a blue one"}, "", None),
        ({"parser": "a red bar stands there\na red bar stands there"}, "parser repeats lines", 1),
        (
            {"parser": "A red bar stands there. A red bar stands there. A red bar stands there."},
            "parser repeats lines",
            2,
        ),
        (
            {"parser": "图中有两个柱子红色的柱子比蓝色的柱子高一倍"},
            "parser in another script than the question",
            None,
        ),
        (
            {"parser": "图中有两个柱子红色的柱子比蓝色的柱子高一倍", "question": "哪个柱子更高？"},
            "",
            None,
        ),
        ({"parser": "Which bar is higher: which bar?"}, "parser repeats the question", 1.0),
        ({"parser": "two bars, so the answer is red"}, "parser states the answer", None),
        (
            {
                "parser": "The big red bar there.",
                "answer": "the big red bar there",
                "response": RESPONSE.replace("> red <", "> the big red bar there <"),
            },
            "parser states the answer",
            None,
        ),
        ({"parser": "a bar beside it, whose answer is unknown"}, "", None),
        (
            {"aux_images": [Image.new("RGB", (60, 60), (9, 90, 200))]},
            "auxiliary image is blank",
            0.0,
        ),
        ({"aux_images": [noise(0)]}, "auxiliary image is the query image", 0.0),
        (
            {
                "images": [noise(0, (256, 192), 16)],
                "aux_images": [
                    Image.open(
                        io.BytesIO(
                            encoded(noise(0, (256, 192), 16).resize((200, 150)), "JPEG", quality=90)
                        )
                    )
                ],
            },
            "auxiliary image is the query image",
            None,
        ),
        ({"aux_images": [noise(0, (20, 20))]}, "image too small", 20),
        ({"images": ["images/none.png"]}, "no such image", None),
    ],
)
def test_filters(stage, tmp_path, change, reason, number):
    change = dict(change)
    parser = change.pop("parser", PARSER)
    row = example(0) | change
    row["response"] = row["response"].replace(PARSER, parser)
    kept = stage("filter", "filtered", data=write_data(tmp_path, [row, example(1)]))
    rejects = read_lines(tmp_path / "out/rejects.jsonl")
    assert [r["id"] for r in kept] == ["x0"] * (not reason) + ["x1"]
    if reason:
        assert rejects[0]["id"] == "x0" and rejects[0]["reason"] == reason
        assert number is None or rejects[0]["number"] == number


def test_a_mark_on_the_query_is_no_repetition(stage, tmp_path):
    marked = noise(0, (640, 480), 16)
    query = marked.copy()
    ImageDraw.Draw(marked).ellipse((300, 200, 330, 230), outline="red", width=3)
    assert (
        len(
            stage(
                "filter",
                "filtered",
                data=write_data(tmp_path, [example(0, images=[query], aux_images=[marked])]),
            )
        )
        == 1
    )


def test_filter_by_the_tower(stage, tmp_path, base):
    """An image that the tower maps to one vector is rejected, a lively one is not; changed thresholds judge anew."""
    flat = Image.new("RGB", (112, 112), (120, 90, 60))
    settings = {
        "data": write_data(
            tmp_path, [example(0, aux_images=[flat]), example(1, aux_images=[noise(5, (112, 112))])]
        ),
        "base": str(base),
        "K": 4,
        "blank": 0.0,
    }
    assert [row["id"] for row in stage("filter", "filtered", **settings)] == ["x1"]
    (reject,) = read_lines(tmp_path / "out/rejects.jsonl")
    assert reject["reason"] == "auxiliary embeddings hardly vary" and reject["number"] < 1e-3
    assert len(stage("filter", "filtered", **settings | {"degenerate": 0.0})) == 2


def test_filter_drops_broken_lines_and_repeated_ids(stage, tmp_path):
    data = write_data(tmp_path, [example(0), example(0), example(1)])
    with open(data, "a") as f:
        f.write('{"id": "x7"\n[1]\n')
    assert [row["id"] for row in stage("filter", "filtered", data=data)] == ["x0", "x1"]
    rejects = read_lines(tmp_path / "out/rejects.jsonl")
    assert [r["id"] for r in rejects] == ["x0", "rows.jsonl:4", "rows.jsonl:5"]
    assert {r["reason"] for r in rejects} == {
        "unreadable or repeated"
    } and "occurs before" in rejects[0]["detail"]


# --- audit


def photo(seed, size=(200, 150)):
    """An image with the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    n = max(size)
    f = np.fft.fftfreq(n)
    radius = np.hypot(f[:, None], f[None])
    radius[0, 0] = 1
    grey = rng.normal(size=(n, n))
    x = [
        np.fft.ifft2(np.fft.fft2(grey + 0.3 * rng.normal(size=(n, n))) / radius).real
        for _ in range(3)
    ]
    x = np.stack([c / c.std() * 50 + 128 for c in x], -1)[: size[1], : size[0]]
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def bars(seed, size=(240, 180)):
    """A bar chart."""
    rng, image = random.Random(seed), Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for x in range(20, 200, 25):
        draw.rectangle(
            (x, rng.randint(10, 160), x + 18, 165), fill=tuple(rng.randrange(256) for _ in range(3))
        )
    draw.line((15, 5, 15, 166, 230, 166), fill="black", width=2)
    return image


def cropped(image, left, top, right, bottom):
    w, h = image.size
    return image.crop(
        (round(left * w), round(top * h), w - round(right * w), h - round(bottom * h))
    )


EDITS = {
    "recompressed": lambda i: Image.open(io.BytesIO(encoded(i, "JPEG", quality=30))),
    "halved": lambda i: i.resize((i.width // 2, i.height // 2)),
    "doubled": lambda i: i.resize((2 * i.width, 2 * i.height)),
    "cropped": lambda i: cropped(i, 0.01, 0.01, 0.01, 0.01),
    "cropped left": lambda i: cropped(i, 0.02, 0, 0, 0),
    "cropped below": lambda i: cropped(i, 0, 0, 0, 0.02),
    "all": lambda i: Image.open(
        io.BytesIO(encoded(cropped(i.resize((160, 120)), 0.01, 0, 0.01, 0), "JPEG", quality=50))
    ),
}


def plant(tmp_path, make, n=10):
    """A test set of n images, and training rows with an edit of each, an exact copy in another encoding, and others."""
    tests = [make(seed) for seed in range(n)]
    folder = tmp_path / "bench"
    with open(saved(folder / "0.png", tests[0]).parent / "test.jsonl", "w") as f:
        for n, image in enumerate(tests):
            saved(folder / f"{n}.png", image)
            f.write(
                json.dumps(
                    {
                        "id": f"t{n}",
                        "images": [f"{n}.png"],
                        "question": f"How many in {n}?",
                        "answer": "5",
                    }
                )
                + "\n"
            )
    rows = [
        example(id=f"x-{name}-{n}", images=[edit(image)], aux_images=[make(5000 + 100 * n + k)])
        for n, image in enumerate(tests)
        for k, (name, edit) in enumerate(EDITS.items())
    ]
    return str(folder / "test.jsonl"), tests, rows


@pytest.mark.parametrize("make", [photo, bars])
def test_audit_finds_planted_duplicates(stage, tmp_path, make):
    bench, tests, rows = plant(tmp_path, make)
    webp = Image.open(io.BytesIO(encoded(tests[3], "WEBP", lossless=True)))
    exact = [
        example(id="x-webp", images=[webp], aux_images=[make(900)]),
        example(id="x-aux", images=[make(901)], aux_images=[tests[4]]),
        example(
            id="x-asked", images=[make(902)], aux_images=[make(903)], question=" how many in 7 ?"
        ),
    ]
    clean = [
        example(id=f"x-clean-{n}", images=[make(1000 + n)], aux_images=[make(2000 + n)])
        for n in range(30)
    ]
    kept = stage(
        "audit", "audited", data=write_data(tmp_path, rows + exact + clean), benchmarks=bench
    )
    found = read_lines(tmp_path / "out/audit.jsonl")
    assert {(f["kind"], f["id"], f["benchmark_id"]) for f in found if f["kind"] != "near"} == {
        ("pixels", "x-webp", "t3"),
        ("pixels", "x-aux", "t4"),
        ("question", "x-asked", "t7"),
    }
    assert {row["id"] for row in kept} == {
        row["id"] for row in rows + clean
    }  # near pairs are for a person to judge
    near = {(f["id"], f["benchmark_id"]) for f in found if f["kind"] == "near"}
    wanted = {(row["id"], f"t{row['id'].rsplit('-', 1)[1]}") for row in rows}
    assert near == wanted, (near - wanted, wanted - near)
    page = (tmp_path / "out/audit.html").read_text()
    assert page.count("<article>") == len(near) and page.count(
        'src="data:image/jpeg;base64,'
    ) == 2 * len(near)
    kept = stage("audit", "audited", drop="near")
    assert {row["id"] for row in kept} == {row["id"] for row in exact + clean}


def test_audit_reads_official_files(stage, tmp_path):
    """Against a benchmark's own table: its images are embedded, and its question is the one without the prompt around it."""
    cells = [base64.b64encode(encoded(photo(n), "JPEG")).decode() for n in range(3)]
    lines = [f"{n}\t{cell}\tIs there a dog in {n}?\tYes\trandom\n" for n, cell in enumerate(cells)]
    (tmp_path / "POPE.tsv").write_text(
        "index\timage\tquestion\tanswer\tcategory\n" + "".join(lines)
    )
    decoded = Image.open(io.BytesIO(encoded(photo(1), "JPEG")))
    rows = [
        example(0, images=[decoded], aux_images=[photo(10)]),
        example(1, images=[photo(11)], aux_images=[photo(12)]),
        example(2, images=[photo(13)], aux_images=[photo(14)], question="Is there a dog in 2?"),
    ]
    kept = stage(
        "audit",
        "audited",
        data=write_data(tmp_path, rows),
        benchmarks="POPE",
        data_root=str(tmp_path),
    )
    found = {
        (f["kind"], f["id"], f["benchmark_id"]) for f in read_lines(tmp_path / "out/audit.jsonl")
    }
    assert found == {("pixels", "x0", "1"), ("question", "x2", "2")} and [
        row["id"] for row in kept
    ] == ["x1"]


def test_false_positives_on_random_images():
    """Among 300 x 300 pairs of unrelated photographs none is near, and the nearest is far: about 6 sigma of 255 coin tosses."""
    prints = [b.fingerprint(photo(seed, (64, 64))) for seed in range(600)]
    distance, _ = b.nearest(prints[:300], prints[300:])
    assert distance.min() > b.near + 20
    flat = [b.fingerprint(Image.new("RGB", (64, 64), colour)) for colour in ("white", "red")]
    assert b.nearest(flat, prints)[0].min() > b.near and b.nearest(flat[:1], flat[1:])[0] == [0]


def test_nearest_against_counting_bits():
    rng = random.Random(0)
    ours, theirs = ([("", f"{rng.getrandbits(256):064x}") for _ in range(n)] for n in (37, 21))
    distance, index = b.nearest(ours, theirs, block=8)
    counted = [[(int(x, 16) ^ int(y, 16)).bit_count() for _, y in theirs] for _, x in ours]
    assert distance.tolist() == [min(c) for c in counted] and index.tolist() == [
        c.index(min(c)) for c in counted
    ]


def test_audit_reads_an_image_once(stage, tmp_path, monkeypatch):
    """A second audit decodes nothing again but for the page, and refuses what it can not do."""
    bench, _, rows = plant(tmp_path, bars, 2)
    data = write_data(tmp_path, rows)
    stage("audit", "audited", data=data, benchmarks=bench)
    monkeypatch.setattr(b, "fingerprint", None)
    stage("audit", "audited", data=data, benchmarks=bench)
    with pytest.raises(SystemExit, match="drop='pixel'"):
        stage("audit", drop="pixel")
    with pytest.raises(SystemExit, match="benchmarks=''"):
        stage("audit", drop="near", benchmarks="")


# --- split, composition, sheet


def test_split_shares_no_image(stage, tmp_path, capsys):
    """Chains of shared images stay on one side, also where the same pixels are encoded in two ways."""
    rng = random.Random(3)
    pool = [noise(n) for n in range(60)]
    rows = [
        example(
            n,
            images=[rng.choice(pool)],
            aux_images=[rng.choice(pool + [noise(100 + n)] * 120)],
            category=["monet_Visual_CoT", "geo_3k", "own"][n % 3],
        )
        for n in range(200)
    ]
    rows[5]["images"] = [Image.open(io.BytesIO(encoded(pool[0], "WEBP", lossless=True)))]
    data = write_data(tmp_path, rows)
    train, val = stage("split", "train", data=data), read_lines(tmp_path / "out/val.jsonl")
    assert (
        sorted(r["id"] for r in train + val) == sorted(r["id"] for r in rows)
        and 15 <= len(val) <= 20
    )
    seen = [
        {
            pixels(tmp_path / "out" / p).tobytes()
            for row in part
            for p in row["images"] + row["aux_images"]
        }
        for part in (train, val)
    ]
    assert not seen[0] & seen[1]
    for name in ("train", "val"):
        load_examples(tmp_path / "out" / f"{name}.jsonl")
    table = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    counted = [sum(r["category"] == "geo_3k" for r in part) for part in (train, val)]
    assert table["Geometry3K"] == [
        "1082",
        "656",
        "79",
        "253",
        *map(str, counted),
        str(sum(counted)),
    ]
    assert table["all"] == [
        "49309",
        "33279",
        "3706",
        "23548",
        str(len(train)),
        str(len(val)),
        "200",
    ]
    assert table["own"][-1] == str(sum(r["category"] == "own" for r in train + val))
    assert list(table).index("Visual CoT") < list(table).index("chart") < list(table).index("GEOQA")
    first = stage("split", "val", data=data)
    assert first == val and stage("split", "val", data=data, seed=1) != val


class Page(HTMLParser):
    """What a page loads, runs and shows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        self.open += [dict(attrs).get("class", "")] * (tag == "span")

    def handle_endtag(self, tag):
        if tag == "span":
            self.open.pop()

    def handle_data(self, data):
        self.text += data


EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> Which & why?"


def test_sheet(stage, tmp_path):
    """One self-contained file; markup in the data is shown, not obeyed; every tag has its colour."""
    red = Image.new("RGB", (200, 120), (250, 10, 20))
    rows = [
        example(n, images=[red], question=EVIL, response=RESPONSE.replace("So red.", f"So {EVIL}"))
        for n in range(5)
    ]
    sheet = tmp_path / "sheet.html"
    stage("sheet", data=write_data(tmp_path, rows), sheet=str(sheet), n_sheet=3)
    page = Page(sheet.read_text())
    assert (
        page.tags.count("article") == 3
        and page.tags.count("img") == 6
        and "script" not in page.tags
    )
    assert (
        all(s.startswith("data:image/jpeg;base64,") for s in page.sources)
        and page.text.count(EVIL) == 6
        and not page.open
    )
    for name in ("think", "latent", "parser", "answer"):
        assert page.text.count(f"<{name}>") == page.text.count(f"</{name}>") == 3
        assert (
            sheet.read_text().count(f'<span class="{name}">') == 3
            and f".{name}{{" in sheet.read_text()
        )


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_sheet_in_a_browser(stage, tmp_path):
    red = Image.new("RGB", (200, 120), (250, 10, 20))
    sheet, picture = tmp_path / "sheet.html", tmp_path / "page.png"
    stage(
        "sheet",
        data=write_data(tmp_path, [example(0, images=[red], question=EVIL)]),
        sheet=str(sheet),
    )
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [*command, f"--screenshot={picture}", "--window-size=1000,900", sheet.as_uri()],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = np.abs(pixels(picture).astype(int) - (250, 10, 20)).max(-1) <= 4
    assert shown.sum() >= 0.98 * 200 * 120  # the query image is drawn
    done = subprocess.run(
        [*command, "--dump-dom", sheet.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (
        "1 of 1 examples" in done.stdout.split("<title>")[1].split("</title>")[0]
    )  # no script has changed it


# --- settings


def test_usage(stage, tmp_path):
    for args, message in (
        (["fetch"], "usage: python build_data.py convert"),
        (["split", "--nosuch=1"], "unknown setting"),
    ):
        done = subprocess.run(
            [sys.executable, str(ROOT / "build_data.py"), *args],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(SystemExit, match="names no file"):
        stage("filter")
    with pytest.raises(SystemExit, match="no such file"):
        stage("split", data=str(tmp_path / "out/none.jsonl"))


def test_from_sources_to_training_files_on_the_toy(tmp_path, world):
    """The README's order of commands, as a user runs them: convert, filter, audit, split, sheet."""

    def run(*args):
        done = subprocess.run(
            [sys.executable, str(ROOT / "build_data.py"), *args, f"--out={tmp_path}"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("convert", "--source=teacher", f"--files={world}/train.jsonl", "--label=toy")
    assert "kept 47 of 48" in run(
        "filter", f"--data={tmp_path}/toy.jsonl"
    )  # one parser text is "again"
    run("audit", f"--data={tmp_path}/filtered.jsonl", f"--benchmarks={world}/test.jsonl")
    run("split", f"--data={tmp_path}/audited.jsonl")
    run("sheet", f"--data={tmp_path}/train.jsonl", "--sheet", f"{tmp_path}/sheet.html")
    ours = load_examples(tmp_path / "train.jsonl") + load_examples(tmp_path / "val.jsonl")
    source = {
        json.dumps([r["question"], r["answer"], r["response"]]): r
        for r in load_examples(world / "train.jsonl")
    }
    for row in ours:
        old = source[json.dumps([row["question"], row["answer"], row["response"]])]
        for new, was in zip(
            row["images"] + row["aux_images"], old["images"] + old["aux_images"], strict=True
        ):
            assert (pixels(new) == pixels(was)).all()
