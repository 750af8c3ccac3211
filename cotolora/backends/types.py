"""What all backends share: the operands of a call, what it asks for, and what a backend must offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cotolora.variants.base import Variant


class Operands(NamedTuple):
    """The tensors of a call, of the shapes that `cotolora.reference` gives them.

    `extra` holds what the variant has beside A and B, and after it the variant's constants. Either `weight` is there,
    or `base`, the output of a module that makes ``x Wᵀ + bias`` itself, ``[..., out_features]``.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor
    b: Tensor
    extra: tuple[Tensor, ...] = ()
    base: Tensor | None = None


class Options(NamedTuple):
    """The rest of a call. `gate` is None where the adapter is on, or a bool or int tensor, ``[]`` or ``[batch]``."""

    scale: float
    dropout: float = 0.0
    gate: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool = False
    weight: bool = False
    bias: bool = False
    a: bool = False
    b: bool = False
    extra: tuple[bool, ...] = ()


NOTHING = Needs()


class Gradients(NamedTuple):
    """The gradients asked for, None for the others; autograd casts them to the dtypes of their tensors."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    extra: tuple[Tensor | None, ...] = ()


class Kept(NamedTuple):
    """The operands that a backward reads, None where it will not."""

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None


def kept_by_lora(operands: Operands, needs: Needs) -> Kept:
    """What the gradients of LoRA, and of variants that only scale its factors or outputs, read beside h."""
    x, weight, _, a, b, *_ = operands
    for_extra = any(needs.extra)
    return Kept(
        x if needs.a or needs.weight else None,
        weight if needs.x else None,
        # the gradient of B has h for it, but a second differentiation is noticed by the presence of A
        a if needs.x or needs.b else None,
        b if needs.x or needs.a or for_extra else None,
    )


class Sizes(NamedTuple):
    """Of ``y [m, n] = x [m, k] Wᵀ`` with `rank`, in elements of `element_size` bytes."""

    m: int
    n: int
    k: int
    rank: int
    element_size: int = 2

    def bytes(self, *tensors: str) -> int:
        """Of the tensors named, each as often as it is named: x y w h a b, and p, dx, dy, u, as h, x, y, y."""
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
        """A call of these sizes, in bfloat16 or, by the size of its elements, another dtype; `adds` as `Call.adds`."""
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.element_size]
        return Call(
            variant, torch.device(device), dtype, self.rank, 0.0, self.m, self.k, self.n,
            base_dtype=dtype if adds else None,
        )  # fmt: skip


class Launch(NamedTuple):
    """One kernel: its name, the bytes that it reads and writes, its products, and whose it is."""

    kernel: str
    bytes: int
    flops: int = 0
    speed: str = "vendor"  # or "gemm", "pointer_gemm" or "masking_gemm": of `cotolora.backends.cost.Machine`


class Launches(NamedTuple):
    """What a backend launches for one layer, and the bytes that it keeps from the forward for the backward beside x.

    The backward is that of the gradients of x, A, B and what else trains.
    """

    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    saved_bytes: int


class Call(NamedTuple):
    """What the choice of a backend may depend on."""

    variant: Variant
    device: torch.device
    dtype: torch.dtype
    rank: int
    dropout: float = 0.0
    rows: int | None = None  # unknown under torch.compile, where a choice by size would compile for each size
    in_features: int = 0
    out_features: int = 0
    backward: bool = True
    base_dtype: torch.dtype | None = None  # of a base's own output, where there is no weight to multiply by

    @property
    def adds(self) -> bool:
        """Whether the update is added to what a base has made."""
        return self.base_dtype is not None

    @property
    def sizes(self) -> Sizes | None:
        """As the models of cost take them; None where the number of rows is not known."""
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
    """Kernels would have to be compiled or loaded while a CUDA graph is captured, which may not be possible."""


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
    """A backend's forward and backward for calls without a gate, with nothing to look up and nothing to decide.

    Small layers spend most of their time on the host. Only x, A and B may have gradients.

    forward: ``(x, weight, bias, a, b, scale)`` to y and the h that the backward reads.
    backward: ``(dy, x, weight, a, b, h, scale)`` to dx, dA and dB; dx is None if weight is.
    casts: whether A and B may have other dtypes than x.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, Tensor, Tensor]]
    casts: bool


class Backend(Protocol):
    """A forward with a hand-written backward. Neither records a graph; `cotolora.backends.autograd` joins them.

    It may have ``always_on(call)`` as well, which is None or an `AlwaysOn` for such calls, equal bit for bit, and
    ``stacked(call)``, which is None or a `Stacked` for layers of such calls. A fused one has ``when_captured()``, the
    same backend, which raises NotPreparedError instead of launching what is new.
    """

    def why_not(self, call: Call) -> list[str]:
        """Every reason it cannot run such a call; an empty list means it can."""

    def forward(self, operands: Operands, options: Options, needs: Needs) -> tuple[Tensor, Any]:
        """The result, and what the backward reads: a NamedTuple of tensors and Nones."""

    def backward(self, dy: Tensor, saved: Any, options: Options, needs: Needs) -> Gradients:
        """The gradients that `needs` asks for, given ``dy [..., out_features]``."""

    def launches(self, call: Call) -> Launches:
        """What it launches for a call whose number of rows is known."""

    def saved_elsewhere(self, saved: Any, dy: Tensor, options: Options) -> Any:
        """`saved` as the addmm backend of the variant has it, for its backward to go on where this one's failed."""
