"""AMVL: its KL terms against torch.distributions, its generation against a slow reference."""

import math
import shutil
from functools import partial
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from conftest import PIXELS, check_other_ways, examples, logged, method_args, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributions import Independent, Normal, kl_divergence

import train
from amvl import AMVL, grown, kl
from data import load_examples, strip_latents
from generate import INTERVENTIONS, check_intervention, generate, intervene, make_prompts, stream
from launch import settings_of
from model import (
    IGNORE,
    MAX_LOG_VARIANCE,
    Gaussian,
    SlotHead,
    embed,
    encode,
    gaussian,
    latent_ids,
    load_head,
    load_processor,
    load_vlm,
)

close = torch.testing.assert_close
K, m = 3, 5


def method(base, **change):
    settings = settings_of(vars(train)) | {"K": K, "slot_dim": m} | change
    vlm, tokenizer = load_vlm(base)
    torch.manual_seed(0)
    model = AMVL(vlm, tokenizer, load_processor(base, *PIXELS), settings)
    model.vlm.model.visual.requires_grad_(False)
    return model


def batch_of(model, rows, step=7):
    """A micro-batch as train.py makes it; step None: of validation."""
    rows, _ = model.rows(rows, training=True)
    if step is not None:
        rows = [row | {"step": step} for row in rows]
    batch = model.collate([model.encode(row) for row in rows])
    return train.to_device(batch, model.vlm, torch.device("cpu"))


def test_kl_is_that_of_torch_distributions():
    torch.manual_seed(0)
    q = Gaussian(torch.randn(7, m), torch.randn(7, m))
    p = Gaussian(torch.randn(7, m), torch.randn(7, m))

    def normal(g):
        return Independent(Normal(g.mean, (g.log_variance / 2).exp()), 1)

    close(kl(q, p), kl_divergence(normal(q), normal(p)))
    close(kl(q, q), torch.zeros(7), rtol=0.0, atol=1e-6)
    # a reparameterised sample has the distribution's moments
    z = Gaussian(q.mean[0], q.log_variance[0]).sample(torch.randn(200_000, m))
    close(z.mean(0), q.mean[0], rtol=0.0, atol=0.02)
    close(z.std(0), (q.log_variance[0] / 2).exp(), rtol=0.02, atol=0.0)
    far = gaussian(torch.cat([torch.zeros(1, m), torch.full((1, m), -1e4)], 1))
    assert (far.log_variance == -MAX_LOG_VARIANCE).all() and kl(q, far).isfinite().all()


def slot_states(model, batch, ids, pos, at):
    """States (K, d) at the slots of one row's ids up to `at`, which ends with the slots; nothing
    after them is read at all."""
    ids, pos = ids[:at], pos[:, :at]
    images = (batch["ids"] == model.vlm.config.image_token_id).sum(1)
    assert len(images) == 1 or not images.diff().any()
    n = int(images[0])
    return lambda i: model.vlm.model.language_model(
        inputs_embeds=embed(model.vlm, ids[None], batch["vision"][n * i : n * (i + 1)]),
        position_ids=pos[:, None],
        use_cache=False,
    ).last_hidden_state[0, -K:]


