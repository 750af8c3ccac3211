#!/usr/bin/env bash
# What a GPU must show, in a bounded time, from a bare checkout: nothing is installed and nothing downloaded.
#
#   benchmarks/on_gpu.sh [OUT] [--minutes 9] [--only PART] [--dry-run]
#
# With some minutes more than nine: three calls, each of its own --minutes, with --only correctness, tuning, benchmarks.
# Parts: correctness is gemm and tests, tuning is tune, benchmarks are the others; or one of: gemm (our GEMM, with and
# without the low-rank term, beside cuBLAS on six shapes), tests (every kernel on the GPU, in every dtype), tune (times
# every form, keeps the table that the parts after it choose by), linear, block, stack, gates, memory, roofline, train,
# and compiled: block beside torch.compile, which takes long.
# A part that fails or runs out of its time stops no other.
# OUT gets log.txt, tune.json, results.json, four pictures and summary.txt, which is printed last.
# --dry-run tries the plumbing on a machine without a GPU, at tiny sizes.
# Needs torch, triton, tqdm, numpy, safetensors and pytest; PEFT and transformers to compare with. Without
# matplotlib there are no pictures, without pytest-xdist the tests run one after the other.
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
        *) [ -z "$out" ] || { echo "one OUT at most; got '$out' and '$1'" >&2; exit 2; }; out=$1 ;;
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
    { echo "torch finds no GPU here; --dry-run tries the plumbing without one" >&2; exit 2; }
out=${out:-on-gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
status=0 summary=() left=$((60 * minutes))
: >"$out/log.txt"

# part NAME SHARE COMMAND...: runs a command for at most SHARE percent of what time is left, its output into log.txt;
# "{}" in the command becomes the minutes that a benchmark may start new shapes in, "PART.png" is named after the part
part() {
    local name=$1 share=$2 began=$SECONDS limit code
    shift 2
    [[ -z "$only" || " $only " == *" $name "* ]] || return 0
    [ "${only##* }" != "$name" ] || share=100
    limit=$(((left - SECONDS) * share / 100))
    [ -z "$dry" ] || limit=240
    if [ "$limit" -lt 20 ]; then
        summary+=("$name: left out, $((left - SECONDS))s were left")
        status=1
        return 0
    fi
    # a benchmark finishes the shape that it is at, and one that compiles takes a while
    set -- "${@//\{\}/$(awk "BEGIN {print $limit * 0.7 / 60}")}"
    set -- "${@//PART.png/$name.png}"
    printf '\n=== %s (at most %ss): %s\n' "$name" "$limit" "$*" | tee -a "$out/log.txt"
    # interrupted, pytest still says what failed
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$out/part.txt" 2>&1
    code=$?
    cat "$out/part.txt" >>"$out/log.txt"
    tail -c 1500 "$out/part.txt"
    [ $code -eq 0 ] || status=1
    summary+=("$name: exit $code after $((SECONDS - began))s: $(grep -v '^$' "$out/part.txt" | tail -n 1 | cut -c1-120)")
    rm -f "$out/part.txt"
}

has() { "$python" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"; }

# the option by which PART.png, named after its part, is drawn; none where nothing can draw
plot=()
! has matplotlib || plot=(--plot "$out/PART.png")

bench() { part "$1" "$2" "${prefix[@]}" "$python" -m benchmarks "$1" --minutes {} "${@:3}" --json "$out/results.json"; }

# off by a gate in memory, it multiplies x by W alone: a plain GEMM
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
    # many small compilations: a worker for each core but a few
    workers=$(($(nproc) > 4 ? $(nproc) - 4 : 1))
    # the first two are what our GEMM was made for; of the others some fill the GPU badly with its largest tile
    part gemm 20 "${prefix[@]}" "$python" -m benchmarks linear --minutes {} "${gemm[@]}" --rounds 20 \
        --shapes 8192,4096,4096 8192,4096,14336 2048,4096,4096 2048,4096,1024 512,4096,4096 12608,768,768
    parallel=()
    ! has xdist || parallel=(-n "$workers")
    # pytest-benchmark, where it is installed, warns of xdist, and here a warning is an error
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
