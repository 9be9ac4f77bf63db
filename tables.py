"""How are official test files read? TSV and CSV with images inside, JSON and JSON lines.

A table of 5 GB is never in memory at once: its rows hold where each image lies in the file, and
`images_of` reads the images of one row when they are wanted.
"""

import ast
import csv
import hashlib
import json
import sys
from typing import NamedTuple

from images import image_bytes

csv.field_size_limit(sys.maxsize)  # a cell may hold an 8K image

LONGEST_REFERENCE = 64  # characters; a shorter image cell names a row that holds the image
# fmt: off
NA = {  # what pandas reads as missing: VLMEvalKit drops an option that says so, and so do we
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}
# fmt: on


class Cell(NamedTuple):
    """An image in a table: one `item` of a cell of the row that begins at byte `offset`."""

    path: str
    offset: int
    column: int
    item: int  # 0, or the place in the cell's list


class Lines:
    """The decoded lines of an open file, and where reading stands: byte, line number, MD5."""

    def __init__(self, file):
        self.file = file
        self.offset = 0
        self.number = 0
        self.digest = hashlib.md5()

    def __iter__(self):
        for line in self.file:
            self.digest.update(line)
            self.offset += len(line)
            self.number += 1
            # else a byte order mark would be part of the first column's name
            yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")


def read_table(path, delimiter="\t"):
    """(rows, MD5) of a TSV or CSV file with a header, in one pass.

    An `image` column becomes `images`, a list of Cells. Raises SystemExit naming file and line.
    """
    rows = []
    # bytes, not text: what finds a row again is where it begins in the file
    with open(path, "rb") as f:
        lines = Lines(f)
        try:
            # the csv module takes quotes and line breaks within cells as pandas does
            cells_of_rows = csv.reader(lines, delimiter=delimiter)
            columns = next(cells_of_rows, [])
            image = columns.index("image") if "image" in columns else None
            # where the next row begins: its images are read from there, when they are wanted
            start = lines.offset
            for cells in cells_of_rows:
                if not cells:  # a blank line, which is no row to pandas either
                    start = lines.offset
                    continue
                # most often a cut download, or a quote that is never closed
                if len(cells) != len(columns):
                    raise SystemExit(
                        f"{path}:{lines.number}: {len(cells)} cells where the header names "
                        f"{len(columns)}: {columns}"
                    )
                row = dict(zip(columns, cells))
                if image is not None:
                    row["images"] = image_cells(row.pop("image"), path, start, image)
                rows.append(row)
                # the reader has taken this row's lines and no more
                start = lines.offset
        except (csv.Error, ValueError, SyntaxError, RecursionError, MemoryError) as e:
            # the last three: what parsing a cell that looks like a list may end in
            raise SystemExit(f"{path}:{lines.number}: not readable as a table ({e})") from None
    if image is not None:
        rows = follow_references(rows, path)
    return rows, lines.digest.hexdigest()


def cell_items(cell):
    """What an image cell holds: nothing, one image or reference, or a list as Python writes it."""
    # VLMEvalKit writes several images as a Python list
    if cell.startswith("["):
        return [str(x) for x in ast.literal_eval(cell)]
    return [] if cell in NA else [cell]


def image_cells(cell, path, offset, column):
    """A Cell for each base64 image of an image cell; references stay as they are."""
    found = []
    for i, item in enumerate(cell_items(cell)):
        if len(item) > LONGEST_REFERENCE:
            item = Cell(str(path), offset, column, i)
        found.append(item)
    return found


def follow_references(rows, path):
    """The rows with Cells only: a reference is the `index` of the row whose images are meant.

    Rows without images are left out, as VLMEvalKit does. Raises SystemExit for a reference to none.
    """
    # circular sets hold an image once, and name it in the other rows
    by_index = {row.get("index"): row for row in rows}

    def followed(item):
        """The Cells that an item of an image cell stands for."""
        images, seen = [item], set()
        # a reference may lead to another; one that comes back to itself leads nowhere
        while not all(isinstance(image, Cell) for image in images):
            name = images[0]
            if len(images) > 1 or name in seen or not by_index.get(name, {}).get("images"):
                raise SystemExit(
                    f"{path}: an image cell holds {name!r}, which is neither an image nor the "
                    "index of a row with images"
                )
            seen.add(name)
            images = by_index[name]["images"]
        return images

    found = [[cell for item in row["images"] for cell in followed(item)] for row in rows]
    return [row | {"images": images} for row, images in zip(rows, found) if images]


def images_of(row):
    """A row's images as paths or encoded bytes, read from the disk now."""
    return [read_cell(x) if isinstance(x, Cell) else x for x in row["images"]]


def read_cell(image):
    """The encoded bytes of an image in a table."""
    with open(image.path, "rb") as f:
        # one row of the file, however large the file is
        f.seek(image.offset)
        # a tab: of the official files only the TSVs have images inside
        cells = next(csv.reader((line.decode() for line in f), delimiter="\t"))
    return image_bytes(cell_items(cells[image.column])[image.item])


def read_json_rows(path):
    """(rows, MD5) of a JSON list, a JSON object of rows, or JSON lines."""
    raw = path.read_bytes()
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
        else:
            rows = json.loads(raw)
    except ValueError as e:
        raise SystemExit(f"{path}: not JSON ({e})") from None
    if isinstance(rows, dict):  # of rows by id
        # MathVista's; what the ids say, the rows say as well
        rows = list(rows.values())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{path}: expected a list of JSON objects")
    return rows, hashlib.md5(raw).hexdigest()
