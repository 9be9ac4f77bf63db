"""Converters on each source's real layout, and files that are damaged or hostile."""

import base64
import io
import json
import sys
import weakref

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import RESPONSE, convert, encoded, noise, pixels, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import build_data as b
import sources
from files import read_lines
from resume import Reject


def test_monet(stage, tmp_path):
    query = saved(tmp_path / "src/images/q.jpg", noise(1))
    aux = saved(tmp_path / "src/images/a.png", noise(2))

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
    assert kept[0]["category"] == "monet_Zebra_CoT_count"
    assert sources.source_of(kept[0]["category"]) == "Zebra-CoT count"
    assert kept[0]["response"] == (
        "<think> Look closer. <latent></latent>\n<parser>two of them</parser> "
        "So \\boxed{\\text{B}}. </think> <answer> B </answer>"
    )
    assert (tmp_path / "out" / kept[0]["images"][0]).read_bytes() == query.read_bytes()
    assert (tmp_path / "out" / kept[0]["aux_images"][0]).read_bytes() == aux.read_bytes()
    assert [(r["reason"], r["number"]) for r in rejects] == [
        ("spans and auxiliary images differ", 1),
        ("no \\boxed answer", None),
        ("another layout than the source's", None),
    ]


def monet_item(question, reply, n_images=1):
    images = [{"type": "image", "image": f"{n}.png"} for n in range(n_images)]
    asked = {"role": "user", "content": [*images, {"type": "text", "text": question}]}
    parts = [{"type": "text", "text": reply}, {"type": "image", "image": "aux.png"}]
    data = [asked, {"role": "assistant", "content": parts}]
    return {"metadata": {"dataset_name": "x"}, "data": data}


BOX = "within \\boxed{}."


@pytest.mark.parametrize(
    "asked",
    [
        f"How many?\nPut your final answer {BOX}",
        f"How many?\nPut your final answer {BOX} If you cannot see relevant visual information to "
        "infer the answer from the image, just output \\boxed{None} and don't guess the answer.",
        "How many?\nPut the letter of your choice within \\boxed{}.",
        "How many?\nGiven the answer in a single word and put it within \\boxed{}.",
        f"Put your final answer {BOX}\nHow many?",
    ],
)
def test_monet_asks_for_a_box_and_we_do_not(asked):
    item = monet_item(asked, "<abs_vis_token></abs_vis_token> So \\boxed{3}.")
    assert sources.from_monet(item)["question"] == "How many?"


def test_monet_questions_of_several_images():
    span = "<abs_vis_token></abs_vis_token>"
    item = monet_item(f"Is {span} in {span}?", f"{span} \\boxed{{no}}", n_images=2)
    row = sources.from_monet(item)
    assert row["question"] == "Is <image> in <image>?" and row["images"] == ["0.png", "1.png"]


def test_what_monet_observes_before_a_picture_reads_none():
    text = "<observation>A table.</observation> Zoom: <abs_vis_token></abs_vis_token>"
    row = sources.from_monet(monet_item("?", f"{text} <observation>25%</observation> \\boxed{{2}}"))
    assert row["response"] == (
        "<think> A table. Zoom: <latent></latent> <parser>25%</parser> \\boxed{2} </think> "
        "<answer> 2 </answer>"
    )


def test_a_zebra_name_without_its_tags_is_a_word_where_others_have_them():
    trace = "See <image_start>[reasoning_image_1]<image_end>. As [reasoning_image_1] shows, C."
    item = {"Question": "?", "Final Answer": "C", "Text Reasoning Trace": trace}
    row = sources.from_zebra(item | {"reasoning_image_1": "a"})
    assert row["aux"] == ["a"] and row["response"].count("<latent>") == 1


