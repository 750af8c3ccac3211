"""Saves and loads adapters in PEFT's format, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from cotolora.groups import adapters, plain_name, unwrap
from cotolora.inject import inject, match_linears, matches
from cotolora.linear import CoToLoRALinear, is_conv1d
from cotolora.peft_config import PeftConfig, describe, exactly, parse

logger = logging.getLogger("cotolora")

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HASH = "cotolora_config_sha256"


class LoadResult(NamedTuple):
    """What did not fit, by the file's keys; both empty unless ``strict=False``."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the enabled adapters, and whatever else trains, as PEFT would: a config and a safetensors file.

    Disabled (pruned) adapters are left out. The names of DDP, compile and checkpoint wrappers are
    dropped; sharded parameters are gathered, so in a distributed run every rank must call this; rank 0 writes.

    A kill at any moment leaves a pair that `load_adapter` reads, the old one or the new one: the
    weights carry the hash of their config, and where a kill fell between the two renames, the new config
    still lies beside them under its temporary name.

    Args:
        model: a model with adapters.
        directory: made if need be; other files in it are left alone.

    Raises:
        ValueError: the model has no enabled adapter, or the base weight or bias of an adapter trains,
            for which the format has no place.
        OSError: the files cannot be written; the old ones are as they were.
    """
    layers = {name: layer for name, layer in adapters(model).items() if _enabled(layer)}
    if not layers:
        raise ValueError(f"model must have enabled adapters to save; {type(model).__name__} has none")
    model = unwrap(model)
    tensors, modules = _trained_besides(model)
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_a
        tensors[f"{name}.lora_B.weight"] = layer.lora_b
    gathered = {_PREFIX + key: _whole(tensor) for key, tensor in tensors.items()}
    config = json.dumps(describe(model, layers, modules), indent=2, sort_keys=True).encode()
    metadata = {"format": "pt", _HASH: hashlib.sha256(config).hexdigest()}
    _on_rank_zero(lambda: _write(Path(directory), config, serialize(gathered, metadata)))


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], strict: bool = True) -> LoadResult:
    """Loads adapters that `save_adapter` or PEFT (LoRA) wrote.

    A model without adapters gets them first, as `inject` would make them, and is frozen but for them; on
    one with adapters, targets, ranks and alphas must agree. Nothing is changed unless all of it fits.

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
    path = Path(directory)
    tensors, config_hash = _read_weights(path)
    config = _read_config(path, config_hash)
    model = unwrap(model)
    existing = adapters(model)
    ranks, missing, unexpected = _fit(model, config, existing, tensors)
    if strict and (missing or unexpected):
        raise ValueError(
            f"{path / WEIGHTS} must hold exactly what {CONFIG} and the model call for; "
            f"missing keys {missing}, unexpected keys {unexpected}"
        )
    extra = _check_plain(model, config, tensors, unexpected)
    if existing:
        _check_agreement(existing, config, ranks, strict)
        layers = existing
    else:
        layers = inject(
            model,
            "|".join(re.escape(name) for name in ranks),
            rank_pattern={exactly(name): rank for name, rank in ranks.items()},
            alpha_pattern={exactly(name): config.alpha_of(name) for name in ranks},
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            trainable=[*config.modules_to_save, *(key for key in extra if "." not in key)],
        )
    for name in ranks:
        layer, was_merged = layers[name], layers[name].merged
        layer.unmerge()
        _fill(layer.lora_a, tensors[f"{name}.lora_A.weight"])
        _fill(layer.lora_b, tensors[f"{name}.lora_B.weight"])
        if was_merged:
            layer.merge()
    for key, parameter in extra.items():
        _fill(parameter, tensors[key])
    if missing or unexpected:
        logger.warning("%s: missing keys %s, unexpected keys %s", path / WEIGHTS, missing, unexpected)
    return LoadResult(missing, unexpected)


def _enabled(layer: CoToLoRALinear) -> bool:
    enabled = layer.enabled
    return bool(enabled.any()) if isinstance(enabled, Tensor) else enabled


def _trained_besides(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """State of the modules that train besides the adapters, and the modules' names (PEFT's modules_to_save)."""
    tensors: dict[str, Tensor] = {}
    modules = []
    for raw_name, module in model.named_modules():
        name = plain_name(raw_name)
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, CoToLoRALinear):
            if trained := [key for key in ("weight", "bias") if key in own and own[key].requires_grad]:
                raise ValueError(f"model must not train the base of an adapter; {name}.{trained[0]} requires grad")
            continue
        trained = [key for key, parameter in own.items() if parameter.requires_grad]
        if not trained:
            continue
        if name == "":  # parameters of the root belong to no module that the config could name
            tensors.update({key: own[key] for key in trained})
            continue
        buffers = {
            key: tensor
            for key, tensor in module.named_buffers(recurse=False)
            if key not in module._non_persistent_buffers_set
        }
        tensors.update({f"{name}.{key}": tensor for key, tensor in {**own, **buffers}.items()})
        modules.append(name)
    return tensors, modules


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)  # a DTensor
    whole = gather() if gather is not None else tensor
    # a clone, because safetensors refuses tensors that share memory
    return whole.detach().cpu().clone(memory_format=torch.contiguous_format)


def _on_rank_zero(write: Callable[[], None]) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return write()
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome)  # also the barrier: nobody reads before it is written
    if outcome[0] is not None:
        raise OSError(outcome[0])


