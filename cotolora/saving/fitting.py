"""Matches a pair of files with a model: the adapters and tensors they fill, and missing and unexpected keys."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cotolora.bases import features, is_conv1d, is_dense, place_of, why_not_adaptable
from cotolora.groups import held_at, plain_name, why_not_in_peft
from cotolora.linear import CoToLoRALinear
from cotolora.saving.experts import weight_of
from cotolora.saving.old_names import renamed, why_not_renamed
from cotolora.saving.peft_config import PeftConfig
from cotolora.saving.places import Copy, Places, base_tensors, inside_bases, is_same, memory
from cotolora.spec import AdapterSpec
from cotolora.targets import match_linears, why_not_target
from cotolora.variants import VARIANTS
from cotolora.variants.base import FROM_WEIGHT, Sizes, Variant
from cotolora.wording import shown


class AdapterFiles(NamedTuple):
    """A pair of files in memory.

    tensors: the tensors by their names in the base model.
    shared: the tensors of `Variant.shared_keys`.
    fields: all fields of the config.
    config: the fields that matter for loading.
    ours: whether `save_adapter` wrote the files.
    """

    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]
    fields: dict[str, Any]
    config: PeftConfig
    ours: bool


class Fit(NamedTuple):
    """How files fit a model.

    tensors: the tensors of the files, by their names in the model.
    wanted: the modules that the config targets.
    unfit: targeted modules that cannot be adapted, with the reasons.
    specs: the settings of the adapters to fill, by module.
    parts: the tensors of these adapters in the files, by module and attribute.
    plain: the model's own tensors to fill, by key.
    bases: tensors of the bases of adapters to fill, by key.
    copies: tensors of `plain` that must be untied before they are filled.
    missing, unexpected: keys.
    """

    tensors: dict[str, Tensor]
    wanted: list[str]
    unfit: dict[str, str]
    specs: dict[str, AdapterSpec]
    parts: dict[str, dict[str, Tensor]]
    plain: dict[str, Tensor]
    bases: dict[str, Tensor]
    copies: list[Copy]
    missing: list[str]
    unexpected: list[str]


def fit_files(model: nn.Module, files: AdapterFiles, existing: dict[str, CoToLoRALinear]) -> Fit:
    """Matches `files` with `model`, whose adapters are `existing`.

    Raises:
        ValueError: the config targets no module of the model, or a tensor has the wrong shape or kind.
    """
    config = files.config
    variant = VARIANTS[config.variant]
    places = Places(model)
    linears = _linears(model)
    _check_parameters(model, config, linears)
    wanted, unfit = _wanted(model, config, linears, existing)
    if not wanted and not unfit:
        raise ValueError(
            f"target_modules {shown(config.targets)} must match linear modules of the model; they match none"
            + why_not_renamed(model, files.tensors)
        )

    known = {*_keys(variant, wanted), *_keys(variant, existing), *places.state}
    tensors = renamed(model, files.tensors, lambda key: key in known or bool(base_tensors(linears, [key])))
    here = [name for name in wanted if not existing or name in existing]
    around = tuple(f"{name}." for name in here)
    plain = {key: tensor for key, tensor in places.state.items() if key in tensors and not key.startswith(around)}
    bases = base_tensors({name: linears[name] for name in here}, tensors)
    copies, without = places.copies(config.wraps, tensors)
    missing = {*_keys(variant, wanted), *_keys(variant, existing), *without} - set(tensors)
    unexpected = set(tensors) - set(_keys(variant, here)) - set(plain) - set(bases)
    whole = [name for name in here if missing.isdisjoint(_keys(variant, [name]))]
    specs = {name: config.spec_of(name, _stored_rank(variant, name, tensors)) for name in whole}
    parts = _parts_of_files(files._replace(tensors=tensors), variant, specs, linears)
    for key, target in (plain | bases).items():
        check_tensor(key, tensors[key], target.dtype, tuple(target.shape), target.device)
    _check_ties(tensors, plain | bases, copies)
    return Fit(tensors, wanted, unfit, specs, parts, plain, bases, copies, sorted(missing), sorted(unexpected))


def why_not_fill(layer: CoToLoRALinear, spec: AdapterSpec) -> str:
    """Why an adapter of `spec` cannot be written into `layer`; empty if it can."""
    if layer.variant != spec.variant:
        return f"must have the variant of the file, {spec.variant!r}; the model's is {layer.variant!r}"
    if layer.init in FROM_WEIGHT:
        return (
            f"must not have an init that depends on W, because files do not hold its initial values; the model's is "
            f"{layer.init!r} (eject the adapters and load onto the base)"
        )
    # for files without a scale the layer's scale is used, which must not be 0, because loading divides by it
    scaled = VARIANTS[spec.variant].peft.scaled
    if layer.rank != spec.rank or not (math.isclose(layer.scale, spec.scale) if scaled else layer.scale):
        return (
            f"must have the rank and scale of the file, {spec.rank} and {spec.scale:g}; "
            f"the model's are {layer.rank} and {layer.scale:g}"
        )
    if layer.merged and isinstance(layer.enabled, Tensor) and layer.enabled.dim() > 0:
        return "must not be merged while enabled is a row mask; unmerge it to load"
    return ""


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are adapters or can become adapters, by name."""
    inside = inside_bases(model)
    return {
        plain_name(raw_name): module
        for raw_name, module in model.named_modules()
        if module not in inside and (isinstance(module, (CoToLoRALinear, nn.Linear)) or not why_not_adaptable(module))
    }


