"""LoRA as vendor GEMMs with a hand-written backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm.products import (
    ALWAYS_ON,
    add_product,
    cast,
    down_projection,
    dropped_out,
    flat,
    ignored_by_addmm,
    is_known_finite,
    masked,
    scaled_product,
    select,
    shaped_like,
    switch,
    times,
    transposed_times,
    transposing_is_faster,
)
from cotolora.backends.addmm.stacked import STACKED
from cotolora.backends.types import AlwaysOn, Call, Gradients, Launch, Launches, Needs, Operands, Options, Stacked

# number of features of x from which a CPU is not slower with several layers together than one by one: whole blocks with
# 394 rows and rank 8 took 0.97 to 1.01 times as long at 256 and 768 features; groups alone took 1.01 to 1.08 times as
# long at 64 and 128
_WIDE = 256


class SavedLora(NamedTuple):
    """The tensors for the backward, None for those that it does not read.

    x, weight, a, b: the operands.
    h: ``δ · dropout(x) Aᵀ``, ``[rows, rank]``, in the dtype of y; multiplied by scale unless that dtype is float32.
    keep: the boolean dropout mask, in the shape of x.
    """

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    h: Tensor | None
    keep: Tensor | None


class LoraByAddmm:
    """``y = x Wᵀ + bias + h Bᵀ`` or ``y = base + h Bᵀ``, with ``h = δ · scale · dropout(x) Aᵀ``.

    If y is float32, h does not contain the scale; the product with B applies it. In lower precision that product is
    rounded before it is added, and a scale there would round once more, so h contains the scale.
    """

    def why_not(self, call: Call) -> list[str]:
        """Empty: it can run every call."""
        return []

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedLora]:
        """Adds ``h Bᵀ`` in place to ``x Wᵀ + bias``, but out of place to `base`, which its module may still need."""
        x, weight, bias, a, b, _, base = operands
        scale, dropout, gate = options
        # the conditions here and below avoid function calls, which take as long as the products of tiny layers
        if weight is not None:
            # contiguous() copies nothing as long as F.linear returns contiguous tensors; without it, the in-place
            # update would be lost for a layout that cannot be viewed as a matrix
            y = F.linear(x, weight, bias).contiguous()
        else:
            assert base is not None
            y = base
        dtype = x.dtype
        a_cast, b_cast = a if a.dtype is dtype else a.to(dtype), b if b.dtype is y.dtype else b.to(y.dtype)
        dropped, keep = (x, None) if not dropout else dropped_out(x, dropout)
        rows, dropped = (y, dropped) if y.dim() == 2 else (flat(y), flat(dropped))
        if y.dtype is torch.float32:
            h = down_projection(dropped, a_cast)
        else:
            h, scale = scaled_product(dropped, a_cast.T, scale), 1.0
        by_row = None
        if h.dtype is not y.dtype:
            h = h.to(y.dtype)
        if gate is not None:
            on, one, by_row = switch(gate, y)
            h, b_cast = select(on, h), select(one, b_cast)
        if by_row is not None and not is_known_finite(b_cast):
            # zeros in inactive rows times a non-finite B give NaN, so this selects after the product
            y = torch.where(by_row, torch.addmm(rows, h, b_cast.T, alpha=scale).view(y.shape), y)
        elif base is not None:
            y = torch.addmm(rows, h, b_cast.T, alpha=scale).view(y.shape)
        elif (total := add_product(rows, h, b_cast.T, scale)) is not rows:
            y = total.view(y.shape)
        return y, SavedLora(
            x if needs.a or needs.weight else None,
            weight if needs.x else None,
            # the gradient of B needs only h, but A must be saved so that a second differentiation is detected
            a if needs.x or needs.b else None,
            b if needs.x or needs.a else None,
            h if needs.b else None,
            keep if needs.a or needs.x else None,
        )

    def backward(self, dy: Tensor, saved: SavedLora, options: Options, needs: Needs) -> Gradients:
        r"""The gradients, from the h that the forward saved.

        With ``p = δ · scale · dy B`` and D the dropout mask times ``1 / (1 - dropout)``:

            dx = dy W + D ∘ (p A)      dA = pᵀ (D ∘ x)      dB = dyᵀ h, times scale if h does not contain it
            dW = dyᵀ x                 dbias = Σ_rows dy

        Without a weight, dx is that of the low-rank update alone, and p is cast to the dtype of x.
        """
        x, weight, a, b, h, keep = saved
        scale, dropout, gate = options
        dx = dw = dbias = da = db = None
        rows = dy if dy.dim() == 2 else flat(dy)
        # inactive rows add zero to the gradients of A and B even if x or dy is not finite: a single gate
        # selects in the product, row gates select in its operands
        on, one, by_row = ALWAYS_ON if gate is None else switch(gate, dy)
        if needs.weight and x is not None:
            dw = rows.T @ flat(x)
        if needs.bias:
            dbias = rows.sum(0)
        if needs.b and h is not None:
            on_rows = rows if by_row is None else select(by_row, rows)
            db = transposed_times(on_rows, h, scale if h.dtype is torch.float32 else 1.0)
            db = db if one is None else select(one, db)
        if (needs.x or needs.a) and b is not None:
            p = times(rows, b if b.dtype is dy.dtype else b.to(dy.dtype), scale)
            p = p if on is None else select(on, p)
            # x Aᵀ was computed in the dtype of x, which may differ from that of dy and of a base output
            p = p if x is None or p.dtype is x.dtype else p.to(x.dtype)
            if needs.a and x is not None:
                dropped = flat(x if keep is None else masked(x, keep, dropout))
                da = p.T @ (dropped if by_row is None else select(by_row, dropped))
                da = da if one is None else select(one, da)
            if needs.x and a is not None:
                a_cast = a if a.dtype is p.dtype else a.to(p.dtype)
                dx = _of_x(rows, weight, select(one, a_cast), p, by_row, keep, dropout)
                dx = dx if dy.dim() == 2 else shaped_like(dx, dy)
        return Gradients(dx, dw, dbias, da, db)

    def always_on(self, call: Call) -> AlwaysOn | None:
        """The faster functions, if there is a weight and no dropout. Below float32 they cast A and B to x's dtype."""
        if call.dropout or call.adds:
            return None
        if call.dtype is torch.float32:
            return AlwaysOn(_forward_always_on, _backward_always_on, casts=False)
        return AlwaysOn(_forward_always_on_cast, _backward_always_on_cast, casts=True)

    def stacked(self, call: Call) -> Stacked | None:
        """The functions for several layers, if there is a weight and no dropout, and on a CPU if x is wide enough."""
        narrow = call.device.type == "cpu" and call.in_features < _WIDE
        return None if call.dropout or call.adds or narrow else STACKED

    def launches(self, call: Call) -> Launches:
        """Three launches forward and five backward, or two and four with a `base`; omits those of a row or a factor."""
        sizes = call.sizes
        assert sizes is not None
        bytes_of = sizes.bytes
        mask = sizes.m * sizes.k if call.dropout else 0
        for_factors = (
            Launch("mm", bytes_of("h", "dy", "b")),
            Launch("addmm", bytes_of("b", "dy", "p")),
            Launch("mm", bytes_of("p", "x", "a")),
        )
        if call.adds:
            return Launches(
                # out of place: torch first copies y and then adds to the copy
                (Launch("addmm", bytes_of("x", "a", "h")), Launch("addmm", bytes_of("h", "b", "y", "y", "y", "y"))),
                (*for_factors, Launch("mm", bytes_of("p", "a", "dx"))),
                bytes_of("h") + mask,
            )
        return Launches(
            (
                Launch("linear", bytes_of("x", "w", "y"), sizes.products),
                Launch("addmm", bytes_of("x", "a", "h")),
                Launch("addmm_", bytes_of("h", "b", "y", "y")),
            ),
            (
                *for_factors,
                Launch("mm", bytes_of("dy", "w", "dx"), sizes.products),
                Launch("addmm_", bytes_of("p", "a", "dx", "dx")),
            ),
            bytes_of("h") + mask,
        )

    def saved_elsewhere(self, saved: SavedLora, dy: Tensor, options: Options) -> SavedLora:
        """Returns `saved`: this is the addmm backend."""
        return saved


