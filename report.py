"""What do the numbers of the ablations carry? Statistics over seeds, tables, verdicts on claims.

ablate.py hands over the lines of its runs as a `Study`; `write_tables` makes <results>.md of them,
from these lines alone. Nothing is run here, and nothing is random.

Two runs a and b are compared in two ways, which stand beside each other in every table:
- the difference of their accuracies, paired by seed, with a t-interval: would other seeds agree?
- McNemar's test on their answers to the same questions: would other questions agree?

`what` names a run ("GAP") or one of its evaluations ("GAP/noise"). A star in it stands for the size
that the study looks at closely: "GAP*" is the run "GAP n=1000".
"""

import itertools
import math
import statistics
from typing import NamedTuple

from data import write_then_rename
from intervals import holm, mcnemar, t_test

# --------------------------------------------------------------------------------------------------
# the tables: what is compared with what, what the paper has for it, and what one expects


class Table(NamedTuple):
    """A table of accuracies. Those whose column begins with "7B" test the paper's own findings."""

    title: str
    column: str  # heading of the last column
    rows: dict  # {what: its cell in the last column}, where the paper has a number that number
    reference: str  # the run that all rows are held against
    claims: list  # (text, more, less, measure = "hard"): `more` beats `less` on these questions
    logged: tuple = (("R2", "val_r2"),)  # columns of the last validation: heading, field


# fmt: off
ALIGNED = (("cosine", "val_cosine"), ("rollout error", "val_rollout_error"))
DIVERGED = (("KL(q, p)", "val_kl_forward"), ("KL(p, q)", "val_kl_reverse"),
            ("right, posterior", "val_right_posterior"), ("right, prior", "val_right_prior"))
