"""Launch parameters of the kernels as data: the tile of each kernel by problem size and GPU.

No row has been timed on a GPU. They were chosen from the number of waves, bytes in flight and shared memory, and from
the registers and spills of the compiled kernels, which `python -m benchmarks aot` lists.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one kernel: the tile of one program, the order of the programs, warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8  # row tiles visited together, so that they share a tile of the weight in the L2 cache
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 1  # programs per multiprocessor, for kernels whose programs write several tiles each

    def meta(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # every version's default; Triton 3.9 warns if it is not passed
        }


@dataclass(frozen=True)
class Stream:
    """Launch parameters of a kernel that reads a matrix once: the tile per step, warps and stages."""

    rows: int
    columns: int
    max_ranks: int = 256  # ranks of one program; a larger rank needs several programs, each of which reads the matrix
    num_warps: int = 4
    num_stages: int = 3

    def meta(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch, without the tile: which dimensions it covers differs among the kernels."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


TileOrStream = TypeVar("TileOrStream", Tile, Stream)


@dataclass(frozen=True)
class Row(Generic[TileOrStream]):
    """Launch parameters and the calls to which they apply: sizes up to and including a bound, and kinds of operands.

    None allows any value. There is no bound on K, which determines only the number of steps.
    """

    tile: TileOrStream
    smaller: tuple[TileOrStream, ...] = ()  # smaller tiles for the same calls, from which `tile_by_waves` may choose
    max_m: int | None = None
    max_n: int | None = None
    min_rank: int = 1
    max_rank: int | None = None
    element_size: int | None = None
    precision: str | None = None
    aligned: bool | None = None
    selects: bool | None = None  # whether row gates or dropout mask the update, which needs registers
    scaled: bool | None = None  # whether columns are scaled, which also needs registers

    @property
    def tiles(self) -> tuple[TileOrStream, ...]:
        """Every tile that such a call may use."""
        return (self.tile,) + self.smaller  # noqa: RUF005 (mypy cannot follow it unpacked)

    def applies_to(
        self, m: int, n: int, rank: int, *, element_size: int, precision: str, aligned: bool, selects: bool,
        scaled: bool,
    ) -> bool:  # fmt: skip
        """Whether the row applies to these sizes and operands; scaled columns count as masked, too."""
        sizes = ((m, self.max_m), (n, self.max_n), (rank, self.max_rank))
        kinds = (
            (element_size, self.element_size),
            (precision, self.precision),
            (aligned, self.aligned),
            (selects or scaled, self.selects),
            (scaled, self.scaled),
        )
        return (
            rank >= self.min_rank
            and all(most is None or size <= most for size, most in sizes)
            and all(only is None or kind == only for kind, only in kinds)
        )


# each element needs its own address; more warps with fewer elements each can hold them in registers
UNALIGNED = Row(Tile(64, 64, 32, num_warps=8, num_stages=2), element_size=2, aligned=False)
# NVIDIA has no matrix instruction for full float32: a product holds 16 operands of each row in registers. With tiles of
# this size ptxas may spill a few bytes to fit one more block on an SM. These compile without spills for every BLOCK_R,
# gate and layout in Triton 3.6 and 3.9, and the last row of each kernel in 3.7 and 3.8 as well [compiled]
IEEE = (
    Row(Tile(16, 32, 16, num_warps=8, num_stages=2), min_rank=129, element_size=4, precision="ieee"),
    Row(Tile(16, 64, 16, num_stages=2), max_rank=32, element_size=4, precision="ieee"),
    Row(Tile(16, 64, 16, num_warps=8, num_stages=1), max_rank=64, element_size=4, precision="ieee", aligned=True),
    Row(Tile(32, 32, 16, num_warps=8, num_stages=2), max_rank=64, element_size=4, precision="ieee"),
)
IEEE_ONE_PASS = (*IEEE, Row(Tile(16, 32, 16, num_stages=1), element_size=4, precision="ieee"))
IEEE_LOW_RANK_GEMM = (*IEEE, Row(Tile(16, 32, 16, num_warps=8, num_stages=2), element_size=4, precision="ieee"))
IEEE_SM_90 = (Row(Tile(32, 32, 16, num_warps=8), element_size=4, precision="ieee"),)
IEEE_SM_100 = (
    Row(Tile(32, 32, 32, num_warps=8, num_stages=2), max_rank=32, element_size=4, precision="ieee"),
    Row(Tile(32, 32, 16, num_warps=8), element_size=4, precision="ieee"),
)
# at rank 256, h takes four times the registers of y
LARGE_RANK = (
    Row(Tile(32, 32, 16, num_warps=8, num_stages=2), min_rank=129, element_size=4, precision="tf32"),
    Row(Tile(64, 32, 16, num_warps=8, num_stages=2), min_rank=129, element_size=2, aligned=False),
    Row(Tile(64, 64, 32, num_warps=8), min_rank=129, element_size=2),
)
LARGE_RANK_SMALL = Row(Tile(64, 32, 16, num_warps=8, num_stages=2), min_rank=129, element_size=2)
# small enough for rank 128, at which h takes twice the registers of y
TF32 = Row(Tile(64, 64, 32, num_warps=8), element_size=4, precision="tf32")

# for sm_90 and sm_100
SMALL_ONE_PASS = (Tile(64, 128, 64, num_stages=4), Tile(64, 64, 64, num_stages=4))

# `row_for` takes the first row that applies; the last one of an architecture applies to every call
ONE_PASS: dict[str, tuple[Row[Tile], ...]] = {
    # 108 SMs, 163 KiB
    "sm_80": (
        *LARGE_RANK,
        UNALIGNED,
        *IEEE_ONE_PASS,
        # spills of 8 bytes with block_k 32 and unaligned strides, or with block_k 16 and 16-byte loads
        Row(Tile(64, 64, 32, num_warps=8, num_stages=4), element_size=4, precision="tf32", aligned=True),
        Row(Tile(64, 64, 16, num_warps=8), element_size=4, precision="tf32"),
        # few rows: reading the weight dominates, and tiles of 32 columns give 128 programs for N = 4096
        Row(Tile(16, 32, 128, group_m=1, num_stages=4), max_m=16, max_rank=64),
        Row(Tile(64, 32, 128, group_m=1, num_stages=4), max_m=64, max_n=8192, max_rank=32),
        # a large N gives enough programs; with a large rank, fewer of them should read A
        Row(Tile(64, 64, 64, group_m=1, num_warps=8, num_stages=4), max_m=64),
        Row(Tile(64, 128, 32, num_warps=8, num_stages=4), scaled=True),
        # the usual tile of this GPU; above rank 32, h and y do not fit into the registers together
        Row(
            Tile(128, 128, 32, num_warps=8, num_stages=4),
            (Tile(64, 128, 32, num_warps=8, num_stages=4), Tile(64, 64, 64, num_warps=8, num_stages=4)),
            max_rank=32,
        ),
        Row(Tile(128, 64, 32, num_warps=8, num_stages=4), (Tile(64, 64, 64, num_warps=8, num_stages=4),)),
    ),
    # 132 SMs, 227 KiB; wgmma needs 64 rows for each 4 warps
    "sm_90": (
        *LARGE_RANK,
        UNALIGNED,
        *IEEE_SM_90,
        Row(Tile(64, 64, 32), max_m=64, element_size=4, precision="tf32", aligned=True),
        Row(Tile(128, 64, 32, num_warps=8), element_size=4, precision="tf32", aligned=True),
        TF32,
        # few rows: reading the weight dominates, and tiles of 32 columns give 128 programs for N = 4096. Each has
        # 5 stages of 8 KiB; 4.3 TB/s with a latency of 0.7 µs needs 23 KiB in flight on each SM
        Row(Tile(64, 32, 128, group_m=1, num_stages=5), max_m=64, max_n=8192, max_rank=32),
        # a large N gives enough programs, two per SM; with a large rank, fewer of them should read A
        Row(Tile(64, 64, 64, group_m=1, num_stages=5), max_m=64),
        # with row gates and u as a second result, 128 columns spill
        Row(Tile(128, 64, 64, num_warps=8, num_stages=4), scaled=True),
        # the widest tile, in which 16 ranks add 1/16 to the multiply-adds; row gates store y twice, which spills
        Row(
            Tile(128, 256, 64, num_warps=8),
            (Tile(128, 128, 64, num_warps=8, num_stages=4), *SMALL_ONE_PASS),
            max_rank=64,
            selects=False,
        ),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4), SMALL_ONE_PASS, max_rank=64),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4), (Tile(64, 64, 64, num_stages=4),)),
    ),
    # 148 SMs, 227 KiB; tcgen05 needs 64 rows and keeps y in tensor memory
    "sm_100": (
        *LARGE_RANK,
        UNALIGNED,
        *IEEE_SM_100,
        Row(Tile(64, 64, 32), max_m=64, element_size=4, precision="tf32", aligned=True),
        Row(Tile(128, 64, 32, num_warps=8), element_size=4, precision="tf32", aligned=True, selects=False),
        Row(Tile(64, 64, 64, num_warps=8, num_stages=2), element_size=4, precision="tf32", aligned=True),
        # a third stage spills 8 bytes in Triton 3.8
        Row(Tile(64, 64, 32, num_warps=8, num_stages=2), element_size=4, precision="tf32"),
        # as on sm_90, which has fewer SMs and is the same otherwise
        Row(Tile(64, 32, 128, group_m=1, num_stages=5), max_m=64, max_n=8192, max_rank=32),
        Row(Tile(64, 64, 64, group_m=1, num_stages=5), max_m=64),
        # 128 rows spill 8 bytes in Triton 3.7 and 3.8
        Row(Tile(64, 64, 64, num_warps=8), scaled=True),
        # up to rank 64, 4 warps are enough to read 128 columns of y from tensor memory
        Row(
            Tile(128, 256, 64, num_warps=8),
            (Tile(128, 128, 64, num_stages=4), *SMALL_ONE_PASS),
            max_rank=64,
            selects=False,
        ),
        Row(Tile(128, 128, 64, num_stages=4), SMALL_ONE_PASS, max_rank=64),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4), (Tile(64, 64, 64, num_stages=4),)),
    ),
    # 304 CUs, 64 KiB and therefore two stages; full float32 has matrix instructions
    "gfx942": (
        LARGE_RANK_SMALL,
        UNALIGNED,
        Row(Tile(64, 64, 32, num_stages=2), element_size=4),
        # few rows: narrow tiles give enough programs for the many CUs
        Row(Tile(16, 32, 128, group_m=1, num_stages=2), max_m=16),
        Row(
            Tile(128, 128, 64, num_warps=8, num_stages=2),
            (Tile(128, 64, 64, num_warps=8, num_stages=2), Tile(64, 64, 64, num_stages=2)),
        ),
    ),
    # any other GPU: at most 64 KiB, and no more registers than sm_80 has
    "generic": (
        LARGE_RANK_SMALL,
        UNALIGNED,
        *IEEE_ONE_PASS,
        Row(Tile(32, 32, 16, num_warps=8, num_stages=2), element_size=4, precision="tf32"),
        Row(Tile(16, 64, 64, group_m=1, num_stages=2), max_m=16),
        Row(Tile(64, 64, 32, num_stages=2)),
    ),
}


# 4 warps: with 8, ptxas spills to fit one more block on an SM
SCALED_IEEE: Row[Tile] = Row(
    Tile(32, 32, 16, num_stages=2, programs=2),
    min_rank=33, max_rank=64, element_size=4, precision="ieee", aligned=False, scaled=True,
)  # fmt: skip
# for sm_90 and sm_100, with TMA; with row gates or dropout, ptxas serialises the wgmma of tiles of 64 rows
SMALL_LOW_RANK_GEMM = (Tile(64, 128, 64, num_stages=4), Tile(64, 64, 64, num_stages=4))
SELECTING_LOW_RANK_GEMM = Tile(128, 64, 64, num_warps=8, num_stages=4)
LOW_RANK_GEMM: dict[str, tuple[Row[Tile], ...]] = {
    "sm_80": (
        SCALED_IEEE,
        *IEEE_LOW_RANK_GEMM,
        Row(Tile(64, 32, 32, num_warps=8, programs=2), element_size=4),
        Row(Tile(64, 64, 32, num_warps=8, programs=2), aligned=False, scaled=True),
        Row(Tile(128, 64, 32, num_warps=8, programs=2), aligned=False),
        Row(Tile(128, 64, 32, num_warps=8, num_stages=4, programs=2), scaled=True),
        Row(
            Tile(128, 128, 32, num_warps=8, num_stages=4),
            (Tile(128, 64, 32, num_warps=8, num_stages=4, programs=2), Tile(64, 64, 32, num_stages=4, programs=2)),
            max_rank=64,
        ),
        Row(Tile(128, 64, 32, num_warps=8, num_stages=4, programs=2), (Tile(64, 64, 32, num_stages=4, programs=2),)),
    ),
    # aligned rows are for TMA
    "sm_90": (
        Row(Tile(32, 32, 16, num_warps=8, num_stages=2), element_size=4, precision="ieee"),
        Row(Tile(64, 32, 32, num_warps=8, programs=2), element_size=4),
        Row(Tile(64, 64, 64, num_warps=8, programs=2), aligned=False, selects=True),
        # block_k 64 spills 8 bytes without a gate, in Triton 3.6
        Row(Tile(128, 64, 32, num_warps=8, programs=2), aligned=False),
        # masks of row gates or of dropout need registers
        Row(
            Tile(128, 256, 64, num_warps=8),
            (Tile(128, 128, 64, num_warps=8, num_stages=4), *SMALL_LOW_RANK_GEMM),
            selects=False,
        ),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4), (SELECTING_LOW_RANK_GEMM,)),
    ),
    "sm_100": (
        Row(Tile(32, 32, 16, num_warps=8, num_stages=2), element_size=4, precision="ieee"),
        Row(Tile(64, 32, 32, num_warps=8, programs=2), element_size=4),
        Row(Tile(64, 64, 64, num_warps=8, programs=2), aligned=False, scaled=True),
        Row(Tile(128, 64, 64, num_warps=8, programs=2), aligned=False),
        Row(
            Tile(128, 256, 64, num_warps=8),
            (Tile(128, 128, 64, num_warps=8, num_stages=4), *SMALL_LOW_RANK_GEMM),
            selects=False,
        ),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4), (SELECTING_LOW_RANK_GEMM,)),
    ),
    "gfx942": (
        Row(Tile(64, 64, 32, num_stages=2, programs=2), element_size=4),
        Row(Tile(128, 64, 64, num_warps=8, num_stages=2), aligned=False),
        Row(Tile(128, 64, 64, num_warps=8, num_stages=2), scaled=True),
        Row(
            Tile(128, 128, 64, num_warps=8, num_stages=2),
            (Tile(128, 64, 64, num_warps=8, num_stages=2), Tile(64, 64, 64, num_stages=2)),
        ),
    ),
    "generic": (
        SCALED_IEEE,
        *IEEE_LOW_RANK_GEMM,
        Row(Tile(32, 32, 16, num_warps=8, num_stages=2, programs=2), element_size=4, scaled=True),
        Row(Tile(32, 32, 32, num_warps=8, num_stages=2, programs=2), element_size=4),
        Row(Tile(64, 64, 32, num_warps=8, num_stages=2, programs=2)),
    ),
}

# rows of W, columns of K; 5 stages of 8 KiB of W each
ONE_PASS_SWAPPED: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(32, 16, num_warps=8), element_size=4),
        Row(Stream(64, 64, num_warps=4 if arch == "sm_100" else 8), aligned=False),
        Row(
            Stream(64, 64, num_warps=8 if arch == "sm_100" else 4, num_stages=2 if arch in ("gfx942", "generic") else 5)
        ),
    )
    for arch in ONE_PASS
}

# with 8192 rows an SM has one program: three stages of 16 KiB in flight are twice what its share of 4.3 TB/s with a
# latency of 0.7 µs needs. With few rows, small steps give more splits of K and fill more SMs
SHRINK_MANY_ROWS = (
    Row(Stream(64, 64), max_m=1024, max_rank=64),
    Row(Stream(64, 128, num_warps=8, num_stages=4), max_rank=64, aligned=True),
)
# kernels that read a matrix once are memory-bound; small tiles leave room for several programs per SM
SHRINK: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(32, 32, max_ranks=32, num_stages=2), element_size=4),
        *(SHRINK_MANY_ROWS if arch == "sm_90" else ()),
        Row(Stream(64, 64), max_rank=64),
        Row(Stream(64, 64, max_ranks=128, num_warps=8)),
    )
    for arch in ONE_PASS
}
GRAM: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(16, 32, max_ranks=32, num_warps=4 if arch == "sm_100" else 8, num_stages=2), element_size=4),
        Row(Stream(64, 64, max_ranks=64, num_warps=8)),
    )
    for arch in ONE_PASS
}
# each tile of columns writes its own part of p, each split of the rows its own part of dB; `stream_by_parts` weighs
# both. At ranks of whole 16-byte loads an SM of sm_90 runs two of the widest; at others they fill its registers
WIDE_PROJECT = (Stream(32, 512, num_warps=8), Stream(32, 256, num_warps=8), Stream(32, 128, num_warps=8))
WIDE_PROJECT_ROWS = tuple(
    Row(WIDE_PROJECT[0], WIDE_PROJECT[1:], min_rank=rank, max_rank=rank, scaled=False) for rank in (16, 32)
)
PROJECT: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(16, 32, num_warps=8, num_stages=2), element_size=4),
        Row(Stream(32, 64, num_warps=8 if arch == "sm_100" else 4), aligned=False),
        *((Row(Stream(32, 64, num_warps=8), scaled=True),) if arch in ("sm_80", "sm_100", "generic") else ()),
        *(WIDE_PROJECT_ROWS if arch == "sm_90" else ()),
        Row(Stream(32, 128, num_warps=4 if arch == "gfx942" else 8)),
    )
    for arch in ONE_PASS
}
PRE_EXPAND: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(16, 16, max_ranks=16, num_stages=2), element_size=4, precision="ieee"),
        Row(Stream(16, 16 if arch in ("sm_80", "sm_90") else 32, max_ranks=16, num_stages=2), element_size=4),
        Row(Stream(64, 32 if arch == "sm_100" else 64, max_ranks=64, num_warps=8)),
    )
    for arch in ONE_PASS
}

# rows of W, columns of K: few rows give many programs, all of which read the small A from the L2; W is read once
ROW_NORM: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(16, 32, max_ranks=16, num_warps=8, num_stages=2), element_size=4),
        Row(Stream(16, 64, max_ranks=32, num_warps=8, num_stages=2), aligned=False),
        Row(Stream(16, 128, max_ranks=64, num_stages=2 if arch in ("gfx942", "generic") else 4), max_rank=64),
        Row(Stream(16, 64, max_ranks=64, num_stages=2 if arch in ("gfx942", "generic") else 3)),
    )
    for arch in ONE_PASS
}
# tiles of y transposed: block_n counts rows of W, for which W ∘ B A is computed in registers. wgmma needs 64 of them;
# if x has few rows, reading W dominates, and 64 give the most programs
HIRA_FLOAT32_OR_UNALIGNED = (
    Row(Tile(32, 32, 16, num_warps=8, num_stages=2), element_size=4),
    Row(Tile(32, 64, 16, num_warps=8, num_stages=2), aligned=False),
)
HIRA_SMALL = (
    *HIRA_FLOAT32_OR_UNALIGNED,
    Row(Tile(32, 64, 16, group_m=1, num_warps=8, num_stages=2), max_m=64),
    Row(Tile(32, 64, 16, num_warps=8, num_stages=2), min_rank=65),
    Row(Tile(64, 64, 32, num_warps=8, num_stages=2)),
)
HIRA_FEW_ROWS = Row(Tile(32, 64, 64, group_m=1, num_warps=8), max_m=64)
HIRA_SELECTING = Row(Tile(64, 128, 64, num_warps=8), (Tile(64, 64, 64, num_warps=8),), selects=True)
HIRA_SM_90 = (
    *HIRA_FLOAT32_OR_UNALIGNED,
    HIRA_FEW_ROWS,
    Row(Tile(64, 64, 64, num_warps=8), min_rank=129, selects=True),
    HIRA_SELECTING,
    # with 128 columns, ptxas serialises the wgmma [compiled]
    Row(Tile(128, 64, 64, num_warps=8), (Tile(64, 64, 64, num_warps=8),)),
)
# at rank 256 Triton 3.6 takes up to twice the shared memory of 3.9: 64 columns and two stages fit in both [compiled]
HIRA_SM_100 = (
    *HIRA_FLOAT32_OR_UNALIGNED,
    Row(Tile(32, 64, 64, group_m=1, num_warps=8, num_stages=2), max_m=64, min_rank=129),
    Row(Tile(64, 64, 64, num_warps=8, num_stages=2), min_rank=129, selects=True),
    Row(Tile(128, 64, 64, num_warps=8, num_stages=2), min_rank=129),
    HIRA_FEW_ROWS,
    HIRA_SELECTING,
    Row(
        Tile(128, 128, 64, num_warps=8, num_stages=2),
        (Tile(128, 64, 64, num_warps=8), Tile(64, 64, 64, num_warps=8)),
    ),
)
# tiles of block_n x block_k of the weight, block_m rows of x and dy per step
HIRA_GRADS_SMALL = (
    Row(Tile(16, 32, 32, num_warps=8, num_stages=2), element_size=4),
    Row(Tile(32, 64, 64, num_warps=8, num_stages=2)),
)
HIRA_GRADS_LARGE = (
    Row(Tile(16, 32, 32, num_warps=8, num_stages=2), element_size=4),
    Row(Tile(32, 64, 64, num_warps=8, num_stages=2), aligned=False),
    Row(Tile(64, 128, 128, num_warps=8), (Tile(64, 64, 128, num_warps=8),)),
)
HIRA: dict[str, tuple[Row[Tile], ...]] = {
    arch: {"sm_90": HIRA_SM_90, "sm_100": HIRA_SM_100}.get(arch, HIRA_SMALL) for arch in ONE_PASS
}
HIRA_GRADS: dict[str, tuple[Row[Tile], ...]] = {
    arch: HIRA_GRADS_SMALL if arch in ("gfx942", "generic") else HIRA_GRADS_LARGE for arch in ONE_PASS
}

TABLES: dict[str, dict[str, tuple[Row[Any], ...]]] = {
    "one_pass": ONE_PASS,
    "one_pass_swapped": ONE_PASS_SWAPPED,
    "low_rank_gemm": LOW_RANK_GEMM,
    "shrink": SHRINK,
    "gram": GRAM,
    "project": PROJECT,
    "pre_expand": PRE_EXPAND,
    "row_norm": ROW_NORM,
    "hira": HIRA,
    "hira_grads": HIRA_GRADS,
}


def row_for(
    table: dict[str, tuple[Row[TileOrStream], ...]], arch: str, m: int, n: int, rank: int,
    *, element_size: int, precision: str, aligned: bool = True, selects: bool = False, scaled: bool = False,
) -> Row[TileOrStream]:  # fmt: skip
    """The first row of a table that applies to ``y [m, n]`` and the kinds of its operands."""
    return next(
        row
        for row in table[arch]
        if row.applies_to(
            m, n, rank, element_size=element_size, precision=precision, aligned=aligned, selects=selects, scaled=scaled
        )
    )


# for each row and BLOCK_N of dy, `project` writes 4 R bytes of p and reads them again: above this rank it is cheaper to
# read dy twice
PROJECT_MAX_RANK = 32
TMA_ARCHITECTURES = ("sm_90", "sm_100")
# assumed if there is no device to ask: A100, H100 or H200, B200, MI300X, and a small GPU
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "generic": 64}


def multiprocessors(arch: str, device: torch.device) -> int:
    """The number of multiprocessors of a device; without a GPU, the assumption in `MULTIPROCESSORS`."""
    return _multiprocessors(device) if device.type == "cuda" else MULTIPROCESSORS[arch]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# speed-up of a tile of twice the size, which reads each operand less often; assumed, not measured
GAIN_OF_TWICE = 1.18


def fill(rows: int, columns: int, block_rows: int, block_columns: int, multiprocessors: int) -> float:
    """The share of the work in whole waves of tiles that belongs to ``[rows, columns]``.

    A wave is one tile per multiprocessor, regardless of how many programs it runs, because they share its matrix units.
    """
    tiles = -(-rows // block_rows) * -(-columns // block_columns)
    waves = max(1, -(-tiles // multiprocessors))
    return rows * columns / (waves * multiprocessors * block_rows * block_columns)


def tile_by_waves(
    row: Row[Tile], rows: int, columns: int, multiprocessors: int, *, sides: tuple[str, str] = ("block_m", "block_n")
) -> Tile:  # fmt: skip
    """The largest tile of a row for a result ``[rows, columns]``, unless a smaller one fills the GPU clearly better.

    "Clearly" means by a factor of `GAIN_OF_TWICE` per halving. `sides`: the fields for a tile's rows and columns.
    """

    def speed(tile: Tile) -> float:
        height, width = (getattr(tile, side) for side in sides)
        return fill(rows, columns, height, width, multiprocessors) * GAIN_OF_TWICE ** math.log2(height * width)

    return max(row.tiles, key=speed)


def tile_for(
    table: dict[str, tuple[Row[Tile], ...]], arch: str, multiprocessors: int, m: int, n: int, rank: int, **kind: Any
) -> Tile:
    """The tile for ``y [m, n]``: chosen by waves from the row that `row_for` finds for the `kind` of operands."""
    return tile_by_waves(row_for(table, arch, m, n, rank, **kind), m, n, multiprocessors)


def splits(multiprocessors: int, tiles: int, steps: int) -> int:
    """The number of programs that share the `steps` of each tile: up to two per multiprocessor, with at least 4 steps.

    A few more than two would need another wave. It is one if the tiles fill three quarters of the GPU, because the
    second launch, which sums the parts, would cost more. The result depends only on the arguments, so that the order of
    summation is the same on all GPUs with the same number of multiprocessors.
    """
    if 4 * tiles >= 3 * multiprocessors:
        return 1
    return max(1, min(2 * multiprocessors // max(tiles, 1), steps // 4))


def stream_by_parts(row: Row[Stream], m: int, n: int, multiprocessors: int) -> Stream:
    """Of the row's tiles for ``dy [m, n]`` that fill the GPU, the one whose programs write the least of p and dB.

    A GPU counts as filled at three quarters, as in `splits`; if no tile fills it, the one with the most programs.
    """

    def rated(stream: Stream) -> tuple[bool, int]:
        tiles = -(-n // stream.columns)
        split = splits(multiprocessors, tiles, -(-m // stream.rows))
        fills = 4 * tiles * split >= 3 * multiprocessors
        return not fills, tiles * m + split * n if fills else -tiles * split

    return min(row.tiles, key=rated)


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture whose rows a device uses: "sm_80", "sm_90", "sm_100", "gfx942", or else "generic"."""
    if device.type != "cuda":
        return "generic"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        # capabilities 9.x and 10.x all have 227 KiB of shared memory; 8.0 has 163, but 8.6 and 8.9 have 99
        name = f"sm_{major}0" if major in (9, 10) or (major, minor) == (8, 0) else "generic"
    return name if name in ONE_PASS else "generic"


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """The precision of `tl.dot` on float32 operands, "tf32" or "ieee", as torch's current matmul setting says."""
    if dtype != torch.float32 or (torch.version.hip and architecture(device) != "gfx942"):
        return "ieee"  # on AMD GPUs, Triton supports "tf32" only on gfx942
    # not allow_tf32, which raises after a program has set fp32_precision
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def is_aligned(matrix: Tensor) -> bool:
    """Whether Triton can prove that 16-byte loads fit: one stride is 1, everything else is a multiple of 16."""
    if 1 not in matrix.stride():
        return False
    inner = matrix.stride().index(1)
    return matrix.data_ptr() % 16 == 0 and matrix.stride(1 - inner) % 16 == 0 and matrix.shape[inner] % 16 == 0
