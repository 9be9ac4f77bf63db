"""The latent head, the inputs and generation, each against an independent computation."""

import pytest
import torch
from conftest import random_pca
from transformers import Qwen2_5_VLForConditionalGeneration

import model
from data import load_examples, open_image, strip_latents
from generate import ema_norm, generate, intervene, make_prompts, pick, to_text
from model import (
    HEADS,
    IGNORE,
    LATENT_END,
    LATENT_PAD,
    LATENT_START,
    FullHead,
    OutputHead,
    PCAHead,
    cross_entropy,
    embed,
    encode,
    encode_images,
    grid_features,
    latent_ids,
    load_head,
    load_vlm,
    save_head,
)

close = torch.testing.assert_close


# --- the head


def test_head_starts_at_the_projection():
    head, h = PCAHead(random_pca(), 4), torch.randn(9, 128)
    assert torch.equal(head.coefficients(h), h @ head.basis)
    close(head(h), (h @ head.basis) @ head.basis.T + head.mean)


@pytest.mark.parametrize("kind", HEADS)
def test_loss_is_the_equation(kind):
    torch.manual_seed(0)
    head, h, v = HEADS[kind](random_pca(), 4), torch.randn(7, 128), torch.randn(7, 128)
    naive = sum(sum((a.item() - b.item()) ** 2 for a, b in zip(x, y)) for x, y in zip(head(h), v))
    close(head.squared_error(h, v).sum().item(), naive, rtol=1e-4, atol=0.0)


def test_gradient_is_the_k_dimensional_one(head):
    """||P_k c + mu - v||^2 and ||c - P_k^T (v - mu)||^2 have one gradient."""
    h, v = torch.randn(7, 128, requires_grad=True), torch.randn(7, 128)
    leaves = [h, *head.parameters()]
    long = torch.autograd.grad((head.reconstruct(head.coefficients(h)) - v).pow(2).sum(), leaves)
    short = torch.autograd.grad(
        (head.coefficients(h) - (v - head.mean) @ head.basis).pow(2).sum(), leaves
    )
    ours = torch.autograd.grad(head.squared_error(h, v).sum(), leaves)
    for a, b, c in zip(long, short, ours):
        close(a, b, rtol=1e-4, atol=1e-4)
        close(c, b, rtol=1e-4, atol=1e-4)


def test_controls():
    """The matched head has GAP's number of weights, the frozen one none; the wide one starts where GAP's does."""
    count = lambda head: sum(p.numel() for p in head.parameters())  # noqa: E731
    for d, k in ((128, 7), (128, 30), (256, 20)):
        pca = random_pca(d, k)
        matched = count(HEADS["matched"](pca, 4)) / count(PCAHead(pca, 4))
        one_more = (2 * d + 1) / count(PCAHead(pca, 4))  # a unit of the hidden layer
        assert abs(matched - 1) <= one_more / 2 + 1e-9
    assert count(HEADS["frozen"](random_pca(), 4)) == 0
    h = torch.randn(5, 128)
    for kind in ("frozen", "wide"):
        close(HEADS[kind](random_pca(), 4)(h), PCAHead(random_pca(), 4)(h))


def test_full_head_has_two_d_squared_weights():
    assert (
        sum(p.numel() for p in FullHead(random_pca(), 4).parameters() if p.ndim == 2) == 2 * 128**2
    )
    assert not list(OutputHead(random_pca(), 4).parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_head_survives_the_disk(tmp_path, loaded, kind):
    torch.manual_seed(0)
    head, h = HEADS[kind](random_pca(), 9), torch.randn(3, 128)
    save_head(tmp_path, head, head.state_dict(), {"mode": "pool"})
    again = load_head(tmp_path, *loaded[:2], 4)
    assert again.K == 9 and again.kind == kind
    close(again(h), head(h))


# --- inputs


def examples(world, n=6):
    return load_examples(world / "train.jsonl")[:n]


def hf_inputs(vlm, processor, ids, paths):
    image = processor(images=[open_image(p) for p in paths], return_tensors="pt") if paths else {}
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "mm_token_type_ids": (ids == vlm.config.image_token_id).int()[None],
        **image,
    }


