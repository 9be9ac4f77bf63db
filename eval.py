"""Answer a JSONL test set with a trained folder and score it.

Reads a model folder and a data file; writes <out>/predictions.rank*.jsonl (append-only, one line an answer, resumed
after a kill with any number of ranks) and, once all answers are there, <out>/metrics.json. Ranks share nothing while
they answer; scoring is a separate pass over the files (`--score_only=1`).

    python eval.py                                                # one process
    torchrun --nproc-per-node 8 eval.py --model=out/gap --out=out/eval/gap
"""

import bisect
import json
import math
import re
import string
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from model import (HEAD_FILE, INTERVENTIONS, LATENT_SPAN, append, check_choices, generate, grid_features, key_of,
                   load_examples, load_head, load_latents_file, load_processor, load_vlm, make_prompts, open_append, open_image,
                   override, pick_device, rank_and_world, read_lines, read_safetensors, save_latents_file, seed_of, to_text,
                   weight_stamps, write_then_rename)

# ---------------------------------------------------------------------------------------------------
model = "out/gap"  # a folder from train.py, or any Qwen2.5-VL folder
data = "out/toy/test.jsonl"
out = "out/eval/gap"
instruction = ""  # appended to every question, e.g. "\nPut your final answer in <answer> </answer>."
batch = 100  # questions a batch; 7B on 80 GB: 16
max_new_tokens = 64  # 7B: 2048
temperature = 0.0  # 0 is greedy
top_p = 1.0
seed = 12345
intervention = "clean"  # clean zero noise mean shuffle oracle oracle_pca
donor = ""  # for shuffle: the latents/ folder of a clean run with save_latents=1
save_latents = False  # also write <out>/latents/*.safetensors, a file an answer
ema_beta = 0.0  # > 0: EMA norm calibration of output-as-input latents [paper; 0.9 ours]
min_pixels, max_pixels = 56 * 56, 1280 * 28 * 28
dtype = "float32"  # 7B: bfloat16
limit = 0  # > 0: only the first rows
score_only = False
# ---------------------------------------------------------------------------------------------------

# the answer check, shared with sample_difficulty.py

SPANS = re.compile(r"<(latent|parser|observation)>.*?</\1>|<abs_vis_token>.*?</abs_vis_token>", re.DOTALL)
DECLARED = re.compile(r"answer\s*(?:is|:)\s*(.+)", re.IGNORECASE)


def boxed(text):
    r"""The content of the last balanced \boxed{...}, or None."""
    for at in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(at, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", text[at:i])
    return None


def extract_answer(text):
    """(answer or None, how it was found): one rule for every model, tagged or not; never a guess."""
    open_think = text.rfind("<think>") > text.rfind("</think>")
    text = SPANS.sub(" ", text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text)
    tagged = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, re.DOTALL)
    if tagged:
        inside = boxed(tagged[-1])
        return (tagged[-1].strip() if inside is None else inside.strip()) or None, "answer"
    if (inside := boxed(text)) is not None:
        return inside.strip() or None, "boxed"
    if open_think:
        return None, "truncated"
    if declared := DECLARED.findall(text):
        return declared[-1].strip() or None, "declared"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1], "last line") if lines else (None, "empty")


def normalise(text):
    """Lower case without outer punctuation, articles and extra spaces; numbers in one form (1,000.0 is 1000)."""
    whole = " ".join(text.lower().replace("$", " ").split())
    text = whole.rstrip(string.punctuation + " ").lstrip(string.punctuation.replace("-", "").replace(".", "") + " ")
    text = text or whole  # "<" and ">" are answers, -3 and .5 are numbers
    text = re.sub(r"^(?:the|an?) (?=\w)", "", text)
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return f"{float(plain):.15g}" if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", plain) else text


def letter_of(text):
    """The option letter that an answer starts with, as in "B", "(b)", "B. 12 cm", or None."""
    m = re.match(r"\s*\(?([A-Za-z])(?:\)|[.:)]|\s*$)", text)
    return m[1].upper() if m else None


