"""Chooses the backend of a call and gives the reasons. Independent of particular variants and backends."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch

from cotolora.backends import cost, measured
from cotolora.backends.types import AlwaysOn, Backend, Call, NotPreparedError, Options, Stacked, transforming
from cotolora.checks import shown
from cotolora.variants import VARIANTS

BACKENDS = ("reference", "addmm", "triton")
CAPTURED = "auto:captured"  # the choice that auto makes during a CUDA graph capture
CLEAR_WIN = 1.10  # modelled speed-up over vendor GEMMs that is required of a form that was never timed
logger = logging.getLogger("cotolora")

_environment = os.environ.get("COTOLORA_BACKEND")

# The choice of set_backend is stored in the thread-local state that torch passes on to the threads of its autograd
# engine, which recompute checkpoints. Globals are not thread-local, and context variables are not passed on.
_KEY = "cotolora_backend"
# whether set_backend was ever called; if not, the thread-local state need not be read
ever_set = False
# the last choice of any thread, used under torch.compile, which cannot trace a read of the thread-local state
_set_last: str | None = None


class set_backend:  # noqa: N801 (used like torch.set_grad_enabled)
    """Sets the backend of all calls in this thread that have no ``backend=``, from now on or inside a ``with`` block.

    A block restores on exit the backend that was set on entry, and can be entered again. Gradient checkpointing
    recomputes with the backend that is set where ``backward`` is called.

    Args:
        backend: "auto", "reference", "addmm" or "triton". "triton:one_pass", "triton:low_rank_gemm",
            "triton:pre_expand" and, for HiRA, "triton:hira" request one form of the fused kernels. "auto:captured"
            makes the choice that auto makes during a CUDA graph capture, where host time does not count. Run the
            warm-up with it: a capture uses only fused kernels that were launched before. None undoes an earlier choice.

    Raises:
        ValueError: `backend` is none of these.

    >>> with set_backend("reference"):
    ...     pass  # calls here run plain autograd
    """

    def __init__(self, backend: str | None) -> None:
        if backend is not None:
            check_name(backend, "backend")
        self._backend, self._before = backend, _Stack()
        self._before.values.append(_set_here())
        _set(backend)

    def __enter__(self) -> set_backend:
        # the constructor has already set the backend for the first block
        if not self._before.begun or _set_here() != self._backend:
            self._before.values.append(_set_here())
            _set(self._backend)
        self._before.begun = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set(self._before.values.pop())


class _Stack(threading.local):
    """The backends to restore, a separate list for each thread; `begun` is true before the first block."""

    def __init__(self) -> None:
        self.values: list[str | None] = []
        self.begun = True


def _set_here() -> str | None:
    """The choice of `set_backend` in this thread, or None."""
    if not ever_set:
        return None
    if torch.compiler.is_compiling():
        return _set_last
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


def _set(backend: str | None) -> None:
    global ever_set, _set_last
    ever_set, _set_last = True, backend
    # torch 2.11 stores the object without taking a reference, but releases one when the object is replaced. In other
    # versions the additional reference is harmless, because there are few names
    held = None if backend is None else sys.intern(backend)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
    torch._C._stash_obj_in_tls(_KEY, held)


def names() -> tuple[str, ...]:
    """All valid names of backends."""
    fused = (name for variant in VARIANTS.values() for name in variant.backends if name.startswith("triton:"))
    return "auto", CAPTURED, *BACKENDS, *dict.fromkeys(fused)


def check_name(backend: object, argument: str) -> None:
    """Raises ValueError unless `backend` is "auto", "auto:captured" or the name of a backend."""
    if not isinstance(backend, str) or (backend not in ("auto", *BACKENDS) and backend not in names()):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, names()))}; got {shown(backend)}")


def requested(backend: str | None) -> tuple[str, str]:
    """The requested backend and its source: the argument, `set_backend`, ``COTOLORA_BACKEND`` or the default "auto"."""
    if backend is not None:
        check_name(backend, "backend")
        return backend, "the backend argument"
    if (chosen := _set_here()) is not None:
        return chosen, "set_backend"
    if _environment:
        check_name(_environment, "the environment variable COTOLORA_BACKEND")
        return _environment, "COTOLORA_BACKEND"
    return "auto", "default"


class Plan(NamedTuple):
    """How calls with the same properties are run, decided once and then applied to the tensors of each call.

    name: "reference", "addmm" or "triton:" and a form.
    backend: the backend; None for the reference, whose backward comes from autograd.
    options: the options without a gate.
    call: the properties of the call, with the sizes for which the choice was made.
    cast_to: the dtype to which autocast casts x, W and bias; None if it casts nothing.
    fused: whether Triton kernels run.
    traced: whether torch.compile traces the call.
    instead: the plan to use if the kernels of this one cannot run; None if a backend was requested by name.
    always_on: the backend's faster functions for calls without a gate; None if it has none.
    stacked: the backend's functions for several layers that read one x; None if it has none.
    """

    name: str
    backend: Backend | None
    options: Options
    call: Call
    cast_to: torch.dtype | None = None
    fused: bool = False
    traced: bool = False
    instead: Plan | None = None
    always_on: AlwaysOn | None = None
    stacked: Stacked | None = None


def plan(backend: str | None, call: Call, options: Options, cast_to: torch.dtype | None = None) -> Plan:
    """The plan for such calls.

    Raises:
        ValueError: `backend` is not the name of a backend.
        RuntimeError: a backend requested by name cannot run this call; the message lists every reason.
    """
    name = choose(backend, call)
    backends, fused, traced = call.variant.backends_for(call), name.startswith("triton"), torch.compiler.is_compiling()
    chosen, instead, always_on = backends.get(name), None, None
    if fused and requested(backend)[0] in ("auto", CAPTURED):
        instead = Plan("addmm", backends["addmm"], options, call, cast_to)
        if capturing(call):
            chosen = chosen.when_captured()  # type: ignore[union-attr]
    if call.backward and not traced and hasattr(chosen, "always_on"):
        always_on = chosen.always_on(call)  # type: ignore[union-attr]
    stacked = None if traced or not hasattr(chosen, "stacked") else chosen.stacked(call)  # type: ignore[union-attr]
    if stacked is not None and requested(backend)[0].startswith("triton:") and stacked.name != name:
        stacked = None  # a form that was asked for by name does not give way to another
    return Plan(name, chosen, options, call, cast_to, fused, traced, instead, always_on, stacked)


def choose(backend: str | None, call: Call) -> str:
    """The backend of a call: "reference", "addmm" or "triton:" and a form.

    Raises:
        ValueError: `backend` is not the name of a backend.
        RuntimeError: a backend requested by name cannot run this call; the message lists every reason.
    """
    name, _ = requested(backend)
    if name in ("auto", CAPTURED):
        return auto(call, captured=name == CAPTURED)[0]
    if reasons := why_not(name, call):
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        raise RuntimeError(f"backend={name!r} cannot run this call:{lines}")
    return named(name, call)


def named(name: str, call: Call) -> str:
    """The full name of the backend that runs a call for which `name` was requested: for "triton", its fastest form."""
    if name == "triton" or (name.startswith("triton") and call.adds):
        return _fastest_fused(call)
    return name


def capturing(call: Call) -> bool:
    """Whether a CUDA graph is being captured."""
    return call.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def auto(call: Call, *, captured: bool = False) -> tuple[str, str]:
    """The choice of ``backend="auto"`` and the reason; `captured` chooses as during a CUDA graph capture."""
    if transforming():
        return (
            "reference",
            "inside a torch.func transform, forward-mode AD or torch.jit.trace, which need plain autograd",
        )
    if call.dtype == torch.float64:
        return "reference", "float64 is meant for checks, which should use the reference"
    backends = call.variant.backends_for(call)
    if "addmm" not in backends:
        return "reference", f"variant {call.variant.name!r} has no other backend"
    if call.device.type != "cuda":
        return "addmm", "the fused kernels need a CUDA device"
    if reasons := why_not("triton", call):
        return "addmm", "the fused kernels cannot run: " + "; ".join(reasons)
    if call.rows is None:
        return "addmm", "the number of rows is not known in advance"
    name, reason = _cached_fastest(call, captured or capturing(call))
    if error := why_failed(name, call):
        return "addmm", f"the fused {name.removeprefix('triton:')} has failed in this process: {error}"
    return name, reason


def why_not(name: str, call: Call) -> list[str]:
    """Every reason the backend `name` cannot run such a call; an empty list means it can."""
    if name == "reference":
        return []
    reasons = (
        ["torch.func transforms, forward-mode AD and torch.jit.trace need the reference"] if transforming() else []
    )
    backends = call.variant.backends_for(call)
    if name == "addmm":
        has_none = f"variant {call.variant.name!r} has no addmm backend"
        return reasons + (backends[name].why_not(call) if name in backends else [has_none])
    fused = _fused(backends)
    if not fused:
        return [*reasons, f"variant {call.variant.name!r} has no fused backend"]
    reasons += next(iter(fused.values())).why_not(call)
    form = name.partition(":")[2]
    if form and not call.adds and name not in fused:
        forms = ", ".join(other.removeprefix("triton:") for other in fused)
        reasons.append(f"the fused forms of variant {call.variant.name!r} are {forms}; got {form!r}")
    return reasons


def _fused(backends: Mapping[str, Backend]) -> dict[str, Backend]:
    return {name: backend for name, backend in backends.items() if name.startswith("triton:")}


def _fastest_fused(call: Call) -> str:
    """The fastest of the fused backends, even if vendor GEMMs are faster."""
    fused = _fused(call.variant.backends_for(call))
    sizes = call.sizes
    if len(fused) == 1:
        return next(iter(fused))
    if sizes is None:
        return list(fused)[-1]  # its speed depends least on the sizes and on our GEMM
    captured = capturing(call)
    name, _ = _cached_fastest(call, captured)
    if name != "addmm":
        return name
    if (arch := architecture(call.device)) not in cost.MACHINES:
        return list(fused)[0 if sizes.m <= 64 else -1]
    times = modelled(call, arch, captured)
    return min(fused, key=lambda name: times[name])


@functools.lru_cache(maxsize=4096)
def _cached_fastest(call: Call, captured: bool) -> tuple[str, str]:
    table = _measured(call.device) if call.device.type == "cuda" else ()
    return fastest(call, architecture(call.device), captured=captured, table=table)


@functools.cache
def _measured(device: torch.device) -> tuple[dict[str, Any], ...]:
    known = {name.removeprefix("triton:") for name in names()}
    return measured.load_table(measured.cache_path(torch.cuda.get_device_name(device)), known)


def architecture(device: torch.device) -> str:
    """The kernels' name of the architecture: "sm_80", "sm_90", "sm_100", "gfx942", or "generic" for all others."""
    from cotolora.kernels import tiles  # imported only if there is a GPU

    return tiles.architecture(device)


