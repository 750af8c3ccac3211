"""Where a model has the tensors that files speak of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from cotolora.linear import CoToLoRALinear

# what PEFT calls the module inside an adapter, and the modules inside what modules_to_save takes
_BASE, _ORIGINAL, _COPY = "base_layer", "original_module", "modules_to_save"


def join_names(*names: str) -> str:
    """The names that are not empty, with dots between."""
    return ".".join(filter(None, names))


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of `module` itself."""
    kept = (item for item in module.named_buffers(recurse=False) if item[0] not in module._non_persistent_buffers_set)
    return dict([*module.named_parameters(recurse=False), *kept])


def inside_bases(model: nn.Module) -> set[nn.Module]:
    """The modules that adapters call as their base, with all that these hold."""
    bases = (module.base for module in model.modules() if isinstance(module, CoToLoRALinear))
    return {module for base in bases if base is not None for module in base.modules()}


def base_state(linear: nn.Module) -> dict[str, Tensor]:
    """The tensors of what an adapter is around, or would be, whether it is merged or not."""
    if isinstance(linear, CoToLoRALinear):
        if linear.base is None:
            bias = {} if linear.bias is None else {"bias": linear.bias}
            return {"weight": linear._base_weight(), **bias}
        linear = linear.base
    return {key: value for key, value in linear.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def base_tensors(linears: Mapping[str, nn.Module], keys: Iterable[str]) -> dict[str, Tensor]:
    """What `keys`, as PEFT writes them, mean of the bases of adapters: it saves those of embeddings and heads."""
    found = {}
    for key in keys:
        name, inside, attribute = key.rpartition(f".{_BASE}.")
        if inside and name in linears and (tensor := base_state(linears[name]).get(attribute)) is not None:
            found[key] = tensor
    return found
