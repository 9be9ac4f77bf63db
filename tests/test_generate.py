"""How text and latents are written: each against an independent computation."""

import copy
import json
from functools import partial
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    PIXELS,
    answers_that_end,
    assert_same,
    examples,
    hf_inputs,
    make_open,
    random_pca,
    record,
    run,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import decoder
import generate as generate_file
from data import LATENT_SPAN, load_examples
from files import read_lines
from generate import (
    Question,
    calibrate,
    check_intervention,
    ema_norm,
    from_all,
    from_nucleus,
    generate,
    intervene,
    latents_name,
    load_latents_file,
    make_prompts,
    pick,
    save_latents_file,
    stream,
    to_text,
)
from images import open_image
from model import (
    LATENT_END,
    LATENT_PAD,
    LATENT_START,
    MONET_TOKENS,
    MonetHead,
    PCAHead,
    embed,
    encode,
    grid_features,
    latent_ids,
    load_head,
    load_processor,
    load_vlm,
)

close = torch.testing.assert_close


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
        # latent tokens, spare rows, and a picture's place, which the model has no picture for
        never = [*range(len(tokenizer) - 3, vlm.config.text_config.vocab_size)]
        never.append(vlm.config.image_token_id)
        hf = vlm.generate(
            **hf_inputs(vlm, processor, ids, row["images"]),
            max_new_tokens=40,
            do_sample=False,
            suppress_tokens=never,
        )
        assert a["ids"] == hf[0, len(ids) :].tolist()


def test_latents_equal_a_full_forward(loaded, head, world):
    """Every latent of the cached, step-by-step loop is the head's output in one whole forward."""
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
    """8 samples from one prefill have the logits of 8 prefills, at every step, in any batch."""
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


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_a_question_that_ends_makes_room(loaded, head, world, monkeypatch, at_once):
    """Whoever is answered beside it, and whenever it begins, a question has the same answers."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 6))
    make_open(vlm, tokenizer, prompts, {1, 4})
    monkeypatch.setattr(decoder, "FIRST_POSITIONS", 4)
    steps = []  # {q with a living row} a step

    def on_step(rows, *_):
        steps.append({row // 8 for row in rows.tolist()})

    all_at_once = answers_that_end(vlm, head, tokenizer, prompts, 6)
    assert_same(answers_that_end(vlm, head, tokenizer, prompts, at_once, on_step), all_at_once)
    assert max(map(len, steps)) == at_once
    # some begin beside others that are not done: nobody waits for the last of a batch
    beside = [after - before for before, after in pairwise(steps) if before & after]
    assert any(beside) == (at_once > 1)


def test_waves_are_all_samples(loaded):
    vlm, tokenizer, _ = loaded
    answers = stream(vlm, None, tokenizer, None, 1, max_new_tokens=1, n_samples=4, waves=[1, 2])
    with pytest.raises(ValueError, match="waves of 3 samples; expected n_samples=4"):
        next(answers)


def test_a_dropped_question_makes_room(loaded, world):
    """A question that is dropped in its first wave has no second, and its place is taken."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 6))
    rest, rows = iter([p | {"seeds": [1, 2, 3]} for p in prompts]), set()
    found = stream(
        vlm,
        None,
        tokenizer,
        lambda n: list(islice(rest, n)),
        2,
        max_new_tokens=4,
        n_samples=3,
        waves=[1, 2],
        temperature=1.0,
        on_step=lambda numbers, *_: rows.update(numbers.tolist()),
        on_finish=lambda q, s, ids: q % 2 == 0,
    )
    answers = dict(found)
    assert sorted(answers) == list(range(6))
    assert rows == {3 * q + s for q in range(6) for s in range(3) if q % 2 or s == 0}
    assert [len(a["ids"]) for a in answers[0]] == [4, 0, 0]


@pytest.mark.parametrize("k", [1, 3, 20, 1024])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.9999])
def test_nucleus_is_that_of_a_whole_sort(top_p, k, monkeypatch):
    """The draws of each row, peaked, flat, tied as in bfloat16, or with tokens that are never."""
    monkeypatch.setattr(generate_file, "NUCLEUS", k)
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.0, 0.01, 1, 3, 10]).repeat(40)[:, None]
    logits = (torch.randn(200, 500, generator=g) * scales).bfloat16().float()
    logits[:, ::7] = -torch.inf
    p, u = logits.softmax(-1), torch.rand(200, generator=g)
    slow = p.clone()
    for row in slow:
        before = 0.0
        for i in row.argsort(descending=True, stable=True).tolist():
            inside = before < top_p or before == 0.0
            before += float(row[i])
            row[i] *= inside
    if top_p == 0.0:
        assert ((slow > 0).sum(-1) == 1).all()
    assert torch.equal(from_nucleus(p, top_p, u, k), from_all(slow, u))


