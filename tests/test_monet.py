"""A checkpoint of Monet's layout: its own tokens, no head file, states fed back, spans that the model may end itself."""

import json

import pytest
import torch
from conftest import PIXELS, run
from safetensors.torch import load_file
from test_model import examples, make_open, record

from data import LATENT_SPAN, load_examples, read_lines
from eval import latents_name
from generate import generate, make_prompts, to_text
from model import MONET_TOKENS, MonetHead, latent_ids, load_head, load_processor, load_vlm

close = torch.testing.assert_close


@pytest.fixture
def monet(tmp_path, base):
    """(folder, vlm, tokenizer, processor): a tiny Qwen2.5-VL whose tokenizer knows Monet's three tokens."""
    vlm, tokenizer = load_vlm(base)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(MONET_TOKENS)}, replace_extra_special_tokens=False
    )
    return tmp_path / "monet", vlm, tokenizer, load_processor(base, *PIXELS)


def save(folder, vlm, tokenizer, processor):
    for part in (vlm, tokenizer, processor):
        part.save_pretrained(folder)


def test_states_are_fed_back_until_the_end(monet, world):
    folder, vlm, tokenizer, processor = monet
    head = load_head(folder, vlm, tokenizer, 6)
    assert isinstance(head, MonetHead) and head.K == 6
    prompts, calls = make_prompts(vlm, tokenizer, processor, examples(world, 2)), []
    make_open(vlm, tokenizer, prompts, {0})
    start, pad, end = latent_ids(tokenizer)
    assert [start, pad, end] == [tokenizer.convert_tokens_to_ids(t) for t in MONET_TOKENS]
    (a,), (b,) = generate(vlm, head, tokenizer, prompts, max_new_tokens=12, on_step=record(calls))
    assert a["ids"][:8] == [start, *[pad] * 6, end] and b["ids"][0] != start
    for row, token, x, h in calls:
        if token == pad:
            close(x, h)  # the state after the final norm, as it is
    assert to_text(tokenizer, a["ids"]).startswith(LATENT_SPAN)

    # the LM head's row of the end token: high at the state of the third latent, low at those before it
    states = torch.stack(
        [h for row, _, _, h in calls if row == 0][1:5]
    )  # from the start token to the third latent
    with torch.no_grad():
        vlm.lm_head.weight[end] = torch.linalg.lstsq(
            states, torch.tensor([[-60.0], [-60], [-60], [60]])
        ).solution[:, 0]
    for kwargs in ({}, {"temperature": 0.7, "seeds": [1, 2]}):
        (a,), (b,) = generate(vlm, head, tokenizer, prompts, max_new_tokens=8, **kwargs)
        assert a["ids"][:5] == [start, pad, pad, pad, end] and end not in b["ids"][:1]
    with pytest.raises(SystemExit, match="PCA"):
        generate(vlm, head, tokenizer, prompts, max_new_tokens=8, intervention="noise")


def test_no_span_without_the_tokens(loaded, base, world):
    vlm, tokenizer = load_vlm(base)
    assert load_head(base, vlm, tokenizer, 6) is None and latent_ids(tokenizer) == (
        None,
        None,
        None,
    )


def test_scripts_take_a_monet_checkpoint(monet, world, tmp_path):
    folder, vlm, tokenizer, processor = monet
    rows = load_examples(world / "test.jsonl", training=False)
    prompts = make_prompts(vlm, tokenizer, processor, rows)
    make_open(vlm, tokenizer, prompts, set(range(len(rows))))
    save(folder, vlm, tokenizer, processor)
    args = [f"--model={folder}", "--latent_size=6", "--ema_beta=0.9", "--max_new_tokens=9"]
    run(
        "eval.py", *args, f"--data={world}/test.jsonl", f"--out={tmp_path}/eval", "--save_latents=1"
    )
    answers = {p["id"]: p for p in read_lines(tmp_path / "eval" / "predictions.rank0.jsonl")}
    assert len(answers) == 12 and all(1 <= p["latents"] <= 7 for p in answers.values())
    for row, p in zip(rows, prompts):  # every latent has the running norm of its own query image
        n_bar = p["vision"][0].norm()
        for v in p["vision"][1:]:
            n_bar = 0.9 * n_bar + 0.1 * v.norm()
        latents = load_file(tmp_path / "eval" / "latents" / latents_name(row["id"]))["latents"]
        assert len(latents) == answers[row["id"]]["latents"]
        close(latents.norm(dim=-1), n_bar.expand(len(latents)), rtol=1e-4, atol=1e-4)

    text = run(
        "infer.py", *args, f"--images={world}/test/2.png", f"--latents={tmp_path}/a.safetensors"
    )
    assert f"⟨latent x{answers['test-2']['latents']}⟩" in text or "⟨latent x6⟩" in text
    assert len(load_file(tmp_path / "a.safetensors")["latents"]) == answers["test-2"]["latents"]

    run("probe.py", *args, f"--data={world}/test.jsonl", f"--out={tmp_path}/probe", "--limit=0")
    found = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert found["predicted"]["latents"] == sum(p["latents"] for p in answers.values())
    assert found["predicted"]["inside"] is None and "agreement" not in found
    assert "noise" in run(
        "eval.py",
        *args,
        f"--data={world}/test.jsonl",
        f"--out={tmp_path}/x",
        "--intervention=noise",
        ok=False,
    )
