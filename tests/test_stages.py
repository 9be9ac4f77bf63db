"""Do the stages fit together? train.py refuses what was not made for it, in one sentence."""

from conftest import TOY, broken, run, sampling
from safetensors.torch import load_file, save_file

from files import folder_digest, read_lines, write_lines


def training(stages, **change):
    """The arguments of a step of train.py."""
    settings = {
        "base": stages["base"],
        "data": stages["world"] / "train.jsonl",
        "val_data": "",
        "pca": stages["pca"],
        "difficulty": "",
        "max_steps": 1,
        "global_batch": 4,
    } | change
    return [f"--{k}={v}" for k, v in settings.items()]


def test_what_is_cheap_is_checked_before_weights(tmp_path, stages):
    """The model's folder is none, which would be said next: a missing file is said before."""
    none = tmp_path / "model"
    none.mkdir()
    (none / "config.json").write_text("{}")
    for change, words in (
        ({"data": "x.jsonl"}, "x.jsonl: no such data file; `python toy.py data` writes the toy's"),
        ({"val_data": "x.jsonl"}, "x.jsonl: no such data file"),
        ({"pca": tmp_path}, "pca.safetensors: no such file; fit_pca.py writes it"),
        ({"difficulty": "x"}, "x: no such file; sample_difficulty.py writes it"),
        ({}, "model_type"),
    ):
        args = training(stages, base=none, out=tmp_path / "out", **change)
        assert words in run("train.py", *args, ok=False), change

    test = stages["world"] / "test.jsonl"
    args = [f"--model={none}", f"--data={test}", f"--out={tmp_path}/eval"]
    shuffled = [*args, "--intervention=shuffle", f"--donor={tmp_path}/none"]
    assert "it holds 0 files" in run("eval.py", *shuffled, ok=False)
    args = [f"--model={none}", f"--images={stages['world']}/test/0.png"]
    shuffled = [*args, "--intervention=shuffle", "--donor=x"]
    assert "x: no such file; infer.py --latents=FILE" in run("infer.py", *shuffled, ok=False)
    oracle = [*args, "--intervention=oracle", "--aux=x.png"]
    assert "x.png: no such image" in run("infer.py", *oracle, ok=False)


def test_early_stop_at_another_tau_is_refused(tmp_path, world, stages):
    out = tmp_path / "early"
    run("sample_difficulty.py", *sampling(TOY, world, out))
    lines = read_lines(out)
    assert any(line["lower_bound"] for line in lines)
    # as if the stages' base, which solves nothing, had been asked
    write_lines(out, [line | {"base": folder_digest(stages["base"])} for line in lines])
    text = run("train.py", *training(stages, difficulty=out, tau=0.9, out=tmp_path / "x"), ok=False)
    assert "stopped early" in text and "tau=0.9" in text


def test_stages_refuse_what_does_not_belong_together(tmp_path, base, world, stages):
    out = tmp_path / "out"

    # a PCA of another tower
    other = tmp_path / "other"
    other.mkdir()
    for f in base.iterdir():
        if f.name != "model.safetensors":
            (other / f.name).symlink_to(f)
    weights = load_file(base / "model.safetensors")
    for name in weights:
        if "merger" in name:
            weights[name] = weights[name] + 0.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    text = run("train.py", *training(stages, base=other, out=out), ok=False)
    assert "pca.safetensors" in text and "vision tower" in text and str(other) in text

    # another K
    mixed = tmp_path / "mixed"
    fit = [f"--base={base}", f"--data={world}/train.jsonl", "--val_data="]
    run("fit_pca.py", *fit, f"--out={mixed}", "--K=1")
    (mixed / "pca.safetensors").unlink()
    (mixed / "pca.safetensors").symlink_to(stages["pca"] / "pca.safetensors")
    text = run("train.py", *training(stages, pca=mixed, out=out), ok=False)
    assert "index.json has K = 1" in text and "pca.safetensors has 4" in text

    # targets missing for an example that needs them
    args = training(stages, data=world / "val.jsonl", pca=mixed, out=out)
    run("train.py", *args, ok=False)
    new = broken(world, tmp_path, lambda r: r | {"id": "new"})
    text = run("train.py", *training(stages, val_data=new, out=out), ok=False)
    assert "'new'" in text and "index.json" in text

    # difficulty of other data
    difficulty = tmp_path / "difficulty.jsonl"
    difficulty.write_text("")
    text = run("train.py", *training(stages, difficulty=difficulty, out=out), ok=False)
    assert "difficulty.jsonl lacks 48 examples" in text

    # targets of other settings
    text = run("fit_pca.py", *fit, f"--out={stages['pca']}", "--K=9", ok=False)
    assert "made_by.json" in text and "'K': (4, 9)" in text
    assert [path.name for path in out.iterdir()] == [".lock"]  # nothing was written
