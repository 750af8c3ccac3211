"""Runs compiled kernels by the emulator and compares them with float64. Needs no GPU.

    python -m tests.ptx [--arch sm_80] [--arch sm_90] [--all] [--only WORD] [--staggered] [--barriers]

The PTX that Triton emits for a GPU of capability 8.0 or 9.0 is executed on CPU tensors, in numpy. Unlike Triton's
interpreter, this runs what the compiler made: layouts, swizzles, asynchronous copies, pipelines, barriers, mma, wgmma
and TMA; and bfloat16 is right. One line a case, with its error: in units of what is to be expected, at most 2, of
`trivial` kernels and rows of the tile tables; in units of PyTorch's own error in the same dtype for y and each gradient
of whole layers. A last line counts. What is compiled is kept beside Triton's cache.

Reported besides wrong numbers: accesses outside the given tensors (element by element: gaps of strided views are
outside) or unaligned; shared memory read before anything wrote it, or while a copy is on its way, or overwritten while
wgmma or TMA still reads it; races between warps of a block (per byte, between two ``bar.sync``, whatever the order of
the warps) and between blocks in global memory; results of wgmma used before their wait; a missing fence.proxy.async;
hangs. ``--staggered`` lets the groups of 4 warps run in turn, and wgmma read as late as it may: then a race that is
reported without it changes the result.

Not covered: the order of threads within a warp; a global read before another block's write; the tensor cores' own
rounding (sums here are float32); time; ptxas, which translates further; atomics, fp8, clusters and warp specialisation,
at which `UnknownError` is raised. ``wgmma.wait_group`` is taken, as by Triton, to complete the reads of all 4 warps of
its group. And what a case does not reach: a branch that no tile takes, a loop that turns once.

``--barriers`` takes out each barrier of each kernel by itself, once with some rows off and once with all rows off, and
lists those that nothing notices. Of sm_80 with Triton 3.9, 284 of 324 are noticed, one_pass left out, which was read
before and has not changed since. The other 40, and the three of row_norm with Triton 3.6, were read in the PTX:

- 15 at the head of a loop (shrink, pre_expand, low_rank_gemm): the same wait and barrier stand at its end, and between
  the two there are only reads.
- 14 after a loop, behind the wait for its last copies (shrink, low_rank_gemm, hira, hira_grads): nothing touches shared
  memory before the next barrier, or before the end of the kernel.
- 7, and those of row_norm, before stores or copies to bytes that nothing has touched since the barrier before (gram,
  hira, hira_grads): Triton sets barriers by buffers, not by bytes.
- 2 of pre_expand, in its source, between the stores of h and its reads: a barrier of the compiler follows them, which
  no rule promises. Another 1 of it, before copies to bytes that only threads of the same warp have read.
- 1 of one_pass_swapped, in a loop over ranks that turns once at rank 16; at rank 144 it is noticed.

`translate` parses PTX; each basic block becomes a Python function over arrays of all threads of many blocks at once.
`machine` runs them, lowest block first, masked where threads diverge. `hopper` adds what sm_90 has. `launch` takes a
launch of Triton, compiles and emulates it. `library` runs whole layers, `rows` every row of the tile tables, `trivial`
kernels to try the emulator on; `cases` lists them all.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import triton
from triton import knobs

from cotolora.kernels.tiles import PROJECT_MAX_RANK, TABLES
from tests.ptx.cases import ARCHITECTURES, all_cases, barrier_case, barriers, outcome


def show_barriers(arch: str, only: str) -> None:
    """Prints a line for each kernel, at a rank of one step and of several."""
    for kernel in TABLES:
        for rank in (16, 144):
            name = f"barriers {arch} {kernel} r{rank}"
            if only not in name or (kernel == "project" and rank > PROJECT_MAX_RANK):
                continue
            for of, count, unnoticed, reached in barriers(barrier_case(kernel, arch, rank)):
                text = f"{count - len(unnoticed)} of {count} noticed, not {unnoticed}, of which reached {reached}"
                print(f"{name}  {of}: {text}", flush=True)


def main() -> int:
    """Runs the cases and returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this; may be repeated")
    parser.add_argument("--all", action="store_true", help="every form, dtype, gate, dropout and rank of layers")
    parser.add_argument("--only", default="", help="only cases with this in their name: 'one_pass sm_90'")
    parser.add_argument("--staggered", action="store_true", help="groups of warps in turn, wgmma as late as it may be")
    parser.add_argument("--barriers", action="store_true", help="only take out barriers, and list those not noticed")
    options = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: with it kernels are interpreted and never compiled")
    torch.set_num_threads(1)
    if options.barriers:
        for arch in options.arch or ARCHITECTURES:
            show_barriers(arch, options.only)
        return 0
    count = wrong = 0
    for arch in options.arch or ARCHITECTURES:
        for name, work in all_cases(arch, options.all):
            if options.only in name:
                text, faults = outcome(work, staggered=options.staggered)
                count, wrong = count + 1, wrong + bool(faults)
                seconds = f"[{time.process_time():.0f} s]"
                print("WRONG" if faults else "ok", name, text, "; ".join(faults), seconds, sep="  ", flush=True)
    if not count:
        parser.error(f"argument --only: no name of a case holds {options.only!r}")
    print(f"triton {triton.__version__}")
    print(f"cases {count}, wrong {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