def is_correct(answer, row):
    """Does an extracted answer agree with a row's gold answer, by letter or by option text where it has `options`?"""
    if answer is None:
        return False
    if normalise(answer) == normalise(row["answer"]):
        return True
    options = row.get("options") or []
    if not options:
        return False

    def index(text):
        if (letter := letter_of(text)) and ord(letter) - 65 < len(options):
            return ord(letter) - 65
        same = [i for i, option in enumerate(options) if normalise(option) == normalise(text)]
        return same[0] if len(same) == 1 else None

    return index(answer) is not None and index(answer) == index(row["answer"])


def wilson(correct, n, z=1.96):
    """The 95 % Wilson interval of an accuracy, as (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, q = correct / n, z * z / n
    mid, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return mid - half, mid + half


# ---------------------------------------------------------------------------------------------------
# test sets: each yields rows {"id", "images", "question", "answer", "category"?, "options"?, "aux_images"?}.
# A public benchmark is one more loader here.


def load_test_set(path):
    rows = load_examples(path, training=False)
    return rows[:limit] if limit else rows


ANSWER_SETTINGS = ("model", "data", "instruction", "max_new_tokens", "temperature", "top_p", "seed", "intervention",
                   "ema_beta", "min_pixels", "max_pixels", "dtype", "donor", "save_latents")  # what changes an answer


def run_key():
    """The key of this run's answers: its settings, the data, the weights and the donors."""
    stamps = weight_stamps(model) + (weight_stamps(donor) if donor else [])
    return key_of({name: globals()[name] for name in ANSWER_SETTINGS} | {"files": stamps}, data)


def latents_name(id):
    """The file name of an example's latents."""
    return f"{seed_of(id):016x}.safetensors"


def read_predictions(rows, key):
    """The predictions of this setting by id, from the files of all ranks."""
    ids = {row["id"] for row in rows}
    found = [p for f in sorted(Path(out).glob("predictions.rank*.jsonl")) for p in read_lines(f)]
    return {p["id"]: p for p in found if p["key"] == key and p["id"] in ids}


def fed_latents(rows, vlm, processor, head, donors):
    """What shuffle and oracle feed, (m, K, d) a row: another example's latents, or the real auxiliary features."""
    if intervention == "shuffle":  # the next file in the order of names, which are hashes of ids
        names = [latents_name(r["id"]) for r in rows]
        return [load_latents_file(donors[bisect.bisect_right(donors, Path(donor) / n) % len(donors)], head) for n in names]
    if not intervention.startswith("oracle"):
        return None
    for r in rows:
        if not r.get("aux_images"):
            raise SystemExit(f"{data}: example {r['id']!r} has no aux_images, which {intervention} feeds")
    mode = read_safetensors(Path(model) / HEAD_FILE, ())[1]["mode"]
    images = [open_image(p) for r in rows for p in r["aux_images"]]
    with torch.inference_mode():
        v = grid_features(vlm, processor, images, head.K, mode)
    return list(v.cpu().split([len(r["aux_images"]) for r in rows]))


