"""The autograd Function of layers that read one x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cotolora.backends.autograd import differentiable_once
from cotolora.backends.types import Stacked


class StackedLinear(torch.autograd.Function):
    """What several layers make of one x, by a backend's `Stacked`. `layers` are W, bias, A and B of each in turn."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, way: Stacked, name: str, scale: float, x: Tensor, *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Each layer's y."""
        weights, biases, factors, b = layers[::4], layers[1::4], layers[2::4], layers[3::4]
        outputs, a, h = way.forward(x, weights, biases, factors, b, scale)  # type: ignore[arg-type]
        ctx.way, ctx.name, ctx.scale, ctx.ranks = way, name, scale, [one.shape[1] for one in b]  # type: ignore[union-attr]
        ctx.set_materialize_grads(False)
        # each A goes along by reference, for its second derivative to be noticed
        ctx.save_for_backward(x, a, h, *b, *factors, *(weights if x.requires_grad else ()))
        return tuple(y.detach() if y._is_view() else y for y in outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of x and of each A and B, which raise if they are differentiated."""
        given = [dy for dy in dys if dy is not None]
        if not given:
            return (None,) * (4 + 4 * len(dys))
        return differentiable_once(lambda ctx, _: _gradients(ctx, dys), ctx, given[0], ctx.name, *given[1:])


def _gradients(ctx: Any, dys: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    x, a, h, *rest = ctx.saved_tensors
    b, weights, ranks = rest[: len(dys)], rest[2 * len(dys) :], ctx.ranks
    used = [i for i, dy in enumerate(dys) if dy is not None]
    if len(used) < len(dys):  # the loss does not depend on the others
        a = torch.cat(_of(used, a.split(ranks)))
        h = torch.cat(_of(used, h.split(ranks, 1)), 1)
        dys, b, weights = _of(used, dys), _of(used, b), _of(used, weights) if weights else []  # type: ignore[assignment]
    dx, da, db = ctx.way.backward(dys, x, weights, a, b, h, ctx.scale)
    found: list[Tensor | None] = [None] * (4 * len(ranks))
    for i, one_a, one_b in zip(used, da, db, strict=True):
        found[4 * i + 2], found[4 * i + 3] = one_a, one_b
    return None, None, None, dx, *found


def _of(used: Sequence[int], these: Sequence[Any]) -> list[Any]:
    return [these[i] for i in used]


apply_stacked = super(torch.autograd.Function, StackedLinear).apply
