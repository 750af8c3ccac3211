"""What arguments must be: each check names the argument, what it must be and what it was."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection


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
    raise ValueError(f"{argument} must be {must or bounds}; got {value!r}")


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
    raise ValueError(f"{argument} must be {must}; got {value!r}")


def finite(argument: str, value: object) -> float:
    """`value` as a float; raises ValueError unless it is a finite number."""
    return number(argument, value, "a finite number")


def probability(argument: str, value: object) -> float:
    """`value` as a float; raises ValueError unless it is a number in [0, 1]."""
    return number(argument, value, "a probability in [0, 1]", lambda p: 0 <= p <= 1)


def flag(argument: str, value: object) -> bool:
    """`value`; raises ValueError unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument} must be True or False; got {value!r}")
    return value


def one_of(argument: str, value: object, allowed: Collection[str]) -> str:
    """`value`; raises ValueError unless it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{argument} must be one of {tuple(allowed)}; got {value!r}")
    return value
