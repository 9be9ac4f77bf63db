"""The latent heads, the inputs and the tower, each against an independent computation."""

import json
import shutil

import pytest
import torch
from conftest import PIXELS, examples, hf_inputs, random_pca
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

import model
from data import strip_latents
from generate import stop_ids
from images import open_image
from model import (
    HEADS,
    IGNORE,
    LATENT_END,
    LATENT_PAD,
    LATENT_START,
    FullHead,
    OutputHead,
    PCAHead,
    add_latent_tokens,
    embed,
    encode,
    encode_images,
    grid_features,
    image_grid,
    load_head,
    load_processor,
    load_vlm,
    save_head,
    say_other_limits,
    tower_fingerprint,
)

close = torch.testing.assert_close


def test_head_starts_at_the_projection():
    head, h = PCAHead(random_pca(), 4), torch.randn(9, 128)
    assert torch.equal(head.coefficients(h), h @ head.basis)
    close(head(h), (h @ head.basis) @ head.basis.T + head.mean)


@pytest.mark.parametrize("kind", HEADS)
def test_loss_is_the_equation(kind):
    torch.manual_seed(0)
    head, h, v = HEADS[kind](random_pca(), 4), torch.randn(7, 128), torch.randn(7, 128)
    naive = sum(sum((a.item() - b.item()) ** 2 for a, b in zip(x, y)) for x, y in zip(head(h), v))
    close(head.squared_error(h, v).sum().item(), naive, rtol=1e-4, atol=0.0)


def test_gradient_is_the_k_dimensional_one(head):
    """||P_k c + mu - v||^2 and ||c - P_k^T (v - mu)||^2 have one gradient."""
    h, v = torch.randn(7, 128, requires_grad=True), torch.randn(7, 128)
    leaves = [h, *head.parameters()]
    long = torch.autograd.grad((head.reconstruct(head.coefficients(h)) - v).pow(2).sum(), leaves)
    short = torch.autograd.grad(
        (head.coefficients(h) - (v - head.mean) @ head.basis).pow(2).sum(), leaves
    )
    ours = torch.autograd.grad(head.squared_error(h, v).sum(), leaves)
    for a, b, c in zip(long, short, ours):
        close(a, b, rtol=1e-4, atol=1e-4)
        close(c, b, rtol=1e-4, atol=1e-4)


def test_controls():
    """The matched head has GAP's number of weights, the frozen one none; the wide starts as GAP."""
    count = lambda head: sum(p.numel() for p in head.parameters())  # noqa: E731
    for d, k in ((128, 7), (128, 30), (256, 20)):
        pca = random_pca(d, k)
        matched = count(HEADS["matched"](pca, 4)) / count(PCAHead(pca, 4))
        one_more = (2 * d + 1) / count(PCAHead(pca, 4))  # a unit of the hidden layer
        assert abs(matched - 1) <= one_more / 2 + 1e-9
    assert count(HEADS["frozen"](random_pca(), 4)) == 0
    h = torch.randn(5, 128)
    for kind in ("frozen", "wide"):
        close(HEADS[kind](random_pca(), 4)(h), PCAHead(random_pca(), 4)(h))


@pytest.mark.parametrize("kind", ["lh", "matched"])
def test_a_control_starts_about_mu(kind):
    """And is the head that it controls otherwise."""
    pca, h = random_pca(), torch.randn(5, 128)
    torch.manual_seed(0)
    plain = HEADS[kind](pca, 4)
    torch.manual_seed(0)
    from_mu = HEADS[f"{kind}_mu"](pca, 4)
    close(from_mu(h), plain(h) + pca["mean"])
    for (name, one), (_, other) in zip(plain.named_parameters(), from_mu.named_parameters()):
        assert name == "out.bias" or torch.equal(one, other)


