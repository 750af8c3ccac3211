"""Cases for the emulator: small kernels, rows of the tile tables, whole layers, and kernels with injected faults.

A case is a function of an `Emulator` that returns a line of figures and a list of errors; `outcome` runs it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from itertools import product

from tests.ptx import trivial
from tests.ptx.launch import Emulator, launches
from tests.ptx.library import Case, run
from tests.ptx.rows import RowCase, case_for, row_cases, run_row

Outcome = tuple[str, list[str]]
Work = Callable[[Emulator], Outcome]

ARCHITECTURES = ("sm_80", "sm_90")
FORMS = ("one_pass", "low_rank_gemm", "pre_expand", "expand", "dora:one_pass", "dora:low_rank_gemm", "hira:hira")
GATES = ("none", "on", "off", "rows", "rows off")
SIZES = (  # m, n, k, rank: odd, aligned, few rows, ranks above those of one program, one of everything
    (70, 136, 72, 5), (70, 144, 80, 16), (37, 136, 72, 16), (130, 100, 60, 40), (5, 133, 71, 3), (300, 272, 160, 64),
    (64, 128, 64, 8), (70, 136, 72, 130), (1, 64, 48, 1), (600, 144, 96, 16),
)  # fmt: skip


def outcome(work: Work, *, staggered: bool = False, change: Callable[[str], str] = str) -> Outcome:
    """Runs a case; returns its figures and all errors. `change` is applied to the PTX."""
    emulator = Emulator(staggered, change)
    try:
        text, wrong = work(emulator)
    except Exception:  # any error of Triton, the launchers or the emulator ends this case, but not the others
        text, wrong = "", [traceback.format_exc(limit=-3)]
    return text, wrong + emulator.errors[:3]


def simple_case(name: str, arch: str) -> Work:
    """A kernel of `trivial`."""

    def work(emulator: Emulator) -> Outcome:
        with launches(emulator, int(arch[3:])):
            return judged(dict(trivial.cases())[name]())

    return work


def row_case(case: RowCase) -> Work:
    """A row of a table, run by its launcher."""
    return lambda emulator: judged(run_row(case, emulator))


def kernel_case(kernel: str, arch: str, dtype: str = "bf16", **kind) -> Work:
    """The row that a kernel uses for operands of a kind, see `case_for`."""
    return row_case(case_for(kernel, arch, dtype, **kind))


def in_turn(*works: Work) -> Work:
    """Several cases as one, which ends with the first that is wrong."""

    def work(emulator: Emulator) -> Outcome:
        text, wrong = "", []
        for one in works:
            text, wrong = one(emulator)
            if wrong or emulator.errors:
                break
        return text, wrong

    return work


def barrier_case(kernel: str, arch: str, rank: int = 16) -> Work:
    """What notices a kernel's barriers: some rows off, then all, where it passes over loops and their barriers."""
    return in_turn(*(kernel_case(kernel, arch, rows=150, rank=rank, gate=gate) for gate in ("rows", "rows off")))


def layer_case(case: Case, arch: str) -> Work:
    """A layer's forward and backward."""

    def work(emulator: Emulator) -> Outcome:
        made = run(case, emulator, int(arch[3:]))
        return made.units, made.wrong

    return work


def judged(error: float) -> Outcome:
    """The error in units of a bound that is rough for cancelling sums; up to two units are accepted."""
    return f"{error:.2f}", [] if error <= 2 else [f"error of {error:.3g} units"]


def layer_cases(everything: bool) -> Iterator[Case]:
    """Whole layers, forward and backward: every kernel and dtype, other options in turn; or all combinations."""
    for turn, (form, dtype) in enumerate(product(FORMS, ("bf16", "fp16", "fp32", "tf32"))):
        drops = 0.0 if form.startswith("dora") else 0.3
        m, n, k, rank = SIZES[turn % len(SIZES)]
        layout, bias = ("plain", "strided")[turn % 5 == 4], turn % 3 != 2
        yield Case(form, dtype, GATES[turn % 5 if turn % 7 else 3], m, n, k, rank, drops * (turn % 2), bias, layout)
    for form in FORMS:  # off must not be a product with zero; and one gate per several rows
        yield Case(form, "bf16", "off", 70, 144, 80, 16, poison=True)
        yield Case(form, "bf16", "rows", 70, 136, 72, 5, batch=10, poison=True)
    if everything:
        for form, dtype, gate, drops, rank in product(FORMS, ("bf16", "fp16", "fp32"), GATES, (0.0, 0.3), (5, 16)):
            if not (form.startswith("dora") and drops):
                yield Case(form, dtype, gate, rank=rank, dropout=drops, batch=35 * (rank == 16))


