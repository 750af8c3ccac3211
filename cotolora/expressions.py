"""Regular expressions of strangers, matched against names in bounded time.

`re` tries the ways through an expression one by one, and a few dozen characters can have more ways than there is time
for. So an expression that may have many is run by a matcher that visits each pair of a place in the expression and one
in the name once. It finds what `re` finds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    from re import _compiler as _sre_compile
    from re import _parser as _sre_parse
else:
    import sre_compile as _sre_compile
    import sre_parse as _sre_parse

MAX_LENGTH = 50_000
MAX_WAYS = 1e5  # through an expression and a name that are left to `re`, which takes at most milliseconds for them
MAX_STEPS = 1_000  # of an expression that has more
_TYPICAL_LENGTH = 100
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_LEAVES = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT")  # one character, or none, in one way


class Expression:
    """A compiled regular expression.

    Attributes:
        ways: at most how many `re` may try in a name of typical length; more than `MAX_WAYS` are not left to it.

    Raises:
        ValueError: it is none, too long, or one that only trying every way can match.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it has {len(text)} characters, more than {MAX_LENGTH}")
        try:
            self.compiled = re.compile(text)
            tree = _sre_parse.parse(text)
            self.ways = _ways(tree)
            self._matcher = None if self.ways <= MAX_WAYS else _Matcher(tree, self.compiled.flags)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.compiled == other.compiled

    def __hash__(self) -> int:
        return hash(self.compiled)

    def match(self, name: str) -> Mapping[str, str] | re.Match[str] | None:
        """As of `re.Pattern`; the result gives the named groups outside of look-arounds by name."""
        return self.compiled.match(name) if self._matcher is None else self._matcher.match(name, None)

    def fullmatch(self, name: str) -> Mapping[str, str] | re.Match[str] | None:
        """As of `re.Pattern`; the result gives the named groups outside of look-arounds by name."""
        return self.compiled.fullmatch(name) if self._matcher is None else self._matcher.match(name, len(name))


@lru_cache(maxsize=256)
def expression(text: str) -> Expression:
    """`Expression`, which is not compiled again for the next name."""
    return Expression(text)


@lru_cache(maxsize=256)
def plain_names(text: str) -> frozenset[str] | None:
    """The names that `text` takes whole, if it is such a list of them as ``"|".join(map(re.escape, names))``."""
    names = [re.sub(r"\\(.)", r"\1", part, flags=re.S) for part in re.findall(r"(?:\\.|[^\\|])+", text, re.S)]
    return frozenset(names) if "|".join(map(re.escape, names)) == text else None


def _ways(tree: Any) -> float:
    """At most how many ways `re` may try through a part of an expression, in a name of typical length."""
    ways = 1.0
    for op, argument in tree:
        if op.name == "BRANCH":
            ways *= sum(map(_ways, argument[1]))
        elif op.name in _REPEATS:
            ways *= _ways_of_repeat(*argument)
        else:
            for part in _parts(op.name, argument):
                ways *= _ways(part)
    return ways


def _ways_of_repeat(least: int, most: int, body: Any) -> float:
    inner = _ways(body)
    if inner == 1:
        return 1.0 + min(most - least, _TYPICAL_LENGTH)
    if most == 1:
        return inner + (1 - least)
    return float("inf")


def _parts(op: str, argument: Any) -> list[Any]:
    """The expressions inside of a group, a look-around or a condition."""
    if op in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return [argument[-1]]
    if op == "GROUPREF_EXISTS":
        return [part for part in argument[1:] if part is not None]
    return [argument] if op == "ATOMIC_GROUP" else []


class _Step(NamedTuple):
    """One step of a matcher.

    kind: "leaf" takes `width` characters if `test` finds them, "split" goes on at each of `after` in turn, "look" goes
        on where `inside` matches, or with `negative` where it does not, "mark" notes where a group begins or ends,
        "accept" is the end.
    after: the next steps.
    behind: how many characters before this place `inside` begins and after which it ends here; None: it begins here.
    """

    kind: str
    after: tuple[int, ...] = ()
    test: Callable[[str, int], Any] | None = None
    width: int = 0
    inside: int = 0
    negative: bool = False
    behind: int | None = None
    group: str = ""