def fastest(call: Call, arch: str, *, captured: bool, table: tuple[dict[str, Any], ...] = ()) -> tuple[str, str]:
    """The fastest backend for a call of known sizes, and why: from the nearest measured row, else from the model."""
    sizes = call.sizes
    assert sizes is not None
    if not (fused := _fused(call.variant.backends_for(call))):
        return "addmm", f"variant {call.variant.name!r} has no fused backend"
    if not call.adds and call.variant.measured and (row := measured.nearest(table, sizes, captured)):
        form = min(row["seconds"], key=row["seconds"].get)
        at = "x".join(str(row[name]) for name in ("m", "n", "k"))
        name = form if form == "addmm" else f"triton:{form}"
        return name, f"measured fastest on this device at {at}, rank {row['rank']}"
    if arch not in cost.MACHINES:
        return "addmm", f"no fused kernel has been measured on {arch}, and there is no cost model for it"
    if sizes.element_size == 4:
        return "addmm", "float32 is not modelled: a fused kernel is used only if it was measured fastest"
    times = modelled(call, arch, captured)
    name = min(fused, key=lambda name: times[name])
    ratio = times["addmm"] / times[name]
    if ratio >= CLEAR_WIN:
        return name, f"modelled, not measured: {ratio:.2f} times as fast as vendor GEMMs on {arch}"
    form = name.removeprefix("triton:")
    return "addmm", f"modelled, not measured: the fused {form} would be only {ratio:.2f} times as fast on {arch}"


