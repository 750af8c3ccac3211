"""Adds up the parts that several programs wrote, in a fixed order, so that every run on a GPU gives the same bits."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cotolora.kernels.launching import launch

BLOCK = 512  # elements per program: one 16-byte load for each thread of 4 warps
PARTS = 4  # parts whose loads are in flight at the same time


@triton.jit
def sum_one(partials_ptr, out_ptr, block, S, size, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Writes the block-th BLOCK elements of out."""
    # int64: an index passes 2**31 for tensors beyond 2 Gi elements
    elements = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ptrs = partials_ptr + elements
    total = tl.zeros((BLOCK,), tl.float32)
    # a mask instead of loop_unroll_factor, with which Triton 3.6 loads the remaining parts one by one, with barriers
    for first in range(0, S, PARTS):
        for part in tl.static_range(PARTS):
            there = tl.where(first + part < S, size, 0)
            total += tl.load(ptrs, mask=elements < there, other=0.0)
            ptrs += size
    tl.store(out_ptr + elements, total.to(out_ptr.dtype.element_ty), mask=elements < size)


@triton.jit(do_not_specialize=["S0", "S1"])
def sum_partials_kernel(
    # [S0, size0], [size0]; [S1, size1] or None, [size1] or None
    partials0_ptr, out0_ptr, partials1_ptr, out1_ptr,
    S0, size0, S1, size1,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK elements of the first sum or of the second, if there is one."""
    block = tl.program_id(0)
    blocks0 = tl.cdiv(size0, BLOCK)
    if block < blocks0:
        sum_one(partials0_ptr, out0_ptr, block, S0, size0, BLOCK, PARTS)
    elif partials1_ptr is not None:
        sum_one(partials1_ptr, out1_ptr, block - blocks0, S1, size1, BLOCK, PARTS)


class Sum(NamedTuple):
    """A sum to compute: ``out`` is the sum over s of ``partials[s]``, float32.

    Both are dense, and each part has the strides of ``out``, so that a sum runs over memory in order.
    """

    partials: Tensor
    out: Tensor


def sum_partials(first: Sum, second: Sum | None = None) -> None:
    """Launches `sum_partials_kernel` once, for one sum or two."""
    sums = [first] if second is None else [first, second]
    blocks = sum(triton.cdiv(one.out.numel(), BLOCK) for one in sums)
    if blocks == 0:
        return
    tensors = [*first, *(second or (None, None))]
    sizes = [size for one in sums for size in (one.partials.shape[0], one.out.numel())] + [0] * (4 - 2 * len(sums))
    launch(
        sum_partials_kernel, (blocks,),
        *tensors, *sizes, BLOCK=BLOCK, PARTS=PARTS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
