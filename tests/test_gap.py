"""GAP as a method: which rows keep what, and what belongs together."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import PIXELS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import binom

import train
from data import Row, load_examples, question_key
from files import write_json, write_lines
from gap import GAP, Targets, check_same_space, is_solved, n_options, read_counts, solved_by
from images import open_image
from model import IGNORE, encode_images, load_pca, load_processor, load_vlm


def gap_of(base, gap_args, **change):
    """A GAP of the random base, with the settings of train.py that it reads."""
    given = dict(arg.removeprefix("--").split("=", 1) for arg in gap_args)
    settings = {name: given[name] for name in ("base", "data", "pca", "difficulty")}
    settings |= {"method": "gap", "tau": 0.0, "rule": "paper", "keep_parser": True}
    settings |= {"write_parser": True, "easy_latents": 0.0, "latents_first": 0}
    settings |= {"skip_unusable": False}
    settings |= {"lambda_latent": 0.5, "latent_loss": "mean", "scheduled_sampling": False}
    return GAP(*load_vlm(base), load_processor(base, *PIXELS), settings | change)


def n_pads(method, row):
    return int((method.encode(row)["ids"] == method.latent_id).sum())


@pytest.mark.parametrize("keep, write", [(True, True), (False, True), (True, False)])
def test_who_keeps_the_parser_text(base, world, gap_args, keep, write):
    """keep_parser=0 drops it from stripped rows, write_parser=0 from all; spans stay put."""
    method = gap_of(base, gap_args, keep_parser=keep, write_parser=write)
    ids = [row["id"] for row in load_examples(world / "train.jsonl")]
    solved = set(ids[::3])

    rows, left_out = method.rows(load_examples(world / "train.jsonl"), training=True)
    assert [row["id"] for row in rows] == ids and not left_out
    for row in rows:
        assert ("<parser>" in row["response"]) == (write and (keep or row["id"] not in solved))
        assert ("<latent>" in row["response"]) == (row["id"] not in solved)
        assert row["response"].endswith(f"</think> <answer> {row['answer']} </answer>")
    for row in method.rows(load_examples(world / "val.jsonl"), training=False)[
        0
    ]:  # validation assigns nothing
        assert "<latent>" in row["response"] and ("<parser>" in row["response"]) == write


def test_a_share_of_the_solved_keeps_its_latents(base, world, gap_args):
    """The same ones whatever the order; a larger share holds a smaller one."""
    kept = {}
    for share in (0.0, 0.5, 0.9, 1.0):
        method = gap_of(base, gap_args, easy_latents=share)
        examples = load_examples(world / "train.jsonl")
        rows, _ = method.rows(examples[::-1] if share == 0.9 else examples, training=True)
        kept[share] = {row["id"] for row in rows if n_pads(method, row)}
    ids = [row["id"] for row in load_examples(world / "train.jsonl")]
    assert kept[0.0] == set(ids) - set(ids[::3]) and kept[1.0] == set(ids)
    assert kept[0.0] < kept[0.5] < kept[0.9] <= kept[1.0]


@pytest.mark.parametrize("write", [True, False])
def test_all_have_latents_in_the_first_steps(base, world, gap_args, write):
    plain = gap_of(base, gap_args, difficulty="", write_parser=write)
    method = gap_of(base, gap_args, latents_first=3, write_parser=write)
    text = gap_of(base, gap_args, write_parser=write)
    all_rows = [
        m.rows(load_examples(world / "train.jsonl"), True)[0] for m in (plain, method, text)
    ]
    for with_latents, row, stripped in zip(*all_rows):
        for step in (0, 2):
            first = method.encode(row | {"step": step})["ids"]
            assert first.equal(plain.encode(with_latents)["ids"]) and n_pads(plain, with_latents)
        for later in ({"step": 3}, {}):
            assert method.encode(row | later)["ids"].equal(text.encode(stripped)["ids"])


def test_the_settings_say_the_latents_of_the_targets(base, gap_args):
    """Whatever train.py's K is: it is what the log holds."""
    method = gap_of(base, gap_args, K=99)
    assert method.settings["K"] == method.targets.K == method.head.K != 99