def modelled(call: Call, arch: str, captured: bool) -> dict[str, float]:
    """Seconds of every backend by the roofline of `cotolora.backends.cost`."""
    return {
        name: cost.seconds(
            backend.launches(call), call.dtype.itemsize, cost.MACHINES[arch], captured=captured, backward=call.backward
        )
        for name, backend in call.variant.backends_for(call).items()
    }


# by the properties of a call, which together with `_failed` determine the plan
plans: dict[tuple[object, ...], Plan] = {}
_MOST_PLANS = 4096

# kinds of launches that auto has chosen and that could not run, with the error; and those for which a warning has said
# that a capture does not use them
_failed: dict[tuple[Any, ...], str] = {}
_unprepared: set[tuple[Any, ...]] = set()


def _kind(name: str, call: Call) -> tuple[Any, ...]:
    """The properties of a call that determine whether its kernels can be compiled and loaded."""
    return name, call.dtype, call.rank, call.variant.name, bool(call.dropout)


def why_failed(name: str, call: Call) -> str | None:
    """The error with which the kernels of a backend have failed for such calls; None if they have not."""
    return _failed.get(_kind(name, call))


def keep(kind: tuple[object, ...], kept: Plan) -> None:
    """Caches the plan for calls with the properties `kind`."""
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[kind] = kept


def note_failure(followed: Plan, error: Exception) -> None:
    """Excludes the kernels of a plan from auto's choice for such calls, and logs this once.

    Kernels whose only problem is that they were not launched before a capture are not excluded.
    """
    kind, form = _kind(followed.name, followed.call), followed.name.removeprefix("triton:")
    if isinstance(error, NotPreparedError):
        if kind not in _unprepared:
            _unprepared.add(kind)
            logger.warning(
                "the fused %s was not launched before this capture, so vendor GEMMs are captured instead; run the "
                "warm-up inside set_backend(%r)", form, CAPTURED,
            )  # fmt: skip
    elif kind not in _failed:
        _failed[kind] = f"{type(error).__name__}: {error}"
        plans.clear()
        logger.warning("the fused %s cannot run here, so vendor GEMMs run instead: %s", form, _failed[kind])
