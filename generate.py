"""How are text and latents written, batched?

One prompt cache per question, shared by its samples; every row in text or latent mode on its own;
questions that end make room for others; the interventions, and the norm calibration.

Shape letters besides model.py's and decoder.py's: Q questions, S samples of each, V vocabulary.
"""

import math
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file

from data import LATENT_SPAN, check_prompt_texts, question_text
from decoder import Decoder
from files import read_safetensors, seed_of, write_then_rename
from images import orientation, png_of, upright
from model import HEAD_FILE, encode, encode_pixels, latent_ids, pixels_of

TOWER_PATCHES = 65_536  # of a tower call without gradients: one image of 16,384 tokens
REFILL_AT = 0.5  # questions begin once at most this share of those after the last refill are busy
REFILL_CAPTURED_AT = 0.9  # the same on a GPU, where they take places that are free
NUCLEUS = 256  # of the likeliest tokens, how many are sorted at first where top_p < 1
INTERVENTIONS = ("clean", "zero", "markers", "noise", "mean", "shuffle", "oracle", "oracle_pca")
OF_OTHERS = ("shuffle", "oracle", "oracle_pca")  # what these feed is not the model's own

# --------------------------------------------------------------------------------------------------
# prompts


def make_prompts(vlm, tokenizer, processor, rows):
    """Encode rows for `generate`, those of a file or {"images", "question"}.

    An image is a path, encoded bytes, a data URI or PIL's; without images a row is text. Raises
    SystemExit for a control token in a question.
    """
    prompts = []
    for row in rows:
        check_prompt_texts(question=question_text(row), system=row.get("system") or "")
        prompts.append(encode(vlm, tokenizer, processor, row | {"images": pictures_in(row)}))
    return see(vlm, processor, prompts)


def pictures_in(row):
    """The images of a row as a file would have them: a list, PIL's as the bytes of a PNG."""
    images = row.get("images") or []
    images = images if isinstance(images, (list, tuple)) else [images]
    return [png_of(upright(x, orientation(x))) if isinstance(x, Image.Image) else x for x in images]


def with_pixels(processor, prompt):
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
# which token, which latent


def pick(logits, temperature, top_p, u):
    """Tokens (R) from logits (R, V): greedy at temperature 0, else by inverse CDF at u (R).

    u are uniforms: a row's draw depends on its own alone, not on the batch it is in.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # float32, so that the sum of 152,064 of them is 1
    p = torch.softmax(logits / temperature, -1)
    u = u.to(p)
    return from_nucleus(p, top_p, u) if top_p < 1 else from_all(p, u)


def from_all(p, u):
    """Columns (R) of p (R, V), not negative, by inverse CDF at u (R)."""
    cdf = p.cumsum(-1)
    # the last column is the total: u < 1 keeps the index on a token of non-zero probability
    u = u * cdf[:, -1]
    drawn = torch.searchsorted(cdf, u[:, None], right=True)[:, 0]
    return drawn.clamp(max=p.shape[-1] - 1)


def from_nucleus(p, top_p, u, k=NUCLEUS):
    """The same, from the likeliest tokens alone that together reach top_p.

    They are looked for among the k likeliest, of rows of more among 16 times as many, and so on: to
    sort the whole vocabulary takes ten times as long as to draw from it.
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
        drawn[wider] = from_nucleus(p[wider], top_p, u[wider], 16 * k)
    return drawn


def intervene(kind, head, v_hat, noise=None, fed=None):
    """What is fed in place of the predicted latents v_hat (M, d).

    The paper's are clean, noise and zero (which opens no span); the others are [ours]. noise
    (M, k): standard normal draws; (M, d) for a head without a PCA, rescaled alone. fed (M, d):
    another example's latents (shuffle) or the real features (oracle).
    """
    if kind == "mean":
        return head.mean.expand_as(v_hat)
    if kind == "noise":
        v = noise
        if head.basis.numel():
            # c ~ N(0, diag(lambda)), as spread as the training coefficients [ours]
            std = head.eigenvalues.clamp(min=0).sqrt()
            c = std * noise
            v = head.reconstruct(c)
        return v * (v_hat.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))
    if kind in ("shuffle", "oracle"):
        return fed
    if kind == "oracle_pca":
        c = (fed - head.mean) @ head.basis  # what the subspace keeps of the real features
        return head.reconstruct(c)
    if kind == "clean":
        return v_hat
    raise ValueError(f"the intervention {kind!r} feeds no latents")


