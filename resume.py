"""What becomes of each item of a long run, and of the run after a kill?

An item is kept, or left out for a reason (Reject), or had no answer and is tried again by the next
run (Unanswered). Each finished item is a line of <folder>/work/<name>.jsonl at once, under a key
that is a hash of the item and of the settings that matter; a later run uses the lines whose keys
still occur.
"""

import threading
from collections import Counter
from pathlib import Path

from files import append, check_fields, each_line, key_of, open_append, write_lines
from launch import Progress, claim
from threads import each


class Reject(Exception):
    """Why an item is left out. The number is what a threshold was held against."""

    def __init__(self, reason, number=None, detail=""):
        super().__init__(reason, number, detail)
        self.reason, self.number, self.detail = reason, number, detail

    def __str__(self):
        return self.detail or self.reason


class Unanswered(Reject):
    """An endpoint failed: the item is left out of this run, and tried again by the next."""


class Refused(Unanswered):
    """It refuses this item: another prompt, or another limit of the server, may change that."""


def clean(text):
    """One line of text that any file can hold, of at most 500 characters."""
    # a lone surrogate, which JSON may bring along, can stand in no file
    return " ".join(str(text).encode("utf-8", "replace").decode().split())[:500]


class Patience:
    """Ends a run after `give_up` failures of an endpoint in a row, whose threads all report here.

    has_answered: ever, this run or before? If so, a refusal is the item's fault and not its.
    """

    def __init__(self, give_up, has_answered=False):
        self.give_up, self.has_answered = give_up, has_answered
        self.in_a_row, self.lock = 0, threading.Lock()

    def answered(self):
        with self.lock:
            self.has_answered, self.in_a_row = True, 0

    def failed(self, e, message):
        """Count an Unanswered. Raises SystemExit with the message where it is one too many."""
        with self.lock:
            known = isinstance(e, Refused) and self.has_answered
            self.in_a_row = 0 if known else self.in_a_row + 1
            if self.in_a_row >= self.give_up:
                raise SystemExit(message)


def run_stage(
    name, rows, work, settings, folder, workers, give_up, rejects, contents, has_answered=False
):
    """Run work(row) -> row on all rows. Writes <name>.jsonl and the file `rejects` in `folder`.

    rows: a list, or what reads them anew each of the two times that they are gone through.
    settings: {name: value} of what makes older results useless when it changes.
    contents(row): what is known of the files that a row names; a change there does the same.
    give_up: so many rows in a row without an answer end the run (SystemExit);
    has_answered: has the endpoint, if one is asked, ever done so?
    Returns the rows that were kept, in the order of `rows`.
    """
    folder = Path(folder)
    path = folder / "work" / f"{name}.jsonl"
    claim(path.parent, path.name)
    # of the whole row: one that an earlier stage has changed is worked on again
    hashed = Progress(rows, desc=f"{name}: what is done", unit="item", leave=False, delay=5)
    keys = [key_of(settings | {"row": row, "contents": contents(row)}) for row in hashed]
    # the file also holds what other rows and other settings gave: a change that is taken back costs
    # nothing
    wanted = set(keys)
    done = {}
    for line in each_line(path, key=str) if path.exists() else ():
        if line["key"] in wanted:
            check_fields(line, {"row" if "row" in line else "reject": dict}, path)
            done[line["key"]] = line
    # what an earlier run has finished is not asked, and not paid, again
    n_done = sum(key in done for key in keys)
    todo = ((key, row) for key, row in zip(keys, rows, strict=True) if key not in done)
    unanswered, patience = {}, Patience(give_up, has_answered)

    def outcome(item):
        return outcome_of(work, *item, patience)

    bar = Progress(desc=name, unit="item", total=len(keys), initial=n_done)
    with open_append(path) as f, bar:
        for line in each(outcome, todo, workers):
            bar.update()
            if "again" in line:  # not written down, so the next run asks again
                unanswered[line["key"]] = line
            else:
                append(f, line)
                done[line["key"]] = line

    # they ended in any order
    lines = [done.get(key) or unanswered[key] for key in keys]
    kept = [line["row"] for line in lines if "row" in line]
    rejected = [line["reject"] for line in lines if "reject" in line]
    # written whole, and only now: a killed run leaves the files of the last one that ended
    write_lines(folder / rejects, rejected)
    write_lines(folder / f"{name}.jsonl", kept)
    print_outcome(name, kept, rejected, unanswered)
    return kept


def outcome_of(work, key, row, patience):
    """The line that says what became of a row."""
    try:
        line = {"key": key, "row": work(row)}
    # returned and not raised: one bad item must not end the others' run
    except Unanswered as e:
        said = f"{patience.give_up} items in a row had no answer ({e.reason}: {clean(e.detail)})"
        advice = "what is finished is kept: mend the endpoint and run the same command again"
        patience.failed(e, f"{said}; {advice}")
        # the mark is for run_stage; such a line is never written
        return {"key": key, "reject": reject_of(row, e), "again": True}
    except Reject as e:
        line = {"key": key, "reject": reject_of(row, e)}
    patience.answered()
    return line


def reject_of(row, e):
    """A line of the file of rejects."""
    return {
        "id": clean(row["id"]),
        "reason": e.reason,
        "number": e.number,
        "detail": clean(e.detail),
    }


def print_outcome(name, kept, rejected, unanswered):
    """How many rows were kept, and for each reason how many were not and the first of them."""
    total = len(kept) + len(rejected)
    print(f"{name}: kept {len(kept)} of {total}, rejected {len(rejected)}")
    # one to look at for each reason: a threshold that is wrong is seen at its first victim
    for reason, n in Counter(r["reason"] for r in rejected).most_common():
        first = next(r["id"] for r in rejected if r["reason"] == reason)
        print(f"  {n:7} {reason:34} e.g. {first}")
    if unanswered:
        n = len(unanswered)
        print(f"  run the same command again to ask once more for the {n} without an answer")
