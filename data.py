"""What is an example, and how do files live on a disk?

Rows and their tags, images, append-only files, settings, ranks. An example is a line of JSONL:

    {"id", "images": [...], "question", "answer", "response", "aux_images": [...]}

with image paths relative to the file, and a response of the form

    <think> ... <latent></latent> <parser> ... </parser> ... </think> <answer> ... </answer>

whose k-th `<latent></latent>` belongs to aux_images[k].
"""

import ast
import errno
import hashlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open

LATENT_SPAN = "<latent></latent>"  # how a span is written in `response`
TAGS = re.compile(r"</?(?:think|latent|parser|answer)>")
TAG_ORDER = re.compile(
    r"<think>(?:(?:<latent></latent>)?(?:<parser></parser>)?)*</think><answer></answer>"
)
# Qwen's control tokens: in a question or a response they would break the prompt
RESERVED = re.compile(
    r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad|latent_\w+)\|>"
)

# --------------------------------------------------------------------------------------------------
# examples


def load_examples(path, training=True):
    """Read and check a JSONL data file; image paths come back absolute.

    `training` also demands `response` and `aux_images`, the k-th `<latent></latent>` belonging to
    aux_images[k]. Raises SystemExit naming file, line and field.
    """
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"{path}: no such data file (for the toy, run `python toy.py data` first)")
    rows, first_line = [], {}  # first_line: {id: the line that has it}
    for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{n}"
        row = parse_row(line, where)
        check_fields(row, training, where)
        if row["id"] in first_line:
            raise SystemExit(f"{where}: id {row['id']!r} repeats line {first_line[row['id']]}")
        first_line[row["id"]] = n
        find_images(row, path.parent, training, where)
        check_text(row, training, where)
        if training:
            check_response(row, where)
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: no examples")
    return rows


def parse_row(line, where):
    """A line of a data file as a dict. Raises SystemExit if it is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError as e:
        raise SystemExit(f"{where}: not JSON ({e})") from None
    if not isinstance(row, dict):
        raise SystemExit(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def image_fields(row, training):
    """The fields of a row that hold image paths."""
    return ["images", "aux_images"] if training or "aux_images" in row else ["images"]


def check_fields(row, training, where):
    """Raise SystemExit for a field that is missing or of another type."""
    texts = ["id", "question", "answer"]
    if training:
        texts.append("response")
    lists = image_fields(row, training)
    if "options" in row:
        lists.append("options")
    for fields, kind in ((texts, str), (lists, list)):
        for field in fields:
            found = row.get(field)
            if not isinstance(found, kind):
                raise SystemExit(
                    f"{where}: field {field!r} must be a {kind.__name__}, found {found!r}"
                )
    for field in lists:
        for item in row[field]:
            if not isinstance(item, str):
                raise SystemExit(f"{where}: field {field!r} must hold strings only, found {item!r}")


def find_images(row, folder, training, where):
    """Make a row's image paths absolute. Raises SystemExit for one that is not there."""
    for field in image_fields(row, training):
        row[field] = [str(folder / path) for path in row[field]]
        for path in row[field]:
            if not Path(path).is_file():
                raise SystemExit(f"{where}: {field}: no such image {path}")


def check_text(row, training, where):
    """Raise SystemExit for one of Qwen's control tokens in a text."""
    for field in ("question", "response") if training else ("question",):
        found = RESERVED.search(row[field])
        if found:
            raise SystemExit(f"{where}: field {field!r} contains the reserved token {found[0]!r}")


def check_response(row, where):
    """Raise SystemExit if the tags of a response are out of order, or spans and images differ."""
    # the text between tags does not matter here
    tags = "".join(TAGS.findall(row["response"]))
    if not TAG_ORDER.fullmatch(tags):
        raise SystemExit(
            f"{where}: response has tags {tags!r}; expected <think>, then any number of "
            "<latent></latent> and <parser></parser>, then </think><answer></answer>"
        )
    n_spans, n_images = row["response"].count(LATENT_SPAN), len(row["aux_images"])
    if n_spans != tags.count("<latent>"):
        raise SystemExit(
            f"{where}: a latent span must be written {LATENT_SPAN!r} with nothing inside"
        )
    if n_spans != n_images:
        raise SystemExit(f"{where}: {n_spans} {LATENT_SPAN} in response but {n_images} aux_images")