def test_full_head_has_two_d_squared_weights():
    assert (
        sum(p.numel() for p in FullHead(random_pca(), 4).parameters() if p.ndim == 2) == 2 * 128**2
    )
    assert not list(OutputHead(random_pca(), 4).parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_head_survives_the_disk(tmp_path, loaded, kind):
    torch.manual_seed(0)
    head, h = HEADS[kind](random_pca(), 9), torch.randn(3, 128)
    meta = {"mode": "pool", "tower": tower_fingerprint(loaded[0])}
    save_head(tmp_path, head, head.state_dict(), meta)
    again = load_head(tmp_path, *loaded[:2], 4)
    assert again.K == head.K == (9 if kind != "markers" else 0) and again.kind == kind
    close(again(h), head(h))


class GainHead(FullHead):
    """A head with a setting that is no tensor's shape."""

    kind, fields = "gain", (*FullHead.fields, "gain")

    def __init__(self, pca, K, gain=1.0):
        super().__init__(pca, K)
        self.gain = gain

    @classmethod
    def of_file(cls, tensors, meta, d, K):
        pca = tensors | {"total_variance": float(meta["total_variance"])}
        return cls(pca, K, float(meta["gain"]))


def test_a_heads_own_setting_survives_the_disk(tmp_path, loaded, monkeypatch):
    monkeypatch.setitem(HEADS, "gain", GainHead)
    head = GainHead(random_pca(), 4, gain=3.0)
    meta = {"mode": "pool", "tower": tower_fingerprint(loaded[0])}
    save_head(tmp_path, head, head.state_dict(), meta)
    assert load_head(tmp_path, *loaded[:2]).gain == 3.0


def test_a_head_that_could_not_be_loaded_is_not_trained():
    for kind, K in (("lh", 4), ("markers", 0), ("gap", 9)):
        model.check_head(HEADS[kind](random_pca(), K))
    with pytest.raises(ValueError, match="GainHead of kind 'gain' is in neither"):
        model.check_head(GainHead(random_pca(), 4))
    with pytest.raises(ValueError, match="Renamed of kind 'gap' is in neither"):
        # its file would be read as a plain one
        model.check_head(type("Renamed", (HEADS["gap"],), {})(random_pca(), 4))
    with pytest.raises(SystemExit, match="K is '5', expected a square"):
        model.check_head(HEADS["lh"](random_pca(), 5))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_logits_equal_hf(loaded, world, images):
    vlm, tokenizer, processor = loaded
    rows = examples(world)
    row = rows[0] | {
        "images": [
            p
            for r in rows[:images]
            for p in (r["images"] + r["aux_images"])[:: 1 if r is rows[1] else 2]
        ][:images]
    }
    e = encode(vlm, tokenizer, processor, row, response=strip_latents(row["response"]))
    vision = (
        torch.cat(encode_images(vlm, processor, [open_image(p) for p in row["images"]])[0])
        if images
        else None
    )
    h = vlm.model.language_model(
        inputs_embeds=embed(vlm, e["ids"][None], vision),
        position_ids=e["pos"][:, None],
        use_cache=False,
    ).last_hidden_state
    close(
        vlm.lm_head(h),
        vlm(**hf_inputs(vlm, processor, e["ids"], row["images"])).logits,
        rtol=1e-4,
        atol=1e-4,
    )


def test_spans_and_labels(loaded, world):
    vlm, tokenizer, processor = loaded
    row = examples(world)[3]
    e = encode(vlm, tokenizer, processor, row, 4, row["response"])
    start, pad, end = map(tokenizer.convert_tokens_to_ids, (LATENT_START, LATENT_PAD, LATENT_END))
    ids, labels = e["ids"].tolist(), e["labels"].tolist()
    at = [i for i, t in enumerate(ids) if t == start]
    assert len(at) == 2 and all(ids[i : i + 6] == [start, pad, pad, pad, pad, end] for i in at)
    assert all(
        labels[i] == start and labels[i + 1 : i + 5] == [IGNORE] * 4 and labels[i + 5] == end
        for i in at
    )
    assert labels[-1] == tokenizer.eos_token_id and ids.count(pad) == 8
    # latent pads take ordinary text positions
    assert (e["pos"][:, at[0] : at[0] + 6].diff(dim=1) == 1).all()


def test_stripping_leaves_nothing(loaded, world):
    vlm, tokenizer, processor = loaded
    latents = [tokenizer.convert_tokens_to_ids(t) for t in (LATENT_START, LATENT_PAD, LATENT_END)]
    for row in examples(world):
        e = encode(vlm, tokenizer, processor, row, 4, strip_latents(row["response"]))
        assert not set(e["ids"].tolist()) & set(latents) and "parser" in tokenizer.decode(e["ids"])


def test_pool_is_the_mean_of_blocks(loaded, world):
    """A 4 x 4 grid pooled to 2 x 2 is the mean over 2 x 2 blocks."""
    vlm, _, processor = loaded
    image = open_image(examples(world)[0]["images"][0]).resize((112, 112))
    v = encode_images(vlm, processor, [image])[0][0].view(4, 4, -1)
    blocks = torch.stack([v[i : i + 2, j : j + 2].mean((0, 1)) for i in (0, 2) for j in (0, 2)])
    close(grid_features(vlm, processor, [image], 4, "pool")[0], blocks)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_a_resized_picture_is_the_grid(loaded, base, world, side):
    """Whatever the pixel limits of the questions' pictures: a token is 28 pixels a side."""
    vlm, _, processor = loaded
    image = open_image(examples(world)[0]["images"][0])
    exact = load_processor(base, (28 * side) ** 2, (28 * side) ** 2)
    (v,), grid = encode_images(vlm, exact, [image.resize((28 * side, 28 * side), 3)])
    assert grid.tolist() == [[1, 2 * side, 2 * side]]
    close(grid_features(vlm, processor, [image], side**2, "resize")[0], v)
    narrow = load_processor(base, 784, 784)
    close(grid_features(vlm, narrow, [image], side**2, "resize")[0], v)


# --- a model folder is whole, or refused by name


def copied(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    return folder


def with_weights(folder, change):
    """Write the folder's weights again, changed."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_json(folder, name, change):
    value = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(value)))


def of_another_shape(weights):
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name] = weights[name][:-1].clone()


def not_finite(weights):
    weights[next(iter(weights))].view(-1)[0] = torch.nan


def sliding(config):
    layers = ["sliding_attention"] * config["text_config"]["num_hidden_layers"]
    text = {"use_sliding_window": True, "sliding_window": 8, "layer_types": layers}
    return config | {"text_config": config["text_config"] | text}


def of_other_positions(config):
    config["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 8]
    return config


def with_tokens(tokenizer):
    kind = tokenizer["added_tokens"][-1]
    more = [kind | {"id": 10_000 + n, "content": f"<more {n}>"} for n in range(1000)]
    return tokenizer | {"added_tokens": tokenizer["added_tokens"] + more}


FOLDERS = {
    "a tensor is missing": lambda f: with_weights(f, lambda w: w.pop("lm_head.weight")),
    "one too many": lambda f: with_weights(f, lambda w: w.update(other=torch.ones(1))),
    "another shape": lambda f: with_weights(f, of_another_shape),
    "a NaN": lambda f: with_weights(f, not_finite),
    "a pointer": lambda f: (f / "model.safetensors").write_text("version https://git-lfs\n"),
    "cut off": lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 100),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "config a list": lambda f: (f / "config.json").write_text("[]"),
    "another model": lambda f: with_json(f, "config.json", lambda c: c | {"model_type": "llama"}),
    "no template": lambda f: (f / "chat_template.jinja").unlink(),
    "a template for text": lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
    "a broken template": lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
    "tokenizer a list": lambda f: (f / "tokenizer.json").write_text("[]"),
    "an adapter": lambda f: (f / "adapter_config.json").write_text("{}"),
    "quantised": lambda f: with_json(
        f, "config.json", lambda c: c | {"quantization_config": {"bits": 4}}
    ),
    "sliding windows": lambda f: with_json(f, "config.json", sliding),
    "positions of another width": lambda f: with_json(f, "config.json", of_other_positions),
    "tokens without an embedding": lambda f: with_json(f, "tokenizer.json", with_tokens),
    "no pad": lambda f: with_json(f, "tokenizer_config.json", lambda c: c | {"pad_token": None}),
}


def prompt_logits(folder):
    """The logits of a prompt with a picture, from a folder."""
    vlm, tokenizer = load_vlm(folder)
    processor = load_processor(folder, *PIXELS)
    vision = encode_images(vlm, processor, [Image.new("RGB", (84, 84), "red")])[0][0]
    row = {"images": [], "question": "Which?"}
    e = encode(vlm, tokenizer, processor, row)
    x = torch.cat([vision, embed(vlm, e["ids"][None])[0]])[None]
    pos = torch.arange(x.shape[1]).expand(3, 1, -1)
    return vlm.lm_head(
        vlm.model.language_model(inputs_embeds=x, position_ids=pos).last_hidden_state
    )


def test_what_is_called_tied_and_is_two_stays_two(base, tmp_path):
    """As a LoRA's merge leaves it, whose LM head was trained: also of what is written from it."""
    folder = copied(base, tmp_path)

    def tied(config):
        text = config["text_config"] | {"tie_word_embeddings": True}
        return config | {"tie_word_embeddings": True, "text_config": text}

    with_json(folder, "config.json", tied)
    close(prompt_logits(folder), prompt_logits(base))
    vlm, tokenizer = load_vlm(folder)
    for part in (vlm, tokenizer, load_processor(folder, *PIXELS)):
        part.save_pretrained(tmp_path / "again")
    close(prompt_logits(tmp_path / "again"), prompt_logits(base))
    assert not vlm.config.tie_word_embeddings  # which train.py's export goes by


def test_a_tokenizer_adds_nothing_of_its_own(loaded, world):
    """Not the first or last token that its post-processor would put around every text."""
    vlm, tokenizer, processor = loaded
    row = examples(world)[0]
    plain = encode(vlm, tokenizer, processor, row, 4, row["response"])["ids"]
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{eos} $A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    assert len(tokenizer("a")["input_ids"]) > len(tokenizer("a", add_special_tokens=False))
    assert torch.equal(encode(vlm, tokenizer, processor, row, 4, row["response"])["ids"], plain)


def test_the_released_layout_is_the_same_model(base, tmp_path):
    """Flat config, rope_scaling, old names in shards with an index, float16, two stop tokens, and
    the template in a file of its own."""
    folder = copied(base, tmp_path)
    config = json.loads((base / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = config | {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (folder / "config.json").write_text(json.dumps(flat))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    stops = {"eos_token_id": [2, 0], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(stops))

    weights = load_file(base / "model.safetensors")
    old = {}
    for name, weight in weights.items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        old[name] = weight.half()
    (folder / "model.safetensors").unlink()
    names, where = sorted(old), {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{n}-of-00002.safetensors"
        save_file({name: old[name] for name in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    close(prompt_logits(folder), prompt_logits(base), rtol=2e-2, atol=2e-2)
    assert len(stop_ids(*load_vlm(folder))) == 3


@pytest.mark.parametrize("limits", [(3136, 12_845_056), (100_000, 200_000)])
def test_our_pixel_limits_hold(base, tmp_path, limits):
    """A folder as released has min_pixels and max_pixels in place of a size."""
    folder = copied(base, tmp_path)

    def released(config):
        config.pop("size")
        return config | {"min_pixels": limits[0], "max_pixels": limits[1]}

    with_json(folder, "preprocessor_config.json", released)
    picture = tmp_path / "a.png"
    Image.new("RGB", (600, 400)).save(picture)
    for ours in ((3136, 50_176), (400_000, 500_000)):
        grids = []
        for place in (folder, base):
            processor = load_processor(place, *ours)
            grids.append(image_grid(processor, picture))
            inputs = processor(images=[open_image(picture)], return_tensors="pt")
            assert inputs["image_grid_thw"].tolist() == [list(grids[-1])]
        assert grids[0] == grids[1]
        n_pixels = grids[0][1] * grids[0][2] * 14**2
        assert ours[0] * 0.9 <= n_pixels <= ours[1]


def test_other_limits_than_in_training_are_said(base, tmp_path, capsys):
    folder = copied(base, tmp_path)
    say_other_limits(folder, 3136, 50_176)
    assert not capsys.readouterr().out  # a download's limits are no one's wish
    (folder / "log.jsonl").touch()
    say_other_limits(folder, 3136, 50_176)
    assert "here (3136, 50176)" in capsys.readouterr().out
    load_processor(folder, 3136, 50_176).save_pretrained(folder)
    say_other_limits(folder, 3136, 50_176)
    assert not capsys.readouterr().out


def test_rows_are_added_where_none_are_spare(base, tmp_path):
    """An embedding that was cut to its tokenizer grows; what it had stays as it was."""
    folder = copied(base, tmp_path)
    n = len(load_vlm(base)[1])
    with_json(
        folder, "config.json", lambda c: c | {"text_config": c["text_config"] | {"vocab_size": n}}
    )

    def cut(weights):
        for name in weights:
            if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                weights[name] = weights[name][:n].clone()

    with_weights(folder, cut)
    vlm, tokenizer = load_vlm(folder)
    before = vlm.get_input_embeddings().weight.detach().clone()
    add_latent_tokens(vlm, tokenizer)
    after = vlm.get_input_embeddings().weight.detach()
    assert len(after) == len(tokenizer) == n + 3 == vlm.config.text_config.vocab_size
    assert torch.equal(after[:n], before)
    close(after[n:], before.mean(0).expand(3, -1))


HEADS_OF_OTHERS = {
    "another width": lambda t, m: t.update(mean=t["mean"][:64], basis=t["basis"][:64]),
    "another tower": lambda t, m: m.update(tower="0" * 16),
    "K no square": lambda t, m: m.update(K="5"),
    "K no number": lambda t, m: m.update(K="x"),
    "K beyond reason": lambda t, m: m.update(K=str(10**12)),
    "another kind": lambda t, m: m.update(kind="other"),
    "a weight gone": lambda t, m: t.pop("up.weight"),
    "a NaN": lambda t, m: t["mean"].fill_(torch.nan),
    "no tower named": lambda t, m: m.pop("tower"),
}


def test_images_stand_at_their_marks(loaded, world):
    vlm, tokenizer, processor = loaded
    paths = [row["images"][0] for row in examples(world, 2)]
    pad = vlm.config.image_token_id

    def asked(question):
        ids = encode(vlm, tokenizer, processor, {"images": paths, "question": question})["ids"]
        runs = [
            t for t, before in zip(ids.tolist(), [None, *ids.tolist()]) if t != pad or before != pad
        ]
        return tokenizer.decode(runs)

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"Left: {image} right: {image}." in asked("Left: <image> right: <image>.")
    # elsewhere than in the question it is text
    for question in ("Which tag?", "Is <image> a tag?"):
        row = {"images": ["1.png"], "question": question, "options": ["<image>", "<img>"]}
        (message,) = model.chat_messages(row | {"instruction": " <image>"})
        pieces = ["[IMG]" if p["type"] == "image" else p["text"] for p in message["content"]]
        said = question.replace("<image>", "[IMG]") if "<image>" in question else f"[IMG]{question}"
        assert "".join(pieces) == said + "\nA. <image>\nB. <img> <image>"
    assert f"{image}{image}Which?" in asked("Which?")


def as_shards(folder):
    """Two shards with an index, as large folders are released; returns the second."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(weights), {}
    for n in (1, 2):
        part = names[n - 1 :: 2]
        file = f"model-{n:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / file


def infinite(weights):
    (name,) = [
        x for x in weights if x.endswith(("model.norm.weight", "language_model.norm.weight"))
    ]
    weights[name][5] = -torch.inf


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
FOLDERS |= {  # half downloads and pointers
    "an infinity": lambda f: with_weights(f, infinite),
    "a layer is missing": lambda f: with_weights(
        f, lambda w: [w.pop(name) for name in list(w) if ".layers.1." in name]
    ),
    "half of the weights": lambda f: cut(f / "model.safetensors", 2_000_000),
    "half of a header": lambda f: cut(f / "model.safetensors", 500),
    "empty weights": lambda f: cut(f / "model.safetensors", 0),
    "a shard is gone": lambda f: as_shards(f).unlink(),
    "a shard is a pointer": lambda f: as_shards(f).write_text(POINTER),
    "a shard is cut off": lambda f: cut(as_shards(f), 300_000),
    "config a pointer": lambda f: (f / "config.json").write_text(POINTER),
    "config empty": lambda f: (f / "config.json").write_text(""),
    "no config": lambda f: (f / "config.json").unlink(),
    "tokenizer a pointer": lambda f: (f / "tokenizer.json").write_text(POINTER),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "an empty template": lambda f: (f / "chat_template.jinja").write_text(""),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_whole_is_refused_by_name(base, tmp_path, name):
    folder = copied(base, tmp_path)
    FOLDERS[name](folder)
    with pytest.raises(SystemExit) as e:
        load_vlm(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change",
    [{"patch_size": 16}, {"merge_size": 1}, {"temporal_patch_size": 1}, {"image_mean": None}],
)
def test_a_processor_of_another_tower_is_refused(base, tmp_path, change):
    folder = copied(base, tmp_path)
    with_json(folder, "preprocessor_config.json", lambda c: c | change)
    with pytest.raises(SystemExit, match="preprocessor_config.json") as e:
        load_processor(folder, *PIXELS)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", [None, "[]", "", POINTER, '{"size": 3}'])
def test_a_processor_file_that_is_none_is_named(base, tmp_path, text):
    folder = copied(base, tmp_path)
    (folder / "preprocessor_config.json").unlink()
    if text is not None:
        (folder / "preprocessor_config.json").write_text(text)
    try:
        processor = load_processor(folder, 3136, 50_176)
    except SystemExit as e:
        assert str(folder) in str(e) and "\n" not in str(e)
    else:  # what the file says of sizes does not matter
        assert text == '{"size": 3}' and processor.size["longest_edge"] == 50_176


@pytest.mark.parametrize(
    "size",
    [
        {"min_pixels": 4 * 784, "max_pixels": 16384 * 784},
        {"min_pixels": 1},
        {"max_pixels": 10**9},
        {"size": {"shortest_edge": 4 * 784, "longest_edge": 16384 * 784}},
        {"size": {"min_pixels": 4 * 784, "max_pixels": 16384 * 784}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 1, "max_pixels": 3},
        {},
    ],
)
def test_no_file_has_a_say_in_the_limits(base, tmp_path, size):
    folder = copied(base, tmp_path)
    with_json(folder, "preprocessor_config.json", lambda c: {**c, "size": None, **size})
    processor = load_processor(folder, 16 * 784, 36 * 784)
    for shape, cells in (((2000, 2000), 36), ((28, 28), 16), ((140, 140), 25)):
        image = Image.new("RGB", shape)
        grid = processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
        assert int(grid.prod()) // 4 == cells
    processor.save_pretrained(tmp_path / "again")  # what is exported says the same
    again = load_processor(tmp_path / "again", 16 * 784, 36 * 784)
    assert again.size == processor.size


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_the_template_counts_wherever_it_lies(base, tmp_path, place):
    folder = copied(base, tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    content = {}
    if (folder / place).exists():
        content = json.loads((folder / place).read_text())
    (folder / place).write_text(json.dumps(content | {"chat_template": template}))
    row = {"images": [], "question": "Which?", "system": "Be brief."}
    found = []
    for where in (folder, base):
        vlm, tokenizer = load_vlm(where)
        found.append(encode(vlm, tokenizer, load_processor(where, *PIXELS), row)["ids"])
    assert torch.equal(*found)


def test_added_rows_change_no_old_logit(base, tmp_path):
    """Where none are spare, and where some are; a second call adds nothing."""
    folder = copied(base, tmp_path)
    n = len(load_vlm(base)[1])

    def cut_rows(weights):
        for name in weights:
            if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                weights[name] = weights[name][:n].clone()

    def narrow(config):
        return config | {"text_config": config["text_config"] | {"vocab_size": n}}

    with_weights(folder, cut_rows)
    with_json(folder, "config.json", narrow)
    ids = torch.arange(14, 44)[None]
    pos = torch.arange(30).expand(3, 1, -1)
    for where in (folder, base):
        vlm, tokenizer = load_vlm(where)

        def logits(vlm=vlm):
            h = vlm.model.language_model(inputs_embeds=embed(vlm, ids), position_ids=pos)
            return vlm.lm_head(h.last_hidden_state)

        before = logits()
        add_latent_tokens(vlm, tokenizer)
        after = logits()
        assert torch.equal(after[..., :n], before[..., :n]) and after.shape[-1] >= n + 3
        assert tokenizer.convert_tokens_to_ids(LATENT_PAD) == n + 1
        table = vlm.get_input_embeddings().weight.detach().clone()
        add_latent_tokens(vlm, tokenizer)
        assert len(tokenizer) == n + 3
        assert torch.equal(vlm.get_input_embeddings().weight, table)


HEADS_OF_OTHERS |= {  # and heads that make no sense
    "an empty basis": lambda t, m: t.update(basis=t["basis"][:, :0]),
    "a basis on its side": lambda t, m: t.update(basis=t["basis"].T),
    "fewer eigenvalues": lambda t, m: t.update(eigenvalues=t["eigenvalues"][:3]),
    "a matrix for a mean": lambda t, m: t.update(mean=t["mean"][None]),
    "an unknown weight": lambda t, m: t.update(other=torch.ones(1)),
    "a narrower weight": lambda t, m: t.update({"up.weight": t["up.weight"][:3]}),
    "an infinite weight": lambda t, m: t["proj.weight"].fill_(-torch.inf),
    "K of 0": lambda t, m: m.update(K="0"),
    "K below 0": lambda t, m: m.update(K="-4"),
    "K a share": lambda t, m: m.update(K="4.0"),
    "K not there": lambda t, m: m.pop("K"),
    "the full head's name": lambda t, m: m.update(kind="lh"),
    "the output's name": lambda t, m: m.update(kind="output"),
    "a variance in words": lambda t, m: m.update(total_variance="much"),
    "no variance": lambda t, m: m.pop("total_variance"),
    "no mean": lambda t, m: t.pop("mean"),
}


@pytest.mark.parametrize("name", HEADS_OF_OTHERS)
def test_a_head_of_another_model_is_refused(tmp_path, loaded, name):
    vlm, tokenizer, _ = loaded
    head = PCAHead(random_pca(), 4)
    meta = {"mode": "pool", "tower": tower_fingerprint(vlm)}
    save_head(tmp_path, head, head.state_dict(), meta)
    assert load_head(tmp_path, vlm, tokenizer, 4).K == 4
    path = tmp_path / "latent_head.safetensors"
    with safe_open(path, "pt") as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata())
    HEADS_OF_OTHERS[name](tensors, meta)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, meta)
    with pytest.raises(SystemExit, match="latent_head.safetensors") as e:
        load_head(tmp_path, vlm, tokenizer, 4)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("spoil", [lambda p: cut(p, 200), lambda p: p.write_text(POINTER)])
def test_a_head_file_that_is_cut_off_is_named(tmp_path, loaded, spoil):
    head = PCAHead(random_pca(), 4)
    save_head(tmp_path, head, head.state_dict(), {"mode": "pool", "tower": "x"})
    spoil(tmp_path / "latent_head.safetensors")
    with pytest.raises(SystemExit, match="latent_head.safetensors: not a readable"):
        load_head(tmp_path, *loaded[:2], 4)


def test_a_head_needs_its_tokens(tmp_path, base):
    vlm, tokenizer = load_vlm(base)
    head = PCAHead(random_pca(), 4)
    save_head(tmp_path, head, head.state_dict(), {"mode": "pool", "tower": tower_fingerprint(vlm)})
    with pytest.raises(SystemExit, match="latent_start"):
        load_head(tmp_path, vlm, tokenizer, 4)


def test_norms_have_the_models_own_epsilon(base):
    """In small states it counts, as in the first layers of a real model."""
    vlm, _ = load_vlm(base)
    for norm in (vlm.model.language_model.norm, vlm.model.visual.merger.ln_q):
        x = 1e-3 * torch.randn(4, len(norm.weight))
        want = norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(norm(x), want)


def test_latent_tokens_begin_at_the_mean_in_the_lm_head_too(base):
    """Where spare rows hold what pretraining left in them."""
    vlm, tokenizer = load_vlm(base)
    n = len(tokenizer)
    with torch.no_grad():
        vlm.lm_head.weight[n:] = 7.0
    add_latent_tokens(vlm, tokenizer)
    w = vlm.lm_head.weight.detach()
    torch.testing.assert_close(w[n : n + 3], w[:n].mean(0).expand(3, -1))


def test_heads_are_their_equations():
    """Written out, of random weights: SwiGLU, SiLU, and what is added where."""
    torch.manual_seed(0)
    h = torch.randn(5, 128)
    heads = {k: HEADS[k](random_pca(), 4) for k in ("gap", "lh", "wide")}
    for head in heads.values():
        for p in head.parameters():
            torch.nn.init.normal_(p, std=0.1)
    P, mu = heads["gap"].basis, heads["gap"].mean
    g, full, w = heads["gap"], heads["lh"], heads["wide"]
    c = h @ g.proj.weight.T
    gate = c @ g.gate.weight.T
    c = c + (gate * gate.sigmoid() * (c @ g.up.weight.T)) @ g.down.weight.T
    torch.testing.assert_close(g(h), c @ P.T + mu)
    for x in (full, w):
        y = h @ x.hidden.weight.T + x.hidden.bias
        y = (y * y.sigmoid()) @ x.out.weight.T + x.out.bias
        want = y if x is full else (h @ w.basis + y) @ w.basis.T + w.mean
        torch.testing.assert_close(x(h), want)
