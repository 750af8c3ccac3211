"""Computes how the parts of a regular expression may begin and must begin, to see where a match can branch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from functools import reduce
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
else:
    import sre_constants as sre

# how a match must begin: alternatives, each a sequence of sets of characters
Heads = list[list[int]]
ANY: Heads = [[]]
_ALTERNATIVES = 24
HEAD = 16  # characters after a repeat that are considered
_MOST_LOOKS = 300_000  # parts of an expression, or pairs of parts, that are considered
_BETWEEN_DOTS = 4  # assumed least average distance of dots in a name
# sets of characters as bits: one for each ASCII character, one for all others
OTHERS = 1 << 128
_ALL = 2 * OTHERS - 1
_LETTERS = sum(1 << code for code in range(128) if chr(code).isalpha())
DIGITS = sum(1 << code for code in range(128) if chr(code).isdecimal())
_SPACES = sum(1 << code for code in range(128) if chr(code).isspace())
_WORD = _LETTERS | DIGITS | 1 << ord("_")
_DOT = 1 << ord(".")
_CATEGORIES = {
    sre.CATEGORY_DIGIT: DIGITS | OTHERS,
    sre.CATEGORY_NOT_DIGIT: _ALL & ~DIGITS,
    sre.CATEGORY_SPACE: _SPACES | OTHERS,
    sre.CATEGORY_NOT_SPACE: _ALL & ~_SPACES,
    sre.CATEGORY_WORD: _WORD | OTHERS,
    sre.CATEGORY_NOT_WORD: _ALL & ~_WORD,
}
CHARACTERS = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)
ASSERTIONS = (sre.ASSERT, sre.ASSERT_NOT)
_ENDS = (sre.AT_END, sre.AT_END_STRING)
REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, getattr(sre, "POSSESSIVE_REPEAT", None))
ATOMIC = getattr(sre, "ATOMIC_GROUP", None)


class SlowError(Exception):
    """Matching could take too many steps; the message says why."""


def _characters(op: Any, value: Any, flags: int) -> int:
    """The set of characters that a part from `CHARACTERS` matches, or a superset."""
    if op is sre.ANY:
        return _ALL
    if op is sre.NOT_LITERAL:
        return _ALL if flags & re.IGNORECASE else _ALL & ~_bit(value)
    found, negated = 0, False
    for kind, what in [(op, value)] if op is sre.LITERAL else value:
        if kind is sre.NEGATE:
            negated = True
        elif kind is sre.LITERAL:
            found |= _bit(what)
        elif kind is sre.RANGE:
            low, high = what
            found |= sum(1 << code for code in range(low, min(high, 127) + 1)) | (OTHERS if high > 127 else 0)
        else:
            found |= _CATEGORIES[what]
    if not flags & re.IGNORECASE:
        return _ALL & ~found | (found & OTHERS) if negated else found
    # some ASCII letters have non-ASCII counterparts in the other case
    return _ALL if negated else found | (_LETTERS | OTHERS if found & (_LETTERS | OTHERS) else 0)


def _bit(code: int) -> int:
    return 1 << code if code < 128 else OTHERS


class Beginnings:
    """The beginnings of the parts of one syntax tree. `flags` are the flags that apply to a part."""

    def __init__(self) -> None:
        self._left = _MOST_LOOKS
        self._firsts: dict[int, tuple[int, bool]] = {}
        self._heads: dict[int, tuple[Heads, bool]] = {}

    def look(self, times: int) -> None:
        """Counts the work of the analysis, which is bounded as well; raises SlowError beyond the bound."""
        self._left -= times
        if self._left < 0:
            raise SlowError("it is too complex to be analysed")

    def first(self, items: Any, flags: int) -> tuple[int, bool]:
        """The characters that a match may begin with, and whether it may be empty."""
        if id(items) not in self._firsts:
            found, empty = 0, True
            for op, value in items:
                first, empty = self.first_of(op, value, flags)
                found |= first
                if not empty:
                    break
            self._firsts[id(items)] = found, empty
        return self._firsts[id(items)]

    def first_of(self, op: Any, value: Any, flags: int) -> tuple[int, bool]:
        """As `first`, for one part."""
        if op in CHARACTERS:
            return _characters(op, value, flags), False
        if op is sre.SUBPATTERN:
            return self.first(value[3], (flags | value[1]) & ~value[2])
        if op is ATOMIC and ATOMIC is not None:
            return self.first(value, flags)
        if op in REPEATS:
            first, empty = self.first(value[2], flags)
            return first, empty or value[0] == 0
        if op is sre.BRANCH:
            firsts = [self.first(branch, flags) for branch in value[1]]
            return reduce(lambda one, other: one | other, (first for first, _ in firsts)), any(e for _, e in firsts)
        if op in ASSERTIONS or op is sre.AT:
            return 0, value not in _ENDS
        return _ALL, True

    def head(self, items: Any, flags: int) -> tuple[Heads, bool]:
        """How a match must begin, and whether that describes the whole match."""
        if isinstance(items, list):
            return self._head_of(items, flags)
        if id(items) not in self._heads:
            self._heads[id(items)] = self._head_of(items, flags)
        return self._heads[id(items)]

    def _head_of(self, items: Iterable[Any], flags: int) -> tuple[Heads, bool]:
        heads: Heads = [[]]
        for op, value in items:
            self.look(len(heads))
            more, fixed = self._head_of_part(op, value, flags)
            heads = joined(heads, more)
            if not fixed or min(map(len, heads)) >= HEAD:
                return heads, False
        return heads, True

    def _head_of_part(self, op: Any, value: Any, flags: int) -> tuple[Heads, bool]:
        if op in CHARACTERS:
            return [[_characters(op, value, flags)]], True
        if op is sre.SUBPATTERN:
            return self.head(value[3], (flags | value[1]) & ~value[2])
        if op is sre.BRANCH:
            branches = [self.head(branch, flags) for branch in value[1]]
            heads = [head for heads, _ in branches for head in heads]
            if len(heads) > _ALTERNATIVES:
                return [union(heads)], False
            return heads, all(fixed for _, fixed in branches)
        if op in REPEATS and value[0]:
            once, fixed = self.head(value[2], flags)
            heads = once
            for _ in range(1, min(value[0], HEAD) if fixed else 1):
                heads = joined(heads, once)
            return heads, fixed and value[0] == value[1]
        return [[]], op in ASSERTIONS or (op is sre.AT and value not in _ENDS)


def joined(heads: Heads, more: Heads) -> Heads:
    """Each of `heads` followed by each of `more`; where these are many, fewer and less specific ones."""
    if len(more) > 1 and len(heads) * len(more) > _ALTERNATIVES:
        more = [union(more)]
    return [(head + tail)[:HEAD] for head in heads for tail in more]


def union(heads: Heads) -> list[int]:
    """One beginning that covers all of `heads`: at each place the union of their sets."""
    return [reduce(lambda one, other: one | other, sets) for sets in zip(*heads, strict=False)]


def _agreement(one: list[int], other: list[int]) -> int:
    """The first place in which two beginnings exclude each other; ``2 * HEAD`` if there is none."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if not a & b), 2 * HEAD)


def _exclude(one: list[int], other: list[int]) -> bool:
    """Whether no text can begin with both."""
    return _agreement(one, other) < 2 * HEAD


def all_exclude(one: Heads, other: Heads) -> bool:
    """Whether no text can begin with one of `one` and one of `other`."""
    return all(_exclude(a, b) for a in one for b in other)


def spread(heads: Heads) -> int:
    """The least distance of two places in a name at which one of `heads` matches, given how these can overlap."""
    shortest = min(map(len, heads))
    ends = [
        max(shift + _agreement(one[shift:], other) for one in heads for other in heads) for shift in range(1, shortest)
    ]
    apart = max((size for size in range(1, shortest + 1) if all(end < size for end in ends[: size - 1])), default=1)
    return max(apart, _BETWEEN_DOTS) if all(head and head[0] == _DOT for head in heads) else apart