TABLES = {"main": [
    Table("All systems", column="what is fed, and on which questions", reference="LH+PCA", rows={
        "base":   "nothing",
        "text":   "nothing",
        "output": "the state; all",
        "LH":     "full head; all",
        "LH+DA":  "full head; those that the base fails",
        "LH+PCA": "PCA head; all",
        "GAP":    "PCA head; those that the base fails",
        "VaLR":   "the state, aligned inside; all, a picture a move",
        "AMVL":   "slots before the answer, which no picture supervises; all",
    }, claims=[
        ("the PCA head beats the full one",            "LH+PCA", "LH"),
        ("the PCA head beats it with difficulty-aware data", "GAP", "LH+DA"),
        ("a full head beats output-as-input",          "LH",     "output"),
        ("the PCA head beats output-as-input",         "LH+PCA", "output"),
        ("difficulty-aware data helps the full head",  "LH+DA",  "LH"),
        ("difficulty-aware data helps the PCA head",   "GAP",    "LH+PCA"),
        ("GAP beats dense-caption SFT",                "GAP",    "text"),
        ("VaLR beats dense-caption SFT",               "VaLR",   "text"),
        ("AMVL beats dense-caption SFT",               "AMVL",   "text"),
        ("the PCA head beats VaLR",                    "LH+PCA", "VaLR"),
        ("the PCA head beats AMVL",                    "LH+PCA", "AMVL"),
    ]),
    Table("What is left without what the latents say", column="", reference="LH+PCA", rows={
        "text":    "the same data without spans",
        "markers": "trained so: a span opens and ends at once",
        "dummy":   "trained so: one learned vector in place of each latent",
        **{f"{name}{kind}": what for name in ("output", "LH", "LH+DA", "LH+PCA", "GAP", "VaLR")
           for kind, what in (("", ""), ("/markers", "the span ends at once"),
                              ("/mean", "mu in place of each latent"),
                              ("/noise", "noise of the same length"),
                              ("/shuffle", "another example's latents"))
           if not (name == "VaLR" and kind == "/mean")},
        "AMVL":         "",
        "AMVL/zero":    "no slots",
        "AMVL/noise":   "noise of the same length",
        "AMVL/shuffle": "another example's slots",
    }, claims=[
        ("markers alone beat text",             "markers", "text"),
        ("a dummy beats text",                  "dummy",   "text"),
        ("latents beat markers",                "LH+PCA",  "markers"),
        ("latents beat a dummy",                "LH+PCA",  "dummy"),
        *((f"{name}: its own latents beat another example's", name, f"{name}/shuffle")
          for name in ("output", "LH", "LH+DA", "LH+PCA", "GAP", "VaLR", "AMVL")),
        *((f"{name}: its own latents beat noise", name, f"{name}/noise")
          for name in ("output", "LH", "LH+DA", "LH+PCA", "GAP", "VaLR", "AMVL")),
    ]),
    Table("The real auxiliary features in place of the latents", column="", reference="LH+PCA",
          rows={what: "" for name in ("output", "LH", "LH+DA", "LH+PCA", "GAP")
                for what in (name, f"{name}/oracle")},
          claims=[(f"better latents would help {name}", f"{name}/oracle", name)
                  for name in ("output", "LH", "LH+DA", "LH+PCA", "GAP")]),
    # fewer spans to learn from, or the questions that have none: which of the two costs?
    Table("What difficulty-aware data costs, and what mends it",
          column="questions with latents", reference="GAP", rows={
        "LH+PCA":         "all",
        "LH+PCA n=1500":  "all: as many spans as GAP, easy and hard",
        "GAP":            "those that the base fails",
        "GAP n=4000":     "the same of more: about as many spans as LH+PCA",
        "easy 10%":       "these, and a tenth of the others",
        "easy 25%":       "these, and a quarter of the others",
        "first 300":      "all in the first quarter of the steps, then as GAP",
        "parser dropped": "as GAP; the others have no parser text",
    }, claims=[
        ("as many spans of easy and hard questions teach more than those of hard ones",
            "LH+PCA n=1500", "GAP"),
        ("more questions mend it",                      "GAP n=4000",     "GAP"),
        ("a tenth of the easy questions mends it",      "easy 10%",       "GAP"),
        ("a quarter of the easy questions mends it",    "easy 25%",       "GAP"),
        ("a first phase with latents everywhere mends it", "first 300",   "GAP"),
        ("the parser text of the others helps",         "GAP",            "parser dropped"),
        ("mended so, GAP is ahead of latents everywhere", "easy 25%",     "LH+PCA"),
        ("mended so, GAP is ahead of it, all questions",  "easy 25%",     "LH+PCA", "all"),
    ]),
], "gap": [
    Table("Main table", column="7B: Avg-P, Avg-R", reference="GAP", rows={
        "base":       "57.66, 52.62",
        "text":       "59.40, 47.24",
        "output":     "Monet 59.58, 47.99; LVR 60.75, 47.66",
        "output/EMA": "",
        "LH":         "59.03, 49.15",
        "LH+DA":      "59.68, 50.05",
        "LH+PCA":     "60.40, 52.48",
        "GAP":        "61.32, 53.97",
    }, claims=[
        ("GAP beats the base",                         "GAP",        "base"),
        ("GAP beats dense-caption SFT",                "GAP",        "text"),
        ("GAP beats output-as-input",                  "GAP",        "output"),
        ("GAP beats LH",                               "GAP",        "LH"),
        ("difficulty-aware data helps the full head",  "LH+DA",      "LH"),
        ("the PCA head helps without it",              "LH+PCA",     "LH"),
        ("the PCA head helps with it",                 "GAP",        "LH+DA"),
        ("difficulty-aware data helps the PCA head",   "GAP",        "LH+PCA"),
        ("EMA calibration helps output-as-input",      "output/EMA", "output"),
        ("difficulty-aware data helps the full head, all questions", "LH+DA", "LH", "all"),
        ("difficulty-aware data helps the PCA head, all questions", "GAP", "LH+PCA", "all"),
    ]),
    Table("Retained variance (here without difficulty-aware data)",
          column="7B: Avg-3", reference="LH+PCA", rows={
        "LH":            "67.40",
        "retained 85%":  "67.63",
        "retained 90%":  "67.69",
        "LH+PCA":        "69.22",
        "retained 99%":  "",
        "wide head":     "",
        "wide head 99%": "",
    }, claims=[
        ("95 % beats 85 %",          "LH+PCA",       "retained 85%"),
        ("95 % beats 90 %",          "LH+PCA",       "retained 90%"),
        ("85 % beats the full head", "retained 85%", "LH"),
    ]),
    # zero and noise are the paper's: what is left of the gain without what the latents say?
    Table("Interventions on GAP's latents", column="7B: mean of two", reference="GAP*", rows={
        "base":            "68.31",
        "text*":           "68.79",
        "GAP*/zero":       "70.33",
        "GAP*/noise":      "69.69",
        "GAP*":            "72.13",
        "GAP*/mean":       "",
        "GAP*/shuffle":    "",
        "GAP*/oracle":     "",
        "GAP*/oracle_pca": "",
    }, claims=[
        ("clean beats noise",            "GAP*",      "GAP*/noise"),
        ("clean beats zero",             "GAP*",      "GAP*/zero"),
        ("zero beats noise",             "GAP*/zero", "GAP*/noise"),
        ("zero beats dense-caption SFT", "GAP*/zero", "text*"),
    ]),
    # an upper bound: what would latents be worth that predicted their picture without an error?
    Table("The real auxiliary features in place of the latents",
          column="", reference="GAP", rows={
        "output/oracle": "",
        "LH/oracle":     "",
        "LH+DA/oracle":  "",
        "LH+PCA/oracle": "",
        "GAP":           "",
        "GAP/oracle":    "",
    }, claims=[
        ("better latents would help GAP",             "GAP/oracle",    "GAP"),
        ("better latents would help LH+PCA",          "LH+PCA/oracle", "LH+PCA"),
        ("GAP reads real features as well as LH+PCA", "GAP/oracle",    "LH+PCA/oracle"),
    ]),
    # pooled to more latents than it has cells, a picture only repeats them: hence resize K=16
    Table("Latent budget (the toy's picture has four cells: 36 is too many; "
          "here without difficulty-aware data)",
          column="7B: Avg-3 at 0, 4, 16, 36, 64, 144", reference="LH+PCA", rows={
        "text":        "66.03",
        "K=1":         "",
        "LH+PCA":      "67.56",
        "K=9":         "",
        "K=16":        "69.11",
        "resize K=16": "",
        "K=36":        "69.22; 64: 68.68; 144: 67.91",
        "LH":          "",
        "LH K=16":     "",
        "LH K=36":     "",
    }, claims=[
        ("four latents beat none", "LH+PCA", "text"),
        ("four beat one",          "LH+PCA", "K=1"),
        ("too many cost",          "LH+PCA", "K=36"),
    ]),
    # a gain over LH could come of fewer weights or of any small subspace: a control for each
    Table("Controls that the paper lacks (without difficulty-aware data)",
          column="what differs from LH+PCA", reference="LH+PCA", rows={
        "LH+PCA":             "",
        "random basis":       "a random orthonormal basis of the same k",
        "no mean":            "mu = 0",
        "matched full head":  "d -> m -> d with as many weights as the PCA head",
        "LH":                 "d -> d -> d",
        "wide head":          "c = P_k^T h + an MLP d -> d -> k",
        "frozen linear head": "c = P_k^T h, nothing trained in it",
    }, claims=[
        ("the PCA basis beats a random one",                  "LH+PCA", "random basis"),
        ("the mean helps",                                    "LH+PCA", "no mean"),
        ("the PCA head beats a full head of as many weights", "LH+PCA", "matched full head"),
        ("training the head helps",                           "LH+PCA", "frozen linear head"),
        ("at the full head's capacity, the subspace helps",   "wide head", "LH"),
        ("the same with 99 % of the variance",                "wide head 99%", "LH"),
        ("a full head beats output-as-input",                 "LH",     "output"),
        ("with 500 examples a full head beats output-as-input", "LH n=500", "output n=500"),
        ("with 16 latents the PCA head beats the full one",   "K=16",   "LH K=16"),
        ("with 36 latents the PCA head beats the full one",   "K=36",   "LH K=36"),
        ("16 latents of a larger picture beat four cells repeated", "resize K=16", "K=16"),
    ]),
    # tau also changes how many spans are trained on: "GAP n=500" has about as many as LH+PCA
    Table("Which questions get latents", column="", reference="GAP", rows={
        "GAP":            "tau = 0",
        "guess-aware":    "tau = 1/8 here",
        "tau=0.25":       "",
        "tau=0.5":        "",
        "LH+PCA":         "tau = 1: all",
        "parser dropped": "of the stripped examples",
        "GAP n=500":      "tau = 0, about as many latent spans as LH+PCA",
    }, claims=[
        ("the guess-aware rule beats tau = 0", "guess-aware", "GAP"),
        ("the guess-aware rule beats tau = 0 on the easy questions", "guess-aware", "GAP", "easy"),
        ("keeping the parser text helps",      "GAP",         "parser dropped"),
        ("with as many latent spans, GAP is ahead of latents everywhere", "GAP n=500", "LH+PCA"),
    ]),
    Table("Training choices (without difficulty-aware data)",
          column="", reference="LH+PCA", rows={
        "LH+PCA":              "lambda = 1, pool, teacher forcing",
        "lambda=0.1":          "",
        "lambda=10":           "",
        "scheduled sampling":  "",
        "no parser text":      "neither in training nor after",
        "GAP*":                "",
        "GAP*/parser skipped": "at inference only",
    }, claims=[
        ("lambda = 1 beats 0.1",     "LH+PCA",             "lambda=0.1"),
        ("lambda = 1 beats 10",      "LH+PCA",             "lambda=10"),
        ("scheduled sampling helps", "scheduled sampling", "LH+PCA"),
        ("the parser text helps",    "LH+PCA",             "no parser text"),
        ("a model trained with the parser text needs it at inference",
                                     "GAP*",               "GAP*/parser skipped"),
    ]),
], "valr": [
    Table("VaLR and its stage-1 model", column="7B: VSI-Bench, BLINK, V*",
          reference="VaLR", logged=ALIGNED, rows={
        "stage 1":    "",
        "text":       "",
        "lambda=0":   "34.0, 57.1, 75.9",
        "lambda=0.5": "41.5, 63.1, 86.4",
        "VaLR":       "lambda 2 here; 1: 40.0, 60.9, 84.3",
    }, claims=[
        ("VaLR beats its stage-1 model",           "VaLR",     "stage 1"),
        ("VaLR beats more training as text",       "VaLR",     "text"),
        ("VaLR beats latents without alignment",   "VaLR",     "lambda=0"),
        ("latents without alignment beat text",    "lambda=0", "text"),
        ("at lambda = 0.5 alignment beats none",   "lambda=0.5", "lambda=0"),
    ]),
    Table("Latents a step, the block that is aligned, and the rollout",
          column="7B: BLINK, V* at K = 1, 4, 16; at block 4, 12, 27", reference="VaLR",
          logged=ALIGNED, rows={
        "VaLR":             "K 58.6, 78.0; block 12 (and K 16): 63.1, 86.4",
        "K=4":              "62.0, 85.3",
        "block 1":          "4: 59.2, 83.8",
        "block 4":          "27: 62.8, 85.3",
        "one pass":         "",
        "stopped gradient": "",
    }, claims=[
        ("four latents a step beat one",                   "K=4",  "VaLR"),
        ("the second block beats the first",               "VaLR", "block 1"),
        ("the second block beats the last",                "VaLR", "block 4"),
        ("an exact rollout beats one pass",                "VaLR", "one pass"),
        ("gradients through what is fed help",             "VaLR", "stopped gradient"),
    ]),
    Table("Interventions on VaLR's latents", column="", reference="VaLR", logged=(), rows={
        "VaLR":         "",
        "VaLR/zero":    "no span opens",
        "VaLR/noise":   "",
        "VaLR/shuffle": "another example's",
    }, claims=[
        ("clean beats noise",       "VaLR", "VaLR/noise"),
        ("clean beats shuffled",    "VaLR", "VaLR/shuffle"),
        ("clean beats no span",     "VaLR", "VaLR/zero"),
    ]),
], "amvl": [
    Table("AMVL's objectives", column="7B: V*, HRBench4K, HRBench8K", reference="AMVL",
          logged=DIVERGED, rows={
        "base":       "76.44, 68.00, 63.75",
        "text":       "",
        "NTP":        "81.15, 70.50, 67.38",
        "+ forward":  "82.72, 72.12, 67.75",
        "+ reverse":  "82.20, 71.75, 67.25",
        "gamma=1e-6": "",
        "AMVL":       "84.29, 72.12, 68.50",
        "gamma=1e-5": "",
    }, claims=[
        ("AMVL beats next tokens alone",     "AMVL",      "NTP"),
        ("the forward term helps",           "+ forward", "NTP"),
        ("the reverse term helps",           "+ reverse", "NTP"),
        ("the reverse term helps beside it", "AMVL",      "+ forward"),
        ("AMVL beats text",                  "AMVL",      "text"),
        ("the reverse term closes the leakage gap", "+ forward", "AMVL", "val_leakage"),
    ]),
    Table("Interventions on AMVL's slots", column="", reference="AMVL", logged=(), rows={
        "AMVL":         "the prior's mean",
        "AMVL/zero":    "no slots",
        "AMVL/noise":   "",
        "AMVL/shuffle": "another example's",
    }, claims=[
        ("clean beats noise",    "AMVL", "AMVL/noise"),
        ("clean beats shuffled", "AMVL", "AMVL/shuffle"),
    ]),
]}
# fmt: on

