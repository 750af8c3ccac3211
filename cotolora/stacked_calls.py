"""Tracks which layers of a parent module are called with the same input, and shares results between them."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from cotolora.linear import CoToLoRALinear
from cotolora.stacked_layers import Output, may_join, member, outputs_of, with_own_node
from cotolora.wording import listed

logger = logging.getLogger("cotolora")


class _Call(NamedTuple):
    """Outputs that were computed together for one x and are still waiting for their layers to be called.

    first: the layer whose call computed them.
    outputs: by layer, for the layers that have not been called yet.
    memory: a detached view of x, which shows where its data was.
    version: the version counter of x. The remaining fields are the state of autograd and the thread at that time.
    """

    first: CoToLoRALinear
    outputs: dict[CoToLoRALinear, Output]
    x: Tensor
    memory: Tensor
    version: int
    requires_grad: bool
    grad_fn: Any
    grad: bool
    thread: int

    def is_for(self, x: Tensor) -> bool:
        """Whether the outputs were computed from this `x` in its present state."""
        return (
            self.x is x
            and self.version == x._version
            and self._has_its_memory(x)
            # detach_ and requires_grad_ change these but not the version
            and self.requires_grad is x.requires_grad
            and self.grad_fn is x.grad_fn
            and self.grad is torch.is_grad_enabled()
            and self.thread == threading.get_ident()
        )

    def _has_its_memory(self, x: Tensor) -> bool:
        # assigning to x.data replaces the memory but does not change the version
        memory = self.memory
        return memory.data_ptr() == x.data_ptr() and memory.shape == x.shape and memory.stride() == x.stride()


class Stack:
    """Layers of one parent that may be called with the same x. A copy of a stack holds no layers.

    The first layer that is called with an x computes the outputs of all. These outputs are valid only until the forward
    of the parent ends: later the layers may have been trained, or the graph freed. Layers that were not called with
    that x are left out of later groups. If gradients are recorded, this takes effect only after a step of an optimizer
    that trains them, because the recomputation of a checkpoint must make the same choices as its forward. For the same
    reason nothing is shared with a checkpoint inside the forward of the parent, which recomputes only a part of it.
    """

    def __init__(self, layers: Mapping[str, CoToLoRALinear] | None = None) -> None:
        layers = layers or {}
        self._names = {weakref.ref(layer): name for name, layer in layers.items()}
        # for each grad mode and first layer: the layers to compute with it, including itself
        self._together = {grad: {key: [*self._names] for key in self._names} for grad in (False, True)}
        self._left_out: set[tuple[weakref.ref[CoToLoRALinear], weakref.ref[CoToLoRALinear]]] = set()
        self._open = self._told = False
        self._hooks: Any = None  # saved-tensor hooks in force when the forward of the parent began
        self._call: _Call | None = None
        for layer in layers.values():
            vars(layer)["_stack"] = self

    def __reduce__(self) -> tuple[type[Stack], tuple[()]]:
        return Stack, ()

    def remove(self) -> None:
        """Ends the stack: every layer is computed by itself again."""
        for reference in self._names:
            if (layer := reference()) is not None and vars(layer).get("_stack") is self:
                del layer._stack
        self._open, self._call = False, None

    def begin(self) -> None:
        """Called when the forward of the parent begins: from now on layers may share results."""
        self._open, self._call, self._hooks = True, None, _hooks_on_saved_tensors()

    def end(self, output: Any) -> None:
        """Called when the forward of the parent has ended; `output` is None if it raised."""
        self._open, call, self._call = False, self._call, None
        if call is not None and output is not None:
            self._note_unused(call)

    def _note_unused(self, call: _Call) -> None:
        """Excludes layers that were not called with the x of `call` from later groups."""
        if torch._C._current_graph_task_id() != -1:
            return  # the recomputation of a checkpoint stops early, as soon as it has the tensors it needs
        first = weakref.ref(call.first)
        absent = [reference for reference in self._names if reference() in call.outputs]
        if not call.grad:
            self._together[False][first] = [one for one in self._together[False][first] if one not in absent]
        else:
            self._left_out.update((first, one) for one in absent)
            _learn_after_a_step(self)
        if not self._told:
            self._told = True
            logger.warning(
                "stack: in a forward that called %r, %s were not called with the same tensor; they will be computed by "
                "themselves", self._names[first], listed([self._names[one] for one in absent]),
            )  # fmt: skip

    def learn(self, trained: Collection[int]) -> bool:
        """Applies the exclusions noted so far if `trained`, ids of parameters, holds an A or B of these layers."""
        layers = [layer for reference in self._names if (layer := reference()) is not None]
        if layers and not any(id(p) in trained for layer in layers for p in layer.parameters(recurse=False)):
            return False
        for first, absent in self._left_out:
            self._together[True][first] = [one for one in self._together[True][first] if one != absent]
        self._left_out.clear()
        return True

    def forward(self, layer: CoToLoRALinear, x: Tensor) -> Tensor | None:
        """The output of `layer` for `x`, or None if the layer must be computed by itself."""
        if not self._open or self._hooks != _hooks_on_saved_tensors():
            return None
        call = self._call
        if call is None or not call.is_for(x):
            return self._first(layer, x)
        output = call.outputs.pop(layer, None)
        if not call.outputs:
            self._call = None
        return with_own_node(output.y) if output is not None and output.is_of(layer, x) else None

    def _first(self, layer: CoToLoRALinear, x: Tensor) -> Tensor | None:
        """Computes `layer` and those expected to follow, for an `x` that no other layer was called with."""
        grad = torch.is_grad_enabled()
        together = self._together[grad].get(weakref.ref(layer), ())  # a copy has no layers
        # inference tensors have no version counter
        if len(together) < 2 or type(x) is not Tensor or x.is_inference():
            return None
        if (first := member(layer, x)) is None:
            return None
        if first.plan.stacked is None:
            self._open = False  # the others will rarely differ, so they are not asked in this forward
            return None
        members = [first]
        for reference in together:
            other = reference()
            if other is not None and other is not layer:
                joining = member(other, x)
                if joining is not None and may_join(first, joining):
                    members.append(joining)
        if len(members) < 2:
            return None
        outputs = outputs_of(members, x, grad)
        if outputs is None:
            self._open = False
            return None
        if (call := self._call) is not None:
            self._note_unused(call)
        of_others = {one.layer: output for one, output in zip(members[1:], outputs[1:], strict=True)}
        self._call = _Call(
            layer, of_others, x, x.detach(), x._version, x.requires_grad, x.grad_fn, grad, threading.get_ident()
        )  # fmt: skip
        return with_own_node(outputs[0].y)


# stacks whose exclusions wait for a step of an optimizer that trains their layers
_learning: weakref.WeakSet[Stack] = weakref.WeakSet()


def _learn_after_a_step(waiting: Stack) -> None:
    _learning.add(waiting)
    _register_step_hook()


@functools.cache
def _register_step_hook() -> None:
    # never removed: torch iterates over these hooks while they run, so a removal then would raise
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _learning:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for waiting in [*_learning]:
        if waiting.learn(trained):
            _learning.discard(waiting)


def _hooks_on_saved_tensors() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
