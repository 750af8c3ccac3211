"""Converts PEFT's LoRA layers to ours and back; weights are shared."""

from __future__ import annotations

import logging
from typing import Any

import peft
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from cotolora import checks
from cotolora.bases import is_conv1d, why_not_adaptable
from cotolora.coto import coto_of
from cotolora.groups import adapters, held_at, is_enabled, unwrap, why_not_in_peft
from cotolora.hooks import HOOKS, block_fast_path, move_hooks, name_missing_adapters, replace_module, restore_load
from cotolora.inject import name_and_watch
from cotolora.linear import CoToLoRALinear
from cotolora.quantised import allow_training, disallow_training
from cotolora.saving.adapter import trained_outside_adapters
from cotolora.saving.peft_config import make_config
from cotolora.targets import why_forward_is_not_its_own

logger = logging.getLogger("cotolora")


def from_peft(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """The base model of a PEFT model, with a `CoToLoRALinear` in place of each of PEFT's LoRA layers.

    Nothing is copied: base weights, A and B stay the same parameters, so an optimizer that holds them remains valid.
    They keep their dtype; bfloat16 A and B then train in bfloat16 (``autocast_adapter_dtype=True``, PEFT's default,
    makes float32 ones). ``requires_grad``, training mode, dropout, scale and hooks stay as they are. Disabled adapters
    get ``enabled=False``. Modules in modules_to_save are replaced by their trained copies. Other adapters are dropped.

    The logits equal those of the PEFT model: bit for bit in float32 with the reference backend, otherwise up to
    rounding (PEFT computes the update of a bfloat16 layer in the dtype of A, this library in that of the input).

    Args:
        model: a ``PeftModel``, or a model that contains PEFT's layers or such models. Changed in place, and no longer
            usable as a PEFT model; unchanged if anything raises.
        adapter: the name of the adapter to convert; by default the active one.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no LoRA layer, or one that ours cannot replace (another variant or method, a merged or a
            quantised one; the message names it and says why); `adapter` is unknown, or is None although not exactly one
            is active; the model is wrapped, for example by DistributedDataParallel, or a CoTo switches it.
    """
    _refuse_in_use(model)
    if existing := adapters(model):
        raise ValueError(f"model must hold only PEFT's adapters; it has {len(existing)} of this library")
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    if not layers or "" in layers:
        has = "is one itself" if layers else "has none"
        raise ValueError(f"model must hold PEFT's LoRA layers; {type(model).__name__} {has}")
    chosen = _chosen(layers, adapter)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in modules.items():
        if reason := _why_not_ours(module, chosen):
            raise ValueError(f"{name or 'model'} must have a counterpart in this library; {reason}")
        if isinstance(module, BaseTunerLayer):
            replacements[module] = _converted(module, chosen)
        elif isinstance(module, ModulesToSaveWrapper):
            replacements[module] = dict(module.modules_to_save.items()).get(chosen, module.original_module)
        elif isinstance(module, peft.PeftModel):
            replacements[module] = module.get_base_model()

    # from the inside out, so that all names stay valid; nothing raises from here on
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):
        if module in replacements and name:
            replace_module(model, name, replacements[module])
    for module, ours in replacements.items():
        if isinstance(ours, CoToLoRALinear):
            move_hooks(module, ours)
    base = replacements.get(model, model)
    for module in base.modules():
        vars(module).pop("peft_config", None)
        if "_hf_peft_config_loaded" in vars(module):  # set by transformers if it added the adapter
            module._hf_peft_config_loaded = False  # type: ignore[assignment]
    block_fast_path(base)
    name_missing_adapters(base)
    allow_training(base)
    name_and_watch(adapters(base))
    return base


