"""What does each table compare, what has the paper for it, and what does one expect?

Facts for report.py. In the name of a run a star stands for the size at which GAP's own study
intervenes on latents; "GAP/noise" is an evaluation of a run, "GAP" its clean one.
"""

from typing import NamedTuple


class Table(NamedTuple):
    """A table of accuracies."""

    title: str
    column: str  # heading of the last column
    rows: dict  # {what: its cell in the last column}, where the paper has a number that number
    reference: str  # the run that all rows are held against
    claims: list  # (text, more, less, measure = "hard"): `more` beats `less` on these questions
    logged: tuple = (("R2", "val_r2"),)  # columns of the last validation: heading, field
    of_paper: bool = False  # its claims are all findings of the paper


# fmt: off
ALIGNED = (("cosine", "val_cosine"), ("rollout error", "val_rollout_error"))
DIVERGED = (("KL(q, p)", "val_kl_forward"), ("KL(p, q)", "val_kl_reverse"),
            ("right, posterior", "val_right_posterior"), ("right, prior", "val_right_prior"))
PREDICTING = ("output", "LH", "LH+DA", "LH+PCA", "GAP")  # runs whose latents are vision embeddings


def with_examples(table, n):
    """The same table of the runs that were trained on n examples; the base is trained on none."""

    def sized(name):
        return name if name == "base" else f"{name} n={n}"

    return table._replace(
        title=f"{table.title}, with {n:,} examples",
        reference=sized(table.reference),
        rows={sized(name): what for name, what in table.rows.items()},
        claims=[(text, sized(more), sized(less)) for text, more, less in table.claims],
    )


ALL_SYSTEMS = Table(
    "All systems", column="what is fed, and on which questions", reference="LH+PCA", rows={
        "base":   "nothing",
        "text":   "nothing",
        "output": "the state; real features in training; all",
        "own states": "the state, fed in training, too; all",
        "LH":     "full head; all",
        "LH+DA":  "full head; those that the base fails",
        "LH+PCA": "PCA head; all",
        "GAP":    "PCA head; those that the base fails",
        "VaLR":   "the state, aligned inside; all, a picture per move",
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
    ])


def retained(title, full, at_95, at_99):
    """A PCA head by the variance that its subspace retains, beside the full head; names of runs."""
    return Table(
        title,
        column="variance retained",
        reference=at_95,
        rows={full: "all", at_95: "95 %", at_99: "99 %"},
        claims=[
            ("99 % beats 95 %", at_99, at_95),
            ("at 99 % the PCA head beats the full one", at_99, full),
        ],
    )


# its head starts about mu and has fewer weights: does either make its gain over the full head?
CONTROLS = Table(
    "The start and the size of the PCA head, for a full one", column="", reference="LH+PCA", rows={
        "LH":                "d -> d -> d, from 0 on",
        "LH from mu":        "the same, from mu on",
        "matched full head": "d -> m -> d with as many weights as the PCA head, from 0 on",
        "matched from mu":   "the same, from mu on",
        "LH+PCA":            "the PCA head",
    }, claims=[
        ("a full head is better from mu on",                    "LH from mu", "LH"),
        ("the PCA head beats a full one from mu on",            "LH+PCA",     "LH from mu"),
        ("the PCA head beats a full one of as many weights",    "LH+PCA",     "matched full head"),
        ("the same where that starts about mu, too",            "LH+PCA",     "matched from mu"),
    ])