@pytest.mark.parametrize("images", [0, 1, 2])
def test_logits_equal_hf(loaded, world, images):
    vlm, tokenizer, processor = loaded
    rows = examples(world)
    row = rows[0] | {
        "images": [
            p
            for r in rows[:images]
            for p in (r["images"] + r["aux_images"])[:: 1 if r is rows[1] else 2]
        ][:images]
    }
    e = encode(vlm, tokenizer, processor, row, response=strip_latents(row["response"]))
    vision = (
        torch.cat(encode_images(vlm, processor, [open_image(p) for p in row["images"]])[0])
        if images
        else None
    )
    h = vlm.model.language_model(
        inputs_embeds=embed(vlm, e["ids"][None], vision),
        position_ids=e["pos"][:, None],
        use_cache=False,
    ).last_hidden_state
    close(
        vlm.lm_head(h),
        vlm(**hf_inputs(vlm, processor, e["ids"], row["images"])).logits,
        rtol=1e-4,
        atol=1e-4,
    )


def test_spans_and_labels(loaded, world):
    vlm, tokenizer, processor = loaded
    row = examples(world)[3]
    e = encode(vlm, tokenizer, processor, row, 4, row["response"])
    start, pad, end = map(tokenizer.convert_tokens_to_ids, (LATENT_START, LATENT_PAD, LATENT_END))
    ids, labels = e["ids"].tolist(), e["labels"].tolist()
    at = [i for i, t in enumerate(ids) if t == start]
    assert len(at) == 2 and all(ids[i : i + 6] == [start, pad, pad, pad, pad, end] for i in at)
    assert all(
        labels[i] == start and labels[i + 1 : i + 5] == [IGNORE] * 4 and labels[i + 5] == end
        for i in at
    )
    assert labels[-1] == tokenizer.eos_token_id and ids.count(pad) == 8
    # latent pads take ordinary text positions
    assert (e["pos"][:, at[0] : at[0] + 6].diff(dim=1) == 1).all()


def test_stripping_leaves_nothing(loaded, world):
    vlm, tokenizer, processor = loaded
    latents = [tokenizer.convert_tokens_to_ids(t) for t in (LATENT_START, LATENT_PAD, LATENT_END)]
    for row in examples(world):
        e = encode(vlm, tokenizer, processor, row, 4, strip_latents(row["response"]))
        assert not set(e["ids"].tolist()) & set(latents) and "parser" in tokenizer.decode(e["ids"])


def test_chunked_cross_entropy():
    torch.manual_seed(0)
    h, labels, lm_head = (
        torch.randn(50, 8, requires_grad=True),
        torch.randint(30, (50,)),
        torch.nn.Linear(8, 30),
    )
    plain = torch.nn.functional.cross_entropy(lm_head(h), labels, reduction="sum")
    ours = cross_entropy(h, labels, lm_head, chunk=7)
    close(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours, [h, lm_head.weight]),
        torch.autograd.grad(plain, [h, lm_head.weight]),
    ):
        close(a, b)


def test_pool_is_the_mean_of_blocks(loaded, world):
    """A 4 x 4 grid of merged tokens pooled to 2 x 2 is the mean over 2 x 2 blocks; resize gives the grid itself."""
    vlm, _, processor = loaded
    image = open_image(examples(world)[0]["images"][0]).resize((112, 112))
    v = encode_images(vlm, processor, [image])[0][0].view(4, 4, -1)
    blocks = torch.stack([v[i : i + 2, j : j + 2].mean((0, 1)) for i in (0, 2) for j in (0, 2)])
    close(grid_features(vlm, processor, [image], 4, "pool")[0], blocks)
    small = image.resize((56, 56), 3)
    close(
        grid_features(vlm, processor, [image], 4, "resize")[0],
        encode_images(vlm, processor, [small])[0][0],
    )


# --- the tower's attention

SIZES = {  # (t, h, w) in patches: windows are 8 x 8
    "one": [(1, 16, 24)],  # whole windows only
    "small": [(1, 2, 2)],
    "ragged": [
        (1, 18, 26),
        (1, 6, 6),
        (1, 2, 40),
        (1, 2, 2),
        (1, 26, 18),
        (1, 16, 16),
        (1, 34, 2),
        (1, 6, 6),
    ],
    "frames": [(3, 10, 14), (1, 10, 14)],
}


