"""How are text and latents written, batched?

One prompt cache a question, shared by its samples; every row in text or in latent mode on its own;
the interventions and the norm calibration of section 5.

Shape letters beside model.py's: Q questions, S samples a question, R rows of text, V vocabulary,
T prompt positions, t new positions; a *slot* is one place of the (Q, S) batch, and writes one row.
"""

import math
from itertools import accumulate, pairwise

import torch
from safetensors.torch import save_file

from data import LATENT_SPAN, read_safetensors, seed_of, write_then_rename
from model import HEAD_FILE, embed, encode, encode_pixels, latent_ids, pixels_of

TOWER_PATCHES = 65_536  # of a tower call without gradients: one image of 16,384 tokens
LEAVE_AT = 0.75  # finished rows leave the batch when no more than this share of slots is needed
FIRST_POSITIONS = 64  # room for new keys and values at first; as much again whenever it is full
CAPTURE = "cuda"  # where a step becomes one graph, as its launches take most of the time ...
CAPTURE_AFTER = 3  # ... once it has been the same so often: a capture costs as much as three steps
NUCLEUS = 256  # tokens among which top_p < 1 is looked for at first
INTERVENTIONS = ("clean", "zero", "markers", "noise", "mean", "shuffle", "oracle", "oracle_pca")

# --------------------------------------------------------------------------------------------------
# prompts


def make_prompts(vlm, tokenizer, processor, rows):
    """Encode data rows for `generate`."""
    prompts = [encode(vlm, tokenizer, processor, row) for row in rows]
    return see(vlm, processor, prompts)


def read_ahead(processor, prompt):
    """An encoded prompt with the pixels of its images: what a thread can do while others decode."""
    return prompt | {"pixels": [pixels_of(processor, image) for image in prompt["images"]]}


def see(vlm, processor, prompts):
    """Add "vision" (N, d) or None to encoded prompts; the tower runs over several images a time."""
    todo = []  # ((image, its pixels if they were read, its grid), patches)
    for p in prompts:
        pixels = p.pop("pixels", [None] * len(p["images"]))
        for image in zip(p["images"], pixels, p["grids"]):
            todo.append((image, math.prod(image[2])))

    seen = []  # (h*w/4, d) an image
    for call in calls_of(todo, TOWER_PATCHES):
        pixels = [pixels_of(processor, image) if x is None else x for image, x, _ in call]
        grids = torch.tensor([grid for _, _, grid in call])
        with torch.inference_mode():
            seen += encode_pixels(vlm, processor, torch.cat(pixels), grids)

    # give each prompt its images back, in order
    rest = iter(seen)
    for p in prompts:
        mine = [next(rest) for _ in p["images"]]
        p["vision"] = torch.cat(mine) if mine else None
    return prompts


def calls_of(sized, most):
    """Split (item, size) pairs into lists of items of at most `most` together, or of one item."""
    call, total = [], 0
    for item, size in sized:
        # the next image would not fit: close this call
        if call and total + size > most:
            yield call
            call, total = [], 0
        call.append(item)
        total += size
    if call:
        yield call


# --------------------------------------------------------------------------------------------------
# the decoder, one position at a time


