"""The layer: a linear module with a low-rank adapter that can be switched."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from functools import cached_property
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotolora.backends.autograd import without_autocast
from cotolora.bases import (
    ReadThrough,
    check_foreign,
    features,
    is_conv1d,
    is_dense,
    keep_keys,
    materialise,
    place_of,
    why_not_adaptable,
)
from cotolora.checks import device_here, flag, floating_dtype, instance, size
from cotolora.functional import add_low_rank, check_operands, coto_lora_linear, planned, run
from cotolora.operands import check_extra, check_gate, check_switch
from cotolora.reference import Gate
from cotolora.spec import SETTINGS, AdapterSpec
from cotolora.variants import VARIANTS
from cotolora.variants.base import FROM_WEIGHT, Variant
from cotolora.variants.starts import since_start, start

logger = logging.getLogger("cotolora")

T = TypeVar("T")

# a spec may be of any rank, as files are; there must be room for a layer's
_SETTINGS: dict[str, Callable[[str, Any], Any]] = {**SETTINGS, "rank": size}


class CoToLoRALinear(nn.Module):
    r"""A frozen linear layer with a low-rank update that can be switched on and off.

        y = x Wᵀ + bias + δ · s · (dropout(x) Aᵀ) Bᵀ,   s = alpha / rank

    B starts at zero, so a fresh layer computes exactly what the plain linear computes; so does a
    layer whose adapter is off, at any time and at the same cost.

    Two switches decide whether the adapter counts: ``δ = enabled and (gate or not training)``.
    `gate` is for training (`CoTo` sets it) and is ignored in `eval()`; `enabled` is the user's and
    always holds (`adapter_mask` and pruning set it). Each takes a bool, or a bool or integer tensor,
    0-dim or ``[batch]``: see `coto_lora_linear`.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: rank of the update, any positive integer.
        alpha: the update is scaled by ``alpha / rank``.
        bias: whether the base has a bias.
        dropout: probability of zeroing an entry of the adapter's input while training.
        use_rslora: scale by ``alpha / √rank`` instead (arXiv:2312.03732, theorem 3.2).
        variant: "lora"; "dora", which learns the lengths of W's rows as well; "hira", which scales W's entries; or
            another name in `cotolora.variants.VARIANTS`.
        init: of A: "kaiming" (uniform with a = √5, as nn.Linear) or "gaussian" (standard
            deviation 1 / rank), where B is zero; or of both from W: "pissa" (its largest singular values) or "olora"
            (its QR factors), see `cotolora.variants.starts.start`. Then what the layer adds is ``s · (B A − B0 A0)``,
            so that a fresh layer and one that is off compute what W does, the original.
        device, dtype: of the base weight. A and B are float32, or float64 if the base is.

    Attributes:
        weight: ``[out_features, in_features]``, frozen; ``[in_features, out_features]`` if
            `fan_in_fan_out`, which marks a layer made from a transformers Conv1D.
        bias: ``[out_features]`` or None, frozen.
        base: a module that makes ``x Wᵀ + bias``, frozen; `weight`, `bias` and whatever else the layer itself has not
            are then the base's. Else None.
        lora_a: A, ``[rank, in_features]``.
        lora_b: B, ``[out_features, rank]``.
        lora_magnitude: m of DoRA, ``[out_features]``, at first ``‖W‖`` by rows; else None.
        lora_a0, lora_b0: where A and B started with "pissa" and "olora"; else None.

    Raises:
        ValueError: a size, `alpha`, `dropout`, `variant` or `init` is out of its range; "pissa" and "olora" want a
            rank that W can have, and a W that is there.
        TypeError: `dtype` is not floating.

    Source: Hu et al. 2021, section 4.1 (arXiv:2106.09685).

    >>> CoToLoRALinear(8, 4, rank=2, alpha=4.0)
    CoToLoRALinear(in_features=8, out_features=4, bias=True, rank=2, alpha=4.0, gate=True, variant=lora)
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    base: nn.Module | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_a0: Tensor | None
    lora_b0: Tensor | None
    _name = ""  # in the model that `inject` put it into
    _told: frozenset[str] | set[str] = (
        frozenset()
    )  # of layers that were put in together: which have been told of as uncalled

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        use_rslora: bool = False,
        variant: str = "lora",
        init: str = "kaiming",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = size("in_features", in_features)
        self.out_features = size("out_features", out_features)
        self._settle(AdapterSpec(rank, alpha, dropout, use_rslora, variant, init))
        dtype = None if dtype is None else floating_dtype("dtype", dtype)
        device, bias = None if device is None else device_here("device", device), flag("bias", bias)
        sizes = self.in_features, self.out_features
        must = f"in_features and out_features must leave room for W; got {sizes}"
        base = _allocated(must, nn.Linear, *sizes, bias, device=device, dtype=dtype)
        self._share(base.weight, base.bias)  # type: ignore[arg-type]
        _freeze((self.weight, self.bias))

    def _settle(self, spec: AdapterSpec) -> None:
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

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        use_rslora: bool = False,
        variant: str = "lora",
        init: str = "kaiming",
    ) -> CoToLoRALinear:
        """A layer around an ``nn.Linear``, a transformers ``Conv1D``, or another module that maps features.

        Of the first two, unless the weight is quantised, sparse or of a tensor subclass, the parameters are shared,
        not copied. Any other module with integer `in_features` and `out_features` becomes `base`: its own forward is
        called and the low-rank part added, so what it computes and how it is stored stay its own; it cannot be
        merged into. The keys of its state dict do not change. Either way the parameters are frozen by this.

        Raises:
            TypeError: `linear` is no such module, or one that cannot be adapted; the message says why.
            ValueError: as the constructor; or `variant` or `init` needs a weight to read and there is only a `base`.
        """
        spec = AdapterSpec(rank, alpha, dropout, use_rslora, variant, init)
        return cls.from_spec(linear, spec)

    @classmethod
    def from_spec(cls, linear: nn.Module, spec: AdapterSpec) -> CoToLoRALinear:
        """As `from_linear`, which makes an `AdapterSpec` of its arguments."""
        instance("spec", spec, AdapterSpec, "an AdapterSpec")
        if reason := why_not_adaptable(linear):
            raise TypeError(f"linear must be a module that maps in_features to out_features; {reason}")
        dense: Any = linear if is_dense(linear) else None
        if dense is None:
            check_foreign(linear, spec.variant, spec.init)
        kind: type[CoToLoRALinear] = _Around if dense is None and cls is CoToLoRALinear else cls
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = features(linear)
        layer._settle(spec)
        if dense is None:
            layer._call(linear)
        else:
            layer.fan_in_fan_out = is_conv1d(linear)
            layer._share(dense.weight, dense.bias)
        layer.training = linear.training
        _freeze(linear.parameters() if dense is None else (dense.weight, dense.bias))
        return layer

    def _share(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        self.weight, self.bias = weight, bias  # type: ignore[assignment]
        self._make_factors(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)

    def _call(self, base: nn.Module) -> None:
        self.base = base
        keep_keys(self)
        self._make_factors(*place_of(base))

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        sizes = {"rank": self.rank, "in_features": self.in_features, "out_features": self.out_features}
        variant = self._variant
        for part in variant.parts:
            shape = part.sizes(**sizes)
            must = f"rank must leave room for {part.attribute} {list(shape)}; got {self.rank}"
            empty = _allocated(must, torch.empty, shape, device=device, dtype=dtype)
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
        """Starts the adapter anew: draws A, sets B to zero, takes from W what comes from W. The base stays as it is.

        An adapter on the meta device gets new parameters where the base is, if that is elsewhere.

        Raises:
            ValueError: `init` is taken from W, and W is on the meta device.
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
                    f"init must be 'kaiming' or 'gaussian' on the meta device, got {self.init!r}, which reads W"
                )
            a0, b0 = start(self.init, weight, self.rank, self.scale)
            for target, value in ((self.lora_a, a0), (self.lora_b, b0), (self.lora_a0, a0), (self.lora_b0, b0)):
                target.copy_(value)
        self._variant.start(self, weight)

    @property
    def scale(self) -> float:
        """``alpha / rank``, or ``alpha / √rank`` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def adapter_parameters(self) -> tuple[nn.Parameter, ...]:
        """A, B and, of DoRA, m: what an optimizer trains, and what gets no gradient where the layer is off."""
        return tuple(getattr(self, name) for name in self._variant.trained)

    @property
    def extra(self) -> tuple[nn.Parameter, ...]:
        """What the variant has beside A and B: of DoRA, m."""
        return tuple(getattr(self, part.attribute) for part in self._variant.extra)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the update ``s · B A``: A and B, or with "pissa" and "olora" those of ``B A − B0 A0``."""
        if self.init not in FROM_WEIGHT:
            return self.lora_a, self.lora_b
        assert self.lora_a0 is not None
        assert self.lora_b0 is not None
        return since_start(self.lora_a, self.lora_b, self.lora_a0, self.lora_b0)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module's takes any module or parameter for a part of this one, whatever the name stands for
        if isinstance(getattr(CoToLoRALinear, name, None), property):
            object.__setattr__(self, name, value)
        elif (check := _SETTINGS.get(name)) is not None:
            object.__setattr__(self, name, check(name, value))
        else:
            super().__setattr__(name, value)

    @property
    def gate(self) -> Gate:
        """The training switch. Assigning a bool to a 0-dim tensor gate fills that tensor."""
        return self._gate

    @gate.setter
    def gate(self, value: Gate) -> None:
        if isinstance(value, bool) and isinstance(self._gate, Tensor) and self._gate.dim() == 0:
            self._gate.fill_(value)  # in place: a captured CUDA graph keeps reading this address
        else:
            self._set_switch("_gate", value)

    @property
    def enabled(self) -> Gate:
        """The user's switch; holds in train and eval."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: Gate) -> None:
        self._set_switch("_enabled", value)

    def _set_switch(self, name: str, value: Gate) -> None:
        check_switch(argument := name.removeprefix("_"), value)
        if isinstance(value, Tensor) and not self.lora_a.is_meta:
            if value.is_meta:
                raise ValueError(f"{argument} must have a value; got a tensor on meta")
            value = value.to(self.lora_a.device)
        self.__dict__.pop(name, None)
        self._buffers.pop(name, None)
        if isinstance(value, Tensor):
            # a buffer, so that it follows .to(); not persistent, because it is no part of a checkpoint
            self.register_buffer(name, value, persistent=False)
        else:
            self.__dict__[name] = value

    @property
    def active(self) -> Gate:
        """δ: whether the adapter counts, ``enabled and (gate or not training)``."""
        enabled, gate = self._enabled, self._gate if self.training else True
        if isinstance(enabled, bool):
            return gate if enabled else False
        if isinstance(gate, bool):
            return enabled if gate else False
        return (enabled != 0) & (gate != 0)

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in_features]`` → ``[..., out_features]``. A merged layer is a plain linear."""
        if self.base is not None:
            return self._added_to(self.base(input), input)
        # a property that is asked takes as long as a small sum: the usual answers are found without
        gate = (self._gate if self.training else True) if self._enabled is True else self.active
        dropout = self.dropout if self.training else 0.0
        if torch.compiler.is_compiling():
            _note_trace()
            return self._checked(input, gate, dropout)
        # in the dict of parameters a look-up takes a tenth of the time; a wrapper may have moved them out of it
        own = self._parameters
        weight: Any = own["weight"] if "weight" in own else self.weight  # noqa: SIM401 (self.weight is slow)
        bias: Any = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        if self._transposed:
            weight = weight.T
        try:
            if gate is False or self._original_weight is not None:
                return F.linear(input, weight, bias)
            variant = VARIANTS[self.variant]
            if self.init in FROM_WEIGHT or "lora_a" not in own:
                a, b = self.factors()
            else:
                a, b = own["lora_a"], own["lora_b"]  # type: ignore[assignment]
            rank, extra = a.shape[0], self.extra if variant.extra else ()
            if extra:
                check_extra(variant, extra, rank, self.in_features, self.out_features, input.device)
            if gate is True:
                gate = None  # type: ignore[assignment]
            elif gate.dim():
                check_gate(gate, input)
            scale = self.scale if self.use_rslora else self.alpha / self.rank
            plan = planned(variant, input, rank, self.in_features, self.out_features, scale, dropout)
            return run(plan, input, weight, bias, a, b, extra, gate)  # type: ignore[arg-type]
        except Exception:
            # torch's own errors name no argument: what was wrong is looked for only where something was
            try:
                check_operands(input, weight, bias, *self.factors())
                if input.is_nested:  # which no backend takes as it is
                    return self._checked(input, self.active, dropout)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self._name}: {error}" if self._name else str(error)) from None
            raise

    @cached_property
    def _transposed(self) -> bool:
        """`fan_in_fan_out`. Only forward reads it, so that it lies in __dict__ once a forward has run, at no cost."""
        return self.fan_in_fan_out

    def _merges_uncalled(self, merged: Tensor) -> bool:
        """Whether `merged` is another weight, though no forward of the model that holds the layer has called it."""
        if "_transposed" in self.__dict__ or _traced or not self._name or merged.is_meta:
            return False
        return not torch.equal(merged, self._base_weight())

    def _added_to(self, y: Tensor, x: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.shape[-1:] != (self.out_features,):
            got = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise TypeError(
                f"{self._name or 'the layer'} must have a base that returns [..., {self.out_features}]; its "
                f"{type(self.base).__name__} returned {got}"
            )
        return add_low_rank(
            y, x, self.lora_a, self.lora_b, scale=self.scale, gate=self.active,
            dropout=self.dropout if self.training else 0.0, variant=self.variant, extra=self.extra,
        )  # fmt: skip

    def _checked(self, x: Tensor, gate: Gate, dropout: float) -> Tensor:
        weight = self._matrix(self.weight)
        if self._original_weight is not None:
            return F.linear(x, weight, self.bias)
        lora_a, lora_b = (self.lora_a, self.lora_b) if gate is False else self.factors()
        return coto_lora_linear(
            x, weight, self.bias, lora_a, lora_b, scale=self.scale, gate=gate, dropout=dropout, variant=self.variant,
            extra=self.extra,
        )  # fmt: skip

    def delta_weight(self) -> Tensor:
        """What the adapter adds to W, ``[out_features, in_features]``, whatever the switches say.

        ``s · B A``; of DoRA ``c ∘ (W + s · B A) − W``, of HiRA ``W ∘ s · B A``. In the dtype of A and B.
        """
        return self._delta(self.lora_a.dtype)

    def _delta(self, dtype: torch.dtype) -> Tensor:
        lora_a, lora_b = self.factors()
        weight = None if self.base is not None else self._matrix(self._base_weight())
        with without_autocast(self.lora_a.device):
            return self._variant.delta(weight, lora_a.to(dtype), lora_b.to(dtype), self.extra, self.scale)

    def _matrix(self, weight: Tensor) -> Tensor:
        """`weight` as ``[out_features, in_features]``."""
        return weight.T if self.fan_in_fan_out else weight

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the update."""
        return self._original_weight is not None

    def _base_weight(self) -> nn.Parameter:
        """The base's own weight, also while `weight` holds the update.

        Raises:
            RuntimeError: there is none, only a `base`.
        """
        if self.base is not None:
            raise RuntimeError(
                f"the base is a {type(self.base).__name__}, which has no dense floating weight that could hold the "
                "update; leave it unmerged, or take it back with to_linear(merge=False) or eject(model, merge=False)"
            )
        return self.weight if self._original_weight is None else self._original_weight

    @torch.no_grad()
    def _merged_weight(self) -> nn.Parameter:
        """The base weight plus the update of an enabled adapter: a new parameter, or the base's own if disabled."""
        base = self._base_weight()
        if isinstance(self._enabled, Tensor) and self._enabled.dim() > 0:
            raise RuntimeError("enabled is a row mask, which no single weight can hold; set it to a bool to merge")
        if not self._enabled:
            return base
        # at least float32, also where .half() has cast A and B: one rounding, the last
        dtype = torch.promote_types(torch.promote_types(base.dtype, self.lora_a.dtype), torch.float32)
        weight = base.to(dtype) + self._matrix(self._delta(dtype))
        return nn.Parameter(weight.to(base.dtype), requires_grad=base.requires_grad)

    def merge(self) -> None:
        """Puts W plus `delta_weight` in place of `weight`, if the adapter is enabled; the gate is ignored.

        A new tensor: the original, which other modules may share, is kept and never written. Until
        `unmerge`, the switches have no effect and nothing trains here. Twice is once.

        Raises:
            RuntimeError: `enabled` is a row mask, or there is a `base`.
        """
        if self._original_weight is None:
            merged, original = self._merged_weight(), self.weight
            if not self._told and self._merges_uncalled(merged):
                self._told |= {self._name}
                warn_of_uncalled([self._name])
            self.weight = merged
            # past nn.Module's __setattr__, which would register a second parameter
            self.__dict__["_original_weight"] = original

    def unmerge(self) -> None:
        """Puts the original weight object back, bit for bit. Does nothing if not merged."""
        if self._original_weight is not None:
            self.weight, self._original_weight = self._original_weight, None

    def to_linear(self, merge: bool = True) -> nn.Module:
        """A plain ``nn.Linear`` (or Conv1D) with the base's bias, and its weight or, merged, a new one; or the `base`.

        Raises:
            RuntimeError: `merge` is asked for of an enabled adapter and `enabled` is a row mask, or there is a `base`.
        """
        flag("merge", merge)
        if self.base is not None and not (merge and torch.as_tensor(self._enabled).any()):
            return self.base
        weight = self._merged_weight() if merge else self._base_weight()
        if self.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            linear: nn.Module = Conv1D(0, 0)
            linear.nf, linear.nx = self.out_features, self.in_features  # type: ignore[assignment]
        else:
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CoToLoRALinear:
        was_meta, switches = self.lora_a.is_meta, {name: self._buffers.get(name) for name in ("_gate", "_enabled")}
        super()._apply(fn, recurse)
        # to_empty leaves arbitrary numbers, of which a checkpoint of the base would replace none of these
        for name, before in switches.items():
            after: Any = self._buffers.get(name)
            if before is not None and after is not before and not after.is_meta:
                after.fill_(1) if before.is_meta else after.copy_(before)
        if was_meta and not self.lora_a.is_meta and self.init not in FROM_WEIGHT and not self._is_sharded:
            self.reset_parameters()
        if (original := self._original_weight) is not None and original is not self.weight:
            with torch.no_grad():
                moved = fn(original)
            if torch._has_compatible_shallow_copy_type(original, moved):
                original.data = moved  # the same object, which a tied module may hold too
            else:
                self.__dict__["_original_weight"] = nn.Parameter(moved, requires_grad=original.requires_grad)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._original_weight is not None:
            destination[prefix + "weight"] = self._original_weight if keep_vars else self._original_weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        was_merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = {prefix + part.attribute for part in self._variant.parts} | {prefix + "lora_a0", prefix + "lora_b0"}
        if own.isdisjoint(state_dict):  # a checkpoint of the base model, which knows no adapters
            assigned = self.lora_a.is_meta and local_metadata.get("assign_to_params_buffers", False)
            # what is one with the tensors of other layers or ranks cannot be started here, and is missing
            if not assigned or not (self._variant.shared_keys or self._is_sharded):
                missing_keys[:] = [key for key in missing_keys if key not in own]
                if assigned and self.base is None and not self._base_weight().is_meta:
                    self.reset_parameters()
            if prefix + "weight" in state_dict and self._is_fresh():
                self._take_from_weight()
        if was_merged:
            self.merge()

    @property
    def _is_sharded(self) -> bool:
        return hasattr(self.lora_a, "device_mesh")

    def _is_fresh(self) -> bool:
        """Whether B is where it started, so that what was taken from an earlier W can be taken from a new one."""
        return not self.lora_b.is_meta and torch.equal(
            self.lora_b, torch.zeros_like(self.lora_b) if self.lora_b0 is None else self.lora_b0
        )

    def _fqn_modifiers(self) -> dict[str, str]:
        # how torch.distributed.checkpoint gets from a key of the state dict to what it is the key of
        base = self.base
        return {} if base is None else dict.fromkeys((*base._parameters, *base._buffers, *base._modules), "base")

    def extra_repr(self) -> str:
        """Sizes and switches, for repr."""
        switches = f"gate={_shown(self._gate)}"
        if self._enabled is not True:
            switches += f", enabled={_shown(self._enabled)}"
        bias = f"bias={self.bias is not None}, " if self.base is None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {bias}"
            f"rank={self.rank}, alpha={self.alpha}, {switches}, variant={self.variant}"
        )


