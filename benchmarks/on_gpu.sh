#!/usr/bin/env bash
# What a GPU must show, in a bounded time, from a bare checkout: nothing is installed and nothing downloaded.
#
#   benchmarks/on_gpu.sh [OUT] [--minutes 9] [--only PART] [--dry-run]
#
# Parts: tests (every kernel on the GPU, in every dtype), launches, tune (times every form, keeps the table).
# A part that fails or runs out of its time stops no other. Logs and tables go to OUT, the summary comes last.
# --dry-run tries the plumbing on a machine without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

out=on-gpu minutes=9 only="" dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes) minutes=$2; shift ;;
        --only) only=$2; shift ;;
        --dry-run) dry=1 ;;
        -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
[[ "$minutes" =~ ^[1-9][0-9]*$ ]] || { echo "--minutes must be a positive number; got $minutes" >&2; exit 2; }
[[ "$only" =~ ^(|tests|launches|tune)$ ]] || { echo "--only must be tests, launches or tune; got $only" >&2; exit 2; }
mkdir -p "$out" || exit 2
export PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-cache}"
python=$(command -v python3)
status=0 summary=()

# part NAME SECONDS COMMAND...: runs a command for at most so long, into OUT/NAME.log
part() {
    local name=$1 seconds=$2 began=$SECONDS code
    shift 2
    [ -z "$only" ] || [ "$only" = "$name" ] || return 0
    echo "=== $name (at most ${seconds}s): $*"
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1
    code=$?
    tail -c 2000 "$out/$name.log"
    [ $code -eq 0 ] || status=1
    summary+=("$name: exit $code after $((SECONDS - began))s: $(tail -n 1 "$out/$name.log" | cut -c1-120)")
}

seconds=$((60 * minutes))
if [ -n "$dry" ]; then
    part tests 120 "$python" -m pytest -q -rf -p no:cacheprovider tests/test_gpu.py
    part launches 120 env -u TRITON_INTERPRET "$python" -m benchmarks launches --rows 64 --json "$out/launches.json"
    part tune 120 env TRITON_INTERPRET=1 "$python" -m benchmarks tune --dry-run --out "$out/tune.json"
else
    # many small compilations: a worker for each core but a few
    workers=$(($(nproc) > 4 ? $(nproc) - 4 : 1))
    [ "$only" = tests ] && share=100 || share=55
    part tests $((seconds * share / 100)) "$python" -m pytest -q -rf -m gpu -p no:cacheprovider -n "$workers" \
        tests/test_kernels.py tests/test_one_pass.py tests/test_gpu.py tests/test_tune.py
    part launches 60 "$python" -m benchmarks launches --json "$out/launches.json"
    left=$((seconds - SECONDS))
    part tune $((left > 60 ? left : 60)) "$python" -m benchmarks tune --minutes "$(((left > 90 ? left - 30 : 60) / 60))" \
        --shapes llama3-8b vit-b --rows 16 64 512 2048 8192 --out "$out/tune.json"
fi

{
    "$python" -c "import torch, triton; g = torch.cuda.is_available(); print(torch.cuda.get_device_name() if g else 'no GPU', '· torch', torch.__version__, '· triton', triton.__version__)"
    git rev-parse --short HEAD 2>/dev/null
    printf '%s\n' "${summary[@]}"
} | tee "$out/summary.txt"
exit $status
