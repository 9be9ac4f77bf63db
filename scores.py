"""How does each benchmark's own harness grade an answer, and what does it make of the grades?

A check takes a row with its gold and what was said ("extracted", "method", "raw") and tells how
right that is: True, False, or a number between. A score takes all rows with their grades
("correct") and returns {name: a number, or rows, which stand for their mean grade}.
"""

import math
from collections import defaultdict

import numpy as np

from answers import after_is, extract_answer, is_choice, is_correct, states, tagged
from options import letter_of
from phrases import declared_text
from stated import find_kind
from values import bare_value, levenshtein, math_equal

# --------------------------------------------------------------------------------------------------
# checks of one answer


def check_letter(row):
    """Is the extracted letter the one that the gold answer starts with?"""
    return row["extracted"] is not None and row["extracted"] == letter_of(row["answer"])


def check_yesno(row):
    return row["extracted"] == row["answer"].strip().lower()


def check_answer(row):
    return is_correct(row["extracted"], row)


def check_nothing(row):
    return False  # only a judge can say


def check_mathvista(row, strict=False):
    """MathVista's normaliser.

    Of a choice the letter, else (not strict) the choice nearest to the answer's text; str(int)
    of an integer; a float rounded to its precision.
    """
    answer, gold = row["extracted"], str(row["answer"]).strip()
    if row["question_type"] == "multi_choice":
        if answer is not None:
            return row["options"][answer] == gold
        text = None if strict else extract_answer(row["raw"])[0]
        if text is None:
            return False
        # officially so, and it pays: a third of the answers that reach this come out right
        nearest = min(row["options"].values(), key=lambda choice: levenshtein(text, choice))
        return nearest == gold
    # a list or a text; the kinds below were read as numbers
    if answer is None or row["answer_type"] not in ("integer", "float"):
        return answer == gold
    value = float(answer)
    # so many digits that no float holds them
    if not math.isfinite(value):
        return False
    # officially cut, not rounded: 32.5 is right where 32 is
    if row["answer_type"] == "integer":
        return str(int(value)) == gold
    # where no precision is named: as many decimals as the gold has
    digits = row.get("precision") or len(gold.partition(".")[2])
    return str(round(value, int(float(digits)))) == gold


def check_mathvision(row):
    """The letter or, as officially, the option's value; or the value of a free-form answer.

    Of free-form answers without a tag the last number counts as well.
    """
    answer, gold, options = row["extracted"], row["answer"], row["options"]
    if options:
        # a gold answer is a letter, and the officially accepted value stands in the options
        letter = letter_of(gold)
        value = options.get(letter) or gold
        said, inside, _ = tagged(row["raw"])
        said = declared_text(said).rstrip(".") if inside is None else inside
        return answer == letter or answer is None and math_equal(said, value)
    if answer is None:
        return False
    if is_choice(answer, gold):  # a letter whose options stand in the question
        return True
    # the official extraction leaves out degrees, percent, units and "x =" before it compares
    for said in (answer, bare_value(answer), bare_value(after_is(answer))):
        if math_equal(said, gold):
            return True
    # untagged, the answer is the rest of a sentence: "12 cm^2, as asked"
    if row["method"] not in ("declared", "last line"):
        return False
    number = find_kind(answer, "number")
    return number is not None and math_equal(number, gold) and states(answer, number)


def mean_relative_accuracy(predicted, gold):
    """MRA of VSI-Bench: the share of the ten thresholds theta with |p - t| / t <= 1 - theta."""
    # nothing is relative to zero
    if gold == 0:
        return float(predicted == 0)
    # the ten confidence thresholds .50, .55, ... .95,
    # not .5 + .05 * i, whose rounding turns ties: 9 against 10 would score .8 and not .9
    theta = np.linspace(0.5, 0.95, 10)
    return float(np.mean(abs(predicted - gold) / abs(gold) <= 1 - theta))


def check_vsi(row):
    if row["options"]:
        return check_letter(row)
    if row["extracted"] is None:
        return 0.0
    return mean_relative_accuracy(float(row["extracted"]), float(row["answer"]))


