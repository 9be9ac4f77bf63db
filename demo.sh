#!/usr/bin/env bash
# The stages in order on the toy, from a fresh machine: on two cores 5 minutes with its installation.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/pip ] || python3 -m venv .venv
.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and
    ".venv has Python %d.%d: delete it, and make it with 3.11 or newer" % sys.version_info[:2])'
# not all of it compiled, but what is imported, when it first is: half a minute less
unset PYTHONDONTWRITEBYTECODE
.venv/bin/pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
run() { echo; echo "\$ python $*"; .venv/bin/python "$@"; }

untrained() {
    run fit_pca.py                                     # latent targets and their PCA
    run eval.py --model=toy/base
}
text() {
    run train.py --method=text --out=out/text          # dense-caption SFT on the same data
    run eval.py --model=out/text
}

# two chains of one thread each are 1.4 times as fast as one after the other with two
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
beside() {
    set -m                                             # a process group of its own, to end with us
    "$1" > "out/$1.log" 2>&1 &
    set +m
    trap "kill -- -$! 2> /dev/null || true" EXIT
}
after() {
    wait $! || { cat "out/$1.log"; exit 1; }
    cat "out/$1.log"
}

run toy.py data                                        # images and JSONL from a seed
beside untrained
run sample_difficulty.py                               # 8 answers a question from the base
after untrained
beside text
run train.py                                           # GAP
run eval.py --model=out/gap
run eval.py --model=out/gap --out=out/eval/gap-noise --intervention=noise
run infer.py --show=out/latents.png --aux=out/toy/test/3-aux.png
after text

echo
.venv/bin/python - <<'PY'
import json
print(f"{'held-out accuracy':20}{'2 to 4 moves':>14}{'one move':>10}")
for name in ("base", "text", "gap", "gap-noise"):
    scores = json.load(open(f"out/eval/{name}/metrics.json"))["scores"]
    several = [scores[f"{moves} moves"] for moves in (2, 3, 4)]
    right = sum(part["n"] * part["accuracy"] for part in several)
    share = right / sum(part["n"] for part in several)
    print(f"{name:20}{share:14.3f}{scores['1 moves']['accuracy']:10.3f}")
print("\nwhat the model imagined: out/latents.png")
PY
