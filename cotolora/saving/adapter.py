"""Saves and loads adapters in PEFT's format, whole or not at all."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cotolora.bases import features, place_of, why_not_adaptable
from cotolora.groups import adapters, is_enabled, plain_name, unwrap
from cotolora.inject import inject, match_linears
from cotolora.linear import CoToLoRALinear
from cotolora.matching import matches
from cotolora.saving.files import CONFIG, WEIGHTS, read_config, read_weights, write
from cotolora.saving.layers import KEYS, fill, plain_key, shapes, why_not
from cotolora.saving.layers import tensors as tensors_of
from cotolora.saving.peft_config import PeftConfig, describe, exactly, is_alone, just, parse

logger = logging.getLogger("cotolora")


class LoadResult(NamedTuple):
    """What did not fit: the file's keys without PEFT's ``base_model.model.``; empty unless ``strict=False``."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the enabled adapters, and whatever else trains, as PEFT would: a config and a safetensors file.

    Modules that train in full are PEFT's modules_to_save. Other parameters that train (a bare parameter, a
    bias alone, a module whose name PEFT would also take for another) are stored beside them under their own
    names, where PEFT finds them too. Disabled (pruned) adapters are left out.

    The names of DDP, compile and checkpoint wrappers are dropped; sharded parameters are gathered, so in a
    distributed run every rank must call this; rank 0 writes.

    DoRA and HiRA are written as PEFT's. Adapters that started from W ("pissa", "olora") become plain LoRA of twice the
    rank and alpha (√2 times alpha with rsLoRA), for the base as it is; PEFT's own would change the base.

    A kill at any moment leaves a pair that `load_adapter` reads, the old one or the new one: the
    weights carry the hash of their config, and where a kill fell between the two renames, the new config
    still lies beside them under its temporary name.

    Args:
        model: a model with adapters.
        directory: made if need be; other files in it are left alone.

    Raises:
        ValueError: the model has no enabled adapter or is one itself, its adapters are of more than one variant, or
            the base weight or bias of an adapter trains: the format has no place for these.
        OSError: the files cannot be written; the old ones are as they were.
    """
    tensors, fields = collect(model)
    write(Path(directory), fields, tensors)


def collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_adapter` writes: tensors by their names in the base model, where they are, and a config.

    Sharded parameters are gathered, so every rank must call this.

    Raises:
        ValueError: as `save_adapter`.
    """
    layers = {name: layer for name, layer in adapters(model).items() if is_enabled(layer)}
    if not layers:
        raise ValueError(f"model must have enabled adapters to save; {type(model).__name__} has none")
    model = unwrap(model)
    if model in layers.values():
        raise ValueError("model must hold adapters; it is one itself, which has no name to save it by")
    _shard_again(model)
    besides, modules = trained_besides(model)
    fields = describe(model, layers, modules)
    tensors = {key: _gathered(tensor) for key, tensor in besides.items()}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in tensors_of(layer, _gathered).items()}
    return tensors, fields


class Saved(NamedTuple):
    """A pair of files as it was read."""

    tensors: dict[str, Tensor]  # by their names in the base model
    fields: dict[str, Any]  # of the config
    config: PeftConfig  # what of them bears on loading
    ours: bool  # whether `save_adapter` wrote it


def read(directory: str | os.PathLike[str]) -> Saved:
    """Reads what `save_adapter` or PEFT wrote.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`, of what does not depend on a model.
    """
    path = Path(directory)
    found, config_hash = read_weights(path)
    fields = read_config(path, config_hash)
    try:
        config = parse(fields)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: {error}") from None
    tensors = {plain_key(key): tensor for key, tensor in found.items()}
    return Saved(tensors, fields, config, config_hash is not None)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], strict: bool = True) -> LoadResult:
    """Loads adapters that `save_adapter` or PEFT (LoRA, DoRA, HiRA) wrote.

    A model without adapters gets them first, as `inject` would make them, and is frozen but for them; on
    one with adapters, targets, variant, ranks and alphas must agree. Nothing is changed unless all of it fits.

    Args:
        model: the base model, or one with adapters.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        strict: False lets adapters be missing from the file (they stay as they are) or from the
            model (they are passed over), and logs which.

    Returns:
        the keys that were missing or unexpected, as `nn.Module.load_state_dict` does.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the two do not belong together, the config asks for something that
            is not supported and would change the result, or the adapter does not fit the model.
    """
    return place(model, read(directory), source=str(Path(directory) / WEIGHTS), strict=strict)


