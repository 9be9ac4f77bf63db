"""How good is it? eval.py on the toy and on every benchmark: ranks, kills, failures, interventions,
scores by hand, the comparison."""

import base64
import json
import os
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PIXELS, TOY, has_lines, kill_when, run
from official_files import args_of, b64, picture, plant
from safetensors.torch import load_file

import eval as evaluate
import launch
import standings
from benchmarks import BENCHMARKS, JSONL, PUBLISHED
from data import load_examples
from files import read_lines, write_lines
from generate import latents_name
from images import open_image
from model import load_processor, load_vlm, real_features

# --- a JSONL test set


def evaluation(stages, out, **change):
    """The arguments of eval.py over the toy's test set."""
    settings = {
        "model": stages["gap"],
        "data": stages["world"] / "test.jsonl",
        "out": out,
        "batch": 5,
        "max_new_tokens": 30,
    } | change
    return [f"--{name}={value}" for name, value in settings.items()]


def strip(predictions):
    """Predictions by id, without what changes from run to run."""
    found = {}
    for line in predictions:
        found[line["id"]] = {k: v for k, v in line.items() if k not in ("key", "seconds")}
    return found


def predictions_of(folder):
    """The lines of all ranks."""
    files = sorted(folder.glob("predictions.rank*.jsonl"))
    return [line for file in files for line in read_lines(file)]


def test_eval_ranks_kills_and_scores(tmp_path, stages):
    run("eval.py", *evaluation(stages, tmp_path / "one"))
    one = strip(read_lines(tmp_path / "one" / "predictions.rank0.jsonl"))
    run("eval.py", *evaluation(stages, tmp_path / "two"), ranks=2)
    two = [p for r in (0, 1) for p in read_lines(tmp_path / "two" / f"predictions.rank{r}.jsonl")]
    assert len(two) == len(one) == 12 and strip(two) == one
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())["scores"]
    two = read_lines(tmp_path / "two" / "scored.jsonl")
    assert metrics["overall"]["n"] == 12
    assert sum(metrics[f"{m} moves"]["n"] for m in (1, 2, 3, 4)) == 12
    assert metrics["overall"]["accuracy"] == sum(p["correct"] for p in two) / 12
    assert metrics["overall"]["tokens"] == pytest.approx(sum(p["tokens"] for p in two) / 12)

    out = tmp_path / "killed"
    path = out / "predictions.rank0.jsonl"
    kill_when(lambda: has_lines(path, 3), "eval.py", *evaluation(stages, out, batch=1))
    text = run("eval.py", *evaluation(stages, out, score_only=1), ok=False)
    assert "answers are missing" in text
    run("eval.py", *evaluation(stages, out), ranks=2)
    lines = predictions_of(out)
    assert len(lines) == 12 and strip(lines) == one

    # another setting does not reuse these answers, and says whose scores it replaces
    text = run("eval.py", *evaluation(stages, out, intervention="zero"))
    assert "metrics.json: in place of the scores of other settings" in text
    assert len(predictions_of(out)) == 24


