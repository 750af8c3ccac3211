"""Adds up the parts that several programs wrote, in a fixed order, so that every run on a GPU gives the same bits."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.launching import launch

BLOCK_M, BLOCK_N = 16, 64


@triton.jit
def sum_one(
    partials_ptr, out_ptr, tile, S, M, N, stride_partials_s, stride_out_m, stride_out_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the tile-th [BLOCK_M, BLOCK_N] tile of out, from contiguous partials."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = (tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (rows < M)[:, None] & (columns < N)[None, :]
    ptrs = partials_ptr + rows[:, None] * N + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(S):
        total += tl.load(ptrs, mask=ok, other=0.0)
        ptrs += stride_partials_s
    out_ptrs = out_ptr + rows[:, None] * stride_out_m + columns[None, :] * stride_out_n
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["S0", "M0", "N0", "S1", "M1", "N1"])
def sum_partials_kernel(
    # [S0, M0, N0], [M0, N0]; [S1, M1, N1] or None, [M1, N1] or None
    partials0_ptr, out0_ptr, partials1_ptr, out1_ptr,
    S0, M0, N0, S1, M1, N1,
    stride_partials0_s, stride_out0_m, stride_out0_n,
    stride_partials1_s, stride_out1_m, stride_out1_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes a tile of the first sum, or of the second where there are two."""
    tile = tl.program_id(0)
    tiles0 = tl.cdiv(M0, BLOCK_M) * tl.cdiv(N0, BLOCK_N)
    if tile < tiles0:
        sum_one(
            partials0_ptr, out0_ptr, tile, S0, M0, N0, stride_partials0_s, stride_out0_m, stride_out0_n,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif partials1_ptr is not None:
        sum_one(
            partials1_ptr, out1_ptr, tile - tiles0, S1, M1, N1, stride_partials1_s, stride_out1_m, stride_out1_n,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip


class Sum(NamedTuple):
    """``out [M, N]``, of any strides, is to be the sum over s of ``partials [S, M, N]``, contiguous float32."""

    partials: Tensor
    out: Tensor


def sum_partials(first: Sum, second: Sum | None = None) -> None:
    """Launches `sum_partials_kernel` once, for one sum or two."""
    sums = [first] if second is None else [first, second]
    tiles = sum(triton.cdiv(s.out.shape[0], BLOCK_M) * triton.cdiv(s.out.shape[1], BLOCK_N) for s in sums)
    if tiles == 0:
        return
    tensors = [*first, *(second or (None, None))]
    sizes = [*first.partials.shape, *((0, 0, 0) if second is None else second.partials.shape)]
    strides = [stride for s in sums for stride in (s.partials.stride(0), *s.out.stride())] + [0] * (6 - 3 * len(sums))
    launch(
        sum_partials_kernel, (tiles,),
        *tensors, *sizes, *strides, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
