"""One adapter as PEFT's files hold it: its keys, its shapes, and what of it is ours alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cotolora.linear import CoToLoRALinear
from cotolora.variants import VARIANTS
from cotolora.variants.starts import since_start

KEYS = {name: tuple(part.key for part in variant.parts) for name, variant in VARIANTS.items()}


def plain_key(key: str) -> str:
    """`key` as `KEYS` has it: PEFT gives the magnitude as a parameter or as a module with a weight."""
    return key.removesuffix(".weight") if key.endswith(".lora_magnitude_vector.weight") else key


def shapes(variant: str, rank: int, in_features: int, out_features: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of `KEYS`."""
    return ((rank, in_features), (out_features, rank), (out_features,))[: len(KEYS[variant])]


def settings(layer: CoToLoRALinear) -> tuple[int, float]:
    """Rank and alpha of what `tensors` gives; alpha in the sense of the layer's own `use_rslora`."""
    if layer.lora_a0 is None:
        return layer.rank, layer.alpha
    # twice the rank at the same scale
    return 2 * layer.rank, layer.alpha * (math.sqrt(2) if layer.use_rslora else 2)


def tensors(layer: CoToLoRALinear, whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of `layer` by `KEYS`, each parameter made whole by `whole` first.

    An adapter that started away from zero becomes a plain one of twice the rank, for the base as it was. HiRA's scale,
    which PEFT does not have, goes into B.
    """
    parameters = [whole(parameter) for parameter in layer.adapter_parameters]
    if layer.lora_a0 is not None and layer.lora_b0 is not None:
        a, b = parameters[:2]
        parameters[:2] = since_start(a, b, whole(layer.lora_a0), whole(layer.lora_b0))
    if layer.variant == "hira":
        parameters[1] = parameters[1].to(torch.promote_types(parameters[1].dtype, torch.float32)) * layer.scale
    return dict(zip(KEYS[layer.variant], parameters, strict=True))


def fill(layer: CoToLoRALinear, values: dict[str, Tensor], write: Callable[[Tensor, Tensor], Any]) -> None:
    """Gives the parameters of `layer` what `values` holds by `KEYS`; `write` takes target and value."""
    for key, target in zip(KEYS[layer.variant], layer.adapter_parameters, strict=True):
        value = values[key]
        write(target, value / layer.scale if key == "hira_B" else value)


def why_not(layer: CoToLoRALinear, variant: str, rank: int, scale: float) -> str:
    """Why `layer` cannot take a file's adapter of such a variant, rank and scale; empty if it can."""
    if layer.variant != variant:
        return f"must have the variant of the file, {variant!r}; the model's is {layer.variant!r}"
    if layer.lora_a0 is not None:
        return (
            f"must not have an init taken from W, whose start no file holds; the model's is {layer.init!r} "
            "(eject the adapters and load onto the base)"
        )
    # HiRA's files have no scale: B is divided by the layer's own
    fits = layer.scale != 0 if variant == "hira" else math.isclose(layer.scale, scale)
    if layer.rank != rank or not fits:
        return (
            f"must have the rank and scale of the file, {rank} and {scale:g}; "
            f"the model's are {layer.rank} and {layer.scale:g}"
        )
    return ""
