"""Which linear modules PEFT mistakes for experts, and how a config names them so that it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

# what transformers 4 called the linears of an expert and their router. transformers 5 holds experts in one parameter,
# and PEFT, which reads old configs too, turns every target of such a name into one of that parameter: those of dense
# blocks and of shared experts as well, which are linears still
_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def mistaken(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that PEFT, finding them in target_modules, would not adapt in `model`."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if "transformers" not in sys.modules or not isinstance(kind, str):
        return []
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN  # what PEFT goes by
    except ImportError:  # transformers 4, where experts are linears
        return []
    ends = _NAMES.get(_MODEL_TO_CONVERSION_PATTERN.get(kind, kind), ())
    return [name for name in names if name.rpartition(".")[2] in ends]


def weight_of(name: str) -> str:
    """The name in target_parameters of the weight of a linear module."""
    return f"{name}.weight"
