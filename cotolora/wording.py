"""Shortens values of any size for error messages and log lines."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

_MAX_CHARACTERS = 300  # of one value
LOG_LINE = 1500  # characters of names in a log line that should list as many as possible


class _Short(reprlib.Repr):
    """A repr of limited length, which shows tensors and arrays as type, dtype and shape, and modules as their type."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 160
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 8
        self.maxlevel = 4

    def repr_instance(self, x: Any, level: int) -> str:
        """The repr of anything that is neither a container nor a string."""
        if isinstance(x, (Tensor, np.ndarray)):
            return f"<{type(x).__name__} of {x.dtype}, shape {tuple(x.shape)}>"
        return f"<{type(x).__name__}>" if isinstance(x, nn.Module) else super().repr_instance(x, level)


_short = _Short()


def shown(value: Any) -> str:
    """The repr of `value`, without the middle if it is long.

    >>> shown({"a": [1, 2]}), len(shown("x" * 1_000_000)) < 200
    ("{'a': [1, 2]}", True)
    """
    try:
        return cut(_short.repr(value))
    except Exception:  # such as an integer of thousands of digits
        return f"<{type(value).__name__}>"


def cut(text: str) -> str:
    """`text`, without the middle if it is long."""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS // 2]}...{text[-_MAX_CHARACTERS // 2 :]}"


def some_of(names: Collection[str], most: int = 8) -> str:
    """The first `most` of `names`, and how many more there are.

    >>> some_of(["q", "k", "v"], most=2)
    "'q', 'k' and 1 more"
    """
    text = ", ".join(_short.repr(name) for name in islice(names, most))
    text = text if len(text) <= 2 * _MAX_CHARACTERS else f"{text[: 2 * _MAX_CHARACTERS]}..."
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def listed(names: Iterable[str], room: int = 2 * _MAX_CHARACTERS) -> str:
    """`names` as the repr of a list, as many as fit into `room` characters.

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
