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

Shape letters beside method.py's: M latents, N spans, K latents a span, P patches.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import LATENT_SPAN, Rows, file_digest, key_of, weights_digest
from encoders import FolderEncoder, OwnEncoder
from images import open_image, usable_rows
from launch import pick_device
from method import Method, idle
from model import (
    LATENT_PAD,
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
        if not encoder_names(settings):
            raise SystemExit("encoders is empty: expected `own` or folders, with commas between")

    def __init__(self, vlm, tokenizer, processor, settings):
        super().__init__(vlm, tokenizer, processor, settings)
        add_latent_tokens(vlm, tokenizer)
        self.latent_id = tokenizer.convert_tokens_to_ids(LATENT_PAD)
        d, n_blocks = vlm.config.text_config.hidden_size, len(vlm.model.language_model.layers)
        if not 1 <= settings["align_layer"] <= n_blocks:
            found = settings["align_layer"]
            raise SystemExit(f"align_layer={found}: the decoder has blocks 1 to {n_blocks}")
        # the seam to `generate`: what follows a state is the state
        self.head = StateHead(d, settings["K"])
        # a list, which nn.Module does not look into: encoders are neither trained nor kept
        self.encoders = []
        for name in encoder_names(settings):
            if name == "own":
                self.encoders.append(OwnEncoder(vlm, processor))
            else:
                dtype = getattr(torch, settings["dtype"])
                self.encoders.append(FolderEncoder(name, dtype, pick_device()))
        self.psi = nn.ModuleList(projector(d, encoder.width) for encoder in self.encoders)
        self.pictures = []  # a digest a row

    def inputs(self):
        folders = [name for name in encoder_names(self.settings) if name != "own"]
        return {
            "encoders": key_of([weights_digest(folder) for folder in folders]),
            "aux_images": key_of(self.pictures),
        }

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
            "seen": [encoder.pixels(images) for encoder in self.encoders] if images else [],
            "picture_of": [once.index(path) for path in paths],  # of each span
        }

    # --- losses

    def forward(self, batch):
        """Sums of cross-entropy, of 1/P sum_p -cos(psi(up(F))[p], F_phi[p]) over the N spans, and
        of ||fed - h||^2 and ||h||^2 over the M latents, which say how exact the rollout was."""
        before = batch["ids"][:, 1:] == self.latent_id  # (B, T - 1): states before a latent
        fed = self.roll_out(batch, before)  # (M, d)
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
        Gradients stop at what is fed [not stated], but for `fed_gradient`: then they go through the
        last pass, which is one more after an exact rollout.
        """
        through = self.settings["fed_gradient"] and torch.is_grad_enabled()
        passes = self.settings["rollout"]
        if passes == 0:
            fed = self.fed_exactly(batch)
        else:
            fed = None  # at first the embedding of the pad itself
            with torch.no_grad():
                for _ in range(passes - 1 if through else passes):
                    fed = self.states(batch, fed, self.latent_id)[before]
        if through:
            fed = self.states(batch, fed, self.latent_id)[before]
        return fed

    @torch.no_grad()  # only so: with activation checkpointing a cache gives wrong gradients
    def fed_exactly(self, batch):
        """What generation would feed at the latents (M, d), each position read once.

        Part n of a row goes from its n-th latent, part 0 from its start, to before the next. The
        n-th parts of all rows are read together, after the keys and values of those before.
        """
        is_latent = batch["ids"] == self.latent_id
        part = is_latent.cumsum(1)  # (B, T)
        x = embed(self.vlm, batch["ids"], batch["vision"])  # (B, T, d), its latents still to come
        row = torch.arange(len(x), device=x.device)[:, None]
        cache, real = None, is_latent[:, :0]
        for n in range(self.most_latents(is_latent)):
            following = is_latent & (part == n + 1)  # the latent that part n leads to
            has_next = following.any(1)
            here = (part == n) & has_next[:, None]
            length = here.sum(1)
            # one position at least: every rank calls the decoder equally often
            L = max(1, int(length.max()))
            # places of a row's part, and then of what is masked
            at = (~here).int().argsort(dim=1, stable=True)[:, :L]
            real = torch.cat([real, here.gather(1, at)], 1)
            out = self.vlm.model.language_model(
                inputs_embeds=x[row, at],
                position_ids=batch["pos"][:, row, at],
                attention_mask=real,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            x[following] = out.last_hidden_state[has_next, length[has_next] - 1]
        return x[is_latent]

    def most_latents(self, is_latent):
        """The most latents of a row, over the micro-batches of all ranks: the same on each."""
        most = is_latent.sum(1).amax()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def states_and_block(self, batch, fed):
        """h_bar (B, T - 1, d) as of `states`, and the states (B, T, d) after block align_layer."""
        kept = []
        # by a hook: it runs outside the block, where FSDP and activation checkpointing are done
        block = self.vlm.model.language_model.layers[self.settings["align_layer"] - 1]
        hook = block.register_forward_hook(lambda module, args, state: kept.append(state))
        h = self.states(batch, fed, self.latent_id)
        hook.remove()
        return h, kept[0]

    def alignment(self, f, batch):
        """-1/P sum_p cos(psi(up(f))[p], F_phi[p]) of each span (N), for its states f (N, K, d).

        The mean over encoders, each with a psi of its own.
        """
        losses = []
        for encoder, psi, pixels in zip(self.encoders, self.psi, batch["seen"]):
            features = encoder.features(pixels)  # [(h, w, z)], a picture
            targets = [features[i] for i in batch["picture_of"]]  # a span
            n_patches = [target.shape[0] * target.shape[1] for target in targets]
            # all patches of all spans together: grids may differ from span to span
            up = torch.cat([upsample(x, target.shape[:2]) for x, target in zip(f, targets)])
            said = psi(up.to(f.dtype)).float()
            seen = torch.cat([target.flatten(0, 1) for target in targets]).float()
            cosine = F.cosine_similarity(said, seen, dim=-1)  # (all patches)
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

    def save(self, folder, weights):
        """latent_head.safetensors, which holds no weights: psi has done its work."""
        meta = {"tower": tower_fingerprint(self.vlm), "layer": self.settings["align_layer"]}
        save_head(folder, self.head, {}, meta)


def encoder_names(settings):
    return [name.strip() for name in settings["encoders"].split(",") if name.strip()]


def add_query_span(row):
    """Give a row of one image and no span one before its first step, with the image as target."""
    if len(row["images"]) == 1 and not row["aux_images"]:
        row["aux_images"] = row["images"]
        row["response"] = with_first_span(row["response"])


def with_first_span(response):
    """A response with a latent span before its first step."""
    before, think, steps = response.rpartition("<think>")
    return f"{before}{think} {LATENT_SPAN}{steps}" if think else f"{LATENT_SPAN} {response}"


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