def to_peft(model: nn.Module, adapter: str = "default", task_type: str | None = None) -> peft.PeftModel:
    """A ``PeftModel`` around `model`, with PEFT's LoRA layers in place of ours; the reverse of `from_peft`.

    Only modules that train in full are copied: they become PEFT's modules_to_save, the trained module stays the
    same object, and PEFT's "original" is a frozen copy. ``requires_grad``, training mode, dropout, scale and hooks
    stay as they are. Disabled (pruned) adapters are left out.

    Args:
        model: a model with adapters; changed in place, and unchanged if anything raises.
        adapter: PEFT's name for the adapter.
        task_type: PEFT's task type, for example "CAUSAL_LM"; it determines the class of the result.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no enabled adapter or is one itself; an adapter is merged, has a row mask as `enabled`, has a
            trainable base, or is one that PEFT's LoRA cannot represent; the model is wrapped, or a CoTo switches it;
            PEFT does not know `task_type`.
    """
    _refuse_in_use(model)
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise ValueError(
            f"adapter must be a valid module name, not empty and without dots; got {checks.shown(adapter)}"
        )
    if task_type is not None:
        checks.one_of("task_type", task_type, [kind.value for kind in peft.TaskType])
    every = adapters(model)
    if model in every.values():
        raise ValueError("model must hold adapters; it is one itself")
    for name, layer in every.items():
        if reason := _why_not_in_peft_lora(layer):
            raise ValueError(f"{name or 'model'} must be an adapter that PEFT's LoRA can represent; {reason}")
    layers = {name: layer for name, layer in every.items() if is_enabled(layer)}
    if not layers:
        raise ValueError(f"model must have enabled adapters; {type(model).__name__} has none")
    tensors, saved = trained_outside_adapters(model)
    fields = make_config(model, layers, saved) | {"inference_mode": False, "task_type": task_type}
    config = peft.LoraConfig(**{key: value for key, value in fields.items() if key != "peft_type"})

    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m in every.values() or n in saved]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        wrapped = _wrapped(model, config, adapter, every, places)
    except BaseException as error:
        for name, module in places:
            replace_module(model, name, module)
        vars(model).pop("peft_config", None)
        if isinstance(error, KeyError):
            raise ValueError(f"adapter must be a valid module name; got {adapter!r} ({error})") from error
        if isinstance(error, AttributeError) and task_type is not None:
            kind = type(model).__name__
            raise ValueError(
                f"task_type must be one that the model supports; got {task_type!r} for a {kind} ({error})"
            ) from error
        raise
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    restore_load(model)
    disallow_training(model)
    for name, layer in every.items():
        move_hooks(layer, model.get_submodule(name))
    held = held_at(wrapped)
    if several := [name for name in every if why_not_in_peft(held[model.get_submodule(name)])]:
        logger.warning("these are in several places of the model, but PEFT will load its files into the first only: %s",
                       ", ".join(several))  # fmt: skip
    if lost := [key for key in tensors if not key.startswith(tuple(f"{name}." for name in saved))]:
        logger.warning("these train, but PEFT will not save them: %s", ", ".join(lost))
    return wrapped


def _refuse_in_use(model: nn.Module) -> None:
    if unwrap(checks.module("model", model)) is not model:
        raise ValueError(f"model must not be wrapped; got a {type(model).__name__}: pass the inner module, wrap again")
    if any(coto_of(module) is not None for module in model.modules()):
        raise ValueError("model must not be switched by a CoTo; call the finish method of the CoTo first")


def _chosen(layers: dict[str, Any], adapter: str | None) -> str:
    present = sorted({name for layer in layers.values() for name in layer._get_available_adapters()})
    active = sorted({name for layer in layers.values() for name in layer.active_adapters if name in present})
    if adapter is not None and (not isinstance(adapter, str) or adapter not in present):
        raise ValueError(f"adapter must be one of {present}; got {checks.shown(adapter)}")
    if adapter is None and len(active) != 1:
        raise ValueError(f"adapter must be given, as one of {present}, because {len(active)} are active: {active}")
    return active[0] if adapter is None else adapter


