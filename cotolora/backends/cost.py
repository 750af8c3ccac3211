"""What each form of a gated low-rank layer launches and moves, how long that should take, and which form is fastest.

No form has been timed on a GPU. The times are a roofline: each kernel takes as long as its bytes or its products,
whichever is more, with the rates below. A table measured by `python -m benchmarks tune` on a GPU goes before it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("cotolora")

FORMS = ("one_pass", "low_rank_gemm", "pre_expand")
ADDING = ("expand",)  # in their place where a module that is called makes ``x Wᵀ``
# DoRA scales the columns of what our own GEMMs make, which a vendor's would leave to a pass over y
VARIANT_FORMS = {"lora": FORMS, "dora": ("one_pass", "low_rank_gemm"), "hira": ("hira",)}
CLEAR_WIN = 1.10  # how many times as long the vendor's GEMMs must take before a form that was never timed is taken


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU: bf16 products in FLOP/s, memory in byte/s. And of its host: seconds to launch a kernel."""

    flops: float
    bandwidth: float
    # of the speed of the vendor's GEMM, both assumed: on an H100 0.90 to 0.97 was published for Triton's with TMA, and
    # far less for one that takes pointers
    gemm: float
    pointer_gemm: float = 0.75
    gap: float = 1e-6  # between two kernels of a graph
    vendor_launch: float = 5e-6
    triton_launch: float = 10e-6


