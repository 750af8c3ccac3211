"""The linears of a block with random data, how each contender runs them, and the check of its results.

The operands exist in several copies, enough to fill the largest cache three times (at most `MAX_COPIES`). Every call,
of any contender, uses the next copy. This imitates a model, where other layers' weights pass through the cache between
two calls of the same layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import Adapter, Contender
from benchmarks.shapes import Linear, inputs, outputs
from cotolora.variants import VARIANTS

MAX_COPIES = 64  # the smallest shapes stay in a CPU's cache even so, as would a model of 64 such layers
UNKNOWN_CACHE = 32 << 20  # bytes, assumed if neither the driver nor the system reports the cache size
CACHES, UNITS = Path("/sys/devices/system/cpu/cpu0/cache"), {"K": 10, "M": 20, "G": 30}
UPDATE = 0.1  # norm of the low-rank update relative to that of the base's output
SCALE = 2.0  # alpha = 2 rank, as in most recipes
FACTORS = {"base": (), "lora": ("A", "B"), "dora": ("A", "B", "m"), "hira": ("A", "B")}
SLACK = 4.0  # a contender may have this multiple of the reference's own error; wrong results are off by 10 % or more


class RefusedError(Exception):
    """A contender cannot run or computes wrong results; the message says why."""


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RefusedError) else f"{type(error).__name__}: {text[:300]}"


def cache_bytes(device: torch.device) -> int:
    """Bytes of the largest cache: a GPU's L2, or the largest cache that Linux lists for the first core."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    named = (path.read_text().strip() for path in CACHES.glob("index*/size"))
    sizes = [int(text[:-1]) << UNITS[text[-1]] for text in named if text[:-1].isdecimal() and text[-1] in UNITS]
    return max(sizes, default=UNKNOWN_CACHE)


@dataclass(frozen=True)
class Copy:
    """Operands of every linear of a block. Linears with the same input share it; `dys` are gradients of the outputs."""

    inputs: dict[str, Tensor]
    bases: list[nn.Linear]
    adapters: list[Adapter]
    dys: list[Tensor]


class Workload:
    """Computes the output of each of `linears` on `rows` rows, then gradients of inputs, A and B from random dy.

    The factors are rounded to `dtype` first, so that A and B have equal values in float32 and in `dtype`, and one set
    of exact results serves both. HiRA's scale is 1, the only one that PEFT supports.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        rows: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        variant: str = "lora",
    ) -> None:
        self.linears, self.rows, self.rank, self.dtype, self.device = tuple(linears), rows, rank, dtype, device
        self.variant, self.scale = variant, 1.0 if variant == "hira" else SCALE
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)

        def adapter(linear: Linear, base: nn.Linear) -> Adapter:
            # HiRA's update is W ∘ (BA): entries of BA must be of size UPDATE, not of size UPDATE times those of W
            size = 1 if variant == "hira" else math.sqrt(linear.in_features)
            a = draw(rank, linear.in_features) / size
            b = draw(linear.out_features, rank) * (UPDATE / self.scale / math.sqrt(rank))
            m = base.weight.norm(dim=1, dtype=torch.float32) * (1 + UPDATE * draw(linear.out_features))
            return Adapter(
                a.to(dtype).float(), b.to(dtype).float(), self.scale, variant=variant,
                magnitude=m.to(dtype).float() if variant == "dora" else None,
            )  # fmt: skip

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
            bases = [base(linear) for linear in self.linears]
            return Copy(xs, bases, list(map(adapter, self.linears, bases)), dys)

        wanted = math.ceil(3 * cache_bytes(device) / self.bytes())
        self.copies = [copy() for _ in range(min(MAX_COPIES, max(2, wanted)))]

    def bytes(self) -> int:
        """Bytes of one copy, without the adapters."""
        weights = sum(x.in_features * x.out_features for x in self.linears)
        rows = self.rows * (sum(inputs(self.linears).values()) + sum(x.out_features for x in self.linears))
        return self.dtype.itemsize * (weights + rows)

    def right(self, contender: Contender) -> str:
        """The name of the expected results of a contender: "base" or a variant."""
        return "base" if not contender.adapter else "lora" if contender.lora else self.variant

    def runner(self, contender: Contender) -> Runner:
        """The contender's layers on every copy; raises RefusedError if they cannot be made."""
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
    """One contender's layers on a workload."""

    workload: Workload
    contender: Contender
    layers: list[list[nn.Module]]

    def forward(self, copy: int = 0) -> list[Tensor]:
        """The y of every linear, with the autograd graph for the backward."""
        with self.contender.context():
            return chained(self.workload.linears, self.workload.copies[copy].inputs, self.layers[copy])

    def both(self, copy: int = 0) -> None:
        """Forward, then backward into ``.grad`` as in training; then drops the gradients."""
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
        """One call per copy, of "forward" or "both"."""
        run = getattr(self, part)
        return [functools.partial(run, copy) for copy in range(len(self.layers))]

    def results(self) -> dict[str, list[Tensor]]:
        """Results on the first copy: y and dx and, if the adapter is on, dA, dB and DoRA's dm."""
        try:
            ys = self.forward()
            torch.autograd.backward([ys[i] for i in outputs(self.workload.linears)], self.workload.copies[0].dys)
            found = {"y": [y.detach() for y in ys], "dx": [t.grad for t in self.workload.copies[0].inputs.values()]}
            names = FACTORS[self.workload.right(self.contender)]
            if names:
                factors = [[p for p in layer.parameters() if p.requires_grad] for layer in self.layers[0]]
                if any(len(trained) != len(names) for trained in factors):
                    raise RefusedError(f"trains {len(factors[0])} tensors, must be {' and '.join(names)}")
                found |= {f"d{name}": [trained[i].grad for trained in factors] for i, name in enumerate(names)}
            return found
        finally:
            self.forget(0)  # otherwise the next contender would accumulate into these gradients


