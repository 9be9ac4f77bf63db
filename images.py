"""What are the pixels of a picture?

The same in every stage, and what a person sees: turned by its EXIF tag, transparency on white, 16
bits and floats scaled to 8, palettes and CMYK as RGB. What cannot be used is found before it is
needed.
"""

import base64
import binascii
import io
import math
import struct
from contextlib import contextmanager

import numpy as np
from PIL import Image

from data import Rows
from files import file_digest, memory, remembered
from launch import Progress, cores_allowed, faults_among, is_machines, rank_and_world
from threads import in_order

# what Pillow raises for a broken file
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, TypeError, RuntimeError, struct.error)
IMAGE_ERRORS += (Image.DecompressionBombError, AssertionError)
# not all that Pillow reads: EPS would start another program
FORMATS = tuple("JPEG PNG WEBP GIF BMP TIFF PPM JPEG2000 AVIF".split())
MOST_NARROW = 200  # the processor takes no picture whose sides differ more
ORIENTATION = 0x0112  # EXIF's tag for how a camera was held
BITS = 0x0102  # TIFF's tag for the bits of a sample
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# where a file's name promises what it does not hold: place, first bytes, advice
# fmt: off
NO_PICTURE = (
    (0, b"version https://git-lfs", "a pointer of Git LFS; run `git lfs pull` where it came from"),
    (4, (b"ftyphei", b"ftyphevc", b"ftypmif1"), "a HEIC photo; save it as JPEG or PNG"),
    (0, b"PAR1", "a parquet table; `build_data.py convert` reads it after `pip install pyarrow`"),
    (0, b"PK\x03\x04", "a zip archive; unpack it"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it"),
)
# fmt: on


class BadImage(ValueError):
    """Why a picture cannot be used."""


def other_kind(content):
    """What a file is, from its first bytes, and what to do; "" where it may be what it is said."""
    for place, begins, advice in NO_PICTURE:
        if content[place:].startswith(begins):
            return advice
    return ""


def open_image(source):
    """A picture as RGB: turned by its EXIF tag, transparency on white, 16 bits and floats scaled.

    source: a path, encoded bytes, or a data URI. Raises SystemExit naming the file.
    """
    try:
        return decode_image(source)
    except BadImage as e:
        raise SystemExit(f"{name_of(source)}: not a usable image ({e})") from None


def image_size(source):
    """(width, height) of a picture as it is shown, from its header alone. Raises as open_image."""
    try:
        with opened(source) as image:
            return shown_size(image)
    except BadImage as e:
        raise SystemExit(f"{name_of(source)}: not a usable image ({e})") from None


def decode_image(source):
    """As open_image, but raises BadImage with the reason."""
    with opened(source) as image:
        # a picture that cannot be used is refused before its pixels are read
        shown_size(image)
        turn = orientation(image)
        # now, while the file is open: Pillow reads pixels only when they are wanted
        image.load()
        return upright(image, turn)


@contextmanager
def opened(source):
    """Pillow's image of a picture. What goes wrong in here is BadImage, or the machine's fault."""
    try:
        with Image.open(image_file(source), formats=FORMATS) as image:
            yield image
    except BadImage:
        raise
    except IMAGE_ERRORS as e:
        if is_machines(e):  # of which the picture knows nothing
            e.filename = e.filename or name_of(source)
            raise
        said = " ".join(str(e).split()) or type(e).__name__
        raise BadImage(other_kind(first_bytes(source)) or said) from None


def upright(image, turn):
    """A picture as `open_image` gives it: turned by its EXIF orientation, and RGB."""
    if turn in TURNED:
        image = image.transpose(TURNED[turn])
    return as_rgb(image)


def first_bytes(source):
    """How a picture's file begins; nothing where it cannot be read."""
    try:
        file = image_file(source)
        if isinstance(file, io.BytesIO):
            return file.read(64)
        with open(file, "rb") as f:
            return f.read(64)
    except (OSError, ValueError):
        return b""


def png_of(image):
    """An image as the bytes of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_file(source):
    """What Pillow opens, for a path, encoded bytes or a data URI."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if str(source).startswith("data:"):
        return io.BytesIO(image_bytes(source))
    return source


def name_of(source):
    """A picture's name in messages."""
    embedded = isinstance(source, bytes) or str(source).startswith("data:")
    return "an embedded image" if embedded else source


def image_bytes(text):
    """The bytes of base64 text, with or without a data URI's prefix. Raises BadImage."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise BadImage(f"not base64: {e}") from None


def orientation(image):
    """The EXIF orientation of an opened picture, 1 to 8, without decoding its pixels."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    # a PNG may carry its tag before the pixels or behind them
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # getexif() would decode the whole picture to look for a tag behind its pixels
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except IMAGE_ERRORS:  # a tag that no program can read turns nothing
        return 1
    return turn if turn in TURNED else 1


def shown_size(image):
    """(width, height) after turning. Raises BadImage for one that the processor does not take."""
    width, height = image.size
    if max(width, height) > MOST_NARROW * min(width, height):
        raise BadImage(f"{width} x {height}: aspect ratio above {MOST_NARROW}")
    # the header counts as the camera was held, the decoder and the prompt as it is shown
    if orientation(image) >= 5:  # turned by a quarter
        return height, width
    return width, height


def as_rgb(image):
    """A decoded picture of any mode as RGB."""
    # scans, depth maps and medical pictures; convert() would clip them to white
    if image.mode == "F" or image.mode.startswith("I"):
        bits = image.tag_v2.get(BITS, (16,)) if image.format == "TIFF" else (16,)
        return Image.fromarray(as_bytes(np.asarray(image), bits[0])).convert("RGB")
    if image.has_transparency_data:  # on white: RGB alone would show what lies beneath
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert("RGB")


def as_bytes(grey, bits):
    """Grey values (h, w) of 0 to 1, of 8 or of `bits` bits as 0 to 255; other ranges are stretched.

    bits: those of a camera or scanner, 12 for example, where the file says so.
    """
    # else what a range means is not stored anywhere: 0 to 1, 8 bits and 16 bits are told by it
    low, high = float(grey.min()), float(grey.max())
    if not math.isfinite(high - low):
        raise BadImage("grey values that are not finite")
    if low < 0 or high > 65535:
        grey = (grey - low) * (255 / max(high - low, 1e-12))
    elif high > 255:
        grey = grey // 2 ** (max(8, min(bits, 16)) - 8)
    elif high < 2:  # resampling overshoots 1 a little
        grey = grey.clip(max=1) * 255
    return grey.astype(np.uint8)


def usable_rows(rows, leave_out, fields=("images",)):
    """The rows whose pictures can be decoded; the others are listed, all of them.

    Raises SystemExit with the list unless `leave_out`. Each picture is decoded once and remembered.
    """
    rows = Rows.of(rows)
    # a picture that many questions share is decoded once
    names = list(
        dict.fromkeys(path for row in rows for field in fields for path in row.get(field, ()))
    )
    fault_of = faults_among(names, image_faults)
    if rank_and_world()[1] > 1:
        memory.cache_clear()  # what the other ranks have found is in its file
    if not fault_of:
        return rows
    # all of them in one message: one at a time would take a day to mend
    good, lines = [], []
    for i, row in enumerate(rows):
        bad = [path for field in fields for path in row.get(field, ()) if path in fault_of]
        lines += [f"{row.where}: {path}: not a usable image ({fault_of[path]})" for path in bad]
        if not bad:
            good.append(i)
    if not leave_out:
        advice = "mend them, or leave the rows out with --skip_unusable=1"
        raise SystemExit("\n".join([*lines, f"{len(lines)} unusable images; {advice}"]))
    if rank_and_world()[0] == 0:
        print("\n".join([*lines, f"left out {len(rows) - len(good)} rows with unusable images"]))
    return rows.keep(good)


def image_faults(names):
    """For each picture, in order: why it cannot be used, "" if it can."""
    # Pillow lets other threads run while it decodes
    faults = in_order(image_fault, names, cores_allowed())
    shown = {"desc": "pictures", "unit": "image", "leave": False, "delay": 5}
    return Progress(faults, total=len(names), disable=rank_and_world()[0] > 0, **shown)


def image_fault(path):
    """Why a picture cannot be used; "" if it can. Its digest, too, is remembered.

    Only what can be used is remembered: a disk that was away for a moment is no fault of a picture.
    """

    def decodes(path):
        decode_image(path)
        return True

    try:
        remembered(path, "usable", decodes)
        file_digest(path)
    except BadImage as e:
        return str(e)
    return ""
