"""What arguments must be: each check names the argument, what it must be and what it was."""

from __future__ import annotations

import math
import numbers
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cotolora.reference import Gate

if TYPE_CHECKING:
    from cotolora.variants.base import Variant


T = TypeVar("T")

_MOST = 2**63  # what an int64 cannot hold
_LARGEST = sys.float_info.max


class _Short(reprlib.Repr):
    """As repr, cut where it is long; of tensors, arrays and modules what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 10

    def repr_instance(self, x: Any, level: int) -> str:
        """Of what is no container and no string."""
        if isinstance(x, (Tensor, np.ndarray)):
            return f"<{type(x).__name__} of {x.dtype}, shape {tuple(x.shape)}>"
        return f"<{type(x).__name__}>" if isinstance(x, nn.Module) else super().repr_instance(x, level)


_SHORT = _Short()


def shown(value: object) -> str:
    """`value` for an error, in a few words."""
    try:
        return _SHORT.repr(value)
    except Exception:  # of an integer of thousands of digits, for one
        return f"<{type(value).__name__}>"


def integer(argument: str, value: object, least: int = 1, below: int | None = None, *, must: str | None = None) -> int:
    """`value` as an int of at least `least`, and less than `below`; numpy's integers are integers, bools are not.

    Raises:
        ValueError: it is none; `must` says what it must be where more is asked of it than these bounds.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if whole and least <= value and (below is None or value < below):  # type: ignore[operator]
        return int(value)  # type: ignore[call-overload, no-any-return]
    bounds = "a positive integer" if least == 1 else f"an integer of at least {least}"
    if below is not None:
        bounds = f"an integer in [{least}, {below})"
    raise ValueError(f"{argument} must be {must or bounds}; got {shown(value)}")


def size(argument: str, value: object, least: int = 1) -> int:
    """`value` as an int of at least `least` that counts what there is memory or time for; raises as `integer`."""
    found = integer(argument, value, least)
    return found if found < _MOST else integer(argument, value, least, _MOST)


def number(argument: str, value: object, must: str, fits: Callable[[float], bool] = math.isfinite) -> float:
    """`value` as a float that `fits`, as `must` says in words; numpy's numbers are numbers, bools are not.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            if fits(as_float := float(value)):
                return as_float
        except OverflowError:  # of an integer that no float can hold
            pass
    raise ValueError(f"{argument} must be {must}; got {shown(value)}")


def finite(argument: str, value: object) -> float:
    """`value` as a float; raises ValueError unless it is a finite number."""
    return number(argument, value, "a finite number")


def probability(argument: str, value: object) -> float:
    """`value` as a float; raises ValueError unless it is a number in [0, 1]."""
    return number(argument, value, "a probability in [0, 1]", lambda p: 0 <= p <= 1)


def flag(argument: str, value: object) -> bool:
    """`value`; raises ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument} must be True or False; got {shown(value)}")
    return value


def one_of(argument: str, value: object, allowed: Collection[str]) -> str:
    """`value`; raises ValueError unless it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{argument} must be one of {tuple(allowed)}; got {shown(value)}")
    return value


def instance(argument: str, value: object, kind: type[T], must: str) -> T:
    """`value`; raises TypeError unless it is of the class `kind`, which `must` says in words."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must be {must}; got {type(value).__name__} {shown(value)}")
    return value


def module(argument: str, value: object) -> nn.Module:
    """`value`; raises TypeError unless it is an ``nn.Module``."""
    return instance(argument, value, nn.Module, "an nn.Module")  # type: ignore[type-abstract]


def function(argument: str, value: object, must: str) -> Callable[..., Any]:
    """`value`; raises TypeError unless it can be called and is no module: that is the model, in the wrong place."""
    if not callable(value) or isinstance(value, nn.Module):
        raise TypeError(f"{argument} must be {must}; got {type(value).__name__} {shown(value)}")
    return value


def score(value: object) -> float:
    """What a score gave, as a float; raises TypeError unless it is a number, or a tensor or an array of one."""
    try:
        found = None if isinstance(value, (str, bytes, bytearray)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    if found is None:
        raise TypeError(f"score must give a number; got {type(value).__name__} {shown(value)}")
    return found


def path(argument: str, value: object) -> Path:
    """`value` as a path; raises TypeError unless it is a str or path-like, ValueError if no file can have the name."""
    name = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a path, as a str or os.PathLike; got {shown(value)}")
    if not name or "\0" in name:
        raise ValueError(f"{argument} must be the path of a folder; got {shown(value)}")
    return Path(name)


def device(argument: str, value: object) -> torch.device:
    """`value` as a device; raises TypeError unless it is one, a str or an index, ValueError if torch knows none so."""
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{argument} must be a torch.device or the name of one; got {shown(value)}")
    try:
        return torch.device(value)
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise ValueError(
            f"{argument} must be a torch.device or the name of one; got {shown(value)} ({error})"
        ) from None


def device_here(argument: str, value: object) -> torch.device:
    """`value` as a device; raises as `device`, and RuntimeError if torch cannot use it on this machine."""
    found = device(argument, value)
    try:
        torch.empty(0, device=found)
    except Exception as error:  # torch has several, also an AssertionError
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"{argument} must be a device that torch can use here; got {shown(value)} ({reason})"
        ) from error
    return found


