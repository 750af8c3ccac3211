"""Hooks on the modules that a training loop may call, which act once per outermost call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class EntryHooks:
    """Calls `after` with the output of the outermost forward among the model and its parts.

    A loop may call the model, or only parts of it: ``training_step`` of a LightningModule is not a forward, and towers
    may be called one by one. `after` runs at the end of the outermost of these calls, not of those inside it.

    Args:
        model: the outermost module.
        parts: modules inside it that a loop may call by themselves.
        after: gets the output; returns a replacement, or None to keep it. Also called, with None, if the
            outermost forward has raised.
    """

    def __init__(self, model: nn.Module, parts: Collection[nn.Module], after: Callable[[Any], Any]) -> None:
        self._model, self._parts, self._after = model, list(parts), after
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        """Registers the hooks on the modules. A second call does nothing."""
        self._depth = 0  # a KeyboardInterrupt in a forward skips the hooks that count down
        if not self._handles:
            for module in (self._model, *self._parts):
                leave = module.register_forward_hook(self._leave, always_call=True)
                self._handles += [module.register_forward_pre_hook(self._enter), leave]

    def remove(self) -> None:
        """Removes the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        # a traced count would add a guard to every graph; compiled code is entered through the model
        if not torch.compiler.is_compiling() and not hasattr(module, "_is_replica"):
            self._depth = 1 if module is self._model else self._depth + 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._after(output) if module is self._model else None
        if hasattr(module, "_is_replica"):  # a replica of nn.DataParallel, whose threads would share the count
            return None
        # not below zero: another pre-hook may have raised before _enter ran
        self._depth = 0 if module is self._model else max(self._depth - 1, 0)
        # activation checkpointing calls parts again in the backward; `after` ran in the forward already
        recomputed = torch._C._current_graph_task_id() != -1
        return self._after(output) if self._depth == 0 and not recomputed else None


def entries_below(modules: Mapping[str, nn.Module], group_of: Mapping[str, object]) -> list[nn.Module]:
    """The parts of a model that a loop may call by themselves, without the model itself.

    Args:
        modules: the modules of the model, by name.
        group_of: the group (block) of each adapter, by adapter name.

    Returns:
        modules that hold adapters of several groups, and their children that hold adapters of one; instead of a module
        without a forward, such as a ModuleList, its children. Adapters themselves only if none of these is around
        them, because a hook is slow compared with a layer. No compiled modules, where a hook would be traced.
    """
    groups: dict[str, set[object]] = {}
    for name, group in group_of.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            groups.setdefault(".".join(parts[:i]), set()).add(group)
    compiled = [name for name, module in modules.items() if _is_compiled(module)]
    found, opened = [], {""}
    for name, inside in groups.items():  # parents before children
        whole, called = len(inside) > 1, _can_be_called(modules[name])
        if whole or name.rpartition(".")[0] in opened:
            opened |= {name} if whole or not called else set()
            found += [name] if called else []
    around = tuple(f"{name}." for name in found)
    found += [name for name in group_of if name and not name.startswith(around)]
    traced = tuple(f"{name}." if name else "" for name in compiled)
    return [modules[name] for name in found if not f"{name}.".startswith(traced)]


def _can_be_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
