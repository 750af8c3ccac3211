"""Times every form of a low-rank layer on this GPU and keeps the table that `cotolora.kernels.forms.choose_form` reads.

    python -m benchmarks tune [--shapes llama3-8b] [--rows 16 512] [--rank 16] [--dtype bfloat16] [--minutes 20]

One time is forward and backward (gradients of x, A and B). Every contender is first held to the reference; then all
take turns in every round, eager and captured in a CUDA graph. Ratios are to the frozen `F.linear`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cotolora
from cotolora.kernels import forms
from cotolora.kernels.forms import Sizes
from cotolora.kernels.tiles import architecture

CONTENDERS = {"addmm": "addmm", **{form: f"triton:{form}" for form in forms.FORMS}}
# (K, N) of the linears
MODELS = {
    "llama3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
    "llama2-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "vit-b": ((768, 768), (768, 2304), (768, 3072), (3072, 768)),
}
DEFAULTS: dict[str, Any] = {
    "shapes": [[(None, *linear) for linear in MODELS["llama3-8b"]]],
    "rows": [16, 64, 512, 2048, 8192],
    "rank": [16],
    "dtype": "bfloat16",
    "rounds": 20,
}
# on both sides of the 64 rows at which one_pass changes its kernel
DRY_RUN = DEFAULTS | {"shapes": [[(16, 32, 48), (80, 48, 32)]], "dtype": "float32", "rounds": 2}
CALLS = 16  # in one time, at least: beside a small call's, the cost of two synchronizes would count
MAX_COPIES = 64


@dataclass(frozen=True)
class Problem:
    """Random operands of one shape: an adapter, and copies of x, W and dy that calls take in turn."""

    copies: list[tuple[Tensor, Tensor, Tensor]]
    lora_a: Tensor
    lora_b: Tensor

    @classmethod
    def random(cls, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        """As many copies as fill the L2 cache three times, so that a call finds nothing of its own in it."""
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        m, n, k, rank = sizes.m, sizes.n, sizes.k, sizes.rank
        # W too: in a model, other layers' weights pass through the cache between two calls of this one
        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        count = min(MAX_COPIES, max(2, math.ceil(3 * l2 / sizes.bytes("x", "w", "dy"))))
        copies = [
            (draw(m, k).to(dtype).requires_grad_(), (draw(n, k) / math.sqrt(k)).to(dtype), draw(m, n).to(dtype))
            for _ in range(count)
        ]
        lora_a, lora_b = draw(rank, k) / math.sqrt(k), draw(n, rank) / math.sqrt(rank)
        return cls(copies, lora_a.requires_grad_(), lora_b.requires_grad_())

    def run(self, name: str, copy: int = 0, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """y, dx, dA and dB of a contender, of the "reference" (computed in `dtype`) or of "frozen" (y and dx)."""
        operands = [*self.copies[copy], self.lora_a, self.lora_b]
        if dtype is not None:
            operands = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in operands]
        x, weight, dy, lora_a, lora_b = operands
        if name == "frozen":
            y = F.linear(x, weight)
            return y, *torch.autograd.grad(y, x, dy)
        backend = CONTENDERS.get(name, name)
        y = cotolora.coto_lora_linear(x, weight, None, lora_a, lora_b, scale=1.0, backend=backend)
        return y, *torch.autograd.grad(y, (x, lora_a, lora_b), dy)


def fit_contenders(problem: Problem, report: Callable[[str], None]) -> list[str]:
    """The contenders that run and err at most twice as much as the reference, with one ulp of slack."""
    exact, reference = problem.run("reference", dtype=torch.float64), problem.run("reference")
    epsilon = torch.finfo(reference[0].dtype).eps
    fit = []
    for name in CONTENDERS:
        try:
            results = problem.run(name)
        except Exception as error:
            report(f"{name} left out: {reason(error)}")
            continue
        for label, ours, theirs, true in zip(("y", "dx", "dA", "dB"), results, reference, exact, strict=True):
            off = (ours.double() - true).abs().max().item()
            allowed = 2 * (theirs.double() - true).abs().max().item() + epsilon * true.abs().max().item()
            if not off <= allowed:  # so put, NaN is wrong too
                report(f"{name} left out: {label} is off by {off:.3g}, allowed is {allowed:.3g}")
                break
        else:
            fit.append(name)
    return fit


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


def capture(problem: Problem, name: str) -> torch.cuda.CUDAGraph:
    """A graph of one call on each copy."""
    graph, stream = torch.cuda.CUDAGraph(), side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    # around the capture too: one that fails leaves its stream the current one
    with torch.cuda.stream(stream):
        for copy in range(len(problem.copies)):
            problem.run(name, copy)
        with torch.cuda.graph(graph, stream=stream):
            for copy in range(len(problem.copies)):
                problem.run(name, copy)
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def time_eager(problem: Problem, name: str) -> float:
    """Seconds of a call by wall clock: of small calls the host is the slower part, which no event sees."""
    cuda = problem.lora_a.is_cuda
    calls = math.ceil(CALLS / len(problem.copies)) * len(problem.copies) if cuda else 1
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for call in range(calls):
        problem.run(name, call % len(problem.copies))
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def time_graph(problem: Problem, graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a call inside a replayed graph."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    replays = max(2, math.ceil(CALLS / len(problem.copies)))
    graph.replay()  # keeps the queue busy, so that the first launch is not waited for
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (replays * len(problem.copies))


def measure(problem: Problem, rounds: int, report: Callable[[str], None]) -> dict[bool, dict[str, float]]:
    """Median seconds of each contender and of "frozen", under False eager and, on a GPU, under True captured."""
    names = ["frozen", *fit_contenders(problem, report)]
    clocks: dict[tuple[bool, str], Callable[[], float]] = {
        (False, name): functools.partial(time_eager, problem, name) for name in names
    }
    for name in names if problem.lora_a.is_cuda else ():
        try:
            clocks[True, name] = functools.partial(time_graph, problem, capture(problem, name))
        except Exception as error:
            report(f"{name} left out of the graphs: {reason(error)}")
    order = list(clocks)
    times: dict[tuple[bool, str], list[float]] = {clock: [] for clock in order}
    for i in range(-1, rounds):  # one round to warm up
        turn = i % len(order)
        for clock in order[turn:] + order[:turn]:
            took = clocks[clock]()
            if i >= 0:
                times[clock].append(took)
    medians: dict[bool, dict[str, float]] = {}
    for (captured, name), values in times.items():
        medians.setdefault(captured, {})[name] = statistics.median(values)
    return medians


COLUMNS = f"{'M x K x N':>18}{'rank':>6}{'mode':>7}{'frozen us':>11}" + "".join(f"{name:>15}" for name in CONTENDERS)
COLUMNS += f"  {'fastest':15}model"


def line(sizes: Sizes, captured: bool, seconds: dict[str, float], device: torch.device) -> str:
    """A row of the printed table: what was measured, over frozen, and what would have run without it."""
    frozen = seconds.get("frozen", math.nan)
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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({**machine, "rows": list(merged.values())}, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink()
        raise


def number(kind: Callable[[str], float]) -> Callable[[str], Any]:
    """An argparse type: a positive finite number."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            what = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a positive {what}; got {text!r}")
        return value

    return parse


