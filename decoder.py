"""How do many rows of text go on together, a position at a time?

Prompts are read whole, once each; from then on a step is one new position of every row.

Shape letters beside model.py's: Q prompts, S rows of each, R rows in all (in a Cohort, its own), T
prompt positions, t new positions, H key-value heads of D, G query heads that share one. A *cohort*
is Q x S rows that began together.
"""

from typing import NamedTuple

import torch

from model import embed

LEAVE_AT = 0.75  # finished rows leave when no more than this share of their cohort is needed
FIRST_POSITIONS = 64  # room for new keys and values at first; as much again whenever it is full
CAPTURE = "cuda"  # where a step becomes one graph, as its launches take most of the time ...
CAPTURE_AFTER = 3  # ... once it has been the same so often: a capture costs as much as three steps


class Prompts(NamedTuple):
    """What is kept of Q prompts once they are read."""

    layers: list  # (keys, values), each (Q, H, T, D), H being key-value heads
    bias: torch.Tensor | None  # (Q, 1, 1, 1, T), added to scores: -inf at padding
    next_pos: torch.Tensor  # (Q), where the text goes on
    last: torch.Tensor  # (Q, d), the state of the last position
    ahead: torch.Tensor  # (Q, A, d), the states of what was read ahead

    def pick(self, q):
        """Those of the prompts q (Q'), ascending; no copy where these are all."""
        if len(q) == len(self.last):
            return self
        q = q.to(self.last.device)
        layers = [(keys[q], values[q]) for keys, values in self.layers]
        bias = None if self.bias is None else self.bias[q]
        return Prompts(layers, bias, self.next_pos[q], self.last[q], self.ahead[q])


class Cohort:
    """S rows of each of Q questions, which began together, and all their caches.

    The S rows of a question attend to *one* prompt cache and each to its own new positions
    (Q, H, S, t, D): the prompt is neither run nor stored nor read once a row.
    """

    def __init__(self, prompts, n_samples):
        self.prompts, self.S = prompts, n_samples
        self.keys = [NewPositions() for _ in prompts.layers]
        self.values = [NewPositions() for _ in prompts.layers]
        self.t = 0  # how many new positions every row has by now

    def __len__(self):
        """Its rows."""
        return len(self.prompts.last) * self.S

    def positions(self, t):
        """The t-th new position of each row (R)."""
        return (self.prompts.next_pos + t)[:, None].expand(-1, self.S).flatten()

    def unwritten(self, x, t):
        """What masks the room that is not written yet (T + n), for a tensor t (1)."""
        T = self.prompts.layers[0][0].shape[2]
        places = torch.arange(-T, self.keys[0].room, device=x.device)
        return torch.where(places > t, -torch.inf, 0.0).to(x)

    def attend(self, i, q, k, v, t, scaling, unwritten):
        """Layer i's attention of each row's t-th new position to its prompt and its past.

        q (R, H, G, D), k and v (R, H, 1, D), G query heads sharing a key-value head. Returns
        (R, H * G * D).
        """
        # one position a row: S takes the place that the sequence has in the stock attention
        R, H, G, D = q.shape
        Q, S = R // self.S, self.S
        # (Q, H, S, G, D) queries, (Q, H, S, 1, D) keys and values
        q, k, v = (x.view(Q, S, H, -1, D).transpose(1, 2) for x in (q, k, v))
        k_prompt, v_prompt = self.prompts.layers[i]  # (Q, H, T, D)
        k_new = self.keys[i].add(k, t)  # parts (Q, H, S, n, D) of t + 1 positions, or of all room
        v_new = self.values[i].add(v, t)

        # all S * G queries of a prompt meet it in one product
        q_flat = q.reshape(Q, H, S * G, D)
        to_prompt = (q_flat @ k_prompt.mT).view(Q, H, S, G, -1)
        if self.prompts.bias is not None:
            to_prompt = to_prompt + self.prompts.bias
        to_new = [q @ part.mT for part in k_new]
        scores = torch.cat([to_prompt, *to_new], -1).mul(scaling)
        if unwritten is not None:
            scores = scores + unwritten

        # one softmax over both parts, in float32 as the stock attention has it
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # (Q, H, S, G, T + new)
        T = k_prompt.shape[2]
        w_prompt, *w_new = weights.split([T, *(part.shape[3] for part in v_new)], -1)
        w_flat = w_prompt.reshape(Q, H, S * G, T)
        o = (w_flat @ v_prompt).view(Q, H, S, G, D)
        for w, part in zip(w_new, v_new):
            o = o + w @ part
        return o.transpose(1, 2).reshape(R, H * G * D)

    def keep(self, q, s):
        """Keep questions q (Q') and, of each, samples s (Q', S')."""
        self.prompts, self.S = self.prompts.pick(q), s.shape[1]
        device = self.prompts.last.device
        for new in self.keys + self.values:
            new.keep(q.to(device), s.to(device))


