"""Compiles regular expressions from untrusted sources, and refuses those that could take very long to match.

`re` does the matching and backtracks wherever a name can be matched in several ways. An upper bound for the number of
ways is computed from the syntax tree of the expression, for names of `_LENGTH` characters. A `Count` is a list of
coefficients of ``_LENGTH**d / d!``: d consecutive repeats that may each end anywhere divide the name between them, in
as many ways as there are d ordered places in it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

from cotolora.syntax import (
    ANY,
    ASSERTIONS,
    ATOMIC,
    CHARACTERS,
    DIGITS,
    HEAD,
    OTHERS,
    REPEATS,
    Beginnings,
    Heads,
    SlowError,
    all_exclude,
    joined,
    spread,
    sre,
    union,
)
from cotolora.wording import shown

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

LONGEST_NAME = 500  # characters of a module name that expressions are matched with
MOST_STEPS = 2e7  # about half a second
_LENGTH = 200  # characters of the names that steps are counted for
_LONGEST = 50_000  # characters of an expression
_DIGITS_IN_A_ROW = 10  # assumed of a name
_FAST = 0.1  # steps per character that a repeat of a single character takes without backtracking

Count = Sequence[float]
_ONE: Count = (1.0,)
_NONE: Count = (0.0,)


def compiled(argument: str, expression: str, before: str = "", after: str = "") -> tuple[re.Pattern[str], float]:
    """`expression` compiled between `before` and `after`, and an upper bound for the steps of matching it.

    Raises:
        ValueError: it is not a regular expression, or it could take very long to match.
    """
    whole = before + expression + after
    try:
        if len(expression) > _LONGEST:
            raise SlowError(f"it has more than {_LONGEST} characters")
        tree = parser.parse(whole)
        ways, steps = _Tree().sequence(tree, tree.state.flags, 0, ANY)
        return re.compile(whole), _value(steps) + _value(ways)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{argument} must hold regular expressions; got {shown(expression)} ({error})") from None
    except SlowError as error:
        raise ValueError(
            f"{argument} must hold regular expressions that can be matched in bounded time; got {shown(expression)}: "
            f"{error}"
        ) from None


class Spelled(NamedTuple):
    """A name that an expression spells out; `text` has a dot at the places `free`, where any character matches."""

    text: str
    free: tuple[int, ...]


def spelled(expression: str) -> list[Spelled] | None:
    """The names in an `expression` that is only names separated by ``|``; None for any other expression."""
    found: list[Spelled] = []
    text, free = "", list[int]()
    characters = iter(expression)
    for character in characters:
        if character == "|":
            found.append(Spelled(text, tuple(free)))
            text, free = "", list[int]()
            continue
        if character == "\\":
            character = next(characters, "a")
            if character.isascii() and character.isalnum():
                return None
        elif character == ".":
            free.append(len(text))
        elif character in "^$*+?{}[]()":
            return None
        text += character
    return [*found, Spelled(text, tuple(free))]


def _value(count: Count) -> float:
    return sum(each * _LENGTH**degree / math.factorial(degree) for degree, each in enumerate(count))


def _plus(one: Count, other: Count) -> Count:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    return [each + (shorter[i] if i < len(shorter) else 0.0) for i, each in enumerate(longer)]


def _times(one: Count, other: Count) -> Count:
    product = [0.0] * (len(one) + len(other) - 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            product[i + j] += a * b
    if _value(product) > MOST_STEPS:
        raise SlowError("consecutive repeats and alternatives can divide a name between them in too many ways")
    return product


def _largest(counts: Iterable[Count]) -> Count:
    def larger(one: Count, other: Count) -> Count:
        size = max(len(one), len(other))
        return [
            max(a, b) for a, b in zip(*([*each, *[0.0] * (size - len(each))] for each in (one, other)), strict=True)
        ]

    return reduce(larger, counts, _NONE)


class _Tree:
    """Counts ways and steps in one syntax tree. `flags` are the regular expression flags that apply to a part."""

    def __init__(self) -> None:
        self._begin = Beginnings()

    def sequence(self, items: Any, flags: int, follow: int, after: Heads) -> tuple[Count, Count]:
        """The number of ways in which `items` match from one place on, and the steps of trying them all.

        Args:
            items: a subpattern.
            flags: the flags that apply to it.
            follow: the characters that the next part may begin with; none at the end.
            after: how the next part must begin.
        """
        items, follows = list(items), []
        for op, value in reversed(items):
            follows.append(follow)
            first, empty = self._begin.first_of(op, value, flags)
            follow = first | (follow if empty else 0)
        ways, steps = _ONE, _ONE
        for i, (op, value) in enumerate(items):
            if op in CHARACTERS or op is sre.AT:
                continue
            head, fixed = self._begin.head(items[i + 1 : i + 1 + HEAD], flags)
            own, work = self._part(op, value, flags, follows[-1 - i], joined(head, after) if fixed else head)
            steps = _plus(steps, _times(ways, work))
            ways = _times(ways, own)
        return ways, steps

    def _part(self, op: Any, value: Any, flags: int, follow: int, after: Heads) -> tuple[Count, Count]:
        if op is sre.SUBPATTERN:
            _, added, removed, inner = value
            return self.sequence(inner, (flags | added) & ~removed, follow, after)
        if op is ATOMIC and ATOMIC is not None:
            return self.sequence(value, flags, follow, after)
        if op in ASSERTIONS:
            return _ONE, self.sequence(value[1], flags, 0, ANY)[1]
        if op is sre.BRANCH:
            return self._branches(value[1], flags, follow, after)
        if op in REPEATS:
            least, most, body = value
            return self._repeat(least, most, body, flags, follow, after)
        if op is sre.GROUPREF_EXISTS:
            return self._branches([inner for inner in value[1:] if inner is not None] + [[]], flags, follow, after)
        return _ONE, _ONE  # a back-reference or an empty match

    def _branches(self, branches: list[Any], flags: int, follow: int, after: Heads) -> tuple[Count, Count]:
        costs = [self.sequence(branch, flags, follow, after) for branch in branches]
        steps = reduce(_plus, (steps for _, steps in costs))
        if len(branches) > 100:
            return reduce(_plus, (ways for ways, _ in costs)), steps
        heads = [self._begin.head(branch, flags)[0] for branch in branches]
        heads = [own if len(branches) < 10 else [union(own)] for own in heads]
        self._begin.look(sum(map(len, heads)) ** 2)
        together = (
            reduce(_plus, (costs[j][0] for j, others in enumerate(heads) if i == j or not all_exclude(own, others)))
            for i, own in enumerate(heads)
        )
        return _largest(together), steps

    def _repeat(self, least: int, most: int, body: Any, flags: int, follow: int, after: Heads) -> tuple[Count, Count]:
        first, empty = self._begin.first(body, flags)
        ends_alone = not empty and not first & follow  # the next character decides whether to repeat again
        again = first if most > 1 else 0
        ways, steps = self.sequence(body, flags, again | follow, after if most == 1 else ANY)
        if most == 1:
            return _largest((_ONE, ways)) if ends_alone else _plus(_ONE, ways), _plus(_ONE, steps)
        if _value(ways) > 1:
            return self._ambiguous(least, min(most, _LENGTH), ways, steps)
        number = self._times_at_most(most, body, first)
        long = number >= _LENGTH
        work = _times((0.0, 1.0) if long else (float(number),), steps)
        if ends_alone or least == most:
            return _ONE, work if len(body) > 1 or body[0][0] not in CHARACTERS else [_FAST * each for each in work]
        self._begin.look(HEAD * len(after) ** 2)
        return (1.0, 1 / spread(after)) if long else (float(number - min(least, number) + 1),), work

    def _ambiguous(self, least: int, most: int, ways: Count, steps: Count) -> tuple[Count, Count]:
        total: Count = _NONE
        work: Count = _ONE
        power: Count = _ONE
        try:
            for number in range(most + 1):
                total = _plus(total, power) if number >= least else total
                work = _plus(work, _times(power, steps))
                power = _times(power, ways)
        except SlowError:
            raise SlowError("a repeat contains a part that can match in several ways, such as another repeat") from None
        return total, work

    def _times_at_most(self, most: int, body: Any, first: int) -> int:
        single = len(body) == 1 and body[0][0] in CHARACTERS
        limit = _DIGITS_IN_A_ROW if single and not first & ~DIGITS & ~OTHERS else _LENGTH
        return min(most, limit)
