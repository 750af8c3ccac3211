"""HiRA as vendor GEMMs with a hand-written backward."""

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
    scaled_product,
    select,
    shaped_like,
    switch,
)
from cotolora.backends.types import Call, Gradients, Kept, Launch, Launches, Needs, Operands, Options
from cotolora.operands import refuse_nested

# number of entries in a block of W's gradient: on a CPU it fits into the cache, elsewhere it keeps the device busy
BLOCK_CPU, BLOCK_DEVICE = 1 << 18, 1 << 24
_PRECISE = 4  # bytes of a dtype in which ``1 + scale · B A`` keeps small updates


class SavedHira(NamedTuple):
    """The tensors for the backward, or None: operands, and the boolean dropout mask in the shape of x."""

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    keep: Tensor | None


def kept_by_hira(operands: Operands, needs: Needs) -> Kept:
    """The operands that the gradients of HiRA read; those of A and B are computed from that of ``scale · B A``."""
    x, weight, _, a, b, *_ = operands
    return Kept(
        x if needs.a or needs.b or needs.weight else None,
        weight if needs.x or needs.a or needs.b else None,
        a if any(needs[:5]) else None,
        b if any(needs[:5]) else None,
    )


class HiraByAddmm:
    """``y = x (W ∘ (1 + scale · B A))ᵀ + bias`` in one GEMM, or ``x Wᵀ + bias + (D x) (W ∘ scale · B A)ᵀ`` in two.

    Two GEMMs with dropout D, with row gates, and below float32, where ``1 + scale · B A`` would lose small updates.
    """

    def why_not(self, call: Call) -> list[str]:
        """Empty: it can run every call."""
        return []

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedHira]:
        """Computes one of the two forms in the docstring of the class."""
        x, weight, bias, a, b, *_ = operands
        scale, dropout, gate = options
        assert weight is not None
        on, _, by_row = switch(gate, x)
        a, b = cast(a, x.dtype), cast(b, x.dtype)
        kept = kept_by_hira(operands, needs)
        if not dropout and _one_gemm_suffices(weight, by_row):
            refuse_nested(x)  # F.linear supports nested tensors, but the backward does not
            return F.linear(x, _whole_weight(weight, a, b, scale, on), bias), SavedHira(*kept, None)
        y = F.linear(x, weight, bias).contiguous()
        dropped, keep = dropped_out(x, dropout)
        update = _update(weight, a, b, scale)
        if on is None:
            y = add_product(flat(y), flat(dropped), update.T).view(y.shape)
        else:
            y = torch.where(on, torch.addmm(flat(y), flat(dropped), update.T).view(y.shape), y)
        return y, SavedHira(*kept, keep)

    def backward(self, dy: Tensor, saved: SavedHira, options: Options, needs: Needs) -> Gradients:
        r"""The gradients; G, that of ``scale · B A``, is computed in blocks of rows of W and never held as a whole.

        With ``G = dyᵀ (D x) ∘ W`` over active rows:

        dx = dy W + D ∘ (dy (W ∘ scale · B A))      dA = scale · Bᵀ G      dB = scale · G Aᵀ
        """
        x, weight, a, b, keep = saved
        scale, dropout, gate = options
        dx = dw = dbias = da = db = None
        rows = flat(dy)
        on, _, by_row = switch(gate, dy)
        # if every row is inactive, A and B may hold infinities, even in products with zeros
        any_on = None if on is None else on.any()
        if needs.bias:
            dbias = rows.sum(0)
        if a is None or b is None:
            return Gradients(bias=dbias)
        a, b = cast(a, dy.dtype), cast(b, dy.dtype)
        on_rows = select(by_row, rows)
        if x is not None:
            dropped = select(by_row, flat(x if keep is None else masked(x, keep, dropout)))
            if needs.weight:
                update = (on_rows.T @ dropped) * scaled_product(b, a, scale)
                dw = rows.T @ flat(x) + select(any_on, update)
            if (needs.a or needs.b) and weight is not None:
                da, db = _of_factors(on_rows, dropped, weight, a, b, needs, scale)
                da = None if da is None else select(any_on, da)
                db = None if db is None else select(any_on, db)
        if needs.x and weight is not None:
            if keep is None and _one_gemm_suffices(weight, by_row):
                dx = rows @ _whole_weight(weight, a, b, scale, on)
            else:
                update = select(on, on_rows @ _update(weight, a, b, scale))
                dx = (rows @ weight).add_(update if keep is None else masked(update, flat(keep), dropout))
            dx = shaped_like(dx, dy)
        return Gradients(dx, dw, dbias, da, db)

    def launches(self, call: Call) -> Launches:
        """Those of the form that calls without row gates take."""
        sizes = call.sizes
        assert sizes is not None
        bytes_of, products = sizes.bytes, sizes.products
        ranks = 2 * sizes.n * sizes.k * max(16, sizes.rank)
        linear, to_x = (
            Launch("linear", bytes_of("x", "w", "y"), products),
            Launch("mm", bytes_of("dy", "w", "dx"), products),
        )
        for_factors = (
            Launch("mm", bytes_of("dy", "x", "w"), products),
            Launch("mul_", bytes_of("w", "w", "w")),
            Launch("addmm", bytes_of("w", "a", "b"), ranks),
            Launch("addmm", bytes_of("w", "b", "a"), ranks),
        )
        product = Launch("addmm", bytes_of("a", "b", "w"), ranks)
        if not call.dropout and call.dtype.itemsize >= _PRECISE:
            whole = (product, Launch("addcmul", bytes_of("w", "w", "w")))
            return Launches((*whole, linear), (*for_factors, *whole, to_x), 0)
        update = (product, Launch("mul_", bytes_of("w", "w", "w")))
        return Launches(
            (linear, *update, Launch("addmm_", bytes_of("x", "w", "y", "y"), products)),
            (*for_factors, *update, to_x, to_x, Launch("add_", bytes_of("dx", "dx", "dx"))),
            sizes.m * sizes.k if call.dropout else 0,
        )

    def saved_elsewhere(self, saved: SavedHira, dy: Tensor, options: Options) -> SavedHira:
        """Returns `saved`: this is the addmm backend."""
        return saved


