"""Computes once what the adapters of projections that read one x have in common."""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cotolora.backends.autograd import without_autocast
from cotolora.backends.choice import Plan
from cotolora.backends.stacked import apply_stacked
from cotolora.checks import entries, strings
from cotolora.functional import autocast, planned
from cotolora.groups import adapters, modules_of
from cotolora.linear import CoToLoRALinear
from cotolora.operands import surely_right
from cotolora.variants import VARIANTS
from cotolora.variants.base import FROM_WEIGHT
from cotolora.wording import listed, shown

logger = logging.getLogger("cotolora")
_PLAIN = (nn.Parameter, Tensor)


def stack(model: nn.Module, groups: Sequence[Sequence[str]]) -> list[list[str]]:
    r"""Lets adapters that read one x, such as those of q, k and v, share what they compute of it.

    With A = [A₁; A₂; …] of the layers that are called with the same tensor in one forward of their parent:

        h = scale · x Aᵀ        yᵢ = x Wᵢᵀ + biasᵢ + hᵢ Bᵢᵀ
        dx = Σᵢ dyᵢ Wᵢ + p A    dA = pᵀ x    dBᵢ = dyᵢᵀ hᵢ,    pᵢ = scale · dyᵢ Bᵢ

    so h, dA and the low-rank part of dx take one product each instead of one a layer, and dx is summed in place. The
    modules stay where they are and are called as before; state dicts and files do not change. Results are those of
    single layers but for the order in which floating-point numbers are added. They share one node of the graph: of
    losses of different yᵢ that are differentiated one by one, all but the last need ``retain_graph=True``, and no A or
    B of the group may be written to before the last.

    A layer is computed by itself, as without this, where it is called with another tensor than the others, or with one
    that was written to in between, or outside a forward of its parent, or in a checkpoint or other hooks on saved
    tensors that begin inside that forward; if the layer has changed in between; if its adapter is off, merged, of
    another scale or switched by a tensor, or A or B has hooks on its gradient, which must see none where the layer is
    not used; in training with dropout, whose masks are each layer's own; under torch.compile,
    torch.func, ``torch.jit.trace`` and ``torch.inference_mode``; by the reference and by the fused kernels; on a CPU
    where x has fewer than 256 features, which would take longer; and in copies of the model.

    Args:
        model: a model with adapters.
        groups: of each group the names of its layers as they end, below one parent: ``[["q_proj", "k_proj",
            "v_proj"], ["gate_proj", "up_proj"]]``. Every parent with two or more of a group has one. What an earlier
            call has stacked in `model` is undone first, so that ``[]`` undoes all.

    Returns:
        the names of the layers of each group that was found, in the order of `groups` and of the model.

    Raises:
        TypeError: `model` is not a module, or `groups` not a list of lists of strings.
        ValueError: `model` has no adapters; a name is in two groups; no parent holds two layers of a group; or they
            can never be computed together: they have different in_features, a base without a dense weight, another
            variant than "lora" or an init from W, or their parent, as an ``nn.ModuleList``, has no forward.

    >>> from cotolora import inject
    >>> class Attention(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return self.q(x) @ self.k(x).mT
    >>> model = nn.Sequential(Attention(), Attention())
    >>> layers = inject(model, rank=2)
    >>> stack(model, [["q", "k"]])
    [['0.q', '0.k'], ['1.q', '1.k']]
    """
    layers = adapters(model)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")
    modules = modules_of(model)
    found = [placed for i, ends in enumerate(_checked(groups)) for placed in _places(i, ends, layers)]
    for parent, names in found:
        _check_place(parent, modules[parent], {name: layers[name] for name in names})
    unstack(model)
    for parent, names in found:
        _add(modules[parent], _Stack({name: layers[name] for name in names}))
    return [names for _, names in found]


def _checked(groups: object) -> list[list[str]]:
    must, found = "a list of lists of names", []
    if isinstance(groups, Tensor):
        raise TypeError(f"groups must be {must}; got {shown(groups)}")
    for i, names in enumerate(entries("groups", groups, must)):
        found.append(ends := strings(f"groups[{i}]", names, "a list of names"))
        if len(set(ends)) < max(2, len(ends)) or not all(ends):
            raise ValueError(f"groups[{i}] must hold two or more names, each once; got {shown(ends)}")
    names = [name for ends in found for name in ends]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"groups must hold each name once; got {listed(twice)} in two of them")
    return found


