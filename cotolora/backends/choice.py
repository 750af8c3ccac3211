"""Which backend runs a call, and why not the others. Nothing here knows a variant or a backend by itself."""

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
CAPTURED = "auto:captured"  # auto as it chooses while a CUDA graph is captured
CLEAR_WIN = 1.10  # how many times as long the vendor's GEMMs must take before a form that was never timed is taken
logger = logging.getLogger("cotolora")

_environment = os.environ.get("COTOLORA_BACKEND")

# What set_backend chose lies in the thread's state that torch hands on to the threads of its autograd engine, which
# recompute checkpoints: neither a global nor a context variable is both a thread's own and there.
_KEY = "cotolora_backend"
# whether set_backend was ever called: until then nobody needs to look
ever_set = False
# what was set last in any thread, for what torch.compile traces: it cannot look into a thread's state
_set_last: str | None = None


class set_backend:  # noqa: N801 (used like torch.set_grad_enabled)
    """Chooses the backend of every call of this thread that names none: at once, or for the length of a ``with`` block.

    A block restores on leaving what was in force when it was entered, and may be entered again. Gradient checkpointing
    recomputes with the backend in force where ``backward`` is called.

    Args:
        backend: "auto", "reference", "addmm" or "triton"; "triton:one_pass", "triton:low_rank_gemm",
            "triton:pre_expand" and, of HiRA, "triton:hira" ask for one form of the fused kernels; "auto:captured" is
            auto as it chooses while a CUDA graph is captured, where the host costs nothing: run the warm-up under it,
            for a capture takes no fused kernel that was not launched before; None takes back an earlier choice.

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
        # the first block goes on with what the constructor began
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
    """What to restore, a list for each thread that enters; `begun` before the first block."""

    def __init__(self) -> None:
        self.values: list[str | None] = []
        self.begun = True


def _set_here() -> str | None:
    """What `set_backend` has chosen in this thread."""
    if not ever_set:
        return None
    if torch.compiler.is_compiling():
        return _set_last
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


def _set(backend: str | None) -> None:
    global ever_set, _set_last
    ever_set, _set_last = True, backend
    # torch 2.11 keeps the object without a reference of its own, and gives one up when it is replaced. Of names, which
    # are few, one reference too many does no harm where torch has its own
    held = None if backend is None else sys.intern(backend)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
    torch._C._stash_obj_in_tls(_KEY, held)


def names() -> tuple[str, ...]:
    """Every name that a backend may be asked for by."""
    fused = (name for variant in VARIANTS.values() for name in variant.backends if name.startswith("triton:"))
    return "auto", CAPTURED, *BACKENDS, *dict.fromkeys(fused)


def check_name(backend: object, argument: str) -> None:
    """Raises ValueError unless `backend` is "auto", "auto:captured" or the name of a backend."""
    if not isinstance(backend, str) or (backend not in ("auto", *BACKENDS) and backend not in names()):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, names()))}; got {shown(backend)}")


def requested(backend: str | None) -> tuple[str, str]:
    """The backend asked for, and by what: the argument, `set_backend`, ``COTOLORA_BACKEND`` or nothing ("auto")."""
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
    """How calls of a kind are run: what is left is to apply it to tensors.

    name: "reference", "addmm" or "triton:" and a form.
    backend: what runs; None for the reference, of which autograd makes the backward.
    options: with the gate left open.
    call: the kind of call; of its sizes, those that the choice was made for.
    cast_to: what autocast casts x, W and bias to, None where it casts nothing.
    fused: whether Triton kernels run.
    traced: whether torch.compile traces the call.
    instead: the plan to follow where this one's kernels cannot run, None where a backend was asked for by name.
    always_on: a faster way of the backend for calls without a gate; None if it has none.
    stacked: the backend's way for layers that read one x; None if it has none.
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
    """How such calls are run.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: a backend asked for by name cannot run this call; the message lists every reason.
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
    """What runs a call: "reference", "addmm" or "triton:" and a form.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: a backend asked for by name cannot run this call; the message lists every reason.
    """
    name, _ = requested(backend)
    if name in ("auto", CAPTURED):
        return auto(call, captured=name == CAPTURED)[0]
    if reasons := why_not(name, call):
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        raise RuntimeError(f"backend={name!r} cannot run this call:{lines}")
    return named(name, call)


def named(name: str, call: Call) -> str:
    """Which backend runs a call that it can run and that asks for `name`: of "triton", the fastest form."""
    if name == "triton" or (name.startswith("triton") and call.adds):
        return _fastest_fused(call)
    return name


def capturing(call: Call) -> bool:
    """Whether a CUDA graph is being captured."""
    return call.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def auto(call: Call, *, captured: bool = False) -> tuple[str, str]:
    """What ``backend="auto"`` takes, and the reason; `captured`: as in a CUDA graph, also where none is captured."""
    if transforming():
        return (
            "reference",
            "inside a torch.func transform, forward-mode AD or torch.jit.trace, which need plain autograd",
        )
    if call.dtype == torch.float64:
        return "reference", "float64 is for checking, and the reference is what to check with"
    backends = call.variant.backends_for(call)
    if "addmm" not in backends:
        return "reference", f"variant {call.variant.name!r} has no other backend"
    if call.device.type != "cuda":
        return "addmm", "off a GPU there are only vendor GEMMs"
    if reasons := why_not("triton", call):
        return "addmm", "the fused kernels cannot run: " + "; ".join(reasons)
    if call.rows is None:
        return "addmm", "the number of rows is not known beforehand"
    name, reason = _cached_fastest(call, captured or capturing(call))
    if error := why_failed(name, call):
        return "addmm", f"the fused {name.removeprefix('triton:')} has failed in this process: {error}"
    return name, reason


def why_not(name: str, call: Call) -> list[str]:
    """Every reason the backend `name` cannot run such a call; an empty list means it can."""
    if name == "reference":
        return []
    reasons = (
        ["torch.func transforms, forward-mode AD and torch.jit.trace take only the reference"] if transforming() else []
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
    """The fastest of the fused backends, even where vendor GEMMs would win."""
    fused = _fused(call.variant.backends_for(call))
    sizes = call.sizes
    if len(fused) == 1:
        return next(iter(fused))
    if sizes is None:
        return list(fused)[-1]  # depends least on the sizes, and on our own GEMM
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
    """As the kernels name it: "sm_80", "sm_90", "sm_100", "gfx942", or "generic" for anything else."""
    from cotolora.kernels import tiles  # not before somebody has a GPU

    return tiles.architecture(device)


def fastest(call: Call, arch: str, *, captured: bool, table: tuple[dict[str, Any], ...] = ()) -> tuple[str, str]:
    """The fastest backend for a call of known sizes, and why: by the nearest measured row, else by the model."""
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
        return "addmm", f"no fused kernel has been measured on {arch}, and there is no model of it"
    if sizes.element_size == 4:
        return "addmm", "float32 is not modelled: a fused kernel is taken only where it was measured fastest"
    times = modelled(call, arch, captured)
    name = min(fused, key=lambda name: times[name])
    ratio = times["addmm"] / times[name]
    if ratio >= CLEAR_WIN:
        return name, f"modelled, not measured: vendor GEMMs take {ratio:.2f} of its time on {arch}"
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


# by kind of call, which decides everything that a plan says but for the first of the tables below
plans: dict[tuple[object, ...], Plan] = {}
_MOST_PLANS = 4096

# kinds of launches that auto has chosen and that could not run, with the error; and those of which it was said that a
# capture goes on without them
_failed: dict[tuple[Any, ...], str] = {}
_unprepared: set[tuple[Any, ...]] = set()


def _kind(name: str, call: Call) -> tuple[Any, ...]:
    """What of a call decides whether its kernels can be compiled and loaded."""
    return name, call.dtype, call.rank, call.variant.name, bool(call.dropout)


def why_failed(name: str, call: Call) -> str | None:
    """The error with which the kernels of a backend have failed for such calls; None if they have not."""
    return _failed.get(_kind(name, call))


def keep(kind: tuple[object, ...], kept: Plan) -> None:
    """Keeps the plan for a kind of call."""
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    plans[kind] = kept


def note_failure(followed: Plan, error: Exception) -> None:
    """Takes the kernels of a plan out of auto's choice for such calls, and says so once in the log.

    Kernels that only were not launched before a capture stay.
    """
    kind, form = _kind(followed.name, followed.call), followed.name.removeprefix("triton:")
    if isinstance(error, NotPreparedError):
        if kind not in _unprepared:
            _unprepared.add(kind)
            logger.warning(
                "the fused %s was not launched before this capture, vendor GEMMs are captured instead; run the warm-up "
                "under set_backend(%r)", form, CAPTURED,
            )  # fmt: skip
    elif kind not in _failed:
        _failed[kind] = f"{type(error).__name__}: {error}"
        plans.clear()
        logger.warning("the fused %s cannot run here, vendor GEMMs run instead: %s", form, _failed[kind])