MACHINES = {
    # four fifths of the data sheet; our GEMM has no TMA there
    "sm_80": Machine(250e12, 1.6e12, gemm=0.75),
    # both rates measured on an H200, with torch's own matmul and copy
    "sm_90": Machine(790e12, 4.3e12, gemm=0.93),
    # two thirds and nine tenths of the data sheet; our kernel does not use all that tcgen05 offers
    "sm_100": Machine(1500e12, 7.0e12, gemm=0.85),
    # two fifths and three quarters of the data sheet; our GEMM takes plain pointers
    "gfx942": Machine(500e12, 4.0e12, gemm=0.75),
}


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, the bytes that it reads and writes, its products, and whose it is."""

    kernel: str
    bytes: int
    flops: int = 0
    speed: str = "vendor"  # or "gemm" or "pointer_gemm": of `Machine`


@dataclass(frozen=True)
class Sizes:
    """Of ``y [m, n] = x [m, k] Wᵀ`` with `rank`, in elements of `element_size` bytes."""

    m: int
    n: int
    k: int
    rank: int
    element_size: int = 2
    adds: bool = False  # to a y that some base has made: of its weight nothing is known

    def bytes(self, *tensors: str) -> int:
        """Of the tensors named, each as often as it is named: x y w h a b, and p, dx, dy, u, as h, x, y, y."""
        counts = {
            "x": self.m * self.k, "y": self.m * self.n, "w": self.n * self.k,
            "h": self.m * self.rank, "a": self.rank * self.k, "b": self.n * self.rank,
        }  # fmt: skip
        counts |= {"dx": counts["x"], "dy": counts["y"], "u": counts["y"], "p": counts["h"]}
        return self.element_size * sum(counts[name] for name in tensors)


def launches(form: str, sizes: Sizes, variant: str = "lora") -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """The kernels of a form's forward and of its backward, which makes the gradients of x, A, B and the magnitude.

    `form` is one of `VARIANT_FORMS[variant]`, "addmm", "merged" (what addmm does with DoRA where W is small), or
    "frozen": the base linear alone. Of the addmm of a variant, launches that move no more than a row or a factor are
    not listed. Where the low-rank part is added to an output it is one of `ADDING`, or "addmm".
    """
    if sizes.adds:
        return _adding(form, sizes)
    if variant != "lora" and form != "frozen":
        return {"dora": dora_launches, "hira": hira_launches}[variant](form, sizes)
    bytes_of, products = sizes.bytes, 2 * sizes.m * sizes.n * sizes.k
    if form == "frozen":
        return (Launch("linear", bytes_of("x", "w", "y"), products),), (
            Launch("mm", bytes_of("dy", "w", "dx"), products),
        )
    if form == "addmm":
        return (
            (
                Launch("linear", bytes_of("x", "w", "y"), products),
                Launch("addmm", bytes_of("x", "a", "h")),
                Launch("addmm_", bytes_of("h", "b", "y", "y")),
            ),
            (
                Launch("mm", bytes_of("h", "dy", "b")),
                Launch("addmm", bytes_of("b", "dy", "p")),
                Launch("mm", bytes_of("p", "x", "a")),
                Launch("mm", bytes_of("dy", "w", "dx"), products),
                Launch("addmm_", bytes_of("p", "a", "dx", "dx")),
            ),
        )
    gradients = _gradients(sizes)
    dx_fused = Launch("low_rank_gemm", bytes_of("dy", "w", "dx", "p", "a"), products, "gemm")
    if form == "one_pass":
        # each of the tiles of 128 columns of y makes h anew
        ranks = 2 * sizes.m * sizes.k * max(16, sizes.rank) * math.ceil(sizes.n / 128)
        moved = bytes_of("x", "w", "y", "a", "b", "h")
        if sizes.m <= 64:
            partials = Launch("finish", bytes_of("y", "h", "b"))
            return (Launch("stacked", moved, products), partials), (*gradients, dx_fused)
        return (Launch("one_pass", moved, products + ranks, "pointer_gemm"),), (*gradients, dx_fused)
    shrink = Launch("shrink", bytes_of("x", "a", "h"))
    if form == "low_rank_gemm":
        gemm = Launch("low_rank_gemm", bytes_of("x", "w", "y", "h", "b"), products, "gemm")
        return (shrink, gemm), (*gradients, dx_fused)
    return (
        (
            Launch("pre_expand", bytes_of("x", "a", "h", "b", "y")),
            Launch("addmm_", bytes_of("x", "w", "y", "y"), products),
        ),
        (
            *gradients,
            Launch("pre_expand", bytes_of("p", "a", "dx")),
            Launch("addmm_", bytes_of("dy", "w", "dx", "dx"), products),
        ),
    )  # fmt: skip


def _gradients(sizes: Sizes) -> tuple[Launch, ...]:
    """Those of A and B by the fused kernels, with p."""
    return (
        Launch("project", sizes.bytes("dy", "h", "b", "p", "b")),
        Launch("sum_partials", sizes.bytes("p", "p")),
        Launch("gram", sizes.bytes("x", "p", "a")),
        Launch("sum_partials", sizes.bytes("a", "b")),
    )


def _adding(form: str, sizes: Sizes) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    bytes_of = sizes.bytes
    if form == "expand":
        return (
            (Launch("shrink", bytes_of("x", "a", "h")), Launch("pre_expand", bytes_of("h", "b", "y", "y"))),
            (*_gradients(sizes), Launch("pre_expand", bytes_of("p", "a", "dx"))),
        )
    # out of place: torch first copies the y that is added to
    return (
        (Launch("addmm", bytes_of("x", "a", "h")), Launch("addmm", bytes_of("h", "b", "y", "y", "y", "y"))),
        (
            Launch("mm", bytes_of("h", "dy", "b")),
            Launch("addmm", bytes_of("b", "dy", "p")),
            Launch("mm", bytes_of("p", "x", "a")),
            Launch("mm", bytes_of("p", "a", "dx")),
        ),
    )


def dora_launches(form: str, sizes: Sizes) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """As `launches`, which a fused form has with one kernel more, and u besides y."""
    if form == "addmm":
        return _dora_by_vendor(sizes)
    if form == "merged":
        return _dora_merged(sizes)
    bytes_of, ((*before, last), (first, *rest)) = sizes.bytes, launches(form, sizes)
    scaled = Launch(last.kernel, last.bytes + bytes_of("u"), last.flops, last.speed)
    first = Launch(first.kernel, first.bytes + bytes_of("u"))
    return (Launch("row_norm", bytes_of("w", "a", "b")), *before, scaled), (first, *rest)


def _dora_merged(sizes: Sizes) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """Of a small W that is merged with its update, all gradients from dyᵀ x."""
    bytes_of, products = sizes.bytes, 2 * sizes.m * sizes.n * sizes.k
    return (
        (
            Launch("addmm", bytes_of("w", "a", "b", "w")),
            Launch("norm", bytes_of("w")),
            Launch("mul", bytes_of("w", "w")),
            Launch("linear", bytes_of("x", "w", "y"), products),
        ),
        (
            Launch("mm", bytes_of("dy", "x", "w"), products),
            Launch("mul", bytes_of("w", "w", "w")),
            Launch("sum", bytes_of("w")),
            Launch("mul", bytes_of("w", "w")),
            Launch("addmm", bytes_of("w", "b", "a")),
            Launch("addmm", bytes_of("w", "a", "b")),
            Launch("mul", bytes_of("w", "w")),
            Launch("mm", bytes_of("dy", "w", "dx"), products),
        ),
    )


def _dora_by_vendor(sizes: Sizes) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    bytes_of, products = sizes.bytes, 2 * sizes.m * sizes.n * sizes.k

    def wide(name: str) -> list[str]:
        return [name] * (4 // sizes.element_size)  # moves as many bytes as a float32 entry

    def cast(name: str) -> list[Launch]:
        return [Launch("cast", bytes_of(name, *wide(name)))] if sizes.element_size < 4 else []

    # c goes onto the smaller operand, and the update there too if it may
    smaller = "dy" if sizes.m <= sizes.k else "w"
    merged = sizes.m > max(sizes.n, sizes.k) and sizes.element_size >= 4
    return (
        (
            *cast("w"),
            # by blocks, which a cache may hold from one launch to the next
            Launch("addmm", bytes_of(*wide("w"), *wide("w"))),
            Launch("norm", bytes_of(*wide("w"))),
            Launch("linear", bytes_of("x", "w", "y"), products),
            Launch("addmm", bytes_of("x", "a", "h")),
            Launch("addcmul", bytes_of("y", *wide("y"))),
            Launch("addmm_", bytes_of("h", "b", *wide("y"), *wide("y"))),
            *cast("y"),
        ),
        (
            Launch("mm", bytes_of("h", "dy", "b")),
            *cast("u"),
            Launch("sub", bytes_of(*wide("u"), *wide("u"))),
            Launch("mul_", bytes_of("dy", *wide("u"), *wide("u"))),
            Launch("sum", bytes_of(*wide("u"))),
            Launch("addmm", bytes_of("b", "dy", "p")),
            Launch("mm", bytes_of("p", "x", "a")),
            Launch("mul", bytes_of(smaller, *wide(smaller))),
            *cast(smaller),
            Launch("addmm_", bytes_of("a", "b", "w", "w") if merged else bytes_of("p", "a", "dx", "dx")),
            Launch("mm", bytes_of("dy", "w", "dx"), products),
        ),
    )


def hira_launches(form: str, sizes: Sizes) -> tuple[tuple[Launch, ...], tuple[Launch, ...]]:
    """As `launches`; the fused form makes ``B A`` anew for each 128 rows of x, and of dy."""
    bytes_of, products = sizes.bytes, 2 * sizes.m * sizes.n * sizes.k
    ranks = 2 * sizes.n * sizes.k * max(16, sizes.rank)
    if form != "addmm":
        again = math.ceil(sizes.m / 128) * ranks
        parts = 4 * sizes.rank * (math.ceil(sizes.n / 128) * sizes.k + math.ceil(sizes.k / 128) * sizes.n)
        moved = bytes_of("x", "w", "y", "a", "b")
        return (Launch("hira", moved, 2 * products + again, "pointer_gemm"),), (
            Launch("hira_grads", moved + parts, products + 2 * ranks, "pointer_gemm"),
            Launch("sum_partials", parts + bytes_of("a", "b")),
            Launch("hira", moved, 2 * products + again, "pointer_gemm"),
        )
    update = (Launch("addmm", bytes_of("a", "b", "w"), ranks), Launch("mul_", bytes_of("w", "w", "w")))
    return (
        (
            Launch("linear", bytes_of("x", "w", "y"), products),
            *update,
            Launch("addmm_", bytes_of("x", "w", "y", "y"), products),
        ),
        (
            Launch("mm", bytes_of("dy", "x", "w"), products),
            Launch("mul_", bytes_of("w", "w", "w")),
            Launch("addmm", bytes_of("w", "a", "b"), ranks),
            Launch("addmm", bytes_of("w", "b", "a"), ranks),
            *update,
            Launch("mm", bytes_of("dy", "w", "dx"), products),
            Launch("mm", bytes_of("dy", "w", "dx"), products),
            Launch("add_", bytes_of("dx", "dx", "dx")),
        ),
    )  # fmt: skip


VENDOR = ("linear", "mm", "addmm", "addmm_", "mul", "mul_", "add_", "addcmul", "cast", "norm", "sub", "sum")


def seconds(
    form: str, sizes: Sizes, machine: Machine, *, captured: bool, backward: bool = True, variant: str = "lora"
) -> float:
    """Modelled time of a form's forward, with `backward` of both; captured in a CUDA graph, the host costs nothing."""
    forward, gradients = launches(form, sizes, variant)
    device = host = 0.0
    for launch in (*forward, *(gradients if backward else ())):
        efficiency = 1.0 if launch.speed == "vendor" else getattr(machine, launch.speed)
        rate = machine.flops / (1 if sizes.element_size == 2 else 2) * efficiency
        device += max(launch.bytes / machine.bandwidth, launch.flops / rate) + machine.gap
        host += machine.vendor_launch if launch.kernel in VENDOR else machine.triton_launch
    return device if captured else max(device, host)


