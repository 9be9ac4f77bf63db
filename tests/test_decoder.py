"""How rows go on together: replayed steps against usual ones, places in memory."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import answers_that_end, assert_same, examples, make_open

import decoder
from generate import make_prompts
from model import load_vlm


def test_new_positions_stay_where_they_are_written(monkeypatch):
    """No part is copied for room; `keep` picks rows of all parts, in any order."""
    monkeypatch.setattr(decoder, "FIRST_POSITIONS", 3)
    x = torch.randn(3, 2, 4, 14, 5)  # (Q, H, S, t, D)
    kept, places = decoder.NewPositions(), set()
    for t in range(13):
        if t == kept.room:
            kept.add_room(x, 3, 2, 4, 5)
        parts = kept.add(x[:, :, :, t : t + 1], t)
        assert torch.equal(torch.cat(parts, 3), x[:, :, :, : t + 1])
        places.add(parts[0].data_ptr())
    assert len(places) == 1 and [part.shape[3] for part in parts] == [3, 3, 6, 1]
    q, s = torch.tensor([2, 0]), torch.tensor([[1, 0, 3], [3, 2, 2]])
    rows = x[q[:, None], :, s].transpose(1, 2)
    kept.keep(q, s)
    assert torch.equal(torch.cat(kept.add(rows[:, :, :, 13:], 13), 3), rows)


@pytest.mark.parametrize("captured", [False, True])
def test_scores_in_bfloat16_are_not_rounded(captured):
    """As in SDPA, whose error is that of its output: Qwen2.5's keys have a common part of 900."""
    torch.manual_seed(0)
    Q, S, H, G, D, T, scaling = 2, 3, 2, 2, 16, 9, 16**-0.5
    common = 900 * torch.nn.functional.normalize(torch.randn(D), dim=0)
    k = (torch.randn(Q, S, H, T + 4, D) + common).bfloat16()
    v = torch.randn(Q, S, H, T + 4, D).bfloat16()
    k[:, :, :, :T], v[:, :, :, :T] = k[:, :1, :, :T], v[:, :1, :, :T]  # one prompt for all samples
    layer = k[:, 0, :, :T].float(), v[:, 0, :, :T]
    last = torch.zeros(Q, 1).bfloat16()
    prompts = decoder.PromptCache([layer], None, last, last, last)
    cohort = decoder.Cohort(prompts.widened(T + 3) if captured else prompts, S, captured)
    cohort.add_room(v, H, D)
    for t in range(4):
        q = torch.randn(Q, S, H, G, D).bfloat16()
        seen = [x[:, :, :, : T + t + 1].double() for x in (k, v)]
        exact = torch.nn.functional.scaled_dot_product_attention(q.double(), *seen, scale=scaling)
        new = [x[:, :, :, T + t].reshape(Q * S, H, 1, D) for x in (k, v)]
        at = torch.full((Q,), t) if captured else t
        mask = cohort.mask(v, at)
        o = cohort.attend(0, q.reshape(Q * S, H, G, D), *new, at, scaling, mask)
        assert o.dtype == torch.bfloat16
        assert (o.double() - exact.reshape(o.shape)).norm() < 2**-8 * exact.norm()


def test_a_product_of_several_keeps_their_weights(base, tmp_path):
    """The model is what it was, can be trained and saved, and stores and copies nothing twice."""
    (vlm, tokenizer), (stock, _) = load_vlm(base), load_vlm(base)
    with torch.inference_mode():
        rows = decoder.Decoder(vlm, 0)
    weight, bias = rows.qkv[0]
    attention = vlm.model.language_model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(bias, torch.cat([part.bias for part in parts]))
    assert {part.weight.untyped_storage().data_ptr() for part in parts} == {weight.data_ptr()}
    again = decoder.Decoder(vlm, 0)
    assert all(a[0].data_ptr() == b[0].data_ptr() for a, b in zip(rows.qkv, again.qkv))

    vlm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = load_vlm(tmp_path)[0].state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    attention.k_proj(torch.ones(1, weight.shape[1])).sum().backward()
    with torch.no_grad():
        attention.k_proj.weight -= attention.k_proj.weight.grad
    assert torch.equal(weight, torch.cat([part.weight for part in parts]))


@pytest.fixture
def ending(loaded, world, monkeypatch):
    """(vlm, tokenizer, prompts), some of which open spans; new positions are in parts of 8."""
    vlm, tokenizer, processor = loaded
    rows = examples(world, 8)
    for row in rows[4:6]:
        row["question"] *= 3  # longer than those before: for them caches are widened
    prompts = make_prompts(vlm, tokenizer, processor, rows)
    make_open(vlm, tokenizer, prompts, {1, 6})
    monkeypatch.setattr(decoder, "FIRST_POSITIONS", 8)
    monkeypatch.setattr(decoder, "PROMPT_ROOM", 1)
    return vlm, tokenizer, prompts


def places(cohorts):
    """Where in memory the caches of cohorts are."""
    found = []
    for cohort in cohorts:
        found += [tensor for pair in cohort.cache.layers for tensor in pair]
        found += [cohort.cache.bias, cohort.cache.next_pos]
        found += [part for new in cohort.keys + cohort.values for part in new.parts]
    return [tensor.data_ptr() for tensor in found]


@pytest.fixture
def seated(monkeypatch):
    """How wide a cohort was and is, of each time that questions took places in it."""
    seat, can_seat, found = decoder.Cohort.seat, decoder.Cohort.can_seat, []

    def noted_can(cohort, prompts, n_samples):
        cohort.before = cohort.cache.T
        return can_seat(cohort, prompts, n_samples)

    def noted(cohort, prompts):
        found.append((cohort.before, cohort.cache.T))
        return seat(cohort, prompts)

    monkeypatch.setattr(decoder.Cohort, "can_seat", noted_can)
    monkeypatch.setattr(decoder.Cohort, "seat", noted)
    return found


