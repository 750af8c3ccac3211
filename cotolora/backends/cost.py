"""A roofline model of the time that a backend takes on a GPU, from the kernels that it launches.

No form of the fused kernels has been timed on a GPU. The modelled time of a kernel is that of its memory traffic or of
its products, whichever is longer, at the rates below. A table measured with `python -m benchmarks tune` takes
precedence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotolora.backends.types import Launch, Launches, Sizes


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU (bf16 products in FLOP/s, memory in byte/s), and times of its host in seconds."""

    flops: float
    bandwidth: float
    # speed relative to the vendor's GEMM, both assumed: on an H100 0.90 to 0.97 was published for a Triton GEMM with
    # TMA, and far less for one with pointers
    gemm: float
    pointer_gemm: float = 0.75
    # a GEMM that draws a mask of x in its main loop: 763 instructions per step instead of 169 [compiled, sm_90]
    masking_gemm: float = 0.75 * 169 / 763
    gap: float = 1e-6  # between two kernels of a graph
    # host times, fitted by `python -m benchmarks host` under Triton 3.6 and 3.9, on an EPYC at 2.4 GHz: a torch
    # operator with its surrounding Python, a Triton launch (both including 2 µs for the driver [assumed]), and the
    # additional time of a fused form in a forward, and again in a backward
    vendor_launch: float = 30e-6
    triton_launch: float = 31e-6
    fused_host: float = 64e-6


MACHINES = {
    # 4/5 of the data sheet; our GEMM has no TMA there
    "sm_80": Machine(250e12, 1.6e12, gemm=0.75),
    # both rates measured on an H200, with torch's own matmul and copy
    "sm_90": Machine(790e12, 4.3e12, gemm=0.93),
    # 2/3 and 9/10 of the data sheet; our kernel does not use all features of tcgen05
    "sm_100": Machine(1500e12, 7.0e12, gemm=0.85),
    # 2/5 and 3/4 of the data sheet; our GEMM uses plain pointers
    "gfx942": Machine(500e12, 4.0e12, gemm=0.75),
}

VENDOR = ("linear", "mm", "addmm", "addmm_", "mul", "mul_", "add_", "addcmul", "cast", "norm", "sub", "sum")


def by_whom(launches: Sequence[Launch]) -> tuple[int, int]:
    """The number of launches of vendor kernels, and of Triton kernels."""
    vendor = sum(launch.kernel in VENDOR for launch in launches)
    return vendor, len(launches) - vendor


def frozen(sizes: Sizes) -> Launches:
    """The launches of the base linear alone."""
    return Launches(
        (Launch("linear", sizes.bytes("x", "w", "y"), sizes.products),),
        (Launch("mm", sizes.bytes("dy", "w", "dx"), sizes.products),),
        0,
    )


def seconds(launches: Launches, element_size: int, machine: Machine, *, captured: bool, backward: bool = True) -> float:
    """Modelled seconds of a forward, or of forward and `backward`; if `captured` in a CUDA graph, without host time."""
    device = host = 0.0
    for launched in (launches.forward, launches.backward) if backward else (launches.forward,):
        for launch in launched:
            efficiency = 1.0 if launch.speed == "vendor" else getattr(machine, launch.speed)
            rate = machine.flops / (1 if element_size == 2 else 2) * efficiency
            device += max(launch.bytes / machine.bandwidth, launch.flops / rate) + machine.gap
        vendor, triton = by_whom(launched)
        host += vendor * machine.vendor_launch + triton * machine.triton_launch + (triton > 0) * machine.fused_host
    return device if captured else max(device, host)