@pytest.mark.parametrize(
    "cell, answer",
    [
        ("<answer> 145° </answer>", "145°"),
        ("Since x = 3, \\boxed{3}", "3"),
        ("B", "B"),
        ("We add both sides, and so it is 3", None),
    ],
)
def test_an_answer_may_stand_in_a_solution(cell, answer):
    item = {"image": "1.png", "problem": "x?", "solution": cell}
    if answer is None:
        with pytest.raises(Reject) as e:
            sources.from_table(item, questions_alone=True)
        assert e.value.reason == "no answer"
        response = "<think> x </think> <answer> 3 </answer>"
        assert sources.from_table(item | {"response": response})["answer"] == "3"
    else:
        assert sources.from_table(item, questions_alone=True)["answer"] == answer
    long = "a sign of red and white that says stop"
    assert sources.from_table(item | {"answer": long}, questions_alone=True)["answer"] == long


def test_boxes(stage, tmp_path, monkeypatch):
    """Visual-CoT in both of its layouts, and LVR, give the crop that the box says."""
    image = noise(3, (200, 100))
    saved(tmp_path / "src/cot/flickr30k/1.png", image)
    monkeypatch.setattr(b, "crop_side", 1)  # nothing is enlarged
    ask = (
        " Please provide the bounding box coordinate of the region that can help you answer "
        "the question better."
    )
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
        "bboxs": [[80, 40, 100, 160], [90, 50, 240, 60]],  # their hull
        "dataset": "flickr30k",
        "split": "train",
    }
    for items, name in (([llava], "viscot_363k.json"), ([meta], "flickr30k_cot_train.jsonl")):
        (row,), rejects = convert(stage, tmp_path, "viscot", items, name)
        assert not rejects
        assert row["question"] == "Which colour?" and row["category"] == "Visual_CoT"
        assert row["response"] == "<think> <latent></latent> </think> <answer> It is red. </answer>"
        crop = pixels(tmp_path / "out" / row["aux_images"][0])
        assert (crop == pixels(image)[8:92, 24:136]).all()
    # visual7w's pictures lie elsewhere, and its questions have options
    saved(tmp_path / "src/cot/v7w/1.png", image)
    choices = ["It is blue.", "It is green.", "It is grey."]
    v7w = meta | {"dataset": "visual7w", "multiple_choices": choices}
    (row,), rejects = convert(stage, tmp_path, "viscot", [v7w], "visual7w_cot_train.jsonl")
    assert not rejects and sorted(row["options"]) == sorted([*choices, "It is red."])
    assert [option for option in row["options"] if option in choices] == choices
    monkeypatch.setattr(b, "crop_side", 224)
    (row,), _ = convert(stage, tmp_path, "viscot", [llava])
    assert Image.open(tmp_path / "out" / row["aux_images"][0]).size == (224, 168)
    (row,), _ = convert(stage, tmp_path, "viscot", [llava], draw="outline")
    drawn = pixels(tmp_path / "out" / row["aux_images"][0])
    outline = np.zeros((100, 200), bool)
    outline[20:80, 40:120] = True
    outline[22:78, 42:118] = False
    assert (drawn[outline] == (255, 0, 0)).all()
    assert (drawn[~outline] == pixels(image)[~outline]).all()

    lvr = {
        "dataset": "gqa",
        "image": [path],
        "bboxes": [[0.2, 0.2, 0.6, 0.8]],
        "conversations": [
            {"from": "human", "value": "<image>\nWhich colour?\nShort."},
            {"from": "gpt", "value": "<lvr>\n<answer> red </answer>"},
        ],
    }
    bad_boxes = [
        [[0.2, 0.2, 0.6]],
        [[0.5, 0.5, 0.5, 0.5]],
        [[float("nan")] * 4],
        [["a"] * 4],
        [5],
        5,
        [],
        [[0, 0, 0.5, 0.5]] * 2,
        [[1e300, 5, 1e301, 9]],
        [[0.04, 0.03, 4.0, 4.0]],  # read as pixels it would be a corner
        [[-3.0, 0.1, 0.5, 0.5]],
        [[True, None, 1, 1]],
    ]
    bad = [lvr | {"bboxes": boxes} for boxes in bad_boxes]
    kept, rejects = convert(stage, tmp_path, "lvr", [lvr, *bad], draw="crop", crop_side=1)
    assert len(kept) == 1 and len(rejects) == len(bad) and kept[0]["answer"] == "red"
    assert kept[0]["response"] == "<think> <latent></latent> </think> <answer> red </answer>"
    crop = pixels(tmp_path / "out" / kept[0]["aux_images"][0])
    assert (crop == pixels(image)[8:92, 24:136]).all()


