"""The score of a model for every subset of its layers' adapters, reusing the outputs of unchanged layers."""

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
    """Accuracy in percent for every subset of layers whose adapters are on.

    The layers must be called in sequence, once per forward. A layer's output is reused as long as no adapter of it or
    of an earlier layer has been switched. With n layers this takes 2ⁿ⁺¹ - 2 layer calls per batch instead of n 2ⁿ.
    """
    layers = [modules_of(model)[str(name)] for name in groups_of(model)]
    right: dict[Subset, int] = {}
    model.eval()
    for x, y in zip(split[0].split(CHUNK), split[1].split(CHUNK), strict=True):
        subset: Subset = ()

        def beginning(count: int) -> Subset:
            return subset[:count]  # noqa: B023 (called only within the same iteration)

        with remembering(layers, beginning):
            # product() varies the last layer fastest, so that most outputs are reused
            for subset in itertools.product((False, True), repeat=len(layers)):
                with adapter_mask(model, subset, unit="layer"):
                    right[subset] = right.get(subset, 0) + int((model(x).argmax(1) == y).sum())
    return {subset: 100 * count / len(split[1]) for subset, count in right.items()}


def looked_up(table: dict[Subset, float]) -> Callable[[nn.Module, Split], float]:
    """A score function that looks up the subset of layers whose adapters are on in the table."""

    def score(model: nn.Module, split: Split) -> float:
        layers = adapters(model)
        return table[tuple(is_enabled(layers[names[0]]) for names in groups_of(model).values())]

    return score


def groups_of(model: nn.Module) -> dict[Any, list[str]]:
    """The names of the adapters of each layer, grouped as CoTo switches them."""
    return group_names(adapters(model), "layer", modules_of(model))


@contextmanager
def remembering(layers: list[nn.Module], beginning: Callable[[int], Subset]) -> Iterator[None]:
    """Inside the block, layer i runs only if ``beginning(i + 1)`` has changed since its last call."""
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
