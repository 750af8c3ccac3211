"""Which backend runs a call, and why not the others.

The only module that imports the Triton kernels, and only when they run.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import operator
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cotolora.backends import cost as forms
from cotolora.backends.addmm import dora as addmm_dora
from cotolora.backends.addmm import hira as addmm_hira
from cotolora.backends.addmm import lora as addmm
from cotolora.backends.cost import VARIANT_FORMS, Choice, Launch, Sizes

_ADDMM = {"lora": addmm, "dora": addmm_dora, "hira": addmm_hira}
BACKENDS = ("reference", "addmm", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_MAX_RANK = 256
logger = logging.getLogger("cotolora")

# a plain global, not a context variable: autograd runs checkpoint recomputation in threads of its
# own, and those must take the backend of the first run
_chosen: str | None = None
_environment = os.environ.get("COTOLORA_BACKEND")


class set_backend:  # noqa: N801 (used like torch.set_grad_enabled)
    """Chooses the backend of every call that names none: at once, or for the length of a ``with`` block.

    Args:
        backend: "auto", "reference", "addmm" or "triton"; "triton:one_pass", "triton:low_rank_gemm",
            "triton:pre_expand" and, of HiRA, "triton:hira" ask for one form of the fused kernels; None takes back an
            earlier choice.

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
    forms_by_name = [f"triton:{form}" for forms_of_one in VARIANT_FORMS.values() for form in forms_of_one]
    if backend != "auto" and backend not in BACKENDS and backend not in forms_by_name:
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


class Call(NamedTuple):
    """What the choice of a backend may depend on; None where the sizes are not known."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    dropout: float = 0.0
    rows: int | None = None  # unknown under torch.compile, where a choice by size would compile for each size
    in_features: int = 0
    out_features: int = 0
    backward: bool = True
    variant: str = "lora"
    adds_to: torch.dtype | None = None  # that of a base's own output, where there is no weight to multiply by

    @property
    def sizes(self) -> Sizes | None:
        """As the kernels' models take them."""
        if self.rows is None:
            return None
        adds = self.adds_to is not None
        return Sizes(self.rows, self.out_features, self.in_features, self.rank, self.dtype.itemsize, adds)


def choose(backend: str | None, call: Call) -> str:
    """What runs a call: "reference", "addmm" or "triton:" and a form.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: a backend asked for by name cannot run this call; the message lists every reason.
    """
    name, _ = requested(backend)
    if name == "auto":
        return auto(call)[0]
    if reasons := why_not(name, call):
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        raise RuntimeError(f"backend={name!r} cannot run this call:{lines}")
    if name == "triton" or (name.startswith("triton") and call.adds_to is not None):
        return f"triton:{_form(call, fastest_fused=True).form}"
    return name


def auto(call: Call) -> tuple[str, str]:
    """What ``backend="auto"`` takes, and the reason."""
    if _transforming():
        return "reference", "inside a torch.func transform or forward-mode AD, which need plain autograd"
    if call.dtype == torch.float64:
        return "reference", "float64 is for checking, and the reference is what to check with"
    if call.device.type != "cuda":
        return "addmm", "off a GPU there are only vendor GEMMs"
    if reasons := why_not("triton", call):
        return "addmm", "the fused kernels cannot run: " + "; ".join(reasons)
    choice = _form(call)
    if choice.form != "addmm" and (reason := _failed.get(choice.form)):
        return "addmm", f"the fused {choice.form} has failed in this process: {reason}"
    return choice.form if choice.form == "addmm" else f"triton:{choice.form}", choice.reason


def _form(call: Call, *, fastest_fused: bool = False) -> Choice:
    """The form for a call; with `fastest_fused` one of the fused forms, even where vendor GEMMs would win."""
    sizes = call.sizes
    if fastest_fused and call.adds_to is not None:
        return Choice("expand", "asked for by name")  # the only one
    if sizes is None:
        # the form that depends least on the sizes, and on our own GEMM
        form = VARIANT_FORMS[call.variant][-1] if fastest_fused else "addmm"
        return Choice(form, "the number of rows is not known beforehand")
    captured = call.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    choice = _form_for(call, captured)
    if fastest_fused and choice.form == "addmm":
        arch = architecture(call.device)
        fused = VARIANT_FORMS[call.variant]
        if arch not in forms.MACHINES:
            return Choice(fused[0] if sizes.m <= 64 else fused[-1], "asked for by name")
        options: dict[str, Any] = {"captured": captured, "backward": call.backward, "variant": call.variant}
        times = {form: forms.seconds(form, sizes, forms.MACHINES[arch], **options) for form in fused}
        return Choice(min(fused, key=lambda form: times[form]), "asked for by name")
    ran = (choice.form, call.dtype, call.rank, call.variant)
    if captured and not fastest_fused and choice.form != "addmm" and ran not in _ran:
        # loading a kernel may not be possible while a graph is being captured
        return Choice("addmm", f"the fused {choice.form} has not run in this process; run it once before the capture")
    return choice


