"""How a script starts, what its settings may be, and how it stops."""

import ast
import errno
import math
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY, run
from safetensors import SafetensorError

import launch
from launch import (
    RANGES,
    SIZES,
    Progress,
    claim,
    hold_alone,
    hold_together,
    is_machines,
    lock,
    override,
    settings_of,
)

SCRIPTS = sorted(
    path.name for path in ROOT.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()
)

# --- settings and folders


def run_here(monkeypatch, path, *args):
    """Run a script in this process, which has imported torch already. Returns its globals."""
    monkeypatch.setattr(sys, "argv", [str(path), *args])
    return runpy.run_path(str(path), run_name="__main__")


def test_what_is_read_is_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    launch.show_files(reads=[tmp_path / "model", ""], writes=["", tmp_path / "out"])
    with pytest.raises(SystemExit, match="link is read, and would be written over"):
        launch.show_files(reads=[tmp_path / "model"], writes=[tmp_path / "link"])


@pytest.mark.parametrize(
    "script,arg,words",
    [
        ("train.py", "--lrr=1", "unknown setting '--lrr'"),
        ("train.py", "--epochs=two", "is not int"),
        ("train.py", "--out=out/caf\udce9", "is not UTF-8"),
        ("fit_pca.py", "--K=5", "not a square"),
    ],
)
def test_unknown_settings(monkeypatch, script, arg, words):
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, ROOT / script, arg)
    assert words in str(e.value)


def test_a_usage_error_waits_for_no_import_of_transformers():
    """Of the scripts that a user starts: it takes longer than all else that they import."""
    scripts = "toy, sample_difficulty, fit_pca, train, infer, eval, probe"
    check = f"import sys; import {scripts}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_imports_go_from_the_lower_rows_of_the_plan_to_the_upper_ones():
    """And every file has its row in CONTRIBUTING.md. A function may import what it alone needs."""
    rows = [
        line.split("|")[2]
        for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines()
        if line.startswith("|")
    ]
    row_of = {name: n for n, row in enumerate(rows) for name in re.findall(r"`(\w+)\.py`", row)}
    files = {path.stem for path in ROOT.glob("*.py")}
    assert not files - row_of.keys(), "these have no row in CONTRIBUTING.md's table"
    assert not row_of.keys() - files, "rows of CONTRIBUTING.md's table whose files are not there"
    for name, n in row_of.items():
        for statement in ast.parse((ROOT / f"{name}.py").read_text()).body:
            imported = []
            if isinstance(statement, ast.Import):
                imported = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom):
                imported = [statement.module]
            for other in imported:
                assert row_of.get(other, -1) < n, f"{name}.py imports {other}.py"


def test_unknown_folders(tmp_path, world):
    args = [f"--base={tmp_path}", f"--data={world}/train.jsonl", "--val_data="]
    args.append(f"--out={tmp_path}/o")
    assert "config.json" in run("fit_pca.py", *args, ok=False)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in run("fit_pca.py", *args, ok=False)

    (tmp_path / "bad.png").write_text("no image")
    args = [f"--images={tmp_path}/bad.png", "--question=x", f"--model={TOY}"]
    text = run("infer.py", *args, ok=False)
    assert "bad.png: not a usable image" in text


