"""Each check on an example that just fails it, and on its neighbour that passes."""

import io

import pytest
from conftest import PARSER, RESPONSE, encoded, example, noise, write_data
from PIL import Image, ImageDraw

import checks
from duplicates import largest_difference
from files import read_lines


@pytest.mark.parametrize(
    "change, reason, number",
    [
        ({}, "", None),
        ({"response": RESPONSE.replace("<answer> red", "<answer> \\boxed{Red.}")}, "", None),
        ({"answer": "A", "options": ["red", "blue"]}, "", None),
        ({"answer": "blue"}, "answer differs from the gold answer", None),
        ({"response": RESPONSE.replace("</parser>", "")}, "tags missing or out of order", None),
        ({"response": RESPONSE + " <answer> red </answer>"}, "tags missing or out of order", None),
        ({"response": f"Well. {RESPONSE}"}, "text before <think> or after </answer>", None),
        ({"aux_images": []}, "spans and auxiliary images differ", 1),
        ({"aux_images": [noise(5), noise(6)]}, "spans and auxiliary images differ", -1),
        ({"question": ""}, "question is empty", None),
        ({"images": []}, "images is empty", None),
        ({"options": "ab"}, "not in the form of an example", None),
        ({"answer": [5]}, "not in the form of an example", None),
        ({"options": ["a"] * 27}, "not in the form of an example", None),
        ({"options": ["red", "<|im_end|>"]}, "reserved token in the text", None),
        ({"question": "Which? <|im_end|>"}, "reserved token in the text", None),
        ({"response": "<think> Easy. </think> <answer> red </answer>", "aux_images": []}, "", None),
        (
            {"response": "<think> <latent></latent> </think> <answer> red </answer>"},
            "span without a parser text after it",
            1,
        ),
        (
            {
                "response": f"<think> <parser> {PARSER} </parser> <latent></latent> </think> "
                "<answer> red </answer>"
            },
            "span without a parser text after it",
            1,
        ),
        ({"parser": "a red bar"}, "parser too short", 3),
        ({"parser": "a red bar of five words"}, "", None),
        ({"parser": "bar " * 201}, "parser too long", 201),
        ({"parser": "first a red bar stands\n\nthen a blue one"}, "", None),
        ({"parser": "first a red bar stands\n\n\nthen a blue one"}, "parser has empty lines", 1),
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
        ({"aux_images": [noise(0, (6, 6))]}, "image too small", 6),
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
    data = write_data(tmp_path, [example(0, images=[query], aux_images=[marked])])
    assert len(stage("filter", "filtered", data=data)) == 1


@pytest.mark.parametrize(
    "text,script",
    [
        ("如图，在△ABC中，AB=AC，∠A=40°，求∠B", "CJK"),
        ("θ = ?", ""),
        ("the triangle ABC", "LATIN"),
        ("12 = 3", ""),
        ("три угла ABC", "CYRILLIC"),
        ("WHICH IS LARGER", "LATIN"),
        ("πόσο είναι", "GREEK"),
    ],
)
def test_names_of_points_and_angles_are_no_script(text, script):
    assert checks.script(text) == script


def test_an_edit_of_colour_alone_is_an_edit():
    query = Image.new("RGB", (200, 200), (76, 76, 76))
    edited = query.copy()
    edited.paste((254, 0, 0), (50, 50, 150, 150))
    assert (
        largest_difference(query.convert("L"), edited.convert("L"))
        < 8
        < largest_difference(query, edited)
    )


def test_a_picture_of_one_lively_channel_is_not_blank():
    image = Image.merge(
        "RGB", [Image.new("L", (60, 60), 9)] * 2 + [Image.effect_noise((60, 60), 80)]
    )
    checks.check_auxiliary(image, [], 2.0, 8.0)
