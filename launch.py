"""How is a script started?

Settings are the plain lower-case values among a script's globals, edited inline or given as
--key=value. Every script ends in one call of `start`. Here are also the ranks of a launch, the
device, and the claim of a run on its output folder.
"""

import ast
import ctypes
import errno
import fcntl
import inspect
import io
import math
import os
import re
import secrets
import shutil
import signal
import sys
import time
import tokenize
from datetime import timedelta
from functools import cache, partial
from glob import escape
from pathlib import Path, PurePath
from types import NoneType

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

USERS_ERRORS = {
    errno.ENOENT,  # no such file
    errno.EACCES,  # not allowed
    errno.EPERM,
    errno.EFBIG,  # a file larger than the disk or the shell takes
    errno.EISDIR,  # a folder where a file should be, and the other way round
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EPIPE,  # whoever read our output has gone
    errno.ELOOP,  # links in a circle
}

# faults of a machine, which say nothing of the file, picture or question that met them
MACHINE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,  # a failing disk
    errno.ESTALE,  # a network disk that was mounted anew
    errno.ETIMEDOUT,
    errno.ENODEV,
    errno.ENXIO,
    errno.EBUSY,
    errno.ENOLCK,
    errno.EMFILE,  # no more open files
    errno.ENFILE,
    errno.ENOMEM,
}

PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent ends
TOGETHER = timedelta(minutes=15)  # the ranks of a launch begin
LINE_SECONDS = 10  # between two lines of progress, where no terminal is

# settings by the least and the largest value that make sense, whatever script has them
NAMES_IN_RANGE = {
    (0, math.inf): "epochs max_steps limit eval_every save_every examples interventions_at "
    "temperature lr lr_head weight_decay grad_clip timeout first_pause degenerate lambda_latent "
    "lambda_align rollout latents_first beta gamma free_bits",
    (1, math.inf): "batch global_batch shard n_samples K token_budget latent_size workers tries "
    "give_up judge_workers judge_tries max_tokens send_side prompt_tokens min_side max_bytes "
    "bomb_pixels repeats threads questions new_tokens base_batch n_edits n_train n_val n_test "
    "align_layer slot_dim n_bank n_sheet",
    (2, math.inf): "longest",
    (0, 1): "tau retained warmup_ratio val_share top_p ema_beta easy_latents",
    (0, 1 - 1e-9): "beta1 beta2",
    (0, 4): "first_phase",
    (1, 64): "loader_threads",
    (0, 2**63 - 1): "seed",
}
RANGES = {name: ends for ends, names in NAMES_IN_RANGE.items() for name in names.split()}
# what --run=NAME moves to out/NAME, the first that fits: the toy's data folder is the run's own
TOY = "out/toy"
RUN_ROOTS = (TOY, "data", "out")
SHARED = ("data_root",)  # the benchmarks' files, which all runs read
RUN = []  # the name that --run gave, if any
# 0 is allowed where it is the default, and lets the script choose; elsewhere at least 1
SIZES = ("max_new_tokens", "min_pixels", "max_pixels")

# --------------------------------------------------------------------------------------------------
# starting