def chained(
    linears: Sequence[Linear], inputs: dict[str, Tensor], layers: Sequence[Callable[[Tensor], Tensor]]
) -> list[Tensor]:
    """The y of every linear, computed from an input or from an earlier y."""
    known, ys = dict(inputs), []
    for linear, layer in zip(linears, layers, strict=True):
        known[linear.name] = layer(known[linear.reads])
        ys.append(known[linear.name])
    return ys


def truth(workload: Workload, dtype: torch.dtype, what: str) -> dict[str, list[Tensor]]:
    """The reference implementation's results on the first copy in `dtype`, for the base or a variant."""
    copy, names = workload.copies[0], FACTORS[what]
    leaf = lambda t: t.detach().to(dtype).requires_grad_()  # noqa: E731
    xs = {name: leaf(t) for name, t in copy.inputs.items()}
    factors = [[leaf(t) for t in (a.lora_a, a.lora_b, a.magnitude)[: len(names)]] for a in copy.adapters]

    def layer(base: nn.Linear, factors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        weight, bias = base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype)
        if not factors:
            return lambda x: F.linear(x, weight, bias)
        return lambda x: VARIANTS[what].definition(x, weight, bias, *factors, scale=workload.scale)

    ys = chained(workload.linears, xs, list(map(layer, copy.bases, factors)))
    torch.autograd.backward([ys[i] for i in outputs(workload.linears)], [dy.to(dtype) for dy in copy.dys])
    found = {"y": [y.detach() for y in ys], "dx": [t.grad for t in xs.values()]}
    return found | {f"d{name}": [of[i].grad for of in factors] for i, name in enumerate(names)}


def error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Relative error in the Frobenius norm, over all linears."""
    off = sum((f.double() - t.double()).square().sum().item() for f, t in zip(found, true, strict=True))
    norm = sum(t.double().square().sum().item() for t in true)
    return math.sqrt(off / norm)


class Judge:
    """Compares contenders with the reference in float64.

    The tolerance is `SLACK` times the error of the reference in the workload's own dtype.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.exact: dict[str, dict[str, list[Tensor]]] = {}
        self.own: dict[str, dict[str, float]] = {}
        for what in dict.fromkeys(("base", "lora", workload.variant)):
            exact, plain = (truth(workload, dtype, what) for dtype in (torch.float64, workload.dtype))
            self.exact[what], self.own[what] = exact, {n: error(plain[n], exact[n]) for n in exact}

    def check(self, runner: Runner) -> float:
        """The error of y relative to that of `F.linear`; raises RefusedError if a result is wrong or does not run."""
        try:
            found = runner.results()
        except Exception as failure:
            raise RefusedError(reason(failure)) from failure
        what = self.workload.right(runner.contender)
        errors = {}
        for name, exact in self.exact[what].items():
            if any(t is None for t in found[name]):
                raise RefusedError(f"gives no {name}")
            errors[name] = error(found[name], exact)
            allowed = SLACK * self.own[what][name] + torch.finfo(self.workload.dtype).eps
            if not errors[name] <= allowed:  # not `errors[name] > allowed`, which is false for NaN
                raise RefusedError(f"{name} is off by {errors[name]:.3g} of its norm, allowed is {allowed:.3g}")
        return errors["y"] / self.own["base"]["y"]
