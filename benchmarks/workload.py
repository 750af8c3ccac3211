"""The linears of a block on random data, run by one contender after the other, each held to the truth before a clock.

Operands lie in as many copies as fill a GPU's cache three times, which calls take in turn: in a model, other layers'
weights pass through the cache between two calls of one. On a CPU, where a virtual machine does not tell what its cache
holds, there are two copies, and what stays in the cache stays there for everyone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import Adapter, Contender
from benchmarks.shapes import Linear, inputs, outputs
from cotolora import reference

MAX_COPIES = 64
UPDATE = 0.1  # norm of the low-rank update, over that of the base's output
SCALE = 2.0  # alpha = 2 rank, as most recipes have it
SLACK = 4.0  # times the reference's own error that a contender may err; a wrong one errs by tenths


class RefusedError(Exception):
    """A contender that cannot run or computes something else; the text says why."""


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RefusedError) else f"{type(error).__name__}: {text[:300]}"


@dataclass(frozen=True)
class Copy:
    """Operands of every linear of a block; those that read the same input share it. `dys` are of its outputs."""

    inputs: dict[str, Tensor]
    bases: list[nn.Linear]
    adapters: list[Adapter]
    dys: list[Tensor]


class Workload:
    """`linears` on `rows` rows: y of each from its input, then gradients of inputs, A and B from random dy.

    The factors are rounded to `dtype` before anyone takes them, so that float32 A and B and those in `dtype` are equal
    and there is one truth.
    """

    def __init__(
        self, linears: Sequence[Linear], rows: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.linears, self.rows, self.rank, self.dtype, self.device = tuple(linears), rows, rank, dtype, device
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)

        def adapter(linear: Linear) -> Adapter:
            a = draw(rank, linear.in_features) / math.sqrt(linear.in_features)
            b = draw(linear.out_features, rank) * (UPDATE / SCALE / math.sqrt(rank))
            return Adapter(a.to(dtype).float(), b.to(dtype).float(), SCALE)

        def base(linear: Linear) -> nn.Linear:
            layer = nn.Linear(linear.in_features, linear.out_features, linear.bias, device="meta", dtype=dtype)
            weight = draw(linear.out_features, linear.in_features) / math.sqrt(linear.in_features)
            layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            if linear.bias:
                layer.bias = nn.Parameter(draw(linear.out_features).to(dtype) / 10, requires_grad=False)
            return layer

        def copy() -> Copy:
            xs = {name: draw(rows, n).to(dtype).requires_grad_() for name, n in inputs(self.linears).items()}
            dys = [draw(rows, self.linears[i].out_features).to(dtype) for i in outputs(self.linears)]
            return Copy(xs, [base(linear) for linear in self.linears], [adapter(x) for x in self.linears], dys)

        l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.copies = [copy() for _ in range(min(MAX_COPIES, max(2, math.ceil(3 * l2 / self.bytes()))))]

    def bytes(self) -> int:
        """Of one copy, but for the adapters."""
        weights = sum(x.in_features * x.out_features for x in self.linears)
        rows = self.rows * (sum(inputs(self.linears).values()) + sum(x.out_features for x in self.linears))
        return self.dtype.itemsize * (weights + rows)

    def runner(self, contender: Contender) -> Runner:
        """The contender's layers around every copy; RefusedError if they cannot be made."""
        try:
            layers = [
                [contender.build(base, adapter) for base, adapter in zip(copy.bases, copy.adapters, strict=True)]
                for copy in self.copies
            ]
        except Exception as error:
            raise RefusedError(reason(error)) from error
        return Runner(self, contender, layers)


