"""Replaces a module of a model by another one and moves its hooks."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

from torch import nn

from cotolora.groups import adapters

# everything that nn.Module.register_*_hook writes to: hooks of calls, and hooks of state dicts
_CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
HOOKS = (*_CALL_HOOKS, *_STATE_HOOKS)
# the attributes that let torch's encoder take its fused path, and the values that prevent it
_FAST_PATH = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),  # "neither": one of the conditions of the fused path
    (nn.TransformerEncoder, "use_nested_tensor", False),  # only the fused path can read nested tensors
)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `model` has `name`."""
    parent, _, leaf = name.rpartition(".")
    # not setattr: Sequential, ModuleList and ModuleDict have children whose names are not identifiers
    model.get_submodule(parent)._modules[leaf] = module


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the hooks of `source` and their handles to `target`; only call hooks if one module holds the other."""
    stays = source in target.children() or target in source.children()
    for name in _CALL_HOOKS if stays else HOOKS:
        getattr(source, name).update(getattr(target, name))
        # the same dictionary object: a handle that the user kept removes its hook from it
        setattr(target, name, getattr(source, name))
        if stays:
            setattr(source, name, OrderedDict())  # it is still called, and hooks must run once
    target._is_full_backward_hook = source._is_full_backward_hook
    if stays:
        source._is_full_backward_hook = None
        return
    _bind_hooks(target)


def _bind_hooks(module: nn.Module) -> None:
    for hook in module._load_state_dict_pre_hooks.values():
        if hook.with_module:  # type: ignore[attr-defined]
            hook.module = weakref.ref(module)  # type: ignore[attr-defined]  # torch keeps the module it was set on


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The state of a module that `move_hooks` changes: its dictionaries of hooks, with their present entries."""
    return {name: (getattr(module, name), dict(getattr(module, name))) for name in HOOKS} | {
        "_is_full_backward_hook": module._is_full_backward_hook
    }


def set_hooks(module: nn.Module, hooks: dict[str, Any]) -> None:
    """Restores the hooks of a module to what `hooks_of` returned."""
    module._is_full_backward_hook = hooks["_is_full_backward_hook"]
    for name in HOOKS:
        dictionary, held = hooks[name]
        dictionary.clear()
        dictionary.update(held)
        setattr(module, name, dictionary)
    _bind_hooks(module)


def name_missing_adapters(model: nn.Module) -> None:
    """Makes load_state_dict name the adapters that a state dict lacks, unless it has none, as one of the base model."""
    model.register_load_state_dict_post_hook(_name_missing)


def restore_load(model: nn.Module) -> None:
    """Takes back `name_missing_adapters`."""
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _name_missing]:
        del hooks[key]


def _name_missing(model: nn.Module, incompatible_keys: Any) -> None:
    layers = adapters(model).values()
    if any(not layer._lacked for layer in layers):
        incompatible_keys.missing_keys.extend(key for layer in layers for key in layer._lacked)


def block_fast_path(model: nn.Module) -> None:
    """Disables torch's fused encoder inference, which reads weights without calling the layers, around adapters."""
    for module in model.modules():
        for kind, attribute, off in _FAST_PATH:
            if isinstance(module, kind) and hasattr(module, attribute) and adapters(module):
                module.__dict__[f"_cotolora_{attribute}"] = getattr(module, attribute)
                setattr(module, attribute, off)


def restore_fast_path(model: nn.Module) -> None:
    """Undoes `block_fast_path`."""
    for module in model.modules():
        for _, attribute, _ in _FAST_PATH:
            if (saved := f"_cotolora_{attribute}") in module.__dict__:
                setattr(module, attribute, module.__dict__.pop(saved))
