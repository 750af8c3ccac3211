"""What CoTo switches: our own layers and, where PEFT is loaded, PEFT's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from cotolora.groups import adapters, plain_name, unwrap
from cotolora.linear import CoToLoRALinear
from cotolora.variants.base import PEFT_INITS as _INITS

_METHODS = {
    "ADALORA": "it allots ranks by the gradients of every adapter, and one that is off has none",
    "SHADOW": "its blocks hand a state from one to the next and have no switch of their own",
    "XLORA": "its layers obey one switch for the whole model",
}


class PeftSwitch:
    """The gate of one PEFT layer: off, the layer runs as its base, by PEFT's own ``_disable_adapters``.

    That flag is set only while the layer's forward runs, and only in training mode. So evaluation finds the adapter
    on however the layer is reached, PEFT's own ``disable_adapter()`` keeps its meaning, and the recomputation of a
    checkpoint sees what the forward saw. A fused forward that reads A and B past the layer (Unsloth's) does not see the
    gate. It has the attributes that CoTo reads of a `CoToLoRALinear`.

    Attributes:
        layer: the PEFT layer.
        gate: whether the adapter is on in training.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.gate = True
        self._acted = False
        self._handles: list[RemovableHandle] = []

    def hold(self) -> None:
        """Puts the hooks on the layer that make the gate count. Twice is once."""
        if not self._handles:
            self._handles = [
                self.layer.register_forward_pre_hook(self._before),
                self.layer.register_forward_hook(self._after),
            ]

    def release(self) -> None:
        """Takes the hooks off again: the layer is PEFT's alone."""
        while self._handles:
            self._handles.pop().remove()
        self.restore()

    def _before(self, layer: Any, args: Any) -> None:
        self.restore()  # from a forward that a KeyboardInterrupt ended, after which torch calls no hook
        # a merged layer that is disabled would unmerge itself, which changes weights
        if not self.gate and layer.training and not layer._disable_adapters and not layer.merged:
            layer._disable_adapters = self._acted = True

    def _after(self, layer: Any, args: Any, output: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Takes back what a forward has set, also one that raised."""
        if self._acted:
            self.layer._disable_adapters = self._acted = False

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return self.layer.training

    @property
    def merged(self) -> bool:
        """Whether the base weight holds an adapter's update."""
        return self.layer.merged

    @property
    def enabled(self) -> bool:
        """The user's switch: PEFT's, and an adapter of this layer must be active."""
        return not self.layer._disable_adapters and _is_active(self.layer)

    @property
    def active(self) -> bool:
        """Whether the adapter counts, ``enabled and (gate or not training)``."""
        return self.enabled and (self.gate or not self.training)

    @property
    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of the active adapters."""
        found = [
            parameter
            for part in _parts(self.layer)
            for name in part.adapter_layer_names
            for adapter in part.active_adapters
            if adapter in (items := getattr(part, name))
            for parameter in _parameters_in(items[adapter])
        ]
        return list(dict.fromkeys(found))  # PEFT lists DoRA's magnitudes twice


Switch = CoToLoRALinear | PeftSwitch


def switches(model: nn.Module) -> dict[str, Switch]:
    """Every layer of `model` that CoTo can switch, by name, in module order: ours, and PEFT's with an active adapter.

    Names are those of the unwrapped model, without what a ``PeftModel`` puts in front.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a PEFT adapter must not be switched; the message names it and says why.
    """
    found: dict[str, Switch] = dict(adapters(model))
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return found
    model = unwrap(model)
    modules = {plain_name(name): module for name, module in model.named_modules()}
    tuners = [name for name, module in modules.items() if isinstance(module, peft.BaseTuner)]
    layers = {name: module for name, module in modules.items() if isinstance(module, peft.BaseTunerLayer)}
    within = {part for layer in layers.values() for part in _parts(layer)[1:]}
    # trainable tokens are, as modules_to_save, trained beside the adapters and not by them
    auxiliary = sys.modules["peft.utils.other"].AuxiliaryTrainingWrapper
    within |= {part for module in modules.values() if isinstance(module, auxiliary) for part in module.modules()}
    layers = {name: layer for name, layer in layers.items() if layer not in within and _is_active(layer)}
    _refuse(modules, {adapter for layer in layers.values() for adapter in layer.active_adapters})
    return {
        _users_name(name, tuners): found[name] if name in found else _switch_of(layers[name])
        for name in modules
        if name in found or name in layers
    }


def module_of(switch: Switch) -> nn.Module:
    """The layer that `switch` switches."""
    return switch.layer if isinstance(switch, PeftSwitch) else switch


def _is_active(layer: Any) -> bool:
    return not layer._get_available_adapters().isdisjoint(layer.active_adapters)


def _parts(layer: Any) -> list[Any]:
    # PEFT merges the adapter of an attention's out_proj with that of the attention and never calls it by itself
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is not None and isinstance(layer, lora.MultiheadAttention):
        return [layer, layer.base_layer.out_proj]
    return [layer]


def _parameters_in(item: Any) -> Iterator[nn.Parameter]:
    if isinstance(item, nn.Parameter):
        yield item
    elif isinstance(item, nn.Module):
        yield from item.parameters()


def _switch_of(layer: Any) -> PeftSwitch:
    """The switch that an earlier CoTo put on `layer`, so that no two ever decide; else a new one."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(switch := getattr(hook, "__self__", None), PeftSwitch):
            return switch
    return PeftSwitch(layer)


def _users_name(name: str, tuners: list[str]) -> str:
    for tuner in tuners:
        inside = f"{tuner}.model." if tuner else "model."
        if name.startswith(inside):
            holder = tuner.removesuffix("base_model")  # a PeftModel
            return (f"{holder}." if holder and holder == tuner else holder) + name.removeprefix(inside)
    return name


def _refuse(modules: dict[str, nn.Module], active: set[str]) -> None:
    configs = [config for module in modules.values() if isinstance(config := vars(module).get("peft_config"), dict)]
    for name, config in (item for found in configs for item in found.items()):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in _METHODS:
            raise ValueError(f"PEFT adapter {name!r} must be of a method with a switch in every layer; {kind} is not: "
                             f"{_METHODS[kind]}")  # fmt: skip
        if name not in active:
            continue
        init = getattr(config, "init_lora_weights", None)
        known = (init.lower() if isinstance(init, str) else init) in _INITS
        changed = "" if known else f"init_lora_weights={init!r}"
        if getattr(config, "kasa_config", None):
            changed = "kasa_config"
        if changed:
            raise ValueError(
                f"PEFT adapter {name!r} must leave the base weights as they were; {changed} took part of them into the "
                "adapter, so where it is off PEFT runs a residual, not the pretrained weight, and CoTo would destroy "
                f"the model; init_lora_weights must be one of {_INITS}"
            )