class Decoder:
    """One prefill for Q prompts, then one position at a time for Q x S rows, wave after wave.

    The S samples of a question attend to *one* prompt cache (Q, H, T, D) and each to its own new
    positions (Q, H, S, t, D), H being key-value heads: the prompt is neither run nor stored nor
    read once a sample.

    `ahead` are A tokens that are read after every prompt and then forgotten: what the model would
    think there, `self.ahead` (Q, A, d), costs no step of its own.
    """

    def __init__(self, vlm, prompts, pad_id, ahead=()):
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

        self.lm, self.rotate = vlm.model.language_model, apply_rotary_pos_emb
        if self.lm.has_sliding_layers:
            advice = "set use_sliding_window to false"
            raise SystemExit(f"generation has no sliding-window attention; {advice}")
        attention = self.lm.layers[0].self_attn
        self.H, self.D = attention.num_key_value_heads, attention.head_dim
        self.G = attention.num_key_value_groups  # query heads that share a key-value head

        # the prefill: one forward over all prompts, images included, padded on the left, so that
        # all prompts end, and all answers begin, at one column
        A = len(ahead)
        read = [followed_by(p, ahead) for p in prompts] if A else prompts
        ids, pos, mask = (x.to(vlm.device) for x in left_padded(read, pad_id))
        vision = [p["vision"] for p in prompts if p["vision"] is not None]
        # not held: the joined copy is as large as all image positions of x
        x = embed(vlm, ids, torch.cat(vision) if vision else None)  # (Q, T, d)
        padded = not mask.all()  # without padding SDPA keeps its causal fast path
        mask_given = mask if padded else None
        out = self.lm(inputs_embeds=x, position_ids=pos, attention_mask=mask_given, use_cache=True)

        # what every later position reads: all but what was read ahead
        T = ids.shape[1] - A
        mask = mask[:, :T]
        cache = out.past_key_values.layers
        self.prompts = [(layer.keys[:, :, :T], layer.values[:, :, :T]) for layer in cache]
        self.biases = None  # (Q, 1, 1, 1, T), added to scores: -inf at padding
        if padded:
            bias = torch.where(mask, 0.0, -torch.inf).to(x)
            self.biases = bias[:, None, None, None]
        # copies, so that the states of all positions are not held by them
        self.ahead = out.last_hidden_state[:, T:].clone()  # (Q, A, d)
        self.last = out.last_hidden_state[:, T - 1 : T].clone()  # (Q, 1, d)
        # text has one position on all three axes of mRoPE: they go on from the largest
        self.first_pos = pos[:, :, :T].amax(dim=(0, 2)) + 1  # (Q)

    def begin(self, questions, n_samples, final):
        """Start a wave: n_samples rows of each of the questions (Q'), to go on after its prompt.

        Returns h_bar (Q', S, d). From the `final` wave on only the prompts in use are held.
        """
        self.forget_graph()
        self.prompt = self.keys = self.values = None  # the wave before makes room
        q = questions.to(self.last.device)
        whole = len(q) == len(self.last)  # no copy
        self.prompt = self.prompts if whole else [(k[q], v[q]) for k, v in self.prompts]
        self.bias = self.biases if whole or self.biases is None else self.biases[q]
        self.next_pos = self.first_pos[q]
        if final:
            self.prompts = None
        self.keys = [NewPositions() for _ in self.prompt]
        self.values = [NewPositions() for _ in self.prompt]
        self.t = 0  # how many new positions every row has by now
        return self.last[q].expand(-1, n_samples, -1)

    def step(self, x):
        """Feed x (Q, S, d), one embedding a row; returns h_bar (Q, S, d), after the final norm.

        The next step may overwrite what is returned.
        """
        if self.t == self.keys[0].room:
            self.forget_graph()
            for new in self.keys + self.values:
                new.add_room(x, self.H, self.D)
        h = self.replayed(x) if x.device.type == CAPTURE else self.forward(x, self.t)
        self.t += 1
        return h

    def forget_graph(self):
        """A shape or a place in memory has changed: no step was like the next."""
        self.graph = self.h = None  # and with them the graph's memory
        self.n_alike = 0

    def replayed(self, x):
        """`forward` of fixed shapes; in one launch, of a CUDA graph, once they have lasted."""
        if self.n_alike == 0:
            self.x, self.at = torch.empty_like(x), torch.empty(1, dtype=torch.long, device=x.device)
        self.x.copy_(x)
        self.at.fill_(self.t)
        self.n_alike += 1
        # these steps also make what libraries make at a first call, which can not be captured
        if self.n_alike <= CAPTURE_AFTER:
            return self.forward(self.x, self.at)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.h = self.forward(self.x, self.at)
        self.graph.replay()
        return self.h

    def forward(self, x, t):
        """The decoder at every row's t-th new position, x (Q, S, d).

        t is an int; or a tensor (1), and then no shape and no address depends on it: the room that
        is not written yet is read, too, and masked.
        """
        unwritten = None
        if torch.is_tensor(t):
            T = self.prompt[0][0].shape[2]
            places = torch.arange(-T, self.keys[0].room, device=x.device)
            unwritten = torch.where(places > t, -torch.inf, 0.0).to(x)  # (T + n), added to scores
        pos = (self.next_pos + t)[:, None]  # (Q, 1)
        cos, sin = self.lm.rotary_emb(x, pos.expand(3, -1, 1))
        rope = cos[:, None], sin[:, None]  # (Q, 1, 1, D)
        for i, layer in enumerate(self.lm.layers):
            y = layer.input_layernorm(x)
            x = x + self.attend(i, layer.self_attn, y, rope, t, unwritten)
            y = layer.post_attention_layernorm(x)
            x = x + layer.mlp(y)
        return self.lm.norm(x)

    def attend(self, i, attention, y, rope, t, unwritten):
        """Layer i's attention of a new position a row, y (Q, S, d), to its prompt and its past."""
        # one position a row: S takes the place that the sequence has in the stock attention
        Q, S, _ = y.shape
        H, G, D = self.H, self.G, self.D
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        # (Q, H, S, G, D) queries, (Q, H, S, 1, D) keys and values
        q, k, v = (proj(y).view(Q, S, H, -1, D).transpose(1, 2) for proj in projections)
        q, k = self.rotate(q, k, *rope)
        k_prompt, v_prompt = self.prompt[i]  # (Q, H, T, D)
        k_new = self.keys[i].add(k, t)  # parts (Q, H, S, n, D) of t + 1 positions, or of all room
        v_new = self.values[i].add(v, t)

        # all S * G queries of a prompt meet it in one product
        q_flat = q.reshape(Q, H, S * G, D)
        to_prompt = (q_flat @ k_prompt.mT).view(Q, H, S, G, -1)
        if self.bias is not None:
            to_prompt = to_prompt + self.bias
        to_new = [q @ part.mT for part in k_new]
        scores = torch.cat([to_prompt, *to_new], -1).mul(attention.scaling)
        if unwritten is not None:
            scores = scores + unwritten

        # one softmax over both parts, in float32 as the stock attention has it
        weights = scores.softmax(-1, dtype=torch.float32).to(y.dtype)  # (Q, H, S, G, T + new)
        T = k_prompt.shape[2]
        w_prompt, *w_new = weights.split([T, *(part.shape[3] for part in v_new)], -1)
        w_flat = w_prompt.reshape(Q, H, S * G, T)
        o = (w_flat @ v_prompt).view(Q, H, S, G, D)
        for w, part in zip(w_new, v_new):
            o = o + w @ part
        return attention.o_proj(o.transpose(1, 2).reshape(Q, S, -1))

    def keep(self, q, s):
        """Keep questions q (Q') and, of each, samples s (Q', S')."""
        self.forget_graph()
        device = self.next_pos.device
        q, s = q.to(device), s.to(device)
        self.next_pos = self.next_pos[q]
        if self.bias is not None:
            self.bias = self.bias[q]
        self.prompt = [(keys[q], values[q]) for keys, values in self.prompt]
        for new in self.keys + self.values:
            new.keep(q, s)


