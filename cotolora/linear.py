"""`CoToLoRALinear`: a linear layer with a low-rank adapter that can be switched on and off."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotolora.bases import (
    ReadThrough,
    carry_attributes,
    check_foreign,
    features,
    is_conv1d,
    is_dense,
    why_not_adaptable,
)
from cotolora.checks import device_here, flag, floating_dtype, instance, size
from cotolora.functional import add_low_rank, check_operands, coto_lora_linear, planned, run
from cotolora.operands import check_extra, check_gate, check_switch
from cotolora.parameters import allocated
from cotolora.reference import Gate
from cotolora.spec import AdapterSpec
from cotolora.training.callers import AVERAGES, called_from
from cotolora.variants import VARIANTS
from cotolora.variants.base import FROM_WEIGHT
from cotolora.weights import MergeableWeights, note_trace


class CoToLoRALinear(MergeableWeights):
    r"""A frozen linear layer with a low-rank update that can be switched on and off.

        y = x Wᵀ + bias + δ · s · (dropout(x) Aᵀ) Bᵀ,   s = alpha / rank

    B starts at zero, so a new layer computes exactly what the plain linear computes. A layer whose
    adapter is inactive does so at any time; if both switches are bools, it runs only the base linear.

    Two switches decide whether the adapter is active: ``δ = enabled and (gate or not training)``.
    `gate` is the training switch (`CoTo` sets it) and is ignored in `eval()`; `enabled` is the user's
    switch and always applies (`adapter_mask` and pruning set it). Each is a bool, or a bool or integer
    tensor, 0-dim or ``[batch]``: see `coto_lora_linear`.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: rank of the update, any positive integer.
        alpha: the update is scaled by ``alpha / rank``.
        bias: whether the base has a bias.
        dropout: probability of zeroing an entry of the adapter's input while training.
        use_rslora: scale by ``alpha / √rank`` instead (arXiv:2312.03732, theorem 3.2).
        variant: "lora"; "dora", which learns the norms of W's rows as well; "hira", which scales W's entries; or
            another name in `cotolora.variants.VARIANTS`.
        init: "kaiming" (A uniform with a = √5, as nn.Linear) or "gaussian" (A normal with standard
            deviation 1 / rank), both with B at zero; or, with A and B taken from W, "pissa" (its largest singular
            values) or "olora" (its QR factors), see `cotolora.variants.starts.start`. With these two the update is
            ``s · (B A − B0 A0)``, so that a new layer and an inactive one compute exactly the output of the original W.
        device, dtype: of the base weight. A and B are float32, or float64 if the base is.

    Attributes:
        weight: ``[out_features, in_features]``, frozen; ``[in_features, out_features]`` if
            `fan_in_fan_out`, which marks a layer made from a transformers Conv1D.
        bias: ``[out_features]`` or None, frozen.
        base: a frozen module that computes ``x Wᵀ + bias``, or None. If there is one, `weight`, `bias` and every other
            attribute that the layer itself does not have are those of the base.
        lora_a: A, ``[rank, in_features]``.
        lora_b: B, ``[out_features, rank]``.
        lora_magnitude: m of DoRA, ``[out_features]``, initially the norms of W's rows; else None.
        lora_a0, lora_b0: the initial A and B with "pissa" and "olora"; else None.

    Raises:
        ValueError: a size, `alpha`, `dropout`, `variant` or `init` is out of its range; "pissa" and "olora" need a
            rank of at most ``min(in_features, out_features)``, and a W that is not on the meta device.
        TypeError: `dtype` is not floating, or `device` is not a device.
        RuntimeError: torch cannot use `device` here, or cannot allocate tensors of these sizes.

    Source: Hu et al. 2021, section 4.1 (arXiv:2106.09685).

    >>> CoToLoRALinear(8, 4, rank=2, alpha=4.0)
    CoToLoRALinear(in_features=8, out_features=4, bias=True, rank=2, alpha=4.0, gate=True, variant=lora)
    """

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
        self._apply_spec(AdapterSpec(rank, alpha, dropout, use_rslora, variant, init))
        dtype = None if dtype is None else floating_dtype("dtype", dtype)
        device, bias = None if device is None else device_here("device", device), flag("bias", bias)
        sizes = self.in_features, self.out_features
        must = f"in_features and out_features must be small enough to allocate W; got {sizes}"
        base = allocated(must, nn.Linear, *sizes, bias, device=device, dtype=dtype)
        self._hold_weight(base.weight, base.bias)  # type: ignore[arg-type]
        _freeze((self.weight, self.bias))

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
        """A layer around an ``nn.Linear``, a transformers ``Conv1D``, or another module with a linear forward.

        A dense ``nn.Linear`` or ``Conv1D`` shares its parameters with the layer, without a copy, and attributes that
        other code has set on it move to the layer. Dense means that the weight is not quantised, not sparse and not
        of a tensor subclass, and that the module holds no other tensors or modules than weight and bias. Any other
        module with integer `in_features` and `out_features` becomes `base`: the layer calls its forward and adds the
        low-rank update, so its computation and its storage do not change; the update cannot be merged into it.
        The keys of its state dict do not change. In both cases the parameters are frozen.

        Raises:
            TypeError: `linear` is not such a module, or cannot be adapted; the message says why.
            ValueError: as the constructor; or `variant` or `init` has to read the weight and there is only a `base`.
        """
        spec = AdapterSpec(rank, alpha, dropout, use_rslora, variant, init)
        return cls.from_spec(linear, spec)

    @classmethod
    def from_spec(cls, linear: nn.Module, spec: AdapterSpec) -> CoToLoRALinear:
        """As `from_linear`, with the settings in an `AdapterSpec`."""
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
        layer._apply_spec(spec)
        if dense is None:
            layer._hold_base(linear)
        else:
            layer.fan_in_fan_out = is_conv1d(linear)
            layer._hold_weight(dense.weight, dense.bias)
            layer._carried = carry_attributes(linear, layer)
        layer.training = linear.training
        _freeze(linear.parameters() if dense is None else (dense.weight, dense.bias))
        return layer

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
        """The user's switch; applies in train and eval mode."""
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy. In a copy made for a moving average, which never trains, the adapter stays active."""
        super().__setstate__(state)
        if called_from(*AVERAGES):
            # the attribute hides the buffer of that name; the buffer stays, because averages pair those of two models
            self.__dict__["_gate"] = True

    @property
    def active(self) -> Gate:
        """δ: whether the adapter is active, ``enabled and (gate or not training)``."""
        enabled, gate = self._enabled, self._gate if self.training else True
        if isinstance(enabled, bool):
            return gate if enabled else False
        if isinstance(gate, bool):
            return enabled if gate else False
        return (enabled != 0) & (gate != 0)

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in_features]`` → ``[..., out_features]``. A merged layer computes a plain linear.

        Raises:
            TypeError: `input` is not a tensor of the dtype of W (autocast lifts this), or the base returns another
                shape than ``[..., out_features]``.
            ValueError: `input` has another shape or device, or a switch ``[batch]`` does not fit it.
        """
        if self.base is not None:
            return self._added_to(self.base(input), input)
        gate, dropout = self.active, self.dropout if self.training else 0.0
        if torch.compiler.is_compiling():
            note_trace()
            return self._checked(input, gate, dropout)
        if self._stack is not None and (y := self._stack.forward(self, input)) is not None:
            return y
        # reading the dict takes a tenth of the time of attribute access; a wrapper may have moved parameters out of it
        own = self._parameters
        weight: Any = own["weight"] if "weight" in own else self.weight  # noqa: SIM401 (self.weight is slow)
        bias: Any = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        if self._transposed:
            weight = weight.T
        try:
            if gate is False or self._original_weight is not None:
                return F.linear(input, weight, bias)
            variant = VARIANTS[self.variant]
            if self.init in FROM_WEIGHT or "lora_a" not in own or "lora_b" not in own:
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
            plan = planned(variant, input, rank, self.in_features, self.out_features, self.scale, dropout)
            if plan.fused and input.shape[-1] != self.in_features:
                # our kernels would read past the rows of W; torch raises
                check_operands(input, weight, bias, a, b)
            return run(plan, input, weight, bias, a, b, extra, gate)  # type: ignore[arg-type]
        except Exception:
            # torch's errors name no argument, so the arguments are checked after the fact to say which one was wrong
            try:
                check_operands(input, weight, bias, *self.factors())
                if input.is_nested:  # no backend takes nested tensors directly
                    return self._checked(input, self.active, dropout)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self._named}{error}") from None
            raise

    def _added_to(self, y: Tensor, x: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.shape[-1:] != (self.out_features,):
            got = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise TypeError(
                f"{self._name or 'the layer'} must have a base that returns [..., {self.out_features}]; its "
                f"{type(self.base).__name__} returned {got}"
            )
        try:
            return add_low_rank(
                y, x, self.lora_a, self.lora_b, scale=self.scale, gate=self.active,
                dropout=self.dropout if self.training else 0.0, variant=self.variant, extra=self.extra,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._named}{error}") from None

    def _checked(self, x: Tensor, gate: Gate, dropout: float) -> Tensor:
        weight = self._matrix(self.weight)
        if self._original_weight is not None:
            return F.linear(x, weight, self.bias)
        lora_a, lora_b = (self.lora_a, self.lora_b) if gate is False else self.factors()
        return coto_lora_linear(
            x, weight, self.bias, lora_a, lora_b, scale=self.scale, gate=gate, dropout=dropout, variant=self.variant,
            extra=self.extra,
        )  # fmt: skip

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


class _Around(ReadThrough, CoToLoRALinear):
    """A `CoToLoRALinear` around a `base`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `CoToLoRALinear.forward`, with the signature of the base: its keywords and its further arguments."""
        assert self.base is not None
        if not args:
            first = "input" if "input" in kwargs else next(iter(signature(self.base.forward).parameters))
            args = (kwargs.pop(first, None),)
        return self._added_to(self.base(*args, **kwargs), args[0])


_Around.__name__ = CoToLoRALinear.__name__  # shown as the same layer; pickle finds the class by __qualname__


def _shown(switch: Gate) -> str:
    return f"tensor{list(switch.shape)}" if isinstance(switch, Tensor) else str(switch)


def _freeze(parameters: Iterable[nn.Parameter | None]) -> None:
    """Freezes all of `parameters`, or none of them if one raises."""
    with ExitStack() as undo:
        for parameter in parameters:
            if parameter is None:
                continue
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        undo.pop_all()
