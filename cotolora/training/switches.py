"""The layers that CoTo switches: our own and, where PEFT is loaded, PEFT's."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cotolora.groups import adapters, is_enabled, modules_of
from cotolora.linear import CoToLoRALinear
from cotolora.variants.base import PEFT_INITS

_UNSUPPORTED = {
    "ADALORA": "it allocates ranks by the gradients of every adapter, and an inactive adapter has none",
    "SHADOW": "its blocks pass a state from one to the next and cannot be switched one by one",
    "XLORA": "its layers have one switch for the whole model",
}


class Switch(ABC):
    """The gate of one layer, and what CoTo needs to know about the layer.

    Attributes:
        layer: the layer.
    """

    layer: nn.Module

    @abstractmethod
    def set_gate(self, on: bool) -> None:
        """Switches the adapter on or off in training."""

    @property
    @abstractmethod
    def enabled(self) -> bool:
        """The user's own switch."""

    @property
    @abstractmethod
    def merged(self) -> bool:
        """Whether the base weight holds the adapter's update."""

    @property
    @abstractmethod
    def adapter_parameters(self) -> Sequence[nn.Parameter]:
        """The adapter's parameters."""

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode."""
        return self.layer.training

    @property
    def trainable(self) -> bool:
        """Whether the adapter trains if its gate is on."""
        return self.enabled and not self.merged

    @property
    @abstractmethod
    def unused(self) -> bool:
        """Whether a forward now leaves the adapter's parameters out of the graph."""

    @property
    def masked(self) -> bool:
        """Whether only the gate makes the adapter unused: with the gate on it would train."""
        return self.unused and self.training and self.trainable

    # the defaults do nothing, which is right for our own layers

    def install(self) -> None:  # noqa: B027
        """Registers hooks on the layer if the gate needs any. A second call does nothing."""

    def remove(self) -> None:  # noqa: B027
        """Removes the hooks."""

    def restore(self) -> None:  # noqa: B027
        """Resets the switch after a forward that raised."""


class LayerSwitch(Switch):
    """The gate of one of our own layers."""

    layer: CoToLoRALinear

    def __init__(self, layer: CoToLoRALinear) -> None:
        self.layer = layer

    def reset_gate(self, kind: str) -> None:
        """Sets a new gate that is on: a bool if `kind` is "host", an int32 tensor if it is "device"."""
        # not layer.gate = …, which would write to a tensor gate that an earlier run has left
        on = torch.ones((), dtype=torch.int32, device="cpu") if kind == "device" else True
        self.layer._set_switch("_gate", on)

    def set_gate(self, on: bool) -> None:
        """Switches the adapter on or off in training."""
        if self.layer.gate is not on:  # assigning an attribute of a module is slow, and most gates stay
            self.layer.gate = on

    @property
    def enabled(self) -> bool:
        """The user's own switch, true if it is on for at least one sample."""
        return is_enabled(self.layer)

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter's update."""
        return self.layer.merged

    @property
    def unused(self) -> bool:
        """Whether a forward now leaves the adapter's parameters out of the graph; False if a switch is a tensor."""
        return self.layer.active is False or self.layer.merged

    @property
    def adapter_parameters(self) -> Sequence[nn.Parameter]:
        """The adapter's parameters."""
        return self.layer.adapter_parameters