def _why_not_ours(module: nn.Module, adapter: str) -> str:
    """Why `module` of a PEFT model has no counterpart in this library; empty if it has, or is not PEFT's."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        reasons = [
            (not isinstance(module, ModulesToSaveWrapper), f"it is a {type(module).__name__}"),
            (module.disable_adapters, "it is in modules_to_save and disabled, which this library does not support"),
        ]
    elif isinstance(module, BaseTunerLayer):
        reasons = _reasons_of_layer(module, adapter)
    elif isinstance(module, peft.PeftModel):
        reasons = []
    else:
        return ""
    hooked = _has_hooks(module) and not isinstance(module, BaseTunerLayer)  # the hooks of a tuner layer move to ours
    reasons.append((hooked, f"this {type(module).__name__} has hooks, which would be lost"))
    return next((reason for applies, reason in reasons if applies), "")


def _reasons_of_layer(layer: Any, adapter: str) -> list[tuple[Any, str]]:
    base, variant = layer.base_layer, getattr(layer, "lora_variant", {}).get(adapter)
    dense = type(base) is nn.Linear or is_conv1d(base)
    common = [
        (layer.merged, "it is merged; call unmerge_adapter first"),
        (isinstance(base, BaseTunerLayer), "it wraps another PEFT layer"),
    ]
    if adapter not in layer._get_available_adapters():
        return [*common, (_has_hooks(layer), "it does not have this adapter, and its hooks would be lost")]
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    own = [
        (type(layer) is not lora.Linear, f"it is a {kind}: only LoRA on nn.Linear and Conv1D has a counterpart"),
        (variant is not None, f"it is a variant of LoRA, {type(variant).__name__}"),
        (getattr(layer, "lora_bias", {}).get(adapter), "its B has a bias (lora_bias)"),
        (not dense, f"its base must be an nn.Linear or a transformers Conv1D; got {type(base).__name__}"),
        (reason := why_not_adaptable(base), f"its base must have a dense floating weight; {reason}"),
        (_has_hooks(base), "its base layer has hooks, which get the output without the adapter"),
        (reason := why_forward_is_not_its_own(layer) or why_forward_is_not_its_own(base), reason),
    ]
    return common + own


def _why_not_in_peft_lora(layer: CoToLoRALinear) -> str:
    """Why PEFT's LoRA layer cannot represent ours; empty if it can."""
    reasons = [
        (layer.variant != "lora", f"it is of variant {layer.variant!r}"),
        (layer.init not in ("kaiming", "gaussian"), f"with init {layer.init!r} its update is not just s · B A"),
        (layer.merged, "it is merged; call its unmerge first"),
        (layer.gate is False or (isinstance(layer.gate, Tensor) and not layer.gate.all()), "its gate is off (CoTo)"),
        (isinstance(layer.enabled, Tensor) and layer.enabled.dim() > 0, "its enabled is a row mask; set it to a bool"),
        (reason := why_forward_is_not_its_own(layer), reason),
    ]
    return next((reason for applies, reason in reasons if applies), "")


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def _converted(layer: Any, adapter: str) -> nn.Module:
    if adapter not in layer._get_available_adapters():
        return layer.base_layer
    base, rank, scale = layer.base_layer, layer.r[adapter], layer.scaling[adapter]
    ours = CoToLoRALinear(
        layer.in_features, layer.out_features, rank, layer.lora_alpha[adapter],
        bias=base.bias is not None, dropout=getattr(layer.lora_dropout[adapter], "p", 0.0),
        use_rslora=layer.use_rslora[adapter], device="meta", dtype=base.weight.dtype,
    )  # fmt: skip
    if ours.scale != scale:  # PEFT's set_scale
        ours.alpha, ours.use_rslora = scale * rank, False
    ours.fan_in_fan_out = is_conv1d(base)
    ours.weight, ours.bias = base.weight, base.bias
    ours.lora_a, ours.lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    ours.enabled = not layer.disable_adapters
    return ours.train(layer.training)


def _wrapped(
    model: nn.Module, config: peft.LoraConfig, adapter: str, every: dict[str, CoToLoRALinear], places: list[Any]
) -> peft.PeftModel:
    plain = {layer: layer.to_linear(merge=False) for layer in every.values()}
    for name, module in places:
        if module in plain:
            replace_module(model, name, plain[module])
    # on the meta device, so that no random numbers are drawn: our A and B replace PEFT's
    wrapped = peft.get_peft_model(model, config, adapter_name=adapter, low_cpu_mem_usage=True)
    wrapped.training = wrapped.base_model.training = model.training
    firsts: dict[nn.Module, nn.Module] = {}
    for name, module in places:
        # PEFT wraps a module with several names only under the first
        theirs = firsts.setdefault(module, model.get_submodule(name))
        replace_module(model, name, theirs)
    for module, theirs in firsts.items():
        if isinstance(module, CoToLoRALinear):
            if is_enabled(module):
                _share(theirs, module, adapter)
        else:
            _keep(theirs, module, adapter)
    return wrapped


def _share(theirs: Any, ours: CoToLoRALinear, adapter: str) -> None:
    theirs.lora_A[adapter].weight, theirs.lora_B[adapter].weight = ours.lora_a, ours.lora_b
    theirs.lora_dropout[adapter] = nn.Dropout(ours.dropout) if ours.dropout else nn.Identity()
    theirs.scaling[adapter] = ours.scale  # a config cannot mix rsLoRA layers with others
    theirs.train(ours.training)


def _keep(wrapper: Any, module: nn.Module, adapter: str) -> None:
    # PEFT would train a copy, but the optimizer holds the original
    wrapper.original_module, wrapper.modules_to_save[adapter] = wrapper.modules_to_save[adapter], module
    wrapper.original_module.requires_grad_(False)
    wrapper.training = wrapper.modules_to_save.training = module.training