def start(main=None, **commands):
    """Run a script as its user starts it: [command] [--key=value ...], or --help.

    The first argument may name one of `commands`; `main` is what runs without one. Arguments that
    are no settings go to the command's function. What a user can cause (a missing file, a full
    disk, Ctrl-C) ends in one sentence and an exit code; a programming error shows its traceback.
    """
    open_streams()
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise SystemExit(f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank that torchrun has started
        end_with_parent()
    script = vars(sys.modules["__main__"])  # the script's globals
    args = sys.argv[1:]
    # wherever it stands, and before anything else is looked at
    if {"--help", "-h"} & set(args):
        print(help_text(script))
        return
    command, args = command_of(args, main, commands, settings_of(script))
    if command is None:
        name = Path(script["__file__"]).name
        usage = f"usage: python {name} {' | '.join(commands)} [--key=value ...]"
        raise SystemExit(f"{usage}; --help says what they do")
    # a command that takes two folders (eval.py --compare A B) says so by its parameters
    words = override(script, args, n_words=len(inspect.signature(command).parameters))
    try:
        command(*words)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None  # what a shell expects of Ctrl-C
    except (OSError, SafetensorError) as e:
        sentence = users_error(e)
        if not sentence:
            raise
        raise SystemExit(sentence) from None


def open_streams():
    """Standard streams that are open, and show as much as their console can."""
    # else the next files that are opened would stand in the places of closed ones
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def command_of(args, main, commands, settings):
    """(the function that the first argument names, `main` if none; the arguments after it)."""
    if not args:
        return main, []
    first, *rest = args
    name, equals, given = first.removeprefix("--").partition("=")
    # --sheet=FILE is a setting where there is one of a command's name
    if name not in commands or equals and name in settings:
        return main, args
    words = given.split(",") if equals else []  # --compare=A,B is --compare A B
    return commands[name], words + rest


def users_error(e):
    """The sentence for an OSError or SafetensorError that is no fault of this code; else ""."""
    code, file = errno_of(e), getattr(e, "filename", None)
    if code not in USERS_ERRORS | MACHINE_ERRORS:
        return ""
    return f"{file}: {os.strerror(code)}" if file else f"{os.strerror(code)}: {e}"


def errno_of(e):
    """The number of an OSError, or of the one that a SafetensorError tells of; None for others."""
    said = re.search(r"os error (\d+)", str(e)) if isinstance(e, SafetensorError) else None
    if said:
        return int(said[1])
    return errno.ENOENT if isinstance(e, FileNotFoundError) else getattr(e, "errno", None)


def is_machines(e):
    """Is an error the machine's, a full or failing disk, say: no fault of what it was met at?"""
    return isinstance(e, (OSError, SafetensorError)) and errno_of(e) in MACHINE_ERRORS


# --------------------------------------------------------------------------------------------------
# settings


def settings_of(namespace):
    """The settings among a script's globals. CONSTANTS are none; K and N, of one letter, are."""
    return {
        name: value
        for name, value in namespace.items()
        if type(value) in (int, float, str, bool)
        and not name.startswith("_")
        and (len(name) == 1 or not name.isupper())
    }


def override(script, args, n_words=0):
    """Apply `--key=value` or `--key value` to a script's globals, cast to the default's type.

    Returns the other arguments, of which there must be `n_words`. Raises SystemExit for a name that
    the script does not have, for a value of another type and for one that makes no sense.
    """
    # the types and names are those of the values written in the script
    defaults = settings_of(script)
    check_types(script)
    args, words, given, run = list(args), [], set(), ""
    while args:
        key, equals, value = args.pop(0).partition("=")
        if not key.startswith("--") and not equals and len(words) < n_words:
            words.append(key)
            continue
        # --max-steps and --max_steps are one setting
        name = key.removeprefix("--").replace("-", "_")
        if not key.startswith("--") or name not in (*defaults, "run"):
            there = ", ".join(sorted(defaults))
            raise SystemExit(f"unknown setting {key!r}; this script has: {there}")
        if not equals and not args:
            raise SystemExit(f"{key} needs a value, as in {key}=value")
        # --key value, as other programs have it
        value = value if equals else args.pop(0)
        if not equals and value.startswith("--"):
            raise SystemExit(f"{key} needs a value, as in {key}=value; found {value}")
        if name == "run":
            run = value
            continue
        script[name] = cast(key, value, type(defaults[name]))
        given.add(name)
    if len(words) < n_words:
        found = len(words)
        raise SystemExit(f"expected {n_words} words before the settings, found {found}; see --help")
    RUN[:] = [run] if run else []
    if run:
        move_to_run(script, run, defaults, given)
    if script.get("val_data") and "val_data" not in given:
        drop_val_data(script, run)
    check_ranges(script, defaults)
    return words


def check_types(script):
    """Raise SystemExit for a value in a script's block that would be no setting, and be ignored."""
    for name, value in script.items():
        kinds = (NoneType, PurePath, list, tuple, dict, set)
        if name.islower() and not name.startswith("_") and isinstance(value, kinds):
            raise SystemExit(
                f'{name} = {value!r}: a setting is a text ("" for none), a number, True or False'
            )


def move_to_run(script, run, defaults, given):
    """--run=NAME: default paths lie in out/NAME, so that a run's stages find each other there."""
    for name, default in defaults.items():
        if type(default) is not str or name in SHARED or name in given:
            continue
        path = Path(default)
        for root in RUN_ROOTS:
            if path.is_relative_to(root):
                script[name] = str(Path("out") / run / path.relative_to(root))
                break


def drop_val_data(script, run):
    """Do without the default val_data where it does not go with one's own data."""
    val_data = script["val_data"]

    def is_toys(path):
        return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(TOY))

    if run and not Path(val_data).exists():
        why = "is not there"
    elif is_toys(val_data) and not is_toys(script["data"]):
        why = "is the toy's"
    else:
        return
    print(f"no val_data: {val_data} {why}; --val_data=FILE names another")
    script["val_data"] = ""


