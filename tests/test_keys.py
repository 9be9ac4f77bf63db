"""Does every setting that changes a result change the key under which the result is kept?

A setting outside its key would leave an old result in place of a new one. What a stage reads is
found in its source, so that a setting which is added counts at once.
"""

import ast
from pathlib import Path

import pytest

import build_data
import eval
import fit_pca
import sample_difficulty
from launch import settings_of

SERVER = "served_key workers tries give_up"  # how a server is asked, not what


def bound_in(node):
    """The names that a function or class gives a meaning of its own."""
    names = {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    return names | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def settings_read(module, *roots):
    """The settings that functions or classes of a script read, also through others of it."""
    tree = ast.parse(Path(module.__file__).read_text())
    kinds = ast.FunctionDef, ast.ClassDef
    defined = {node.name: node for node in tree.body if isinstance(node, kinds)}
    settings, todo, done, found = settings_of(vars(module)), list(roots), set(), set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        node = defined[name]
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - bound_in(node)
        todo += names & defined.keys()
        found |= names & settings.keys()
    return found


def other(value):
    """Another value of a setting's type."""
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else 2 * value + 1


# by what is made: the functions that make it, the settings in its key, and those that it reads and
# that change nothing of it
MADE = {
    "convert": (["convert_one"], build_data.CONVERT_USES, "out"),
    "draw": (
        ["draw_image"],
        build_data.DRAWN_USES,
        "out image_url image_key tries first_pause timeout",
    ),
    "write": (
        ["write_response"],
        build_data.WRITTEN_USES,
        "out teacher_url teacher_key tries first_pause timeout",
    ),
    "filter": (["filter_one"], build_data.FILTER_USES, "out"),
}


@pytest.mark.parametrize("name", MADE)
def test_what_build_data_keeps(name):
    roots, keyed, free = MADE[name]
    assert settings_read(build_data, *roots) - set(free.split()) <= set(keyed)


def test_what_sample_difficulty_keeps(monkeypatch):
    monkeypatch.setattr(sample_difficulty, "folder_digest", lambda base: "base")
    monkeypatch.setattr(sample_difficulty, "url", "http://localhost")
    read = settings_read(sample_difficulty, "sample_all")
    read -= set(f"data out base url batch {SERVER}".split())
    assert {"temperature", "served_model", "rule", "max_pixels"} <= read
    before = sample_difficulty.run_key()
    for name in read:
        with monkeypatch.context() as m:
            m.setattr(sample_difficulty, name, other(getattr(sample_difficulty, name)))
            assert sample_difficulty.run_key() != before, name


def test_what_fit_pca_keeps(monkeypatch, loaded):
    vlm = loaded[0]
    read = settings_read(fit_pca, "encode_shard") - {"batch", "base"}  # its tower is in the key
    assert {"K", "mode", "degenerate"} <= read
    before = fit_pca.provenance(vlm)
    for name in read:
        with monkeypatch.context() as m:
            m.setattr(fit_pca, name, other(getattr(fit_pca, name)))
            assert fit_pca.provenance(vlm) != before, name


@pytest.mark.parametrize("served", [False, True])
def test_what_eval_keeps(monkeypatch, served):
    monkeypatch.setattr(eval, "folder_digest", str)
    monkeypatch.setattr(eval, "file_md5", str)
    monkeypatch.setattr(eval, "load_examples", lambda path, training: [])
    monkeypatch.setattr(eval, "usable_rows", lambda rows, skip, fields: rows)
    if served:
        monkeypatch.setattr(eval, "url", "http://localhost")
    read = settings_read(eval, "ServedAnswerer" if served else "Answerer")
    # kept latents are looked for beside their answer
    read -= set(f"url save_latents batch prompt_tokens {SERVER}".split())
    assert {"temperature", "instruction", "seed"} <= read
    before = eval.load_test_set("").key
    for name in [*read, "min_pixels", "max_pixels", "max_new_tokens"]:
        with monkeypatch.context() as m:
            m.setattr(eval, name, other(getattr(eval, name) or 5000))
            assert eval.load_test_set("").key != before, name
