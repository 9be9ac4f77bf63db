"""Pairs of questions that differ in one thing: what followed, counted by hand."""

import hashlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY, method_args, run
from PIL import Image
from safetensors.torch import save_file

import edits
import toy
from data import load_examples
from edits import nearer_to_own
from files import folder_digest, read_json, read_safetensors, write_json, write_lines
from generate import latents_name
from images import open_image
from model import (
    HEAD_FILE,
    encode_images,
    load_processor,
    load_vlm,
    real_features,
)


def test_a_latent_is_nearer_to_one_of_two_pictures():
    real_a = torch.tensor([[9.0, 0], [0, 9], [5, 5]])
    real_b = torch.tensor([[-9.0, 0], [0, 9.1], [5, -5]])  # the second place is the same
    assert nearer_to_own(real_a, real_b, real_a, real_b) == 1.0
    assert nearer_to_own(real_b, real_a, real_a, real_b) == 0.0
    blind = torch.zeros(3, 2)
    blind[0] = real_a[0]  # for both: right for one of them
    assert nearer_to_own(blind, blind, real_a, real_b) == 0.25
    assert nearer_to_own(real_a, real_a, real_a, real_a) is None


def test_an_option_is_its_text_wherever_it_stands():
    """Options in another order: the letters stay, and the answers change; or the other way."""
    one = {"id": "1", "options": ["red", "blue"], "answer": "red"}
    two = {"id": "2", "options": ["blue", "red"], "answer": "B"}

    def follows(a, b):
        said = {
            "1": {"extracted": a, "correct": a == "A"},
            "2": {"extracted": b, "correct": b == "B"},
        }
        return edits.follows(one, two, said)

    assert follows("A", "B") and follows("B", "A")  # both are right, or wrong, alike
    assert not follows("A", "A") and not follows("A", None)


@pytest.mark.parametrize(
    "gold, options, extracted, correct, follows",
    [
        (("4", "4"), None, ("four", "4"), (1, 1), True),
        (("yes", "yes"), None, ("Yes, there is a car.", "Yes."), (1, 1), True),
        (("3", "3"), None, ("There are three blocks.", "It is 3."), (1, 1), True),
        (("3", "3"), None, ("There are five.", "5"), (0, 0), True),  # wrong, and the same
        (("3", "3"), None, ("5", "3"), (0, 1), False),
        (("3", "3"), None, ("4", "3"), (0.5, 1), False),  # half right is another answer
        (("3", "4"), None, ("5", "five"), (0, 0), False),
        (("B", "A"), ["Yes", "Yes, partly", "No"], ("B", "A"), (1, 1), True),
    ],
)
def test_an_answer_is_the_same_however_it_was_put(gold, options, extracted, correct, follows):
    """Which row of a pair comes first does not count."""
    rows = [{"id": str(i), "answer": answer, "options": options} for i, answer in enumerate(gold)]
    lines = [{"extracted": x, "correct": c} for x, c in zip(extracted, correct)]
    for order in (slice(None), slice(None, None, -1)):
        a, b = rows[order]
        said = {row["id"]: line for row, line in zip(rows, lines)}
        assert edits.follows(a, b, said) == follows


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, world, pca):
    out = tmp_path_factory.mktemp("edits") / "m"
    args = [*method_args("gap", base, world, out), f"--pca={pca}", "--difficulty=", "--max_steps=1"]
    run("train.py", *args)
    return out


