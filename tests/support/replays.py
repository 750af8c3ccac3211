"""Compares the arguments that Triton's launcher receives from replayed launches and from JIT, with a stub driver.

It runs as a program of its own, because its kernels must not be interpreted. Prints the number of launches compared.
"""

import itertools

import torch
from triton.backends.nvidia.driver import CudaLauncher
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.host import on_stub
from cotolora.backends.fused import ops
from cotolora.backends.fused.common import repeatable
from cotolora.backends.types import NotPreparedError

SCALE = 0.5


def tensors(dtype, aligned, gate, seed):
    m, n, k, r = (600, 256, 288, 16) if aligned else (70, 37, 33, 5)
    gates = {"none": None, "device": torch.ones(3, dtype=torch.int32)[1], "rows": torch.ones(m // 10, dtype=torch.bool)}
    sizes = {"x": (m, k), "weight": (n, k), "bias": (n,), "a": (r, k), "b": (n, r), "h": (m, r), "dy": (m, n)}
    made = {name: torch.zeros(size, dtype=dtype) for name, size in sizes.items()}
    floats = {name: torch.ones(n) for name in ("scaling", "norm")}
    return {**made, **floats, "gate": gates[gate], "seed": torch.tensor(3) if seed else None}


def calls(t, dropout):
    """Yields (operator, arguments) for every operator."""
    x, weight, bias, a, b, h, dy = (t[name] for name in ("x", "weight", "bias", "a", "b", "h", "dy"))
    gate, seed, floats = t["gate"], t["seed"], (torch.float32, torch.float32)
    yield "one_pass", (x, weight, bias, a, b, gate, seed, SCALE, dropout)
    few = gate if gate is None or gate.dim() == 0 else gate[:6]
    yield "one_pass", (x[:48], weight, bias, a, b, few, seed, SCALE, dropout)
    yield "pre_expand", (x, bias, a, b, gate, seed, SCALE, dropout)
    yield "shrink", (x, a, gate, seed, SCALE, dropout)
    yield "low_rank_gemm", (x, weight, bias, h, b, gate, seed, dropout)
    yield "low_rank_gemm", (dy, weight.T, None, h, a.T, gate, seed, dropout)
    yield "expand", (h, a, None, gate, seed, dropout)
    yield "adapter_grads", (dy, x, h, b, gate, seed, SCALE, dropout, *floats)
    yield "adapter_grads", (dy, None, h, b, gate, seed, SCALE, dropout, *floats)
    yield "gram", (x, h, gate, torch.float32)
    yield "hira", (x, weight, bias, a, b, gate, seed, SCALE, dropout, True)
    yield "hira_grads", (dy, x, weight, a, b, gate, seed, SCALE, dropout, *floats)
    if seed is None:
        scaling, norm, u = t["scaling"], t["norm"], torch.zeros_like(dy)
        yield "row_norm", (weight, a, b, SCALE, None, bias, gate)
        yield "one_pass", (x, weight, bias, a, b, gate, None, SCALE, 0.0, scaling, True)
        yield "low_rank_gemm", (x, weight, bias, h, b, gate, None, 0.0, None, scaling, True)
        yield "adapter_grads", (dy, x, h, b, gate, None, SCALE, 0.0, *floats, scaling, norm, u, torch.float32)


def named(value, names):
    """An argument of a launch; an address becomes the name of its tensor, or "temporary" if no named tensor has it."""
    if isinstance(value, TensorDescriptor):
        return [named(value.base, names), list(value.shape), list(value.strides), value.block_shape, value.padding]
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    return names.get(value, "temporary" if isinstance(value, int) and value > 2**32 else value)


def launched(seen, function, args):
    """The arguments that one call passes to Triton's launcher, with names in place of addresses."""
    seen.clear()
    results = function(False, *args)
    results = [results] if isinstance(results, torch.Tensor) else results
    names = {t.data_ptr(): f"input {i}" for i, t in enumerate(args) if isinstance(t, torch.Tensor)}
    names |= {t.data_ptr(): f"output {i}" for i, t in enumerate(results) if t is not None and t.numel()}
    # the grid, the function and the packed arguments, without the stream and the arguments for hooks
    found = [[*a[:3], *a[4:6], *(named(value, names) for value in a[9:])] for a in seen]
    return found, [(t.shape, t.stride(), t.dtype) for t in results if t is not None]


def main():
    """Raises AssertionError if the two differ."""
    seen, call, compared = [], CudaLauncher.__call__, 0
    CudaLauncher.__call__ = lambda self, *args: seen.append(args) or call(self, *args)
    with on_stub():
        operators = {
            name: repeatable(lambda found, *args, name=name: getattr(found, name)(*args)) for name in ops.SCHEMAS
        }
        kinds = itertools.product((torch.bfloat16, torch.float32), (True, False), ("none", "device", "rows"), (0, 0.5))
        for dtype, aligned, gate, dropout in kinds:
            for name, args in calls(tensors(dtype, aligned, gate, bool(dropout)), dropout):
                by_jit = launched(seen, operators[name], args)
                again = launched(seen, operators[name], args)
                assert again == by_jit, f"{name} {dtype} {gate}:\n{by_jit}\n{again}"
                compared += len(by_jit[0])
        x, a = torch.zeros(40, 32), torch.zeros(4, 32)
        shrink = operators["shrink"]
        shrink(False, x, a, None, None, SCALE, 0.0)
        shrink(True, x, a, None, None, SCALE, 0.0)
        try:
            shrink(True, x[1:], a, None, None, SCALE, 0.0)
            raise AssertionError("a kind that was never launched must not count as prepared")
        except NotPreparedError:
            pass
        kept = [replay is not None for replays in ops._REPLAYS.values() for replay in replays.values()]
        print(compared, "launches,", sum(kept), "of", len(kept), "kinds launched again")


if __name__ == "__main__":
    main()
