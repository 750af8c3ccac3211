"""`explain`: describes which backend would run a layer or a shape, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from cotolora.backends.choice import BACKENDS, CAPTURED, auto, named, requested, why_not
from cotolora.backends.cost import frozen
from cotolora.backends.types import Call, Launch, Launches
from cotolora.checks import device as checked_device
from cotolora.checks import entries, floating_dtype, one_of, probability, shown, size
from cotolora.variants import VARIANTS


@dataclass(frozen=True)
class Explanation:
    """The backend that would run and why; `str` of it is a short text.

    Attributes:
        call: a description of the call.
        backend: the name of the backend that would run, or None if the requested one cannot.
        reason: why this one was chosen.
        others: for every other backend, why it cannot run, or "can run".
        form: the form of the Triton backend; None for other backends.
        forward, backward: the kernels, each with the bytes that it reads and writes; empty if the number of rows is
            not known, and for the reference.
        saved_bytes: bytes saved for the backward in addition to the arguments of the call; None in the same cases.
    """

    call: str
    backend: str | None
    reason: str
    others: Mapping[str, tuple[str, ...]]
    form: str | None = None
    forward: tuple[Launch, ...] = ()
    backward: tuple[Launch, ...] = ()
    saved_bytes: int | None = None

    def __str__(self) -> str:
        name = f"{self.backend} as {self.form}" if self.form else self.backend
        lines = [f"{self.call}: {name or 'cannot run'} ({self.reason})"]
        for pass_, launches in (("forward", self.forward), ("backward", self.backward)):
            if launches:
                kernels = ", ".join(f"{launch.kernel} {launch.bytes / 1e6:.2f} MB" for launch in launches)
                lines.append(f"  {pass_}: {len(launches)} launches: {kernels}")
        if self.saved_bytes is not None:
            lines.append(f"  saved for backward: {self.saved_bytes / 1e6:.2f} MB in addition to x")
        lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in self.others.items()]
        return "\n".join(lines)


def explain(
    layer_or_shapes: Any,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dropout: float = 0.0,
    variant: str = "lora",
    backend: str | None = None,
) -> Explanation:
    """Explains which backend would run a layer or a shape, with which kernels, and why not another. Runs nothing.

    A layer is explained in its present state: merged, or with an inactive adapter, it is a plain linear. A layer with
    init "pissa" or "olora" computes an update of twice its rank.

    Args:
        layer_or_shapes: a `CoToLoRALinear`, whose dtype, device and dropout are used (except the dtype of one with a
            `base`, which is not known), or the shapes ``(rows, in_features, out_features, rank)``.
        rows: number of rows of the layer's input; without it, kernels and bytes are not reported.
        dtype, device, dropout, variant: properties of a call given by its shapes; `dtype` also for a layer with a
            `base`.
        backend: as in `coto_lora_linear`.

    Raises:
        TypeError: `layer_or_shapes` is neither, `dtype` is not floating or `device` is not a device.
        ValueError: a size is negative or the rank is not positive; another argument is out of its range.

    >>> explanation = explain((394, 768, 768, 8))
    >>> explanation.backend, len(explanation.forward), explanation.saved_bytes
    ('addmm', 3, 12608)
    """
    rows = None if rows is None else size("rows", rows, least=0)
    dtype, device = floating_dtype("dtype", dtype), checked_device("device", device)
    dropout, variant = probability("dropout", dropout), one_of("variant", variant, VARIANTS)
    if isinstance(layer_or_shapes, nn.Module) and isinstance(getattr(layer_or_shapes, "lora_a", None), Tensor):
        call = _call_of_layer(layer_or_shapes, rows, dtype)
        if (plain := _why_plain(layer_or_shapes)) is not None:
            return _explained(_shown(call), "linear", plain, dict.fromkeys(BACKENDS, (plain,)), _frozen(call))
    else:
        call = _call_of_shapes(layer_or_shapes, dtype, device, dropout, variant)
    name, source = requested(backend)
    if name in ("auto", CAPTURED):
        runs, reason = auto(call, captured=name == CAPTURED)
    else:
        runs = name if why_not(name, call) else named(name, call)
        reason = f"requested by {source}"
    ran_by = runs.partition(":")[0]
    why_nots = {other: why_not(other, call) for other in BACKENDS}
    others = {other: tuple(why) or ("can run",) for other, why in why_nots.items() if other != ran_by}
    if blocked := why_not(runs, call):
        return Explanation(_shown(call), None, f"{reason}, but " + "; ".join(blocked), others)
    found = call.variant.backends_for(call).get(runs)
    launches = None if found is None or call.sizes is None else found.launches(call)
    return _explained(_shown(call), runs, reason, others, launches)


def _explained(
    shown: str, runs: str, reason: str, others: Mapping[str, tuple[str, ...]], launches: Launches | None
) -> Explanation:
    backend, _, form = runs.partition(":")
    if launches is None:
        return Explanation(shown, backend, reason, others, form or None)
    return Explanation(shown, backend, reason, others, form or None, *launches)


def _frozen(call: Call) -> Launches | None:
    return None if call.sizes is None or call.adds else frozen(call.sizes)


def _why_plain(layer: Any) -> str | None:
    """Why `layer` computes a plain linear in its present state; None if its adapter may be active."""
    if layer.merged:
        return "the adapter is merged into the weight"
    return "the adapter is inactive" if layer.active is False else None


def _call_of_layer(layer: Any, rows: int | None, dtype: torch.dtype) -> Call:
    base_dtype = None if layer.base is None else dtype
    return Call(
        VARIANTS[layer.variant],
        layer.lora_a.device,
        dtype if layer.base is not None else layer.weight.dtype,
        layer.factors()[0].shape[0],
        layer.dropout if layer.training else 0.0,
        rows,
        layer.in_features,
        layer.out_features,
        base_dtype=base_dtype,
    )


def _call_of_shapes(shapes: Any, dtype: torch.dtype, device: torch.device, dropout: float, variant: str) -> Call:
    must = "a CoToLoRALinear or (rows, in_features, out_features, rank)"
    sizes = entries("layer_or_shapes", shapes, must)
    if len(sizes) != 4 or not all(isinstance(size, Integral) and not isinstance(size, bool) for size in sizes):
        raise TypeError(f"layer_or_shapes must be {must}; got {shown(shapes)}")
    rows, in_features, out_features, rank = map(int, sizes)
    if min(rows, in_features, out_features, rank - 1) < 0 or max(sizes) >= 2**63:
        raise ValueError(
            "layer_or_shapes must be (rows, in_features, out_features, rank), none negative and rank at least 1; "
            f"got {shown(shapes)}"
        )
    return Call(VARIANTS[variant], device, dtype, rank, dropout, rows, in_features, out_features)


def _shown(call: Call) -> str:
    words = "" if call.variant.name == "lora" else f"{call.variant.name}, "
    words += f"rows {'any' if call.rows is None else call.rows}, {call.in_features} -> {call.out_features}, "
    words += f"rank {call.rank}, {str(call.dtype).removeprefix('torch.')} on {call.device}"
    return words + (", added to the output of a base module" if call.adds else "")