def test_interventions_by_eval(tmp_path, stages):
    run("eval.py", *evaluation(stages, tmp_path / "clean", save_latents=1))
    clean = {p["id"]: p for p in predictions_of(tmp_path / "clean")}
    donor = tmp_path / "clean" / "latents"
    saved = {file.name: load_file(file)["latents"] for file in donor.iterdir()}
    ids = {evaluate.latents_name(id): id for id in clean}
    assert len(saved) >= 2
    for name, latents in saved.items():
        assert len(latents) == clean[ids[name]]["latents"] // 4 * 4

    # latents that are gone, or those of another setting's answers, are written again
    (donor / next(iter(saved))).unlink()
    run("eval.py", *evaluation(stages, tmp_path / "clean", save_latents=1, intervention="noise"))
    run("eval.py", *evaluation(stages, tmp_path / "clean", save_latents=1))
    assert {file.name for file in donor.iterdir()} == saved.keys()
    for name, latents in saved.items():
        assert torch.equal(load_file(donor / name)["latents"], latents)

    for kind in ("zero", "noise", "mean", "shuffle", "oracle", "oracle_pca"):
        change = {"intervention": kind, "save_latents": 1}
        if kind == "shuffle":
            change["donor"] = donor
        run("eval.py", *evaluation(stages, tmp_path / kind, **change))
        metrics = json.loads((tmp_path / kind / "metrics.json").read_text())
        assert (metrics["scores"]["overall"]["latents"] == 0) == (kind == "zero")

    # another example's latents: the next in the order of file names
    order = sorted(saved)
    for i, name in enumerate(order):
        fed = load_file(tmp_path / "shuffle" / "latents" / name)["latents"]
        theirs = saved[order[(i + 1) % len(order)]]
        n = min(len(theirs), len(fed))
        assert (fed[:n] == theirs[:n]).all() and not torch.equal(theirs[:4], saved[name][:4])

    no_donor = evaluation(stages, tmp_path / "x", intervention="shuffle")
    assert "donor" in run("eval.py", *no_donor, ok=False)
    no_head = evaluation(stages, tmp_path / "x", model=stages["base"], intervention="noise")
    assert "no latent_head" in run("eval.py", *no_head, ok=False)


# --- public benchmarks


def scores_of(out, name):
    return json.loads((out / name / "metrics.json").read_text())["scores"]


# shares of errors, and groups that the small files do not hold
NOT_ALL_RIGHT = ("IK", "IG", "strict RM", "loose RM", "S3", "object_rel_direction")


def test_every_benchmark_through_the_script(tmp_path, base, bench_root):
    """All official layouts with a tiny model; then its answers are replaced by known ones."""
    root, golds = bench_root
    out = tmp_path / "all"
    text = run("eval.py", *args_of(base, root, out))
    files = [file for benchmark in BENCHMARKS.values() for file in benchmark.files]
    known = [file for file in files if file.md5 and (root / file.path).exists()]
    assert set(golds) == set(BENCHMARKS) and text.count("has MD5") == len(known)

    for name in golds:
        plant(out, name, [right for right, _ in golds[name]])
    text = run("eval.py", *args_of(base, root, out, score_only=1))
    for name in golds:
        metrics = json.loads((out / name / "metrics.json").read_text())
        for group, found in metrics["scores"].items():
            assert found["accuracy"] == 1 or group in NOT_ALL_RIGHT, (name, group)
        assert metrics["settings"]["max_pixels"] == 56 * 56
        assert len(metrics["settings"]["md5"]) == 32 and metrics["versions"]["torch"]
    assert scores_of(out, "WeMath")["IK"]["accuracy"] == 0
    # every row of every paper's table is one that we score, and is all right
    for table in PUBLISHED.values():
        assert table.paper in text
        for _, name, theirs in table.rows:
            numbers = "".join(f"{x:9.2f}" if x else f"{'-':>9}" for x in theirs)
            assert f"{name:14}{100:9.2f}  |{numbers}\n" in text, name
    assert "no score here" in text
    response = json.loads((out / "MMHal-Bench" / "response.json").read_text())
    assert response[0]["model_answer"] == "a dog"
    assert response[0]["image_src"] == "https://host/x.jpg"

    # half of the answers right: the scores by hand
    for name in golds:
        plant(out, name, [pair[i % 2] for i, pair in enumerate(golds[name])])
    text = run("eval.py", *args_of(base, root, out, score_only=1))
    third = pytest.approx(1 / 3)
    by_hand = [
        ("HRBench4K", {"overall": 0.5, "single": 1, "cross": 0}),
        # l0: rows 0 and 3
        ("MMStar", {"overall": 0.5, "mean of l2": pytest.approx((0.5 + 0 + 1) / 3)}),
        ("MME-RealWorld-Lite", {"overall": 0.5, "Perception": third}),
        # right: steps 1 and multi; step 2
        ("WeMath", {"strict": 0, "loose": 0.5}),
        ("BLINK", {"overall": 0.5, "IQ_Test": 1, "Jigsaw": 0}),
        ("MMVP", {"overall": 0, "single": 0.5}),
        # two of three of ADE20K, none of one of COCO
        ("CV-Bench-2D", {"overall": third, "micro": 0.5, "COCO": 0}),
        ("CV-Bench-3D", {"overall": pytest.approx(2 / 3), "micro": pytest.approx(2 / 3)}),
        ("VSI-Bench", {"overall": 0.5}),
        ("POPE", {"overall": 1, "accuracy": 0.5}),
    ]
    for name, expected in by_hand:
        scores = scores_of(out, name)
        assert {group: scores[group]["accuracy"] for group in expected} == expected, name
    # of both parts: the mean of 1/3 and 2/3, and 4 of 7 questions
    for name, ours in (("CV-Bench", 50), ("- all rows", 400 / 7)):
        assert f"\n{name:14}{ours:9.2f}  |" in text
    overall = scores_of(out, "HRBench4K")["overall"]
    assert (overall["n_unparsed"], overall["n"]) == (2, 4)