def folder_of(stage, model):
    """Where a stage writes of a model, if no other folder is given.

    out/eval/gap for out/gap, out/mine/eval/gap for out/mine/gap, out/eval/X for elsewhere/X; below
    out/NAME with --run=NAME.
    """
    folder = Path(model)
    beside = folder.parent if folder.is_relative_to("out") else Path("out")
    if RUN:
        beside = Path("out", *RUN)
    return str(beside / stage / folder.resolve().name)


def cast(key, value, kind):
    """The text of a setting as its default's type. Raises SystemExit where it is of another."""
    if kind is bool:
        # bool("False") is True
        if value.lower() not in ("0", "1", "true", "false"):
            raise SystemExit(f"{key}={value!r} is not a bool; use 0 or 1")
        return value.lower() in ("1", "true")
    try:
        value.encode()
        return kind(value)
    except UnicodeEncodeError:  # a byte of the command line that Python could not read
        raise SystemExit(f"{key}={value!r} is not UTF-8") from None
    except ValueError:
        raise SystemExit(f"{key}={value!r} is not {kind.__name__}") from None


def check_ranges(script, defaults):
    """Raise SystemExit for a number that makes no sense, naming the setting and its range."""
    for name, default in defaults.items():
        value = script[name]
        # a NaN passes every comparison below
        if isinstance(value, float) and math.isnan(value):
            raise SystemExit(f"{name}={value} is not a number")
        if name in SIZES:
            low, high = (1 if default else 0), math.inf
        elif name in RANGES:
            low, high = RANGES[name]
        else:
            continue
        if not low <= value <= high or value == math.inf:
            wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise SystemExit(f"{name}={value} makes no sense: expected {wanted}")
    if script.get("min_pixels", 0) > script.get("max_pixels", 0) > 0:
        low, high = script["min_pixels"], script["max_pixels"]
        raise SystemExit(f"min_pixels={low} is above max_pixels={high}")


def names_in(text):
    """The names in a setting that holds several, with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_choices(settings, **choices):
    """Raise SystemExit for a setting that is not one of its choices."""
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            there = ", ".join(allowed)
            raise SystemExit(f"{name}={settings[name]!r} is not one of: {there}")


def help_text(script):
    """A script's docstring, then each setting with its default and the comment beside it."""
    # the comments are not in the globals: they are read from the file
    source = Path(script["__file__"]).read_text(encoding="utf-8")
    comments, headings = {}, {}  # by line number; a heading stands alone, above settings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kind = headings if token.start[1] == 0 else comments
            kind[token.start[0]] = token.string.strip("# -")
    known = settings_of(script)
    said = script["__doc__"] or ""  # none under python -OO
    lines = [said.strip(), "", "settings, as --key=value:"]
    lines.append(
        "  --run=NAME".ljust(46) + "default paths lie in out/NAME (out/toy, data and out do)"
    )
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign):
            continue
        comment = comments.get(statement.end_lineno, "")
        heading = headings.get(statement.lineno - 1)
        for target in ast.walk(statement.targets[0]):
            if isinstance(target, ast.Name) and target.id in known:
                if heading:
                    lines += ["", f"  {heading}"]
                default = repr(known[target.id])
                if len(default) > 40:
                    default = default[:36] + "..."
                lines.append(f"  --{target.id}={default}".ljust(46) + comment)
    return "\n".join(line.rstrip() for line in lines)


# --------------------------------------------------------------------------------------------------
# what it says


def show_files(reads, writes):
    """Say first what a stage reads and writes: a default path is not always the one meant.

    Raises SystemExit where it would write over what it reads.
    """
    check_apart(reads, writes)
    if rank_and_world()[0] > 0:
        return
    for verb, paths in (("reads", reads), ("writes", writes)):
        named = [str(path) for path in paths if path]
        if named:
            print(f"{verb:6} {', '.join(named)}", flush=True)


def check_apart(reads, writes):
    """Raise SystemExit for what is read and would be written over."""
    for path in filter(None, writes):
        if any(is_same(path, read) for read in filter(None, reads)):
            raise SystemExit(f"{path} is read, and would be written over: give another")


def is_same(a, b):
    """Do two paths lead to one place? Where a disk knows no capitals two spellings do, too."""
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.realpath(a) == os.path.realpath(b)