def strip_latents(response):
    """Remove every latent span; the `<parser>` text stays (difficulty-aware data, section 4.3)."""
    return re.sub(r" ?<latent></latent>", "", response)


def strip_parser(response):
    """Remove every `<parser>` text."""
    return re.sub(r" ?<parser>.*?</parser>", "", response, flags=re.DOTALL)


# --------------------------------------------------------------------------------------------------
# images

# what Pillow raises for a broken file
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def image_file(source):
    """What Pillow opens, and its name in messages, for a path or the encoded bytes of an image."""
    if isinstance(source, bytes):
        return io.BytesIO(source), "an embedded image"
    return source, source


def open_image(source):
    """Open a path or encoded bytes as RGB.

    Raises SystemExit naming the file if it is not an image that the processor takes.
    """
    file, name = image_file(source)
    try:
        image = Image.open(file).convert("RGB")
    except IMAGE_ERRORS as e:
        raise SystemExit(f"{name}: not a usable image ({e})") from None
    if max(image.size) > 200 * min(image.size):
        size = f"{image.width} x {image.height}"
        raise SystemExit(f"{name}: not a usable image ({size}: aspect ratio above 200)")
    return image


# --------------------------------------------------------------------------------------------------
# files: written whole under a temporary name, or appended to a line at a time


