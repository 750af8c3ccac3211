"""Dropout masks that are never stored: a function of seed, row and column, recomputed in the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


ROUNDS = tl.constexpr(7)  # rounds of Philox: the fewest that pass BigCrush (Salmon et al. 2011)


@triton.jit
def keep_mask(
    seed, rows, first_column, dropout,
    BLOCK_N: tl.constexpr,  # a power of two, at least 8
):  # fmt: skip
    """The mask of entries ``[rows, first_column : first_column + BLOCK_N]`` that are kept.

    Each entry is kept with probability 1 - dropout, in steps of 2⁻¹⁶. One call of Philox gives the random numbers of
    eight neighbours in a row. `first_column` must be a multiple of 8, so that tiles agree on an entry's number.
    """
    eights = (first_column // 8 + tl.arange(0, BLOCK_N // 8))[None, :].to(tl.uint32)
    zeros = tl.zeros((rows.shape[0], BLOCK_N // 8), tl.uint32)
    low, high = (rows & 0xFFFFFFFF)[:, None].to(tl.uint32), (rows >> 32)[:, None].to(tl.uint32)
    n0, n1, n2, n3 = tl.philox(seed, zeros + eights, zeros + low, zeros + high, zeros, ROUNDS)
    pairs = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    numbers = tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), (rows.shape[0], BLOCK_N))
    return numbers.to(tl.float32) * 2**-16 >= dropout


def wide_gates(gate: Tensor | None, seed: Tensor | None, precision: str) -> Tensor | None:
    """Casts 8-bit row gates to int32 for launches with dropout in TF32 under Triton before 3.8.

    There the 8-bit gates determine the layout of the masked TF32 operand, and that layout splits tiles of 16 along the
    summed dimension wrongly. Other launches keep their gates.
    """
    if VERSION >= (3, 8) or gate is None or gate.dim() == 0 or gate.element_size() > 1:
        return gate
    return gate if seed is None or precision != "tf32" else gate.to(torch.int32)


def keep_scale(dropout: float) -> float:
    """The factor ``1 / (1 - dropout)`` of the entries that are kept; 0 if dropout is 1."""
    return 0.0 if dropout == 1 else 1 / (1 - dropout)


def drawn_mask(seed: Tensor, rows: int, columns: int, dropout: float) -> Tensor:
    """The mask of `keep_mask` for a whole matrix, bool ``[rows, columns]``, computed with torch.

    Philox 4x32-7: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    eights = torch.arange((columns + 7) // 8, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    c0, c1, c2, c3 = torch.broadcast_tensors(eights, row & LOW_32_BITS, row >> 32, torch.zeros_like(row))
    key0, key1 = seed & LOW_32_BITS, (seed >> 32) & LOW_32_BITS
    for _ in range(ROUNDS.value):
        high0, low0 = _product(0xD2511F53, c0)
        high2, low2 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & LOW_32_BITS, (key1 + 0xBB67AE85) & LOW_32_BITS
    words = torch.stack((c0, c1, c2, c3), -1)
    numbers = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(1)[:, :columns]
    return numbers.to(torch.float32) * 2**-16 >= dropout


LOW_32_BITS = 0xFFFFFFFF


def _product(constant: int, t: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers; int64 holds only 63 bits of it."""
    low, high = constant * (t & 0xFFFF), constant * (t >> 16)
    return (high + (low >> 16)) >> 16, (constant * t) & LOW_32_BITS
