"""Calls of the operation, derived from the registry of variants without naming any variant or backend."""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora import coto_lora_linear
from cotolora.backends.types import Call
from cotolora.functional import add_low_rank, planned
from cotolora.functional import run as run_plan
from cotolora.variants.base import Variant

SCALE = 0.75  # neither 1 nor a power of two, so that a lost, squared or inverted scale is visible
LOW = (torch.float32, torch.float16, torch.bfloat16)

Named = Mapping[str, Tensor | None]


class Subject(NamedTuple):
    """A backend of a variant, for a linear with a weight or, if it `adds`, for a base module that is called."""

    variant: Variant
    backend: str
    adds: bool = False

    def __str__(self) -> str:
        return f"{self.variant.name}-{self.backend}" + "-adding" * self.adds

    @property
    def implementation(self) -> Any:
        """The backend object; None for the reference."""
        return (self.variant.adding_backends if self.adds else self.variant.backends).get(self.backend)

    @property
    def asked(self) -> str:
        """The value for ``backend=``; for a base module every fused kernel is called "triton"."""
        return "triton" if self.adds and self.fused else self.backend

    @property
    def fused(self) -> bool:
        """Whether it runs our kernels, which are slow in Triton's interpreter."""
        return self.backend.startswith("triton")

    def why_not(self, dtype: torch.dtype, dropout: float = 0.0) -> list[str]:
        """The backend's reasons against such a call on a CPU."""
        call = Call(self.variant, torch.device("cpu"), dtype, 2, dropout, 6, 4, 3, True, dtype if self.adds else None)
        return [] if self.implementation is None else self.implementation.why_not(call)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes that it supports on this machine."""
        return [dtype for dtype in (*LOW, torch.float64) if not self.why_not(dtype)]

    @property
    def drops(self) -> bool:
        """Whether it supports dropout."""
        return not self.why_not(self.dtypes[0], 0.5)

    @property
    def base(self) -> tuple[str, ...]:
        """The operands that are not the adapter's."""
        return ("y", "x") if self.adds else ("x", "weight", "bias")

    @property
    def adapter(self) -> tuple[str, ...]:
        """A, B and the extra operands, by the argument names of `coto_lora_linear`."""
        return tuple(part.argument for part in self.variant.parts)


def subjects(variant: Variant) -> Iterator[Subject]:
    """The reference and every backend of a variant, and, if its update can be added, the same for a base module."""
    for adds in (False, True) if variant.addition is not None else (False,):
        for name in ("reference", *(variant.adding_backends if adds else variant.backends)):
            yield Subject(variant, name, adds)


