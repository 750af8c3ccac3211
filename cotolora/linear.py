"""The layer: a linear module with a low-rank adapter that can be switched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotolora.backends.autograd import without_autocast
from cotolora.bases import check_foreign, features, is_conv1d, is_dense, keep_keys, place_of, why_not_adaptable
from cotolora.functional import add_low_rank, coto_lora_linear, row_norms
from cotolora.reference import Gate
from cotolora.variants.starts import FROM_WEIGHT, check, delta, since_start, start


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
        variant: "lora"; "dora", which learns the lengths of W's rows as well; "hira", which scales W's entries. See
            `coto_lora_linear`.
        init: of A: "kaiming" (uniform with a = √5, as nn.Linear) or "gaussian" (standard
            deviation 1 / rank), where B is zero; or of both from W: "pissa" (its largest singular values) or "olora"
            (its QR factors), see `cotolora.variants.starts.start`. Then what the layer adds is ``s · (B A − B0 A0)``,
            so that a fresh layer and one that is off compute what W does, the original.
        device, dtype: of the base weight. A and B are float32, or float64 if the base is.

    Attributes:
        weight: ``[out_features, in_features]``, frozen; ``[in_features, out_features]`` if
            `fan_in_fan_out`, which marks a layer made from a transformers Conv1D.
        bias: ``[out_features]`` or None, frozen.
        base: a module that makes ``x Wᵀ + bias``, frozen, in place of `weight` and `bias`, which then are
            None; else None.
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

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    base: nn.Module | None
    lora_magnitude: nn.Parameter | None
    lora_a0: Tensor | None
    lora_b0: Tensor | None

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
        for name, size in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer; got {size!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number; got {alpha!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability in [0, 1]; got {dropout!r}")
        check(variant, init, rank, alpha, (out_features, in_features))
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype; got {dtype}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.alpha, self.dropout, self.use_rslora = float(alpha), float(dropout), bool(use_rslora)
        self.variant, self.init = variant, init
        self.fan_in_fan_out = False
        self._gate: Gate = True
        self._enabled: Gate = True
        self._original_weight: nn.Parameter | None = None
        self.base = None
        self._norm: tuple[tuple[int, ...], Tensor] | None = None
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._share(base.weight, base.bias)  # type: ignore[arg-type]

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
        if reason := why_not_adaptable(linear):
            raise TypeError(f"linear must be a module that maps in_features to out_features; {reason}")
        dense = is_dense(linear)
        if not dense:
            check_foreign(linear, variant, init)
        weight: Any = linear.weight if dense else None
        bias: Any = linear.bias if dense else None
        in_features, out_features = features(linear)
        # an init from W can only follow once W is in place
        layer = cls(
            in_features, out_features, rank, alpha, bias=bias is not None, dropout=dropout,
            use_rslora=use_rslora, variant=variant, device="meta", dtype=weight.dtype if dense else None,
        )  # fmt: skip
        check(variant, init, rank, alpha, (out_features, in_features))
        layer.init = init
        if dense:
            layer.fan_in_fan_out = is_conv1d(linear)
            layer._share(weight, bias)
        else:
            layer._call(linear)
        layer.training = linear.training
        return layer

    def _share(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        weight.requires_grad_(False)
        self.weight = weight
        if bias is not None:
            bias.requires_grad_(False)
        self.bias = bias
        self._make_factors(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)

    def _call(self, base: nn.Module) -> None:
        self.weight = self.bias = None
        self.base = base.requires_grad_(False)
        keep_keys(self)
        self._make_factors(*place_of(base))

    def _make_factors(self, device: torch.device, dtype: torch.dtype) -> None:
        self.lora_a = nn.Parameter(torch.empty(self.rank, self.in_features, device=device, dtype=dtype))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, self.rank, device=device, dtype=dtype))
        empty = torch.empty(self.out_features, device=device, dtype=dtype)
        self.register_parameter("lora_magnitude", nn.Parameter(empty) if self.variant == "dora" else None)
        for name, factor in (("lora_a0", self.lora_a), ("lora_b0", self.lora_b)):
            self.register_buffer(name, torch.empty_like(factor.detach()) if self.init in FROM_WEIGHT else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts the adapter anew: draws A, sets B to zero, takes from W what comes from W. The base stays as it is.

        Raises:
            ValueError: `init` is taken from W, and W is on the meta device.
        """
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        elif self.init == "gaussian":
            nn.init.normal_(self.lora_a, std=1 / self.rank)
        nn.init.zeros_(self.lora_b)
        self._take_from_weight()

    @torch.no_grad()
    def _take_from_weight(self) -> None:
        self._norm = None
        if self.base is not None:
            return
        weight = self._matrix(self._base_weight())
        if self.lora_a0 is not None and self.lora_b0 is not None:
            if weight.is_meta:
                raise ValueError(
                    f"init must be 'kaiming' or 'gaussian' on the meta device, got {self.init!r}, which reads W"
                )
            a0, b0 = start(self.init, weight, self.rank, self.scale)
            for target, value in ((self.lora_a, a0), (self.lora_b, b0), (self.lora_a0, a0), (self.lora_b0, b0)):
                target.copy_(value)
        if self.lora_magnitude is not None and not weight.is_meta:
            # at the start the update is zero, whatever A is
            zero = torch.zeros_like(self.lora_b)
            self.lora_magnitude.copy_(row_norms(weight, self.lora_a, zero, self.scale))

    @property
    def scale(self) -> float:
        """``alpha / rank``, or ``alpha / √rank`` with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def adapter_parameters(self) -> tuple[nn.Parameter, ...]:
        """A, B and, of DoRA, m: what an optimizer trains, and what gets no gradient where the layer is off."""
        both = (self.lora_a, self.lora_b)
        return both if self.lora_magnitude is None else (*both, self.lora_magnitude)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the update ``s · B A``: A and B, or with "pissa" and "olora" those of ``B A − B0 A0``."""
        if self.init not in FROM_WEIGHT:  # no attribute of a module's own is looked up as fast
            return self.lora_a, self.lora_b
        assert self.lora_a0 is not None
        assert self.lora_b0 is not None
        return since_start(self.lora_a, self.lora_b, self.lora_a0, self.lora_b0)

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
        argument = name.removeprefix("_")
        if not isinstance(value, (bool, Tensor)):
            raise TypeError(
                f"{argument} must be a bool or a bool or integer tensor; got {type(value).__name__} {value!r}"
            )
        if isinstance(value, Tensor):
            if value.is_floating_point() or value.is_complex():
                raise TypeError(f"{argument} must be a bool or a bool or integer tensor; got a tensor of {value.dtype}")
            if value.dim() > 1:
                raise ValueError(f"{argument} must be 0-dim or [batch]; got a tensor of shape {tuple(value.shape)}")
            if not self.lora_a.is_meta:
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

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` → ``[..., out_features]``. A merged layer is a plain linear."""
        gate, dropout = self.active, self.dropout if self.training else 0.0
        if self.base is not None:
            return add_low_rank(self.base(x), x, self.lora_a, self.lora_b, scale=self.scale, gate=gate, dropout=dropout)
        assert self.weight is not None
        weight = self._matrix(self.weight)
        if self._original_weight is not None:
            return F.linear(x, weight, self.bias)
        lora_a, lora_b = (self.lora_a, self.lora_b) if gate is False else self.factors()
        if self.variant != "dora":
            return coto_lora_linear(
                x, weight, self.bias, lora_a, lora_b, scale=self.scale, gate=gate, dropout=dropout, variant=self.variant
            )
        return coto_lora_linear(
            x, weight, self.bias, lora_a, lora_b, scale=self.scale, gate=gate, dropout=dropout,
            variant="dora", magnitude=self.lora_magnitude,
            norm=None if gate is False else self._kept_norm(weight, lora_a, lora_b),
        )  # fmt: skip

    def _kept_norm(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor | None:
        """DoRA's norm, from one forward to the next in eval() without gradients; None where it must be computed.

        `train`, a load, `merge`, `unmerge` and `.to()` forget it, and so does a forward that records gradients, since
        training may follow. The versions tell of most other writes, but not of one through ``.data``.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._norm = None
            return None
        written = (weight, self.lora_a, self.lora_b)
        versions = tuple(-1 if t.is_inference() else t._version for t in written)
        if self._norm is None or self._norm[0] != versions:
            self._norm = versions, row_norms(weight, lora_a, lora_b, self.scale)
        return self._norm[1]

    def forget_norm(self) -> None:
        """Has DoRA's norm computed anew. Call it after writing to a parameter through ``.data`` in eval()."""
        self._norm = None

    def train(self, mode: bool = True) -> CoToLoRALinear:
        """As of any module; besides, what eval() has kept is forgotten."""
        self._norm = None
        return super().train(mode)

    def delta_weight(self) -> Tensor:
        """What the adapter adds to W, ``[out_features, in_features]``, whatever the switches say.

        ``s · B A``; of DoRA ``c ∘ (W + s · B A) − W``, of HiRA ``W ∘ s · B A``. In the dtype of A and B.
        """
        return self._delta(self.lora_a.dtype)

    def _delta(self, dtype: torch.dtype) -> Tensor:
        lora_a, lora_b = self.factors()
        weight = None if self.variant == "lora" else self._matrix(self._base_weight())
        with without_autocast(self.lora_a.device):
            return delta(self.variant, weight, lora_a.to(dtype), lora_b.to(dtype), self.lora_magnitude, self.scale)

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
        weight = self.weight if self._original_weight is None else self._original_weight
        if weight is None:
            raise RuntimeError(
                f"the base is a {type(self.base).__name__}, which has no dense floating weight that could hold the "
                "update; leave it unmerged, or take it back with to_linear(merge=False) or eject(model, merge=False)"
            )
        return weight

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
            self._norm = None
            merged, original = self._merged_weight(), self.weight
            self.weight = merged
            # past nn.Module's __setattr__, which would register a second parameter
            self.__dict__["_original_weight"] = original

    def unmerge(self) -> None:
        """Puts the original weight object back, bit for bit. Does nothing if not merged."""
        if self._original_weight is not None:
            self.weight, self._original_weight, self._norm = self._original_weight, None, None

    def to_linear(self, merge: bool = True) -> nn.Module:
        """A plain ``nn.Linear`` (or Conv1D) with the base's bias, and its weight or, merged, a new one; or the `base`.

        Raises:
            RuntimeError: `merge` is asked for of an enabled adapter and `enabled` is a row mask, or there is a `base`.
        """
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
        self._norm = None
        super()._apply(fn, recurse)
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
        self._norm = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = {prefix + name for name in ("lora_a", "lora_b", "lora_magnitude", "lora_a0", "lora_b0")}
        if own.isdisjoint(state_dict):  # a checkpoint of the base model, which knows no adapters
            missing_keys[:] = [key for key in missing_keys if key not in own]
            if prefix + "weight" in state_dict and self._is_fresh():
                self._take_from_weight()
        if was_merged:
            self.merge()

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


def _shown(switch: Gate) -> str:
    return f"tensor{list(switch.shape)}" if isinstance(switch, Tensor) else str(switch)
