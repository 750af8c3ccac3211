"""Warnings that a run logs once about a model on which CoTo does not work well."""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Iterable, Mapping

import torch
from torch import nn

from cotolora.wording import some_of

logger = logging.getLogger("cotolora")


def warn_of_few_groups(groups: Mapping[Hashable, Collection[str]]) -> None:
    """Warns if there is only one group, which is always active as long as at least one must be."""
    if len(groups) < 2:
        ((key, names),) = groups.items()
        logger.warning(
            "CoTo found only one group of adapters, %r with %d of them, which is therefore always active; use "
            "another unit, such as 'module' or a callable from an adapter's name to its group",
            key,
            len(names),
        )


def warn_of_disabled(disabled: Collection[str], count: int) -> None:
    """Warns of adapters that the user has disabled before the run begins, since they will not train.

    Args:
        disabled: names of these adapters.
        count: number of all adapters.
    """
    if disabled:
        logger.warning(
            "%d of %d adapters are disabled (`enabled`), so they do not train and save_adapter does not write them: "
            "%s; if an earlier prune or adapter_mask disabled them, undo it before creating CoTo",
            len(disabled),
            count,
            some_of(disabled),
        )


def warn_of_stranger(optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter]) -> None:
    """Warns if `optimizer` holds none of the `trained` parameters, for example because it was made before `inject`."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held and held.isdisjoint(trained):
        logger.warning(
            "%s holds no parameter of the model that trains, so its steps train nothing of it; was it made before "
            "inject, or of another model? Make it of adapter_parameters(model) or trainable_parameters(model)",
            type(optimizer).__name__,
        )


def warn_of_many_graphs(model: nn.Module, groups: Iterable[Collection[nn.Module]]) -> None:
    """Warns if torch.compile will trace a graph for every pattern of host gates.

    Args:
        model: the model, with its wrappers.
        groups: the layers that are switched together.
    """
    group_of = {layer: i for i, layers in enumerate(groups) for layer in layers}
    for name, module in model.named_modules():
        if not hasattr(module, "_orig_mod") and getattr(module, "_compiled_call_impl", None) is None:
            continue
        inside = {group_of[child] for child in module.modules() if child in group_of}
        if len(inside) > 1:
            logger.warning(
                "torch.compile traces one graph for each pattern of host gates inside a compiled module, up to its "
                "recompile limit; %s holds %d groups: compile modules of one group each, or use gates='device'",
                name or "the model",
                len(inside),
            )
            return
