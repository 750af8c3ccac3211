"""Puts one module in another's place, with the hooks that the other has."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

from torch import nn

from cotolora.groups import adapters

# everything that nn.Module.register_*_hook writes to: what calls run, and what state dicts do
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
# what makes torch's encoder take the fused path, and the value that keeps it off
_FAST_PATH = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),  # "neither": one of the conditions of the fused path
    (nn.TransformerEncoder, "use_nested_tensor", False),  # only the fused path can read nested tensors
)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `model` has `name`."""
    parent, _, leaf = name.rpartition(".")
    # not setattr: Sequential, ModuleList and ModuleDict hold children under names that are no identifiers
    model.get_submodule(parent)._modules[leaf] = module


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the hooks of `source` and their handles; only those of calls where one holds the other."""
    stays = source in target.children() or target in source.children()
    for name in _CALL_HOOKS if stays else HOOKS:
        getattr(source, name).update(getattr(target, name))
        # the very same dictionary: a handle that the user kept removes its hook from it
        setattr(target, name, getattr(source, name))
        if stays:
            setattr(source, name, OrderedDict())  # it goes on being called: once is enough
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
    """What `move_hooks` changes of a module: its dictionaries of hooks, with what they hold now."""
    return {name: (getattr(module, name), dict(getattr(module, name))) for name in HOOKS} | {
        "_is_full_backward_hook": module._is_full_backward_hook
    }


def set_hooks(module: nn.Module, hooks: dict[str, Any]) -> None:
    """Gives a module back what `hooks_of` found."""
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
    """Keeps torch's fused encoder inference, which reads the weights past the layers, off what was adapted."""
    for module in model.modules():
        for kind, attribute, off in _FAST_PATH:
            if isinstance(module, kind) and hasattr(module, attribute) and adapters(module):
                module.__dict__[f"_cotolora_{attribute}"] = getattr(module, attribute)
                setattr(module, attribute, off)


def restore_fast_path(model: nn.Module) -> None:
    """Takes back `block_fast_path`."""
    for module in model.modules():
        for _, attribute, _ in _FAST_PATH:
            if (saved := f"_cotolora_{attribute}") in module.__dict__:
                setattr(module, attribute, module.__dict__.pop(saved))
