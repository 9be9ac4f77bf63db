"""Which pictures are the same? Exactly, by their pixels, or nearly, by a perceptual hash."""

import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from files import append, file_digest, open_append, read_lines
from launch import Progress, claim
from resume import Reject
from threads import each

# The perceptual hash: the signs of the LOW x LOW slowest cosines of a SIDE x SIDE grey image. What
# recompression, scaling and small cuts leave of a picture is in its slow waves.
SIDE, LOW = 32, 16
PHASES = np.pi / SIDE * (np.arange(SIDE) + 0.5)  # (SIDE,)
COSINES = np.cos(PHASES * np.arange(LOW)[:, None])  # (LOW, SIDE)


def coarse(image, side):
    """An image's levels on a side x side grid, each the mean of its patch."""
    # BOX is the plain mean; filters with negative weights would ring at edges
    return np.asarray(image.resize((side, side), Image.BOX), dtype=float)


def largest_difference(image, query):
    """The largest difference of two pictures on a 64 x 64 grid, in levels (0 to 255) of YCbCr."""
    # first to one size, so that both fall on the grid alike
    query = query.resize(image.size, Image.BICUBIC)
    # as JPEG has them: an edit can leave the grey levels alone, and noise is less than in RGB
    a, b = (coarse(x.convert("YCbCr"), 64) for x in (image, query))
    return float(np.abs(a - b).max())


def fingerprint(image):
    """(SHA-256 of the decoded pixels, perceptual hash of 256 bits), both as hex."""
    size = str(image.size).encode()  # the same bytes in another shape are another image
    pixels = hashlib.sha256(size + image.tobytes()).hexdigest()
    waves = COSINES @ coarse(image.convert("L"), SIDE) @ COSINES.T  # (LOW, LOW)
    bits = waves.flatten() > 1e-6  # a flat image gives zeros, not the signs of rounding errors
    bits[0] = False  # the mean, which is always above 0 and tells nothing
    return pixels, np.packbits(bits).tobytes().hex()


def fingerprints(images, total, name, folder, workers, decode):
    """{where: (pixels, hash)} of the pairs (where, path or encoded bytes) that `images` yields.

    decode(content) gives the RGB image of encoded bytes, or raises Reject; those images are counted
    in a printed line and left out. One image a worker is in memory. What was computed is kept in
    <folder>/work/fingerprints.jsonl, under a file's name, size and time, or a hash of the bytes.
    """
    path = Path(folder) / "work" / "fingerprints.jsonl"
    claim(path.parent, path.name)
    known = {line["key"]: line["print"] for line in read_lines(path, key=str, print=list)}
    found = {}

    def one(item):
        where, content = item
        key = content_key(content)
        if key in known:
            return where, key, known[key]
        # read by the worker, so that only as many images as workers are in memory
        encoded = content if isinstance(content, bytes) else Path(content).read_bytes()
        try:
            return where, key, fingerprint(decode(encoded))
        except Reject as e:
            return where, key, [e.reason, ""]  # no hash: it is not compared

    with open_append(path) as f:
        results = each(one, images, workers)
        for where, key, print_ in Progress(results, total=total, desc=name, unit="image"):
            # two workers may have read the same content: one line is enough; what could not be
            # read may be readable with other settings
            if key not in known and print_[1]:
                known[key] = print_
                append(f, {"key": key, "print": print_})
            found[where] = print_

    unread = [where for where, (_, hash_) in found.items() if not hash_]
    if unread:
        reason, _ = found[unread[0]]
        print(f"{name}: {len(unread)} images could not be compared, e.g. {unread[0]}: {reason}")
    return {where: print_ for where, print_ in found.items() if print_[1]}


def content_key(content):
    """What tells a picture's encoded bytes, or its file, from the next without decoding it."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()[:16]
    return file_digest(content)


def nearest(ours, theirs, block=128):
    """The smallest Hamming distance of each fingerprint of ours to theirs, and where: two (n,).

    block x len(theirs) pairs are held at a time.
    """
    ours, theirs = hash_words(ours), hash_words(theirs)  # (n, 4), (m, 4)
    distance, index = np.zeros(len(ours), int), np.zeros(len(ours), int)
    for i in Progress(range(0, len(ours), block), desc="near-duplicates", unit="block"):
        here = slice(i, i + block)
        bits = 0  # that differ: (block, m); never bit 0, so at most 255, and uint8 holds that
        # a word at a time: (block, m) at once, and never (block, m, 4)
        for w in range(4):
            differ = ours[here, None, w] ^ theirs[None, :, w]
            bits = bits + np.bitwise_count(differ)
        index[here] = bits.argmin(1)
        distance[here] = bits.min(1)
    return distance, index


def hash_words(prints):
    """The perceptual hashes of fingerprints as four 64-bit words each: (n, 4)."""
    return np.array([np.frombuffer(bytes.fromhex(hash_), np.uint64) for _, hash_ in prints])


def groups_of(rows, prints):
    """Lists of rows such that no image, by its pixels, occurs in two of them.

    prints: {image: (pixels, hash)}; an image that is not there is one by its name.
    """
    leader = list(range(len(rows)))  # union-find: rows of one group lead to one row

    def find(i):
        while leader[i] != i:
            # halves the way to the leader for whoever asks next
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first = {}  # the first row with these pixels
    for i, row in enumerate(rows):
        for name in row["images"] + row["aux_images"]:
            pixels = prints[name][0] if name in prints else name
            # this row's group joins that of the first row with the image
            leader[find(i)] = find(first.setdefault(pixels, i))
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[find(i)].append(row)
    return list(groups.values())
