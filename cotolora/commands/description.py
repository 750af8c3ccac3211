"""The contents of an adapter directory in words and tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cotolora.commands.arguments import one_line
from cotolora.commands.layers import Table, by_layer
from cotolora.saving.contents import Adapter, Contents, norm_of
from cotolora.saving.files import WEIGHTS
from cotolora.wording import shown, some_of


class Norms(NamedTuple):
    """Norms by layer.

    of: in words, what they are the Frobenius norms of.
    table: by layer and kind of module.
    extra: by what a variant adds, the norm for each layer.
    """

    of: str
    table: Table
    extra: dict[str, list[float]]


def measure(found: Contents) -> Norms | None:
    """The norms of the updates, or of what is there in their place; None if there are no tensors."""
    updates = {name: adapter.norm for name, adapter in found.adapters.items() if adapter.norm is not None}
    if found.variant is not None and updates:
        known = all(found.adapters[name].scale is not None for name in updates)
        notes = "" if known else ", without s, which is unknown"
        if found.variant.shared_keys:
            notes += ", by all columns of A, of which a narrow module has the first"
        extra = {
            key: by_layer({name: found.adapters[name].extra[key] for name in updates}).total
            for key in (part.attribute for part in found.variant.extra)
        }
        return Norms(found.variant.low_rank + notes, by_layer(updates), extra)
    parts: dict[str, list[float]] = {}
    for key, tensor in (found.tensors or {}).items():
        parts.setdefault(key.rpartition(".")[0] or key, []).append(norm_of(tensor))
    if not parts:
        return None
    table = by_layer({name: math.hypot(*each) for name, each in parts.items()})
    return Norms("the tensors of each module, as its update is not known", table, {})


def described(directory: Path, found: Contents, norms: Norms | None) -> Iterator[str]:
    """The lines of the report."""
    yield one_line(str(directory))
    for title, text in _summary(directory, found):
        yield f"  {title:12}  {one_line(text)}"
    if norms is not None:
        yield ""
        yield f"Frobenius norms by layer of {norms.of}:"
        yield from _written(norms)


def _summary(directory: Path, found: Contents) -> Iterator[tuple[str, str]]:
    if found.fields is None:
        yield "config", "cannot be read"
    else:
        yield "method", _method(found, found.fields)
        base = found.fields.get("base_model_name_or_path")
        yield "base model", "not stated" if base is None else _plain(base)
    if found.adapters:
        yield "adapters", _adapters(found.adapters)
        yield "scale", _scale(found)
    elif found.config is not None:
        yield "rank", f"{found.config.rank} by the config" + (", and by patterns" if found.config.rank_pattern else "")
    if found.tensors is None:
        yield "weights", "cannot be read"
    else:
        yield from _weights(directory, found, found.tensors)
    verdict = f"refuses it: {found.refusal}" if found.refusal else "reads it, for a model that has these modules"
    yield "load_adapter", verdict


def _weights(directory: Path, found: Contents, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    by_dtype = ", ".join(dtypes if len(dtypes) < 2 else (f"{count:,} {dtype}" for dtype, count in dtypes.items()))
    own = sum(tensor.nbytes for tensor in tensors.values())
    yield "parameters", f"{dtypes.total():,} in {_tensors(len(tensors))}" + (f", {by_dtype}" if tensors else "")
    yield "size", f"{_size(own)} of tensors, {_size((directory / WEIGHTS).stat().st_size)} in {WEIGHTS}"
    if found.variant is not None and (others := found.others()):
        yield "also holds", f"{_tensors(len(others))} of no linear's adapter: {some_of(others, most=4)}"
    if broken := [key for key, tensor in tensors.items() if not math.isfinite(norm_of(tensor))]:
        yield "not finite", f"NaN or infinity in {some_of(broken, most=4)}"
    changed = "differs: the weights have changed since they were saved"
    states = {True: "agrees", False: changed, None: "none, as in PEFT's files"}
    yield "checksum", states[found.checksum]


def _method(found: Contents, fields: Mapping[str, Any]) -> str:
    peft_type = fields.get("peft_type")
    if found.variant is None:
        return "not stated" if peft_type is None else f"{_plain(peft_type)}, which cotolora does not have"
    method = found.variant.peft
    names = ("peft_type", *method.flags, method.init, method.dropout)
    settings = ", ".join(f"{name}={_plain(fields[name])}" for name in names if name in fields)
    by = f"; saved by PEFT {_plain(fields['peft_version'])}" if fields.get("peft_version") else ""
    return f"{found.variant.name} ({settings or 'by its tensors'}){by}"


def _adapters(adapters: Mapping[str, Adapter]) -> str:
    layers = len(by_layer(dict.fromkeys(adapters, 0.0)).rows)
    return f"{len(adapters)} in {layers} layers; rank {_counted(a.rank for a in adapters.values())}"


def _scale(found: Contents) -> str:
    if found.config is None or found.variant is None:
        return "unknown"
    if not found.variant.peft.scaled:
        return "1: in the files of this method B holds the scale"
    formula = "alpha / sqrt(rank), rsLoRA" if found.config.use_rslora else "alpha / rank"
    scales = (adapter.scale for adapter in found.adapters.values() if adapter.scale is not None)
    return f"s = {_counted(scales)}: {formula}"


def _counted(values: Iterable[float]) -> str:
    """The values in their order, each with how many have it if they differ."""
    counts = sorted(Counter(values).items())
    if len(counts) == 1:
        return f"{counts[0][0]:g}"
    text = ", ".join(f"{value:g} in {count}" for value, count in counts[:6])
    return text if len(counts) <= 6 else f"{text} and {len(counts) - 6} other values up to {counts[-1][0]:g}"


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 200 else shown(value)


def _written(norms: Norms) -> Iterator[str]:
    table = norms.table
    columns: dict[str, Iterable[float | None]] = {**table.columns, **norms.extra}
    if [table.total] != list(table.columns.values()):
        columns = {**table.columns, "all": table.total, **norms.extra}
    titles = [one_line(title) for title in columns]
    rows = [one_line(row) for row in table.rows]
    first = max(map(len, ("layer", *rows)))
    widths = [max(9, len(title)) for title in titles]
    yield "  ".join(("layer".ljust(first), *(t.rjust(w) for t, w in zip(titles, widths, strict=True))))
    for row, *values in zip(rows, *columns.values(), strict=True):
        cells = ("-" if value is None else f"{value:.4g}" for value in values)
        yield "  ".join((row.ljust(first), *(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))))


def details(found: Contents) -> Iterator[str]:
    """A line for each adapter, for each tensor beside them, and for each field of the config."""
    most = "at most " if found.variant is not None and found.variant.shared_keys else ""
    yield "\nadapters:"
    for name, adapter in found.adapters.items():
        norms = {"norm": adapter.norm, **adapter.extra}
        text = ", ".join(f"{key} " + ("unknown" if value is None else f"{value:.4g}") for key, value in norms.items())
        scale = "unknown" if adapter.scale is None else f"{adapter.scale:g}"
        sizes = f"{most}{adapter.in_features} -> {adapter.out_features}, rank {adapter.rank}, scale {scale}"
        yield f"  {one_line(name)}: {sizes}, {text}"
    yield "\nother tensors:"
    for key, tensor in found.others().items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield f"  {one_line(key)}: {tuple(tensor.shape)} {dtype}, norm {norm_of(tensor):.4g}"
    yield "\nconfig:"
    for key, value in sorted((found.fields or {}).items()):
        yield f"  {one_line(f'{_plain(key)}: {shown(value)}')}"
