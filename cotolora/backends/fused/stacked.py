"""LoRA of several layers that read one x, by the fused kernels: h of all from one read of x, and dA of all from one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm import stacked as addmm
from cotolora.backends.addmm.products import cast, flat, shaped_like
from cotolora.backends.addmm.stacked import on_by_rank, select_by_rank
from cotolora.backends.fused.common import MAX_RANK, repeatable
from cotolora.backends.types import Call, Launch, Launches, Stacked


@repeatable
def shrink(ops: Any, x: Tensor, a: Tensor, gate: Tensor | None, scale: float) -> Tensor:
    """``h = δ · scale · x Aᵀ``."""
    return ops.shrink(x, a, gate, None, scale, 0.0)


@repeatable
def low_rank_gemm(
    ops: Any, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, gate: Tensor | None
) -> Tensor:
    """``x Wᵀ + bias + δ · h Bᵀ``."""
    return ops.low_rank_gemm(x, weight, bias, h, b, gate, None, 0.0)[0]


@repeatable
def expand(ops: Any, h: Tensor, b: Tensor, add: Tensor | None, gate: Tensor | None) -> Tensor:
    """``add + δ · h Bᵀ``, of ``Bᵀ``."""
    return ops.expand(h, b, add, gate, None, 0.0)


@repeatable
def project(
    ops: Any, dy: Tensor, h: Tensor, b: Tensor, gate: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``p = δ · scale · dy B``, and ``dB = dyᵀ h`` in `dtype`."""
    p, _, db, _ = ops.adapter_grads(dy, None, h, b, gate, None, scale, 0.0, dtype, dtype)
    return p, db


