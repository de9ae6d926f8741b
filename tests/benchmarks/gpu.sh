#!/usr/bin/env bash
# The three benchmarks on a GPU, on a machine that has the packages but not holdfast itself: nothing is installed.
#
#     bash tests/benchmarks/gpu.sh
#
# SITE: folder of the packages, where Python does not find them by itself. PYTHON: the interpreter. LIMIT, TOTAL: seconds
# for each benchmark and for all. DTYPE: of the models. THREADS: of the processor. DEVICE=cpu runs tiny sizes on a CPU,
# which measure nothing, to try the script.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

# What an installation would give: the package's folders under one name, and a version.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
mkdir -p "$made/path/holdfast" "$made/path/holdfast-$version.dist-info" "$made/tmp"
for part in trainer analysis recipes ds_configs; do
    ln -s "$root/$part" "$made/path/holdfast/$part"
done
printf 'Metadata-Version: 2.1\nName: holdfast\nVersion: %s\n' "$version" >"$made/path/holdfast-$version.dist-info/METADATA"

export PYTHONPATH="$made/path${SITE:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}"
export TMPDIR="$made/tmp" HF_HOME="$made/huggingface" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} PYTHONDONTWRITEBYTECODE=1

limit=${LIMIT:-180}
total=${TOTAL:-420}
flags=(--device cuda --dtype "${DTYPE:-bfloat16}" --threads "${THREADS:-8}")
if [ "${DEVICE:-cuda}" = cpu ]; then
    limit=${LIMIT:-600}
    total=${TOTAL:-1800}
    flags=(--device cpu --dtype "${DTYPE:-float32}" --rounds 2 --rows 8 --length 64 --batch 4 --blocks 2 --width 64 --vocabulary 512)
fi

# A title, then what Python is to run.
run() {
    local title=$1
    shift
    local left=$((total - SECONDS)) start=$SECONDS status=0
    ((left > limit)) && left=$limit
    echo "=== $title"
    if ((left < 5)); then
        echo "--- left out: the $total seconds are over"
        return
    fi
    timeout -k 5 "$left" "$python" -u "$@" 2>&1 || status=$?
    case $status in
    0) echo "--- done in $((SECONDS - start)) s" ;;
    124 | 137) echo "--- STOPPED after $((SECONDS - start)) s" ;;
    *) echo "--- FAILED with exit code $status after $((SECONDS - start)) s" ;;
    esac
}

# One package that does not import (deepspeed without a CUDA toolkit, say) shows its traceback; the others go on.
check='
import importlib, traceback
for name in ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "holdfast.trainer.run"):
    try:
        found = importlib.import_module(name)
        print(name, getattr(found, "__version__", "imported"), flush=True)
    except BaseException:
        print(f"{name} DOES NOT IMPORT:", flush=True)
        traceback.print_exc()
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB")
'
run "packages" -c "$check"
for benchmark in gradient measure penalty; do
    of_it=("${flags[@]}")
    # Steps of a tenth of a second need many to tell.
    if [ $benchmark = penalty ] && [ "${DEVICE:-cuda}" = cuda ]; then of_it+=(--steps 10); fi
    run "$benchmark ${of_it[*]}" "$root/tests/benchmarks/test_${benchmark}_cost.py" "${of_it[@]}"
done
