"""Bad input ends in one sentence; a script starts and stops as its user expects."""

import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TOY, broken, run

from data import load_examples, settings_of

# --- a data file: the sentence names file, line and field


def answer_first(row):
    return row | {"response": "<answer> x </answer> <think> <latent></latent> </think>"}


def no_end_of_thought(row):
    return row | {"response": row["response"].replace("</think>", "")}


def words_in_span(row):
    return row | {"response": row["response"].replace("<latent></latent>", "<latent> x </latent>")}


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda r: "{", ["not JSON"]),
        (lambda r: "[1]", ["JSON object"]),
        (lambda r: r | {"id": "train-0"}, ["train-0", "repeats line 1"]),
        (lambda r: r | {"answer": 3}, ["'answer'", "found 3"]),
        (lambda r: r | {"images": ["no.png"]}, ["no.png"]),
        (lambda r: r | {"images": [3]}, ["'images'", "found 3"]),
        (lambda r: r | {"options": [3]}, ["'options'", "found 3"]),
        (lambda r: r | {"aux_images": []}, ["1 <latent></latent>", "0 aux_images"]),
        (no_end_of_thought, ["tags"]),
        (answer_first, ["tags"]),
        (words_in_span, ["nothing inside"]),
        (lambda r: r | {"question": "what is <|image_pad|>?"}, ["'question'", "<|image_pad|>"]),
    ],
)
def test_bad_data_names_the_line(tmp_path, world, change, words):
    with pytest.raises(SystemExit) as e:
        load_examples(broken(world, tmp_path, change))
    for word in ["broken.jsonl:2", *words]:
        assert word in str(e.value)


# --- settings and folders


def run_here(monkeypatch, path, *args):
    """Run a script in this process, which has imported torch already. Returns its globals."""
    monkeypatch.setattr(sys, "argv", [str(path), *args])
    return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(
    "script,arg,words",
    [
        ("train.py", "--lrr=1", "unknown setting '--lrr'"),
        ("train.py", "--epochs=two", "is not int"),
        ("fit_pca.py", "--K=5", "not a square"),
    ],
)
def test_unknown_settings(monkeypatch, script, arg, words):
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, ROOT / script, arg)
    assert words in str(e.value)


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


# --- starting a script and stopping it

SCRIPTS = sorted(
    path.name for path in ROOT.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_setting(script, monkeypatch, capsys):
    namespace = run_here(monkeypatch, ROOT / script, "--help")  # SystemExit would fail the test
    text = capsys.readouterr().out
    question = namespace["__doc__"].strip().splitlines()[0]
    assert text.splitlines()[0] == question
    settings = settings_of(namespace)
    assert settings
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
    assert str(e.value).startswith("usage: python toy.py data | base [--key=value ...]")
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, ROOT / "toy.py", "--data", "--n_trian=3")
    assert str(e.value).startswith("unknown setting '--n_trian'; this script has: ")


SCRIPT = '''
"""Does one thing of what can go wrong."""
import sys
sys.path.insert(0, {root!r})
from data import start

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
    with pytest.raises(TypeError):
        run_here(monkeypatch, script, "err")

    done = finished(script, "err")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "line 13, in err" in done.stderr


def test_out_below_a_file(tmp_path):
    """A folder that can not be made, for root neither: exit code 1 and one line."""
    (tmp_path / "file").write_text("")
    done = finished(ROOT / "toy.py", "data", f"--data_folder={tmp_path}/file/toy")
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path}/file/toy/train: Not a directory\n"


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