@dataclass(frozen=True)
class Choice:
    """A form or "addmm", and why."""

    form: str
    reason: str


def choose_form(
    sizes: Sizes, arch: str, *, captured: bool, backward: bool = True, table: tuple[dict[str, Any], ...] = (),
    variant: str = "lora",
) -> Choice:  # fmt: skip
    """The fastest of a variant's forms and "addmm": by the measured row nearest to the sizes, else by the model.

    Where the low-rank part is added to an output, which no row measures, of `ADDING` and "addmm" by the model.
    """
    fused = ADDING if sizes.adds else VARIANT_FORMS[variant]
    if sizes.adds:
        table = ()
    if row := nearest(table, sizes, captured):
        form = min(row["seconds"], key=row["seconds"].get)
        at = "x".join(str(row[name]) for name in ("m", "n", "k"))
        return Choice(form, f"measured fastest on this device at {at}, rank {row['rank']}")
    if arch not in MACHINES:
        return Choice("addmm", f"no fused kernel has been measured on {arch}, and there is no model of it")
    options: dict[str, Any] = {"captured": captured, "backward": backward, "variant": variant}
    times = {form: seconds(form, sizes, MACHINES[arch], **options) for form in ("addmm", *fused)}
    form = min(fused, key=lambda name: times[name])
    ratio = times["addmm"] / times[form]
    if ratio >= CLEAR_WIN:
        return Choice(form, f"modelled, not measured: vendor GEMMs take {ratio:.2f} of its time on {arch}")
    return Choice(
        "addmm", f"modelled, not measured: the fused {form} would be only {ratio:.2f} times as fast on {arch}"
    )


