"""What is an example?

A line of JSONL:

    {"id", "images": [...], "question", "answer", "response", "aux_images": [...]}

with image paths relative to the file, and a response of the form

    <think> ... <latent></latent> <parser> ... </parser> ... </think> <answer> ... </answer>

whose k-th `<latent></latent>` belongs to aux_images[k]. What people write beside that (numbers,
null, one image as a string, a JSON list, `<image>` marks, lettered options) is put into one form
here and nowhere else; what cannot be is refused with file, line and field.
"""

import json
import math
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

from files import expect_object, file_digest, key_of, parse_json
from options import lettered, option_named, without_letters

LATENT_SPAN = "<latent></latent>"  # how a span is written in `response`
IMAGE_FIELDS = ("images", "aux_images")
FIELDS = ("id", "question", "answer", "response", "system", "options", *IMAGE_FIELDS)  # of a row
OURS = ("instruction", "step", "at_first", "error")  # what stages add to a row: no column of a file
IMAGE_MARK = "<image>"  # where an image stands in a question that says so
TAGS = re.compile(r"</?(?:think|latent|parser|answer)>")
EXPECTED_TAGS = (
    "<think>, then any number of <latent></latent> and <parser></parser>, then "
    "</think><answer></answer>"
)
TAG_ORDER = re.compile(r"<think>(?:<latent></latent>|<parser></parser>)*</think><answer></answer>")
# the control tokens of Qwen, GAP and Monet: in a question they would break the prompt, and in a
# response they would be learnt
RESERVED = re.compile(
    r"<\|(?:endoftext|(?:im|vision|image|video|latent|object_ref|box|quad|fim|repo|file)_\w+)\|>"
    r"|</?abs_vis_token(?:_pad)?>"
)

# --------------------------------------------------------------------------------------------------
# examples


class Row(dict):
    """An example, and where it stands: "file:line"."""

    where = ""


class Rows(Sequence):
    """Examples that stay on the disk: each is read, and put into one form, when it is asked for.

    places: what `read` takes of each row. A change is made to a row, in place, as it is read.
    """

    def __init__(self, read, places, changes=()):
        self.read, self.places, self.changes = read, places, changes

    @classmethod
    def of(cls, rows):
        """Rows of rows in memory, which are copied as they are read."""
        if isinstance(rows, cls):
            return rows

        def read(i):
            row = Row(rows[i])
            row.where = getattr(rows[i], "where", "")
            return row

        return cls(read, range(len(rows)))

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.keep(range(len(self))[i])
        row = self.read(self.places[i])
        for change in self.changes:
            change(row)
        return row

    def keep(self, which):
        """The rows of some indices alone, in their order."""
        return Rows(self.read, array("q", [self.places[i] for i in which]), self.changes)

    def then(self, change):
        """The same rows with a further change."""
        return Rows(self.read, self.places, (*self.changes, change))


def load_examples(path, training=True):
    """The Rows of a data file, JSONL or a JSON list, in one form; images can be opened from here.

    `training` also demands `response`, and an auxiliary image for each of its latent spans. Raises
    SystemExit naming file, line and field.
    """
    path = Path(path)
    if path.is_dir():
        raise SystemExit(f"{path}: a folder; expected a data file, JSON lines or a JSON list")
    if not path.exists():
        by = "`python toy.py data` writes the toy's, build_data.py train and val of public data"
        raise SystemExit(f"{path}: no such data file; {by}; --data=FILE names another")
    if not path.is_file():  # a pipe can be read only once
        raise SystemExit(f"{path}: no regular file, and rows are read where they stand")
    items = ListItems(path) if is_list(path) else LineItems(path)

    def read(n):
        where, raw = items.read(n)
        row = Row(in_one_form(raw, training, where))
        row.where = where
        find_images(row, path.parent)
        return row

    # in the order of the file; an id is a key everywhere later, so it must be one line's own
    first_place = {}  # {id: the place where it stands}
    for n in items.places:
        row = read(n)
        first = first_place.setdefault(row["id"], n)
        if first != n:
            raise SystemExit(f"{row.where}: id {row['id']!r} repeats {items.where(first)}")
        check_images(row)
        check_text(row)
        if training:
            check_response(row)
    if not items.places:
        raise SystemExit(f"{path}: no examples")
    return Rows(read, items.places)


def is_list(path):
    """Does a file hold a JSON list, after the byte order mark of some editors?"""
    with open(path, "rb") as f:
        for line in f:
            text = line.removeprefix(b"\xef\xbb\xbf").lstrip()
            if text:
                return text[:1] == b"["
    return False


