"""How are official test files read? Large tables, tables under fuzz, and any bytes at all."""

import base64
import csv
import random
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tables


def test_large_tables_stay_on_the_disk(tmp_path):
    """A table of 200 MB is listed, and its images read, in far less memory than it has."""
    path = tmp_path / "big.tsv"
    cell = base64.b64encode(random.Random(0).randbytes(3 << 20))
    with open(path, "wb") as f:
        f.write(b"index\timage\tquestion\n")
        for i in range(50):
            f.write(b"%d\t%s\tq\n" % (i, cell[:-4] + b"%04d" % i))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows, _ = tables.read_table(path)
    sizes = {len(tables.images_of(row)[0]) for row in rows}
    assert len(rows) == 50 and sizes == {3 << 20} and path.stat().st_size > 200e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60e3  # KiB


def test_a_blank_line_is_no_row(tmp_path):
    path = tmp_path / "a.tsv"
    cells = [base64.b64encode(bytes([n]) * 90).decode() for n in (1, 2)]
    path.write_text(f"index\timage\n1\t{cells[0]}\n\n2\t{cells[1]}\n\n\n")
    rows, _ = tables.read_table(path)
    assert [row["index"] for row in rows] == ["1", "2"]
    assert [tables.images_of(row) for row in rows] == [[bytes([n]) * 90] for n in (1, 2)]


def test_a_reference_stands_for_all_images_of_a_row(tmp_path):
    """Through other references, too; a cell that pandas reads as missing drops its row."""
    path = tmp_path / "a.tsv"
    one, two = (base64.b64encode(bytes([n]) * 90).decode() for n in (1, 2))
    cells = [f"['{one}', '{two}']", "0", "1", "nan", one]
    path.write_text("index\timage\n" + "".join(f"{n}\t{x}\n" for n, x in enumerate(cells)))
    rows, _ = tables.read_table(path)
    both = [bytes([n]) * 90 for n in (1, 2)]
    assert [row["index"] for row in rows] == ["0", "1", "2", "4"]
    assert [tables.images_of(row) for row in rows] == [both] * 3 + [both[:1]]
    for cells in (["1", "0"], [f"['{one}', '0']"], ["9"]):
        path.write_text("index\timage\n" + "".join(f"{n}\t{x}\n" for n, x in enumerate(cells)))
        with pytest.raises(SystemExit, match="neither an image nor the index"):
            tables.read_table(path)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(
            st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=8),
            min_size=2,
            max_size=2,
        ),
        max_size=5,
    )
)
def test_tables_under_fuzz(tmp_path_factory, cells):
    """What csv writes comes back cell by cell, and its images from their offsets."""
    path = tmp_path_factory.getbasetemp() / "fuzz.tsv"
    rows = [
        {
            "index": str(i),
            "a": a,
            "image": "AAAA" * 20 + base64.b64encode(b.encode()).decode(),
            "z": b,
        }
        for i, (a, b) in enumerate(cells)
    ]
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(
            f, ["index", "a", "image", "z"], delimiter="\t", quoting=csv.QUOTE_ALL
        )
        writer.writeheader()
        writer.writerows(rows)
    found, _ = tables.read_table(path)
    assert [{k: r[k] for k in ("index", "a", "z")} for r in found] == [
        {k: r[k] for k in ("index", "a", "z")} for r in rows
    ]
    assert [tables.images_of(r)[0][60:] for r in found] == [r["z"].encode() for r in rows]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_table_or_one_sentence(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.tsv"
    for head in (b"", b"index\timage\n"):
        path.write_bytes(head + data)
        try:
            rows, _ = tables.read_table(path)
        except SystemExit as e:
            assert str(path) in str(e)
        else:
            assert all(isinstance(r, dict) for r in rows)
