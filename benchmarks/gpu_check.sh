#!/usr/bin/env bash
# Everything that a GPU machine is for, in one call: build from source, GPU tests, memory and race checks, benchmarks,
# and the calibrated merge at the size of an 8B model.
#
#     OUT=/tmp/results bash benchmarks/gpu_check.sh
#
# Needs nvcc, a C++ compiler and a CUDA build of torch; installs nothing, downloads nothing and leaves the working tree
# as it is. Writes OUT/<gpu>.json and OUT/<gpu>.log (OUT: benchmarks/results); the JSON is there whatever happens.
#
# Exit code: 0 every step passed, 1 a step failed or ran out of its time, 2 no GPU or no build (nothing else was run),
# 3 nothing failed but a step could not be run here (its reason is in the JSON).
#
# Variables: GPU_CHECK_SECONDS (530) for the whole script, PYTHON (python3), CXX (g++), LORAFORGE_COMMIT.
set -u

self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$self")")
export PYTHON=${PYTHON:-python3} CXX=${CXX:-g++} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
UNAVAILABLE=77 # exit code of a step whose tool does not work on this machine

# ---- the steps: run in the copy of the tree, each a process of its own ----------------------------------------------

step_environment() {
    command -v nvidia-smi >/dev/null || { echo "no NVIDIA GPU: nvidia-smi is not there" >&2; return 1; }
    nvidia-smi || { echo "no NVIDIA GPU: nvidia-smi failed" >&2; return 1; }
    command -v nvcc >/dev/null || { echo "no nvcc in PATH: the extension cannot be built" >&2; return 1; }
    nvcc --version && "$CXX" --version || return 1
    "$PYTHON" -m benchmarks.gpu_results environment "$WORK/environment.json"
}

step_build() {
    # nvcc may be a wrapper or a link: the compiler itself says where its toolkit is.
    CUDA_HOME=$(nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
    [ -n "$CUDA_HOME" ] || CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
    CUDA_HOME=$(cd "$CUDA_HOME" && pwd -P) || return 1
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -m benchmarks.gpu_results arch "$WORK/environment.json") || return 1
    export CUDA_HOME TORCH_CUDA_ARCH_LIST FORCE_CUDA=1 LORAFORGE_REQUIRE_EXT=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
    echo "CUDA_HOME=$CUDA_HOME TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST MAX_JOBS=$MAX_JOBS"
    # An older setuptools refuses the licence field of pyproject.toml; a build in place needs the package's name alone.
    mv pyproject.toml pyproject.aside
    printf '%s\n' '[project]' 'name = "loraforge"' 'version = "0"' '[tool.setuptools]' 'packages = ["loraforge"]' \
        >pyproject.toml
    "$PYTHON" setup.py build_ext --inplace
    local rc=$?
    mv pyproject.aside pyproject.toml
    [ $rc -eq 0 ] || return $rc
    "$PYTHON" -m benchmarks.gpu_results built
}

step_tests() {
    # Warnings of other versions of the libraries are no failure of a kernel: the file's `error` is taken back.
    "$PYTHON" -m pytest -q -ra -p no:cacheprovider -o addopts= -o filterwarnings= -m gpu \
        --continue-on-collection-errors --junitxml="$WORK/tests.xml" tests ||
        return $?
    "$PYTHON" -m benchmarks.gpu_results ran "$WORK/tests.xml"
}

sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not there" >&2; return $UNAVAILABLE; }
    local log=$WORK/sanitizer-$1.log
    local own=()
    # torch asks the driver for symbols that it may not have; our own launches check their codes themselves.
    [ "$1" = memcheck ] && own=(--report-api-errors no)
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${own[@]}" --error-exitcode 86 \
        "$PYTHON" -m benchmarks.gpu_small 2>&1 | tee "$log"
    local rc=${PIPESTATUS[0]}
    if ! grep -q "SUMMARY:" "$log" || grep -q "No attachable process found\|[Dd]evice not supported" "$log"; then
        echo "compute-sanitizer does not work here: $(grep '=====' "$log" | tail -n 1)" >&2
        return $UNAVAILABLE
    fi
    return "$rc"
}