class LineItems:
    """The objects of JSON lines, read where their lines stand."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb")  # held open: the rows of a file that is replaced stay the same
        self.starts, self.places = array("q", [0]), array("q")  # of lines; those that are not blank
        # split by "\n" alone: splitlines() would cut at characters that a JSON text may hold
        for n, line in enumerate(self.file):
            self.starts.append(self.starts[-1] + len(line))
            if line.strip():
                self.places.append(n)

    def line(self, n):
        size = self.starts[n + 1] - self.starts[n]
        # not seek and read, which threads would do for each other
        line = os.pread(self.file.fileno(), size, self.starts[n])
        if len(line) < size:
            raise SystemExit(f"{self.where(n)}: the file has become shorter while it was read")
        return line

    def where(self, n):
        return f"{self.path}:{n + 1}"

    def read(self, n):
        where = self.where(n)
        return where, expect_object(parse_json(self.line(n), where), where)


class ListItems:
    """The objects of a JSON list, as LLaVA's and LLaMA-Factory's files are: it is held whole."""

    def __init__(self, path):
        self.path = path
        self.items = parse_json(path.read_bytes(), str(path))
        self.places = range(len(self.items))

    def where(self, n):
        return f"{self.path}: item {n + 1}"

    def read(self, n):
        where = self.where(n)
        return where, expect_object(self.items[n], where)


def in_one_form(raw, training, where):
    """A row as every stage expects it: texts are text, lists are lists, null is absent."""
    row = {}
    for field, value in raw.items():
        if field not in FIELDS:
            try:
                value = finite(value)
            except RecursionError:
                raise SystemExit(f"{where}: field {field!r} is nested too deeply") from None
        # a null is what a table export writes for a cell without a value
        if field not in OURS and value is not None:
            row[field] = value
    texts = ["id", "question", "answer"]
    if training:
        texts.append("response")
    if "system" in row:
        texts.append("system")
    for field in [*texts, "images"]:
        if field not in row:
            missing = f"is missing; there are {', '.join(map(repr, row)) or 'none'}"
            raise SystemExit(f"{where}: field {field!r} {'is null' if field in raw else missing}")
    for field in texts:
        row[field] = as_text(row[field], field, where)

    if training:
        row.setdefault("aux_images", [])  # a response without a span needs none
    for field in IMAGE_FIELDS:
        if isinstance(row.get(field), str):  # a single image is often written without its list
            row[field] = [row[field]]
        if field in row:
            check_list(row[field], field, where)
            check_strings(row[field], field, where)
    if "options" in row:
        options = row["options"]  # of which a single one without its list is a mistake
        check_list(options, "options", where)
        row["options"] = without_letters([as_text(x, "options", where) for x in options])
        if len(options) > 26:
            raise SystemExit(f"{where}: {len(options)} options; there are 26 letters")
    if names_no_option(row):
        raise SystemExit(
            f"{where}: answer {row['answer']!r} is none of the {len(row['options'])} options, or "
            "not one alone; write the letter of the right one, or its text"
        )
    # the prompt needs each mark to have its image
    row["question"] = place_marks(row["question"], len(row["images"]), where)
    return row


def names_no_option(row):
    """Are there options, of which the gold answer is neither one's letter nor one's text?

    As ScienceQA's and AI2D's, the place of one, counted from 0, or "A, C", which names two: nothing
    that a model says would ever be right.
    """
    options = row.get("options")
    return bool(options) and option_named(row["answer"], lettered(options)) is None


def finite(value):
    """What stands in a column of the user's own as JSON has it: null for NaN and infinities."""
    if isinstance(value, dict):
        return {name: finite(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [finite(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(value, field, where):
    """A text, or a number as text: 17 is "17", 2.5 is "2.5"."""
    if isinstance(value, str):
        return value
    # json reads NaN and Infinity, which are no answers
    is_number = isinstance(value, int) or isinstance(value, float) and math.isfinite(value)
    if isinstance(value, bool) or not is_number:
        raise SystemExit(f"{where}: field {field!r} must be a str, found {value!r}")
    # as it stood in the file: 3 stays 3, 2.5 stays 2.5
    return json.dumps(value)


def check_list(value, field, where):
    if not isinstance(value, list):
        raise SystemExit(f"{where}: field {field!r} must be a list, found {value!r}")


def check_strings(values, field, where):
    for value in values:
        if not isinstance(value, str):
            raise SystemExit(f"{where}: field {field!r} must hold strings only, found {value!r}")


def place_marks(question, n_images, where):
    """The question with `<image>` where an image stands in the text; none if all stand before it.

    Raises SystemExit if there are marks, but not one per image.
    """
    n_marks = question.count(IMAGE_MARK)
    if n_marks == 0:
        return question
    if n_marks != n_images:
        raise SystemExit(
            f"{where}: field 'question' has {n_marks} {IMAGE_MARK} marks for {n_images} images"
        )
    # LLaVA's way: all marks first. That is where images stand anyway
    leading = re.match(rf"(?:\s*{IMAGE_MARK})+\s*", question)
    if leading and leading[0].count(IMAGE_MARK) == n_marks:
        return question[leading.end() :]
    return question


def find_images(row, folder):
    """Make a row's image paths, relative to its file, such as can be opened from here."""
    for field in IMAGE_FIELDS:
        if field in row:
            row[field] = [os.path.join(folder, path) for path in row[field]]


def check_images(row):
    """Raise SystemExit for an image that is not there."""
    for field in IMAGE_FIELDS:
        for path in row.get(field, ()):
            # not Path.is_file(), which raises for a NUL byte or an endless name
            if not os.path.isfile(path):
                raise SystemExit(f"{row.where}: {field}: no such image {path}")


def check_text(row):
    """Raise SystemExit for one of Qwen's control tokens in a text."""
    field, token = reserved_in(row)
    if token:
        raise SystemExit(f"{row.where}: field {field!r} contains the reserved token {token!r}")


def reserved_in(row):
    """(field, token) of the first control token in a row's texts; two "" for none."""
    for field in ("question", "response", "system", "options"):
        text = as_one_text(row.get(field, ""))
        # nor one that comes together where a span or a text is stripped
        found = RESERVED.search(text) or RESERVED.search(strip_parser(strip_latents(text)))
        if found:
            return field, found[0]
    return "", ""


def check_prompt_texts(**settings):
    """Raise SystemExit for a control token in a setting that becomes part of every prompt."""
    for name, text in settings.items():
        found = RESERVED.search(text)
        if found:
            raise SystemExit(f"{name}={text!r} contains the reserved token {found[0]!r}")


def as_one_text(value):
    """A text as it is, a list of texts as lines."""
    return value if isinstance(value, str) else "\n".join(value)


def check_response(row):
    """Raise SystemExit if the tags of a response are out of order, or spans and images differ."""
    fault, _, said = response_fault(row)
    if fault:
        raise SystemExit(f"{row.where}: {said}")


def response_fault(row):
    """(what is wrong with a response, by how much, that in a sentence); "" if nothing is."""
    response = row["response"]
    # the text between tags does not matter here
    tags = "".join(TAGS.findall(response))
    if not TAG_ORDER.fullmatch(tags):
        said = f"response has tags {tags!r}; expected {EXPECTED_TAGS}"
        return "tags missing or out of order", None, said
    spans, images = response.count(LATENT_SPAN), len(row["aux_images"])
    # its latents are fed, not written
    if spans != tags.count("<latent>"):
        said = f"a latent span must be written {LATENT_SPAN!r} with nothing inside"
        return "text inside a latent span", None, said
    # the k-th span is trained on the k-th image
    if spans != images:
        said = f"{spans} {LATENT_SPAN} in response but {images} aux_images"
        return "spans and auxiliary images differ", spans - images, said
    return "", None, ""


def strip_latents(response):
    """Remove every latent span; the `<parser>` text stays (difficulty-aware data)."""
    return re.sub(r" ?<latent></latent>", "", response)


def strip_parser(response):
    """Remove every `<parser>` text."""
    return re.sub(r" ?<parser>.*?</parser>", "", response, flags=re.DOTALL)


def question_text(row):
    """What the prompt asks: the question, its options with letters, and the run's instruction.

    Options are added where they stand in a column of their own and the question does not list
    them already. A benchmark's row (its options are a dict) has its whole prompt in `question`.
    """
    text = row["question"]
    options = row.get("options")
    if isinstance(options, list) and options:
        lines = [(chr(ord("A") + i), option) for i, option in enumerate(options)]
        # "Which is larger, (A) x or (B) y?" lists them itself
        listed = [rf"(?<!\w)\(?{x}[).:]\s*{re.escape(option.strip())}" for x, option in lines]
        if not all(re.search(mark, text) for mark in listed):
            text += "".join(f"\n{x}. {option}" for x, option in lines)
    return text + row.get("instruction", "")


# --------------------------------------------------------------------------------------------------
# what a row is known by


def question_key(row):
    """A hash of what is asked and what is right: text, options, gold answer, pictures."""
    asked = {name: row.get(name) for name in ("question", "options", "answer", "system")}
    return key_of(asked | {"images": [file_digest(path) for path in row["images"]]})


def example_key(row):
    """A hash of what a row teaches: its question and its response."""
    taught = [row[name] for name in ("response", "at_first") if name in row]
    return key_of([row["id"], question_key(row), *taught])