class Decoder:
    """Reads prompts, whole, and then one position at a time of all rows of all cohorts.

    Rows (R) stand cohort after cohort and, in these, question after question. A cohort attends on
    its own; all else of a step, which is what its weights cost, is one for all.
    """

    def __init__(self, vlm, pad_id):
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

        self.vlm, self.lm, self.pad_id = vlm, vlm.model.language_model, pad_id
        self.rotate = apply_rotary_pos_emb
        if self.lm.has_sliding_layers:
            advice = "set use_sliding_window to false"
            raise SystemExit(f"generation has no sliding-window attention; {advice}")
        attention = self.lm.layers[0].self_attn
        self.H, self.D = attention.num_key_value_heads, attention.head_dim
        self.cohorts = []
        self.forget_graph()

    def read(self, prompts, ahead=()):
        """The Prompts that a prefill of encoded prompts leaves: one forward over all, with images.

        `ahead` are A tokens that are read after every prompt and then forgotten: what the model
        would think there costs no step of its own.
        """
        # padded on the left, so that all prompts end, and all answers begin, at one column
        A = len(ahead)
        read = [followed_by(p, ahead) for p in prompts] if A else prompts
        ids, pos, mask = (x.to(self.vlm.device) for x in left_padded(read, self.pad_id))
        vision = [p["vision"] for p in prompts if p["vision"] is not None]
        # not held: the joined copy is as large as all image positions of x
        x = embed(self.vlm, ids, torch.cat(vision) if vision else None)  # (Q, T, d)
        padded = not mask.all()  # without padding SDPA keeps its causal fast path
        mask_given = mask if padded else None
        out = self.lm(inputs_embeds=x, position_ids=pos, attention_mask=mask_given, use_cache=True)

        # what every later position reads: all but what was read ahead
        T = ids.shape[1] - A
        layers = out.past_key_values.layers
        bias = None
        if padded:
            bias = torch.where(mask[:, :T], 0.0, -torch.inf).to(x)[:, None, None, None]
        # copies of the states, so that those of all positions are not held by them
        return Prompts(
            layers=[(layer.keys[:, :, :T], layer.values[:, :, :T]) for layer in layers],
            bias=bias,
            # text has one position on all three axes of mRoPE: it goes on from the largest
            next_pos=pos[:, :, :T].amax(dim=(0, 2)) + 1,
            last=out.last_hidden_state[:, T - 1].clone(),
            ahead=out.last_hidden_state[:, T:].clone(),
        )

    def begin(self, prompts, n_samples):
        """A cohort more, at the end: n_samples rows to go on after each of the Prompts.

        Returns h_bar (Q * n_samples, d), from which its first tokens are drawn.
        """
        self.cohorts.append(
            Cohort(prompts, n_samples)
        )  # its first step makes room, and a new graph
        return prompts.last.repeat_interleave(n_samples, 0)

    def step(self, x):
        """Feed x (R, d), one embedding a row; returns h_bar (R, d), after the final norm.

        The next step may overwrite what is returned.
        """
        for cohort in self.cohorts:
            if cohort.t == cohort.keys[0].room:
                self.forget_graph()
                for new in cohort.keys + cohort.values:
                    new.add_room(x, len(cohort.prompts.last), self.H, cohort.S, self.D)
        ts = [cohort.t for cohort in self.cohorts]
        h = self.replayed(x, ts) if x.device.type == CAPTURE else self.forward(x, ts)
        for cohort in self.cohorts:
            cohort.t += 1
        return h

    def forget_graph(self):
        """A shape or a place in memory has changed: no step was like the next."""
        self.graph = self.h = None  # and with them the graph's memory
        self.n_alike = 0

    def replayed(self, x, ts):
        """`forward` of fixed shapes; in one launch, of a CUDA graph, once they have lasted."""
        ts = torch.tensor(ts)
        if self.n_alike == 0:
            self.x, self.ts = torch.empty_like(x), ts.to(x.device)
        self.x.copy_(x)
        self.ts.copy_(ts)
        self.n_alike += 1
        # these steps also make what libraries make at a first call, which can not be captured
        if self.n_alike <= CAPTURE_AFTER:
            return self.forward(self.x, self.ts.split(1))
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.h = self.forward(self.x, self.ts.split(1))
        self.graph.replay()
        return self.h

    def forward(self, x, ts):
        """The decoder at every row's next position, x (R, d), which is its cohort's t-th.

        A t is an int; or a tensor (1), and then no shape and no address depends on it: the room
        that is not written yet is read, too, and masked.
        """
        cohorts = list(zip(self.cohorts, ts))
        pos = torch.cat([cohort.positions(t) for cohort, t in cohorts])  # (R)
        rope = self.lm.rotary_emb(x, pos[:, None].expand(3, -1, -1))  # two of (R, 1, D)
        unwritten = [
            cohort.unwritten(x, t) if torch.is_tensor(t) else None for cohort, t in cohorts
        ]
        sizes = [len(cohort) for cohort in self.cohorts]
        for i, layer in enumerate(self.lm.layers):
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            # (R, H, G, D) queries, (R, H, 1, D) keys and values
            q, k, v = (
                proj(y).view(len(y), self.H, -1, self.D)
                for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = self.rotate(q, k, *rope)
            parts = zip(q.split(sizes), k.split(sizes), v.split(sizes))
            o = [
                cohort.attend(i, *qkv, t, attention.scaling, mask)
                for (cohort, t), qkv, mask in zip(cohorts, parts, unwritten)
            ]
            x = x + attention.o_proj(torch.cat(o))
            y = layer.post_attention_layernorm(x)
            x = x + layer.mlp(y)
        return self.lm.norm(x)

    def leave(self, alive):
        """Let rows go that are not alive (R), where that makes their cohort smaller by much.

        Returns the places (R') of those that stay; None where all do.
        """
        parts = list(zip(self.cohorts, alive.split([len(cohort) for cohort in self.cohorts])))
        # as at most steps: no cohort becomes smaller than its living rows
        if all(living.sum() > LEAVE_AT * len(cohort) for cohort, living in parts):
            return None
        places, cohorts, before = [], [], 0
        for cohort, living in parts:
            at = torch.arange(before, before + len(cohort)).view(-1, cohort.S)
            before += len(cohort)
            # a cohort stays a rectangle: some that have ended may have to stay, too
            q, s = still_needed(living.view(-1, cohort.S))
            if s.numel() <= LEAVE_AT * len(cohort):
                at = at[q[:, None], s]
                if len(q):
                    cohort.keep(q, s)
            places.append(at.flatten())
            if len(q):
                cohorts.append(cohort)
        if before == sum(len(at) for at in places):
            return None
        self.forget_graph()
        self.cohorts = cohorts
        return torch.cat(places)


def still_needed(alive):
    """Questions (Q') with a living row, and of each as many samples (Q', S') as any has alive."""
    questions = alive.any(1).nonzero()[:, 0]
    most = int(alive.sum(1).max())
    living_first = alive[questions].int().argsort(dim=1, descending=True, stable=True)
    return questions, living_first[:, :most]


class NewPositions:
    """One layer's keys, or values, of new positions: in parts (Q, H, S, n, D), of which the last
    has room left.

    A part holds as many as all before it. What is written is never copied for room: in the step
    that doubled one buffer, all rows waited for it.
    """

    def __init__(self):
        self.parts = []
        self.room = 0  # positions that the parts hold

    def add_room(self, x, Q, H, S, D):
        """Another part, of x's type."""
        n = self.room or FIRST_POSITIONS
        # a captured step multiplies what is not written yet by 0: that must not be NaN
        make = x.new_zeros if x.device.type == CAPTURE else x.new_empty
        self.parts.append(make(Q, H, S, n, D))
        self.room += n

    def add(self, x, t):
        """Store x (Q, H, S, 1, D) as position t, in the last part.

        Returns the parts as far as they are written; whole ones, where t is a tensor (1).
        """
        *full, last = self.parts
        at = t - (self.room - last.shape[3])
        if torch.is_tensor(t):
            last.index_copy_(3, at, x)
            return self.parts
        last[:, :, :, at] = x[:, :, :, 0]
        return [*full, last[:, :, :, : at + 1]]

    def keep(self, q, s):
        """Keep questions q (Q') and, of each, samples s (Q', S')."""
        # the two index arrays come first in what this gives: (Q', S', H, n, D)
        kept = [part[q[:, None], :, s] for part in self.parts]
        self.parts = [part.transpose(1, 2).contiguous() for part in kept]


def followed_by(prompt, ids):
    """An encoded prompt with more text after it."""
    after = prompt["pos"].max() + 1 + torch.arange(len(ids))  # text goes on by one
    return prompt | {
        "ids": torch.cat([prompt["ids"], torch.tensor(ids)]),
        "pos": torch.cat([prompt["pos"], after.expand(3, -1)], 1),
    }


def left_padded(prompts, pad_id):
    """ids (Q, T), pos (3, Q, T) and mask (Q, T) of prompts that all end at the last column."""
    lengths = [len(p["ids"]) for p in prompts]
    Q, T = len(prompts), max(lengths)
    ids = torch.full((Q, T), pad_id)
    pos = torch.zeros(3, Q, T, dtype=torch.long)
    mask = torch.zeros(Q, T, dtype=torch.bool)
    for i, (p, n) in enumerate(zip(prompts, lengths)):
        ids[i, T - n :] = p["ids"]
        pos[:, i, T - n :] = p["pos"]
        mask[i, T - n :] = True
    return ids, pos, mask
