"""Compiles every row of the tile tables for its GPU, without a GPU, and reports the kernels that exceed their budget.

    python -m benchmarks aot [--quick] [--target sm_90]... [--kernel one_pass]... [--json FILE]

Run it without --quick after a change to kernels or tiles, under each supported Triton version (15 minutes on two
cores). The tests run it with --quick. Launchers are called on meta tensors and their launches are intercepted, so each
kernel is compiled with the arguments, specialisations and options that a launch on that GPU would have.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from tqdm import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from cotolora.kernels.adapter_grads import Dora, gram, project
from cotolora.kernels.hira import hira
from cotolora.kernels.hira_grads import hira_grads
from cotolora.kernels.low_rank_gemm import HELD_RANKS, low_rank_gemm
from cotolora.kernels.one_pass import one_pass
from cotolora.kernels.one_pass_swapped import one_pass_swapped
from cotolora.kernels.partials import sum_partials
from cotolora.kernels.pre_expand import expand, pre_expand
from cotolora.kernels.row_norm import row_norm
from cotolora.kernels.shrink import shrink
from cotolora.kernels.tiles import PROJECT_MAX_RANK, TABLES, TMA_ARCHITECTURES, UNALIGNED, Row, Stream, Tile, row_for
from cotolora.results import write_json


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the budget of one program (thread block) on it."""

    gpu: GPUTarget
    shared_limit: int  # bytes
    instructions: dict[str, str]  # name → prefix of the instruction in the assembly


NVIDIA = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, NVIDIA),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, NVIDIA),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, NVIDIA),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, {"mfma": "v_mfma"}),
}
# targets for which the "generic" rows are compiled, and the smallest shared memory that any GPU using them has
GENERIC_TARGETS = ("sm_80", "gfx942")
GENERIC_SHARED_LIMIT = 64 * 1024
SCALED = ("one_pass", "one_pass_swapped", "low_rank_gemm", "gram", "project")  # the kernels that DoRA uses as well
GATES = ("none", "device", "rows")  # ordered by the registers they take
# For this target --quick compiles the heaviest case of every kind; for the others only the heaviest of the first kind
# in HEAVIEST that the row supports. No simple rule predicts which case is heaviest. When this choice was made, it
# contained the case with the most registers in 189 of 222 rows under Triton 3.9 and in 191 under 3.6, and found each
# of the 6 rows that exceeded their budget under 3.6.
QUICK_TARGET = "sm_90"
KINDS = ("dropout", "plain", "scaled")
HEAVIEST = dict.fromkeys(("low_rank_gemm", "gram", "project"), ("scaled", "dropout", "plain"))
HEAVIEST |= {"hira": ("plain", "dropout"), "one_pass_swapped": ("dropout", "scaled")}
BARRIER = r"(?m)^\s*(gpu|ttg)\.barrier"
SPILLS = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"


@dataclass(frozen=True)
class Operands:
    """The operands of a launcher, on the meta device: sizes and strides, no memory."""

    m: int
    n: int
    rank: int
    dtype: torch.dtype
    gate: str
    layout: str  # "aligned"; "odd": every stride and size is odd; "ones": sizes of 1, which Triton makes constants
    dropout: bool
    scaled: bool = False  # whether the columns of y are scaled, as DoRA does

    def tensors(self) -> dict[str, Any]:
        """x, weight, bias, a, b, dy, h, p and gate; a seed if there is dropout, a column scale if `scaled`."""
        empty = partial(torch.empty, dtype=self.dtype, device="meta")
        m, n, k, r = self.m, self.n, 1 if self.layout == "ones" else 4096, self.rank
        if self.layout == "odd":
            k, n = k - 3, n - 3
            x, dy, weight = empty(k, m).t(), empty(n, m).t(), empty(n, 2 * k + 1)[:, 1::2]
            a, b, bias = empty(r, k + 1)[:, 1:], empty(r, n).t(), empty(1).expand(n)
            h = p = empty(r, m).t()
        else:
            x, dy, weight, a, b, bias = empty(m, k), empty(m, n), empty(n, k), empty(r, k), empty(n, r), empty(n)
            h = p = empty(m, r)
        gates = (None, empty((), dtype=torch.int32), empty(m, dtype=torch.bool))
        return {
            "x": x, "dy": dy, "weight": weight, "a": a, "b": b, "bias": bias, "h": h, "p": p,
            "gate": dict(zip(GATES, gates, strict=True))[self.gate],
            "scaled": {"column_scale": empty(n, dtype=torch.float32), "u": empty(m, n)} if self.scaled else {},
            "dropped": {"seed": empty((), dtype=torch.int64), "dropout": 0.1} if self.dropout else {},
        }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A launch, its target, and the architecture (`rows`) whose table holds the tile."""

    kernel: str
    target: str
    rows: str
    tile: Tile | Stream
    dtype: str  # followed by the precision if it is float32
    operands: Operands
    tma: bool

    def launch(self) -> None:
        """Calls the launcher with the case's float32 matmul precision, as if on a GPU of its architecture."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.dtype == "float32 tf32" else "highest")
        # these launchers ask for the architecture themselves, beside what the tile says
        modules = ("adapter_grads", "one_pass")
        try:
            with contextlib.ExitStack() as stack:
                for module in modules:
                    asked = f"cotolora.kernels.{module}.architecture"
                    stack.enter_context(mock.patch(asked, return_value=self.rows))
                launch(self.kernel, self.tile, self.tma, self.operands)
        finally:
            torch.set_float32_matmul_precision(before)