def _forward_always_on(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `LoraByAddmm.forward`."""
    y = F.linear(x, weight, bias)
    if y.dim() == 2:
        h = down_projection(x, a)
        y.addmm_(h, b.T, alpha=scale)
        return y, h
    y = y.contiguous()
    h = down_projection(flat(x), a)
    flat(y).addmm_(h, b.T, alpha=scale)
    return y, h


def _backward_always_on(
    dy: Tensor, x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, h: Tensor, scale: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """As `LoraByAddmm.backward`."""
    rows, x = (dy, x) if dy.dim() == 2 else (flat(dy), flat(x))
    none = ignored_by_addmm(dy)
    if transposing_is_faster(rows, h.shape[1]):
        p = torch.addmm(none, b.T, rows.T, beta=0, alpha=scale).T
        db = torch.addmm(none, h.T, rows, beta=0, alpha=scale).T
    else:
        p = torch.addmm(none, rows, b, beta=0, alpha=scale)
        db = torch.addmm(none, rows.T, h, beta=0, alpha=scale)
    da = p.T @ x
    if weight is None:
        return None, da, db
    dx = (rows @ weight).addmm_(p, a)
    return dx if dy.dim() == 2 else shaped_like(dx, dy), da, db


def _forward_always_on_cast(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `LoraByAddmm.forward`."""
    y, dtype = F.linear(x, weight, bias).contiguous(), x.dtype
    h = scaled_product(flat(x), cast(a, dtype).T, scale)
    flat(y).addmm_(h, cast(b, dtype).T)
    return y, h


def _backward_always_on_cast(
    dy: Tensor, x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, h: Tensor, scale: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """As `LoraByAddmm.backward`."""
    rows, dtype = flat(dy), dy.dtype
    p, db = times(rows, cast(b, dtype), scale), transposed_times(rows, h)
    da = p.T @ flat(x)
    dx = None if weight is None else shaped_like((rows @ weight).addmm_(p, cast(a, dtype)), dy)
    return dx, da, db


def _of_x(
    rows: Tensor,
    weight: Tensor | None,
    a: Tensor,
    p: Tensor,
    by_row: Tensor | None,
    keep: Tensor | None,
    dropout: float,
) -> Tensor:
    dx = None if weight is None else rows @ weight
    if keep is None and by_row is None:
        return p @ a if dx is None else dx.addmm_(p, a)
    update = select(by_row, p @ a)
    if keep is not None:
        update = masked(update, flat(keep), dropout)
    return update if dx is None else dx.add_(update)


BACKEND = LoraByAddmm()
