"""What does GAP train? L = L_LM + lambda * L_latent, and latents only where the base fails.

Feature level: a latent head regresses the targets that fit_pca.py left.
Data level, "context-level": each span has an auxiliary image and a parser text (data.py).
Model level, "capacity-guided": the difficulty rule says which questions keep their latents.

The baselines LH and output-as-input and the controls differ in the head only (model.HEADS).
Constants of the paper are settings of train.py: lambda_latent, tau, ...
"""

import math
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from data import LATENT_SPAN, question_key, strip_parser
from files import (
    check_finite,
    check_there,
    each_line,
    file_digest,
    folder_digest,
    key_of,
    read_json,
    seed_of,
    tensors_digest,
)
from images import usable_rows
from launch import check_choices, check_each
from method import Method, head_of, idle
from model import (
    HEADS,
    add_latent_tokens,
    encode,
    load_pca,
    save_head,
    tower_fingerprint,
)
from options import hidden_options, option_named

# --------------------------------------------------------------------------------------------------
# difficulty-aware assignment: is_solved decides a count, needs_latents a line, solved_by a file;
# GAP.keeps_latents asks it

RULES = ("paper", "guess")
GUESSING = 0.05  # a count is no luck if blind guessing reaches it less often than this [ours]


def is_solved(correct, n, n_options, tau, rule):
    """Does the rule call a question solved, and so train it without latents?

    paper: accuracy above tau. guess: with options, a count that blind guessing reaches with
    probability below 5 % (binomial tail); free-form questions as in the paper.
    """
    if rule == "guess" and n_options > 1:
        # what a blind guess hits
        p = 1 / n_options
        counts = range(correct, n + 1)
        tail = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in counts)
        return tail < GUESSING
    a = correct / n
    return a > tau  # a <= tau: the full latent format


def n_options(row):
    """Among how many options a guess would choose; 0 for a free-form answer."""
    if row.get("options"):
        return len(row["options"])
    # those that its question lists, if its answer is one of them
    options = hidden_options(row["question"])
    return len(options) if option_named(row["answer"], options) else 0


def needs_latents(line, tau, rule):
    """The assignment of one line of difficulty.jsonl."""
    return not is_solved(line["correct"], line["n"], line["n_options"], tau, rule)


# what training needs of a line of difficulty.jsonl
COUNTED = {
    "id": str,
    "base": str,
    "row": str,
    "n": int,
    "correct": int,
    "n_options": int,
    "lower_bound": bool,
}


def read_counts(path):
    """{id: line} of a finished difficulty file. Raises SystemExit for an id that occurs twice."""
    counts = {}
    for n, line in enumerate(read_count_lines(path), 1):
        if line["id"] in counts:
            raise SystemExit(f"{path}:{n}: id {line['id']!r} occurs before")
        # of a million lines no more than is needed
        line = {name: line[name] for name in COUNTED}
        counts[line["id"]] = line | {"base": sys.intern(line["base"])}
    return counts


def read_count_lines(path):
    """Yield the lines that sample_difficulty.py wrote. Raises SystemExit naming line and field."""
    if not Path(path).exists():
        return
    # they are resumed and trusted, so each is checked as if a stranger had sent it
    for n, line in enumerate(each_line(path, key=str, **COUNTED), 1):
        if not 0 <= line["correct"] <= line["n"] or line["n"] < 1:
            raise SystemExit(f"{path}:{n}: {line['correct']} of {line['n']} answers correct")
        yield line


