"""What is measured against what: the frozen linear, ours in every form, and what a user would otherwise take.

Unsloth's and torchtune's orders of operations are written anew from their published behaviour, so that they run without
those packages; PEFT and LoRAFusion are the packages themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cotolora
from cotolora import reference
from cotolora.kernels.forms import FORMS


@dataclass(frozen=True)
class Adapter:
    """A and B as they are given to every contender, and how they are used."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.lora_a.shape[0]


@dataclass(frozen=True)
class Contender:
    """Something that computes a low-rank layer.

    Attributes:
        name: in tables.
        build: makes the layer from a frozen linear and an adapter; raises with the reason if it cannot be made here.
        peer: what ``--peers`` calls it; None for the frozen linear and for ours.
        adapter: whether the update is computed; without, the frozen linear is what is right.
        context: entered around its calls.
    """

    name: str
    build: Callable[[nn.Linear, Adapter], nn.Module]
    peer: str | None = None
    adapter: bool = True
    context: Callable[[], AbstractContextManager] = nullcontext


class UnslothOrder(torch.autograd.Function):
    """Unsloth's order of operations: x alone is saved, and dy B is computed twice."""

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

    def forward(self, x: Tensor) -> Tensor:
        """``run(x, weight, bias, A, B, scale)``."""
        return self.run(x, self.base.weight, self.base.bias, self.lora_a, self.lora_b, self.scale)


def unsloth_order(base: nn.Linear, adapter: Adapter) -> nn.Module:
    return Adapted(base, adapter, UnslothOrder.apply)


def torchtune_order(base: nn.Linear, adapter: Adapter) -> nn.Module:
    """Torchtune's LoRALinear: base, down, up, scaled and added, by autograd."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)

    return Adapted(base, adapter, run)


@cache
def compiled_reference() -> Callable[..., Tensor]:
    """`torch.compile` of the definition, for static shapes."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return reference.lora_linear(x, weight, bias, a, b, scale=scale)

    return torch.compile(run, dynamic=False)


def lorafusion(base: nn.Linear, adapter: Adapter) -> nn.Module:
    """LoRAFusion's fused layer, which takes inputs of three dimensions."""
    from lorafusion.ops.lora_v1 import fused_linear_lora

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return fused_linear_lora(x[None], weight, a, b, scale, linear_bias=bias)[0]

    return Adapted(base, adapter, run)


def peft(base: nn.Linear, adapter: Adapter, *, as_shipped: bool = True) -> nn.Module:
    """PEFT's LoRA; as it ships A and B are float32, else of the linear's dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.scale * adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=["0"],
    )
    layer = inject_adapter_in_model(config, nn.Sequential(base), low_cpu_mem_usage=base.weight.is_meta)[0]
    dtype = torch.float32 if as_shipped else base.weight.dtype
    for module, factor in ((layer.lora_A, adapter.lora_a), (layer.lora_B, adapter.lora_b)):
        module["default"].weight = nn.Parameter(factor.detach().to(dtype))
    return layer


def ours(base: nn.Linear, adapter: Adapter, *, gate: Any = True, as_shipped: bool = True) -> nn.Module:
    """`CoToLoRALinear`; as it ships A and B are float32, else of the linear's dtype. `gate` may make a tensor."""
    layer = cotolora.CoToLoRALinear.from_linear(
        base, rank=adapter.rank, alpha=adapter.scale * adapter.rank, dropout=adapter.dropout
    )
    dtype = torch.float32 if as_shipped else base.weight.dtype
    layer.lora_a = nn.Parameter(adapter.lora_a.detach().to(dtype))
    layer.lora_b = nn.Parameter(adapter.lora_b.detach().to(dtype))
    layer.gate = gate(base.weight.device) if callable(gate) else gate
    return layer


def peft_disabled(base: nn.Linear, adapter: Adapter) -> nn.Module:
    """PEFT's LoRA with its adapters switched off."""
    layer = peft(base, adapter)
    layer.enable_adapters(False)
    return layer


def device_gate(on: bool) -> Callable[[torch.device], Tensor]:
    """Makes a gate that kernels read from memory."""
    return lambda device: torch.tensor(int(on), dtype=torch.int32, device=device)


BACKENDS = ("reference", "addmm", *(f"triton:{form}" for form in FORMS))


def by_name(backend: str) -> Callable[[], AbstractContextManager]:
    """A context in which ours takes one backend."""
    return lambda: cotolora.set_backend(backend)


FROZEN = Contender("frozen", lambda base, _: base, adapter=False)
AUTO = Contender("ours", ours)
NAMED = tuple(Contender(f"ours {backend}", ours, context=by_name(backend)) for backend in BACKENDS)
NARROW = Contender("ours, A and B in x's dtype", partial(ours, as_shipped=False))
OFF_BY_HOST = Contender("ours off by host gate", partial(ours, gate=False), adapter=False)
OFF_BY_DEVICE = tuple(
    Contender(
        f"ours{suffix} off by device gate", partial(ours, gate=device_gate(False)), adapter=False, context=context
    )
    for suffix, context in (("", nullcontext), *((f" {name}", by_name(name)) for name in BACKENDS))
)
ON_BY_DEVICE = Contender("ours on by device gate", partial(ours, gate=device_gate(True)))
PEFT_OFF = Contender("PEFT disabled", peft_disabled, peer="peft", adapter=False)
PEERS = (
    Contender("PEFT as shipped", peft, peer="peft"),
    Contender("PEFT, A and B in x's dtype", partial(peft, as_shipped=False), peer="peft"),
    Contender("Unsloth's order", unsloth_order, peer="unsloth"),
    Contender("torchtune's order", torchtune_order, peer="torchtune"),
    Contender(
        "torch.compile of the reference",
        lambda base, adapter: Adapted(base, adapter, compiled_reference()),
        peer="compile",
    ),
    Contender("LoRAFusion", lorafusion, peer="lorafusion"),
)
PEER_NAMES = tuple(dict.fromkeys(contender.peer for contender in PEERS))


def chosen(peers: list[str], dtype: str) -> list[Contender]:
    """Those of `PEERS` asked for; where A and B are float32 anyway, PEFT once."""
    twice = dtype == "float32"
    return [c for c in PEERS if c.peer in peers and not (twice and c.name.startswith("PEFT, "))]
