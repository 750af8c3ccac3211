"""Lets torch.distributed.checkpoint save and load an optimizer that lacks states for some parameters."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from cotolora.training.callers import called_from

_CHECKPOINT = "torch.distributed.checkpoint"
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def support_missing_states(optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """Makes torch.distributed.checkpoint save and load `optimizer` although some parameters have no state yet.

    An adapter that has never been active has no optimizer state, and a plain ``state_dict()`` contains none for it. But
    torch.distributed.checkpoint needs states of the same parameters on saving and on loading, and these sets can differ
    here. So a state_dict that it requests has a placeholder for every parameter without a state, of the right shapes
    and filled with NaN. Placeholders are removed after they are loaded, also if that was before this call.

    Returns:
        handles that undo this.
    """
    _remove_placeholders(optimizer)
    cleaned = optimizer.state

    def remove_what_was_loaded(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # an optimizer with its own load_state_dict (bitsandbytes) may call no hook; a new dict shows that it ran
        nonlocal cleaned
        if optimizer.state is not cleaned:
            cleaned = optimizer.state
            _remove_placeholders(optimizer)

    return [
        optimizer.register_state_dict_pre_hook(remove_what_was_loaded),
        optimizer.register_state_dict_post_hook(_add_placeholders),
        optimizer.register_load_state_dict_post_hook(remove_what_was_loaded),
        optimizer.register_step_pre_hook(remove_what_was_loaded),
        optimizer.register_step_pre_hook(_skip_first_step),
    ]


def _skip_first_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # torch.distributed.checkpoint steps an optimizer without states once, with gradients of zero, to create states
    if called_from(_CHECKPOINT):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _add_placeholders(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    if not called_from(_CHECKPOINT):
        return
    saved = state_dict["state"]
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        keys = dict(zip(group["params"], packed["params"], strict=True))
        missing = [p for p, key in keys.items() if p.requires_grad and not saved.get(key)]
        states, shared = _first_states(optimizer, group, missing)
        for parameter, state in zip(missing, states, strict=True):
            placeholder = {name: value if name in shared else _placeholder(value) for name, value in state.items()}
            if _is_placeholder(placeholder, shared):
                saved[keys[parameter]] = placeholder


def _first_states(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[Tensor]
) -> tuple[list[dict[str, Any]], set[str]]:
    """The states that `optimizer` creates for `parameters` of `group` in a first step, found by stepping copies.

    Also returns the names of entries that all states share, such as bitsandbytes' quantisation table. These are not
    specific to a parameter, and a placeholder contains them unchanged.
    """
    copies = [parameter.detach().clone().requires_grad_() for parameter in (*parameters, *parameters[-1:])]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    twin: Any = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer), state=defaultdict(dict), param_groups=[{**group, "params": copies}])
    vars(twin).update({name: OrderedDict() for name in _HOOKS})
    vars(twin).pop("step", None)  # a learning rate scheduler sets one that is bound to the original optimizer
    if not copies:
        return [], set()
    if callable(train := getattr(twin, "train", None)):  # schedule-free optimizers step only in train mode
        train()
    twin.step()
    *states, again = (twin.state[copy] for copy in copies)
    return states, {name for name, value in again.items() if isinstance(value, Tensor) and value is states[-1][name]}


def _placeholder(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.full_like(value, math.nan, requires_grad=False)
    return math.nan if isinstance(value, float) else value


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
    }


def _is_nan(value: Any) -> bool:
    return bool(torch.as_tensor(value).isnan().all())


def _is_placeholder(state: dict[str, Any], shared: Collection[str] = ()) -> bool:
    """Whether all floats of `state` except `shared` are NaN, even step counts, which training never makes NaN."""
    own = [value for name, value in _numbers(state).items() if name not in shared]
    return bool(own) and all(_is_nan(value) for value in own)


def _remove_placeholders(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        shared: set[str] | None = None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state or not any(_is_nan(value) for value in _numbers(state).values()):
                continue
            whole = _is_placeholder(state)
            if not whole and shared is None:
                _, shared = _first_states(optimizer, group, [parameter])
            if whole or _is_placeholder(state, shared or ()):
                del optimizer.state[parameter]
