"""The backend for a tensor gate that is known to be 0: computes only the base, and gives the adapter zero gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends.addmm.products import flat, shaped_like
from cotolora.backends.cost import frozen
from cotolora.backends.types import Call, Gradients, Launches, Needs, Operands, Options
from cotolora.operands import refuse_nested


class SavedOff(tuple[Tensor | None, ...]):
    """The tensors for the backward: x and weight, or None if it does not read them, then A, B and the extra ones."""

    __slots__ = ()

    @classmethod
    def _make(cls, tensors: Iterable[Tensor | None]) -> SavedOff:
        return cls(tensors)


class BaseAlone:
    """``y = x Wᵀ + bias``, or the output of the base. The same for every variant."""

    def why_not(self, call: Call) -> list[str]:
        """Empty: it can run every call."""
        return []

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, SavedOff]:
        """Returns the output of the base, bit for bit."""
        x, weight, bias, a, b, extra, base = operands
        refuse_nested(x)  # F.linear supports nested tensors, but the backward does not
        saved = SavedOff((x if needs.weight else None, weight if needs.x else None, a, b, *extra))
        if weight is not None:
            return F.linear(x, weight, bias), saved
        assert base is not None
        return base.detach(), saved

    def backward(self, dy: Tensor, saved: SavedOff, options: Options, needs: Needs) -> Gradients:
        """``dx = dy W``, and zeros in the shapes of A, B and the extra tensors."""
        x, weight, *parts = saved
        rows = flat(dy)
        zeros = [torch.zeros_like(t) if needed and t is not None else None
                 for t, needed in zip(parts, (needs.a, needs.b, *needs.extra), strict=True)]  # fmt: skip
        dx = None
        if needs.x:
            a = parts[0]
            assert a is not None
            dx = a.new_zeros(*dy.shape[:-1], a.shape[1]) if weight is None else shaped_like(rows @ weight, dy)
        return Gradients(
            dx,
            rows.T @ flat(x) if needs.weight and x is not None else None,
            rows.sum(0) if needs.bias else None,
            zeros[0],
            zeros[1],
            tuple(zeros[2:]),
        )

    def launches(self, call: Call) -> Launches:
        """The launches of the frozen linear."""
        assert call.sizes is not None
        return frozen(call.sizes)

    def saved_elsewhere(self, saved: SavedOff, dy: Tensor, options: Options) -> SavedOff:
        """Never called, because this backend never fails over to another."""
        return saved


OFF = BaseAlone()
