"""How do files live on a disk?

They are written whole under a temporary name, or a line at a time; read again by their fields,
types and shapes; and known by their contents, never by paths or times.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from launch import is_machines

CHUNK = 2**20  # bytes that are read at once
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: no UTF-8 can hold it

# --------------------------------------------------------------------------------------------------
# files that we write: whole under a temporary name, or appended to a line at a time


def write_then_rename(path, write):
    """Call `write(tmp_path)` and rename the result to `path`, which is never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside it, so that the rename is one step; hidden, so that no pattern finds it; in a folder
    # of its own, since safetensors writes under one more temporary name
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp = folder / path.name
    with naming(path):
        try:
            folder.mkdir(exist_ok=True)
            tmp.touch()
            mode = tmp.stat().st_mode
            write(tmp)
            tmp.chmod(mode)  # safetensors makes files that their owner alone may read
            with open(tmp, "rb") as f:
                os.fsync(f.fileno())  # on the disk before what it replaces goes
            os.replace(tmp, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # and what is left of a write that failed


@contextmanager
def naming(path):
    """Give an error of the disk that names no file this name: which file found the disk full?"""
    try:
        yield
    except (OSError, SafetensorError) as e:
        e.filename = getattr(e, "filename", None) or str(path)
        raise


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
    # not "r+": every write goes to the end, whoever else writes. Unbuffered: nothing is left to be
    # written, and to fail without a name, when it is closed
    f = open(path, "ab+", buffering=0)
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
    """Write one row and flush it to the disk: a finished row survives a kill.

    Raises FileNotFoundError if the file was removed meanwhile: what is written to it would be lost.
    """
    line, written = json_line(row).encode(), 0
    with naming(f.name):
        try:
            while written < len(line):
                written += f.write(line[written:])
        except OSError:
            # no half of a line before the next one, of another thread
            if written and f.tell() == os.fstat(f.fileno()).st_size:
                f.truncate(f.tell() - written)
            raise
        # else a power cut could lose what a resumed run takes for done
        os.fsync(f.fileno())
        if was_removed(f):
            raise FileNotFoundError(errno.ENOENT, "removed while it was written", str(f.name))


def was_removed(f):
    """Has an open file no name any more?"""
    here = os.fstat(f.fileno())
    if here.st_nlink:
        return False
    try:  # some disks count no names
        return not os.path.samestat(here, os.stat(f.name))
    except FileNotFoundError:
        return True


# --------------------------------------------------------------------------------------------------
# files that we wrote, read again: by their fields, types and shapes


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
        if is_machines(e):
            raise
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
        if is_machines(e):
            raise
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
