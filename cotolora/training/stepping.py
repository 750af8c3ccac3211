"""Hooks that run just before an optimizer's step, also if accelerate or Lightning wraps the optimizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def register_before_step(optimizer: torch.optim.Optimizer, action: Callable[[], None]) -> RemovableHandle:
    """Calls `action` before each step of `optimizer` changes a parameter; returns a handle that undoes this.

    Args:
        optimizer: may be wrapped by accelerate or Lightning. If its step gets a closure, `action` runs after
            each call of the closure, which computes the gradients.
        action: changes gradients.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
    """
    optimizer = unwrap_optimizer(optimizer)

    def before_step(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Lightning runs backward in a closure inside the step, so the gradients exist only after the closure
        new_args = tuple(_followed_by(action, value) if callable(value) else value for value in args)
        if callable(closure := kwargs.get("closure")):
            return new_args, {**kwargs, "closure": _followed_by(action, closure)}
        if new_args == args:
            action()
        return new_args, kwargs

    return optimizer.register_step_pre_hook(before_step)


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside a wrapper of accelerate or Lightning.

    Raises:
        TypeError: `optimizer` is neither a torch optimizer nor a wrapper of one.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if isinstance(optimizer, type) or not hasattr(optimizer, "register_step_pre_hook"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    return optimizer


class CombinedHandle(RemovableHandle):
    """One handle that removes several hooks, and calls `then` once they are removed."""

    def __init__(self, *handles: RemovableHandle, then: Callable[[], None]) -> None:
        super().__init__(OrderedDict())
        self._handles = list(handles)
        self._then = then

    def remove(self) -> None:
        """Removes all of them. A second call does nothing."""
        if self._handles:
            while self._handles:
                self._handles.pop().remove()
            self._then()


def _followed_by(action: Callable[[], None], closure: Callable[..., Any]) -> Callable[..., Any]:
    def closure_and_action(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        action()
        return result

    return closure_and_action
