"""The low-rank linear as vendor GEMMs with a hand-written backward: the backend of CPUs and of small eager batches.

`forward` and `backward` are the two halves of one autograd Function (functional.py); neither records a graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.reference import Gate, rows_on


class Saved(NamedTuple):
    """What the backward needs beyond the arguments, None where it will not be asked for.

    h: ``scale · dropout(x) Aᵀ [rows, rank]`` in the dtype of x, zero where the gate is off.
    keep: boolean dropout mask of the shape of x; of the Triton backend an int64 ``[]``, the seed that draws it.

    Of DoRA alone:

    column: c ``[out_features]``, where the whole call is off 1.
    norm: ``‖W + scale · B A‖`` by rows, ``[out_features]``.
    base: what c multiplies, ``[rows, out_features]``, before h Bᵀ: ``x Wᵀ + bias``, or ``dropout(x) Wᵀ``.
    bias: what `base` has too much.

    Of DoRA merged with a small W h is None, though dB may be asked for, and base is ``W + scale · B A``.
    """

    h: Tensor | None
    keep: Tensor | None
    column: Tensor | None = None
    norm: Tensor | None = None
    base: Tensor | None = None
    bias: Tensor | None = None


class Needs(NamedTuple):
    """The dtype of each gradient that is asked for, None for the others."""

    x: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None
    lora_a: torch.dtype | None
    lora_b: torch.dtype | None
    magnitude: torch.dtype | None = None


def flat(t: Tensor) -> Tensor:
    """``[..., features]`` as ``[rows, features]``: a view where the strides allow one, else a copy."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, ten times as fast where there is nothing to do: of tiny layers the host is the slower part."""
    return t if t.dtype == dtype else t.to(dtype)


def scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · a b``, rounded once."""
    # beta=0 ignores the first operand
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``y + a b``, written over y where nothing traces."""
    # torch 2.11's compiler takes the gradient of an output that is written in place for zero
    return torch.addmm(y, a, b) if torch.compiler.is_compiling() else y.addmm_(a, b)


def short_first(rows: Tensor, rank: int) -> bool:
    """Whether ``rows b`` and ``rowsᵀ h``, of `rank` columns, are faster as ``(bᵀ rowsᵀ)ᵀ`` and ``(hᵀ rows)ᵀ``.

    Measured on a CPU at widths 256 to 3072: below rank 16 half the time and less, from 64 rows on; else it costs up to
    nine times as much, most of it for the copy that turns the gradient as B lies.
    """
    # under torch.compile the number of rows may be a symbol, which a comparison would pin down
    return rank < 16 and rows.device.type == "cpu" and (torch.compiler.is_compiling() or rows.shape[0] >= 64)


