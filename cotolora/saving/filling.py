"""Writes the tensors of files into a model, all of them or none."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.autograd import _unsafe_preserve_version_counter

from cotolora.linear import CoToLoRALinear
from cotolora.saving.fitting import AdapterFiles, Fit
from cotolora.variants import VARIANTS
from cotolora.wording import some_of

logger = logging.getLogger("cotolora")


def untied(fit: Fit, undo: ExitStack) -> Fit:
    """`fit` with untied copies of the tensors that PEFT would copy; also puts these copies into the model."""
    plain = dict(fit.plain)
    for keys, owners, tensor, others in fit.copies:
        copy = deepcopy(tensor.detach() if not isinstance(tensor, nn.Parameter) else tensor)
        for module, name in owners:
            undo.callback(_put, module, name, tensor)
            _put(module, name, copy)
        plain |= dict.fromkeys(keys, copy)
        logger.warning("%s was tied to %s; it is trained, so it is now a separate tensor", keys[0], some_of(others))
    return fit._replace(plain=plain)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    (module._parameters if name in module._parameters else module._buffers)[name] = tensor  # type: ignore[assignment]


def fill(layers: dict[str, CoToLoRALinear], fit: Fit, files: AdapterFiles, undo: ExitStack) -> None:
    """Writes the tensors of the files into the model, all or none; `undo` restores the old ones after a later error."""
    variant = VARIANTS[files.config.variant]
    writes = []
    for name, parts in fit.parts.items():
        values = variant.loaded({key: _at_least_float32(value) for key, value in parts.items()}, layers[name].scale)
        writes += [(f"{name}.{key}", getattr(layers[name], key), value) for key, value in values.items()]
    writes += [(key, target, fit.tensors[key]) for key, target in (fit.bases | fit.plain).items()]
    _write(writes, undo)
    merged = [layer for layer in layers.values() if layer.merged]
    # computes all new merged weights before it sets the first one
    for layer, weight in [(layer, layer._merged_weight()) for layer in merged]:
        undo.callback(setattr, layer, "weight", layer.weight)
        layer.weight = weight


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def _write(writes: list[tuple[str, Tensor, Tensor]], undo: ExitStack) -> None:
    """Copies each value into its target. `writes` holds name, target and value. Fails before it changes anything."""
    for key, target, _ in writes:
        if reason := _why_not_writable(target):
            raise ValueError(f"{key} must be a tensor of the model that can be written; {reason}")
    ready = [(target, _like(value, target), target.clone()) for _, target, value in writes]
    for target, value, before in ready:
        if not target.is_inference():
            # so that a restored tensor has its old version for autograd, too
            undo.enter_context(_unsafe_preserve_version_counter(target))
        undo.callback(_restore, target, before)
        target.copy_(value)


def _why_not_writable(target: Tensor) -> str:
    if target.is_inference() and not torch.is_inference_mode_enabled():
        return "it was created in inference mode and can be written to only in that mode"
    local = getattr(target, "to_local", lambda: target)()  # the local part of a DTensor
    reach = 0
    for stride, size in sorted(zip(local.stride(), local.shape, strict=True)):
        if size > 1 and stride <= reach:
            return "it is expanded: several of its entries share memory"
        reach += stride * (size - 1)
    return ""


@torch.no_grad()
def _restore(target: Tensor, before: Tensor) -> None:
    target.copy_(before)


def _like(value: Tensor, target: Tensor) -> Tensor:
    """`value` on the device and in the dtype of `target`, and sharded as `target` is."""
    value = value.to(target.device, target.dtype)
    if not hasattr(target, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[attr-defined]
