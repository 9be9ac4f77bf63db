"""What may a paper add to the decoder? The seam between a method and the training loop.

train.py's loop sees a method only as a `Method`. The class below adds nothing: it is dense-caption
SFT (`method=text`), cross-entropy on responses without their latent spans. A paper is a subclass in
a file of its own (gap.py) that overrides what it changes, and a line of METHODS in train.py.

Shape letters: B rows, T positions, N labels, V vocabulary rows, d model width.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from data import Rows, strip_latents, strip_parser
from images import open_image
from model import IGNORE, embed, encode


class Method(nn.Module):
    """The decoder, what a method adds to it, and its losses: the module that FSDP shards.

    What a step minimises is, over the names of `weights`,

        sum of weights[name] * (sum of forward(batch)[name]) / (sum of counts(example)[name])

    both sums over the whole global batch: all micro-batches of all ranks. A method's own weights
    are submodules beside `vlm`; train.py trains them with `lr_head`. On every rank a forward must
    call the decoder equally often and reach all trained weights: FSDP waits for each of them.
    """

    latent_id = None  # the token at whose places latents are fed
    reads = ()  # settings with the files and folders that it reads, beside base and data
    free = ()  # settings that say nothing to it: a resume does not compare them

    def __init__(self, vlm, tokenizer, processor, settings):
        """settings: those of train.py by name, with --key=value applied."""
        super().__init__()
        # a submodule: FSDP gathers embeddings and LM head while this module's forward runs
        self.vlm = vlm
        self.tokenizer, self.processor, self.settings = tokenizer, processor, settings

    @classmethod
    def check(cls, settings):
        """Raise SystemExit for settings that this method cannot have, before weights are read."""

    def inputs(self):
        """{name: key} of what training depends on beside data and base: a resume needs the same."""
        return {}

    def also_reads(self, row):
        """Paths of what is read of a row at every step, beside the images of its question."""
        return []

    # --- which rows, and how a row becomes numbers

    def rows(self, examples, training):
        """(the examples, their responses as this method trains on them; ids that it leaves out)."""
        examples = Rows.of(examples)
        kept, left_out = [], []
        for i, row in enumerate(examples):
            # a row that trains as text needs nothing else: it is never left out
            latents = row["aux_images"] and self.keeps_latents(row, training)
            if latents and not self.can_use(row):
                left_out.append(row["id"])
            else:
                kept.append(i)
        return examples.keep(kept).then(partial(self.change, training=training)), left_out

    def change(self, row, training):
        """Put a row's response as this method trains on it."""
        if not self.keeps_parser(row, training):
            row["response"] = strip_parser(row["response"])
        if not row["aux_images"] or not self.keeps_latents(row, training):
            row["response"] = strip_latents(row["response"])

    def keeps_latents(self, row, training):
        """Does a row keep its latent spans? `training` is False for validation rows."""
        return False

    def keeps_parser(self, row, training):
        """Does a row keep its `<parser>` texts?"""
        # a control: does the text that says what a span shows matter?
        return self.settings["write_parser"]

    def can_use(self, row):
        """Is there all that a row with latents needs? False leaves it out."""
        return True

    def encode(self, row):
        """An example: {"ids" (T), "labels" (T), "pos" (3, T), "images", ...} of a row."""
        return encode(self.vlm, self.tokenizer, self.processor, row, response=row["response"])

    def counts(self, example):
        """{name: what that sum of `forward` is divided by}, one example's share of it."""
        return {"ce": int((example["labels"] != IGNORE).sum())}

    def collate(self, examples):
        """A micro-batch on the CPU: ids (B, T), labels (B, T), pos (3, B, T), pixels, grids.

        Padded on the right, so that causal attention needs no mask.
        """
        # (3, B, T) is built from (T, 3) rows: pad_sequence pads the first axis
        ids = [example["ids"] for example in examples]
        labels = [example["labels"] for example in examples]
        pos = [example["pos"].T for example in examples]  # (T, 3)
        batch = {
            "ids": pad_sequence(ids, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
            "pos": pad_sequence(pos, batch_first=True).permute(2, 0, 1),
            # a batch of text alone has none; the tower is frozen, so a rank may skip it
            "pixels": None,
            "grids": None,
        }
        # here and not in encode: only this rank's own images are decoded
        images = [open_image(path) for example in examples for path in example["images"]]
        if images:
            inputs = self.processor(images=images, return_tensors="pt")
            batch["pixels"], batch["grids"] = inputs["pixel_values"], inputs["image_grid_thw"]
        return batch

    # --- losses

    def forward(self, batch):
        """Named sums over a micro-batch, of which `weights` says what is minimised.

        train.py has put "vision" (N, d) beside what `collate` made.
        """
        return {"ce": self.cross_entropy(self.states(batch), batch)}

    def states(self, batch, latents=None):
        """h_bar (B, T - 1, d) of a micro-batch: each position predicts the next, the last none."""
        # images at their pads; a subclass puts latents at theirs
        x = embed(self.vlm, batch["ids"], batch["vision"], latents, self.latent_id)
        decoder = self.vlm.model.language_model
        # no cache: those of transformers grow in place, and activation checkpointing, which reads
        # twice, then gives wrong gradients, in silence (valr.py has one that does not)
        out = decoder(inputs_embeds=x, position_ids=batch["pos"], use_cache=False)
        return out.last_hidden_state[:, :-1]

    def cross_entropy(self, h, batch):
        """Summed cross-entropy of states h (B, T - 1, d) against the labels one position on."""
        # the state at position t predicts the token at t + 1
        labels = batch["labels"][:, 1:]
        on = labels != IGNORE  # only these get logits
        return cross_entropy(h[on], labels[on], self.vlm.lm_head)

    def weights(self, step, total):
        """{name: weight} of the losses at a step of `total`."""
        # constant; a paper with a schedule reads step and total
        return {"ce": 1.0}

    def report(self, means):
        """What log.jsonl says of a batch, from the means of `forward` that have a count."""
        return means

    # --- what it leaves

    def save(self, folder, trained):
        """Write the method's own files beside the exported model; trained: {full name: tensor}."""


def head_of(trained):
    """The weights of `self.head`, by their names in it, among those that `save` is given."""
    names = (name for name in trained if name.startswith("head."))
    return {name.removeprefix("head."): trained[name] for name in names}


def idle(module):
    """0, with a gradient of 0 for each weight: FSDP wants the same gradients on every rank."""
    return sum(p.sum() for p in module.parameters()) * 0.0


def cross_entropy(h, labels, lm_head, chunk=512):
    """Summed cross-entropy of states h (N, d) against labels (N), with float32 softmax.

    Logits exist for `chunk` rows at a time: at V = 152,064 the full (T, V) float32 matrix is what
    runs out of memory. In bfloat16 the LM head's gradient is rounded once a chunk, by .004 of its
    length for eight of them; between micro-batches and ranks it is float32.
    """
    return CrossEntropy.apply(h, lm_head.weight, labels, chunk, torch.is_grad_enabled())


class CrossEntropy(torch.autograd.Function):
    """The above; both gradients are computed with the logits at hand, and wait for the backward.

    With z = W h and p = softmax(z), the loss is log sum exp(z) - z_label, and

        dL/dz = p - onehot(label),   dL/dh = W^T dL/dz,   dL/dW = sum of dL/dz h^T

    so no logit is computed twice or kept.
    """

    @staticmethod
    def forward(ctx, h, W, labels, chunk, trained):
        dh = torch.zeros_like(h) if trained else None  # (N, d)
        dW = torch.zeros_like(W) if trained and ctx.needs_input_grad[1] else None  # (V, d)
        total = h.new_zeros((), dtype=torch.float32)
        # all chunks share it: on a CPU fresh memory costs as much as what is computed in it
        buffer = h.new_empty(min(chunk, len(h)), len(W))
        for first in range(0, len(h), chunk):
            part = slice(first, first + chunk)
            h_part, at = h[part], (torch.arange(len(h[part]), device=h.device), labels[part])
            logits = torch.mm(h_part, W.T, out=buffer[: len(h_part)])
            z = logits.float()  # (chunk, V): the buffer itself, unless that is bfloat16
            z -= z.amax(-1, keepdim=True)
            z_label = z[at]
            sums = z.exp_().sum(-1, keepdim=True)
            total += sums.log().sum() - z_label.sum()
            if trained:
                dz = z.div_(sums)
                dz[at] -= 1
                dz = dz.to(h.dtype)
                dh[part] = dz @ W
                if dW is not None:
                    dW.addmm_(dz.T, h_part)
        ctx.gradients = dh, dW
        return total

    @staticmethod
    def backward(ctx, scale):
        dh, dW = ctx.gradients
        ctx.gradients = None  # scaled in place: they serve one backward
        dh = dh.mul_(scale)
        dW = dW.mul_(scale) if dW is not None else None
        return dh, dW, None, None, None
