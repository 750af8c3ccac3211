"""`Variant`, the description of a variant of the low-rank update; its defaults are those of plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from cotolora.backends.types import Backend, Call
from cotolora.wording import shown

if TYPE_CHECKING:
    from cotolora.linear import CoToLoRALinear
    from cotolora.spec import AdapterSpec

INITS = ("kaiming", "gaussian", "pissa", "olora")
FROM_WEIGHT = ("pissa", "olora")
# PEFT's initialisations of LoRA that do not change the base weights; the others leave a residual in the base
PEFT_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


class Part(NamedTuple):
    """One tensor of an adapter.

    attribute: its name in the layer.
    shape: its sizes, each "rank", "in_features" or "out_features".
    key: its name in PEFT's files after the module's name; None if it is not stored per module, see
        `Variant.shared_keys`.
    argument: its name in error messages, that of the argument of `coto_lora_linear` if there is one.
    """

    attribute: str
    shape: tuple[str, ...]
    key: str | None
    argument: str

    def sizes(self, **sizes: int) -> tuple[int, ...]:
        """Its shape for the given rank, in_features and out_features."""
        return tuple(sizes[name] for name in self.shape)


def lora_a(key: str = "lora_A.weight") -> Part:
    """A, ``[rank, in_features]``."""
    return Part("lora_a", ("rank", "in_features"), key, "lora_a")


def lora_b(key: str = "lora_B.weight") -> Part:
    """B, ``[out_features, rank]``."""
    return Part("lora_b", ("out_features", "rank"), key, "lora_b")


class Sizes(NamedTuple):
    """The sizes that determine the shapes of an adapter's tensors."""

    rank: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class PeftMethod:
    """How a PEFT config describes a variant.

    peft_type: the method.
    flags: fields that distinguish variants of one method, with their values.
    dropout, init: the names of the fields for dropout and initialisation.
    inits: values of the field `init` that do not change the base weights.
    default_rank, default_alpha: values for a config without these fields.
    scaled: whether the method has alpha and rsLoRA; if not, alpha is the rank.
    patterned: whether PEFT applies rank_pattern.
    fields: further fields that such a config may have, with their defaults, which `save_adapter` writes.
    """

    peft_type: str
    flags: Mapping[str, bool] = dataclass_field(default_factory=dict)
    dropout: str = "lora_dropout"
    init: str = "init_lora_weights"
    inits: Collection[Any] = PEFT_INITS
    default_rank: int = 8
    default_alpha: float = 8
    scaled: bool = True
    patterned: bool = True
    fields: Mapping[str, Any] = dataclass_field(default_factory=dict)


