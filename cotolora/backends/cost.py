"""A roofline of what a backend launches: how long a layer should take on a GPU.

No form has been timed on a GPU. Each kernel takes as long as its bytes or its products, whichever is more, with the
rates below. A table measured by `python -m benchmarks tune` on a GPU goes before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotolora.backends.types import Launch, Launches, Sizes


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU: bf16 products in FLOP/s, memory in byte/s. And of its host: seconds."""

    flops: float
    bandwidth: float
    # of the speed of the vendor's GEMM, both assumed: on an H100 0.90 to 0.97 was published for Triton's with TMA, and
    # far less for one that takes pointers
    gemm: float
    pointer_gemm: float = 0.75
    # that draws a mask of x in its main loop: 763 instructions a step where 169 draw none [compiled, sm_90]
    masking_gemm: float = 0.75 * 169 / 763
    gap: float = 1e-6  # between two kernels of a graph
    # of the host, as `python -m benchmarks host` fits them under Triton 3.6 and 3.9, on an EPYC at 2.4 GHz: an operator
    # of torch with what surrounds it, a launch of Triton, to both of which 2 µs are added for the driver [assumed], and
    # what a fused form takes besides in a forward, and again in a backward
    vendor_launch: float = 30e-6
    triton_launch: float = 31e-6
    fused_host: float = 64e-6


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

VENDOR = ("linear", "mm", "addmm", "addmm_", "mul", "mul_", "add_", "addcmul", "cast", "norm", "sub", "sum")


def by_whom(launches: Sequence[Launch]) -> tuple[int, int]:
    """How many of the launches are the vendor's and how many Triton's."""
    vendor = sum(launch.kernel in VENDOR for launch in launches)
    return vendor, len(launches) - vendor


def frozen(sizes: Sizes) -> Launches:
    """The base linear alone."""
    return Launches(
        (Launch("linear", sizes.bytes("x", "w", "y"), sizes.products),),
        (Launch("mm", sizes.bytes("dy", "w", "dx"), sizes.products),),
        0,
    )


def seconds(launches: Launches, element_size: int, machine: Machine, *, captured: bool, backward: bool = True) -> float:
    """Modelled time of a forward, with `backward` of both; captured in a CUDA graph, the host costs nothing."""
    device = host = 0.0
    for launched in (launches.forward, launches.backward) if backward else (launches.forward,):
        for launch in launched:
            efficiency = 1.0 if launch.speed == "vendor" else getattr(machine, launch.speed)
            rate = machine.flops / (1 if element_size == 2 else 2) * efficiency
            device += max(launch.bytes / machine.bandwidth, launch.flops / rate) + machine.gap
        vendor, triton = by_whom(launched)
        host += vendor * machine.vendor_launch + triton * machine.triton_launch + (triton > 0) * machine.fused_host
    return device if captured else max(device, host)