class NewPositions:
    """One layer's keys, or values, of new positions: in parts (Q, H, S, n, D), of which the last
    has room left.

    A part holds as many as all before it. What is written is never copied for room: in the step
    that doubled one buffer, all rows waited for it.
    """

    def __init__(self):
        self.parts = []
        self.room = 0  # positions that the parts hold

    def add_room(self, x, H, D):
        """Another part, for rows x (Q, S, d) of H heads of D."""
        Q, S, _ = x.shape
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
        # the two index arrays come first in what this gives
        kept = [part[q[:, None], :, s] for part in self.parts]  # (Q', S', H, n, D)
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


# --------------------------------------------------------------------------------------------------
# which token, which latent


def pick(logits, temperature, top_p, u):
    """Tokens (R) from logits (R, V): greedy at temperature 0, else by inverse CDF at u (R).

    u are uniforms: a row's draw depends on its own alone, not on the batch it is in.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # float32, so that the sum of 152,064 of them is 1
    p = torch.softmax(logits / temperature, -1)
    return from_nucleus(p, top_p, u) if top_p < 1 else from_all(p, u)


def from_all(p, u):
    """Columns (R) of p (R, V), not negative, by inverse CDF at u (R)."""
    cdf = p.cumsum(-1)
    # the last column is the total: u < 1 keeps the index on a token of non-zero probability
    u = u.to(cdf) * cdf[:, -1]
    drawn = torch.searchsorted(cdf, u[:, None], right=True)[:, 0]
    return drawn.clamp(max=p.shape[-1] - 1)


def from_nucleus(p, top_p, u, k=NUCLEUS):
    """The same, from the likeliest tokens alone that together reach top_p.

    They are looked for among the k likeliest, for rows of more among 16 k, then among all: to sort
    the whole vocabulary takes ten times as long as to draw from it.
    """
    V = p.shape[-1]
    tokens = torch.arange(V, device=p.device).expand_as(p)
    if k < V:
        tokens = p.topk(k).indices.sort(-1).values  # (R, k)
    # equally likely ones in the order of the vocabulary: the draw depends on no algorithm
    likeliest, order = p.gather(-1, tokens).sort(dim=-1, descending=True, stable=True)
    likelier = likeliest.cumsum(-1) - likeliest  # the tokens before this one, together
    outside = likelier >= top_p
    outside[:, 0] = False  # top_p=0: the likeliest alone

    # by inverse CDF in the order of the vocabulary, as from all of p with 0 outside
    inside = torch.zeros_like(likeliest).scatter(-1, order, likeliest.masked_fill(outside, 0))
    drawn = tokens.gather(-1, from_all(inside, u)[:, None])[:, 0]

    # more tokens may belong to it unless the last of the k is less likely than all inside
    least = likeliest.masked_fill(outside, 1).amin(-1)
    wider = least == likeliest[:, -1]
    if k < V and wider.any():
        k = 16 * k if k == NUCLEUS else V
        drawn[wider] = from_nucleus(p[wider], top_p, u[wider], k)
    return drawn


def intervene(kind, head, v_hat, noise=None, fed=None):
    """What is fed in place of the predicted latents v_hat (M, d) (section 5).

    noise (M, k): standard normal draws, scaled to the training coefficients' own standard
    deviations, reconstructed and rescaled to the predicted norm; (M, d) for a head without a PCA,
    rescaled alone. fed (M, d): another example's latents (shuffle) or the real features (oracle).
    """
    if kind == "mean":
        return head.mean.expand_as(v_hat)
    if kind == "noise":
        w = noise
        if head.basis.numel():
            # the spread of the training coefficients along each component
            std = head.eigenvalues.clamp(min=0).sqrt()
            w = head.reconstruct(noise * std)
        norm = v_hat.norm(dim=-1, keepdim=True)
        return w * norm / w.norm(dim=-1, keepdim=True)
    if kind in ("shuffle", "oracle"):
        return fed
    if kind == "oracle_pca":
        c = (fed - head.mean) @ head.basis  # what the subspace keeps of the real features
        return head.reconstruct(c)
    return v_hat


def ema_norm(vision, beta):
    """n_bar, a moving average of ||v|| over a query's embeddings (N, d); 0 without images."""
    if vision is None:
        return 0.0
    # in reading order, image after image
    norms = vision.float().norm(dim=-1).tolist()
    n_bar = norms[0]
    for n in norms[1:]:
        n_bar = beta * n_bar + (1 - beta) * n
    return n_bar


