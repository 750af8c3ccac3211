"""The settings of one adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cotolora.checks import finite, flag, integer, one_of, probability
from cotolora.variants import VARIANTS
from cotolora.variants.base import INITS

# the check of each setting
SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "rank": integer,
    "alpha": finite,
    "dropout": probability,
    "use_rslora": flag,
    "variant": lambda name, value: one_of(name, value, VARIANTS),
    "init": lambda name, value: one_of(name, value, INITS),
}


@dataclass(frozen=True)
class AdapterSpec:
    """The settings of an adapter, independent of its base. Arguments as in `CoToLoRALinear`.

    Raises:
        ValueError: an argument is out of its range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False
    variant: str = "lora"
    init: str = "kaiming"

    def __post_init__(self) -> None:
        for name, check in SETTINGS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @property
    def scale(self) -> float:
        """``alpha / rank``, or ``alpha / √rank`` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def check_sizes(self, in_features: int, out_features: int) -> None:
        """Raises ValueError unless an adapter with these settings fits a linear of such sizes."""
        VARIANTS[self.variant].check(self.init, self.rank, self.alpha, (out_features, in_features))
