"""Lets transformers' Trainer accept a quantised model that has adapters."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from cotolora.groups import adapters


def allow_training(model: nn.Module) -> None:
    """Sets ``is_qat_trainable`` on the quantizers of a model with adapters, so that Trainer accepts it.

    Trainer refuses a quantised model unless PEFT wraps it or its quantizer has ``is_qat_trainable``, which nothing else
    in transformers reads. ``is_trainable``, which says whether gradients can pass through the quantisation at all,
    is not changed.
    """
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if hasattr(quantizer, "is_qat_trainable") and not quantizer.is_qat_trainable and adapters(module):
            kind: Any = type(quantizer)
            quantizer.__class__ = _trainable(kind)


def disallow_training(model: nn.Module) -> None:
    """Undoes `allow_training`."""
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if (kind := getattr(type(quantizer), "_cotolora_original", None)) is not None:
            quantizer.__class__ = kind


@cache
def _trainable(kind: Any) -> type:
    """A subclass of the quantizer class `kind` that differs only in ``is_qat_trainable``."""

    def reduce(self: Any) -> tuple[Any, ...]:
        # pickle could not find this class, which is created at run time, in any module
        return _restored, (kind, vars(self))

    flags = {"is_qat_trainable": True, "__reduce__": reduce, "_cotolora_original": kind}
    return type(kind)(kind.__name__, (kind,), flags | {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _restored(kind: type, state: dict[str, Any]) -> Any:
    quantizer: Any = object.__new__(_trainable(kind))
    vars(quantizer).update(state)
    return quantizer
