"""What does VaLR train? L = L_CE + lambda * L_REPA: latents that look like their picture inside.

Vision-aligned Latent Reasoning (arXiv 2602.04476). Latents stand before the reasoning steps that
have a target picture, and are output as input: E_{t+1} = [E_t; h_t]. In training the decoder's
states at the latents of step i, after an early block, are aligned with a frozen encoder's features
F_phi of the step's picture (REPA):

    L_REPA = -1/(N P) sum_i sum_p cos(psi(up(F_MLLM^i))[p], F_phi^i[p])

A row is one of our JSONL: aux_images[k] is the target of the k-th span. The paper's second stage
starts from a chain-of-thought model (`method=text` on the same rows). Its values, where they are
settings of train.py: K = 16, align_layer = 12 of 28, lambda_align = 0.5, lr = 2e-6,
lr_head = 1e-5 (of psi), one epoch.

Shape letters besides method.py's: M latents, N spans, K latents per span, P patches, L places of a
part.
"""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import LATENT_SPAN, Rows
from encoders import FolderEncoder, OwnEncoder
from files import file_digest, folder_digest, key_of
from images import open_image, usable_rows
from launch import names_in, pick_device
from method import Method, idle
from model import (
    IGNORE,
    StateHead,
    add_latent_tokens,
    embed,
    encode,
    save_head,
    tower_fingerprint,
)

PSI_WIDTH = 2048  # of psi's two hidden layers [REPA, which the paper cites; its own is not stated]
UPSAMPLING = "bilinear"  # K -> P, the latents as a square of sqrt(K) a side [not stated]