class Variant:
    """A variant of the low-rank update: its formula, its backends, its tensors and its form in files.

    A subclass sets the attributes and overrides the methods in which it differs from LoRA. Instances have no state.

    Attributes:
        name: the value of ``variant=``.
        definition: its function in `cotolora.reference`, ``(x, weight, bias, a, b, *extra, *constants, *, scale, gate,
            dropout)``.
        addition: the function that adds the update to a base output, ``(y, x, a, b, *extra, *, scale, gate, dropout)``;
            None if the variant must read W.
        addmm, addmm_adding: the backend of vendor GEMMs, or None; the second for layers with a `base`.
        fused, fused_adding: the backends of our kernels by the names of their forms; the second for layers with a
            `base`.
        measured: whether `python -m benchmarks tune` measures it.
        parts: the tensors of an adapter: A, B and the extra ones.
        trained: the attributes that train, in the order in which an optimizer gets them; the others are shared.
        inits: the allowed initialisations of A and B, see `CoToLoRALinear`.
        product: whether the update is just ``scale · B A``, which merging decomposes.
        low_rank: a description of the product of `factors` times the scale; `python -m cotolora inspect` prints its
            norm.
        peft: how a PEFT config describes it.
        shared_keys: the names in PEFT's files, after ``base_model.``, of tensors that belong to no single module.
    """

    name: ClassVar[str]
    definition: ClassVar[Callable[..., Tensor]]
    addition: ClassVar[Callable[..., Tensor] | None] = None
    addmm: ClassVar[Backend | None] = None
    addmm_adding: ClassVar[Backend | None] = None
    fused: ClassVar[Mapping[str, Backend]] = {}
    fused_adding: ClassVar[Mapping[str, Backend]] = {}
    measured: ClassVar[bool] = False
    parts: ClassVar[tuple[Part, ...]] = (lora_a(), lora_b())
    trained: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")
    inits: ClassVar[tuple[str, ...]] = INITS
    product: ClassVar[bool] = False
    low_rank: ClassVar[str] = "s B A"
    peft: ClassVar[PeftMethod]
    shared_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.extra = self.parts[2:]
        self.backends = _by_name(self.addmm, self.fused)
        self.adding_backends = _by_name(self.addmm_adding, self.fused_adding)

    def backends_for(self, call: Call) -> Mapping[str, Backend]:
        """The backends of such calls by their full names, without the reference."""
        return self.adding_backends if call.adds else self.backends

    def constants(
        self, backend: Backend | None, weight: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """Tensors that must be computed from W before autocast casts it; the backend gets them after the extra ones."""
        return ()

    # the layer

    def check(self, init: str, rank: int, alpha: float, sizes: tuple[int, int]) -> None:
        """Raises ValueError unless the variant allows `init`, `rank` and `alpha` on a weight of these sizes."""
        if init not in INITS:
            raise ValueError(f"init must be one of {INITS}; got {shown(init)}")
        if init not in self.inits:
            raise ValueError(f"init must be one of {self.inits} with variant={self.name!r}; got {shown(init)}")
        if init not in FROM_WEIGHT:
            return
        if rank > min(sizes):
            raise ValueError(
                f"rank must be at most {min(sizes)} with init={init!r}, the smaller of the sizes {sizes}; got {rank}"
            )
        if not alpha / rank > 0:  # false as well if alpha is so small that the quotient underflows
            raise ValueError(f"alpha must be positive with init={init!r}; got {alpha!r}")

    def start(self, layer: CoToLoRALinear, weight: Tensor | None) -> None:
        """Initialises the extra tensors, given W ``[out_features, in_features]``, or None or a meta tensor instead."""

    def share(self, layers: Sequence[CoToLoRALinear]) -> None:
        """Gives the layers of one model their shared tensors, when `inject` puts them into it."""

    def factors(self, a: Tensor, b: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The factors of the product `low_rank`, in the shapes and the dtype of A and B."""
        return a, b

    def delta(self, weight: Tensor | None, a: Tensor, b: Tensor, extra: Sequence[Tensor], scale: float) -> Tensor:
        """What merging adds to W, ``[out_features, in_features]``, in the dtype of A and B."""
        a, b = self.factors(a, b, extra)
        return scale * (b @ a)

    # files

    def saved_spec(self, layer: CoToLoRALinear) -> AdapterSpec:
        """The settings that belong to the tensors from `saved`, for an unchanged base."""
        if layer.init not in FROM_WEIGHT:
            return layer.spec
        # twice the rank at the same scale
        alpha = layer.alpha * (math.sqrt(2) if layer.use_rslora else 2)
        return replace(layer.spec, rank=2 * layer.rank, alpha=alpha, init="kaiming")

    def saved(self, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """The tensors of an adapter as PEFT stores them, by attribute; `scale` is the layer's."""
        return tensors

    def loaded(self, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        """The reverse of `saved`, for tensors of at least float32; tensors without a key come from `spread_shared`."""
        return tensors

    def saved_shared(self, layers: Mapping[str, CoToLoRALinear]) -> dict[str, Tensor]:
        """The tensors of `shared_keys` by key, for the saved layers."""
        return {}

    def spread_shared(
        self, shared: Mapping[str, Tensor], fields: Mapping[str, Any], sizes: Mapping[str, Sizes]
    ) -> dict[str, dict[str, Tensor]]:
        """The tensors of each module that come from `shared`, by attribute: all parts without a key.

        Args:
            shared: the tensors of `shared_keys` in the file.
            fields: the fields of the config that are in `PeftMethod.fields`.
            sizes: the sizes of the modules, by name.

        Raises:
            ValueError: a tensor is missing or does not fit.
        """
        return {}


def without_scale(b: Tensor, scale: float) -> Tensor:
    """``b / scale``, for methods whose files hold B times the scale.

    Raises:
        ValueError: the result is not finite although `b` is.
    """
    quotient = b / scale
    if b.isfinite().all() and not quotient.isfinite().all():
        raise ValueError(f"alpha must leave B finite when it is divided by the scale; got a scale of {scale!r}")
    return quotient


def _by_name(addmm: Backend | None, fused: Mapping[str, Backend]) -> dict[str, Backend]:
    vendor = {} if addmm is None else {"addmm": addmm}
    return {**vendor, **{f"triton:{form}": backend for form, backend in fused.items()}}
