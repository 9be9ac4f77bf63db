"""What do the numbers of the ablations carry? Statistics over seeds, tables, verdicts on claims.

ablate.py hands over the lines of its runs as a `Study`; `write_tables` makes <results>.md of them,
from these lines alone. Nothing is run here, and nothing is random.

Two runs a and b are compared in two ways, which stand beside each other in every table:
- the difference of their accuracies, paired by seed, with a t-interval: would other seeds agree?
- the same over the questions, of which each is one pair: would other questions agree?

`what` names a run ("GAP") or one of its evaluations ("GAP/noise"). A star in it stands for the size
that the study looks at closely: "GAP*" is the run "GAP n=1000".
"""

import itertools
import math
import statistics
from typing import NamedTuple

from claims import PREDICTING, TABLES
from data import expect_object
from files import check_fields, read_lines, write_text
from intervals import difference_p, holm, t_quantile, t_test

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

    def named(self, what):
        """A run or evaluation with its star filled in."""
        return what.replace("*", self.star)


def run_and_evaluation(what):
    """("GAP", "noise") of "GAP/noise"; an evaluation that is not named is the clean one."""
    name, _, kind = what.partition("/")
    return name, kind or "clean"


def lines_of(path):
    """The lines of ablate.py, none if there is no file. Raises SystemExit naming line and field."""
    lines = read_lines(path, name=str, seed=int, key=str, settings=dict, evals=dict)
    for n, line in enumerate(lines, 1):
        for kind, evaluation in line["evals"].items():
            where = f"{path}:{n}: evals.{kind}"
            check_fields(expect_object(evaluation, where), {"right": dict}, where)
            for category, bits in evaluation["right"].items():
                if not are_bits(bits):
                    wanted = "the number of questions and their bits, as in [2, '3']"
                    raise SystemExit(f"{where}: {category!r} must be {wanted}, found {bits!r}")
    return lines


def are_bits(bits):
    """Is this (how many questions, their bits as one hexadecimal number)?"""
    try:
        n, digits = bits
        return type(n) is int and 0 <= int(digits, 16) < 2**n
    except (TypeError, ValueError):
        return False


def right(line, kind, measure, easy):
    """Right (1) and wrong (0) answers of an evaluation, in the test set's order within a category.

    `measure` picks the questions: hard, easy, all, or "category:" and the name of one.
    """
    answers = []
    # {category: (how many questions, their bits as one hexadecimal number)}
    for category, (n, digits) in line["evals"][kind]["right"].items():
        group = "easy" if easy and category == easy else "hard"  # rows may have no category
        if measure in (f"category:{category}", group, "all"):
            bits = f"{int(digits, 16):0{n}b}"  # a bit per question, leading zeros kept
            answers += [int(bit) for bit in bits]
    return answers


def latest(lines):
    """Those of ablate.py's lines that go together.

    Of the last line's base and test set, with their run's latest settings, and of the training data
    that the last run of their size and layout had.
    """
    lines = [line for line in lines if line.get("world") == lines[-1].get("world")]
    keys = {line["name"]: line["key"] for line in lines}
    lines = [line for line in lines if line["key"] == keys[line["name"]]]

    def size(line):
        settings = line["settings"]
        return settings.get("examples"), (settings.get("run") or {}).get("layout")

    # a line of an earlier revision does not say
    data = {size(line): line["data"] for line in lines if "data" in line}
    return [line for line in lines if line.get("data") in (None, data.get(size(line)))]