def shape(text: str) -> list[tuple[int | None, int, int]]:
    """An argparse type: a model's linears, with M to come from --rows, or one M,K,N."""
    if text in MODELS:
        return [(None, *linear) for linear in MODELS[text]]
    try:
        m, k, n = map(number(int), text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        names = ", ".join(MODELS)
        raise argparse.ArgumentTypeError(f"must be {names} or M,K,N, all positive; got {text!r}") from None
    return [(m, k, n)]


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
    names = ", ".join(MODELS)
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


def machine_of(device: torch.device) -> dict[str, str]:
    """The head of a table: what its rows were measured on and with."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, Triton's interpreter"
    versions = {module.__name__: module.__version__ for module in (torch, triton, cotolora)}
    return {"device": name, **versions}


def tune(options: argparse.Namespace, machine: dict[str, str], progress: tqdm) -> int:
    """Measures and saves one shape and rank after the other; how many rows were written."""
    dtype, begun, written = getattr(torch, options.dtype), time.monotonic(), 0
    for sizes in progress:
        if time.monotonic() - begun > 60 * options.minutes:
            tqdm.write(f"stopped: --minutes {options.minutes:g} are over", file=sys.stderr)
            break
        where = f"{sizes.m}x{sizes.k}x{sizes.n} rank {sizes.rank}"
        report = lambda text, where=where: tqdm.write(f"{where}: {text}", file=sys.stderr)  # noqa: E731
        try:
            medians = measure(Problem.random(sizes, dtype, options.device), options.rounds, report)
        except torch.OutOfMemoryError as error:
            report(f"left out: {reason(error)}")
            continue
        rows = []
        for captured, seconds in medians.items():
            timed = {name: seconds[name] for name in CONTENDERS if name in seconds}
            if timed:
                rows.append({**vars(sizes), "captured": captured, "seconds": timed})
                tqdm.write(line(sizes, captured, seconds, options.device))
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
        machine = machine_of(options.device)
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
