"""Products and selections that the addmm backends of all variants use."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.reference import rows_on

# 0-dim operands that addmm ignores, cached by dtype and device: creating one takes longer than a tiny product
_IGNORED: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def flat(t: Tensor) -> Tensor:
    """``[..., features]`` as ``[rows, features]``: a view if the strides allow one, else a copy."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def shaped_like(rows: Tensor, t: Tensor) -> Tensor:
    """``[rows, features]`` with the leading dimensions of `t`."""
    return rows if t.dim() == 2 else rows.view(*t.shape[:-1], rows.shape[1])


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, ten times as fast if `t` already has `dtype`, since host time dominates in tiny layers."""
    return t if t.dtype == dtype else t.to(dtype)


def ignored_by_addmm(like: Tensor) -> Tensor:
    """A first operand for addmm, which does not read it if beta is 0."""
    traced = torch.compiler.is_compiling()
    found = None if traced else _IGNORED.get((like.dtype, like.device))
    if found is None:
        found = like.new_empty(())
        # tensors made under a dispatch mode or by a subclass are not cached
        if type(like) in (Tensor, torch.nn.Parameter) and type(found) is Tensor and not traced:
            _IGNORED[like.dtype, like.device] = found
    return found


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · a b``, rounded once."""
    return torch.addmm(ignored_by_addmm(a), a, b, beta=0, alpha=scale)


def add_product(y: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``y + scale · a b``, written into `y` unless torch.compile traces."""
    # torch 2.11's compiler assumes a gradient of zero for an output that is written in place
    if torch.compiler.is_compiling():
        return torch.addmm(y, a, b, alpha=scale)
    return y.addmm_(a, b, alpha=scale)


def transposing_is_faster(rows: Tensor, rank: int) -> bool:
    """Whether ``rows b`` and ``rowsᵀ h``, of `rank` columns, are faster as ``(bᵀ rowsᵀ)ᵀ`` and ``(hᵀ rows)ᵀ``.

    Measured on a CPU at widths 256 to 3072: at most half the time below rank 16 and from 64 rows on; otherwise up to
    nine times as slow, mostly because of the copy that transposes the gradient into the layout of B.
    """
    if rank >= 16 or not rows.is_cpu:
        return False
    # under torch.compile the number of rows may be symbolic, and a comparison would specialise it
    return torch.compiler.is_compiling() or rows.shape[0] >= 64


def times(rows: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · rows b``, ``[rows, rank]``, rounded once, in the faster of two orders."""
    if transposing_is_faster(rows, b.shape[1]):
        return scaled_product(b.T, rows.T, scale).T
    return scaled_product(rows, b, scale)


def down_projection(x: Tensor, a: Tensor) -> Tensor:
    """``x Aᵀ``, ``[rows, rank]``, in float32, in the layout that makes `transposed_times` faster too."""
    return (a @ x.T).T if transposing_is_faster(x, a.shape[0]) else F.linear(x, a)


def transposed_times(rows: Tensor, h: Tensor, scale: float = 1.0) -> Tensor:
    """``scale · rowsᵀ h``, ``[features, rank]``, rounded once, in the faster of two orders."""
    transposed = transposing_is_faster(rows, h.shape[1])
    left, right = (h.T, rows) if transposed else (rows.T, h)
    product = left @ right if scale == 1 else scaled_product(left, right, scale)
    return product.T if transposed else product


class Switch(NamedTuple):
    """A tensor gate as boolean masks that broadcast against ``[..., features]``; all None without a gate.

    on: the gate. one: the gate if it is a single one for all rows, else None. rows: the gate if it is one per sample,
    else None.
    """

    on: Tensor | None
    one: Tensor | None
    rows: Tensor | None


ALWAYS_ON = Switch(None, None, None)


def switch(gate: Tensor | None, like: Tensor) -> Switch:
    """`gate` for tensors with the leading dimensions of `like`."""
    if gate is None:
        return ALWAYS_ON
    on = rows_on(gate, like)
    return Switch(on, on, None) if on.dim() == 0 else Switch(on, None, on)


def select(on: Tensor | None, t: Tensor) -> Tensor:
    """``t [rows, features]`` in active rows, zeros in the others; `on` is None, ``[]`` or ``[batch, 1, …, 1]``.

    A selection, not a product, because inactive rows may hold infinities.
    """
    if on is None:
        return t
    if on.dim() == 0:
        return torch.where(on, t, 0)
    per_sample = t.reshape(on.shape[0], t.shape[0] // max(on.shape[0], 1), t.shape[1])
    return torch.where(on.view(-1, 1, 1), per_sample, 0).reshape(t.shape)


def is_known_finite(b: Tensor) -> bool:
    """Whether adding 0 · B changes nothing, so that y needs no selection; False if a check would sync or break a trace.

    The selection in y takes longer on a CPU than the product itself.
    """
    plain = b.device.type == "cpu" and type(b) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and bool(b.isfinite().all())


def dropped_out(x: Tensor, dropout: float) -> tuple[Tensor, Tensor | None]:
    """``dropout(x)`` and its boolean mask; the mask is None if dropout is 0."""
    return torch.native_dropout(x, dropout, True) if dropout else (x, None)


def masked(t: Tensor, keep: Tensor, dropout: float) -> Tensor:
    """``D ∘ t``: zero where `keep` is False, ``t / (1 - dropout)`` elsewhere."""
    return (t * keep).mul_(0.0 if dropout == 1 else 1 / (1 - dropout))
