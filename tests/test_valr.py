"""VaLR: its loss against naive loops, its rollout against step-by-step generation."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    PIXELS,
    check_other_ways,
    examples,
    logged,
    make_open,
    method_args,
    noise,
    record,
    run,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_encoders import saved_encoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import toy
import train
import valr
from data import load_examples, strip_latents
from files import write_lines
from generate import INTERVENTIONS, check_intervention, generate, make_prompts
from images import open_image
from launch import settings_of
from method import Method
from model import IGNORE, encode_images, load_head, load_processor, load_vlm
from valr import VaLR, upsample

close = torch.testing.assert_close


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A folder with the toy's chain-of-thought form."""
    folder = tmp_path_factory.mktemp("steps")
    before = toy.form
    toy.form = "steps"
    try:
        for split, n in (("train", 24), ("val", 6), ("test", 8)):
            toy.write_split(folder, split, n)
    finally:
        toy.form = before
    return folder


def method(base, **change):
    """VaLR on a base, and a micro-batch maker."""
    settings = settings_of(vars(train)) | {"K": 4, "base": str(base)} | change
    vlm, tokenizer = load_vlm(base)
    torch.manual_seed(0)
    return VaLR(vlm, tokenizer, load_processor(base, *PIXELS), settings)


def batch_of(model, rows):
    """A micro-batch of rows as train.py makes it, on the CPU."""
    rows, _ = model.rows(rows, training=True)
    batch = model.collate([model.encode(row) for row in rows])
    return train.to_device(batch, model.vlm, torch.device("cpu"))


def step_by_step(model, batch, i):
    """What generation feeds at the latents of row i (M, d), a whole forward for each position."""
    embed = model.vlm.model.language_model.embed_tokens
    ids = batch["ids"][i]
    x = embed(ids)[None].clone()
    images = (batch["ids"] == model.vlm.config.image_token_id).sum(1).tolist()
    first = sum(images[:i])
    x[0, ids == model.vlm.config.image_token_id] = batch["vision"][first : first + images[i]]
    fed = []
    for t in (ids == model.latent_id).nonzero()[:, 0].tolist():
        out = model.vlm.model.language_model(
            inputs_embeds=x[:, :t], position_ids=batch["pos"][:, i : i + 1, :t], use_cache=False
        )
        x[0, t] = out.last_hidden_state[0, -1]
        fed.append(x[0, t].clone())
    return torch.stack(fed)


@torch.no_grad()
def test_an_exact_rollout_is_step_by_step_generation(base, steps, alone):
    """Latent after latent, or with as many passes as latents, what is fed is what generation feeds;
    with fewer passes the first latents are exact and the error is reported."""
    model = method(base)
    # 2, 3 and 4 moves: 8 to 16 latents; and a row of text, which is the longest
    rows = list(load_examples(steps / "train.jsonl")[1:5])
    rows[3] |= {"aux_images": [], "response": "look at it again. " * 25 + "<answer> a </answer>"}
    batch = batch_of(model, rows)
    assert batch["ids"].shape[1] == len(model.encode(rows[3])["ids"])
    before = batch["ids"][:, 1:] == model.latent_id
    slow = torch.cat([step_by_step(model, batch, i) for i in range(3)])
    assert len(slow) == 36 and model.most_latents(batch["ids"] == model.latent_id) == 16
    close(model.roll_out(batch, before), slow, rtol=1e-3, atol=1e-3)

    errors = []
    for passes in (1, 4, 8, 16):
        model.settings["rollout"] = passes
        fed = model.roll_out(batch, before).split([8, 12, 16])
        for one, all_of_it in zip(fed, slow.split([8, 12, 16])):
            close(one[:passes], all_of_it[:passes], rtol=1e-3, atol=1e-3)
        sums = model(batch)
        error = model.report({k: float(v) for k, v in sums.items()})["rollout_error"]
        exact = model.states(batch, torch.cat(fed))[before]
        off = float((torch.cat(fed) - exact).norm() / exact.norm())
        assert error == pytest.approx(off, abs=1e-4)
        errors.append(error)
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 1e-4


