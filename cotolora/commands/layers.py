"""Norms of adapters sorted for reading: a row for each layer, a column for each kind of module in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cotolora.groups import group_names

MOST_COLUMNS = 8


class Table(NamedTuple):
    """Norms by layer and by kind of module.

    rows: the layers, as CoTo groups them, in the order of their numbers.
    columns: by kind, a norm for each layer, or None where it has no such module.
    total: the norm of all adapters of each layer together.
    """

    rows: list[str]
    columns: dict[str, list[float | None]]
    total: list[float]


def by_layer(norms: Mapping[str, float]) -> Table:
    """Sorts norms by the names of their modules.

    Modules whose names differ in a number inside the layer, such as experts, share a column; theirs is the norm of all
    together. There are no columns if there would be more than `MOST_COLUMNS`; a module without a layer is in none.

    >>> by_layer({"h.0.q": 3.0, "h.0.v": 4.0, "h.1.q": 1.0})
    Table(rows=['h.0', 'h.1'], columns={'q': [3.0, 1.0], 'v': [4.0, None]}, total=[5.0, 1.0])
    """
    groups = group_names(sorted(norms, key=_in_order), "layer")
    kinds = {name: _kind(name, str(key)) for key, names in groups.items() for name in names}
    shown = _shortest(dict.fromkeys(kind for kind in kinds.values() if kind))
    columns: dict[str, list[float | None]] = {}
    if len(shown) <= MOST_COLUMNS:
        for kind, title in shown.items():
            values = [[norms[name] for name in names if kinds[name] == kind] for names in groups.values()]
            columns[title] = [math.hypot(*each) if each else None for each in values]
    return Table([*map(str, groups)], columns, [math.hypot(*(norms[n] for n in names)) for names in groups.values()])


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers: files hold layer 10 before layer 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _kind(name: str, layer: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name.removeprefix(layer).removeprefix("."))


def _shortest(kinds: Iterable[str]) -> dict[str, str]:
    """The shortest dotted end of each kind that no other has."""
    kinds = list(kinds)
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        found[kind] = next(e for e in ends if e == kind or sum(f".{k}".endswith(f".{e}") for k in kinds) == 1)
    return found