def two_towers(base, sizes, dtype=torch.float32):
    """Our tower and the stock one, pixels of noise and their grids."""
    grids = torch.tensor(SIZES[sizes])
    towers = load_vlm(base, dtype)[0].model.visual, stock_vlm(base, dtype).model.visual
    return (
        *towers,
        torch.randn(grids.prod(1).sum(), 1176, generator=torch.Generator().manual_seed(0)),
        grids,
    )


def stock_vlm(base, dtype=torch.float32):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=dtype).eval()


@pytest.mark.parametrize(
    "numbers", [model.CHUNK["cpu"], 6400]
)  # 100 patches: a group of windows takes several calls
@pytest.mark.parametrize("sizes", SIZES)
def test_tower_equals_stock(base, sizes, numbers, monkeypatch):
    """Embeddings and all gradients, for sizes that are no multiples of a window or smaller than one."""
    monkeypatch.setitem(model.CHUNK, "cpu", numbers)
    ours, stock, pixels, grids = two_towers(base, sizes)
    found = []
    for tower in (ours, stock):
        x = pixels.clone().requires_grad_()
        v = tower(x, grid_thw=grids).pooler_output
        found.append((v, *torch.autograd.grad(v.sin().sum(), [x, *tower.parameters()])))
    for a, b in zip(*found):
        close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def test_tower_equals_stock_in_bfloat16(base):
    ours, stock, pixels, grids = two_towers(base, "ragged", torch.bfloat16)
    a, b = (tower(pixels.bfloat16(), grid_thw=grids).pooler_output for tower in (ours, stock))
    assert a.dtype == torch.bfloat16
    close(a, b)