def select(on: Tensor | None, t: Tensor) -> Tensor:
    """``t [rows, features]`` where the gate is on, zeros elsewhere; `on` is None, ``[]`` or ``[batch, 1, …, 1]``.

    A selection, not a product: what is off may hold infinities.
    """
    if on is None:
        return t
    if on.dim() == 0:
        return torch.where(on, t, 0)
    per_sample = t.reshape(on.shape[0], t.shape[0] // max(on.shape[0], 1), t.shape[1])
    return torch.where(on.view(-1, 1, 1), per_sample, 0).reshape(t.shape)


def _all_finite(b: Tensor) -> bool:
    """Whether adding 0 · B changes nothing; False also where asking would wait for a device or break a trace.

    It saves a selection among all of y, which takes longer on a CPU than the product itself.
    """
    plain = b.device.type == "cpu" and type(b) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and bool(b.isfinite().all())


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    gate: Gate,
    dropout: float,
    base: Tensor | None = None,
) -> tuple[Tensor, Saved]:
    """``y = x Wᵀ + bias + h Bᵀ`` with ``h = δ · scale · dropout(x) Aᵀ``, added in place to the base's result.

    Shapes as in `cotolora.reference.lora_linear`. `gate` is True or a tensor: a host gate that is off never comes here.
    Given `base`, some module's output, in place of a weight: ``y = base + h Bᵀ``, as in `reference.add_low_rank`.
    """
    if weight is not None:
        # contiguous() costs nothing on what F.linear makes today; without it a layout that cannot be
        # viewed as a matrix would lose the in-place update
        y = F.linear(x, weight, bias).contiguous()
    else:
        assert base is not None
        # never in place: the base's own backward, or the base itself, may need what it has returned
        y = base
    rows = flat(y)
    lora_a, lora_b = cast(lora_a, x.dtype), cast(lora_b, y.dtype)
    dropped, keep = torch.native_dropout(x, dropout, True) if dropout else (x, None)
    h = scaled_mm(flat(dropped), lora_a.T, scale)
    on = rows_on(gate, y) if isinstance(gate, Tensor) else None
    h = cast(select(on, h), y.dtype)
    if on is None or on.dim() == 0 or _all_finite(lora_b):
        factor = lora_b if on is None or on.dim() > 0 else select(on, lora_b)
        total = (add_product if base is None else torch.addmm)(rows, h, factor.T)
        y = y if total is rows else total.view(y.shape)
    else:
        # a row that is off must not meet a non-finite B, so here the selection comes after the product
        y = torch.where(on, torch.addmm(rows, h, lora_b.T).view(y.shape), y)
    return y, Saved(h, keep)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    saved: Saved,
    needs: Needs,
    *,
    scale: float,
    gate: Gate,
    dropout: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    r"""Gradients of x, weight, bias, A and B given ``dy [..., out]``.

    With ``p = δ · scale · dy B``, h as the forward saved it and D the dropout mask times ``1 / (1 - dropout)``:

        dx = dy W + D ∘ (p A)      dA = pᵀ (D ∘ x)      dB = dyᵀ h
        dW = dyᵀ x                 dbias = Σ_rows dy

    Without a weight, dx is of the low-rank part alone, and p is cast to the dtype of x. Only what `needs` asks for is
    computed; operands that the rest would need may be None.
    """
    dx = dw = dbias = da = db = p = None
    rows = flat(dy)
    on = rows_on(gate, dy) if isinstance(gate, Tensor) else None
    # what is off adds zero to A's and B's gradients even where x or dy is not finite: with one gate
    # for all the product is selected, with row gates its operands
    whole, by_row = (on, None) if on is None or on.dim() == 0 else (None, on)
    if needs.weight and x is not None:
        dw = rows.T @ flat(x)
    if needs.bias:
        dbias = rows.sum(0)
    if needs.lora_b and saved.h is not None:
        h, on_rows = saved.h, select(by_row, rows)
        db = select(whole, (h.T @ on_rows).T if short_first(rows, h.shape[1]) else on_rows.T @ h)
        db = cast(db, needs.lora_b)
    if (needs.x or needs.lora_a) and lora_b is not None:
        b = cast(lora_b, dy.dtype)
        p = scaled_mm(b.T, rows.T, scale).T if short_first(rows, b.shape[1]) else scaled_mm(rows, b, scale)
        # the dtype of x, which that of a base's output, and so of dy, need not be
        p = cast(select(on, p), x.dtype if x is not None else needs.x or dy.dtype)
    if needs.lora_a and p is not None and x is not None:
        dropped = x if saved.keep is None else masked(x, saved.keep, dropout)
        da = cast(select(whole, p.T @ select(by_row, flat(dropped))), needs.lora_a)
    if needs.x and p is not None and lora_a is not None:
        dx = None if weight is None else rows @ weight
        lora_a = cast(lora_a, p.dtype)
        if saved.keep is None and (on is None or on.dim() == 0):
            lora_a = select(whole, lora_a)
            dx = p @ lora_a if dx is None else dx.addmm_(p, lora_a)
        else:
            update = select(on, p @ lora_a)
            if saved.keep is not None:
                update = masked(update, flat(saved.keep), dropout)
            dx = update if dx is None else dx.add_(update)
        dx = dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], lora_a.shape[1])
    return dx, dw, dbias, da, db


def masked(t: Tensor, keep: Tensor, dropout: float) -> Tensor:
    """``D ∘ t``: zero where `keep` is, the rest times ``1 / (1 - dropout)``."""
    return (t * keep).mul_(0.0 if dropout == 1 else 1 / (1 - dropout))