@torch.no_grad()
def test_a_rollout_reads_no_more_than_it_needs(base, steps, alone):
    """Each position before a row's last latent once; of rows without latents one place, as ranks
    read together."""
    model, lengths = method(base), []
    decoder = model.vlm.model.language_model
    decoder.register_forward_pre_hook(
        lambda module, args, inputs: lengths.append(inputs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    rows = list(load_examples(steps / "train.jsonl")[1:3])
    batch = batch_of(model, rows[:1])
    before = batch["ids"][:, 1:] == model.latent_id
    fed = model.roll_out(batch, before)
    assert len(fed) == len(lengths) == 8 and sum(lengths) == int(before[0].nonzero().max()) + 1
    lengths.clear()
    for row in rows:
        row |= {"aux_images": [], "response": strip_latents(row["response"])}
    batch = batch_of(model, rows)
    fed = model.roll_out(batch, batch["ids"][:, 1:] == model.latent_id)
    assert fed.shape[0] == 0 and lengths == [1]


@torch.no_grad()
def test_an_exact_rollout_in_bfloat16(base, steps, alone):
    """Read in parts or at once, rounding is all that differs."""
    model = method(base)
    model.vlm.bfloat16()
    batch = batch_of(model, load_examples(steps / "train.jsonl")[1:4])
    before = batch["ids"][:, 1:] == model.latent_id
    fed = model.roll_out(batch, before)
    exact = model.states(batch, fed)[before]
    assert fed.dtype == torch.bfloat16
    assert (fed - exact).float().norm() < 0.03 * exact.float().norm()


@torch.no_grad()
def test_what_is_trained_is_what_generate_writes(base, steps, alone):
    """A row that begins with its span: the latents that `generate` feeds are the rollout's."""
    model = method(base)
    rows = list(load_examples(steps / "train.jsonl")[:2])
    for row in rows:  # the model is made to open the span at once
        row["response"] = "<latent></latent> x"
        row["aux_images"] = row["aux_images"][:1]
    batch = batch_of(model, rows)
    prompts = make_prompts(model.vlm, model.tokenizer, model.processor, rows)
    make_open(model.vlm, model.tokenizer, prompts, {0, 1})
    before = batch["ids"][:, 1:] == model.latent_id
    fed = model.roll_out(batch, before).split([4, 4])
    calls = []
    answers = generate(
        model.vlm, model.head, model.tokenizer, prompts, max_new_tokens=7, on_step=record(calls)
    )
    for (answer,), wanted in zip(answers, fed):
        close(answer["latents"], wanted, rtol=1e-3, atol=1e-3)
    for _, token, x, h in calls:
        if token == model.latent_id:
            close(x, h)  # output as input


def test_losses_are_those_of_naive_loops(base, steps, alone):
    """The cosines patch by patch, in float64 where it matters, spans of several rows and grids."""
    model = method(base, encoders="own", align_layer=3, rollout=2)
    rows = list(load_examples(steps / "train.jsonl")[1:4])
    big = noise(5, size=(84, 112))
    big.save(steps / "big.png")
    rows[1]["aux_images"][0] = str(steps / "big.png")  # a grid of 4 x 3
    rows[2]["aux_images"][0] = str(steps / "big.png")  # the same picture twice
    batch = batch_of(model, rows)
    assert len(batch["encoder_pixels"][0]["image_grid_thw"]) == 8 and len(batch["picture_of"]) == 9
    sums = model(batch)

    before = batch["ids"][:, 1:] == model.latent_id
    fed = model.roll_out(batch, before)
    assert not fed.requires_grad
    x = model.vlm.model.language_model.embed_tokens(batch["ids"]).detach().clone()
    x[batch["ids"] == model.vlm.config.image_token_id] = batch["vision"]
    x[batch["ids"] == model.latent_id] = fed
    with torch.no_grad():
        out = model.vlm.model.language_model(
            inputs_embeds=x, position_ids=batch["pos"], use_cache=False, output_hidden_states=True
        )
        # hidden_states[0] is the input: [3] is what the third block gives
        early = out.hidden_states[3][batch["ids"] == model.latent_id].unflatten(0, (-1, 4))
        spans = [path for row in rows for path in row["aux_images"]]
        total = 0.0
        for f, path in zip(early, spans):
            (v,), ((_, h, w),) = encode_images(model.vlm, model.processor, [open_image(path)])
            h, w = int(h) // 2, int(w) // 2
            cosines = []
            for row in range(h):
                for column in range(w):
                    # bilinear by hand: the 2 x 2 states stand at the middles of a square's quarters
                    y = min(max((row + 0.5) * 2 / h - 0.5, 0), 1)
                    c = min(max((column + 0.5) * 2 / w - 0.5, 0), 1)
                    up = (1 - y) * ((1 - c) * f[0] + c * f[1]) + y * ((1 - c) * f[2] + c * f[3])
                    hidden = F.silu(model.psi[0][0](up))
                    hidden = F.silu(model.psi[0][2](hidden))
                    said, seen = model.psi[0][4](hidden), v[row * w + column]
                    cosines.append(float(said @ seen / said.norm() / seen.norm()))
            total -= sum(cosines) / len(cosines)
        h = out.last_hidden_state
        logits = model.vlm.lm_head(h[:, :-1]).flatten(0, 1)
        ce = F.cross_entropy(
            logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
    assert float(sums["align"].detach()) == pytest.approx(total, rel=1e-4)
    close(sums["ce"], ce, rtol=1e-4, atol=1e-3)
    # neither pads nor pictures are asked for in text
    labels = batch["labels"]
    assert not (labels == model.latent_id).any()


def test_several_encoders_have_a_psi_each(base, steps, alone, tmp_path):
    for name in ("dinov2", "clip"):
        saved_encoder(tmp_path / name, name)
    folders = [str(tmp_path / name) for name in ("dinov2", "clip")]
    rows = list(load_examples(steps / "train.jsonl")[1:3])
    losses = {}
    for encoders in ("own," + ",".join(folders), "own", *folders):
        model = method(base, encoders=encoders, rollout=1)
        batch = batch_of(model, [dict_copy(row) for row in rows])
        if "," in encoders:
            psi, whole = model.psi, model
            assert len(psi) == 3
            assert not any("module" in name for name, _ in model.named_parameters())
        else:
            model.psi[0] = psi[["own", *folders].index(encoders)]
        with torch.no_grad():
            losses[encoders] = float(model(batch)["align"])
    together = losses.pop("own," + ",".join(folders))
    assert together == pytest.approx(sum(losses.values()) / 3, rel=1e-4)
    # which encoders there are, and in which order, is a run's identity, too
    names = ("own", folders[0], f"own,{folders[0]}", f"{folders[0]},own")
    keys = {method(base, encoders=encoders).inputs()["encoders"] for encoders in names}
    assert len(keys) == 4
    # identity by content: another encoder's weights are another run
    before = whole.inputs()["encoders"]
    saved = load_file(tmp_path / "clip" / "model.safetensors")
    name = next(iter(saved))
    save_file(
        saved | {name: saved[name] + 1}, tmp_path / "clip" / "model.safetensors", {"format": "pt"}
    )
    assert whole.inputs()["encoders"] != before


def dict_copy(row):
    copy = type(row)(row)
    copy.where = row.where
    copy["aux_images"] = list(row["aux_images"])
    return copy


@pytest.mark.parametrize("rollout", [0, 2])
@pytest.mark.parametrize("through", [False, True])
def test_gradients_stop_at_what_is_fed(base, steps, alone, through, rollout):
    """Of the alignment alone: blocks after the aligned one move only through what is fed."""
    model = method(base, align_layer=2, rollout=rollout, fed_gradient=through)
    batch = batch_of(model, load_examples(steps / "train.jsonl")[1:3])
    model.vlm.model.visual.requires_grad_(False)
    model(batch)["align"].backward()
    layers = model.vlm.model.language_model.layers
    moved = [layer.mlp.up_proj.weight.grad for layer in layers]
    assert all(g is not None and g.norm() > 0 for g in moved[:2])
    norm = model.vlm.model.language_model.norm.weight.grad
    for g in (*moved[2:], norm):
        assert (g is not None and float(g.norm()) > 0) == through
    assert all(p.grad.norm() > 0 for p in model.psi.parameters())
    assert all(p.grad is None for p in model.vlm.model.visual.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_go_through_a_whole_exact_rollout(base, steps, alone, checkpointing):
    """Read in parts, once, they are those of as many whole passes as a row has latents, each with
    its gradients; rows of 2 and 3 moves, and one of text, which is the longest."""
    model = method(base, whole_gradient=True)
    model.vlm.model.visual.requires_grad_(False)
    model.double()  # through a chain of random layers rounding grows
    rows = list(load_examples(steps / "train.jsonl")[1:4])
    rows[2] |= {"aux_images": [], "response": "look at it again. " * 20 + "<answer> a </answer>"}
    batch = batch_of(model, rows)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss_and_gradients(sums):
        loss = sums["ce"] + 2 * sums["align"]
        return loss.detach(), torch.autograd.grad(loss, parameters)

    before, fed = batch["ids"][:, 1:] == model.latent_id, None
    for _ in range(model.most_latents(before)):
        fed = model.states(batch, fed)[before]
    h, early = model.states_and_block(batch, fed)
    early = early[batch["ids"] == model.latent_id].unflatten(0, (-1, model.head.K))
    naive = {"ce": model.cross_entropy(h, batch), "align": model.alignment(early, batch).sum()}
    loss, gradients = loss_and_gradients(naive)

    layers = model.vlm.model.language_model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer) if checkpointing else layer
    sums = model(batch)
    assert float(sums["fed_error"]) == 0
    ours, again = loss_and_gradients(sums)
    close(ours, loss, rtol=1e-5, atol=0)
    for g, wanted in zip(again, gradients):
        assert (g - wanted).norm() < 1e-5 * wanted.norm()


def test_an_image_in_the_question_can_be_the_target(base, world, alone):
    """query_span: a row of one image and no span of its own; the others keep what they have."""
    rows = examples(world, 4)
    rows[0] |= {"aux_images": [], "response": strip_latents(rows[0]["response"])}
    rows[1] |= {"aux_images": [], "response": "<think> </think> <answer> a </answer>"}
    two = rows[3]
    assert len(two["images"]) == 2
    two |= {"aux_images": [], "response": strip_latents(two["response"])}
    plain, _ = method(base).rows([dict_copy(row) for row in rows], True)
    assert [row["response"].count("<latent>") for row in plain] == [0, 0, 1, 0]
    spanned, _ = method(base, query_span=True).rows(rows, True)
    assert [row["response"].count("<latent>") for row in spanned] == [1, 1, 1, 0]
    assert spanned[0]["response"].startswith("<think> <latent></latent> Follow")
    assert spanned[0]["aux_images"] == spanned[0]["images"]
    assert strip_latents(spanned[0]["response"]) == plain[0]["response"]


def test_a_target_picture_that_is_replaced_makes_another_row(base, steps, alone, tmp_path):
    """VaLR reads it at every step; what reads none has a row as it was."""
    row = load_examples(steps / "train.jsonl")[0]
    own, plain = method(base), Method(None, None, None, {})
    row["aux_images"] = [shutil.copy(path, tmp_path) for path in row["aux_images"]]
    before = train.row_key(own, row), train.row_key(plain, row)
    Image.new("RGB", (56, 56), "red").save(row["aux_images"][-1])
    assert train.row_key(own, row) != before[0] and train.row_key(plain, row) == before[1]


def test_upsampling_keeps_places():
    f = torch.arange(4.0)[:, None]
    close(upsample(f, (2, 2)), f)
    close(upsample(f[:1], (3, 5)), torch.zeros(15, 1))
    big = upsample(f, (4, 4)).view(4, 4)
    assert big[0, 0] == 0 and big[-1, -1] == 3 and bool((big.diff(dim=1) >= 0).all())


def args_of(base, steps, out, *more):
    return method_args("valr", base, steps, out, *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, steps):
    folder = tmp_path_factory.mktemp("valr")
    run("train.py", *args_of(base, steps, folder))
    return folder


def test_ranks_and_micro_batches_agree_and_a_run_resumes(tmp_path, base, steps, trained):
    """2 ranks, one row a micro-batch, activation checkpointing, and a run that stopped half-way."""
    one = logged(trained)[1:]
    assert one[-1]["rollout_error"] < 1e-4 and -1 <= one[-1]["cosine"] <= 1
    fields = ("loss", "ce", "cosine", "grad_norm", "val_cosine")
    again = check_other_ways(trained, tmp_path, partial(args_of, base, steps), fields)
    # another picture under an old name is another run
    shutil.copytree(steps, tmp_path / "moved")
    noise(3).save(tmp_path / "moved" / "train" / "1-aux-0.png")
    text = run("train.py", *args_of(base, tmp_path / "moved", again), ok=False)
    assert "aux_images" in text


@pytest.mark.parametrize(
    "gradient", ["--whole_gradient=1", "--fed_gradient=1", "--fed_gradient=1 --rollout=2"]
)
def test_a_rank_may_have_no_latents(tmp_path, base, steps, gradient):
    """Rows mostly of text, gradients through what is fed: all ranks still read every part, and
    meet in every pass."""
    rows = list(load_examples(steps / "train.jsonl"))
    for i, row in enumerate(rows):
        if i % 4:
            row["response"], row["aux_images"] = strip_latents(row["response"]), []
    write_lines(tmp_path / "train.jsonl", rows)
    more = [f"--data={tmp_path}/train.jsonl", *gradient.split(), "--max_steps=2"]
    run("train.py", *args_of(base, steps, tmp_path / "one", *more))
    more += ["--token_budget=1", "--activation_checkpointing=1"]
    run("train.py", *args_of(base, steps, tmp_path / "two", *more), ranks=2)
    one, two = (logged(tmp_path / name)[1:] for name in ("one", "two"))
    assert any("cosine" in row for row in one)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for field in ("loss", "ce", "grad_norm"):
            assert b[field] == pytest.approx(a[field], rel=2e-3), field


def test_what_a_run_leaves(base, trained):
    """No psi and no encoder beside the model; a head without weights that says what it is."""
    with safe_open(trained / "latent_head.safetensors", "pt") as f:
        assert not list(f.keys())
        assert f.metadata()["kind"] == "valr" and f.metadata()["K"] == "4"
    assert not any("psi" in name for name in load_file(trained / "model.safetensors"))
    vlm, tokenizer = load_vlm(trained)
    assert load_head(trained, vlm, tokenizer, 1).K == 4


def test_the_other_stages_take_it(tmp_path, steps, trained):
    """eval.py with the interventions that make sense, a sentence for the others; probe.py."""
    data = ["--model=" + str(trained), f"--data={steps}/test.jsonl"]
    out = f"--out={tmp_path}"
    for kind in ("clean", "noise"):
        run("eval.py", *data, f"{out}/{kind}", f"--intervention={kind}", "--max_new_tokens=24")
    text = run("eval.py", *data, f"{out}/oracle", "--intervention=oracle", ok=False)
    assert "needs the PCA" in text
    head = load_head(trained, *load_vlm(trained), 1)
    for kind in INTERVENTIONS:
        if kind in ("mean", "oracle", "oracle_pca"):
            with pytest.raises(SystemExit, match="needs the PCA"):
                check_intervention(kind, head)
        else:
            check_intervention(kind, head)
    run("probe.py", *data, f"{out}/probe", "--max_new_tokens=24")
    text = run("infer.py", data[0], f"--images={steps}/test/3.png", "--question=Where?")
    assert "Where?" in text


REFUSED = {  # the setting, and what the sentence names
    "K no square": ({"K": 5}, "K=5"),
    "a block that is not there": ({"align_layer": 5}, "align_layer=5"),
    "no encoder": ({"encoders": " , "}, "encoders"),
    "an encoder that is not there": ({"encoders": "own,nowhere"}, "nowhere"),
    "a whole gradient of passes": ({"whole_gradient": True, "rollout": 2}, "rollout=2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_make_no_sense(base, name):
    change, named = REFUSED[name]
    with pytest.raises(SystemExit, match=named):
        VaLR.check(settings_of(vars(train)) | change)
        method(base, **change)


def test_a_broken_target_is_found_before_the_first_step(tmp_path, base, steps):
    rows = list(load_examples(steps / "train.jsonl"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    rows[5]["aux_images"][0] = str(broken)
    write_lines(tmp_path / "train.jsonl", rows)
    args = args_of(base, steps, tmp_path / "out", f"--data={tmp_path}/train.jsonl")
    text = run("train.py", *args, ok=False)
    assert str(broken) in text
    run("train.py", *args, "--skip_unusable=1", "--max_steps=1")


def test_the_alignment_is_weighed_by_lambda():
    method = SimpleNamespace(settings={"lambda_align": 0.125})
    assert VaLR.weights(method, 3, 10) == {"ce": 1.0, "align": 0.125}


def test_the_log_has_a_cosine_and_a_relative_error():
    method = SimpleNamespace(head=SimpleNamespace(K=4))
    said = valr.VaLR.report(
        method, {"ce": 1.0, "align": -0.75, "fed_error": 1.0, "fed_energy": 4.0}
    )
    assert said == {"ce": 1.0, "cosine": 0.75, "rollout_error": 0.5}


def test_alignment_counts_spans_and_errors_count_latents():
    method = valr.VaLR.__new__(valr.VaLR)
    nn.Module.__init__(method)
    method.head = SimpleNamespace(K=4)
    n = method.counts({"labels": torch.tensor([1]), "targets": ["a", "b"]})
    assert n == {"ce": 1, "align": 2, "fed_error": 8, "fed_energy": 8}