@torch.no_grad()
def test_sums_are_those_of_naive_passes(base, world):
    """Row by row: the prior reads [x, slots] alone, the posterior [x, y, slots], y follows Z."""
    model = method(base)
    rows = examples(world, 3)
    batch = batch_of(model, rows)
    sums = model(batch)
    ce = forward = reverse = 0.0
    for i in range(3):
        ids, q_ids = batch["ids"][i], batch["ids_q"][i]
        end = int((ids == model.latent_id).nonzero()[-1]) + 1
        q_end = int((q_ids == model.latent_id).nonzero()[-1]) + 1
        h = slot_states(model, batch, ids, batch["pos"][:, i], end)(i)
        # encoded anew in its own order
        response = strip_latents(rows[i]["response"]) + "<latent></latent>"
        asked = encode(model.vlm, model.tokenizer, model.processor, rows[i], K, response)
        pos_q = asked["pos"]
        assert asked["ids"].tolist() == q_ids[: len(asked["ids"])].tolist()
        h_q = slot_states(model, batch, q_ids, pos_q, q_end)(i)
        # what the posterior reads: the question, then the whole response, then the slots
        y = model.tokenizer.decode(q_ids[:q_end])
        assert rows[i]["answer"] in y and y.endswith("<|latent_pad|>" * K)
        p_mean, p_log = model.head.prior(h).chunk(2, -1)
        q_mean, q_log = model.posterior(h_q).chunk(2, -1)
        p = Independent(Normal(p_mean, (p_log / 2).exp()), 1)
        q = Independent(Normal(q_mean, (q_log / 2).exp()), 1)
        forward += float(kl_divergence(q, p).sum())
        reverse += float(kl_divergence(p, q).sum())
        z = q_mean + (q_log / 2).exp() * batch["noise"][K * i : K * (i + 1)]
        n = len(batch["vision"]) // 3
        x = embed(model.vlm, ids[None], batch["vision"][n * i : n * (i + 1)])
        x[0, ids == model.latent_id] = model.head.decode(z)
        out = model.vlm.model.language_model(
            inputs_embeds=x, position_ids=batch["pos"][:, i : i + 1], use_cache=False
        ).last_hidden_state
        labels = batch["labels"][i, 1:]
        logits = model.vlm.lm_head(out[0, :-1])
        ce += float(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
    assert float(sums["ce"]) == pytest.approx(ce, rel=1e-4)
    assert float(sums["kl_forward"]) == pytest.approx(forward, rel=1e-4)
    assert float(sums["kl_reverse"]) == pytest.approx(reverse, rel=1e-4)
    # nothing is learnt of the slots and their ends
    start, pad, end = latent_ids(model.tokenizer)
    assert not set(batch["labels"].flatten().tolist()) & {start, pad, end}


@torch.no_grad()
def test_the_answer_reaches_the_posterior_and_not_the_prior(base, world):
    model = method(base)
    rows = examples(world, 2)
    other = examples(world, 2)
    other[0]["response"] = other[0]["response"].replace(other[0]["answer"], "red ring, blue cross")
    a, b = batch_of(model, rows), batch_of(model, other)
    assert torch.equal(a["noise"], b["noise"])
    p, p_other = model.prior_of(a), model.prior_of(b)
    q, q_other = model.posterior_of(a), model.posterior_of(b)
    close(p.mean, p_other.mean, rtol=1e-4, atol=1e-4)
    close(p.log_variance, p_other.log_variance, rtol=1e-4, atol=1e-4)
    assert (q.mean[:K] - q_other.mean[:K]).norm() > 0.05 * q.mean[:K].norm()
    close(q.mean[K:], q_other.mean[K:], rtol=1e-4, atol=1e-4)


MOVES = {  # by loss: does it move the prior's head, the posterior's, the map into the slots
    "ce": (False, True, True),
    "kl_forward": (True, False, False),
    "kl_reverse": (False, True, False),
}


@pytest.mark.parametrize("name", MOVES)
def test_gradients_stop_where_they_should(base, world, name):
    model = method(base)
    model(batch_of(model, examples(world, 2)))[name].backward()
    parts = model.head.prior.weight, model.posterior.weight, model.head.decode.weight
    moved = [p.grad is not None and float(p.grad.norm()) > 0 for p in parts]
    assert tuple(moved) == MOVES[name]
    # the decoder moves with each, through the pass of the distribution that moves
    assert model.vlm.model.language_model.layers[0].mlp.up_proj.weight.grad.norm() > 0


def test_the_forward_term_moves_the_decoder_through_the_prior_alone(base, world):
    """Its gradient is that of a prior's pass against a posterior that is a constant."""
    model = method(base)
    batch = batch_of(model, examples(world, 2))
    weight = model.vlm.model.language_model.layers[1].mlp.up_proj.weight
    (ours,) = torch.autograd.grad(model(batch)["kl_forward"], [weight])
    with torch.no_grad():
        q = model.posterior_of(batch)
    (wanted,) = torch.autograd.grad(kl(q, model.prior_of(batch)).sum(), [weight])
    close(ours, wanted)


def test_free_bits_leave_small_divergences_alone(base):
    model = method(base, free_bits=2.0)
    q = Gaussian(torch.tensor([[0.1] * m, [3.0] * m], requires_grad=True), torch.zeros(2, m))
    p = Gaussian(torch.zeros(2, m), torch.zeros(2, m))
    total = model.divergence(q, p)
    assert float(total.detach()) == pytest.approx(2.0 + 4.5 * m)
    total.backward()
    assert (q.mean.grad[0] == 0).all() and (q.mean.grad[1] == 3).all()


def test_forward_first_then_reverse(base):
    """Beta grows first, gamma later and, as it is set, smaller."""
    model = method(base, beta=0.5, gamma=0.1)
    at = [model.weights(step, 100) for step in range(100)]
    assert at[0] == {"ce": 1.0, "kl_forward": 0.0, "kl_reverse": 0.0}
    beta, gamma = ([w[name] for w in at] for name in ("kl_forward", "kl_reverse"))
    assert beta == sorted(beta) and gamma == sorted(gamma)
    assert beta[20] == beta[-1] == 0.5 and gamma[20] == 0.0 and gamma[40] == gamma[-1] == 0.1
    assert beta[10] == pytest.approx(0.25) and grown(0.3, 0.2, 0.4) == pytest.approx(0.5)


@torch.no_grad()
def by_hand(model, prompt, n, noise=None):
    """Slow reference: the slots' states from [x, slots], then n greedy tokens after Z, a whole
    forward for each."""
    vlm, (start, pad, end) = model.vlm, latent_ids(model.tokenizer)
    lm = vlm.model.language_model

    def states(ids, latents=None):
        after = prompt["pos"].max() + 1 + torch.arange(len(ids) - len(prompt["ids"]))
        pos = torch.cat([prompt["pos"], after.expand(3, -1)], 1)
        x = embed(vlm, ids[None], prompt["vision"])
        if latents is not None:
            x[0, ids == pad] = latents
        return lm(inputs_embeds=x, position_ids=pos[:, None], use_cache=False).last_hidden_state[0]

    ids = torch.cat([prompt["ids"], torch.tensor([start, *[pad] * K])])
    mean, log_variance = model.head.prior(states(ids)[-K:]).chunk(2, -1)
    z = mean if noise is None else mean + (log_variance / 2).exp() * noise
    latents = model.head.decode(z)
    ids = torch.cat([ids, torch.tensor([end])])
    for _ in range(n):
        logits = vlm.lm_head(states(ids, latents)[-1])
        logits[[start, pad, end]] = -torch.inf
        logits[len(model.tokenizer) :] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None]])
    return ids[len(prompt["ids"]) :].tolist(), latents


