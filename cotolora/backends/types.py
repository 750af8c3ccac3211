"""Types that all backends share: the operands and options of a call, its results, and the interface of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cotolora.variants.base import Variant


class Operands(NamedTuple):
    """The tensors of a call, with the shapes that `cotolora.reference` documents.

    `extra` holds the further tensors of the variant after A and B, then the variant's constants. Either `weight` is
    given, or `base`, the output ``[..., out_features]`` of a module that computes ``x Wᵀ + bias`` itself.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor
    b: Tensor
    extra: tuple[Tensor, ...] = ()
    base: Tensor | None = None


class Options(NamedTuple):
    """The other arguments of a call. `gate` is None (active) or a bool or int tensor, ``[]`` or ``[batch]``."""

    scale: float
    dropout: float = 0.0
    gate: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are required."""

    x: bool = False
    weight: bool = False
    bias: bool = False
    a: bool = False
    b: bool = False
    extra: tuple[bool, ...] = ()


NOTHING = Needs()


class Gradients(NamedTuple):
    """The required gradients, None for the others; autograd casts them to the dtypes of their tensors."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    extra: tuple[Tensor | None, ...] = ()


class Kept(NamedTuple):
    """The operands that a backward reads, None for the others."""

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None


def kept_by_lora(operands: Operands, needs: Needs) -> Kept:
    """The operands that the gradients read in addition to h, of LoRA and variants that scale its factors or outputs."""
    x, weight, _, a, b, *_ = operands
    for_extra = any(needs.extra)
    return Kept(
        x if needs.a or needs.weight else None,
        weight if needs.x else None,
        # the gradient of B needs only h, but A must be saved so that a second differentiation is detected
        a if needs.x or needs.b else None,
        b if needs.x or needs.a or for_extra else None,
    )


class Sizes(NamedTuple):
    """The sizes of ``y [m, n] = x [m, k] Wᵀ`` with an update of `rank`; elements have `element_size` bytes."""

    m: int
    n: int
    k: int
    rank: int
    element_size: int = 2

    def bytes(self, *tensors: str) -> int:
        """The bytes of `tensors`, each counted as often as listed: x y w h a b, and p, dx, dy, u as h, x, y, y."""
        counts = {
            "x": self.m * self.k, "y": self.m * self.n, "w": self.n * self.k,
            "h": self.m * self.rank, "a": self.rank * self.k, "b": self.n * self.rank,
        }  # fmt: skip
        counts |= {"dx": counts["x"], "dy": counts["y"], "u": counts["y"], "p": counts["h"]}
        return self.element_size * sum(counts[name] for name in tensors)

    @property
    def products(self) -> int:
        """Floating-point operations of ``x Wᵀ``."""
        return 2 * self.m * self.n * self.k

    def call(self, variant: Variant, device: torch.device | str = "cuda", *, adds: bool = False) -> Call:
        """A call of these sizes, in the dtype that `element_size` implies (2: bfloat16); `adds` as `Call.adds`."""
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.element_size]
        return Call(
            variant, torch.device(device), dtype, self.rank, 0.0, self.m, self.k, self.n,
            base_dtype=dtype if adds else None,
        )  # fmt: skip


class Launch(NamedTuple):
    """One kernel: its name, the bytes that it reads and writes, its floating-point operations and its speed class."""

    kernel: str
    bytes: int
    flops: int = 0
    speed: str = "vendor"  # or a field of `cotolora.backends.cost.Machine`: "gemm", "pointer_gemm", "masking_gemm"


class Launches(NamedTuple):
    """The kernels of one layer, and the bytes that the forward saves for the backward in addition to x.

    The backward computes the gradients of x, A, B and the other trained tensors.
    """

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    saved_bytes: int


class Call(NamedTuple):
    """The properties of a call that the choice of a backend may depend on."""

    variant: Variant
    device: torch.device
    dtype: torch.dtype
    rank: int
    dropout: float = 0.0
    rows: int | None = None  # None under torch.compile, where a choice by size would compile once per size
    in_features: int = 0
    out_features: int = 0
    backward: bool = True
    base_dtype: torch.dtype | None = None  # the dtype of a base output; None if there is a weight

    @property
    def adds(self) -> bool:
        """Whether the update is added to the output of a base."""
        return self.base_dtype is not None

    @property
    def sizes(self) -> Sizes | None:
        """The sizes for the cost model; None if the number of rows is not known."""
        if self.rows is None:
            return None
        return Sizes(self.rows, self.out_features, self.in_features, self.rank, self.dtype.itemsize)


def transforming() -> bool:
    """Whether a torch.func transform, forward-mode AD or torch.jit.trace is active."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


class NotPreparedError(RuntimeError):
    """A kernel would have to be compiled or loaded during a CUDA graph capture, which may be impossible."""


class Stacked(NamedTuple):
    """A backend's forward and backward for several layers that read one x, of one scale and without dropout.

    Only x and each A and B may have gradients. Gates are as in `Options`, one for each layer.

    name: the full name of the backend.
    forward: ``(x, weights, biases, factors A, bs, gates, scale)`` to each y; A of all, in the dtype of x; and h of all.
    backward: ``(dys, x, weights, a of all, bs, h, gates, scale, dtype of the factors)`` to dx, each dA and each dB; dx
        is None without weights.
    launches: for calls whose number of rows is known.
    most_ranks: of all layers together; None for any.
    elsewhere: the backward by vendor GEMMs of what the forward has left; None for those themselves.
    """

    name: str
    forward: Callable[..., tuple[Sequence[Tensor], Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor]]]
    launches: Callable[[Sequence[Call]], Launches]
    most_ranks: int | None = None
    elsewhere: Callable[..., tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor]]] | None = None


class AlwaysOn(NamedTuple):
    """A backend's forward and backward for calls without a gate, without any lookups or branches on options.

    Reduces host time, which dominates in small layers. Only x, A and B may have gradients.

    forward: ``(x, weight, bias, a, b, scale)`` to y and the h that the backward reads.
    backward: ``(dy, x, weight, a, b, h, scale)`` to dx, dA and dB; dx is None if weight is.
    casts: whether A and B may have other dtypes than x.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, Tensor, Tensor]]
    casts: bool


class Backend(Protocol):
    """A forward with a hand-written backward. Neither records a graph; `cotolora.backends.autograd` connects them.

    A backend may also have ``always_on(call)``, which returns None or an `AlwaysOn` with bitwise equal results for such
    calls, and ``stacked(call)``, which returns None or a `Stacked` for layers of such calls. A fused backend has
    ``when_captured()``, which returns the same backend, but one that raises NotPreparedError for new launches.
    """

    def why_not(self, call: Call) -> list[str]:
        """Every reason it cannot run such a call; an empty list means it can."""

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, Any]:
        """Returns the result and a NamedTuple of tensors (or None) for the backward."""

    def backward(self, dy: Tensor, saved: Any, options: Options, needs: Needs) -> Gradients:
        """Returns the gradients that `needs` requires, given ``dy [..., out_features]``."""

    def launches(self, call: Call) -> Launches:
        """The kernels that it launches for a call with a known number of rows."""

    def saved_elsewhere(self, saved: Any, dy: Tensor, options: Options) -> Any:
        """`saved` in the form of the variant's addmm backend, whose backward runs if this backend's fails."""