def _places(i: int, ends: Sequence[str], layers: Mapping[str, CoToLoRALinear]) -> list[tuple[str, list[str]]]:
    """The parents that hold two or more layers whose names end in `ends`, with the names."""
    found: dict[str, list[str]] = {}
    for name in layers:
        for end in ends:
            if f".{name}".endswith(f".{end}"):
                found.setdefault(name[: -len(end)].removesuffix("."), []).append(name)
    if not (places := [(parent, names) for parent, names in found.items() if len(names) > 1]):
        raise ValueError(
            f"groups[{i}] must name two or more adapters of one parent; got {listed(ends)}, and the adapters are "
            f"{listed(layers)}"
        )
    return places


def _check_place(parent: str, holder: nn.Module, layers: Mapping[str, CoToLoRALinear]) -> None:
    """Raises ValueError if these can never be computed together."""
    must = f"groups must hold layers that read one x; those of {parent!r} cannot"
    if isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"{must}, whose {type(holder).__name__} has no forward to call them in")
    sizes = {name: layer.in_features for name, layer in layers.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{must}: in_features differ, {sizes}")
    for name, layer in layers.items():
        if reason := _why_never(layer):
            raise ValueError(f"{must}: {name!r} has {reason}")


def _why_never(layer: CoToLoRALinear) -> str:
    if layer.base is not None:
        return f"a base without a dense weight, {type(layer.base).__name__}"
    if layer.variant != "lora":
        return f"variant {layer.variant!r}, and must have 'lora'"
    return f"init {layer.init!r}, which is from W" if layer.init in FROM_WEIGHT else ""


def _add(parent: nn.Module, new: _Stack) -> None:
    if "_stacks" not in vars(parent):
        before = parent.register_forward_pre_hook(_before_forward)
        vars(parent)["_stacks"] = [], before, parent.register_forward_hook(_after_forward, always_call=True)
    vars(parent)["_stacks"][0].append(new)


def unstack(model: nn.Module) -> None:
    """Undoes `stack`, and leaves nothing of it."""
    for parent in model.modules():
        stacks, *handles = vars(parent).pop("_stacks", ((),))
        for earlier in stacks:
            earlier.remove()
        for handle in handles:
            handle.remove()


def _before_forward(parent: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        for own in _stacks_of(parent):
            own.begin()


def _after_forward(parent: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for own in _stacks_of(parent):
            own.end(output)


def _stacks_of(parent: nn.Module) -> Sequence[_Stack]:
    """None of a module that others have given the hooks of a parent."""
    return vars(parent).get("_stacks", ((),))[0]


class _Output(NamedTuple):
    """What a layer has made of an x, and by what: the plan, and `_tensors` with how often each was written to."""

    y: Tensor
    plan: Plan
    tensors: Sequence[Tensor | None]
    versions: Sequence[int]

    def is_of(self, layer: CoToLoRALinear, x: Tensor) -> bool:
        """Whether `layer` would make the same now."""
        return (
            _is_plain(layer, x)
            and all(map(operator.is_, self.tensors, now := _tensors(layer)))
            and self.versions == [_version(one) for one in now]
            and self.plan is _plan(layer, x)
        )


class _Call(NamedTuple):
    """What layers have made of one x, from the first that read it to the last.

    first: the layer that was called.
    outputs: of the layers that have yet to be called.
    version: how often x had been written to; the rest is what x was part of, and where.
    """

    first: CoToLoRALinear
    outputs: dict[CoToLoRALinear, _Output]
    x: Tensor
    version: int
    requires_grad: bool
    grad_fn: Any
    grad: bool
    thread: int

    def is_for(self, x: Tensor) -> bool:
        """Whether `x` is what the outputs were made of."""
        return (
            self.x is x
            and self.version == x._version
            # other than by the version, which detach_ and requires_grad_ leave
            and self.requires_grad is x.requires_grad
            and self.grad_fn is x.grad_fn
            and self.grad is torch.is_grad_enabled()
            and self.thread == threading.get_ident()
        )


class _Stack:
    """Layers of one parent that may read one x. A copy holds none.

    The first that is called with an x computes all. What it has computed for others counts only until the forward of
    the parent ends: later it would meet layers that were trained since, or a graph that has been freed. Layers that
    did not come are left out from then on; where gradients are recorded not before a step of an optimizer that trains
    them, for a checkpoint must find in its recomputation what it found in its forward. For the same reason nothing is
    shared with a checkpoint inside the forward of the parent, which is recomputed without the rest of it.
    """

    def __init__(self, layers: Mapping[str, CoToLoRALinear] | None = None) -> None:
        layers = layers or {}
        self._names = {weakref.ref(layer): name for name, layer in layers.items()}
        # by whether gradients are recorded, and by the layer that comes first: those that came with it, itself too
        self._together = {grad: {key: [*self._names] for key in self._names} for grad in (False, True)}
        self._left_out: set[tuple[weakref.ref[CoToLoRALinear], weakref.ref[CoToLoRALinear]]] = set()
        self._open = self._told = False
        self._hooks: Any = None  # on saved tensors, where the forward of the parent began
        self._call: _Call | None = None
        for layer in layers.values():
            vars(layer)["_stack"] = self

    def __reduce__(self) -> tuple[type[_Stack], tuple[()]]:
        return _Stack, ()

    def remove(self) -> None:
        """Leaves the layers to themselves."""
        for reference in self._names:
            if (layer := reference()) is not None and vars(layer).get("_stack") is self:
                del layer._stack
        self._open, self._call = False, None

    def begin(self) -> None:
        """What a layer computes for others counts from now on."""
        self._open, self._call, self._hooks = True, None, _hooks_on_saved_tensors()

    def end(self, output: Any) -> None:
        """The forward of the parent has ended; it has no output where it raised."""
        self._open, call, self._call = False, self._call, None
        if call is not None and output is not None:
            self._note_unused(call)

    def _note_unused(self, call: _Call) -> None:
        """Leaves out, from the next time on, layers that were not called with the x of `call`."""
        if torch._C._current_graph_task_id() != -1:
            return  # the recomputation of a checkpoint ends where it has what it wants
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
        """Leaves out what has not come in earlier forwards, if A or B of a layer is among `trained`, by id."""
        layers = [layer for reference in self._names if (layer := reference()) is not None]
        if layers and not any(id(p) in trained for layer in layers for p in layer.parameters(recurse=False)):
            return False
        for first, absent in self._left_out:
            self._together[True][first] = [one for one in self._together[True][first] if one != absent]
        self._left_out.clear()
        return True

    def forward(self, layer: CoToLoRALinear, x: Tensor) -> Tensor | None:
        """What `layer` makes of `x`, or None if it must be computed by itself."""
        if not self._open or self._hooks != _hooks_on_saved_tensors():
            return None
        call = self._call
        if call is None or not call.is_for(x):
            return self._first(layer, x)
        output = call.outputs.pop(layer, None)
        if not call.outputs:
            self._call = None
        return _with_own_node(output.y) if output is not None and output.is_of(layer, x) else None

    def _first(self, layer: CoToLoRALinear, x: Tensor) -> Tensor | None:
        """The same of a layer that is called with an `x` which none of the others has read."""
        grad = torch.is_grad_enabled()
        together = self._together[grad].get(weakref.ref(layer), ())  # none of a copy
        # inference tensors do not count how often they are written to
        if len(together) < 2 or type(x) is not Tensor or x.is_inference() or not _is_plain(layer, x):
            return None
        plan = _plan(layer, x)
        if plan.stacked is None:
            self._open = False  # nor for the others of this forward, as a rule: not to ask each
            return None
        plans = {layer: plan}
        for reference in together:
            other = reference()
            if other is not None and other is not layer and (own := _plan_with(layer, plan, other, x)) is not None:
                plans[other] = own
        if len(plans) < 2:
            return None
        outputs = _outputs(plans, x, grad)
        if outputs is None:
            self._open = False
            return None
        if (call := self._call) is not None:
            self._note_unused(call)
        y = outputs.pop(layer).y
        self._call = _Call(
            layer, outputs, x, x._version, x.requires_grad, x.grad_fn, grad, threading.get_ident()
        )  # fmt: skip
        return _with_own_node(y)


def _outputs(plans: Mapping[CoToLoRALinear, Plan], x: Tensor, grad: bool) -> dict[CoToLoRALinear, _Output] | None:
    """What each layer makes of `x`; None if one has an operand that may not fit: its own forward says what is wrong."""
    plan = next(iter(plans.values()))
    way, scale, cast_to = plan.stacked, plan.options.scale, plan.cast_to
    assert way is not None
    tensors = [_tensors(layer) for layer in plans]
    versions = [[_version(one) for one in own] for own in tensors]
    with nullcontext() if cast_to is None else without_autocast(x.device):
        operands = [_operands(layer, own, cast_to) for layer, own in zip(plans, tensors, strict=True)]
        x = x if cast_to is None else autocast(x, cast_to)
        if not all(surely_right(x, *own) for own in operands):
            return None
        if grad:
            found = apply_stacked(way, plan.name, scale, x, *itertools.chain(*operands))
        else:
            found = way.forward(x, *zip(*operands, strict=True), scale)[0]
    made = zip(found, plans.values(), tensors, versions, strict=True)
    return {layer: _Output(*one) for layer, one in zip(plans, made, strict=True)}


def _with_own_node(y: Tensor) -> Tensor:
    """`y` by a node of its own: hooks on it are called where it has a gradient, not where another output has one."""
    return y.view_as(y) if y.requires_grad else y


# stacks that wait for a step of an optimizer of theirs
_learning: weakref.WeakSet[_Stack] = weakref.WeakSet()


def _learn_after_a_step(waiting: _Stack) -> None:
    _learning.add(waiting)
    _hear_of_steps()


@functools.cache
def _hear_of_steps() -> None:
    # for good: torch goes through these hooks while they run, when none may be removed
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _learning:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for waiting in [*_learning]:
        if waiting.learn(trained):
            _learning.discard(waiting)


def _plan(layer: CoToLoRALinear, x: Tensor) -> Plan:
    """How `layer` is computed of `x`."""
    dropout = layer.dropout if layer.training else 0.0
    rank = layer._parameters["lora_a"].shape[0]  # type: ignore[union-attr]
    sizes = layer.in_features, layer.out_features
    return planned(VARIANTS[layer.variant], x, rank, *sizes, layer.scale, dropout)


def _plan_with(first: CoToLoRALinear, plan: Plan, layer: CoToLoRALinear, x: Tensor) -> Plan | None:
    """How `layer` is computed of `x`; None if not as the first layer that reads it is, by `plan`."""
    if not _is_plain(layer, x) or layer._parameters["weight"].dtype != first._parameters["weight"].dtype:  # type: ignore[union-attr]
        return None
    own = _plan(layer, x)
    return own if own.stacked is plan.stacked and own.options == plan.options else None


def _is_plain(layer: CoToLoRALinear, x: Tensor) -> bool:
    """Whether the adapter of `layer` is on, its tensors are whole and here, and A and B train or nothing does."""
    if (
        layer.active is not True or layer._original_weight is not None or x.is_nested
        or x.layout is not torch.strided or x.shape[-1:] != (layer.in_features,)
    ):  # fmt: skip
        return False
    weight, bias, a, b = _tensors(layer)
    if (
        # sharded ones are of other types
        type(a) not in _PLAIN or type(b) not in _PLAIN or type(weight) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or not a.device == b.device == weight.device == x.device
    ):  # fmt: skip
        return False
    if not torch.is_grad_enabled():
        return True
    trains = a.requires_grad and b.requires_grad and not a._backward_hooks and not b._backward_hooks
    return trains and not weight.requires_grad and (bias is None or not bias.requires_grad)


def _tensors(layer: CoToLoRALinear) -> tuple[Any, Any, Any, Any]:
    """W, the bias, A and B; something else in place of one that a wrapper has moved out of the layer's parameters."""
    own = layer._parameters
    return own.get("weight"), vars(layer).get("bias", own.get("bias", ...)), own.get("lora_a"), own.get("lora_b")


def _operands(
    layer: CoToLoRALinear, tensors: tuple[Any, Any, Any, Any], cast_to: torch.dtype | None
) -> tuple[Any, Any, Any, Any]:
    """The same as they are computed with."""
    weight, bias, a, b = tensors
    if layer._transposed:
        weight = weight.T
    if cast_to is not None:
        weight, bias = autocast(weight, cast_to), None if bias is None else autocast(bias, cast_to)
    return weight, bias, a, b


def _version(t: Tensor | None) -> int:
    # tensors made in inference mode do not count; outside it none can be written to
    return 0 if t is None or t.is_inference() else t._version


def _hooks_on_saved_tensors() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
