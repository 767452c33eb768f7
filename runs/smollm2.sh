#!/usr/bin/env bash
# The README's figure, from an empty directory: SmolLM2-135M-Instruct without 20 % of its blocks'
# parameters, repaired and not trained, beside the whole model; perplexity on c4 that calibration
# never saw and on WikiText-2. The cut takes nine minutes on two CPU cores, half a minute on a GPU.
#
#     runs/smollm2.sh DATA DIRECTORY
#
# DATA holds redpajama/c4.jsonl and wikitext2-test.txt. Needed beforehand: `make demo`, which brings
# the model, and `source .venv/bin/activate`. MODEL names another model and SHAPE another shape.
# With PANELS=1 every criterion of docs/one_shot.svg is run as well, which takes hours; what is there
# already is not run again.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=$(realpath "${1:?name the directory with the text}")
model=${MODEL:-$(python -c 'from shearling.commands.demo_run import demo_model; print(demo_model())')}
if [ -e "$model" ]; then model=$(realpath "$model"); fi
mkdir -p "${2:?name a directory for what is made}"
cd "$2"
shape=${SHAPE:-layers=28,mlp=1243}

# Calibration sees the first nine tenths of the documents, evaluation the last.
documents=$(wc -l <"$data/redpajama/c4.jsonl")
head -n $((documents * 9 / 10)) "$data/redpajama/c4.jsonl" >calibration.jsonl
tail -n +$((documents * 9 / 10 + 1)) "$data/redpajama/c4.jsonl" >c4.jsonl
cp "$data/wikitext2-test.txt" wikitext2-test.txt

test -e smaller || shearling prune "$model" --shape "$shape" --calibration calibration.jsonl --output smaller
shearling eval "$model" smaller --text c4.jsonl --text wikitext2-test.txt --window 512 --max-windows 12 --output results
shearling compare "$model" smaller --results results --output figure.html

if [ "${PANELS:-0}" = 1 ]; then
    SHEARLING_BENCH_DATA=$data SHEARLING_BENCH_MODEL=$model python "$repository/benchmarks/one_shot.py"
    python "$repository/benchmarks/plot_one_shot.py"
fi