SUBSPACE = retained("What the subspace leaves out", "LH", "LH+PCA", "LH+PCA 99%")
SUBSPACE_DA = retained("The same with difficulty-aware data", "LH+DA", "GAP", "GAP 99%")
# of each study, in their order; a name is that of a section of report.py
TABLES = {"main": [
    ALL_SYSTEMS,
    with_examples(ALL_SYSTEMS, 2500),
    "by_category",
    Table("What is left without what the latents say", column="", reference="LH+PCA", rows={
        "text":    "the same data without spans",
        "markers": "trained so: a span opens and ends at once",
        "dummy":   "trained so: one learned vector in place of each latent",
        **{f"{name}{kind}": what for name in (*PREDICTING, "VaLR")
           for kind, what in (("", ""), ("/markers", "the span ends at once"),
                              ("/mean", "mu in place of each latent"),
                              ("/noise", "noise of the same length"),
                              ("/shuffle", "another example's latents"))
           if not (name == "VaLR" and kind == "/mean")},
        "own states":         "",
        "own states/markers": "the span ends at once",
        "own states/noise":   "noise of the same length",
        "own states/shuffle": "another example's latents",
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
          for name in (*PREDICTING, "VaLR", "AMVL")),
        *((f"{name}: its own latents beat noise", name, f"{name}/noise")
          for name in (*PREDICTING, "VaLR", "AMVL")),
    ]),
    "edits", "drift",
    Table("The real auxiliary features in place of the latents", column="", reference="LH+PCA",
          rows={what: "" for name in PREDICTING
                for what in (name, f"{name}/oracle")},
          claims=[(f"better latents would help {name}", f"{name}/oracle", name)
                  for name in PREDICTING]),
    # fewer spans to learn from, or the questions that have none: which of the two costs?
    Table("What difficulty-aware data costs, and what mends it",
          column="questions with latents", reference="GAP", rows={
        "LH+PCA":         "all",
        "LH+PCA n=750":   "all: about as many with latents as GAP, easy and hard",
        "GAP":            "those that the base fails",
        "GAP n=2500":     "those that the base fails, of 2,500",
        "tau=0.5":        "those that it solves in no more than half of its answers",
        "easy 10%":       "these, and a tenth of the others",
        "easy 25%":       "these, and a quarter of the others",
        "first 200":      "all in the first quarter of the steps, then as GAP",
        "parser dropped": "as GAP; the others have no parser text",
    }, claims=[
        ("latents on as many easy and hard questions teach more than on hard ones",
            "LH+PCA n=750", "GAP"),
        ("more questions mend it",                      "GAP n=2500",     "GAP"),
        ("tau = 1/2 mends it",                          "tau=0.5",        "GAP"),
        ("a tenth of the easy questions mends it",      "easy 10%",       "GAP"),
        ("a quarter of the easy questions mends it",    "easy 25%",       "GAP"),
        ("a first phase with latents everywhere mends it", "first 200",   "GAP"),
        ("the parser text of the others helps",         "GAP",            "parser dropped"),
        ("with a quarter of the easy questions GAP is ahead of latents everywhere",
            "easy 25%", "LH+PCA"),
        ("the same, over all questions",                "easy 25%",       "LH+PCA", "all"),
    ]),
    SUBSPACE,
    with_examples(SUBSPACE, 2500),
    SUBSPACE_DA,
    with_examples(SUBSPACE_DA, 2500),
    CONTROLS,
    Table("What VaLR needs", column="examples; steps; gradients; a move's name",
          logged=ALIGNED, reference="long VaLR n=4200", rows={
        "VaLR":                     "1,250; 800; through the last of two passes; after its span",
        "VaLR n=2500":              "2,500; the same",
        "long text n=4200":         "4,200; 1,600, without spans",
        "long VaLR n=4200":         "4,200; 1,600; through all of an exact one; before it",
        "long VaLR n=4200/markers": "the span ends at once",
        "long VaLR n=4200/noise":   "noise of the same length",
        "long VaLR n=4200/shuffle": "another example's latents",
    }, claims=[
        ("all of it helps",                        "long VaLR n=4200", "VaLR n=2500"),
        ("it beats dense-caption SFT",             "long VaLR n=4200", "long text n=4200"),
        ("its own latents beat another example's", "long VaLR n=4200", "long VaLR n=4200/shuffle"),
        ("its own latents beat noise",             "long VaLR n=4200", "long VaLR n=4200/noise"),
    ]),
    Table("The span's tokens, and latents everywhere at first, with 2,500 examples",
          column="", reference="LH+PCA n=2500", rows={
        "text n=2500":      "the same data without spans",
        "markers n=2500":   "trained so: a span opens and ends at once",
        "dummy n=2500":     "trained so: one learned vector in place of each latent",
        "LH+PCA n=2500":    "latents on all questions",
        "GAP n=2500":       "on those that the base fails",
        "first 200 n=2500": "on all in the first quarter of the steps, then as GAP",
    }, claims=[
        ("markers alone beat text", "markers n=2500", "text n=2500"),
        ("a dummy beats text",      "dummy n=2500",   "text n=2500"),
        ("latents beat markers",    "LH+PCA n=2500",  "markers n=2500"),
        ("a first phase with latents everywhere mends what difficulty-aware data costs GAP",
            "first 200 n=2500", "GAP n=2500"),
    ]),
    "scarcity", "diagnosis", "costs",
], "fresh": [
    Table("What the main study left open", column="latents on which questions",
          reference="LH+PCA", rows={
        "LH":                "all",
        "LH+PCA":            "all",
        "LH+PCA 99%":        "all",
        "GAP":               "those that the base fails",
        "first 200":         "all in the first quarter of the steps, then as GAP",
        "LH n=2500":         "all",
        "LH+PCA n=2500":     "all",
        "LH+PCA 99% n=2500": "all",
        "LH+DA n=2500":      "those that the base fails",
    }, claims=[
        ("99 % of the variance beats 95 %", "LH+PCA 99%", "LH+PCA"),
        ("the same with 2,500 examples", "LH+PCA 99% n=2500", "LH+PCA n=2500"),
        ("at 99 % the PCA head beats the full one", "LH+PCA 99%", "LH"),
        ("difficulty-aware data costs the full head with 2,500 examples",
            "LH n=2500", "LH+DA n=2500"),
        ("latents everywhere at first mend what it costs GAP", "first 200", "GAP"),
    ]),
    # of five seeds of the main study it was +.173 and -.067
    Table("The start of the PCA head, for a full one", column="", reference="LH+PCA", rows={
        "LH":         "d -> d -> d, from 0 on",
        "LH from mu": "the same, from mu on",
        "LH+PCA":     "the PCA head",
    }, claims=[
        ("a full head is better from mu on",         "LH from mu", "LH"),
        ("the PCA head beats a full one from mu on", "LH+PCA",     "LH from mu"),
    ]),
], "gap": [
    "diagnosis",
    Table("Main table", column="7B: Avg-P, Avg-R", reference="GAP", of_paper=True, rows={
        "base":       "57.66, 52.62",
        "text":       "59.40, 47.24",
        "output":     "Monet 59.58, 47.99; LVR 60.75, 47.66",
        "output/EMA": "Monet on HRBench4K 70.75 -> 71.63, MathVista 61.30 -> 63.30",
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
    "by_category",
    Table("Retained variance (here without difficulty-aware data)",
          column="7B: Avg-3", reference="LH+PCA", of_paper=True, rows={
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
    Table("Interventions on GAP's latents", column="7B: mean of two", reference="GAP*",
          of_paper=True, rows={
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
    "costs",
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
    "scarcity",
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
        "VaLR":             "K = 4: 62.0, 85.3; block 12 (and K 16): 63.1, 86.4",
        "K=1":              "58.6, 78.0",
        "block 1":          "4: 59.2, 83.8",
        "block 4":          "27: 62.8, 85.3",
        "four passes":      "of up to 16, which are exact",
        "one pass":         "",
        "stopped gradient": "",
    }, claims=[
        ("four latents per step beat one",                   "VaLR", "K=1"),
        ("the second block beats the first",               "VaLR", "block 1"),
        ("the second block beats the last",                "VaLR", "block 4"),
        ("an exact rollout beats four passes",             "VaLR", "four passes"),
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
