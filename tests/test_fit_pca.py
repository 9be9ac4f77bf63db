"""Where do real vision embeddings live? The PCA against an SVD, and the files of targets."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import PIXELS, broken, kill_when, noise, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fit_pca
from data import LATENT_SPAN, load_examples
from files import metadata_of, read_lines, tensors_digest, write_lines
from imagine import load_bank
from model import load_pca, load_processor, load_vlm

close = torch.testing.assert_close


def fitting(base, world, out, *args):
    """The arguments of a run of fit_pca.py."""
    return [
        f"--base={base}",
        f"--data={world}/train.jsonl",
        f"--val_data={world}/val.jsonl",
        f"--out={out}",
        *args,
    ]


def test_pca_equals_svd(tmp_path):
    """Mean, basis, k and RelMSE, streamed from shards, against one float64 SVD of all vectors."""
    torch.manual_seed(0)
    v = torch.randn(600, 16) * torch.logspace(1, -1, 16) + torch.randn(16) * 5
    v = v.bfloat16()
    for i, part in enumerate(v.split(200)):
        targets = {f"{i}-{j}": x for j, x in enumerate(part.view(-1, 1, 4, 16))}
        save_file(targets, tmp_path / f"{i}", {"rejected": "[]"})
    total, outer, n = fit_pca.moments(sorted(tmp_path.iterdir()), 16, "cpu")
    mean, covariance = fit_pca.mean_and_covariance(total, outer, n)
    eigenvalues, vectors, k = fit_pca.fit(covariance, 0.95)

    x = v.double() - v.double().mean(0)
    _, s, basis = torch.linalg.svd(x, full_matrices=False)
    explained = (s**2).cumsum(0) / (s**2).sum()
    assert n == 600 and k == int((explained < 0.95).sum()) + 1
    close(mean, v.double().mean(0))
    close(eigenvalues, s**2 / n)
    close((vectors[:, :k] * basis.T[:, :k]).sum(0).abs(), torch.ones(k, dtype=torch.float64))
    for j in range(1, 16):  # RelMSE(j) is the share that a rank-j reconstruction loses
        lost = (x - x @ basis.T[:, :j] @ basis[:j]).pow(2).sum() / x.pow(2).sum()
        close(fit_pca.rel_mse(eigenvalues, j), float(lost))


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_all_of_the_variance_has_as_many_components_as_the_data(offset):
    """11 vectors in 37 dimensions have rank 10; what is beyond it is rounding."""
    v = torch.randn(11, 37, generator=torch.Generator().manual_seed(0)) + offset
    v = v.bfloat16().double()
    _, covariance = fit_pca.mean_and_covariance(v.sum(0), v.T @ v, len(v))
    assert fit_pca.fit(covariance, 1.0)[2] == torch.linalg.matrix_rank(v - v.mean(0)) == 10


def test_random_basis():
    """Orthonormal, not the PCA's; its variances are the data's along it and sum to the total."""
    x = torch.randn(500, 12, dtype=torch.float64) * torch.logspace(1, -1, 12, dtype=torch.float64)
    x = x - x.mean(0)
    variances, vectors = fit_pca.random_basis(x.T @ x / 500)
    close(vectors.T @ vectors, torch.eye(12, dtype=torch.float64))
    close(variances, (x @ vectors).var(0, correction=0))
    close(variances.sum(), x.var(0, correction=0).sum())
    assert vectors.abs().max(0).values.max() < 0.99  # the PCA's vectors are near the axes


def test_targets_are_safetensors_only(tmp_path, base, world):
    run("fit_pca.py", *fitting(base, world, tmp_path, "--shard=20"))
    index = json.loads((tmp_path / "targets" / "index.json").read_text())
    assert len(index["files"]) == 56 and index["K"] == 4
    with safe_open(tmp_path / "targets" / index["files"]["train-3"], "pt") as f:
        two_spans = f.get_tensor("train-3")
    assert two_spans.shape == (2, 4, 128) and two_spans.dtype == torch.bfloat16
    assert PIXELS == (index["min_pixels"], index["max_pixels"])

    # the controls on the same targets: a random basis of the same k, and no mean
    before = load_pca(tmp_path / "pca.safetensors")[0]
    args = fitting(base, world, tmp_path, "--shard=20", "--basis=random", "--centre=0")
    run("fit_pca.py", *args)
    after, meta = load_pca(tmp_path / "pca.safetensors")
    assert meta["basis"] == "random" and after["basis"].shape == before["basis"].shape
    assert not after["mean"].any()
    close(after["basis"].T @ after["basis"], torch.eye(after["basis"].shape[1]))
    close(after["total_variance"], before["total_variance"], rtol=1e-5, atol=0.0)
    assert after["eigenvalues"].sum() < before["eigenvalues"].sum()


def test_fit_pca_ranks_and_resume(tmp_path, base, world):
    """Two ranks, and a run that finds half of its shards, give the PCA of one process."""
    args = fitting(base, world, tmp_path / "one", "--shard=10")
    run("fit_pca.py", *args)
    run("fit_pca.py", *fitting(base, world, tmp_path / "two", "--shard=10"), ranks=2)
    one = load_file(tmp_path / "one" / "pca.safetensors")
    two = load_file(tmp_path / "two" / "pca.safetensors")
    for name in ("mean", "eigenvalues"):
        assert (one[name] - two[name]).abs().max() < 1e-4 * one[name].abs().max()

    shard = tmp_path / "one" / "targets" / "train-00001.safetensors"
    stamp = shard.stat().st_mtime_ns
    (tmp_path / "one" / "targets" / "train-00002.safetensors").unlink()
    (tmp_path / "one" / "pca.safetensors").unlink()
    run("fit_pca.py", *args)
    assert shard.stat().st_mtime_ns == stamp
    assert (load_file(tmp_path / "one" / "pca.safetensors")["mean"] == one["mean"]).all()


def test_degenerate_images_are_rejected(tmp_path, base, world):
    """A blank auxiliary image is named and left out of the PCA and of training."""
    Image.new("RGB", (56, 56), "white").save(tmp_path / "blank.png")
    path = broken(world, tmp_path, lambda r: r | {"aux_images": [str(tmp_path / "blank.png")]})
    args = [f"--base={base}", f"--data={path}", "--val_data=", f"--out={tmp_path}/pca"]
    text = run("fit_pca.py", *args, "--degenerate=0.02")
    assert "rejected as degenerate: 1" in text and "train-1" in text
    text = run(
        "train.py",
        f"--base={base}",
        f"--data={path}",
        "--val_data=",
        f"--pca={tmp_path}/pca",
        "--difficulty=",
        f"--out={tmp_path}/gap",
        "--max_steps=1",
        "--global_batch=2",
    )
    assert "3 examples, 3 with latents, 1 rejected" in text


def test_images_too_thin_for_the_grid_are_counted(tmp_path, base, world):
    """One embedding high: the cells above each other are the same."""
    noise(0, (28, 140)).save(tmp_path / "thin.png")
    path = broken(world, tmp_path, lambda r: r | {"aux_images": [str(tmp_path / "thin.png")]})
    args = [f"--base={base}", f"--data={path}", "--val_data=", f"--out={tmp_path}/pca"]
    assert "too thin for 2 x 2 cells: 1 images" in run("fit_pca.py", *args)


def test_targets_belong_to_their_pictures(tmp_path, base, world):
    """A repeated fit changes nothing; a redrawn picture is refused by train.py, made anew here."""
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    args = [f"--base={base}", f"--data={copy}/train.jsonl", "--val_data=", "--shard=20"]
    out = tmp_path / "pca"
    run("fit_pca.py", *args, f"--out={out}")
    first = {path: tensors_digest(path) for path in out.rglob("*.safetensors")}
    times = {path: path.stat().st_mtime_ns for path in (out / "targets").glob("*.safetensors")}
    index = (out / "targets" / "index.json").read_bytes()
    run("fit_pca.py", *args, f"--out={out}")
    assert {path: tensors_digest(path) for path in first} == first
    assert (out / "targets" / "index.json").read_bytes() == index  # a half-done training's inputs
    assert all(path.stat().st_mtime_ns == t for path, t in times.items())

    shutil.copy(copy / "train/0-aux.png", copy / "train/30-aux.png")
    train = [*args[:3], f"--pca={out}", "--difficulty=", "--max_steps=1", "--global_batch=4"]
    text = run("train.py", *train, f"--out={tmp_path}/a", ok=False)
    assert "train.jsonl:31" in text and "run fit_pca.py again" in text
    # a run that is killed on the way leaves no index of what no longer is, and goes on
    indexed = (out / "targets" / "index.json").exists
    kill_when(lambda: not indexed(), "fit_pca.py", *args, f"--out={out}")
    assert "index.json: no such file; fit_pca.py" in run(
        "train.py", *train, f"--out={tmp_path}/a", ok=False
    )
    run("fit_pca.py", *args, f"--out={out}")
    made_again = [path for path, t in times.items() if path.stat().st_mtime_ns != t]
    assert [path.name for path in made_again] == ["train-00001.safetensors"]
    run("train.py", *train, f"--out={tmp_path}/a")

    # a flipped bit in a target file that was indexed: refused; without the file the same PCA
    path = out / "targets" / "train-00000.safetensors"
    pca = tensors_digest(out / "pca.safetensors")
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x40
    path.write_bytes(content)
    text = run("fit_pca.py", *args, f"--out={out}", ok=False)
    assert f"{path}: damaged or exchanged" in text
    path.unlink()
    run("fit_pca.py", *args, f"--out={out}")
    assert tensors_digest(out / "pca.safetensors") == pca

    # one fit's PCA beside another's targets
    write_lines(copy / "fewer.jsonl", read_lines(copy / "train.jsonl")[:30])
    run("fit_pca.py", *args, f"--data={copy}/fewer.jsonl", f"--out={tmp_path}/fewer")
    shutil.copy(tmp_path / "fewer" / "pca.safetensors", out / "pca.safetensors")
    text = run("train.py", *train, f"--out={tmp_path}/a", ok=False)
    assert "fitted on other targets" in text


def test_a_target_file_is_of_its_key(tmp_path):
    path = tmp_path / "train-00000.safetensors"
    assert not fit_pca.is_made(path, "k")
    save_file({"a": torch.ones(1, 4, 8)}, path, {"key": "k"})
    assert fit_pca.is_made(path, "k") and not fit_pca.is_made(path, "another")
    for content in (
        path.read_bytes()[:-1],
        path.read_bytes()[:20],
        b"",
        b"version https://git-lfs",
    ):
        path.write_bytes(content)
        assert not fit_pca.is_made(path, "k")
    save_file({"a": torch.ones(1, 4, 8)}, path)  # not ours
    assert not fit_pca.is_made(path, "k")


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda rows, folder: shutil.copy(folder / "p0.png", folder / "moved.png"), True),
        (lambda rows, folder: rows[0].update(question="another", answer="another"), True),
        (lambda rows, folder: (folder / "p0.png").write_bytes(b"redrawn"), False),
        (lambda rows, folder: rows[0].update(id="another"), False),
        (lambda rows, folder: rows[0]["aux_images"].append(str(folder / "p1.png")), False),
        (lambda rows, folder: rows.reverse(), False),
        (lambda rows, folder: rows.pop(), False),
    ],
)
def test_a_target_file_is_made_again_where_its_pictures_change(tmp_path, change, same):
    def key(made_by="settings"):
        ((_, _, key),) = fit_pca.split_to_shards({"train": rows}, made_by)
        return key

    rows = []
    for n in range(3):
        (tmp_path / f"p{n}.png").write_bytes(f"picture {n}".encode())
        rows.append({"id": str(n), "aux_images": [str(tmp_path / f"p{n}.png")]})
    before = key()
    change(rows, tmp_path)
    if (tmp_path / "moved.png").exists():
        rows[0]["aux_images"] = [str(tmp_path / "moved.png")]
    assert (key() == before) == same
    assert key("other settings") not in (before, key())


def test_pictures_that_are_replaced_meanwhile(tmp_path, monkeypatch):
    """Of which picture a target is then, nobody knows."""
    monkeypatch.setattr(fit_pca, "gathered", lambda value: [value])
    monkeypatch.setattr(fit_pca, "shard", 1)
    rows = [{"id": str(n), "aux_images": [str(tmp_path / f"{n}.png")]} for n in range(2)]
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(b"a picture")
    before = fit_pca.split_to_shards({"train": rows}, "settings")
    made = [tmp_path / path.name for path, _, _ in before]
    before = [file._replace(path=path) for path, file in zip(made, before)]
    for path in made:
        path.touch()
    fit_pca.check_unchanged(before, fit_pca.split_to_shards({"train": rows}, "settings"))
    (tmp_path / "1.png").write_bytes(b"redrawn")
    with pytest.raises(SystemExit, match="train-00001.safetensors: pictures changed"):
        fit_pca.check_unchanged(before, fit_pca.split_to_shards({"train": rows}, "settings"))
    assert made[0].exists() and not made[1].exists()


def test_a_fit_to_a_picture_that_is_replaced_meanwhile(base, world, tmp_path, monkeypatch):
    """The stage itself ends, before a PCA of it is written."""
    shutil.copytree(world, tmp_path / "toy")
    monkeypatch.setattr(fit_pca, "base", str(base))
    monkeypatch.setattr(fit_pca, "data", str(tmp_path / "toy/train.jsonl"))
    monkeypatch.setattr(fit_pca, "val_data", "")
    monkeypatch.setattr(fit_pca, "out", str(tmp_path / "pca"))
    monkeypatch.setattr(fit_pca, "K", 4)
    encode_shard = fit_pca.encode_shard

    def redrawn_after(path, rows, *others):
        encode_shard(path, rows, *others)
        noise(64).save(rows[0]["aux_images"][0])

    monkeypatch.setattr(fit_pca, "encode_shard", redrawn_after)
    try:
        with pytest.raises(SystemExit, match="pictures changed while their targets were made"):
            fit_pca.main()
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "pca/pca.safetensors").exists()


@pytest.mark.parametrize("text", ["[]", "", "7", '{"K": 9, "mode": "pool"}', '{"K": 4}'])
def test_targets_made_in_another_way_are_refused(tmp_path, text):
    made_by, note = {"K": 4, "mode": "pool"}, tmp_path / "made_by.json"
    fit_pca.check_provenance(note, made_by)  # none there
    note.write_text('{"mode": "pool", "K": 4}')
    fit_pca.check_provenance(note, made_by)
    note.write_text(text)
    with pytest.raises(SystemExit, match="made_by.json"):
        fit_pca.check_provenance(note, made_by)


def test_rows_that_are_left_out_are_left_out_by_all(tmp_path, base, world):
    """fit_pca.py, train.py and probe.py take a data file with a broken auxiliary image alike."""
    rows = [dict(row) for row in load_examples(world / "train.jsonl")[:9]]
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    rows[4]["aux_images"] = [str(tmp_path / "broken.png")]
    write_lines(tmp_path / "train.jsonl", rows)
    args = [f"--base={base}", f"--data={tmp_path}/train.jsonl", "--val_data="]
    text = run("fit_pca.py", *args, f"--out={tmp_path}/pca", ok=False)
    assert "broken.png" in text and "--skip_unusable=1" in text
    args.append("--skip_unusable=1")
    run("fit_pca.py", *args, f"--out={tmp_path}/pca")
    args += [f"--pca={tmp_path}/pca", "--difficulty=", f"--out={tmp_path}/gap", "--max_steps=1"]
    assert "8 examples" in run("train.py", *args, "--global_batch=4", "--save_every=0")

    args = [f"--model={base}", f"--data={tmp_path}/train.jsonl", f"--out={tmp_path}/probe"]
    assert "--skip_unusable=1" in run("probe.py", *args, "--max_new_tokens=2", ok=False)
    run("probe.py", *args, "--max_new_tokens=2", "--skip_unusable=1")
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["questions"] == 8


def test_the_pca_is_of_usable_training_vectors_alone(tmp_path, base, world):
    """Neither of validation data nor of a row with a flat picture: by the target files."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    Image.new("RGB", (56, 56), "red").save(folder / "flat.png")
    # one of two pictures: the row is left out whole
    rows[0]["aux_images"].append("flat.png")
    rows[0]["response"] = rows[0]["response"].replace(LATENT_SPAN, LATENT_SPAN * 2)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [f"--data={folder}/train.jsonl", f"--val_data={folder}/val.jsonl"]
    run("fit_pca.py", f"--base={base}", *args, f"--out={tmp_path}/pca")
    targets = tmp_path / "pca" / "targets"
    assert json.loads((targets / "index.json").read_text())["rejected"] == [rows[0]["id"]]
    pca, meta = load_pca(tmp_path / "pca" / "pca.safetensors")
    bank = load_bank(tmp_path / "pca" / "bank.safetensors", meta["targets"])
    assert rows[0]["id"] not in {id for id, _ in bank["pictures"]}
    v = []
    for file in targets.glob("train-*.safetensors"):
        of_rows = load_file(file).items()
        v += [x.flatten(0, 1).double() for id, x in of_rows if id != rows[0]["id"]]
    v = torch.cat(v)
    assert int(meta["n"]) == len(v)
    torch.testing.assert_close(pca["mean"].double(), v.mean(0), rtol=1e-4, atol=1e-4)


