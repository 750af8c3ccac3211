"""A roofline of what a backend launches: how long a layer should take on a GPU.

No form has been timed on a GPU. Each kernel takes as long as its bytes or its products, whichever is more, with the
rates below. A table measured by `python -m benchmarks tune` on a GPU goes before it.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    # of the host, fitted to `python -m benchmarks host` with float32 A and B: a layer's Python and autograd in one
    # forward and in one backward, and a launch, to which 2 µs are added for the driver [assumed]
    forward_host: float = 28e-6
    backward_host: float = 67e-6
    vendor_launch: float = 5e-6
    triton_launch: float = 12e-6


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


def frozen(sizes: Sizes) -> Launches:
    """The base linear alone."""
    return Launches(
        (Launch("linear", sizes.bytes("x", "w", "y"), sizes.products),),
        (Launch("mm", sizes.bytes("dy", "w", "dx"), sizes.products),),
        0,
    )


def seconds(launches: Launches, element_size: int, machine: Machine, *, captured: bool, backward: bool = True) -> float:
    """Modelled time of a forward, with `backward` of both; captured in a CUDA graph, the host costs nothing."""
    device, host = 0.0, machine.forward_host + (machine.backward_host if backward else 0)
    both: Iterable[Launch] = (*launches.forward, *(launches.backward if backward else ()))
    for launch in both:
        efficiency = 1.0 if launch.speed == "vendor" else getattr(machine, launch.speed)
        rate = machine.flops / (1 if element_size == 2 else 2) * efficiency
        device += max(launch.bytes / machine.bandwidth, launch.flops / rate) + machine.gap
        host += machine.vendor_launch if launch.kernel in VENDOR else machine.triton_launch
    return device if captured else max(device, host)
