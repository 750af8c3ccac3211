"""HiRA as vendor GEMMs with a hand-written backward; `lora.py` beside it has the plain form and what both share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm.lora import Needs, Saved, add_product, cast, flat, masked, scaled_mm, select
from cotolora.reference import Gate, rows_on

# entries of a block of W's gradient: on a CPU what a cache holds, else what keeps a device busy
BLOCK_CPU, BLOCK_DEVICE = 1 << 18, 1 << 24


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    gate: Gate,
    dropout: float,
) -> tuple[Tensor, Saved]:
    """``y = x (W ∘ (1 + scale · B A))ᵀ + bias`` in one GEMM, or ``x Wᵀ + bias + (D x) (W ∘ scale · B A)ᵀ`` in two.

    Two with dropout D, with row gates, and below float32, where ``1 + scale · B A`` would lose small updates.
    Shapes as in `cotolora.reference.hira_linear`; `gate` is True or a tensor.
    """
    on = rows_on(gate, x) if isinstance(gate, Tensor) else None
    lora_a, lora_b = cast(lora_a, x.dtype), cast(lora_b, x.dtype)
    if not dropout and _in_one(weight, on):
        return F.linear(x, _whole_weight(weight, lora_a, lora_b, scale, on), bias), Saved(None, None)
    y = F.linear(x, weight, bias).contiguous()
    dropped, keep = torch.native_dropout(x, dropout, True) if dropout else (x, None)
    update = _update(weight, lora_a, lora_b, scale)
    if on is None:
        y = add_product(flat(y), flat(dropped), update.T).view(y.shape)
    else:
        y = torch.where(on, torch.addmm(flat(y), flat(dropped), update.T).view(y.shape), y)
    return y, Saved(None, keep)


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

    With ``G = dyᵀ (D x) ∘ W`` of gated rows:

        dx = dy W + D ∘ (dy (W ∘ scale · B A))      dA = scale · Bᵀ G      dB = scale · G Aᵀ

    G is made and used up by blocks of rows of W. Only what `needs` asks for is computed.
    """
    dx = dw = dbias = da = db = None
    rows = flat(dy)
    on = rows_on(gate, dy) if isinstance(gate, Tensor) else None
    by_row = None if on is None or on.dim() == 0 else on
    # where every row is off A and B may be anything, also in a product with zeros
    any_on = None if on is None else on.any()
    if lora_a is not None:
        lora_a = cast(lora_a, dy.dtype)
    if lora_b is not None:
        lora_b = cast(lora_b, dy.dtype)
    on_rows = select(by_row, rows)
    dropped = None
    if x is not None:
        dropped = flat(x if saved.keep is None else masked(x, saved.keep, dropout))
        dropped = select(by_row, dropped)
    if needs.bias:
        dbias = rows.sum(0)
    if needs.weight and x is not None and dropped is not None and lora_a is not None and lora_b is not None:
        update = (on_rows.T @ dropped) * scaled_mm(lora_b, lora_a, scale)
        dw = rows.T @ flat(x) + select(any_on, update)
    if (needs.lora_a or needs.lora_b) and dropped is not None and weight is not None:
        da, db = _for_factors(on_rows, dropped, weight, lora_a, lora_b, needs, scale)
        da = None if da is None else cast(select(any_on, da), needs.lora_a or da.dtype)
        db = None if db is None else cast(select(any_on, db), needs.lora_b or db.dtype)
    if needs.x and weight is not None and lora_a is not None and lora_b is not None:
        if saved.keep is None and _in_one(weight, on):
            dx = rows @ _whole_weight(weight, lora_a, lora_b, scale, on)
        else:
            update = select(on, on_rows @ _update(weight, lora_a, lora_b, scale))
            dx = (rows @ weight).add_(update if saved.keep is None else masked(update, flat(saved.keep), dropout))
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, dw, dbias, da, db


def _for_factors(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, needs: Needs, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """``scale · Bᵀ G [rank, in_features]`` and ``scale · G Aᵀ [out_features, rank]`` with ``G = dyᵀ x ∘ W``."""
    da, parts = None, []
    size = max(1, (BLOCK_CPU if dy.device.type == "cpu" else BLOCK_DEVICE) // weight.shape[1])
    for start in range(0, weight.shape[0], size):
        block = slice(start, start + size)
        g = (dy[:, block].T @ x).mul_(weight[block])
        if needs.lora_b and lora_a is not None:
            parts.append(scaled_mm(g, lora_a.T, scale))
        if needs.lora_a and lora_b is not None:
            part = scaled_mm(lora_b[block].T, g, scale)
            # sums of more than one part in float32
            da = part if da is None else part.to(torch.promote_types(part.dtype, torch.float32)) + da
    return da, torch.cat(parts) if parts else None


def _in_one(weight: Tensor, on: Tensor | None) -> bool:
    """Whether one weight serves all rows, and has the precision for it."""
    return (on is None or on.dim() == 0) and weight.dtype.itemsize >= 4


def _update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``W ∘ scale · B A [out_features, in_features]``."""
    return _product(weight, lora_a, lora_b, scale).mul_(weight)


def _whole_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, on: Tensor | None) -> Tensor:
    """``W ∘ (1 + scale · B A) [out_features, in_features]``; W itself where the one gate is off."""
    product = _product(weight, lora_a, lora_b, scale)
    both = torch.addcmul(weight, weight, product, out=product)
    return both if on is None else torch.where(on, both, weight)


def _product(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``scale · B A``, laid out as `weight` lies, which may be a transposed view."""
    if weight.stride(0) < weight.stride(1):
        return scaled_mm(lora_a.T, lora_b.T, scale).T
    return scaled_mm(lora_b, lora_a, scale)