def draw(
    subject: Subject,
    shape: Sequence[int] = (3, 2, 4),
    out: int = 3,
    rank: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    y_dtype: torch.dtype | None = None,
    factors: torch.dtype | None = None,
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Operands by name, scaled so that base and update have similar size; A and B have the dtype `factors`.

    Extra operands are at least float32. Their values are exact in every dtype and differ from any initialisation.
    """
    g = torch.Generator().manual_seed(seed)
    sizes = {"rank": rank, "in_features": shape[-1], "out_features": out}
    named: dict[str, Tensor | None] = {
        "x": torch.randn(*shape, generator=g).to(dtype),
        "weight": (torch.randn(out, shape[-1], generator=g) / math.sqrt(shape[-1] or 1)).to(dtype),
        "bias": torch.randn(out, generator=g).to(dtype) if bias else None,
    }
    for part in subject.variant.parts[:2]:
        size = part.sizes(**sizes)
        named[part.argument] = (torch.randn(*size, generator=g) / math.sqrt(size[1] or 1)).to(factors or dtype)
    for part in subject.variant.extra:
        size = part.sizes(**sizes)
        values = (torch.arange(math.prod(size)) % 5 + 1.5).view(size)
        named[part.argument] = values.to(torch.promote_types(factors or dtype, torch.float32))
    if subject.adds:
        del named["weight"], named["bias"]
        named = {"y": torch.randn(*shape[:-1], out, generator=g).to(y_dtype or dtype), **named}
    return named


def dy_of(named: Named, seed: int = 1) -> Tensor:
    """A gradient of the result of such operands."""
    x, b, like = named["x"], named["lora_b"], named.get("y", named["x"])
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*x.shape[:-1], b.shape[0], generator=g).to(like.dtype)


def double(named: Named) -> dict[str, Tensor | None]:
    """The operands in float64; A and B are first rounded to the dtype in which the operation uses them."""
    via = {"lora_a": named["x"].dtype, "lora_b": named.get("y", named["x"]).dtype}
    return {k: None if t is None else t.detach().to(via.get(k, t.dtype)).double() for k, t in named.items()}


def apply(
    subject: Subject,
    named: Named,
    *,
    gate: bool | Tensor = True,
    dropout: float = 0.0,
    constants: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor:
    """Calls the operation with the given `constants` of the variant (see `constants_of`) if there are any."""
    variant, backend = subject.variant, backend or subject.asked
    extra = tuple(named[part.argument] for part in variant.extra)
    plain = {name: t for name, t in named.items() if name in (*subject.base, "lora_a", "lora_b")}
    if not constants:
        options = {"gate": gate, "dropout": dropout, "variant": variant.name, "extra": extra, "backend": backend}
        return (add_low_rank if subject.adds else coto_lora_linear)(**plain, scale=SCALE, **options)
    (out_features, in_features), rank = named["weight"].shape, named["lora_a"].shape[0]
    plan = planned(variant, named["x"], rank, in_features, out_features, SCALE, dropout, backend)
    return run_plan(plan, *plain.values(), (*extra, *constants), None if gate is True else gate)


def constants_of(subject: Subject, named: Named) -> tuple[Tensor, ...]:
    """The values that the variant computes from W, A and B and treats as constants for autograd."""
    if subject.adds:
        return ()
    factors = (named[name].detach() for name in ("weight", "lora_a", "lora_b"))
    return subject.variant.constants(subject.implementation, *factors, SCALE)


def leaves_of(named: Named, needs: Collection[str] | None = None) -> dict[str, Tensor | None]:
    """New leaves of the same layout; those in `needs` (by default all) require a gradient."""
    return {
        name: None if t is None else t.detach().requires_grad_(needs is None or name in needs)
        for name, t in named.items()
    }


def run(
    subject: Subject,
    named: Named,
    dy: Tensor | None = None,
    needs: Collection[str] | None = None,
    *,
    forward_in: contextlib.AbstractContextManager | None = None,
    backward_in: contextlib.AbstractContextManager | None = None,
    **options: Any,
) -> dict[str, Tensor | None]:
    """The result as "out" and the gradients by name, computed in the given context."""
    leaves = leaves_of(named, needs)
    with forward_in or contextlib.nullcontext():
        out = apply(subject, leaves, **options)
    asked = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    if not out.requires_grad:
        return {"out": out, **dict.fromkeys(asked)}
    with backward_in or contextlib.nullcontext():
        dy = dy_of(named).to(out.dtype) if dy is None else dy
        gradients = torch.autograd.grad(out, list(asked.values()), dy, allow_unused=True)
    return {"out": out.detach(), **dict(zip(asked, gradients, strict=True))}


def base_result(named: Named) -> Tensor:
    """The result without the adapter."""
    return named["y"] if "y" in named else F.linear(named["x"], named["weight"], named["bias"])


def fits(gate: bool | Tensor, x: Tensor) -> bool | Tensor:
    """The gate for the samples of x: row gates cut to their number, or a single gate if x has no sample dimension."""
    if isinstance(gate, Tensor) and gate.dim() == 1:
        return gate[: x.shape[0]] if x.dim() > 1 else gate[0]
    return gate


# layouts


def transposed(t: Tensor) -> Tensor:
    """Swaps the memory order of the last two dimensions."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def sliced(t: Tensor) -> Tensor:
    """Every other entry of the last dimension."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def rows_sliced(t: Tensor) -> Tensor:
    """Every other entry of the first dimension."""
    tall = torch.full((2 * t.shape[0], *t.shape[1:]), float("nan"), dtype=t.dtype)
    tall[1::2] = t
    return tall[1::2]


def sliced_everywhere(t: Tensor) -> Tensor:
    """Every other entry of every dimension, with the dimensions stored in reverse order."""
    wide = torch.full([2 * size + 3 for size in reversed(t.shape)], float("nan"), dtype=t.dtype)
    view = wide[tuple(slice(1, 1 + 2 * size, 2) for size in reversed(t.shape))]
    return view.permute(*reversed(range(t.dim()))).copy_(t)


def offset(t: Tensor) -> Tensor:
    """Starts three entries into its storage."""
    padded = torch.full((t.numel() + 3,), float("nan"), dtype=t.dtype)
    padded[3:] = t.flatten()
    return padded[3:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """One sample in memory, expanded to all."""
    return t[:1].expand(t.shape)


def expanded_features(t: Tensor) -> Tensor:
    """One number in memory per row, expanded over the features."""
    return t[..., :1].expand(t.shape)


def leading_swapped(t: Tensor) -> Tensor:
    """Leading dimensions that no view can flatten, if there are at least two."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 2 else t


LAYOUTS = (transposed, sliced, rows_sliced, sliced_everywhere, offset, expanded, expanded_features, leading_swapped)