class _Matcher:
    """Tries the ways through an expression as `re` does, but none twice from the same place of it and of the name."""

    def __init__(self, tree: Any, flags: int) -> None:
        self._steps: list[_Step] = []
        self._names = {number: name for name, number in tree.state.groupdict.items()}
        self._state = tree.state
        self._start = self._sequence(tree, flags, self._add(_Step("accept")))

    def match(self, name: str, end: int | None) -> Mapping[str, str] | None:
        """The named groups of the first match from the start of `name`, up to `end` if that is given."""
        found = self._run(self._start, name, 0, end, {})
        if found is None:
            return None
        places: dict[str, list[int]] = {}
        (marks,) = found
        while marks is not None:
            marks, group, place = marks
            places.setdefault(group, []).append(place)
        # the last that were noted come first: an end, and its beginning
        return {group: name[noted[1] : noted[0]] for group, noted in places.items()}

    def _run(
        self, start: int, name: str, place: int, end: int | None, looked: dict[tuple[int, int], bool]
    ) -> tuple[Any] | None:
        seen: set[tuple[int, int]] = set()
        todo: list[tuple[int, int, Any]] = [(start, place, None)]
        while todo:
            number, place, marks = todo.pop()
            if (number, place) in seen:
                continue
            seen.add((number, place))
            step = self._steps[number]
            if step.kind == "accept":
                if end is None or place == end:
                    return (marks,)
                continue
            if step.kind == "leaf":
                if not step.test(name, place):  # type: ignore[misc]
                    continue
                place += step.width
            elif step.kind == "look":
                if (number, place) not in looked:
                    looked[number, place] = self._looks(step, name, place, looked)
                if looked[number, place] is step.negative:
                    continue
            elif step.kind == "mark":
                marks = (marks, step.group, place)
            todo += [(after, place, marks) for after in reversed(step.after)]
        return None

    def _looks(self, step: _Step, name: str, place: int, looked: dict[tuple[int, int], bool]) -> bool:
        if step.behind is None:
            return self._run(step.inside, name, place, None, looked) is not None
        begin = place - step.behind
        return begin >= 0 and self._run(step.inside, name, begin, place, looked) is not None

    def _add(self, step: _Step) -> int:
        if len(self._steps) >= MAX_STEPS:
            raise ValueError(f"it is ambiguous, and of more than {MAX_STEPS} steps")
        self._steps.append(step)
        return len(self._steps) - 1

    def _sequence(self, tree: Any, flags: int, after: int) -> int:
        """Adds the steps of a part, from its last to its first; the number of the first."""
        leaves: list[Any] = []
        for op, argument in reversed(list(tree)):
            if op.name in _LEAVES:
                leaves.insert(0, (op, argument))
                continue
            after = self._step(op.name, argument, flags, self._leaf(leaves, flags, after))
            leaves = []
        return self._leaf(leaves, flags, after)

    def _leaf(self, leaves: list[Any], flags: int, after: int) -> int:
        if not leaves:
            return after
        compiled = _sre_compile.compile(_sre_parse.SubPattern(self._state, leaves), flags)
        width = sum(op.name != "AT" for op, _ in leaves)
        return self._add(_Step("leaf", (after,), compiled.match, width))

    def _step(self, op: str, argument: Any, flags: int, after: int) -> int:
        if op == "BRANCH":
            return self._add(_Step("split", tuple(self._sequence(part, flags, after) for part in argument[1])))
        if op == "SUBPATTERN":
            group, added, removed, body = argument
            name = self._names.get(group)
            if name is not None:
                after = self._add(_Step("mark", (after,), group=name))
            first = self._sequence(body, (flags | added) & ~removed, after)
            return first if name is None else self._add(_Step("mark", (first,), group=name))
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, body = argument
            behind = body.getwidth()[0] if direction < 0 else None
            inside = self._sequence(body, flags, self._add(_Step("accept")))
            return self._add(_Step("look", (after,), inside=inside, negative=op == "ASSERT_NOT", behind=behind))
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(argument, flags, after, greedy=op == "MAX_REPEAT")
        if op == "FAILURE":
            return self._add(_Step("split"))
        # what matches then depends on what has matched before
        raise ValueError("it is ambiguous, and has a back-reference, a condition or a possessive part")

    def _repeat(self, argument: tuple[int, int, Any], flags: int, after: int, greedy: bool) -> int:
        least, most, body = argument

        def choice(again: int) -> _Step:
            return _Step("split", (again, after) if greedy else (after, again))

        if most == _sre_parse.MAXREPEAT:
            first = self._add(_Step("split"))  # of which the body must know
            self._steps[first] = choice(self._sequence(body, flags, first))
        else:
            first = after
            for _ in range(most - least):
                first = self._add(choice(self._sequence(body, flags, first)))
        for _ in range(least):
            first = self._sequence(body, flags, first)
        return first
