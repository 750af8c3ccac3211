"""Counts the kernel launches, bytes moved and bytes saved of one low-rank linear, forward and backward, without a GPU.

    python -m benchmarks launches [--variant dora] [--rows M] [--in-features K] [--out-features N] [--rank R]
        [--dropout P] [--verbose]

Nothing is timed. Layers run on meta tensors. Every computing operator of torch counts as one kernel, however many the
vendor's library launches. The Triton launches of our launchers are intercepted, as they would be made on an H200. The
bytes of a kernel count each distinct operand once; on a GPU, an operand that does not stay in cache is read more often.
Gradients accumulate into ``.grad`` as in training, which copies a gradient that has unusual strides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs

import cotolora
from benchmarks.aot import intercept
from benchmarks.contenders import COMPARED, Adapter, ours, peft, unsloth_order
from benchmarks.shapes import number
from cotolora.backends import choice as dispatch
from cotolora.backends.fused.common import MAX_RANK
from cotolora.kernels import (
    adapter_grads,
    hira,
    hira_grads,
    low_rank_gemm,
    one_pass,
    one_pass_swapped,
    pre_expand,
    row_norm,
    shrink,
)
from cotolora.results import write_json
from cotolora.variants import VARIANTS

ARCHITECTURE = "sm_90"  # an H200; the launchers' splits and their use of TMA depend on it
LAUNCHERS = (
    adapter_grads, hira, hira_grads, low_rank_gemm, one_pass, one_pass_swapped, pre_expand, row_norm, shrink
)  # fmt: skip
DTYPE = torch.bfloat16
SCALES = {"lora": 2.0, "dora": 2.0, "hira": 1.0}  # PEFT's HiRA has no scale
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
OVERWRITING = ("copy_", "fill_", "zero_")  # in-place operators that do not read the old values


@dataclass(frozen=True)
class Kernel:
    """One launch and the bytes that it reads and writes."""

    name: str
    bytes: int


@dataclass
class Count:
    """The counts of one contender; `x_saved_as` is the dtype of a copy of x among the saved tensors, if any."""

    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    saved_bytes: int = 0
    x_saved_as: str | None = None

    def moved(self) -> int:
        """Bytes moved in forward and backward."""
        return bytes_of(self.forward + self.backward)


def bytes_of(kernels: list[Kernel]) -> int:
    return sum(kernel.bytes for kernel in kernels)


def storage(t: Tensor) -> int:
    """An identifier of a tensor's memory, which also works on the meta device, where every address is 0."""
    return t.untyped_storage()._cdata


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`; memory that views share counts once, expanded dimensions do not count."""
    sizes: dict[int, int] = {}
    for t in tensors:
        if isinstance(t, Tensor):
            seen = min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
            sizes[storage(t)] = max(seen, sizes.get(storage(t), 0))
    return sum(sizes.values())


class Counter(TorchDispatchMode):
    """Appends each kernel to `kernels` and keeps the copies of x in other dtypes in `casts`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.x, self.casts = x, []

    def __torch_dispatch__(
        self, op: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs, name = kwargs or {}, op._schema.name.partition("::")[2]
        if op.namespace == "cotolora":
            return self.launch(op, args)
        out = op(*args, **kwargs)
        if op.is_view or name in ALLOCATIONS:
            return out
        reads = tree_leaves((args, kwargs))
        if name in OVERWRITING or (name in ("addmm", "addmm_") and kwargs.get("beta") == 0):
            reads = reads[1:]
        self.kernels.append(Kernel(name, size(reads) + size(tree_leaves(out))))
        if name == "_to_copy" and storage(args[0]) == storage(self.x):
            self.casts.append(out)
        return out

    def launch(self, op: Any, args: tuple) -> Any:
        """Runs the GPU implementation of one of our operators and counts its launches."""
        made = []
        on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        with self:  # so that operators of torch called by a launcher count as well
            calls = intercept(lambda: made.append(op.redispatch(on_gpu, *args)))
        for kernel, positional, named in calls:
            operands = [getattr(operand, "base", operand) for operand in (*positional, *named.values())]
            self.kernels.append(Kernel(kernel.__name__.removesuffix("_kernel"), size(operands)))
        return made[0]


def native_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Replaces `F.dropout`, which is one kernel on a GPU but three operators on meta tensors."""
    return torch.native_dropout(x, p, training)[0]


def contenders(options: argparse.Namespace) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    """The contenders by name: a layer and its parameters."""
    n, k, r, variant = options.out_features, options.in_features, options.rank, options.variant
    base = nn.Linear(k, n, device="meta", dtype=DTYPE).requires_grad_(False)
    factors = (torch.empty(size, device="meta", dtype=torch.float32) for size in ((r, k), (n, r)))
    magnitude = torch.empty(n, device="meta") if variant == "dora" else None
    adapter = Adapter(*factors, SCALES[variant], options.dropout, variant, magnitude)

    def named(backend: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with cotolora.set_backend(backend):
                return layer(x)

        return run

    rows = {"frozen": (base, base)}
    for name, as_shipped in (("PEFT as shipped", True), ("PEFT, bf16 A and B", False)):
        layer = peft(base, adapter, as_shipped=as_shipped)
        rows[name] = layer, layer
    if variant == "lora" and not options.dropout:  # Unsloth's kernels support neither other variants nor dropout
        layer = unsloth_order(base, adapter)
        rows["Unsloth's order"] = layer, layer
    # the fused forms of DoRA refuse dropout
    forms = () if variant == "dora" and options.dropout else VARIANTS[variant].fused
    for as_shipped, suffix in ((False, ""), (True, ", f32 A and B")):
        for backend in ("addmm", *(f"triton:{form}" for form in forms)):
            layer = ours(base, adapter, as_shipped=as_shipped)
            rows[f"ours {backend}{suffix}"] = named(backend, layer), layer
    layer = ours(base, adapter, gate=False)
    rows["ours off"] = layer, layer
    return {name: (run, list(layer.parameters())) for name, (run, layer) in rows.items()}


def of_an_h200(device: torch.device) -> str:
    """Replaces `architecture`. A `Mock` would take longer than the launches that `python -m benchmarks host` times."""
    return ARCHITECTURE


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside the block, backends, launchers and PEFT's dropout run as if there were a GPU."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "choose", lambda backend, call: dispatch.requested(backend)[0]))
        stack.enter_context(mock.patch.object(dispatch, "plans", {}))
        stack.enter_context(mock.patch.object(F, "dropout", native_dropout))
        for module in LAUNCHERS:
            stack.enter_context(mock.patch.object(module, "architecture", of_an_h200))
        yield


def count(layer: Callable[[Tensor], Tensor], parameters: list[Tensor], options: argparse.Namespace) -> Count:
    """Runs a layer forward and backward once and counts its kernels and saved bytes."""
    x = torch.empty(options.rows, options.in_features, device="meta", dtype=DTYPE, requires_grad=True)
    dy = torch.empty(options.rows, options.out_features, device="meta", dtype=DTYPE)
    free = {storage(t) for t in (x, *parameters)}
    saved: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        if storage(t) not in free:
            saved[storage(t)] = t.untyped_storage()
        return t

    counter = Counter(x)
    with as_on_gpu(), saved_tensors_hooks(pack, lambda t: t), counter:
        y = layer(x)
        forward = len(counter.kernels)
        y.backward(dy)
    for t in parameters:
        t.grad = None
    return Count(
        counter.kernels[:forward],
        counter.kernels[forward:],
        sum(s.nbytes() for s in saved.values()),
        next((str(t.dtype).removeprefix("torch.") for t in counter.casts if storage(t) in saved), None),
    )


COLUMNS = ("launches forward", "launches backward", "MB forward", "MB backward", "MB saved", "MB over frozen's")


def table(counts: dict[str, Count], verbose: bool) -> str:
    """The counts as text; `verbose` lists every kernel under its contender."""
    width = max(map(len, counts))
    lines = [" " * width + "".join(f"{column:>{len(column) + 2}}" for column in COLUMNS)]
    for name, c in counts.items():
        cells: list[str] = [str(len(c.forward)), str(len(c.backward))]
        bytes_ = (bytes_of(c.forward), bytes_of(c.backward), c.saved_bytes, c.moved() - counts["frozen"].moved())
        cells += [f"{size / 1e6:.2f}" for size in bytes_]
        line = "".join(f"{cell:>{len(column) + 2}}" for cell, column in zip(cells, COLUMNS, strict=True))
        lines.append(f"{name:{width}}{line}" + (f"  saves x again in {c.x_saved_as}" if c.x_saved_as else ""))
        for way in ("forward", "backward") if verbose else ():
            lines += [f"    {way:10}{kernel.name:24}{kernel.bytes / 1e6:12.3f} MB" for kernel in getattr(c, way)]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks launches", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=COMPARED, default="lora")
    for name, default in (("rows", 8192), ("in-features", 4096), ("out-features", 4096), ("rank", 16)):
        parser.add_argument(f"--{name}", type=number(int), default=default, help=f"default: {default}")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability in [0, 1)")
    parser.add_argument("--verbose", action="store_true", help="list every kernel with its bytes")
    parser.add_argument("--json", type=Path, help="also write every kernel here")
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: it makes Triton interpret kernels instead of launching them")
    if options.rank > MAX_RANK:
        parser.error(f"--rank must be at most {MAX_RANK}; got {options.rank}")
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout must be in [0, 1); got {options.dropout}")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"argument --json: {options.json.parent} is not a folder")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    options = parse(arguments)
    import peft

    counts = {name: count(*row, options) for name, row in contenders(options).items()}
    modules = " · ".join(f"{module.__name__} {module.__version__}" for module in (torch, triton, peft, cotolora))
    sizes = f"rows {options.rows}, {options.in_features} -> {options.out_features}, rank {options.rank}"
    head = (
        f"{options.variant}, {sizes}, dropout {options.dropout:g}, {str(DTYPE).removeprefix('torch.')} · "
        f"counted for {ARCHITECTURE} · {modules}"
    )
    print(head)
    print(table(counts, options.verbose))
    if options.json:
        write_json(options.json, {"head": head, "counts": {name: asdict(c) for name, c in counts.items()}})
    return 0
