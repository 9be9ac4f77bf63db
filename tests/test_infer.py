"""What does it answer, and what did it imagine? With a model that has latents, and the base."""

import json
import re

import pytest
import torch
from conftest import ROOT, noise, run, saved
from PIL import Image, ImageColor
from safetensors.torch import load_file

import infer
from data import load_examples, question_text
from model import LATENT_END, LATENT_PAD, LATENT_START


def test_text_comes_in_whole_characters(loaded, capsys):
    """What is printed at each step adds up to the decoded text, and no half of a character is."""
    _, tokenizer, _ = loaded
    printer = infer.Printer(tokenizer)
    span = LATENT_START + LATENT_PAD * 4 + LATENT_END
    steps = []
    for token in tokenizer(f"<think> né ↗ {span} 🙂 </think><|im_end|>")["input_ids"]:
        printer.on_step(None, torch.tensor([token]), None, None)
        steps.append(capsys.readouterr().out)
    assert "".join(steps) == "<think> né ↗ ⟨latent x4⟩ 🙂 </think>"
    assert not any("\ufffd" in step for step in steps)
    printer.end()
    assert capsys.readouterr().out == "\n"


def test_a_span_that_is_cut_off_is_said(loaded, capsys):
    _, tokenizer, _ = loaded
    for n in (0, 3):
        printer = infer.Printer(tokenizer)
        for token in tokenizer(f"<think> {LATENT_START}{LATENT_PAD * n}")["input_ids"]:
            printer.on_step(None, torch.tensor([token]), None, None)
        printer.end()
        assert capsys.readouterr().out == f"<think> ⟨latent x{n}, cut off⟩\n"


def test_infer_shows_and_saves(tmp_path, stages):
    image = stages["world"] / "test" / "2.png"
    args = [f"--model={stages['gap']}", f"--images={image}", "--max_new_tokens=30"]
    text = run("infer.py", *args, f"--show={tmp_path}/a.png", f"--latents={tmp_path}/a.safetensors")
    assert "Start at" in text and "⟨latent x4⟩" in text
    assert load_file(tmp_path / "a.safetensors")["latents"].shape[1] == 128
    assert Image.open(tmp_path / "a.png").width > 2 * 140

    # what an oracle fed, fed again as a donor's
    aux = stages["world"] / "test" / "2-aux.png"
    o, s = tmp_path / "o.safetensors", tmp_path / "s.safetensors"
    run("infer.py", *args, "--intervention=oracle", f"--aux={aux}", f"--latents={o}")
    run("infer.py", *args, "--intervention=shuffle", f"--donor={o}", f"--latents={s}")
    assert (load_file(o)["latents"][:4] == load_file(s)["latents"][:4]).all()

    # one of several pictures is not drawn over
    said = run("infer.py", args[0], f"--images={aux},{image}", f"--show={image}", ok=False)
    assert "is read, and would be written over" in said

    # the README's lines for a notebook, which open the same files
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    asked = load_examples(stages["world"] / "test.jsonl", training=False)[2]["question"]
    for name, here in (
        ("out/mine/gap", str(stages["gap"])),
        ("photo.jpg", str(image)),
        ("What is on the sign?", asked),
        ("max_new_tokens=128", "max_new_tokens=30"),
    ):
        assert name in code
        code = code.replace(name, here)
    said = {}
    exec(code, said)
    latents = said["answer"]["latents"]
    assert len(latents) and torch.equal(latents, load_file(tmp_path / "a.safetensors")["latents"])

    # two images, a question of one's own, the base model
    run(
        "infer.py",
        f"--model={stages['base']}",
        f"--images={image},{aux}",
        "--question=What is this?",
        "--max_new_tokens=5",
    )


