"""`stack`: adapters of projections with the same input share the low-rank products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotolora.checks import entries, strings
from cotolora.groups import adapters, modules_of
from cotolora.linear import CoToLoRALinear
from cotolora.stacked_calls import Stack
from cotolora.variants.base import FROM_WEIGHT
from cotolora.wording import listed, shown


def stack(model: nn.Module, groups: Sequence[Sequence[str]]) -> list[list[str]]:
    r"""Lets adapters of layers with the same input, such as q, k and v, share their low-rank products.

    For layers that are called with the same tensor in one forward of their parent, with A = [A₁; A₂; …]:

        h = scale · x Aᵀ        yᵢ = x Wᵢᵀ + biasᵢ + hᵢ Bᵢᵀ
        dx = Σᵢ dyᵢ Wᵢ + p A    dA = pᵀ x    dBᵢ = dyᵢᵀ hᵢ,    pᵢ = scale · dyᵢ Bᵢ

    h, dA and the low-rank part of dx take one product for the group instead of one for each layer, and dx is summed in
    place. Modules stay where they are and are called as before; state dicts and files do not change. Results differ
    from those of single layers only in the order of floating-point sums. All yᵢ share one autograd node: if losses of
    different yᵢ are differentiated separately, every backward but the last needs ``retain_graph=True``, and no A or B
    of the group may be written to before the last.

    Gates may differ within a group. A tensor gate of 0 selects the base, as in a single layer, and a gate on a device
    is read only by the device. A layer whose adapter is inactive on the host is computed by itself.

    A layer is computed by itself, as without `stack`,

    - if it is called with another tensor than the others, with a tensor that was written to in between, outside a
      forward of its parent, or in a checkpoint (or other saved-tensor hooks) that begins inside that forward;
    - if the layer has changed in between; if its adapter is inactive, merged or has another scale; or if A or B has
      gradient hooks, which must not run for a layer that is not used;
    - in training with dropout: each layer draws its own mask of x, so there is no common product, and one mask for the
      group would correlate the layers;
    - under torch.compile, torch.func, ``torch.jit.trace`` and ``torch.inference_mode``;
    - with ``backend="reference"``, and with ``set_backend("triton:one_pass")``, which computes h within its GEMM;
    - if the ranks of the group add up to more than the fused kernels support;
    - on a CPU if x has fewer than 256 features, where stacking takes longer;
    - in copies of the model.

    With the fused kernels, h is one launch and dA another, each with one read of x, and vendor GEMMs sum dx. If
    ``backend="auto"`` chooses different backends for the layers, the group uses the one with the least modelled time.

    Args:
        model: a model with adapters.
        groups: for each group the ends of the names of its layers below one parent, for example ``[["q_proj", "k_proj",
            "v_proj"], ["gate_proj", "up_proj"]]``. Every parent with two or more of these layers gets a group. Groups
            of an earlier call on `model` are undone first, so ``[]`` undoes all.

    Returns:
        the names of the layers of each group found, in the order of `groups` and of the model.

    Raises:
        TypeError: `model` is not a module, or `groups` not a list of lists of strings.
        ValueError: `model` has no adapters; a name is in two groups; no parent holds two layers of a group; or its
            layers can never be computed together: they differ in in_features, have a base without a dense weight,
            another variant than "lora" or an init from W, or their parent has no forward (``nn.ModuleList``).

    >>> from cotolora import inject
    >>> class Attention(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return self.q(x) @ self.k(x).mT
    >>> model = nn.Sequential(Attention(), Attention())
    >>> layers = inject(model, rank=2)
    >>> stack(model, [["q", "k"]])
    [['0.q', '0.k'], ['1.q', '1.k']]
    """
    layers = adapters(model)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")
    modules = modules_of(model)
    found = [placed for i, ends in enumerate(_checked(groups)) for placed in _places(i, ends, layers)]
    for parent, names in found:
        _check_place(parent, modules[parent], {name: layers[name] for name in names})
    unstack(model)
    for parent, names in found:
        _add(modules[parent], Stack({name: layers[name] for name in names}))
    return [names for _, names in found]


def _checked(groups: object) -> list[list[str]]:
    must, found = "a list of lists of names", []
    if isinstance(groups, Tensor):
        raise TypeError(f"groups must be {must}; got {shown(groups)}")
    for i, names in enumerate(entries("groups", groups, must)):
        found.append(ends := strings(f"groups[{i}]", names, "a list of names"))
        if len(set(ends)) < max(2, len(ends)) or not all(ends):
            raise ValueError(f"groups[{i}] must hold two or more names, each once; got {shown(ends)}")
    names = [name for ends in found for name in ends]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"groups must hold each name once; got {listed(twice)} in two of them")
    return found


def _places(i: int, ends: Sequence[str], layers: Mapping[str, CoToLoRALinear]) -> list[tuple[str, list[str]]]:
    """The parents that hold two or more layers whose names end in `ends`, with the names."""
    found: dict[str, list[str]] = {}
    for name in layers:
        for end in ends:
            if f".{name}".endswith(f".{end}"):
                found.setdefault(name[: -len(end)].removesuffix("."), []).append(name)
    if not (places := [(parent, names) for parent, names in found.items() if len(names) > 1]):
        raise ValueError(
            f"groups[{i}] must name two or more adapters of one parent; got {listed(ends)}, and the adapters are "
            f"{listed(layers)}"
        )
    return places


def _check_place(parent: str, holder: nn.Module, layers: Mapping[str, CoToLoRALinear]) -> None:
    """Raises ValueError if these can never be computed together."""
    must = f"groups must hold layers that read one x; those of {parent!r} cannot"
    if isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"{must}, whose {type(holder).__name__} has no forward to call them in")
    sizes = {name: layer.in_features for name, layer in layers.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{must}: in_features differ, {sizes}")
    for name, layer in layers.items():
        if reason := _why_never(layer):
            raise ValueError(f"{must}: {name!r} has {reason}")


def _why_never(layer: CoToLoRALinear) -> str:
    if layer.base is not None:
        return f"a base without a dense weight, {type(layer.base).__name__}"
    if layer.variant != "lora":
        return f"variant {layer.variant!r}, and must have 'lora'"
    return f"init {layer.init!r}, which is from W" if layer.init in FROM_WEIGHT else ""


def _add(parent: nn.Module, new: Stack) -> None:
    if "_stacks" not in vars(parent):
        before = parent.register_forward_pre_hook(_before_forward)
        vars(parent)["_stacks"] = [], before, parent.register_forward_hook(_after_forward, always_call=True)
    vars(parent)["_stacks"][0].append(new)


def unstack(model: nn.Module) -> None:
    """Undoes `stack` and removes its hooks."""
    for parent in model.modules():
        stacks, *handles = vars(parent).pop("_stacks", ((),))
        for earlier in stacks:
            earlier.remove()
        for handle in handles:
            handle.remove()


def _before_forward(parent: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        for own in _stacks_of(parent):
            own.begin()


def _after_forward(parent: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for own in _stacks_of(parent):
            own.end(output)


def _stacks_of(parent: nn.Module) -> Sequence[Stack]:
    """The stacks of a parent; empty for a module to which other code has copied the hooks of a parent."""
    return vars(parent).get("_stacks", ((),))[0]