step_memcheck() { sanitize memcheck; }
step_racecheck() { sanitize racecheck; }
step_bench_kernels() { "$PYTHON" -m loraforge bench kernels --device cuda --json; }
step_bench_merge() { "$PYTHON" -m loraforge bench merge --device cuda --json; }
# Two layers of the full width first: what breaks at these shapes breaks in seconds.
step_iteris_two_layers() {
    "$PYTHON" -m benchmarks.iteris_at_size --device cuda --layers 2 --out "$WORK/iteris_two_layers.json"
}
step_iteris_8b() {
    "$PYTHON" -m benchmarks.iteris_at_size --device cuda --method iteris-plus iteris-plus-delta \
        --out "$WORK/iteris_8b.json"
}

if [ "${1:-}" = --step ]; then
    cd "$WORK/tree" || exit 1
    export PYTHONPATH=$PWD
    "step_$2"
    exit $?
fi

# ---- one step after the other ----------------------------------------------------------------------------------------

budget=${GPU_CHECK_SECONDS:-530}
reserve=5 # seconds kept for the results
out=${OUT:-$root/benchmarks/results}
WORK=$(mktemp -d) && mkdir -p "$out" "$WORK/tree" || exit 2
export WORK
SECONDS=0
failed=0 missing=0 stopped=""

record() { # name status rc seconds limit reason
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$@" >>"$WORK/steps.tsv"
    printf '%-18s %-11s rc %-3s %4s s of %s  %s\n' "$@"
}

finish() {
    trap - EXIT INT TERM
    if ! (cd "$WORK/tree" && "$PYTHON" -m benchmarks.gpu_results join "$WORK" "$out" "$SECONDS" "$budget"); then
        failed=1 # not even Python works: say so where the results would be
        printf '{"what": "gpu-check", "ok": false, "error": "%s could not join the results"}\n' "$PYTHON" >"$out/no-gpu.json"
    fi
    rm -rf "$WORK"
    if [ -n "$stopped" ]; then exit 2; fi
    if [ $failed -ne 0 ]; then exit 1; fi
    if [ $missing -ne 0 ]; then exit 3; fi
    exit 0
}
trap finish EXIT
trap 'failed=1; exit 1' INT TERM

run() { # name, most seconds, least seconds that make sense
    local name=$1 limit=$2 least=$3 left started rc status reason
    if [ -n "$stopped" ]; then
        missing=1
        record "$name" "not run" - 0 "$limit" "$stopped"
        return 1
    fi
    left=$((budget - SECONDS - reserve))
    if [ $left -lt "$least" ]; then
        missing=1
        record "$name" "not run" - 0 "$limit" "$left s of the budget left, $least needed"
        return 1
    fi
    [ $left -lt "$limit" ] && limit=$left
    started=$SECONDS
    timeout --signal=TERM --kill-after=5 "$limit" bash "$self" --step "$name" \
        >"$WORK/$name.out" 2>"$WORK/$name.err" </dev/null
    rc=$?
    reason=""
    case $rc in
        0) status=passed ;;
        "$UNAVAILABLE") status=unavailable missing=1 ;;
        124 | 137) status="timed out" failed=1 ;;
        *) status=failed failed=1 ;;
    esac
    [ $rc -eq 0 ] || reason=$(grep -v '^[[:space:]]*$' "$WORK/$name.err" | tail -n 1 | tr '\t' ' ' | cut -c 1-300)
    record "$name" "$status" $rc $((SECONDS - started)) "$limit" "$reason"
    [ $rc -eq 0 ]
}

tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./shared --exclude='*.so' \
    --exclude=__pycache__ --exclude='./.*_cache' --exclude=./.hypothesis -cf - . | tar -C "$WORK/tree" -xf -
if [ -z "${LORAFORGE_COMMIT:-}" ]; then
    LORAFORGE_COMMIT=$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null)
    changed=$(git -C "$root" status --porcelain --untracked-files=no -- loraforge csrc benchmarks 2>/dev/null)
    [ -z "$changed" ] || LORAFORGE_COMMIT="$LORAFORGE_COMMIT+changes"
fi
export LORAFORGE_COMMIT

run environment 120 1 || stopped="there is no GPU to check on"
run build 180 20 || stopped=${stopped:-"there is no build"}
run tests 130 10
run memcheck 75 15
run racecheck 60 15
run bench_kernels 100 10
run bench_merge 60 10
run iteris_two_layers 45 15
run iteris_8b 180 60
