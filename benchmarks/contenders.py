"""The contenders: the frozen linear, every backend of cotolora, and the libraries that a user would otherwise choose.

Unsloth's and torchtune's orders of operations are reimplemented from their published code, so that they run without
those packages. PEFT and LoRAFusion are the packages themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cotolora
from cotolora.variants import VARIANTS


@dataclass(frozen=True)
class Adapter:
    """The factors A and B (and DoRA's magnitude m) that every contender receives, and how to apply them."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    dropout: float = 0.0
    variant: str = "lora"
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank: the number of rows of A."""
        return self.lora_a.shape[0]


@dataclass(frozen=True)
class Contender:
    """One implementation of a low-rank layer.

    Attributes:
        name: its name in tables.
        build: makes the layer from a frozen linear and an adapter; raises an error if it cannot run on this machine.
        peer: its name in ``--peers``; None for the frozen linear and for ours.
        adapter: whether it computes the low-rank update; if not, it must equal the frozen linear.
        lora: whether it computes LoRA even when the other contenders compute another variant.
        context: context manager entered around its calls.
    """

    name: str
    build: Callable[[nn.Linear, Adapter], nn.Module]
    peer: str | None = None
    adapter: bool = True
    lora: bool = False
    context: Callable[[], AbstractContextManager] = nullcontext


class UnslothOrder(torch.autograd.Function):
    """Unsloth's order of operations: saves only x for the backward and computes dy B twice."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """``y = x Wᵀ + bias + s (x Aᵀ) Bᵀ``."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(x @ a.T, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x, A and B."""
        x, weight, a, b = ctx.saved_tensors
        da = torch.empty_like(a.T).addmm_(x.T, dy @ b, alpha=ctx.scale, beta=0).T
        db = torch.empty_like(b.T).addmm_(a @ x.T, dy, alpha=ctx.scale, beta=0).T
        return (dy @ weight).addmm_(dy @ b, a, alpha=ctx.scale), None, None, da, db, None


class Adapted(nn.Module):
    """A frozen linear with A and B in `dtype` (the linear's own by default), computed by a function."""

    def __init__(self, base: nn.Linear, adapter: Adapter, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.base, self.scale, self.run = base, adapter.scale, run
        self.lora_a = nn.Parameter(adapter.lora_a.to(base.weight.dtype))
        self.lora_b = nn.Parameter(adapter.lora_b.to(base.weight.dtype))
        self.magnitude = None if adapter.magnitude is None else nn.Parameter(adapter.magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """``run(x, weight, bias, A, B, [m,] scale)``."""
        factors = [p for p in (self.lora_a, self.lora_b, self.magnitude) if p is not None]
        return self.run(x, self.base.weight, self.base.bias, *factors, self.scale)


def unsloth_order(base: nn.Linear, adapter: Adapter) -> nn.Module:
    return Adapted(base, adapter, UnslothOrder.apply)


def torchtune_order(base: nn.Linear, adapter: Adapter) -> nn.Module:
    """The operations of torchtune's LoRALinear, differentiated by autograd: base, down, up, scale, add."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)

    return Adapted(base, adapter, run)


@cache
def compiled_reference(variant: str) -> Callable[..., Tensor]:
    """`torch.compile` of the reference implementation, with static shapes."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor | float) -> Tensor:
        *tensors, scale = factors
        return VARIANTS[variant].definition(x, weight, bias, *tensors, scale=scale)

    return torch.compile(run, dynamic=False)


def lorafusion(base: nn.Linear, adapter: Adapter) -> nn.Module:
    """LoRAFusion's fused layer, which takes 3-D inputs."""
    from lorafusion.ops.lora_v1 import fused_linear_lora

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return fused_linear_lora(x[None], weight, a, b, scale, linear_bias=bias)[0]

    return Adapted(base, adapter, run)


def peft(base: nn.Linear, adapter: Adapter, *, as_shipped: bool = True) -> nn.Module:
    """PEFT's layer. A and B are float32 if `as_shipped` (PEFT's default), otherwise of the linear's dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    config: Any
    if adapter.variant == "hira":
        from peft import HiraConfig  # new in PEFT 0.21

        if adapter.scale != 1:
            raise ValueError(f"scale must be 1, because PEFT's HiRA has none; got {adapter.scale}")
        config = HiraConfig(r=adapter.rank, hira_dropout=adapter.dropout, target_modules=["0"])
    else:
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.scale * adapter.rank,
            lora_dropout=adapter.dropout,
            use_dora=adapter.variant == "dora",
            target_modules=["0"],
        )
    layer = inject_adapter_in_model(config, nn.Sequential(base), low_cpu_mem_usage=base.weight.is_meta)[0]
    dtype = torch.float32 if as_shipped else base.weight.dtype
    factors = (nn.Parameter(factor.detach().to(dtype)) for factor in (adapter.lora_a, adapter.lora_b))
    if adapter.variant == "hira":
        layer.hira_A["default"], layer.hira_B["default"] = factors
    else:
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = factors
    if adapter.magnitude is not None:
        layer.lora_magnitude_vector["default"].weight = nn.Parameter(adapter.magnitude.detach().clone())
    return layer


def ours(base: nn.Linear, adapter: Adapter, *, gate: Any = True, as_shipped: bool = True) -> nn.Module:
    """`CoToLoRALinear`. A and B are float32 if `as_shipped` (the default), otherwise of the linear's dtype.

    `gate` may be a function that makes a tensor on the layer's device.
    """
    layer = cotolora.CoToLoRALinear.from_linear(
        base, rank=adapter.rank, alpha=adapter.scale * adapter.rank, dropout=adapter.dropout, variant=adapter.variant
    )
    dtype = torch.float32 if as_shipped else base.weight.dtype
    layer.lora_a = nn.Parameter(adapter.lora_a.detach().to(dtype))
    layer.lora_b = nn.Parameter(adapter.lora_b.detach().to(dtype))
    if adapter.magnitude is not None:
        layer.lora_magnitude = nn.Parameter(adapter.magnitude.detach().clone())
    layer.gate = gate(base.weight.device) if callable(gate) else gate
    return layer


def our_lora(base: nn.Linear, adapter: Adapter) -> nn.Module:
    """Our LoRA, as a baseline for our other variants."""
    return ours(base, replace(adapter, variant="lora", magnitude=None))


def peft_disabled(base: nn.Linear, adapter: Adapter) -> nn.Module:
    """PEFT's LoRA with its adapters switched off."""
    layer = peft(base, adapter)
    layer.enable_adapters(False)
    return layer


def device_gate(on: bool) -> Callable[[torch.device], Tensor]:
    """Returns a function that makes a gate tensor, which kernels read from device memory."""
    return lambda device: torch.tensor(int(on), dtype=torch.int32, device=device)


HAVE_VARIANTS = ("peft", "compile")
# the variants that can be compared: those with fused kernels
COMPARED = tuple(name for name, variant in VARIANTS.items() if variant.fused)


def backends(variant: str) -> tuple[str, ...]:
    """Names of all backends that compute a variant."""
    return "reference", *VARIANTS[variant].backends


def by_name(backend: str) -> Callable[[], AbstractContextManager]:
    """A context in which our layers use the given backend."""
    return lambda: cotolora.set_backend(backend)


FROZEN = Contender("frozen", lambda base, _: base, adapter=False)
AUTO = Contender("ours", ours)
OUR_LORA = Contender("our LoRA", our_lora, lora=True)

NARROW = Contender("ours, A and B in x's dtype", partial(ours, as_shipped=False))
OFF_BY_HOST = Contender("ours off by host gate", partial(ours, gate=False), adapter=False)
OFF_BY_DEVICE = Contender("ours off by device gate", partial(ours, gate=device_gate(False)), adapter=False)
ON_BY_DEVICE = Contender("ours on by device gate", partial(ours, gate=device_gate(True)))
PEFT_OFF = Contender("PEFT disabled", peft_disabled, peer="peft", adapter=False)
PEERS = (
    Contender("PEFT as shipped", peft, peer="peft"),
    Contender("PEFT, A and B in x's dtype", partial(peft, as_shipped=False), peer="peft"),
    Contender("Unsloth's order", unsloth_order, peer="unsloth"),
    Contender("torchtune's order", torchtune_order, peer="torchtune"),
    Contender(
        "torch.compile of the reference",
        lambda base, adapter: Adapted(base, adapter, compiled_reference(adapter.variant)),
        peer="compile",
    ),
    Contender("LoRAFusion", lorafusion, peer="lorafusion"),
)
PEER_NAMES = tuple(dict.fromkeys(contender.peer for contender in PEERS))


def named(variant: str) -> list[Contender]:
    """Our layer with each of its backends."""
    return [Contender(f"ours {name}", ours, context=by_name(name)) for name in backends(variant)]


def off_by_device(variant: str) -> list[Contender]:
    """Our layer with a device gate that is off: with the default backend and with each backend by name."""
    return [
        OFF_BY_DEVICE,
        *(
            replace(OFF_BY_DEVICE, name=f"ours {name} off by device gate", context=by_name(name))
            for name in backends(variant)
        ),
    ]


def ours_in_full(variant: str, dtype: str) -> list[Contender]:
    """The frozen linear and our layer: default backend, each backend, gate off; for other variants also our LoRA."""
    beside = [] if variant == "lora" else [OUR_LORA]
    narrow = [] if dtype == "float32" else [NARROW]
    return [FROZEN, *beside, AUTO, *named(variant), *narrow, OFF_BY_HOST, OFF_BY_DEVICE]


def chosen(peers: list[str], dtype: str, variant: str) -> list[Contender]:
    """The requested peers that support the variant; only one form of PEFT for float32, where both are the same."""
    twice = dtype == "float32"
    able = [c for c in PEERS if variant == "lora" or c.peer in HAVE_VARIANTS]
    return [c for c in able if c.peer in peers and not (twice and c.name.startswith("PEFT, "))]