def test_a_margin_never_makes_a_crop_the_whole_picture(monkeypatch):
    """It shrinks where it would; a box keeps its own pixels, and shares just above 1 are cut."""
    image = noise(3, (200, 100))
    monkeypatch.setattr(b, "crop_side", 1)
    whole = 200 * 100
    rng = np.random.default_rng(0)
    for _ in range(300):
        x1, x2 = np.sort(rng.uniform(0, 1.002, 2))
        y1, y2 = np.sort(rng.uniform(0, 1.002, 2))
        if min((x2 - x1) * 200, (y2 - y1) * 100) < 28:
            continue
        part = b.stand_in(image, sources.Box(x1, y1, x2, y2, True))
        box = min(200, x2 * 200) - x1 * 200, min(100, y2 * 100) - y1 * 100
        assert part.width >= box[0] - 1 and part.height >= box[1] - 1
        area = part.width * part.height
        assert area <= 0.8 * whole or area <= (box[0] + 1) * (box[1] + 1)
        # with room for it, all of the margin is there
        if 1.4 * box[0] < 0.8 * 200 and 1.4 * box[1] < 100 and x1 > 0.3 < y1 and x2 < 0.7 > y2:
            assert abs(part.width - 1.4 * box[0]) <= 2


TALK = "Look closer. <image> It is red. \\boxed{red}"


def chats():
    """{layout: the same chat in it}, with pictures q.png of the question and a.png of the reply."""
    q, a = "q.png", "a.png"
    ask = "<image>\nWhich colour?"
    parts = [{"type": "image", "image": q}, {"type": "text", "text": "Which colour?"}]
    reply = [
        {"type": "text", "text": "Look closer. "},
        {"type": "image_url", "image_url": {"url": a}},
        {"type": "text", "text": " It is red. \\boxed{red}"},
    ]
    cell = {"bytes": base64.b64encode(encoded(noise(1))).decode(), "path": None}
    mirage = {"image_input": [q], "image_output": [a], "text_input": "Which colour?"}
    return {
        "ShareGPT": {
            "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": TALK}],
            "images": [q, a],
        },
        "LLaVA, one image": {
            "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": "red"}],
            "image": q,
        },
        "messages": {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": ask},
                {"role": "assistant", "content": TALK},
                {"role": "user", "content": "Thanks."},
            ],
            "images": [cell, a],
        },
        "parts": {
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": reply},
            ],
        },
        "marks in the text": {
            "query": f"<img>{q}</img>Which colour?",
            "response": TALK.replace("<image>", f'<img src="{a}">'),
            "history": [],
        },
        "no mark of the query": {"query": "Which colour?", "response": TALK, "images": [q, a]},
        "Mirage": mirage | {"text_output": TALK.replace("<image>", "<output_image>")},
    }


@pytest.mark.parametrize("layout", chats())
def test_chats(stage, tmp_path, layout):
    """Each layout of a chat gives the same example."""
    saved(tmp_path / "src/q.png", noise(1))
    saved(tmp_path / "src/a.png", noise(2))
    (row,), rejects = convert(stage, tmp_path, "chat", [chats()[layout]])
    assert not rejects and row["question"].replace("<image>", "").strip() == "Which colour?"
    assert row["answer"] == "red" and row["response"].endswith("<answer> red </answer>")
    assert (pixels(tmp_path / "out" / row["images"][0]) == pixels(noise(1))).all()
    if layout == "LLaVA, one image":
        assert row["response"] == "<think>  </think> <answer> red </answer>"
        assert row["aux_images"] == []
        return
    assert "Look closer. <latent></latent> It is red." in row["response"]
    assert (pixels(tmp_path / "out" / row["aux_images"][0]) == pixels(noise(2))).all()


