"""Finds the adapters and parameters of a model, and sorts adapter names into groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cotolora.checks import function, module, number
from cotolora.linear import CoToLoRALinear
from cotolora.wording import listed, shown, some_of

Unit = str | Callable[[str], Hashable]

# classes that wrap a whole model, and the attribute that holds it; torch.compile's is recognised by its attribute
_HOLDERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
    "lightning_fabric.wrappers._FabricModule": "_forward_module",
}
# components that compile, checkpoint and FSDP1 wrappers insert into names
_WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """`model` and, as long as it is a wrapper such as DistributedDataParallel or a moving average, the model inside."""
    yield model
    kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__)
    inner = getattr(model, next((_HOLDERS[kind] for kind in kinds if kind in _HOLDERS), "_orig_mod"), None)
    if isinstance(inner, nn.Module):
        yield from wrappers(inner)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel, torch.compile, a moving average and other wrappers."""
    *_, inner = wrappers(model)
    return inner


def plain_name(name: str) -> str:
    """`name` without the components that wrappers add.

    >>> plain_name("layers.0._checkpoint_wrapped_module.mlp.up")
    'layers.0.mlp.up'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def adapters(model: nn.Module) -> dict[str, CoToLoRALinear]:
    """Every `CoToLoRALinear` of `model` by its name, in module order.

    Names are those of the unwrapped model. A layer that is reachable under several names is listed
    once, under the first.

    Raises:
        TypeError: `model` is not a module.
    """
    inner = unwrap(module("model", model))
    return {plain_name(name): found for name, found in inner.named_modules() if isinstance(found, CoToLoRALinear)}


def unmerged_adapters(model: nn.Module) -> dict[str, CoToLoRALinear]:
    """The adapters of a model, which must have some and no merged ones.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no adapters, or merged ones.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ValueError(
            f"model must have no merged adapters, which cannot be switched (unmerge them); merged: {listed(merged)}"
        )
    return layers


