"""PEFT's rules for names: which modules a list or a regular expression takes, and which pattern decides."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cotolora.checks import shortened, shown
from cotolora.expressions import MAX_WAYS, Expression, expression, plain_names

logger = logging.getLogger("cotolora")

Targets = str | Collection[str]

# of the keys of a rank_pattern or alpha_pattern together, but for those that are one name
_MAX_KEYS = 10_000
_MAX_WAYS = 1e7
_MAX_AMBIGUOUS = 20


class Patterns:
    """A rank_pattern or alpha_pattern: values by regular expressions, of which the first that takes a name decides.

    Raises:
        ValueError: a key is no regular expression, or they are so many or ambiguous that matching takes too long.
    """

    def __init__(self, argument: str, pattern: Mapping[str, Any]) -> None:
        self._argument, self._items = argument, list(pattern.items())
        self._exact: dict[str, int] = {}  # numbers of keys that are one name, as they are saved: "^" and it
        self._others: list[tuple[int, Expression]] = []
        ways, ambiguous = 0.0, 0
        for number, key in enumerate(pattern):
            names = plain_names(key[1:]) if key.startswith("^") else None
            if names is not None and len(names) == 1:
                self._exact.setdefault(next(iter(names)), number)
                continue
            rule = check_expression(argument, rf"(.*\.)?({key})$", key)
            self._others.append((number, rule))
            ambiguous += rule.ways > MAX_WAYS
            ways += rule.ways if rule.ways <= MAX_WAYS else 0
            if ways > _MAX_WAYS or ambiguous > _MAX_AMBIGUOUS or len(self._others) > _MAX_KEYS:
                raise ValueError(f"{argument} must have fewer or simpler keys; matching {len(pattern)} takes too long")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self._items == other._items

    __hash__ = None  # type: ignore[assignment]

    def first(self, name: str, default: Any) -> Any:
        """The value of the first key that takes `name`, or `default`."""
        exact = self._exact.get(name, len(self._items))
        others = (number for number, expression in self._others if number < exact and expression.match(name))
        number = next(others, exact)
        return self._items[number][1] if number < len(self._items) else default

    def warn_of_idle_keys(self, names: Collection[str]) -> None:
        """Logs the keys that take none of `names`, also where another key comes first."""
        numbers = [number for name, number in self._exact.items() if name not in names]
        numbers += [number for number, expression in self._others if not any(map(expression.match, names))]
        if numbers:
            keys = [self._items[number][0] for number in sorted(numbers)]
            logger.warning("%s: %s take none of the targets, %s", self._argument, some_of(keys), some_of(names))


def matches(name: str, targets: Targets) -> bool:
    """Whether a module's name is a target: a list holds names or dotted ends, a string is a full regular expression.

    >>> matches("layers.0.q_proj", ["q_proj"]), matches("layers.0.not_q_proj", ["q_proj"])
    (True, False)
    """
    if not isinstance(targets, str):
        return name in targets or any(name[i + 1 :] in targets for i, letter in enumerate(name) if letter == ".")
    names = plain_names(targets)
    return name in names if names is not None else expression(targets).fullmatch(name) is not None


def check_expression(argument: str, text: str, shown_as: str | None = None) -> Expression:
    """`text` compiled.

    Raises:
        ValueError: it is no regular expression that can be matched in bounded time.
    """
    try:
        return expression(text) if shown_as is None else Expression(text)
    except ValueError as error:
        raise ValueError(
            f"{argument} must hold regular expressions; got {shown(text if shown_as is None else shown_as)} "
            f"({shortened(str(error))})"
        ) from None


def compile_patterns(argument: str, pattern: Mapping[str, Any] | None) -> Patterns:
    """The keys of a rank_pattern or alpha_pattern, compiled once, with their values.

    Raises:
        ValueError: `pattern` is no map, or its keys are not such as `Patterns` takes.
    """
    if not isinstance(pattern, (Mapping, type(None))):
        raise ValueError(f"{argument} must be a map from regular expressions to values; got {shown(pattern)}")
    return Patterns(argument, pattern or {})


def first_match(patterns: Patterns, name: str, default: Any) -> Any:
    """The value of the first pattern that takes `name`, or `default`."""
    return patterns.first(name, default)


def checked_names(argument: str, value: Targets) -> Targets:
    """`value`, a string or a list of strings.

    Raises:
        ValueError: it is neither, or a string that is no regular expression.
    """
    if isinstance(value, str):
        if plain_names(value) is None:
            check_expression(argument, value)
        return value
    names = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{argument} must be a list of names or a regular expression; got {shown(value)}")
    return names


def with_parents(name: str) -> list[str]:
    """The names of the modules around `name`, the outermost first, and its own.

    >>> with_parents("layers.0.q_proj")
    ['layers', 'layers.0', 'layers.0.q_proj']
    """
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def some_of(names: Collection[str], room: int = 600) -> str:
    """The first of `names`, for an error or the log: as many as `room` characters hold, and one at least.

    >>> some_of(["q", "k", "v"], room=10)
    "'q', 'k' and 1 more"
    """
    listed: list[str] = []
    for name in names:
        text = shown(name)
        room -= len(text) + 2
        if listed and room < 0:
            break
        listed.append(text)
    more = len(names) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")