def floating_dtype(argument: str, value: object) -> torch.dtype:
    """`value`; raises TypeError unless it is one of torch's dtypes that a linear is computed in."""
    if not isinstance(value, torch.dtype) or value not in _FLOATING:
        names = ", ".join(sorted(map(str, _FLOATING)))
        raise TypeError(f"{argument} must be a floating dtype; got {shown(value)}, which is none of {names}")
    return value


def listed(argument: str, value: object, must: str, *, empty: bool = True) -> list[Any]:
    """The entries of a list, which may be `empty` or not.

    Raises:
        TypeError: it is none; nor are strings, maps, sets and modules, though they have entries.
        ValueError: it is empty, and must not be.
    """
    no_list = (str, bytes, bytearray, Mapping, Set, nn.Module)
    if isinstance(value, no_list) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be {must}; got {shown(value)}")
    try:
        entries = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else list(value)
    except Exception:  # of a tensor on meta, and of what a stranger's class does
        entries = None
    if not isinstance(entries, list):  # of a tensor without dimensions
        raise TypeError(f"{argument} must be {must}; got {shown(value)}")
    if not entries and not empty:
        raise ValueError(f"{argument} must hold at least one; got none, {shown(value)}")
    return entries


def strings(argument: str, value: object, must: str) -> list[str]:
    """The entries of any iterable of strings; raises TypeError of anything else, a string included."""
    refused = (str, bytes, bytearray, Tensor)
    try:
        names: list[Any] = [None] if isinstance(value, refused) else list(value)  # type: ignore[call-overload]
    except Exception:  # of what is no iterable, though its class may say so
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be {must}; got {shown(value)}")
    return names


def mapping(argument: str, value: Mapping[str, T], must: str, kind: type = object) -> Mapping[str, T]:
    """`value`; raises ValueError unless it is a map from strings to values of the class `kind`."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items()):
        raise ValueError(f"{argument} must be {must}; got {shown(value)}")
    return value


_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def surely_right(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether the tensor checks would find nothing, found out in a third of their time. False does not mean wrong."""
    try:
        dtype, device, (out_features, in_features), (rank, columns) = x.dtype, x.device, weight.shape, lora_a.shape
        return (
            dtype in _FLOATING
            and dtype is weight.dtype
            and lora_a.dtype in _FLOATING
            and lora_b.dtype in _FLOATING
            and x.shape[-1] == in_features == columns
            and lora_b.shape == (out_features, rank)
            and rank > 0
            and device == weight.device == lora_a.device == lora_b.device
            and (bias is None or (bias.dtype is dtype and bias.shape == (out_features,) and bias.device == device))
        )
    except (AttributeError, IndexError, TypeError, ValueError):  # of what is no tensor or has too few dimensions
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
    """Raises unless A and B are factors of such an update; `base` says what they must fit."""
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
    """Raises unless `extra` are the tensors that `variant` has beside A and B, for such sizes."""
    if len(extra) != len(variant.extra):
        names = ", ".join(part.argument for part in variant.extra) or "none"
        raise ValueError(
            f"extra must hold the tensors that variant={variant.name!r} has beside A and B, {names}; "
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
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{argument} must be a bool or a bool or integer tensor; got a tensor of {value.dtype}")
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


def check_numbers(scale: float, dropout: float) -> float:
    """`scale` as a float; raises unless it is finite and `dropout` a probability."""
    for name, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__} {shown(value)}")
    # not math.isfinite, which torch.compile cannot trace once it takes a changing scale for a symbol
    if not abs(scale) <= _LARGEST:
        raise ValueError(f"scale must be finite; got {shown(scale)}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1]; got {shown(dropout)}")
    return float(scale) if isinstance(scale, int) else scale  # which torch would take for one of 64 bits


def check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless W and the bias are of the dtype of x."""
    dtype = x.dtype
    if weight.dtype != dtype:
        raise TypeError(f"weight must be of the dtype of x, {dtype}; got {weight.dtype}")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias must be of the dtype of x, {dtype}; got {bias.dtype}")
