"""What the keys and shapes of a file's tensors say of its adapters, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from cotolora.variants import VARIANTS
from cotolora.variants.base import Part, Variant

# how the keys of an adapter's tensors end, of any variant
ENDS = tuple(f".{part.key}" for variant in VARIANTS.values() for part in variant.parts if part.key is not None)


def modules_of(variant: Variant, keys: Iterable[str], whole: bool = True) -> list[str]:
    """The modules that have all tensors of an adapter of the variant, or any if they need not be `whole`."""
    found: dict[str, int] = {}
    ends = [f".{part.key}" for part in variant.parts if part.key is not None]
    for key in keys:
        for end in ends:
            if key.endswith(end):
                name = key.removesuffix(end)
                found[name] = found.get(name, 0) + 1
    return [name for name, count in found.items() if count == len(ends) or not whole]


def sizes_of(variant: Variant, parts: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Rank, in_features and out_features by the shapes of an adapter's tensors; None if these are of none."""
    sizes: dict[str, int] = {}
    for part in variant.parts:
        if part.attribute not in parts:
            continue
        shape = tuple(parts[part.attribute].shape)
        if len(shape) != len(part.shape):
            return None
        for size, name in zip(shape, part.shape, strict=True):
            if sizes.setdefault(name, size) != size:
                return None
    for part, tensor in shares_of(variant, shared):
        if tensor.dim() == len(part.shape):
            sizes = dict(zip(part.shape, tensor.shape, strict=True)) | sizes
    return sizes


def shares_of(variant: Variant, shared: Mapping[str, Tensor]) -> Iterator[tuple[Part, Tensor]]:
    """The tensors of no single module, with the parts of each adapter that are cut from them."""
    cut = [part for part in variant.parts if part.key is None]
    return ((part, shared[key]) for part, key in zip(cut, variant.shared_keys, strict=False) if key in shared)
