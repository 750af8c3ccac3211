"""Times every form of a low-rank layer on this GPU and keeps the table that `cotolora.kernels.forms.choose_form` reads.

    python -m benchmarks tune [--shapes llama3-8b] [--rows 16 512] [--rank 16] [--dtype bfloat16] [--minutes 20]

One time is forward and backward (gradients of x, A and B). Every contender is first held to the reference; then all
take turns in every round, eager and captured in a CUDA graph. Ratios are to the frozen `F.linear`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.compare import Comparison, compare
from benchmarks.contenders import FROZEN, NAMED
from benchmarks.shapes import BLOCKS, Linear, distinct, number, shape
from benchmarks.workload import Workload, reason
from cotolora.kernels import forms
from cotolora.kernels.forms import Sizes
from cotolora.kernels.tiles import architecture

# what may be chosen, by the name that the table has for it
CONTENDERS = {c.name.removeprefix("ours ").removeprefix("triton:"): c for c in NAMED if c.name != "ours reference"}
DEFAULTS: dict[str, Any] = {
    "shapes": [[(None, *linear) for linear in distinct("llama3-8b")]],
    "rows": [16, 64, 512, 2048, 8192],
    "rank": [16],
    "dtype": "bfloat16",
    "rounds": 20,
}
# on both sides of the 64 rows at which one_pass changes its kernel
DRY_RUN = DEFAULTS | {"shapes": [[(16, 32, 48), (80, 48, 32)]], "dtype": "float32", "rounds": 2}


def measure(sizes: Sizes, options: argparse.Namespace, report_: Callable[[str], None]) -> list[Comparison]:
    """Times the contenders on one linear, eager and, on a GPU, captured; says who is left out and why."""
    linear = Linear("linear", sizes.k, sizes.n, "x")
    workload = Workload((linear,), sizes.m, sizes.rank, getattr(torch, options.dtype), options.device)
    modes = ["eager", "graph"] if options.device.type == "cuda" else ["eager"]
    comparisons = compare(workload, [FROZEN, *CONTENDERS.values()], modes, options.rounds, ("both",))
    for name, why in {n: w for c in comparisons for n, w in c.refused.items()}.items():
        report_(f"{name} left out: {why}")
    return comparisons


COLUMNS = f"{'M x K x N':>18}{'rank':>6}{'mode':>7}{'frozen us':>11}" + "".join(f"{name:>15}" for name in CONTENDERS)
COLUMNS += f"  {'fastest':15}model"


def line(sizes: Sizes, captured: bool, seconds: dict[str, float], frozen: float, device: torch.device) -> str:
    """A row of the printed table: what was measured, over frozen, and what would have run without it."""
    mode, size = "graph" if captured else "eager", f"{sizes.m}x{sizes.k}x{sizes.n}"
    cells = "".join(f"{seconds[n] / frozen:15.3f}" if n in seconds else f"{'-':>15}" for n in CONTENDERS)
    fastest = min((name for name in CONTENDERS if name in seconds), key=seconds.__getitem__)
    model = forms.choose_form(sizes, architecture(device), captured=captured).form
    return f"{size:>18}{sizes.rank:6}{mode:>7}{1e6 * frozen:11.1f}{cells}  {fastest:15}{model}"


def read(path: Path, device: str) -> tuple[dict[str, Any], ...]:
    """The rows that a table has so far; ValueError if the file is anything but a table of this device."""
    if not path.exists():
        return ()
    rows = forms.load_table(path)
    if not rows:
        raise ValueError(f"{path} is there and holds no measured rows; move it away")
    if (other := json.loads(path.read_text()).get("device")) != device:
        raise ValueError(f"{path} was measured on {other}, this is {device}")
    return rows


def save(path: Path, machine: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Adds rows to a table, in the place of those measured for the same sizes; whole or not at all."""
    key = lambda row: tuple(row[name] for name in (*forms.MEASURED_FOR, "element_size", "captured"))  # noqa: E731
    merged = {key(row): row for row in (*read(path, machine["device"]), *rows)}
    report.replace(path, {**machine, "rows": list(merged.values())})


