"""Times every backend of a low-rank layer on this GPU and saves the table that `cotolora.backends.choice` reads.

    python -m benchmarks tune [--shapes llama3-8b] [--rows 16 512] [--rank 16] [--dtype bfloat16] [--minutes 20]

A measurement covers forward and backward (gradients of x, A and B). Every contender is first checked against the
reference. Then all take turns in every round, eagerly and captured in a CUDA graph. Ratios are to the frozen
`F.linear`. Peers cannot be chosen as a backend and are timed only on request.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import linear, report, sweep
from benchmarks.compare import compare
from benchmarks.contenders import FROZEN, chosen, named
from benchmarks.report import Result
from benchmarks.workload import Workload
from cotolora.backends import choice, measured
from cotolora.backends.types import Sizes
from cotolora.results import rounded, write_json
from cotolora.variants import VARIANTS

# the contenders that may be chosen, by their names in the table
CONTENDERS = {
    c.name.removeprefix("ours ").removeprefix("triton:"): c for c in named("lora") if c.name != "ours reference"
}
FORMS = frozenset(CONTENDERS)
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"shapes": ["llama3-8b"], "rows": [16, 64, 512, 2048, 8192], "mode": ["eager", "graph"], "rounds": 20},
    # for a dry run: shapes on both sides of 64 rows, where one_pass switches its kernel
    "cpu": {"shapes": ["16,32,48", "80,48,32"], "rows": [16], "rank": [16], "rounds": 2},
}
plot = linear.plot


def line(rows: list[dict[str, Any]]) -> str:
    """The line of one linear in one mode: ratios to frozen, the fastest backend, and the cost model's choice."""
    first, over = rows[0], {row["contender"]: sweep.value(row, "over_frozen") for row in rows}
    seconds = {row["contender"]: row["median_s"] for row in rows}
    able = [name for name, c in CONTENDERS.items() if c.name in seconds]
    cells = [f"{first['rows']} × {first['shape']}, rank {first['rank']}, {first['mode']}"]
    cells.append(report.duration(seconds.get(FROZEN.name, math.nan)))
    cells += [report.ratio(over.get(c.name, math.nan)) for c in CONTENDERS.values()]
    cells += [min(able, key=lambda name: seconds[CONTENDERS[name].name], default="-"), first["model"]]
    others = {FROZEN.name, *(c.name for c in CONTENDERS.values())}
    told = [f"{name} {report.ratio(value)}" for name, value in over.items() if name not in others]
    widths = (38, 9, *(15 for _ in CONTENDERS), 15, 15)
    padded = [
        f"{cell:{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return "".join(padded) + "".join(f"  {text}" for text in told)


def text(result: Result) -> str:
    """The printed report."""
    lines = [line(rows) for rows in report.groups(result.rows, sweep.WHERE).values()]
    return "\n".join([report.head(result), COLUMNS, *lines, sweep.endings(result)])


COLUMNS = f"{'M × K → N':38}{'frozen':>9}" + "".join(f"{name:>15}" for name in (*CONTENDERS, "fastest", "model"))


def read(path: Path, device: str) -> tuple[dict[str, Any], ...]:
    """The rows of an existing table; raises ValueError if the file is not a table of this device."""
    if not path.exists():
        return ()
    rows = measured.load_table(path, FORMS)
    if not rows:
        raise ValueError(f"{path} exists but holds no measured rows; move it away")
    if (other := json.loads(path.read_text()).get("device")) != device:
        raise ValueError(f"{path} was measured on {other}, this is {device}")
    return rows


def save(path: Path, machine: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Adds rows to a table atomically, replacing those measured for the same sizes."""
    key = lambda row: tuple(row[name] for name in (*measured.MEASURED_FOR, "element_size", "captured"))  # noqa: E731
    merged = {key(row): row for row in (*read(path, machine["device"]), *rows)}
    write_json(path, {**machine, "rows": list(merged.values())})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the arguments; exits if this machine cannot measure or the table cannot be written."""
    parser = sweep.parser_of("tune", __doc__ or "", without=("variant",))
    linear.add_shapes(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table (default: where cotolora looks for it)")
    parser.add_argument("--dry-run", action="store_true", help="test the command on a CPU with Triton's interpreter")
    options = sweep.settle(parser, arguments, {name: {"peers": ["none"], **d} for name, d in DEFAULTS.items()})
    on_gpu = options.device.type == "cuda"
    if options.dry_run:
        if on_gpu:
            parser.error(f"argument --device: --dry-run is for the CPU; got '{options.device}'")
        if not options.out or options.out.resolve().parent == measured.cache_path("").resolve().parent:
            parser.error("--dry-run needs --out FILE, outside the folder where cotolora looks for tables")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which happens later
    elif not on_gpu:
        parser.error(
            "argument --device: must be a GPU, because times on a CPU say nothing about one; "
            f"got '{options.device}' with torch {torch.__version__} (--dry-run tests the command on a CPU)"
        )
    elif os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: it makes Triton interpret kernels instead of compiling them")
    try:
        import triton  # noqa: F401 (whose absence is worth a message of its own)

        device = report.machine(options.device)["device"]
        options.out = options.out or measured.cache_path(device)
        read(options.out, device)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out.parent, os.W_OK):
            raise ValueError(f"{options.out.parent} cannot be written to")
    except ImportError as error:
        parser.error(f"{error}; the fused kernels need triton")
    except (ValueError, OSError) as error:
        parser.error(f"argument --out: {error}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints and writes the table; returns 1 if nothing could be measured."""
    options = parse(arguments)
    result = Result("tune", report.machine(options.device), sweep.settings_of(options))
    contenders = [FROZEN, *CONTENDERS.values(), *chosen(options.peers, options.dtype, "lora")]
    written = 0

    def one(workload: Workload, where: str, keys: dict[str, Any]) -> None:
        nonlocal written
        (it,) = workload.linears
        sizes = Sizes(workload.rows, it.out_features, it.in_features, workload.rank, workload.dtype.itemsize)
        rows = []
        for found in compare(workload, contenders, options.mode, options.rounds, ("both",)):
            at, captured = f"{where}, {found.mode}", found.mode == "graph"
            result.refused += [{"contender": n, "where": at, "reason": why} for n, why in found.refused.items()]
            result.notes += sweep.noise(found, at)
            call = sizes.call(VARIANTS["lora"])
            model, _ = choice.fastest(call, choice.architecture(options.device), captured=captured)
            made = rounded(found.rows(**keys, model=model.removeprefix("triton:")))
            if made:
                tqdm.write(line(made))
            result.rows.extend(made)
            medians = {
                name: found.median(c.name, "both").median for name, c in CONTENDERS.items() if c.name in found.seconds
            }
            if medians:
                rows.append({**sizes._asdict(), "captured": captured, "seconds": medians})
        if rows:
            save(options.out, result.machine, rows)
        written += len(rows)

    print(f"{report.head(result)}\n{COLUMNS}")
    sweep.each(result, options, linear.cases(options.shapes, options.rows, bias=False), one)
    print(sweep.endings(result))
    sweep.finish(result, options, plot)
    if written:
        print(f"written: {options.out}")
    return 0 if written else 1