def ema_norm(vision, beta):
    """n_bar, a moving average of ||v|| over a query's embeddings (N, d); 0 without images."""
    if vision is None:
        return 0.0
    # in reading order, image after image; it starts at the first [ours]
    norms = vision.float().norm(dim=-1).tolist()
    n_bar = norms[0]
    for n in norms[1:]:
        n_bar = beta * n_bar + (1 - beta) * n
    return n_bar


def calibrate(v, n_bar):
    """EMA norm calibration: n_bar v / ||v|| for latents v (M, d), n_bar (M); as it is where 0."""
    # 0 for a question without images: nothing to be calibrated to
    scale = n_bar[:, None] / v.norm(dim=-1, keepdim=True)
    # a zero latent has no direction
    return torch.where((scale > 0) & scale.isfinite(), v * scale, v)


class Tokens:
    """The text of all rows: tokens drawn from the LM head."""

    def __init__(self, vlm, tokenizer, never, temperature, top_p):
        self.lm_head = vlm.lm_head
        # a span's inner tokens are forced, never chosen; spare rows are no tokens
        never = [*never, *range(len(tokenizer), len(self.lm_head.weight))]
        self.never = torch.tensor(never, device=self.lm_head.weight.device)
        self.temperature, self.top_p = temperature, top_p

    def next(self, h, u):
        """The next tokens (R) of rows whose states are h (R, d), by their draws u (R)."""
        logits = self.lm_head(h).float()  # (R, V)
        logits.index_fill_(-1, self.never, -torch.inf)
        return pick(logits, self.temperature, self.top_p, u).cpu()

    def would_write(self, token, h, u):
        """Would the LM head write `token` now, where it may write anything? (R) bools."""
        logits = self.lm_head(h).float()
        return pick(logits, self.temperature, self.top_p, u).cpu() == token


class Question:
    """A question that is being answered: its draws, what it is fed, what was written so far."""

    def __init__(self, q, prompt, cache, place, n_samples, max_new_tokens, temperature, ema_beta):
        self.q = q
        self.cache = cache  # of the prompts that were read together; until its last wave has begun
        self.place = place  # which of these is its own
        self.d = cache.last.shape[1]
        self.begun = 0  # samples
        self.dropped = False  # True: what is still to come is not wanted
        # a generator per sample: its draws do not depend on who else is in the batch
        self.generators = [torch.Generator().manual_seed(s) for s in prompt.get("seeds", ())]
        self.u = torch.zeros(n_samples, max_new_tokens)
        if temperature:
            draws = [torch.rand(max_new_tokens, generator=g) for g in self.generators]
            self.u = torch.stack(draws)
        self.fed = prompt.get("fed")  # (m, K, d), of shuffle and oracle
        # the norm that EMA calibration gives its latents, or 0
        self.n_bar = ema_norm(prompt["vision"], ema_beta) if ema_beta else 0.0
        self.planned = None  # (S, K, d) latents, where all are predicted before the answer
        self.ids = [[] for _ in range(n_samples)]
        self.latents = [[] for _ in range(n_samples)]

    def stand_in(self, s):
        """What is fed for the next latent of sample s: the same place in its donor's, repeated."""
        donor = self.fed.flatten(0, 1)
        return donor[len(self.latents[s]) % len(donor)]

    def answers(self, stops):
        """{"ids", "latents" (m, d), "finished"} of each sample."""
        found = []
        for ids, latents in zip(self.ids, self.latents):
            v = torch.stack(latents) if latents else torch.zeros(0, self.d)
            # else it was cut off by the limit, or dropped
            finished = bool(ids) and ids[-1] in stops
            found.append({"ids": ids, "latents": v, "finished": finished})
        return found