@functools.lru_cache(maxsize=4096)
def _form_for(call: Call, captured: bool) -> Choice:
    sizes = call.sizes
    assert sizes is not None
    # the variants have not been measured anywhere
    table = _measured(call.device) if call.device.type == "cuda" and call.variant == "lora" else ()
    return forms.choose_form(
        sizes, architecture(call.device), captured=captured, backward=call.backward, table=table, variant=call.variant
    )


@functools.cache
def _measured(device: torch.device) -> tuple[dict[str, Any], ...]:
    return forms.load_table(forms.cache_path(torch.cuda.get_device_name(device)))


# forms that auto has taken and that could not run, with the error; and those that have run, by dtype, rank and variant
_failed: dict[str, str] = {}
_ran: set[tuple[str, torch.dtype, int, str]] = set()


def note_run(backend: str, dtype: torch.dtype, rank: int, variant: str = "lora") -> None:
    """Remembers that the kernels of a form are compiled and loaded."""
    _ran.add((backend.removeprefix("triton:"), dtype, rank, variant))


def note_failure(backend: str, error: Exception) -> None:
    """Takes a form that auto had chosen out of its choice and says so once in the log."""
    form = backend.removeprefix("triton:")
    if form not in _failed:
        _failed[form] = f"{type(error).__name__}: {error}"
        logger.warning("the fused %s cannot run here, vendor GEMMs run instead: %s", form, _failed[form])


def drawn_mask(seed: Tensor, shape: torch.Size, dropout: float) -> Tensor:
    """The dropout mask that a fused kernel drew for an x of `shape`, for vendor GEMMs to go on with."""
    from cotolora.backends.fused import ops

    return ops.drawn_mask(seed, math.prod(shape[:-1]), shape[-1], dropout).view(shape)


def why_not(backend: str, call: Call) -> list[str]:
    """Every reason `backend` cannot run such a call; an empty list means it can."""
    if backend == "reference":
        return []
    reasons = ["torch.func transforms and forward-mode AD take only the reference"] if _transforming() else []
    if backend == "addmm":
        return reasons
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not has_triton():
        reasons.append("triton is not installed")
    if call.device.type != "cuda" and not interpreted:
        reasons.append(f"x is on {call.device.type}, not cuda (on a CPU only under TRITON_INTERPRET=1)")
    if call.device.type == "cuda" and not torch.cuda.is_available():
        reasons.append("this machine has no CUDA device")
    if call.dtype not in TRITON_DTYPES:
        reasons.append(f"dtype {call.dtype} is not float32, float16 or bfloat16")
    if call.adds_to not in (None, call.dtype):
        reasons.append(f"x is {call.dtype} and the output of the base {call.adds_to}")
    if interpreted and call.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if call.rank > TRITON_MAX_RANK:
        reasons.append(f"rank {call.rank} exceeds {TRITON_MAX_RANK}")
    if call.variant == "dora" and call.dropout:
        reasons.append("DoRA with dropout takes a second product with W, which no fused form has")
    form, its_forms = backend.partition(":")[2], VARIANT_FORMS[call.variant]
    if form and form not in its_forms:
        reasons.append(f"the fused forms of variant {call.variant!r} are {', '.join(its_forms)}; got {form!r}")
    return reasons


