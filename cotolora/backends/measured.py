"""Reads the table that `python -m benchmarks tune` measures on a GPU: seconds of each backend at some sizes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cotolora.backends.types import Sizes

logger = logging.getLogger("cotolora")

MEASURED_FOR = ("m", "n", "k", "rank")


def nearest(table: tuple[dict[str, Any], ...], sizes: Sizes, captured: bool) -> dict[str, Any] | None:
    """The row of the nearest sizes on a logarithmic scale; None if in every row a size differs by more than 2 times."""

    def distances(row: dict[str, Any]) -> list[float]:
        return [abs(math.log2(max(row[name], 1) / max(getattr(sizes, name), 1))) for name in MEASURED_FOR]

    near = [
        row
        for row in table
        if row["captured"] == captured and row["element_size"] == sizes.element_size and max(distances(row)) <= 1
    ]
    return min(near, key=lambda row: sum(distances(row)), default=None)


def cache_path(device_name: str) -> Path:
    """The path of the measured table of a device: under ``XDG_CACHE_HOME``, or ``~/.cache``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "cotolora" / ("".join(c if c.isalnum() else "_" for c in device_name) + ".json")


def load_table(path: Path, known: Collection[str]) -> tuple[dict[str, Any], ...]:
    """The rows of a measured table, which may contain only `known` backends.

    Empty, with a warning that says why, if the file is damaged.
    """
    if not path.exists():
        return ()
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            numbers = [row[name] for name in (*MEASURED_FOR, "element_size")] + list(row["seconds"].values())
            if not all(isinstance(n, (int, float)) and math.isfinite(n) and n >= 0 for n in numbers):
                raise ValueError(f"a row has an entry that is not a size or a time: {row}")
            if not isinstance(row["captured"], bool) or not row["seconds"] or set(row["seconds"]) - set(known):
                raise ValueError(f"a row has unknown backends or no bool for captured: {row}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("ignoring the measured table %s: %s: %s", path, type(error).__name__, error)
        return ()
    return tuple(rows)