# --------------------------------------------------------------------------------------------------
# what the scores are made of


def group_by(rows, field):
    """{value of the field: its rows}, in the order of their first appearance."""
    # a dict keeps the order of the file, and so do the tables
    groups = defaultdict(list)
    for row in rows:
        if row.get(field) not in (None, ""):
            groups[str(row[field])].append(row)
    return dict(groups)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def accuracy(rows):
    return mean(float(row["correct"]) for row in rows)


def macro(groups):
    """The unweighted mean of the groups' accuracies."""
    return mean(accuracy(rows) for rows in groups.values())


def score_categories(*fields):
    """A score of all rows and of the groups by each of these fields."""

    def score(rows):
        found = {"overall": rows}
        for field in fields:
            for name, part in group_by(rows, field).items():
                # a group may be called as one before it, or "overall"
                found[f"{field}: {name}" if name in found else name] = part
        return found

    return score


# --------------------------------------------------------------------------------------------------
# the benchmarks' own scores


def score_hrbench(rows):
    """The mean over cycles of each cycle's accuracy; with cycles of one size the mean over rows.

    In a cycle the same questions are asked with their options in another order.
    """

    def over_cycles(part):
        # unequal cycles: an incomplete run must not weigh one order of options more
        cycles = group_by(part, "cycle_category")
        sizes = {len(cycle) for cycle in cycles.values()}
        return part if len(sizes) <= 1 else macro(cycles)

    found = {"overall": over_cycles(rows)}
    for category, part in group_by(rows, "category").items():
        found[category] = over_cycles(part)
    return found


def score_mmstar(rows):
    # files with either spelling are about
    fine = group_by(rows, "l2_category") or group_by(rows, "l2-category")
    # the headline is VLMEvalKit's, over rows; lmms-eval's is the mean over 18 kinds
    return {"overall": rows, "mean of l2": macro(fine)} | group_by(rows, "category")


def score_mme(rows):
    """By task (Perception, Reasoning), by task and subject, and by these and l2.

    All attributes of one kind of object are one l2: "vehicle/attribute/color" is vehicle/attribute.
    """
    # the official script counts by these three levels
    named = []
    for row in rows:
        l2 = row["l2-category"].lower()
        if "attribute" in l2:
            l2 = l2.partition("/")[0] + "/attribute"
        task = row["category"].partition("/")[0]
        named.append(row | {"task": task, "l2": f"{row['category']}/{l2}"})
    found = {"overall": rows}
    for field in ("task", "category", "l2"):
        found |= group_by(named, field)
    return found


def score_mathvista(rows):
    # official: an unread choice falls back to the nearest one; strict: it counts as wrong
    strict = [row | {"correct": check_mathvista(row, strict=True)} for row in rows]
    return {"overall": rows, "strict": strict} | group_by(rows, "task")


def score_wemath(rows):
    """(Mastery + inadequate generalisation / 2) / problems, strict and loose.

    A problem is a question and its steps, each asked alone. Question wrong: insufficient
    knowledge (IK), or inadequate generalisation (IG) if all steps are right. Question right:
    complete mastery (CM) if the steps are, all (strict) or one (loose), else rote memory (RM).
    A problem that lacks a row (of a partial run) is left out.
    """
    problems = []
    # "3steps_1", "3steps_2", "3steps_3", "3steps_multi": problems of other lengths may share an ID
    named = [row | {"problem": f"{row['ID']}/{row['step'][0]}"} for row in rows]
    for part in group_by(named, "problem").values():
        n_steps = int(part[0]["step"][0])
        if len(part) == n_steps + 1:
            problems.append(part)
    count, right_of = defaultdict(int), defaultdict(list)
    for problem in problems:
        # {"1": ..., "2": ..., "multi": ...}
        right = {row["step"].partition("_")[2]: bool(row["correct"]) for row in problem}
        multi, single = right.pop("multi"), list(right.values())
        right_of["S1"] += single
        right_of[f"S{len(single)}"].append(multi)
        if multi:
            count["strict CM" if all(single) else "strict RM"] += 1
            count["loose CM" if any(single) else "loose RM"] += 1
        else:
            count["IG" if all(single) else "IK"] += 1

    # a short run may hold no whole problem: then all shares are 0
    n = max(1, len(problems))
    found = {kind: (count[f"{kind} CM"] + count["IG"] / 2) / n for kind in ("strict", "loose")}
    for name in ("IK", "IG", "strict CM", "strict RM", "loose CM", "loose RM"):
        found[name] = count[name] / n
    for name in sorted(right_of):  # S1, S2, S3: the accuracy of questions of so many steps
        found[name] = mean(right_of[name])
    return found | {"all rows": rows}