def test_chats_of_several_turns_and_damaged_ones(stage, tmp_path):
    saved(tmp_path / "src/q.png", noise(1))
    saved(tmp_path / "src/a.png", noise(2))
    more = {
        "query": "And <image>?",
        "response": "<think> Now <image> </think> <answer> B </answer>",
        "history": [["What is <image>?", "A cat."]],
        "images": ["q.png", "q.png", "a.png"],
        "choices": ["cat", "dog"],
    }
    damaged = [
        more | {"images": ["q.png"]},
        more | {"images": ["q.png"] * 4},
        more | {"history": [["one of two"]]},
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": []},
        {"messages": [{"role": "user", "content": None}]},
        {"query": "no reply", "response": None},
        {"text": "another layout"},
    ]
    (row,), rejects = convert(stage, tmp_path, "chat", [more, *damaged])
    assert len(rejects) == len(damaged)
    assert row["question"] == "User: What is <image>?\nAssistant: A cat.\nUser: And <image>?"
    assert len(row["images"]) == 2 and len(row["aux_images"]) == 1 and row["answer"] == "B"
    assert row["response"] == "<think> Now <latent></latent> </think> <answer> B </answer>"
    assert row["options"] == ["cat", "dog"]


def as_files(items):
    """The same items as each kind of file has them: {name: bytes}."""
    lines = "".join(json.dumps(item) + "\n" for item in items)
    table = io.BytesIO()
    cells = [[dict(c, bytes=base64.b64decode(c["bytes"])) for c in x["images"]] for x in items]
    # parquet has no other kind of picture
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([x | {"images": c} for x, c in zip(items, cells)]), table
    )
    return {
        "list.json": json.dumps(items).encode(),
        "lines.jsonl": lines.encode(),
        "wrapped.json": json.dumps({"info": "1.0", "data": items}, indent=1).encode(),
        "table.parquet": table.getvalue(),
    }