class VaLR(Method):
    """Latents by output as input, their early states aligned with pictures."""

    @classmethod
    def check(cls, settings):
        K = settings["K"]
        if math.isqrt(K) ** 2 != K:
            raise SystemExit(f"K={K}: latents are upsampled as a square; expected 1, 4, 9, 16, ...")
        if not names_in(settings["encoders"]):
            raise SystemExit("encoders is empty: expected `own` or folders, with commas between")
        if settings["whole_gradient"] and settings["rollout"]:
            found = f"found rollout={settings['rollout']}"
            raise SystemExit(f"whole_gradient=1 wants an exact rollout, rollout=0; {found}")

    def __init__(self, vlm, tokenizer, processor, settings):
        super().__init__(vlm, tokenizer, processor, settings)
        self.latent_id = add_latent_tokens(vlm, tokenizer)
        d, n_blocks = vlm.config.text_config.hidden_size, len(vlm.model.language_model.layers)
        if not 1 <= settings["align_layer"] <= n_blocks:
            found = settings["align_layer"]
            raise SystemExit(f"align_layer={found}: the decoder has blocks 1 to {n_blocks}")
        # the seam to `generate`: what follows a state is the state
        self.head = StateHead(d, settings["K"])
        # a list, which nn.Module does not look into: encoders are neither trained nor kept
        self.encoders = []
        for name in names_in(settings["encoders"]):
            if name == "own":
                self.encoders.append(OwnEncoder(vlm, processor))
            else:
                dtype = getattr(torch, settings["dtype"])
                self.encoders.append(FolderEncoder(name, dtype, pick_device()))
        self.psi = nn.ModuleList(projector(d, encoder.width) for encoder in self.encoders)
        self.pictures = []  # a digest per row
        if settings["whole_gradient"]:
            # `read_in_parts` has masks, for which cuDNN's attention gives NaN gradients on an H100
            # (github.com/pytorch/pytorch/issues/196678)
            torch.backends.cuda.enable_cudnn_sdp(False)

    def inputs(self):
        names = names_in(self.settings["encoders"])  # in their order, which is that of the psi
        digests = [name if name == "own" else folder_digest(name) for name in names]
        return {
            "encoders": key_of(digests),
            "aux_images": key_of(self.pictures),
        }

    def also_reads(self, row):
        return row["aux_images"]

    # --- which rows, and how a row becomes numbers

    def rows(self, examples, training):
        examples = Rows.of(examples)
        if self.settings["query_span"]:
            examples = examples.then(add_query_span)
        # an auxiliary image is only looked at in the step that needs it: now is the time to say so
        examples = usable_rows(examples, self.settings["skip_unusable"], ("aux_images",))
        rows, left_out = super().rows(examples, training)
        self.pictures += [key_of(list(map(file_digest, row["aux_images"]))) for row in rows]
        return rows, left_out

    def keeps_latents(self, row, training):
        return True

    def encode(self, row):
        response, K = row["response"], self.head.K
        example = encode(self.vlm, self.tokenizer, self.processor, row, K, response)
        return example | {"targets": row["aux_images"][: response.count(LATENT_SPAN)]}

    def counts(self, example):
        N = len(example["targets"])
        M = N * self.head.K
        return super().counts(example) | {"align": N, "fed_error": M, "fed_energy": M}

    def collate(self, examples):
        paths = [path for example in examples for path in example["targets"]]
        # each picture once, however many spans have it for a target
        once = list(dict.fromkeys(paths))
        images = [open_image(path) for path in once]
        return super().collate(examples) | {
            "encoder_pixels": [x.pixels(images) for x in self.encoders] if images else [],
            "picture_of": [once.index(path) for path in paths],  # of each span
        }

    # --- losses

    def forward(self, batch):
        """Sums of cross-entropy, of 1/P sum_p -cos(psi(up(F))[p], F_phi[p]) over the N spans, and
        of ||fed - h||^2 and ||h||^2 over the M latents, which say how exact the rollout was."""
        before = batch["ids"][:, 1:] == self.latent_id  # (B, T - 1): states before a latent
        if self.settings["whole_gradient"]:
            h, early = self.read_in_parts(batch)
            fed = h[before]  # (M, d), themselves: the error is 0
        else:
            fed = self.roll_out(batch, before)
            h, early = self.states_and_block(batch, fed)
        ce = self.cross_entropy(h, batch)
        if not batch["picture_of"]:
            zero = ce.new_zeros(())
            ce = ce + idle(self.psi)
            return {"ce": ce, "align": zero, "fed_error": zero, "fed_energy": zero}
        f = early[batch["ids"] == self.latent_id]  # (M, d)
        f = f.unflatten(0, (-1, self.head.K))  # (N, K, d), spans in reading order
        with torch.no_grad():  # logged, not trained
            exact = h[before].float()
            fed_error = (fed.float() - exact).pow(2).sum()
            fed_energy = exact.pow(2).sum()
        return {
            "ce": ce,
            "align": self.alignment(f, batch).sum(),
            "fed_error": fed_error,
            "fed_energy": fed_energy,
        }

    def roll_out(self, batch, before):
        """What is fed at the latents (M, d): the decoder's own states, E_{t+1} = [E_t; h_t].

        Latent after latent, as in generation; or by `rollout` Jacobi passes: each feeds all latents
        the states of the pass before, one position on, and makes one more of every row exact.
        Gradients stop at what is fed [ours: not stated], but for `fed_gradient`: then they go
        through the last pass, which is one more after an exact rollout.
        """
        through = self.settings["fed_gradient"] and torch.is_grad_enabled()
        passes = self.settings["rollout"]
        with torch.no_grad():
            if passes == 0:
                fed = self.read_in_parts(batch, to_end=False)[0][before]
            else:
                fed = None  # at first the embedding of the pad itself
                for _ in range(passes - 1 if through else passes):
                    fed = self.states(batch, fed)[before]
        if through:
            fed = self.states(batch, fed)[before]
        return fed

    def read_in_parts(self, batch, to_end=True):
        """As `states_and_block`, but each position is read once, fed what generation would feed.

        Part n of a row goes from its n-th latent, part 0 from its start, to before the next. The
        n-th parts of all rows are read together, after the keys and values of those before; then,
        with `to_end`, what follows the last latent of each. Gradients go through all that is fed.
        What is not read (padding, for one) has states of 0.
        """
        is_latent = batch["ids"] == self.latent_id
        part, n_parts = self.parts(is_latent, batch["labels"], to_end)
        order = reading_order(part, n_parts)

        x = embed(self.vlm, batch["ids"], batch["vision"])  # (B, T, d), its latents still to come
        rows = torch.arange(len(x), device=x.device)
        row = rows[:, None]
        h_t = x[:, 0]  # (B, d): fed at each row's next latent, once there is one
        past, read, states, early = Past(), [], [], []
        with self.after_block(early):
            for at, real in order:
                read.append(real)
                is_latent_here = is_latent[row, at][..., None]
                out = self.vlm.model.language_model(
                    # E_{t+1} = [E_t; h_t]
                    inputs_embeds=torch.where(is_latent_here, h_t[:, None], x[row, at]),
                    position_ids=batch["pos"][:, row, at],
                    attention_mask=torch.cat(read, 1),
                    past_key_values=past,
                )
                past = past.following()
                states.append(out.last_hidden_state)
                length = real.sum(1)
                last = states[-1][rows, (length - 1).clamp(min=0)]
                h_t = torch.where(length[:, None] > 0, last, h_t)
        T = part.shape[1]
        return in_places(states, order, T)[:, :-1], in_places(early, order, T)

    def parts(self, is_latent, labels, to_end):
        """In which part each position is read (B, T), -1: in none; and how many parts there are."""
        most = self.most_latents(is_latent)
        part = is_latent.cumsum(1)
        # the last part of each row, the only one where there is no latent
        part = part.masked_fill(part == part[:, -1:], most if to_end else -1)
        padding = (labels != IGNORE).flip(1).cumsum(1).flip(1) == 0  # after the last label
        n_parts = most + 1 if to_end else max(1, most)
        return part.masked_fill(padding, -1), n_parts

    def most_latents(self, is_latent):
        """The most latents of a row, over the micro-batches of all ranks: the same on each."""
        most = is_latent.sum(1).amax()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def states_and_block(self, batch, fed):
        """h_bar (B, T - 1, d) as of `states`, and the states (B, T, d) after block align_layer."""
        kept = []
        with self.after_block(kept):
            h = self.states(batch, fed)
        return h, kept[0]

    @contextmanager
    def after_block(self, kept):
        """Within this context the output of block align_layer is appended to `kept`."""
        # by a hook: it runs outside the block, where FSDP and activation checkpointing are done
        block = self.vlm.model.language_model.layers[self.settings["align_layer"] - 1]
        hook = block.register_forward_hook(lambda module, args, state: kept.append(state))
        try:
            yield
        finally:
            hook.remove()

    def alignment(self, f, batch):
        """-1/P sum_p cos(psi(up(f))[p], F_phi[p]) of each span (N), for its states f (N, K, d).

        The mean over encoders, each with a psi of its own.
        """
        losses = []
        for encoder, psi, pixels in zip(self.encoders, self.psi, batch["encoder_pixels"]):
            features = encoder.features(pixels)  # [(h, w, z)], one per picture
            targets = [features[i] for i in batch["picture_of"]]  # one per span
            n_patches = [target.shape[0] * target.shape[1] for target in targets]
            # all patches of all spans together: grids may differ from span to span
            up = torch.cat([upsample(x, target.shape[:2]) for x, target in zip(f, targets)])
            predicted = psi(up.to(f.dtype)).float()
            wanted = torch.cat([target.flatten(0, 1) for target in targets]).float()
            cosine = F.cosine_similarity(predicted, wanted, dim=-1)  # (all patches)
            losses.append(torch.stack([-c.mean() for c in cosine.split(n_patches)]))
        return torch.stack(losses).mean(0)

    def weights(self, step, total):
        return {"ce": 1.0, "align": self.settings["lambda_align"]}

    def report(self, means):
        if "align" not in means:
            return means
        # of what was fed against what should have been: 0, but for rounding, if it was exact
        error = math.sqrt(means["fed_error"] / max(means["fed_energy"], 1e-12))
        return {"ce": means["ce"], "cosine": -means["align"], "rollout_error": error}

    # --- what it leaves

    def save(self, folder, trained):
        """latent_head.safetensors, which holds no weights: psi has done its work."""
        meta = {"tower": tower_fingerprint(self.vlm), "layer": self.settings["align_layer"]}
        save_head(folder, self.head, {}, meta)