def _write(directory: Path, config: bytes, weights: bytes) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    new_config, new_weights = directory / _temporary(CONFIG), directory / _temporary(WEIGHTS)
    try:
        _write_durably(new_config, config)
        _write_durably(new_weights, weights)
    except BaseException:
        new_config.unlink(missing_ok=True)
        new_weights.unlink(missing_ok=True)
        raise
    # weights first: between the two renames the new config is still there under its temporary name
    os.replace(new_weights, directory / WEIGHTS)
    os.replace(new_config, directory / CONFIG)


def _temporary(name: str) -> str:
    return f".{name}.new"


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read_weights(directory: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors by their names in the base model, and the hash of the config they were saved with."""
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise ValueError(
                f"{directory} must hold {WEIGHTS}; it holds adapter_model.bin, a pickle, which can run code and "
                "is not read; load it with PEFT and save it again with safe_serialization=True"
            )
        raise FileNotFoundError(f"directory must hold {WEIGHTS}; there is none in {directory}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} must be a whole safetensors file; reading it failed: {error}") from error
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"{path} must hold keys that begin with {_PREFIX!r}; got {key!r}")
        if ".lora_" in key and not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} must be of a floating dtype; got {tensor.dtype}")
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}, metadata.get(_HASH)


def _read_config(directory: Path, config_hash: str | None) -> PeftConfig:
    path = directory / CONFIG
    if config_hash is not None:
        pair = [p for p in (path, directory / _temporary(CONFIG)) if p.is_file() and _sha256(p) == config_hash]
        if not pair:
            raise ValueError(f"{path} must be the config that {WEIGHTS} was saved with; it is missing or another one")
        path = pair[0]
    elif not path.is_file():
        raise FileNotFoundError(f"directory must hold {CONFIG}; there is none in {directory}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON; reading it failed: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(fields).__name__}")
    try:
        return parse(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fit(
    model: nn.Module, config: PeftConfig, existing: dict[str, CoToLoRALinear], tensors: dict[str, Tensor]
) -> tuple[dict[str, int], list[str], list[str]]:
    """Ranks of the adapters that file, config and model agree on, and the keys that are missing or too many.

    Raises:
        ValueError: a tensor has the wrong shape.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for raw_name, module in model.named_modules():
        if isinstance(module, CoToLoRALinear):
            sizes[plain_name(raw_name)] = module.out_features, module.in_features
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            out_features, in_features = module.weight.shape[::-1] if is_conv1d(module) else module.weight.shape
            sizes[plain_name(raw_name)] = out_features, in_features
    if isinstance(config.targets, str) and config.targets.lower() == "all-linear":
        wanted = list(existing or match_linears(model, config.targets, config.exclude, config.modules_to_save))
    else:
        wanted = [name for name in sizes if config.takes(name)]
    if not wanted:
        raise ValueError(f"target_modules {config.targets!r} must take linear modules of the model; they take none")

    expected = {f"{name}.lora_{factor}.weight" for name in wanted for factor in "AB"}
    plain = _plain_keys(model, config, tensors)
    missing = sorted((expected | plain) - set(tensors))
    unexpected = sorted(set(tensors) - expected - plain)
    ranks = {}
    for name in wanted:
        if f"{name}.lora_A.weight" in missing or f"{name}.lora_B.weight" in missing:
            continue
        (out_features, in_features), rank = sizes[name], config.rank_of(name)
        for factor, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            got = tuple(tensors[f"{name}.lora_{factor}.weight"].shape)
            if got != shape:
                raise ValueError(f"{name}.lora_{factor}.weight must be of shape {shape}; the file holds {got}")
        ranks[name] = rank
    return ranks, missing, unexpected


def _plain_keys(model: nn.Module, config: PeftConfig, tensors: dict[str, Tensor]) -> set[str]:
    """Keys of what trained in full: the state of modules_to_save, and parameters of the root that the file holds."""
    state = {plain_name(key) for key in model.state_dict(keep_vars=True)}
    roots = {name for name, _ in model.named_parameters(recurse=False)} & set(tensors)
    modules = {plain_name(name) for name, _ in model.named_modules() if name}
    saved = [name for name in modules if matches(name, config.modules_to_save)]
    return roots | {key for key in state if any(key.startswith(name + ".") for name in saved)}


def _check_plain(
    model: nn.Module, config: PeftConfig, tensors: dict[str, Tensor], unexpected: list[str]
) -> dict[str, Tensor]:
    """The model's own tensors that the file replaces, each of the right shape."""
    state = {plain_name(key): tensor for key, tensor in model.state_dict(keep_vars=True).items()}
    plain = {key: state[key] for key in _plain_keys(model, config, tensors) if key in tensors}
    for key, tensor in plain.items():
        if tensor.shape != tensors[key].shape:
            raise ValueError(
                f"{key} must be of shape {tuple(tensor.shape)}; the file holds {tuple(tensors[key].shape)}"
            )
    return plain


def _check_agreement(
    existing: dict[str, CoToLoRALinear], config: PeftConfig, ranks: dict[str, int], strict: bool
) -> None:
    if strict and (differing := sorted(set(existing) ^ set(ranks))):
        raise ValueError(f"the file and the model must adapt the same modules; only one of them has {differing}")
    for name, rank in ranks.items():
        if name not in existing:
            raise ValueError(f"{name} must be an adapter of the model; eject the model to load it with other targets")
        layer = existing[name]
        scale = config.alpha_of(name) / (math.sqrt(rank) if config.use_rslora else rank)
        if layer.rank != rank or not math.isclose(layer.scale, scale):
            raise ValueError(
                f"{name} must have the rank and scale of the file, {rank} and {scale:g}; "
                f"the model's are {layer.rank} and {layer.scale:g}"
            )


@torch.no_grad()
def _fill(target: Tensor, value: Tensor) -> None:
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)
