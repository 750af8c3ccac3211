"""Draws norms by layer. Imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from cotolora.commands.arguments import one_line
from cotolora.commands.description import Norms
from cotolora.commands.layers import Table
from cotolora.results import save_picture

Lines = Mapping[str, Sequence[float | None]]
_STEPS = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
_TICKS = 32  # names of layers that have room along the axis
_STYLES = ("-", "--", ":")
_COLORS = 10  # of matplotlib's own cycle


def formats() -> list[str]:
    """The endings of files that can be drawn into."""
    return sorted(f".{name}" for name in Figure().canvas.get_supported_filetypes())


def draw(norms: Norms, title: str, path: Path) -> None:
    """Draws a line for each kind of module against the layers; below, a panel for each norm of what a variant adds."""
    table, positions = norms.table, range(len(norms.table.rows))
    panels: list[tuple[str, Lines]] = [(norms.of, _lines(table))]
    panels += [(name, {"": values}) for name, values in norms.extra.items()]
    figure = Figure(figsize=(9, 4.6 + 2 * len(norms.extra)), layout="constrained")
    heights = [2] + [1] * len(norms.extra)
    axes = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (what, lines) in zip(axes, panels, strict=True):
        for i, (name, values) in enumerate(lines.items()):
            points = [value if value is not None and math.isfinite(value) else math.nan for value in values]
            style = _STYLES[i // _COLORS % len(_STYLES)]
            axis.plot(positions, points, style, marker="o", markersize=3, linewidth=1, label=_plain(name))
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.set_title(f"norm of {_plain(what)}", fontsize="medium")
        axis.set_ylabel("Frobenius norm")
        axis.grid(alpha=0.3)
        if any(lines):
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    common, ends = _ends(table.rows)
    step = next(step for step in _STEPS if step * _TICKS >= len(ends))
    rotation = 90 if max(map(len, ends)) > 3 else 0
    axes[-1].set_xticks(positions[::step], [_plain(end) for end in ends[::step]], rotation=rotation, fontsize="small")
    axes[-1].set_xlabel(f"layer of {_plain(common)}" if common else "layer")
    figure.suptitle(_plain(title))
    save_picture(figure, path, dpi=150)


def _lines(table: Table) -> Lines:
    """The columns of a table, and the layers that are in none of them."""
    in_none = (all(values[i] is None for values in table.columns.values()) for i in range(len(table.rows)))
    rest = [total if alone else None for total, alone in zip(table.total, in_none, strict=True)]
    if all(value is None for value in rest):
        return table.columns
    return {**table.columns, "single linears" if table.columns else "all": rest}


def _ends(rows: list[str]) -> tuple[str, list[str]]:
    """What the names of all layers begin with, and how they go on."""
    parts = [row.split(".")[:-1] for row in rows]
    common = next((i for i, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), min(map(len, parts)))
    return ".".join(parts[0][:common]), [".".join(row.split(".")[common:]) for row in rows]


def _plain(text: str) -> str:
    """`text` as it stands: matplotlib reads formulas between dollars and hides labels that begin with "_"."""
    text = one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
