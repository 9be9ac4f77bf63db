"""What does GAP train? L = L_LM + lambda * L_latent, and latents only where the base fails.

Model level (section 4.3): the difficulty rule says which questions keep their latents.
Feature level (4.1): a latent head regresses the targets that fit_pca.py left.
Loss (4.2): one teacher-forced forward a step.

The baselines LH and output-as-input and the controls differ in the head only (model.HEADS).
Constants of the paper are settings of train.py: lambda_latent, tau, ...
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

from data import LATENT_SPAN, check_choices, read_lines
from method import Method
from model import (
    HEADS,
    LATENT_PAD,
    add_latent_tokens,
    encode,
    load_pca,
    save_head,
    tower_fingerprint,
)

# --------------------------------------------------------------------------------------------------
# difficulty-aware assignment (section 4.3)

RULES = ("paper", "guess")
GUESSING = 0.05  # a count is no luck if blind guessing reaches it less often than this [ours]


def is_solved(correct, n, n_options, tau, rule):
    """Does the rule call a question solved, and so train it without latents?

    paper: accuracy above tau. guess: with options, a count that blind guessing reaches with
    probability below 5 % (binomial tail); free-form questions as in the paper.
    """
    if rule == "guess" and n_options > 1:
        p = 1 / n_options
        counts = range(correct, n + 1)
        tail = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in counts)
        return tail < GUESSING
    return correct / n > tau


def needs_latents(row, tau, rule):
    """The assignment of one line of difficulty.jsonl."""
    return not is_solved(row["correct"], row["n"], row["n_options"], tau, rule)


def read_difficulty(path, tau, rule):
    """(ids that the rule trains as text, all ids) of a difficulty file.

    Raises SystemExit where early-stopped counts can not tell.
    """
    fields = {"id", "n", "correct", "n_options", "lower_bound"}
    solved, known = set(), set()
    for n, row in enumerate(read_lines(path), 1):
        missing = fields - row.keys()
        if missing:
            wanted = "expected a line written by sample_difficulty.py"
            raise SystemExit(f"{path}:{n}: lacks {sorted(missing)}; {wanted}")
        known.add(row["id"])
        if not needs_latents(row, tau, rule):
            solved.add(row["id"])
        elif row["lower_bound"]:
            # it counted no further once solved under another tau or rule
            raise SystemExit(
                f"{path}:{n}: {row['id']!r} was stopped early at {row['correct']} correct, which "
                f"does not decide tau={tau} under rule={rule!r}; sample again with early_stop=0 or "
                "this tau and rule"
            )
    return solved, known


# --------------------------------------------------------------------------------------------------
# latent targets, as fit_pca.py left them


class Targets:
    """The latent targets v of each example, read from <folder>/targets when they are asked for."""

    def __init__(self, folder):
        self.folder = Path(folder) / "targets"
        self.index_file = self.folder / "index.json"
        if not self.index_file.is_file():
            raise SystemExit(f"{self.index_file}: no such file; run fit_pca.py first")
        self.index = json.loads(self.index_file.read_text())
        self.files = self.index["files"]  # {id: the file that holds it}
        self.rejected = set(self.index["rejected"])  # ids with a degenerate auxiliary image
        self.open = {}

    def read(self, id, n_spans):
        """(n_spans * K, d) of an example. Raises SystemExit if its response has other spans."""
        name = self.files[id]
        if name not in self.open:
            self.open[name] = safe_open(self.folder / name, "pt")
        # safetensors maps the file: only this example's bytes are read
        v = self.open[name].get_tensor(id)  # (m, K, d)
        if len(v) != n_spans:
            raise SystemExit(
                f"{self.folder / name}: {len(v)} spans for example {id!r}, whose response has "
                f"{n_spans}; run fit_pca.py again"
            )
        return v.flatten(0, 1)


def check_same_space(vlm, base, targets, pca_file, meta):
    """Refuse a PCA, targets and base that do not belong together."""
    ours = tower_fingerprint(vlm)
    for name, theirs in ((pca_file, meta), (targets.index_file, targets.index)):
        if theirs["tower"] != ours:
            raise SystemExit(
                f"{name} was made with vision tower {theirs['tower']}, but {base} has tower {ours}"
            )
    for field in ("K", "mode"):
        there, here = str(targets.index[field]), meta[field]
        if there != here:
            raise SystemExit(
                f"{targets.index_file} has {field} = {there}, but {pca_file} has {here}"
            )


# --------------------------------------------------------------------------------------------------
# the loss (section 4.2)


class GAP(Method):
    """Latents fed and regressed by a head (4.1), on the questions that the base fails (4.3)."""

    @classmethod
    def check(cls, settings):
        losses = ("mean", "sum", "relative")
        check_choices(settings, latent_loss=losses, rule=RULES)

    def __init__(self, vlm, tokenizer, processor, settings):
        super().__init__(vlm, tokenizer, processor, settings)
        add_latent_tokens(vlm, tokenizer)
        self.latent_id = tokenizer.convert_tokens_to_ids(LATENT_PAD)
        self.pca_file = Path(settings["pca"]) / "pca.safetensors"
        pca, self.meta = load_pca(self.pca_file)
        self.targets = Targets(settings["pca"])
        check_same_space(vlm, settings["base"], self.targets, self.pca_file, self.meta)
        # the seam to `generate`: what follows a state is head(h_bar)
        self.head = HEADS[settings["method"]](pca, self.targets.index["K"])
        self.solved, self.known = set(), set()
        if settings["difficulty"]:
            rule = settings["tau"], settings["rule"]
            self.solved, self.known = read_difficulty(settings["difficulty"], *rule)

    def inputs(self):
        files = [self.pca_file, self.targets.index_file]
        if self.settings["difficulty"]:
            files.append(self.settings["difficulty"])
        return files

    # --- which rows, and how a row becomes numbers

    def rows(self, path, training):
        rows, left_out = super().rows(path, training)
        difficulty = self.settings["difficulty"]
        if training and difficulty:
            missing = [row["id"] for row in rows if row["id"] not in self.known]
            if missing:
                raise SystemExit(
                    f"{difficulty} lacks {len(missing)} examples of {path} (the first is "
                    f"{missing[0]!r}); run sample_difficulty.py again, it goes on where it stopped"
                )
        return rows, left_out

    def keeps_latents(self, row, training):
        return not training or row["id"] not in self.solved

    def keeps_parser(self, row, training):
        if not self.settings["keep_parser"] and not self.keeps_latents(row, training):
            return False
        return super().keeps_parser(row, training)

    def can_use(self, row, path):
        if row["id"] in self.targets.rejected:
            return False
        if row["id"] not in self.targets.files:
            raise SystemExit(
                f"{path}: example {row['id']!r} needs latent targets, which "
                f"{self.targets.index_file} does not have; run fit_pca.py on this data file"
            )
        return True

    def encode(self, row):
        response, K = row["response"], self.head.K
        example = encode(self.vlm, self.tokenizer, self.processor, row, K, response)
        return example | {"id": row["id"], "n_spans": response.count(LATENT_SPAN)}

    def counts(self, example):
        # the latent loss has a count of its own: a batch of few spans does not shrink its gradient
        M = example["n_spans"] * self.head.K
        return super().counts(example) | {"latent": M, "norm_predicted": M, "norm_target": M}

    def collate(self, examples):
        # in the order of the pads, row by row
        v = [self.targets.read(e["id"], e["n_spans"]) for e in examples if e["n_spans"]]
        latents = torch.cat(v) if v else torch.zeros(0, self.targets.index["d"])  # (M, d)
        return super().collate(examples) | {"latents": latents}

    # --- losses

    def forward(self, batch):
        """Sums of cross-entropy, ||v_hat - v||^2, ||v_hat|| and ||v||.

        The state at <|latent_start|> predicts latent 1, the state at latent i latent i + 1: both
        losses are read one position early.
        """
        v = batch["latents"]  # (M, d): what is fed (teacher forcing), and what is regressed
        at = batch["ids"][:, 1:] == self.latent_id  # (B, T - 1): states before a latent
        fed = v
        if self.settings["scheduled_sampling"]:
            # on every rank, with latents or not: FSDP gathers the decoder twice
            with torch.no_grad():
                fed = self.head(self.states(batch, v, self.latent_id)[at])
        h = self.states(batch, fed, self.latent_id)
        ce = self.cross_entropy(h, batch)
        if not len(v):
            # the head stays in the graph: FSDP wants the same gradients on every rank
            idle = sum(p.sum() for p in self.head.parameters()) * 0.0
            zero = ce.new_zeros(())
            return {"ce": ce + idle, "latent": zero, "norm_predicted": zero, "norm_target": zero}
        with torch.no_grad():  # logged, not trained
            norm_predicted = self.head(h[at]).float().norm(dim=-1).sum()
            norm_target = v.float().norm(dim=-1).sum()
        return {
            "ce": ce,
            "latent": self.head.squared_error(h[at], v).sum(),
            "norm_predicted": norm_predicted,
            "norm_target": norm_target,
        }

    def latent_scale(self):
        """What makes L_latent of the mean of ||v_hat - v||^2: 1/d, 1, or 1/variance of targets."""
        d = self.head.basis.shape[0]
        scales = {"mean": 1 / d, "sum": 1.0, "relative": 1 / self.head.total_variance}
        return scales[self.settings["latent_loss"]]

    def weights(self, step, total):
        return {"ce": 1.0, "latent": self.settings["lambda_latent"] * self.latent_scale()}

    def report(self, means):
        if "latent" not in means:
            return means
        squared = means["latent"]
        r2 = 1 - squared / self.head.total_variance
        return {
            "ce": means["ce"],
            "latent": self.latent_scale() * squared,
            "r2": r2,
            "norm_predicted": means["norm_predicted"],
            "norm_target": means["norm_target"],
        }

    # --- what it leaves

    def save(self, folder, weights):
        """latent_head.safetensors, what `generate` asks for the next latent."""
        prefix = "head."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        save_head(folder, self.head, own, self.meta)