MEASURED_FOR = ("m", "n", "k", "rank")


def nearest(table: tuple[dict[str, Any], ...], sizes: Sizes, captured: bool) -> dict[str, Any] | None:
    """The row measured nearest to the sizes, in the logarithm; None if every row is more than 2 times off somewhere."""

    def distances(row: dict[str, Any]) -> list[float]:
        return [abs(math.log2(max(row[name], 1) / max(getattr(sizes, name), 1))) for name in MEASURED_FOR]

    near = [
        row
        for row in table
        if row["captured"] == captured and row["element_size"] == sizes.element_size and max(distances(row)) <= 1
    ]
    return min(near, key=lambda row: sum(distances(row)), default=None)


def cache_path(device_name: str) -> Path:
    """Where the measured table of a device is kept: under ``XDG_CACHE_HOME``, or ``~/.cache``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "cotolora" / ("".join(c if c.isalnum() else "_" for c in device_name) + ".json")


def load_table(path: Path) -> tuple[dict[str, Any], ...]:
    """The rows of a measured table; none, with one line in the log saying why, if the file is damaged."""
    if not path.exists():
        return ()
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            numbers = [row[name] for name in (*MEASURED_FOR, "element_size")] + list(row["seconds"].values())
            if not all(isinstance(n, (int, float)) and math.isfinite(n) and n >= 0 for n in numbers):
                raise ValueError(f"a row holds something that is no size or time: {row}")
            if not isinstance(row["captured"], bool) or not row["seconds"] or set(row["seconds"]) - {"addmm", *FORMS}:
                raise ValueError(f"a row measures something unknown: {row}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("ignoring the measured table %s: %s: %s", path, type(error).__name__, error)
        return ()
    return tuple(rows)
