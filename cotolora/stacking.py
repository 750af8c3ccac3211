"""Computes once what the adapters of projections that read one x have in common."""

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
    r"""Lets adapters that read one x, such as those of q, k and v, share what they compute of it.

    With A = [A₁; A₂; …] of the layers that are called with the same tensor in one forward of their parent:

        h = scale · x Aᵀ        yᵢ = x Wᵢᵀ + biasᵢ + hᵢ Bᵢᵀ
        dx = Σᵢ dyᵢ Wᵢ + p A    dA = pᵀ x    dBᵢ = dyᵢᵀ hᵢ,    pᵢ = scale · dyᵢ Bᵢ

    so h, dA and the low-rank part of dx take one product each instead of one a layer, and dx is summed in place. The
    modules stay where they are and are called as before; state dicts and files do not change. Results are those of
    single layers but for the order in which floating-point numbers are added. They share one node of the graph: of
    losses of different yᵢ that are differentiated one by one, all but the last need ``retain_graph=True``, and no A or
    B of the group may be written to before the last.

    Gates may differ within a group. Where a gate is a tensor, off selects the base as in a single layer, and a gate on
    a device is read by the device alone; a layer whose adapter the host knows to be off is computed by itself.

    A layer is computed by itself, as without this, where it is called with another tensor than the others, or with one
    that was written to in between, or outside a forward of its parent, or in a checkpoint or other hooks on saved
    tensors that begin inside that forward; if the layer has changed in between; if its adapter is off, merged or of
    another scale, or A or B has hooks on its gradient, which must see none where the layer is not used; in training
    with dropout: each layer drops entries of x by a mask of its own, so that there is no one product, and one mask for
    all would correlate what they drop; under torch.compile, torch.func, ``torch.jit.trace`` and
    ``torch.inference_mode``; by the reference, whose results are what others are held to; where
    ``set_backend("triton:one_pass")`` asks for a form that computes h in its GEMM; where the ranks of a group add up to
    more than the fused kernels take; on a CPU where x has fewer than 256 features, which would take longer; and in
    copies of the model.

    By the fused kernels h is one launch and dA another, each with one read of x; the vendor's GEMMs add up dx. Where
    ``backend="auto"`` has another backend for each layer, the group takes the one that is modelled fastest for all.

    Args:
        model: a model with adapters.
        groups: of each group the names of its layers as they end, below one parent: ``[["q_proj", "k_proj",
            "v_proj"], ["gate_proj", "up_proj"]]``. Every parent with two or more of a group has one. What an earlier
            call has stacked in `model` is undone first, so that ``[]`` undoes all.

    Returns:
        the names of the layers of each group that was found, in the order of `groups` and of the model.

    Raises:
        TypeError: `model` is not a module, or `groups` not a list of lists of strings.
        ValueError: `model` has no adapters; a name is in two groups; no parent holds two layers of a group; or they
            can never be computed together: they have different in_features, a base without a dense weight, another
            variant than "lora" or an init from W, or their parent, as an ``nn.ModuleList``, has no forward.

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
    """Undoes `stack`, and leaves nothing of it."""
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
    """None of a module that others have given the hooks of a parent."""
    return vars(parent).get("_stacks", ((),))[0]
