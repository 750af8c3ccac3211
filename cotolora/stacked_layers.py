"""Computes layers that have the same input together, and decides which layers allow it."""

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
    """A layer of a stack with the plan and the gate for its call; a gate of None is active."""

    layer: CoToLoRALinear
    plan: Plan
    gate: Tensor | None


class Output(NamedTuple):
    """An output of a layer with what it was computed from: the operands of `_read_by`, and the state of each."""

    y: Tensor
    plan: Plan
    gated: bool
    read: Sequence[Any]
    states: Sequence[Any]

    def is_of(self, layer: CoToLoRALinear, x: Tensor) -> bool:
        """Whether `layer` would compute the same output now."""
        return (
            _is_plain(layer, x)
            and all(map(operator.is_, self.read, now := _read_by(layer, self.gated)))
            and self.states == [_state(one) for one in now]
            and self.plan is _plan(layer, x)
            and (self.gated or _usable(layer.active, self.plan, x) is True)
        )


def outputs_of(members: Sequence[Member], x: Tensor, grad: bool) -> list[Output] | None:
    """The outputs of all layers for `x`, or None if each layer must be computed by itself.

    None also if an operand may not fit, because the layer's own forward raises the better error, or if a kernel cannot
    run.
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
    """`y` with its own autograd node, so that its hooks do not run if only another output has a gradient."""
    return y.view_as(y) if y.requires_grad else y


def _plan(layer: CoToLoRALinear, x: Tensor) -> Plan:
    """The plan by which `layer` computes `x`."""
    dropout = layer.dropout if layer.training else 0.0
    rank = layer._parameters["lora_a"].shape[0]  # type: ignore[union-attr]
    sizes = layer.in_features, layer.out_features
    return planned(VARIANTS[layer.variant], x, rank, *sizes, layer.scale, dropout)


def member(layer: CoToLoRALinear, x: Tensor) -> Member | None:
    """`layer` as a member of a group that computes `x`; None if it must be computed by itself."""
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
    """The gate as a bool, or as a tensor that only the device reads; also False if it does not fit x."""
    if isinstance(gate, bool):
        return gate
    fits = gate.dim() == 0 or (x.dim() > 1 and gate.shape[0] == x.shape[0])
    if not fits or type(gate) is not Tensor or gate.device != x.device:
        return False
    # a single layer reads such a gate on the host, too
    return bool(gate) if not plan.fused and readable(gate) else gate


def _is_plain(layer: CoToLoRALinear, x: Tensor) -> bool:
    """Whether `layer` has plain, unsharded tensors on the device of `x`, and trains both A and B or nothing."""
    if (
        layer._original_weight is not None or x.is_nested or x.layout is not torch.strided
        or x.shape[-1:] != (layer.in_features,)
    ):  # fmt: skip
        return False
    weight, bias, a, b = _tensors(layer)
    if (
        # sharded parameters have other types
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
    """W, the bias, A and B; a parameter that a wrapper has moved elsewhere is replaced by None or `...`."""
    own = layer._parameters
    return own.get("weight"), vars(layer).get("bias", own.get("bias", ...)), own.get("lora_a"), own.get("lora_b")


def _read_by(layer: CoToLoRALinear, gated: bool) -> tuple[Any, ...]:
    """The tensors of `layer`, and its switches if it is `gated`; `active` may return a new tensor on every call."""
    if not gated:
        return _tensors(layer)
    return *_tensors(layer), layer._enabled, layer._gate if layer.training else True


def _operands(layer: CoToLoRALinear, read: Sequence[Any], cast_to: torch.dtype | None) -> tuple[Any, Any, Any, Any]:
    """W, bias, A and B in the dtypes and layouts of the computation."""
    weight, bias, a, b, *_ = read
    if layer._transposed:
        weight = weight.T
    if cast_to is not None:
        weight, bias = autocast(weight, cast_to), None if bias is None else autocast(bias, cast_to)
    return weight, bias, a, b


def _state(read: Any) -> Any:
    """A value that changes when a tensor is written to or gets new memory."""
    if not isinstance(read, Tensor):
        return None
    # inference tensors have no version counter, but outside inference mode they cannot be written to
    return 0 if read.is_inference() else read._version, read.data_ptr()
