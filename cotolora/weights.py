"""How the weights of a layer are merged with the update, moved to a device or dtype, saved and loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cotolora.backends.autograd import without_autocast
from cotolora.checks import flag
from cotolora.parameters import LowRankParameters
from cotolora.variants.base import FROM_WEIGHT
from cotolora.wording import LOG_LINE, listed

logger = logging.getLogger("cotolora")


class MergeableWeights(LowRankParameters):
    """How a `CoToLoRALinear` merges, moves, saves and loads."""

    # the attributes that other code had set on the linear
    _carried: tuple[str, ...] = ()
    # names of layers that a warning has reported as merged but never called; one set for all layers of an inject
    _told: frozenset[str] | set[str] = frozenset()
    # the keys of the adapter that the last state dict lacked, as one of the base model alone does
    _lacked: tuple[str, ...] = ()

    def delta_weight(self) -> Tensor:
        """The update that the adapter adds to W, ``[out_features, in_features]``; ignores the switches.

        ``s · B A``; ``c ∘ (W + s · B A) − W`` with DoRA, ``W ∘ s · B A`` with HiRA. In the dtype of A and B.
        """
        return self._delta(self.lora_a.dtype)

    def _delta(self, dtype: torch.dtype) -> Tensor:
        lora_a, lora_b = self.factors()
        weight = None if self.base is not None else self._matrix(self._base_weight())
        with without_autocast(self.lora_a.device):
            return self._variant.delta(weight, lora_a.to(dtype), lora_b.to(dtype), self.extra, self.scale)

    @torch.no_grad()
    def _merged_weight(self) -> nn.Parameter:
        """The base weight plus the update of an enabled adapter: a new parameter, or the base's own if disabled."""
        base = self._base_weight()
        if isinstance(self._enabled, Tensor) and self._enabled.dim() > 0:
            raise RuntimeError(
                f"{self._named}enabled is a row mask, which no single weight can hold; set it to a bool to merge"
            )
        if not self._enabled:
            return base
        # at least float32, even if .half() has cast A and B, so that only the final cast rounds
        dtype = torch.promote_types(torch.promote_types(base.dtype, self.lora_a.dtype), torch.float32)
        weight = base.to(dtype) + self._matrix(self._delta(dtype))
        return nn.Parameter(weight.to(base.dtype), requires_grad=base.requires_grad)

    def merge(self) -> None:
        """Replaces `weight` by W plus `delta_weight` if the adapter is enabled; ignores the gate.

        The sum is a new tensor: the original, which other modules may share, is kept and never written to. Until
        `unmerge`, the switches have no effect and the adapter does not train. A second call does nothing.

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
        """Restores the original weight object, bit for bit. Does nothing if the layer is not merged."""
        if self._original_weight is not None:
            self.weight, self._original_weight = self._original_weight, None

    def to_linear(self, merge: bool = True) -> nn.Module:
        """A plain ``nn.Linear`` (or Conv1D) with the base's bias and, if `merge`, a merged weight; or the `base`.

        With ``merge=False``, and for a disabled adapter, the weight is the base's own parameter.

        Raises:
            ValueError: `merge` is not a bool.
            RuntimeError: `merge` is True, the adapter is enabled, and `enabled` is a row mask or there is a `base`.
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
        linear.__dict__.update({name: self.__dict__[name] for name in self._carried if name in self.__dict__})
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergeableWeights:
        was_meta, switches = self.lora_a.is_meta, {name: self._buffers.get(name) for name in ("_gate", "_enabled")}
        super()._apply(fn, recurse)
        # to_empty leaves arbitrary numbers, and a checkpoint of the base does not contain these tensors
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
        self._lacked = ()
        if own.isdisjoint(state_dict):  # a checkpoint of the base model, without adapters
            assigned = self.lora_a.is_meta and local_metadata.get("assign_to_params_buffers", False)
            # tensors shared with other layers or sharded over ranks cannot be initialised here, and count as missing
            if not assigned or not (self._variant.shared_keys or self._is_sharded):
                self._lacked = tuple(key for key in missing_keys if key in own)
                missing_keys[:] = [key for key in missing_keys if key not in own]
                if assigned and self.base is None and not self._base_weight().is_meta:
                    self.reset_parameters()
            if prefix + "weight" in state_dict and self._is_fresh():
                self._take_from_weight()
        if was_merged:
            self.merge()

    def _fqn_modifiers(self) -> dict[str, str]:
        # torch.distributed.checkpoint uses this to find the module that a key of the state dict belongs to
        base = self.base
        return {} if base is None else dict.fromkeys((*base._parameters, *base._buffers, *base._modules), "base")

    @cached_property
    def _transposed(self) -> bool:
        """`fan_in_fan_out`. Only forward reads it, so its presence in __dict__ shows that a forward has run."""
        return self.fan_in_fan_out

    def _merges_uncalled(self, merged: Tensor) -> bool:
        """Whether merging changes the weight of a layer that no forward of its model has called."""
        if "_transposed" in self.__dict__ or _traced or not self._name or merged.is_meta:
            return False
        return not torch.equal(merged, self._base_weight())


# whether torch.compile has traced a layer: such a call does not set _transposed
_traced = False


def note_trace() -> bool:
    """Remembers that torch.compile traces a layer."""
    global _traced
    _traced = True
    return True


# as torch.compiler.assume_constant_result, so that it runs while a layer is traced, but without importing Triton
note_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def warn_of_uncalled(names: Collection[str]) -> None:
    """Warns of adapters that are about to be merged although no forward has called them."""
    if names:
        logger.warning(
            "merging changes the weights of %s, whose adapters no forward has called yet; if the model reads these "
            "weights without calling the layers, it has run without the adapters and its outputs will change",
            listed(names, LOG_LINE),
        )
