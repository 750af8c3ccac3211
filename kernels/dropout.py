"""Dropout that a backward draws again instead of reading: the mask is a function of seed, row and column."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_mask(
    seed, rows, first_column, dropout,
    BLOCK_N: tl.constexpr,  # a power of two, at least 4
):  # fmt: skip
    """Which of the entries ``[rows, first_column : first_column + BLOCK_N]`` stay: each with probability 1 - dropout.

    The same for every tile that covers an entry, because `first_column` is a multiple of 4: one draw of Philox gives
    four numbers, those of four neighbours in a row.
    """
    fours = (first_column // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
    zeros = tl.zeros((rows.shape[0], BLOCK_N // 4), tl.uint32)
    low, high = (rows & 0xFFFFFFFF)[:, None].to(tl.uint32), (rows >> 32)[:, None].to(tl.uint32)
    n0, n1, n2, n3 = tl.philox(seed, zeros + fours, zeros + low, zeros + high, zeros)
    numbers = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (rows.shape[0], BLOCK_N))
    # 24 bits are what a float32 in [0, 1) holds exactly
    return (numbers >> 8).to(tl.float32) * 2**-24 >= dropout


def keep_scale(dropout: float) -> float:
    """What dropout multiplies the entries that stay by."""
    return 0.0 if dropout == 1 else 1 / (1 - dropout)
