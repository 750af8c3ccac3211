"""DoRA as vendor GEMMs with a hand-written backward; on a CPU a small W is merged with its update instead."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm.products import (
    Switch,
    add_product,
    cast,
    dropped_out,
    flat,
    masked,
    scaled_product,
    select,
    shaped_like,
    switch,
    times,
    transposed_times,
)
from cotolora.backends.types import Call, Gradients, Launch, Launches, Needs, Operands, Options, Sizes, kept_by_lora
from cotolora.operands import refuse_nested

# number of entries of W + scale · B A that are computed at a time; on a CPU they fit into the cache
BLOCK_CPU, BLOCK_DEVICE = 1 << 18, 1 << 22
# W is merged with its update if it has at most this many entries, and x at least this many rows
MERGED_ENTRIES, MERGED_ROWS = 1 << 14, 64


class SavedDora(NamedTuple):
    """The tensors for the backward, None for those that it does not read.

    x, weight, a, b: the operands.
    h: ``δ · scale · dropout(x) Aᵀ``, ``[rows, rank]``, in the dtype of x.
    keep: the boolean dropout mask, in the shape of x.
    column_scale: c, ``[out_features]``; 1 if the adapter is inactive in all rows.
    norm: the row norms ``‖W + scale · B A‖``, ``[out_features]``.
    product: ``x Wᵀ + bias``, or ``dropout(x) Wᵀ``, ``[rows, out_features]``, for the gradient of m.
    product_bias: the bias in `product`, which c does not scale.
    """

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    h: Tensor | None
    keep: Tensor | None
    column_scale: Tensor
    norm: Tensor | None
    product: Tensor | None
    product_bias: Tensor | None


class SavedMergedDora(NamedTuple):
    """The tensors for the backward of a merged W: `total` is ``W + scale · B A``, the others are as in `SavedDora`."""

    x: Tensor
    a: Tensor
    b: Tensor
    column_scale: Tensor
    norm: Tensor
    total: Tensor


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """As `cotolora.reference.row_norms`, but holds only one block of ``W + scale · B A`` in memory at a time.

    If B = 0 the result is exactly the row norms of W.

    The expansion ``‖W_i‖² + 2 s · W_i · (B A)_i + s² · ‖(B A)_i‖²`` from W Aᵀ and A Aᵀ would need no sum of W and B A,
    but its terms may cancel, and a CPU takes at least as long for products of so few columns as for the whole sum.
    This function has not been timed on a GPU, where it is the fallback of the fused kernels, which have their own.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = (cast(cast(factor, weight.dtype), dtype) for factor in (a, b))

    def norms(weight: Tensor, b: Tensor) -> Tensor:
        wide = cast(weight, dtype)
        add = wide.addmm if wide is weight else wide.addmm_
        return torch.linalg.vector_norm(add(b, a, alpha=scale), dim=1)

    # a trace would contain every block, so it uses large ones
    small = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    size = max(1, (BLOCK_CPU if small else BLOCK_DEVICE) // max(1, weight.shape[1]))
    if weight.shape[0] <= size:
        return norms(weight, b)
    return torch.cat([norms(*block) for block in zip(weight.split(size), b.split(size), strict=True)])


class DoraByAddmm:
    r"""``y = c ∘ base + (1 − c) ∘ bias + h (c ∘ B)ᵀ`` with ``base = x Wᵀ + bias`` and ``h = δ · scale · x Aᵀ``.

    With dropout D, ``y = x Wᵀ + bias + (c − 1) ∘ (D x) Wᵀ + h (c ∘ B)ᵀ`` with ``h = δ · scale · D x Aᵀ``.
    On a CPU, a small W that is multiplied with many rows is merged: ``y = x (c ∘ (W + scale · B A))ᵀ + bias``.
    If c = 1 and B = 0, and where the gate is 0, all forms return the base output, bit for bit.

    `extra` of the operands is m and, if autocast has cast W, the row norms from W before the cast.
    """

    def why_not(self, call: Call) -> list[str]:
        """Empty: it can run every call."""
        return []

    def row_norms(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The row norms ``‖W + scale · B A‖``, ``[out_features]``."""
        return row_norms(weight, a, b, scale)

    def forward(
        self, operands: Operands, options: Options, needs: Needs
    ) -> tuple[Tensor, SavedDora] | tuple[Tensor, SavedMergedDora]:
        """Computes one of the three forms in the docstring of the class."""
        x, weight, bias, a, b, (magnitude, *known_norm), _ = operands
        scale, dropout, gate = options
        assert weight is not None
        if gate is None and needs.a and needs.b and not torch.compiler.is_compiling():
            rows = x.numel() // max(1, weight.shape[1])
            if merges(x.device, weight.dtype, rows, weight.numel(), dropout):
                refuse_nested(x)  # F.linear supports nested tensors, but the backward does not
                return _merged(operands, scale)
        norm = known_norm[0] if known_norm else row_norms(weight, a, b, scale)
        y = F.linear(x, weight, bias).contiguous()
        rows_of_y = flat(y)
        on, one, by_row = switch(gate, y)
        c = _column_scale(magnitude, norm)
        if on is not None:
            c = torch.where(on.any(), c, 1)
        dropped, keep = dropped_out(x, dropout)
        h = select(on, scaled_product(flat(dropped), cast(a, x.dtype).T, scale))
        if dropout:
            product = flat(dropped) @ weight.T
            out = torch.addcmul(rows_of_y, product, c - 1)
        else:
            product = rows_of_y
            out = product * c if bias is None else torch.addcmul(torch.addcmul(bias, bias, c, value=-1), product, c)
        # stays in the dtype of c until the end, so that only the final cast rounds
        out = cast(add_product(out, cast(h, c.dtype), _scaled_b(c, b, one, c.dtype).T), x.dtype)
        out = out if y.dim() == 2 else out.view(y.shape)
        if by_row is not None:
            out = torch.where(by_row, out, y)
        for_magnitude = bool(needs.extra) and needs.extra[0]
        of_magnitude = (norm, product, None if dropout else bias) if for_magnitude else (None, None, None)
        h_kept = h if needs.b or for_magnitude else None
        return out, SavedDora(*kept_by_lora(operands, needs), h_kept, keep, c, *of_magnitude)

    def backward(self, dy: Tensor, saved: SavedDora | SavedMergedDora, options: Options, needs: Needs) -> Gradients:
        r"""The gradients of LoRA with ``c ∘ dy`` in place of dy, and that of m.

        With ``p = δ · scale · dy (c ∘ B)`` and without dropout:

        dx = (c ∘ dy) W + p A      dA = pᵀ x      dB = c ∘ dyᵀ h      dm = Σ_rows dy ∘ (x Wᵀ + h Bᵀ) / norm
        """
        if isinstance(saved, SavedMergedDora):
            return _backward_of_merged(dy, saved, options.scale, needs)
        x, weight, a, b, h, keep, c, *_ = saved
        scale, dropout, gate = options
        for_magnitude = bool(needs.extra) and needs.extra[0]
        dx = dw = dbias = da = db = dm = None
        rows, switches = flat(dy), switch(gate, dy)
        on, one, by_row = switches
        on_rows = select(by_row, rows)
        dropped = x if x is None or keep is None else masked(x, keep, dropout)
        if needs.bias:
            dbias = rows.sum(0)
        if h is not None:
            across = transposed_times(on_rows, h)
            if needs.b:
                db = select(one, across * c.unsqueeze(1))
            if for_magnitude and b is not None:
                dm = _of_magnitude(on_rows, across, b, saved, switches)
        if (needs.x or needs.a) and b is not None:
            scaled_b = _scaled_b(c, b, one, dy.dtype)
            p = select(on, times(rows, scaled_b, scale))
            if needs.a and dropped is not None:
                da = select(one, p.T @ select(by_row, flat(dropped)))
            if needs.x and weight is not None and a is not None:
                a_cast = select(one, cast(a, dy.dtype))
                dx = shaped_like(_of_x(dy, weight, a_cast, scaled_b, p, saved, switches, options), dy)
        if needs.weight and x is not None and dropped is not None:
            dw = weight_gradient(dy, x, dropped, c, switches)
        return Gradients(dx, dw, dbias, da, db, (dm, None))

    def launches(self, call: Call) -> Launches:
        """The launches with a merged W or without; omits launches that move no more than a row or a factor."""
        sizes = call.sizes
        assert sizes is not None
        if merges(call.device, call.dtype, sizes.m, sizes.n * sizes.k, call.dropout):
            return _launches_of_merged(sizes)
        return _launches(sizes, sizes.m * sizes.k if call.dropout else 0)

    def saved_elsewhere(self, saved: SavedDora, dy: Tensor, options: Options) -> SavedDora:
        """Returns `saved`: this is the addmm backend."""
        return saved


def weight_gradient(dy: Tensor, x: Tensor, dropped: Tensor, c: Tensor, switches: Switch) -> Tensor:
    """``dW = (c ∘ dy)ᵀ x``, or with dropout D ``dyᵀ x + ((c − 1) ∘ dy)ᵀ (D x)``; `dropped` is D x."""
    if dropped is x:
        return _scaled(dy, c, switches.rows).T @ flat(x)
    rows = flat(dy)
    return rows.T @ flat(x) + cast(select(switches.rows, rows) * (c - 1), dy.dtype).T @ flat(dropped)


def merges(device: torch.device, dtype: torch.dtype, rows: int | None, entries: int, dropout: float) -> bool:
    """Whether to compute ``c ∘ (W + scale · B A)``, with all gradients from ``dyᵀ x``; W has `entries` entries.

    Only if A and B train and the adapter is active. This takes one more product of the size of W and no pass over
    tensors of shape ``[rows, out_features]``, which was measured to be faster for a small W on a CPU. Not in low
    precision, which would round small updates away.
    """
    many = rows is not None and rows >= MERGED_ROWS
    return device.type == "cpu" and dtype.itemsize >= 4 and many and entries <= MERGED_ENTRIES and not dropout


def _merged(operands: Operands, scale: float) -> tuple[Tensor, SavedMergedDora]:
    x, weight, bias, a, b, (magnitude, *known_norm), _ = operands
    assert weight is not None
    total = weight.addmm(cast(b, x.dtype), cast(a, x.dtype), alpha=scale)
    norm = known_norm[0] if known_norm else torch.linalg.vector_norm(total, dim=1)
    c = _column_scale(magnitude, norm)
    y = F.linear(x, cast(total * c.unsqueeze(1), x.dtype), bias)
    return y, SavedMergedDora(x, a, b, c, norm, total)


def _backward_of_merged(dy: Tensor, saved: SavedMergedDora, scale: float, needs: Needs) -> Gradients:
    r"""``dA = scale · Bᵀ G, dB = scale · G Aᵀ, dm = Σ dyᵀ x ∘ (W + scale · B A) / norm`` with ``G = c ∘ dyᵀ x``."""
    x, a, b, c, norm, total = saved
    rows, column, dm = flat(dy), c.unsqueeze(1), None
    across = rows.T @ flat(x)
    if needs.extra and needs.extra[0]:
        dm = (across * total).sum(1).div_(norm).masked_fill_(norm.logical_not(), 0)
    across = cast(across * column, rows.dtype)
    return Gradients(
        shaped_like(rows @ cast(total * column, rows.dtype), dy) if needs.x else None,
        across if needs.weight else None,
        rows.sum(0) if needs.bias else None,
        scaled_product(cast(b, dy.dtype).T, across, scale),
        scaled_product(across, cast(a, dy.dtype).T, scale),
        (dm, None),
    )


def _column_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """As `reference.column_scale`, in fewer steps, because no gradient flows through the division."""
    return (magnitude / norm).masked_fill_(norm.logical_not(), 1)


def _of_x(
    dy: Tensor,
    weight: Tensor,
    a: Tensor,
    scaled_b: Tensor,
    p: Tensor,
    saved: SavedDora,
    switches: Switch,
    options: Options,
) -> Tensor:
    """``(c ∘ dy) W + p A``, or with dropout ``dy W + D ∘ (((c − 1) ∘ dy) W + p A)``."""
    rows, c, keep, by_row = flat(dy), saved.column_scale, saved.keep, switches.rows
    if keep is not None:
        update = (cast(select(by_row, rows) * (c - 1), rows.dtype) @ weight).add_(select(by_row, p @ a))
        return (rows @ weight).add_(masked(update, flat(keep), options.dropout))
    if by_row is not None:
        return (_scaled(dy, c, by_row) @ weight).add_(select(by_row, p @ a))
    # c is multiplied into the smaller operand; an unknown number of rows is assumed to be small
    if torch.compiler.is_compiling() or rows.shape[0] <= weight.shape[1]:
        return (_scaled(dy, c, None) @ weight).addmm_(p, a)
    scaled = cast(weight * c.unsqueeze(1), rows.dtype)
    # so is the update, if that is smaller and low precision would not round it away
    if rows.shape[0] > weight.shape[0] and weight.dtype.itemsize >= 4:
        return rows @ scaled.addmm_(scaled_b, a, alpha=options.scale)
    return (rows @ scaled).addmm_(p, a)


def _of_magnitude(on_rows: Tensor, across: Tensor, b: Tensor, saved: SavedDora, switches: Switch) -> Tensor:
    """``Σ_rows dy ∘ u / norm [out_features]`` with ``u = x Wᵀ + h Bᵀ`` and ``across = dyᵀ h``."""
    product, norm = saved.product, saved.norm
    assert product is not None
    assert norm is not None
    # selects, because inactive rows may be infinite
    product = select(switches.rows, cast(product, norm.dtype))
    # subtracts the bias before the sum, because a large bias would cost the sum precision
    terms = on_rows * product if saved.product_bias is None else torch.sub(product, saved.product_bias).mul_(on_rows)
    total = terms.sum(0) + (across * b).sum(1)
    # a row with norm 0 has c = 1, independent of m
    without_norm = norm.logical_not()
    if switches.on is not None:
        without_norm |= ~switches.on.any()
    return (total / norm).masked_fill_(without_norm, 0)


def _scaled_b(c: Tensor, b: Tensor, one: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``c ∘ B``, ``[out_features, rank]``, in `dtype`; zeros if a gate for all rows is 0."""
    return select(one, cast(b * c.unsqueeze(1), dtype))


def _scaled(dy: Tensor, c: Tensor, by_row: Tensor | None) -> Tensor:
    """``c ∘ dy``, ``[rows, out_features]``, on active rows, and dy on the others."""
    scaled = cast(dy * c, dy.dtype)
    return flat(scaled if by_row is None else torch.where(by_row, scaled, dy))


def _launches_of_merged(sizes: Sizes) -> Launches:
    bytes_of, products = sizes.bytes, sizes.products
    return Launches(
        (
            Launch("addmm", bytes_of("w", "a", "b", "w")),
            Launch("norm", bytes_of("w")),
            Launch("mul", bytes_of("w", "w")),
            Launch("linear", bytes_of("x", "w", "y"), products),
        ),
        (
            Launch("mm", bytes_of("dy", "x", "w"), products),
            Launch("mul", bytes_of("w", "w", "w")),
            Launch("sum", bytes_of("w")),
            Launch("mul", bytes_of("w", "w")),
            Launch("addmm", bytes_of("w", "b", "a")),
            Launch("addmm", bytes_of("w", "a", "b")),
            Launch("mul", bytes_of("w", "w")),
            Launch("mm", bytes_of("dy", "w", "dx"), products),
        ),
        bytes_of("w") + 8 * sizes.n,
    )


def _launches(sizes: Sizes, mask: int) -> Launches:
    bytes_of, products = sizes.bytes, sizes.products

    def wide(name: str) -> list[str]:
        return [name] * (4 // sizes.element_size)  # repeated so that the bytes are those of a float32 tensor

    def cast(name: str) -> list[Launch]:
        return [Launch("cast", bytes_of(name, *wide(name)))] if sizes.element_size < 4 else []

    # c is multiplied into the smaller operand; the update is added to W under the conditions of _of_x
    smaller = "dy" if sizes.m <= sizes.k else "w"
    merged = sizes.m > max(sizes.n, sizes.k) and sizes.element_size >= 4
    return Launches(
        (
            *cast("w"),
            # in blocks, which may stay in a cache between launches
            Launch("addmm", bytes_of(*wide("w"), *wide("w"))),
            Launch("norm", bytes_of(*wide("w"))),
            Launch("linear", bytes_of("x", "w", "y"), products),
            Launch("addmm", bytes_of("x", "a", "h")),
            Launch("addcmul", bytes_of("y", *wide("y"))),
            Launch("addmm_", bytes_of("h", "b", *wide("y"), *wide("y"))),
            *cast("y"),
        ),
        (
            Launch("mm", bytes_of("h", "dy", "b")),
            *cast("u"),
            Launch("sub", bytes_of(*wide("u"), *wide("u"))),
            Launch("mul_", bytes_of("dy", *wide("u"), *wide("u"))),
            Launch("sum", bytes_of(*wide("u"))),
            Launch("addmm", bytes_of("b", "dy", "p")),
            Launch("mm", bytes_of("p", "x", "a")),
            Launch("mul", bytes_of(smaller, *wide(smaller))),
            *cast(smaller),
            Launch("addmm_", bytes_of("a", "b", "w", "w") if merged else bytes_of("p", "a", "dx", "dx")),
            Launch("mm", bytes_of("dy", "w", "dx"), products),
        ),
        bytes_of("h", "u") + 8 * sizes.n + mask,
    )


BACKEND = DoraByAddmm()
