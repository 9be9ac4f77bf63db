"""What the method takes for granted of the toy: what its base can do and cannot; data by seed."""

import random
import re

import pytest
from conftest import PIXELS, ROOT, run
from PIL import Image, ImageChops

import toy
from answers import extract_answer
from data import LATENT_SPAN, load_examples, strip_latents
from files import file_digest
from generate import generate, see, to_text
from model import (
    IGNORE,
    add_latent_tokens,
    encode,
    image_grid,
    latent_ids,
    load_processor,
    load_vlm,
)

TOY = ROOT / "toy" / "base"


@pytest.fixture(scope="module")
def toy_base():
    """(vlm, tokenizer, processor) of the base that ships with the toy, with latent tokens."""
    vlm, tokenizer = load_vlm(TOY)
    add_latent_tokens(vlm, tokenizer)
    return vlm, tokenizer, load_processor(TOY, *PIXELS)


def open_prompt(base, row, text):
    """A question with the beginning of its response, auxiliary images between a span's marks."""
    vlm, tokenizer, processor = base
    prompt = encode(vlm, tokenizer, processor, row, K=4, response=text)
    ids = prompt["ids"][:-1]  # without the end token
    if LATENT_SPAN in text:
        ids[ids == latent_ids(tokenizer)[1]] = vlm.config.image_token_id
        storyboards = [image_grid(processor, path) for path in row["aux_images"]]
        prompt["grids"] = prompt["grids"] + storyboards
        prompt["images"] = row["images"] + row["aux_images"]
    return prompt | {"ids": ids, "pos": prompt["pos"][:, :-1]}


def answers_to(base, prompts):
    """What it says after each prompt."""
    vlm, tokenizer, processor = base
    answers = generate(vlm, None, tokenizer, see(vlm, processor, prompts), max_new_tokens=16)
    return [extract_answer(to_text(tokenizer, a["ids"]))[0] for (a,) in answers]


def test_toy_base_can_what_the_method_takes_for_granted(world, toy_base):
    """One move, at once and after a stripped example's text; more with the auxiliary image.

    That is shown beside the board, or written where its latents will be, between new tokens.
    """
    vlm, tokenizer, processor = toy_base
    found = {"at once": [], "after the text": [], "shown": [], "written": [], "several": []}
    for row in load_examples(world / "test.jsonl"):
        text = row["response"].partition(" <answer>")[0]
        with_storyboard = row | {"images": row["images"] + row["aux_images"]}
        prompts = [
            encode(vlm, tokenizer, processor, row),
            open_prompt(toy_base, row, strip_latents(text)),
            encode(vlm, tokenizer, processor, with_storyboard),
            open_prompt(toy_base, row, text),
        ]
        said = answers_to(toy_base, prompts)
        once, after, shown, written = (answer == row["answer"] for answer in said)
        found["shown"].append(shown)
        found["written"].append(written)
        if row["category"] == "1 moves":
            found["at once"].append(once)
            found["after the text"].append(after)
        else:
            found["several"].append(once or after)
    several = found.pop("several")
    assert all(all(answers) for answers in found.values()), found
    assert sum(several) <= 1, several


def test_toy_base_reads_two_storyboards_where_it_writes(tmp_path, monkeypatch, toy_base):
    monkeypatch.setattr(toy, "longest", 8)
    toy.write_split(tmp_path, "test", 30)
    rows = [row for row in load_examples(tmp_path / "test.jsonl") if len(row["aux_images"]) == 2]
    assert {row["category"] for row in rows} == {f"{n} moves" for n in range(5, 9)}
    texts = [row["response"].partition(" <answer>")[0] for row in rows]
    prompts = [open_prompt(toy_base, row, text) for row, text in zip(rows, texts)]
    assert answers_to(toy_base, prompts) == [row["answer"] for row in rows]


def test_toy_data_is_a_function_of_the_seed(tmp_path):
    for name in ("a", "b"):
        run(
            "toy.py",
            "data",
            f"--data_folder={tmp_path}/{name}",
            "--n_train=8",
            "--n_val=4",
            "--n_test=4",
        )
    one, two = tmp_path / "a", tmp_path / "b"
    files = sorted(p.relative_to(one) for p in one.rglob("[!.]*") if p.is_file())
    assert len(files) == 3 + 2 * 16
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    for row in load_examples(one / "train.jsonl"):
        before_the_answer = row["response"].split("</parser>")[0]
        words = row["answer"].replace(",", "").split()
        assert all(word not in before_the_answer for word in words)


