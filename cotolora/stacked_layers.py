"""What layers that read one x make of it together, and what each must be for that."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cotolora.backends.autograd import without_autocast
from cotolora.backends.choice import Plan
from cotolora.backends.stacked import apply_stacked
from cotolora.functional import autocast, planned
from cotolora.linear import CoToLoRALinear
from cotolora.operands import surely_right
from cotolora.variants import VARIANTS

_PLAIN = (nn.Parameter, Tensor)


class Output(NamedTuple):
    """What a layer has made of an x, and by what: the plan, and `_tensors` with how often each was written to."""

    y: Tensor
    plan: Plan
    tensors: Sequence[Tensor | None]
    versions: Sequence[int]

    def is_of(self, layer: CoToLoRALinear, x: Tensor) -> bool:
        """Whether `layer` would make the same now."""
        return (
            is_plain(layer, x)
            and all(map(operator.is_, self.tensors, now := _tensors(layer)))
            and self.versions == [_version(one) for one in now]
            and self.plan is plan_of(layer, x)
        )


def outputs_of(plans: Mapping[CoToLoRALinear, Plan], x: Tensor, grad: bool) -> dict[CoToLoRALinear, Output] | None:
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
    return {layer: Output(*one) for layer, one in zip(plans, made, strict=True)}


def with_own_node(y: Tensor) -> Tensor:
    """`y` by a node of its own: hooks on it are called where it has a gradient, not where another output has one."""
    return y.view_as(y) if y.requires_grad else y


def plan_of(layer: CoToLoRALinear, x: Tensor) -> Plan:
    """How `layer` is computed of `x`."""
    dropout = layer.dropout if layer.training else 0.0
    rank = layer._parameters["lora_a"].shape[0]  # type: ignore[union-attr]
    sizes = layer.in_features, layer.out_features
    return planned(VARIANTS[layer.variant], x, rank, *sizes, layer.scale, dropout)


def plan_with(first: CoToLoRALinear, plan: Plan, layer: CoToLoRALinear, x: Tensor) -> Plan | None:
    """How `layer` is computed of `x`; None if not as the first layer that reads it is, by `plan`."""
    if not is_plain(layer, x) or layer._parameters["weight"].dtype != first._parameters["weight"].dtype:  # type: ignore[union-attr]
        return None
    own = plan_of(layer, x)
    return own if own.stacked is plan.stacked and own.options == plan.options else None


def is_plain(layer: CoToLoRALinear, x: Tensor) -> bool:
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
