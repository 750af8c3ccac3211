"""Averages the outputs of several models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cotolora.checks import entries, shown
from cotolora.merging.combining import Weights, checked_weights, weighted_sum


def ensemble(models: Sequence[nn.Module], weights: Weights = None) -> Ensemble:
    """A module that averages the outputs of `models`: ``Σ λᵢ modelᵢ(x)``. Every call runs all of them.

    Outputs are tensors, or have `logits` (a mapping, a dataclass, a transformers output): then the logits are
    averaged, and all other fields are None or left out, since their mean would have no meaning.

    Args:
        models: at least one; called with the same arguments; their train or eval mode is not changed.
        weights: λ, one finite number for each model; by default equal ones that sum to 1.

    Raises:
        ValueError: there are no models, or `weights` has another number of entries or one that is not finite; in a
            call, outputs differ in shape.
        TypeError: a model is not an nn.Module; in a call, an output is neither a tensor nor has `logits`.

    >>> ensemble([torch.nn.Identity(), torch.nn.ReLU()], [0.5, 0.5])(torch.tensor([-2.0, 2.0]))
    tensor([-1.,  2.])
    """
    must = "nn.Modules"
    given = entries("models", list(models) if isinstance(models, nn.ModuleList) else models, must, empty=False)
    for model in given:
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be {must}; got {type(model).__name__} {shown(model)}")
    return Ensemble(given, checked_weights(weights, len(given), "models"))


class Ensemble(nn.Module):
    """The module that `ensemble` returns."""

    def __init__(self, models: Sequence[nn.Module], weights: list[float]) -> None:
        super().__init__()
        self.models, self.weights = nn.ModuleList(models), weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged output, in the type of the first model's output. Averages in at least float32."""
        outputs = [model(*args, **kwargs) for model in self.models]
        logits = [_logits(output) for output in outputs]
        if len(shapes := {tuple(tensor.shape) for tensor in logits}) > 1:
            raise ValueError(f"outputs of the models must be of one shape; got {sorted(shapes)}")
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        mean = weighted_sum(self.weights, [tensor.to(logits[0].device, wide) for tensor in logits])
        return _with_logits(outputs[0], mean.to(logits[0].dtype))


def _logits(output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(f"outputs must be tensors or have logits; got {type(output).__name__}")
    return found


def _with_logits(output: Any, logits: Tensor) -> Any:
    if isinstance(output, Tensor):
        return logits
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        others = {entry.name: None for entry in dataclasses.fields(output) if entry.init and entry.name != "logits"}
        return dataclasses.replace(output, logits=logits, **others)
    return type(output)(logits=logits)