def precision_recall_f1(rows):
    """Of the answer "yes"."""
    hits = sum(row["correct"] for row in rows if row["answer"].lower() == "yes")
    said = sum(row["extracted"].lower() == "yes" for row in rows if row["extracted"])
    gold = sum(row["answer"].lower() == "yes" for row in rows)
    precision, recall = hits / max(said, 1), hits / max(gold, 1)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


def score_pope(rows):
    """F1 of "yes", over all rows and by split.

    A question that several splits share counts in each, as in VLMEvalKit.
    """
    # the three splits of POPE ask some questions together: the file holds those once
    spread = []
    for row in rows:
        for split in str(row.get("category", "")).split(","):
            spread.append(row | {"category": split.strip()})
    precision, recall, f1 = precision_recall_f1(spread)
    found = {"overall": f1, "accuracy": spread, "precision": precision, "recall": recall}
    for split, part in group_by(spread, "category").items():
        found[split] = precision_recall_f1(part)[2]
    return found


def score_vsi(rows):
    """The mean over eight tasks, the three difficulties of relative direction being one."""
    tasks = group_by(rows, "question_type")
    # easy, medium and hard: one task in the paper's mean
    direction = {k: v for k, v in tasks.items() if k.startswith("object_rel_direction")}
    eight = [accuracy(part) for name, part in tasks.items() if name not in direction]
    if direction:
        eight.append(macro(direction))
        tasks = {"object_rel_direction": macro(direction)} | tasks
    return {"overall": mean(eight)} | tasks


def score_blink(rows):
    # officially 14 subtasks weigh alike; VLMEvalKit's Overall, over rows, is printed beside it
    tasks = group_by(rows, "sub_task") or group_by(rows, "category")
    return {"overall": macro(tasks), "micro": rows} | tasks


def score_cvbench(rows):
    # the sources weigh alike: ADE20K and COCO in 2D; in 3D Omni3D is the only one
    sources = group_by(rows, "source")
    return {"overall": macro(sources), "micro": rows} | sources


# rows of MMVP, counted from 0, whose golds the official file has swapped, as they should be
MMVP_MENDED = {98: "B", 99: "A", 278: "B", 279: "A"}


def score_mmvp(rows):
    """Pairs (1, 2), (3, 4), ... of which both must be right; also with the golds mended."""

    # pairs are neighbours by number, in whatever order the ranks answered
    rows = sorted(rows, key=lambda row: int(row["id"]))
    first = min(1, int(rows[0]["id"]))

    def pairs(rows):
        by_pair = defaultdict(list)
        for row in rows:
            by_pair[(int(row["id"]) - first) // 2].append(row)
        # of some of the answers only whole pairs
        whole = [pair for pair in by_pair.values() if len(pair) == 2]
        return [a | {"correct": bool(a["correct"] and b["correct"])} for a, b in whole]

    found = {"overall": pairs(rows), "single": rows}
    if len(rows) == 300:  # the places hold in the whole file only
        mended = []
        for i, row in enumerate(rows):
            gold = MMVP_MENDED.get(i, row["answer"])
            mended.append(row | {"correct": check_letter(row | {"answer": gold})})
        found["corrected gold"] = pairs(mended)
    return found


def score_mmhal(rows):
    """With a judge: its mean rating, 0 to 6, and the share of answers rated below 3."""
    # without a judge there is no score, only the response file
    rated = [row["rating"] for row in rows if row.get("rating") is not None]
    if not rated:
        return {}
    return {
        "rating": mean(rated),
        "hallucination": mean(rating < 3 for rating in rated),
    }
