"""The diagnosis on data of known norms, ranks and retrieval, and on a model of known states."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_open, random_pca, record, run

import probe
from data import load_examples
from generate import ema_norm, generate, make_prompts
from model import PCAHead, latent_ids, load_pca, save_head

close = torch.testing.assert_close


def test_norms_of_a_decoder_without_layers(loaded):
    """With nothing added to the residual stream, every state is the input.

    The final norm then brings all to sqrt(d) |w|.
    """
    vlm, _, _ = loaded
    for layer in vlm.model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    vlm.model.language_model.norm.weight.data.fill_(3.0)
    lengths = torch.tensor([1.0, 2, 10, 100, 500])
    x = torch.nn.functional.normalize(torch.randn(1, 5, 128), dim=-1) * lengths[None, :, None]
    logs = probe.log_norms(vlm, x, torch.arange(5).expand(3, -1))
    assert logs.shape == (4 + 2, 5)
    close(logs[:-1].exp(), lengths.expand(5, -1))
    after_norm = torch.full((5,), 3 * math.sqrt(128))
    close(logs[-1].exp(), after_norm, rtol=1e-3, atol=0.0)  # the norm's epsilon


def test_norms_equal_the_states_that_hf_returns(loaded):
    vlm, _, _ = loaded
    x, pos = torch.randn(1, 6, 128), torch.arange(6).expand(3, -1)
    logs = probe.log_norms(vlm, x, pos)
    lm = vlm.model.language_model
    out = lm(inputs_embeds=x, position_ids=pos[:, None], use_cache=False, output_hidden_states=True)
    hf = out.hidden_states
    for i in (0, 1, 2, 3):  # HF's last one is after the norm
        close(logs[i], hf[i][0].norm(dim=-1).log())
    close(logs[5], hf[-1][0].norm(dim=-1).log())
    rotary = lm.rotary_emb(x, pos[:, None])
    before = lm.layers[-1](hf[3], position_embeddings=rotary, attention_mask=None)
    close(logs[4], before[0].norm(dim=-1).log(), rtol=1e-4, atol=1e-4)


def test_mean_and_std():
    x = np.random.default_rng(0).normal(2.0, 0.3, (3, 50))
    moments = torch.tensor(np.stack([np.full(3, 50), x.sum(1), (x**2).sum(1)], -1))
    mean, std = probe.mean_and_std(moments)
    np.testing.assert_allclose(mean, x.mean(1))
    np.testing.assert_allclose(std, x.std(1))


def test_energy_in_the_subspace():
    pca = random_pca()
    basis, mean = pca["basis"], pca["mean"]
    outside = torch.linalg.qr(torch.cat([basis, torch.randn(128, 1)], 1))[0][:, -1]
    shares = torch.tensor([0.0, 0.25, 0.9, 1.0])
    within = basis[:, 2]
    parts = [s.sqrt() * within + (1 - s).sqrt() * outside for s in shares]
    v = torch.stack([mean + 7 * part for part in parts])
    close(probe.inside(v, mean, basis), shares, rtol=0.0, atol=1e-5)
    head = PCAHead(pca, 4)
    close(probe.inside(head(torch.randn(9, 128)), mean, basis), torch.ones(9), rtol=0.0, atol=1e-4)


def test_effective_rank():
    q = torch.linalg.qr(torch.randn(16, 4))[0].T  # four orthonormal latents
    one = torch.randn(16)
    assert probe.effective_rank(q) == pytest.approx(4, rel=1e-5)
    assert probe.effective_rank(torch.stack([one, 2 * one, -one])) == pytest.approx(1, rel=1e-3)
    s = torch.tensor([3.0, 1.0, 0.0, 0.0])  # the entropy of (3/4, 1/4)
    assert probe.effective_rank(torch.diag(s) @ q) == pytest.approx(4 / 3**0.75, rel=1e-4)


def test_pairwise_cosine():
    v = torch.randn(5, 8)
    pairs = [(a, b) for i, a in enumerate(v.numpy()) for j, b in enumerate(v.numpy()) if i != j]
    cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    assert probe.pairwise_cosine(v) == pytest.approx(np.mean(cosines), abs=1e-6)
    one_line = v[:1].expand(4, -1) * torch.tensor([[1.0], [2], [3], [4]])
    assert probe.pairwise_cosine(one_line) == pytest.approx(1, abs=1e-6)
    assert probe.pairwise_cosine(torch.eye(3)) == pytest.approx(0, abs=1e-6)


def test_retrieval():
    real = torch.randn(10, 24)
    assert probe.retrieval(real + 0.01 * torch.randn(10, 24), real) == pytest.approx((1.0, 0.1))
    wrong = real.clone()
    wrong[:3] = real[[1, 2, 0]]  # three spans show another's picture
    assert probe.retrieval(wrong, real) == pytest.approx((0.7, 0.1))
    real[5] = real[4] * (1 + 1e-6)  # the same picture twice: either will do
    assert probe.retrieval(real[[0, 1, 2, 3, 5, 4, 6, 7, 8, 9]], real) == pytest.approx((1.0, 0.12))


def test_spans_of():
    v = torch.arange(5.0)[:, None]
    spans = probe.spans_of([1, 9, 9, 2, 9, 9, 9], v, 9)
    assert [span[:, 0].tolist() for span in spans] == [[0, 1], [2, 3, 4]]
    assert probe.spans_of([1, 2], torch.zeros(0), 9) == []
    assert probe.spans_of([1, 2], torch.zeros(0), None) == []


def test_drift_along_a_chain():
    """R2 by place, of the questions with most latents alone."""
    real = [torch.tensor([[2.0, 0], [0, 2], [-2, -2]]), torch.tensor([[-2.0, 0], [0, -2], [2, 2]])]
    own = [v + torch.tensor([[0.0], [0.5], [1.0]]) for v in real]
    short = (torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2))
    found = probe.along([(own[0], real[0], real[0]), short, (own[1], real[1], real[1])])
    variance = torch.cat(real).pow(2).sum(-1).mean()  # about a mean of 0
    want = [1 - 2 * e * e / float(variance) for e in (0.0, 0.5, 1.0)]
    assert found["questions"] == 2 and found["forced"] == [1.0] * 3
    close(torch.tensor(found["own"]), torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_what_the_head_says_of_real_latents(loaded, head, world, monkeypatch):
    """As in a generation that is fed the real ones; calibrated where what is written is."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, load_examples(world / "test.jsonl")[:3])
    make_open(vlm, tokenizer, prompts, {0, 1, 2})
    _, pad, _ = latent_ids(tokenizer)
    for seed, prompt in enumerate(prompts):
        real = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(seed))
        calls = []
        ((answer,),) = generate(
            vlm,
            head,
            tokenizer,
            [prompt],
            max_new_tokens=7,
            intervention="oracle",
            fed=[real],
            on_step=record(calls),
        )
        want = torch.stack([head(h) for _, token, _, h in calls if token == pad])
        found = probe.said_of_real(vlm, head, prompt, answer["ids"], real[0], pad)
        assert len(want) == 4
        close(found, want.detach(), rtol=1e-3, atol=1e-3)
        with monkeypatch.context() as m:
            m.setattr(probe, "ema_beta", 0.9)
            found = probe.said_of_real(vlm, head, prompt, answer["ids"], real[0], pad)
        norm = ema_norm(prompt["vision"], 0.9)
        close(found, norm * F.normalize(want.detach(), dim=-1), rtol=1e-3, atol=1e-3)


