"""Times the host (CPU) overhead of one low-rank linear in forward and backward, without a GPU.

    python -m benchmarks host [--kinds lora dropout device-gate dora hira] [--backends addmm triton:one_pass …]

Computation takes almost no time here. Triton compiles the kernels for an H200, and its launcher passes them to a stub
driver (`driver_stub.c`, built with the C compiler), which runs nothing. Operators of torch run on the CPU with a few
rows. The fused kernels are not executed, so their layers are large enough to cause the same launches as real ones.
Times are microseconds of one thread's CPU time: the minimum over all rounds, in which the contenders take turns. They
include neither the time of the real driver nor that of torch's allocator and kernel launches on a GPU.
If LoRA, DoRA and HiRA are measured with all backends, the last line fits the host costs of the cost model to them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cotolora
from benchmarks import host_model
from benchmarks.clock import Clock, take_turns
from benchmarks.contenders import Adapted, Adapter, device_gate, ours
from cotolora.backends import autograd
from cotolora.backends.addmm import lora as addmm
from cotolora.results import write_json
from cotolora.variants import VARIANTS

DTYPE, RANK = torch.bfloat16, 16
# rows, columns of x and columns of y for torch's matmuls, whose host overhead does not depend on the size
TINY = (4, 16, 16)
# the same for the fused kernels: large enough that every sum in the backward is split and every matrix fits TMA
LARGE = (512, 256, 256)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"dropout": 0.1},
    "device-gate": {"gate": device_gate(True)},
    "dora": {"variant": "dora"},
    "hira": {"variant": "hira"},
}
BACKENDS = ("addmm", *dict.fromkeys(f"triton:{form}" for kind in ("lora", "hira") for form in VARIANTS[kind].fused))
PEFT = "PEFT's order, bf16 A and B"


@dataclass
class Row:
    """Microseconds of one contender, and the number of Triton launches per call."""

    name: str
    forward: float
    both: float
    of_peft: float
    launches: int


def compiler() -> str | None:
    """The C compiler that Triton would use."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def load_stub(folder: Path) -> ctypes.CDLL:
    """Compiles the stub and loads it as this process's CUDA driver."""
    include = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("driver_stub.c")
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", str(source), "-o", str(library)]
    subprocess.run([compiler(), *options], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def unreadable(gate: Tensor) -> bool:
    """Stands for `readable`: the host cannot read a gate on a GPU without a synchronization."""
    return False


@contextmanager
def on_stub() -> Iterator[ctypes.CDLL]:
    """Inside the block, Triton launches on CPU tensors as on an H200, through the stub driver that is yielded."""
    from triton import knobs
    from triton.runtime.driver import driver

    from benchmarks.launches import as_on_gpu

    with (
        tempfile.TemporaryDirectory() as folder, knobs.nvidia.scope(), knobs.cache.scope(), as_on_gpu(),
        mock.patch.object(autograd, "readable", unreadable),
    ):  # fmt: skip
        stub = load_stub(Path(folder))
        knobs.nvidia.libcuda_path = folder
        knobs.cache.dir += "-host"  # other programs must not load launchers that are linked with the stub
        from triton.backends.nvidia.driver import CudaDriver

        class Stub(CudaDriver):
            def __init__(self) -> None:
                super().__init__()
                self.get_device_capability = lambda device=None: (9, 0)
                self.get_current_stream = lambda device=0: 0
                self.get_current_device = lambda: 0
                self.set_current_device = lambda device: None

        driver.set_active(Stub())
        try:
            yield stub
        finally:
            driver._active = None


def peft_order(dropout: float) -> Callable[..., Tensor]:
    """The operations of PEFT's LoRA, differentiated by autograd: base, down, up, scale, add."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        dropped = F.dropout(x, dropout) if dropout else x
        return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a), b) * scale

    return run


_add_product = addmm.add_product
_TINY_Y, _TINY_A, _TINY_B = (torch.zeros(rows, 16, dtype=DTYPE) for rows in (4, 4, 16))


def product(y: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Replaces `add_product`: computes a tiny product if y is large, because a large one takes too long on a CPU."""
    if y.shape[0] == TINY[0]:
        return _add_product(y, a, b, scale)
    _TINY_Y.addmm_(_TINY_A, _TINY_B, alpha=scale)
    return y


@dataclass
class Contender:
    """A layer with one backend: its forward, and its forward and backward for x and the trainable parameters."""

    layer: nn.Module
    sizes: tuple[int, int, int]
    backend: str | None = None

    def __post_init__(self) -> None:
        rows, k, n = self.sizes
        self.x, self.dy = torch.randn(rows, k).to(DTYPE).requires_grad_(), torch.randn(rows, n).to(DTYPE)
        self.wanted = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def forward(self) -> object:
        """The output."""
        return self.layer(self.x)

    def both(self) -> object:
        """Forward and backward; returns the gradients."""
        return torch.autograd.grad(self.layer(self.x), self.wanted, self.dy, allow_unused=True)

    def clock(self, call: Callable[[], object], count: int) -> Clock:
        """A timer of this thread's CPU time."""

        def run() -> float:
            cotolora.set_backend(self.backend)
            began = time.thread_time()
            for _ in range(count):
                call()
            return (time.thread_time() - began) / count

        return run


def contenders(kind: str, backends: list[str]) -> dict[str, Contender]:
    """The contenders of a kind, by name."""
    options = dict(KINDS[kind])
    gate, variant, dropout = options.get("gate", True), options.get("variant", "lora"), options.get("dropout", 0.0)

    def made(sizes: tuple[int, int, int]) -> tuple[nn.Linear, Adapter]:
        _, k, n = sizes
        magnitude = torch.ones(n) if variant == "dora" else None
        adapter = Adapter(torch.randn(RANK, k), torch.randn(n, RANK), 2.0, dropout, variant, magnitude)
        return nn.Linear(k, n, bias=False, dtype=DTYPE).requires_grad_(False), adapter

    base, adapter = made(TINY)
    peft = Adapter(adapter.lora_a, adapter.lora_b, 2.0)
    found = {
        "frozen": Contender(base, TINY),
        PEFT: Contender(Adapted(base, peft, peft_order(dropout)), TINY),
        "ours off": Contender(ours(base, adapter, gate=False), TINY),
    }
    for as_shipped, suffix in ((False, ", bf16 A and B"), (True, ", f32 A and B")):
        for backend in backends:
            if backend not in VARIANTS[variant].backends or (variant == "dora" and dropout):
                continue
            sizes = TINY if backend == "addmm" else LARGE
            layer = ours(*made(sizes), gate=gate, as_shipped=as_shipped)
            found[f"ours {backend}{suffix}"] = Contender(layer, sizes, backend)
    return found


def measure(kind: str, backends: list[str], stub: ctypes.CDLL, rounds: int, count: int) -> list[Row]:
    """Times all contenders of a kind."""
    found, launches = contenders(kind, backends), ctypes.c_long.in_dll(stub, "launches")
    launched = {}
    for name, contender in found.items():
        contender.clock(contender.both, 2)()  # compiles
        before = launches.value
        contender.clock(contender.both, 1)()
        launched[name] = launches.value - before
    ways = {(name, way): c.clock((c.forward, c.both)[way], count) for name, c in found.items() for way in (0, 1)}
    least = {key: 1e6 * min(seconds) for key, seconds in take_turns(ways, rounds).items()}
    cotolora.set_backend(None)
    return [
        Row(name, least[name, 0], least[name, 1], least[name, 1] / least[PEFT, 1], launched[name]) for name in found
    ]


def table(kind: str, rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{kind:36}{'forward':>9}{'both':>9}{'of PEFT':>9}{'Triton launches':>17}"]
    lines += [f"{r.name:36}{r.forward:9.1f}{r.both:9.1f}{r.of_peft:9.2f}{r.launches:17}" for r in rows]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of layers (default: all)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each contender (default: 9)")
    parser.add_argument("--count", type=int, default=100, help="calls per measurement (default: 100)")
    parser.add_argument("--json", type=Path, help="also write the times here")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.count) < 1:
        parser.error("--rounds and --count must be positive")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"argument --json: {options.json.parent} is not a folder")
    if find_spec("triton") is None or find_spec("triton.backends.nvidia") is None:
        parser.error("needs Triton with its backend for NVIDIA: pip install triton")
    if compiler() is None:
        parser.error("needs a C compiler to build the stub driver: cc, gcc, clang or $CC")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: it makes Triton interpret kernels instead of launching them")
    if torch.cuda.is_available():
        parser.error("needs a machine without a GPU, whose driver it replaces; here use python -m benchmarks linear")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables."""
    options = parse(arguments)
    import triton

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    modules = " · ".join(f"{module.__name__} {module.__version__}" for module in (torch, triton, cotolora))
    print(f"CPU time of one thread in µs, {str(DTYPE).removeprefix('torch.')}, rank {RANK} · {modules}", flush=True)
    found = {}
    try:
        with on_stub() as stub, mock.patch.object(addmm, "add_product", product):
            for kind in options.kinds:
                found[kind] = measure(kind, options.backends, stub, options.rounds, options.count)
                print("\n" + table(kind, found[kind]), flush=True)
        if options.backends == list(BACKENDS) and found.keys() >= host_model.KINDS:
            print("\n" + host_model.line(found))
    finally:
        torch.set_num_threads(threads)
    if options.json:
        write_json(options.json, {kind: [vars(row) for row in rows] for kind, rows in found.items()})
    return 0
