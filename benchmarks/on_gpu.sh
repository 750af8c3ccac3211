#!/usr/bin/env bash
# Runs the checks and measurements that need a GPU, in a bounded time and from a plain checkout. It installs and
# downloads nothing.
#
#   benchmarks/on_gpu.sh [OUT] [--minutes 9] [--only PART] [--dry-run]
#
# If you have more than nine minutes, call it three times, each with its own --minutes: --only correctness, --only tuning
# and --only benchmarks.
# PART is one of the groups correctness (gemm, tests), tuning (tune) and benchmarks (all others), or a single part:
#   gemm      our GEMM, with and without the low-rank term, against cuBLAS on six shapes
#   tests     every kernel on the GPU, in every dtype
#   tune      times every backend and saves the table from which the later parts choose
#   linear, block, stack, gates, memory, roofline, train: the benchmark of that name
#   compiled  block against torch.compile, which takes long
# A part that fails or times out does not stop the others.
# OUT receives log.txt, tune.json, results.json, four pictures and summary.txt, which is printed last.
# --dry-run tests this script on a machine without a GPU, with tiny sizes.
# Requires torch, triton, tqdm, numpy, safetensors and pytest; comparisons require PEFT and transformers. Without
# matplotlib there are no pictures; without pytest-xdist the tests run sequentially.
set -uo pipefail
cd "$(dirname "$0")/.."

parts=(gemm tests tune linear block stack gates memory roofline train compiled)
out="" minutes=9 only="" dry=""
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes) minutes=${2:-}; shift ;;
        --only) only=${2:-}; shift ;;
        --dry-run) dry=1 ;;
        -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
        *) [ -z "$out" ] || { echo "at most one OUT is allowed; got '$out' and '$1'" >&2; exit 2; }; out=$1 ;;
    esac
    shift
done
[[ "$minutes" =~ ^[1-9][0-9]*$ ]] || { echo "--minutes must be a positive number; got '$minutes'" >&2; exit 2; }
case "$only" in
    correctness) only="gemm tests" ;;
    tuning) only=tune ;;
    benchmarks) only="linear block stack gates memory roofline train compiled" ;;
    *) [[ -z "$only" || " ${parts[*]} " == *" $only "* ]] ||
        { echo "--only must be one of correctness tuning benchmarks ${parts[*]}; got '$only'" >&2; exit 2; } ;;
