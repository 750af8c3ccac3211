"""`AdapterState`: adapters without a model, the operands of merging and interpolation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cotolora.checks import finite, flag, mapping, module
from cotolora.groups import adapters, is_enabled, plain_name, unwrap
from cotolora.linear import CoToLoRALinear
from cotolora.saving.adapter import LoadResult, collect, load_into, read_files, write_files
from cotolora.saving.experts import weight_of
from cotolora.saving.fitting import AdapterFiles
from cotolora.saving.peft_config import adapter_fields, exact_expression, parse_config
from cotolora.saving.places import Places, base_tensors
from cotolora.spec import AdapterSpec
from cotolora.variants import VARIANTS
from cotolora.variants.base import FROM_WEIGHT
from cotolora.wording import listed, shown, some_of

# variants whose update is a product, so that merging can use its factors; their files have the same format
PRODUCTS = tuple(name for name, variant in VARIANTS.items() if variant.product)
# fields of a config that do not depend on single adapters and are kept when merging
KEPT_FIELDS = ("base_model_name_or_path", "fan_in_fan_out", "lora_dropout", "modules_to_save", "task_type")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")
_OTHER_PART = re.compile(r"\.lora_(A|B|embedding|magnitude)")


@dataclass(frozen=True, eq=False)
class Factors:
    """The update ``s · B A`` of one linear, ``s = alpha / rank``, or ``alpha / √rank`` with rsLoRA.

    Attributes:
        lora_a: A, ``[rank, in_features]``, at least float32.
        lora_b: B, ``[out_features, rank]``, at least float32.
        alpha, use_rslora: as in `CoToLoRALinear`.

    Raises:
        ValueError: a factor is not a floating matrix, A and B differ in rank, or a setting is out of its range.
    """

    lora_a: Tensor
    lora_b: Tensor
    alpha: float
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for argument, tensor in (("lora_a", self.lora_a), ("lora_b", self.lora_b)):
            dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_nested
            if not dense or tensor.dim() != 2 or not tensor.is_floating_point():
                raise ValueError(f"{argument} must be a floating matrix; got {shown(tensor)}")
            if tensor.is_meta:
                raise ValueError(f"{argument} must have memory; got a tensor on the meta device")
        if self.lora_a.shape[0] != self.lora_b.shape[1] or self.rank < 1:
            shapes = f"{tuple(self.lora_a.shape)} and {tuple(self.lora_b.shape)}"
            raise ValueError(f"lora_a and lora_b must be [rank, in_features] and [out_features, rank]; got {shapes}")
        object.__setattr__(self, "alpha", finite("alpha", self.alpha))
        flag("use_rslora", self.use_rslora)

    @property
    def rank(self) -> int:
        """The number of rows of A and of columns of B."""
        return self.lora_a.shape[0]

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.spec.scale

    @property
    def spec(self) -> AdapterSpec:
        """The settings of an adapter with these factors."""
        return AdapterSpec(self.rank, self.alpha, use_rslora=self.use_rslora)

    def delta(self) -> Tensor:
        """The update ``s · B A``, ``[out_features, in_features]``."""
        return self.scale * (self.lora_b @ self.lora_a)


@dataclass(frozen=True, eq=False)
class AdapterState:
    """The adapters of a model, by the names of its modules, and other tensors that were trained with them.

    Only plain LoRA, because merging needs an update that is a product of two factors.

    Attributes:
        factors: A, B and scale of each adapter, by module name.
        other_tensors: other saved parameters (a head) and buffers, by name.
        kept: fields of the PEFT config that states derived from this one inherit.

    Raises:
        ValueError: an argument is not a mapping from strings to such values; there are no factors, or one is not
            finite.

    >>> layer = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> from cotolora import inject
    >>> _ = inject(layer, rank=1, alpha=2.0)
    >>> AdapterState.from_model(layer)
    AdapterState(1 adapters, ranks {1})
    """

    factors: Mapping[str, Factors]
    other_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        factors = mapping("factors", self.factors, "a mapping from names to Factors", Factors)
        if not factors:
            raise ValueError(f"factors must hold at least one adapter; got {shown(factors)}")
        mapping("kept", self.kept, "a mapping from fields to their values")
        object.__setattr__(self, "factors", {name: _checked(name, part) for name, part in factors.items()})
        must = "a mapping from names to tensors"
        for key, tensor in mapping("other_tensors", self.other_tensors, must, Tensor).items():
            if tensor.is_floating_point() and not _is_finite(tensor):
                raise ValueError(f"{key} must be finite; it holds NaN or infinity")

    def __repr__(self) -> str:
        ranks = sorted({part.rank for part in self.factors.values()})
        others = f", {len(self.other_tensors)} other tensors" if self.other_tensors else ""
        return f"AdapterState({len(self.factors)} adapters, ranks {{{', '.join(map(str, ranks))}}}{others})"

    @classmethod
    def from_model(cls, model: nn.Module) -> AdapterState:
        """Copies the content that `save_adapter` would write: the enabled adapters and other trained tensors.

        Raises:
            ValueError: as `save_adapter`, or an adapter is not of variant "lora".
        """
        return cls._from_files(collect(model), type(model).__name__)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> AdapterState:
        """Reads the files that `save_adapter`, `save` or PEFT wrote.

        Raises:
            TypeError, FileNotFoundError, ValueError: as `load_adapter`, or the files do not hold plain LoRA.
        """
        return cls._from_files(read_files(directory), str(directory))

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        alpha: float | None = None,
        use_rslora: bool = False,
        like: nn.Module | None = None,
    ) -> AdapterState:
        """Adapters from a flat mapping, which does not contain the scale of ``B A``.

        Args:
            tensors: tensors by keys as `save_adapter` writes them (``blocks.0.q.lora_A.weight``), with or without
                PEFT's ``base_model.model.``; other keys are those of other trained tensors. Copied.
            alpha, use_rslora: the settings that determine the scale of every adapter; or
            like: a model whose adapters of the same names have the scales.

        Raises:
            TypeError: `like` is not a module.
            ValueError: both or neither of `alpha` and `like` are given; A or B of an adapter is missing; an adapter is
                not plain LoRA; or `like` does not have it, or not at this rank.

        >>> tensors = {"q.lora_A.weight": torch.ones(2, 3), "q.lora_B.weight": torch.ones(4, 2)}
        >>> AdapterState.from_tensors(tensors, alpha=4)
        AdapterState(1 adapters, ranks {2})
        """
        if not mapping("tensors", tensors, "a mapping from names to tensors", Tensor):
            raise ValueError(f"tensors must hold at least one adapter; got {shown(tensors)}")
        if (alpha is None) == (like is None):
            got = f"{'neither' if like is None else 'both'}, alpha={shown(alpha)} and like={shown(like)}"
            raise ValueError(f"exactly one of alpha and like must be given, for the scale; got {got}")
        alpha = None if alpha is None else finite("alpha", alpha)
        flag("use_rslora", use_rslora)
        plain = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
        layers = {} if like is None else adapters(module("like", like))

        def spec_of(name: str) -> AdapterSpec:
            if alpha is not None:
                rank = len(plain[f"{name}.lora_A.weight"])
                return AdapterSpec(rank, alpha, use_rslora=use_rslora)
            if name not in layers:
                raise ValueError(f"tensors must be of adapters that like has; got {name}, which it does not have")
            return layers[name].spec

        return cls._from_flat(plain, spec_of, {}, "tensors")

    @classmethod
    def _from_files(cls, files: AdapterFiles, source: str) -> AdapterState:
        if files.config.variant not in PRODUCTS:
            raise ValueError(
                f"{source} must hold adapters of variant {' or '.join(map(repr, PRODUCTS))}, whose update is a product "
                f"of factors; got {files.config.variant!r}"
            )
        kept = {key: files.fields[key] for key in KEPT_FIELDS if key in files.fields}
        names = {match["name"] for key in files.tensors if (match := _FACTOR.fullmatch(key))}
        if by_weight := sorted(weight_of(name) for name in names if files.config.takes_parameter(weight_of(name))):
            kept["target_parameters"] = by_weight
        return cls._from_flat(files.tensors, files.config.spec_of, kept, source)

    @classmethod
    def _from_flat(
        cls, tensors: Mapping[str, Tensor], spec_of: Callable[[str], AdapterSpec], kept: dict[str, Any], source: str
    ) -> AdapterState:
        pairs: dict[str, dict[str, Tensor]] = {}
        others = {}
        ends = tuple(f".{part.key}" for variant in VARIANTS.values() for part in variant.parts if part.key is not None)
        for key, tensor in tensors.items():
            if match := _FACTOR.fullmatch(key):
                pairs.setdefault(match["name"], {})[match["factor"]] = tensor
            elif _OTHER_PART.search(key) or key.endswith(ends):
                raise ValueError(f"{source} must hold plain LoRA of linears, lora_A and lora_B; got {shown(key)}")
            else:
                others[key] = tensor.detach().clone()
        factors = {}
        for name, pair in pairs.items():
            if len(pair) < 2:
                raise ValueError(f"{source} must hold lora_A and lora_B of {name}; got only lora_{next(iter(pair))}")
            for key, tensor in pair.items():
                if tensor.dim() != 2 or not tensor.is_floating_point():
                    raise ValueError(f"lora_{key.lower()} of {name} must be a floating matrix; got {shown(tensor)}")
            spec = spec_of(name)
            if (rank := pair["A"].shape[0]) != spec.rank:
                raise ValueError(
                    f"{source} must have the rank of its tensors for {name}; got {spec.rank}, the tensors have {rank}"
                )
            try:
                a, b = (pair[factor].detach().clone() for factor in "AB")
                factors[name] = Factors(a, b, spec.alpha, spec.use_rslora)
            except ValueError as error:
                raise ValueError(f"{source} must hold factors of {name}; {error}") from None
        if not factors:
            raise ValueError(f"{source} must hold at least one adapter; got {shown(tensors)}")
        return cls(factors, others, kept)

    def _saved(self) -> AdapterFiles:
        tensors = dict(self.other_tensors)
        for name, part in self.factors.items():
            tensors |= {f"{name}.lora_A.weight": part.lora_a, f"{name}.lora_B.weight": part.lora_b}
        specs = {name: part.spec for name, part in self.factors.items()}
        kept = dict(self.kept)
        parameters = kept.pop("target_parameters", ())
        by_weight = [name for name in specs if weight_of(name) in parameters]
        modules = [name for name in specs if name not in set(by_weight)]
        fields = {
            **adapter_fields(specs, by_weight), **kept, "target_modules": exact_expression(modules) if modules else [],
            **({"target_parameters": [weight_of(name) for name in by_weight]} if by_weight else {}),
        }  # fmt: skip
        return AdapterFiles(tensors, {}, fields, parse_config(fields), ours=True)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the pair of files that `load_adapter` and PEFT read, completely or not at all, as `save_adapter` does.

        Raises:
            TypeError: `directory` is not a path.
            OSError: the files cannot be written; the old ones are unchanged.
        """
        write_files(self._saved(), directory)

    def load_into(self, model: nn.Module, strict: bool = True) -> LoadResult:
        """As `load_adapter`, without files: injects into a plain model; existing adapters must have the same ranks.

        Raises:
            ValueError: the state does not fit the model. Nothing is changed then.
        """
        return load_into(model, self._saved(), source="the state", strict=strict)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the block, `model` computes with this state; its own adapters may have other ranks.

        After the block, also if it raises, the model has its own adapters again, the same parameter objects, which are
        never written to. The state's other tensors are copied into those of the model, whose values are restored bit
        for bit. Switches and merged layers are restored too.

        Raises:
            ValueError: the state and the model differ in modules or shapes; a layer is not plain LoRA.
        """
        layers = self._layers_of(model)
        targets = self._other_tensors_of(model)
        # make the copies first, so that nothing has changed if memory runs out
        own = {key: target.detach().clone() for key, target in targets.items()}
        before = {name: (layer.spec, layer.lora_a, layer.lora_b, layer.merged) for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                part = self.factors[name]
                layer.unmerge()
                _set_factors(layer, part.spec, _parameter_like(part.lora_a, layer), _parameter_like(part.lora_b, layer))
            _copy(self.other_tensors, targets)
            yield
        finally:
            _copy(own, targets)
            for name, layer in layers.items():
                spec, lora_a, lora_b, merged = before[name]
                _set_factors(layer, spec, lora_a, lora_b)
                if merged:
                    layer.merge()

    def _layers_of(self, model: nn.Module) -> dict[str, CoToLoRALinear]:
        layers = adapters(model)
        needed = {name for name, layer in layers.items() if is_enabled(layer)}
        if missing := sorted(needed - set(self.factors)) or sorted(set(self.factors) - set(layers)):
            whose = "only the model has" if missing[0] in layers else "only the state has"
            raise ValueError(f"state must hold the adapters of the model; {whose} {listed(missing)}")
        layers = {name: layer for name, layer in layers.items() if name in self.factors}
        for name, layer in layers.items():
            part = self.factors[name]
            if layer.variant not in PRODUCTS or layer.init in FROM_WEIGHT:
                raise ValueError(f"{name} must be plain LoRA; it is {layer.variant!r} with init {layer.init!r}")
            if layer.merged and isinstance(layer.enabled, Tensor) and layer.enabled.dim() > 0:
                raise ValueError(f"{name} must not be merged while enabled is a row mask; unmerge it")
            if hasattr(layer.lora_a, "device_mesh"):
                raise ValueError(f"{name} must have whole parameters; they are sharded")
            shape = (part.lora_b.shape[0], part.lora_a.shape[1])
            if shape != (layer.out_features, layer.in_features):
                raise ValueError(
                    f"{name} must be {layer.out_features} x {layer.in_features} as in the model; the state's is {shape}"
                )
        return layers

    def _other_tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        if not self.other_tensors:
            return {}
        own = {plain_name(key): tensor for key, tensor in unwrap(model).state_dict(keep_vars=True).items()}
        own |= base_tensors(adapters(model), self.other_tensors)
        for key, tensor in self.other_tensors.items():
            if key not in own or own[key].shape != tensor.shape:
                found = f"of shape {tuple(own[key].shape)}" if key in own else "not there"
                raise ValueError(f"{key} must be in the model, of shape {tuple(tensor.shape)}; it is {found}")
        copies, _ = Places(unwrap(model)).copies(self._saved().config.wraps, self.other_tensors)
        if copies:
            keys, _, _, others = copies[0]
            raise ValueError(f"{keys[0]} must be a separate tensor in the model; it is tied to {some_of(others)}")
        return {key: own[key] for key in self.other_tensors}


def _is_finite(tensor: Tensor) -> bool:
    # float8 has no isfinite
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())


def _checked(name: str, part: Factors) -> Factors:
    for key, tensor in (("lora_a", part.lora_a), ("lora_b", part.lora_b)):
        if not _is_finite(tensor):
            raise ValueError(f"{key} of {name} must be finite; it holds NaN or infinity")
    # not promote_types, which does not support float8
    dtype = torch.float64 if torch.float64 in (part.lora_a.dtype, part.lora_b.dtype) else torch.float32
    return Factors(part.lora_a.detach().to(dtype), part.lora_b.detach().to(dtype), part.alpha, part.use_rslora)


def _set_factors(layer: CoToLoRALinear, spec: AdapterSpec, lora_a: Tensor, lora_b: Tensor) -> None:
    layer.rank, layer.alpha, layer.use_rslora = spec.rank, spec.alpha, spec.use_rslora
    layer.lora_a, layer.lora_b = lora_a, lora_b  # type: ignore[assignment]


def _parameter_like(value: Tensor, layer: CoToLoRALinear) -> nn.Parameter:
    own = layer.lora_a
    return nn.Parameter(value.to(own.device, own.dtype, copy=True), requires_grad=own.requires_grad)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for key, target in targets.items():
        target.copy_(values[key])