@dataclass
class Result:
    """What one compiled kernel of a case uses; `broken` lists the parts of the budget that it exceeds."""

    case: Case
    kernel: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    serialized: bool = False  # ptxas makes each wgmma wait for the previous one
    seconds: float = 0.0
    broken: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The result as one row of the table."""
        case, operands, tile = self.case, self.case.operands, self.case.tile
        sizes = (tile.block_m, tile.block_n, tile.block_k) if isinstance(tile, Tile) else (tile.rows, tile.columns)
        return {
            "kernel": self.kernel,
            "target": case.target,
            "rows": case.rows,
            "tile": f"{'x'.join(map(str, sizes))} w{tile.num_warps} s{tile.num_stages}",
            "rank": operands.rank,
            "dtype": case.dtype,
            "gate": operands.gate,
            "layout": operands.layout + " tma" * case.tma,
            "dropout": operands.dropout,
            "scaled": operands.scaled,
            "registers": self.registers,
            "spill_bytes": self.spill_bytes,
            "shared_bytes": self.shared_bytes,
            "instructions": self.instructions,
            "broken": self.broken,
            "serialized": self.serialized,
            "seconds": self.seconds,
        }


def launch(kernel: str, tile: Tile | Stream, tma: bool, operands: Operands) -> None:
    """Calls every launcher of a kernel family, so that all its kernels are compiled."""
    t = SimpleNamespace(**operands.tensors())
    forward = (t.bias, t.a, t.b, t.gate, 2.0)
    column_scale = t.scaled.get("column_scale")
    dora = Dora(column_scale, column_scale, t.scaled["u"], torch.float32) if operands.scaled else None
    match kernel:
        case "one_pass":
            one_pass(t.x, t.weight, *forward, **t.dropped, **t.scaled, tile=tile)
        case "one_pass_swapped":
            one_pass_swapped(t.x, t.weight, *forward, **t.dropped, **t.scaled, stream=tile, split=2)
        case "pre_expand":
            pre_expand(t.x, *forward, **t.dropped, stream=tile)
            expand(t.p, t.a, t.gate, **t.dropped, stream=tile)
            expand(t.h, t.b.T, t.gate, add=t.dy, stream=tile)
        case "shrink":
            shrink(t.x, t.a, t.gate, 2.0, **t.dropped, stream=tile, split=1)
        case "gram":
            wide, narrow = (t.dy, t.h) if operands.scaled else (t.x, t.p)
            sums, _ = gram(wide, narrow, t.gate, 1.0, torch.float32, **t.dropped, dora=dora, stream=tile, split=2)
            sum_partials(sums, sums)
        case "row_norm":
            row_norm(t.weight, t.a, t.b, 2.0, None, t.bias, t.gate, stream=tile)
        case "hira" if operands.dropout and operands.gate == "rows":
            hira(t.dy, t.weight.T, None, t.b.T, t.a.T, t.gate, 2.0, **t.dropped, drops_input=False, tile=tile)
        case "hira":
            hira(t.x, t.weight, *forward, **t.dropped, tile=tile)
        case "hira_grads":
            hira_grads(t.dy, t.x, t.weight, *forward[1:], torch.float32, torch.float32, **t.dropped, tile=tile, split=2)
        case "project":
            project(t.dy, t.h, t.b, t.gate, 2.0, torch.float32, dora=dora, stream=tile)
        case "low_rank_gemm" if operands.dropout:
            low_rank_gemm(t.dy, t.weight.T, None, t.p, t.a.T, t.gate, **t.dropped, tile=tile, tma=tma)
        case "low_rank_gemm":
            low_rank_gemm(t.x, t.weight, t.bias, t.h, t.b, t.gate, **t.scaled, tile=tile, tma=tma)
            if operands.scaled:
                low_rank_gemm(t.dy, t.weight.T, None, t.p, t.a.T, t.gate, x_scale=column_scale, tile=tile, tma=tma)
        case _:
            raise ValueError(f"kernel must have a case here; got {kernel!r}, a table of kernels/tiles.py without one")


def all_cases(target: str, quick: bool = False) -> Iterator[Case]:
    """The cases of every row of every table for a target; only the heaviest ones if `quick`."""
    for kernel, table in TABLES.items():
        for arch in (target, "generic") if target in GENERIC_TARGETS else (target,):
            for row, tile in [(one, tile) for one in table[arch] for tile in one.tiles]:
                if arch == target or row not in table[target]:
                    precisions = [row.precision] if row.precision else ["ieee", "tf32"]
                    floats = [f"float32 {precision}" for precision in precisions]
                    dtypes = {2: ["bfloat16"], 4: floats, None: ["bfloat16", *floats]}[row.element_size]
                    for dtype in dtypes:
                        yield from row_cases(kernel, arch, target, row, tile, dtype, quick)
                    # one float16 case is enough: it compiles as bfloat16 does, give or take a few registers
                    if row is table[arch][-1] and (not quick or target == QUICK_TARGET):
                        yield list(row_cases(kernel, arch, target, row, tile, "float16"))[-1]
    # Triton compiles an argument equal to 1 as a constant, which selects different operations
    ones = Operands(1, 1, 1, torch.bfloat16, "rows", "ones", dropout=False)
    yield Case("one_pass", target, target, UNALIGNED.tile, "bfloat16", ones, tma=False)


def row_cases(
    kernel: str, arch: str, target: str, row: Row, tile: Tile | Stream, dtype: str, quick: bool = False
) -> Iterator[Case]:  # fmt: skip
    """The cases of a row's tile in one dtype: light ones first, then the heaviest of each kind; fewer if `quick`."""
    m, n = row.max_m or (64 if kernel == "one_pass_swapped" else 8192), row.max_n or 16384
    scalar, precision = getattr(torch, dtype.split()[0]), dtype.partition(" ")[2] or "ieee"
    ranks = [rank for rank in (8, 16, 32, 64, 128, 256) if kernel != "project" or rank <= PROJECT_MAX_RANK]

    def comes_to_row(rank: int, gate: str, layout: str, dropout: bool, scaled: bool) -> bool:
        return row is row_for(
            TABLES[kernel], arch, m, n, rank, element_size=scalar.itemsize, precision=precision,
            aligned=layout == "aligned", selects=gate == "rows" or dropout, scaled=scaled,
        ) and not (dropout and (scaled or kernel == "project"))  # fmt: skip

    with_scale = (False, True) if kernel in SCALED else (False,)
    operands = [o for o in product(ranks, GATES, ("aligned", "odd"), (False, True), with_scale) if comes_to_row(*o)]
    kinds = {
        "plain": [o for o in operands if not o[3] and not o[4]],
        "dropout": [o for o in operands if o[3]],
        "scaled": [o for o in operands if o[4]],
    }
    heaviest = {name: kind[-1] for name, kind in kinds.items() if kind}  # largest rank, row gates, odd strides
    if quick and target != QUICK_TARGET:
        chosen = [heaviest[name] for name in HEAVIEST.get(kernel, KINDS) if name in heaviest]
        # one_pass_swapped has two kernels: one draws the dropout mask, the other applies the scale
        chosen = chosen if kernel == "one_pass_swapped" else chosen[:1]
    else:
        chosen = [*light(kernel, dtype, kinds["plain"], kinds["scaled"], quick), *heaviest.values()]
    for rank, gate, layout, *options in dict.fromkeys(chosen):
        tma = kernel == "low_rank_gemm" and arch in TMA_ARCHITECTURES and layout == "aligned"
        yield Case(kernel, target, arch, tile, dtype, Operands(m, n, rank, scalar, gate, layout, *options), tma)