def write_then_rename(path, write):
    """Call `write(tmp_path)` and rename the result to `path`, which is never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the rename is one step; hidden, so that no pattern finds it
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(tmp)
    os.replace(tmp, path)


def write_text(path, text):
    """Write a text file at once."""
    write_then_rename(path, lambda tmp: tmp.write_bytes(text.encode()))


def write_lines(path, rows):
    """Write a JSONL file at once."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path):
    """Rows of an append-only JSONL file, none if it is not there.

    A last line without a newline was cut off by a kill and is left out.
    """
    if not Path(path).exists():
        return []
    whole_lines = Path(path).read_bytes().split(b"\n")[:-1]
    rows = []
    for n, line in enumerate(whole_lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise SystemExit(f"{path}:{n}: not JSON ({e})") from None
    return rows


def open_append(path):
    """Open an append-only JSONL file, cutting off a half-written last line first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "ab+")  # not "r+": every write goes to the end, whoever else writes
    f.seek(0)
    f.truncate(f.read().rfind(b"\n") + 1)
    return f


def append(f, row):
    """Write one row and flush it to the disk: a finished row survives a kill."""
    f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    f.flush()
    os.fsync(f.fileno())


def read_safetensors(path, names, fields=()):
    """All tensors and the metadata of a safetensors file.

    Raises SystemExit if it lacks one of the tensors `names` or of the metadata `fields`.
    """
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
    return tensors, meta


# --------------------------------------------------------------------------------------------------
# what a result was made with


def seed_of(*parts):
    """A 63-bit seed that depends on nothing but `parts`: not on ranks, batches or order."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes signed 64-bit seeds


def key_of(settings, *files):
    """A hash of settings and file contents: results of another key are not used again."""
    # sorted: the order in which settings are named does not count
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def weight_stamps(folder):
    """Name, size and time of a model folder's weight files.

    They tell one model from the next without reading 16 GB.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def versions():
    """Of python, torch, transformers and this repository, for the record of a run."""
    folder = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=folder)
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git.stdout.strip() or "unknown",
    }


# --------------------------------------------------------------------------------------------------
# ranks, device, clock


def rank_and_world():
    """This process's rank and the number of processes, as torchrun sets them (else 0 and 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device():
    """The CUDA device of this local rank, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def clock(device):
    """Seconds for timing work: this process's own on a CPU, which others may share; else wall."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


# --------------------------------------------------------------------------------------------------
# settings: plain lower-case values among a script's globals, edited inline or given as --key=value

USERS_ERRORS = {
    errno.ENOENT,  # no such file
    errno.EACCES,  # not allowed
    errno.EPERM,
    errno.EROFS,  # a read-only disk
    errno.ENOSPC,  # a full disk
    errno.EDQUOT,
    errno.EISDIR,  # a folder where a file should be, and the other way round
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EPIPE,  # whoever read our output has gone
}


def start(main=None, **commands):
    """Run a script as its user starts it: [command] [--key=value ...], or --help.

    The first argument may name one of `commands`; `main` is what runs without one. Arguments that
    are no settings go to the command's function. What a user can cause (a missing file, a full
    disk, Ctrl-C) ends in one sentence and an exit code; a programming error shows its traceback.
    """
    settings = vars(sys.modules["__main__"])  # the script's globals
    args = sys.argv[1:]
    if {"--help", "-h"} & set(args):
        print(help_text(settings))
        return
    run = main
    if args and args[0].removeprefix("--") in commands:
        run = commands[args.pop(0).removeprefix("--")]
    if run is None:
        script = Path(settings["__file__"]).name
        usage = f"usage: python {script} {' | '.join(commands)} [--key=value ...]"
        raise SystemExit(f"{usage}; --help says what they do")
    words = override(settings, args, n_words=len(inspect.signature(run).parameters))
    try:
        run(*words)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None  # what a shell expects of Ctrl-C
    except (OSError, SafetensorError) as e:
        sentence = users_error(e)
        if not sentence:
            raise
        raise SystemExit(sentence) from None


def users_error(e):
    """The sentence for an OSError or SafetensorError that a user can cause; "" for another."""
    code, file = getattr(e, "errno", None), getattr(e, "filename", None)
    said = re.search(r"os error (\d+)", str(e))  # safetensors keeps the number in its message
    if said:
        code = int(said[1])
    if isinstance(e, FileNotFoundError):
        code = errno.ENOENT
    if code not in USERS_ERRORS:
        return ""
    return f"{file}: {os.strerror(code)}" if file else f"{os.strerror(code)}: {e}"


def settings_of(namespace):
    """The settings among a script's globals. CONSTANTS are none; K and N, of one letter, are."""
    return {
        name: value
        for name, value in namespace.items()
        if type(value) in (int, float, str, bool)
        and not name.startswith("_")
        and (len(name) == 1 or not name.isupper())
    }


def override(settings, args, n_words=0):
    """Apply `--key=value` or `--key value` to a script's globals, cast to the default's type.

    Returns the other arguments, of which there must be `n_words`. Raises SystemExit for a name that
    the script does not have and for a value of another type.
    """
    known = settings_of(settings)
    args, words = list(args), []
    while args:
        key, equals, value = args.pop(0).partition("=")
        if not key.startswith("--") and not equals and len(words) < n_words:
            words.append(key)
            continue
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or name not in known:
            there = ", ".join(sorted(known))
            raise SystemExit(f"unknown setting {key!r}; this script has: {there}")
        if not equals and not args:
            raise SystemExit(f"{key} needs a value, as in {key}=value")
        value = value if equals else args.pop(0)
        settings[name] = cast(key, value, type(known[name]))
    if len(words) < n_words:
        raise SystemExit(
            f"expected {n_words} words before the settings, found {len(words)}; see --help"
        )
    return words


def cast(key, value, kind):
    """The text of a setting as its default's type. Raises SystemExit where it is of another."""
    if kind is bool:
        if value.lower() not in ("0", "1", "true", "false"):
            raise SystemExit(f"{key}={value!r} is not a bool; use 0 or 1")
        return value.lower() in ("1", "true")
    try:
        return kind(value)
    except ValueError:
        raise SystemExit(f"{key}={value!r} is not {kind.__name__}") from None


def help_text(script):
    """A script's docstring, then each setting with its default and the comment beside it.

    script: the script's globals.
    """
    source = Path(script["__file__"]).read_text()
    comments = {}  # by line number
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    known = settings_of(script)
    lines = [script["__doc__"].strip(), "", "settings, as --key=value:"]
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign):
            continue
        comment = comments.get(statement.end_lineno, "")
        for target in ast.walk(statement.targets[0]):
            if isinstance(target, ast.Name) and target.id in known:
                default = repr(known[target.id])
                if len(default) > 40:
                    default = default[:36] + "..."
                lines.append(f"  --{target.id}={default}".ljust(46) + comment)
    return "\n".join(line.rstrip() for line in lines)


def check_choices(settings, **choices):
    """Raise SystemExit for a setting that is not one of its choices."""
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            there = ", ".join(allowed)
            raise SystemExit(f"{name}={settings[name]!r} is not one of: {there}")