def test_benchmark_ranks_and_kills(tmp_path, base, bench_root):
    root, _ = bench_root

    def args(out, **change):
        return args_of(base, root, out, **{"benchmarks": "HRBench4K,VisualPuzzles"} | change)

    run("eval.py", *args(tmp_path / "one"))
    one = (tmp_path / "one/HRBench4K/scored.jsonl").read_bytes()
    out = tmp_path / "killed"
    path = out / "HRBench4K/predictions.rank0.jsonl"
    kill_when(lambda: has_lines(path, 1), "eval.py", *args(out, batch=1))
    with open(path, "a") as f:
        f.write('{"id": "3", "ke')
    assert "answers are missing" in run("eval.py", *args(out, score_only=1), ok=False)
    partial = args(out, score_only=1, allow_partial=1, benchmarks="HRBench4K")
    assert "MISSING" in run("eval.py", *partial)
    run("eval.py", *args(out), ranks=2)
    assert (out / "HRBench4K/scored.jsonl").read_bytes() == one
    assert len(predictions_of(out / "HRBench4K")) == 4  # nothing was answered twice


def test_the_rank_that_answers_last_scores(tmp_path, base, world):
    """Of two, one has nothing left to do; the other asks again what has failed before."""
    out = tmp_path / "e"
    args = [f"--model={base}", f"--data={world}/test.jsonl", f"--out={out}", "--max_new_tokens=8"]
    run("eval.py", *args, ranks=2)
    path = out / "predictions.rank1.jsonl"
    *lines, last = read_lines(path)
    write_lines(path, [*lines, {"id": last["id"], "key": last["key"], "error": "out of memory"}])
    run("eval.py", *args, ranks=2)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["scores"]["overall"]["n_error"] == 0


def test_a_failed_question_does_not_stop_the_others(tmp_path, base, bench_root):
    """An image that cannot be read: its question fails, and the next run tries it again."""
    root, _ = bench_root
    broken = tmp_path / "root"
    broken.mkdir()
    damaged = base64.b64encode(picture(1)[:60] + b"\0" * 60).decode()
    text = (root / "VisualPuzzles.tsv").read_text()
    (broken / "VisualPuzzles.tsv").write_text(text.replace(b64(1), damaged))
    out = tmp_path / "broken"
    text = run("eval.py", *args_of(base, broken, out, benchmarks="VisualPuzzles"))
    assert "1 questions failed" in text and "not a usable image" in text
    overall = scores_of(out, "VisualPuzzles")["overall"]
    assert (overall["n"], overall["n_error"]) == (2, 1)
    run("eval.py", *args_of(base, broken, out, benchmarks="VisualPuzzles"))
    lines = read_lines(out / "VisualPuzzles/predictions.rank0.jsonl")
    assert Counter("error" in line for line in lines) == {False: 1, True: 2}