def test_a_refit_of_the_same_is_kept(tmp_path):
    """Another number of threads rounds another way: what was trained on a PCA can still go on."""
    path, meta = tmp_path / "pca.safetensors", {"targets": "a", "k": "2"}
    assert metadata_of(path) != meta
    save_file({"mean": torch.zeros(3)}, path, meta)
    assert metadata_of(path) == meta and metadata_of(path) != meta | {"targets": "b"}
    path.write_bytes(path.read_bytes()[:20])
    assert metadata_of(path) != meta


def test_the_bank_is_spread_over_the_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_pca, "n_bank", 3)
    rows = [{"id": str(i), "aux_images": ["a"]} for i in range(9)]
    path = tmp_path / "train-00000.safetensors"
    save_file({str(i): torch.full((1, 1, 1), float(i)) for i in range(9)}, path)
    found = fit_pca.sample_targets([fit_pca.TargetFile(path, rows, "k")], {"3"})
    assert [row["id"] for row, _ in found] == ["0", "2", "6"]


def test_norms_are_said(tmp_path, base, world):
    args = [f"--base={base}", f"--data={world}/train.jsonl", "--val_data=", f"--out={tmp_path}/pca"]
    text = run("fit_pca.py", *args)
    v = load_file(tmp_path / "pca/targets/train-00000.safetensors")
    norm = torch.cat([x.flatten(0, 1).float() for x in v.values()]).norm(dim=-1).mean()
    assert f"mean norm of targets {norm:.2f}," in text
    vlm, _ = load_vlm(base)
    rows = list(load_examples(world / "train.jsonl"))
    said = fit_pca.query_norms(rows[:3], vlm, load_processor(base, *PIXELS))
    assert said.shape == (3 * 9,)


def test_all_that_makes_a_target_is_in_its_provenance(base, monkeypatch):
    vlm, _ = load_vlm(base)
    found = [fit_pca.provenance(vlm)]
    others = {"K": 9, "mode": "resize", "min_pixels": 1, "max_pixels": 2, "degenerate": 0.5}
    for name, value in (others | {"dtype": "bfloat16"}).items():
        with monkeypatch.context() as m:
            m.setattr(fit_pca, name, value)
            found.append(fit_pca.provenance(vlm))
    assert len({tuple(x.items()) for x in found}) == len(found)
