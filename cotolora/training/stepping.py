"""Does something just before an optimizer's step, whoever wraps the optimizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def before_each_step(optimizer: torch.optim.Optimizer, action: Callable[[], None]) -> RemovableHandle:
    """Calls `action` before each step of `optimizer` moves anything; returns a handle that undoes this.

    Args:
        optimizer: also one wrapped by accelerate or Lightning; where it runs backward in a closure, `action`
            follows each call of it.
        action: changes gradients.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
    """
    optimizer = unwrapped(optimizer)

    def before_step(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Lightning runs backward inside the step, in a closure: there the gradients are those that it leaves
        followed = tuple(_followed_by(action, value) if callable(value) else value for value in args)
        if callable(closure := kwargs.get("closure")):
            return followed, {**kwargs, "closure": _followed_by(action, closure)}
        if followed == args:
            action()
        return followed, kwargs

    return optimizer.register_step_pre_hook(before_step)


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's or Lightning's.

    Raises:
        TypeError: there is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    return optimizer


class Together(RemovableHandle):
    """Several handles as one."""

    def __init__(self, *handles: RemovableHandle) -> None:
        super().__init__(OrderedDict())
        self._handles = handles

    def remove(self) -> None:
        """Removes all of them; twice is once."""
        for handle in self._handles:
            handle.remove()


def _followed_by(then: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then()
        return result

    return both