# --------------------------------------------------------------------------------------------------
# what a table reads of the lines


class Study(NamedTuple):
    """The runs that are reported, and what the tables must know of how they were made."""

    name: str  # of TABLES
    lines: dict  # {run: {seed: its line in <results>.jsonl}}
    methods: tuple  # the main runs, trained on `examples` examples
    sizes: tuple  # further numbers of examples that they are trained on; such a run is "GAP n=500"
    examples: int  # 0: all
    star: str  # what a star in a run's name stands for: " n=1000", or "" for the main size
    easy: str  # the category that needs no latents, reported apart; "" for none
    train_args: str

    def seeds_each(self):
        """Seeds of most runs."""
        return statistics.mode(len(by_seed) for by_seed in self.lines.values())

    def named(self, what):
        """A run or evaluation with its star filled in."""
        return what.replace("*", self.star)


def run_and_evaluation(what):
    """("GAP", "noise") of "GAP/noise"; an evaluation that is not named is the clean one."""
    name, _, kind = what.partition("/")
    return name, kind or "clean"


def right(line, kind, measure, easy):
    """Right (1) and wrong (0) answers of an evaluation, in the test set's order within a category.

    `measure` picks the questions: hard, easy, all, or a category by its name.
    """
    answers = []
    # {category: (how many questions, their bits as one hexadecimal number)}
    for category, (n, digits) in line["evals"][kind]["right"].items():
        group = "easy" if category == easy else "hard"
        if measure in (category, group, "all"):
            bits = f"{int(digits, 16):0{n}b}"  # a bit a question, leading zeros kept
            answers += [int(bit) for bit in bits]
    return answers