@pytest.mark.parametrize("waves", [(1,), (2,)])
def test_a_replayed_step_is_the_step(ending, head, monkeypatch, seated, waves):
    """Steps of fixed shapes, replayed from buffers, write what those do that grow.

    A graph of the test's own stands in for CUDA's: a replay runs what was captured, on the places
    in memory that it had.
    """
    vlm, tokenizer, prompts = ending
    usual = answers_that_end(vlm, head, tokenizer, prompts, 4, waves=waves)
    forward, calls, replays = decoder.Decoder.forward, [], []

    def noted(self, x, ts):
        calls.append((self, x, ts))
        return forward(self, x, ts)

    class Graph:
        def replay(self):
            captured, x, ts = self.captured
            assert places(captured.cohorts) == self.places
            captured.h.copy_(forward(captured, x, ts))
            replays.append([t.tolist() for t in ts])

    @contextmanager
    def capture(graph):
        yield
        graph.captured = calls[-1]
        graph.places = places(graph.captured[0].cohorts)

    monkeypatch.setattr(decoder.Decoder, "forward", noted)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(decoder, "CAPTURE", "cpu")
    assert_same(answers_that_end(vlm, head, tokenizer, prompts, 4, waves=waves), usual)
    # who takes a place is not as far as its neighbours, and may be longer
    assert any(len(set(filter(None, t))) > 1 for ts in replays for t in ts)
    assert len(seated) > 1 and any(now > before for before, now in seated)


@pytest.mark.parametrize("widen", [1.0, 2.0])
@pytest.mark.parametrize("at_once", [1, 3])
def test_others_begin_where_one_ended(ending, head, monkeypatch, seated, widen, at_once):
    """Whatever the number of places; a prompt that is too long for them has a cohort of its own."""
    vlm, tokenizer, prompts = ending
    usual = answers_that_end(vlm, head, tokenizer, prompts, len(prompts), waves=(1,))
    monkeypatch.setattr(decoder, "CAPTURE", "cpu")
    monkeypatch.setattr(decoder, "WIDEN_AT_MOST", widen)
    monkeypatch.setattr(decoder.Decoder, "replayed", decoder.Decoder.forward)
    assert_same(answers_that_end(vlm, head, tokenizer, prompts, at_once, waves=(1,)), usual)
    assert seated and any(now > before for before, now in seated) == (widen > 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("waves", [(1,), (2,)])
def test_a_captured_step_is_the_step(ending, head, monkeypatch, seated, waves):
    vlm, tokenizer, prompts = ending
    vlm, head = vlm.cuda(), head.cuda()
    for p in prompts:
        p["vision"] = p["vision"].cuda()
    captured = answers_that_end(vlm, head, tokenizer, prompts, 4, waves=waves)
    monkeypatch.setattr(decoder, "CAPTURE", "")
    assert_same(answers_that_end(vlm, head, tokenizer, prompts, 4, waves=waves), captured)
    assert len(seated) > 1


@torch.no_grad()
def test_a_cohort_that_has_ended_leaves(loaded, world):
    """At once, however many others go on; of one that has not, rows leave once they are many."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 5))
    rows = decoder.Decoder(vlm, tokenizer.pad_token_id)
    rows.begin(rows.read(prompts[:4]), 2)
    rows.begin(rows.read(prompts[4:]), 1)
    alive = torch.ones(9, dtype=torch.bool)
    alive[2] = False
    assert rows.leave(alive) is None
    alive[8] = False
    assert rows.leave(alive).tolist() == list(range(8)) and len(rows.cohorts) == 1
    alive = alive[:8]
    alive[3] = alive[6] = False  # of four questions one has ended, and half of another
    assert rows.leave(alive).tolist() == [0, 1, 4, 5, 7, 6]
    assert rows.leave(torch.zeros(6, dtype=torch.bool)).tolist() == [] and not rows.cohorts


def test_cohorts_keep_to_their_width_and_go_when_nobody_is_in(loaded, monkeypatch):
    """Else each longer prompt would widen all others' caches, again and again."""
    monkeypatch.setattr(decoder, "PROMPT_ROOM", 1)
    monkeypatch.setattr(decoder, "CAPTURE", "cpu")
    rows = decoder.Decoder(loaded[0], 0)

    def cache(n, T):
        layer = torch.zeros(n, rows.H, T, rows.D), torch.zeros(n, rows.H, T, rows.D)
        last = torch.zeros(n, 8)
        return decoder.PromptCache([layer], None, torch.zeros(n).long(), last, last)

    rows.begin(cache(3, 4), 1)
    (cohort,) = rows.cohorts
    cohort.free[:] = True
    assert [cohort.can_seat(cache(1, T), 1) for T in (4, 8, 9)] == [True, True, False]
    _, index = rows.begin(cache(1, 8), 1)
    assert cohort.cache.T == 8 and index.tolist() == [3, 1, 2]
    assert not cohort.can_seat(cache(1, 9), 1)  # twice its first width, whatever it has become
    # one row is in the first cohort: it stays beside that of a longer prompt
    _, index = rows.begin(cache(2, 20), 1)
    assert [len(c) for c in rows.cohorts] == [3, 2] and index.tolist() == [0, 1, 2, 3, 4]
    rows.cohorts[0].free[:] = True
    _, index = rows.begin(cache(1, 100), 1)
    assert [len(c) for c in rows.cohorts] == [2, 1] and index.tolist() == [3, 4, 5]