@pytest.fixture
def answering(tmp_path, base, world, monkeypatch):
    """(Answerer of the toy's base, its test rows), at most three questions at once."""
    monkeypatch.setattr(evaluate, "batch", 3)
    test = SimpleNamespace(settings={"max_new_tokens": 12}, out=tmp_path, key="k")
    model = evaluate.Answerer(test, *load_vlm(base), load_processor(base, *PIXELS), None, [])
    return model, list(load_examples(world / "test.jsonl", training=False))


KEYS = defaultdict(lambda: "k")  # of any answer


def answers_of(answering):
    """{id: line}, each of which comes once."""
    model, rows = answering
    lines = [(row["id"], line) for row, line in model.answers(rows, KEYS, False)]
    found = dict(lines)
    assert len(lines) == len(found) == len(rows)
    return found


def test_a_failure_is_one_questions_alone(answering, monkeypatch, capsys):
    """One fails whoever is beside it, another has an answer that cannot be saved, and all fail
    where three begin at once, as if memory were too small: the others have their usual answers."""
    usual = {id: line["raw"] for id, line in answers_of(answering).items()}
    assert len(set(usual.values())) > 6 and not capsys.readouterr().out
    rows = answering[1]
    see, save, sizes = evaluate.see, evaluate.save_latents_file, []

    def failing(vlm, processor, prompts):
        sizes.append(len(prompts))
        if len(prompts) == 3 or any(p["images"] == rows[5]["images"] for p in prompts):
            raise RuntimeError("out of memory")
        return see(vlm, processor, prompts)

    def unsaved(path, latents, head, key):
        if path.name == latents_name(rows[7]["id"]):
            raise OSError("disk full")
        return save(path, latents, head, key)

    monkeypatch.setattr(evaluate, "see", failing)
    monkeypatch.setattr(evaluate, "save_latents", True)
    monkeypatch.setattr(evaluate, "save_latents_file", unsaved)
    found = answers_of(answering)
    assert found.pop(rows[5]["id"]) == {"error": "RuntimeError: out of memory"}
    assert found.pop(rows[7]["id"]) == {"error": "OSError: disk full"}
    assert all(line["raw"] == usual[id] for id, line in found.items())
    assert 3 in sizes and 1 in sizes
    said = "RuntimeError: out of memory: the 3 questions under way are asked one by one"
    assert said in capsys.readouterr().out


def test_what_no_question_is_to_blame_for_ends_the_run(answering, monkeypatch):
    def refusing(*args, **kwargs):
        raise SystemExit("no sliding windows")

    monkeypatch.setattr(evaluate, "stream", refusing)
    with pytest.raises(SystemExit, match="no sliding windows"):
        answers_of(answering)


def test_prompts_of_those_under_way_are_within_the_limit(answering, monkeypatch):
    """Of two at once, padded, though three would be allowed."""
    model, rows = answering
    usual = {id: line["raw"] for id, line in answers_of(answering).items()}
    prompts = [evaluate.encode(*(model.vlm, model.tokenizer, model.processor), row) for row in rows]
    lengths = {row["id"]: len(p["ids"]) for row, p in zip(rows, prompts)}
    monkeypatch.setattr(evaluate, "prompt_tokens", 2 * max(lengths.values()))
    see, begun, answered = evaluate.see, [], []

    def seen(vlm, processor, prompts):
        begun.append(len(prompts))
        assert sum(begun) - len(answered) <= 2
        return see(vlm, processor, prompts)

    monkeypatch.setattr(evaluate, "see", seen)
    for row, line in model.answers(rows, KEYS, False):
        answered.append(row["id"])
        assert line["raw"] == usual[row["id"]]
    assert 2 in begun and sum(begun) == len(rows)


