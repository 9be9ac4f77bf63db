"""What of the test sets is in the training data? Questions, images, and what looks like these.

A copy of a question or of all pixels is a fact, and its example can be left out. A question that a
test set asks of several pictures is a template, and no copy without one of them. A near copy, by
the perceptual hash, is for a person to judge, on a page that shows both images.
"""

import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from benchmarks import BENCHMARKS, PUBLISHED, expanded, load_benchmark
from data import load_examples
from duplicates import nearest
from pages import write_page
from tables import images_of
from values import normalise

OPTIONS = re.compile(
    r"\s*\b(?:options|choices)\s*:.*|\n\s*\(?A\s*[.:)].*", re.DOTALL | re.IGNORECASE
)
INSTRUCTION = re.compile(  # as prompts end
    r"\s*(?:please )?(?:answer (?:with|the question using|yes or no)|put your final answer)\b.*$",
    re.IGNORECASE,
)
OUR_TEMPLATE = 5  # a question that we ask of so many pictures is a template, "Find x." [ours]
FINDINGS = ("pixels", "question", "template", "near")


def load_tests(names, data_root):
    """{(benchmark, id): row} of test sets: public ones, a paper's table of them, or JSONL files."""
    tests = {}
    for name in expanded(names):
        if name in BENCHMARKS:
            rows, _ = load_benchmark(name, data_root)
        elif Path(name).is_file():
            rows = load_examples(name, training=False)
        else:
            there = ", ".join([*PUBLISHED, *BENCHMARKS])
            raise SystemExit(f"benchmarks: {name!r} is neither a file nor one of {there}")
        # an id is unique within its benchmark only
        tests |= {(name, row["id"]): row for row in rows}
    return tests


def images_of_tests(tests):
    """Yield ((benchmark, id, which image), path or encoded bytes), read as they are needed."""
    for (benchmark, id), row in tests.items():
        for i, image in enumerate(images_of(row)):
            yield (benchmark, id, i), image


def find_copies(rows, tests, ours, theirs, near):
    """The findings, a dict each, in the order of `rows`.

    ours, theirs: fingerprints by our image's name, and by (benchmark, id, which image).
    near: two images are near each other if at most so many bits of their hashes differ.
    """
    by_question = defaultdict(list)
    for key, row in tests.items():
        by_question[bare_question(row)].append(key)
    # where test rows share an image, the last stands for all; `rows_of` has them all
    by_pixels = {pixels: where for where, (pixels, _) in theirs.items()}
    rows_of, pictures_of = defaultdict(set), defaultdict(set)
    for (benchmark, id, _), (pixels, _) in theirs.items():
        rows_of[pixels].add((benchmark, id))
        pictures_of[benchmark, id].add(pixels)
    # copies are looked up; near copies need every pair of images
    by_hash = near_copies(ours, theirs, near)

    our_questions = [bare_question(row) for row in rows]
    our_pictures = defaultdict(set)  # by the question that is asked of them
    for question, row in zip(our_questions, rows):
        pixels = frozenset(ours[name][0] for name in row["images"] if name in ours)
        our_pictures[question].add(pixels)

    def is_template(question, asked):
        """Does a test set ask it of several pictures (HRBench of each four times), or do we?"""
        pictures = defaultdict(set)
        for key in asked:
            pictures[key[0]].add(frozenset(pictures_of[key]))
        several = any(len(of) > 1 for of in pictures.values())
        return several or len(our_pictures[question]) >= OUR_TEMPLATE

    findings = []
    for question, row in zip(our_questions, rows):
        # auxiliary images, too: they are what the latents are trained on
        names = row["images"] + row["aux_images"]
        asked = by_question.get(question)
        if asked:
            # "Is there a person in the image?" is a copy of none, unless the picture is
            same = [ours[name][0] for name in names if name in ours]
            same += [theirs[by_hash[name][0]][0] for name in names if name in by_hash]
            shown = set().union(*(rows_of.get(pixels, ()) for pixels in same))
            seen = [key for key in asked if key in shown]
            kind = "template" if not seen and is_template(question, asked) else "question"
            benchmark, id = (seen or asked)[-1]
            # the question matched, not an image: None
            findings.append(finding(kind, row, None, (benchmark, id, None), None))
        for name in names:
            # an image that could not be read has no fingerprint
            where = by_pixels.get(ours[name][0]) if name in ours else None
            if where:  # and near as well, which says nothing more
                findings.append(finding("pixels", row, name, where, 0))
            elif name in by_hash:
                where, distance = by_hash[name]
                findings.append(finding("near", row, name, where, distance))
    return findings


def bare_question(row):
    """A row's question without a benchmark's prompt and options around it, in one spelling."""
    question = re.sub(r"<image\d*>", " ", row.get("asked", row["question"]))
    # without runs of spaces, over which the patterns below would take long
    question = "\n".join(" ".join(line.split()) for line in question.splitlines() if line.strip())
    question = INSTRUCTION.sub("", OPTIONS.sub("", question)).strip() or question
    # NFKC: full-width letters, ligatures and the like are one with the plain ones
    return normalise(unicodedata.normalize("NFKC", question))


def near_copies(ours, theirs, near):
    """{our image: (where in theirs, bits that differ)} of those with a copy at most `near` away."""
    # nothing has no nearest
    if not ours or not theirs:
        return {}
    distances, indices = nearest(ours.values(), theirs.values())  # (n,), (n,)
    # in the order of its values: index i of these is place i
    places = list(theirs)
    found = {}
    for name, distance, index in zip(ours, distances, indices):
        if distance <= near:
            found[name] = places[index], int(distance)
    return found


def finding(kind, row, image, where, distance):
    """A line of audit.jsonl."""
    benchmark, benchmark_id, benchmark_image = where
    return {
        "kind": kind,
        "id": row["id"],
        "image": image,
        "benchmark": benchmark,
        "benchmark_id": benchmark_id,
        "benchmark_image": benchmark_image,
        "distance": distance,
    }


def write_pairs(path, findings, tests, folder, most, shown):
    """The page on which a person judges the near pairs, the `most` nearest, the nearest first.

    Our images lie in `folder`; shown(content, caption) gives the HTML of encoded bytes.
    """
    pairs = [f for f in findings if f["kind"] == "near"]
    # the nearest are the likeliest copies; nobody looks at thousands
    pairs = sorted(pairs, key=lambda f: f["distance"])[:most]
    cards = []
    for pair in pairs:
        ours = (Path(folder) / pair["image"]).read_bytes()
        test = tests[pair["benchmark"], pair["benchmark_id"]]
        theirs = images_of(test)[pair["benchmark_image"]]
        # from a table it comes as bytes, else as a path
        if not isinstance(theirs, bytes):
            theirs = Path(theirs).read_bytes()
        # 255 and not 256: the hash leaves its first bit unset
        cards.append(
            f"<p>{pair['distance']} of 255 bits differ</p>"
            + shown(ours, pair["id"])
            + shown(theirs, f"{pair['benchmark']} {pair['benchmark_id']}")
        )
    write_page(path, f"{len(pairs)} near pairs: ours, theirs", cards)
