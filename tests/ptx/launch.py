"""Compiles the kernels of Triton launches for a GPU that need not be present, and emulates them."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.ptx.hopper import TMA_SPAN, Hopper, TensorMap
from tests.ptx.machine import Arena, Machine, Program
from tests.ptx.translate import PARAMETER_BASE, parse

PACK = {"u64": "<q", "u32": "<i", "f32": "<f", "f64": "<d", "u16": "<h", "u8": "<b", "b64": "<q", "b32": "<i"}
MOST_THREADS = 4096  # emulated at the same time


def compile_launch(gpu: GPUTarget, kernel: JITFunction, args: tuple, kwargs: dict):
    """The compiled kernel and its remaining positional arguments, without constants."""
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = compile_kernel(source, target=gpu, options=options.__dict__)
    left = [value for name, value in bound.items() if signature[name] != "constexpr"]
    return compiled, left


@contextmanager
def launches(run: Callable, capability: int) -> Iterator[None]:
    """Inside the block, every Triton launch calls `run(compiled, grid, args)`."""
    gpu = GPUTarget("cuda", capability, 32)

    def intercepted(kernel, *args, grid, warmup, **kwargs):
        # without ptxas, so the cache must not be shared with other programs
        with mock.patch.object(CUDABackend, "make_cubin", return_value=b"left out"), knobs.cache.scope():
            knobs.cache.dir += "-ptx"
            compiled, left = compile_launch(gpu, kernel, args, kwargs)
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, args, strict=False)) | kwargs)
        return run(compiled, (*grid, 1, 1)[:3], left)

    with mock.patch.object(JITFunction, "run", intercepted):
        yield


class Emulator:
    """Runs the launches that `launches` intercepts; `errors` collects faults that the results do not show.

    `staggered`: see `Machine`. `change`: a function applied to the PTX before it runs.
    """

    def __init__(self, staggered: bool = False, change: Callable[[str], str] = str) -> None:
        self.staggered, self.change = staggered, change
        self.programs: dict[str, Program] = {}
        self.errors: list[str] = []

    def __call__(self, compiled, grid, args) -> None:
        text, metadata = self.change(compiled.asm["ptx"]), compiled.metadata
        if text not in self.programs:
            self.programs[text] = Program(parse(text))
        program = self.programs[text]
        kernel = program.kernel
        arena = Arena(
            [a.base if isinstance(a, TensorDescriptor) else a for a in args if not isinstance(a, int | float)]
        )
        values, maps = [], {}
        described = iter(getattr(metadata, "tensordesc_meta", None) or ())
        for a in args:
            if isinstance(a, TensorDescriptor):
                meta = next(described)
                maps[PARAMETER_BASE + 256 * len(values)] = TensorMap(
                    arena.address(a.base),
                    a.shape,
                    a.strides,
                    meta["elem_size"],
                    meta["block_size"],
                    TMA_SPAN[meta["swizzle"]],
                )
                values += [b"", *a.shape, *a.strides]
            else:
                values.append(arena.address(a) if isinstance(a, torch.Tensor) else a)
        values += [0] * (len(kernel.params) - len(values))  # unused scratch memory
        parameters = {
            name: packed(kind, value)
            for (name, kind, _), value in zip(kernel.params, values, strict=True)
            if not isinstance(value, bytes)
        }
        threads = metadata.num_warps * 32
        shared = max(metadata.shared, kernel.static_shared)
        blocks = np.array(list(itertools.product(*(range(n) for n in reversed(grid)))), int).reshape(-1, 3)[:, ::-1]
        at_once = max(1, MOST_THREADS // threads)
        kind = Hopper if "sm_90" in text else Machine
        for first in range(0, len(blocks), at_once):
            some = blocks[first : first + at_once]
            machine = kind(program, arena, parameters, grid, some, threads, shared, self.errors)
            machine.tensor_maps, machine.staggered = maps, self.staggered
            machine.run()
        arena.write_back()


def packed(kind: str, value: float) -> bytes:
    """The bytes of a parameter; integers wrap around."""
    if PACK[kind] in ("<q", "<i") and isinstance(value, int):
        bits = 64 if kind.endswith("64") else 32
        value = (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    return struct.pack(PACK[kind], value)