def test_what_has_no_targets_has_no_latents_in_the_first_steps(base, world, gap_args):
    method = gap_of(base, gap_args, latents_first=3)
    solved = [row["id"] for row in load_examples(world / "train.jsonl")][::3]
    method.targets.rejected.add(solved[0])
    rows, _ = method.rows(load_examples(world / "train.jsonl"), training=True)
    first = {row["id"]: n_pads(method, row | {"step": 0}) for row in rows}
    assert first[solved[0]] == 0 and all(first[id] for id in first if id != solved[0])


def test_markers_leave_no_place_for_a_latent(base, world, gap_args):
    """Their rows are those of the dummy without its pads; the losses are the text's alone."""
    markers, dummy = (gap_of(base, gap_args, method=m, difficulty="") for m in ("markers", "dummy"))
    rows, _ = markers.rows(load_examples(world / "train.jsonl")[2:5], training=True)
    for row in rows:
        with_pads = dummy.encode(row)["ids"]
        assert markers.encode(row)["ids"].equal(with_pads[with_pads != dummy.latent_id])
    examples = [markers.encode(row) for row in rows]
    batch = markers.collate(examples) | {"vision": None}
    sums = markers.forward(batch)
    assert sums["latent"] == 0 and all(markers.counts(e)["latent"] == 0 for e in examples)
    torch.testing.assert_close(sums["ce"], markers.cross_entropy(markers.states(batch), batch))


def test_a_dummy_learns_from_the_text_alone(base, world, gap_args):
    """Its gradient is the text loss's, summed over the places where it is fed."""
    method = gap_of(base, gap_args, method="dummy", difficulty="")
    rows, _ = method.rows(load_examples(world / "train.jsonl")[2:5], training=True)
    batch = method.collate([method.encode(row) for row in rows])
    pictures = [open_image(path) for row in rows for path in row["images"]]
    vision, _ = encode_images(method.vlm, method.processor, pictures)
    batch["vision"] = torch.cat(vision).detach()
    sums = method.forward(batch)
    weights = method.weights(0, 10)
    sum(weights[name] * sums[name] for name in weights).backward()

    fed = method.head.mean.repeat(len(batch["latents"]), 1).requires_grad_()
    h = method.states(batch, fed)
    logits = method.vlm.lm_head(h).float().flatten(0, 1)
    wanted = batch["labels"][:, 1:].flatten()
    F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum").backward()
    assert len(fed) == 4 * 4 and fed.grad.norm() > 1  # one of three rows has two spans
    torch.testing.assert_close(method.head.vector.grad, fed.grad.sum(0), rtol=1e-3, atol=1e-4)


def test_rules():
    # four options: one of eight is what guessing gives, five of eight is not (binomial tail .027)
    assert is_solved(1, 8, 4, 0.0, "paper") and not is_solved(1, 8, 4, 0.0, "guess")
    assert is_solved(5, 8, 4, 0.0, "guess") and not is_solved(4, 8, 4, 0.0, "guess")
    assert is_solved(1, 8, 0, 0.0, "guess") and not is_solved(0, 8, 0, 0.0, "guess")
    assert not is_solved(4, 8, 0, 0.5, "paper") and is_solved(5, 8, 0, 0.5, "paper")


def test_guess_rule_against_scipy():
    for n in (2, 3, 4, 9):
        for c in range(9):
            improbable = binom.sf(c - 1, 8, 1 / n) < 0.05
            assert is_solved(c, 8, n, 0.0, "guess") == improbable


# --- what a stage wrote belongs to what the next one reads

LINE = {"id": "a", "key": "k", "base": "b", "row": "r", "n": 8, "correct": 2, "n_options": 0}
LINE |= {"lower_bound": False}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"correct": 9}, "9 of 8"),
        ({"correct": -1}, "-1 of 8"),
        ({"n": 0, "correct": 0}, "0 of 0"),
        ({"n": "8"}, "'n'"),
        ({"n": 8.0}, "'n'"),
        ({"correct": True}, "'correct'"),
        ({"lower_bound": 0}, "'lower_bound'"),
        ({"row": None}, "'row'"),
        ({"id": 3}, "'id'"),
        ({"id": "first"}, "'first' occurs before"),
    ],
)
def test_counts_of_another_kind_are_named(tmp_path, change, words):
    path = tmp_path / "difficulty.jsonl"
    write_lines(path, [LINE | {"id": "first"}, LINE])
    assert list(read_counts(path)) == ["first", "a"]
    write_lines(path, [LINE | {"id": "first"}, LINE | change])
    with pytest.raises(SystemExit) as e:
        read_counts(path)
    assert f"{path}:2" in str(e.value) and words in str(e.value)


