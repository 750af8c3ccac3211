"""Layers that share an input: the backend that computes them together, and its autograd Function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cotolora.backends import cost
from cotolora.backends.autograd import differentiable_once
from cotolora.backends.choice import (
    CAPTURED,
    CLEAR_WIN,
    Plan,
    architecture,
    capturing,
    note_failure,
    requested,
    why_failed,
)
from cotolora.backends.types import Call, Stacked


def stacked_plan(plans: Sequence[Plan]) -> Plan | None:
    """The plan that computes layers of these plans together, or None if there is none. Each must have `stacked`.

    If `auto` has chosen backends for single layers that cannot be combined, the fastest one for the group is used.
    """
    first, calls = plans[0], tuple(each.call for each in plans)
    if all(each.stacked is first.stacked for each in plans) and _fits(first.stacked, calls):
        return first
    if requested(None)[0] not in ("auto", CAPTURED):
        return None
    captured = requested(None)[0] == CAPTURED or capturing(first.call)
    name = _fastest_stacked(calls, architecture(first.call.device), captured)
    if why_failed(name, first.call):
        name = "addmm"
    backends = first.call.variant.backends_for(first.call)
    chosen, by_addmm = backends[name], Plan("addmm", backends["addmm"], first.options, first.call, first.cast_to)
    if name != "addmm" and capturing(first.call):
        chosen = chosen.when_captured()  # type: ignore[attr-defined]
    way = chosen.stacked(first.call)  # type: ignore[attr-defined]
    fused = name != "addmm"
    return by_addmm._replace(
        name=name, backend=chosen, fused=fused, instead=by_addmm if fused else None, stacked=way
    )  # fmt: skip


def _fits(way: Stacked | None, calls: Sequence[Call]) -> bool:
    return way is not None and (way.most_ranks is None or sum(call.rank for call in calls) <= way.most_ranks)


@functools.lru_cache(maxsize=4096)
def _fastest_stacked(calls: tuple[Call, ...], arch: str, captured: bool) -> str:
    """The backend that the roofline predicts to be fastest for a group; "addmm" unless another wins clearly."""
    first = calls[0]
    backends = first.variant.backends_for(first)
    ways = [one.stacked(first) for one in backends.values() if hasattr(one, "stacked")]
    ways = [way for way in ways if _fits(way, calls)]
    if arch not in cost.MACHINES or first.dtype.itemsize == 4:
        return "addmm"
    times = {
        way.name: cost.seconds(
            way.launches(calls), first.dtype.itemsize, cost.MACHINES[arch], captured=captured, backward=first.backward
        )
        for way in ways
    }
    name = min(times, key=lambda name: times[name])
    return name if times["addmm"] / times[name] >= CLEAR_WIN else "addmm"


class StackedLinear(torch.autograd.Function):
    """The outputs of several layers for one x, by the `stacked` of a plan. `layers`: W, bias, A, B, gate of each."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, plan: Plan, x: Tensor, *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Returns the output of each layer."""
        assert plan.stacked is not None
        weights, biases, factors, b, gates = (layers[i::5] for i in range(5))
        outputs, a, h = plan.stacked.forward(x, weights, biases, factors, b, gates, plan.options.scale)
        ctx.plan, ctx.ranks = plan, [one.shape[1] for one in b]  # type: ignore[union-attr]
        ctx.set_materialize_grads(False)
        # A is saved as it is, too, so that a second derivative with respect to it is noticed
        ctx.save_for_backward(x, a, h, *gates, *b, *factors, *(weights if x.requires_grad else ()))
        return tuple(y.detach() if y._is_view() else y for y in outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of x and of each A and B, which raise if they are differentiated."""
        given = [dy for dy in dys if dy is not None]
        if not given:
            return (None,) * (2 + 5 * len(dys))
        return differentiable_once(
            lambda ctx, _: _gradients(ctx, dys), ctx, given[0], ctx.plan.stacked.name, *given[1:]
        )


def _gradients(ctx: Any, dys: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    x, a, h, *rest = ctx.saved_tensors
    count, ranks = len(dys), ctx.ranks
    gates, b, factors, weights = (rest[i * count : (i + 1) * count] for i in range(4))
    used = [i for i, dy in enumerate(dys) if dy is not None]
    if len(used) < len(dys):  # the loss does not depend on the others
        a = torch.cat(_of(used, a.split(ranks)))
        h = torch.cat(_of(used, h.split(ranks, 1)), 1)
        dys, gates, b = _of(used, dys), _of(used, gates), _of(used, b)  # type: ignore[assignment]
        weights = _of(used, weights) if weights else []
    operands = dys, x, weights, a, b, h, gates, ctx.plan.options.scale, factors[0].dtype
    way = ctx.plan.stacked
    try:
        dx, da, db = way.backward(*operands)
    except Exception as error:
        if ctx.plan.instead is None or isinstance(error, torch.OutOfMemoryError):
            raise
        note_failure(ctx.plan, error)
        dx, da, db = way.elsewhere(*operands)
    found: list[Tensor | None] = [None] * (5 * count)
    for i, one_a, one_b in zip(used, da, db, strict=True):
        found[5 * i + 2], found[5 * i + 3] = one_a, one_b
    return None, dx, *found


def _of(used: Sequence[int], these: Sequence[Any]) -> list[Any]:
    return [these[i] for i in used]


apply_stacked = super(torch.autograd.Function, StackedLinear).apply