def answer_all(rows, key):
    """Answer this rank's share of the rows that have no prediction yet."""
    rank, world = rank_and_world()
    device = pick_device()
    done = read_predictions(rows, key)
    # by position in the file, not among the missing: ranks that start at different moments still split alike
    todo = [row for i, row in enumerate(rows) if i % world == rank and row["id"] not in done]
    vlm, tokenizer = load_vlm(model, getattr(torch, dtype), device)
    processor, head = load_processor(model, min_pixels, max_pixels), load_head(model, device)
    if head is None and intervention != "clean":
        raise SystemExit(f"{model} has no {HEAD_FILE}: the intervention {intervention!r} needs a model with latents")
    donors = sorted(Path(donor).glob("*.safetensors")) if donor else []
    if intervention == "shuffle" and len(donors) < 2:
        raise SystemExit(f"shuffle feeds other examples' latents: donor={donor!r} must be the latents/ folder of a clean run "
                         f"with save_latents=1; it holds {len(donors)} files")
    bar = tqdm(total=len(todo), unit="question", desc=Path(out).name, disable=rank > 0)
    with open_append(Path(out) / f"predictions.rank{rank}.jsonl") as f:
        for i in range(0, len(todo), batch):
            part = todo[i : i + batch]
            asked = [row | {"question": row["question"] + instruction} for row in part]
            answers = generate(
                vlm, head, tokenizer, make_prompts(vlm, tokenizer, processor, asked), max_new_tokens=max_new_tokens,
                temperature=temperature, top_p=top_p, seeds=[seed_of(seed, row["id"]) for row in part],
                intervention=intervention, fed=fed_latents(part, vlm, processor, head, donors), ema_beta=ema_beta)
            for row, (a,) in zip(part, answers):
                raw = to_text(tokenizer, a["ids"])
                answer, method = extract_answer(raw)
                if save_latents and len(a["latents"]) >= head.K:  # before the line that says it is done
                    save_latents_file(Path(out) / "latents" / latents_name(row["id"]), a["latents"], head.K)
                append(f, {"id": row["id"], "key": key, "raw": raw, "extracted": answer, "method": method,
                           "correct": is_correct(answer, row), "truncated": not a["finished"],
                           "tokens": len(a["ids"]), "latents": len(a["latents"])})
            bar.update(len(part))
    bar.close()


def summary(predictions):
    """Accuracy with its interval, and what else a reader needs to trust it."""
    n, correct = len(predictions), sum(p["correct"] for p in predictions)
    mean = lambda field: sum(p[field] for p in predictions) / n  # noqa: E731
    return {"n": n, "accuracy": correct / n, "interval": wilson(correct, n),
            "n_unparsed": sum(p["extracted"] is None for p in predictions),
            "n_truncated": sum(p["truncated"] for p in predictions),
            "opened_latents": sum(LATENT_SPAN in p["raw"] for p in predictions) / n,
            "tokens": mean("tokens"), "latents": mean("latents")}


def score(rows, predictions, key):
    """Print the table and write metrics.json. Raises SystemExit if answers are missing."""
    if missing := [row["id"] for row in rows if row["id"] not in predictions]:
        raise SystemExit(f"{out}: {len(missing)} of {len(rows)} answers are missing (the first is {missing[0]!r}); "
                         "run eval.py again to fill them in")
    groups = defaultdict(list)
    for row in rows:
        groups["overall"].append(predictions[row["id"]])
        if "category" in row:
            groups[str(row["category"])].append(predictions[row["id"]])
    metrics = {name: summary(group) for name, group in groups.items()}
    print(f"\n{model} on {data}, {intervention}")
    print(f"{'':16}{'n':>6}{'accuracy':>10}{'95 % interval':>16}{'unparsed':>10}{'truncated':>10}"
          f"{'latent':>8}{'tokens':>8}{'latents':>8}")
    for name, m in metrics.items():
        low, high = m["interval"]
        print(f"{name:16}{m['n']:6}{m['accuracy']:10.3f}{f'{low:.3f} - {high:.3f}':>16}{m['n_unparsed']:10}"
              f"{m['n_truncated']:10}{m['opened_latents']:8.2f}{m['tokens']:8.1f}{m['latents']:8.1f}")
    settings = {name: globals()[name] for name in ANSWER_SETTINGS}
    text = json.dumps({"settings": settings, "key": key, "scores": metrics}, indent=1)
    write_then_rename(Path(out) / "metrics.json", lambda p: p.write_text(text))


def main():
    check_choices(globals(), intervention=INTERVENTIONS, dtype=("float32", "bfloat16"))
    rows, key = load_test_set(data), run_key()
    if not score_only:
        answer_all(rows, key)
    predictions = read_predictions(rows, key)
    # the rank that finishes last sees all answers and scores them; no rank waits for another
    if len(predictions) == len(rows) or score_only or rank_and_world()[1] == 1:
        score(rows, predictions, key)
    else:
        print(f"rank {rank_and_world()[0]} is done; {len(rows) - len(predictions)} answers are left to other ranks")


if __name__ == "__main__":
    override(globals())
    main()