@torch.no_grad()
def test_generation_is_the_slow_reference(base, world):
    """Prompts of several lengths, batched and one by one, with one image and two."""
    model = method(base)
    parts = model.vlm, model.tokenizer, model.processor
    prompts = make_prompts(*parts, examples(world, 5))
    n = K + 2 + 6
    options = {"max_new_tokens": n}
    together = generate(model.vlm, model.head, model.tokenizer, prompts, **options)
    for prompt, (answer,) in zip(prompts, together):
        ids, latents = by_hand(model, prompt, 6)
        close(answer["latents"], latents, rtol=1e-3, atol=1e-3)
        assert answer["ids"] == ids[: len(answer["ids"])]  # shorter where it ended
        ((alone,),) = generate(model.vlm, model.head, model.tokenizer, [prompt], **options)
        assert alone["ids"] == answer["ids"]
        close(alone["latents"], answer["latents"], rtol=1e-3, atol=1e-3)
    # two at a time, the third read after them
    rest, parts = iter(prompts), (model.vlm, model.head, model.tokenizer)
    for q, (answer,) in stream(*parts, lambda n: list(islice(rest, n)), 2, **options):
        assert answer["ids"] == together[q][0]["ids"]
        close(answer["latents"], together[q][0]["latents"], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_samples_of_a_prompt_draw_their_own_latents(base, world):
    """At a temperature: mean + temperature * deviation * the row's own draws, in any batch."""
    model = method(base)
    parts = model.vlm, model.tokenizer, model.processor
    prompts = make_prompts(*parts, examples(world, 2))
    seeds = [11, 12, 13, 14]
    options = {"max_new_tokens": K + 3, "temperature": 0.5}
    four = generate(*parts[:1], model.head, parts[1], prompts, n_samples=2, seeds=seeds, **options)
    for q in range(2):
        for s in range(2):
            seed = seeds[2 * q + s]
            g = torch.Generator().manual_seed(seed)
            torch.rand(K + 3, generator=g)  # the tokens' draws come first
            noise = 0.5 * torch.randn(K, m, generator=g)
            _, latents = by_hand(model, prompts[q], 0, noise)
            close(four[q][s]["latents"], latents, rtol=1e-3, atol=1e-3)
            ((alone,),) = generate(
                model.vlm, model.head, parts[1], [prompts[q]], seeds=[seed], **options
            )
            assert alone["ids"] == four[q][s]["ids"]
    assert not torch.allclose(four[0][0]["latents"], four[0][1]["latents"])


@torch.no_grad()
def test_teacher_forced_is_generated(base, world):
    """With the prior's latents, training's states are those that generation saw."""
    model = method(base)
    rows = examples(world, 2)
    batch = batch_of(model, rows, step=None)
    p = model.prior_of(batch)
    prompts = make_prompts(model.vlm, model.tokenizer, model.processor, rows)
    answers = generate(model.vlm, model.head, model.tokenizer, prompts, max_new_tokens=K + 2)
    close(
        model.head.decode(p.mean),
        torch.cat([a[0]["latents"] for a in answers]),
        rtol=1e-3,
        atol=1e-3,
    )
    sums = model(batch)
    assert {"ce_prior", "right_posterior", "right_prior"} <= sums.keys()
    assert 0 <= float(sums["right_posterior"]) <= 2


def test_rows_right_counts_whole_rows(base, world):
    model = method(base)
    batch = batch_of(model, examples(world, 3))
    labels = batch["labels"][:, 1:]
    on = labels != IGNORE
    said = labels.clone()
    said[1, on[1].nonzero()[-1]] += 1  # one token of one row
    vlm = model.vlm

    class Says(torch.nn.Module):
        def forward(self, h):
            return F.one_hot(h.long()[:, 0], len(model.tokenizer) + 5)

    vlm.lm_head = Says()
    assert model.rows_right(said[..., None].float(), batch, chunk=4) == 2
    assert model.rows_right(labels[..., None].float(), batch, chunk=4) == 3


def args_of(base, world, out, *more):
    return method_args("amvl", base, world, out, "--K=8", "--slot_dim=6", *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, world):
    folder = tmp_path_factory.mktemp("amvl")
    run("train.py", *args_of(base, world, folder))
    return folder


def test_ranks_and_micro_batches_agree_and_a_run_resumes(tmp_path, base, world, trained):
    one = logged(trained)[1:]
    said = one[-1]
    assert said["val_leakage"] == pytest.approx(
        said["val_right_posterior"] - said["val_right_prior"]
    )
    assert said["val_leakage_ce"] == pytest.approx(said["val_ce_prior"] - said["val_ce"])
    assert all(said[k] > 0 for k in ("kl_forward", "kl_reverse", "val_kl_forward"))
    fields = ("loss", "ce", "kl_forward", "kl_reverse", "grad_norm")
    check_other_ways(trained, tmp_path, partial(args_of, base, world), fields)


def test_what_a_run_leaves(trained):
    """The prior and the map into the slots; what has seen answers stays in the checkpoint."""
    head = load_file(trained / "latent_head.safetensors")
    assert sorted(head) == ["decode.bias", "decode.weight", "prior.bias", "prior.weight"]
    vlm, tokenizer = load_vlm(trained)
    loaded = load_head(trained, vlm, tokenizer, 1)
    assert isinstance(loaded, SlotHead) and loaded.K == 8 and loaded.m == 6
    assert not any("posterior" in name for name in load_file(trained / "model.safetensors"))


DAMAGED = {
    "no map": lambda t, meta: t.pop("decode.weight"),
    "a prior of other slots": lambda t, meta: t.update({"prior.weight": t["prior.weight"][:8]}),
    "a vector for a map": lambda t, meta: t.update({"decode.weight": t["decode.weight"][:, 0]}),
    "another tower": lambda t, meta: meta.update(tower="0" * 16),
    "no slots": lambda t, meta: meta.update(K="0"),
    "another method's": lambda t, meta: meta.update(kind="valr"),
    "GAP's": lambda t, meta: meta.update(kind="gap"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_head_is_refused(tmp_path, trained, name):
    folder = tmp_path / "model"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("ckpt"))
    path = folder / "latent_head.safetensors"
    with safe_open(path, "pt") as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())
    DAMAGED[name](tensors, meta)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, meta)
    vlm, tokenizer = load_vlm(folder)
    with pytest.raises(SystemExit, match="latent_head.safetensors") as e:
        load_head(folder, vlm, tokenizer, 1)
    assert "\n" not in str(e.value)


