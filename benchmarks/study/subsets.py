"""The score of a model under every subset of its layers' adapters, a layer run once for each beginning of a subset."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.study.encoders import CHUNK
from benchmarks.study.tasks import Split
from cotolora.groups import adapters, group_names, is_enabled, modules_of
from cotolora.masks import adapter_mask

Subset = tuple[bool, ...]


@torch.no_grad()
def accuracies(model: nn.Module, split: Split) -> dict[Subset, float]:
    """Share of correct labels in percent, for every subset of the layers whose adapters are on.

    The layers must be called one after another, once in a forward: what a layer returned is taken again as long as the
    adapters of no layer up to it have changed. With n layers that is 2ⁿ⁺¹ - 2 calls of layers instead of n 2ⁿ.
    """
    layers = [modules_of(model)[str(name)] for name in groups_of(model)]
    right: dict[Subset, int] = {}
    model.eval()
    for x, y in zip(split[0].split(CHUNK), split[1].split(CHUNK), strict=True):
        subset: Subset = ()

        def beginning(count: int) -> Subset:
            return subset[:count]  # noqa: B023 (read while the loop's own value stands)

        with remembering(layers, beginning):
            # the last layer changes fastest
            for subset in itertools.product((False, True), repeat=len(layers)):
                with adapter_mask(model, subset, unit="layer"):
                    right[subset] = right.get(subset, 0) + int((model(x).argmax(1) == y).sum())
    return {subset: 100 * count / len(split[1]) for subset, count in right.items()}


def looked_up(table: dict[Subset, float]) -> Callable[[nn.Module, Split], float]:
    """A score that reads off which layers' adapters are on, and takes their subset's from the table."""

    def score(model: nn.Module, split: Split) -> float:
        layers = adapters(model)
        return table[tuple(is_enabled(layers[names[0]]) for names in groups_of(model).values())]

    return score


def groups_of(model: nn.Module) -> dict[Any, list[str]]:
    """The adapters of each layer, as CoTo switches them."""
    return group_names(adapters(model), "layer", modules_of(model))


@contextmanager
def remembering(layers: list[nn.Module], beginning: Callable[[int], Subset]) -> Iterator[None]:
    """Inside the block, layer i runs only where ``beginning(i + 1)`` is not what it was at its last call."""
    with ExitStack() as undo:
        for i, layer in enumerate(layers):
            layer.forward = _Remembering(layer.forward, i, beginning)  # type: ignore[method-assign,assignment]
            undo.callback(layer.__dict__.pop, "forward")
        yield


class _Remembering:
    def __init__(self, forward: Callable[..., Any], index: int, beginning: Callable[[int], Subset]) -> None:
        self._forward, self._index, self._beginning = forward, index, beginning
        self._of: Subset | None = None
        self._output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (of := self._beginning(self._index + 1)) != self._of:
            self._of, self._output = of, self._forward(*args, **kwargs)
        return self._output