def test_what_followed_an_edit(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(toy, "data_folder", str(tmp_path))
    monkeypatch.setattr(toy, "n_edits", 3)
    toy.write_edits()
    rows = load_examples(tmp_path / "edits.jsonl")
    monkeypatch.setattr(edits, "model", str(trained))
    features = edits.load_features()

    # answers: right to every question but one of "start" and one of "elsewhere"; latents: the real
    # features, but for "move" the other question's
    wrong = {"edits-start-0-b", "edits-elsewhere-1-a"}
    (tmp_path / "e" / "latents").mkdir(parents=True)
    said, other = [], {}
    for a, b in zip(rows[::2], rows[1::2]):
        other |= {a["id"]: b, b["id"]: a}
    for row in rows:
        answer = "no idea" if row["id"] in wrong else row["answer"].upper()
        said.append({"id": row["id"], "extracted": answer, "correct": row["id"] not in wrong})
        said[-1] |= {"key": f"answer to {row['id']}", "latents": 4}
        shown = other[row["id"]] if row["category"] == "move" else row
        v = features([open_image(path) for path in shown["aux_images"]]).flatten(0, 1)
        name = tmp_path / "e" / "latents" / latents_name(row["id"])
        save_file({"latents": v.contiguous()}, name, {"key": said[-1]["key"]})
    write_lines(tmp_path / "e" / "scored.jsonl", said)
    md5 = hashlib.md5((tmp_path / "edits.jsonl").read_bytes()).hexdigest()
    record = {"settings": {"md5": md5, "save_latents": True}, "weights": folder_digest(trained)}
    write_json(tmp_path / "e" / "metrics.json", record)
    args = [f"--model={trained}", f"--data={tmp_path}/edits.jsonl", f"--answers={tmp_path}/e"]
    printed = run("edits.py", *args)
    found = read_json(tmp_path / "e" / "edits.json")
    (head,) = [line.split() for line in printed.splitlines() if "both_right" in line]
    for kind in toy.EDITS:  # each number below its name
        (cells,) = [x.split() for x in printed.splitlines() if x.startswith(f"{kind} ")]
        for name, cell in zip(head, cells[1:], strict=True):
            number = found[kind][name]
            assert cell == "-" if number is None else float(cell) == pytest.approx(number, abs=6e-4)
    third = pytest.approx(2 / 3)
    a, b = rows[:2]
    unread = {row["id"]: {"extracted": None} for row in (a, b)}
    assert not edits.follows(a, a | {"id": b["id"]}, unread)  # no answer is no answer twice
    # an answer that is no answer has changed, too
    assert [found[kind]["followed"] for kind in toy.EDITS] == [1.0, 1.0, 1.0, third]
    assert [found[kind]["both_right"] for kind in toy.EDITS] == [third, 1.0, 1.0, third]
    assert [found[kind]["own"] for kind in toy.EDITS] == [1.0, 0.0, None, None]
    assert found["piece"]["cosine"] == pytest.approx(1.0) and found["start"]["cosine"] < 0.99

    # of another model, of a run that kept none, and of another run in the same folder
    other_model = [f"--model={TOY}", *args[1:]]
    assert "answers of another model" in run("edits.py", *other_model, ok=False)
    not_kept = record | {"settings": {"md5": md5, "save_latents": False}}
    write_json(tmp_path / "e" / "metrics.json", not_kept)
    assert "the latents were not kept" in run("edits.py", *args, ok=False)
    write_json(tmp_path / "e" / "metrics.json", record)
    write_lines(tmp_path / "e" / "scored.jsonl", [line | {"key": "another"} for line in said])
    run("edits.py", *args)
    assert read_json(tmp_path / "e" / "edits.json")["start"]["own"] is None
    write_lines(tmp_path / "e" / "scored.jsonl", said)

    # answers without latents are answers
    shutil.rmtree(tmp_path / "e" / "latents")
    run("edits.py", *args)
    again = read_json(tmp_path / "e" / "edits.json")
    assert again["start"]["cosine"] is None and again["start"]["followed"] == 1.0
    write_lines(tmp_path / "e" / "scored.jsonl", said[1:])
    assert "no answer to 'edits-start-0-a'" in run("edits.py", *args, ok=False)
    write_lines(tmp_path / "e" / "scored.jsonl", said)
    write_lines(tmp_path / "edits.jsonl", [dict(row) for row in rows[2:]])
    assert "has no answers to" in run("edits.py", *args, ok=False)  # as the file is now
    write_lines(tmp_path / "edits.jsonl", [dict(row) for row in rows[1:]])
    assert "has 1 rows, expected 2" in run("edits.py", *args, ok=False)


def test_real_features_are_those_of_the_targets(tmp_path, trained, world):
    """Made of pictures as small or large as fit_pca.py saw them, as the head's file says."""
    pictures = [open_image(load_examples(world / "train.jsonl")[0]["aux_images"][0])]
    vlm, _ = load_vlm(trained)
    side = pictures[0].width
    for least, most in ((56 * 56, 10**6), ((2 * side) ** 2, 10**6), (28 * 28, (side // 2) ** 2)):
        folder = tmp_path / f"{least}-{most}"
        shutil.copytree(trained, folder)
        tensors, meta = read_safetensors(trained / HEAD_FILE)
        limits = {"min_pixels": str(least), "max_pixels": str(most)}
        save_file(tensors, folder / HEAD_FILE, meta | limits)
        (v,), (grid,) = encode_images(vlm, load_processor(trained, least, most), pictures)
        plane = v.detach().T.view(1, -1, *(grid[1:] // 2))
        want = F.adaptive_avg_pool2d(plane, 2)[0].flatten(1).T
        torch.testing.assert_close(real_features(folder, vlm)(pictures)[0], want)
    # one more folder, whose targets are of pictures resized to 2 x 2 cells
    save_file(tensors, folder / HEAD_FILE, meta | {"mode": "resize"})
    small = [picture.resize((56, 56), Image.BICUBIC) for picture in pictures]
    (v,), _ = encode_images(vlm, load_processor(trained, 1, 10**6), small)
    torch.testing.assert_close(real_features(folder, vlm)(pictures)[0], v.detach())
    assert real_features(TOY, vlm) is None


def test_pooled_latents_have_no_order(monkeypatch):
    """The critics pool them: what is said in another order is the same to them."""
    v = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(edits, "latents_of", lambda line: line["v"])
    said = {"a": {"v": v}, "b": {"v": v.flip(0)}}
    said = {id: line | {"extracted": "x", "correct": 1} for id, line in said.items()}
    a, b = ({"id": id, "answer": "x"} for id in "ab")
    found = edits.compare(a, b, said, None)
    assert found["pooled"] == pytest.approx(1.0) and found["cosine"] < 0.9


def test_means_are_over_the_pairs_that_have_a_number():
    one = {"followed": True, "both_right": True, "cosine": 0.5, "pooled": 0.5, "own": 0.5}
    found = edits.summary(
        [one, one | {"cosine": None, "pooled": None, "own": None, "followed": False}]
    )
    assert found["own"] == found["cosine"] == 0.5 == found["followed"]
