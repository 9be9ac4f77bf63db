"""What is an example, and how do files live on a disk? Rows, tags, images, append-only files, settings, ranks."""

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
RESERVED = re.compile(
    r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad|latent_\w+)\|>"
)


# ---------------------------------------------------------------------------------------------------
# settings: the lower-case plain values among a script's globals, edited inline or given as --key=value

USERS_ERRORS = (
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
)


def start(main=None, **commands):
    """Run a script as its user starts it: [command] [--key=value ...], or --help.

    The first argument may name one of `commands`; `main` is what runs without one. Arguments that are
    no settings go to the command's function. What a user can cause (a missing file, a full disk,
    Ctrl-C) ends in one sentence and an exit code; a programming error still shows its traceback.
    """
    settings = vars(sys.modules["__main__"])
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
    words = override(settings, args, most=len(inspect.signature(run).parameters))
    try:
        run(*words)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None  # what a shell expects of Ctrl-C
    except OSError as e:
        if e.errno not in USERS_ERRORS:
            raise
        raise SystemExit(f"{e.filename or 'a file'}: {e.strerror}") from None
    except SafetensorError as e:
        if "No space left" not in str(e):
            raise
        raise SystemExit(f"a safetensors file could not be written: {e}") from None


def settings_of(namespace):
    """The settings among a script's globals. CONSTANTS are none; K and N, of one letter, are."""
    return {
        name: value
        for name, value in namespace.items()
        if type(value) in (int, float, str, bool)
        and not name.startswith("_")
        and (len(name) == 1 or not name.isupper())
    }


def override(settings, args, most=0):
    """Apply `--key=value` or `--key value` to a script's globals, cast to the default's type.

    Returns the other arguments, of which there must be `most`. Raises SystemExit for a name that the
    script does not have and for a value of another type.
    """
    known = settings_of(settings)
    args, words = list(args), []
    while args:
        key, equals, value = args.pop(0).partition("=")
        if not key.startswith("--") and not equals and len(words) < most:
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
    if len(words) < most:
        raise SystemExit(
            f"expected {most} words before the settings, found {len(words)}; see --help"
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


def help_text(settings):
    """A script's docstring, then each setting with its default and the comment that stands beside it."""
    source = Path(settings["__file__"]).read_text()
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    lines = [settings["__doc__"].strip(), "", "settings, as --key=value:"]
    known = settings_of(settings)
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign):
            continue
        names = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
        for name in names:
            if name in known:
                default = repr(known[name]) if isinstance(known[name], str) else str(known[name])
                default = default if len(default) <= 40 else default[:36] + "..."
                comment = comments.get(node.end_lineno, "")
                lines.append(
                    f"  --{name}={default}".ljust(44) + ("  " + comment if comment else "")
                )
    return "\n".join(line.rstrip() for line in lines)


def check_choices(settings, **choices):
    """Raise SystemExit for a setting that is not one of its choices."""
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            there = ", ".join(allowed)
            raise SystemExit(f"{name}={settings[name]!r} is not one of: {there}")


def rank_and_world():
    """This process's rank and the number of processes, as torchrun sets them (0 and 1 without it)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device():
    """The CUDA device of this local rank, else the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def clock(device):
    """Seconds for timing work: of this process alone on a CPU, which others may share; of the wall where a GPU works."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def write_then_rename(path, write):
    """Call `write(tmp_path)` and rename the result to `path`, so that `path` is never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(tmp)
    os.replace(tmp, path)


def write_lines(path, rows):
    """Write a JSONL file at once."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_then_rename(path, lambda p: p.write_bytes(text.encode()))


def read_lines(path):
    """Rows of an append-only JSONL file; a last line cut off by a kill (no newline) is left out."""
    rows = []
    if Path(path).exists():
        for n, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except ValueError as e:
                raise SystemExit(f"{path}:{n}: not JSON ({e})") from None
    return rows


def open_append(path):
    """Open an append-only JSONL file, cutting off a half-written last line first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path, "ab+")
    f.seek(0)
    f.truncate(f.read().rfind(b"\n") + 1)
    return f


def append(f, row):
    """Write one row and flush it to the disk: a finished row survives a kill."""
    f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    f.flush()
    os.fsync(f.fileno())