class Progress(tqdm):
    """tqdm's bar in a terminal; in a file or a pipe a plain line every LINE_SECONDS, and the last.

    Everything that tqdm shows goes through `display`.
    """

    def __init__(self, *args, **settings):
        self.plain = not sys.stderr.isatty()
        self.shown = time.monotonic()
        super().__init__(*args, **settings | ({"ncols": 0} if self.plain else {}))

    def display(self, msg=None, pos=None):
        if not self.plain:
            return super().display(msg, pos)
        closing = self.disable  # tqdm ends the last line itself
        if msg is None and (closing or time.monotonic() - self.shown >= LINE_SECONDS):
            self.shown = time.monotonic()
            self.fp.write(str(self) + ("" if closing else "\n"))
            self.fp.flush()
        return False

    def clear(self, *args, **settings):
        if not self.plain:
            super().clear(*args, **settings)

    def moveto(self, n):
        if not self.plain:
            super().moveto(n)


# --------------------------------------------------------------------------------------------------
# ranks, device, clock


def rank_and_world():
    """This process's rank and the number of processes, as torchrun sets them (else 0 and 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device, longest):
    """Join the ranks of torchrun, or be the only one; then they wait at most `longest` (timedelta).

    Raises SystemExit where one does not come.
    """
    backend = "gloo"
    if device.type == "cuda":
        backend = "cuda:nccl,cpu:gloo"
    rank, world = rank_and_world()
    if world == 1:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)  # alone it needs no network that others share
    store = dist.HashStore() if world == 1 else meet(rank, world)
    store.set_timeout(longest)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=longest)
    except RuntimeError as e:  # gloo finds no address of this machine
        said = " ".join(str(e).split())[:200]
        raise SystemExit(f"rank {rank} cannot join the others: {said}") from None


def meet(rank, world):
    """The store of a launch, once all its ranks have come: one may never, and work takes days."""
    try:
        # torchrun says where it is
        store, _, _ = next(dist.rendezvous("env://", timeout=TOGETHER))
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(world)], TOGETHER)
    except (dist.DistError, ValueError) as e:  # or an address that lacks, or is none
        said = " ".join(str(e).split())[:200]
        raise SystemExit(
            f"rank {rank} did not meet all {world} within {TOGETHER}: {said}"
        ) from None
    return store


def leave_ranks():
    """End together with the other ranks."""
    dist.barrier()
    dist.destroy_process_group()


def gathered(value):
    """The values of all ranks, in their order. No rank goes on before all have come here."""
    values = [None] * rank_and_world()[1]
    dist.all_gather_object(values, value)
    return values


def faults_among(names, look):
    """{name: what is wrong with it} of names; ranks that have joined look at a share each.

    look(names): gives a text for each, "" for no fault. Every rank knows all faults in the end.
    """
    rank, world = rank_and_world() if dist.is_initialized() else (0, 1)
    mine = names[rank::world]
    found = {name: fault for name, fault in zip(mine, look(mine)) if fault}
    parts = gathered(found) if world > 1 else [found]
    return {name: fault for part in parts for name, fault in part.items()}


def check_each(names, fault):
    """Raise SystemExit, on every rank, with the first text that fault(name) gives; "" is none."""
    faults = faults_among(names, partial(map, fault))
    if faults:
        raise SystemExit(next(iter(faults.values())))


def check_same_everywhere(what, value):
    """Raise SystemExit, on every rank, unless all ranks have the same value."""
    values = gathered(value)
    differ = [rank for rank, other in enumerate(values) if other != values[0]]
    if differ:
        raise SystemExit(
            f"{what} of ranks 0 and {differ[0]} differ: is a file missing, or another, somewhere?"
        )


def check_shared(folder):
    """Raise SystemExit, on every rank, unless all ranks see one and the same folder."""
    # named as what `claim` removes of a killed run
    mark = Path(folder) / f".shared.{secrets.token_hex(4)}.{os.getpid()}.tmp"
    mark = gathered(mark)[0]
    if rank_and_world()[0] == 0:
        mark.touch()
    dist.barrier()
    seen = gathered(mark.exists())
    if rank_and_world()[0] == 0:
        mark.unlink()
    if not all(seen):
        rank = seen.index(False)
        raise SystemExit(f"{folder}: rank {rank} has another one than rank 0: share its disk")


def end_with_parent():
    """Let this process end when the one that started it ends, however that ends (on Linux).

    torchrun's ranks have a process group each: they outlive a killed torchrun, go on training, and
    meet the launch that resumes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def use_idle_cores():
    """Let torch use as many CPU threads as cores are idle; OMP_NUM_THREADS of a user wins.

    A thread that waits for others spins: with one more thread than idle cores a step of the toy
    takes up to 50 times as long, with one less 1.3 to 1.45 times. torchrun sets one per rank.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        before = cpu_ticks()
        time.sleep(0.1)  # in which this process does nothing
        idle = idle_cores(before, cpu_ticks(), torch.get_num_threads())
        torch.set_num_threads(min(idle, cores_allowed()))


def cores_allowed(limit="/sys/fs/cgroup/cpu.max"):
    """How many cores this process may use: a job or a container may have fewer than the machine."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path(limit).read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # none here, or "max": no limit
        return cores


