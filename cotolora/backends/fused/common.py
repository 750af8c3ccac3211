"""Shared parts of the fused backends. Importing this module does not import Triton; running a backend does."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cotolora.backends.types import Call

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 256

# determined at import, because torch.compile would trace into a cached function
_triton = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether triton can be imported; does not import it."""
    return _triton


def operators() -> Any:
    """``torch.ops.cotolora``. The first call registers the operators and imports Triton."""
    from cotolora.backends.fused import ops  # noqa: F401

    return torch.ops.cotolora


def repeatable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns ``function(operators, *args)`` into a function of ``(only_prepared, *args)``.

    Unless torch.compile traces or a dispatch mode is active, it bypasses the dispatcher and repeats recorded launches
    (`cotolora.kernels.launching.replayed`), so `function` may compute only with the operators. With `only_prepared`
    it raises NotPreparedError for a kind of call that was never launched.
    """
    made: dict[bool, Callable[..., Any]] = {}

    def run(only_prepared: bool, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return function(operators(), *args)
        if not made:
            from cotolora.backends.fused.ops import directly

            made.update({only: directly(function, only) for only in (False, True)})
        return made[only_prepared](*args)

    return run


class Fused:
    """Base class of the fused backends."""

    only_prepared = False  # whether to raise instead of launching a kernel for the first time

    def why_not(self, call: Call) -> list[str]:
        """Every limit of the kernels that the call exceeds."""
        return why_not_fused(call)

    def when_captured(self) -> Fused:
        """The same backend, but one that raises NotPreparedError if it would compile or load a kernel."""
        other = copy.copy(self)
        other.only_prepared = True
        return other


def why_not_fused(call: Call) -> list[str]:
    """Every reason no fused kernel can run such a call."""
    reasons = []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not has_triton():
        reasons.append("triton is not installed")
    if call.device.type != "cuda" and not interpreted:
        reasons.append(f"x is on {call.device.type}, not cuda (on a CPU only under TRITON_INTERPRET=1)")
    if call.device.type == "cuda" and not torch.cuda.is_available():
        reasons.append("this machine has no CUDA device")
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} is not float32, float16 or bfloat16")
    if call.base_dtype not in (None, call.dtype):
        reasons.append(f"x is {call.dtype}, but the output of the base is {call.base_dtype}")
    if interpreted and call.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if call.rank > MAX_RANK:
        reasons.append(f"rank {call.rank} exceeds {MAX_RANK}")
    return reasons


def drawn_seed(device: torch.device, dropout: float) -> Tensor | None:
    """The seed of a dropout mask, int64 ``[]``, from torch's generator; None if dropout is 0."""
    # drawn on the device: no sync, and every replay of a CUDA graph draws a new seed
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device) if dropout else None


def mask_of_x(seed: Tensor | None, dy: Tensor, a: Tensor | None, dropout: float) -> Tensor | None:
    """The boolean mask in the shape of x that the kernels draw from `seed`, for a backward by vendor GEMMs.

    x has the leading dimensions of `dy` and the columns of A. None if nothing is dropped.
    """
    if seed is None or a is None:
        return None
    from cotolora.kernels.dropout import drawn_mask

    return drawn_mask(seed, math.prod(dy.shape[:-1]), a.shape[1], dropout).view(*dy.shape[:-1], a.shape[1])