def light(kernel: str, dtype: str, plain: list[tuple], scaled: list[tuple], quick: bool) -> Iterator[tuple]:
    """The lighter cases of a row that are worth compiling beside its heaviest."""
    smallest = [o for o in plain if o[0] == plain[0][0]]
    if kernel == "one_pass" and dtype == "bfloat16":
        yield from (o for o in smallest if o[1] != "rows")  # test_aot.py compares these
    if kernel == "low_rank_gemm" and dtype == "bfloat16":
        # up to HELD_RANKS, h and B stay in registers during the K loop: this takes more registers than the largest rank
        yield from (o for o in (*plain, *scaled) if o[:3] == (HELD_RANKS, "device", "aligned"))
    if quick:
        return
    yield from scaled[:1]
    yield from [o for o in smallest if o[1] != "none"][:1] if len(plain) > 1 else plain
    if kernel in ("one_pass", "one_pass_swapped") and dtype.startswith("float32"):
        # at any rank, ptxas may spill float32 to fit one more block on the SM
        yield from (o for o in plain if o[1] == plain[-1][1])


def intercept(launch: Callable[[], object]) -> list[tuple[JITFunction, tuple, dict[str, Any]]]:
    """The kernels that `launch` would start, each with its arguments by position and by name."""
    calls = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        calls.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        launch()
    return calls


