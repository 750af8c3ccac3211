"""Finds and replaces the tensors in the output of a module, inside containers and objects."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# levels of nested objects that are searched; deeper objects are state of the model rather than outputs
_DEEPEST = 4
# types that hold no tensors, compared by identity, which is faster than isinstance: most leaves are of these
_PLAIN = frozenset((type(None), bool, int, float, str, bytes, torch.dtype, torch.device))
_CLOSED = (nn.Module, type, ModuleType, FunctionType)


def tensors_in(output: Any, *, deep: bool = True) -> list[Tensor]:
    """The tensors in `output`, also inside pytree containers, dataclasses and other objects.

    With ``deep=False``, objects inside an object are not searched.
    """
    return list(_tensors(output, set(), 0 if deep else _DEEPEST - 1))


def with_tensors(output: Any, new: Mapping[int, Tensor]) -> Any:
    """`output` with tensors replaced by id. Copies the objects that hold a replaced tensor and nothing else."""
    return _replaced(output, new, {}, 0)


def _tensors(value: Any, seen: set[int], depth: int) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif (held := _held(leaf, depth)) and id(leaf) not in seen:
            seen.add(id(leaf))
            for part in held:
                yield from _tensors(part, seen, depth + 1)


def _replaced(value: Any, new: Mapping[int, Tensor], done: dict[int, Any], depth: int) -> Any:
    def in_place_of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) or not (held := _held(leaf, depth)):
            return new.get(id(leaf), leaf)
        if id(leaf) in done:
            return done[id(leaf)]
        if new.keys().isdisjoint(id(tensor) for part in held for tensor in _tensors(part, {id(leaf)}, depth + 1)):
            return leaf
        # creates the copy first, because its contents may refer to it; a tuple can only be created with its contents
        if isinstance(leaf, tuple):
            entries = [_replaced(held.pop(), new, done, depth + 1)]
            done[id(leaf)] = tuple.__new__(type(leaf), *entries)
        else:
            done[id(leaf)] = _new_like(leaf)
        _fill(done[id(leaf)], *(_replaced(part, new, done, depth + 1) for part in held))
        return done[id(leaf)]

    return pytree.tree_map(in_place_of, value)


def _held(value: Any, depth: int) -> list[Any]:
    """The contents of `value` as one or two pytree containers: its attributes, and its entries if it has any."""
    if type(value) in _PLAIN or isinstance(value, _CLOSED):
        return []
    # in a trace, reading attributes of arbitrary objects would add guards
    if not dataclasses.is_dataclass(value) and (torch.compiler.is_compiling() or depth >= _DEEPEST):
        return []
    slots = [name for name in _slots(type(value)) if hasattr(value, name)]  # type: ignore[arg-type]
    attributes = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    entries: list[Any] = []
    if isinstance(value, dict):
        entries = [dict(value)]
    elif isinstance(value, (list, tuple)):
        entries = [list(value)]
    return [attributes, *entries] if attributes or entries else []


@functools.lru_cache
def _slots(kind: type) -> list[str]:
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for slots in found for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__")]


def _new_like(value: Any) -> Any:
    kind = next(kind for kind in (dict, list, object) if isinstance(value, kind))
    try:
        return kind.__new__(type(value))  # not copy.copy, which a class may override
    except TypeError:  # a class implemented in C
        return copy.copy(value)


def _fill(copied: Any, attributes: dict[str, Any], entries: Any = ()) -> None:
    if isinstance(copied, dict):
        dict.update(copied, entries)
    elif isinstance(copied, list):
        list.__setitem__(copied, slice(None), entries)
    for name, attribute in attributes.items():
        object.__setattr__(copied, name, attribute)  # a frozen dataclass refuses setattr
