"""Launch parameters of the kernels, as data: which tile a kernel takes for which sizes on which GPU.

No row has been timed on a GPU. They follow from counting waves, bytes in flight and shared memory, and from the
registers and spills that `python -m benchmarks aot` reads out of the compiled kernels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one kernel: what one program covers, the order of the programs, warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8  # row tiles taken together, so that a tile of the weight is read again while the L2 has it
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 1  # on one multiprocessor, where each takes tile after tile

    def meta(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # the default of all versions; left unsaid, Triton 3.9 warns
        }


@dataclass(frozen=True)
class Stream:
    """Launch parameters of a kernel that reads a matrix once: the tile it reads at a time, warps and stages."""

    rows: int
    columns: int
    max_ranks: int = 256  # of one program; a larger rank takes several, and reads the matrix several times
    num_warps: int = 4
    num_stages: int = 3

    def meta(self) -> dict[str, int | bool]:
        """Keyword arguments of the launch, but for the tile, which the kernels name by their own dimensions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


Launch = TypeVar("Launch", Tile, Stream)


@dataclass(frozen=True)
class Row(Generic[Launch]):
    """A tile and what it is for: sizes up to and including a bound, and one kind of operand. None is any.

    There is no bound on K, which sets the number of steps and nothing else.
    """

    tile: Launch
    max_m: int | None = None
    max_n: int | None = None
    min_rank: int = 1
    max_rank: int | None = None
    element_size: int | None = None
    precision: str | None = None
    aligned: bool | None = None
    selects: bool | None = None  # whether row gates or dropout leave out entries, which takes registers
    scaled: bool | None = None  # whether columns are scaled, which does too

    def takes(
        self, m: int, n: int, rank: int, *, element_size: int, precision: str, aligned: bool, selects: bool,
        scaled: bool,
    ) -> bool:  # fmt: skip
        """Whether the row is for these sizes and operands."""
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


# every element has an address of its own, so only more warps per element keep them in registers
UNALIGNED = Row(Tile(64, 64, 32, num_warps=8, num_stages=2), element_size=2, aligned=False)
# NVIDIA has no matrix instruction for full float32: a product holds 16 operands a row in registers. Among tiles of this
# size ptxas may spill a few bytes to fit one more block on the SM; these it leaves alone, for every BLOCK_R, gate and
# layout, in Triton 3.6 and 3.9 alike, and the last of each kernel in 3.7 and 3.8 as well [compiled]
IEEE = (
    Row(Tile(16, 32, 16, num_warps=8, num_stages=2), min_rank=129, element_size=4, precision="ieee"),
    Row(Tile(16, 64, 16, num_stages=2), max_rank=32, element_size=4, precision="ieee"),
    Row(Tile(16, 64, 16, num_stages=1), max_rank=64, element_size=4, precision="ieee", aligned=True),
    Row(Tile(32, 32, 16, num_warps=8, num_stages=2), max_rank=64, element_size=4, precision="ieee"),
)
IEEE_ONE_PASS = (*IEEE, Row(Tile(16, 32, 16, num_stages=1), element_size=4, precision="ieee"))
IEEE_LOW_RANK_GEMM = (*IEEE, Row(Tile(16, 32, 16, num_warps=8, num_stages=2), element_size=4, precision="ieee"))
IEEE_SM_90 = (Row(Tile(32, 32, 16, num_warps=8), element_size=4, precision="ieee"),)
IEEE_SM_100 = (
    Row(Tile(32, 32, 32, num_warps=8, num_stages=2), max_rank=32, element_size=4, precision="ieee"),
    Row(Tile(32, 32, 16, num_warps=8), element_size=4, precision="ieee"),
)
# h of rank 256 takes four times the registers of y
WIDE = (
    Row(Tile(32, 32, 16, num_warps=8, num_stages=2), min_rank=129, element_size=4, precision="tf32"),
    Row(Tile(64, 32, 16, num_warps=8, num_stages=2), min_rank=129, element_size=2, aligned=False),
    Row(Tile(64, 64, 32, num_warps=8), min_rank=129, element_size=2),
)
WIDE_SMALL = Row(Tile(64, 32, 16, num_warps=8, num_stages=2), min_rank=129, element_size=2)
# small enough for rank 128, where h takes twice the registers of y
TF32 = Row(Tile(64, 64, 32, num_warps=8), element_size=4, precision="tf32")