def calibrate(v, n_bar):
    """EMA norm calibration: n_bar v / ||v|| for latents v (M, d), n_bar (M); as it is where 0."""
    # 0 for a question without images: nothing to be calibrated to
    scale = n_bar[:, None] / v.norm(dim=-1, keepdim=True)
    return torch.where(scale > 0, v * scale, v)


class Tokens:
    """The text of all rows: tokens drawn from the LM head, each row by draws of its own."""

    def __init__(self, vlm, tokenizer, never, temperature, top_p, u):
        self.lm_head = vlm.lm_head
        # a span's inner tokens are forced, never chosen; spare rows are no tokens
        never = [*never, *range(len(tokenizer), len(self.lm_head.weight))]
        self.never = torch.tensor(never, device=self.lm_head.weight.device)
        self.temperature, self.top_p = temperature, top_p
        self.u = u  # (all rows, max_new_tokens)

    def next(self, h, rows, n):
        """The n-th tokens (R) of `rows` (R), whose states are h (R, d)."""
        logits = self.lm_head(h).float()  # (R, V)
        logits.index_fill_(-1, self.never, -torch.inf)
        return self.draw(logits, rows, n)

    def draw(self, logits, rows, n):
        """Tokens (R) from logits (R, V), by the n-th draws of `rows` (R)."""
        u = self.u[rows, n]
        return pick(logits, self.temperature, self.top_p, u).cpu()

    def would_write(self, token, h, rows, n):
        """Would the LM head write `token` now, where it may write anything? (R) bools."""
        return self.draw(self.lm_head(h).float(), rows, n) == token