MATMUL = "matmul bfloat16 ieee 64x64x128 stages 3 warps 4"
THROUGH_REGISTERS = "matmul bfloat16 ieee 37x50x33 stages 2 warps 4"  # before they are written to shared memory
BARRIER = r"bar\.sync\s+0;"
STORE_TO_LOAD = r"st\.global(?:(?!st\.global)(?s:.))*?(?=cp\.async\.c[ag]|ld\.global)"
RETURNS = (
    r"\g<0>\n.reg .b32 %block;\n.reg .pred %is_second;\nmov.u32 %block, %ctaid.x;\n"
    r"setp.eq.s32 %is_second, %block, 1;\n@%is_second ret;\n"
)


def without_barriers(match: re.Match[str]) -> str:
    """The matched text without its barriers."""
    return re.sub(BARRIER, "", match[0])


# name → case, pattern in its PTX, number of replacements (0: all), replacement, GPUs
FAULTS = {
    "a missing barrier of a reduction": ("sum bfloat16", BARRIER, 1, "", ARCHITECTURES),
    "the missing barriers of a product": (MATMUL, BARRIER, 0, "", ARCHITECTURES),
    "the missing barriers of a layer": ("one_pass", BARRIER, 0, "", ARCHITECTURES),
    "a missing barrier between h and its use": ("pre_expand", STORE_TO_LOAD, 1, without_barriers, ARCHITECTURES),
    "a copy not waited for": (MATMUL, r"cp\.async\.wait_group\s+2;", 1, "cp.async.wait_group 3;", ARCHITECTURES),
    "a read outside a tensor": ("add bfloat16", r"setp\.lt\.s32", 1, "setp.ne.s32", ARCHITECTURES),
    "another swizzle of what is written": (MATMUL, r"(xor\.b32 \s*%r\d+, %r\d+), 32;", 1, r"\1, 64;", ("sm_80",)),
    "another swizzle of what is read": (MATMUL, r", 4611686\d{12};", 1, ", -9223371899382267904;", ("sm_90",)),
    "an unwritten tile": ("one_pass", r"\A(?s:.*)\.reg[^;]*;", 1, RETURNS, ARCHITECTURES),
    "a product not waited for": (MATMUL, r"wgmma\.wait_group\.sync\.aligned 0;", 1, "", ("sm_90",)),
    "a missing fence": (THROUGH_REGISTERS, r"fence\.proxy\.async\S*;", 1, "", ("sm_90",)),
    "a TMA copy not waited for": (
        "low_rank_gemm", r"mbarrier\.try_wait[^;]* complete, [^;]*;", 0, "setp.eq.u32 complete, 0, 0;", ("sm_90",)
    ),
}  # fmt: skip


def fault_case(name: str, arch: str) -> Work:
    """Checks that a fault injected into the PTX is detected; a missed fault or an unmatched pattern is an error."""
    kernel, pattern, count, to, _ = FAULTS[name]
    changed = 0

    def change(text: str) -> str:
        nonlocal changed
        text, times = re.subn(pattern, to, text, count=count)
        changed += times
        return text

    def work(_: Emulator) -> Outcome:
        case = simple_case(kernel, arch) if " " in kernel else kernel_case(kernel, arch)
        faults = outcome(case, change=change)[1]
        if not changed:
            return "", ["the PTX has nothing to change"]
        return f"noticed: {faults[:1]}", [] if faults else ["not noticed"]

    return work


def barriers(work: Work) -> Iterator[tuple[str, int, list[int], list[int]]]:
    """For each kernel of a case: the number of barriers, those whose removal is not detected, and which of these run.

    Barriers are removed one at a time, so if two make each other redundant, both removals are undetected.
    """
    emulator = Emulator()
    work(emulator)
    for text, program in emulator.programs.items():
        # a barrier ends a block
        ends = [n for n, block in enumerate(program.kernel.blocks) if block and block[-1].op.startswith("bar.sync")]
        reached = {number for number, _ in program.functions}
        unnoticed = []
        for i, barrier in enumerate(re.finditer(BARRIER, text)):
            without = text[: barrier.start()] + text[barrier.end() :]
            if not outcome(work, change=lambda ptx, text=text, without=without: without if ptx == text else ptx)[1]:
                unnoticed.append(i)
        yield program.kernel.name, len(ends), unnoticed, [i for i in unnoticed if ends[i] in reached]


def all_cases(arch: str, everything: bool) -> Iterator[tuple[str, Work]]:
    """All cases of one GPU, by name."""
    for name, (*_, archs) in FAULTS.items():
        if arch in archs:
            yield f"detects {arch} {name}", fault_case(name, arch)
    for name in dict(trivial.cases()):
        yield f"trivial {arch} {name}", simple_case(name, arch)
    for case in row_cases(arch):
        yield f"row {case}", row_case(case)
    for case in layer_cases(everything):
        yield f"layer {arch} {case}", layer_case(case, arch)