def test_questions_wait_for_room(monkeypatch):
    """Each once and in order; padded, beside what is held, within the limit, or quite alone."""
    monkeypatch.setattr(evaluate, "prompt_tokens", 100)
    rng = random.Random(0)
    lengths = [rng.choice([5, 20, 60, 150]) for _ in range(60)]
    waiting = evaluate.Waiting((i, {"ids": range(n)}) for i, n in enumerate(lengths))
    seen, held = [], []
    while len(seen) < 60:
        part, padded = waiting.fitting(rng.randint(1, 4), sum(held))
        assert part or held
        assert padded == max((len(prompt["ids"]) for _, prompt in part), default=0)
        if part:
            assert sum(held) + len(part) * padded <= 100 or not held and len(part) == 1
        seen += [i for i, _ in part]
        held = (held + [padded] * len(part))[rng.randint(0, 2) :]
    assert seen == list(range(60))
    assert waiting.fitting(3, 0) == ([], 0)


# --- statistics


def test_a_file_of_ones_own_is_asked_and_read_as_it_says(world, monkeypatch):
    """Its system prompt is put, and another one is another question; a column `kind` is its own."""
    row = load_examples(world / "test.jsonl", training=False)[0]
    with_system = row | {"system": "Be brief."}
    assert evaluate.as_asked(with_system)["system"] == "Be brief."
    assert evaluate.row_key("k", with_system) != evaluate.row_key("k", row)
    monkeypatch.setattr(evaluate, "system", "Be long.")
    assert evaluate.as_asked(with_system)["system"] == "Be long."
    test = SimpleNamespace(rows=[row | {"kind": "chart"}], benchmark=JSONL)
    (graded,) = evaluate.grade(test, {row["id"]: {"raw": f"<answer> {row['answer']} </answer>"}})
    assert graded["correct"]


def test_an_oracles_answer_belongs_to_what_it_was_fed(world, monkeypatch):
    """And one whose latents are kept is the same answer."""
    row, other = load_examples(world / "test.jsonl", training=False)[:2]
    redrawn = row | {"aux_images": other["aux_images"]}
    assert evaluate.row_key("k", redrawn) == evaluate.row_key("k", row)
    monkeypatch.setattr(evaluate, "intervention", "oracle")
    assert evaluate.row_key("k", redrawn) != evaluate.row_key("k", row)

    monkeypatch.setattr(evaluate, "data", str(world / "test.jsonl"))
    monkeypatch.setattr(evaluate, "model", str(TOY))
    plain = evaluate.load_test_set("").key
    monkeypatch.setattr(evaluate, "save_latents", True)
    assert evaluate.load_test_set("").key == plain


def test_headlines_are_of_whole_benchmarks_in_one_setting(tmp_path, monkeypatch, capsys):
    """And of one model, whatever its folder is called."""
    monkeypatch.setattr(evaluate, "out", str(tmp_path))
    monkeypatch.setattr(evaluate, "folder_digest", lambda folder: "w")
    whole = {"missing": 0, "limit": 0, "weights": "w", "questions": 20}
    whole["scores"] = {"overall": {"accuracy": 0.5, "n": 20}}
    for name, change, settings in (
        ("MMStar", {}, {"model": "moved"}),
        ("POPE", {"limit": 20}, {}),
        ("BLINK", {"missing": 1}, {}),
        ("MMVP", {}, {"instruction": "Think."}),
        ("VStar", {"weights": "of another model"}, {}),
        ("HRBench4K", {}, {"max_pixels": 50176}),
        ("WeMath", {}, {"max_new_tokens": 7}),
        ("VisualPuzzles", {}, {"served_model": "m"}),
    ):
        (tmp_path / name).mkdir()
        settings = evaluate.settings_for(BENCHMARKS[name]) | settings
        record = {"settings": settings} | whole | change
        (tmp_path / name / "metrics.json").write_text(json.dumps(record))
    assert evaluate.headlines() == {"MMStar/overall": 50.0}
    assert "MMStar: of 20 questions, where the benchmark has 1500" in capsys.readouterr().out
    # POPE's number is not known for sure: there is nothing to say
    record = {"settings": evaluate.settings_for(BENCHMARKS["POPE"])} | whole
    (tmp_path / "POPE" / "metrics.json").write_text(json.dumps(record))
    assert set(evaluate.headlines()) == {"MMStar/overall", "POPE/overall"}
    assert "POPE" not in capsys.readouterr().out