class Past:
    """A cache for one part: its own keys and values, and those of the parts before it.

    It has the methods that the decoder calls of transformers' caches. Activation checkpointing
    reads a part twice: a cache that grows in place would then hold it twice, and give wrong
    gradients; in this one the second reading finds the first.
    """

    def __init__(self, before=()):
        self.before = before  # parts
        self.own = {}  # {layer: (keys, values)}, each (B, H, L, D)

    def following(self):
        """The cache of the next part."""
        return Past((*self.before, self))

    def update(self, keys, values, layer):
        """A layer's keys and values up to this part's end."""
        self.own.setdefault(layer, (keys, values))
        parts = [part.own[layer] for part in (*self.before, self)]
        return tuple(torch.cat(kind, 2) for kind in zip(*parts))

    def get_query_offset(self, layer):
        return sum(part.own[layer][0].shape[2] for part in self.before)

    def get_mask_sizes(self, length, layer):
        return self.get_query_offset(layer) + length, 0


def reading_order(part, n_parts):
    """For each part n, where `part` (B, T) is n: positions (B, L), and which are real (B, L).

    A row with fewer than L is filled up with positions of other parts, which are not real.
    """
    order = []
    for n in range(n_parts):
        here = part == n
        # one position at least: every rank calls the decoder equally often
        L = max(1, int(here.sum(1).max()))
        at = (~here).int().argsort(dim=1, stable=True)[:, :L]  # its own first
        order.append((at, here.gather(1, at)))
    return order


def in_places(states, order, T):
    """States (B, L, d) of each part at their places in the rows, (B, T, d); 0 where none is."""
    at, real = (torch.cat(parts, 1) for parts in zip(*order))
    states = torch.cat(states, 1)
    B, _, d = states.shape
    # what is no part's own goes to a place after the row's end, which is left out
    at = at.masked_fill(~real, T)[..., None].expand(-1, -1, d)
    return states.new_zeros(B, T + 1, d).scatter(1, at, states)[:, :T]


def add_query_span(row):
    """Give a row of one image and no span one before its first step, with the image as target."""
    if len(row["images"]) == 1 and not row["aux_images"]:
        row["aux_images"] = row["images"]
        row["response"] = row["response"].replace("<think>", f"<think> {LATENT_SPAN}", 1)


def projector(d, z):
    """psi: d -> z, an MLP of REPA's shape, Xavier weights and zero biases."""
    layers = [nn.Linear(d, PSI_WIDTH), nn.Linear(PSI_WIDTH, PSI_WIDTH), nn.Linear(PSI_WIDTH, z)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


def upsample(f, grid):
    """A span's states f (K, d), a square in reading order, at the places of a grid: (h * w, d)."""
    side = math.isqrt(len(f))
    plane = f.float().T.view(1, -1, side, side)  # (1, d, side, side)
    up = F.interpolate(plane, size=tuple(grid), mode=UPSAMPLING, align_corners=False)
    return up[0].flatten(1).T
