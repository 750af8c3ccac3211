"""Argument checks. Each error names the argument, what it must be and what it was."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cotolora.wording import shown

T = TypeVar("T")

# the dtypes that a linear layer is computed in
FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))

LARGEST = torch.finfo(torch.float32).max  # the largest number that a float32 tensor can be multiplied by
_INT64_END = 2**63  # the first integer that int64 cannot hold


def integer(argument: str, value: object, least: int = 1, below: int | None = None, *, must: str | None = None) -> int:
    """`value` as an int of at least `least` and less than `below`; accepts numpy integers, not bools.

    Raises:
        ValueError: it is not such an integer. The message describes these bounds, or says `must` if that is given.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if whole and least <= value and (below is None or value < below):  # type: ignore[operator]
        return int(value)  # type: ignore[call-overload, no-any-return]
    bounds = "a positive integer" if least == 1 else f"an integer of at least {least}"
    if below is not None:
        bounds = f"an integer in [{least}, {below})"
    raise ValueError(f"{argument} must be {must or bounds}; got {shown(value)}")


def size(argument: str, value: object, least: int = 1) -> int:
    """`value` as an int of at least `least` that int64 can hold, for sizes and counts; raises as `integer` does."""
    found = integer(argument, value, least)
    return found if found < _INT64_END else integer(argument, value, least, _INT64_END)


def number(argument: str, value: object, must: str, fits: Callable[[float], bool] = math.isfinite) -> float:
    """`value` as a float for which `fits` is true; `must` describes it for the message. Not bools.

    Raises:
        ValueError: it is not such a number.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            if fits(as_float := float(value)):
                return as_float
        except OverflowError:  # an integer too large for a float
            pass
    raise ValueError(f"{argument} must be {must}; got {shown(value)}")


def finite(argument: str, value: object) -> float:
    """`value` as a float; raises ValueError unless it is a number that is finite in float32 as well."""
    found = number(argument, value, "a finite number")
    return number(argument, found, "a number that float32 can hold", lambda number: abs(number) <= LARGEST)


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
    """`value`; raises TypeError unless it is an instance of `kind`, which `must` describes for the message."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must be {must}; got {type(value).__name__} {shown(value)}")
    return value


def module(argument: str, value: object) -> nn.Module:
    """`value`; raises TypeError unless it is an ``nn.Module``."""
    return instance(argument, value, nn.Module, "an nn.Module")  # type: ignore[type-abstract]


def function(argument: str, value: object, must: str) -> Callable[..., Any]:
    """`value`; raises TypeError unless it is callable. A module is refused: it is the model in the wrong place."""
    if not callable(value) or isinstance(value, nn.Module):
        raise TypeError(f"{argument} must be {must}; got {type(value).__name__} {shown(value)}")
    return value


def score(value: object) -> float:
    """The result of a score as a float; raises TypeError unless it is a number, or a tensor or array with one entry."""
    try:
        found = None if isinstance(value, (str, bytes, bytearray)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    if found is None:
        raise TypeError(f"score must return a number; got {type(value).__name__} {shown(value)}")
    return found


def path(argument: str, value: object) -> Path:
    """`value` as a path; raises TypeError unless it is a str or path-like, ValueError if no file can have the name."""
    try:
        name = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        possible = isinstance(name, str) and b"\0" not in (os.fsencode(name) or b"\0")
    except Exception:  # a class of another library may raise anything; some characters cannot be encoded
        name, possible = "", False
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a path, as a str or os.PathLike; got {shown(value)}")
    if not possible:
        raise ValueError(f"{argument} must be the path of a folder; got {shown(value)}")
    return Path(name)


def device(argument: str, value: object) -> torch.device:
    """`value` as a device; raises TypeError unless it is a device, a str or an int, ValueError if torch rejects it."""
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise TypeError(f"{argument} must be a torch.device or the name of one; got {shown(value)}")
    try:
        found = torch.device(value)
        if isinstance(value, int) and found.index != value:
            raise ValueError(f"torch reads it as {found}")  # it keeps only the lowest byte
        return found
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise ValueError(
            f"{argument} must be a torch.device or the name of one; got {shown(value)} ({shown(str(error))})"
        ) from None


def device_here(argument: str, value: object) -> torch.device:
    """`value` as a device; raises as `device` does, and RuntimeError if torch cannot use it on this machine."""
    found = device(argument, value)
    try:
        torch.empty(0, device=found)
    except Exception as error:  # torch raises several types, among them AssertionError
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"{argument} must be a device that torch can use here; got {shown(value)} ({reason})"
        ) from error
    return found


def floating_dtype(argument: str, value: object) -> torch.dtype:
    """`value`; raises TypeError unless it is one of the dtypes in `FLOATING`."""
    if not isinstance(value, torch.dtype) or value not in FLOATING:
        names = ", ".join(sorted(map(str, FLOATING)))
        raise TypeError(f"{argument} must be a floating dtype; got {shown(value)}, which is none of {names}")
    return value


def entries(argument: str, value: object, must: str, *, empty: bool = True) -> list[Any]:
    """The entries of `value` as a list; `empty` says whether there may be none.

    Raises:
        TypeError: it is not a sequence of entries. Strings, mappings, sets and modules are refused as well.
        ValueError: it has no entries and `empty` is False.
    """
    no_list = (str, bytes, bytearray, Mapping, Set, nn.Module)
    if isinstance(value, no_list) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be {must}; got {shown(value)}")
    try:
        found = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else list(value)
    except Exception:  # a tensor on meta raises; a class of another library may raise anything
        found = None
    if not isinstance(found, list):  # a 0-dim tensor gives a number
        raise TypeError(f"{argument} must be {must}; got {shown(value)}")
    if not found and not empty:
        raise ValueError(f"{argument} must hold at least one entry; got {shown(value)}")
    return found


def strings(argument: str, value: object, must: str) -> list[str]:
    """The entries of an iterable of strings; raises TypeError for anything else, including a single string."""
    refused = (str, bytes, bytearray, Tensor, nn.Module)
    try:
        names: list[Any] = [None] if isinstance(value, refused) else list(value)  # type: ignore[call-overload]
    except Exception:  # not iterable, even if its class has __iter__
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be {must}; got {shown(value)}")
    return names


def mapping(argument: str, value: Mapping[str, T], must: str, kind: type = object) -> Mapping[str, T]:
    """`value`; raises ValueError unless it is a mapping from strings to instances of `kind`."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items()):
        raise ValueError(f"{argument} must be {must}; got {shown(value)}")
    return value