class Latents:
    """The latents of all rows: what the head says, or what an intervention feeds instead.

    A head says them one by one, each from the state before it, or all at once before the answer.

    fed: (m, K, d) a question, for `shuffle` and `oracle`. n_bar: the norm that EMA calibration
    gives a question's latents, or 0. generators: one a row, for `noise`.
    """

    def __init__(self, head, intervention, fed, n_bar, generators, n_samples):
        self.head, self.intervention = head, intervention
        self.fed, self.n_bar, self.generators = fed, n_bar, generators
        self.n_samples = n_samples
        self.written = [[] for _ in range(len(n_bar) * n_samples)]  # a list of (d) a row
        self.planned = None  # (all rows, K, d) where they are said before the answer

    def plan(self, h, temperature):
        """Say all latents of all rows from the states h (Q, K, d) that their slots would have."""
        h = h.repeat_interleave(self.n_samples, 0)  # (all rows, K, d)
        noise = None
        if temperature:
            # a row's draws are its own, as those of its tokens
            draws = [torch.randn(h.shape[1], self.head.m, generator=g) for g in self.generators]
            noise = temperature * torch.stack(draws).to(h.device)
        self.planned = self.head(h, noise)

    def next(self, h, rows):
        """The next latents (M, d) of `rows` (M ints), whose states are h (M, d)."""
        noise = given = None
        if self.intervention == "noise":
            d, k = self.head.basis.shape
            k = k or d
            draws = [torch.randn(k, generator=self.generators[row]) for row in rows]
            noise = torch.stack(draws).to(h.device)
        if self.intervention in ("shuffle", "oracle", "oracle_pca"):
            given = torch.stack([self.stand_in(row) for row in rows]).to(h.device)
        if self.planned is None:
            v_hat = self.head(h)
        else:
            v_hat = torch.stack([self.planned[row, len(self.written[row])] for row in rows])
        v = intervene(self.intervention, self.head, v_hat, noise, given)
        n_bar = [self.n_bar[row // self.n_samples] for row in rows]
        if any(n_bar):
            v = calibrate(v, torch.tensor(n_bar, device=h.device))
        for row, latent in zip(rows, v.cpu()):
            self.written[row].append(latent)
        return v

    def stand_in(self, row):
        """What is fed for a row's next latent: the same place in its donor's, which may repeat."""
        donor = self.fed[row // self.n_samples].flatten(0, 1)
        return donor[len(self.written[row]) % len(donor)]


# --------------------------------------------------------------------------------------------------
# generation


@torch.inference_mode()
def generate(
    vlm,
    head,
    tokenizer,
    prompts,
    *,
    max_new_tokens,
    n_samples=1,
    waves=(),
    temperature=0.0,
    top_p=1.0,
    seeds=None,
    intervention="clean",
    fed=None,
    ema_beta=0.0,
    suppress=(),
    after="",
    on_step=None,
    on_finish=None,
):
    """Answer a batch of prompts, each {"ids" (T), "pos" (3, T), "vision" (N, d) or None}.

    Text positions use the LM head. After `<|latent_start|>` exactly K latents follow, each the
    head's output for the state before it, then `<|latent_end|>` and the text `after` are forced
    (section 3.4; forced end [ours]); a Monet model may also end its span itself. Where the head
    fills its slots before the answer (AMVL), the first token is a forced `<|latent_start|>`, and no
    other span opens. With no head, or under `zero`, none does; under `markers` one ends at once.

    waves: how many of the n_samples are drawn one time after another, on one prompt cache.
    seeds: Q * n_samples ints that fix each row's draws. fed: a (m, K, d) tensor a question, which
    `shuffle` and `oracle` feed. ema_beta > 0 rescales each latent to n_bar. Tokens in `suppress`
    are never written. on_step(rows, tokens, x, h) sees what each living row is fed, and from which
    state; on_finish(q, s, ids) is called as a row ends and may return True to drop the question's
    other rows and later waves.

    Returns per question a list of {"ids", "latents" (m, d), "finished"}.
    """
    check_intervention(intervention, head)
    n_rows = len(prompts) * n_samples
    start, latent_pad, end = latent_ids(tokenizer)
    # the base and text models write text only
    closed = head is None or intervention == "zero"  # no span can open
    ends_early = not closed and not head.fixed_length
    stops = stop_ids(vlm, tokenizer)

    # what a span forces: its start, latents, its end, the text after it
    after_span = [end, *tokenizer(after, add_special_tokens=False)["input_ids"]]
    K = 0 if closed or intervention == "markers" else head.K
    span = torch.tensor([] if closed else [start] + [latent_pad] * K + after_span)
    # slots that are filled before the answer: the prompt is read with them
    before_answer = not closed and head.before_answer
    ahead = [start] + [latent_pad] * K if before_answer else []

    # a generator a row: its draws do not depend on who else is in the batch
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]
    u = torch.zeros(n_rows, max_new_tokens)
    if temperature:
        u = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators])
    never = [latent_pad, end, *suppress]
    if closed or before_answer:
        never.append(start)
    never = [token for token in never if token is not None]
    tokens = Tokens(vlm, tokenizer, never, temperature, top_p, u)

    n_bar = [0.0] * len(prompts)
    if ema_beta:
        n_bar = [ema_norm(p["vision"], ema_beta) for p in prompts]
    latents = Latents(head, intervention, fed, n_bar, generators, n_samples)

    # the prompt is read once; from here on a step is one position
    decoder = Decoder(vlm, prompts, tokenizer.pad_token_id, ahead)
    if before_answer:
        latents.plan(decoder.ahead[:, 1:].float(), temperature)
    ids = [[] for _ in range(n_rows)]
    dropped = set()  # questions whose further samples are not wanted

    for first, last in pairwise([0, *accumulate(waves or [n_samples])]):
        # a wave: samples first to last of the questions that are left
        questions = [q for q in range(len(prompts)) if q not in dropped]
        if not questions:
            break
        rows = torch.arange(n_rows).view(-1, n_samples)[questions, first:last]
        h = decoder.begin(torch.tensor(questions), last - first, last == n_samples)  # (Q, S, d)
        alive = torch.ones_like(rows, dtype=torch.bool)
        left = torch.zeros_like(rows)  # positions of its span that a slot has yet to write
        if before_answer:
            left[:] = len(span)

        for n in range(max_new_tokens):
            # 1. a slot writes text, a latent, or what is forced after a span's latents
            text = alive & (left == 0)
            inside = alive & is_latent(left, K, len(after_span))
            if ends_early and inside.any():
                # Monet's way: the LM head is asked at every latent
                ended = tokens.would_write(end, h[inside], rows[inside], n)
                left[inside] = torch.where(ended, len(after_span), left[inside])
                inside = alive & is_latent(left, K, len(after_span))

            # 2. its token, forced or drawn
            # what a finished row is fed does not matter
            token = torch.full_like(rows, tokenizer.pad_token_id)
            in_span = alive & (left > 0)
            if in_span.any():
                token[in_span] = span[-left[in_span]]
            if text.any():
                token[text] = tokens.next(h[text], rows[text], n)

            # 3. what is fed: the token's embedding, or a latent in its place
            x = vlm.model.language_model.embed_tokens(token.to(vlm.device))  # (Q, S, d)
            if inside.any():
                v = latents.next(h[inside].float(), rows[inside].tolist())  # (M, d)
                x[inside] = v.to(x.dtype)
            for row, t in zip(rows[alive].tolist(), token[alive].tolist()):
                ids[row].append(t)
            if on_step:
                on_step(rows[alive], token[alive], x[alive], h[alive])

            # 4. spans open, rows end
            left = (left - 1).clamp(min=0)
            if not closed:
                # the start was just written: its span is still to come
                left[text & (token == start)] = len(span) - 1
            # a stop token ends a row in text only
            done = text & torch.isin(token, stops)
            if n + 1 == max_new_tokens:
                done = alive
            alive = alive & ~done
            if on_finish:
                for q, s in done.nonzero().tolist():
                    row = int(rows[q, s])
                    if on_finish(row // n_samples, row % n_samples, ids[row]):
                        alive[q] = False
                        dropped.add(row // n_samples)
            if not alive.any():
                break

            # 5. finished rows leave the batch once they are many
            if decoder.t:
                questions, samples = still_needed(alive)
                if samples.numel() <= LEAVE_AT * alive.numel():
                    # caches shrink with the batch
                    decoder.keep(questions, samples)
                    at = questions[:, None], samples
                    rows, alive, left, x = rows[at], alive[at], left[at], x[at]
            h = decoder.step(x)

    answers = []
    for written, spans in zip(ids, latents.written):
        v = torch.stack(spans) if spans else torch.zeros(0)  # (m, d)
        # else it was cut off by the limit, or dropped
        finished = bool(written) and written[-1] in stops.tolist()
        answers.append({"ids": written, "latents": v, "finished": finished})
    return [answers[i : i + n_samples] for i in range(0, n_rows, n_samples)]


def is_latent(left, K, n_after):
    """Is a slot's next position a latent? `left`: how many of its span, start to end, are left."""
    return (left > n_after) & (left <= n_after + K)


def still_needed(alive):
    """Questions (Q') with a living row, and of each as many samples (Q', S') as any has alive."""
    questions = alive.any(1).nonzero()[:, 0]
    most = int(alive.sum(1).max())
    living_first = alive[questions].int().argsort(dim=1, descending=True, stable=True)
    return questions, living_first[:, :most]


def check_intervention(intervention, head):
    """Raise SystemExit for an intervention that is none, or that this head can not have."""
    if intervention not in INTERVENTIONS:
        there = ", ".join(INTERVENTIONS)
        raise SystemExit(f"intervention {intervention!r} is not one of {there}")
    if intervention == "markers" and head and head.before_answer:
        raise SystemExit("slots before the answer have no markers: take them away by 'zero'")
    # without one, latents are no vision embeddings: neither their mean nor real ones are at home
    needs_pca = intervention in ("mean", "oracle", "oracle_pca")
    if needs_pca and head and not head.basis.numel():
        needs = f"the intervention {intervention!r} needs the PCA of a {HEAD_FILE}"
        raise SystemExit(f"{needs}, which this model does not have")


def stop_ids(vlm, tokenizer):
    """Ids that end an answer: the tokenizer's and the generation config's (int, list or None)."""
    configured = vlm.generation_config.eos_token_id
    if configured is None:
        configured = []
    if isinstance(configured, int):
        configured = [configured]
    return torch.tensor([tokenizer.eos_token_id, *configured])


def to_text(tokenizer, ids):
    """Decode generated ids, each latent span written `<latent></latent>` as in the data."""
    start, pad, end = latent_ids(tokenizer)
    silent = {pad, end, tokenizer.eos_token_id, tokenizer.pad_token_id}
    pieces = [[]]  # ids before, between and after spans
    for t in ids:
        if t == start:
            pieces.append([])
        elif t not in silent:
            pieces[-1].append(t)
    return LATENT_SPAN.join(tokenizer.decode(piece) for piece in pieces)


# --------------------------------------------------------------------------------------------------
# latents on the disk


def span_unit(head):
    """Latents are kept in multiples of this: whole spans, where all spans are of one length."""
    return max(1, head.K) if head is not None and head.fixed_length else 1


def latents_name(id):
    """The file name of an example's latents."""
    return f"{seed_of(id):016x}.safetensors"


def save_latents_file(path, latents, head):
    """Write the whole spans of generated latents (m * K, d), if any.

    A span that the token limit cut off is left out.
    """
    # the token limit can cut a span in two
    unit = span_unit(head)
    whole = len(latents) // unit * unit
    if whole:
        tensors = {"latents": latents[:whole].contiguous()}
        write_then_rename(path, lambda tmp: save_file(tensors, tmp))


def load_latents_file(path, head):
    """Latents (m, K, d) to feed to a model with this head. Raises SystemExit if they do not fit."""
    latents = read_safetensors(path, ("latents",))[0]["latents"]
    unit, d = span_unit(head), head.mean.shape[0]
    if not len(latents) or latents.shape[1] != d or len(latents) % unit:
        shape = tuple(latents.shape)
        raise SystemExit(
            f"{path}: latents of shape {shape}; the model's head writes spans of {unit} x {d}"
        )
    return latents.view(-1, unit, d)
