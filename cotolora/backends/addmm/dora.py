"""DoRA as vendor GEMMs with a hand-written backward; `lora.py` beside it has the plain form and what both share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm.lora import Needs, Saved, add_product, cast, flat, masked, scaled_mm, select, short_first
from cotolora.reference import Gate, rows_on

# entries of W + scale · B A that are made at a time: on a CPU what its cache holds
BLOCK_CPU, BLOCK_DEVICE = 1 << 18, 1 << 22
# entries of W up to which, and rows from which, W and its update are merged
MERGED, MANY = 1 << 14, 64


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``‖W + scale · B A‖`` by rows ``[out_features]``, of which no more than a block is ever there.

    In float32, or float64 if `weight` is. Where B = 0 it is ``‖W‖`` exactly.

    Not by ``‖W_i‖² + 2 s · W_i · (B A)_i + s² · ‖(B A)_i‖²`` from W Aᵀ and A Aᵀ, which needs no sum of W and B A: the
    terms may cancel, and a CPU takes as long for a product of so few columns as for the whole sum, or longer. It has
    not been timed on a GPU, where it is the fallback of the fused kernels, which have their own.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lora_a, lora_b = cast(lora_a, dtype), cast(lora_b, dtype)

    def norms(weight: Tensor, lora_b: Tensor) -> Tensor:
        wide = cast(weight, dtype)
        add = wide.addmm if wide is weight else wide.addmm_
        return torch.linalg.vector_norm(add(lora_b, lora_a, alpha=scale), dim=1)

    # a trace holds every block
    small = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    size = max(1, (BLOCK_CPU if small else BLOCK_DEVICE) // max(1, weight.shape[1]))
    if weight.shape[0] <= size:
        return norms(weight, lora_b)
    return torch.cat([norms(*block) for block in zip(weight.split(size), lora_b.split(size), strict=True)])


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    needs: Needs,
    *,
    scale: float,
    gate: Gate,
    dropout: float,
) -> tuple[Tensor, Saved]:
    r"""``y = c ∘ base + (1 − c) ∘ bias + h (c ∘ B)ᵀ`` with ``base = x Wᵀ + bias`` and ``h = δ · scale · x Aᵀ``.

    With dropout D, ``y = x Wᵀ + bias + (c − 1) ∘ (D x) Wᵀ + h (c ∘ B)ᵀ`` with ``h = δ · scale · D x Aᵀ``.
    A small W that many rows meet on a CPU is merged with its update: ``y = x (c ∘ (W + scale · B A))ᵀ + bias``.
    Where c = 1 and B = 0, so also where the gate is off, all are the base's own result, bit for bit.
    Shapes as in `cotolora.reference.dora_linear`; `gate` is True or a tensor. A norm of None is computed.
    """
    if _merges(x, weight, needs, gate, dropout):
        total = weight.addmm(cast(lora_b, x.dtype), cast(lora_a, x.dtype), alpha=scale)
        norm = torch.linalg.vector_norm(total, dim=1) if norm is None else norm
        c = (magnitude / norm).masked_fill_(norm.logical_not(), 1)
        return F.linear(x, cast(total * c.unsqueeze(1), x.dtype), bias), Saved(None, None, c, norm, total)
    if norm is None:
        norm = row_norms(weight, lora_a, lora_b, scale)
    y = F.linear(x, weight, bias).contiguous()
    rows = flat(y)
    on, whole, by_row = _switches(gate, y)
    # as column_scale, in fewer steps: there is no gradient to keep from the division
    c = (magnitude / norm).masked_fill_(norm.logical_not(), 1)
    if on is not None:
        c = torch.where(on.any(), c, 1)
    dropped, keep = torch.native_dropout(x, dropout, True) if dropout else (x, None)
    h = select(on, scaled_mm(flat(dropped), cast(lora_a, x.dtype).T, scale))
    if dropout:
        base = flat(dropped) @ weight.T
        out = torch.addcmul(rows, base, c - 1)
    else:
        base = rows
        out = rows * c if bias is None else torch.addcmul(torch.addcmul(bias, bias, c, value=-1), rows, c)
    # in c's dtype to the end: one rounding, the last
    out = cast(add_product(out, cast(h, c.dtype), _columns(c, lora_b, whole, c.dtype).T), x.dtype)
    out = out if y.dim() == 2 else out.view(y.shape)
    if by_row is not None:
        out = torch.where(by_row, out, y)
    of_magnitude = (norm, base, None if dropout else bias) if needs.magnitude else (None, None, None)
    return out, Saved(h, keep, c, *of_magnitude)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    r"""Gradients of x, weight, bias, A, B and m given ``dy [..., out]``: those of LoRA with ``c ∘ dy`` in place of dy.

    With ``p = δ · scale · dy (c ∘ B)`` and without dropout:

        dx = (c ∘ dy) W + p A      dA = pᵀ x      dB = c ∘ dyᵀ h      dm = Σ_rows dy ∘ (x Wᵀ + h Bᵀ) / norm

    Only what `needs` asks for is computed; operands that the rest would need may be None. Of a merged weight, which is
    told by dB asked for without h, see `_of_merged`.
    """
    dx = dw = dbias = da = db = dm = p = None
    c, keep = saved.column, saved.keep
    assert c is not None
    rows = flat(dy)
    if needs.lora_b and saved.h is None:
        assert x is not None
        assert lora_a is not None
        assert lora_b is not None
        return _of_merged(dy, rows, x, lora_a, lora_b, saved, needs, scale)
    on, whole, by_row = _switches(gate, dy)
    on_rows = select(by_row, rows)
    dropped = x if x is None or keep is None else masked(x, keep, dropout)
    if needs.bias:
        dbias = rows.sum(0)
    if saved.h is not None:
        h = saved.h
        across = (h.T @ on_rows).T if short_first(rows, h.shape[1]) else on_rows.T @ h
        if needs.lora_b:
            db = cast(select(whole, across * c.unsqueeze(1)), needs.lora_b)
        if needs.magnitude and lora_b is not None:
            dm = cast(_for_magnitude(on_rows, across, lora_b, saved, on), needs.magnitude)
    if (needs.x or needs.lora_a) and lora_b is not None:
        b = _columns(c, lora_b, whole, dy.dtype)
        p = scaled_mm(b.T, rows.T, scale).T if short_first(rows, b.shape[1]) else scaled_mm(rows, b, scale)
        p = select(on, p)
    if needs.lora_a and p is not None and dropped is not None:
        da = cast(select(whole, p.T @ select(by_row, flat(dropped))), needs.lora_a)
    if needs.weight and x is not None and dropped is not None:
        dw = _scaled(dy, c, by_row).T @ flat(x)
        if keep is not None:
            dw = rows.T @ flat(x) + cast(on_rows * (c - 1), dy.dtype).T @ flat(dropped)
    if needs.x and p is not None and weight is not None and lora_a is not None:
        dx = _for_x(dy, weight, select(whole, cast(lora_a, dy.dtype)), b, p, saved, by_row, scale, dropout)
        dx = dx if dy.dim() == 2 else dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, dw, dbias, da, db, dm


def merges(device: torch.device, element_size: int, rows: int | None, entries: int, dropout: float) -> bool:
    """Whether an adapter that is on and trains is merged with a W of so many entries; see `_merges`."""
    many = rows is not None and rows >= MANY
    return device.type == "cpu" and element_size >= 4 and many and entries <= MERGED and not dropout


def _merges(x: Tensor, weight: Tensor, needs: Needs, gate: Gate, dropout: float) -> bool:
    """Whether ``c ∘ (W + scale · B A)`` is made, and all gradients are taken from ``dyᵀ x``.

    It takes one product of the size of W's more and no pass over what is ``[rows, out_features]``: faster where W is
    small, by measurement on a CPU. Not in low precision, which would round small updates away.
    """
    if gate is not True or needs.lora_a is None or needs.lora_b is None or torch.compiler.is_compiling():
        return False
    rows = x.numel() // max(1, weight.shape[1])
    return merges(x.device, weight.dtype.itemsize, rows, weight.numel(), dropout)


def _of_merged(
    dy: Tensor, rows: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, saved: Saved, needs: Needs, scale: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    r"""``dA = scale · Bᵀ G, dB = scale · G Aᵀ, dm = Σ dyᵀ x ∘ (W + scale · B A) / norm`` with ``G = c ∘ dyᵀ x``."""
    total, norm, c = saved.base, saved.norm, saved.column
    assert total is not None
    assert norm is not None
    assert c is not None
    across, column = rows.T @ flat(x), c.unsqueeze(1)
    dm = (across * total).sum(1).div_(norm).masked_fill_(norm.logical_not(), 0) if needs.magnitude else None
    across = cast(across * column, rows.dtype)
    da = scaled_mm(cast(lora_b, dy.dtype).T, across, scale)
    db = scaled_mm(across, cast(lora_a, dy.dtype).T, scale)
    dx = rows @ cast(total * column, rows.dtype) if needs.x else None
    return (
        dx if dx is None or dy.dim() == 2 else dx.view(x.shape),
        across if needs.weight else None,
        rows.sum(0) if needs.bias else None,
        cast(da, needs.lora_a or da.dtype),
        cast(db, needs.lora_b or db.dtype),
        None if dm is None else cast(dm, needs.magnitude or dm.dtype),
    )


def _for_x(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    columns: Tensor,
    p: Tensor,
    saved: Saved,
    by_row: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """``(c ∘ dy) W + p A``, or with dropout ``dy W + D ∘ (((c − 1) ∘ dy) W + p A)``; `columns` is ``c ∘ B``."""
    rows, c, keep = flat(dy), saved.column, saved.keep
    assert c is not None
    if keep is not None:
        update = (cast(select(by_row, rows) * (c - 1), rows.dtype) @ weight).add_(select(by_row, p @ lora_a))
        return (rows @ weight).add_(masked(update, flat(keep), dropout))
    if by_row is not None:
        return (_scaled(dy, c, by_row) @ weight).add_(select(by_row, p @ lora_a))
    # c is put onto the smaller operand; a number of rows that is not known is taken for small
    if torch.compiler.is_compiling() or rows.shape[0] <= weight.shape[1]:
        return (_scaled(dy, c, None) @ weight).addmm_(p, lora_a)
    scaled = cast(weight * c.unsqueeze(1), rows.dtype)
    # and the update too where it is smaller there, unless small ones would be rounded away
    if rows.shape[0] > weight.shape[0] and weight.dtype.itemsize >= 4:
        return rows @ scaled.addmm_(columns, lora_a, alpha=scale)
    return (rows @ scaled).addmm_(p, lora_a)


def _for_magnitude(on_rows: Tensor, across: Tensor, lora_b: Tensor, saved: Saved, on: Tensor | None) -> Tensor:
    """``Σ_rows dy ∘ u / norm [out_features]``, with u from `saved` and ``across = dyᵀ h``."""
    base, norm = saved.base, saved.norm
    assert base is not None
    assert norm is not None
    base = cast(base, norm.dtype)
    # less the bias before the sum, not after: a large one would cost the sum its digits
    product = on_rows * base if saved.bias is None else torch.sub(base, saved.bias).mul_(on_rows)
    total = product.sum(0) + (across * lora_b).sum(1)
    # a row without a norm has c = 1 whatever m is
    nothing = norm.logical_not()
    if on is not None:
        nothing |= ~on.any()
    return (total / norm).masked_fill_(nothing, 0)


def _switches(gate: Gate, like: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gate as `rows_on` gives it, and once more as the second if it is one for all, else as the third."""
    on = rows_on(gate, like) if isinstance(gate, Tensor) else None
    return (on, on, None) if on is None or on.dim() == 0 else (on, None, on)


def _columns(c: Tensor, lora_b: Tensor, whole: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``c ∘ B [out_features, rank]`` in `dtype`, zeros where the one gate is off."""
    return select(whole, cast(lora_b * c.unsqueeze(1), dtype))


def _scaled(dy: Tensor, c: Tensor, by_row: Tensor | None) -> Tensor:
    """``c ∘ dy [rows, out_features]`` on the rows that are on, dy on the others."""
    scaled = cast(dy * c, dy.dtype)
    return flat(scaled if by_row is None else torch.where(by_row, scaled, dy))