def test_a_run_has_one_folder(tmp_path, monkeypatch, capsys):
    """--run=NAME: each stage's defaults lie in out/NAME, and what one writes the next reads."""
    monkeypatch.chdir(tmp_path)
    for path in ("out/mine/val.jsonl", "out/mine/ablate/toy/val.jsonl"):
        Path(path).parent.mkdir(parents=True)
        Path(path).touch()
    found = {}
    for script in SCRIPTS:
        given = runpy.run_path(str(ROOT / script))  # its settings, not started
        before = settings_of(given)
        override(given, ["--run", "mine"])
        found[script] = {k: (v, given[k]) for k, v in before.items() if v != given[k]}
        for old, new in found[script].values():
            assert Path("out/mine") in (Path(new), *Path(new).parents), (script, old, new)
    now = {script: {k: new for k, (_, new) in pairs.items()} for script, pairs in found.items()}
    assert now["build_data.py"]["out"] == "out/mine" and "data_root" not in now["eval.py"]
    assert now["train.py"]["data"] == now["fit_pca.py"]["data"] == "out/mine/train.jsonl"
    assert now["train.py"]["val_data"] == "out/mine/val.jsonl"
    assert now["train.py"]["pca"] == now["fit_pca.py"]["out"]
    assert now["train.py"]["difficulty"] == now["sample_difficulty.py"]["out"]
    assert now["train.py"]["out"] == now["eval.py"]["model"] == now["infer.py"]["model"]

    # what is given stays, and validation data that is not there is left out with a word
    Path("out/mine/val.jsonl").unlink()
    train = runpy.run_path(str(ROOT / "train.py"))
    override(train, ["--run=mine", "--pca=out/pca"])
    assert train["pca"] == "out/pca" and train["val_data"] == ""
    assert "out/mine/val.jsonl is not there" in capsys.readouterr().out


def test_progress_in_a_pipe_is_plain_lines(monkeypatch, capsys):
    """No carriage return, one line every few seconds and the last; in a terminal it is tqdm's."""
    now = [0.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    for _ in (bar := Progress(range(100), desc="steps", mininterval=0)):
        now[0] += 1.0
        bar.set_postfix_str("ce 1")
        if now[0] == 50:
            bar.write("a word between")
    text = capsys.readouterr()
    lines = text.err.splitlines()
    assert "\r" not in text.err + text.out and "a word between\n" == text.out
    assert 8 <= len(lines) <= 11 and all("steps" in line for line in lines)
    assert "100/100" in lines[-1] and text.err.endswith("\n")
    list(Progress(range(3), leave=False))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "script, reads, absent, by",
    [
        (
            "sample_difficulty.py",
            "toy/base, out/toy/train.jsonl",
            "toy/base/config.json",
            "train.py",
        ),
        ("fit_pca.py", "toy/base, out/toy/train.jsonl, ", "toy/base/config.json", "train.py"),
        ("train.py", "toy/base, out/toy/train.jsonl, ", "toy/base/config.json", "train.py"),
        ("infer.py", "out/gap, out/toy/test/3.png", "out/gap/config.json", "train.py"),
        ("eval.py", "out/gap, out/toy/test.jsonl", "out/gap/config.json", "train.py"),
        ("probe.py", "out/gap, out/toy/test.jsonl", "out/gap/config.json", "train.py"),
    ],
)
def test_files_are_named_first(tmp_path, monkeypatch, capsys, script, reads, absent, by):
    """What is read and written; then what is not there, with who writes it. Nothing is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, ROOT / script)
    assert str(e.value).startswith(f"{absent}: no such file; ") and by in str(e.value)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"reads  {reads}")
    assert script == "infer.py" or lines[1].startswith("writes out/")
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setenv("RANK", "1")  # the others are silent
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="no such file"):
        run_here(monkeypatch, ROOT / script)
    assert capsys.readouterr().out == ""


def test_a_local_rank_has_a_gpu_of_its_own(monkeypatch):
    """And it is the current one: a CUDA graph is captured on the current one's stream."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    launch.pick_device.cache_clear()
    assert launch.pick_device() == torch.device("cuda", 3)
    launch.pick_device.cache_clear()
    assert current == [torch.device("cuda", 3)]


def test_a_rank_that_never_comes(monkeypatch):
    """The launch ends; its work may take days, but not its beginning."""
    monkeypatch.setattr(launch, "TOGETHER", timedelta(seconds=2))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(SystemExit, match="rank 0 did not meet all 2 within 0:00:02"):
        launch.meet(0, 2)
    monkeypatch.setenv("MASTER_PORT", "x")
    with pytest.raises(SystemExit, match="rank 0 did not meet all 2"):
        launch.meet(0, 2)