def read_safetensors(path, names, fields=()):
    """All tensors and the metadata of a safetensors file. Raises SystemExit if it lacks a name or a metadata field."""
    try:
        with safe_open(path, "pt") as f:
            tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise SystemExit(f"{path}: not a readable safetensors file ({e})") from None
    if missing := [n for n in names if n not in tensors] + [n for n in fields if n not in meta]:
        raise SystemExit(
            f"{path}: lacks {missing}, has {sorted(tensors)} and metadata {sorted(meta)}"
        )
    return tensors, meta


def seed_of(*parts):
    """A 63-bit seed that depends on nothing but `parts`: not on ranks, batches or order."""
    return (
        int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
    )


def key_of(settings, *files):
    """A hash of settings and of the content of files: results made under another key are not reused."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def weight_stamps(folder):
    """Name, size and time of a model folder's weight files: tells one model from the next without reading 16 GB."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def versions():
    """Of python, torch, transformers and this repository, for the record of a run."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git.stdout.strip() or "unknown",
    }


def load_examples(path, training=True):
    """Read and check a JSONL data file; image paths come back absolute.

    `training` also demands `response` and `aux_images`, the k-th `<latent></latent>` belonging to aux_images[k].
    Raises SystemExit naming file, line and field.
    """
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"{path}: no such data file (for the toy, run `python toy.py data` first)")
    rows, seen = [], {}
    for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{n}"
        try:
            row = json.loads(line)
        except ValueError as e:
            raise SystemExit(f"{where}: not JSON ({e})") from None
        if not isinstance(row, dict):
            raise SystemExit(f"{where}: expected a JSON object, found {type(row).__name__}")
        texts = ["id", "question", "answer"] + ["response"] * training
        lists = (
            ["images"]
            + ["aux_images"] * (training or "aux_images" in row)
            + ["options"] * ("options" in row)
        )
        for field, kind in [(f, str) for f in texts] + [(f, list) for f in lists]:
            if not isinstance(row.get(field), kind):
                raise SystemExit(
                    f"{where}: field {field!r} must be a {kind.__name__}, found {row.get(field)!r}"
                )
        for field in lists:
            if other := [x for x in row[field] if not isinstance(x, str)]:
                raise SystemExit(
                    f"{where}: field {field!r} must hold strings only, found {other[0]!r}"
                )
        if row["id"] in seen:
            raise SystemExit(f"{where}: id {row['id']!r} repeats line {seen[row['id']]}")
        seen[row["id"]] = n
        for field in set(lists) - {"options"}:
            row[field] = [str(path.parent / p) for p in row[field]]
            for p in row[field]:
                if not Path(p).is_file():
                    raise SystemExit(f"{where}: {field}: no such image {p}")
        for field in {"question", "response"} & set(texts):
            if found := RESERVED.search(row[field]):
                raise SystemExit(
                    f"{where}: field {field!r} contains the reserved token {found[0]!r}"
                )
        if training:
            tags = "".join(TAGS.findall(row["response"]))
            if not TAG_ORDER.fullmatch(tags):
                raise SystemExit(
                    f"{where}: response has tags {tags!r}; expected <think>, then any number of <latent></latent> "
                    "and <parser></parser>, then </think><answer></answer>"
                )
            spans = row["response"].count(LATENT_SPAN)
            if spans != tags.count("<latent>"):
                raise SystemExit(
                    f"{where}: a latent span must be written {LATENT_SPAN!r} with nothing inside"
                )
            if spans != len(row["aux_images"]):
                raise SystemExit(
                    f"{where}: {spans} {LATENT_SPAN} in response but {len(row['aux_images'])} aux_images"
                )
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: no examples")
    return rows


def strip_latents(response):
    """Remove every latent span from a response; the `<parser>` text stays (difficulty-aware assignment, section 4.3)."""
    return re.sub(r" ?<latent></latent>", "", response)


def image_file(source):
    """What PIL opens, and its name in messages, for a path or the encoded bytes of an image."""
    return (
        (io.BytesIO(source), "an embedded image") if isinstance(source, bytes) else (source, source)
    )


def open_image(source):
    """Open a path or encoded bytes as RGB. Raises SystemExit naming the file if it is not an image that the processor takes."""
    file, name = image_file(source)
    try:
        image = Image.open(file).convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as e:  # what PIL raises for a broken file
        raise SystemExit(f"{name}: not a usable image ({e})") from None
    if max(image.size) > 200 * min(image.size):
        raise SystemExit(
            f"{name}: not a usable image ({image.width} x {image.height}: aspect ratio above 200)"
        )
    return image
