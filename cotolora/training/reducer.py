"""Keeps the output connected to a graph and DistributedDataParallel's reducer working while adapters are inactive."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cotolora.training.outputs import tensors_in, with_tensors

logger = logging.getLogger("cotolora")


class OutputJoin:
    """Connects unused parameters to a model's output in the autograd graph, for three reasons.

    DDP's reducer waits for a gradient of every trainable parameter. An inactive adapter is in no graph, so one autograd
    node connects its parameters to the output and gives them gradients of zero.

    The loss may depend on none of the active adapters (an unused pooler, a dropped layer, a tower without input).
    Without a graph backward would raise, so outputs without a graph are connected as well. DDP would also wait for the
    parameters of such an active adapter, unless it finds unused parameters itself, so they are connected too.

    With several optimizers, one of them may have no parameter with a gradient, and GradScaler refuses to step it. So a
    parameter of an inactive adapter is connected for each of these optimizers.

    Args:
        parameters: returns the trainable adapter parameters that a forward does not use now, and those that it does.
        masked: returns whether a gate makes any adapter inactive that would otherwise train.
        drops_zeros: returns whether optimizer steps ignore the gradients of unused parameters. If so these gradients
            are zeros instead of None, because GradScaler raises if an optimizer has no gradient at all.
        grad_carriers: returns one unused parameter for each optimizer that might otherwise have no gradient at all.
    """

    def __init__(
        self,
        parameters: Callable[[], tuple[list[nn.Parameter], list[nn.Parameter]]],
        masked: Callable[[], bool],
        drops_zeros: Callable[[], bool],
        grad_carriers: Callable[[], list[nn.Parameter]],
    ) -> None:
        self._parameters, self._masked, self._drops_zeros = parameters, masked, drops_zeros
        self._grad_carriers = grad_carriers
        self._warned = False
        # whether the output depended on a parameter when a forward used it for the first time
        self._reached: dict[nn.Parameter, bool] = {}

    def __call__(self, output: Any) -> Any:
        """`output` with the unused parameters in its graph, or None if there is nothing to connect.

        None instead of `output`, because torch.compile traces a hook that returns a tensor as a separate graph.
        """
        if not torch.is_grad_enabled():
            return None
        reducer = dist.is_available() and dist.is_initialized()
        loss = _loss_of(output)
        # next to a loss, objects in the output hold other data, such as the key-value cache of every layer
        found = tensors_in(output, deep=loss is None)
        tensors = [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]
        without_graph = _without_graph(tensors, loss)
        grad_carriers = self._grad_carriers()
        if tensors and not without_graph and not reducer and not grad_carriers:
            return None  # the usual case
        # torch.func transforms use no reducer and reject this kind of Function; a jit trace with one cannot be saved
        if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
            return None
        masked = self._masked()
        if not masked and not reducer:
            return None
        unused, used = self._parameters()
        if reducer:
            unused += self._unreached(used, tensors)
        elif tensors and not without_graph:
            unused = grad_carriers
        if not unused:
            return None
        if not tensors:
            self._warn(output)
            return None
        chosen = [tensor for tensor in tensors if tensor.requires_grad] if reducer or grad_carriers else []
        chosen += without_graph if masked else []
        # by id: a tensor in two places must stay one tensor, so that writing to it in place affects both
        by_id = {id(tensor): tensor for tensor in chosen}
        if not by_id:
            return None
        zeros = reducer or self._drops_zeros()
        if grad_carriers and not reducer:
            # one node per output: with a shared node, outputs that the loss does not use would pass on zeros
            results = {key: _Join.apply(1, zeros, tensor, *unused)[0] for key, tensor in by_id.items()}
        else:
            results = dict(zip(by_id, _Join.apply(len(by_id), zeros, *by_id.values(), *unused), strict=True))
        return with_tensors(output, results)

    def _unreached(self, used: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> list[nn.Parameter]:
        """The parameters in `used` that DDP would wait for although they get no gradient."""
        ddp = nn.parallel.DistributedDataParallel._active_ddp_module
        if torch.compiler.is_compiling() or ddp is None or (ddp.find_unused_parameters and not ddp.static_graph):
            return []
        if new := [parameter for parameter in used if parameter not in self._reached]:
            reached = _reached_from(tensors)
            self._reached.update((parameter, reached is None or parameter in reached) for parameter in new)
        return [parameter for parameter in used if not self._reached[parameter]]

    def _warn(self, output: Any) -> None:
        raised = output is None and sys.exc_info()[0] is not None  # the hook runs after a forward that raised, too
        if not self._warned and not raised:
            logger.warning(
                "no floating-point tensors found in the entries and attributes of the model's output, a %s: "
                "DistributedDataParallel will wait for gradients of inactive adapters, and a loss that depends on no "
                "active adapter will have no graph",
                type(output).__name__,
            )
            self._warned = True


def find_grad_carriers(
    optimizers: Sequence[torch.optim.Optimizer], unused: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    """One `unused` parameter, to carry a gradient, for each of `optimizers` that may have no other parameter with one.

    A single optimizer may have none if all its parameters are `unused`; each of several may, because the loss may
    depend only on parameters of the others.
    """
    off, found = set(unused), []
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        without = [p for p in held if p in off]
        if len(optimizers) > 1 or len(without) == len(held):
            found += without[:1]
    return found


def _loss_of(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def _without_graph(tensors: Sequence[Tensor], loss: Tensor | None) -> list[Tensor]:
    """The tensors without a graph that a loss may be computed from."""
    return [
        tensor
        for tensor in tensors
        if not tensor.requires_grad
        and not tensor.is_inference()
        # next to a loss, other scalars are metrics, which need no graph and may be converted to numpy
        and (loss is None or tensor is loss or tensor.dim() > 0)
    ]


def _reached_from(tensors: Sequence[Tensor]) -> set[Tensor] | None:
    """The leaves of the graph of `tensors`; None if a reentrant checkpoint hides some."""
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, leaves = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if node.name().startswith("CheckpointFunction"):
            return None
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves.add(leaf)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        nodes += new
    return leaves


class _Join(torch.autograd.Function):
    """Returns the outputs unchanged; its backward gives zeros, or None, to the unused parameters.

    Zeros under DDP: with None and static_graph, the ranks diverge without an error.
    """

    @staticmethod
    def forward(ctx: Any, count: int, zeros: bool, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.unused, ctx.zeros = tensors[count:], zeros
        # outputs that the loss does not use get None: zeros would take memory and could give 0 · inf = NaN upstream
        ctx.set_materialize_grads(False)
        # detach instead of a view: autograd forbids writing in place (loss /= n) to a view made in a Function
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def jvp(ctx: Any, count: int, zeros: bool, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tangents[: len(tangents) - len(ctx.unused)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        unused = (torch.zeros_like(parameter) if ctx.zeros else None for parameter in ctx.unused)
        return None, None, *gradients, *unused
