"""VeRA, which trains two vectors per layer; its random factors are frozen and shared by all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cotolora import reference
from cotolora.backends.addmm import vera as by_addmm
from cotolora.variants.base import Part, PeftMethod, Sizes, Variant, without_scale

if TYPE_CHECKING:
    from cotolora.linear import CoToLoRALinear

D_INITIAL = 0.1
_FIELDS = {"projection_prng_key": 0, "save_projection": True, "d_initial": D_INITIAL}


class Vera(Variant):
    """``y = x Wᵀ + bias + scale · b ∘ ((d ∘ (x Aᵀ)) Bᵀ)``.

    A ``[rank, in_features]`` is the first columns and B ``[out_features, rank]`` the first rows of two matrices of the
    largest sizes in the model, drawn from one seed; d is initially 0.1 and b is 0.
    """

    name = "vera"
    definition = staticmethod(reference.vera_linear)
    addition = staticmethod(reference.add_vera)
    addmm = by_addmm.BACKEND
    addmm_adding = by_addmm.BACKEND
    parts = (
        Part("lora_a", ("rank", "in_features"), None, "lora_a"),
        Part("lora_b", ("out_features", "rank"), None, "lora_b"),
        Part("vera_lambda_d", ("rank",), "vera_lambda_d", "lambda_d"),
        Part("vera_lambda_b", ("out_features",), "vera_lambda_b", "lambda_b"),
    )
    trained = ("vera_lambda_d", "vera_lambda_b")
    inits = ("kaiming",)
    low_rank = "s (b * B)(d * A)"
    peft = PeftMethod(
        "VERA", dropout="vera_dropout", init="init_weights", inits=(True, False, None), default_rank=256,
        default_alpha=256, scaled=False, patterned=False, fields=_FIELDS,
    )  # fmt: skip
    shared_keys = ("vera_A", "vera_B")

    def start(self, layer: CoToLoRALinear, weight: Tensor | None) -> None:
        """Initialises d and b, and A and B as in a layer that shares them with no other."""
        d, b = layer.extra
        nn.init.constant_(d, D_INITIAL)
        nn.init.zeros_(b)
        if not layer.lora_a.is_meta:
            a0, b0 = _drawn(layer.rank, layer.in_features, layer.out_features)
            with torch.no_grad():
                layer.lora_a.copy_(a0)
                layer.lora_b.copy_(b0)

    def share(self, layers: Sequence[CoToLoRALinear]) -> None:
        """Gives all layers of one rank, device and dtype views of one A and one B of the largest sizes."""
        together: dict[Any, list[CoToLoRALinear]] = {}
        for layer in layers:
            if not layer.lora_a.is_meta:
                together.setdefault((layer.rank, layer.lora_a.device, layer.lora_a.dtype), []).append(layer)
        for (rank, device, dtype), members in together.items():
            in_features, out_features = (
                max(getattr(layer, name) for layer in members) for name in ("in_features", "out_features")
            )
            a, b = (factor.to(device, dtype) for factor in _drawn(rank, in_features, out_features))
            for layer in members:
                layer.lora_a = nn.Parameter(a[:, : layer.in_features], requires_grad=False)
                layer.lora_b = nn.Parameter(b[: layer.out_features], requires_grad=False)

    def factors(self, a: Tensor, b: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``d ∘ A`` and ``b ∘ B``, where d and b scale rows."""
        d, lambda_b = (t.to(a.dtype) for t in extra)
        return a * d[:, None], b * lambda_b[:, None]

    def saved(self, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Multiplies the scale, which PEFT does not have, into b."""
        b = tensors["vera_lambda_b"]
        return tensors | {"vera_lambda_b": b.to(torch.promote_types(b.dtype, torch.float32)) * scale}

    def loaded(self, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Divides b by the scale of the layer."""
        return tensors | {"vera_lambda_b": without_scale(tensors["vera_lambda_b"], scale)}

    def saved_shared(self, layers: Mapping[str, CoToLoRALinear]) -> dict[str, Tensor]:
        """The largest A and B, which contain those of the other layers.

        Raises:
            ValueError: they do not contain them, so that no single matrix can be stored.
        """
        a = max((layer.lora_a for layer in layers.values()), key=lambda factor: factor.shape[1])
        b = max((layer.lora_b for layer in layers.values()), key=lambda factor: factor.shape[0])
        for name, layer in layers.items():
            of_a, of_b = a[:, : layer.in_features], b[: layer.out_features]
            if not (torch.equal(layer.lora_a, of_a) and torch.equal(layer.lora_b, of_b)):
                raise ValueError(f"all layers must share VeRA's A and B, as inject makes them; {name} differs")
        return {"vera_A": a.detach(), "vera_B": b.detach()}

    def spread_shared(
        self, shared: Mapping[str, Tensor], fields: Mapping[str, Any], sizes: Mapping[str, Sizes]
    ) -> dict[str, dict[str, Tensor]]:
        """The first columns of A and the first rows of B, drawn from the config's seed if the file lacks them."""
        if shared.keys() != set(self.shared_keys):
            if shared or fields.get("save_projection", True):
                raise ValueError(f"the file must hold {self.shared_keys}; of these it holds {sorted(shared)}")
            (rank,) = {size.rank for size in sizes.values()}
            widest, tallest = (max(size[i] for size in sizes.values()) for i in (1, 2))
            drawn = _drawn(rank, widest, tallest, fields.get("projection_prng_key", 0))
            shared = dict(zip(self.shared_keys, drawn, strict=True))
        a, b = (shared[key] for key in self.shared_keys)
        parts = {}
        for name, (rank, in_features, out_features) in sizes.items():
            for key, t, least in (("vera_A", a, (rank, in_features)), ("vera_B", b, (out_features, rank))):
                exact = t.dim() == 2 and t.shape[key == "vera_B"] == rank
                if not exact or any(size < need for size, need in zip(t.shape, least, strict=True)):
                    raise ValueError(f"{key} must be at least {least} for {name}; the file holds {tuple(t.shape)}")
            parts[name] = {"lora_a": a[:, :in_features], "lora_b": b[:out_features]}
        return parts


def _drawn(rank: int, in_features: int, out_features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A and B, uniform with bound ``√(6 / columns)``: the numbers that PEFT draws from the seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    a, b = torch.empty(rank, in_features, device="cpu"), torch.empty(out_features, rank, device="cpu")
    for factor in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(factor.shape[1]))
        factor.uniform_(-bound, bound, generator=generator)
    return a, b