def test_the_default_folder_follows_the_models_name(monkeypatch):
    monkeypatch.setattr(launch, "RUN", [])
    for model, out in (
        ("out/gap", "out/eval/gap"),
        ("out/mine/gap", "out/mine/eval/gap"),
        ("toy/base", "out/eval/base"),
        ("/models/Qwen2.5-VL-7B-Instruct/", "out/eval/Qwen2.5-VL-7B-Instruct"),
    ):
        assert launch.folder_of("eval", model) == out
    launch.RUN[:] = ["mine"]  # wherever the model lies, what is written is the run's own
    for model in ("out/gap", "out/mine/gap", "/models/gap/"):
        assert launch.folder_of("eval", model) == "out/mine/eval/gap"


# --- an answer belongs to its question and pixels


@pytest.fixture
def asked(tmp_path):
    """A test set of one question of two pictures, and its answer on the disk."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    images = [str(tmp_path / f"{name}.png") for name in ("a", "b")]
    row = {"id": "1", "question": "Which?", "options": ["x", "y"], "answer": "x", "images": images}
    test = evaluate.TestSet("t", [row], tmp_path / "out", evaluate.JSONL, {}, "key")
    line = {"id": "1", "key": evaluate.row_key("key", row), "raw": "x", "truncated": False}
    write_lines(tmp_path / "out" / "predictions.rank0.jsonl", [line | {"tokens": 3, "latents": 0}])
    return test


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda row: row.update(answer="y"), True),  # graded anew, not asked anew
        (lambda row: row.update(category="more"), True),
        (lambda row: row.update(images=[str(Path(p)) for p in row["images"]]), True),
        (lambda row: os.utime(row["images"][0], (0, 0)), True),
        (lambda row: row.update(images=[shutil.copy(p, p + ".copy") for p in row["images"]]), True),
        (lambda row: row.update(question="Which one?"), False),
        (lambda row: row.update(options=["y", "x"]), False),
        (lambda row: row.update(options=None), False),
        (lambda row: row["images"].reverse(), False),
        (lambda row: row["images"].pop(), False),
        (lambda row: Path(row["images"][1]).write_bytes(b"redrawn"), False),
    ],
)
def test_an_answer_belongs_to_its_question(asked, change, same):
    assert list(evaluate.read_predictions(asked)) == ["1"]
    change(asked.rows[0])
    assert list(evaluate.read_predictions(asked)) == ["1"] * same


def test_a_picture_that_is_replaced_meanwhile(asked, monkeypatch):
    """The answer is to what was there before, and is asked for again."""
    (asked.out / "predictions.rank0.jsonl").unlink()
    (row,) = asked.rows
    line = {"raw": "x", "truncated": False, "tokens": 3, "latents": 0}
    pictures = [b"redrawn", b"redrawn"]  # by the first run alone

    class Replacing:
        def answers(self, rows, keys, has_answered):
            for row in rows:
                Path(row["images"][0]).write_bytes(pictures.pop())
                yield row, line

        def is_whole(self, id, line):
            return True

    for n_asked in (1, 2):
        evaluate.answer_all(asked, Replacing())
        assert len(pictures) == 2 - n_asked
        assert list(evaluate.read_predictions(asked)) == ["1"] * (n_asked - 1)
    evaluate.answer_all(asked, Replacing())
    assert not pictures


def test_a_process_may_claim_again_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "out", str(tmp_path))
    evaluate.claim_rank()
    evaluate.claim_rank()


def test_scores_of_two_settings_never_stand_together(asked, monkeypatch):
    """A kill between the two files of a result leaves one of them."""
    monkeypatch.setattr(evaluate, "folder_digest", str)
    line = read_lines(asked.out / "predictions.rank0.jsonl")[0]
    graded = evaluate.grade(asked, {"1": line})
    evaluate.write_scores(asked, graded, {"scores": {}}, 0)
    assert (asked.out / "metrics.json").exists()

    def killed(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.write_scores(asked._replace(key="another"), graded, {"scores": {}}, 0)
    assert not (asked.out / "metrics.json").exists()


def test_an_answer_stands_over_a_failure_and_another_runs_line(asked):
    (answer,) = read_lines(asked.out / "predictions.rank0.jsonl")
    failed = {"id": "1", "key": answer["key"], "error": "out of memory"}
    others = [answer | {"key": "another", "raw": "z"}, answer | {"id": "2", "raw": "z"}]
    write_lines(asked.out / "predictions.rank1.jsonl", [failed, *others])
    assert evaluate.read_predictions(asked)["1"]["raw"] == "x"
    write_lines(asked.out / "predictions.rank0.jsonl", [])
    assert evaluate.read_predictions(asked)["1"] == failed
    with open(asked.out / "predictions.rank0.jsonl", "a") as f:
        f.write('{"id": "1", "key": "')  # cut off by a kill
    assert evaluate.read_predictions(asked)["1"] == failed


@pytest.mark.parametrize(
    "field, value",
    [("id", 1), ("key", None), ("raw", 7), ("truncated", 0), ("tokens", "3"), ("latents", 1.5)],
)
def test_an_answer_of_another_kind_is_named(asked, field, value):
    path = asked.out / "predictions.rank0.jsonl"
    (answer,) = read_lines(path)
    write_lines(path, [answer | {field: value}])
    with pytest.raises(SystemExit, match="predictions.rank0.jsonl") as e:
        evaluate.read_predictions(asked)
    assert repr(field) in str(e.value)


def test_limits_and_judges_are_checked_before_the_first_answer(tmp_path, base, world, bench_root):
    root, _ = bench_root
    limits = {"min_pixels": 0, "max_pixels": 602112}
    args = args_of(base, root, tmp_path, benchmarks="VSI-Bench,MMVP", **limits)
    text = run("eval.py", *args, ok=False)
    assert "MMVP: min_pixels=" in text and not (tmp_path / "VSI-Bench").exists()
    assert "is above max_pixels=602112; give both" in text
    data = tmp_path / "MMStar.jsonl"  # a file of one's own by the name of a benchmark
    row = json.loads((world / "test.jsonl").read_text().splitlines()[0])
    row["images"] = [str(world / path) for path in row["images"]]
    data.write_text(json.dumps(row | {"aux_images": []}) + "\n")
    args = [f"--model={base}", f"--data={data}", f"--out={tmp_path}/o"]
    args.append("--judge_url=http://localhost:1")
    assert "judge_url: of these none has a judge; HRBench4K" in run("eval.py", *args, ok=False)


CHANGED = {"temperature": 0.5, "top_p": 0.9, "seed": 1, "system": "x", "instruction": "x"}
CHANGED |= {"intervention": "zero", "ema_beta": 0.9, "dtype": "bfloat16", "after_latents": " x"}
CHANGED |= {"latent_size": 3, "max_new_tokens": 7, "min_pixels": 4000, "max_pixels": 5000}


def test_an_answers_key_is_of_all_that_changes_it(world, stages, monkeypatch):
    monkeypatch.setattr(evaluate, "data", str(world / "test.jsonl"))
    monkeypatch.setattr(evaluate, "model", str(TOY))
    seen = {evaluate.load_test_set("").key}
    folders = {"model": str(stages["gap"]), "donor": str(stages["pca"])}
    for name, value in (CHANGED | folders).items():
        with monkeypatch.context() as m:
            m.setattr(evaluate, name, value)
            seen.add(evaluate.load_test_set("").key)
    assert len(seen) == len(CHANGED) + 3


def test_another_file_of_a_benchmark_has_other_answers(tmp_path, bench_root, monkeypatch):
    monkeypatch.setattr(evaluate, "model", str(TOY))
    monkeypatch.setattr(evaluate, "data_root", str(tmp_path))
    keys = set()
    for more in (b"", b"\n"):
        (tmp_path / "POPE.tsv").write_bytes((bench_root[0] / "POPE.tsv").read_bytes() + more)
        keys.add(evaluate.load_test_set("POPE").key)
    assert len(keys) == 2


def test_settings_and_seeds_reach_the_answers(base, world, monkeypatch, tmp_path):
    given, seeds = {}, []

    def stream(*args, **settings):
        given.update(settings)
        seeds.extend(p["seeds"][0] for p in args[3](3))
        return iter(())

    want = {"temperature": 0.7, "top_p": 0.5, "after_latents": " x", "ema_beta": 0.9}
    for name, value in want.items():
        monkeypatch.setattr(evaluate, name, value)
    monkeypatch.setattr(evaluate, "stream", stream)
    test = SimpleNamespace(settings={"max_new_tokens": 12}, out=tmp_path, key="k")
    model = evaluate.Answerer(test, *load_vlm(base), load_processor(base, *PIXELS), None, [])
    rows = list(load_examples(world / "test.jsonl", training=False)[:3])
    list(model.answer_together(evaluate.Waiting(model.prepared(rows, [])), {}))
    assert [given[n] for n in ("temperature", "top_p", "after", "ema_beta")] == [*want.values()]
    assert len(set(seeds)) == 3


def test_an_oracle_feeds_each_row_its_own_pictures(stages, world, monkeypatch):
    monkeypatch.setattr(evaluate, "intervention", "oracle")
    monkeypatch.setattr(evaluate, "model", str(stages["gap"]))
    vlm, tokenizer = load_vlm(stages["gap"])
    model = evaluate.Answerer(None, vlm, tokenizer, None, None, [])
    rows = list(load_examples(world / "train.jsonl")[2:5])  # one has two pictures
    features = real_features(stages["gap"], vlm)
    for row, fed in zip(rows, model.fed_latents(rows), strict=True):
        want = [features([open_image(path)])[0] for path in row["aux_images"]]
        torch.testing.assert_close(fed, torch.stack(want), rtol=1e-4, atol=1e-4)


def test_what_failed_is_wrong_and_what_was_cut_off_no_guess():
    row = {"id": "1", "answer": "A", "options": ["red", "blue"], "images": [], "question": "?"}
    test = SimpleNamespace(rows=[row, row | {"id": "2"}], benchmark=evaluate.JSONL)
    said = {"raw": "Looking closely, A seems", "truncated": False, "tokens": 1, "latents": 0}
    good, cut = (evaluate.grade(test, {"1": said | {"truncated": t}})[0] for t in (False, True))
    assert good["correct"] and not cut["correct"]
    both = evaluate.grade(test, {"1": said, "2": {"error": "x"}})
    assert standings.summary(both)["accuracy"] == 0.5  # what failed is wrong


def test_an_instruction_ends_the_question(monkeypatch):
    monkeypatch.setattr(evaluate, "instruction", " Tag it.")
    row = {"question": "Q", "images": [], "id": "1"}
    assert evaluate.question_text(evaluate.as_asked(row)) == "Q Tag it."