def value(line, kind, measure, easy):
    """One number of a line, or None where it has no such number.

    `measure` is a mean cost of the evaluation (tokens, latents), an accuracy (of what `right`
    picks) or a path into the line (val_r2, probe.real.cosine).
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


class Difference(NamedTuple):
    """Two runs, paired by seed: the mean of a - b, its 95 % t-interval, and its p over seeds."""

    mean: float
    low: float
    high: float
    seeds: int
    p: float


def mean_interval(x):
    """The mean of a few numbers, one per seed, and its 95 % t-interval; infinitely wide for one."""
    mean = sum(x) / len(x)
    # one seed says nothing of what another would give
    if len(x) == 1:
        return mean, -math.inf, math.inf
    half = t_quantile(0.95, len(x) - 1) * statistics.stdev(x) / math.sqrt(len(x))
    return mean, mean - half, mean + half


def difference(study, a, b, measure="hard"):
    """The Difference a - b, over the seeds that both have; None where there is no such seed."""
    of_a, of_b = values(study, a, measure), values(study, b, measure)
    seeds = sorted(of_a.keys() & of_b.keys())
    if not seeds:
        return None
    # what a seed does to both runs, such as the order of the data, cancels
    gaps = [of_a[seed] - of_b[seed] for seed in seeds]
    return over_seeds(gaps)


def over_seeds(gaps):
    """The Difference that gaps are, one per seed."""
    return Difference(*mean_interval(gaps), len(gaps), t_test(gaps))


def paired_p(study, a, b):
    """p of the hard questions' mean difference, each question's over all common seeds."""
    # a run that opened no span has no answers with another example's latents
    seeds = values(study, a).keys() & values(study, b).keys()

    def shares_right(what):
        """For each question, the share of the seeds that answer it right."""
        name, kind = run_and_evaluation(what)
        answers = [right(study.lines[name][seed], kind, "hard", study.easy) for seed in seeds]
        return [sum(one) / len(seeds) for one in zip(*answers)]

    # a question is one pair, not one per seed: seeds find the same questions hard
    pairs = zip(shares_right(a), shares_right(b))
    return difference_p([x - y for x, y in pairs])


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


# a difference of accuracies that a study should tell: p < .05, uncorrected, in four of five tries
TELLS = 0.05
# means of accuracy between which runs say how far seeds differ: at the floor they cannot
OFF_FLOOR_AND_CEILING = 0.1, 0.9


def power(study):
    """In words: how many seeds tell a difference of TELLS, by the spread of the seeds there are."""
    spread, freedom = 0.0, 0
    low, high = OFF_FLOOR_AND_CEILING
    for name, by_seed in study.lines.items():
        x = list(values(study, name).values())
        trained = next(iter(by_seed.values()))["settings"].get("run") is not None
        if trained and len(x) > 1 and low <= statistics.mean(x) <= high:
            spread += statistics.variance(x) * (len(x) - 1)
            freedom += len(x) - 1
    if not freedom:
        return "How far seeds differ is not known: no run between floor and ceiling has two."
    sd = math.sqrt(spread / freedom)

    def told(seeds):
        """The difference of two runs that so many seeds tell."""
        # standard errors: the two-sided 5 % of t, and the one-sided 80 %
        t = t_quantile(0.95, seeds - 1) + t_quantile(0.6, seeds - 1)
        return sd * math.sqrt(2 / seeds) * t

    here = max(2, statistics.mode(map(len, study.lines.values())))  # as most runs have
    enough = next(n for n in itertools.count(2) if told(n) <= TELLS)
    now = f"one of {told(here):.2f}" if told(here) < 1 else "none at all"
    return (
        f"The seeds of a run with accuracy between {low} and {high} have a standard deviation of "
        f"{sd:.3f} ({freedom} degrees of freedom): in four of five tries a single uncorrected test "
        f"detects a difference of {TELLS} with {enough} seeds per run, and {now} with {here}."
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


def each_seed(numbers):
    """{seed: accuracy} as the mean, and in brackets every seed's: "0.537 (.51 .55)"."""
    text = mean_sd(numbers).partition(" ")[0]
    if len(set(numbers.values())) > 1:
        each = [f"{x:.2f}".removeprefix("0") for x in numbers.values()]
        text += f" ({' '.join(each)})"
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
    lines = []
    for row in [head, rule, *rows]:
        # a category may have any name
        cells = [" ".join(str(cell).replace("|", r"\|").split()) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
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
            f"These runs agree with the paper on {yes} of {len(claims)} findings, disagree on {no}"
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


def accuracy_table(study, table):
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
        found = values(study, what)
        others = [values(study, what, m) for m in ("easy", *(field for _, field in table.logged))]
        numbers = [each_seed(found), *map(mean_sd, others)]
        # the reference against itself, or runs without a common seed: no difference, and no test
        d = difference(study, what, reference) if what != reference else None
        p = p_shown(paired_p(study, what, reference)) if d else ""
        # the untrained base has one line, which stands under every seed
        n_runs = len({study.lines[name][seed]["seed"] for seed in found})
        cells.append([what, n_runs, *numbers, shown(d), p, last])
    easy = study.easy or "easy"
    logged = [heading for heading, _ in table.logged]
    head = ["run", "seeds", "hard", easy, *logged, f"hard, minus {reference}", "p", table.column]

    # the hard questions, where the claim names no others: only these need latents
    claims = []  # with the star filled in, and the questions
    for text, more, less, *measure in table.claims:
        claims.append((text, study.named(more), study.named(less), *(measure or ["hard"])))
    return [
        f"## {table.title}",
        *markdown(head, cells),
        *not_run(absent),
        *sentences(study, claims, table.of_paper),
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
# Monet-7B's on HRBench4K, before the final norm only; the norm of latents is GAP's
DIAGNOSIS_OF_PAPER = [
    "paper, 7B", "Monet 546; -", "Monet 8.7; -", "GAP 3.53", "3.94 (query)", "1", "", "", "", "",
]
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
    """The paper's figure of norms in numbers, from probe.py."""
    rows = [diagnosis_row(study, name) for name in DIAGNOSED]
    return [
        "## Diagnosis",
        "",
        "Norms as multiples of the input embeddings' before and after the final norm; natural "
        "logarithms of L2 norms; the share of the latents' energy in the PCA subspace; rank and "
        "cosine of an example's latents about mu (in brackets: of the real features).",
        *markdown(DIAGNOSIS_HEAD, [*rows, DIAGNOSIS_OF_PAPER]),
        *sentences(study, DIAGNOSIS_CLAIMS, paper=False),
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


SYSTEMS = ("text", *PREDICTING, "VaLR", "AMVL")


def by_category(study):
    """Longer chains feed back more of their own latents: does the subspace stop the drift?"""
    found = set()
    # whatever categories the test set has: the report knows none by name
    for name in SYSTEMS:
        for line in study.lines.get(name, {}).values():
            found |= line["evals"]["clean"]["right"].keys()
    categories = sorted(found)  # on the toy: the number of moves
    there = [name for name in SYSTEMS if name in study.lines]
    measures = [f"category:{category}" for category in categories]
    rows = [[name, *(mean_sd(values(study, name, m)) for m in measures)] for name in there]
    claims = [
        (f"{pca} beats {full} on {category}", pca, full, f"category:{category}")
        for pca, full in PCA_AGAINST_FULL
        for category in categories
    ]
    return [
        "## Longer chains",
        *markdown(["run", *categories], rows),
        *sentences(study, claims, paper=False),
    ]


def drift(study):
    """Does the subspace stop the drift? R2 of the latents by their place in the longest chains."""
    chains = {name: chains_of(study, name) for name in PREDICTING}
    lengths = {name: len(found[0]["own"]) for name, found in chains.items() if found}
    if not lengths:
        return []
    # a run that writes too few spans has no last place to compare
    there = [name for name in lengths if lengths[name] == max(lengths.values())]
    short = [name for name in lengths if name not in there]
    rows = []
    for name in there:
        for kind, title in (("own", "its own latents"), ("forced", "the real ones")):
            places = zip(*(chain[kind] for chain in chains[name]))
            means = [f"{statistics.fmean(place):.2f}" for place in places]
            rows.append([f"{name}, fed {title}", *means])
    gaps = [drift_of(study, name) for name in there]
    each = [
        f"- {name} loses by its own latents: **{word}**, R2 {shown(d)} at the last place, "
        f"seeds: {d.seeds}"
        for name, d, word in zip(there, gaps, verdicts(gaps))
    ]
    return [
        "## Drift along the chain",
        "",
        "R2 of the i-th latent against its real feature, of the questions with most latents: fed "
        "with the latents that the model wrote before it, and with the real ones.",
        *markdown(["run", *range(1, len(rows[0]))], rows),
        *([f"Too few spans: {', '.join(short)}.", ""] if short else []),
        *each,
    ]


def chains_of(study, name):
    """What probe.py found along the chains of a run's seeds, of those with the longest chains."""
    found = [line["probe"].get("along") for line in study.lines.get(name, {}).values()]
    return longest([chain for chain in found if chain])


def longest(chains):
    """Those of the greatest length: a run that writes too few spans has shorter ones."""
    most = max((len(chain["own"]) for chain in chains), default=0)
    return [chain for chain in chains if len(chain["own"]) == most]


def drift_of(study, name):
    """What its own latents cost at the last place: R2 when fed real ones minus R2 of its own."""
    gaps = [chain["forced"][-1] - chain["own"][-1] for chain in chains_of(study, name)]
    return over_seeds(gaps)


# fmt: off
EDIT_KINDS = (
    ("start", "another start"), ("move", "another move"), ("piece", "another piece under the dot"),
    ("elsewhere", "another piece elsewhere"),
)
# fmt: on


def edits(study):
    """Do latents and answers follow an edit of the input? From edits.py."""
    there = [name for name in SYSTEMS if values(study, name, "edits.start.followed")]
    if not there:
        return []

    def cells(name, measure):
        return [
            mean_sd(values(study, name, f"edits.{kind}.{measure}"), 2) for kind, _ in EDIT_KINDS
        ]

    lines = [
        "## Edits of the input",
        "",
        "Pairs of questions that differ in one thing. *Followed*: the share of pairs whose answers "
        "change, to whatever, where the right answer does, and stay where it stays. *Both right*: "
        "the share of pairs with two right answers. *Cosine* of the two questions' latents: 1 "
        "where they are blind to the edit; *pooled*, of the means of their latents. *Own*: the "
        "share of latents nearer to their own picture's features than to the other question's, "
        "where the two differ; chance is .5.",
    ]
    for measure in ("followed", "both_right", "cosine", "pooled", "own"):
        rows = [[name, *cells(name, measure)] for name in there]
        rows = [row for row in rows if any(row[1:])]
        if rows:
            head = [measure.replace("_", " "), *(words for _, words in EDIT_KINDS)]
            lines += markdown(head, rows)[:-1]
    return lines


# fmt: off
COSTS = (
    "text", "output", "LH", "LH+PCA", "GAP",
    "K=1", "K=9", "K=16", "K=36", "GAP*/parser skipped", "no parser text",
)
COSTS_HEAD = [
    "run", "steps a second, ratio", "time per answer, ratio", "positions per answer",
    "of them latents",
]
# fmt: on


def costs(study):
    """Speed against the text run of the same seed; tokens and latents per answer."""
    rows = []
    for starred in COSTS:
        what = study.named(starred)
        name, kind = run_and_evaluation(what)
        # no line for what was not run: the tables of accuracies name it
        if not values(study, what, "tokens"):
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
    rows = [
        [name, *(each_seed(values(study, at(name, n))) for n in sizes)] for name in study.methods
    ]
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
        "Hard questions by the number of training examples, at the same number of steps. What pays "
        "is decided by the t-test with Holm's correction over the sizes of a line alone.",
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
        sizes = [f"{n:,}" if n else "all" for n, verdict in found.items() if verdict == wanted]
        parts.append(f"{words} at {', '.join(sizes) or 'no size'}")
    return "; ".join(parts)


# --------------------------------------------------------------------------------------------------
# the report

SECTIONS = {f.__name__: f for f in (by_category, edits, drift, scarcity, diagnosis, costs)}
TITLES = {
    "main": "All systems",
    "fresh": "What fresh seeds say",
    "gap": "GAP's own tables",
    "valr": "VaLR",
    "amvl": "AMVL",
}
R2 = "R2 is that of the latents on validation data, teacher-forced."
MEANINGS = {
    "valr": "The cosine of latents and their pictures is that of validation data; the rollout's "
    "error is ||fed - h|| / ||h||.",
    "amvl": "KL terms are nats per question, of validation data; right are answers all of whose "
    "tokens are the likeliest, with the posterior's mean in the slots and with the prior's.",
}


def preamble(study, lines):
    """How many runs there are, how they were made, and how to read the tables."""
    # all runs answer one test set: any line tells its size
    hard = len(right(lines[0], "clean", "hard", study.easy))
    easy = len(right(lines[0], "clean", "easy", study.easy))
    questions = f"{hard} hard and {easy} easy" if study.easy else f"{hard}"
    text = (
        f"{len(lines)} runs: {study.examples or 'all'} examples unless stated, "
        f"`{study.train_args}`, {questions} test questions, greedy. "
        "Accuracies on hard questions list every seed; other numbers are mean ± standard deviation "
        "over seeds. "
        f"{MEANINGS.get(study.name, R2)} "
        "A difference is paired by seed; its 95 % t-interval is over seeds, on this test set. "
        "p is over the questions, each averaged over the seeds, uncorrected. "
        '"Yes" and "no" are decided at 5 % by the paired t-test over seeds, with Holm\'s '
        'correction over the claims of a list; the rest is "undecided". '
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
    ]


def write_tables(path, study):
    """Write the report on a study of at least one run. Returns the number of its runs."""
    distinct = {}  # the untrained base stands under every seed and is one run
    for by_seed in study.lines.values():
        for line in by_seed.values():
            distinct[line["key"], line["seed"]] = line
    lines = list(distinct.values())

    sections = [preamble(study, lines)]
    for table in TABLES[study.name]:
        named = isinstance(table, str)
        sections.append(SECTIONS[table](study) if named else accuracy_table(study, table))
    texts = ["\n".join(section).strip() for section in sections]
    page = "\n\n".join(filter(None, texts)) + "\n"
    write_text(path, page)
    return len(lines)
