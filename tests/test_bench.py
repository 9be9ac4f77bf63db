"""What a benchmark says of its settings, and that both of its sides do the same work."""

import pytest
import torch

import bench
import toy


def test_a_part_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(bench, "data", __file__)
    monkeypatch.setattr(bench, "only", "z")
    with pytest.raises(SystemExit, match="only='z': expected some of abcdefgh"):
        bench.main()


def test_a_side_of_no_part_is_refused(monkeypatch):
    monkeypatch.setattr(bench, "side", "ours")
    with pytest.raises(SystemExit, match="side='ours': .* with --only=b, d, g or h"):
        bench.main()


def test_what_a_side_could_not_do_is_said(monkeypatch, tmp_path):
    """In the sentence of its own process."""
    (tmp_path / "bad.jsonl").write_text("[1\n")
    monkeypatch.setattr(bench, "data", str(tmp_path / "bad.jsonl"))
    with pytest.raises(SystemExit, match="bad.jsonl.*not JSON"):
        bench.in_process("g", "ours")


def test_making_room_and_whole_batches_write_the_same(monkeypatch):
    """The two ways that are timed answer all questions alike, at lengths that differ."""
    monkeypatch.setattr(bench, "shape", "7b-smoke")
    monkeypatch.setitem(bench.ROOM, "7b-smoke", (4, 2, 6, 12))
    monkeypatch.setattr(bench, "PROMPT", 96)
    monkeypatch.setattr(bench, "VOCABULARY", 600)
    monkeypatch.setattr(bench, "NO_TOKENS", ())
    written = []

    def kept(write):
        def call(*args, **settings):
            answers = write(*args, **settings)
            found = dict(answers) if write is streamed else dict(enumerate(answers))
            written.append([[a["ids"] for a in found[q]] for q in sorted(found)])
            return list(found.items()) if write is streamed else answers

        return call

    streamed = bench.stream
    monkeypatch.setattr(bench, "stream", kept(bench.stream))
    monkeypatch.setattr(bench, "generate", kept(bench.generate))
    torch.manual_seed(0)
    vlm = bench.shaped_vlm().float()
    vlm.config.image_token_id = 0  # one of the few that there are
    bench.making_room(vlm, toy.make_tokenizer())
    # a warm-up and the whole, then a warm-up and two batches
    assert written[1] == written[3] + written[4]
    assert len({len(ids) for answers in written[1] for ids in answers}) > 3
