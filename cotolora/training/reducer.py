"""Keeps a model's output in a graph, and DistributedDataParallel's reducer informed, where adapters are off."""

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
    """Joins unused parameters to a model's output, for two reasons.

    DDP's reducer waits for a gradient of every trainable parameter. An adapter that is off is in no graph, so its
    parameters are tied to the output by one autograd node, which gives them zeros.

    The adapters that are on may be ones that the loss does not depend on (a pooler that is not read, a layer that was
    dropped, a tower without input). Without a graph backward would raise, so outputs without one are tied as well.
    Unless DDP looks for unused parameters itself, it would wait for those of such an adapter whenever it is on, so
    these are tied then too.

    With several optimizers, one of them may hold no parameter with a gradient, which GradScaler refuses to step. A
    parameter of an adapter that is off is tied for each of these.

    Args:
        parameters: returns the trainable parameters that a forward does not use now, and those that it does.
        masked: whether adapters are off that the user has not disabled.
        drops_zeros: whether optimizer steps leave `unused` out whatever its gradients are. If so these are zeros and
            not None, for GradScaler raises where an optimizer has no gradient at all.
        starved: returns a parameter of each optimizer that would have none though the output has a graph.
    """

    def __init__(
        self,
        parameters: Callable[[], tuple[list[nn.Parameter], list[nn.Parameter]]],
        masked: Callable[[], bool],
        drops_zeros: Callable[[], bool],
        starved: Callable[[], list[nn.Parameter]],
    ) -> None:
        self._parameters, self._masked, self._drops_zeros = parameters, masked, drops_zeros
        self._starved = starved
        self._warned = False
        # whether the output depended on a parameter when a forward used it for the first time
        self._reached: dict[nn.Parameter, bool] = {}

    def __call__(self, output: Any) -> Any:
        """`output` with the unused parameters in its graph; None where there is nothing to join.

        None and not `output`: torch.compile traces a hook that returns a tensor as a graph of its own.
        """
        if not torch.is_grad_enabled():
            return None
        reducer = dist.is_available() and dist.is_initialized()
        loss = _loss_of(output)
        # beside a loss, objects hold what a model keeps, such as the keys and values of every layer
        found = tensors_in(output, deep=loss is None)
        tensors = [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]
        without_graph = _without_graph(tensors, loss)
        starved = self._starved()
        if tensors and not without_graph and not reducer and not starved:
            return None  # the usual case
        # torch.func's transforms have no reducer, and refuse this kind of Function; a trace with one cannot be saved
        if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
            return None
        masked = self._masked()
        if not masked and not reducer:
            return None
        unused, used = self._parameters()
        if reducer:
            unused += self._unreached(used, tensors)
        elif tensors and not without_graph:
            unused = starved
        if not unused:
            return None
        if not tensors:
            self._warn(output)
            return None
        chosen = [tensor for tensor in tensors if tensor.requires_grad] if reducer or starved else []
        chosen += without_graph if masked else []
        # by identity: a tensor in two places stays one tensor, or writing to one of them would miss the other's graph
        by_id = {id(tensor): tensor for tensor in chosen}
        if not by_id:
            return None
        zeros = reducer or self._drops_zeros()
        if starved and not reducer:
            # one node each: through a shared one an output that the loss does not use would pass zeros on
            results = {key: _Join.apply(1, zeros, tensor, *unused)[0] for key, tensor in by_id.items()}
        else:
            results = dict(zip(by_id, _Join.apply(len(by_id), zeros, *by_id.values(), *unused), strict=True))
        return with_tensors(output, results)

    def _unreached(self, used: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> list[nn.Parameter]:
        """Those of `used` that DDP would wait for in vain."""
        ddp = nn.parallel.DistributedDataParallel._active_ddp_module
        if torch.compiler.is_compiling() or ddp is None or (ddp.find_unused_parameters and not ddp.static_graph):
            return []
        if new := [parameter for parameter in used if parameter not in self._reached]:
            reached = _reached_from(tensors)
            self._reached.update((parameter, reached is None or parameter in reached) for parameter in new)
        return [parameter for parameter in used if not self._reached[parameter]]

    def _warn(self, output: Any) -> None:
        raised = output is None and sys.exc_info()[0] is not None  # the hook is called all the same
        if not self._warned and not raised:
            logger.warning(
                "the model's output, a %s, shows no tensors of floating point (as its entries or attributes it would): "
                "DistributedDataParallel will miss the adapters that are off, and a loss that none of the others "
                "reaches will have no graph",
                type(output).__name__,
            )
            self._warned = True


def find_starved(optimizers: Sequence[torch.optim.Optimizer], unused: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """One of `unused` for each of `optimizers` that may have no parameter with a gradient.

    That is one whose parameters are all `unused`; and any of several, for the loss may depend on the others alone.
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
    """Those of `tensors` that a loss may be computed from and that have no graph."""
    return [
        tensor
        for tensor in tensors
        if not tensor.requires_grad
        and not tensor.is_inference()
        # beside a loss, other scalars are measures of it, which need no graph and may become numpy's
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
    """Returns the outputs unchanged; its backward gives zeros, or None, to the parameters that took no part in them.

    Zeros under DDP: with None its static_graph lets the ranks drift apart without an error.
    """

    @staticmethod
    def forward(ctx: Any, count: int, zeros: bool, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.unused, ctx.zeros = tensors[count:], zeros
        # an output that the loss does not use gets None: zeros would cost memory, and 0 · inf further down is NaN
        ctx.set_materialize_grads(False)
        # detached and not viewed: autograd forbids writing in place (loss /= n) to a view made in here
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def jvp(ctx: Any, count: int, zeros: bool, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tangents[: len(tangents) - len(ctx.unused)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        unused = (torch.zeros_like(parameter) if ctx.zeros else None for parameter in ctx.unused)
        return None, None, *gradients, *unused