def solved_by(counts, examples, base, settings):
    """Ids of the examples that the difficulty rule trains as text.

    Raises SystemExit for examples that were not sampled, or not as they are now, or from another
    base, and where an early-stopped count cannot tell.
    """
    path, tau, rule = settings["difficulty"], settings["tau"], settings["rule"]
    again = "run sample_difficulty.py again, it goes on where it stopped"
    missing = [row["id"] for row in examples if row["id"] not in counts]
    if missing:
        raise SystemExit(
            f"{path} lacks {len(missing)} examples of {settings['data']} (the first is "
            f"{missing[0]!r}); {again}"
        )
    # ids that train as text; all others keep their latents
    solved = set()
    for row in examples:
        line = counts[row["id"]] | {"n_options": n_options(row)}
        if line["base"] != base:
            raise SystemExit(f"{path}: {row['id']!r} was sampled from another base than this run's")
        if line["row"] != question_key(row):
            raise SystemExit(
                f"{path}: {row['id']!r} was sampled with another question, answer or picture than "
                f"{row.where} has; {again}"
            )
        if not needs_latents(line, tau, rule):
            # the share that keeps its latents depends on the ids alone
            if seed_of("easy", row["id"]) >= settings["easy_latents"] * 2**63:
                solved.add(row["id"])
        elif line["lower_bound"]:
            # it counted no further once solved under another tau or rule
            raise SystemExit(
                f"{path}: {row['id']!r} was stopped early at {line['correct']} correct, which "
                f"does not decide tau={tau} under rule={rule!r}; sample again with early_stop=0 or "
                "this tau and rule"
            )
    return solved


# --------------------------------------------------------------------------------------------------
# latent targets, as fit_pca.py left them


class Targets:
    """The latent targets v of each example, read from <folder>/targets when they are asked for."""

    def __init__(self, folder):
        self.folder = Path(folder) / "targets"
        self.index_file = self.folder / "index.json"
        check_there(self.index_file)
        # the index is written last by fit_pca.py: where it stands, the targets are whole
        kinds = {"K": int, "d": int, "mode": str, "tower": str}
        kinds |= {"rejected": list, "files": dict, "pictures": dict, "shards": dict}
        self.index = read_json(self.index_file, **kinds)
        self.K, self.d = self.index["K"], self.index["d"]
        self.files = self.index["files"]  # {id: the file that holds it}
        # ids with a degenerate auxiliary image
        self.rejected = set(map(str, self.index["rejected"]))
        self.handles = {}  # {path: open file}

    def check_files(self):
        """Refuse target files that are not those that fit_pca.py indexed."""
        shards = self.index["shards"]

        def fault(name):
            path = self.folder / name
            if not path.is_file() or tensors_digest(path) != shards[name]:
                return f"{path}: not the targets that index.json names; run fit_pca.py"
            return ""

        check_each([*shards], fault)
        for name in shards:
            # held open: a file that is replaced while this one trains is another one
            self.handles[self.folder / name] = safe_open(self.folder / name, "pt")

    def are_usable(self, row):
        """False if one is of a degenerate picture. SystemExit if they are missing, or of others."""
        if row["id"] not in self.files:
            raise SystemExit(
                f"{row.where}: example {row['id']!r} needs latent targets, which {self.index_file} "
                "does not have; run fit_pca.py on this data file"
            )
        # by content: a picture that was redrawn under its old name is another one
        pictures = [file_digest(path) for path in row["aux_images"]]
        if self.index["pictures"].get(row["id"]) != pictures:
            raise SystemExit(
                f"{row.where}: the auxiliary images of {row['id']!r} are not those that its "
                f"targets in {self.folder} were made from; run fit_pca.py again"
            )
        return row["id"] not in self.rejected

    def read(self, id, n_spans):
        """(n_spans * K, d) of an example. Raises SystemExit if its targets have another shape."""
        path = self.folder / self.files[id]
        # safetensors maps the file: only this example's bytes are read
        v = self.handles[path].get_tensor(id)  # (m, K, d)
        if v.shape != (n_spans, self.K, self.d):
            raise SystemExit(
                f"{path}: targets {tuple(v.shape)} for example {id!r}, expected "
                f"{(n_spans, self.K, self.d)}; run fit_pca.py again"
            )
        check_finite(v, f"{path}: the targets of example {id!r}")
        return v.flatten(0, 1)


