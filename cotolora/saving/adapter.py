"""Saves and loads adapters in PEFT's format, whole or not at all."""

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
from cotolora.groups import adapters, held_at, is_enabled, unwrap, why_not_pefts
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

# what PEFT puts before the names of the base model, and before those of tensors that belong to no module of it
PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
_ROOM = 1600  # characters of keys in a log line


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

    Of a mixture of experts, linears that PEFT would mistake for experts (those of dense blocks and of shared experts)
    stand in target_parameters by their weights; there PEFT wants a dropout of 0 and no DoRA.

    DoRA and HiRA are written as PEFT's. Adapters that started from W ("pissa", "olora") become plain LoRA of twice the
    rank and alpha (√2 times alpha with rsLoRA), for the base as it is; PEFT's own would change the base.

    A kill at any moment leaves a pair that `load_adapter` reads, the old one or the new one: the
    weights carry a copy of their config, and where a kill fell between the two renames, the new config
    still lies beside them under its temporary name. What of a config has no bearing on the result, such as
    base_model_name_or_path, the order of its fields and line ends, may be edited.

    Args:
        model: a model with adapters.
        directory: made if need be; other files in it are left alone.

    Raises:
        ValueError: the model has no enabled adapter or is one itself, its adapters are of more than one variant, one is
            in several places of the model, or the base weight or bias of one trains: the format has no place for these.
        OSError: the files cannot be written; the old ones are as they were.
    """
    write_files(collect(model), directory)


def write_files(files: AdapterFiles, directory: str | os.PathLike[str]) -> None:
    """Writes the pair, whole or not at all.

    Raises:
        ValueError: a tensor is on the meta device.
        OSError: the files cannot be written; the old ones are as they were.
    """
    tensors = {PREFIX + key: tensor for key, tensor in files.tensors.items()}
    shared = {SHARED_PREFIX + key: tensor for key, tensor in files.shared.items()}
    if unmade := [key for key, tensor in (files.tensors | files.shared).items() if tensor.is_meta]:
        raise ValueError(f"tensors to save must have memory; on the meta device are {listed(unmade)}")
    write(checks.path("directory", directory), files.fields, tensors | shared)


def collect(model: nn.Module) -> AdapterFiles:
    """What `save_adapter` writes, the tensors where they are.

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
    held = held_at(model)
    for name, layer in layers.items():
        if reason := why_not_pefts(held[layer]):
            raise ValueError(f"{name} {reason}")
    _shard_again(model)
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
    """The tensors of a layer by their keys in a file, for the base as it is."""
    parts = {part.attribute: _gathered(getattr(layer, part.attribute)) for part in variant.parts}
    if layer.init in FROM_WEIGHT:
        start = (_gathered(getattr(layer, name)) for name in ("lora_a0", "lora_b0"))
        parts["lora_a"], parts["lora_b"] = since_start(parts["lora_a"], parts["lora_b"], *start)
    parts = variant.saved(parts, layer.scale)
    return {part.key: parts[part.attribute] for part in variant.parts if part.key is not None}


def read_files(directory: str | os.PathLike[str]) -> AdapterFiles:
    """Reads what `save_adapter` or PEFT wrote.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`, of what does not depend on a model.
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
    """`key` without the end that PEFT adds where it holds a vector in a module: ``.weight``."""
    stem = key.removesuffix(".weight")
    ends = tuple(f".{part.key}" for part in variant.parts if part.key is not None)
    return stem if stem != key and stem.endswith(ends) else key


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], strict: bool = True) -> LoadResult:
    """Loads adapters that `save_adapter` or PEFT (LoRA, DoRA, HiRA) wrote.

    A model without adapters gets them first, as `inject` would make them, and is frozen but for them; on
    one with adapters, targets, variant, ranks and alphas must agree. Nothing is changed unless all of it fits.

    PEFT's modules_to_save are copies: where such a weight is tied to another in the model, and the file does not give
    both one value, it becomes a parameter of its own, which a warning says.

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
    return load_into(model, read_files(directory), source=str(Path(directory) / WEIGHTS), strict=strict)