def _allocated(must: str, make: Callable[..., T], *args: Any, **options: Any) -> T:
    """What `make` makes; where torch refuses such a size, the error says what it `must` be, and why."""
    try:
        return make(*args, **options)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # torch.OutOfMemoryError, which users catch
            raise
        raise RuntimeError(f"{must} ({str(error).partition(chr(10))[0]})") from error


# whether torch.compile has traced a layer: such a call leaves no mark in it
_traced = False


def _note_trace() -> bool:
    global _traced
    _traced = True
    return True


# torch.compiler.assume_constant_result, by which it runs while a layer is traced, does this too, and imports Triton
_note_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def warn_of_uncalled(names: Collection[str]) -> None:
    """Warns of adapters that are to be merged and that no forward has called."""
    if names:
        logger.warning(
            "merging changes the weights of %s, whose adapters no forward has called yet; if the model reads these "
            "weights past the layers, it has computed without the adapters and its outputs will change",
            ", ".join(names),
        )


class _Around(ReadThrough, CoToLoRALinear):
    """A layer around a `base`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As that of `CoToLoRALinear`, called as the base is: by its names, and with whatever else it takes."""
        assert self.base is not None
        if not args:
            first = "input" if "input" in kwargs else next(iter(signature(self.base.forward).parameters))
            args = (kwargs.pop(first, None),)
        return self._added_to(self.base(*args, **kwargs), args[0])


_Around.__name__ = CoToLoRALinear.__name__  # to whoever asks it is the same layer; pickle goes by the other name


def _shown(switch: Gate) -> str:
    return f"tensor{list(switch.shape)}" if isinstance(switch, Tensor) else str(switch)


def _freeze(parameters: Iterable[nn.Parameter | None]) -> None:
    """All or none."""
    with ExitStack() as undo:
        for parameter in parameters:
            if parameter is None:
                continue
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        undo.pop_all()