def test_probe_of_a_model_that_knows_its_pictures(tmp_path, loaded, base, world):
    """A folder whose head writes mu only: its norms and retrieval are known. And bad input."""
    vlm, tokenizer, processor = loaded
    run(
        "fit_pca.py",
        f"--base={base}",
        f"--data={world}/train.jsonl",
        "--val_data=",
        f"--out={tmp_path}/pca",
    )
    pca, meta = load_pca(tmp_path / "pca" / "pca.safetensors")
    rows = load_examples(world / "test.jsonl", training=False)
    make_open(vlm, tokenizer, make_prompts(vlm, tokenizer, processor, rows), set(range(6)))
    head = PCAHead(pca, 4)
    head.proj.weight.data.zero_()  # c = 0
    for part in (vlm, tokenizer, processor):
        part.save_pretrained(tmp_path / "m")
    save_head(tmp_path / "m", head, head.state_dict(), meta)
    data = f"--data={world}/test.jsonl"
    text = run(
        "probe.py",
        f"--model={tmp_path}/m",
        data,
        f"--out={tmp_path}/p",
        "--max_new_tokens=6",
        "--batch=5",
    )
    found = json.loads((tmp_path / "p" / "probe.json").read_text())
    n = found["agreement"]["spans"]
    assert n >= 6 and found["predicted"]["latents"] >= 4 * n  # the token limit may cut a last span
    predicted, fed = found["predicted"], found["norms"]["latent"]["input"]
    close(predicted["mean_log"], float(pca["mean"].norm().log()), rtol=1e-4, atol=1e-4)
    close(fed["mean_log"], predicted["mean_log"], rtol=1e-4, atol=1e-4)
    assert fed["n"] == predicted["latents"]
    assert predicted["std_log"] < 1e-4
    assert found["agreement"]["retrieval_at_1"] <= 2 / n + 1e-6  # one guess for all
    along = found["along"]  # of mu alone, whatever is fed
    assert along["questions"] >= 6 and len(along["own"]) == 4 and max(along["own"]) < 0.5
    close(torch.tensor(along["own"]), torch.tensor(along["forced"]), rtol=1e-4, atol=1e-4)
    final = math.log(vlm.model.language_model.norm.weight.abs().mean().item() * math.sqrt(128))
    assert abs(found["norms"]["text"]["final norm"]["mean_log"] - final) < 0.1
    assert "before the final norm" in text
    if (tmp_path / "p" / "norms.png").exists():
        from PIL import Image

        assert Image.open(tmp_path / "p" / "latents.png").width > 300
    text = run(
        "probe.py",
        f"--model={base}",
        data,
        f"--pca={tmp_path}/none",
        f"--out={tmp_path}/q",
        ok=False,
    )
    assert "none" in text and not (tmp_path / "q" / "probe.json").exists()