def value(line, kind, measure, easy):
    """One number of a line, or None where it has no such number.

    `measure` is a mean cost of the evaluation (tokens, latents), an accuracy (hard, easy, all, or a
    category), or a path into the line (val_r2, probe.real.cosine).
    """
    evaluation = line["evals"].get(kind)
    if evaluation:
        if measure in evaluation:  # a mean cost
            return evaluation[measure]
        answers = right(line, kind, measure, easy)
        if answers:
            return sum(answers) / len(answers)
    found = line  # what is left is a path from the top of the line
    for field in measure.split("."):
        # a run that was not probed has nothing on the way there
        found = found.get(field) if found else None
    return found


def values(study, what, measure="hard"):
    """{seed: number} of a run or of one of its evaluations, without seeds that lack the number."""
    name, kind = run_and_evaluation(what)
    numbers = {}
    for seed, line in study.lines.get(name, {}).items():
        number = value(line, kind, measure, study.easy)
        if number is not None:
            numbers[seed] = number
    return numbers


# --------------------------------------------------------------------------------------------------
# statistics over seeds

# Student's t, two-sided 95 %, for 1 to 9 degrees of freedom; the last one serves for more, too,
# which makes the interval of more than ten seeds a little too wide, never too narrow
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Difference(NamedTuple):
    """Of two runs, paired by seed: the mean of a - b, its 95 % t-interval and p over seeds."""

    mean: float
    low: float
    high: float
    seeds: int
    p: float


def mean_interval(x):
    """The mean of a few numbers, one a seed, and its 95 % t-interval; infinitely wide for one."""
    mean = sum(x) / len(x)
    # one seed says nothing of what another would give
    if len(x) == 1:
        return mean, -math.inf, math.inf
    freedom = len(x) - 1
    t = T975[min(freedom, len(T975)) - 1]
    half = t * statistics.stdev(x) / math.sqrt(len(x))
    return mean, mean - half, mean + half