class There(torch.Tensor):
    """A tensor that stands for one of another device, which no tensor of this one may index."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[1], cls):
            assert isinstance(args[0], cls), "indexed here by what is there"
        return super().__torch_function__(function, types, args, kwargs or {})


def test_draws_follow_the_logits_to_their_device(monkeypatch):
    """A flat nucleus, for which more tokens are looked at: on a GPU u comes from the CPU."""
    logits, u = torch.zeros(3, 1000), torch.tensor([0.1, 0.5, 0.9])
    here = pick(logits, 1.0, 0.9, u)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, other: x.as_subclass(There))
    assert pick(logits.as_subclass(There), 1.0, 0.9, u).tolist() == here.tolist()


def test_ema_is_the_loop():
    v = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]])
    close(ema_norm(v, 0.9), 0.9 * (0.9 * 5 + 0.1 * 1) + 0.1 * 10)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_ema_is_the_weighted_sum(beta):
    """Unrolled: the first norm weighs beta^(N-1), norm i (1 - beta) beta^(N-1-i)."""
    v = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)).double()
    norms = [sum(x * x for x in row) ** 0.5 for row in v.tolist()]
    slow = beta**29 * norms[0] + sum((1 - beta) * beta ** (29 - i) * norms[i] for i in range(1, 30))
    assert ema_norm(v, beta) == pytest.approx(slow, rel=1e-6)


def test_rows_of_a_notebook(loaded, world, tmp_path):
    """PIL's images, one image without its list, none at all; a file's row is as it was."""
    vlm, tokenizer, processor = loaded
    row = examples(world, 1)[0]
    (path,) = row["images"]
    asked = {"question": row["question"]}
    rows = [row | {"images": x} for x in ([path], path, open_image(path), [open_image(path)])]
    first, *others = make_prompts(vlm, tokenizer, processor, rows)
    for prompt in others:
        assert torch.equal(prompt["ids"], first["ids"])
        assert torch.equal(prompt["vision"], first["vision"])
    (text,) = make_prompts(vlm, tokenizer, processor, [asked])
    assert text["vision"] is None
    # as its path would give it: turned by its tag, and RGB
    photo = open_image(path).convert("CMYK").resize((112, 56))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    both = str(tmp_path / "photo.jpg"), Image.open(tmp_path / "photo.jpg")
    one, other = make_prompts(vlm, tokenizer, processor, [row | {"images": [x]} for x in both])
    assert torch.equal(one["vision"], other["vision"]) and torch.equal(one["pos"], other["pos"])
    with pytest.raises(SystemExit, match="reserved token '<|image_pad|>'".replace("|", r"\|")):
        make_prompts(vlm, tokenizer, processor, [{"question": "What is <|image_pad|>?"}])


def test_what_a_call_needs_and_lacks_is_said(loaded, world):
    vlm, tokenizer, processor = loaded
    head = PCAHead(random_pca(), 4)
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 2))
    ask = partial(generate, vlm, head, tokenizer, prompts, max_new_tokens=2)
    for wrong, words in (
        ({"temperature": 1.0, "seeds": [1]}, "1 seeds; expected 2"),
        ({"intervention": "shuffle"}, "shuffle feeds what `fed` gives, which is missing"),
        ({"intervention": "oracle", "fed": [torch.zeros(4, 128)] * 2}, "expected latents"),
        ({"intervention": "oracle", "fed": [torch.zeros(1, 4, 128)]}, "each of 2 prompts"),
    ):
        with pytest.raises(ValueError, match=words):
            ask(**wrong)
    sampled = []
    for _ in range(2):  # without seeds torch's own generator draws
        torch.manual_seed(5)
        answers = ask(temperature=1.0, n_samples=3)
        sampled.append([answer["ids"] for answer in sum(answers, [])])
    assert sampled[0] == sampled[1] and len(sampled[0]) == 6


def test_a_zero_latent_has_no_norm_to_set():
    v = torch.tensor([[3.0, 4], [0, 0], [3, 4]])
    close(calibrate(v, torch.tensor([10.0, 10, 0])), torch.tensor([[6.0, 8], [0, 0], [3, 4]]))


@pytest.mark.parametrize("beta", [0.9])
def test_ema_calibration_sets_the_norm(loaded, head, world, beta):
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 1))
    make_open(vlm, tokenizer, prompts, {0})
    ((a,),) = generate(vlm, head, tokenizer, prompts, max_new_tokens=6, ema_beta=beta)
    close(a["latents"].norm(dim=-1), torch.full((4,), ema_norm(prompts[0]["vision"], beta)))


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


def test_markers_without_latents(loaded, head, world):
    """The span ends at once, and the text goes on as greedily as from those two tokens alone."""
    vlm, tokenizer, processor = loaded
    (prompt,) = make_prompts(vlm, tokenizer, processor, examples(world, 1))
    make_open(vlm, tokenizer, [prompt], {0})
    ((a,),) = generate(vlm, head, tokenizer, [prompt], max_new_tokens=8, intervention="markers")
    start, pad, end = latent_ids(tokenizer)
    assert a["ids"][:2] == [start, end] and not len(a["latents"]) and pad not in a["ids"]
    n, ids = len(prompt["ids"]), torch.cat([prompt["ids"], torch.tensor(a["ids"])])
    after = prompt["pos"].max() + 1 + torch.arange(len(a["ids"])).expand(3, -1)
    h = vlm.model.language_model(
        inputs_embeds=embed(vlm, ids[None], prompt["vision"]),
        position_ids=torch.cat([prompt["pos"], after], 1)[:, None],
        use_cache=False,
    ).last_hidden_state[0]
    for t in range(n + 1, len(ids) - 1):
        logits = vlm.lm_head(h[t])[: len(tokenizer)]
        logits[[pad, end]] = -torch.inf
        assert ids[t + 1] == end or logits.argmax() == ids[t + 1]


def test_pads_are_never_written(loaded, head, world):
    """Not by a model to which they are the likeliest: no picture and no latent is behind them."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 2))
    pads = [vlm.config.image_token_id, latent_ids(tokenizer)[1]]
    with torch.no_grad():
        vlm.lm_head.weight[pads] *= 1000  # of one of two signs it wins everywhere
    for answers in generate(vlm, head, tokenizer, prompts, n_samples=2, max_new_tokens=20):
        for answer in answers:
            assert vlm.config.image_token_id not in answer["ids"]
            assert answer["ids"].count(pads[1]) == len(answer["latents"])


