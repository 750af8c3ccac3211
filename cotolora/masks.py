"""Switches adapters on and off inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from cotolora.checks import shown
from cotolora.groups import Unit, adapters, as_mask, group_names, modules_of
from cotolora.linear import CoToLoRALinear
from cotolora.reference import Gate


@contextmanager
def temporarily_enabled(layers: Mapping[str, CoToLoRALinear], switches: Mapping[str, Gate]) -> Iterator[None]:
    """Inside the block, sets `enabled` of the adapters named in `switches`; restores the old values after it."""
    before = {name: layers[name].enabled for name in switches}
    try:
        for name, switch in switches.items():
            layers[name].enabled = switch
        yield
    finally:
        for name, switch in before.items():
            layers[name].enabled = switch


@contextmanager
def adapter_mask(model: nn.Module, mask: object, *, unit: Unit = "module") -> Iterator[None]:
    """Inside the block, sets `enabled` of every adapter; restores the old values after it.

    Applies in training and evaluation. Blocks can be nested; a block that raises restores the old values too.

    Args:
        model: a model with adapters.
        mask: a bool for all adapters; ``[n]`` for the n groups in module order; or ``[batch, n]``, whose row i
            switches the groups for sample i of a batch-first model. May be a tensor or anything that
            `torch.tensor` accepts; its values must be 0, 1, True or False.
        unit: how adapters are grouped: "module" (each is its own group), "layer" or a callable, as in `CoTo`.

    Raises:
        TypeError: `model` is not a module, or `unit` is neither a string nor a callable.
        ValueError: `model` has no adapters; `mask` has another shape, or values other than 0 and 1.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")
    groups = group_names(layers, unit, modules_of(model))
    values = as_mask(mask)
    if values.dim() > 2 or (values.dim() > 0 and values.shape[-1] != len(groups)):
        raise ValueError(
            f"mask must be a bool, [{len(groups)}] or [batch, {len(groups)}], one entry for each group; "
            f"got shape {tuple(values.shape)}, {shown(mask)}"
        )
    # plain bools where one value applies to the whole batch: an inactive adapter then launches no kernels
    switches: list[bool | Tensor]
    if values.dim() == 0:
        switches = [bool(values)] * len(groups)
    elif values.dim() == 1:
        switches = values.tolist()
    else:
        switches = list(values.unbind(1))

    of_name = {name: switch for names, switch in zip(groups.values(), switches, strict=True) for name in names}
    with temporarily_enabled(layers, of_name):
        yield