def difference(study, a, b, measure="hard"):
    """The Difference a - b, over the seeds that both have; None where there is no such seed."""
    of_a, of_b = values(study, a, measure), values(study, b, measure)
    seeds = sorted(of_a.keys() & of_b.keys())
    if not seeds:
        return None
    # what a seed does to both runs, such as the order of the data, cancels
    gaps = [of_a[seed] - of_b[seed] for seed in seeds]
    return Difference(*mean_interval(gaps), len(gaps), t_test(gaps))


def paired_p(study, a, b):
    """McNemar's p of the answers to the hard questions, those of all common seeds together."""
    (name_a, kind_a), (name_b, kind_b) = run_and_evaluation(a), run_and_evaluation(b)
    lines_a, lines_b = study.lines[name_a], study.lines[name_b]
    # a question counts once a seed: each seed's model has answered it anew
    answers_a, answers_b = [], []
    for seed in sorted(lines_a.keys() & lines_b.keys()):
        answers_a += right(lines_a[seed], kind_a, "hard", study.easy)
        answers_b += right(lines_b[seed], kind_b, "hard", study.easy)
    return mcnemar(answers_a, answers_b)


def verdicts(differences):
    """Does each claim that a - b > 0 hold here? Of all read together, so with Holm's correction."""
    made = [d for d in differences if d]
    adjusted = iter(holm([d.p for d in made]))
    words = []
    for d in differences:
        if d is None:
            words.append("not run yet")
        elif next(adjusted) >= 0.05:
            words.append("undecided")
        else:
            words.append("yes" if d.mean > 0 else "no")
    return words


TELLS = (
    0.05  # a difference of accuracies that a study should tell, at p < .05 in four of five tries
)


def power(study):
    """In words: how many seeds tell a difference of TELLS, by the spread of the seeds there are."""
    spread, freedom, chance = 0.0, 0, []
    for name in study.lines:
        x = list(values(study, name).values())
        if len(set(x)) > 1:
            spread += statistics.variance(x) * (len(x) - 1)
            freedom += len(x) - 1
            first = next(iter(study.lines[name].values()))
            n = len(right(first, "clean", "hard", study.easy))
            p = sum(x) / len(x)
            chance.append(p * (1 - p) / n)
    if not freedom:
        return "One seed each: how far seeds differ is not known."
    sd = math.sqrt(spread / freedom)
    questions = math.sqrt(sum(chance) / len(chance))

    def told(seeds):
        """The difference of two runs that so many seeds tell."""
        # standard errors: the two-sided 5 % of t, and 80 % of it (.98 to .84, by the seeds)
        return sd * math.sqrt(2 / seeds) * (T975[min(seeds - 1, len(T975)) - 1] + 0.9)

    here = max(2, study.seeds_each())
    enough = next(n for n in itertools.count(2) if told(n) <= TELLS)
    return (
        f"Seeds of a run differ by a standard deviation of {sd:.3f} (over {freedom} degrees of "
        f"freedom; {questions:.3f} of it is the number of questions), so that a difference of "
        f"{TELLS} is told in four of five tries by {enough} seeds a run, and by {here} seeds one "
        f"of {told(here):.2f}."
    )


# --------------------------------------------------------------------------------------------------
# numbers as text


def shown(d):
    """A Difference with its interval; nothing for None."""
    if d is None:
        return ""
    if d.seeds == 1:
        return f"{d.mean:+.3f} (one seed)"
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def each_seed(numbers, digits=2):
    """{seed: accuracy} as the mean, and in brackets every seed's: "0.537 (.51 .55)"."""
    x = list(numbers.values())
    text = mean_sd(dict(enumerate(x))).partition(" ")[0]
    if len(set(x)) > 1:
        shown = [f"{v:.{digits}f}".removeprefix("0") for v in x]
        text += f" ({' '.join(shown)})"
    return text


def mean_sd(numbers, digits=3):
    """{seed: number} as mean ± standard deviation: the mean alone where all are equal."""
    x = list(numbers.values())
    if not x:
        return ""
    text = f"{sum(x) / len(x):.{digits}f}"
    # one seed, or a count that no seed changes: "± 0.000" would say nothing
    if len(set(x)) > 1:
        text += f" ± {statistics.stdev(x):.{digits}f}"
    return text


def markdown(head, rows):
    """A table as lines, a blank one before and after it."""
    rule = ["---"] * len(head)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, rule, *rows]]
    return ["", *lines, ""]


def not_run(names):
    """The line that names what a table lacks, and a blank one; nothing if it lacks nothing."""
    return [f"Not run yet: {', '.join(names)}.", ""] if names else []


def sentences(study, claims, paper):
    """One sentence over claims (text, more, less, measure), then a line for each that was run.

    `paper` tells the paper's findings from our own expectations.
    """
    found = [(text, difference(study, more, less, measure)) for text, more, less, measure in claims]
    words = verdicts([d for _, d in found])
    yes, no, undecided, absent = map(words.count, ("yes", "no", "undecided", "not run yet"))
    if paper:
        whole = (
            f"The toy agrees with the paper on {yes} of {len(claims)} findings, disagrees on {no}"
        )
    else:
        whole = f"Of {len(claims)} expectations {yes} hold here, {no} do not"
    whole += f"; {undecided} undecided"
    if absent:
        whole += f", {absent} not run yet"
    # what was not run is counted above and not listed
    each = [
        f"- {text}: **{word}**, {shown(d)}, seeds: {d.seeds}"
        for (text, d), word in zip(found, words)
        if d
    ]
    return [whole + ".", "", *each]


