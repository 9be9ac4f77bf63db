"""What does AMVL train? Latents drawn from a prior that learns from a posterior, and shapes it.

Asymmetric Mutual Variational Learning (arXiv 2607.00461, of which only summaries could be read).
A question x is followed by k slots, then the response y. A slot is filled by z in R^m through a
linear map: in training from the posterior q(z | x, y), at test from the prior p(z | x), diagonal
Gaussians both, of slots that are independent given what was read:

    L = L_NTP(y | x, Z ~ q) + beta KL(sg[q] || p) + gamma KL(sg[p] || q)

The forward term moves the prior, the reverse term the posterior: it keeps the posterior where the
prior can reach it, against an answer that leaks through the slots. That is so of their two heads;
the decoder that both read gets the gradients of both [ours: the summaries do not say]. Theirs,
where they are settings of train.py: K = 8 slots, slot_dim = 512.

A causal slot cannot see the y after it, so each distribution has a pass of its own [ours]:
the prior's reads [x, slots], the posterior's [x, y, slots], and the third, with Z in the slots,
writes y. Shape letters beside method.py's: K slots, m latent dimensions.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from data import LATENT_SPAN
from files import seed_of
from method import Method, head_of
from model import (
    IGNORE,
    SlotHead,
    add_latent_tokens,
    encode,
    gaussian,
    latent_ids,
    save_head,
    tower_fingerprint,
)

# "forward first", as the summaries have it: shares of the steps at which a weight begins to grow
# from 0 and at which it is whole, linearly between [the numbers are ours]
BETA_GROWS = 0.0, 0.2
GAMMA_GROWS = 0.2, 0.4
# of both distributions at the start: at 0 their noise drowns what the slots could say [ours]
LOG_VARIANCE_AT_START = -5.0


def kl(q, p):
    """KL(q || p), summed over the dimensions: (...), in nats."""
    difference = q.log_variance - p.log_variance
    distance = (q.mean - p.mean).square() / p.log_variance.exp()
    return 0.5 * (difference.exp() + distance - 1 - difference).sum(-1)


class AMVL(Method):
    """K slots before the answer, filled from the posterior in training and the prior at test."""

    def __init__(self, vlm, tokenizer, processor, settings):
        super().__init__(vlm, tokenizer, processor, settings)
        self.latent_id = add_latent_tokens(vlm, tokenizer)
        d = vlm.config.text_config.hidden_size
        # the prior, and the way from z into a slot: all that a test needs
        self.head = SlotHead(d, settings["K"], settings["slot_dim"])
        self.posterior = nn.Linear(d, 2 * self.head.m)
        for linear in (self.head.prior, self.posterior):
            nn.init.constant_(linear.bias[self.head.m :], LOG_VARIANCE_AT_START)

    # --- how a row becomes numbers: [x, slots, y], and for the posterior [x, y, slots]

    def encode(self, row):
        K, response = self.head.K, LATENT_SPAN + row["response"]  # which has no spans of its own
        example = encode(self.vlm, self.tokenizer, self.processor, row, K, response)
        ids = example["ids"]
        # the span's two ends are forced at test: nothing is learnt of them
        start, _, end = latent_ids(self.tokenizer)
        example["labels"][(ids == start) | (ids == end)] = IGNORE
        # text after the question has one position per token: the order alone changes. <eos> stays
        # last: no state is read there
        first = int((ids == start).nonzero())
        x, span, y, eos = ids.split([first, K + 2, len(ids) - first - K - 3, 1])
        example["ids_q"] = torch.cat([x, y, span, eos])
        if "step" in row:
            # a row's own draw of a step, whatever rank or micro-batch it falls to
            seed = seed_of(self.settings["seed"], row["step"], row["id"])
            draws = torch.Generator().manual_seed(seed)
            example["noise"] = torch.randn(K, self.head.m, generator=draws)
        return example

    def counts(self, example):
        n = super().counts(example) | {"kl_forward": 1, "kl_reverse": 1}
        if "noise" in example:
            return n
        # of a validation row also what the prior's latents are worth
        return n | {"ce_prior": n["ce"], "right_posterior": 1, "right_prior": 1}

    def collate(self, examples):
        batch = super().collate(examples)
        batch["ids_q"] = pad_sequence([e["ids_q"] for e in examples], batch_first=True)
        if "noise" in examples[0]:
            batch["noise"] = torch.cat([example["noise"] for example in examples])  # (B * K, m)
        return batch

    # --- losses

    def forward(self, batch):
        """Sums of L_NTP over the response, and of both KL terms over the rows.

        Without draws (validation) the means are fed, and the same is measured with the prior's.
        """
        p, q = self.prior_of(batch), self.posterior_of(batch)  # (B * K, m)
        z = q.sample(batch["noise"]) if "noise" in batch else q.mean
        h = self.states(batch, self.head.into_slots(z))
        sums = {
            "ce": self.cross_entropy(h, batch),
            "kl_forward": self.divergence(q.detach(), p),
            "kl_reverse": self.divergence(p.detach(), q),
        }
        if "noise" in batch:
            return sums
        h_prior = self.states(batch, self.head.into_slots(p.mean))
        return sums | {
            "ce_prior": self.cross_entropy(h_prior, batch),
            "right_posterior": self.rows_right(h, batch),
            "right_prior": self.rows_right(h_prior, batch),
        }

    def prior_of(self, batch):
        """p(z | x): read at the slots of [x, slots, y], where y is still to come."""
        at = batch["ids"][:, :-1] == self.latent_id
        return gaussian(self.head.prior(self.states(batch)[at]))

    def posterior_of(self, batch):
        """q(z | x, y): read at the slots of [x, y, slots]."""
        at = batch["ids_q"][:, :-1] == self.latent_id
        return gaussian(self.posterior(self.states(batch | {"ids": batch["ids_q"]})[at]))

    def divergence(self, a, b):
        """Summed KL(a || b); a slot's counts for no less than free_bits nats [ours: 0]."""
        return kl(a, b).clamp(min=self.settings["free_bits"]).sum()

    def rows_right(self, h, batch, chunk=512):
        """How many rows have the likeliest token right at every place, the text before it given."""
        labels = batch["labels"][:, 1:]
        on = labels != IGNORE
        # as in cross_entropy: never all logits at once
        said = torch.cat([self.vlm.lm_head(part).argmax(-1) for part in h[on].split(chunk)])
        wrong = torch.zeros_like(labels, dtype=torch.bool)
        wrong[on] = said != labels[on]
        return (~wrong.any(1)).sum().float()

    def weights(self, step, total):
        beta, gamma = self.settings["beta"], self.settings["gamma"]
        done = step / total
        return {
            "ce": 1.0,
            "kl_forward": beta * grown(done, *BETA_GROWS),
            "kl_reverse": gamma * grown(done, *GAMMA_GROWS),
        }

    def report(self, means):
        if "ce_prior" not in means:
            return means
        # the leakage gap: what the answer, seen through the slots, is worth at best
        return means | {
            "leakage": means["right_posterior"] - means["right_prior"],
            "leakage_ce": means["ce_prior"] - means["ce"],
        }

    # --- what it leaves

    def save(self, folder, trained):
        """latent_head.safetensors: the prior and the map into the slots. No posterior."""
        meta = {"tower": tower_fingerprint(self.vlm)}
        save_head(folder, self.head, head_of(trained), meta)


def grown(done, begin, end):
    """A ramp from 0 at the share `begin` of the steps to 1 at `end`; `done`: the share taken."""
    return min(1.0, max(0.0, (done - begin) / (end - begin)))