def check_same_space(vlm, base, targets, pca_file, pca, meta):
    """Refuse a PCA, targets and base that do not belong together."""
    # latents are read by the decoder as that tower's embeddings
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
    if meta.get("targets") != key_of(targets.index):
        raise SystemExit(f"{pca_file} was fitted on other targets than {targets.index_file} names")
    d = vlm.config.text_config.hidden_size
    if not len(pca["mean"]) == targets.d == d:
        raise SystemExit(f"{pca_file}: vectors of width {len(pca['mean'])}, but {base} has {d}")
    if math.isqrt(targets.K) ** 2 != targets.K or targets.K < 1:
        raise SystemExit(f"{targets.index_file}: K = {targets.K} is not a square")


# --------------------------------------------------------------------------------------------------
# the loss


class GAP(Method):
    """Latents fed and regressed by a head, on the questions that the base fails."""

    reads = ("pca", "difficulty")
    free = ("K",)  # that of the targets, which are compared

    @classmethod
    def check(cls, settings):
        losses = ("mean", "sum", "relative")
        check_choices(settings, latent_loss=losses, rule=RULES)
        check_there(Path(settings["pca"]) / "pca.safetensors")
        check_there(Path(settings["pca"]) / "targets" / "index.json")
        if settings["difficulty"]:
            by = "sample_difficulty.py writes it, --difficulty= trains without"
            check_there(settings["difficulty"], by)

    def __init__(self, vlm, tokenizer, processor, settings):
        super().__init__(vlm, tokenizer, processor, settings)
        self.latent_id = add_latent_tokens(vlm, tokenizer)
        self.pca_file = Path(settings["pca"]) / "pca.safetensors"
        pca, self.meta = load_pca(self.pca_file)
        self.targets = Targets(settings["pca"])
        check_same_space(vlm, settings["base"], self.targets, self.pca_file, pca, self.meta)
        self.targets.check_files()
        self.head = self.new_head(pca)
        settings["K"] = self.targets.K  # what the log says
        self.solved = set()

    def new_head(self, pca):
        """The head of settings["method"] on this PCA: in `generate`, what follows a state."""
        return HEADS[self.settings["method"]](pca, self.targets.K)

    def inputs(self):
        keys = {"pca": tensors_digest(self.pca_file), "targets": key_of(self.targets.index)}
        if self.settings["difficulty"]:
            keys["difficulty"] = key_of(sorted(self.solved))
        return keys

    # --- which rows, and how a row becomes numbers

    def rows(self, examples, training):
        # as fit_pca.py did; each rank makes a share of their digests here
        examples = usable_rows(examples, self.settings["skip_unusable"], ("aux_images",))
        if training and self.settings["difficulty"]:
            counts = read_counts(self.settings["difficulty"])
            base = folder_digest(self.settings["base"])
            self.solved = solved_by(counts, examples, base, self.settings)
        return super().rows(examples, training)

    def change(self, row, training):
        whole = row["response"]
        super().change(row, training)
        # beside a stripped response the whole one, for the first steps
        stripped = row["aux_images"] and not self.keeps_latents(row, training)
        if self.settings["latents_first"] and stripped and self.can_use(row):
            row["at_first"] = whole if self.settings["write_parser"] else strip_parser(whole)

    def keeps_latents(self, row, training):
        return not training or row["id"] not in self.solved

    def keeps_parser(self, row, training):
        if not self.settings["keep_parser"] and not self.keeps_latents(row, training):
            return False
        return super().keeps_parser(row, training)

    def can_use(self, row):
        return self.targets.are_usable(row)

    def encode(self, row):
        response = row["response"]
        if "step" in row and row["step"] < self.settings["latents_first"]:
            response = row.get("at_first", response)
        # the same prompt and spans as at inference, with K pads per span
        example = encode(self.vlm, self.tokenizer, self.processor, row, self.head.K, response)
        return example | {"id": row["id"], "n_spans": response.count(LATENT_SPAN)}

    def counts(self, example):
        # the latent loss has a count of its own: a batch of few spans does not shrink its gradient
        M = example["n_spans"] * self.head.K
        return super().counts(example) | {"latent": M, "norm_predicted": M, "norm_target": M}

    def collate(self, examples):
        # in the order of the pads, row by row
        v = []
        if self.head.K:
            v = [self.targets.read(e["id"], e["n_spans"]) for e in examples if e["n_spans"]]
        latents = torch.cat(v) if v else torch.zeros(0, self.targets.d)  # (M, d)
        return super().collate(examples) | {"latents": latents}

    # --- losses

    def forward(self, batch):
        """Sums of cross-entropy, ||v_hat - v||^2, ||v_hat|| and ||v||.

            L = sum CE / N + lambda * scale * sum ||v_hat - v||^2 / M

        N labels and M latents are those of the whole global batch (`counts`; train.py divides), and
        lambda * scale, which is lambda / d where latent_loss=mean, is of `weights`.

        The state at <|latent_start|> predicts latent 1, the state at latent i latent i + 1: h is
        taken one position before each pad.
        """
        v = batch["latents"]  # (M, d)
        before = batch["ids"][:, 1:] == self.latent_id  # (B, T - 1): states before a latent
        h = self.states(batch, self.fed(batch, before))  # (B, T - 1, d)
        ce = self.cross_entropy(h, batch)
        if not len(v):
            zero = ce.new_zeros(())
            ce = ce + idle(self.head)
            return {"ce": ce, "latent": zero, "norm_predicted": zero, "norm_target": zero}
        h_bar = h[before]  # (M, d)
        with torch.no_grad():  # logged, not trained
            norm_predicted = self.head(h_bar).float().norm(dim=-1).sum()
            norm_target = v.float().norm(dim=-1).sum()
        return {
            "ce": ce,
            "latent": self.head.squared_error(h_bar, v).sum(),
            "norm_predicted": norm_predicted,
            "norm_target": norm_target,
        }

    def fed(self, batch, before):
        """What stands at the latents in training (M, d)."""
        v = batch["latents"]
        if not self.head.targets_fed:  # a control's own vector, whatever v is
            return self.head(v)
        # not in validation, whose numbers are of one forward whatever the setting
        if self.settings["scheduled_sampling"] and torch.is_grad_enabled():
            # every latent of every step, and no gradient through what is fed [ours];
            # on every rank, with latents or not: FSDP gathers the decoder twice
            with torch.no_grad():
                return self.head(self.states(batch, v)[before])
        return v  # teacher forcing: one forward trains all latents at once

    def latent_scale(self):
        """What makes L_latent of the mean of ||v_hat - v||^2: 1/d, 1, or 1/variance of targets."""
        # at 7B the sum over d is of the order of 1,000 against a cross-entropy of 1
        d = self.head.basis.shape[0]
        scales = {"mean": 1 / d, "sum": 1.0, "relative": 1 / self.head.total_variance}
        return scales[self.settings["latent_loss"]]

    def weights(self, step, total):
        # what is not fed in training is no target either
        lambda_latent = self.settings["lambda_latent"] if self.head.targets_fed else 0.0
        return {"ce": 1.0, "latent": lambda_latent * self.latent_scale()}

    def report(self, means):
        if "latent" not in means:
            return means
        # logged whatever latent_loss is: 1 - R^2 means the same on every tower
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

    def save(self, folder, trained):
        """latent_head.safetensors, what `generate` asks for the next latent.

        It also says where the bank lies that its latents can be looked at with: now, and from the
        folder, as both may be moved together.
        """
        bank = self.pca_file.with_name("bank.safetensors").resolve()
        # `folder` is one that is renamed to `out` once it is whole
        beside = os.path.relpath(bank, Path(self.settings["out"]).resolve())
        meta = self.meta | {"bank": str(bank), "bank_beside": beside}
        save_head(folder, self.head, head_of(trained), meta)