def asked(world, n=3):
    """Rows, and counts of them as they are: the first solved, the last stopped early."""
    rows = list(load_examples(world / "train.jsonl")[:n])
    counts = {row["id"]: LINE | {"row": question_key(row), "correct": 0} for row in rows}
    counts[rows[0]["id"]]["correct"] = 8
    return rows, counts


def solved(rows, counts, tau=0.0, base="b", rule="paper"):
    settings = {"difficulty": "d.jsonl", "tau": tau, "rule": rule, "data": "x.jsonl"}
    settings["easy_latents"] = 0.0
    return solved_by(counts, rows, base, settings)


@pytest.mark.parametrize("field", ["question", "answer", "options", "system", "images"])
def test_a_count_belongs_to_its_question(world, field):
    rows, counts = asked(world)
    assert solved(rows, counts) == {rows[0]["id"]}
    change = {"options": ["x", "y"], "images": rows[2]["images"]}.get(field, "another")
    rows[1][field] = change
    with pytest.raises(SystemExit, match="another question, answer or picture") as e:
        solved(rows, counts)
    assert rows[1].where in str(e.value) and rows[1]["id"] in str(e.value)


def test_a_count_belongs_to_its_base_and_threshold(world):
    rows, counts = asked(world)
    with pytest.raises(SystemExit, match="another base"):
        solved(rows, counts, base="other")
    counts[rows[2]["id"]] |= {"correct": 1, "lower_bound": True}
    assert solved(rows, counts) == {rows[0]["id"], rows[2]["id"]}
    with pytest.raises(SystemExit, match="stopped early"):
        solved(rows, counts, tau=0.5)
    del counts[rows[1]["id"]]
    with pytest.raises(SystemExit, match="lacks 1 examples"):
        solved(rows, counts)


def test_a_count_is_held_against_the_options_that_a_question_lists(world):
    """Whatever a file says that an older version sampled."""
    rows, counts = asked(world)
    row = rows[1]
    row |= {"question": "Which? A. red B. blue C. green D. none", "answer": "B"}
    counts[row["id"]] |= {"row": question_key(row), "correct": 1, "n_options": 0}
    assert row["id"] in solved(rows, counts)
    assert row["id"] not in solved(rows, counts, rule="guess")


def test_counts_follow_copies_of_the_pictures(tmp_path, world):
    rows, counts = asked(world)
    shutil.copytree(world, tmp_path / "copy")
    (tmp_path / "copy" / "train.jsonl").touch()
    copies = load_examples(tmp_path / "copy" / "train.jsonl")[:3]
    assert solved(copies, counts) == {rows[0]["id"]}


@pytest.fixture
def fitted(gap_args, tmp_path):
    """A copy of the folder that fit_pca.py left."""
    given = dict(arg.removeprefix("--").split("=", 1) for arg in gap_args)
    shutil.copytree(given["pca"], tmp_path / "pca")
    return tmp_path / "pca"


def test_targets_belong_to_each_picture(fitted, world, tmp_path):
    targets = Targets(fitted)
    targets.check_files()
    rows = load_examples(world / "train.jsonl")
    assert all(targets.are_usable(row) for row in rows)
    two = rows[3]  # of two auxiliary images
    assert targets.read(two["id"], 2).shape == (8, 128)
    copy = shutil.copy(two["aux_images"][0], tmp_path / "copy.png")
    assert targets.are_usable(two | {"aux_images": [str(copy), two["aux_images"][1]]})

    a, b = two["aux_images"]
    for pictures in ([b, a], [a], [a, b, b], [a, rows[0]["aux_images"][0]]):
        row = Row(two | {"aux_images": pictures})
        row.where = "mine.jsonl:4"
        with pytest.raises(SystemExit, match="mine.jsonl:4: .* run fit_pca.py again"):
            targets.are_usable(row)
    row = Row(two | {"id": "new"})
    row.where = "mine.jsonl:9"
    with pytest.raises(SystemExit, match="mine.jsonl:9: .*'new'"):
        targets.are_usable(row)
    with pytest.raises(SystemExit, match="train-3"):
        targets.read(two["id"], 1)