class Latents:
    """What the head predicts, or what an intervention feeds instead.

    Latents are predicted one by one, each from the state before it, or all before the answer.
    """

    def __init__(self, head, intervention):
        self.head, self.intervention = head, intervention

    def plan(self, questions, temperature):
        """Predict all latents of questions from the states that their slots would have."""
        for question in questions:
            h = question.cache.ahead[question.place, 1:].float()  # (K, d): the first is the start
            h = h.expand(len(question.ids), -1, -1)  # (S, K, d)
            noise = None
            if temperature:
                shape = h.shape[1], self.head.m
                draws = [torch.randn(shape, generator=g) for g in question.generators]
                noise = temperature * torch.stack(draws).to(h.device)
            question.planned = self.head(h, noise)

    def next(self, h, rows):
        """The next latents (M, d) of M rows (question, sample), whose states are h (M, d)."""
        noise = fed = None
        if self.intervention == "noise":
            d, k = self.head.basis.shape
            draws = [torch.randn(k or d, generator=question.generators[s]) for question, s in rows]
            noise = torch.stack(draws).to(h.device)
        if self.intervention in OF_OTHERS:
            fed = torch.stack([question.stand_in(s) for question, s in rows]).to(h.device)
        if self.head.before_answer:
            planned = [question.planned[s, len(question.latents[s])] for question, s in rows]
            v_hat = torch.stack(planned)
        else:
            v_hat = self.head(h)
        n_bar = [question.n_bar for question, _ in rows]
        if any(n_bar):
            v_hat = calibrate(v_hat, torch.tensor(n_bar, device=h.device))
        v = intervene(self.intervention, self.head, v_hat, noise, fed)
        for (question, s), latent in zip(rows, v.cpu()):
            question.latents[s].append(latent)
        return v


# --------------------------------------------------------------------------------------------------
# generation


def generate(vlm, head, tokenizer, prompts, *, seeds=None, fed=None, n_samples=1, **settings):
    """Answer a batch of prompts, each {"ids" (T), "pos" (3, T), "vision" (N, d) or None}.

    seeds: Q * n_samples ints that fix each row's draws; torch's own generator gives them where none
    are given. fed: a (m, K, d) tensor a question, which `shuffle` and `oracle` feed. Settings are
    those of `stream`.

    Returns per question a list of {"ids", "latents" (m, d), "finished"}.
    """
    n = len(prompts) * n_samples
    if seeds is None:
        seeds = torch.randint(2**31, (n,)).tolist()
    if len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds; expected {n}, one for each sample of each prompt")
    if fed is not None and (len(fed) != len(prompts) or any(x.ndim != 3 for x in fed)):
        raise ValueError(f"fed: expected latents (m, K, d) for each of {len(prompts)} prompts")
    asked = []
    for q, prompt in enumerate(prompts):
        prompt = prompt | {"seeds": seeds[q * n_samples : (q + 1) * n_samples]}
        if fed is not None:
            prompt["fed"] = fed[q]
        asked.append(prompt)
    left = iter(asked)

    def more(n):
        return list(islice(left, n))

    answered = stream(vlm, head, tokenizer, more, len(asked), n_samples=n_samples, **settings)
    found = dict(answered)
    return [found[q] for q in range(len(asked))]


