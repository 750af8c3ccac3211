"""Saves and loads the states of an optimizer some of whose parameters have had no step yet."""

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
    """Makes torch.distributed.checkpoint save and load `optimizer`, though some parameters have no state yet.

    An adapter that has never been on has no optimizer state, and none is ever written to a plain ``state_dict()``. But
    torch.distributed.checkpoint needs states for the same parameters where it saves and where it loads, which differ
    here. So in a state_dict that it asks for, every parameter without a state has a stand-in, of the right shapes and
    full of NaN. Stand-ins are removed after they are loaded, now or before this call.

    Returns:
        handles that undo this.
    """
    _remove_stand_ins(optimizer)
    cleaned = optimizer.state

    def remove_what_was_loaded(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # a load_state_dict of an optimizer's own, as bitsandbytes has, may call no hook; a new dict shows that it ran
        nonlocal cleaned
        if optimizer.state is not cleaned:
            cleaned = optimizer.state
            _remove_stand_ins(optimizer)

    return [
        optimizer.register_state_dict_pre_hook(remove_what_was_loaded),
        optimizer.register_state_dict_post_hook(_add_stand_ins),
        optimizer.register_load_state_dict_post_hook(remove_what_was_loaded),
        optimizer.register_step_pre_hook(remove_what_was_loaded),
        optimizer.register_step_pre_hook(_skip_first_step),
    ]


def _skip_first_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # torch.distributed.checkpoint makes an optimizer without states step with gradients of zero, and leaves the states
    if called_from(_CHECKPOINT):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def _add_stand_ins(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    if not called_from(_CHECKPOINT):
        return
    saved = state_dict["state"]
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        keys = dict(zip(group["params"], packed["params"], strict=True))
        missing = [p for p, key in keys.items() if p.requires_grad and not saved.get(key)]
        states, shared = _first_states(optimizer, group, missing)
        for parameter, state in zip(missing, states, strict=True):
            stand_in = {name: value if name in shared else _stand_in(value) for name, value in state.items()}
            if _is_stand_in(stand_in, shared):
                saved[keys[parameter]] = stand_in


def _first_states(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[Tensor]
) -> tuple[list[dict[str, Any]], set[str]]:
    """The states that `optimizer` gives `parameters` of `group` in their first step, taken with copies of them.

    Also the names of what it gives all of them in common, such as bitsandbytes' table of what 8 bits stand for: that is
    no state of any of them, and a stand-in has it as it is.
    """
    copies = [parameter.detach().clone().requires_grad_() for parameter in (*parameters, *parameters[-1:])]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    twin: Any = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer), state=defaultdict(dict), param_groups=[{**group, "params": copies}])
    vars(twin).update({name: OrderedDict() for name in _HOOKS})
    vars(twin).pop("step", None)  # which a learning rate scheduler binds to the optimizer itself
    if not copies:
        return [], set()
    if callable(train := getattr(twin, "train", None)):  # schedule-free ones step in this mode alone
        train()
    twin.step()
    *states, again = (twin.state[copy] for copy in copies)
    return states, {name for name, value in again.items() if isinstance(value, Tensor) and value is states[-1][name]}


def _stand_in(value: Any) -> Any:
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


def _is_stand_in(state: dict[str, Any], shared: Collection[str] = ()) -> bool:
    """Whether all numbers of `state` but `shared` are NaN, counts of steps too, which no training makes of them."""
    own = [value for name, value in _numbers(state).items() if name not in shared]
    return bool(own) and all(_is_nan(value) for value in own)


def _remove_stand_ins(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        shared: set[str] | None = None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state or not any(_is_nan(value) for value in _numbers(state).values()):
                continue
            whole = _is_stand_in(state)
            if not whole and shared is None:
                _, shared = _first_states(optimizer, group, [parameter])
            if whole or _is_stand_in(state, shared or ()):
                del optimizer.state[parameter]