def rewritten(path, change):
    """Write a safetensors file again, changed."""
    with safe_open(path, "pt") as f:
        tensors, meta = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    change(tensors)
    save_file(tensors, path, meta)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: rewritten(path, lambda t: t["train-3"].fill_(0)),
        lambda path: rewritten(path, lambda t: t.pop("train-3")),
        lambda path: rewritten(path, lambda t: t.update(more=torch.ones(1, 4, 128))),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_target_files_are_those_of_the_index(fitted, spoil):
    path = fitted / "targets" / "train-00000.safetensors"
    rewritten(path, lambda tensors: None)  # in another order of bytes, it may be
    Targets(fitted).check_files()
    spoil(path)
    with pytest.raises(SystemExit, match="train-00000.safetensors"):
        Targets(fitted).check_files()


def test_targets_that_are_not_finite_are_named(fitted):
    path = fitted / "targets" / "train-00000.safetensors"
    rewritten(path, lambda t: t["train-3"].view(-1)[7:8].fill_(torch.nan))
    targets = Targets(fitted)
    targets.handles[path] = safe_open(path, "pt")
    assert targets.read("train-2", 1).isfinite().all()
    with pytest.raises(SystemExit, match="train-00000.safetensors: .*'train-3'.* not finite"):
        targets.read("train-3", 2)


@pytest.mark.parametrize(
    "field, value",
    [("K", "4"), ("K", None), ("d", 1.5), ("tower", 5), ("files", []), ("pictures", None)]
    + [("shards", "x"), ("rejected", {}), ("mode", 1)],
)
def test_an_index_of_another_kind_is_named(fitted, field, value):
    path = fitted / "targets" / "index.json"
    write_json(path, json.loads(path.read_text()) | {field: value})
    with pytest.raises(SystemExit, match=f"index.json: field '{field}'"):
        Targets(fitted)


def test_a_pca_belongs_to_its_tower_and_targets(fitted, base):
    vlm, targets = load_vlm(base)[0], Targets(fitted)
    file = fitted / "pca.safetensors"
    pca, meta = load_pca(file)
    check_same_space(vlm, base, targets, file, pca, meta)
    for field, value, words in (
        ("tower", "0" * 16, "vision tower"),
        ("K", "9", "has K = 4"),
        ("mode", "resize", "has mode = pool"),
        ("targets", "0" * 16, "other targets"),
    ):
        with pytest.raises(SystemExit, match=words):
            check_same_space(vlm, base, targets, file, pca, meta | {field: value})
    targets.index["degenerate"] = 0.5  # another fit's index beside it
    with pytest.raises(SystemExit, match="other targets"):
        check_same_space(vlm, base, targets, file, pca, meta)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("basis"), "lacks"),
        (lambda t: t.update(basis=t["basis"].T.contiguous()), "shapes"),
        (lambda t: t.update(mean=t["mean"][:64].clone()), "shapes"),
        (lambda t: t.update(eigenvalues=t["eigenvalues"][:1].clone()), "shapes"),
        (lambda t: t["mean"].fill_(torch.nan), "not finite"),
        (lambda t: t["eigenvalues"].fill_(torch.inf), "not finite"),
        (lambda t: t["eigenvalues"].fill_(0), "sum to 0"),
    ],
)
def test_a_pca_that_is_none_is_named(fitted, change, words):
    rewritten(fitted / "pca.safetensors", change)
    with pytest.raises(SystemExit, match="pca.safetensors") as e:
        load_pca(fitted / "pca.safetensors")
    assert words in str(e.value)


@pytest.mark.parametrize("kind", ["mean", "sum", "relative"])
def test_the_latent_loss_is_weighed_by_lambda_and_its_scale(base, gap_args, kind):
    """Against the eigenvalues in the PCA's file."""
    gap = gap_of(base, gap_args, latent_loss=kind, lambda_latent=0.25)
    variance = float(load_file(gap.pca_file)["eigenvalues"].sum())
    d = gap.vlm.config.text_config.hidden_size
    scale = {"mean": 1 / d, "sum": 1.0, "relative": 1 / variance}[kind]
    assert gap.weights(3, 10)["latent"] == pytest.approx(0.25 * scale, rel=1e-5)


