"""Planted copies of test images and questions are found, also in public files; nothing else is."""

import base64
import io
import json
import os
import random

import pytest
from conftest import encoded, example, photo, saved, write_data
from PIL import Image, ImageDraw

import contamination
import duplicates
from contamination import bare_question
from files import read_lines, write_lines


def bars(seed, size=(240, 180)):
    """A bar chart."""
    rng, image = random.Random(seed), Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for x in range(20, 200, 25):
        top = rng.randint(10, 160)
        colour = tuple(rng.randrange(256) for _ in range(3))
        draw.rectangle((x, top, x + 18, 165), fill=colour)
    draw.line((15, 5, 15, 166, 230, 166), fill="black", width=2)
    return image


def cropped(image, left, top, right, bottom):
    """An image without these shares of its sides."""
    w, h = image.size
    box = (round(left * w), round(top * h), w - round(right * w), h - round(bottom * h))
    return image.crop(box)


def as_jpeg(image, quality):
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality)))


EDITS = {
    "recompressed": lambda i: as_jpeg(i, 30),
    "halved": lambda i: i.resize((i.width // 2, i.height // 2)),
    "doubled": lambda i: i.resize((2 * i.width, 2 * i.height)),
    "cropped": lambda i: cropped(i, 0.01, 0.01, 0.01, 0.01),
    "cropped left": lambda i: cropped(i, 0.02, 0, 0, 0),
    "cropped below": lambda i: cropped(i, 0, 0, 0, 0.02),
    "all": lambda i: as_jpeg(cropped(i.resize((160, 120)), 0.01, 0, 0.01, 0), 50),
}


def plant(tmp_path, make, n=10):
    """The path and images of a test set, and training rows with each edit of each image."""
    tests = [make(seed) for seed in range(n)]
    folder = tmp_path / "bench"
    lines = []
    for n, image in enumerate(tests):
        saved(folder / f"{n}.png", image)
        row = {"id": f"t{n}", "images": [f"{n}.png"]}
        row |= {"question": f"How many in {n}?", "answer": "5"}
        lines.append(json.dumps(row) + "\n")
    (folder / "test.jsonl").write_text("".join(lines))
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
        example(id="x-asked", images=[make(902)], aux_images=[make(903)]),
    ]
    exact[2]["question"] = " how many in 7 ?"
    clean = [
        example(id=f"x-clean-{n}", images=[make(1000 + n)], aux_images=[make(2000 + n)])
        for n in range(30)
    ]
    data = write_data(tmp_path, rows + exact + clean)
    kept = stage("audit", "audited", data=data, benchmarks=bench)
    found = {
        (f["kind"], f["id"], f["benchmark_id"]) for f in read_lines(tmp_path / "out/audit.jsonl")
    }
    near = {(id, test) for kind, id, test in found if kind == "near"}
    assert {finding for finding in found if finding[0] != "near"} == {
        ("pixels", "x-webp", "t3"),
        ("pixels", "x-aux", "t4"),
        ("question", "x-asked", "t7"),
    }
    # near pairs are for a person to judge
    assert {row["id"] for row in kept} == {row["id"] for row in rows + clean}
    wanted = {(row["id"], f"t{row['id'].rsplit('-', 1)[1]}") for row in rows}
    assert near == wanted, (near - wanted, wanted - near)
    page = (tmp_path / "out/audit.html").read_text()
    assert page.count("<article>") == len(near)
    assert page.count('src="data:image/jpeg;base64,') == 2 * len(near)
    kept = stage("audit", "audited", drop="near")
    assert {row["id"] for row in kept} == {row["id"] for row in exact + clean}


def test_audit_reads_official_files(stage, tmp_path):
    """A benchmark's own table: images are embedded, and a question has no prompt around it."""
    cells = [base64.b64encode(encoded(photo(n), "JPEG")).decode() for n in range(3)]
    lines = [f"{n}\t{cell}\tIs there a dog in {n}?\tYes\trandom\n" for n, cell in enumerate(cells)]
    header = "index\timage\tquestion\tanswer\tcategory\n"
    (tmp_path / "POPE.tsv").write_text(header + "".join(lines))
    decoded = Image.open(io.BytesIO(encoded(photo(1), "JPEG")))
    rows = [
        example(0, images=[decoded], aux_images=[photo(10)]),
        example(1, images=[photo(11)], aux_images=[photo(12)]),
        example(2, images=[photo(13)], aux_images=[photo(14)], question="Is there a dog in 2?"),
    ]
    data = write_data(tmp_path, rows)
    kept = stage("audit", "audited", data=data, benchmarks="POPE", data_root=str(tmp_path))
    found = {
        (f["kind"], f["id"], f["benchmark_id"]) for f in read_lines(tmp_path / "out/audit.jsonl")
    }
    assert found == {("pixels", "x0", "1"), ("question", "x2", "2")}
    assert [row["id"] for row in kept] == ["x1"]


def test_audit_knows_a_picture_by_what_it_holds(stage, tmp_path):
    """Another one of the same size, in the same place, with the same time, is another one."""
    rows = [example(n, images=[photo(n)], aux_images=[photo(10 + n)]) for n in range(2)]
    data = write_data(tmp_path, rows)
    test = tmp_path / "bench/0.bmp"
    for picture, left in ((photo(99), 2), (photo(0), 1)):
        saved(test, picture)
        os.utime(test, (0, 0))
        asked = {"id": "t", "images": ["0.bmp"], "question": "What?", "answer": "x"}
        write_lines(tmp_path / "bench/test.jsonl", [asked])
        kept = stage("audit", "audited", data=data, benchmarks=f"{tmp_path}/bench/test.jsonl")
        assert len(kept) == left


def test_audit_reads_an_image_once(stage, tmp_path, monkeypatch):
    """A second audit decodes nothing again but for the page, and refuses what it cannot do."""
    bench, _, rows = plant(tmp_path, bars, 2)
    data = write_data(tmp_path, rows)
    stage("audit", "audited", data=data, benchmarks=bench)
    monkeypatch.setattr(duplicates, "fingerprint", None)
    stage("audit", "audited", data=data, benchmarks=bench)
    with pytest.raises(SystemExit, match="drop='pixel'"):
        stage("audit", drop="pixel")
    with pytest.raises(SystemExit, match="benchmarks=''"):
        stage("audit", drop="near", benchmarks="")


def test_questions_are_compared_without_marks_and_options():
    same = [
        "<image1> What is x?",
        "<image>\nWhat is x?",
        "What is x?\nOptions: A: red, B: blue",
        "What is x?\n(A) red\n(B) blue",
        "What is x?\nAnswer with the option's letter from the given choices directly.",
        "what is X? Please answer yes or no.",
    ]
    assert {bare_question({"question": question}) for question in same} == {"what is x"}
    assert (
        bare_question({"question": "What is y?"})
        != "what is x"
        != bare_question({"question": "Options: A"})
    )


def test_a_template_is_no_copy_without_its_picture(stage, tmp_path):
    """A question of one picture is a copy; an unknown test set is refused with those there are."""
    folder, asked = tmp_path / "bench", "Is there a dog?"
    lines = []
    # the first picture under two dogs' rows, and a question that one picture is asked four times
    rare, turned = "Is there a rare thing?", "Where is the cup?"
    for n, question in enumerate([asked, asked, rare, *[turned] * 4, asked, "What is it?"]):
        picture = f"{ {4: 3, 5: 3, 6: 3, 7: 0, 8: 0}.get(n, n) }.png"
        saved(folder / picture, photo(int(picture[:-4])))
        row = {"id": f"t{n}", "images": [picture], "question": question, "answer": "no"}
        lines.append(json.dumps(row) + "\n")
    (folder / "test.jsonl").write_text("".join(lines))
    rows = [
        example(id="other", question=asked, images=[photo(50)], aux_images=[photo(51)]),
        example(id="copy", question=asked, images=[photo(1)], aux_images=[photo(52)]),
        example(id="rare", question=rare, images=[photo(53)]),
        example(id="turned", question=turned, images=[photo(54)]),
        example(id="shared", question=asked, images=[photo(0)], aux_images=[photo(55)]),
    ]
    data = write_data(tmp_path, rows)
    kept = stage("audit", "audited", data=data, benchmarks=str(folder / "test.jsonl"))
    assert [row["id"] for row in kept] == ["other"]
    found = {(f["id"], f["kind"]) for f in read_lines(tmp_path / "out/audit.jsonl")}
    expected = {("other", "template"), ("rare", "question"), ("turned", "question")}
    for id in ("copy", "shared"):
        expected |= {(id, "question"), (id, "pixels")}
    assert found == expected
    with pytest.raises(SystemExit, match="HRBench4K: no such file"):
        stage("audit", "audited", data=data, benchmarks="gap")  # a table stands for its test sets
    with pytest.raises(SystemExit, match="'MMstar' is neither a file nor one of .*MMStar"):
        stage("audit", data=data, benchmarks="MMstar")


def test_a_picture_that_could_not_be_read_is_tried_again(stage, tmp_path):
    saved(tmp_path / "bench/0.png", photo(0))
    row = {"id": "t", "images": ["0.png"], "question": "Which one?", "answer": "no"}
    (tmp_path / "bench/test.jsonl").write_text(json.dumps(row) + "\n")
    data = write_data(tmp_path, [example(0, images=[photo(0)])])
    settings = {"data": data, "benchmarks": str(tmp_path / "bench/test.jsonl")}
    assert len(stage("audit", "audited", bomb_pixels=1000, **settings)) == 1
    assert stage("audit", "audited", bomb_pixels=50_000_000, **settings) == []


def test_a_question_of_two_test_sets_is_no_template():
    tests = {(bench, "1"): {"question": "Q?"} for bench in ("a", "b")}
    theirs = {("a", "1", 0): ("p", "00"), ("b", "1", 0): ("q", "00")}
    row = {"id": "x", "question": "Q?", "images": [], "aux_images": []}
    (found,) = contamination.find_copies([row], tests, {}, theirs, 0)
    assert found["kind"] == "question"


def test_a_template_counts_beside_a_near_picture():
    tests = {("a", str(i)): {"question": "Q?"} for i in range(2)}
    theirs = {("a", str(i), 0): (f"p{i}", f"{i:064x}") for i in range(2)}
    row = {"id": "x", "question": "Q?", "images": ["i.png"], "aux_images": []}
    found = contamination.find_copies([row], tests, {"i.png": ("other", f"{1:064x}")}, theirs, 0)
    assert {f["kind"] for f in found} == {"question", "near"}


def test_what_we_ask_of_many_pictures_is_a_template(stage, tmp_path):
    """Though the test set asks it once; of a few it may be the test's question, copied."""
    saved(tmp_path / "bench/0.png", photo(99))
    asked = {"id": "t", "images": ["0.png"], "question": "Find $y$.", "answer": "3"}
    write_lines(tmp_path / "bench/test.jsonl", [asked])
    rows = [example(n, images=[photo(n)], aux_images=[photo(50 + n)]) for n in range(6)]
    for row in rows:
        row["question"] = "Find y."
    for n, left in ((6, 6), (4, 0)):
        data = write_data(tmp_path, rows[:n])
        kept = stage("audit", "audited", data=data, benchmarks=f"{tmp_path}/bench/test.jsonl")
        assert len(kept) == left
