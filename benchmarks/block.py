"""Times all linears of a block at once: the seven of a Llama's, the six of a vision transformer's.

    python -m benchmarks block [--shapes llama3-8b vit-b] [--rows 8192] [--rank 16] [--json F] [--plot F]

Linears that read the same input share it, and its gradient is summed, as in the model. Attention, norms and activations
are left out: they cost every contender the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import report, sweep
from benchmarks.contenders import AUTO, FROZEN, NAMED, NARROW, OFF_BY_DEVICE, OFF_BY_HOST, chosen
from benchmarks.report import Result
from benchmarks.shapes import BLOCKS

DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"shapes": ["llama3-8b", "vit-b"], "rows": [8192]},
    "cpu": {"shapes": ["three-64", "three-256", "three-768", "vit-b"], "rows": [394]},
}


def plot(result: Result, path: Path) -> None:
    """Forward and backward over frozen, a panel of bars for each block."""
    rows = [row for row in result.rows if row["part"] == "both" and row["over_frozen"] is not None]
    groups = report.groups(rows, sweep.WHERE)
    figure, axes = report.figure(len(groups), width=5.0)
    for axis, (group, members) in zip(axes, groups.items(), strict=True):
        bars = members[::-1]
        colors = ["C0" if row["contender"].startswith("ours") else "0.6" for row in bars]
        drawn = axis.barh([row["contender"] for row in bars], [row["over_frozen"] for row in bars], color=colors)
        axis.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=f"{group[0]}, {group[1]} rows, rank {group[2]}", xlabel="forward and backward, over frozen")
        axis.tick_params(axis="y", labelsize=8)
        axis.margins(x=0.15)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for every block; 1 if ours chose a backend that is not the fastest."""
    parser = sweep.parser_of("block", __doc__ or "")
    parser.add_argument("--shapes", action="extend", nargs="+", choices=BLOCKS, help="whose block; may be repeated")
    options = sweep.settle(parser, arguments, DEFAULTS)
    cases = [(name, BLOCKS[name], m) for name in options.shapes for m in options.rows]
    ours = [AUTO, *NAMED, *([NARROW] if options.dtype != "float32" else []), OFF_BY_HOST, OFF_BY_DEVICE[0]]
    return sweep.run("block", options, cases, [FROZEN, *ours, *chosen(options.peers, options.dtype)], plot)