def test_items_are_the_same_in_every_kind_of_file(stage, tmp_path, monkeypatch):
    """A list, lines, a list in an object, parquet; an object a file."""
    cell = {"bytes": base64.b64encode(encoded(noise(1))).decode(), "path": "elsewhere.png"}
    chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}]
    items = [{"id": f"i{n}", "images": [cell], "messages": chat} for n in range(3)]
    src = tmp_path / "src"
    src.mkdir()
    for n, (name, content) in enumerate(as_files(items).items()):
        (src / name).write_bytes(content)
        rows = stage("convert", f"of{n}", source="chat", files=str(src / name), label=f"of{n}")
        assert [row["id"] for row in rows] == ["i0", "i1", "i2"], name
        assert (pixels(tmp_path / "out" / rows[0]["images"][0]) == pixels(noise(1))).all()
    for n, item in enumerate(items):
        (src / f"one-{n}.json").write_text(json.dumps(item, indent=2))
    rows = stage("convert", "one", source="chat", files=str(src / "one-*.json"), label="one")
    assert [row["id"] for row in rows] == ["i0", "i1", "i2"]

    (src / "cut.parquet").write_bytes((src / "table.parquet").read_bytes()[:-20])
    stage("convert", "cut", source="chat", files=str(src / "cut.parquet"), label="cut")
    (reject,) = read_lines(tmp_path / "out/rejects.cut.jsonl")
    assert "not readable parquet" in reject["detail"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    stage("convert", "bare", source="chat", files=str(src / "table.parquet"), label="bare")
    (reject,) = read_lines(tmp_path / "out/rejects.bare.jsonl")
    assert "pip install pyarrow" in reject["detail"]


def test_zebra(stage, tmp_path):
    saved(tmp_path / "src/p1.png", noise(1))
    bytes_cell = {"bytes": base64.b64encode(encoded(noise(2))).decode(), "path": "elsewhere.png"}
    item = {
        "Question": "Where? <image_start>[problem_image_1]<image_end>",
        "Final Answer": "C",
        "Text Reasoning Trace": "THOUGHT 0: Draw it.\n"
        "<image_start>[reasoning_image_1]<image_end>\n"
        "THOUGHT 1: And again <image_start>[reasoning_image_2]<image_end> so C.",
        "problem_image_1": "p1.png",
        "problem_image_2": bytes_cell,
        "problem_image_3": None,
        "reasoning_image_1": bytes_cell,
        "reasoning_image_2": "p1.png",
    }
    items = [item, item | {"reasoning_image_2": None}, {"Question": "x"}]
    items.append(item | {"reasoning_image_3": "p1.png"})  # nobody says what it shows
    kept, rejects = convert(stage, tmp_path, "zebra", items, "z.jsonl")
    assert len(kept) == 1 and len(rejects) == 3
    assert rejects[2]["reason"] == "image that the trace does not name"
    assert kept[0]["question"] == "Where?" and kept[0]["answer"] == "C"
    first, second = (pixels(tmp_path / "out" / p) for p in kept[0]["images"])
    assert (first == pixels(noise(1))).all() and (second == pixels(noise(2))).all()
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
    other = {"data_source": "x", "image": "0.png", "question": "?", "thoughts": 1}
    found = "'response': looked for .*teacher_response.*found data_source, image, question, th"
    with pytest.raises(SystemExit, match=found):
        convert(stage, tmp_path, "gap", [other], name="o.json")

    in_latent = raw.replace("<|vision_start|>", "<latent> <|vision_start|>")
    in_latent = in_latent.replace("<|vision_end|>", "<|vision_end|> </latent>")
    texts = [
        "```\n" + raw + "\n```<|im_end|>",
        in_latent,
        raw.replace("</think>", ""),
        raw.replace("<answer>", "<answer> <think>"),
        RESPONSE.replace("<latent></latent>", "<latent>words</latent>"),
        "just words",
        raw + " <|im_start|>user</answer>",
        "",
    ]
    item = {"images": ["0.png"], "question": "Which?", "answer": "red", "aux_images": ["1.png"]}
    items = [item | {"raw": text} for text in texts]
    kept, rejects = convert(stage, tmp_path, "teacher", items, "t.jsonl")
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


def test_hostile_text(stage, tmp_path):
    """Truncated JSON, other encodings, endless brackets: what is whole before damage is kept."""
    saved(tmp_path / "src/ok.png", noise(1))
    item = {
        "images": ["ok.png"],
        "question": "Which?",
        "answer": "red",
        "response": "<think> x </think> <answer> red </answer>",
    }
    text = json.dumps(item)
    line = text.encode()

    def outcome(content, name):
        """How many items of a file are kept, and where the others stand."""
        path = tmp_path / "src" / name
        path.write_bytes(content)
        settings = {"source": "teacher", "label": name, "root": ""}
        kept = stage("convert", name, files=str(path), **settings)
        rejects = read_lines(tmp_path / f"out/rejects.{name}.jsonl")
        return len(kept), [r["id"].split("/")[1] for r in rejects]

    cut = f"\ufeff{text}\n{text[:40]}\n{text}".encode()
    for n, nothing in enumerate((b"", b"\n\n", "\ufeff".encode())):
        assert outcome(nothing, f"empty{n}.jsonl") == (0, [])
    assert outcome(f"\ufeff\n{text}\n{text}".encode(), "mark.jsonl") == (2, [])
    assert outcome(f"[{text},\n {text[:-30]}".encode(), "cut.json") == (1, ["cut.json:2"])
    assert outcome(f"[{text}, {text}".encode(), "open.json") == (2, ["open.json:3"])
    assert outcome(cut, "cut.jsonl") == (2, ["cut.jsonl:2"])
    indented = json.dumps({"data": [item, item]}, indent=1).encode()
    assert outcome(indented, "whole.json") == (2, [])
    assert outcome(indented[:-9], "object.json") == (0, ["object.json:1"])
    latin = line.replace(b"Which?", b"O\xf9?")
    assert outcome(latin + b"\n" + line, "latin.jsonl") == (1, ["latin.jsonl:1"])
    assert outcome(b"[" + latin + b"," + line + b"]", "latin.json") == (1, ["latin.json:1"])
    assert outcome(text.encode("utf-16"), "utf16.jsonl")[0] == 0
    half = line.replace(b"Which", b"\\ud800")
    assert outcome(half + b"\n" + line, "half.jsonl") == (1, ["half.jsonl:1"])
    deep = "\n".join('{"a":' + "[" * n + "]" * n + "}" for n in (400, 490, 900, 980, 10**5))
    assert outcome(f"{deep}\n{text}".encode(), "deep.jsonl")[0] == 1
    types = b'{"question": NaN}\n5\nnull\n[]\n"x"\n'
    wrong = [f"types.jsonl:{n}" for n in range(1, 6)]
    assert outcome(types + line, "types.jsonl") == (1, wrong)
    with pytest.raises(SystemExit, match="matches no file"):
        stage("convert", source="teacher", files=str(tmp_path / "none*"))
    with pytest.raises(SystemExit, match="not a name for a file"):
        stage("convert", label="../elsewhere")
    with pytest.raises(SystemExit, match="source=''"):
        stage("convert", source="")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"[", b'[{"a": 1}, ', b'{"a": 1}\n']))
