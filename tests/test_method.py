"""The seam: a method of one's own trains as GAP does, with nothing patched."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import PIXELS, logged, run
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import train
from data import load_examples, strip_latents
from files import write_then_rename
from launch import override
from method import Method, cross_entropy
from model import IGNORE, encode, load_processor, load_vlm

close = torch.testing.assert_close


@pytest.mark.parametrize("n", [0, 7, 50])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradients(n, frozen, dtype):
    """Of a tied LM head, over two micro-batches with weights, against autograd in float64."""
    torch.manual_seed(0)
    table = nn.Embedding(30, 8).to(dtype).requires_grad_(not frozen)
    lm_head = nn.Linear(8, 30, bias=False)
    lm_head.weight = table.weight
    shift = torch.randn(8, dtype=dtype, requires_grad=True)
    ids, labels = torch.randint(30, (2, n)), torch.randint(30, (2, n))

    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (shift, table.weight)]
    plain, ours = 0.0, 0.0
    for weight, x, y in zip((0.3, -2.0), ids, labels):
        logits = (nn.functional.embedding(x, wide[1]) + wide[0]).tanh() @ wide[1].T
        plain = plain + weight * nn.functional.cross_entropy(logits, y, reduction="sum")
        loss = weight * cross_entropy((table(x) + shift).tanh(), y, lm_head, chunk=7)
        loss.backward()
        ours = ours + loss.detach()
        with torch.no_grad():
            again = weight * cross_entropy((table(x) + shift).tanh(), y, lm_head, chunk=7)
        assert torch.equal(again, loss)
    plain.backward()

    precise = dtype == torch.float32
    rtol, atol = (1e-6, 5e-6) if precise else (0.03, 0.3)
    assert ours.dtype == torch.float32
    close(ours.double(), plain.detach(), rtol=1e-6 if precise else 0.01, atol=atol)
    for a, b in zip((shift, table.weight), wide):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert a.grad.dtype == dtype
            close(a.grad.double(), b.grad, rtol=rtol, atol=atol)


# --- a made-up method: a linear map of each state says how many label tokens are still to come


class Countdown(Method):
    """L = L_CE + w(step) * mean over words of (psi(h) - tokens left)^2, every second position."""

    def __init__(self, *args):
        super().__init__(*args)
        self.psi = nn.Linear(self.vlm.config.text_config.hidden_size, 1)
        nn.init.zeros_(self.psi.weight)
        nn.init.ones_(self.psi.bias)  # at the start it says 1 everywhere

    def encode(self, row):
        example = super().encode(row)
        on = example["labels"] != IGNORE
        left = on.flip(0).cumsum(0).flip(0)  # labels from here on
        left[~on | (left % 2 == 1)] = -1  # only even numbers are asked for
        return example | {"left": left}

    def counts(self, example):
        return super().counts(example) | {"countdown": int((example["left"] >= 0).sum())}

    def collate(self, examples):
        left = [example["left"] for example in examples]
        left = pad_sequence(left, batch_first=True, padding_value=-1)
        return super().collate(examples) | {"left": left}

    def forward(self, batch):
        h, left = self.states(batch), batch["left"][:, 1:]
        said = self.psi(h)[..., 0].float()
        error = ((said - left) ** 2 * (left >= 0)).sum()
        return {"ce": self.cross_entropy(h, batch), "countdown": error}

    def weights(self, step, total):
        return {"ce": 1.0, "countdown": 0.01 * (step + 1) / total}

    def save(self, folder, trained):
        psi = {k: v.contiguous() for k, v in trained.items() if k.startswith("psi.")}
        write_then_rename(Path(folder) / "psi.safetensors", lambda tmp: save_file(psi, tmp))


def test_a_made_up_method_trains(tmp_path, base, gap_args, world):
    """Its losses by its own counts over the global batch; 2 ranks, one process and one row a
    micro-batch agree; its weights are trained and saved."""
    ways = {"one": (1, 100000), "rows": (1, 1), "ranks": (2, 170)}
    for name, (ranks, budget) in ways.items():
        args = [*gap_args, "--method=countdown", "--max_steps=2", f"--token_budget={budget}"]
        run("tests/test_method.py", *args, f"--out={tmp_path}/{name}", ranks=ranks)
    one = logged(tmp_path / "one")[1:]
    assert [row["step"] for row in one] == [1, 2]
    for step, row in enumerate(one):
        weight = 0.01 * (step + 1) / 2
        assert row["loss"] == pytest.approx(row["ce"] + weight * row["countdown"])
    assert one[1]["val_countdown"] > 0

    # the first step, by hand: psi says 1, and the rows of the batch are known
    vlm, tokenizer = load_vlm(base)
    processor = load_processor(base, *PIXELS)
    rows = load_examples(world / "train.jsonl")
    errors = []
    train.global_batch, before = 4, train.global_batch
    try:
        picked = train.batch_of(0, len(rows))
    finally:
        train.global_batch = before
    for i in picked:
        response = strip_latents(rows[i]["response"])
        labels = encode(vlm, tokenizer, processor, rows[i], 0, response)["labels"]
        n = int((labels != IGNORE).sum())
        errors += [(1 - left) ** 2 for left in range(n, 0, -1) if left % 2 == 0]
    assert one[0]["countdown"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)

    weights = load_file(tmp_path / "one" / "model.safetensors")
    psi = load_file(tmp_path / "one" / "psi.safetensors")
    assert psi["psi.weight"].abs().max() > 0
    for name in ("rows", "ranks"):
        for a, b in zip(one, logged(tmp_path / name)[1:]):
            for field in ("loss", "ce", "countdown", "grad_norm"):
                assert b[field] == pytest.approx(a[field], rel=1e-3), field
        close(load_file(tmp_path / name / "psi.safetensors"), psi, rtol=0.0, atol=1e-3)
        others = load_file(tmp_path / name / "model.safetensors")
        for k in weights:
            close(others[k], weights[k], rtol=0.0, atol=2e-3)


if __name__ == "__main__":  # train.py, with one more line in its table
    train.METHODS["countdown"] = Countdown
    override(vars(train), sys.argv[1:])
    train.main()