def test_the_other_stages_take_it(tmp_path, world, trained):
    """eval.py with the interventions that make sense, a sentence for the others; probe.py."""
    data = ["--model=" + str(trained), f"--data={world}/test.jsonl", "--max_new_tokens=24"]
    out = f"--out={tmp_path}"
    run("eval.py", *data, f"{out}/clean", "--save_latents=1")
    latents = sorted((tmp_path / "clean" / "latents").iterdir())
    assert len(latents) == 12 and load_file(latents[0])["latents"].shape[0] == 8
    donor = f"--donor={tmp_path}/clean/latents"
    run("eval.py", *data, f"{out}/shuffle", "--intervention=shuffle", donor)
    fed = load_file(latents[1])["latents"]
    head = load_head(trained, *load_vlm(trained), 1)
    for kind in INTERVENTIONS:
        if kind in ("mean", "oracle", "oracle_pca"):
            with pytest.raises(SystemExit, match="needs the PCA"):
                check_intervention(kind, head)
    # noise has the norm of what it stands for
    noise = intervene("noise", head, fed, torch.randn(fed.shape))
    close(noise.norm(dim=-1), fed.norm(dim=-1))
    assert F.cosine_similarity(noise, fed).abs().max() < 0.5
    run("probe.py", *data, f"{out}/probe")
    asked = [f"--images={world}/test/3.png", "--question=Where?", f"--show={tmp_path}/show.png"]
    assert "⟨latent x8⟩" in run("infer.py", data[0], *asked)
    assert (tmp_path / "show.png").exists()  # where the slots look: no picture goes with them


