"""What an adapter directory holds, also one that `load_adapter` refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cotolora.saving.adapter import PREFIX, SHARED_PREFIX, plain_key, read_files
from cotolora.saving.files import WEIGHTS, Look, look
from cotolora.saving.peft_config import PeftConfig, parse_config
from cotolora.saving.shapes import modules_of, shares_of, sizes_of
from cotolora.saving.stand_in import why_not_load
from cotolora.variants import VARIANTS
from cotolora.variants.base import Variant

# fields of a config that decide what an update is scaled by
_OF_SCALE = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_parameters")


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear, as its tensors show it.

    Attributes:
        rank, in_features, out_features: its sizes; where a file does not state `in_features`, the largest in the model.
        scale: by the config; None if that cannot be read.
        norm: the Frobenius norm of `Variant.low_rank`, of the product alone where the scale is unknown; None if a
            factor is not in the file.
        extra: norms of what the variant adds, by attribute.
        keys: of its tensors.
    """

    rank: int
    in_features: int | None
    out_features: int | None
    scale: float | None
    norm: float | None
    extra: dict[str, float]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """What a directory holds.

    Attributes:
        fields: of the config, or None if it cannot be read.
        tensors: by their names in the base model, and those of no single module by their own, or None.
        variant: of the adapters; None of a method that is not supported.
        config: what the fields mean as far as the scale goes, or None.
        adapters: by the names of the linears.
        checksum: whether the weights are as they were saved; None without a checksum.
        refusal: what `load_adapter` would raise whatever the model; empty if it depends on the model alone.
    """

    fields: dict[str, Any] | None
    tensors: dict[str, Tensor] | None
    variant: Variant | None
    config: PeftConfig | None
    adapters: dict[str, Adapter]
    checksum: bool | None
    refusal: str

    def others(self) -> dict[str, Tensor]:
        """The tensors that belong to no adapter."""
        own = {key for adapter in self.adapters.values() for key in adapter.keys}
        shared = () if self.variant is None else self.variant.shared_keys
        return {key: tensor for key, tensor in (self.tensors or {}).items() if key not in own and key not in shared}


def contents(directory: Path) -> Contents:
    """Reads a directory as far as it can be read.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`, where neither the config nor the weights can be read.
        OSError: the directory cannot be listed.
    """
    found, refusal = look(directory), ""
    try:
        files = read_files(directory)
    except (OSError, ValueError) as error:
        if found.tensors is None and found.fields is None:
            raise
        refusal, fields, read = str(error), found.fields, found.tensors is not None
        config = _lenient(fields or {})
        variant, tensors, shared = _sorted(found, config)
    else:
        refusal, fields, read = why_not_load(files, str(directory / WEIGHTS)), files.fields, True
        config, variant, tensors, shared = files.config, VARIANTS[files.config.variant], files.tensors, files.shared
    adapters = {} if variant is None else dict(_adapters(variant, tensors, shared, config))
    return Contents(fields, tensors | shared if read else None, variant, config, adapters, found.checksum, refusal)


def _sorted(found: Look, config: PeftConfig | None) -> tuple[Variant | None, dict[str, Tensor], dict[str, Tensor]]:
    """The variant if it is known, the tensors by their names in the base model, and those of no single module."""
    named = {_name(key): tensor for key, tensor in (found.tensors or {}).items()}
    variant = VARIANTS[config.variant] if config else _variant_of(found.fields, named)
    if variant is None:
        return None, named, {}
    tensors = {plain_key(key, variant): tensor for key, tensor in named.items()}
    return variant, tensors, {key: tensors.pop(key) for key in variant.shared_keys if key in tensors}


def _name(key: str) -> str:
    return key.removeprefix(PREFIX if key.startswith(PREFIX) else SHARED_PREFIX)


def _lenient(fields: Mapping[str, Any]) -> PeftConfig | None:
    """What of a config that `parse_config` refuses can be understood: the variant, the ranks and the scales."""
    names = {*_OF_SCALE, *(flag for variant in VARIANTS.values() for flag in variant.peft.flags)}
    try:
        return parse_config({key: value for key, value in fields.items() if key in names} | {"target_modules": ["."]})
    except ValueError:
        return None


def _variant_of(fields: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Variant | None:
    """The variant of tensors whose config cannot be read, the one of the most parts if several would do."""
    if fields is not None and fields.get("peft_type") not in [None, *(v.peft.peft_type for v in VARIANTS.values())]:
        return None
    fitting = [
        variant for variant in VARIANTS.values() if modules_of(variant, (plain_key(k, variant) for k in tensors))
    ]
    return max(fitting, key=lambda variant: len(variant.parts), default=None)


def _adapters(
    variant: Variant, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor], config: PeftConfig | None
) -> Iterator[tuple[str, Adapter]]:
    for name in tqdm(modules_of(variant, tensors), disable=None, delay=3, desc="norms"):
        own = {part.attribute: f"{name}.{part.key}" for part in variant.parts if part.key is not None}
        parts = {attribute: tensors[key] for attribute, key in own.items()}
        sizes = sizes_of(variant, parts, shared)
        if sizes is None:
            continue
        for part, tensor in shares_of(variant, shared):
            parts[part.attribute] = tensor[tuple(slice(sizes.get(size)) for size in part.shape[: tensor.dim()])]
        scale = config.spec_of(name, sizes.get("rank")).scale if config is not None else None
        norm = _product_norm(variant, parts)
        yield name, Adapter(
            sizes.get("rank", 0), sizes.get("in_features"), sizes.get("out_features"), scale,
            norm if norm is None or scale is None else abs(scale) * norm,
            {part.attribute: norm_of(parts[part.attribute]) for part in variant.extra},
            tuple(own.values()),
        )  # fmt: skip


def _product_norm(variant: Variant, parts: Mapping[str, Tensor]) -> float | None:
    r"""The Frobenius norm of B A by Gram matrices of size rank: ``‖B A‖² = ⟨Bᵀ B, A Aᵀ⟩``, in float64."""
    try:
        a, b, *extra = (parts[part.attribute].double() for part in variant.parts)
        a, b = variant.factors(a, b, extra)
        return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()
    except (KeyError, RuntimeError):  # a part that is not stored, or of a dtype or shape that has no product
        return None


def norm_of(tensor: Tensor) -> float:
    """The norm of all entries in float64; NaN of a dtype that has none."""
    try:
        return torch.linalg.vector_norm(tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)).item()
    except RuntimeError:
        return float("nan")
