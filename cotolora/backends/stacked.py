"""The autograd Function of layers that read one x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cotolora.backends.autograd import differentiable_once
from cotolora.backends.choice import Plan, note_failure


class StackedLinear(torch.autograd.Function):
    """What several layers make of one x, by the `stacked` of a plan. `layers`: W, bias, A, B and the gate of each."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, plan: Plan, x: Tensor, *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Each layer's y."""
        assert plan.stacked is not None
        weights, biases, factors, b, gates = (layers[i::5] for i in range(5))
        outputs, a, h = plan.stacked.forward(x, weights, biases, factors, b, gates, plan.options.scale)
        ctx.plan, ctx.ranks = plan, [one.shape[1] for one in b]  # type: ignore[union-attr]
        ctx.set_materialize_grads(False)
        # each A goes along by reference, for its second derivative to be noticed
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