def test_windows_share_a_call(base, monkeypatch):
    """A window layer makes a call for every length, not for every window; so does a layer of whole images."""
    ours, stock, pixels, grids = two_towers(base, "ragged", torch.bfloat16)
    pixels = pixels.bfloat16()
    attention, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(q, *args, **kwargs):
        calls.append(q.shape)
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    stock(pixels, grid_thw=grids)
    one_by_one, n = (
        calls[:],
        sum(-(-h // 8) * -(-w // 8) for _, h, w in SIZES["ragged"]),
    )  # n windows, then 8 images
    calls.clear()
    ours(pixels, grid_thw=grids)
    assert sum(s[0] for s in calls) == len(one_by_one) == n + 8
    assert len(calls) == len({s[2] for s in one_by_one[:n]}) + len({s[2] for s in one_by_one[n:]})


def test_windows_are_taken_once():
    """Every patch is in one batch, in a window of its own bounds; neighbours are a slice."""
    lengths = torch.tensor([64] * 70 + [16, 64, 16, 5000, 4, 64, 64])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    patches, window = (
        torch.arange(int(bounds[-1])),
        torch.arange(len(lengths)).repeat_interleave(lengths),
    )
    seen = []
    for length, at in model.equal_windows(bounds, 4096):
        taken = patches[at].view(-1, length)
        assert (window[taken] == window[taken[:, :1]]).all() and (
            lengths[window[taken[:, 0]]] == length
        ).all()
        assert len(taken) == 1 or taken.numel() <= 4096
        assert isinstance(at, slice) == bool((taken.flatten().diff() == 1).all())
        seen += taken.flatten().tolist()
    assert sorted(seen) == patches.tolist()


def test_saved_config_is_stock(base, tmp_path):
    """The attention's name is of the running process: neither in a saved folder nor on the language model."""
    vlm, stock = load_vlm(base)[0], stock_vlm(base)
    assert vlm.model.visual.config._attn_implementation == model.TOWER_ATTENTION
    assert (
        vlm.model.language_model.config._attn_implementation
        == vlm.config._attn_implementation
        == "sdpa"
    )
    vlm.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert (tmp_path / "ours" / "config.json").read_text() == (
        tmp_path / "stock" / "config.json"
    ).read_text()
    again = stock_vlm(tmp_path / "ours")
    assert again.model.visual.config._attn_implementation == "sdpa"
    pixels, grids = torch.randn(36, 1176), torch.tensor([[1, 6, 6]])
    close(*(m.model.visual(pixels, grid_thw=grids).pooler_output for m in (vlm, again)))


# --- generation


def make_open(vlm, tokenizer, prompts, opens):
    """Turn the LM head so that prompts[opens] begin with a latent span, and the others do not."""
    from generate import Decoder

    with torch.no_grad():
        h = torch.cat([Decoder(vlm, [p], 1, 0).h[:, 0] for p in prompts])
        want = torch.tensor([60.0 if i in opens else -60.0 for i in range(len(prompts))])
        vlm.lm_head.weight[latent_ids(tokenizer)[0]] = torch.linalg.lstsq(
            h, want[:, None]
        ).solution[:, 0]


def test_greedy_equals_hf_generate(loaded, world):
    """A left-padded batch: text only, one image, two images of different sizes."""
    vlm, tokenizer, processor = loaded
    rows = examples(world, 4)
    rows[0]["images"] = []
    ours = generate(
        vlm, None, tokenizer, make_prompts(vlm, tokenizer, processor, rows), max_new_tokens=40
    )
    for row, (a,) in zip(rows, ours):
        ids = encode(vlm, tokenizer, processor, row)["ids"]
        vlm.model.rope_deltas = None
        no_token = [
            *range(len(tokenizer) - 3, vlm.config.text_config.vocab_size)
        ]  # latent tokens and spare rows
        hf = vlm.generate(
            **hf_inputs(vlm, processor, ids, row["images"]),
            max_new_tokens=40,
            do_sample=False,
            suppress_tokens=no_token,
        )
        assert a["ids"] == hf[0, len(ids) :].tolist()


def test_latents_equal_a_full_forward(loaded, head, world):
    """Every latent of the cached, step-by-step loop is the head's output in one forward over the whole sequence."""
    vlm, tokenizer, processor = loaded
    row = examples(world, 1)[0]
    (prompt,) = make_prompts(vlm, tokenizer, processor, [row])
    make_open(vlm, tokenizer, [prompt], {0})
    ((a,),) = generate(vlm, head, tokenizer, [prompt], max_new_tokens=20)
    pad = tokenizer.convert_tokens_to_ids(LATENT_PAD)
    assert a["ids"][:6] == [
        *map(tokenizer.convert_tokens_to_ids, (LATENT_START, *[LATENT_PAD] * 4, LATENT_END))
    ]
    ids = torch.cat([prompt["ids"], torch.tensor(a["ids"])])
    pos = torch.cat(
        [prompt["pos"], prompt["pos"].max() + 1 + torch.arange(len(a["ids"])).expand(3, -1)], 1
    )
    x = embed(vlm, ids[None], prompt["vision"], a["latents"], pad)
    h = vlm.model.language_model(
        inputs_embeds=x, position_ids=pos[:, None], use_cache=False
    ).last_hidden_state[0]
    before = (ids[1:] == pad).nonzero()[:, 0]
    assert len(before) == len(a["latents"]) >= 4
    close(head(h[before]), a["latents"], rtol=1e-4, atol=1e-4)
    for t in range(
        len(prompt["ids"]) - 1, len(ids) - 1
    ):  # and the text between the spans is greedy
        if ids[t + 1] not in (pad, tokenizer.convert_tokens_to_ids(LATENT_END)):
            logits = vlm.lm_head(h[t])
            logits[[pad, tokenizer.convert_tokens_to_ids(LATENT_END)]] = -torch.inf
            assert logits[: len(tokenizer)].argmax() == ids[t + 1]


def test_mixed_batch_equals_one_by_one(loaded, head, world):
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 5))
    make_open(vlm, tokenizer, prompts, {1, 3})
    kwargs = dict(max_new_tokens=24, n_samples=2, temperature=0.7)
    together = generate(vlm, head, tokenizer, prompts, seeds=list(range(10)), **kwargs)
    start = tokenizer.convert_tokens_to_ids(LATENT_START)
    assert [a["ids"][0] == start for a, _ in together] == [False, True, False, True, False]
    for i, p in enumerate(prompts):
        (alone,) = generate(vlm, head, tokenizer, [p], seeds=[2 * i, 2 * i + 1], **kwargs)
        for a, b in zip(alone, together[i]):
            assert a["ids"] == b["ids"]
            close(a["latents"], b["latents"], rtol=1e-4, atol=1e-4)


def record(calls):
    def on_step(rows, tokens, x, h):
        with torch.inference_mode(False):  # clones that autograd may touch
            calls.extend(zip(rows.tolist(), tokens.tolist(), x.clone(), h.clone()))

    return on_step


