"""What does it answer, and what did it imagine? With a model that has latents, and the base."""

import torch
from conftest import run
from PIL import Image
from safetensors.torch import load_file

import infer
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

    # two images, a question of one's own, the base model
    run(
        "infer.py",
        f"--model={stages['base']}",
        f"--images={image},{aux}",
        "--question=What is this?",
        "--max_new_tokens=5",
    )
