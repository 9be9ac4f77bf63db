"""How are text and latents written, batched? A shared prompt cache, latent and text mode a row, interventions, calibration."""

import math
from itertools import accumulate

import torch
from safetensors.torch import save_file
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from data import LATENT_SPAN, open_image, read_safetensors, write_then_rename
from model import HEAD_FILE, MonetHead, embed, encode, encode_images, latent_ids

TOWER_PATCHES = 65_536  # a tower call without gradients: one image of 16,384 tokens
INTERVENTIONS = ("clean", "zero", "noise", "mean", "shuffle", "oracle", "oracle_pca")


def intervene(kind, head, v_hat, noise=None, fed=None):
    """What is fed in place of the predicted latents v_hat (M, d) (section 5).

    noise (M, k): standard normal draws, scaled to the training coefficients' own standard deviations, reconstructed
    and rescaled to the predicted norm. fed (M, d): another example's latents (shuffle) or the real features (oracle).
    """
    if kind == "mean":
        return head.mean.expand_as(v_hat)
    if kind == "noise":
        w = head.reconstruct(noise * head.eigenvalues.clamp(min=0).sqrt())
        return w * v_hat.norm(dim=-1, keepdim=True) / w.norm(dim=-1, keepdim=True)
    if kind in ("shuffle", "oracle"):
        return fed
    if kind == "oracle_pca":
        return head.reconstruct((fed - head.mean) @ head.basis)
    return v_hat


def ema_norm(vision, beta):
    """n_bar, an exponential moving average of ||v|| over a query's vision embeddings (N, d), token by token."""
    norms = vision.float().norm(dim=-1).tolist()
    n_bar = norms[0]
    for n in norms[1:]:
        n_bar = beta * n_bar + (1 - beta) * n
    return n_bar