def test_start_token_keeps_its_embedding(loaded, head, world):
    vlm, tokenizer, processor = loaded
    prompts, calls = make_prompts(vlm, tokenizer, processor, examples(world, 1)), []
    make_open(vlm, tokenizer, prompts, {0})
    generate(vlm, head, tokenizer, prompts, max_new_tokens=8, on_step=record(calls))
    table = vlm.get_input_embeddings().weight.detach()
    pad = tokenizer.convert_tokens_to_ids(LATENT_PAD)
    assert calls[0][1] == tokenizer.convert_tokens_to_ids(LATENT_START)
    for (_, token, x, _), (_, _, _, h) in zip(calls, calls):
        close(x, head(h).detach() if token == pad else table[token])


def test_shared_prefill_equals_separate_prefills(loaded, world):
    """8 samples from one prefill have the logits of 8 prefills, at every step, whatever else is in the batch."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 3))
    shared, kwargs = [], dict(max_new_tokens=16, temperature=1.0)
    generate(
        vlm,
        None,
        tokenizer,
        prompts,
        n_samples=8,
        seeds=list(range(24)),
        on_step=record(shared),
        **kwargs,
    )
    for row in range(24):
        calls = []
        generate(
            vlm, None, tokenizer, [prompts[row // 8]], seeds=[row], on_step=record(calls), **kwargs
        )
        mine = [c for c in shared if c[0] == row]
        assert [c[1] for c in mine] == [c[1] for c in calls]
        close(
            vlm.lm_head(torch.stack([c[3] for c in mine])),
            vlm.lm_head(torch.stack([c[3] for c in calls])),
            rtol=1e-4,
            atol=1e-4,
        )


def test_finished_rows_are_dropped_without_a_trace(loaded, world):
    """Dropping a question when it is decided changes no other question's answers."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 4))
    vlm.lm_head.weight.data[tokenizer.eos_token_id] *= 4  # rows end at various lengths
    kwargs = dict(max_new_tokens=40, n_samples=4, temperature=1.0, seeds=list(range(16)))
    full = generate(vlm, None, tokenizer, prompts, **kwargs)
    ended = []
    part = generate(
        vlm,
        None,
        tokenizer,
        prompts,
        on_finish=lambda q, s, ids: ended.append((q, s)) or q == 1,
        **kwargs,
    )
    assert len({len(a["ids"]) for q in full for a in q}) > 3
    assert [[a["ids"] for a in q] for i, q in enumerate(full) if i != 1] == [
        [a["ids"] for a in q] for i, q in enumerate(part) if i != 1
    ]
    assert sum(q == 1 for q, _ in ended) < 4 or len({len(a["ids"]) for a in full[1]}) == 1


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -torch.inf, 2.0]]).expand(20000, -1)
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7)):
        p = torch.softmax(logits[0] / temperature, -1)
        if top_p < 1:  # the smallest set that reaches top_p: tokens 3 and 0
            p = p * torch.tensor([1.0, 0, 0, 1.0])
        drawn = torch.bincount(pick(logits, temperature, top_p, u), minlength=4) / 20000
        close(drawn, p / p.sum(), rtol=0.0, atol=0.012)
    assert pick(logits[:2], 1.0, 1.0, torch.tensor([0.0, 1 - 1e-7])).tolist() == [0, 3]


def test_ema_is_the_loop():
    v = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    close(ema_norm(v, 0.9), 0.9 * (0.9 * 5 + 0.1 * 1) + 0.1 * 10)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_ema_is_the_weighted_sum(beta):
    """Unrolled: the first norm weighs beta^(N-1), norm i (1 - beta) beta^(N-1-i), term by term over the coordinates."""
    v = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)).double()
    norms = [sum(x * x for x in row) ** 0.5 for row in v.tolist()]
    slow = beta**29 * norms[0] + sum((1 - beta) * beta ** (29 - i) * norms[i] for i in range(1, 30))
    assert ema_norm(v, beta) == pytest.approx(slow, rel=1e-6)


@pytest.mark.parametrize("beta", [0.9])
def test_ema_calibration_sets_the_norm(loaded, head, world, beta):
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 1))
    make_open(vlm, tokenizer, prompts, {0})
    ((a,),) = generate(vlm, head, tokenizer, prompts, max_new_tokens=6, ema_beta=beta)
    close(a["latents"].norm(dim=-1), torch.full((4,), ema_norm(prompts[0]["vision"], beta)))