@dataclass(frozen=True)
class Runner:
    """A contender on a workload."""

    workload: Workload
    contender: Contender
    layers: list[list[nn.Module]]

    def forward(self, copy: int = 0) -> list[Tensor]:
        """Every linear's y, with what autograd needs for the backward."""
        with self.contender.context():
            return chained(self.workload.linears, self.workload.copies[copy].inputs, self.layers[copy])

    def both(self, copy: int = 0) -> None:
        """Forward, and backward into ``.grad``, as training has it; then the gradients go."""
        ys = self.forward(copy)
        torch.autograd.backward([ys[i] for i in outputs(self.workload.linears)], self.workload.copies[copy].dys)
        self.forget(copy)

    def forget(self, copy: int) -> None:
        """Drops the gradients."""
        for t in self.workload.copies[copy].inputs.values():
            t.grad = None
        for layer in self.layers[copy]:
            for parameter in layer.parameters():
                parameter.grad = None

    def calls(self, part: str) -> list[Callable[[], object]]:
        """One call for each copy, of "forward" or "both"."""
        run = getattr(self, part)
        return [functools.partial(run, copy) for copy in range(len(self.layers))]

    def results(self) -> dict[str, list[Tensor]]:
        """y, dx and, of an adapter that is on, dA and dB, of the first copy's linears or inputs."""
        try:
            ys = self.forward()
            torch.autograd.backward([ys[i] for i in outputs(self.workload.linears)], self.workload.copies[0].dys)
            found = {"y": [y.detach() for y in ys], "dx": [t.grad for t in self.workload.copies[0].inputs.values()]}
            if self.contender.adapter:
                factors = [[p for p in layer.parameters() if p.requires_grad] for layer in self.layers[0]]
                if any(len(both) != 2 for both in factors):
                    raise RefusedError(f"trains {len(factors[0])} tensors, must be A and B")
                found |= {name: [both[i].grad for both in factors] for i, name in enumerate(("dA", "dB"))}
            return found
        finally:
            self.forget(0)  # or the next contender's gradients would be added to


def chained(
    linears: Sequence[Linear], inputs: dict[str, Tensor], layers: Sequence[Callable[[Tensor], Tensor]]
) -> list[Tensor]:
    """Every linear's y, from an input or an earlier y."""
    known, ys = dict(inputs), []
    for linear, layer in zip(linears, layers, strict=True):
        known[linear.name] = layer(known[linear.reads])
        ys.append(known[linear.name])
    return ys


def truth(workload: Workload, dtype: torch.dtype, *, adapter: bool) -> dict[str, list[Tensor]]:
    """What is right on the first copy, by the reference in `dtype`."""
    copy = workload.copies[0]
    leaf = lambda t: t.detach().to(dtype).requires_grad_()  # noqa: E731
    xs = {name: leaf(t) for name, t in copy.inputs.items()}
    factors = [(leaf(a.lora_a), leaf(a.lora_b)) for a in copy.adapters]

    def layer(base: nn.Linear, a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
        weight, bias = base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype)
        if not adapter:
            return lambda x: F.linear(x, weight, bias)
        return lambda x: reference.lora_linear(x, weight, bias, a, b, scale=SCALE)

    ys = chained(workload.linears, xs, [layer(base, a, b) for base, (a, b) in zip(copy.bases, factors, strict=True)])
    torch.autograd.backward([ys[i] for i in outputs(workload.linears)], [dy.to(dtype) for dy in copy.dys])
    found = {"y": [y.detach() for y in ys], "dx": [t.grad for t in xs.values()]}
    return found | ({"dA": [a.grad for a, _ in factors], "dB": [b.grad for _, b in factors]} if adapter else {})


def error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Relative error in the Frobenius norm, over all linears."""
    off = sum((f.double() - t.double()).square().sum().item() for f, t in zip(found, true, strict=True))
    norm = sum(t.double().square().sum().item() for t in true)
    return math.sqrt(off / norm)


class Judge:
    """Holds contenders to the reference in float64, within `SLACK` times what it errs in the workload's own dtype."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.exact: dict[bool, dict[str, list[Tensor]]] = {}
        self.own: dict[bool, dict[str, float]] = {}
        for adapter in (True, False):
            exact = truth(workload, torch.float64, adapter=adapter)
            plain = truth(workload, workload.dtype, adapter=adapter)
            self.exact[adapter], self.own[adapter] = exact, {n: error(plain[n], exact[n]) for n in exact}

    def check(self, runner: Runner) -> float:
        """The error of y over that of `F.linear`'s own y; RefusedError if anything is wrong or does not run."""
        try:
            found = runner.results()
        except Exception as failure:
            raise RefusedError(reason(failure)) from failure
        adapter = runner.contender.adapter
        errors = {}
        for name, exact in self.exact[adapter].items():
            if any(t is None for t in found[name]):
                raise RefusedError(f"gives no {name}")
            errors[name] = error(found[name], exact)
            allowed = SLACK * self.own[adapter][name] + torch.finfo(self.workload.dtype).eps
            if not errors[name] <= allowed:  # so put, NaN is wrong too
                raise RefusedError(f"{name} is off by {errors[name]:.3g} of its norm, allowed is {allowed:.3g}")
        return errors["y"] / self.own[False]["y"]