# the first row that takes the operands counts, and the last of an architecture takes what is left
ONE_PASS: dict[str, tuple[Row[Tile], ...]] = {
    # 108 SMs, 163 KiB
    "sm_80": (
        *WIDE,
        UNALIGNED,
        *IEEE_ONE_PASS,
        # 8 bytes of spills with 32 of K and odd strides, or with 16 of K and 16-byte loads
        Row(Tile(64, 64, 32, num_warps=8, num_stages=4), element_size=4, precision="tf32", aligned=True),
        Row(Tile(64, 64, 16, num_warps=8), element_size=4, precision="tf32"),
        # the weight is read once and all else is small: 32 columns make 128 programs of N = 4096
        Row(Tile(16, 32, 128, group_m=1, num_stages=4), max_m=16, max_rank=64),
        Row(Tile(64, 32, 128, group_m=1, num_stages=4), max_m=64, max_n=8192, max_rank=32),
        # a large N has programs enough; a large rank wants A read by fewer of them
        Row(Tile(64, 64, 64, group_m=1, num_warps=8, num_stages=4), max_m=64),
        # too few rows to fill the GPU with 128 x 128
        Row(Tile(64, 128, 32, num_warps=8, num_stages=4), max_m=512),
        Row(Tile(64, 128, 32, num_warps=8, num_stages=4), scaled=True),
        # the usual tile of this GPU; above rank 32 h does not fit beside y
        Row(Tile(128, 128, 32, num_warps=8, num_stages=4), max_rank=32),
        Row(Tile(128, 64, 32, num_warps=8, num_stages=4)),
    ),
    # 132 SMs, 227 KiB; wgmma wants 64 rows for each 4 warps
    "sm_90": (
        *WIDE,
        UNALIGNED,
        *IEEE_SM_90,
        Row(Tile(64, 64, 32), max_m=64, element_size=4, precision="tf32", aligned=True),
        Row(Tile(128, 64, 32, num_warps=8), element_size=4, precision="tf32", aligned=True),
        TF32,
        # the weight is read once and all else is small: 32 columns make 128 programs of N = 4096, 5 stages of 8 KiB
        # of it each; 4.3 TB/s at 0.7 µs want 23 KiB in flight on an SM
        Row(Tile(64, 32, 128, group_m=1, num_stages=5), max_m=64, max_n=8192, max_rank=32),
        # a large N has programs enough, two to an SM; a large rank wants A read by fewer of them
        Row(Tile(64, 64, 64, group_m=1, num_stages=5), max_m=64),
        # row gates and a second result beside y: 128 columns of it spill
        Row(Tile(128, 64, 64, num_warps=8, num_stages=4), scaled=True),
        # 128 programs of [256, 4096], 128 of [512, 4096]
        Row(Tile(64, 128, 64, num_stages=4), max_m=256, max_rank=64),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4), max_m=512),
        # the widest: 16 ranks cost 1/16 more products; row gates store y twice, and that spills
        Row(Tile(128, 256, 64, num_warps=8), max_rank=64, selects=False),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4)),
    ),
    # 148 SMs, 227 KiB; tcgen05 wants 64 rows and keeps y in tensor memory
    "sm_100": (
        *WIDE,
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
        Row(Tile(128, 128, 64, num_stages=4), max_m=512, max_rank=64),
        Row(Tile(128, 256, 64, num_warps=8), max_rank=64, selects=False),
        # 4 warps can read y out of tensor memory, but not above rank 64
        Row(Tile(128, 128, 64, num_stages=4), max_rank=64),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4)),
    ),
    # 304 CUs, 64 KiB, so two stages; matrix instructions exist for full float32
    "gfx942": (
        WIDE_SMALL,
        UNALIGNED,
        Row(Tile(64, 64, 32, num_stages=2), element_size=4),
        # the weight is read once: narrow tiles for the many CUs
        Row(Tile(16, 32, 128, group_m=1, num_stages=2), max_m=16),
        Row(Tile(64, 64, 64, num_stages=2), max_m=512),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=2)),
    ),
    # any other GPU: at most 64 KiB, and no more registers than sm_80 has
    "generic": (
        WIDE_SMALL,
        UNALIGNED,
        *IEEE_ONE_PASS,
        Row(Tile(32, 32, 16, num_warps=8, num_stages=2), element_size=4, precision="tf32"),
        Row(Tile(16, 64, 64, group_m=1, num_stages=2), max_m=16),
        Row(Tile(64, 64, 32, num_stages=2)),
    ),
}