def specialise(gpu: GPUTarget, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Options, signature, constants and attributes, as Triton's JIT would compute them on `gpu`."""
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    return kernel._pack_args(backend, kwargs, bound, specialization, options)


def compile_for(gpu: GPUTarget, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, str]:
    """The compiled kernel and ptxas's log."""
    options, signature, constants, attributes = specialise(gpu, kernel, args, kwargs)
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a kernel from Triton's cache has no ptxas log
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=gpu, options=options.__dict__)
    return compiled, log.getvalue()


def distinct(cases: Iterable[Case]) -> Iterator[tuple[Case, int]]:
    """Yields each distinct kernel once, as a case and the position of the launch within it."""
    seen = set()
    for case in cases:
        for position, (kernel, args, kwargs) in enumerate(intercept(case.launch)):
            same = (
                case.target,
                case.rows,
                kernel.__name__,
                repr(specialise(TARGETS[case.target].gpu, kernel, args, kwargs)),
            )
            if same not in seen:
                seen.add(same)
                yield case, position


def measure_one(case_and_position: tuple[Case, int]) -> Result:
    """Measures one kernel of a case."""
    case, position = case_and_position
    return measure_kernel(case, *intercept(case.launch)[position])


def measure(case: Case) -> list[Result]:
    """Compiles the kernels of a case and measures each of them."""
    return [measure_kernel(case, *call) for call in intercept(case.launch)]


def measure_kernel(case: Case, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Result:
    """Compiles one kernel and reads its registers, spills, shared memory and matrix instructions."""
    target, result = TARGETS[case.target], Result(case, kernel.__name__.removesuffix("_kernel"))
    start = time.perf_counter()
    try:
        compiled, log = compile_for(target.gpu, kernel, args, kwargs)
    except Exception as error:  # any compiler error is a result to report
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
    # given x, pre_expand reads back the h that other threads wrote; the interpreter cannot show that it waits for them
    if result.kernel == "pre_expand" and args[0] is not None and not re.search(BARRIER, compiled.asm["ttgir"]):
        result.broken.append("no barrier")
    return result


def broken(result: Result) -> list[str]:
    """Every part of its target's budget that a compiled kernel exceeds."""
    case, reasons = result.case, []
    float32, nvidia = case.dtype.startswith("float32"), TARGETS[case.target].gpu.backend == "cuda"
    shared_limit = GENERIC_SHARED_LIMIT if case.rows == "generic" else TARGETS[case.target].shared_limit
    if result.spill_bytes > 0:
        reasons.append(f"{result.spill_bytes} bytes of spills")
    if result.shared_bytes > shared_limit:
        reasons.append(f"{result.shared_bytes} bytes of shared memory, {shared_limit} allowed")
    # the other kernels are memory-bound, so serialized wgmma costs them no time
    if result.serialized and result.kernel in ("one_pass", "low_rank_gemm", "hira"):
        reasons.append("serialized wgmma")
    if result.kernel == "sum_partials":
        return reasons
    # the finish kernel has 16 rows, too few for wgmma
    if case.target == "sm_90" and not float32 and result.kernel != "finish" and not result.instructions["wgmma"]:
        reasons.append("no wgmma")
    if case.dtype == "float32 ieee" and nvidia:
        if any(result.instructions.values()):
            reasons.append("a matrix instruction, which rounds float32")
    elif not any(result.instructions.values()):
        reasons.append("no matrix instruction")
    return reasons


def table(results: list[Result]) -> str:
    """The results as text, after a line with the version of Triton."""
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
    """Compiles, prints the table, and returns 1 if any kernel exceeds its budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="compile only the heaviest case of most rows")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this GPU; may be repeated")
    parser.add_argument(
        "--kernel", action="append", choices=TABLES, help="only this table of tiles.py; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: it makes Triton interpret kernels instead of compiling them")
    cases = list(
        distinct(
            case
            for target in options.target or TARGETS
            for case in all_cases(target, options.quick)
            if not options.kernel or case.kernel in options.kernel
        )
    )
    # spawn, because forking after torch has started its threads can hang
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        results = list(tqdm(pool.map(measure_one, cases, chunksize=4), total=len(cases), desc="compiled"))
    print(table(results))
    if options.json:
        write_json(options.json, {"triton": triton.__version__, "results": [result.record() for result in results]})
    return int(any(result.broken for result in results))
