"""Times all linears of a block together: the seven of a Llama block, the six of a vision-transformer block.

    python -m benchmarks block [--shapes llama3-8b vit-b] [--rows 8192] [--rank 16] [--json F] [--plot F]

Linears that read the same input share it, and its gradient is summed, as in the model. Attention, norms and
activations are omitted because they cost every contender the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import report, sweep
from benchmarks.contenders import AUTO, FROZEN, chosen, ours_in_full
from benchmarks.report import Result
from benchmarks.shapes import BLOCKS, title
from cotolora.results import save_picture

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"shapes": ["llama3-8b", "vit-b"], "rows": [8192]},
    "cpu": {"shapes": ["three-64", "three-256", "three-768", "vit-b"], "rows": [394]},
}


def plot(result: Result, path: Path) -> None:
    """Plots the time of forward and backward beyond the frozen linears', one panel of bars per block."""
    rows = [row for row in result.rows if row.get("part") == "both" and row["over_frozen"] is not None]
    groups = report.groups([row for row in rows if row["contender"] != FROZEN.name], sweep.WHERE)
    figure, axes = report.figure(len(groups), width=5.5)
    for axis, ((shape, m, rank, mode), members) in zip(axes, groups.items(), strict=True):
        bars = members[::-1]
        extra = [100 * (row["over_frozen"] - 1) for row in bars]
        drawn = axis.barh([row["contender"] for row in bars], extra, color=[color_of(row["contender"]) for row in bars])
        axis.bar_label(drawn, fmt="{:+.0f} %", padding=2, fontsize=8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{title(shape)}, {m} rows, rank {rank}, {mode}", size=8)
        axis.set_xlabel("extra time over the frozen linears, % (lower is better)", size=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.25)
    save_picture(figure, path, dpi=150)


def color_of(name: str) -> str:
    """Blue for ours, pale blue for a single backend of ours, green for ours with the gate off, grey for peers."""
    if not name.startswith("ours"):
        return "0.6"
    return "C0" if name == AUTO.name else "C2" if " off " in name else "lightsteelblue"


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for every block; returns 1 if ours chose a backend that is not the fastest."""
    parser = sweep.parser_of("block", __doc__ or "")
    parser.add_argument("--shapes", action="extend", nargs="+", choices=BLOCKS, help="models; may be repeated")
    options = sweep.settle(parser, arguments, DEFAULTS)
    cases = [(name, BLOCKS[name], m) for name in options.shapes for m in options.rows]
    contenders = [*ours_in_full(options.variant, options.dtype), *chosen(options.peers, options.dtype, options.variant)]
    return sweep.run("block", options, cases, contenders, plot)
