"""Optimizer states that are whole where they are saved, though some parameters have had no step yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


def keep_whole(optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """Makes ``optimizer.state_dict()`` hold zeros for parameters that have no state yet; loading them leaves none.

    An adapter that has never been on has none, and which those are differs between the run that saves and the
    one that loads. torch.distributed.checkpoint loads only into states of the same keys, so without this it
    refuses the checkpoint or drops a part of it. Nothing in memory changes. Zeros at step 0 are what torch's
    optimizers begin with anyway, so that such a state also loads where this was not called.

    Args:
        optimizer: one whose states are None, numbers, 0-dim or of their parameter's shape; others are left as they are.

    Returns:
        handles that undo this.
    """
    return [
        optimizer.register_state_dict_post_hook(_fill),
        optimizer.register_load_state_dict_post_hook(_forget_zeros),
    ]


def _fill(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    saved = state_dict["state"]
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        keys = dict(zip(group["params"], packed["params"], strict=True))
        sample = next((parameter for parameter, key in keys.items() if saved.get(key)), None)
        if sample is None or not all(_is_plain(value, sample) for value in saved[keys[sample]].values()):
            continue
        for parameter, key in keys.items():
            if parameter.requires_grad and not saved.get(key):
                saved[key] = {name: _zeros(value, parameter) for name, value in saved[keys[sample]].items()}


def _is_plain(value: object, parameter: Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 or value.shape == parameter.shape
    return value is None or isinstance(value, (int, float))


def _zeros(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros_like(value if value.dim() == 0 else parameter, dtype=value.dtype, requires_grad=False)
    return None if value is None else type(value)(0)


def _forget_zeros(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in list(optimizer.state.items()):
        # the count of steps, where there is one, decides without reading everything
        values = [state["step"]] if "step" in state else list(state.values())
        if not any(bool(value.any()) if isinstance(value, Tensor) else bool(value) for value in values):
            del optimizer.state[parameter]