def test_one_process_needs_no_network():
    """A name that a node's shell sets for its jobs, on a node that has no such network."""
    script = (
        "import torch\nfrom datetime import timedelta\n"
        "from launch import join_ranks, leave_ranks\n"
        "join_ranks(torch.device('cpu'), timedelta(minutes=1))\nleave_ranks()\n"
    )
    env = os.environ | {"GLOO_SOCKET_IFNAME": "ib9"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, check=True)


def test_a_script_may_have_no_console(tmp_path):
    """Closed, as a service has them: nothing lands in the next file that is opened."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from launch import Progress, start\n"
        f"def main():\n    f = open({str(tmp_path / 'file')!r}, 'w')\n    import os\n"
        "    os.write(2, b'said by a library')\n"
        "    print('said')\n    print('said', file=sys.stderr)\n"
        "    assert list(Progress(range(3))) == [0, 1, 2]\n    f.write('written')\n"
        "start(main)\n"
    )
    subprocess.run(f"exec <&- >&- 2>&-; {sys.executable} {script}", shell=True, check=True)
    assert (tmp_path / "file").read_text() == "written"


@pytest.mark.parametrize("rank,world", [("1", "1"), ("-1", "2"), ("0", "0"), ("", "1"), ("0", "x")])
def test_a_rank_that_cannot_be(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit, match="in the environment do not fit"):
        launch.start(main=lambda: None)


# --- starting a script and stopping it


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_setting(script, monkeypatch, capsys):
    namespace = run_here(monkeypatch, ROOT / script, "--help")  # SystemExit would fail the test
    text = capsys.readouterr().out
    question = namespace["__doc__"].strip().splitlines()[0]
    assert text.splitlines()[0] == question
    settings = settings_of(namespace)
    assert settings or script == "answers.py"  # which takes a file alone
    for name, value in settings.items():
        default = repr(value)
        if len(default) > 40:
            default = default[:36] + "..."
        lines = [line for line in text.splitlines() if line.startswith(f"  --{name}={default}")]
        assert len(lines) == 1, (name, lines)


def test_commands(monkeypatch):
    """A script of commands without one says which it has; two dashes before one do no harm."""
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, ROOT / "toy.py")
    assert str(e.value).startswith("usage: python toy.py data | edits | base [--key=value ...]")
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, ROOT / "toy.py", "--data", "--n_trian=3")
    assert str(e.value).startswith("unknown setting '--n_trian'; this script has: ")


SCRIPT = '''
"""Does one thing of what can go wrong."""
import sys
sys.path.insert(0, {root!r})
from launch import start

path = "absent.txt"  # a file to read

def read():
    print(open(path).read())

def err():
    return 1 + "one"

start(read=read, err=err)
'''


def test_ends_in_a_sentence_or_a_traceback(tmp_path, monkeypatch):
    """What a user causes ends in a sentence that names the file; a programming error is shown."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    absent = tmp_path / "absent.txt"
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, script, "read", f"--path={absent}")
    assert e.value.code == f"{absent}: No such file or directory"
    with pytest.raises(SystemExit) as e:  # a folder where a file should be
        run_here(monkeypatch, script, "read", f"--path={tmp_path}")
    assert e.value.code == f"{tmp_path}: Is a directory"
    for number in (errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.ENOSPC):
        assert (
            launch.users_error(OSError(number, "x", "a.json")) == f"a.json: {os.strerror(number)}"
        )
        told = SafetensorError(f"I/O error: of the disk (os error {number})")
        assert is_machines(told) and os.strerror(number) in launch.users_error(told)
    assert not is_machines(FileNotFoundError(errno.ENOENT, "x")) and not is_machines(ValueError())
    with pytest.raises(TypeError):
        run_here(monkeypatch, script, "err")

    done = finished(script, "err")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "line 13, in err" in done.stderr