def place(model: nn.Module, saved: Saved, *, source: str, strict: bool = True) -> LoadResult:
    """`load_adapter` of what was read, or never lay on a disk; `source` names it in errors."""
    tensors, config = saved.tensors, saved.config
    existing = adapters(model)
    _shard_again(model)
    fit = _fit(unwrap(model), config, existing, tensors)
    if strict and (fit.missing or fit.unexpected):
        raise ValueError(
            f"{source} must hold exactly what {CONFIG} and the model call for; "
            f"missing keys {fit.missing}, unexpected keys {fit.unexpected}"
        )
    if existing:
        _check_agreement(existing, config, fit.ranks)
        layers = existing
    elif not fit.ranks:
        raise ValueError(f"{source} must hold an adapter that fits the model; it holds none")
    else:
        # what we saved besides the adapters did train; of what PEFT saved, modules_to_save did
        trained = [key for key in fit.plain if saved.ours or _is_saved(key, config)]
        parameters = {plain_name(name) for name, _ in unwrap(model).named_parameters()}
        layers = inject(
            model,
            just(fit.ranks),
            rank=config.rank,
            alpha=config.lora_alpha,
            rank_pattern={exactly(name): rank for name, rank in fit.ranks.items() if rank != config.rank},
            alpha_pattern={
                exactly(name): alpha
                for name, rank in fit.ranks.items()
                if (alpha := _alpha(config, name, rank)) != config.lora_alpha
            },
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            variant=config.variant,
            trainable=just(parameters & set(trained)) or (),
        )
    merged = [layer for layer in layers.values() if layer.merged]
    for layer in merged:
        layer.unmerge()
    for name in fit.ranks:
        fill(layers[name], {key: tensors[f"{name}.{key}"] for key in KEYS[config.variant]}, _fill)
    for key, target in fit.plain.items():
        _fill(target, tensors[key])
    for layer in merged:
        layer.merge()
    if fit.missing or fit.unexpected:
        logger.warning("%s: missing keys %s, unexpected keys %s", source, fit.missing, fit.unexpected)
    return LoadResult(fit.missing, fit.unexpected)


