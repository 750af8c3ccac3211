"""LoRA of several layers that read one x, as vendor GEMMs: one product for all A, and one for their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm.products import (
    cast,
    flat,
    scaled_product,
    shaped_like,
    times,
    transposed_times,
    transposing_is_faster,
)
from cotolora.backends.types import Stacked


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    bs: Sequence[Tensor],
    scale: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """As `LoraByAddmm.forward`. h is laid out by rank where that is faster for a layer alone."""
    dtype, rows, ranks = x.dtype, flat(x), [b.shape[1] for b in bs]
    a = cast(torch.cat(factors), dtype)  # type: ignore[arg-type]
    if dtype is not torch.float32:
        h, scale = scaled_product(rows, a.T, scale), 1.0
    else:
        h = (a @ rows.T).T if transposing_is_faster(rows, max(ranks)) else F.linear(rows, a)
    outputs, start = [], 0
    for weight, bias, b, rank in zip(weights, biases, bs, ranks, strict=True):
        y = F.linear(x, weight, bias).contiguous()
        flat(y).addmm_(h.narrow(1, start, rank), cast(b, dtype).T, alpha=scale)
        outputs.append(y)
        start += rank
    return outputs, a, h


def _backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    h: Tensor,
    scale: float,
) -> tuple[Tensor | None, Sequence[Tensor], list[Tensor]]:
    """As `LoraByAddmm.backward`; dx is summed in place."""
    rows_x, dtype, start = flat(x), x.dtype, 0
    h_scale = scale if dtype is torch.float32 else 1.0
    p, da, db, dx = [], [], [], None
    for i, (dy, b) in enumerate(zip(dys, bs, strict=True)):
        rows, rank = flat(dy), b.shape[1]
        p.append(times(rows, cast(b, dtype), scale))
        db.append(transposed_times(rows, h.narrow(1, start, rank), h_scale))
        start += rank
        if weights:
            dx = rows @ weights[i] if dx is None else dx.addmm_(rows, weights[i])
    # laid out by rank or by row, as the products have left it
    by_rank = torch.cat([one.T for one in p]) if p[0].stride(0) == 1 else torch.cat(p, 1).T
    of_all, start = by_rank @ rows_x, 0
    for b in bs:
        da.append(of_all.narrow(0, start, b.shape[1]))
        start += b.shape[1]
    return None if dx is None else shaped_like(dx.addmm_(by_rank.T, a), x), da, db


STACKED = Stacked(_forward, _backward)
