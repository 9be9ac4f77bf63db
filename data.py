"""What is an example, and how do files live on a disk?

Rows and their tags, files that we write and read again. An example is a line of JSONL:

    {"id", "images": [...], "question", "answer", "response", "aux_images": [...]}

with image paths relative to the file, and a response of the form

    <think> ... <latent></latent> <parser> ... </parser> ... </think> <answer> ... </answer>

whose k-th `<latent></latent>` belongs to aux_images[k]. What people write beside that (numbers,
null, one image as a string, a JSON list, `<image>` marks, lettered options) is put into one form
here and nowhere else; what cannot be is refused with file, line and field.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from answers import lettered, option_named, without_letters

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
CHUNK = 2**20  # bytes that are read at once
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: no UTF-8 can hold it

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


def parse_json(content, where):
    """The value of JSON bytes. Raises SystemExit if they are none, or hold what is no Unicode."""
    try:
        # Windows editors begin a file with a mark that json refuses
        text = content.decode("utf-8-sig")
        value = json.loads(text)
        # only an escape can smuggle half a character in
        if "\\ud" in text.lower() and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise SystemExit(f"{where}: not Unicode: half of a surrogate pair")
    except UnicodeDecodeError as e:
        raise SystemExit(f"{where}: not Unicode: {e}") from None
    except ValueError as e:
        raise SystemExit(f"{where}: not JSON ({e})") from None
    except RecursionError:
        raise SystemExit(f"{where}: not usable JSON: nested too deeply") from None
    return value


def expect_object(value, where):
    if not isinstance(value, dict):
        raise SystemExit(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


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
    """Remove every latent span; the `<parser>` text stays (difficulty-aware data, section 4.3)."""
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
# files that we write: whole under a temporary name, or appended to a line at a time


def write_then_rename(path, write):
    """Call `write(tmp_path)` and rename the result to `path`, which is never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the rename is one step; hidden, so that no pattern finds it
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tmp.touch()
        mode = tmp.stat().st_mode
        write(tmp)
        tmp.chmod(mode)  # safetensors makes files that their owner alone may read
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())  # on the disk before what it replaces goes
        os.replace(tmp, path)
    except (OSError, SafetensorError) as e:
        e.filename = getattr(e, "filename", None) or str(path)  # which file found the disk full
        raise
    finally:
        tmp.unlink(missing_ok=True)  # of a write that failed


def write_text(path, text):
    """Write a text file at once."""
    write_then_rename(path, lambda tmp: tmp.write_bytes(text.encode()))


def write_json(path, value, indent=None):
    """Write a JSON file at once. NaN, which no other reader takes, is an error."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False))


def write_lines(path, rows):
    """Write a JSONL file at once."""

    def write(tmp):
        with open(tmp, "wb") as f:
            f.writelines(json_line(row).encode() for row in rows)

    write_then_rename(path, write)


def json_line(row):
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def open_append(path):
    """Open an append-only JSONL file, cutting off a half-written last line first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "ab+")  # not "r+": every write goes to the end, whoever else writes
    # everything up to the last newline is a finished row; it is looked for from the end
    end = size = f.seek(0, os.SEEK_END)
    found = -1
    while end and found < 0:
        start = max(0, end - CHUNK)
        f.seek(start)
        found = f.read(end - start).rfind(b"\n")
        end = start + found + 1
    # not what another process has added since
    if end < size == os.fstat(f.fileno()).st_size:
        f.truncate(end)
    return f


def append(f, row):
    """Write one row and flush it to the disk: a finished row survives a kill."""
    try:
        f.write(json_line(row).encode())
        f.flush()
        # else a power cut could lose what a resumed run takes for done
        os.fsync(f.fileno())
    except OSError as e:
        e.filename = f.name  # which file found the disk full
        raise


# --------------------------------------------------------------------------------------------------
# files that we wrote, read again: by their fields, types and shapes


def read_lines(path, **fields):
    """Rows of an append-only JSONL file, none if it is not there.

    A last line without a newline was cut off by a kill and is left out. fields: {name: type or
    types} that every row must have; raises SystemExit naming file, line and field.
    """
    if not Path(path).exists():
        return []
    return list(each_line(path, **fields))


def each_line(path, **fields):
    """Yield the rows of such a file, which is there: a million need not be held at once."""
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            # what stands after the last newline was being written when the process was killed
            if not line.endswith(b"\n"):
                return
            where = f"{path}:{n}"
            row = expect_object(parse_json(line, where), where)
            check_fields(row, fields, where)
            yield row


def read_json(path, **fields):
    """The object of a JSON file that a stage wrote. Raises as read_lines."""
    value = expect_object(parse_json(Path(path).read_bytes(), str(path)), str(path))
    check_fields(value, fields, path)
    return value


def check_fields(row, fields, where):
    """Raise SystemExit for a field that is missing, of another type, or no finite number."""
    for name, kind in fields.items():
        value = row.get(name)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # not isinstance, which takes True for a number
        right = type(value) in kinds
        if isinstance(value, float) and not math.isfinite(value):
            right = False
        if not right:
            wanted = " or ".join(k.__name__ for k in kinds)
            found = "nothing" if name not in row else repr(value)[:80]
            raise SystemExit(f"{where}: field {name!r} must be {wanted}, found {found}")


def read_safetensors(path, names=(), fields=()):
    """All tensors and the metadata of a safetensors file, every number finite.

    Raises SystemExit if it lacks one of the tensors `names` or of the metadata `fields`.
    """
    check_there(path)
    try:
        with safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            meta = f.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise SystemExit(f"{path}: not a readable safetensors file ({e})") from None
    missing = [name for name in names if name not in tensors]
    missing += [field for field in fields if field not in meta]
    if missing:
        there = f"has {sorted(tensors)} and metadata {sorted(meta)}"
        raise SystemExit(f"{path}: lacks {missing}, {there}")
    # a NaN here would become a NaN everywhere, without a word
    for name, tensor in tensors.items():
        check_finite(tensor, f"{path}: tensor {name!r}")
    return tensors, meta


