"""Renames the tensors of a file that was saved when the modules of a transformers model had other names."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def renamed(model: nn.Module, tensors: Mapping[str, Tensor], fits: Callable[[str], bool]) -> dict[str, Tensor]:
    """`tensors` under the model's present names, found as PEFT finds them; keys that fit under neither name stay.

    Args:
        model: a transformers model knows the former names of its modules; for any other model nothing is renamed.
        tensors: the tensors of a file, by key.
        fits: says whether a key belongs to the model.
    """
    strange = [key for key in tensors if not fits(key)]
    rename = _renamer(model) if strange else None
    if rename is None:
        return dict(tensors)
    now = {key: new for key in strange if (new := rename(key)) not in tensors and fits(new)}
    given = Counter(now.values())
    now = {key: new for key, new in now.items() if given[new] == 1}  # of two, neither is known to be the one
    return {now.get(key, key): tensor for key, tensor in tensors.items()}


def why_not_renamed(model: nn.Module, keys: Iterable[str]) -> str:
    """Why `keys` of a file have no counterpart in `model`, as the end of an error; empty if the reason is unknown."""
    fused = _of_kind(model, "WeightConverter")
    for key in keys:
        name = key.partition(".lora_")[0] + ".weight"
        if any(conversion.rename_source_key(name)[1] is not None for conversion in fused):
            return (
                f"; {type(model).__name__} has no linear for {key}: this version of transformers stores it fused with "
                "others in one parameter (PEFT can load such an adapter, to merge it)"
            )
    return ""


def _renamer(model: nn.Module) -> Callable[[str], str] | None:
    # transformers 4.52 to 4.57 has the rules in the model class, later versions in a table
    stated = getattr(model, "_checkpoint_conversion_mapping", None)
    rules = list(stated.items()) if isinstance(stated, dict) else []
    table = _of_kind(model, "WeightRenaming")

    def rename(key: str) -> str:
        for pattern, replacement in rules:
            new, count = re.subn(pattern, replacement, key)
            if count:
                key = new
                break
        for conversion in table:
            key = conversion.rename_source_key(key)[0]
        return key

    return rename if rules or table else None


def _of_kind(model: nn.Module, kind: str) -> list[Any]:
    """The conversions of class `kind` with which transformers reads old checkpoints of `model`."""
    if "transformers" not in sys.modules or not hasattr(getattr(model, "config", None), "model_type"):
        return []
    try:
        from transformers import conversion_mapping, core_model_loading

        conversions = conversion_mapping.get_model_conversion_mapping(model)
        return [each for each in conversions if isinstance(each, getattr(core_model_loading, kind))]
    except (ImportError, AttributeError):  # another version of transformers, or a model that only resembles one of its
        return []
