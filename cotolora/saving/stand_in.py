"""Whether a file fits any model at all: it is held to one that has all that the file speaks of."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn

from cotolora.saving.adapter import fitted
from cotolora.saving.fitting import AdapterFiles
from cotolora.saving.shapes import ENDS, modules_of, shares_of
from cotolora.variants import VARIANTS
from cotolora.variants.base import Variant


def why_not_load(files: AdapterFiles, source: str) -> str:
    """What `load_adapter` would raise on such a model, naming `source`; empty if it would load."""
    try:
        fitted(_model_of(files), files, {}, source=source)
    except ValueError as error:
        return str(error)
    return ""


def _model_of(files: AdapterFiles) -> nn.Module:
    """A model that has all that the files speak of: what it does not fit, fits no model. Its weights take no memory."""
    variant, model = VARIANTS[files.config.variant], nn.Module()
    names = sorted(modules_of(variant, files.tensors, whole=False))  # parents first
    linears = {name: linear for name in names if (linear := _linear_of(variant, name, files))}
    for name, linear in linears.items():
        _put(model, name, linear)
    for key, tensor in files.tensors.items():
        name, inside, attribute = key.partition(".base_layer.")
        if inside and attribute == "bias" and name in linears:
            linears[name].bias = nn.Parameter(tensor, requires_grad=False)
        elif not inside and ".lora_" not in key and not key.endswith(ENDS):
            _put(model, key, tensor)
    return model


def _linear_of(variant: Variant, name: str, files: AdapterFiles) -> nn.Linear | None:
    """A linear for an adapter of such tensors, by the first that has each size: the error then names the other."""
    sizes: dict[str, int] = {}
    parts = [(part, files.tensors[key]) for part in variant.parts if (key := f"{name}.{part.key}") in files.tensors]
    for part, tensor in (*parts, *shares_of(variant, files.shared)):
        if tensor.dim() == len(part.shape):
            sizes = dict(zip(part.shape, tensor.shape, strict=True)) | sizes
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.in_features, linear.out_features = sizes.get("in_features", 1), sizes.get("out_features", 1)
    with suppress(RuntimeError):  # more entries than can be counted
        weight = torch.zeros(()).expand(linear.out_features, linear.in_features)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
    return None


def _put(model: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Sets a module or tensor at its name, unless that is taken or one that no module can have."""
    *parents, leaf = name.split(".")
    with suppress(KeyError):
        for parent in parents:
            if parent not in model._modules:
                model.add_module(parent, nn.Module())
            model = model.get_submodule(parent)
        if isinstance(value, nn.Module):
            model.add_module(leaf, value)
        elif value.is_floating_point() or value.is_complex():
            model.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        else:
            model.register_buffer(leaf, value)