# --------------------------------------------------------------------------------------------------
# the sections of the report, each a list of lines

PCA_AGAINST_FULL = (("GAP", "LH+DA"), ("LH+PCA", "LH"))  # with difficulty-aware data, and without


def scores(study, table):
    """A section of TABLES: accuracies, differences to the reference, verdicts on its claims."""
    reference = study.named(table.reference)
    cells, absent = [], []
    for starred, last in table.rows.items():
        what = study.named(starred)
        name, _ = run_and_evaluation(what)
        if name not in study.lines:
            absent.append(what)
            continue
        # what was logged is the run's: an evaluation shows that of its run
        hard = each_seed(values(study, what))
        measures = ["easy", *(field for _, field in table.logged)]
        numbers = [hard, *(mean_sd(values(study, what, measure)) for measure in measures)]
        # the reference against itself, or runs without a common seed: no difference, and no test
        d = difference(study, what, reference) if what != reference else None
        p = p_shown(paired_p(study, what, reference)) if d else ""
        cells.append([what, len(study.lines[name]), *numbers, shown(d), p, last])
    easy = study.easy or "easy"
    logged = [heading for heading, _ in table.logged]
    head = ["run", "seeds", "hard", easy, *logged, f"hard, minus {reference}", "p", table.column]

    # the hard questions, where the claim names no others: only these need latents
    claims = []  # with the star filled in, and the questions
    for text, more, less, *measure in table.claims:
        claims.append((text, study.named(more), study.named(less), *(measure or ["hard"])))
    return [
        "",
        f"## {table.title}",
        *markdown(head, cells),
        *not_run(absent),
        *sentences(study, claims, table.column.startswith("7B")),
    ]


def p_shown(p):
    """A p-value to two digits."""
    return f"{p:.2g}" if p > 1e-99 else "< 1e-99"


# fmt: off
DIAGNOSED = ("base", "text", "output", "LH", "LH+DA", "LH+PCA", "GAP")
DIAGNOSIS_HEAD = [
    "run", "text state / input", "image state / input", "log norm of latents", "of real features",
    "in the subspace", "effective rank", "pairwise cosine", "R2", "retrieval at 1 (chance)",
]
# measured on Monet-7B and HRBench4K, and before the final norm only; the norm of latents is GAP's
DIAGNOSIS_OF_PAPER = ["paper, 7B", "546; -", "8.7; -", "3.53", "3.94 (query)", "1", "", "", "", ""]
DIAGNOSIS_CLAIMS = [
    ("GAP's latents lie deeper in the subspace than the full head's",
        "GAP", "LH+DA", "probe.predicted.inside"),
    ("GAP's latents find their own picture more often",
        "GAP", "LH+DA", "probe.agreement.retrieval_at_1"),
    ("output-as-input latents are longer than GAP's",
        "output", "GAP", "probe.predicted.mean_log"),
]
# fmt: on


def diagnosis(study):
    """The paper's Fig. 2 in numbers, from probe.py."""
    rows = [diagnosis_row(study, name) for name in DIAGNOSED]
    return [
        "## Diagnosis",
        "",
        "Norms as multiples of the input embeddings' before and after the final norm; natural "
        "logarithms of L2 norms; the share of the latents' energy in the PCA subspace; rank and "
        "cosine of an example's latents about mu (in brackets: of the real features).",
        *markdown(DIAGNOSIS_HEAD, [*rows, DIAGNOSIS_OF_PAPER]),
        *sentences(study, DIAGNOSIS_CLAIMS, paper=True),
        "",
    ]


def diagnosis_row(study, name):
    """The cells of one run under DIAGNOSIS_HEAD; empty where the run writes no latents."""

    # a path is that of a number in probe.json
    def cell(path, digits):
        return mean_sd(values(study, name, f"probe.{path}"), digits)

    def growth(kind):
        # output-as-input feeds what comes after the final norm, so both are shown
        before, after = cell(f"growth.{kind}.before", 1), cell(f"growth.{kind}.after", 1)
        return f"{before}; {after}"

    def beside(path, other, digits):
        text = cell(path, digits)
        return f"{text} ({cell(other, digits)})" if text else ""

    return [
        name,
        growth("text"),
        growth("image"),
        cell("predicted.mean_log", 2),
        cell("real.mean_log", 2),
        cell("predicted.inside", 3),
        beside("predicted.effective_rank", "real.effective_rank", 2),
        beside("predicted.cosine", "real.cosine", 2),
        cell("agreement.r2", 3),
        beside("agreement.retrieval_at_1", "agreement.chance", 3),
    ]


CHAINS = ("text", "output", "LH", "LH+DA", "LH+PCA", "GAP", "VaLR", "AMVL")