def test_damaged_text_never_crashes(tmp_path_factory, tail, head):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(head + tail)
    for _, item, error in sources.read_items(path):
        assert error or json.dumps(item, ensure_ascii=False).encode() is not None


def test_a_sources_items_are_never_all_in_memory(stage, tmp_path, monkeypatch):
    """They may hold their pictures: 59 GB of them in Zebra-CoT."""

    class Item(dict):
        __hash__ = object.__hash__  # as a weak set asks for

    alive, most = weakref.WeakSet(), 0

    def read_many(path):
        nonlocal most
        for n in range(1, 201):
            item = Item(id=n % 150, image="none.png", question="Which?", answer="A")
            alive.add(item)
            most = max(most, len(alive))
            yield n, item, ""

    path = tmp_path / "src.jsonl"
    path.touch()
    monkeypatch.setattr(b, "read_items", read_many)
    rejects = {}
    for limit in (0, 40):
        stage("convert", source="qa", files=str(path), workers=1, limit=limit)
        rejects[limit] = [line["id"] for line in read_lines(tmp_path / "out/rejects.qa.jsonl")]
    ids = [str(n) if 50 < n < 150 else f"qa/src.jsonl:{n}" for n in range(1, 201)]
    ids = [id.replace("qa/src.jsonl:150", "0") for id in ids]
    assert rejects[0] == ids and most < 10
    assert len(rejects[40]) == 40 and rejects[40] == sorted(rejects[40], key=ids.index)


def test_a_parquet_tables_pictures_are_never_all_in_memory(tmp_path):
    path, held = tmp_path / "x.parquet", []
    table = pyarrow.table({"id": ["0"], "picture": [b""]})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        for n in range(100):
            picture = np.random.default_rng(n).bytes(50_000)
            writer.write_table(pyarrow.table({"id": [f"{n}"], "picture": [picture]}))
    before = pyarrow.total_allocated_bytes()
    for n, item, _ in sources.read_items(path):
        assert item["id"] == f"{n - 1}"
        held.append(pyarrow.total_allocated_bytes() - before)
    assert len(held) == 100 and max(held) < path.stat().st_size / 2
    assert base64.b64decode(item["picture"]) == picture


def chat(asked, reply, **more):
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return sources.from_chat({"messages": turns} | more)


def test_the_gold_answer_of_a_chat_is_the_files_own():
    """Else the reply's, after its thought; check_answer holds the reply against the file's."""
    assert chat("Which?", r"so \boxed{4}", answer="5")["answer"] == "5"
    assert chat("How many?", "None at all", answer=0)["answer"] == "0"
    tagged = r"<think> \boxed{3} </think> <answer> B </answer>"
    assert chat("Which?", tagged)["answer"] == "B"