class Scheduler:
    """Which questions are being answered, which wait for their next wave, and which come next.

    What servers call continuous batching.
    """

    def __init__(self, more, at_once, n_samples, read, refill_at):
        self.more, self.at_once, self.n_samples = more, at_once, n_samples
        self.read, self.refill_at = read, refill_at
        self.under_way = {}  # {q: Question} of those that have not ended
        self.waiting = {}  # lists of them, each of one prefill and one wave
        self.n_read = 0
        self.others_may_come = True  # not, once `more` gave none
        self.n_busy = 0  # questions with a living row ...
        self.full = at_once  # ... and how many these were when the last ones began

    def due(self):
        """Lists of questions, each of one prefill, whose next wave begins now."""
        if self.n_busy > self.refill_at * self.full:
            return []
        groups = list(self.waiting.values())
        self.waiting.clear()
        room = self.at_once - len(self.under_way)
        prompts = self.more(room) if room else []
        self.others_may_come = bool(prompts) or not room
        if prompts:
            group = self.read(prompts, self.n_read)
            self.n_read += len(group)
            self.under_way |= {question.q: question for question in group}
            groups.append(group)
        self.n_busy += sum(len(group) for group in groups)
        self.full = self.n_busy
        return groups

    def end_wave(self, question):
        """Its wave's last row has ended. Returns whether the question has, too, or only waits."""
        self.n_busy -= 1
        if question.dropped or question.begun == len(question.ids):
            del self.under_way[question.q]
            return True
        key = id(question.cache), question.begun
        self.waiting.setdefault(key, []).append(question)
        return False

    def samples(self, number):
        """[(Question, its sample)] of rows with these numbers (R)."""
        places = [divmod(row, self.n_samples) for row in number.tolist()]
        return [(self.under_way[q], s) for q, s in places]


class Span(NamedTuple):
    """What a latent span forces: its start, K latents, its end and the text after it.

    A row counts down how many of it are left: with K = 2 and no text after the end 3 and 2 are
    latents, 1 is the end, and at 0 it is in text again.
    """

    ids: torch.Tensor  # (1 + K + after); (0) where none can open
    K: int
    after: int  # positions from its end on

    def is_latent(self, left):
        """Is a row's next position a latent? `left` (R): how many of its span are left."""
        return (left > self.after) & (left <= self.after + self.K)


class RowStates(NamedTuple):
    """The rows of all cohorts, one after the other."""

    number: torch.Tensor  # (R) q * n_samples + s
    n: torch.Tensor  # (R) how many tokens it has
    left: torch.Tensor  # (R) positions of its span still to write: span[-left] is next; 0 in text
    alive: torch.Tensor  # (R) bools: it has not ended
    u: torch.Tensor  # (R, max_new_tokens) its draws

    @classmethod
    def none(cls, max_new_tokens):
        zero = torch.zeros(0, dtype=torch.long)
        return cls(zero, zero, zero, zero.bool(), torch.zeros(0, max_new_tokens))

    def at(self, places):
        return RowStates(*(x[places] for x in self))

    def and_then(self, other):
        return RowStates(*(torch.cat(pair) for pair in zip(self, other)))