def test_out_below_a_file(tmp_path):
    """A folder that cannot be made, for root neither: exit code 1 and one line."""
    (tmp_path / "file").write_text("")
    done = finished(ROOT / "toy.py", "data", f"--data_folder={tmp_path}/file/toy")
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path}/file/toy: Not a directory\n"


def finished(script, *args):
    """A script as its user runs it, with its exit code."""
    return subprocess.run(
        [sys.executable, str(script), *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def hear_interrupts():
    """A shell starts what it runs in the background deaf to Ctrl-C; and so this test, it may be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt(tmp_path):
    """Ctrl-C ends in one sentence and the exit code that a shell expects."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "toy.py"), "data", f"--data_folder={tmp_path}"]
        + ["--n_train=1000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=hear_interrupts,
    )
    while not (tmp_path / "train" / "0.png").exists():
        assert process.poll() is None, "toy.py ended before it could be interrupted"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert text.splitlines()[-1] == "stopped" and "Traceback" not in text


# --- settings have ranges

TRAIN = {
    **{"batch": 4, "global_batch": 16, "save_every": 500, "epochs": 2, "lr": 1e-3, "top_p": 1.0},
    **{"temperature": 1.0, "tau": 0.0, "max_new_tokens": 24, "min_pixels": 3136, "seed": 1},
    **{"max_pixels": 1003520, "data": "toy.jsonl", "val_data": "val.jsonl", "limit": 0},
    **{"beta1": 0.9, "beta2": 0.95},
}


@pytest.mark.parametrize(
    "setting",
    ["batch=0", "batch=-1", "global_batch=0", "save_every=-1", "epochs=-2", "lr=nan", "lr=-1"]
    + ["lr=inf", "beta1=1", "beta2=1", "top_p=1.5", "top_p=-0.1", "temperature=-1"]
    + ["temperature=nan", "tau=2"]
    + ["max_new_tokens=0", "min_pixels=0", "min_pixels=2000000", "limit=-1"],
)
def test_settings_that_make_no_sense_are_named(setting):
    with pytest.raises(SystemExit) as e:
        override(dict(TRAIN), [f"--{setting}"])
    assert setting.partition("=")[0] in str(e.value)


@pytest.mark.parametrize(
    "setting", ["batch=1", "save_every=0", "epochs=0", "lr=0", "top_p=1", "tau=1", "limit=0"]
)
def test_the_ends_of_ranges_are_settings(setting):
    script = dict(TRAIN)
    override(script, [f"--{setting}"])
    assert script[setting.partition("=")[0]] == float(setting.partition("=")[2])


@pytest.mark.parametrize("inline", [True, False])
def test_the_toys_validation_file_stays_with_the_toy(capsys, inline):
    """However a setting is given, in the block at the top or by --key=value."""
    val = "out/toy/val.jsonl"
    for given, kept in (
        ({}, val),
        ({"data": "out/toy/train.jsonl"}, val),
        ({"data": "./out/toy/test.jsonl"}, val),
        ({"data": os.path.abspath("out/toy/train.jsonl")}, val),
        ({"data": "mine.jsonl"}, ""),
        ({"data": "mine.jsonl", "val_data": "mine-val.jsonl"}, "mine-val.jsonl"),
    ):
        script = TRAIN | {"data": "out/toy/train.jsonl", "val_data": val}
        if inline:
            script |= given
        override(script, [] if inline else [f"--{name}={value}" for name, value in given.items()])
        assert script["val_data"] == kept
        assert ("no val_data" in capsys.readouterr().out) == (kept == "")


@pytest.mark.parametrize("value", [None, Path("out"), ["a"], ("a", "b"), {}])
def test_a_value_that_would_be_no_setting_is_named(value):
    """It would be missing in --help and in the record of the run."""
    with pytest.raises(SystemExit, match="^difficulty = .*a setting is a text"):
        override(TRAIN | {"difficulty": value}, [])


def test_a_runs_own_validation_file_stays_with_another_data_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/mine").mkdir(parents=True)
    (tmp_path / "out/mine/val.jsonl").touch()
    script = {"data": "out/toy/train.jsonl", "val_data": "out/toy/val.jsonl"}
    override(script, ["--run=mine", "--data=out/mine/train2.jsonl"])
    assert script["val_data"] == "out/mine/val.jsonl" and not capsys.readouterr().out


def test_a_setting_is_no_value():
    with pytest.raises(SystemExit, match="--data needs a value"):
        override(dict(TRAIN), ["--data", "--limit=3"])


# --- one folder, one writer

HOLD = """
import sys
sys.path.insert(0, {root!r})
from launch import claim
claim({folder!r})
print("held", flush=True)
sys.stdin.read()
"""


def test_one_holds_a_lock(tmp_path):
    assert lock(tmp_path / ".scores.lock") and not lock(tmp_path / ".scores.lock")


def test_a_second_writer_is_told_so(tmp_path):
    """While the first lives; what a dead one left half-written goes, a living one's stays."""
    folder = tmp_path / "out"
    script = HOLD.format(root=str(ROOT), folder=str(folder))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", script], **pipes)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(SystemExit, match="another process"):
        claim(folder)
    living, dead = folder / f".a.json.{os.getpid()}.tmp", folder / f".b.json.{first.pid}.tmp"
    for path in (living, dead):
        path.touch()
    first.communicate()
    claim(folder)
    assert living.exists() and not dead.exists()


def ends_of(name, default):
    """(values of a setting that make no sense, values that do)."""
    if name in SIZES:
        low, high = (1 if default else 0), math.inf
    else:
        low, high = RANGES[name]
    if isinstance(default, int):
        beyond = [] if high == math.inf else [high + 1]
        return [low - 1, -7, *beyond], [low, low + 1]
    beyond = [] if high == math.inf else [high + 0.01]
    return [low - 0.01, "nan", "inf", "-inf", *beyond], [low, low + 0.5]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_scripts_numbers_have_ranges(script, monkeypatch, capsys):
    namespace = run_here(monkeypatch, ROOT / script, "--help")
    capsys.readouterr()
    settings = settings_of(namespace)
    for name in settings.keys() & {*RANGES, *SIZES}:
        refused, taken = ends_of(name, settings[name])
        for value in refused:
            with pytest.raises(SystemExit) as e:
                override(dict(namespace), [f"--{name}={value}"])
            assert str(e.value).startswith(f"{name}=") and "\n" not in str(e.value), (name, value)
        for value in taken:
            # a limit of pixels is held against the other one
            other = {"min_pixels": ["--max_pixels=9999999"], "max_pixels": ["--min_pixels=1"]}
            other = other.get(name, []) if settings.keys() >= {"min_pixels", "max_pixels"} else []
            override(dict(namespace), [f"--{name}={value}", *other])


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_float_may_be_nan(script, monkeypatch, capsys):
    namespace = run_here(monkeypatch, ROOT / script, "--help")
    capsys.readouterr()
    for name, value in settings_of(namespace).items():
        if type(value) is float:
            with pytest.raises(SystemExit) as e:
                override(dict(namespace), [f"--{name}=nan"])
            assert name in str(e.value)


def test_other_ranks_and_other_files_are_left_alone(tmp_path, monkeypatch):
    """A launch has one writer; what a user put there is not cleaned up, however deep."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    deep = tmp_path / "targets" / "deep"
    deep.mkdir(parents=True)
    kept = [".tmp", ".a.tmp", ".notes.2024x.tmp", f"a.{ended.pid}.tmp", f".a.{ended.pid}.txt"]
    kept += [f".a.json.{os.getpid()}.tmp", ".a.json.1.tmp"]  # of processes that run
    for name in kept:
        (deep / name).touch()
    for number in (ended.pid, 10**20):
        (deep / f".a.json.{number}.tmp").touch()
    # a file is written in a folder of its own, by safetensors under one more name; a user's folder
    # of such a name has folders
    (deep / f".folder.{ended.pid}.tmp" / "a").mkdir(parents=True)
    kept.append(f".link.{ended.pid}.tmp")
    (deep / kept[-1]).symlink_to(tmp_path)
    (deep / f".b.safetensors.{ended.pid}.tmp").mkdir()
    for name in ("b.safetensors", ".tmpAbCdEf"):
        (deep / f".b.safetensors.{ended.pid}.tmp" / name).touch()

    claim(tmp_path)
    assert sorted(p.name for p in deep.iterdir()) == sorted([*kept, f".folder.{ended.pid}.tmp"])
    claim(tmp_path)  # what a process has it may claim again
    # a stage of its own for one file in the same folder
    for name in (f".counts.jsonl.{ended.pid}.tmp", f".a.json.{ended.pid}.tmp"):
        (tmp_path / name).touch()
    claim(tmp_path, "counts.jsonl")
    assert not (tmp_path / f".counts.jsonl.{ended.pid}.tmp").exists()
    assert (tmp_path / f".a.json.{ended.pid}.tmp").exists()  # of a process on another machine?
    monkeypatch.setenv("RANK", "1")
    claim(tmp_path)


def test_threads_are_the_idle_cores(tmp_path):
    """Of two readings of /proc/stat, of the cores that are ours."""
    stat = tmp_path / "stat"
    readings = []
    ours, other = min(os.sched_getaffinity(0)), 1 + max(os.sched_getaffinity(0))
    for user, idle, disk in ((100, 1000, 10), (110, 1025, 15)):
        lines = [
            "cpu  1 2 3 4 5 6 7 8 9 10",
            f"cpu{ours} {user} 0 7 {idle} {disk} 0 0 0 99 99",
            f"cpu{other} {user} 0 0 1 0 0 0 0 0 0",  # another job's
            "intr 1",
        ]
        stat.write_text("\n".join(lines))
        readings.append(launch.cpu_ticks(stat))
    for cores, want in ((1, 1), (2, 2), (4, 3), (16, 12)):  # 30 of 40 ticks idle
        assert launch.idle_cores(*readings, cores) == want
    busy = readings[0], (readings[0][0], readings[0][1] + 40)
    assert launch.idle_cores(*busy, 8) == 1  # never none
    nowhere = launch.cpu_ticks(tmp_path / "none")
    assert launch.idle_cores(nowhere, nowhere, 8) == 8
    idle, total = launch.cpu_ticks()
    assert 0 < idle < total


def test_a_container_may_have_fewer_cores_than_the_machine(tmp_path):
    limit, ours = tmp_path / "cpu.max", len(os.sched_getaffinity(0))
    assert launch.cores_allowed(limit) == ours
    for text, want in (("max 100000", ours), ("150000 100000", 1), ("9900000 100000", ours)):
        limit.write_text(f"{text}\n")
        assert launch.cores_allowed(limit) == want
    for text in ("", "max", "a b", "50000 0"):
        limit.write_text(text)
        assert launch.cores_allowed(limit) == ours


def test_a_users_own_number_of_threads_wins(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(launch, "cpu_ticks", lambda: (0, 0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.use_idle_cores()
    assert torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    readings = iter([(0, 0), (0, 100)])  # no core is idle
    torch.set_num_threads(4)
    monkeypatch.setattr(launch, "cpu_ticks", lambda: next(readings))
    launch.use_idle_cores()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_who_is_alone_with_a_lock_is_the_last(tmp_path):
    first, second = (hold_together(tmp_path / ".answering.lock") for _ in range(2))
    assert first.readable() and first.writable()  # as NFS asks
    assert not hold_alone(first)
    assert hold_alone(second)  # the first has let go when it was not