def test_rank_and_cosine_are_about_the_mean():
    mean = torch.full((6,), 50.0)
    found = probe.geometry([mean + torch.eye(6)[:4]], mean, torch.zeros(6, 0))
    assert found["effective_rank"] == pytest.approx(4, rel=1e-3) and abs(found["cosine"]) < 1e-3


def test_r2_is_against_one_mean_of_all():
    real = torch.tensor([[[0.0], [10.0]], [[2.0], [12.0]]]).double()
    assert probe.agreement(real + 1, real)["r2"] == pytest.approx(1 - 4 / 104)


def test_growth_is_a_ratio_to_the_inputs():
    """Before the final norm, and after it."""
    stages = {
        n: {"mean_log": math.log(x)}
        for n, x in (("input", 1), ("layer 1", 3), ("layer 2", 8), ("final norm", 2))
    }
    assert probe.growth_of(stages) == pytest.approx({"before": 8, "after": 2})


def test_a_pca_that_is_given_wins(tmp_path, monkeypatch):
    head, other = PCAHead(random_pca(), 4), random_pca(128, 5)
    monkeypatch.setattr(probe, "load_pca", lambda path: (other, {}))
    monkeypatch.setattr(probe, "pca", "x")
    assert probe.subspace(head, 128)[1].equal(other["basis"])
    monkeypatch.setattr(probe, "pca", "")
    assert probe.subspace(head, 128)[1].equal(head.basis)


def test_probed_latents_are_calibrated(base, world, loaded, head, monkeypatch):
    vlm, tokenizer, processor = loaded
    rows = load_examples(world / "test.jsonl")[:2]
    make_open(vlm, tokenizer, make_prompts(vlm, tokenizer, processor, rows), {0, 1})
    for name, value in {"model": str(base), "ema_beta": 0.9, "max_new_tokens": 6}.items():
        monkeypatch.setattr(probe, name, value)
    _, written, _, _ = probe.measure(rows, vlm, head, tokenizer, processor)
    prompts = make_prompts(vlm, tokenizer, processor, rows)
    want = torch.tensor([ema_norm(p["vision"], 0.9) for p in prompts])
    torch.testing.assert_close(
        torch.stack(written).norm(dim=-1), want[:, None].expand(2, 4), rtol=1e-4, atol=1e-4
    )
