"""The contents of a layer: its settings, its base, A, B and the further tensors of its variant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cotolora.bases import keep_keys, materialise, place_of, why_not_dense
from cotolora.checks import size
from cotolora.reference import Gate
from cotolora.spec import SETTINGS, AdapterSpec
from cotolora.variants import VARIANTS
from cotolora.variants.base import FROM_WEIGHT, Variant
from cotolora.variants.starts import since_start, start

T = TypeVar("T")

# a spec may have any rank, since files do; the rank of a layer must fit into int64
_SETTINGS: dict[str, Callable[[str, Any], Any]] = {**SETTINGS, "rank": size}


class LowRankParameters(nn.Module):
    """The tensors and settings of a `CoToLoRALinear`, which says what they mean."""

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    base: nn.Module | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_a0: Tensor | None
    lora_b0: Tensor | None
    _name = ""  # the layer's name in the model that `inject` put it into
    _stack: Any = None  # set by `cotolora.stack`

    def _apply_spec(self, spec: AdapterSpec) -> None:
        spec.check_sizes(self.in_features, self.out_features)
        self.rank, self.alpha, self.dropout = spec.rank, spec.alpha, spec.dropout
        self.use_rslora, self.variant, self.init = spec.use_rslora, spec.variant, spec.init
        self.fan_in_fan_out = False
        self._gate: Gate = True
        self._enabled: Gate = True
        self._original_weight: nn.Parameter | None = None
        self.base = None

    @property
    def spec(self) -> AdapterSpec:
        """The settings of the adapter."""
        return AdapterSpec(self.rank, self.alpha, self.dropout, self.use_rslora, self.variant, self.init)

    def _hold_weight(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.weight, self.bias = weight, bias  # type: ignore[assignment]
        self._make_factors(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)

    def _hold_base(self, base: nn.Module) -> None:
        self.base = base
        keep_keys(self)
        self._make_factors(*place_of(base))

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        sizes = {"rank": self.rank, "in_features": self.in_features, "out_features": self.out_features}
        variant = self._variant
        for part in variant.parts:
            shape = part.sizes(**sizes)
            must = f"rank must be small enough to allocate {part.attribute} {list(shape)}; got {self.rank}"
            empty = allocated(must, torch.empty, shape, device=device, dtype=dtype)
            self.register_parameter(part.attribute, nn.Parameter(empty, part.attribute in variant.trained))
        if "lora_magnitude" not in self._parameters:
            self.register_parameter("lora_magnitude", None)
        for name, factor in (("lora_a0", self.lora_a), ("lora_b0", self.lora_b)):
            self.register_buffer(name, torch.empty_like(factor.detach()) if self.init in FROM_WEIGHT else None)
        self.reset_parameters()

    @property
    def _variant(self) -> Variant:
        return VARIANTS[self.variant]

    def reset_parameters(self) -> None:
        """Initialises the adapter again: draws A, sets B to zero, reads from W what depends on it. Keeps the base.

        If the adapter is on the meta device and the base is not, it gets new parameters on the base's device.

        Raises:
            ValueError: `init` needs W, and W is on the meta device.
        """
        device = self._base_weight().device if self.base is None else place_of(self.base)[0]
        if device.type != "meta":
            materialise(self, (*(part.attribute for part in self._variant.parts), "lora_a0", "lora_b0"), device)
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        elif self.init == "gaussian":
            nn.init.normal_(self.lora_a, std=1 / self.rank)
        nn.init.zeros_(self.lora_b)
        self._take_from_weight()

    @torch.no_grad()
    def _take_from_weight(self) -> None:
        weight = None if self.base is not None else self._matrix(self._base_weight())
        if self.lora_a0 is not None and self.lora_b0 is not None:
            assert weight is not None
            if weight.is_meta:
                raise ValueError(
                    f"init must be 'kaiming' or 'gaussian' on the meta device; got {self.init!r}, which reads W"
                )
            a0, b0 = start(self.init, weight, self.rank, self.scale)
            for target, value in ((self.lora_a, a0), (self.lora_b, b0), (self.lora_a0, a0), (self.lora_b0, b0)):
                target.copy_(value)
        self._variant.start(self, weight)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        """``alpha / rank``, or ``alpha / √rank`` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def adapter_parameters(self) -> tuple[nn.Parameter, ...]:
        """The adapter's trained parameters, which get no gradient while it is inactive: A and B, with DoRA also m."""
        return tuple(getattr(self, name) for name in self._variant.trained)

    @property
    def extra(self) -> tuple[nn.Parameter, ...]:
        """The further tensors of the variant after A and B: m with DoRA."""
        return tuple(getattr(self, part.attribute) for part in self._variant.extra)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the update ``s · B A``: A and B, or with "pissa" and "olora" those of ``B A − B0 A0``."""
        if self.init not in FROM_WEIGHT:
            return self.lora_a, self.lora_b
        assert self.lora_a0 is not None
        assert self.lora_b0 is not None
        return since_start(self.lora_a, self.lora_b, self.lora_a0, self.lora_b0)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module.__setattr__ would register any module or parameter, even under the name of a property
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        elif (check := _SETTINGS.get(name)) is not None:
            object.__setattr__(self, name, check(name, value))
        else:
            super().__setattr__(name, value)

    def _matrix(self, weight: Tensor) -> Tensor:
        """`weight` as ``[out_features, in_features]``."""
        return weight.T if self.fan_in_fan_out else weight

    @property
    def merged(self) -> bool:
        """Whether `weight` contains the update."""
        return self._original_weight is not None

    def _base_weight(self) -> nn.Parameter:
        """The weight of the base, also while `weight` contains the update.

        Raises:
            RuntimeError: there is none, only a `base`.
        """
        if self.base is not None:
            raise RuntimeError(
                f"{self._named}the base is {why_not_dense(self.base)}, so the update cannot be merged; keep it "
                "unmerged, or get the base back with to_linear(merge=False) or eject(model, merge=False)"
            )
        return self.weight if self._original_weight is None else self._original_weight

    @property
    def _named(self) -> str:
        """The layer's name in its model and a colon, to begin an error message with; empty if it has none."""
        return f"{self._name}: " if self._name else ""

    @property
    def _is_sharded(self) -> bool:
        return hasattr(self.lora_a, "device_mesh")

    def _is_fresh(self) -> bool:
        """Whether B has its initial value, so that what was read from an earlier W may be read from a new one."""
        return not self.lora_b.is_meta and torch.equal(
            self.lora_b, torch.zeros_like(self.lora_b) if self.lora_b0 is None else self.lora_b0
        )


def allocated(must: str, make: Callable[..., T], *args: Any, **options: Any) -> T:
    """The result of `make`; if torch refuses the size, the RuntimeError says what it `must` be and torch's reason."""
    try:
        return make(*args, **options)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # torch.OutOfMemoryError, which users catch
            raise
        raise RuntimeError(f"{must} ({str(error).partition(chr(10))[0]})") from error