def cpu_ticks(stat="/proc/stat"):
    """(idle, all) ticks of our cores since the start of the machine; (0, 0) where none says."""
    try:
        lines = Path(stat).read_text().splitlines()
    except OSError:  # no Linux
        return 0, 0
    ours = {f"cpu{n}" for n in os.sched_getaffinity(0)}  # others of a node may be another job's
    idle = total = 0
    for line in lines:
        name, *ticks = line.split() or [""]
        if name in ours and len(ticks) > 4:
            ticks = [int(x) for x in ticks[:8]]  # what follows is part of these
            idle += ticks[3] + ticks[4]  # waiting for a disk is idle, too
            total += sum(ticks)
    return idle, total


def idle_cores(before, after, cores):
    """How many of so many cores were idle between two readings, at least 1; all if none says."""
    idle, total = (b - a for a, b in zip(before, after))
    return max(1, round(cores * idle / total)) if total > 0 else cores


@cache
def pick_device():
    """The CUDA device of this local rank, else the CPU, with a thread for each idle core."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)  # what is captured is of the current one, and NCCL uses it
        return device
    use_idle_cores()
    return torch.device("cpu")


def clock(device):
    """Seconds for timing work: this process's own on a CPU, which others may share; else wall."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


# --------------------------------------------------------------------------------------------------
# one folder, one writer

HELD = {}  # {path: open lock file}: held until this process ends, however it ends


def lock(path):
    """Hold a lock file until this process ends, however it ends; False if another one holds it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:  # a network disk without locks
        where = Path(path).parent
        print(f"{where}: no lock can be held here ({e.strerror}); start no second process on it")
    HELD[Path(path).absolute()] = file  # the kernel lets go of it when the file is closed
    return True


def hold(path):
    """Hold a lock file, since before or from now on; False if another process holds it."""
    path = Path(path).absolute()
    return path in HELD or lock(path)


def hold_together(path):
    """Hold a lock file together with other processes; waits while one holds it alone."""
    file = open(path, "a+")  # NFS shares only what is open for reading, and alone what for writing
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as e:  # a network disk without locks
        print(f"{path}: no lock can be held here ({e.strerror})")
    return file


def hold_alone(file):
    """Hold a lock file alone, once every other process has let go of it; False before that."""
    try:
        fcntl.flock(file, fcntl.LOCK_UN)  # NFS keeps a shared one where it refuses this one alone
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # without locks each takes itself for the last
        pass
    return True


def claim(folder, file=""):
    """Make an output folder, and keep other launches of the stage out of it until this one ends.

    With a `file` in it only that is claimed. Raises SystemExit if another launch has it; a process
    may claim again what it has. What a killed run left half-written is removed. Rank 0 claims for
    all ranks of a launch.
    """
    folder = Path(folder)
    if rank_and_world()[0] > 0:
        folder.mkdir(parents=True, exist_ok=True)
        return
    if not hold(folder / (f".{file}.lock" if file else ".lock")):
        raise SystemExit(f"{folder}: another process is writing here; wait, or give another out")
    # named .<name>.<process>.tmp by write_then_rename; a living process still needs its own
    for tmp in list(folder.glob(f".{escape(file)}.*.tmp") if file else folder.rglob(".*.tmp")):
        writer = tmp.suffixes[-2].lstrip(".") if len(tmp.suffixes) > 1 else ""
        if writer.isdigit() and not is_running(int(writer)):
            remove_leftover(tmp)


def remove_leftover(tmp):
    """Remove a file, or a folder of files alone: a user's folders and links stay."""
    if tmp.is_symlink():
        return
    if tmp.is_file():
        tmp.unlink()
    elif tmp.is_dir() and all(file.is_file() for file in tmp.iterdir()):
        shutil.rmtree(tmp)


def is_running(process):
    """Is there a process of this number?"""
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except (ProcessLookupError, OverflowError):  # no process has so large a number
        return False
    except PermissionError:  # another user's
        pass
    return True
