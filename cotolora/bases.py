"""The modules that an adapter can wrap: a dense linear, whose weight it shares, or another module, which it calls."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cotolora.variants import VARIANTS
from cotolora.variants.base import FROM_WEIGHT, INITS
from cotolora.wording import listed

# inits that do not read the weight of a base
FOREIGN_INITS = tuple(init for init in INITS if init not in FROM_WEIGHT)

_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is a transformers Conv1D; does not import transformers."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and type(module) is loaded.Conv1D


def is_dense(module: nn.Module) -> bool:
    """Whether `module` is an ``nn.Linear`` or Conv1D, no subclass, with a dense floating weight and at most a bias."""
    return (type(module) is nn.Linear or is_conv1d(module)) and _has_dense_weight(module) and not _others_in(module)


def why_not_dense(module: nn.Module) -> str:
    """Describes a module that is not `is_dense`, and why its weight can be neither read nor written."""
    if isinstance(module, nn.Linear) and _has_dense_weight(module):
        # with the name of its Python module, because subclasses may be called Linear
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if type(module) is nn.Linear:
            return f"a {kind} that holds {listed(_others_in(module))} in addition to its weight and bias"
        return f"a {kind}, whose forward may be other than the product with its weight"
    return f"a {type(module).__name__}, which has no dense floating weight"


def _has_dense_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and weight.layout == torch.strided
    )


def _others_in(module: nn.Module) -> list[str]:
    """The names of parameters, buffers and modules in `module` other than weight and bias."""
    held = (*module._parameters, *module._buffers, *module._modules)
    return [name for name in held if name not in ("weight", "bias")]


def carry_attributes(source: nn.Module, target: nn.Module) -> tuple[str, ...]:
    """Copies attributes of `source` that `target` does not have to `target`; returns their names.

    Names with an underscore, which other packages keep for themselves (accelerate's _hf_hook), are not copied.
    """
    names = tuple(name for name in vars(source) if not name.startswith("_") and not hasattr(target, name))
    target.__dict__.update({name: vars(source)[name] for name in names})
    return names


def is_peft_module(module: nn.Module) -> bool:
    """Whether `module` is a layer, wrapper or model of PEFT; does not import PEFT."""
    kinds = (
        ("peft.tuners.tuners_utils", "BaseTunerLayer"),
        ("peft.utils.other", "AuxiliaryTrainingWrapper"),
        ("peft.peft_model", "PeftModel"),
        ("peft.mixed_model", "PeftMixedModel"),
    )
    loaded = ((sys.modules.get(place), kind) for place, kind in kinds)
    return any(isinstance(module, getattr(place, kind)) for place, kind in loaded if hasattr(place, kind))


def features(module: nn.Module) -> tuple[Any, Any]:
    """``in_features`` and ``out_features`` of `module`; None for one that it does not have."""
    if is_dense(module):
        weight: Any = module.weight
        return tuple(weight.shape if is_conv1d(module) else weight.shape[::-1])
    ins, outs = ("nx", "nf") if is_conv1d(module) else ("in_features", "out_features")
    return _own(module, ins), _own(module, outs)


def _own(module: nn.Module, name: str) -> Any:
    # without __getattr__, which compile and checkpoint wrappers forward to the module inside
    return getattr(module, name) if name in vars(module) or hasattr(type(module), name) else None


def why_not_adaptable(module: nn.Module) -> str:
    """Why `CoToLoRALinear.from_linear` cannot take `module`; empty if it can."""
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        return f"got {kind}"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return f"got {kind}, whose weight nn.MultiheadAttention passes to a functional without calling the module"
    if hasattr(module, "lora_a") or hasattr(module, "base_layer"):  # ours, and PEFT's
        return f"got a {kind} that is an adapter already"
    if isinstance(vars(module).get("weight"), Tensor):
        # torch's old weight_norm and prune: their hook would move to the layer and set a weight there
        return f"got a {kind} whose weight is a Tensor, not an nn.Parameter: a hook sets it before each forward"
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in features(module)):
        return f"got {kind}, whose in_features and out_features are not positive integers"
    if type(module).forward is nn.Module.forward:
        return f"got {kind}, which has no forward"
    if any(hasattr(t, "device_mesh") for t in chain(module.parameters(), module.buffers())):
        return f"got a {kind} that is sharded already: an adapter made now would not be sharded or synchronised with it"
    return why_no_linear_map(module)


def why_no_linear_map(module: nn.Module) -> str:
    """Why the forward of `module` does not map in_features to out_features; empty if it does or cannot be tested.

    The test runs on the meta device, where nothing is computed and every rank gets the same result. It finds subclasses
    of nn.Linear that are routers, which return a tuple, or that hold the weights of several groups.
    """
    if complex_one := next((name for name, p in module.named_parameters() if p.is_complex()), None):
        return f"got a {type(module).__name__}, whose {complex_one} is complex"
    forward = type(module).forward
    if forward in (nn.Linear.forward, nn.Identity.forward) or is_conv1d(module) or _wants_more_than_x(forward):
        return ""
    tensors = [*module.parameters(), *module.buffers()]
    # a packed weight needs its own kernel; such a module was made to replace a linear
    if not all(
        type(t) in (nn.Parameter, Tensor) and t.dtype in _COMPUTED_IN and t.layout == torch.strided for t in tensors
    ):
        return ""
    ins, outs = features(module)
    dtype = tensors[0].dtype if tensors else torch.float32
    kind, reasons = type(module).__name__, []
    for leading in ((1,), (1, 1), (1, 1, 1)):
        shape, x = (*leading, ins), torch.empty(*leading, ins, dtype=dtype, device="meta")
        try:
            with torch.no_grad():
                y = forward(_on_meta(module), x)
        except Exception as error:
            if "meta" in str(error).lower():  # an operation that the meta device does not support
                return ""
            reasons.append(f"raises on an input of shape {shape}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if isinstance(y, Tensor) and y.is_floating_point() and y.shape == (*leading, outs):
            return ""
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        reasons.append(f"returns {got}, not a tensor of shape {(*leading, outs)}, for an input of shape {shape}")
    return f"got a {kind}, whose forward {reasons[0]}"


def _wants_more_than_x(forward: Callable[..., Any]) -> bool:
    others = list(inspect.signature(forward).parameters.values())[2:]
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` on the meta device, without hooks, whose forward cannot change the original."""
    twin = object.__new__(type(module))  # not copy.copy, which parametrised modules refuse
    twin.__dict__.update(vars(module))
    twin.__dict__.pop("forward", None)
    for name, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            twin.__dict__[name] = OrderedDict() if name.endswith("_hooks") else copy.copy(value)
    twin._parameters = {name: _without_memory(t) for name, t in module._parameters.items()}
    twin._buffers = {name: _without_memory(t) for name, t in module._buffers.items()}
    twin._modules = {name: None if child is None else _on_meta(child) for name, child in module._modules.items()}
    return twin


def _without_memory(t: Tensor | None) -> Any:
    if t is None:
        return None
    empty = torch.empty_like(t, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty


def check_foreign(module: nn.Module, variant: str, init: str) -> None:
    """Raises ValueError if `variant` or `init` would read the weight of a base that is not dense."""
    adding = tuple(name for name, kind in VARIANTS.items() if kind.addition is not None)
    for name, value, allowed in (("variant", variant, adding), ("init", init, FOREIGN_INITS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed} on {why_not_dense(module)}; got {value!r}")


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of A and B for a base that is not dense: float32, or float64 if one of its parameters is."""
    first = next(chain(module.parameters(), module.buffers()), None)
    double = any(parameter.dtype == torch.float64 for parameter in module.parameters())
    return torch.device("cpu") if first is None else first.device, torch.float64 if double else torch.float32


class ReadThrough(nn.Module):
    """Makes the attributes of ``base`` readable on the layer around it, for code that expects the base there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # names with an underscore, which other packages keep for themselves (accelerate's _hf_hook), stay private
            if name.startswith("_") or (base := self.__dict__["_modules"].get("base")) is None:
                raise
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") or self._shows(name):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._shows(name):
            delattr(self.base, name)
        else:
            super().__delattr__(name)

    def _shows(self, name: str) -> bool:
        """Whether the layer reads the attribute `name` from its base."""
        if name.startswith("_") or name in self.__dict__ or hasattr(type(self), name):
            return False
        parameters, buffers, modules = (self.__dict__.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules"))
        own = name in parameters or name in buffers or name in modules
        return not own and hasattr(modules.get("base"), name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The base before the layer: some code takes dtype and device of a model from its first parameter."""
        found = super().named_modules(memo, prefix, remove_duplicate)
        own = next(found, None)
        yield from found
        if own is not None:
            yield own


def materialise(layer: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Replaces those of the tensors `names` that are on the meta device by uninitialised ones on `device`."""
    for name in names:
        if (t := getattr(layer, name)) is not None and t.is_meta:
            empty = torch.empty_like(t, device=device)
            setattr(layer, name, nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty)


def keep_keys(layer: nn.Module) -> None:
    """Keeps the state dict keys of ``layer.base`` as they are without the layer around it."""
    layer.register_state_dict_post_hook(_without_base)
    layer.register_load_state_dict_pre_hook(_with_base)
    # the base is loaded after the layer
    layer.register_load_state_dict_post_hook(_start_beside_base)


def _start_beside_base(layer: Any, incompatible_keys: Any) -> None:
    if layer.lora_a.is_meta and place_of(layer.base)[0].type != "meta":
        layer.reset_parameters()


def _without_base(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    inside = prefix + "base."
    # remove all before adding any: a base may itself hold a module named base
    moved = {key.removeprefix(inside): state_dict.pop(key) for key in list(state_dict) if key.startswith(inside)}
    state_dict.update({prefix + name: value for name, value in moved.items()})
    metadata = getattr(state_dict, "_metadata", {})
    for key in [key for key in metadata if f"{key}.".startswith(inside)]:
        # in addition to the old entry, which a layer like this reads on loading
        metadata[(prefix + f"{key}.".removeprefix(inside))[:-1]] = metadata[key]


def _with_base(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {prefix + name for name, _ in layer.named_parameters(recurse=False)}
    names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix) and key not in own]
    moved = {name: state_dict.pop(prefix + name) for name in names}
    state_dict.update({f"{prefix}base.{name}": value for name, value in moved.items()})