def by_category(study):
    """Longer chains feed back more of their own latents: does the subspace stop the drift?"""
    found = set()
    # whatever categories the test set has: the report knows none by name
    for name in CHAINS:
        for line in study.lines.get(name, {}).values():
            found |= line["evals"]["clean"]["right"].keys()
    categories = sorted(found)  # on the toy: the number of moves
    there = [name for name in CHAINS if name in study.lines]
    rows = [[name, *(mean_sd(values(study, name, c)) for c in categories)] for name in there]
    claims = [
        (f"{pca} beats {full} on {category}", pca, full, category)
        for pca, full in PCA_AGAINST_FULL
        for category in categories
    ]
    return [
        "## Longer chains",
        *markdown(["run", *categories], rows),
        *sentences(study, claims, paper=False),
    ]


DRIFTING = ("output", "LH", "LH+DA", "LH+PCA", "GAP")


def drift(study):
    """Does the subspace stop the drift? R2 of the latents by their place in the longest chains."""
    rows, claims = [], []
    for name in DRIFTING:
        chains = [line["probe"].get("along") for line in study.lines.get(name, {}).values()]
        chains = [chain for chain in chains if chain]
        for kind, title in (("own", "its own latents"), ("forced", "the real ones")):
            places = zip(*(chain[kind] for chain in chains))
            means = [f"{statistics.fmean(place):.2f}" for place in places]
            if means:
                rows.append([f"{name}, fed {title}", *means])
        if chains:
            claims.append((name, f"{name} loses by its own latents"))
    if not rows:
        return []
    each = []
    gaps = [drift_of(study, name) for name, _ in claims]
    for (_, text), d, word in zip(claims, gaps, verdicts(gaps)):
        each.append(f"- {text}: **{word}**, R2 {shown(d)} at the last place, seeds: {d.seeds}")
    return [
        "",
        "## Drift along the chain",
        "",
        "R2 of the i-th latent against its real feature, of the questions with most latents: fed "
        "with the latents that the model wrote before it, and with the real ones.",
        *markdown(["run", *range(1, len(rows[0]))], rows),
        *each,
    ]


def drift_of(study, name):
    """What its own latents cost at the last place: R2 when fed real ones minus R2 of its own."""
    gaps = []
    for line in study.lines[name].values():
        chain = line["probe"].get("along")
        if chain:
            gaps.append(chain["forced"][-1] - chain["own"][-1])
    return Difference(*mean_interval(gaps), len(gaps), t_test(gaps))


# fmt: off
EDITED = ("text", "output", "LH", "LH+DA", "LH+PCA", "GAP", "VaLR", "AMVL")
EDIT_KINDS = (
    ("start", "another start"), ("move", "another move"), ("piece", "another piece under the dot"),
    ("elsewhere", "another piece elsewhere"),
)
# fmt: on


def edits(study):
    """Do latents and answers follow an edit of the input? From edits.py."""
    there = [name for name in EDITED if values(study, name, "edits.start.followed")]
    if not there:
        return []

    def cells(name, measure):
        return [
            mean_sd(values(study, name, f"edits.{kind}.{measure}"), 2) for kind, _ in EDIT_KINDS
        ]

    lines = [
        "",
        "## Edits of the input",
        "",
        "Pairs of questions that differ in one thing. *Followed*: the share of pairs whose answers "
        "change with the right answer, or stay with it. *Cosine* of the two questions' latents: 1 "
        "where they are blind to the edit. *Own*: the share of latents nearer to their own "
        "picture's features than to the other question's, where the two differ; chance is .5.",
    ]
    for measure, title in (("followed", "followed"), ("cosine", "cosine"), ("own", "own")):
        rows = [[name, *cells(name, measure)] for name in there]
        rows = [row for row in rows if any(row[1:])]
        if rows:
            lines += markdown([title, *(words for _, words in EDIT_KINDS)], rows)[:-1]
    return lines


# fmt: off
COSTS = (
    "text", "output", "LH", "LH+PCA", "GAP",
    "K=1", "K=9", "K=16", "K=36", "GAP*/parser skipped", "no parser text",
)
COSTS_HEAD = [
    "run", "steps a second, ratio", "time an answer, ratio", "positions an answer",
    "of them latents",
]
# fmt: on


def costs(study):
    """Speed against the text run of the same seed; tokens and latents an answer."""
    rows = []
    for starred in COSTS:
        what = study.named(starred)
        name, kind = run_and_evaluation(what)
        # no line for what was not run: the tables of accuracies name it
        if name not in study.lines:
            continue
        speed = time = ""
        if kind == "clean":  # of a run's evaluations only this one is timed
            speed = mean_sd(ratio_to_text(study, name, "steps_per_s"), 2)
            time = mean_sd(ratio_to_text(study, name, "ms_per_answer"), 2)
        tokens, latents = (mean_sd(values(study, what, m), 1) for m in ("tokens", "latents"))
        rows.append([what, speed, time, tokens, latents])
    return [
        "## Cost",
        "",
        "Ratios to dense-caption SFT of the same seed, one question at a time, in seconds on a "
        "shared machine: the counts are exact, the ratios are not. "
        "Paper: 36 latents take 1.61 times as long.",
        *markdown(COSTS_HEAD, rows),
    ]


def ratio_to_text(study, name, field):
    """{seed: a number of a run, divided by that of the text run of the same seed}."""
    text = study.lines.get("text", {})
    return {
        seed: line[field] / text[seed][field]
        for seed, line in study.lines[name].items()
        if seed in text
    }


