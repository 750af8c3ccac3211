"""VeRA as vendor GEMMs with a hand-written backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm.products import (
    add_product,
    cast,
    dropped_out,
    flat,
    masked,
    select,
    shaped_like,
    switch,
    times,
    transposed_times,
)
from cotolora.backends.types import Call, Gradients, Launch, Launches, Needs, Operands, Options


class SavedVera(NamedTuple):
    """The tensors for the backward, None for those that it does not read.

    x, weight, a, b, lambda_d, lambda_b: the operands.
    z: ``δ · dropout(x) Aᵀ``, ``[rows, rank]``, in the dtype of x.
    keep: the boolean dropout mask, in the shape of x.
    """

    x: Tensor | None
    weight: Tensor | None
    a: Tensor
    b: Tensor
    lambda_d: Tensor
    lambda_b: Tensor
    z: Tensor
    keep: Tensor | None


class VeraByAddmm:
    """``y = x Wᵀ + bias + scale · h (b ∘ B)ᵀ`` or ``y = base + …``, with ``h = d ∘ z`` and ``z = δ · dropout(x) Aᵀ``.

    `extra` of the operands is d and b.
    """

    def why_not(self, call: Call) -> list[str]:
        """Empty: it can run every call."""
        return []

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedVera]:
        """Adds the update in place to ``x Wᵀ + bias``, but out of place to `base`, which its module may still need."""
        x, weight, bias, a, b, (lambda_d, lambda_b), base = operands
        scale, dropout, gate = options
        if weight is not None:
            y = F.linear(x, weight, bias).contiguous()
        else:
            assert base is not None
            y = base
        on, _, by_row = switch(gate, y)
        dropped, keep = dropped_out(x, dropout)
        z = select(on, flat(F.linear(dropped, cast(a, x.dtype))))
        # if every row is inactive, b ∘ B may hold infinities, even in a product with zeros
        any_on = None if on is None else on.any()
        scaled_b = select(any_on, _scaled_b(b, lambda_b, y.dtype))
        h = cast(select(on, z * select(any_on, cast(lambda_d, x.dtype))), y.dtype)
        rows = flat(y)
        if by_row is not None:
            y = torch.where(by_row, torch.addmm(rows, h, scaled_b.T, alpha=scale).view(y.shape), y)
        elif base is not None:
            y = torch.addmm(rows, h, scaled_b.T, alpha=scale).view(y.shape)
        elif (total := add_product(rows, h, scaled_b.T, scale)) is not rows:
            y = total.view(y.shape)
        x_kept = x if needs.a or needs.weight else None
        return y, SavedVera(x_kept, weight if needs.x else None, a, b, lambda_d, lambda_b, z, keep)

    def backward(self, dy: Tensor, saved: SavedVera, options: Options, needs: Needs) -> Gradients:
        r"""The gradients, with D the dropout mask times ``1 / (1 - dropout)``.

        With ``q = δ · scale · dy (b ∘ B)``, ``p = d ∘ q`` and ``S = scale · dyᵀ h`` over active rows:

            dx = dy W + D ∘ (p A)      dA = pᵀ (D ∘ x)      dB = b ∘ S
            dd = Σ_rows q ∘ z          db = Σ_rank B ∘ S
        """
        x, weight, a, b, lambda_d, lambda_b, z, keep = saved
        scale, dropout, gate = options
        for_d, for_b = needs.extra[:2] if needs.extra else (False, False)
        dx = dw = dbias = da = db = dd = d_lambda_b = None
        rows = flat(dy)
        on, _, by_row = switch(gate, dy)
        any_on = None if on is None else on.any()
        on_rows = select(by_row, rows)
        lambda_d = select(any_on, cast(lambda_d, z.dtype))
        if needs.weight and x is not None:
            dw = rows.T @ flat(x)
        if needs.bias:
            dbias = rows.sum(0)
        # in float32 if d or b trains: their gradients are sums whose terms may cancel, and rounded terms would not
        wide = torch.promote_types(dy.dtype, torch.float32) if for_d or for_b else dy.dtype
        if needs.b or for_b:
            h = cast(z, wide) * (scale * cast(lambda_d, wide))
            across = select(any_on, transposed_times(cast(on_rows, wide), h))
            if needs.b:
                db = select(any_on, across * lambda_b.unsqueeze(1))
            if for_b:
                d_lambda_b = select(any_on, (across * cast(b, wide)).sum(1))
        if needs.x or needs.a or for_d:
            q = select(on, times(cast(rows, wide), select(any_on, _scaled_b(b, lambda_b, wide)), scale))
            if for_d:
                dd = (q * cast(z, wide)).sum(0)
            p = cast(q * cast(lambda_d, wide), z.dtype)
            if needs.a and x is not None:
                dropped = flat(x if keep is None else masked(x, keep, dropout))
                da = select(any_on, p.T @ select(by_row, dropped))
            if needs.x:
                update = select(on, p @ select(any_on, cast(a, p.dtype)))
                update = update if keep is None else masked(update, flat(keep), dropout)
                dx = shaped_like(update if weight is None else (rows @ weight).add_(update), dy)
        return Gradients(dx, dw, dbias, da, db, (dd, d_lambda_b))

    def launches(self, call: Call) -> Launches:
        """The launches; omits those that move a factor or less."""
        sizes = call.sizes
        assert sizes is not None
        bytes_of = sizes.bytes
        adds_in_place = ("h", "b", "y", "y") if not call.adds else ("h", "b", "y", "y", "y", "y")
        base = () if call.adds else (Launch("linear", bytes_of("x", "w", "y"), sizes.products),)
        base_dx = () if call.adds else (Launch("mm", bytes_of("dy", "w", "dx"), sizes.products),)
        return Launches(
            (
                *base,
                Launch("linear", bytes_of("x", "a", "h")),
                Launch("mul", bytes_of("h", "h")),
                Launch("addmm", bytes_of(*adds_in_place)),
            ),
            (
                Launch("mul", bytes_of("h", "h")),
                Launch("mm", bytes_of("h", "dy", "b")),
                Launch("addmm", bytes_of("b", "dy", "p")),
                Launch("mul", bytes_of("p", "h", "h")),
                Launch("sum", bytes_of("h")),
                Launch("mul", bytes_of("p", "p")),
                Launch("mm", bytes_of("p", "a", "dx")),
                *base_dx,
                *(() if call.adds else (Launch("add_", bytes_of("dx", "dx", "dx")),)),
            ),
            bytes_of("h") + (sizes.m * sizes.k if call.dropout else 0),
        )

    def saved_elsewhere(self, saved: SavedVera, dy: Tensor, options: Options) -> SavedVera:
        """Returns `saved`: this is the addmm backend."""
        return saved


def _scaled_b(b: Tensor, lambda_b: Tensor, dtype: torch.dtype) -> Tensor:
    """``b ∘ B``, ``[out_features, rank]``, rounded once to `dtype`."""
    return cast(b * lambda_b.unsqueeze(1), dtype)


BACKEND = VeraByAddmm()