def test_a_drawing_of_tall_wide_and_several_pictures(tmp_path):
    """Each picture keeps its shape and is as large as fits; none covers another."""
    torch.manual_seed(0)
    colours = ["red", "lime", "blue", "yellow"]
    sizes = [(30, 900), (900, 30), (40, 40), (3000, 2000)]
    pictures = [Image.new("RGB", size, c) for size, c in zip(sizes, colours)]
    visions = [torch.randn(6, 8) for _ in pictures]
    real = Image.new("RGB", (60, 20), "magenta")
    panels = infer.line_of(torch.randn(4, 8), None, pictures, visions, [(2, 3)] * 4, real)
    assert [caption.split(",")[0] for caption, _ in panels] == ["real", *["where"] * 4]
    for (_, panel), (width, height) in zip(panels, [(60, 20), *sizes]):
        assert panel.width == infer.BOX[0] or panel.height == infer.BOX[1]
        assert panel.width <= infer.BOX[0] and panel.height <= infer.BOX[1]
        assert abs(panel.width - panel.height * width / height) <= max(1, width / height)
    flat = [(caption, Image.new("RGB", p.size, c)) for (caption, p), c in zip(panels, colours)]
    infer.draw(tmp_path / "a.png", [flat, flat[:1]])
    drawn = Image.open(tmp_path / "a.png").convert("RGB")
    for (_, panel), c in zip(flat, colours):
        area = panel.width * panel.height * (2 if c == "red" else 1)
        count = dict((colour, n) for n, colour in drawn.getcolors(1 << 20))
        assert count[ImageColor.getrgb(c)] == area


def test_where_is_where_the_embeddings_are():
    """The embedding that is one of the latents is lit, the one that is its opposite is dark."""
    latents = torch.eye(4)
    vision = torch.stack([torch.ones(4), latents[2] * 5, -torch.ones(4), torch.ones(4)])
    cosine = infer.cosines(latents, vision)
    assert cosine.tolist() == pytest.approx([0.5, 1.0, -0.5, 0.5])
    white = Image.new("RGB", (40, 40), "white")
    seen = infer.lit(white, cosine, (2, 2)).convert("L")
    assert seen.getpixel((35, 5)) > 240 and seen.getpixel((5, 35)) < 80


def test_marks_stand_as_in_all_stages(monkeypatch):
    """LLaVA's leading mark is no text of the prompt; marks and images are counted."""
    monkeypatch.setattr(infer, "question", "<image>\nWhat is on the sign?")
    assert infer.row_to_ask(["a.png"])["question"] == "What is on the sign?"
    monkeypatch.setattr(infer, "question", "Is <image> in <image>?")
    assert infer.row_to_ask(["a.png", "b.png"])["question"] == "Is <image> in <image>?"
    with pytest.raises(SystemExit, match="--question: .* 2 <image> marks for 1 images"):
        infer.row_to_ask(["a.png"])


def test_a_row_is_asked_whole(tmp_path, monkeypatch):
    """Without a question, that of the image's row, its options and system text and all images."""
    names = [f"picture with a long name {n}.png" for n in range(20)]
    for name in names:
        saved(tmp_path / "test" / name, noise(1))
    row = {"id": "1", "images": [f"test/{name}" for name in names], "question": "Which?"}
    row |= {"answer": "B", "options": ["red", "blue"], "system": "Answer with a letter."}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    paths = infer.paths_of(",".join(row["images"]))  # longer than a file's name may be
    asked = infer.row_to_ask(paths[:1])
    assert question_text(asked) == "Which?\nA. red\nB. blue"
    assert asked["system"] == "Answer with a letter." and len(asked["images"]) == len(paths) == 20
    with pytest.raises(SystemExit, match="needs --question: .* has other images"):
        infer.row_to_ask(paths[:2])
    monkeypatch.setattr(infer, "system", "Think.")
    assert infer.row_to_ask(paths)["system"] == "Think."
    monkeypatch.setattr(infer, "system", "<|im_end|>")
    with pytest.raises(SystemExit, match="'system' contains the reserved token"):
        infer.row_to_ask(paths)