def load_into(model: nn.Module, files: AdapterFiles, *, source: str, strict: bool = True) -> LoadResult:
    """`load_adapter` of what was read, or never lay on a disk; `source` names it in errors."""
    existing = adapters(model)
    checks.flag("strict", strict)
    if not existing:
        plain_model(model)  # raises before anything is said of names that are not the model's own
    _shard_again(model)
    fit = fitted(model, files, existing, source=source, strict=strict)
    if existing and fit.copies:
        keys, _, _, others = fit.copies[0]
        raise ValueError(
            f"{source}: modules_to_save takes {keys[0]}, whose trained copy is its own, and in the model it is tied to "
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
        logger.warning("%s: passed over %s, which %s", source, names, reason)
    for kind, keys in (("missing", fit.missing), ("unexpected", fit.unexpected)):
        if keys:
            logger.warning("%s: %s keys %s", source, kind, listed(keys, _ROOM))
    return LoadResult(fit.missing, fit.unexpected)


def fitted(
    model: nn.Module, files: AdapterFiles, existing: dict[str, CoToLoRALinear], *, source: str, strict: bool = True
) -> Fit:
    """How files fit `model`, whose adapters are `existing`. Changes nothing.

    Raises:
        ValueError: as `load_adapter`, of what the files and the model's modules decide.
    """
    try:
        fit = fit_files(unwrap(model), files, existing)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if strict and fit.unfit:
        names, reason = _by_reason(fit.unfit)[0]
        raise ValueError(f"{names} {reason}; strict=False passes over what {source} holds for such modules")
    if strict and (fit.missing or fit.unexpected):
        raise ValueError(
            f"{source} must hold exactly what {CONFIG} and the model call for; missing keys {listed(fit.missing)}, "
            f"unexpected keys {listed(fit.unexpected)}{why_not_renamed(unwrap(model), fit.unexpected)}; strict=False "
            "loads what fits"
        )
    return fit


def _by_reason(unfit: dict[str, str]) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = {}
    for name, reason in unfit.items():
        names.setdefault(reason, []).append(name)
    return [(first + (f" (and {some_of(others)})" if others else ""), r) for r, (first, *others) in names.items()]


def _trained(model: nn.Module, fit: Fit, files: AdapterFiles) -> set[nn.Parameter]:
    """The parameters besides the adapters that trained when the files were saved."""
    # all of what we saved did; of what PEFT saved, modules_to_save did
    trained = (target for key, target in fit.plain.items() if files.ours or files.config.saves(key))
    # others cannot have a gradient; and of those that share memory one is enough
    able = (t for t in trained if isinstance(t, nn.Parameter) and (t.is_floating_point() or t.is_complex()))
    first: dict[Hashable, nn.Parameter] = {}
    for parameter in able:
        first.setdefault(memory(parameter), parameter)
    return set(first.values())


def trained_outside_adapters(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """What trains outside the adapters, with buffers beside it, and the modules that PEFT can find by name."""
    tensors: dict[str, Tensor] = {}
    modules = []
    places = Places(model)
    # PEFT makes a copy for each place; inside a module of several names, one place has several names too
    named = {places.slot(name): name for name in reversed(places.modules)}
    variants = {layer.variant for layer in adapters(model).values()}
    # what shares its memory with something that trains changes too
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
                    f"model must not train the base of an adapter; {name}.{trained[0]} requires grad, or what "
                    "shares its memory does"
                )
        elif trained:
            frozen = set(own) - set(trained)
            tensors |= {join_names(name, key): t for key, t in own_state(module).items() if key not in frozen}
            alone = name and not frozen and not list(module.children())
            if alone and all(is_unambiguous(name, places.modules, VARIANTS[variant]) for variant in variants):
                modules.append(name)
    return tensors, modules


def _shard_again(model: nn.Module) -> None:
    """Ends what an evaluation leaves under FSDP2: whole copies in the parameters' places, where writing is lost."""
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def _gathered(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)  # a DTensor
    return (tensor if gather is None else gather()).detach()