@repeatable
def gram(ops: Any, x: Tensor, p: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``dA = pᵀ x``, over the rows that are on."""
    return ops.gram(x, p, gate, dtype)


def some_on(on: Tensor | None, gates: Sequence[Tensor | None]) -> Tensor | None:
    """Of `on_by_rank`, whether any layer is on: where none is, x need not be read. None where one always is."""
    return None if on is None or any(gate is None for gate in gates) else on.any(-1)


def _forward(
    form: str,
    only_prepared: bool,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    bs: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    scale: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of a layer that is off, h may hold anything: what reads it selects by the gate."""
    dtype, rows, ranks = x.dtype, flat(x), [b.shape[1] for b in bs]
    a = cast(torch.cat(factors), dtype)  # type: ignore[arg-type]
    h = shrink(only_prepared, rows, a, some_on(on_by_rank(gates, ranks), gates), scale)
    outputs = []
    for weight, bias, b, own_h, gate in zip(weights, biases, bs, h.split(ranks, 1), gates, strict=True):
        if form == "low_rank_gemm":
            y = low_rank_gemm(only_prepared, rows, weight, bias, own_h, cast(b, dtype), gate)
        else:
            y = expand(only_prepared, own_h, cast(b, dtype).T, F.linear(rows, weight, bias), gate)
        outputs.append(shaped_like(y, x))
    return outputs, a, h


def _backward(
    form: str,
    only_prepared: bool,
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
    """A gate per sample leaves other rows of x to each dA, so that each is a product of its own."""
    dtype, rows, ranks = x.dtype, [flat(dy) for dy in dys], [b.shape[1] for b in bs]
    on = on_by_rank(gates, ranks)
    p, db = [], []
    for dy, b, own_h, gate in zip(rows, bs, h.split(ranks, 1), gates, strict=True):
        one, of_b = project(only_prepared, dy, own_h, cast(b, dtype), gate, scale, b.dtype)
        p.append(one)
        db.append(of_b)
    if on is not None and on.dim() == 2:
        da = [gram(only_prepared, flat(x), one, gate, dtype_a) for one, gate in zip(p, gates, strict=True)]
        dx = _row_by_row(form, only_prepared, rows, weights, p, a.split(ranks), gates) if weights else None
    else:
        of_all, some = torch.cat(p, 1), some_on(on, gates)
        found = gram(only_prepared, flat(x), of_all, some, dtype_a)
        da = list((found if on is None else torch.where(on[:, None], found, 0)).split(ranks))
        a = a if on is None else torch.where(on[:, None], a, 0)
        dx = _of_x(form, only_prepared, rows, weights, of_all, a, some) if weights else None
    return None if dx is None else shaped_like(dx, x), da, db


def _of_x(
    form: str,
    only_prepared: bool,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    p: Tensor,
    a: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """``Σᵢ dyᵢ Wᵢ + p A``: one product by our kernel, the smallest, and the others added by the vendor's."""
    left = sorted(zip(dys, weights, strict=True), key=lambda pair: pair[1].shape[0])
    if form == "low_rank_gemm":
        dy, weight = left.pop(0)
        dx = low_rank_gemm(only_prepared, dy, weight.T, None, p, a.T, gate)
    else:
        dx = expand(only_prepared, p, a, None, gate)
    for dy, weight in left:
        dx.addmm_(dy, weight)
    return dx


def _row_by_row(
    form: str,
    only_prepared: bool,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    ps: Sequence[Tensor],
    factors: Sequence[Tensor],
    gates: Sequence[Tensor | None],
) -> Tensor:
    """The same where rows that are off may not meet an A that is not finite: each low-rank part under its own gate."""
    dx = None
    for dy, weight, p, a, gate in zip(dys, weights, ps, factors, gates, strict=True):
        if dx is None and form == "low_rank_gemm":
            dx = low_rank_gemm(only_prepared, dy, weight.T, None, p, a.T, gate)
        else:
            dx = expand(only_prepared, p, a, dx, gate).addmm_(dy, weight)
    assert dx is not None
    return dx


def _by_addmm(dys: Any, x: Any, weights: Any, a: Any, bs: Any, h: Tensor, gates: Any, scale: float, dtype: Any) -> Any:
    """The backward by vendor GEMMs, whose h is selected, and in float32 without the scale."""
    h = select_by_rank(on_by_rank(gates, [b.shape[1] for b in bs]), h)
    if h.dtype is torch.float32 and scale:
        h = h / scale
    return addmm.STACKED.backward(dys, x, weights, a, bs, h, gates, scale, dtype)


def _launches(form: str, calls: Sequence[Call]) -> Launches:
    """Those of a group, forward and backward; what moves a factor or p is not counted."""
    sizes = sorted((call.sizes for call in calls if call.sizes is not None), key=lambda one: one.n)
    of_all = sizes[0]._replace(rank=sum(one.rank for one in sizes))
    gemm = form == "low_rank_gemm"
    forward, backward = [Launch("shrink", of_all.bytes("x", "a", "h"))], []
    for one in sizes:
        if gemm:
            forward.append(Launch("low_rank_gemm", one.bytes("x", "w", "y", "h", "b"), one.products, "gemm"))
        else:
            forward.append(Launch("linear", one.bytes("x", "w", "y"), one.products))
            forward.append(Launch("expand", one.bytes("h", "b", "y", "y")))
        backward.append(Launch("project", one.bytes("dy", "h", "b", "p", "b")))
        backward.append(Launch("sum_partials", one.bytes("p", "p")))
    backward += [Launch("gram", of_all.bytes("x", "p", "a")), Launch("sum_partials", of_all.bytes("a", "a"))]
    if gemm:
        own = of_all.bytes("dx", "p", "a") + sizes[0].bytes("dy", "w")
        backward.append(Launch("low_rank_gemm", own, sizes[0].products, "gemm"))
    else:
        backward.append(Launch("expand", of_all.bytes("p", "a", "dx")))
    for one in sizes[1 if gemm else 0 :]:
        backward.append(Launch("addmm_", one.bytes("dy", "w", "dx", "dx"), one.products))
    return Launches(tuple(forward), tuple(backward), of_all.bytes("h"))


def _stacked(form: str, only_prepared: bool) -> Stacked:
    return Stacked(
        f"triton:{form}",
        partial(_forward, form, only_prepared),
        partial(_backward, form, only_prepared),
        partial(_launches, form),
        most_ranks=MAX_RANK,
        elsewhere=_by_addmm,
    )


# by form, and by whether a kernel that was not launched before may not be
STACKED = {(form, only): _stacked(form, only) for form in ("low_rank_gemm", "pre_expand") for only in (False, True)}
