"""Compiles every row of the tile tables for its GPU, with no GPU present, and says which kernels break their budget.

    python -m benchmarks aot [--target sm_90]... [--json FILE]

Launchers are called on meta tensors and their launches intercepted, so that what is compiled has the arguments, the
specialisations and the options that a launch on that GPU would have.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from cotolora.kernels.one_pass import one_pass
from cotolora.kernels.tiles import UNALIGNED, Row, Tile, one_pass_row, one_pass_rows


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what one program may use there."""

    gpu: GPUTarget
    shared_limit: int  # bytes
    instructions: dict[str, str]  # name → how the assembly begins it


NVIDIA = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, NVIDIA),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, NVIDIA),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, NVIDIA),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, {"mfma": "v_mfma"}),
}
# where the rows for any other GPU are tried, and the least that such a GPU has
GENERIC_TARGETS = ("sm_80", "gfx942")
GENERIC_SHARED_LIMIT = 64 * 1024
GATES = ("none", "device", "rows")  # by the registers they take
SPILLS = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"


@dataclass(frozen=True)
class Case:
    """One compilation: a launch, its target, and what the table says of it."""

    kernel: str
    target: str
    rows: str  # the architecture in whose table the tile stands
    tile: Tile
    rank: int
    dtype: str  # with the precision, if it is float32
    gate: str
    layout: str
    launch: Callable[[], object]