class PeftSwitch(Switch):
    """The gate of one PEFT layer, which uses PEFT's own ``_disable_adapters`` to run only the base.

    That flag is set only while the layer's forward runs, and only in training mode. So in evaluation the adapter is
    active no matter how the layer is called, PEFT's ``disable_adapter()`` still works, and the recomputation in
    activation checkpointing uses the same gate as the forward. A fused forward that reads A and B without calling the
    layer (Unsloth's) ignores the gate.

    Attributes:
        gate: whether the adapter is on in training.
    """

    layer: Any

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.gate = True
        self._disabled_here = False
        self._handles: list[RemovableHandle] = []

    def set_gate(self, on: bool) -> None:
        """Switches the adapter on or off in training."""
        self.gate = on

    def install(self) -> None:
        """Registers the hooks that apply the gate on the layer. A second call does nothing."""
        if not self._handles:
            self._handles = [
                self.layer.register_forward_pre_hook(self._before),
                self.layer.register_forward_hook(self._after),
            ]

    def remove(self) -> None:
        """Removes the hooks, which leaves the layer as PEFT made it."""
        while self._handles:
            self._handles.pop().remove()
        self.restore()

    def _before(self, layer: Any, args: Any) -> None:
        self.restore()  # after a forward that ended with KeyboardInterrupt, for which torch calls no hook
        # a merged layer that is disabled would unmerge itself, which changes weights
        if not self.gate and layer.training and not layer._disable_adapters and not layer.merged:
            layer._disable_adapters = self._disabled_here = True

    def _after(self, layer: Any, args: Any, output: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Resets PEFT's flag after a forward, also after one that raised."""
        if self._disabled_here:
            self.layer._disable_adapters = self._disabled_here = False

    @property
    def merged(self) -> bool:
        """Whether the base weight holds an adapter's update."""
        return self.layer.merged

    @property
    def unused(self) -> bool:
        """Whether a forward now leaves the adapter's parameters out of the graph."""
        return not self.trainable or (self.training and not self.gate)

    @property
    def enabled(self) -> bool:
        """The user's own switch: PEFT has not disabled the layer, and one of its adapters is active in PEFT's sense."""
        return not self.layer._disable_adapters and _is_active(self.layer)

    @property
    def adapter_parameters(self) -> Sequence[nn.Parameter]:
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


def switches(model: nn.Module) -> dict[str, Switch]:
    """Every layer of `model` that CoTo can switch, by name, in module order: ours, and PEFT's with an active adapter.

    Names are those of the unwrapped model, without the prefix that a ``PeftModel`` adds.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a PEFT adapter cannot be switched; the message names it and says why.
    """
    found: dict[str, Switch] = {name: LayerSwitch(layer) for name, layer in adapters(model).items()}
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return found
    modules = modules_of(model)
    layers = {name: module for name, module in modules.items() if isinstance(module, peft.BaseTunerLayer)}
    within = {part for layer in layers.values() for part in _parts(layer)[1:]}
    # trainable tokens, like modules_to_save, train alongside the adapters and are not switched
    auxiliary = sys.modules["peft.utils.other"].AuxiliaryTrainingWrapper
    within |= {part for module in modules.values() if isinstance(module, auxiliary) for part in module.modules()}
    layers = {name: layer for name, layer in layers.items() if layer not in within and _is_active(layer)}
    _refuse(modules, {adapter for layer in layers.values() for adapter in layer.active_adapters})
    users = _users_names(modules)
    return {
        users[name]: found[name] if name in found else _switch_of(layers[name])
        for name in modules
        if name in found or name in layers
    }


def modules_by_users_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of `model`, under names like those of `switches`."""
    modules = modules_of(model)
    users = _users_names(modules)
    return {users[name]: module for name, module in modules.items()}


def parameters_of(idle: Iterable[Switch], used: Iterable[Switch]) -> list[nn.Parameter]:
    """The parameters of `idle` adapters, except those shared with `used` ones, as in some PEFT methods."""
    kept = {parameter for switch in used for parameter in switch.adapter_parameters}
    found = dict.fromkeys(parameter for switch in idle for parameter in switch.adapter_parameters)
    return [parameter for parameter in found if parameter not in kept]


def _is_active(layer: Any) -> bool:
    return not layer._get_available_adapters().isdisjoint(layer.active_adapters)


def _parts(layer: Any) -> list[Any]:
    # the adapter on out_proj is part of PEFT's MultiheadAttention layer; PEFT never calls it on its own
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
    """The switch that an earlier CoTo installed on `layer`, so that a layer has only one; otherwise a new one."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(switch := getattr(hook, "__self__", None), PeftSwitch):
            return switch
    return PeftSwitch(layer)


def _users_names(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each name, the name without the prefix that a ``PeftModel`` or its tuner adds."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    tuners = [] if peft is None else [name for name, module in modules.items() if isinstance(module, peft.BaseTuner)]
    return {name: _users_name(name, tuners) for name in modules}


def _users_name(name: str, tuners: list[str]) -> str:
    for tuner in tuners:
        inside = f"{tuner}.model" if tuner else "model"
        if name == inside or name.startswith(f"{inside}."):
            holder = tuner.rpartition(".")[0] if tuner.rpartition(".")[2] == "base_model" else tuner  # a PeftModel
            return ".".join(part for part in (holder, name.removeprefix(inside).removeprefix(".")) if part)
    return name


def _refuse(modules: dict[str, nn.Module], active: set[str]) -> None:
    configs = [config for module in modules.values() if isinstance(config := vars(module).get("peft_config"), dict)]
    for name, config in (item for found in configs for item in found.items()):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in _UNSUPPORTED:
            raise ValueError(f"PEFT adapter {name!r} must use a method with a switch in every layer; {kind} has none: "
                             f"{_UNSUPPORTED[kind]}")  # fmt: skip
        if name not in active:
            continue
        init = getattr(config, "init_lora_weights", None)
        known = (init.lower() if isinstance(init, str) else init) in PEFT_INITS
        changed = "" if known else f"init_lora_weights={init!r}"
        if getattr(config, "kasa_config", None):
            changed = "kasa_config"
        if changed:
            raise ValueError(
                f"PEFT adapter {name!r} must not have changed the base weights; {changed} moved part of them into the "
                "adapter, so without the adapter PEFT runs a residual instead of the pretrained weight, and CoTo would "
                f"destroy the model; init_lora_weights must be one of {PEFT_INITS}"
            )
