"""Saves and loads adapters in PEFT's format, completely or not at all."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Hashable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from cotolora import checks
from cotolora.groups import adapters, held_at, is_enabled, unwrap, why_not_in_peft
from cotolora.inject import install, plain_model
from cotolora.linear import CoToLoRALinear
from cotolora.matching import warn_of_idle_keys
from cotolora.saving.files import CONFIG, WEIGHTS, read, write
from cotolora.saving.filling import fill, untied
from cotolora.saving.fitting import AdapterFiles, Fit, fit_files, why_not_fill
from cotolora.saving.old_names import why_not_renamed
from cotolora.saving.peft_config import is_same_config, is_unambiguous, make_config, parse_config
from cotolora.saving.places import Places, join_names, memory, own_state, superseded
from cotolora.variants import VARIANTS
from cotolora.variants.base import FROM_WEIGHT, Variant
from cotolora.variants.starts import since_start
from cotolora.wording import listed, shown, some_of

logger = logging.getLogger("cotolora")

# PEFT's prefixes of names in the base model, and of tensors that belong to no module of it
PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
_ROOM = 1600  # characters of keys in a log line


class LoadResult(NamedTuple):
    """Keys that did not fit, without PEFT's prefix ``base_model.model.``; empty unless ``strict=False``."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the enabled adapters, and all other trained parameters, as PEFT would: a config and a safetensors file.

    Modules that train in full are listed in PEFT's modules_to_save. Other trained parameters (a bare parameter, a
    single bias, a module whose name matches others in PEFT as well) are stored under their own names, where
    PEFT finds them too. Disabled (pruned) adapters are left out.

    Name components of DDP, compile and checkpoint wrappers are dropped. Sharded parameters are gathered, so in a
    distributed run every rank must call this; rank 0 writes.

    In a mixture of experts, linears that PEFT would mistake for experts (those of dense blocks and of shared experts)
    are listed in target_parameters by their weights; for these PEFT requires a dropout of 0 and no DoRA.

    DoRA and HiRA are written as in PEFT. Adapters that were initialised from W ("pissa", "olora") are written as plain
    LoRA of twice the rank and alpha (√2 times alpha with rsLoRA) for the unchanged base; PEFT's own would change it.

    If the process is killed at any moment, `load_adapter` can read the pair, either the old or the new one: the
    weights contain a copy of their config, and after a kill between the two renames the new config still exists next
    to them under its temporary name. Parts of a config that do not affect the result may be edited, such as
    base_model_name_or_path, the order of its fields and line ends.

    Args:
        model: a model with adapters.
        directory: created if it does not exist; other files in it are not changed.

    Raises:
        TypeError: `model` is not a module, or `directory` is not a path.
        ValueError: the model has no enabled adapter or is one itself, its adapters have more than one variant, one is
            in several places of the model, or the base weight or bias of one trains: the format cannot hold these.
        OSError: the files cannot be written; the old ones are unchanged.
    """
    write_files(collect(model), directory)


def write_files(files: AdapterFiles, directory: str | os.PathLike[str]) -> None:
    """Writes both files, completely or not at all.

    Raises:
        ValueError: a tensor is on the meta device.
        OSError: the files cannot be written; the old ones are unchanged.
    """
    tensors = {PREFIX + key: tensor for key, tensor in files.tensors.items()}
    shared = {SHARED_PREFIX + key: tensor for key, tensor in files.shared.items()}
    if unmade := [key for key, tensor in (files.tensors | files.shared).items() if tensor.is_meta]:
        raise ValueError(f"tensors to save must have memory; on the meta device are {listed(unmade)}")
    write(checks.path("directory", directory), files.fields, tensors | shared)


def collect(model: nn.Module) -> AdapterFiles:
    """The content that `save_adapter` writes, with the tensors on their present devices.

    Sharded parameters are gathered, so every rank must call this.

    Raises:
        ValueError: as `save_adapter`.
    """
    layers = {name: layer for name, layer in adapters(model).items() if is_enabled(layer)}
    if not layers:
        raise ValueError(f"model must have enabled adapters to save; {type(model).__name__} has none")
    model = unwrap(model)
    if model in layers.values():
        raise ValueError("model must hold adapters; it is one itself and has no name to save it under")
    held = held_at(model)
    for name, layer in layers.items():
        if reason := why_not_in_peft(held[layer]):
            raise ValueError(f"{name} {reason}")
    _reshard(model)
    trained, modules = trained_outside_adapters(model)
    fields = make_config(model, layers, modules)
    config = parse_config(fields)
    variant = VARIANTS[config.variant]
    tensors = {key: _gathered(tensor) for key, tensor in trained.items()}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in _stored(layer, variant).items()}
    shared = {key: _gathered(tensor) for key, tensor in variant.saved_shared(layers).items()}
    return AdapterFiles(tensors, shared, fields, config, ours=True)


def _stored(layer: CoToLoRALinear, variant: Variant) -> dict[str, Tensor]:
    """The tensors of a layer by their keys in a file, for the unchanged base."""
    parts = {part.attribute: _gathered(getattr(layer, part.attribute)) for part in variant.parts}
    if layer.init in FROM_WEIGHT:
        start = (_gathered(getattr(layer, name)) for name in ("lora_a0", "lora_b0"))
        parts["lora_a"], parts["lora_b"] = since_start(parts["lora_a"], parts["lora_b"], *start)
    parts = variant.saved(parts, layer.scale)
    return {part.key: parts[part.attribute] for part in variant.parts if part.key is not None}


def read_files(directory: str | os.PathLike[str]) -> AdapterFiles:
    """Reads the files that `save_adapter` or PEFT wrote.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`, for errors that do not depend on a model.
    """
    path = checks.path("directory", directory)
    pair = read(path, is_same_config)
    try:
        config = parse_config(pair.fields)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
    variant = VARIANTS[config.variant]
    tensors, shared = {}, {}
    for key, tensor in pair.tensors.items():
        if key.startswith(PREFIX):
            if (plain := plain_key(key.removeprefix(PREFIX), variant)) in tensors:
                raise ValueError(f"{path / WEIGHTS} must hold each tensor once; {shown(key)} is another of one")
            tensors[plain] = tensor
        elif (rest := key.removeprefix(SHARED_PREFIX)) != key and rest in variant.shared_keys:
            shared[rest] = tensor
        else:
            raise ValueError(f"{path / WEIGHTS} must hold keys that begin with {PREFIX!r}; got {shown(key)}")
    for key in superseded(tensors, config.saves):
        del tensors[key]
    return AdapterFiles(tensors, shared, pair.fields, config, pair.ours)


def plain_key(key: str, variant: Variant) -> str:
    """`key` without the ending ``.weight`` that PEFT adds to a vector that it holds in a module."""
    stem = key.removesuffix(".weight")
    ends = tuple(f".{part.key}" for part in variant.parts if part.key is not None)
    return stem if stem != key and stem.endswith(ends) else key


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], strict: bool = True) -> LoadResult:
    """Loads adapters that `save_adapter` or PEFT (LoRA, DoRA, HiRA, VeRA) wrote.

    Adapters are first put into a model that has none, as `inject` does, and everything else is frozen; in a model
    with adapters, targets, variant, ranks and alphas must agree. The model is not changed unless everything fits.

    PEFT's modules_to_save are copies: if such a weight is tied to another one in the model, and the file has different
    values for the two, it becomes a separate parameter and a warning says so.

    Args:
        model: the base model, or one with adapters.
        directory: contains ``adapter_config.json`` and ``adapter_model.safetensors``.
        strict: with False, adapters may be missing from the file (they stay as they are) or from the
            model (they are ignored); a warning lists them.

    Returns:
        the missing and the unexpected keys, as in `nn.Module.load_state_dict`.

    Raises:
        TypeError: `model` is not a module, or `directory` is not a path.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the two do not belong together, the config has a setting that is not
            supported and would change the result, or the adapter does not fit the model.
    """
    return load_into(model, read_files(directory), source=str(Path(directory) / WEIGHTS), strict=strict)


def load_into(model: nn.Module, files: AdapterFiles, *, source: str, strict: bool = True) -> LoadResult:
    """`load_adapter` for the content of files in memory; `source` is its name in errors."""
    existing = adapters(model)
    checks.flag("strict", strict)
    if not existing:
        plain_model(model)  # raises first, because with PEFT's modules inside the names would not be the model's own
    _reshard(model)
    fit = fitted(model, files, existing, source=source, strict=strict)
    if existing and fit.copies:
        keys, _, _, others = fit.copies[0]
        raise ValueError(
            f"{source}: modules_to_save makes {keys[0]} a separate trained copy, but in the model it is tied to "
            f"{some_of(others)}; load onto a model without adapters, where it is untied, or untie it before inject"
        )
    if not existing and not fit.specs:
        raise ValueError(f"{source} must hold an adapter that fits the model; it holds none")
    if existing:
        for name, spec in fit.specs.items():
            if reason := why_not_fill(existing[name], spec):
                raise ValueError(f"{name} {reason}")
    named = [files.config.pattern_name(name) for name in fit.wanted]
    warn_of_idle_keys(files.config.rank_pattern, files.config.alpha_pattern, named)
    with ExitStack() as undo:
        fit = untied(fit, undo)
        if existing:
            fill(existing, fit, files, undo)
        else:
            install(model, fit.specs, _trained(model, fit, files), lambda layers: fill(layers, fit, files, undo))
        undo.pop_all()
    for names, reason in _by_reason(fit.unfit):
        logger.warning("%s: ignored %s, which %s", source, names, reason)
    for kind, keys in (("missing", fit.missing), ("unexpected", fit.unexpected)):
        if keys:
            logger.warning("%s: %s keys %s", source, kind, listed(keys, _ROOM))
    return LoadResult(fit.missing, fit.unexpected)


def fitted(
    model: nn.Module, files: AdapterFiles, existing: dict[str, CoToLoRALinear], *, source: str, strict: bool = True
) -> Fit:
    """Matches `files` with `model`, whose adapters are `existing`. Changes nothing.

    Raises:
        ValueError: as `load_adapter`, for errors that follow from the files and the model's modules.
    """
    try:
        fit = fit_files(unwrap(model), files, existing)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if strict and fit.unfit:
        names, reason = _by_reason(fit.unfit)[0]
        raise ValueError(f"{names} {reason}; strict=False ignores the tensors of {source} for such modules")
    if strict and (fit.missing or fit.unexpected):
        raise ValueError(
            f"{source} must hold exactly the keys that follow from {CONFIG} and the model; missing keys "
            f"{listed(fit.missing)}, unexpected keys {listed(fit.unexpected)}"
            f"{why_not_renamed(unwrap(model), fit.unexpected)}; strict=False loads the keys that fit"
        )
    return fit


def _by_reason(unfit: dict[str, str]) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = {}
    for name, reason in unfit.items():
        names.setdefault(reason, []).append(name)
    return [(first + (f" (and {some_of(others)})" if others else ""), r) for r, (first, *others) in names.items()]


def _trained(model: nn.Module, fit: Fit, files: AdapterFiles) -> set[nn.Parameter]:
    """The parameters outside the adapters that were trained when the files were saved."""
    # everything that this library saved was trained; in PEFT's files only modules_to_save was
    trained = (target for key, target in fit.plain.items() if files.ours or files.config.saves(key))
    # other dtypes cannot have a gradient; of parameters that share memory one is enough
    able = (t for t in trained if isinstance(t, nn.Parameter) and (t.is_floating_point() or t.is_complex()))
    first: dict[Hashable, nn.Parameter] = {}
    for parameter in able:
        first.setdefault(memory(parameter), parameter)
    return set(first.values())


def trained_outside_adapters(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The trained tensors outside the adapters, with buffers next to them, and modules that PEFT can find by name."""
    tensors: dict[str, Tensor] = {}
    modules = []
    places = Places(model)
    # PEFT makes one copy per place; a place inside a module with several names has several names too
    named = {places.slot(name): name for name in reversed(places.modules)}
    variants = {layer.variant for layer in adapters(model).values()}
    # a tensor that shares memory with a trained one changes as well
    changing = {memory(tensor) for tensor in places.state.values() if tensor.requires_grad}
    for name in reversed(named.values()):
        module = places.modules[name]
        own = dict(module.named_parameters(recurse=isinstance(module, CoToLoRALinear)))
        if isinstance(module, CoToLoRALinear) and module.merged:
            own["weight"] = module._base_weight()
        trained = [key for key, parameter in own.items() if parameter.requires_grad or memory(parameter) in changing]
        if isinstance(module, CoToLoRALinear):
            parts = {part.attribute for part in VARIANTS[module.variant].parts}
            if trained := [key for key in trained if key not in parts]:
                raise ValueError(
                    f"model must not train the base of an adapter; {name}.{trained[0]} requires grad, or a tensor that "
                    "shares its memory does"
                )
        elif trained:
            frozen = set(own) - set(trained)
            tensors |= {join_names(name, key): t for key, t in own_state(module).items() if key not in frozen}
            alone = name and not frozen and not list(module.children())
            if alone and all(is_unambiguous(name, places.modules, VARIANTS[variant]) for variant in variants):
                modules.append(name)
    return tensors, modules


def _reshard(model: nn.Module) -> None:
    """Restores FSDP2's sharded parameters after an evaluation, which leaves whole copies that lose any writes."""
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def _gathered(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)  # a DTensor
    return (tensor if gather is None else gather()).detach()
