"""Checks of the tensors and numbers of one call, by themselves and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cotolora.checks import FLOATING, LARGEST, shown
from cotolora.reference import Gate

if TYPE_CHECKING:
    from cotolora.variants.base import Variant


def surely_right(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether the tensor checks would surely pass, in a third of their time. False means that they must run."""
    try:
        dtype, device, (out_features, in_features), (rank, columns) = x.dtype, x.device, weight.shape, lora_a.shape
        return (
            dtype in FLOATING
            and dtype is weight.dtype
            and lora_a.dtype in FLOATING
            and lora_b.dtype in FLOATING
            and x.shape[-1] == in_features == columns
            and lora_b.shape == (out_features, rank)
            and rank > 0
            and device == weight.device == lora_a.device == lora_b.device
            and (bias is None or (bias.dtype is dtype and bias.shape == (out_features,) and bias.device == device))
        )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # not tensors of such dimensions
        return False


def check_tensors(*tensors: tuple[str, Tensor | None]) -> None:
    """Raises unless each is a floating tensor on the device of the first; a bias may be None."""
    device = None
    for name, t in tensors:
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype; got {t.dtype}")
        if t.is_nested and t.layout != torch.jagged:
            raise TypeError(
                f"{name} must be dense, or nested with layout=torch.jagged; got a nested tensor with "
                "layout=torch.strided, which has no shape"
            )
        device = device or t.device
        if t.device != device:
            raise ValueError(f"{name} must be on the device of {tensors[0][0]}, {device}; got {t.device}")


def check_linear_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless x, W and the bias fit together."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features]; got shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    beside = f"with weight of shape {tuple(weight.shape)}"
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}] to fit weight; got shape {tuple(x.shape)} {beside}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}] to fit weight; got shape {tuple(bias.shape)} {beside}")


def check_factors(lora_a: Tensor, lora_b: Tensor, out_features: int, in_features: int, base: str) -> None:
    """Raises unless A and B have the shapes for such sizes; `base` names the tensors that they must fit."""
    if lora_a.dim() != 2 or lora_a.shape[1] != in_features or lora_a.shape[0] == 0:
        raise ValueError(f"lora_a must be [rank, {in_features}] with rank at least 1; got shape {tuple(lora_a.shape)}")
    if lora_b.shape != (out_features, lora_a.shape[0]):
        raise ValueError(
            f"lora_b must be [{out_features}, {lora_a.shape[0]}] to fit {base} and lora_a; "
            f"got shape {tuple(lora_b.shape)}"
        )


def check_list(argument: str, value: Sequence[Tensor]) -> Sequence[Tensor]:
    """`value`; raises TypeError unless it is a tuple or a list."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{argument} must be a tuple of tensors; got {type(value).__name__} {shown(value)}")
    return value


def check_extra(
    variant: Variant, extra: Sequence[object], rank: int, in_features: int, out_features: int, device: torch.device
) -> None:
    """Raises unless `extra` are the further tensors of `variant` after A and B, for such sizes."""
    if len(extra) != len(variant.extra):
        names = ", ".join(part.argument for part in variant.extra) or "none"
        raise ValueError(
            f"extra must hold the further tensors of variant={variant.name!r}, {names}; "
            f"got {len(extra)}: {shown(list(extra))}"
        )
    for part, t in zip(variant.extra, extra, strict=True):
        name = part.argument
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor with variant={variant.name!r}; got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype; got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{name} must be on the device of x, {device}; got {t.device}")
        shape = part.sizes(rank=rank, in_features=in_features, out_features=out_features)
        if t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} to fit weight; got shape {tuple(t.shape)}")


def check_switch(argument: str, value: Gate) -> None:
    """Raises unless `value` is a bool, or a bool or integer tensor, 0-dim or [batch]."""
    if isinstance(value, bool):
        return
    if not isinstance(value, Tensor):
        got = f"{type(value).__name__} {shown(value)}"
        raise TypeError(f"{argument} must be a bool or a bool or integer tensor; got {got}")
    dense = value.layout == torch.strided and not value.is_nested
    if not dense or value.is_floating_point() or value.is_complex() or value.is_quantized:
        got = f"a tensor of {value.dtype}" + ("" if dense else " that is not dense")
        raise TypeError(f"{argument} must be a bool or a bool or integer tensor; got {got}")
    if value.dim() > 1:
        raise ValueError(f"{argument} must be 0-dim or [batch]; got a tensor of shape {tuple(value.shape)}")


def check_gate(gate: Gate, x: Tensor) -> None:
    """Raises unless `gate` is a bool, or a bool or integer tensor that fits `x`."""
    check_switch("gate", gate)
    if isinstance(gate, bool):
        return
    if gate.device != x.device:
        raise ValueError(f"gate must be on the device of x, {x.device}; got {gate.device}")
    if gate.dim() == 1 and (x.dim() < 2 or gate.shape[0] != x.shape[0]):
        raise ValueError(
            f"a row gate [batch] needs x [batch, ..., in_features] with the same batch; "
            f"got gate of shape {tuple(gate.shape)}, x of shape {tuple(x.shape)}"
        )


def refuse_nested(x: Tensor) -> None:
    """Raises TypeError if `x` is nested: backends compute only the values of a nested tensor."""
    if x.is_nested:
        raise TypeError("x must be dense here; got a nested tensor")


def check_numbers(scale: float, dropout: float) -> float:
    """`scale` as a float; raises unless it is finite and `dropout` a probability."""
    for name, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__} {shown(value)}")
    # not math.isfinite, which torch.compile cannot trace if it treats a changing scale as a symbol
    if not abs(scale) <= LARGEST:
        raise ValueError(f"scale must be finite in float32; got {shown(scale)}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1]; got {shown(dropout)}")
    return float(scale) if isinstance(scale, int) else scale  # torch would convert an int to int64


def check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError unless W and the bias have the dtype of x."""
    dtype = x.dtype
    if weight.dtype != dtype:
        raise TypeError(f"weight must be of the dtype of x, {dtype}; got {weight.dtype}")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias must be of the dtype of x, {dtype}; got {bias.dtype}")
