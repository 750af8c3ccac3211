"""Computes once what the adapters of projections that read one x have in common."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from cotolora.backends.autograd import autocasts, without_autocast
from cotolora.backends.choice import Plan
from cotolora.backends.stacked import apply_stacked
from cotolora.checks import entries, strings
from cotolora.functional import planned
from cotolora.groups import adapters, modules_of
from cotolora.linear import CoToLoRALinear
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
    single layers but for the order in which floating-point numbers are added.

    A layer is computed by itself, as without this, where it is called with another tensor than the others, or with one
    that was written to in between, or outside a forward of its parent; if its adapter is off, merged, of another scale
    or switched by a tensor; in training with dropout, whose masks are each layer's own; under torch.compile,
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
    for module in modules.values():
        _undo(module)
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


def _undo(parent: nn.Module) -> None:
    stacks, *handles = vars(parent).pop("_stacks", ((),))
    for earlier in stacks:
        earlier.remove()
    for handle in handles:
        handle.remove()


def _before_forward(parent: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        for own in vars(parent)["_stacks"][0]:
            own.begin()


def _after_forward(parent: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for own in vars(parent)["_stacks"][0]:
            own.end(output)


class _Call(NamedTuple):
    """What layers have made of one x, from the first that read it to the last.

    first: the layer that was called.
    outputs: of the layers that have yet to be called.
    version: how often x had been written to; the rest is what the outputs were computed under.
    """

    first: CoToLoRALinear
    outputs: dict[CoToLoRALinear, Tensor]
    x: Tensor
    version: int
    grad: bool
    autocast: torch.dtype | None
    thread: int

    def is_for(self, x: Tensor) -> bool:
        """Whether a layer that is called with `x` now would make the same of it."""
        return (
            self.x is x
            and self.version == x._version
            and self.grad is torch.is_grad_enabled()
            and self.autocast is _autocast_of(x)
            and self.thread == threading.get_ident()
        )


class _Stack:
    """Layers of one parent that may read one x. A copy holds none.

    The first that is called with an x computes all. What it has computed for others counts only until the forward of
    the parent ends: later it would meet layers that were trained since, or a graph that has been freed. Layers that
    did not come are left out from then on; where gradients are recorded not before an optimizer's step, for a
    checkpoint must find in its recomputation what it found in its forward.
    """

    def __init__(self, layers: Mapping[str, CoToLoRALinear] | None = None) -> None:
        layers = layers or {}
        self._names = {weakref.ref(layer): name for name, layer in layers.items()}
        # by whether gradients are recorded, and by the layer that comes first: those that came with it, itself too
        self._together = {grad: {key: [*self._names] for key in self._names} for grad in (False, True)}
        self._left_out: list[tuple[weakref.ref[CoToLoRALinear], weakref.ref[CoToLoRALinear]]] = []
        self._open = self._told = False
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
        self._open, self._call = True, None

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
            self._left_out += [(first, one) for one in absent]
            _learn_after_a_step(self)
        if not self._told:
            self._told = True
            logger.warning(
                "stack: in a forward that called %r, %s were not called with the same tensor; they will be computed by "
                "themselves", self._names[first], listed([self._names[one] for one in absent]),
            )  # fmt: skip

    def learn(self) -> None:
        """Leaves out what has not come in earlier forwards."""
        for first, absent in self._left_out:
            self._together[True][first] = [one for one in self._together[True][first] if one != absent]
        self._left_out = []

    def forward(self, layer: CoToLoRALinear, x: Tensor) -> Tensor | None:
        """What `layer` makes of `x`, or None if it must be computed by itself."""
        call = self._call
        if call is None or not call.is_for(x):
            return self._first(layer, x) if self._open else None
        y = call.outputs.pop(layer, None)
        if not call.outputs:
            self._call = None
        return y

    def _first(self, layer: CoToLoRALinear, x: Tensor) -> Tensor | None:
        """The same of a layer that is called with an `x` which none of the others has read."""
        grad = torch.is_grad_enabled()
        together = self._together[grad].get(weakref.ref(layer), ())  # none of a copy
        # inference tensors do not count how often they are written to
        if len(together) < 2 or type(x) is not Tensor or x.is_inference() or not _is_plain(layer, x):
            return None
        plan = _plan(layer, x)
        if plan.stacked is None or not (plan.cast_to or x.dtype == layer._parameters["weight"].dtype):  # type: ignore[union-attr]
            self._open = False  # nor for the others of this forward, as a rule: not to ask each
            return None
        layers: list[CoToLoRALinear] = []
        for reference in together:
            other: Any = reference()
            if other is layer or (other is not None and _goes_with(layer, plan, other, x)):
                layers.append(other)
        if len(layers) < 2:
            return None
        if (call := self._call) is not None:
            self._note_unused(call)
        outputs = dict(zip(layers, _outputs(plan, x, layers, grad), strict=True))
        y = outputs.pop(layer)
        self._call = _Call(layer, outputs, x, x._version, grad, _autocast_of(x), threading.get_ident())  # type: ignore[arg-type]
        return y


def _outputs(plan: Plan, x: Tensor, layers: Sequence[CoToLoRALinear], grad: bool) -> Sequence[Tensor]:
    way, scale = plan.stacked, plan.options.scale
    assert way is not None
    with nullcontext() if plan.cast_to is None else without_autocast(x.device):
        tensors = [_tensors(layer, plan.cast_to) for layer in layers]
        x = x if plan.cast_to is None else x.to(plan.cast_to)
        if grad:
            return apply_stacked(way, plan.name, scale, x, *itertools.chain(*tensors))
        return way.forward(x, *zip(*tensors, strict=True), scale)[0]


# stacks that wait for a step of any optimizer
_learning: weakref.WeakSet[_Stack] = weakref.WeakSet()
_handle: RemovableHandle | None = None


def _learn_after_a_step(waiting: _Stack) -> None:
    global _handle
    _learning.add(waiting)
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _handle
    while _learning:
        _learning.pop().learn()
    if _handle is not None:
        _handle.remove()
        _handle = None


def _plan(layer: CoToLoRALinear, x: Tensor) -> Plan:
    """How `layer` is computed of `x`."""
    dropout = layer.dropout if layer.training else 0.0
    rank = layer._parameters["lora_a"].shape[0]  # type: ignore[union-attr]
    sizes = layer.in_features, layer.out_features
    return planned(VARIANTS[layer.variant], x, rank, *sizes, layer.scale, dropout)


def _goes_with(first: CoToLoRALinear, plan: Plan, layer: CoToLoRALinear, x: Tensor) -> bool:
    """Whether `layer` is computed of `x` as the first layer that reads it is, by `plan`."""
    if not _is_plain(layer, x) or layer._parameters["weight"].dtype != first._parameters["weight"].dtype:  # type: ignore[union-attr]
        return False
    alike = (
        layer.out_features == first.out_features and layer.rank == first.rank and layer.alpha == first.alpha
        and layer.use_rslora is first.use_rslora and layer.training is first.training
        and layer.dropout == first.dropout
    )  # fmt: skip
    own = plan if alike else _plan(layer, x)
    return own.stacked is plan.stacked and own.options == plan.options


def _is_plain(layer: CoToLoRALinear, x: Tensor) -> bool:
    """Whether the adapter of `layer` is on, its tensors are whole and here, and A and B train or nothing does."""
    own = layer._parameters
    a, b, weight, bias = own.get("lora_a"), own.get("lora_b"), own.get("weight"), own.get("bias")
    if (
        layer.active is not True or layer._original_weight is not None or x.shape[-1:] != (layer.in_features,)
        # sharded ones are of other types
        or type(a) not in _PLAIN or type(b) not in _PLAIN or type(weight) not in _PLAIN
        or not a.device == b.device == weight.device == x.device  # type: ignore[union-attr]
    ):  # fmt: skip
        return False
    if not torch.is_grad_enabled():
        return True
    trains = a.requires_grad and b.requires_grad  # type: ignore[union-attr]
    return trains and not weight.requires_grad and (bias is None or not bias.requires_grad)  # type: ignore[union-attr]


def _tensors(layer: CoToLoRALinear, cast_to: torch.dtype | None) -> tuple[Any, Any, Any, Any]:
    """W and the bias as they are computed with, A and B."""
    own = layer._parameters
    weight, bias = own["weight"], own.get("bias")
    if layer._transposed:
        weight = weight.T  # type: ignore[union-attr, assignment]
    if cast_to is not None:
        weight, bias = weight.to(cast_to), None if bias is None else bias.to(cast_to)  # type: ignore[union-attr, assignment]
    return weight, bias, own["lora_a"], own["lora_b"]


def _autocast_of(x: Tensor) -> torch.dtype | None:
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else None
