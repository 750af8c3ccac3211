"""PEFT's rules for names: which modules a list or a regular expression takes, and which pattern decides."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from cotolora.checks import mapping, strings

logger = logging.getLogger("cotolora")

Targets = str | Sequence[str]


class Pattern(NamedTuple):
    """A key of a rank_pattern or alpha_pattern, compiled, and its value."""

    key: str
    expression: re.Pattern[str]
    value: Any


Patterns = list[Pattern]


def matches(name: str, targets: Targets) -> bool:
    """Whether a module's name is a target: a list holds names or dotted ends, a string is a full regular expression.

    >>> matches("layers.0.q_proj", ["q_proj"]), matches("layers.0.not_q_proj", ["q_proj"])
    (True, False)
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def compiled(argument: str, expression: str) -> re.Pattern[str]:
    """`expression`, compiled.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{argument} must hold regular expressions; got {expression!r} ({error})") from None


def compile_patterns(argument: str, pattern: Mapping[str, Any] | None) -> Patterns:
    """The keys of a rank_pattern or alpha_pattern, compiled once, with their values.

    Raises:
        ValueError: `pattern` is no map, or a key is no regular expression.
    """
    pattern = mapping(argument, {} if pattern is None else pattern, "a map from regular expressions to values")
    return [Pattern(key, compiled(argument, rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]


def first_match(patterns: Patterns, name: str, default: Any) -> Any:
    """The value of the first pattern that takes `name`, or `default`."""
    return next((pattern.value for pattern in patterns if pattern.expression.match(name)), default)


def warn_of_idle_keys(ranks: Patterns, alphas: Patterns, names: Collection[str]) -> None:
    """Logs the keys of a rank_pattern and an alpha_pattern that take none of `names`, as PEFT would not."""
    for argument, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        idle = [pattern.key for pattern in patterns if not any(pattern.expression.match(name) for name in names)]
        if idle:
            logger.warning("%s: %s take none of the targets, %s", argument, some_of(idle), some_of(names))


def checked_names(argument: str, value: Targets) -> Targets:
    """`value`, a string or a list of strings.

    Raises:
        ValueError: it is neither, or a string that is no regular expression.
    """
    if isinstance(value, str):
        compiled(argument, value)
        return value
    try:
        return strings(argument, value, "a list of names or a regular expression")
    except TypeError as error:
        raise ValueError(str(error)) from None


def with_parents(name: str) -> list[str]:
    """The names of the modules around `name`, the outermost first, and its own.

    >>> with_parents("layers.0.q_proj")
    ['layers', 'layers.0', 'layers.0.q_proj']
    """
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def some_of(names: Collection[str], most: int = 8) -> str:
    """The first of `names`, for an error.

    >>> some_of(["q", "k", "v"], most=2)
    "'q', 'k' and 1 more"
    """
    shown = ", ".join(repr(name) for name in islice(names, most))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