def _check_parameters(model: nn.Module, config: PeftConfig, linears: dict[str, nn.Module]) -> None:
    """Raises ValueError if target_parameters matches anything but the weight of an ``nn.Linear``."""
    for raw_name, _ in model.named_parameters(remove_duplicate=False) if config.parameters else ():
        name, _, attribute = plain_name(raw_name).rpartition(".")
        if not config.takes_parameter(plain_name(raw_name)):
            continue
        module = linears.get(name)
        if isinstance(module, CoToLoRALinear):
            plain = module.base is None and not module.fan_in_fan_out
        else:
            plain = module is not None and is_dense(module) and not is_conv1d(module)
        if attribute != "weight" or not plain:
            raise ValueError(
                f"target_parameters must match only weights of nn.Linear; it matches {plain_name(raw_name)} (adapters "
                "of other parameters, such as experts that share one parameter, are not supported)"
            )


def _check_ties(tensors: dict[str, Tensor], targets: dict[str, Tensor], copies: list[Copy]) -> None:
    """Raises ValueError if a file has different values for what is one tensor in the model."""
    places: dict[Hashable, str] = {}
    own = {key: number for number, copy in enumerate(copies) for key in copy.keys}
    for key, target in targets.items():
        first = places.setdefault(own.get(key, memory(target)), key)
        if first != key and not is_same(tensors[first], tensors[key]):
            raise ValueError(
                f"{first} and {key} are tied in the model and must be equal; the file has different values for them"
            )


def _wanted(
    model: nn.Module, config: PeftConfig, linears: dict[str, nn.Module], existing: dict[str, CoToLoRALinear]
) -> tuple[list[str], dict[str, str]]:
    """The modules that the config targets and that can be adapted, and the other targets with the reasons."""
    unfit: dict[str, str] = {}
    if isinstance(config.targets, str) and config.targets.lower() == "all-linear":
        wanted = list(existing or match_linears(model, config.targets, config.exclude, config.modules_to_save, unfit))
        wanted += [name for name in linears if name not in wanted and config.takes_parameter(weight_of(name))]
    else:
        wanted = []
        for name in linears:
            if config.takes(name) and not name.startswith(tuple(f"{other}." for other in wanted)):
                wanted.append(name)
        modules = dict(model.named_modules(remove_duplicate=False))
        raw_names: dict[nn.Module, list[str]] = {}
        for raw_name, module in modules.items():
            raw_names.setdefault(module, []).append(raw_name)
        for name in wanted:
            if name not in existing and (reason := why_not_target(raw_names[linears[name]], modules)):
                unfit[name] = reason
    held = held_at(model)
    for name in wanted:
        if reason := why_not_in_peft(held.get(linears[name], ())):
            unfit[name] = reason
    return [name for name in wanted if name not in unfit], unfit


def _keys(variant: Variant, names: Iterable[str]) -> list[str]:
    return [f"{name}.{part.key}" for name in names for part in variant.parts if part.key is not None]


def _stored_rank(variant: Variant, name: str, tensors: dict[str, Tensor]) -> int | None:
    for part in variant.parts:
        if part.key is not None and "rank" in part.shape:
            shape, place = tensors[f"{name}.{part.key}"].shape, part.shape.index("rank")
            return shape[place] if place < len(shape) else None
    return None


def _parts_of_files(
    files: AdapterFiles, variant: Variant, specs: dict[str, AdapterSpec], linears: dict[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each adapter by attribute, including its part of tensors that all modules share."""
    places = {name: _place(linears[name]) for name in specs}
    sizes = {name: Sizes(spec.rank, *places[name][0]) for name, spec in specs.items()}
    own = {
        name: {part.attribute: files.tensors[f"{name}.{part.key}"] for part in variant.parts if part.key is not None}
        for name in specs
    }
    for name in specs:
        _check_parts(name, variant, own[name], sizes[name], places[name][1])
    spread = variant.spread_shared(files.shared, files.config.fields, sizes)
    for name, shares in spread.items():
        _check_parts(name, variant, shares, sizes[name], places[name][1])
    return {name: own[name] | spread.get(name, {}) for name in specs}


def _check_parts(name: str, variant: Variant, tensors: dict[str, Tensor], sizes: Sizes, device: torch.device) -> None:
    for part in variant.parts:
        if part.attribute in tensors:
            key, shape = f"{name}.{part.key or part.attribute}", part.sizes(**sizes._asdict())
            check_tensor(key, tensors[part.attribute], torch.float32, shape, device)


def _place(linear: nn.Module) -> tuple[tuple[int, int], torch.device]:
    """in_features and out_features of a module, and the device of its adapter."""
    if isinstance(linear, CoToLoRALinear):
        return (linear.in_features, linear.out_features), linear.lora_a.device
    return features(linear), place_of(linear)[0]


def check_tensor(key: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless a tensor of a file can be written into one with this dtype, shape and device."""
    if device.type == "meta":
        raise ValueError(f"{key} must have memory in the model to be loaded; it is on the meta device")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key} must be of shape {shown(shape)}; the file holds {shown(tuple(tensor.shape))}")
    if tensor.dtype.is_floating_point != dtype.is_floating_point or tensor.is_complex() != dtype.is_complex:
        raise ValueError(f"{key} must be of a dtype like {dtype}; the file holds {tensor.dtype}")
