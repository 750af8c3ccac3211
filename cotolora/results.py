"""Writes measurements to files: JSON with readable line diffs, and small pictures."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

DIGITS = 5
COLORS = 256


def rounded(content: Any) -> Any:
    """`content` with every float rounded to `DIGITS` significant digits; integers, which are counts, are kept.

    >>> rounded({"seconds": [0.000233993722, 12345678.9], "seed": 1234567})
    {'seconds': [0.00023399, 12346000.0], 'seed': 1234567}
    """
    if isinstance(content, float):
        return float(f"{content:.{DIGITS}g}")
    if isinstance(content, dict):
        return {name: rounded(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [rounded(value) for value in content]
    return content


def text(content: Any) -> str:
    """`content` as JSON with floats `rounded` and one line per record, which is an object or list inside a list.

    So a change of one number changes one line. A container of records takes one line for each of its entries.

    Raises:
        ValueError: a float is not finite, which JSON cannot express.

    >>> print(text({"machine": {"threads": 2}, "rows": [{"n": 1, "seconds": 0.1234567}, {"n": 2, "seconds": 0.5}]}))
    {
     "machine":{"threads":2},
     "rows":[
      {"n":1,"seconds":0.12346},
      {"n":2,"seconds":0.5}
     ]
    }
    """
    return _lines(rounded(content), "")


def write_json(path: Path, content: Any) -> None:
    """Writes the `text` of `content` to `path` atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text(content) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(figure: Any, path: Path, dpi: int) -> None:
    """Writes a matplotlib figure; a PNG gets a palette of `COLORS` colors, which takes a third of the bytes."""
    if path.suffix != ".png":
        figure.savefig(path, dpi=dpi)
        return
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def _lines(content: Any, indent: str) -> str:
    if not _holds_records(content):
        return json.dumps(content, separators=(",", ":"), allow_nan=False)
    inner = indent + " "
    if isinstance(content, dict):
        opening, closing = "{", "}"
        entries = [f"{json.dumps(str(name))}:{_lines(value, inner)}" for name, value in content.items()]
    else:
        opening, closing = "[", "]"
        entries = [_lines(value, inner) for value in content]
    return f"{opening}\n{inner}" + f",\n{inner}".join(entries) + f"\n{indent}{closing}"


def _holds_records(content: Any) -> bool:
    """Whether `content` contains an object or a list inside a list, at any depth."""
    if isinstance(content, dict):
        return any(_holds_records(value) for value in content.values())
    return isinstance(content, list) and any(isinstance(value, (dict, list)) for value in content)
