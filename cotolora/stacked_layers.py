"""What layers that read one x make of it together, and what each must be for that."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cotolora.backends.autograd import readable, without_autocast
from cotolora.backends.choice import Plan, note_failure
from cotolora.backends.stacked import apply_stacked, stacked_plan
from cotolora.functional import autocast, planned
from cotolora.linear import CoToLoRALinear
from cotolora.operands import surely_right
from cotolora.reference import Gate
from cotolora.variants import VARIANTS

_PLAIN = (nn.Parameter, Tensor)


class Member(NamedTuple):
    """A layer of a stack as it is computed of an x: by a plan, under a gate, None where it is on."""

    layer: CoToLoRALinear
    plan: Plan
    gate: Tensor | None


class Output(NamedTuple):
    """What a layer has made of an x, and by what: what `_read_by` finds, and in which state each of it was."""

    y: Tensor
    plan: Plan
    gated: bool
    read: Sequence[Any]
    states: Sequence[Any]

    def is_of(self, layer: CoToLoRALinear, x: Tensor) -> bool:
        """Whether `layer` would make the same now."""
        return (
            _is_plain(layer, x)
            and all(map(operator.is_, self.read, now := _read_by(layer, self.gated)))
            and self.states == [_state(one) for one in now]
            and self.plan is _plan(layer, x)
            and (self.gated or _usable(layer.active, self.plan, x) is True)
        )


def outputs_of(members: Sequence[Member], x: Tensor, grad: bool) -> list[Output] | None:
    """What each layer makes of `x`; None if each must be computed by itself.

    As where an operand may not fit, of which its own forward says what is wrong, or where a kernel cannot run.
    """
    plan = stacked_plan([one.plan for one in members])
    if plan is None or plan.stacked is None:
        return None
    cast_to = plan.cast_to
    read = [_read_by(one.layer, one.gate is not None) for one in members]
    states = [[_state(one) for one in own] for own in read]
    with nullcontext() if cast_to is None else without_autocast(x.device):
        operands = [_operands(one.layer, own, cast_to) for one, own in zip(members, read, strict=True)]
        x = x if cast_to is None else autocast(x, cast_to)
        if not all(surely_right(x, *own) for own in operands):
            return None
        layers = [(*own, one.gate) for own, one in zip(operands, members, strict=True)]
        try:
            if grad:
                found = apply_stacked(plan, x, *itertools.chain(*layers))
            else:
                found = plan.stacked.forward(x, *zip(*layers, strict=True), plan.options.scale)[0]
        except Exception as error:
            if plan.instead is None or isinstance(error, torch.OutOfMemoryError):
                raise
            note_failure(plan, error)
            return None
    made = zip(found, members, read, states, strict=True)
    return [Output(y, one.plan, one.gate is not None, *of_it) for y, one, *of_it in made]


def with_own_node(y: Tensor) -> Tensor:
    """`y` by a node of its own: hooks on it are called where it has a gradient, not where another output has one."""
    return y.view_as(y) if y.requires_grad else y


def _plan(layer: CoToLoRALinear, x: Tensor) -> Plan:
    """How `layer` is computed of `x`."""
    dropout = layer.dropout if layer.training else 0.0
    rank = layer._parameters["lora_a"].shape[0]  # type: ignore[union-attr]
    sizes = layer.in_features, layer.out_features
    return planned(VARIANTS[layer.variant], x, rank, *sizes, layer.scale, dropout)


def member(layer: CoToLoRALinear, x: Tensor) -> Member | None:
    """`layer` as it is computed of `x`; None if it must be by itself."""
    gate = layer.active
    if gate is False or not _is_plain(layer, x):
        return None
    plan = _plan(layer, x)
    gate = _usable(gate, plan, x) if plan.stacked is not None else True
    return None if gate is False else Member(layer, plan, None if gate is True else gate)


def may_join(first: Member, other: Member) -> bool:
    """Whether `other` can be computed together with `first`."""
    plan, weight, its_weight = first.plan, first.layer._parameters["weight"], other.layer._parameters["weight"]
    return (
        other.plan.stacked is not None and other.plan.options == plan.options and its_weight.dtype == weight.dtype  # type: ignore[union-attr]
    )


def _usable(gate: Gate, plan: Plan, x: Tensor) -> Gate:
    """A gate as a bool, or a tensor that only a device reads; False also where it does not fit x."""
    if isinstance(gate, bool):
        return gate
    fits = gate.dim() == 0 or (x.dim() > 1 and gate.shape[0] == x.shape[0])
    if not fits or type(gate) is not Tensor or gate.device != x.device:
        return False
    # as a single layer reads it
    return bool(gate) if not plan.fused and readable(gate) else gate


def _is_plain(layer: CoToLoRALinear, x: Tensor) -> bool:
    """Whether the tensors of `layer` are its own, whole and here, and A and B train or nothing does."""
    if (
        layer._original_weight is not None or x.is_nested or x.layout is not torch.strided
        or x.shape[-1:] != (layer.in_features,)
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


def _read_by(layer: CoToLoRALinear, gated: bool) -> tuple[Any, ...]:
    """Its tensors; and where it is `gated` by one its switches, of which `active` may make another tensor each time."""
    if not gated:
        return _tensors(layer)
    return *_tensors(layer), layer._enabled, layer._gate if layer.training else True


def _operands(layer: CoToLoRALinear, read: Sequence[Any], cast_to: torch.dtype | None) -> tuple[Any, Any, Any, Any]:
    """W, bias, A and B as they are computed with."""
    weight, bias, a, b, *_ = read
    if layer._transposed:
        weight = weight.T
    if cast_to is not None:
        weight, bias = autocast(weight, cast_to), None if bias is None else autocast(bias, cast_to)
    return weight, bias, a, b


def _state(read: Any) -> Any:
    """What changes when a tensor is written to, or given other memory."""
    if not isinstance(read, Tensor):
        return None
    # tensors made in inference mode do not count; outside it none can be written to
    return 0 if read.is_inference() else read._version, read.data_ptr()
