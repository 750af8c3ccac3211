"""Lets transformers' Trainer take a quantised model that has adapters."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from cotolora.groups import adapters


def allow_training(model: nn.Module) -> None:
    """Answers transformers' question whether a quantised model has more to train than its quantised weights.

    Trainer refuses such a model unless PEFT wraps it, or the model's quantizer says ``is_qat_trainable``, which nothing
    else in transformers reads. So the quantizers of models that hold adapters say so. Whether a method of quantisation
    can be trained through at all is another question, ``is_trainable``, whose answer stays.
    """
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if hasattr(quantizer, "is_qat_trainable") and not quantizer.is_qat_trainable and adapters(module):
            kind: Any = type(quantizer)
            quantizer.__class__ = _trainable(kind)


def disallow_training(model: nn.Module) -> None:
    """Takes back `allow_training`."""
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if (kind := getattr(type(quantizer), "_cotolora_original", None)) is not None:
            quantizer.__class__ = kind


@cache
def _trainable(kind: Any) -> type:
    """A subclass of a class of quantizers that is told apart by the one flag alone."""

    def reduce(self: Any) -> tuple[Any, ...]:
        # a class that is made here is in no module where pickle could find it
        return _restored, (kind, vars(self))

    flags = {"is_qat_trainable": True, "__reduce__": reduce, "_cotolora_original": kind}
    return type(kind)(kind.__name__, (kind,), flags | {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _restored(kind: type, state: dict[str, Any]) -> Any:
    quantizer: Any = object.__new__(_trainable(kind))
    vars(quantizer).update(state)
    return quantizer