def _of_factors(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, needs: Needs, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """``scale · Bᵀ G [rank, in_features]`` and ``scale · G Aᵀ [out_features, rank]`` with ``G = dyᵀ x ∘ W``."""
    da, parts = None, []
    size = max(1, (BLOCK_CPU if dy.device.type == "cpu" else BLOCK_DEVICE) // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], size):
        block = slice(start, start + size)
        g = (dy[:, block].T @ x).mul_(weight[block])
        if needs.b:
            parts.append(scaled_product(g, a.T, scale))
        if needs.a:
            part = scaled_product(b[block].T, g, scale)
            # sums several parts in at least float32
            da = part if da is None else part.to(torch.promote_types(part.dtype, torch.float32)) + da
    return da, torch.cat(parts) if parts else None


def _one_gemm_suffices(weight: Tensor, by_row: Tensor | None) -> bool:
    """Whether all rows have the same weight, and its dtype is precise enough for ``1 + scale · B A``."""
    return by_row is None and weight.dtype.itemsize >= _PRECISE


def _update(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``W ∘ scale · B A``, ``[out_features, in_features]``."""
    return _product(weight, a, b, scale).mul_(weight)


def _whole_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, on: Tensor | None) -> Tensor:
    """``W ∘ (1 + scale · B A)``, ``[out_features, in_features]``; W itself if the gate is 0."""
    product = _product(weight, a, b, scale)
    both = torch.addcmul(weight, weight, product, out=product)
    return both if on is None else torch.where(on, both, weight)


def _product(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · B A`` in the memory layout of `weight`, which may be a transposed view."""
    if weight.stride(0) < weight.stride(1):
        return scaled_product(a.T, b.T, scale).T
    return scaled_product(b, a, scale)


BACKEND = HiraByAddmm()
