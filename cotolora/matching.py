"""PEFT's rules for names: which modules a list or a regular expression matches, and which pattern decides."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from cotolora.checks import strings
from cotolora.patterns import LONGEST_NAME, MOST_STEPS, Spelled, compiled, spelled
from cotolora.wording import shown, some_of

logger = logging.getLogger("cotolora")

Targets = str | Sequence[str]

_MOST_EXPRESSIONS = 1000  # in one argument
_MOST_CHARACTERS = 200_000  # in all expressions of one argument
_MOST_SHAPES = 1000  # different sets of free places in names of one length


def taking(argument: str, targets: Targets) -> Callable[[str], bool]:
    """A function that says whether a name is a target: a list holds names or dotted ends, a string is a full regex.

    Raises:
        ValueError: the string is not a regular expression, or could take very long to match.

    >>> takes = taking("targets", ["q_proj"])
    >>> takes("layers.0.q_proj"), takes("layers.0.not_q_proj")
    (True, False)
    """
    if not isinstance(targets, str):
        ends = frozenset(targets)
        return lambda name: not ends.isdisjoint(dotted_ends(name))
    if (names := _spellings(targets)) is not None:
        return lambda name: next(names.find(name), None) is not None
    expression = compiled(argument, targets)[0]
    return lambda name: expression.fullmatch(_short_enough(argument, name)) is not None


def why_not_whole(argument: str, expression: str, names: Iterable[str]) -> str:
    """A hint that `expression` matches only a part of one of `names`; empty if it matches a whole one or none.

    >>> why_not_whole("targets", "q_proj|v_proj", ["layers.0.q_proj"])
    "; a regular expression must match the whole name, and this one matches a part of 'layers.0.q_proj'"
    """
    names = [name for name in names if len(name) <= LONGEST_NAME]
    try:
        inside = compiled(argument, expression, "(?s:.*)(?:", ")")[0]
    except ValueError:  # a search could take very long, or the expression has flags, which must come first
        return ""
    found = next((name for name in names if inside.match(name)), None)
    if found is None or any(map(taking(argument, expression), names)):
        return ""
    return f"; a regular expression must match the whole name, and this one matches a part of {found!r}"


def matches(name: str, targets: Targets) -> bool:
    """Whether `name` is one of `targets`, see `taking`."""
    return _taking(targets if isinstance(targets, str) else tuple(targets))(name)


@lru_cache(maxsize=64)
def _taking(targets: Targets) -> Callable[[str], bool]:
    return taking("targets", targets)


def _short_enough(argument: str, name: str) -> str:
    if len(name) > LONGEST_NAME:
        raise ValueError(
            f"{argument} holds regular expressions, which are matched only with names of at most {LONGEST_NAME} "
            f"characters; the model has a module {shown(name)}"
        )
    return name


def dotted_ends(name: str) -> list[str]:
    """`name`, and the part of it after each dot.

    >>> dotted_ends("layers.0.q_proj")
    ['layers.0.q_proj', '0.q_proj', 'q_proj']
    """
    return [name, *(name[place + 1 :] for place, character in enumerate(name) if character == ".")]


class _Spellings:
    """Names that expressions spell out, each with a number, found by dict lookups."""

    def __init__(self) -> None:
        # by length, then by free places, then by text
        self._shapes: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}

    def has_room(self, name: Spelled) -> bool:
        shapes = self._shapes.get(len(name.text), {})
        return name.free in shapes or len(shapes) < _MOST_SHAPES

    def add(self, name: Spelled, number: int) -> None:
        self._shapes.setdefault(len(name.text), {}).setdefault(name.free, {}).setdefault(name.text, number)

    def find(self, text: str) -> Iterator[int]:
        for free, numbers in self._shapes.get(len(text), {}).items():
            shape = list(text)
            for place in free:
                shape[place] = "." if text[place] != "\n" else ""
            if (number := numbers.get("".join(shape))) is not None:
                yield number


def _spellings(expression: str) -> _Spellings | None:
    names = spelled(expression)
    if names is None:
        return None
    found = _Spellings()
    for name in names:
        if not found.has_room(name):
            return None
        found.add(name, 0)
    return found


def compiled_all(argument: str, expressions: Sequence[str], before: str = "", after: str = "") -> list[re.Pattern[str]]:
    """`expressions`, each compiled between `before` and `after`.

    Raises:
        ValueError: one is not a regular expression, or one or all together could take very long to match.
    """
    if len(expressions) > _MOST_EXPRESSIONS or sum(map(len, expressions)) > _MOST_CHARACTERS:
        raise ValueError(
            f"{argument} must hold at most {_MOST_EXPRESSIONS} regular expressions with {_MOST_CHARACTERS} characters "
            f"in total; got {len(expressions)}: {some_of(expressions)}"
        )
    found, total = [], 0.0
    for expression in expressions:
        pattern, steps = compiled(argument, expression, before, after)
        found.append(pattern)
        total += steps
        if total > MOST_STEPS:
            raise ValueError(
                f"{argument} must hold regular expressions that can be matched in bounded time; got "
                f"{len(expressions)} that take too long together: {some_of(expressions)}"
            )
    return found


class Patterns:
    r"""The keys of a rank_pattern or alpha_pattern and their values: ``re.match(rf"(.*\.)?({key})$", name)`` decides.

    Raises:
        ValueError: `pattern` is not a mapping, or a key is not a regular expression or could take very long to match.
    """

    def __init__(self, argument: str, pattern: Mapping[str, Any] | None) -> None:
        if not isinstance(pattern, (Mapping, type(None))):
            raise ValueError(f"{argument} must be a mapping from regular expressions to values; got {shown(pattern)}")
        self.argument = argument
        self.items = list((pattern or {}).items())
        self._ends, self._wholes = _Spellings(), _Spellings()
        others = {number: key for number, (key, _) in enumerate(self.items) if not self._is_spelled(key, number)}
        expressions = compiled_all(argument, list(others.values()), r"(.*\.)?(", ")$")
        self._expressions = dict(zip(others, expressions, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self.items == other.items

    __hash__ = None  # type: ignore[assignment]

    def _is_spelled(self, key: object, number: int) -> bool:
        if not isinstance(key, str):
            raise ValueError(
                f"{self.argument} must be a mapping from regular expressions to values; got the key {shown(key)}"
            )
        # an anchored key matches only whole names
        anchored = key.startswith("^") and "|" not in key
        where = self._wholes if anchored else self._ends
        names = spelled(key[anchored:])
        if names is None or "\n" in key or not all(map(where.has_room, names)):
            return False
        for name in names:
            where.add(name, number)
        return True

    def taking(self, name: str) -> Iterator[int]:
        """The numbers of the keys that match `name`, in no particular order."""
        if self._expressions or "\n" in name:
            _short_enough(self.argument, name)
        if "\n" in name:  # $ and dots treat newlines specially
            keys = enumerate(key for key, _ in self.items)
            yield from (number for number, key in keys if re.match(rf"(.*\.)?({key})$", name))
            return
        yield from self._wholes.find(name)
        for end in dotted_ends(name):
            yield from self._ends.find(end)
        for number, expression in self._expressions.items():
            if expression.match(name):
                yield number

    def idle(self, names: Iterable[str]) -> list[str]:
        """The keys that match none of `names`."""
        taken = {number for name in names for number in self.taking(name)} if self.items else set()
        return [key for number, (key, _) in enumerate(self.items) if number not in taken]


def compile_patterns(argument: str, pattern: Mapping[str, Any] | None) -> Patterns:
    """The `Patterns` of an argument; raises as its constructor."""
    return Patterns(argument, pattern)


def first_match(patterns: Patterns, name: str, default: Any) -> Any:
    """The value of the first pattern that matches `name`, or `default`."""
    number = min(patterns.taking(name), default=None)
    return default if number is None else patterns.items[number][1]


def warn_of_idle_keys(ranks: Patterns, alphas: Patterns, names: Collection[str]) -> None:
    """Logs the keys of a rank_pattern and an alpha_pattern that match none of `names`; PEFT ignores such keys."""
    for patterns in (ranks, alphas):
        if idle := patterns.idle(names):
            logger.warning("%s: %s match none of the targets, %s", patterns.argument, some_of(idle), some_of(names))


def checked_names(argument: str, value: Targets) -> Targets:
    """`value`, a string or a list of strings.

    Raises:
        ValueError: it is neither, or a string that is not a regular expression or could take very long to match.
    """
    if isinstance(value, str):
        taking(argument, value)
        return value
    try:
        return strings(argument, value, "a list of names or a regular expression")
    except TypeError as error:
        raise ValueError(str(error)) from None


def with_parents(name: str) -> list[str]:
    """The names of the modules around `name`, outermost first, and `name` itself.

    >>> with_parents("layers.0.q_proj")
    ['layers', 'layers.0', 'layers.0.q_proj']
    """
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