@dataclass
class Result:
    """What the compiler made of a case; `broken` lists the parts of the budget that it breaks."""

    case: Case
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    serialized: bool = False  # each wgmma waits for the one before
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Everything but the launch, in the order of the table."""
        record = {**vars(self.case), **vars(self)}
        tile = record.pop("tile")
        record["tile"] = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
        order = "kernel target rows tile rank dtype gate layout registers spill_bytes shared_bytes instructions broken"
        return {name: record[name] for name in [*order.split(), "serialized", "seconds"]}


def launch_one_pass(tile: Tile, m: int, n: int, rank: int, dtype: torch.dtype, gate: str, layout: str) -> None:
    """Calls the launcher on operands that have sizes and strides but no memory."""
    empty = partial(torch.empty, dtype=dtype, device="meta")
    k = 1 if layout == "ones" else 4096
    if layout != "odd":
        x, weight, a, b, bias = empty(m, k), empty(n, k), empty(rank, k), empty(n, rank), empty(n)
    else:
        k, n = k - 3, n - 3
        x, weight = empty(k, m).t(), empty(n, 2 * k + 1)[:, 1::2]
        a, b, bias = empty(rank, k + 1)[:, 1:], empty(rank, n).t(), empty(1).expand(n)
    gates = dict(zip(GATES, (None, empty((), dtype=torch.int32), empty(m, dtype=torch.bool)), strict=True))
    one_pass(x, weight, bias, a, b, gates[gate], 2.0, tile=tile)


def one_pass_cases(target: str) -> Iterator[Case]:
    """Every row for a target, with operands that come to it: of the smallest and the largest rank, of any layout."""
    for arch in (target, "generic") if target in GENERIC_TARGETS else (target,):
        for row in one_pass_rows(arch):
            if arch == target or row not in one_pass_rows(target):
                precisions = [row.precision] if row.precision else ["ieee", "tf32"]
                dtypes = [f"float32 {precision}" for precision in precisions] if row.element_size == 4 else ["bfloat16"]
                for dtype in dtypes:
                    yield from one_pass_row_cases(arch, target, row, dtype)
                if row is one_pass_rows(arch)[-1]:
                    yield list(one_pass_row_cases(arch, target, row, "float16"))[-1]
    # an argument that is 1 is a constant to Triton, with operations of its own
    tile = UNALIGNED.tile
    ones = partial(launch_one_pass, tile, 1, 1, 1, torch.bfloat16, "rows", "ones")
    yield Case("one_pass", target, target, tile, 1, "bfloat16", "rows", "ones", ones)


def one_pass_row_cases(arch: str, target: str, row: Row, dtype: str) -> Iterator[Case]:
    """The cases of one row in one dtype, those that take most registers last."""
    m, n = row.max_m or 8192, row.max_n or 16384
    scalar, precision = getattr(torch, dtype.split()[0]), dtype.partition(" ")[2] or "ieee"

    def comes_to_row(rank: int, gate: str, layout: str) -> bool:
        return row is one_pass_row(
            m, n, rank, arch, element_size=scalar.itemsize, precision=precision,
            aligned=layout == "aligned", row_gates=gate == "rows",
        )  # fmt: skip

    operands = [o for o in product((8, 32, 64, 128), GATES, ("aligned", "odd")) if comes_to_row(*o)]
    smallest, largest, greediest = operands[0][0], operands[-1][0], operands[-1][1]
    for rank, gate, layout in operands:
        first = rank == smallest and (gate == "device" or (gate == "none" and dtype == "bfloat16"))
        # ptxas spills float32 for one more block on the SM, at any rank
        if first or (rank == largest and gate == greediest) or scalar == torch.float32:
            launch = partial(launch_one_pass, row.tile, m, n, rank, scalar, gate, layout)
            yield Case("one_pass", target, arch, row.tile, rank, dtype, gate, layout, launch)


def intercept(launch: Callable[[], object]) -> list[tuple[JITFunction, tuple, dict[str, Any]]]:
    """The kernels that `launch` would start, each with its arguments by position and by name."""
    calls = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        calls.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        launch()
    return calls


def compile_for(gpu: GPUTarget, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, str]:
    """The compiled kernel and ptxas's log, specialised on the arguments as Triton's JIT does where it finds `gpu`."""
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # what comes from Triton's cache comes without a log
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=gpu, options=options.__dict__)
    return compiled, log.getvalue()


def measure(case: Case) -> Result:
    """Compiles a case and reads what it takes."""
    target, result = TARGETS[case.target], Result(case)
    start = time.perf_counter()
    try:
        ((kernel, args, kwargs),) = intercept(case.launch)
        precision = case.dtype.partition(" ")[2] or "ieee"
        compiled, log = compile_for(target.gpu, kernel, args, kwargs | {"PRECISION": precision})
    except Exception as error:  # whatever a compiler raises is the finding
        result.broken = [f"does not compile: {error!r}"]
        return result
    result.seconds = round(time.perf_counter() - start, 2)
    result.shared_bytes = compiled.metadata.shared
    if target.gpu.backend == "cuda":
        assembly = compiled.asm["ptx"]
        result.registers = int(re.search(r"Used (\d+) registers", log)[1])
        result.spill_bytes = max(map(int, re.search(SPILLS, log).groups()))
        result.serialized = "wgmma.mma_async instructions are serialized" in log
    else:
        assembly = compiled.asm["amdgcn"]
        result.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        result.spill_bytes = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
    result.instructions = {name: assembly.count(text) for name, text in target.instructions.items()}
    result.broken = broken(result)
    return result


def broken(result: Result) -> list[str]:
    """Every part of its target's budget that a compiled kernel breaks."""
    case, reasons = result.case, []
    float32, nvidia = case.dtype.startswith("float32"), TARGETS[case.target].gpu.backend == "cuda"
    shared_limit = GENERIC_SHARED_LIMIT if case.rows == "generic" else TARGETS[case.target].shared_limit
    if result.spill_bytes > 0:
        reasons.append(f"{result.spill_bytes} bytes of spills")
    if result.shared_bytes > shared_limit:
        reasons.append(f"{result.shared_bytes} bytes of shared memory, {shared_limit} allowed")
    if case.target == "sm_90" and not float32 and not result.instructions["wgmma"]:
        reasons.append("no wgmma")
    if result.serialized:
        reasons.append("serialized wgmma")
    if case.dtype == "float32 ieee" and nvidia:
        if any(result.instructions.values()):
            reasons.append("a matrix instruction, which rounds float32")
    elif not any(result.instructions.values()):
        reasons.append("no matrix instruction")
    return reasons


def table(results: list[Result]) -> str:
    """The results as text, the version of Triton first."""
    cells = [list(results[0].record())[:-2]]
    for result in results:
        values = list(result.record().values())[:-2]
        values[-2] = " ".join(f"{count} {name}" for name, count in values[-2].items() if count)
        values[-1] = "; ".join(values[-1])
        cells.append([str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([f"triton {triton.__version__}", "", *lines])


def main(arguments: list[str]) -> int:
    """Compiles, prints the table, and returns 1 if anything breaks its budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: with it kernels are interpreted and never compiled")
    cases = [case for target in options.target or TARGETS for case in one_pass_cases(target)]
    # spawned: a fork after torch has started its threads can hang
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(measure, cases))
    print(table(results))
    if options.json:
        records = [result.record() for result in results]
        options.json.write_text(json.dumps({"triton": triton.__version__, "results": records}, indent=1))
    return int(any(result.broken for result in results))