@torch.inference_mode()
def stream(
    vlm,
    head,
    tokenizer,
    more,
    at_once,
    *,
    max_new_tokens,
    n_samples=1,
    waves=(),
    temperature=0.0,
    top_p=1.0,
    intervention="clean",
    ema_beta=0.0,
    suppress=(),
    after="",
    on_step=None,
    on_finish=None,
):
    """Answer prompts, `at_once` of them at a time; one that ends makes room for another.

    more(n) gives up to n prompts, as those of `generate`, each with its "seeds" and, for `shuffle`
    and `oracle`, what is "fed". It may be asked again; the stream ends when it gives none while no
    question is being answered. Yields (q, its answers as of `generate`) as questions end, numbered
    in the order in which `more` gave them.

    Text positions use the LM head. After `<|latent_start|>` exactly K latents follow, each the
    head's output for the state before it, then `<|latent_end|>` and the text `after` are forced
    [forced end: ours]; a Monet model may also end its span itself. Where the head
    fills its slots before the answer (AMVL), the first token is a forced `<|latent_start|>`, and no
    other span opens. With no head, or under `zero`, none does; under `markers` one ends at once.

    waves: how many of the n_samples each successive wave draws, all on one prompt cache; a GPU
    always draws them all at once.
    ema_beta > 0 rescales each predicted latent to n_bar, before an intervention. Tokens in
    `suppress` are never written.
    on_step(rows, tokens, x, h) sees what each living row is fed, and from which state;
    on_finish(q, s, ids) is called as a row ends and may return True to drop the question's other
    rows and later waves.
    """
    check_intervention(intervention, head)
    start, latent_pad, end = latent_ids(tokenizer)
    closed = head is None or intervention == "zero"  # no span can open: text only
    ends_early = not closed and not head.fixed_length
    before_answer = not closed and head.before_answer
    stops = stop_ids(vlm, tokenizer)

    K = 0 if closed or intervention == "markers" else head.K
    slots = [] if closed else [start] + [latent_pad] * K
    after_span = [end, *tokenizer(after, add_special_tokens=False)["input_ids"]]
    span = Span(torch.tensor([] if closed else slots + after_span), K, len(after_span))
    ahead = slots if before_answer else []  # what the prompt is read with

    # pads stand for pictures and latents, of which a written one would have none
    never = [vlm.config.image_token_id, latent_pad, end, *suppress]
    if closed or before_answer:
        never.append(start)
    never = [token for token in never if token is not None]
    tokens = Tokens(vlm, tokenizer, never, temperature, top_p)
    latents = Latents(head, intervention)

    decoder = Decoder(vlm, tokenizer.pad_token_id)
    waves = list(accumulate(waves or [n_samples]))  # how many samples have begun after each
    if waves[-1] != n_samples:
        raise ValueError(f"waves of {waves[-1]} samples; expected n_samples={n_samples}")
    refill_at = REFILL_AT
    if decoder.captured:
        waves = [n_samples]  # rows cost little there, another shape costs a capture
        refill_at = REFILL_CAPTURED_AT

    def read(prompts, q):
        """Questions from the q-th on, their prompts read together."""
        if intervention in OF_OTHERS and any(p.get("fed") is None for p in prompts):
            raise ValueError(f"{intervention} feeds what `fed` gives, which is missing")
        cache = decoder.read(prompts, ahead)
        sampling = n_samples, max_new_tokens, temperature, ema_beta
        group = [Question(q + i, p, cache, i, *sampling) for i, p in enumerate(prompts)]
        if before_answer:
            latents.plan(group, temperature)
        return group

    scheduler = Scheduler(more, at_once, n_samples, read, refill_at)
    rows = RowStates.none(max_new_tokens)
    h = vlm.lm_head.weight.new_zeros(0, vlm.lm_head.in_features)  # (R, d)

    while True:
        # 0. where there is room, questions begin their next wave, and others their first
        forced = len(span.ids) if before_answer else 0
        for group in scheduler.due():
            begun, states, index = begin(decoder, group, waves, forced)
            rows, h = rows.and_then(begun).at(index), torch.cat([h, states])[index]
        if not rows.alive.any():
            return

        # 1. a row writes text, a latent, or what is forced after a span's latents
        number, n, left, alive, draws = rows
        # (R) the draw of this token; a row that has ended may have none left
        u = draws.gather(1, n.clamp(max=max_new_tokens - 1)[:, None])[:, 0]
        text = alive & (left == 0)
        inside = alive & span.is_latent(left)
        if ends_early and inside.any():
            # Monet's way: the LM head is asked at every latent
            would_end = tokens.would_write(end, h[inside], u[inside])
            left[inside] = torch.where(would_end, span.after, left[inside])
            inside = alive & span.is_latent(left)

        # 2. its token, forced or drawn
        # what a finished row is fed does not matter
        token = torch.full_like(number, tokenizer.pad_token_id)
        in_span = alive & (left > 0)
        if in_span.any():
            token[in_span] = span.ids[-left[in_span]]
        if text.any():
            token[text] = tokens.next(h[text], u[text])

        # 3. what is fed: the token's embedding, or a latent in its place
        x = vlm.model.language_model.embed_tokens(token.to(h.device))  # (R, d)
        if inside.any():
            v = latents.next(h[inside].float(), scheduler.samples(number[inside]))  # (M, d)
            x[inside] = v.to(x.dtype)
        for (question, s), t in zip(scheduler.samples(number[alive]), token[alive].tolist()):
            question.ids[s].append(t)
        if on_step:
            on_step(number[alive], token[alive], x[alive], h[alive])

        # 4. spans open, rows end, and with its last row a question or its wave
        left = (left - 1).clamp(min=0)
        if not closed:
            # the start was just written: its span is still to come
            left[text & (token == start)] = len(span.ids) - 1
        n = n + 1
        # a stop token ends a row in text only
        done = text & torch.isin(token, stops) | alive & (n == max_new_tokens)
        alive = alive & ~done
        ended = scheduler.samples(number[done])
        for question, s in ended:
            if on_finish and on_finish(question.q, s, question.ids[s]):
                question.dropped = True
        for question in dict.fromkeys(question for question, _ in ended):
            mine = number // n_samples == question.q
            if question.dropped:
                alive = alive & ~mine
            if (alive & mine).any():
                continue
            if scheduler.end_wave(question):
                yield question.q, question.answers(stops.tolist())

        # 5. finished rows leave once they are many; the others read what they wrote
        rows = RowStates(number, n, left, alive, draws)
        staying = decoder.leave(alive, scheduler.others_may_come)
        if staying is not None:
            rows, x, h = rows.at(staying), x[staying], h[staying]
        if alive.any():
            h = decoder.step(x)


