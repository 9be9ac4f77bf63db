"""How do many rows of text go on together, one position at a time?

Prompts are read whole, once each, into a KV cache that their rows share; from then on a step is one
new position of every row.

Shape letters besides model.py's: Q prompts, S rows of each, R rows in all (in a Cohort, its own), T
prompt positions, t new positions, H key-value heads of D, G query heads that share one. A *cohort*
is Q x S rows whose caches have one shape.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import embed

FIRST_POSITIONS = 64  # room for new keys and values at first; as much again whenever it is full ...
MORE_POSITIONS = 512  # ... but no more than this
LEAVE_AT = 0.75  # finished rows leave when no more than this share (below 1) of a cohort is needed

# On a GPU the launches of a step take most of its time, so that it becomes one graph. No shape may
# change then: questions take the places of those that have ended, and room is made ahead.
CAPTURE = "cuda"
LEAVE_CAPTURED_AT = 0.25  # as LEAVE_AT: every new shape is captured anew
PROMPT_ROOM = 128  # prompts of a cohort are as long as a multiple of this ...
WIDEN_AT_MOST = 2.0  # ... and become at most so many times as long for those that take a place


class PromptCache(NamedTuple):
    """The KV cache of Q prompts that were read together, and where each goes on."""

    layers: list  # (keys in float32, values), each (Q, H, T, D), H being key-value heads
    bias: torch.Tensor | None  # (Q, T), added to scores: -inf at padding
    next_pos: torch.Tensor  # (Q), where the text goes on
    last: torch.Tensor  # (Q, d), the state of the last position
    ahead: torch.Tensor  # (Q, A, d), the states of what was read ahead

    @property
    def T(self):
        """Positions, with padding."""
        return self.layers[0][0].shape[2]

    def at(self, q):
        """Those of the prompts q (Q'), ascending; no copy where these are all."""
        if len(q) == len(self.last):
            return self
        q = q.to(self.last.device)
        layers = [(keys[q], values[q]) for keys, values in self.layers]
        bias = None if self.bias is None else self.bias[q]
        return PromptCache(layers, bias, self.next_pos[q], self.last[q], self.ahead[q])

    def widened(self, T):
        """With caches of its own, padded on the left to T positions."""
        more = T - self.T
        bias = self.last.new_zeros(len(self.last), self.T) if self.bias is None else self.bias
        return self._replace(
            layers=[tuple(F.pad(x, (0, 0, more, 0)) for x in layer) for layer in self.layers],
            bias=F.pad(bias, (more, 0), value=-torch.inf),
            next_pos=self.next_pos.clone(),
        )


def rounded_up(n, step):
    return -(-n // step) * step


class NewPositions:
    """One layer's keys, or values, of new positions: in parts (Q, H, S, n, D), of which the last
    has room left.

    A part doubles the room, or adds MORE_POSITIONS. What is written is never copied for room: in
    the step that doubled one buffer, all rows waited for it. Captured steps have one part, which is
    copied when it is full: a GPU does that in no time, and a part more is more launches a step.
    """

    def __init__(self, in_one_part=False):
        self.in_one_part, self.parts = in_one_part, []
        self.room = 0  # positions that the parts hold

    def add_room(self, x, Q, H, S, D):
        """For more positions, of x's type."""
        n = min(self.room or FIRST_POSITIONS, MORE_POSITIONS)
        if not self.in_one_part:
            self.parts.append(x.new_empty(Q, H, S, n, D))
        # what is not written yet is read and multiplied by 0: it must not be NaN
        elif not self.parts:
            self.parts = [x.new_zeros(Q, H, S, n, D)]
        else:
            self.parts = [F.pad(self.parts[0], (0, 0, 0, n))]
        self.room += n

    def add(self, x, t):
        """Store x (Q, H, S, 1, D) as position t, in the last part.

        Returns the parts as far as they are written; whole ones, where t is a tensor (Q).
        """
        *full, last = self.parts
        if torch.is_tensor(t):
            last[torch.arange(len(t), device=t.device), :, :, t] = x[:, :, :, 0]
            return self.parts
        at = t - (self.room - last.shape[3])
        last[:, :, :, at] = x[:, :, :, 0]
        return [*full, last[:, :, :, : at + 1]]

    def keep(self, q, s):
        """Keep questions q (Q') and, of each, samples s (Q', S')."""
        # the two index arrays come first in what this gives: (Q', S', H, n, D)
        kept = [part[q[:, None], :, s] for part in self.parts]
        self.parts = [part.transpose(1, 2).contiguous() for part in kept]


class Cohort:
    """S rows of each of Q questions, and all their caches.

    They began together; on a GPU, some may have begun where others had ended.
    The S rows of a question attend to *one* prompt cache and each to its own new positions
    (Q, H, S, t, D): the prompt is neither run nor stored nor read once a row.
    """

    def __init__(self, cache, n_samples, in_one_part):
        self.cache, self.S = cache, n_samples
        self.longest = int(WIDEN_AT_MOST * cache.T)  # prompt that may take a place, padding and all
        self.keys = [NewPositions(in_one_part) for _ in cache.layers]
        self.values = [NewPositions(in_one_part) for _ in cache.layers]
        Q = len(cache.last)
        self.t = torch.zeros(Q, dtype=torch.long)  # how many new positions each has by now
        self.free = torch.zeros(Q, dtype=torch.bool)  # places that others can take

    def __len__(self):
        """Its rows."""
        return len(self.cache.last) * self.S

    @property
    def room(self):
        """For how many new positions there is room."""
        return self.keys[0].room

    def add_room(self, x, H, D):
        """For more new positions: keys in float32, values of x's type."""
        size = len(self.cache.last), H, self.S, D
        for keys, values in zip(self.keys, self.values):
            keys.add_room(x.float(), *size)
            values.add_room(x, *size)

    def positions(self, t):
        """The t-th new position of each row (R)."""
        return (self.cache.next_pos + t)[:, None].expand(-1, self.S).flatten()

    def mask(self, x, t):
        """What is added to the scores of the t-th new positions: -inf at what is no position.

        (Q, 1, 1, 1, T + new); None where all are.
        """
        bias = self.cache.bias
        if not torch.is_tensor(t):
            return None if bias is None else F.pad(bias, (0, t + 1))[:, None, None, None]
        # captured prompts were widened, and have a bias
        unwritten = torch.arange(self.room, device=x.device) > t[:, None]
        new = torch.zeros_like(unwritten, dtype=x.dtype).masked_fill(unwritten, -torch.inf)
        return torch.cat([bias, new], -1)[:, None, None, None]

    def attend(self, i, q, k, v, t, scaling, mask):
        """Layer i's attention of each row's t-th new position to its prompt and its past.

        q (R, H, G, D), k and v (R, H, 1, D), G query heads sharing a key-value head. Returns
        (R, H * G * D).

        Queries, keys and scores are in float32, as they are within the attention of a whole text:
        Qwen2.5 has keys of length 900, and scores in bfloat16 would double the error of a state.
        """
        q, k = q.float(), k.float()
        # one position per row: S takes the place that the sequence has in the stock attention
        R, H, G, D = q.shape
        Q, S = R // self.S, self.S
        # (Q, H, S, G, D) queries, (Q, H, S, 1, D) keys and values
        q, k, v = (x.view(Q, S, H, -1, D).transpose(1, 2) for x in (q, k, v))
        k_prompt, v_prompt = self.cache.layers[i]  # (Q, H, T, D)
        k_new = self.keys[i].add(k, t)  # parts (Q, H, S, n, D) of t + 1 positions, or of all room
        v_new = self.values[i].add(v, t)

        # all S * G queries of a prompt meet it in one product
        q_flat = q.reshape(Q, H, S * G, D)
        to_prompt = (q_flat @ k_prompt.mT).view(Q, H, S, G, -1)
        to_new = [q @ part.mT for part in k_new]
        scores = torch.cat([to_prompt, *to_new], -1)
        scores = scores * scaling if mask is None else torch.add(mask, scores, alpha=scaling)

        # one softmax over both parts
        weights = scores.softmax(-1).to(v.dtype)  # (Q, H, S, G, T + new)
        T = k_prompt.shape[2]
        w_prompt, *w_new = weights.split([T, *(part.shape[3] for part in v_new)], -1)
        w_flat = w_prompt.reshape(Q, H, S * G, T)
        o = (w_flat @ v_prompt).view(Q, H, S, G, D)
        for w, part in zip(w_new, v_new):
            o = o + w @ part
        return o.transpose(1, 2).reshape(R, H * G * D)

    def can_seat(self, cache, n_samples):
        """Are there enough free places for a PromptCache, and are they long enough?"""
        fits = rounded_up(cache.T, PROMPT_ROOM) <= self.longest
        return fits and self.S == n_samples and self.free.sum() >= len(cache.last)

    def seat(self, cache):
        """The prompts of a cache take places that are free, which are returned (Q')."""
        places = self.free.nonzero()[: len(cache.last), 0]
        theirs = cache.widened(self.cache.T)
        at = places.to(cache.last.device)
        for mine, new in zip(self.cache.layers, theirs.layers):
            for x, y in zip(mine, new):
                x[at] = y
        self.cache.bias[at] = theirs.bias
        self.cache.next_pos[at] = theirs.next_pos
        self.t[places] = 0
        self.free[places] = False
        return places

    def set_free(self, alive):
        """The places of questions without a living row (R) can be taken."""
        self.free = ~alive.view(-1, self.S).any(1)
        self.t[self.free] = 0  # until they are taken they write to their first position

    def shrink(self, alive, leave_at):
        """Drop rows that are not alive (R), if no more than the share `leave_at` is still needed.

        Returns the index (R') of those that stay: a rectangle, so that some that have ended may
        have to stay, too.
        """
        rows = torch.arange(len(self)).view(-1, self.S)
        q, s = still_needed(alive.view(-1, self.S))
        if s.numel() <= leave_at * len(self):
            rows = rows[q[:, None], s]
            if len(q):
                self.keep(q, s)
        return rows.flatten()

    def keep(self, q, s):
        """Keep questions q (Q') and, of each, samples s (Q', S')."""
        self.cache, self.S = self.cache.at(q), s.shape[1]
        self.t, self.free = self.t[q], self.free[q]
        device = self.cache.last.device
        for new in self.keys + self.values:
            new.keep(q.to(device), s.to(device))


class Decoder:
    """Reads prompts, whole, and then one position at a time of all rows of all cohorts.

    Rows (R) stand cohort after cohort and, in these, question after question. A cohort attends on
    its own; all else of a step, which is what its weights cost, is one for all.
    """

    def __init__(self, vlm, pad_id):
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

        self.vlm, self.lm, self.pad_id = vlm, vlm.model.language_model, pad_id
        self.rotate_half = rotate_half
        attention = [layer.self_attn for layer in self.lm.layers]
        self.qkv = [joined(a.q_proj, a.k_proj, a.v_proj) for a in attention]
        self.gate_up = [joined(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in self.lm.layers]
        self.H, self.D = attention[0].num_key_value_heads, attention[0].head_dim
        self.captured = vlm.device.type == CAPTURE
        self.cohorts = []
        self.forget_graph()

    def read(self, prompts, ahead=()):
        """The PromptCache of encoded prompts: one forward over all, with their images.

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
            bias = torch.where(mask[:, :T], 0.0, -torch.inf).to(x)
        # copies of the states, so that those of all positions are not held by them
        return PromptCache(
            layers=[(layer.keys[:, :, :T].float(), layer.values[:, :, :T]) for layer in layers],
            bias=bias,
            # text has one position on all three axes of mRoPE: it goes on from the largest
            next_pos=pos[:, :, :T].amax(dim=(0, 2)) + 1,
            last=out.last_hidden_state[:, T - 1].clone(),
            ahead=out.last_hidden_state[:, T:].clone(),
        )

    def begin(self, cache, n_samples):
        """More rows: n_samples for each prompt of a PromptCache, to go on after it.

        Returns h_bar (Q * n_samples, d), from which their first tokens are drawn; and an index (R):
        what is row i now was row index[i] of the rows before, followed by these.
        """
        h = cache.last.repeat_interleave(n_samples, 0)
        index = torch.arange(sum(map(len, self.cohorts)))
        begun = len(index) + torch.arange(len(h))
        if self.captured:
            places = self.take_places(cache, n_samples)
            if places is not None:
                index[places] = begun
                return h, index
            cache = cache.widened(rounded_up(cache.T, PROMPT_ROOM))
        self.forget_graph()
        # the shapes change anyway: cohorts that nobody is in go
        rows = index.split([len(cohort) for cohort in self.cohorts])
        kept = [(cohort, at) for cohort, at in zip(self.cohorts, rows) if not cohort.free.all()]
        self.cohorts = [cohort for cohort, _ in kept]
        self.cohorts.append(Cohort(cache, n_samples, in_one_part=self.captured))
        return h, torch.cat([*(at for _, at in kept), begun])

    def take_places(self, cache, n_samples):
        """Seat prompts where others have ended: their rows; None where no cohort has the room."""
        T = rounded_up(cache.T, PROMPT_ROOM)
        first = 0
        for cohort in self.cohorts:
            if cohort.can_seat(cache, n_samples):
                if T > cohort.cache.T:
                    self.forget_graph()
                    cohort.cache = cohort.cache.widened(T)
                places = cohort.seat(cache)
                rows = first + places[:, None] * n_samples + torch.arange(n_samples)
                return rows.flatten()
            first += len(cohort)
        return None

    def step(self, x):
        """Feed x (R, d), one embedding per row; returns h_bar (R, d), after the final norm.

        The next step may overwrite what is returned.
        """
        for cohort in self.cohorts:
            if cohort.t.max() == cohort.room:
                self.forget_graph()
                cohort.add_room(x, self.H, self.D)
        ts = [cohort.t for cohort in self.cohorts]  # (Q) each
        if self.captured:
            h = self.replayed(x, ts)
        else:
            # nobody takes a place: all of a cohort are as far
            h = self.forward(x, [int(t[0]) for t in ts])
        for cohort in self.cohorts:
            cohort.t += 1
        return h

    def forget_graph(self):
        """A shape or an address has changed, or will."""
        self.graph = self.h = self.x = self.ts = None  # and with them the graph's memory

    def replayed(self, x, ts):
        """`forward` of fixed shapes: the first time as usual, later in one launch of a CUDA graph.

        ts: of each cohort t (Q).
        """
        sizes = [len(t) for t in ts]
        if self.x is None:
            self.x, self.ts = x.clone(), torch.cat(ts).to(x.device)
            # this step also makes what libraries make at a first call, which cannot be captured
            return self.forward(self.x, self.ts.split(sizes))
        self.x.copy_(x)
        self.ts.copy_(torch.cat(ts))
        with torch.cuda.device(x.device):  # a capture is of the current one's stream
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.h = self.forward(self.x, self.ts.split(sizes))
            self.graph.replay()
        return self.h

    def forward(self, x, ts):
        """The decoder at every row's next position, x (R, d), which is its question's t-th.

        A t is an int, of a cohort; or a tensor (Q), and then no shape and no address depends on it:
        the room that is not written yet is read, too, and masked.
        """
        cohorts = list(zip(self.cohorts, ts))
        pos = torch.cat([cohort.positions(t) for cohort, t in cohorts])  # (R)
        cos, sin = self.lm.rotary_emb(x, pos[:, None].expand(3, -1, -1))  # (R, 1, D)
        masks = [cohort.mask(x, t) for cohort, t in cohorts]
        sizes = [len(cohort) for cohort in self.cohorts]
        for i, layer in enumerate(self.lm.layers):
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            heads = F.linear(y, *self.qkv[i]).view(len(y), -1, self.D)  # all of q, then of k, of v
            qk, v = heads[:, : -self.H], heads[:, -self.H :]
            qk = qk * cos + self.rotate_half(qk) * sin
            # (R, H, G, D) queries, (R, H, 1, D) keys and values
            q, k = qk[:, : -self.H].view(len(y), self.H, -1, self.D), qk[:, -self.H :]
            qs, ks, vs = (part.split(sizes) for part in (q, k[:, :, None], v[:, :, None]))
            o = []
            for c, (cohort, t) in enumerate(cohorts):
                of_cohort = qs[c], ks[c], vs[c], t
                o.append(cohort.attend(i, *of_cohort, attention.scaling, masks[c]))
            x = x + attention.o_proj(o[0] if len(o) == 1 else torch.cat(o))
            y = layer.post_attention_layernorm(x)
            gate, up = F.linear(y, *self.gate_up[i]).chunk(2, -1)
            x = x + layer.mlp.down_proj(layer.mlp.act_fn(gate) * up)
        return self.lm.norm(x)

    def leave(self, alive, others_may_come=False):
        """Drop rows that are not alive (R), where that makes their cohort smaller by enough.

        While steps are captured and others may come, none is dropped: their places are used again.
        Returns the index (R') of those that stay; None where all do.
        """
        parts = alive.split([len(cohort) for cohort in self.cohorts])
        parts = list(zip(self.cohorts, parts))
        leave_at = LEAVE_AT
        if self.captured:
            leave_at = LEAVE_CAPTURED_AT
            for cohort, living in parts:
                cohort.set_free(living)
            if others_may_come:
                return None
        # the usual case, found out cheaply: too many are alive for any cohort to become smaller
        if all(living.sum() > leave_at * len(cohort) for cohort, living in parts):
            return None
        index, cohorts, first = [], [], 0
        for cohort, living in parts:
            n_rows = len(cohort)
            staying = cohort.shrink(living, leave_at)
            index.append(first + staying)
            first += n_rows
            if len(staying):
                cohorts.append(cohort)
        index = torch.cat(index)
        if len(index) == len(alive):
            return None
        self.forget_graph()
        self.cohorts = cohorts
        return index


def joined(*linears):
    """(weight, bias) of one product that is those of all linears, which read the same.

    Their weights are laid one below the other and stay theirs: nothing is stored twice.
    """
    weights, biases = zip(*((linear.weight, linear.bias) for linear in linears))
    return one_below_the_other(weights), one_below_the_other(biases)


def one_below_the_other(params):
    """Parameters (rows, ...) as one tensor of all rows, of which each is a part from now on."""
    if params[0] is None:
        return None
    sizes = [len(p) for p in params]
    begin = [(p.untyped_storage().data_ptr(), p.storage_offset()) for p in params]
    end = [(memory, at + p.numel()) for (memory, at), p in zip(begin, params)]
    if begin[1:] != end[:-1]:
        # not in inference mode: they may be trained on
        with torch.inference_mode(False), torch.no_grad():
            for p, rows in zip(params, torch.cat(params).split(sizes)):
                p.data = rows
    return params[0].detach().as_strided((sum(sizes), *params[0].shape[1:]), params[0].stride())


def still_needed(alive):
    """Questions (Q') with a living row, and of each as many samples (Q', S') as any has alive."""
    questions = alive.any(1).nonzero()[:, 0]
    most = int(alive.sum(1).max())
    living_first = alive[questions].int().argsort(dim=1, descending=True, stable=True)
    return questions, living_first[:, :most]


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