def pick(logits, temperature, top_p, u):
    """Tokens (R) from logits (R, V): greedy at temperature 0, else by inverse CDF at the uniforms u (R).

    A row's draw depends on its own u alone, not on the batch it is in.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        p_sorted, order = p.sort(-1, descending=True)
        p_sorted[p_sorted.cumsum(-1) - p_sorted >= top_p] = 0
        p = torch.zeros_like(p).scatter(-1, order, p_sorted)
    cdf = p.cumsum(-1)
    # the last column is the total: u < 1 keeps the index on a token of non-zero probability
    return torch.searchsorted(cdf, (u.to(cdf) * cdf[:, -1])[:, None], right=True)[:, 0].clamp(
        max=p.shape[-1] - 1
    )


class Decoder:
    """One prefill for Q prompts, then one position at a time for Q x S rows.

    The S samples of a question attend to *one* prompt cache (Q, H_kv, T, D) and each to its own new positions
    (Q, H_kv, S, t, D): the prompt is neither run nor stored nor read once per sample.
    """

    def __init__(self, vlm, prompts, n_samples, pad_id):
        self.lm = vlm.model.language_model
        if self.lm.has_sliding_layers:
            raise SystemExit(
                "generation has no sliding-window attention; set use_sliding_window to false"
            )
        device, T = vlm.device, max(len(p["ids"]) for p in prompts)
        ids = torch.full((len(prompts), T), pad_id)
        pos = torch.zeros(3, len(prompts), T, dtype=torch.long)
        mask = torch.zeros(len(prompts), T, dtype=torch.bool)
        for i, p in enumerate(prompts):  # left-padded: every prompt ends at the same column
            n = len(p["ids"])
            ids[i, T - n :], pos[:, i, T - n :], mask[i, T - n :] = p["ids"], p["pos"], True
        vision = [p["vision"] for p in prompts if p["vision"] is not None]
        x = embed(vlm, ids.to(device), torch.cat(vision) if vision else None)
        out = self.lm(
            inputs_embeds=x,
            position_ids=pos.to(device),
            use_cache=True,
            attention_mask=None if mask.all() else mask.to(device),
        )
        self.prompt = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        self.bias = (
            None if mask.all() else torch.where(mask, 0.0, -torch.inf).to(x)[:, None, None, None]
        )
        self.h = out.last_hidden_state[:, -1:].expand(-1, n_samples, -1)  # (Q, S, d)
        self.next_pos = (pos.amax(dim=(0, 2)) + 1).to(
            device
        )  # (Q): the same on all three axes from here on
        a = self.lm.layers[0].self_attn
        self.heads = (a.num_key_value_heads, a.num_key_value_groups, a.head_dim)
        self.new, self.t = [None] * len(self.lm.layers), 0

    def step(self, x):
        """Feed x (Q, S, d), one embedding a row. Returns the states after the final norm, h_bar (Q, S, d)."""
        (Q, S, _), (H, G, D), t = x.shape, self.heads, self.t
        cos, sin = self.lm.rotary_emb(x, (self.next_pos + t)[None, :, None].expand(3, Q, 1))
        cos, sin = cos[:, None], sin[:, None]  # (Q, 1, 1, D)
        for i, layer in enumerate(self.lm.layers):
            a, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                proj(y).view(Q, S, H, -1, D).transpose(1, 2)
                for proj in (a.q_proj, a.k_proj, a.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)  # (Q, H, S, G or 1, D)
            k_new, v_new = self._write(i, k, v)
            k_prompt, v_prompt = self.prompt[i]
            s_prompt = (q.reshape(Q, H, S * G, D) @ k_prompt.mT).view(Q, H, S, G, -1)
            if self.bias is not None:
                s_prompt = s_prompt + self.bias
            w = torch.cat([s_prompt, q @ k_new.mT], -1).mul(a.scaling)
            w = w.softmax(-1, dtype=torch.float32).to(x.dtype)
            w_prompt, w_new = w.split([k_prompt.shape[2], t + 1], -1)
            o = (w_prompt.reshape(Q, H, S * G, -1) @ v_prompt).view(Q, H, S, G, D) + w_new @ v_new
            x = x + a.o_proj(o.transpose(1, 2).reshape(Q, S, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.t += 1
        return self.lm.norm(x)

    def _write(self, i, k, v):
        """Store position t of layer i; returns all new keys and values so far, (Q, H, S, t + 1, D)."""
        t, shape = self.t, list(k.shape)
        if self.new[i] is None or self.new[i][0].shape[3] == t:  # room for twice as many
            shape[3] = max(32, t)
            room = [k.new_empty(shape), v.new_empty(shape)]
            self.new[i] = (
                room if t == 0 else [torch.cat(pair, 3) for pair in zip(self.new[i], room)]
            )
        k_new, v_new = self.new[i]
        k_new[:, :, :, t], v_new[:, :, :, t] = k[:, :, :, 0], v[:, :, :, 0]
        return k_new[:, :, :, : t + 1], v_new[:, :, :, : t + 1]

    def keep(self, q, s):
        """Keep questions q (Q') and, of each, samples s (Q', S')."""
        q, s = q.to(self.next_pos.device), s.to(self.next_pos.device)
        self.next_pos = self.next_pos[q]
        self.bias = None if self.bias is None else self.bias[q]
        self.prompt = [(k[q], v[q]) for k, v in self.prompt]
        self.new = [
            [x[q[:, None], :, s].transpose(1, 2).contiguous() for x in kv] for kv in self.new
        ]


@torch.inference_mode()
def generate(
    vlm,
    head,
    tokenizer,
    prompts,
    *,
    max_new_tokens,
    n_samples=1,
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

    Text positions use the LM head. After `<|latent_start|>` exactly K latents follow, each the head's output for the
    state before it, then `<|latent_end|>` and the text `after` are forced (section 3.4; forced end [ours]); a Monet
    model may also end its span itself. With no head, or under `zero`, a span can not open. `seeds` (Q * n_samples ints)
    fix each row's draws; `fed` (a (m, K, d) tensor a question) feeds `shuffle` and `oracle`; ema_beta > 0 rescales each
    latent to n_bar (EMA norm calibration); tokens in `suppress` are never written.
    on_step(rows, tokens, x, h) sees what each living row is fed, and from which state; on_finish(q, s, ids) is called
    as a row ends and may return True to drop the question's other rows.
    Returns per question a list of {"ids", "latents" (m, d), "finished"}.
    """
    if intervention not in INTERVENTIONS:
        raise SystemExit(f"intervention {intervention!r} is not one of {', '.join(INTERVENTIONS)}")
    if intervention in ("noise", "mean", "oracle_pca") and head and not head.basis.numel():
        raise SystemExit(
            f"the intervention {intervention!r} needs the PCA of a {HEAD_FILE}, which this model does not have"
        )
    device, S0 = vlm.device, n_samples
    start, pad, end = latent_ids(tokenizer)
    closed = head is None or intervention == "zero"
    never = [t for t in (pad, end, *suppress) + (start,) * closed if t is not None]
    eos = vlm.generation_config.eos_token_id  # an int, a list, or None
    stops = torch.tensor([tokenizer.eos_token_id, *([eos] if isinstance(eos, int) else eos or ())])
    n_bar = [
        ema_norm(p["vision"], ema_beta) if ema_beta and p["vision"] is not None else 0
        for p in prompts
    ]
    rng = [torch.Generator().manual_seed(s) for s in seeds] if seeds else None
    u = torch.stack([torch.rand(max_new_tokens, generator=g) for g in rng]) if temperature else None

    # what a span forces after its start; `left` counts down to its last position
    then = [end, *tokenizer(after, add_special_tokens=False)["input_ids"]]
    forced = torch.tensor([] if closed else [pad] * head.K + then)

    decoder = Decoder(vlm, prompts, S0, tokenizer.pad_token_id)
    h = decoder.h
    rows = torch.arange(len(prompts) * S0).view(-1, S0)  # which row of the result a slot holds
    alive, left = (
        torch.ones_like(rows, dtype=torch.bool),
        torch.zeros_like(rows),
    )  # left: forced positions to come
    ids, latents = [[] for _ in range(rows.numel())], [[] for _ in range(rows.numel())]
    for n in range(max_new_tokens):
        text, inside = alive & (left == 0), alive & (left > len(then))
        if inside.any() and isinstance(head, MonetHead):
            ended = (
                pick(
                    vlm.lm_head(h[inside]).float(),
                    temperature,
                    top_p,
                    u[rows[inside], n] if temperature else None,
                )
                == end
            )
            left[inside] = torch.where(ended.cpu(), len(then), left[inside])
            inside = alive & (left > len(then))
        token = torch.full_like(rows, tokenizer.pad_token_id)
        if (on := alive & (left > 0)).any():
            token[on] = forced[-left[on]]
        if text.any():
            logits = vlm.lm_head(h[text]).float()
            logits[:, never] = -torch.inf
            logits[:, len(tokenizer) :] = -torch.inf  # spare rows are no tokens
            token[text] = pick(
                logits, temperature, top_p, u[rows[text], n] if temperature else None
            ).cpu()
        x = vlm.model.language_model.embed_tokens(token.to(device))
        if inside.any():
            r = rows[inside].tolist()
            noise = (
                torch.stack([torch.randn(head.basis.shape[1], generator=rng[i]) for i in r]).to(
                    device
                )
                if intervention == "noise"
                else None
            )
            given = (
                torch.stack(
                    [(f := fed[i // S0].flatten(0, 1))[len(latents[i]) % len(f)] for i in r]
                ).to(device)
                if intervention in ("shuffle", "oracle", "oracle_pca")
                else None
            )
            v = intervene(intervention, head, head(h[inside].float()), noise, given)
            if ema_beta:
                scale = torch.tensor([n_bar[i // S0] for i in r], device=device)[:, None] / v.norm(
                    dim=-1, keepdim=True
                )
                v = torch.where(scale > 0, v * scale, v)
            x[inside] = v.to(x.dtype)
            for i, latent in zip(r, v.cpu()):
                latents[i].append(latent)
        for i, t in zip(rows[alive].tolist(), token[alive].tolist()):
            ids[i].append(t)
        if on_step:
            on_step(rows[alive], token[alive], x[alive], h[alive])
        left = (
            torch.where(text & (token == start), len(forced), (left - 1).clamp(min=0))
            if not closed
            else left
        )
        done = text & torch.isin(token, stops) | (alive if n + 1 == max_new_tokens else False)
        alive = alive & ~done
        for slot in done.nonzero().tolist() if on_finish else ():
            i = int(rows[tuple(slot)])
            if on_finish(i // S0, i % S0, ids[i]):
                alive[slot[0]] = False
        if not alive.any():
            break
        live, most = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
        if len(live) * most <= 0.75 * alive.numel() and decoder.t:  # finished rows leave the batch
            s = alive[live].int().argsort(dim=1, descending=True, stable=True)[:, :most]
            decoder.keep(live, s)
            rows, alive, left, x = (a[live[:, None], s] for a in (rows, alive, left, x))
        h = decoder.step(x)
    result = [
        {
            "ids": i,
            "latents": torch.stack(v) if v else torch.zeros(0),
            "finished": i[-1] in stops.tolist(),
        }
        for i, v in zip(ids, latents)
    ]
    return [result[i : i + S0] for i in range(0, len(result), S0)]


def to_text(tokenizer, ids):
    """Decode generated ids, each latent span written `<latent></latent>` as in the data."""
    start, pad, end = latent_ids(tokenizer)
    drop = {pad, end, tokenizer.eos_token_id, tokenizer.pad_token_id}
    pieces, run = [], []
    for t in ids + [start]:
        if t == start:
            pieces.append(tokenizer.decode(run))
            run = []
        elif t not in drop:
            run.append(t)
    return LATENT_SPAN.join(pieces)


def see(vlm, processor, prompts):
    """Add "vision" (N, d) or None to encoded prompts, the tower taking at most TOWER_PATCHES patches a call (or one image)."""
    todo = [
        (image, math.prod(grid)) for p in prompts for image, grid in zip(p["images"], p["grids"])
    ]
    v = []
    while todo:
        n = next(
            (
                i
                for i, total in enumerate(accumulate(size for _, size in todo))
                if total > TOWER_PATCHES
            ),
            len(todo),
        )
        part, todo = todo[: max(n, 1)], todo[max(n, 1) :]
        with torch.inference_mode():
            v += encode_images(vlm, processor, [open_image(image) for image, _ in part])[0]
    rest = iter(v)
    for p in prompts:
        mine = [next(rest) for _ in p["images"]]
        p["vision"] = torch.cat(mine) if mine else None
    return prompts


def make_prompts(vlm, tokenizer, processor, rows):
    """Encode data rows for `generate`."""
    return see(vlm, processor, [encode(vlm, tokenizer, processor, row) for row in rows])


def span_unit(head):
    """Latents are kept in multiples of this: whole spans; a Monet span may be shorter than K."""
    return 1 if head is None or isinstance(head, MonetHead) else head.K


def save_latents_file(path, latents, head):
    """Write the whole spans of generated latents (m * K, d), if any; a span that the token limit cut off is left out."""
    if whole := len(latents) // span_unit(head) * span_unit(head):
        write_then_rename(path, lambda p: save_file({"latents": latents[:whole].contiguous()}, p))


def load_latents_file(path, head):
    """Latents (m, K, d) to feed to a model with this head. Raises SystemExit if they do not fit it."""
    latents, unit = read_safetensors(path, ("latents",))[0]["latents"], span_unit(head)
    d = head.mean.shape[0]
    if not len(latents) or latents.shape[1] != d or len(latents) % unit:
        raise SystemExit(
            f"{path}: latents of shape {tuple(latents.shape)}; the model's head writes spans of {unit} x {d}"
        )
    return latents.view(-1, unit, d)
