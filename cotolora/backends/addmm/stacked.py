"""LoRA of several layers that read one x, as vendor GEMMs: one product for all A, and one for their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm.products import (
    cast,
    flat,
    is_known_finite,
    scaled_product,
    select,
    shaped_like,
    times,
    transposed_times,
    transposing_is_faster,
)
from cotolora.backends.types import Call, Launch, Launches, Stacked


def on_by_rank(gates: Sequence[Tensor | None], ranks: Sequence[int]) -> Tensor | None:
    """For each rank of each layer whether that layer is on: bool ``[ranks]``, or ``[batch, ranks]`` if a gate is.

    A gate of None is on; without any other the result is None.
    """
    found = [gate for gate in gates if gate is not None]
    if not found:
        return None
    batch = next((gate.shape[0] for gate in found if gate.dim()), None)
    columns = []
    for gate, rank in zip(gates, ranks, strict=True):
        own = found[0].new_ones(()) if gate is None else gate
        columns.append(own.expand(rank) if batch is None else own.reshape(-1, 1).expand(batch, rank))
    return torch.cat(columns, -1) != 0


def select_by_rank(on: Tensor | None, h: Tensor) -> Tensor:
    """``h [rows, ranks]`` where `on_by_rank` is, zeros elsewhere."""
    if on is None or on.dim() == 1:
        return h if on is None else torch.where(on, h, 0)
    per_sample = h.reshape(on.shape[0], h.shape[0] // max(on.shape[0], 1), h.shape[1])
    return torch.where(on[:, None], per_sample, 0).reshape(h.shape)


def switches(on: Tensor | None, gates: Sequence[Tensor | None], ranks: Sequence[int]) -> list[Tensor | None]:
    """The gate of each layer out of `on_by_rank`, ``[]`` or ``[batch]``; None where it has none."""
    found, start = [], 0
    for gate, rank in zip(gates, ranks, strict=True):
        found.append(None if on is None or gate is None else on[..., start])
        start += rank
    return found


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    bs: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    scale: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """As `LoraByAddmm.forward`. h is laid out by rank where that is faster for a layer alone."""
    dtype, rows, ranks = x.dtype, flat(x), [b.shape[1] for b in bs]
    a = cast(torch.cat(factors), dtype)  # type: ignore[arg-type]
    if dtype is not torch.float32:
        h, scale = scaled_product(rows, a.T, scale), 1.0
    else:
        h = (a @ rows.T).T if transposing_is_faster(rows, max(ranks)) else F.linear(rows, a)
    on = on_by_rank(gates, ranks)
    h = select_by_rank(on, h)
    outputs = []
    layers = zip(weights, biases, bs, switches(on, gates, ranks), h.split(ranks, 1), strict=True)
    for weight, bias, b, own, own_h in layers:
        y, b = F.linear(x, weight, bias).contiguous(), cast(b, dtype)
        if own is None or own.dim() == 0 or is_known_finite(b):
            flat(y).addmm_(own_h, select(own if own is None or own.dim() == 0 else None, b).T, alpha=scale)
        else:
            # a row that is off must not meet a non-finite B
            total = torch.addmm(flat(y), own_h, b.T, alpha=scale).view(y.shape)
            y = torch.where(own.view(-1, *[1] * (y.dim() - 1)), total, y)
        outputs.append(y)
    return outputs, a, h


def _backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Tensor,
    bs: Sequence[Tensor],
    h: Tensor,
    gates: Sequence[Tensor | None],
    scale: float,
    dtype_a: torch.dtype,
) -> tuple[Tensor | None, Sequence[Tensor], list[Tensor]]:
    """As `LoraByAddmm.backward`; dx is summed in place. Autograd casts dA."""
    dtype, ranks = x.dtype, [b.shape[1] for b in bs]
    on = on_by_rank(gates, ranks)
    own = switches(on, gates, ranks)
    h_scale = scale if dtype is torch.float32 else 1.0
    p, db, dx = [], [], None
    for i, (dy, b, own_h) in enumerate(zip(dys, bs, h.split(ranks, 1), strict=True)):
        rows = flat(dy)
        p.append(times(rows, cast(b, dtype), scale))
        db.append(_selected_product(rows, own_h, own[i], h_scale))
        if weights:
            dx = rows @ weights[i] if dx is None else dx.addmm_(rows, weights[i])
    # laid out by rank or by row, as the products have left it
    by_rank = torch.cat([one.T for one in p]) if p[0].stride(0) == 1 else torch.cat(p, 1).T
    by_rank = select_by_rank(on, by_rank.T).T
    da = _of_factors(by_rank, flat(x), on, own, ranks)
    if dx is None:
        return None, da, db
    return shaped_like(_add_low_rank(dx, by_rank, a, on, own, ranks), x), da, db


def _selected_product(rows: Tensor, h: Tensor, on: Tensor | None, scale: float) -> Tensor:
    """dB: what is off adds zero even where dy is not finite. One gate for all selects the product."""
    if on is None or on.dim() == 0:
        return select(on, transposed_times(rows, h, scale))
    return transposed_times(select(on, rows), h, scale)


def _of_factors(
    p: Tensor, x: Tensor, on: Tensor | None, own: Sequence[Tensor | None], ranks: Sequence[int]
) -> Sequence[Tensor]:
    """Each dA, of ``p [ranks, rows]``."""
    if on is None or on.dim() == 1 or is_known_finite(x):
        da = p @ x
        return (da if on is None or on.dim() == 2 else torch.where(on[:, None], da, 0)).split(ranks)
    return [one @ select(gate, x) for one, gate in zip(p.split(ranks), own, strict=True)]


def _add_low_rank(
    dx: Tensor, p: Tensor, a: Tensor, on: Tensor | None, own: Sequence[Tensor | None], ranks: Sequence[int]
) -> Tensor:
    """``dx + pᵀ A`` in place, where p is zero and A may be anything in what is off."""
    if on is None or on.dim() == 1 or is_known_finite(a):
        return dx.addmm_(p.T, a if on is None or on.dim() == 2 else torch.where(on[:, None], a, 0))
    for one, factor, gate in zip(p.split(ranks), a.split(ranks), own, strict=True):
        dx.add_(select(gate, one.T @ factor))
    return dx


def _launches(calls: Sequence[Call]) -> Launches:
    """Those of a group, forward and backward; what moves a factor or p is not counted."""
    sizes = [call.sizes for call in calls if call.sizes is not None]
    of_all = sizes[0]._replace(rank=sum(one.rank for one in sizes))
    forward, backward = [Launch("addmm", of_all.bytes("x", "a", "h"))], []
    for i, one in enumerate(sizes):
        forward.append(Launch("linear", one.bytes("x", "w", "y"), one.products))
        forward.append(Launch("addmm_", one.bytes("h", "b", "y", "y")))
        backward.append(Launch("mm", one.bytes("h", "dy", "b")))
        backward.append(Launch("addmm", one.bytes("b", "dy", "p")))
        dx = ("dx", "dx") if i else ("dx",)
        backward.append(Launch("addmm_" if i else "mm", one.bytes("dy", "w", *dx), one.products))
    backward += [Launch("mm", of_all.bytes("p", "x", "a")), Launch("addmm_", of_all.bytes("p", "a", "dx", "dx"))]
    return Launches(tuple(forward), tuple(backward), of_all.bytes("h"))


STACKED = Stacked("addmm", _forward, _backward, _launches)