def device_of(text: str | None, dry_run: bool) -> torch.device:
    """What to run on; ValueError with the reason why nothing can run there."""
    if text not in (None, "cpu", "cuda") and not re.fullmatch(r"cuda:\d+", text):
        raise ValueError(f"must be cuda or cuda:N; got {text!r}")
    if dry_run:
        if text not in (None, "cpu"):
            raise ValueError(f"--dry-run is for the CPU; got {text!r}")
        return torch.device("cpu")
    build, index = f"torch {torch.__version__}", int((text or "").partition(":")[2] or 0)
    if text == "cpu":
        raise ValueError("times on a CPU tell nothing of a GPU; with --dry-run everything is tried there")
    if not (torch.version.cuda or torch.version.hip):
        raise ValueError(f"{build} is built without CUDA; --dry-run tries everything on the CPU")
    if index >= torch.cuda.device_count():
        raise ValueError(f"{build} finds {torch.cuda.device_count()} GPUs that it can use; got {text or 'cuda'}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("unset TRITON_INTERPRET: with it kernels are interpreted and never compiled")
    return torch.device("cuda", index)


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options, with `device` and `out` settled."""
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(BLOCKS)
    add("--device", help="cuda or cuda:N (default: cuda)")
    add("--shapes", type=shape, **several, help=f"{names} or M,K,N; may be repeated (default: llama3-8b)")
    add("--rows", type=number(int), **several, metavar="M", help="with a model's shapes (default: 16 64 512 2048 8192)")
    add("--rank", type=number(int), **several, help="may be repeated (default: 16)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of x and W (default: bfloat16); A, B are float32")
    add("--rounds", type=number(int), help="times of each contender (default: 20)")
    add("--minutes", type=number(float), default=math.inf, help="start no new shape after this long")
    add("--out", type=Path, metavar="FILE", help="the table (default: where cotolora looks for this GPU's)")
    add("--dry-run", action="store_true", help="try it all on the CPU, in Triton's interpreter; needs --out")
    options = parser.parse_args(arguments)
    for name, value in (DRY_RUN if options.dry_run else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        options.device = device_of(options.device, options.dry_run)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    if options.dry_run and (not options.out or options.out.resolve().parent == forms.cache_path("").resolve().parent):
        parser.error("--dry-run needs --out FILE, outside the folder where cotolora looks for tables")
    return parser, options


def tune(options: argparse.Namespace, machine: dict[str, str], progress: tqdm) -> int:
    """Measures and saves one shape and rank after the other; how many rows were written."""
    begun, written = time.monotonic(), 0
    for sizes in progress:
        if time.monotonic() - begun > 60 * options.minutes:
            tqdm.write(f"stopped: --minutes {options.minutes:g} are over", file=sys.stderr)
            break
        where = f"{sizes.m}x{sizes.k}x{sizes.n} rank {sizes.rank}"
        report_ = lambda text, where=where: tqdm.write(f"{where}: {text}", file=sys.stderr)  # noqa: E731
        try:
            comparisons = measure(sizes, options, report_)
        except torch.OutOfMemoryError as error:
            report_(f"left out: {reason(error)}")
            continue
        rows = []
        for comparison in comparisons:
            captured, timed = comparison.mode == "graph", comparison.seconds
            seconds = {n: comparison.median(c.name, "both").median for n, c in CONTENDERS.items() if c.name in timed}
            if seconds:
                rows.append({**vars(sizes), "captured": captured, "seconds": seconds})
                frozen = comparison.median("frozen", "both").median if "frozen" in timed else math.nan
                tqdm.write(line(sizes, captured, seconds, frozen, options.device))
        if rows:
            save(options.out, machine, rows)
        written += len(rows)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and writes it; 1 if nothing could be measured."""
    parser, options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which they are not yet
    else:
        torch.cuda.set_device(options.device)
    try:
        import triton  # noqa: F401 (whose absence is worth a message of its own)

        machine = report.machine(options.device)
        options.out = options.out or forms.cache_path(machine["device"])
        read(options.out, machine["device"])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out.parent, os.W_OK):
            raise ValueError(f"{options.out.parent} cannot be written to")
    except ImportError as error:
        parser.error(f"{error}; the fused kernels need triton")
    except (ValueError, OSError) as error:
        parser.error(f"argument --out: {error}")
    linears = [linear for group in options.shapes for linear in group]
    shapes = [(m, k, n) for given, k, n in linears for m in ([given] if given else options.rows)]
    width = getattr(torch, options.dtype).itemsize
    sizes = dict.fromkeys(Sizes(m, n, k, rank, width) for m, k, n in shapes for rank in options.rank)
    print(" · ".join([machine["device"], *(f"{name} {machine[name]}" for name in ("torch", "triton", "cotolora"))]))
    print(f"forward and backward in {options.dtype}, over frozen; medians of {options.rounds} rounds")
    print(COLUMNS)
    with tqdm(sizes, disable=None, unit="shape") as progress:
        written = tune(options, machine, progress)
    if written:
        print(f"written: {options.out}")
    return 0 if written else 1