def test_what_feeds_nothing_of_its_own_is_refused(head):
    """A name without a branch would be a clean run under another name."""
    v_hat = torch.randn(3, len(head.mean))
    assert intervene("clean", head, v_hat) is v_hat
    with pytest.raises(ValueError, match="'negate' feeds no latents"):
        intervene("negate", head, v_hat)


def test_noise_has_the_training_spread(head):
    draws = torch.randn(20000, 6, generator=torch.Generator().manual_seed(0))
    w = head.reconstruct(draws * head.eigenvalues.sqrt())
    fed = intervene("noise", head, w, draws)  # rescaled to its own norm: unchanged
    close(fed, w)
    close(((fed - head.mean) @ head.basis).std(0), head.eigenvalues.sqrt(), rtol=0.03, atol=0.0)


def test_forced_text_after_a_span(loaded, head, world):
    """`after` follows each span at once; the text then goes on as if the model had written it."""
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


@pytest.fixture
def monet(tmp_path, base):
    """(folder, vlm, tokenizer, processor): a tiny Qwen2.5-VL that knows Monet's three tokens."""
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
    for _, token, x, h in calls:
        if token == pad:
            close(x, h)  # the state after the final norm, as it is
    assert to_text(tokenizer, a["ids"]).startswith(LATENT_SPAN)

    # the LM head's row of the end token: high at the third latent's state, low at those before it
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
        generate(vlm, head, tokenizer, prompts, max_new_tokens=8, intervention="oracle")


def test_no_span_without_the_tokens(loaded, base, world):
    vlm, tokenizer = load_vlm(base)
    assert load_head(base, vlm, tokenizer, 6) is None and latent_ids(tokenizer) == (
        None,
        None,
        None,
    )


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
def test_latent_ids_are_looked_up(loaded, base, monkeypatch, unknown):
    """No copy of the vocabulary an answer; a token that is not there is not the unknown one."""
    _, tokenizer, _ = loaded
    without = load_vlm(base)[1]
    monkeypatch.setattr(type(tokenizer), "get_vocab", None)
    for t in (tokenizer, without):
        t.unk_token = unknown
    assert latent_ids(tokenizer) == list(range(len(tokenizer) - 3, len(tokenizer)))
    assert latent_ids(without) == (None, None, None)