# asked once, at import: a cached function is one that torch.compile would trace into
_triton = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether triton can be imported, found out without importing it."""
    return _triton


def kernels(backend: str, variant: str = "lora") -> Any:
    """What has the `forward` and `backward`, and of DoRA the `row_norms`, of a name that `choose` gave."""
    if backend == "addmm":
        return _ADDMM[variant]
    from cotolora.backends.fused import dora as ops_variants
    from cotolora.backends.fused import ops

    form = backend.removeprefix("triton:")
    return ops.FUSED[form] if variant == "lora" else ops_variants.FUSED[variant, form]


def _transforming() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@dataclass(frozen=True)
class Plan:
    """What would run and why; `str` of it is a short text.

    Attributes:
        backend: the name of the backend that would run, or None if the one asked for cannot.
        reason: why this one.
        others: for every other backend, why it does not run.
        form: of the Triton backend, which of its forms.
        forward, backward: the kernels, each with the bytes that it reads and writes; empty where the number of rows is
            not known, and for the reference.
        saved_bytes: what is kept for the backward beyond the arguments of the call; None likewise.
    """

    call: str
    backend: str | None
    reason: str
    others: dict[str, tuple[str, ...]]
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
            lines.append(f"  saved for backward: {self.saved_bytes / 1e6:.2f} MB beside x")
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
) -> Plan:
    """Which backend would run a layer or a shape, with which kernels, and why not the others. Runs nothing.

    Args:
        layer_or_shapes: a `CoToLoRALinear`, whose own dtype, device and dropout are used (of one with a `base` the
            dtype is not known), or the shapes ``(rows, in_features, out_features, rank)``.
        rows: of the layer's input; without it nothing that depends on it is said.
        dtype, device, dropout, variant: of a call described by its shapes; `dtype` also of a layer with a `base`.
        backend: as in `coto_lora_linear`.

    Raises:
        TypeError: `layer_or_shapes` is neither.
        ValueError: a size is negative or the rank is not positive; `backend` is no backend's name.

    >>> plan = explain((394, 768, 768, 8))
    >>> plan.backend, len(plan.forward), plan.saved_bytes
    ('addmm', 3, 12608)
    """
    if isinstance(getattr(layer_or_shapes, "lora_a", None), Tensor):
        layer = layer_or_shapes
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 0):
            raise ValueError(f"rows must be a non-negative integer; got {rows!r}")
        rank, (out_features, in_features) = layer.rank, (layer.out_features, layer.in_features)
        place, dropout = layer.lora_a.device, layer.dropout if layer.training else 0.0
        dtype, adds_to = (layer.weight.dtype, None) if layer.base is None else (dtype, dtype)
        variant = layer.variant
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
        place, adds_to = torch.device(device), None
    if variant not in VARIANT_FORMS:
        raise ValueError(f"variant must be one of {tuple(VARIANT_FORMS)}; got {variant!r}")
    call = Call(place, dtype, rank, dropout, rows, in_features, out_features, variant=variant, adds_to=adds_to)
    name, source = requested(backend)
    if name == "auto":
        runs, reason = auto(call)
    else:
        runnable = name == "triton" and not why_not(name, call)
        runs = f"triton:{_form(call, fastest_fused=True).form}" if runnable else name
        reason = f"asked for by {source}"
    ran_by, _, form = runs.partition(":")
    why_nots = {other: why_not(other, call) for other in BACKENDS}
    others = {other: tuple(why) or ("can run",) for other, why in why_nots.items() if other != ran_by}
    shown = "" if variant == "lora" else f"{variant}, "
    shown += f"rows {'any' if rows is None else rows}, {in_features} -> {out_features}, rank {rank}, "
    shown += f"{str(dtype).removeprefix('torch.')} on {place}"
    shown += "" if adds_to is None else ", added to what the base makes"
    if blocked := why_nots[ran_by]:
        return Plan(shown, None, f"{reason}, but " + "; ".join(blocked), others)
    sizes = call.sizes
    if sizes is None or ran_by == "reference":
        return Plan(shown, ran_by, reason, others, form or None)
    merged = variant == "dora" and ran_by == "addmm"
    merged = merged and addmm_dora.merges(place, dtype.itemsize, sizes.m, sizes.n * sizes.k, dropout)
    forward, backward = forms.launches("merged" if merged else form or runs, sizes, call.variant)
    mask = 0 if not dropout else sizes.m * sizes.k if runs == "addmm" else 8
    # DoRA keeps what c multiplies, c and the norm; HiRA nothing but what it is given
    kept = {"lora": sizes.bytes("h"), "dora": sizes.bytes("h", "u") + 8 * sizes.n, "hira": 0}[variant]
    if merged:
        kept = sizes.bytes("w") + 8 * sizes.n
    return Plan(shown, ran_by, reason, others, form or None, forward, backward, kept + mask)


def architecture(device: torch.device) -> str:
    """As the kernels name it: "sm_80", "sm_90", "sm_100", "gfx942", or "generic" for anything else."""
    from cotolora.kernels import tiles  # not before somebody has a GPU

    return tiles.architecture(device)