esac
python=$(command -v python3) || { echo "no python3 on the PATH" >&2; exit 2; }
export PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-cache}"
[ -n "$dry" ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "torch finds no GPU; --dry-run tests the script without one" >&2; exit 2; }
out=${out:-on-gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
status=0 summary=() left=$((60 * minutes))
: >"$out/log.txt"

# part NAME SHARE COMMAND...: runs a command for at most SHARE percent of the remaining time and appends its output to
# log.txt; replaces "{}" in the command by the minutes in which a benchmark may start new shapes, and "PART.png" by
# NAME.png
part() {
    local name=$1 share=$2 began=$SECONDS limit code
    shift 2
    [[ -z "$only" || " $only " == *" $name "* ]] || return 0
    [ "${only##* }" != "$name" ] || share=100
    limit=$(((left - SECONDS) * share / 100))
    [ -z "$dry" ] || limit=240
    if [ "$limit" -lt 20 ]; then
        summary+=("$name: skipped, only $((left - SECONDS))s were left")
        status=1
        return 0
    fi
    # only 70 %, because a benchmark finishes the shape it has started, and compiling takes a while
    set -- "${@//\{\}/$(awk "BEGIN {print $limit * 0.7 / 60}")}"
    set -- "${@//PART.png/$name.png}"
    printf '\n=== %s (at most %ss): %s\n' "$name" "$limit" "$*" | tee -a "$out/log.txt"
    # SIGINT, because pytest then still reports the failures
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$out/part.txt" 2>&1
    code=$?
    cat "$out/part.txt" >>"$out/log.txt"
    tail -c 1500 "$out/part.txt"
    [ $code -eq 0 ] || status=1
    summary+=("$name: exit $code after $((SECONDS - began))s: $(grep -v '^$' "$out/part.txt" | tail -n 1 | cut -c1-120)")
    rm -f "$out/part.txt"
}

has() { "$python" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"; }

# the option that draws PART.png; empty without matplotlib
plot=()
! has matplotlib || plot=(--plot "$out/PART.png")

bench() { part "$1" "$2" "${prefix[@]}" "$python" -m benchmarks "$1" --minutes {} "${@:3}" --json "$out/results.json"; }

# with a device gate that is off, the kernel computes only x Wᵀ: a plain GEMM
fused="ours triton:low_rank_gemm"
gemm=(--peers none --contenders "$fused" "$fused off by device gate")

if [ -n "$dry" ]; then
    prefix=(env TRITON_INTERPRET=1)
    part gemm 30 "${prefix[@]}" "$python" -m benchmarks linear --shapes 16,32,48 "${gemm[@]}" --rounds 1
    part tests 30 "$python" -m pytest -q -rf -m "" -p no:cacheprovider tests/kernels/test_gpu.py
    part tune 30 "${prefix[@]}" "$python" -m benchmarks tune --dry-run --out "$out/tune.json"
    tiny=(--rounds 1 --peers peft unsloth torchtune lorafusion)
    bench linear 30 --shapes 16,32,48 "${tiny[@]}" "${plot[@]}"
    prefix=(env -u TRITON_INTERPRET)
    bench block 30 --shapes three-64 --rows 4 "${tiny[@]}" "${plot[@]}"
    part stack 30 "${prefix[@]}" "$python" -m benchmarks stack --widths 64 --rows 4 --rounds 1 \
        --json "$out/results.json"
    bench gates 30 --shapes 16,32,48 --rounds 1
    part memory 30 "$python" -m benchmarks memory --shapes three-64 --rows 16 --json "$out/results.json"
    bench roofline 30 --shapes 16,32,48 --rounds 1 "${plot[@]}"
    part train 30 "$python" -m benchmarks train --steps 4 --layers 2 --hidden 32 --batch 2 --tokens 8 \
        --json "$out/results.json" "${plot[@]}"
else
    prefix=(env -u TRITON_INTERPRET)
    # one worker per core except four, because the tests compile many small kernels
    workers=$(($(nproc) > 4 ? $(nproc) - 4 : 1))
    # the first two shapes suit our GEMM best; with its largest tile, some of the others do not fill the GPU
    part gemm 20 "${prefix[@]}" "$python" -m benchmarks linear --minutes {} "${gemm[@]}" --rounds 20 \
        --shapes 8192,4096,4096 8192,4096,14336 2048,4096,4096 2048,4096,1024 512,4096,4096 12608,768,768
    parallel=()
    ! has xdist || parallel=(-n "$workers")
    # if pytest-benchmark is installed, it warns about xdist, and pytest turns warnings into errors here
    part tests 40 "$python" -m pytest -q -rf -m gpu -p no:cacheprovider -p no:benchmark "${parallel[@]}" \
        tests/kernels/test_kernels.py tests/kernels/test_one_pass.py tests/kernels/test_gpu.py \
        tests/kernels/test_tiles.py tests/kernels/test_compiled.py tests/benchmarks/test_tune.py
    part tune 35 "${prefix[@]}" "$python" -m benchmarks tune --minutes {} \
        --shapes llama3-8b vit-b --rows 16 64 512 2048 8192
    table=$(sed -n 's/^written: //p' "$out/log.txt" | tail -n 1)
    [ -z "$table" ] || cp "$table" "$out/tune.json"
    plain=(--peers peft unsloth torchtune lorafusion)
    bench block 25 "${plain[@]}" "${plot[@]}"
    bench linear 45 "${plain[@]}" --rounds 20 "${plot[@]}"
    part stack 40 "${prefix[@]}" "$python" -m benchmarks stack --rounds 20 --json "$out/results.json"
    bench gates 30 --rounds 20
    bench roofline 40 --rows 512 2048 8192 --rounds 10 "${plot[@]}"
    part memory 40 "${prefix[@]}" "$python" -m benchmarks memory --json "$out/results.json"
    part train 60 "${prefix[@]}" "$python" -m benchmarks train --json "$out/results.json" "${plot[@]}"
    part compiled 90 "${prefix[@]}" "$python" -m benchmarks block --shapes vit-b llama3-8b --peers compile \
        --minutes {} --json "$out/results.json"
fi

{
    "$python" -c "import torch, triton; g = torch.cuda.is_available(); print(torch.cuda.get_device_name() if g else 'no GPU', '· torch', torch.__version__, '· triton', triton.__version__)"
    git rev-parse --short HEAD 2>/dev/null
    has matplotlib || echo "no pictures: matplotlib is not installed"
    [ ! -f "$out/results.json" ] || "$python" -m benchmarks show --brief "$out/results.json"
    printf '%s\n' "${summary[@]}"
} 2>&1 | tee "$out/summary.txt"
exit $status