WRITTEN_BY = {
    "pca.safetensors": "fit_pca.py writes it",
    "bank.safetensors": "fit_pca.py writes it",
    "index.json": "fit_pca.py writes it",
    "latent_head.safetensors": "train.py writes it",
    "log.jsonl": "train.py writes it",
    "config.json": "expected a Qwen2.5-VL folder, which train.py writes, or a download",
}


def check_there(path, by=""):
    """Raise SystemExit for a file that is not there, naming the stage that writes it."""
    if not Path(path).is_file():
        by = by or WRITTEN_BY.get(Path(path).name, "")
        raise SystemExit(f"{path}: no such file{by and '; '}{by}")


def check_finite(tensor, what):
    """Raise SystemExit if a tensor holds NaN or an infinity."""
    if not tensor.isfinite().all():
        raise SystemExit(f"{what} holds numbers that are not finite")


# --------------------------------------------------------------------------------------------------
# what a result was made with: contents, never paths or times


def seed_of(*parts):
    """A 63-bit seed that depends on nothing but `parts`: not on ranks, batches or order."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes signed 64-bit seeds


def key_of(value, *files):
    """A hash of a JSON value and of file contents: results of another key are not used again."""
    # sorted: the order in which settings are named does not count
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for path in files:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def file_digest(path):
    """A hash of a file's content, remembered."""
    return remembered(path, "sha256", hash_file)


def hash_file(path):
    """A hash of a file's content, read now."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def metadata_of(path):
    """What a safetensors file says of itself; {} of one that is not there, or not whole."""
    try:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}
    except (OSError, SafetensorError):  # missing or cut off
        return {}


def is_made(path, key):
    """Is a safetensors file there, whole, and made under this key?"""
    return metadata_of(path).get("key") == key


def file_md5(path):
    """The MD5 of a file, by which an evaluation's record names its data."""
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


def tensors_digest(path):
    """A hash of a safetensors file's tensors and metadata, whatever their order; remembered."""
    return remembered(path, "tensors", hash_tensors)


def hash_tensors(path):
    digest = hashlib.sha256()
    try:
        with safe_open(path, "pt") as f:
            digest.update(json.dumps(f.metadata() or {}, sort_keys=True).encode())
            for name in sorted(f.keys()):
                tensor = f.get_tensor(name).contiguous()
                # the name and shape too: the same bytes as another matrix are another tensor
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy())
    except (OSError, SafetensorError) as e:
        raise SystemExit(f"{path}: not a readable safetensors file ({e})") from None
    return digest.hexdigest()[:16]


# what transformers reads of a model folder beside its weights; other files are a user's notes
# fmt: off
FOLDER_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
)
# fmt: on


def folder_digest(folder):
    """A hash of what a model folder computes: its weights, configuration, tokenizer and template.

    Copied or touched it is the same.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    digests = [(file.name, tensors_digest(file)) for file in files]
    there = (Path(folder) / name for name in FOLDER_FILES)
    digests += [(file.name, file_digest(file)) for file in there if file.is_file()]
    return key_of(digests)


def question_key(row):
    """A hash of what is asked and what is right: text, options, gold answer, pictures."""
    asked = {name: row.get(name) for name in ("question", "options", "answer", "system")}
    return key_of(asked | {"images": [file_digest(path) for path in row["images"]]})


def example_key(row):
    """A hash of what a row teaches: its question and its response."""
    taught = [row[name] for name in ("response", "at_first") if name in row]
    return key_of([row["id"], question_key(row), *taught])


def memory_file():
    """Where digests are remembered from run to run."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "gap" / "files.jsonl"


MEMORY_LOCK = threading.Lock()


@cache
def memory():
    """{hash of (path, size, times, what): value} of what runs have found of files."""
    known = {}
    try:
        with open(memory_file(), "rb") as file:
            for line in file:
                key, _, value = line.rpartition(b", ")
                try:
                    # a hash: of a million pictures the paths alone would be half a gigabyte
                    known[short_hash(key)] = json.loads(value.removesuffix(b"]\n"))
                except ValueError:  # a line cut off by a kill
                    continue
    except (OSError, RuntimeError):  # no home, or no file that can be read: found out again
        pass
    return known


def short_hash(content):
    return hashlib.blake2b(content, digest_size=16).digest()


def remembered(path, what, compute):
    """compute(path), or what it gave before for this path, size and times.

    100,000 images so cost a stat each. Memory that cannot be kept costs time, nothing else.
    """
    # the path as the system knows it: another spelling of it is the same file. Archives and copies
    # may keep the time of a change; that of the inode they cannot set
    stat = os.stat(path)
    found = [os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, what]
    # the line of a file begins with what is known of it, and ends with the value
    line = json.dumps(found).removesuffix("]").encode()
    # another process may have written meanwhile: at worst a file is read twice
    with MEMORY_LOCK:  # many threads ask at once, and each would read it
        known = memory()
    key = short_hash(line)
    if key not in known:
        known[key] = compute(path)
        try:
            file = memory_file()
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "ab") as f:
                f.write(line + b", " + json.dumps(known[key]).encode() + b"]\n")
        except (OSError, RuntimeError):  # a home that is none or cannot be written
            pass
    return known[key]


def versions():
    """Of python, torch, transformers and this repository, for the record of a run."""
    import transformers

    folder = Path(__file__).parent
    try:
        command = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()
    except OSError:  # no git here
        git = ""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git or "unknown",
    }
