"""Finds linear modules that PEFT mistakes for experts; a config lists these by their weights instead."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

# the names of an expert's linears and of their router in transformers 4. transformers 5 stores experts in one
# parameter. To read old configs, PEFT redirects every target with such a name to that parameter, even the linears of
# dense blocks and of shared experts, which are still linears
_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def mistaken(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The `names` that PEFT would not adapt in `model` if they were in target_modules."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if "transformers" not in sys.modules or not isinstance(kind, str):
        return []
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN  # PEFT uses this table
    except ImportError:  # transformers 4, where experts are linears
        return []
    ends = _NAMES.get(_MODEL_TO_CONVERSION_PATTERN.get(kind, kind), ())
    return [name for name in names if name.rpartition(".")[2] in ends]


def weight_of(name: str) -> str:
    """The name that the weight of the linear module `name` has in target_parameters."""
    return f"{name}.weight"
