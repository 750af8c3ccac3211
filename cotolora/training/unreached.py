"""Adapters that were on in a training step and had no gradient: they are named once, with or without a CoTo."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cotolora.wording import LOG_LINE, listed

logger = logging.getLogger("cotolora")
Adapter = TypeVar("Adapter")

# the names of layers that no step of an optimizer has told of yet
_watched: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def trained_by(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    """The parameters of `optimizer` that could have a gradient; none where no parameter has one."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    # else it is no step of a training loop
    return {p for p in held if p.requires_grad} if any(p.grad is not None for p in held) else set()


def without_gradient(adapters: Iterable[Adapter], optimizer: torch.optim.Optimizer) -> list[Adapter]:
    """Those of `adapters` whose parameters have no gradient, though others of `optimizer` have."""
    held, found = trained_by(optimizer), list[Any](adapters)
    parameters = ((one, [p for p in one.adapter_parameters if p in held]) for one in found)
    return [one for one, own in parameters if own and all(p.grad is None for p in own)]


def warn_of_unreached(names: Collection[str]) -> None:
    """Warns of adapters that were on in a training step and had no gradient."""
    if names:
        logger.warning(
            "these adapters were on in a training step and had no gradient, so they do not learn: %s (no forward "
            "called their layers, or the loss does not depend on them, or the model reads the weight past the layer)",
            listed(names, LOG_LINE),
        )


def watch(layers: Mapping[str, nn.Module]) -> None:
    """Looks after the steps of any optimizer at those of `layers`, by name, that it trains, until each has been seen.

    A hook of all optimizers and none of the layers: nothing is added to a forward.
    """
    _watched.update({layer: name for name, layer in layers.items()})
    _hear_of_steps()


@functools.cache
def _hear_of_steps() -> None:
    # for good: torch goes through these hooks while they run, when none may be removed
    register_optimizer_step_post_hook(_after_step)


def unwatch(layers: Iterable[nn.Module]) -> None:
    """Leaves `layers` to another, who sees the same."""
    for layer in layers:
        _watched.pop(layer, None)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched:
        return
    held = trained_by(optimizer)
    seen: dict[Any, str] = {}
    for layer, name in list(_watched.items()) if held else ():
        on = layer.training and layer.active is not False and not layer.merged
        if on and not held.isdisjoint(layer.adapter_parameters):  # type: ignore[arg-type]
            seen[layer] = name
    warn_of_unreached([seen[layer] for layer in without_gradient(seen, optimizer)])
    unwatch(seen)