def scarcity(study):
    """Accuracy by number of training examples, and where the PCA head pays."""

    def at(name, n):  # a main run of the default size has no suffix
        return name if n == study.examples else f"{name} n={n}"

    def was_run(n):
        return any(at(name, n) in study.lines for name in study.methods)

    # a size that no method was trained on would be an empty column
    sizes = [n for n in sorted({*study.sizes, study.examples}) if was_run(n)]
    rows = [[name, *(mean_sd(values(study, at(name, n))) for n in sizes)] for name in study.methods]
    conclusions = []
    for pca, full in PCA_AGAINST_FULL:
        gaps = {n: difference(study, at(pca, n), at(full, n)) for n in sizes}
        rows.append([f"{pca} minus {full}", *map(shown, gaps.values())])
        pays = where_it_pays(gaps)
        conclusions.append(
            f"- The PCA head in place of the full one ({pca} against {full}) {pays}."
        )
    named = [at(name, n) for n in study.sizes for name in study.methods]
    return [
        "## Scarce data",
        "",
        "Hard questions by the number of training examples, at the same number of steps.",
        *markdown(["run", *(f"{n:,}" if n else "all" for n in sizes)], rows),
        *not_run([name for name in named if name not in study.lines]),
        *conclusions,
    ]


def where_it_pays(gaps):
    """In words, of {number of examples: Difference or None}: where a head pays, and where not."""
    # any Difference is true, of zeros too; only None is not
    if not any(gaps.values()):
        return "has not been run"
    parts, found = [], dict(zip(gaps, verdicts(gaps.values())))
    for words, wanted in (("pays", "yes"), ("costs", "no"), ("is undecided", "undecided")):
        sizes = [f"{n:,}" for n, verdict in found.items() if verdict == wanted]
        parts.append(f"{words} at {', '.join(sizes) or 'no size'}")
    return "; ".join(parts)


# --------------------------------------------------------------------------------------------------
# the report

TITLES = {
    "main": "The toy's tables",
    "gap": "GAP's own tables on the toy",
    "valr": "VaLR on the toy",
    "amvl": "AMVL on the toy",
}
MEANINGS = {
    "main": "R2 is that of the latents on validation data, teacher-forced.",
    "gap": "R2 is that of the latents on validation data, teacher-forced.",
    "valr": "The cosine of latents and their pictures is that of validation data; the rollout's "
    "error is ||fed - h|| / ||h||.",
    "amvl": "KL terms are nats a question, of validation data; right are answers all of whose "
    "tokens are the likeliest, with the posterior's mean in the slots and with the prior's.",
}


def preamble(study, lines):
    """How many runs there are, how they were made, and how to read the tables."""
    # all runs answer one test set: any line tells its size
    hard = len(right(lines[0], "clean", "hard", study.easy))
    easy = len(right(lines[0], "clean", "easy", study.easy))
    text = (
        f"{len(lines)} runs: {study.examples or 'all'} examples unless said, "
        f"`{study.train_args}`, {hard} hard and {easy} easy test questions, greedy. "
        "Of an accuracy on hard questions every seed's is shown, of other numbers mean ± standard "
        "deviation over seeds. "
        f"{MEANINGS[study.name]} "
        "A difference is paired by seed; its 95 % t-interval is over seeds, on this test set. "
        "p is McNemar's, exact, over the questions of all seeds, "
        "not corrected for the number of tests. "
        '"Yes" and "no" are at 5 % by the paired t-test over seeds, with Holm\'s correction for '
        'the claims of a list; "undecided" is the rest. '
        f"{power(study)} "
    )
    revisions = sorted({line["git"][:7] for line in lines if "git" in line})
    if revisions:
        text += f"Revisions: {', '.join(revisions)}."
    return [
        f"# {TITLES[study.name]}",
        "",
        "Written by `ablate.py` from the lines beside it; do not edit.",
        "",
        text,
        "",
    ]


def write_tables(path, study):
    """Write the report on a study of at least one run. Returns the number of its runs."""
    distinct = {}  # the untrained base stands under every seed and is one run
    for by_seed in study.lines.values():
        for line in by_seed.values():
            distinct[line["key"], line["seed"]] = line
    lines = list(distinct.values())

    sections = [scores(study, table) for table in TABLES[study.name]]
    if study.name == "gap":
        body = gap_body(study, sections)
    elif study.name == "main":
        body = main_body(study, sections)
    else:
        body = [line for section in sections for line in section]
    text = [*preamble(study, lines), *body, ""]
    write_then_rename(path, lambda tmp: tmp.write_text("\n".join(text)))
    return len(lines)


def main_body(study, sections):
    """The table of all systems, the critics' tests, and what else the lines hold."""
    systems, without, oracle, difficulty = sections
    return [
        *systems,
        "",
        *by_category(study),
        *without,
        *edits(study),
        *drift(study),
        *oracle,
        *difficulty,
        "",
        *scarcity(study),
        "",
        *diagnosis(study),
        *costs(study),
    ]


def gap_body(study, sections):
    """GAP's tables of accuracies, with the sections that no other study has between them."""
    main, variance, interventions, oracle, *beyond = sections
    return [
        *diagnosis(study),
        *main,
        "",
        *by_category(study),
        *variance,
        *interventions,
        *oracle,
        "",
        *costs(study),
        *(line for section in beyond for line in section),
        "",
        *scarcity(study),
    ]
