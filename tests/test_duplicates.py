"""Unrelated pictures are far from each other, and distances are the counts of bits that differ."""

import random

from conftest import photo
from PIL import Image

import build_data as b
import duplicates


def test_false_positives_on_random_images():
    """Among 300 x 300 pairs of unrelated photographs none is near.

    The nearest is far: `near` lies about 6 sigma of 255 coin tosses below it.
    """
    prints = [duplicates.fingerprint(photo(seed, (64, 64))) for seed in range(600)]
    distance, _ = duplicates.nearest(prints[:300], prints[300:])
    assert distance.min() > b.near + 20
    white, red = (Image.new("RGB", (64, 64), colour) for colour in ("white", "red"))
    flat = [duplicates.fingerprint(white), duplicates.fingerprint(red)]
    assert duplicates.nearest(flat, prints)[0].min() > b.near
    assert duplicates.nearest(flat[:1], flat[1:])[0] == [0]


def test_nearest_against_counting_bits():
    rng = random.Random(0)
    ours, theirs = ([("", f"{rng.getrandbits(256):064x}") for _ in range(n)] for n in (37, 21))
    distance, index = duplicates.nearest(ours, theirs, block=8)
    counted = [[(int(x, 16) ^ int(y, 16)).bit_count() for _, y in theirs] for _, x in ours]
    assert distance.tolist() == [min(c) for c in counted] and index.tolist() == [
        c.index(min(c)) for c in counted
    ]