def test_a_reply_with_half_of_the_tags_is_a_response():
    found = chat("Which?", "It is red. <answer>red</answer>")
    assert found["response"] == "<think> It is red. </think> <answer> red </answer>"
    found = chat("Which?", "<think> I look. </think> It is red.")
    assert found["response"] == "<think> I look. </think> <answer> It is red. </answer>"


def test_a_picture_in_a_chat_may_have_any_name():
    odd = 'dog\'s "best" <1> & 2.png'
    asked = [{"type": "image", "image": odd}, {"type": "text", "text": "Which?"}]
    reply = [{"type": "text", "text": "See "}, {"type": "image", "image": "it's.png"}]
    found = chat(asked, reply)
    assert (found["images"], found["question"]) == ([odd], "<image>Which?")
    assert found["aux"] == ["it's.png"] and "See <latent></latent>" in found["response"]
    for mark in ('<img src="b c\'s.png"/>', "<img>b c's.png</img>"):
        assert chat(f"{mark}What?", "red")["images"] == ["b c's.png"]


@pytest.mark.parametrize(
    "options",
    [
        ["red", "blue"],
        "['red', 'blue']",
        {"A": "red", "B": "blue"},
        ("red", "blue"),
        ["red", "blue", None],
        {"A": "red", "B": "blue", "C": None},
    ],
)
def test_options_are_read_in_every_layout(options):
    assert sources.with_options({}, options) == {"options": ["red", "blue"]}


@pytest.mark.parametrize(
    "options",
    [
        "red",
        "red; blue",
        pytest.param("[" * 10**5, id="deep"),
        ["red"],
        "['red' 'blue']",
        [float("nan"), "red"],
        {"A": "red", "B": None, "C": "blue"},  # whose letters would move
    ],
)
def test_options_that_can_not_be_are_no_options(options):
    with pytest.raises((ValueError, TypeError)):
        sources.with_options({}, options)


def test_cells_without_a_value_hide_no_column():
    item = {"images": [], "image": "q.png", "question": "Which?", "answer": float("nan")}
    found = sources.from_table(item | {"response": "<think> x </think> <answer> A </answer>"})
    assert (found["images"], found["answer"]) == (["q.png"], "A")
    with pytest.raises(Reject, match="no response"):
        sources.from_table(item | {"answer": "A"})
    assert sources.SOURCES["qa"](item | {"answer": "A"})["answer"] == "A"


@pytest.mark.parametrize(
    "question,told,images",
    [
        ("Is [problem_image_2] in [problem_image_1]?", "Is <image> in <image>?", "ba"),
        ("Is [problem_image_2] in it?", "<image>Is <image> in it?", "ab"),
        ("[problem_image_1] [problem_image_2] Which?", "Which?", "ab"),
        ("Which? [problem_image_1]", "Which?", "ab"),
        ("Is [problem_image_3] in [problem_image_1]?", "Is  in ?", "ab"),
    ],
)
def test_zebra_pictures_stand_where_they_are_named(question, told, images):
    item = {"Question": question, "Final Answer": "C", "Text Reasoning Trace": "x"}
    found = sources.from_zebra(item | {"problem_image_1": "a", "problem_image_2": "b"})
    assert (found["question"].strip(), "".join(found["images"])) == (told, images)


def test_lists_of_other_forms(tmp_path):
    """{id: item}; a line break within a text; what lies behind damage is said not to be read."""
    path = tmp_path / "x.json"
    path.write_text('{"a": {"question": "Q"}, "b": {"question": "R"}}')
    items = [item for _, item, _ in sources.read_items(path)]
    assert items == [{"id": "a", "question": "Q"}, {"id": "b", "question": "R"}]
    path.write_text('[{"question": "Q\nR"}, {"question: 1}, {"question": "S"}]')
    (_, first, _), (n, _, error) = sources.read_items(path)
    assert first == {"question": "Q\nR"} and n == 2 and "after it is not read" in error