# with eight warps ptxas spills for one more block on the multiprocessor
SCALED_IEEE: Row[Tile] = Row(
    Tile(32, 32, 16, num_stages=2, programs=2),
    min_rank=33, max_rank=64, element_size=4, precision="ieee", aligned=False, scaled=True,
)  # fmt: skip
LOW_RANK_GEMM: dict[str, tuple[Row[Tile], ...]] = {
    "sm_80": (
        SCALED_IEEE,
        *IEEE_LOW_RANK_GEMM,
        Row(Tile(64, 32, 32, num_warps=8, programs=2), element_size=4),
        Row(Tile(64, 64, 32, num_warps=8, programs=2), aligned=False, scaled=True),
        Row(Tile(128, 64, 32, num_warps=8, programs=2), aligned=False),
        Row(Tile(128, 64, 32, num_warps=8, num_stages=4, programs=2), scaled=True),
        Row(Tile(128, 128, 32, num_warps=8, num_stages=4), max_rank=64),
        Row(Tile(128, 64, 32, num_warps=8, num_stages=4, programs=2)),
    ),
    # by TMA where aligned
    "sm_90": (
        Row(Tile(32, 32, 16, num_warps=8, num_stages=2), element_size=4, precision="ieee"),
        Row(Tile(64, 32, 32, num_warps=8, programs=2), element_size=4),
        Row(Tile(64, 64, 64, num_warps=8, programs=2), aligned=False, selects=True),
        # with 64 of K 8 bytes of spills where there is no gate, in Triton 3.6
        Row(Tile(128, 64, 32, num_warps=8, programs=2), aligned=False),
        # too few tiles of 128 x 256 to go round
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4), max_m=1024),
        # rows off or entries dropped of a low-rank term take registers of their own
        Row(Tile(128, 256, 64, num_warps=8), selects=False),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4)),
    ),
    "sm_100": (
        Row(Tile(32, 32, 16, num_warps=8, num_stages=2), element_size=4, precision="ieee"),
        Row(Tile(64, 32, 32, num_warps=8, programs=2), element_size=4),
        Row(Tile(64, 64, 64, num_warps=8, programs=2), aligned=False, scaled=True),
        Row(Tile(128, 64, 64, num_warps=8, programs=2), aligned=False),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4), max_m=1024),
        Row(Tile(128, 256, 64, num_warps=8), selects=False),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=4)),
    ),
    "gfx942": (
        Row(Tile(64, 64, 32, num_stages=2, programs=2), element_size=4),
        Row(Tile(128, 64, 64, num_warps=8, num_stages=2), aligned=False),
        Row(Tile(128, 64, 64, num_warps=8, num_stages=2), scaled=True),
        Row(Tile(128, 128, 64, num_warps=8, num_stages=2)),
    ),
    "generic": (
        SCALED_IEEE,
        *IEEE_LOW_RANK_GEMM,
        Row(Tile(32, 32, 16, num_warps=8, num_stages=2, programs=2), element_size=4, scaled=True),
        Row(Tile(32, 32, 32, num_warps=8, num_stages=2, programs=2), element_size=4),
        Row(Tile(64, 64, 32, num_warps=8, num_stages=2, programs=2)),
    ),
}

# rows of W, columns of K; 3 stages of 8 KiB of W on each of two programs keep 40 KiB in flight on an SM
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

# what reads a matrix once waits for memory: small tiles, which leave room for several programs on a multiprocessor
SHRINK: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(32, 32, max_ranks=32, num_stages=2), element_size=4),
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
# wide, because each tile of columns writes a p of its own
PROJECT: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(16, 32, num_warps=8, num_stages=2), element_size=4),
        Row(Stream(32, 64, num_warps=8 if arch == "sm_100" else 4), aligned=False),
        *((Row(Stream(32, 64, num_warps=8), scaled=True),) if arch in ("sm_80", "sm_100", "generic") else ()),
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

