"""The commands from sources to training files: hostile images, paths, filter, split, settings."""

import io
import json
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import convert, encoded, example, noise, pixels, run, saved, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import build_data as b
import sources
from data import load_examples
from files import read_lines
from images import open_image
from resume import Reject


def tree(folder):
    """{path: when it was changed} of all that lies in a folder, but for `out`."""
    paths = [p for p in folder.rglob("*") if "out" not in p.parts]
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in paths}


def test_hostile_images_and_paths(stage, tmp_path):
    """Each bad image is one reject with its reason, and usable oddities become plain RGB.

    Nothing outside `out` changes.
    """
    src = tmp_path / "src"
    good = encoded(noise(1))
    secret = saved(tmp_path / "secret.png", noise(9))
    saved(src / "ok.png", noise(1))
    (src / "link.png").symlink_to(secret)
    (src / "dir.png").mkdir()
    os.mkfifo(src / "pipe.png")
    frames = [noise(i) for i in range(3)]
    bomb = bytearray(good)
    # the header's width and height, and its checksum
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    bad = {
        "empty.png": b"",
        "text.png": b"<html>no image</html>",
        "cut.png": good[: len(good) // 2],
        "cut.jpg": encoded(noise(1), "JPEG")[:-400],
        "bomb.png": bytes(bomb),
        "tiny.png": encoded(noise(1, (6, 6))),
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
    outside = ["../secret.png", str(secret), "link.png"]
    no_files = ["dir.png", "pipe.png"]
    odd = ["a\0b", "x" * 5000, "none.png", 5, {"path": None}]
    paths = [*outside, *no_files, *odd]
    item = {
        "question": "Which?",
        "answer": "red",
        "response": "<think> x </think> <answer> red </answer>",
    }
    before = tree(tmp_path)
    items = [item | {"images": [path]} for path in [*fine, *bad, *paths]]
    kept, rejects = convert(stage, tmp_path, "teacher", items, "h.jsonl", max_bytes=150_000)
    of_bad = ["unreadable image"] * 4 + [
        "image has too many pixels",
        "image too small",
        "image too narrow for the processor",
        "animated image",
        "animated image",
        "unreadable image",
        "image file too large",
    ]
    of_paths = ["path leaves the data folder"] * 3 + ["no such image"] * 2
    of_paths += ["unreadable path"] * 2 + ["no such image"] + ["unreadable path"] * 2
    assert [r["reason"] for r in rejects] == of_bad + of_paths
    numbers = [rejects[i]["number"] for i in (4, 5, 10)]
    assert numbers == [60_000**2, 6, 200_000]
    for row, (_, wanted) in zip(kept, fine.values(), strict=True):
        image = Image.open(tmp_path / "out" / row["images"][0])
        assert image.mode == "RGB"
        assert np.abs(pixels(image).astype(int) - pixels(wanted)).max() <= 2, row["id"]
    after = tree(tmp_path)
    assert {k for k in after if after[k] != before.get(k)} <= {".", "src", "src/h.jsonl"}


OTHER_KINDS = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "parquet": b"PAR1\x15\x04",
    "zip": b"PK\x03\x04",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_of_another_kind_is_called_by_its_name(stage, tmp_path, kind):
    """In the same words as a picture, as a picture of a later stage, and as the source's file."""
    path = tmp_path / "src/photo.jpg"
    path.parent.mkdir()
    path.write_bytes(OTHER_KINDS[kind])
    with pytest.raises(SystemExit, match=f"photo.jpg: .*{kind}"):
        open_image(path)
    assert not stage("convert", "qa", source="qa", files=str(path))
    (reject,) = read_lines(tmp_path / "out/rejects.qa.jsonl")
    assert "photo.jpg:1" in reject["id"] and kind in reject["detail"]
    item = {"image": "photo.jpg", "question": "Which?", "answer": "red"}
    kept, (reject,) = convert(stage, tmp_path, "qa", [item])
    assert not kept and "items.json:1" in reject["id"]
    assert "photo.jpg" in reject["detail"] and kind in reject["detail"]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_split_of_few_rows_has_both_sides(stage, tmp_path, n):
    data = write_data(tmp_path, [example(i) for i in range(n)])
    assert len(stage("split", "train", data=data)) == n - 1
    assert len(read_lines(tmp_path / "out/val.jsonl")) == 1
    assert len(stage("split", "train", data=data, val_share=0.0)) == n
    alone = write_data(tmp_path, [example(0)], "alone")
    with pytest.raises(SystemExit, match="leaves none to train on"):
        stage("split", data=alone, val_share=0.1)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.data())
def test_damaged_images_never_crash(kind, data):
    content = bytearray(encoded(noise(1, (32, 32)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image, _ = b.decode(bytes(content[: data.draw(st.integers(0, len(content)))]))
        assert image.mode == "RGB" and min(image.size) >= b.min_side
    except Reject:
        pass


def test_paths_of_later_stages(stage, tmp_path):
    """A data file in `out` names no image outside it, and a data file outside it is refused."""
    secret = saved(tmp_path / "secret.png", noise(9))
    above, absolute = example(0, images=["../secret.png"]), example(1, images=[str(secret)])
    data = write_data(tmp_path, [above, absolute, example(2)])
    assert [row["id"] for row in stage("filter", "filtered", data=data)] == ["x2"]
    reasons = {r["reason"] for r in read_lines(tmp_path / "out/rejects.jsonl")}
    assert reasons == {"path leaves the data folder"}
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="convert"):
        stage("filter", data=str(tmp_path / "other.jsonl"))


def test_filter_by_the_tower(stage, tmp_path, base):
    """An image that the tower maps to one vector is rejected, a lively one is not.

    A changed threshold judges anew.
    """
    flat, lively = Image.new("RGB", (112, 112), (120, 90, 60)), noise(5, (112, 112))
    data = write_data(tmp_path, [example(0, aux_images=[flat]), example(1, aux_images=[lively])])
    settings = {"data": data, "base": str(base), "K": 4, "blank": 0.0}
    assert [row["id"] for row in stage("filter", "filtered", **settings)] == ["x1"]
    (reject,) = read_lines(tmp_path / "out/rejects.jsonl")
    assert reject["reason"] == "auxiliary embeddings hardly vary" and reject["number"] < 1e-3
    assert len(stage("filter", "filtered", **settings | {"degenerate": 0.0})) == 2


def test_filter_judges_a_picture_by_what_it_holds(stage, tmp_path):
    """One that is redrawn, goes or comes back under its name is judged again."""
    data = write_data(tmp_path, [example(0), example(1)])

    def kept():
        return [row["id"] for row in stage("filter", "filtered", data=data)]

    assert kept() == ["x0", "x1"]
    path = tmp_path / "out" / read_lines(data)[0]["aux_images"][0]
    content = path.read_bytes()
    path.write_bytes(encoded(Image.new("RGB", (80, 80), "red")))
    assert kept() == ["x1"]  # it is blank
    path.unlink()
    assert kept() == ["x1"]
    path.write_bytes(content)
    assert kept() == ["x0", "x1"]


def test_filter_drops_broken_lines_and_repeated_ids(stage, tmp_path):
    data = write_data(tmp_path, [example(0), example(0), example(1)])
    with open(data, "a") as f:
        f.write('{"id": "x7"\n[1]\n')
    assert [row["id"] for row in stage("filter", "filtered", data=data)] == ["x0", "x1"]
    rejects = read_lines(tmp_path / "out/rejects.jsonl")
    assert [r["id"] for r in rejects] == ["x0", "rows.jsonl:4", "rows.jsonl:5"]
    assert {r["reason"] for r in rejects} == {"unreadable or repeated"}
    assert "occurs before" in rejects[0]["detail"]


def test_ids_are_the_users_own_and_no_two_rows_share_one(stage, tmp_path):
    """Where two items, or two files, have the same, all that share it get another."""
    item = {"image": "q.png", "question": "Which?", "answer": "red"}
    saved(tmp_path / "src/q.png", noise(1))
    items = [item | {"id": id} for id in ("a", 7, "twice", "twice", None, True)] + [item]
    kept, _ = convert(stage, tmp_path, "qa", items)
    ids = [row["id"] for row in kept]
    assert ids == ["a", "7", *(f"qa/items.json:{n}" for n in (3, 4, 5, 6, 7))]

    convert(stage, tmp_path, "qa", [item | {"id": "a"}], "second.json", label="more")
    both = f"{tmp_path}/out/qa.jsonl,{tmp_path}/out/more.jsonl"
    merged = stage("filter", "filtered", data=both, need_reasoning=False)
    assert [row["id"] for row in merged] == [*ids, "more/a"]
    rows = stage("split", "train", data=both, val_share=0.0)
    assert [row["id"] for row in rows] == [*ids, "more/a"]


def test_a_second_convert_does_not_overwrite_the_first(stage, tmp_path):
    """Of other files; those that have moved, were mended or have come to more are the same."""
    item = {"image": "q.png", "question": "Which?", "answer": "red"}
    src = tmp_path / "src"
    saved(src / "q.png", noise(1))

    def convert_again(pattern):
        return len(stage("convert", "qa", source="qa", files=str(src / pattern), root=str(src)))

    (src / "a.json").write_text(json.dumps([item]))
    (src / "b.json").write_text(json.dumps([item] * 2))
    assert convert_again("a.json") == 1
    with pytest.raises(SystemExit, match="qa.jsonl was made of other files .*--label=NAME"):
        convert_again("b.json")
    assert len(read_lines(tmp_path / "out/qa.jsonl")) == 1
    (src / "a.json").rename(src / "c.json")
    assert convert_again("c.json") == 1
    assert convert_again("*.json") == 3
    (src / "b.json").write_text(json.dumps([item] * 4))
    assert convert_again("b.json") == 4


def test_convert_notices_another_name_of_a_column(stage, tmp_path, monkeypatch):
    """As the documentation has users put it into FIELDS."""
    saved(tmp_path / "src/q.png", noise(1))
    items = [{"image": "q.png", "question": "Which?", "answer": "short", "gold_label": "red"}]
    assert convert(stage, tmp_path, "qa", items)[0][0]["answer"] == "short"
    monkeypatch.setitem(sources.FIELDS, "answer", ("gold_label", "answer"))
    assert convert(stage, tmp_path, "qa", items)[0][0]["answer"] == "red"


def test_convert_notices_pictures_that_come_change_and_go(stage, tmp_path):
    items = [{"image": f"{n}.png", "question": "Which?", "answer": "red"} for n in range(3)]
    src = tmp_path / "src"
    for n in (0, 1):
        saved(src / f"{n}.png", noise(n))
    kept, rejects = convert(stage, tmp_path, "qa", items)
    assert len(kept) == 2 and rejects[0]["reason"] == "no such image"
    saved(src / "2.png", noise(2))
    saved(src / "1.png", noise(9))
    (src / "0.png").unlink()
    later, (reject,) = convert(stage, tmp_path, "qa", items)
    assert reject["id"] == kept[0]["id"]
    shown = [pixels(tmp_path / "out" / row["images"][0]) for row in later]
    assert (shown[0] == pixels(noise(9))).all() and (shown[1] == pixels(noise(2))).all()


def test_a_picture_is_known_by_more_than_its_size_and_time(stage, tmp_path):
    """Copies keep the time of a change, and BMPs of one shape have one size."""
    items = [{"image": "0.bmp", "question": "Which?", "answer": "red"}]
    picture = tmp_path / "src/0.bmp"
    for n in (1, 2):
        saved(picture, noise(n))
        os.utime(picture, (0, 0))
        ((row,), _) = convert(stage, tmp_path, "qa", items)
        assert (pixels(tmp_path / "out" / row["images"][0]) == pixels(noise(n))).all()


def test_what_lies_outside_is_not_read_to_be_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(b, "out", str(tmp_path / "out"))
    saved(tmp_path / "secret.png", noise(1))
    saved(tmp_path / "out/images/0.png", noise(2))
    monkeypatch.setattr(b, "file_digest", lambda path: Path(path).name)
    item = {"images": ["../secret.png", "images/0.png", None], "aux_images": ["/dev/zero"]}
    assert b.digests_of_item(item) == [None, "0.png", None, None]


def test_a_split_that_is_killed_leaves_no_two_halves_of_two(stage, tmp_path, monkeypatch):
    rows = [example(n, images=[noise(n)], aux_images=[noise(50 + n)]) for n in range(20)]
    data = write_data(tmp_path, rows)
    stage("split", "train", data=data, val_share=0.3)
    write_lines = b.write_lines

    def killed_after(path, lines):
        write_lines(path, lines)
        raise KeyboardInterrupt

    monkeypatch.setattr(b, "write_lines", killed_after)
    with pytest.raises(KeyboardInterrupt):
        stage("split", "train", data=data, val_share=0.3, seed=2)
    assert not (tmp_path / "out/val.jsonl").exists()


def test_a_split_of_the_sources_own(stage, tmp_path, capsys):
    """As an item says, else its file's name, else its folder's; rows without one are named."""
    saved(tmp_path / "src/q.png", noise(1))
    item = {"image": "q.png", "question": "Which?", "answer": "red", "data_source": "chart"}
    items = [item | {"id": "t"}, item | {"id": "v", "split": "validation"}]
    convert(stage, tmp_path, "qa", items, "train.json")
    (tmp_path / "src/valid").mkdir()
    convert(stage, tmp_path, "qa", [item], "valid/rows.json", label="more")
    both = f"{tmp_path}/out/qa.jsonl,{tmp_path}/out/more.jsonl"
    train = stage("split", "train", data=both, own_split=True)
    val = read_lines(tmp_path / "out/val.jsonl")
    assert [row["id"] for row in train] == ["t"]
    assert [row["id"] for row in val] == ["v", "more/valid/rows.json:1"]
    said = capsys.readouterr().out
    assert "1 groups of examples with a shared image lie on both sides" in said
    assert "45,702" in said
    with pytest.raises(SystemExit, match="2 of 2 examples say no split, the first 'x0'"):
        stage("split", data=write_data(tmp_path, [example(0), example(1)]))


def test_rows_without_reasoning_are_no_training_data(stage, tmp_path):
    saved(tmp_path / "src/q.png", noise(1))
    item = {"image": "q.png", "question": "Which?", "answer": "red"}
    convert(stage, tmp_path, "qa", [item])
    data = f"{tmp_path}/out/qa.jsonl"
    assert not stage("filter", "filtered", data=data)
    (reject,) = read_lines(tmp_path / "out/rejects.jsonl")
    assert reject["reason"] == "no reasoning"
    assert len(stage("filter", "filtered", data=data, need_reasoning=False)) == 1


def test_split_shares_no_image(stage, tmp_path, capsys):
    """Chains of shared images stay on one side, also where pixels are encoded in two ways."""
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
    assert sorted(r["id"] for r in train + val) == sorted(r["id"] for r in rows)
    assert 15 <= len(val) <= 20

    def seen(part):
        paths = [p for row in part for p in row["images"] + row["aux_images"]]
        return {pixels(tmp_path / "out" / path).tobytes() for path in paths}

    assert not seen(train) & seen(val)
    for name in ("train", "val"):
        load_examples(tmp_path / "out" / f"{name}.jsonl")
    table = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    counted = [sum(r["category"] == "geo_3k" for r in part) for part in (train, val)]
    published = ["1082", "656", "79", "253"]
    assert table["Geometry3K"] == [*published, *map(str, counted), str(sum(counted))]
    published = ["49309", "33279", "3706", "23548"]
    assert table["all"] == [*published, str(len(train)), str(len(val)), "200"]
    assert table["own"][-1] == str(sum(r["category"] == "own" for r in train + val))
    assert list(table).index("Visual CoT") < list(table).index("chart") < list(table).index("GEOQA")
    first = stage("split", "val", data=data)
    assert first == val and stage("split", "val", data=data, seed=1) != val


def test_usage(stage, tmp_path):
    for args, message in (
        (["fetch"], "usage: python build_data.py convert | "),
        (["split", "--nosuch=1"], "unknown setting"),
        (["sheet", "--workers=0"], "workers=0 makes no sense: expected 1 or more"),
    ):
        assert message in run("build_data.py", *args, ok=False)
    with pytest.raises(SystemExit, match="names no file"):
        stage("filter")
    with pytest.raises(SystemExit, match="no such file"):
        stage("split", data=str(tmp_path / "out/none.jsonl"))
    (tmp_path / "elsewhere.jsonl").touch()
    with pytest.raises(SystemExit, match=f"not in out=.*; give --out={tmp_path}, or bring it"):
        stage("split", data=str(tmp_path / "elsewhere.jsonl"))


def test_from_sources_to_training_files_on_the_toy(tmp_path, world):
    """The README's order of commands, as a user runs them: convert, filter, audit, split, sheet."""

    def build(*args):
        return run("build_data.py", *args, f"--out={tmp_path}")

    build("convert", "--source=teacher", f"--files={world}/train.jsonl", "--label=toy")
    # one parser text is "again"
    assert "kept 47 of 48" in build("filter", f"--data={tmp_path}/toy.jsonl")
    build("audit", f"--data={tmp_path}/filtered.jsonl", f"--benchmarks={world}/test.jsonl")
    build("split", f"--data={tmp_path}/audited.jsonl")
    build("sheet", f"--data={tmp_path}/train.jsonl", "--sheet", f"{tmp_path}/sheet.html")
    ours = [*load_examples(tmp_path / "train.jsonl"), *load_examples(tmp_path / "val.jsonl")]

    def texts(row):
        return row["question"], row["answer"], row["response"]

    source = {texts(row): row for row in load_examples(world / "train.jsonl")}
    for row in ours:
        old = source[texts(row)]
        new_images, old_images = (r["images"] + r["aux_images"] for r in (row, old))
        for new, was in zip(new_images, old_images, strict=True):
            assert (pixels(new) == pixels(was)).all()


def test_no_command_writes_over_what_it_reads(stage, tmp_path):
    train = write_data(tmp_path, [example(i) for i in range(9)], "train")
    before = open(train).read()
    for command, name in (("split", "train"), ("filter", "filtered"), ("audit", "audited")):
        path = write_data(tmp_path, [example(0)], name) if name != "train" else train
        with pytest.raises(SystemExit, match=f"{name}.jsonl is read, and would be written over"):
            stage(command, data=path, benchmarks=path)
    path = write_data(tmp_path, [example(0)], "synthesised")
    with pytest.raises(SystemExit, match="synthesised.jsonl is read, and would be written over"):
        stage("synthesise", data=path)
    for name in ("qa", "rejects.qa"):  # a source in the folder itself
        path = write_data(tmp_path, [example(0)], name)
        with pytest.raises(SystemExit, match=f"{name}.jsonl is read, and would be written over"):
            stage("convert", source="qa", files=str(path))
    assert open(train).read() == before
    rows = write_data(tmp_path, [example(i) for i in range(9)])
    with pytest.raises(SystemExit, match="names .*rows.jsonl twice"):
        stage("split", data=f"{rows},{rows}")
    # no validation data is no file, and none of an earlier split
    stage("split", data=rows, val_share=0.2)
    assert len(stage("split", "train", data=rows, val_share=0.0)) == 9
    assert not (tmp_path / "out/val.jsonl").exists()


def test_what_a_setting_or_a_disk_mends_is_tried_again(stage, tmp_path, monkeypatch):
    data = write_data(tmp_path, [example(0), example(1)])
    (tmp_path / "out/images").rename(tmp_path / "elsewhere")
    (tmp_path / "out/images").symlink_to(tmp_path / "elsewhere")
    assert stage("filter", "filtered", data=data) == []
    assert len(stage("filter", "filtered", data=data, follow_links=True)) == 2

    (tmp_path / "out/work/filtered.jsonl").unlink()
    read = b.Path.read_bytes
    with monkeypatch.context() as patch:

        def denied(path):
            if path.suffix == ".png":
                raise PermissionError(13, "Permission denied")
            return read(path)

        patch.setattr(b.Path, "read_bytes", denied)
        assert stage("filter", "filtered", data=data) == []
        (first, _) = read_lines(tmp_path / "out/rejects.jsonl")
        assert "Permission denied" in first["detail"]
    assert len(stage("filter", "filtered", data=data)) == 2


def test_filter_reads_what_all_stages_read(stage, tmp_path):
    """Numbers as ids, null options, one image without its list, a line break in the end."""
    row = example(0) | {"id": 7, "options": None}
    row["response"] += "\n"
    (kept,) = stage("filter", "filtered", data=write_data(tmp_path, [row]))
    assert kept["id"] == "7" and "options" not in kept


@pytest.mark.parametrize(
    "item,file,split",
    [
        ({"split": "test"}, "train.json", ""),
        ({"split": "validation"}, "train.json", "val"),
        ({}, "val/train_part.json", "train"),
        ({"split": None}, "dev/a.json", "val"),
    ],
)
def test_an_items_own_split_counts_alone(item, file, split):
    assert b.split_of(item, file) == split


def test_a_page_shows_why_a_picture_is_missing(stage, tmp_path):
    data = write_data(tmp_path, [example(0), example(1, images=[noise(1, (6, 6))])])
    stage("sheet", data=data, sheet=str(tmp_path / "sheet.html"))
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<figure>") == 3 and "query 0: image too small 6 x 6" in page


def test_a_file_may_be_named_like_a_pattern(stage, tmp_path):
    saved(tmp_path / "src/0.png", noise(0))
    item = {"images": "0.png", "question": "Which?", "answer": "red"}
    kept, _ = convert(stage, tmp_path, "qa", [item], "v[1].json")
    assert len(kept) == 1


def test_another_converter_converts_anew(stage, tmp_path, monkeypatch):
    saved(tmp_path / "src/0.png", noise(0))
    items = [{"images": "0.png", "question": "Which?", "answer": "red"}]
    convert(stage, tmp_path, "qa", items)
    plain = sources.SOURCES["qa"]
    monkeypatch.setitem(sources.SOURCES, "qa", lambda item: plain(item) | {"category": "mine"})
    monkeypatch.setattr(b, "CODE", "that of a file with this line")
    (row,), _ = convert(stage, tmp_path, "qa", items)
    assert row["category"] == "mine"


@pytest.mark.parametrize(
    "name, value",
    [
        ("same_as_query", 256.0),
        ("blank", 256.0),
        ("parser_words_min", 99),
        ("parser_words_max", 3),
        ("parser_repeats", 0.0),
    ],
)
def test_another_threshold_judges_anew(stage, tmp_path, name, value):
    data = write_data(tmp_path, [example(0)])
    assert len(stage("filter", "filtered", data=data)) == 1
    assert stage("filter", "filtered", data=data, **{name: value}) == []


def test_the_flattest_picture_counts(stage, tmp_path, base):
    flat, lively = Image.new("RGB", (112, 112), (120, 90, 60)), noise(5, (112, 112))
    row = example(0, aux_images=[lively, flat])
    row["response"] = row["response"].replace(
        "</parser>",
        "</parser> <latent></latent> <parser> the blue one stands beside it </parser>",
        1,
    )
    data = write_data(tmp_path, [row])
    assert stage("filter", "filtered", data=data, base=str(base), K=4, blank=0.0) == []
    (reject,) = read_lines(tmp_path / "out/rejects.jsonl")
    assert reject["reason"] == "auxiliary embeddings hardly vary"