def test_leakage_is_measured_as_it_is(base, world):
    """A decoder that hears the answer in the slots: the gap says so."""
    model = method(base)
    means = {"ce": 0.1, "kl_forward": 2.0, "kl_reverse": 1.0}
    assert model.report(means).keys() == {"ce", "kl_forward", "kl_reverse"}
    said = model.report(means | {"ce_prior": 0.7, "right_posterior": 0.9, "right_prior": 0.2})
    assert said["leakage"] == pytest.approx(0.7) and said["leakage_ce"] == pytest.approx(0.6)
    assert math.isfinite(sum(said.values()))


def test_noise_is_a_steps_a_rows_and_a_seeds_own(base, world):
    drawn = set()
    for seed in (1, 2):
        amvl = method(base, seed=seed)
        rows, _ = amvl.rows(list(load_examples(world / "train.jsonl")[:2]), training=True)
        for step in (0, 1):
            for row in rows:
                noise, again = (amvl.encode(row | {"step": step})["noise"] for _ in range(2))
                assert noise.equal(again)
                drawn.add(tuple(noise.flatten().tolist()))
    assert len(drawn) == 8


def test_kl_terms_count_questions(base, world):
    """Not slots; and right answers count questions, too."""
    model = method(base)
    rows = [row | {"response": "<think> x </think>"} for row in examples(world, 2)]
    for row in rows:
        n = model.counts(model.encode(row | {"step": 1}))
        assert n["kl_forward"] == n["kl_reverse"] == 1
    val = model.counts(model.encode(rows[0]))
    assert val["ce_prior"] == val["ce"] > 1 == val["right_prior"]


@torch.no_grad()
def test_validation_has_the_priors_slots_and_the_posteriors(base, world):
    model = method(base)
    torch.nn.init.normal_(model.posterior.weight)
    batch = batch_of(model, examples(world, 2), step=None)
    sums = model(batch)
    means = {"ce": model.posterior_of(batch).mean, "ce_prior": model.prior_of(batch).mean}
    for name, mean in means.items():
        h = model.states(batch, model.head.into_slots(mean))
        assert float(sums[name]) == pytest.approx(float(model.cross_entropy(h, batch)), rel=1e-5)
    assert float((sums["ce"] - sums["ce_prior"]).abs()) > 1e-2
    seen = []
    model.rows_right = lambda h, batch: seen.append(h) or torch.zeros(())
    model(batch)
    assert len(seen) == 2 and not torch.equal(*seen)