# --- interventions: what is fed


def test_interventions_change_what_is_fed(loaded, head, world):
    vlm, tokenizer, processor = loaded
    rows = examples(world, 2)
    prompts = make_prompts(vlm, tokenizer, processor, rows)
    make_open(vlm, tokenizer, prompts, {0, 1})
    fed = list(
        grid_features(vlm, processor, [open_image(r["aux_images"][0]) for r in rows], 4, "pool")
        .detach()
        .split(1)
    )
    pad = tokenizer.convert_tokens_to_ids(LATENT_PAD)

    def latents(kind, seeds=(0, 1)):
        calls = []
        generate(
            vlm,
            head,
            tokenizer,
            prompts,
            max_new_tokens=6,
            intervention=kind,
            fed=fed,
            seeds=list(seeds),
            on_step=record(calls),
        )
        return torch.stack(
            [x for row, token, x, _ in calls if token == pad and row == 0] or [torch.zeros(0)]
        ), calls

    clean, _ = latents("clean")
    assert clean.shape == (4, 128)
    assert latents("zero")[0].numel() == 0 and all(t != pad for _, t, _, _ in latents("zero")[1])
    close(latents("mean")[0], head.mean.expand(4, -1))
    close(latents("oracle")[0], fed[0][0])
    close(latents("shuffle")[0], fed[0][0])
    close(latents("oracle_pca")[0], head.mean + (fed[0][0] - head.mean) @ head.basis @ head.basis.T)
    noise, calls = latents("noise")
    predicted = head(torch.stack([h for row, token, _, h in calls if token == pad and row == 0]))
    close(noise.norm(dim=-1), predicted.norm(dim=-1), rtol=1e-3, atol=1e-3)
    assert (noise - clean).norm() > 0.1 * clean.norm()
    close(noise, latents("noise")[0])
    assert not torch.allclose(noise, latents("noise", (5, 6))[0])


def test_noise_has_the_training_spread(head):
    draws = torch.randn(20000, 6, generator=torch.Generator().manual_seed(0))
    w = head.reconstruct(draws * head.eigenvalues.sqrt())
    fed = intervene("noise", head, w, draws)  # rescaled to its own norm: unchanged
    close(fed, w)
    close(((fed - head.mean) @ head.basis).std(0), head.eigenvalues.sqrt(), rtol=0.03, atol=0.0)


def test_forced_text_after_a_span(loaded, head, world):
    """`after` follows each span at once, and the text then goes on as if the model had written it."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 2))
    make_open(vlm, tokenizer, prompts, {0})
    after = tokenizer(" </think> <answer>")["input_ids"]
    (a,), (b,) = generate(
        vlm, head, tokenizer, prompts, max_new_tokens=24, after=" </think> <answer>"
    )
    start, pad, end = latent_ids(tokenizer)
    assert a["ids"][: 6 + len(after)] == [start, *[pad] * 4, end, *after]
    assert b["ids"][:1] != [start] and len(after) > 1
    ids = torch.cat([prompts[0]["ids"], torch.tensor(a["ids"])])
    pos = torch.cat(
        [
            prompts[0]["pos"],
            prompts[0]["pos"].max() + 1 + torch.arange(len(a["ids"])).expand(3, -1),
        ],
        1,
    )
    x = embed(vlm, ids[None], prompts[0]["vision"], a["latents"], pad)
    h = vlm.model.language_model(
        inputs_embeds=x, position_ids=pos[:, None], use_cache=False
    ).last_hidden_state[0]
    logits = vlm.lm_head(h[len(prompts[0]["ids"]) + 5 + len(after)])
    logits[[pad, end]] = -torch.inf
    assert logits[: len(tokenizer)].argmax() == a["ids"][6 + len(after)]


def test_text_of_spans(loaded):
    _, tokenizer, _ = loaded
    text = "<think> Follow the dot. <latent></latent> <parser> four </parser> </think>"
    span = LATENT_START + LATENT_PAD * 4 + LATENT_END
    assert (
        to_text(
            tokenizer,
            tokenizer(text.replace("<latent></latent>", span) + "<|im_end|>")["input_ids"],
        )
        == text
    )