def test_scheduled_sampling_is_a_second_pass_on_its_own_latents(base, world, gap_args):
    """Against two plain forwards, with embeddings put together by hand."""
    gap = gap_of(base, gap_args, difficulty="", scheduled_sampling=True)
    torch.nn.init.normal_(gap.head.down.weight, std=0.3)
    rows, _ = gap.rows(load_examples(world / "train.jsonl")[2:5], training=True)
    batch = gap.collate([gap.encode(row) for row in rows])
    pictures = [open_image(path) for row in rows for path in row["images"]]
    batch["vision"] = torch.cat(encode_images(gap.vlm, gap.processor, pictures)[0]).detach()
    decoder, is_latent = gap.vlm.model.language_model, batch["ids"] == gap.latent_id
    before = is_latent.roll(-1, 1)

    def states(latents):
        x = decoder.embed_tokens(batch["ids"]).clone()
        x[batch["ids"] == gap.vlm.config.image_token_id] = batch["vision"]
        x[is_latent] = latents.float()
        return decoder(
            inputs_embeds=x, position_ids=batch["pos"], use_cache=False
        ).last_hidden_state

    sums = {name: x.detach() for name, x in gap.forward(batch).items()}
    with torch.no_grad():
        h = states(gap.head(states(batch["latents"])[before]))
        logits = gap.vlm.lm_head(h[:, :-1]).flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        squared = (gap.head(h[before]) - batch["latents"].float()).pow(2).sum()
    torch.testing.assert_close(sums["ce"], ce, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums["latent"], squared, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "row, n",
    [
        ({"question": "Which?", "answer": "red", "options": ["red", "blue", "green"]}, 3),
        ({"question": "Which? A. red B. blue C. green D. none", "answer": "B"}, 4),
        ({"question": "Which?\n(A) red\n(B) blue", "answer": "blue"}, 2),
        ({"question": "How far is (A) from (B)?", "answer": "12"}, 0),
        ({"question": "Which?", "answer": "B"}, 0),
    ],
)
def test_a_guess_is_among_the_options_that_a_question_lists(row, n):
    assert n_options(row) == n


def test_a_resume_needs_the_same_solved_questions(base, world, gap_args):
    keys = set()
    for tau in (0.0, 0.5):
        gap = gap_of(base, gap_args, tau=tau)
        gap.rows(load_examples(world / "train.jsonl"), training=True)
        keys.add(gap.inputs()["difficulty"])
    assert len(keys) == 2


def seen_batch(method, rows):
    batch = method.collate([method.encode(row) for row in rows])
    return train.to_device(batch, method.vlm, torch.device("cpu"))


def test_the_log_is_of_what_was_said(base, world, gap_args):
    """R2, the latent loss and both norms, by hand."""
    method = gap_of(base, gap_args, difficulty="", latent_loss="relative")
    torch.nn.init.normal_(method.head.down.weight, std=0.3)
    rows, _ = method.rows(load_examples(world / "train.jsonl")[2:5], training=True)
    batch = seen_batch(method, rows)
    with torch.no_grad():
        sums = method(batch)
        v = batch["latents"].float()
        before = (batch["ids"] == method.latent_id)[:, 1:]
        said = method.head(method.states(batch, v)[before])
    n = {k: sum(method.counts(method.encode(row))[k] for row in rows) for k in sums}
    assert n["latent"] == n["norm_target"] == len(v) == 16
    found = method.report({k: float(x) / n[k] for k, x in sums.items()})
    r2 = 1 - float((said - v).pow(2).sum(-1).mean()) / method.head.total_variance
    assert found["r2"] == pytest.approx(r2, abs=1e-4)
    assert found["latent"] == pytest.approx(1 - r2, abs=1e-4)
    assert found["norm_target"] == pytest.approx(float(v.norm(dim=-1).mean()), rel=1e-4)
    assert found["norm_predicted"] == pytest.approx(float(said.norm(dim=-1).mean()), rel=1e-3)


def test_no_gradient_goes_through_what_a_second_pass_is_fed(base, world, gap_args):
    method = gap_of(base, gap_args, difficulty="", scheduled_sampling=True)
    rows, _ = method.rows(load_examples(world / "train.jsonl")[2:4], training=True)
    batch = seen_batch(method, rows)
    fed, states = [], method.states
    method.states = lambda batch, v: fed.append(v) or states(batch, v)
    method(batch)
    assert len(fed) == 2 and not fed[1].requires_grad and not torch.equal(fed[0], fed[1])
    # in validation the targets are fed, as without it
    with torch.no_grad():
        method(batch)
    assert len(fed) == 3 and torch.equal(fed[2], batch["latents"])
