"""Under DistributedDataParallel: makes parameters that a forward did not use part of its output's graph."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

logger = logging.getLogger("cotolora")


class JoinUnused:
    """Joins unused parameters to a model's output, where a reducer waits for their gradients.

    DDP's reducer waits for a gradient of every trainable parameter. An adapter that is off is in no graph, so its
    parameters are tied to the output by one autograd node, which gives them zeros.

    Args:
        unused: returns the parameters that the forward did not use.
    """

    def __init__(self, unused: Callable[[], Sequence[Tensor]]) -> None:
        self._unused = unused
        self._warned = False

    def __call__(self, output: Any) -> Any:
        """`output` with the unused parameters in its graph; None where there is nothing to join.

        None and not `output`: torch.compile traces a hook that returns a tensor as a graph of its own.
        """
        if not (dist.is_available() and dist.is_initialized() and torch.is_grad_enabled()):
            return None
        if torch._C._are_functorch_transforms_active():  # no reducer there, and they refuse this kind of Function
            return None
        unused = self._unused()
        return self._joined(output, unused) if unused else None

    def _joined(self, output: Any, unused: Sequence[Tensor]) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        if len(leaves) == 1 and leaves[0] is output and dataclasses.is_dataclass(output):
            # pytree knows only the dataclasses that were registered with it
            fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
            output = copy.copy(output)
            for name, value in self._joined(fields, unused).items():
                object.__setattr__(output, name, value)
            return output
        # by identity: a tensor in two places stays one tensor, or writing to one of them would miss the other's graph
        tied = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad}
        if not tied:
            if not self._warned and not any(isinstance(leaf, Tensor) for leaf in leaves):
                logger.warning(
                    "the model's output, a %s, shows no tensors (in tuples, lists, dicts or a dataclass it would): "
                    "DistributedDataParallel will miss the adapters that are off",
                    type(output).__name__,
                )
                self._warned = True
            return output
        joined = dict(zip(tied, _Join.apply(len(tied), *tied.values(), *unused), strict=True))
        return pytree.tree_unflatten([joined.get(id(leaf), leaf) for leaf in leaves], spec)


class _Join(torch.autograd.Function):
    """Returns the outputs unchanged; its backward gives zeros to the parameters that took no part in them.

    Zeros and not None: with None, DDP's static_graph lets the ranks drift apart without an error.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.unused = tensors[count:]
        # an output that the loss does not use gets None: zeros would cost memory, and 0 · inf further down is NaN
        ctx.set_materialize_grads(False)
        # detached and not viewed: autograd forbids writing in place (loss /= n) to a view made in here
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *gradients, *(torch.zeros_like(parameter) for parameter in ctx.unused)
