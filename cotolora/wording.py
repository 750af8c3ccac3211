"""How errors and log lines show values that may be of any size."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

_MOST = 300  # characters of one value
LOG_LINE = 1500  # characters for the names in a log line that must name all it can


class _Short(reprlib.Repr):
    """As repr, cut where it is long; of tensors, arrays and modules what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 160
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 8
        self.maxlevel = 4

    def repr_instance(self, x: Any, level: int) -> str:
        """Of what is no container and no string."""
        if isinstance(x, (Tensor, np.ndarray)):
            return f"<{type(x).__name__} of {x.dtype}, shape {tuple(x.shape)}>"
        return f"<{type(x).__name__}>" if isinstance(x, nn.Module) else super().repr_instance(x, level)


_short = _Short()


def shown(value: Any) -> str:
    """`value` as repr shows it, with the middle of what is long left out.

    >>> shown({"a": [1, 2]}), len(shown("x" * 1_000_000)) < 200
    ("{'a': [1, 2]}", True)
    """
    try:
        return cut(_short.repr(value))
    except Exception:  # of an integer of thousands of digits, for one
        return f"<{type(value).__name__}>"


def cut(text: str) -> str:
    """`text` without the middle where it is long."""
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]}...{text[-_MOST // 2 :]}"


def some_of(names: Collection[str], most: int = 8) -> str:
    """The first of `names`.

    >>> some_of(["q", "k", "v"], most=2)
    "'q', 'k' and 1 more"
    """
    text = ", ".join(_short.repr(name) for name in islice(names, most))
    text = text if len(text) <= 2 * _MOST else f"{text[: 2 * _MOST]}..."
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def listed(names: Iterable[str], room: int = 2 * _MOST) -> str:
    """`names` as repr shows a list, as many as have room.

    >>> listed(["q", "k"])
    "['q', 'k']"
    """
    found = []
    names = list(names)
    for name in names:
        text = _short.repr(name)
        room -= len(text) + 2
        if room < 0:
            break
        found.append(text)
    more = len(names) - len(found)
    return f"[{', '.join(found)}]" if not more else f"[{', '.join(found)}, and {more} more]"