def trained_besides(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """What trains besides the adapters, with buffers beside it, and the modules that PEFT can find by name."""
    tensors: dict[str, Tensor] = {}
    modules = []
    inside = _inside_adapters(model)
    named = {plain_name(name): module for name, module in model.named_modules() if module not in inside}
    for name, module in named.items():
        own = dict(module.named_parameters(recurse=isinstance(module, CoToLoRALinear)))
        trained = [key for key, parameter in own.items() if parameter.requires_grad]
        if isinstance(module, CoToLoRALinear):
            if trained := [key for key in trained if not key.startswith("lora_")]:
                raise ValueError(f"model must not train the base of an adapter; {name}.{trained[0]} requires grad")
        elif trained:
            frozen = set(own) - set(trained)
            tensors |= {_join(name, key): t for key, t in _own_state(module).items() if key not in frozen}
            if name and not frozen and not list(module.children()) and is_alone(name, named):
                modules.append(name)
    return tensors, modules


def _inside_adapters(model: nn.Module) -> set[nn.Module]:
    """The modules that adapters call as their base, with all that these hold."""
    bases = (layer.base for layer in adapters(model).values() if layer.base is not None)
    return {module for base in bases for module in base.modules()}


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of `module` itself."""
    kept = (item for item in module.named_buffers(recurse=False) if item[0] not in module._non_persistent_buffers_set)
    return dict([*module.named_parameters(recurse=False), *kept])


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _shard_again(model: nn.Module) -> None:
    """Ends what an evaluation leaves under FSDP2: whole copies in the parameters' places, where writing is lost."""
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def _gathered(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)  # a DTensor
    return (tensor if gather is None else gather()).detach()


class _Fit(NamedTuple):
    """How a file lies on a model."""

    ranks: dict[str, int]  # of the adapters to load
    plain: dict[str, Tensor]  # the model's own tensors to load, by the file's keys
    missing: list[str]
    unexpected: list[str]


def _fit(model: nn.Module, config: PeftConfig, existing: dict[str, CoToLoRALinear], tensors: dict[str, Tensor]) -> _Fit:
    """What file, config and model agree on, and the keys that are missing or too many.

    Raises:
        ValueError: the config takes nothing of the model, or a tensor has the wrong shape or kind.
    """
    linears: dict[str, nn.Module] = {}
    state: dict[str, Tensor] = {}
    inside = _inside_adapters(model)
    for raw_name, module in model.named_modules():
        if module in inside:
            continue
        name = plain_name(raw_name)
        if isinstance(module, (CoToLoRALinear, nn.Linear)) or not why_not_adaptable(module):
            linears[name] = module
        if not isinstance(module, CoToLoRALinear):
            state |= {_join(name, key): tensor for key, tensor in _own_state(module).items()}
    if isinstance(config.targets, str) and config.targets.lower() == "all-linear":
        wanted = list(existing or match_linears(model, config.targets, config.exclude, config.modules_to_save))
    else:
        wanted = []
        for name in linears:
            if config.takes(name) and not name.startswith(tuple(f"{other}." for other in wanted)):
                wanted.append(name)
    if not wanted:
        raise ValueError(f"target_modules {config.targets!r} must take linear modules of the model; they take none")

    here = [name for name in wanted if not existing or name in existing]
    bases = tuple(f"{name}." for name in here)
    plain = {key: tensor for key, tensor in state.items() if key in tensors and not key.startswith(bases)}
    saved = {key for key in state if _is_saved(key, config)}
    variant = config.variant
    missing = ({*_keys(variant, wanted), *_keys(variant, existing)} | saved) - set(tensors)
    unexpected = set(tensors) - set(_keys(variant, here)) - set(plain)
    ranks = {name: _rank(config, name, tensors) for name in here if not missing & set(_keys(variant, [name]))}
    for name, rank in ranks.items():
        out_features, in_features, device = _sizes(name, linears[name])
        for key, shape in zip(_keys(variant, [name]), shapes(variant, rank, in_features, out_features), strict=True):
            _check_tensor(key, tensors[key], torch.float32, shape, device)
    for key, target in plain.items():
        _check_tensor(key, tensors[key], target.dtype, tuple(target.shape), target.device)
    return _Fit(ranks, plain, sorted(missing), sorted(unexpected))


def _rank(config: PeftConfig, name: str, tensors: dict[str, Tensor]) -> int:
    # PEFT (as of 0.21) writes a rank_pattern of HiRA that it has not followed
    unfollowed = config.variant == "hira" and tensors[f"{name}.hira_A"].shape[:1] == (config.rank,)
    return config.rank if unfollowed else config.rank_of(name)


def _alpha(config: PeftConfig, name: str, rank: int) -> float:
    # PEFT's HiRA has no scale
    return rank if config.variant == "hira" else config.alpha_of(name)


def _keys(variant: str, names: Iterable[str]) -> list[str]:
    return [f"{name}.{key}" for name in names for key in KEYS[variant]]


def _is_saved(key: str, config: PeftConfig) -> bool:
    """Whether modules_to_save takes a module around the tensor `key`."""
    parts = key.split(".")[:-1]
    return any(matches(".".join(parts[: i + 1]), config.modules_to_save) for i in range(len(parts)))


def _sizes(name: str, linear: nn.Module) -> tuple[int, int, torch.device]:
    if isinstance(linear, CoToLoRALinear):
        return linear.out_features, linear.in_features, linear.lora_a.device
    if reason := why_not_adaptable(linear):
        raise ValueError(f"{name} must be a module that maps in_features to out_features; {reason}")
    in_features, out_features = features(linear)
    return out_features, in_features, place_of(linear)[0]


def _check_tensor(key: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if device.type == "meta":
        raise ValueError(f"{key} must have memory in the model to be loaded into; there it is on the meta device")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key} must be of shape {shape}; the file holds {tuple(tensor.shape)}")
    if tensor.dtype.is_floating_point != dtype.is_floating_point or tensor.is_complex() != dtype.is_complex:
        raise ValueError(f"{key} must be of a dtype like {dtype}; the file holds {tensor.dtype}")


def _check_agreement(existing: dict[str, CoToLoRALinear], config: PeftConfig, ranks: dict[str, int]) -> None:
    for name, rank in ranks.items():
        scale = _alpha(config, name, rank) / (math.sqrt(rank) if config.use_rslora else rank)
        if reason := why_not(existing[name], config.variant, rank, scale):
            raise ValueError(f"{name} {reason}")
    for name, layer in existing.items():
        if layer.merged and isinstance(layer.enabled, Tensor) and layer.enabled.dim() > 0:
            raise ValueError(f"{name} must not be merged while enabled is a row mask; unmerge it to load")


@torch.no_grad()
def _fill(target: Tensor, value: Tensor) -> None:
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)