# rows of W, columns of K: W is read once, so few rows make many programs and the small A comes from the L2
ROW_NORM: dict[str, tuple[Row[Stream], ...]] = {
    arch: (
        Row(Stream(16, 32, max_ranks=16, num_warps=8, num_stages=2), element_size=4),
        Row(Stream(16, 64, max_ranks=32, num_warps=8, num_stages=2), aligned=False),
        Row(Stream(16, 128, max_ranks=64, num_stages=2 if arch in ("gfx942", "generic") else 4), max_rank=64),
        Row(Stream(16, 64, max_ranks=64, num_stages=2 if arch in ("gfx942", "generic") else 3)),
    )
    for arch in ONE_PASS
}
# y transposed: its 128 rows are columns of the weight, of which W ∘ B A is made in registers. 64 rows of it are the
# least that wgmma takes, and make the most programs where few rows of x leave nothing to do but read W
HIRA_ODD = (
    Row(Tile(32, 32, 16, num_warps=8, num_stages=2), element_size=4),
    Row(Tile(32, 64, 16, num_warps=8, num_stages=2), aligned=False),
)
HIRA_SMALL = (
    *HIRA_ODD,
    Row(Tile(32, 64, 16, group_m=1, num_warps=8, num_stages=2), max_m=64),
    Row(Tile(32, 64, 16, num_warps=8, num_stages=2), min_rank=65),
    Row(Tile(64, 64, 32, num_warps=8, num_stages=2)),
)
HIRA_FEW_ROWS = Row(Tile(32, 64, 64, group_m=1, num_warps=8), max_m=64)
HIRA_LARGE = (
    Row(Tile(64, 128, 64, num_warps=8), selects=True),
    Row(Tile(128, 128, 64, num_warps=8, num_stages=2)),
)
HIRA_SM_90 = (
    *HIRA_ODD,
    HIRA_FEW_ROWS,
    Row(Tile(64, 64, 64, num_warps=8), min_rank=129, selects=True),
    *HIRA_LARGE,
)
# of rank 256 Triton 3.6 takes up to twice the shared memory of 3.9: 64 columns and two stages fit in both [compiled]
HIRA_SM_100 = (
    *HIRA_ODD,
    Row(Tile(32, 64, 64, group_m=1, num_warps=8, num_stages=2), max_m=64, min_rank=129),
    Row(Tile(64, 64, 64, num_warps=8, num_stages=2), min_rank=129, selects=True),
    Row(Tile(128, 64, 64, num_warps=8, num_stages=2), min_rank=129),
    HIRA_FEW_ROWS,
    *HIRA_LARGE,
)
# block_n by block_k of the weight, block_m rows of x and dy at a time
HIRA_GRADS_SMALL = (
    Row(Tile(16, 32, 32, num_warps=8, num_stages=2), element_size=4),
    Row(Tile(32, 64, 64, num_warps=8, num_stages=2)),
)
HIRA_GRADS_LARGE = (
    Row(Tile(16, 32, 32, num_warps=8, num_stages=2), element_size=4),
    Row(Tile(32, 64, 64, num_warps=8, num_stages=2), aligned=False),
    Row(Tile(64, 128, 128, num_warps=8)),
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


def choose(
    table: dict[str, tuple[Row[Launch], ...]], arch: str, m: int, n: int, rank: int,
    *, element_size: int, precision: str, aligned: bool = True, selects: bool = False, scaled: bool = False,
) -> Row[Launch]:  # fmt: skip
    """The row of a table for ``y [m, n]``, of which kernels that read a matrix once take no notice."""
    return next(
        row
        for row in table[arch]
        if row.takes(
            m, n, rank, element_size=element_size, precision=precision, aligned=aligned, selects=selects, scaled=scaled
        )
    )


# project writes 4 R bytes and reads them again for each BLOCK_N of dy: above this rank a second read of dy is less
PROJECT_MAX_RANK = 32
TMA_ARCHITECTURES = ("sm_90", "sm_100")
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "generic": 64}


def splits(arch: str, tiles: int, steps: int) -> int:
    """Into how many parts `tiles` programs of `steps` steps are split: two programs to a multiprocessor, 4 steps each.

    One, if the tiles fill three quarters of the GPU: the second launch that sums the parts would cost more. A function
    of the architecture and the sizes alone, so that a sum has the same order on every such GPU.
    """
    if 4 * tiles >= 3 * MULTIPROCESSORS[arch]:
        return 1
    return max(1, min(-(-2 * MULTIPROCESSORS[arch] // max(tiles, 1)), steps // 4))


@functools.cache
def architecture(device: torch.device) -> str:
    """Whose rows a device takes: "sm_80", "sm_90", "sm_100", "gfx942", or "generic" for anything else."""
    if device.type != "cuda":
        return "generic"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        # all of 9 and 10 have 227 KiB of shared memory; 8.0 has 163, but 8.6 and 8.9 have 99
        name = f"sm_{major}0" if major in (9, 10) or (major, minor) == (8, 0) else "generic"
    return name if name in ONE_PASS else "generic"


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """What `tl.dot` does to float32 operands, "tf32" or "ieee": as torch's own switch says at the moment."""
    if dtype != torch.float32 or (torch.version.hip and architecture(device) != "gfx942"):
        return "ieee"  # of AMD's GPUs, Triton takes "tf32" on gfx942 alone
    switch = torch.backends.cuda.matmul
    # torch 2.9 brought fp32_precision; a program that sets it can no longer read allow_tf32
    if hasattr(switch, "fp32_precision"):
        return "tf32" if switch.fp32_precision == "tf32" else "ieee"
    return "tf32" if switch.allow_tf32 else "ieee"


def is_aligned(matrix: Tensor) -> bool:
    """Whether Triton can see that 16-byte loads fit: a stride of 1, all else multiples of 16."""
    if 1 not in matrix.stride():
        return False
    inner = matrix.stride().index(1)
    return matrix.data_ptr() % 16 == 0 and matrix.stride(1 - inner) % 16 == 0 and matrix.shape[inner] % 16 == 0