def test_pictures_never_stand_beside_other_rows(tmp_path, monkeypatch):
    """A killed run leaves no rows whose pictures it has written over."""
    monkeypatch.setattr(toy, "data_folder", str(tmp_path))
    monkeypatch.setattr(toy, "n_train", 3)
    toy.write_data()
    monkeypatch.setattr(toy, "seed", 2)
    with monkeypatch.context() as patch:
        patch.setattr(toy, "example", lambda *args: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            toy.write_data()
    assert not (tmp_path / "train.jsonl").exists() and (tmp_path / "val.jsonl").exists()
    with pytest.raises(SystemExit, match="form='place' is not one of"):
        monkeypatch.setattr(toy, "form", "place")
        toy.write_edits()


def start_and_moves(question):
    """The place and the names of moves that a question says."""
    start, moves = re.fullmatch(r"Start at (\w+)\. Moves: ([^.]*)\..*", question).groups()
    return toy.PLACES.index(start), moves.split(", ")


def test_long_paths_have_a_storyboard_for_each_four_moves(tmp_path, monkeypatch):
    """The dots of all storyboards, followed through the question's moves one by one."""
    monkeypatch.setattr(toy, "longest", 8)
    toy.write_split(tmp_path, "train", 40)
    panels = [toy.draw_panel(place).tobytes() for place in range(9)]
    seen = set()
    for row in load_examples(tmp_path / "train.jsonl"):
        place, moves = start_and_moves(row["question"])
        wanted = []
        for i, name in enumerate(moves):
            if i % 4 == 0:
                wanted.append([place] * 4)
            place = toy.move(place, name)
            wanted[-1] = [*wanted[-1][1:], place]
        found = []
        for path in row["aux_images"]:
            parts = [(x, y, x + 28, y + 28) for y in (0, 28) for x in (0, 28)]
            with Image.open(path) as image:
                found.append([panels.index(image.crop(part).tobytes()) for part in parts])
        assert found == wanted
        assert row["category"] == f"{len(moves)} moves"
        seen.add(len(moves))
    assert seen == set(range(1, 9))


@pytest.mark.parametrize("form, step", [("steps", "S {}."), ("named", "{}. S")])
def test_a_picture_a_move_stands_before_or_after_its_name(tmp_path, monkeypatch, form, step):
    monkeypatch.setattr(toy, "form", form)
    toy.write_split(tmp_path, "train", 10)
    for row in load_examples(tmp_path / "train.jsonl"):
        place, moves = start_and_moves(row["question"])
        wanted = []
        for name in moves:
            place = toy.move(place, name)
            wanted.append(toy.draw_panel(place).tobytes())
        assert [Image.open(path).tobytes() for path in row["aux_images"]] == wanted
        think = row["response"].replace(LATENT_SPAN, "S").split("<think> ")[1]
        assert think.startswith(" ".join(step.format(name) for name in moves) + " </think>")


def test_pairs_differ_in_one_thing(tmp_path, monkeypatch):
    """Held against their pictures: which of board, storyboard, question and answer changed."""
    monkeypatch.setattr(toy, "data_folder", str(tmp_path))
    monkeypatch.setattr(toy, "longest", 8)
    monkeypatch.setattr(toy, "n_edits", 12)
    toy.write_edits()
    rows = load_examples(tmp_path / "edits.jsonl")
    assert len(rows) == 2 * 4 * 12 and all("<latent>" in row["response"] for row in rows)
    for a, b in zip(rows[::2], rows[1::2]):
        assert a["pair"] == b["pair"]
        changed = {
            "question": a["question"] != b["question"],
            "answer": a["answer"] != b["answer"],
            "board": file_digest(a["images"][0]) != file_digest(b["images"][0]),
            "storyboard": list(map(file_digest, a["aux_images"]))
            != list(map(file_digest, b["aux_images"])),
        }
        assert {name for name, differs in changed.items() if differs} == {
            "start": {"question", "storyboard", "answer"},
            "move": {"question", "storyboard", "answer"},
            "piece": {"board", "answer"},
            "elsewhere": {"board"},
        }[a["category"]]
        # one word of the question, one cell of the board
        words = zip(a["question"].split(), b["question"].split(), strict=True)
        assert sum(x != y for x, y in words) == changed["question"]
        with Image.open(a["images"][0]) as one, Image.open(b["images"][0]) as two:
            box = ImageChops.difference(one, two).getbbox()
        if box:
            assert box[0] // 28 == (box[2] - 1) // 28 and box[1] // 28 == (box[3] - 1) // 28


def test_lessons_are_padded_with_nothing_to_learn(base):
    """Labels are padded with IGNORE, and ids and positions are those of the stages' own encode."""
    vlm, tokenizer = load_vlm(TOY)
    lessons = toy.Lessons(vlm, tokenizer, load_processor(TOY, *PIXELS))
    ids, labels, pos, _, _ = lessons.batch(6, ["question", "think"], random.Random(0))
    end = (ids == tokenizer.eos_token_id).int().flip(1).argmax(1)
    for row, n in zip(labels, end):
        assert n == 0 or (row[-n:] == IGNORE).all()
    assert (end > 0).any()


def test_each_move_moves():
    for seed in range(50):
        names, path = toy.new_path(random.Random(seed), 4)
        assert path == toy.walk(path[0], names) and all(a != b for a, b in zip(path, path[1:]))
