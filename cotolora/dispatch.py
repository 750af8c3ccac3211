"""Which backend runs a call, and why not the others.

The only module that imports the Triton kernels, and only when they run.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cotolora import addmm

BACKENDS = ("reference", "addmm", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_MAX_RANK = 128

# a plain global, not a context variable: autograd runs checkpoint recomputation in threads of its
# own, and those must take the backend of the first run
_chosen: str | None = None
_environment = os.environ.get("COTOLORA_BACKEND")


class set_backend:  # noqa: N801 (used like torch.set_grad_enabled)
    """Chooses the backend of every call that names none: at once, or for the length of a ``with`` block.

    Args:
        backend: "auto", "reference", "addmm" or "triton"; None takes back an earlier choice.

    Raises:
        ValueError: `backend` is none of these.

    >>> with set_backend("reference"):
    ...     pass  # calls here run plain autograd
    """

    def __init__(self, backend: str | None) -> None:
        global _chosen
        if backend is not None:
            check_name(backend, "backend")
        self._backend, self._before = backend, _chosen
        _chosen = backend

    def __enter__(self) -> set_backend:
        global _chosen
        _chosen = self._backend  # again, for an object that is entered a second time
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._before


def check_name(backend: object, argument: str) -> None:
    """Raises ValueError unless `backend` is "auto" or the name of a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{argument} must be 'auto', 'reference', 'addmm' or 'triton'; got {backend!r}")


def requested(backend: str | None) -> tuple[str, str]:
    """The backend asked for, and by what: the argument, `set_backend`, ``COTOLORA_BACKEND`` or nothing ("auto")."""
    if backend is not None:
        check_name(backend, "backend")
        return backend, "the backend argument"
    if _chosen is not None:
        return _chosen, "set_backend"
    if _environment:
        check_name(_environment, "the environment variable COTOLORA_BACKEND")
        return _environment, "COTOLORA_BACKEND"
    return "auto", "default"


def choose(backend: str | None, device: torch.device, dtype: torch.dtype, rank: int, dropout: float) -> str:
    """The name of the backend that runs a call.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: a backend asked for by name cannot run this call; the message lists every reason.
    """
    name, _ = requested(backend)
    if name == "auto":
        return auto(device, dtype)[0]
    if reasons := why_not(name, device, dtype, rank, dropout):
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        raise RuntimeError(f"backend={name!r} cannot run this call:{lines}")
    return name


def auto(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What ``backend="auto"`` takes, and the reason."""
    if _transforming():
        return "reference", "inside a torch.func transform or forward-mode AD, which need plain autograd"
    if dtype == torch.float64:
        return "reference", "float64 is for checking, and the reference is what to check with"
    if device.type == "cuda":
        return "addmm", "no fused kernel has been measured faster on a GPU yet, and none is chosen on trust"
    return "addmm", f"vendor GEMMs are the fastest there is on {device.type}"


def why_not(backend: str, device: torch.device, dtype: torch.dtype, rank: int, dropout: float) -> list[str]:
    """Every reason `backend` cannot run such a call; an empty list means it can."""
    if backend == "reference":
        return []
    reasons = ["torch.func transforms and forward-mode AD take only the reference"] if _transforming() else []
    if backend == "addmm":
        return reasons
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not has_triton():
        reasons.append("triton is not installed")
    if device.type != "cuda" and not interpreted:
        reasons.append(f"x is on {device.type}, not cuda (on a CPU only under TRITON_INTERPRET=1)")
    if dtype not in TRITON_DTYPES:
        reasons.append(f"dtype {dtype} is not float32, float16 or bfloat16")
    if interpreted and dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if rank > TRITON_MAX_RANK:
        reasons.append(f"rank {rank} exceeds {TRITON_MAX_RANK}")
    if dropout > 0:
        reasons.append(f"the fused kernel has no dropout yet; got dropout={dropout}")
    return reasons


@functools.cache
def has_triton() -> bool:
    """Whether triton can be imported, found out without importing it."""
    return importlib.util.find_spec("triton") is not None


def kernels(backend: str) -> ModuleType:
    """The module whose `forward` and `backward` run `backend`."""
    if backend == "addmm":
        return addmm
    from cotolora import ops

    return ops


def _transforming() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@dataclass(frozen=True)
class Plan:
    """What would run and why; `str` of it is a short text.

    Attributes:
        backend: the name of the backend that would run, or None if the one asked for cannot.
        reason: why this one.
        others: for every other backend, why it does not run.
    """

    call: str
    backend: str | None
    reason: str
    others: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.backend or 'cannot run'} ({self.reason})"]
        lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in self.others.items()]
        return "\n".join(lines)


def explain(
    layer_or_shapes: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dropout: float = 0.0,
    backend: str | None = None,
) -> Plan:
    """Which backend would run a layer or a shape, and why not the others. Runs nothing.

    Args:
        layer_or_shapes: a `CoToLoRALinear`, whose own dtype, device and dropout are used, or the
            shapes ``(rows, in_features, out_features, rank)``.
        dtype, device, dropout: of a call described by its shapes.
        backend: as in `coto_lora_linear`.

    Raises:
        TypeError: `layer_or_shapes` is neither.
        ValueError: a size is negative or the rank is not positive; `backend` is no backend's name.

    >>> explain((394, 768, 768, 8)).backend
    'addmm'
    """
    if isinstance(getattr(layer_or_shapes, "lora_a", None), Tensor):
        layer = layer_or_shapes
        rank, (out_features, in_features) = layer.rank, (layer.out_features, layer.in_features)
        rows: int | str = "any"
        place, dtype, dropout = layer.weight.device, layer.weight.dtype, layer.dropout if layer.training else 0.0
    else:
        try:
            rows, in_features, out_features, rank = (operator.index(size) for size in layer_or_shapes)
        except (TypeError, ValueError):
            raise TypeError(
                "layer_or_shapes must be a CoToLoRALinear or (rows, in_features, out_features, rank); "
                f"got {layer_or_shapes!r}"
            ) from None
        if min(rows, in_features, out_features, rank - 1) < 0:
            raise ValueError(
                "layer_or_shapes must be (rows, in_features, out_features, rank), none negative and rank at least 1; "
                f"got {layer_or_shapes!r}"
            )
        place = torch.device(device)
    name, source = requested(backend)
    why_nots = {other: why_not(other, place, dtype, rank, dropout) for other in BACKENDS}
    if name == "auto":
        runs, reason = auto(place, dtype)
    else:
        runs, reason = name, f"asked for by {source}"
    others = {other: tuple(why) or ("can run",) for other, why in why_nots.items() if other != runs}
    call = f"rows {rows}, {in_features} -> {out_features}, rank {rank}, {str(dtype).removeprefix('torch.')} on {place}"
    if blocked := why_nots[runs]:
        return Plan(call, None, f"{reason}, but " + "; ".join(blocked), others)
    return Plan(call, runs, reason, others)