def is_enabled(layer: CoToLoRALinear) -> bool:
    """Whether the adapter is enabled, at least for one sample."""
    return bool(layer.enabled.any()) if isinstance(layer.enabled, torch.Tensor) else layer.enabled


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of every adapter, in module order: A and B, with DoRA also m; with VeRA its two vectors.

    Raises:
        TypeError: `model` is not a module.
    """
    return [parameter for layer in adapters(model).values() for parameter in layer.adapter_parameters]


def trainable_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """All trainable parameters in groups for an optimizer: first the adapters, then other parameters trained in full.

    The second group exists only if there are such parameters, for example a head that `inject` got as `trainable`. Add
    a key to give a group its own learning rate or weight decay: ``groups[1]["lr"] = 1e-4``.

    Returns:
        groups with "name" ("adapters" or "others") and "params", in module order.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no adapters, or no trainable parameters.

    >>> from cotolora import inject
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> _ = inject(model, ["0"], rank=1, trainable=["1"])
    >>> groups = trainable_parameters(model)
    >>> [(group["name"], len(group["params"])) for group in groups]
    [('adapters', 2), ('others', 2)]
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    if not adapters(model):
        raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")
    of_adapters = {id(p) for p in adapter_parameters(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"model must have trainable parameters; all of {type(model).__name__} is frozen")
    groups = [
        {"name": "adapters", "params": [p for p in trained if id(p) in of_adapters]},
        {"name": "others", "params": [p for p in trained if id(p) not in of_adapters]},
    ]
    return [group for group in groups if group["params"]]


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer in which the learning rate of every B is `ratio` times that of the rest.

    Args:
        model: a model with adapters.
        lr: learning rate of A and of all other trainable parameters.
        ratio: learning rate of B divided by `lr`.

    Returns:
        two groups with "params" and "lr": the rest, then every B.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no adapters; `lr`, `ratio` or their product is not a positive finite number.

    Source: LoRA+, Hayou et al. 2024, section 4 (arXiv:2402.12354).
    """
    lr, ratio = _positive("lr", lr), _positive("ratio", ratio)
    if math.isinf(lr * ratio):
        raise ValueError(f"ratio must leave lr times ratio finite; got {ratio!r} with lr={lr!r}")
    layers = adapters(model)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")
    fast = [layer.lora_b for layer in layers.values() if layer.lora_b.requires_grad]
    known = {id(parameter) for parameter in fast}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": rest, "lr": lr}, {"params": fast, "lr": lr * ratio}]


def _positive(argument: str, value: float) -> float:
    return number(argument, value, "a positive finite number", lambda number: 0 < number < math.inf)


def trainable_report(model: nn.Module) -> str:
    """How many parameters of `model` are trainable, in the format of PEFT's ``print_trainable_parameters``.

    >>> from cotolora import inject
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = inject(model, ["0"], rank=1)
    >>> trainable_report(model)
    'trainable params: 8 || all params: 28 || trainable%: 28.5714'

    Raises:
        TypeError: `model` is not a module.
    """
    every = sum(p.numel() for p in module("model", model).parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = 100 * trained / every if every else 0.0
    return f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {share:.4f}"


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of `model` by its name without wrappers; the module inside a wrapper replaces the wrapper."""
    # a wrapper and the module inside have the same plain name; named_modules yields the latter second, so it wins
    return {plain_name(name): module for name, module in unwrap(model).named_modules()}


def held_at(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The places of each module in the model: one name for every attribute that holds it."""
    found: dict[nn.Module, list[str]] = {}
    for name, holder in model.named_modules():
        for key, child in holder._modules.items():
            if child is not None:
                found.setdefault(child, []).append(plain_name(f"{name}.{key}" if name else key))
    return found


def why_not_in_peft(names: Collection[str]) -> str:
    """Why PEFT cannot represent our adapter on a module in these places; empty if it can."""
    if len(names) < 2:
        return ""
    return (
        f"must be in one place of the model; it is in {some_of(names)}, and PEFT would load its adapter into the first "
        "of these only, while this library's adapter is in all (give the other places copies of the module, which may "
        "share its weight)"
    )


def group_names(
    names: Iterable[str], unit: Unit, modules: Mapping[str, nn.Module] | None = None
) -> dict[Hashable, list[str]]:
    """Sorts adapter names into groups, in the order of their first member.

    With "layer", the adapters of one repeated block form a group: names that agree up to and including the integer
    that counts the blocks. The list of blocks is the outermost list (module whose children are named by integers) with
    two or more children of one class that hold adapters. If a name leads through no such list, lists count whose
    children are adapters themselves; then lists in which a single child holds adapters, unless that child contains one
    of the other lists. A name that leads through no list is its own group.

    Args:
        names: adapter names, in module order.
        unit: "layer" as above; "module": every adapter is its own group; or a callable from a name to the key of its
            group.
        modules: the modules of the model by name, to compare the classes of children; without it all children of a list
            are assumed to be of one class.

    Raises:
        ValueError: `unit` is another string.
        TypeError: `unit` is neither a string nor a callable, or returns a key that cannot be hashed.

    >>> group_names(["embed", "blocks.0.q", "blocks.0.v", "blocks.1.q"], "layer")
    {'embed': ['embed'], 'blocks.0': ['blocks.0.q', 'blocks.0.v'], 'blocks.1': ['blocks.1.q']}
    """
    names, unit = list(names), checked_unit(unit)
    key: Callable[[str], Hashable]
    key = unit if callable(unit) else str if unit == "module" else _layer_key(names, modules)
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        if not isinstance(group := key(name), Hashable):
            raise TypeError(f"unit must return hashable keys; {shown(unit)} returned {shown(group)} for {name!r}")
        groups.setdefault(group, []).append(name)
    return groups


def checked_unit(unit: object) -> Unit:
    """`unit`; raises ValueError if it is another string, TypeError if it is neither a string nor a callable."""
    must = "'layer', 'module' or a callable"
    if isinstance(unit, str):
        if unit not in ("layer", "module"):
            raise ValueError(f"unit must be {must}; got {shown(unit)}")
        return unit
    return function("unit", unit, must)


def _layer_key(names: Collection[str], modules: Mapping[str, nn.Module] | None) -> Callable[[str], str]:
    """The group of a name, see `group_names`."""
    adapters = set(names)
    holding: dict[str, set[str]] = {}  # for each list, its children that are or hold adapters
    for name in names:
        for parent, child in _list_items(name):
            holding.setdefault(parent, set()).add(child)

    def repeated(children: Iterable[str]) -> bool:
        kinds = Counter(None if modules is None else _class_of(modules[child]) for child in children)
        return max(kinds.values(), default=0) > 1

    def all_children(parent: str) -> list[str]:
        assert modules is not None
        return [f"{parent}.{key}" if parent else key for key in modules[parent]._modules if key.isdecimal()]

    blocks = {parent for parent, children in holding.items() if repeated(children - adapters)}
    layers = {parent for parent, children in holding.items() if repeated(children)}
    around = {outer for inner in (*blocks, *layers) for outer, _ in _list_items(inner)}
    others = {parent for parent in holding if modules is None or repeated(all_children(parent))} - around

    def key(name: str) -> str:
        items = _list_items(name)
        return next((child for lists in (blocks, layers, others) for parent, child in items if parent in lists), name)

    return key


def _list_items(name: str) -> list[tuple[str, str]]:
    """The lists on the path `name`, each with its child on that path, outermost first.

    >>> _list_items("0.layers.3.q")
    [('', '0'), ('0.layers', '0.layers.3')]
    """
    parts = name.split(".")
    return [(".".join(parts[:i]), ".".join(parts[: i + 1])) for i, part in enumerate(parts) if part.isdecimal()]


def _class_of(module: nn.Module) -> type:
    """The user's class of `module`: FSDP2 replaces it by a subclass."""
    own = type(module)
    sharded = own.__name__ == f"FSDP{own.__bases__[-1].__name__}" and len(own.__bases__) > 1
    return own.__bases__[-1] if sharded else own


def as_mask(mask: object, argument: str = "mask") -> torch.Tensor:
    """`mask` as a bool tensor; raises ValueError unless all values are 0, 1, True or False."""
    try:
        # a copy, so that later writes to `mask` have no effect
        values = mask.detach().clone() if isinstance(mask, torch.Tensor) else torch.tensor(mask)
        if values.is_floating_point() and not isinstance(mask, torch.Tensor):
            values = torch.tensor(mask, dtype=torch.float64)  # in float32 1 + 1e-9 is 1, and 1e-50 is 0
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"{argument} must be a bool or hold bools, as torch.tensor takes them; got {shown(mask)}"
        ) from None
    dense = not (values.is_meta or values.is_nested or values.is_complex()) and values.layout == torch.strided
    if not dense or (values.dtype != torch.bool and not ((values == 0) | (values == 1)).all()):
        raise ValueError(f"{argument} must hold only 0, 1, True or False; got {shown(mask)}")
    return values != 0