def test_no_latents_of_an_earlier_answer_stay(tmp_path, head):
    """Whole spans are written; an answer without one leaves no file, whatever was there."""
    path, v = tmp_path / "a.safetensors", torch.randn(2 * head.K + 1, head.mean.shape[0])
    save_latents_file(path, v, head)
    close(load_file(path)["latents"], v[:-1])
    assert load_latents_file(path, head).shape == (2, head.K, v.shape[1])
    # a file of a head whose spans are longer is none of this one's
    save_file({"latents": v[: 2 * head.K]}, path, {"K": str(2 * head.K)})
    with pytest.raises(SystemExit, match=f"in spans of {2 * head.K}"):
        load_latents_file(path, head)
    save_latents_file(path, v[: head.K - 1], head)
    assert not path.exists()


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
    asked = [*args, f"--data={world}/test.jsonl", f"--out={tmp_path}/x", "--limit=3"]
    assert "needs the PCA" in run("eval.py", *asked, "--intervention=mean", ok=False)
    run("eval.py", *asked, "--intervention=noise")  # of the states' own norm


def test_a_nucleus_ends_where_it_has_its_share():
    log_p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    drawn = {int(pick(log_p, 1.0, 0.5, torch.tensor([u]))) for u in (0.0, 0.3, 0.6, 0.99)}
    assert drawn == {0}


def test_a_shorter_donor_is_repeated_span_by_span():
    """Not its last latent: the first of a second span is its first."""
    fed = torch.randn(1, 4, 7)
    prompt = {"fed": fed, "vision": None}
    cache = SimpleNamespace(last=torch.zeros(1, 7))
    question = Question(
        0, prompt, cache, 0, n_samples=1, max_new_tokens=9, temperature=0, ema_beta=0
    )
    assert question.answers([])[0]["latents"].shape == (0, 7)
    for i in range(8):
        close(question.stand_in(0), fed[0, i % 4])
        question.latents[0].append(question.stand_in(0))


def test_finished_is_ended_by_a_stop(loaded, world):
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 2))
    vlm.generation_config.eos_token_id = list(range(0, len(tokenizer), 9))
    for n in (1, 40):
        for (a,) in generate(vlm, None, tokenizer, prompts, max_new_tokens=n):
            stopped = a["ids"][-1] % 9 == 0 or a["ids"][-1] == tokenizer.eos_token_id
            assert a["finished"] == stopped


def test_calibrated_latents_are_fed(loaded, head, world):
    """What is kept of an answer is what was fed."""
    vlm, tokenizer, processor = loaded
    prompts, calls = make_prompts(vlm, tokenizer, processor, examples(world, 1)), []
    make_open(vlm, tokenizer, prompts, {0})
    ((a,),) = generate(
        vlm, head, tokenizer, prompts, max_new_tokens=6, ema_beta=0.9, on_step=record(calls)
    )
    fed = torch.stack([x for _, token, x, _ in calls if token == latent_ids(tokenizer)[1]])
    torch.testing.assert_close(fed, a["latents"])


def test_predictions_are_calibrated_and_what_stands_in_for_them_is_not(loaded, head, world):
    """The noise has the length of what it replaces; real features stay what they are."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 1))
    make_open(vlm, tokenizer, prompts, {0})
    n_bar, real = ema_norm(prompts[0]["vision"], 0.9), 3 * torch.randn(1, 4, len(head.mean))
    fed = {}
    for kind in ("noise", "oracle", "mean"):
        settings = {"max_new_tokens": 6, "ema_beta": 0.9, "intervention": kind, "fed": [real]}
        ((a,),) = generate(vlm, head, tokenizer, prompts, seeds=[1], **settings)
        fed[kind] = a["latents"]
    close(fed["noise"].norm(dim=-1), torch.full((4,), n_bar))
    close(fed["oracle"], real[0])
    close(fed["mean"], head.mean.expand(4, -1))


def test_what_lies_about_mu_needs_one(head):
    no_mean = copy.deepcopy(head)
    no_mean.mean.zero_()
    for kind in ("mean", "noise"):
        check_intervention(kind, head)
        with pytest.raises(SystemExit, match=f"'{kind}' feeds what lies about mu"):
            check_intervention(kind, no_mean)
    check_intervention("shuffle", no_mean)


@pytest.mark.parametrize("kind", ["zero", "text"])
def test_no_span_opens_where_none_can(loaded, head, world, kind):
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 2))
    make_open(vlm, tokenizer, prompts, {0, 1})
    head, intervention = (head, "zero") if kind == "zero" else (None, "clean")
    answers = generate(vlm, head, tokenizer, prompts, max_new_tokens=6, intervention=intervention)
    assert not any(latent_ids(tokenizer)[0] in a["ids"] for (a,) in answers)