def begin(decoder, group, waves, forced):
    """Begin the next wave of Questions of one prefill, with so many `forced` positions at first.

    Returns its RowStates, the states h (R, d) from which they go on, and the index of all rows that
    there are now, as Decoder.begin gives it.
    """
    first = group[0].begun
    last = next(n for n in waves if n > first)
    group = sorted(group, key=lambda question: question.place)
    places = torch.tensor([question.place for question in group])
    h, index = decoder.begin(group[0].cache.at(places), last - first)
    n_samples = waves[-1]
    for question in group:
        question.begun = last
        if last == n_samples:
            question.cache = None  # no longer needed, but by the rows
    number = [question.q * n_samples + s for question in group for s in range(first, last)]
    u = torch.cat([question.u[first:last] for question in group])
    R = len(number)
    begun = RowStates(
        number=torch.tensor(number),
        n=torch.zeros(R, dtype=torch.long),
        left=torch.full((R,), forced),
        alive=torch.ones(R, dtype=torch.bool),
        u=u,
    )
    return begun, h, index


def check_intervention(intervention, head):
    """Raise SystemExit for an intervention that is none, or that this head cannot have."""
    if intervention not in INTERVENTIONS:
        there = ", ".join(INTERVENTIONS)
        raise SystemExit(f"intervention {intervention!r} is not one of {there}")
    if intervention == "markers" and head and head.before_answer:
        raise SystemExit("slots before the answer have no markers: take them away by 'zero'")
    if intervention.startswith("oracle") and head and not head.targets_fed:
        raise SystemExit(f"{intervention} feeds real features, which {head.kind!r} never had")
    if intervention in ("mean", "noise") and head and head.basis.numel() and not head.mean.any():
        raise SystemExit(f"{intervention!r} feeds what lies about mu, which is 0 here (centre=0)")
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


def save_latents_file(path, latents, head, key=""):
    """Write the whole spans of generated latents (m * K, d), if any, in place of earlier ones.

    A span that the token limit cut off is left out. key: of the answer that they belong to.
    """
    unit = span_unit(head)
    whole = len(latents) // unit * unit
    if not whole:
        Path(path).unlink(missing_ok=True)
        return
    tensors = {"latents": latents[:whole].contiguous()}
    meta = {"key": key, "K": str(unit)}
    write_then_rename(path, lambda tmp: save_file(tensors, tmp, meta))


def load_latents_file(path, head):
    """Latents (m, K, d) to feed to a model with this head. Raises SystemExit if they do not fit."""
    tensors, meta = read_safetensors(path, ("latents",))
    latents, unit, d = tensors["latents"], span_unit(head), head.mean.shape[0]
    # spans of 36 would go into a head of 4 as nine each
    theirs = meta.get("K", str(unit))
    if not len(latents) or latents.shape[1] != d or len(latents) % unit or theirs != str(unit):
        raise SystemExit(
            f"{path}: latents of shape {tuple(latents.shape)}, in spans of {theirs}; the model's "
            f"head writes spans of {unit} x {d}"
        )
    return latents.view(-1, unit, d)
