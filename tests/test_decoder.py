"""How rows go on together: replayed steps against usual ones, places in memory."""

from contextlib import contextmanager

import pytest
import torch
from conftest import answers_that_end, assert_same, examples, make_open

import decoder
from generate import make_prompts


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


@pytest.fixture
def ending(loaded, world, monkeypatch):
    """(vlm, tokenizer, prompts) of answers that end early; new positions are in parts of 4."""
    vlm, tokenizer, processor = loaded
    prompts = make_prompts(vlm, tokenizer, processor, examples(world, 4))
    make_open(vlm, tokenizer, prompts, {1})
    vlm.lm_head.weight.data[tokenizer.eos_token_id] *= 4
    monkeypatch.setattr(decoder, "FIRST_POSITIONS", 4)
    return vlm, tokenizer, prompts


def test_a_replayed_step_is_the_step(ending, head, monkeypatch):
    """Steps of fixed shapes, replayed from buffers, write what those do that grow.

    A graph of the test's own stands in for CUDA's: a replay runs what was captured, on the places
    in memory that it had.
    """
    vlm, tokenizer, prompts = ending
    usual = answers_that_end(vlm, head, tokenizer, prompts)
    assert len({len(a["ids"]) for a in usual}) > 3 and any(len(a["latents"]) for a in usual)

    forward, calls, replays = decoder.Decoder.forward, [], []

    def noted(self, x, ts):
        calls.append((self, x, ts))
        return forward(self, x, ts)

    class Graph:
        def replay(self):
            captured, x, ts = self.captured
            captured.h.copy_(forward(captured, x, ts))
            replays.append(tuple(map(int, ts)))

    @contextmanager
    def capture(graph):
        yield
        graph.captured = calls[-1]

    monkeypatch.setattr(decoder.Decoder, "forward", noted)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(decoder, "CAPTURE", "cpu")
    assert_same(answers_that_end(vlm, head, tokenizer, prompts), usual)
    assert len(replays) > 10 and len(set(replays)) > 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_step_is_the_step(ending, head, monkeypatch):
    vlm, tokenizer, prompts = ending
    vlm, head = vlm.cuda(), head.cuda()
    for p in prompts:
        p["vision"] = p["vision"].cuda()
    captured = answers_that_end(vlm, head, tokenizer, prompts)
    assert len({len(a["ids"]) for a in captured}) > 3
    assert any(len(a["latents"]) for a in captured)
    monkeypatch.setattr(decoder, "CAPTURE", "")
    assert_same(answers_that_end(vlm, head, tokenizer, prompts), captured)
