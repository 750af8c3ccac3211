"""Dropout masks that are never stored: a function of seed, row and column, drawn again in the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@triton.jit
def keep_mask(
    seed, rows, first_column, dropout,
    BLOCK_N: tl.constexpr,  # a power of two, at least 4
):  # fmt: skip
    """Which of the entries ``[rows, first_column : first_column + BLOCK_N]`` stay: each with probability 1 - dropout.

    One draw of Philox gives the numbers of four neighbours in a row. `first_column` must be a multiple of 4: then every
    tile that covers an entry draws the same number for it.
    """
    fours = (first_column // 4 + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32)
    zeros = tl.zeros((rows.shape[0], BLOCK_N // 4), tl.uint32)
    low, high = (rows & 0xFFFFFFFF)[:, None].to(tl.uint32), (rows >> 32)[:, None].to(tl.uint32)
    n0, n1, n2, n3 = tl.philox(seed, zeros + fours, zeros + low, zeros + high, zeros)
    numbers = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (rows.shape[0], BLOCK_N))
    # a float32 in [0, 1) holds 24 bits exactly
    return (numbers >> 8).to(tl.float32) * 2**-24 >= dropout


def wide_gates(gate: Tensor | None, seed: Tensor | None, precision: str) -> Tensor | None:
    """`gate`, in int32 where Triton before 3.8 would lay out a masked TF32 operand for the 8 bits of row gates.

    The layout takes tiles of 16 along the summed dimension apart wrongly. The gates are what determines it, so they are
    widened; other launches keep theirs.
    """
    if VERSION >= (3, 8) or gate is None or gate.dim() == 0 or gate.element_size() > 1:
        return gate
    return gate if seed is None or precision != "tf32" else gate.to(torch.int32)


def keep_scale(dropout: float) -> float:
    """The factor ``1 / (1 - dropout)`` of the entries that stay; 0 if none do."""
    return 0.0 if dropout == 1 else 1 / (1 - dropout)


def drawn_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """What `keep_mask` draws for a whole matrix, bool ``[rows, columns]``, computed by torch.

    Philox 4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    fours = torch.arange((columns + 3) // 4, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    c0, c1, c2, c3 = torch.broadcast_tensors(fours, row & LOW_32_BITS, row >> 32, torch.zeros_like(row))
    key0, key1 = seed & LOW_32_BITS, (seed >> 32) & LOW_32_BITS
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high2, low2 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & LOW_32_BITS, (key1 + 0xBB67AE85) & LOW_32_BITS
    numbers = torch.stack((c0, c1, c2, c3), -1).flatten(1)[:, :columns]
    return (numbers >> 8).to(torch.float32) * 2**-24 >= dropout


LOW_32_BITS = 0xFFFFFFFF


def _product(constant: int, t: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two 32-bit numbers, computed in int64, which holds 63 bits."""
    low, high = constant * (t & 0xFFFF), constant * (t >> 16)
    return (high + (low >> 16)) >> 16, (constant * t) & LOW_32_BITS
