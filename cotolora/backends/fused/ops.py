"""torch.library registrations over the Triton launchers. Imported only when the Triton backend runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from cotolora.backends.fused.lora import SWAPPED_ROWS
from cotolora.backends.types import NotPreparedError
from cotolora.kernels import adapter_grads as grads
from cotolora.kernels import hira as hiras
from cotolora.kernels import hira_grads as hira_gradients
from cotolora.kernels import low_rank_gemm as gemm
from cotolora.kernels import one_pass, one_pass_swapped
from cotolora.kernels import pre_expand as expands
from cotolora.kernels import row_norm as norms
from cotolora.kernels import shrink as shrinks
from cotolora.kernels.launching import replayed

# define and impl instead of custom_op, which has twice the overhead of an eager call
_library = torch.library.Library("cotolora", "DEF")
FORWARD = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? gate, Tensor? seed, float scale, float dropout"
)
# for DoRA: the factors of the columns of y, and whether to return y before this multiplication too
SCALED = "Tensor? column_scale=None, bool keep_u=False"
SCHEMAS = {
    "one_pass": f"({FORWARD}, {SCALED}) -> (Tensor, Tensor, Tensor)",
    "pre_expand": f"({FORWARD.replace('Tensor weight, ', '')}) -> (Tensor, Tensor)",
    "shrink": "(Tensor x, Tensor a, Tensor? gate, Tensor? seed, float scale, float dropout) -> Tensor",
    "low_rank_gemm": "(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor b, Tensor? gate, Tensor? seed, "
    f"float dropout, Tensor? x_scale=None, {SCALED}) -> (Tensor, Tensor)",
    "expand": "(Tensor p, Tensor a, Tensor? add, Tensor? gate, Tensor? seed, float dropout) -> Tensor",
    "adapter_grads": "(Tensor dy, Tensor? x, Tensor? h, Tensor? b, Tensor? gate, Tensor? seed, float scale, "
    "float dropout, ScalarType dtype_a, ScalarType dtype_b, Tensor? column_scale=None, Tensor? norm=None, "
    "Tensor? u=None, ScalarType? dtype_m=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "gram": "(Tensor x, Tensor p, Tensor? gate, ScalarType dtype) -> Tensor",
    "row_norm": "(Tensor weight, Tensor a, Tensor b, float scale, Tensor? norm, Tensor? magnitude, Tensor? gate) "
    "-> (Tensor, Tensor)",
    "hira": f"({FORWARD}, bool drops_input) -> Tensor",
    "hira_grads": "(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? gate, Tensor? seed, float scale, "
    "float dropout, ScalarType dtype_a, ScalarType dtype_b) -> (Tensor, Tensor)",
}


def _one_pass(x, weight, bias, a, b, gate, seed, scale, dropout, column_scale=None, keep_u=False):  # type: ignore[no-untyped-def]
    module = one_pass_swapped.one_pass_swapped if x.shape[0] <= SWAPPED_ROWS else one_pass.one_pass
    u = x.new_empty(x.shape[0], weight.shape[0]) if keep_u else None
    made = module(x, weight, bias, a, b, gate, scale, seed=seed, dropout=dropout, column_scale=column_scale, u=u)
    return *made, x.new_empty(0) if u is None else u


def _pre_expand(x, bias, a, b, gate, seed, scale, dropout):  # type: ignore[no-untyped-def]
    return expands.pre_expand(x, bias, a, b, gate, scale, seed=seed, dropout=dropout)


def _shrink(x, a, gate, seed, scale, dropout):  # type: ignore[no-untyped-def]
    return shrinks.shrink(x, a, gate, scale, seed=seed, dropout=dropout)


def _low_rank_gemm(x, weight, bias, h, b, gate, seed, dropout, x_scale=None, column_scale=None, keep_u=False):  # type: ignore[no-untyped-def]
    u = x.new_empty(x.shape[0], weight.shape[0]) if keep_u else None
    scales = {"x_scale": x_scale, "column_scale": column_scale, "u": u}
    y = gemm.low_rank_gemm(x, weight, bias, h, b, gate, seed=seed, dropout=dropout, **scales)
    return y, x.new_empty(0) if u is None else u


def _expand(p, a, add, gate, seed, dropout):  # type: ignore[no-untyped-def]
    return expands.expand(p, a, gate, add=add, seed=seed, dropout=dropout)


def _adapter_grads(  # type: ignore[no-untyped-def]
    dy, x, h, b, gate, seed, scale, dropout, dtype_a, dtype_b, column_scale=None, norm=None, u=None, dtype_m=None
):
    dora = None if column_scale is None else grads.Dora(column_scale, norm, u, dtype_m or dy.dtype)
    made = grads.adapter_grads(dy, x, h, b, gate, scale, dtype_a, dtype_b, seed=seed, dropout=dropout, dora=dora)
    # an operator must return tensors: an empty one for each result that was not required
    return tuple(dy.new_empty(0) if t is None else t for t in made)


def _hira(x, weight, bias, a, b, gate, seed, scale, dropout, drops_input):  # type: ignore[no-untyped-def]
    return hiras.hira(x, weight, bias, a, b, gate, scale, seed=seed, dropout=dropout, drops_input=drops_input)


def _hira_grads(dy, x, weight, a, b, gate, seed, scale, dropout, dtype_a, dtype_b):  # type: ignore[no-untyped-def]
    return hira_gradients.hira_grads(dy, x, weight, a, b, gate, scale, dtype_a, dtype_b, seed=seed, dropout=dropout)


def _linear_shapes(x, weight, bias, a, b, gate, seed, scale, dropout, column_scale=None, keep_u=False):  # type: ignore[no-untyped-def]
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, x.new_empty(x.shape[0], a.shape[0]), torch.empty_like(y) if keep_u else x.new_empty(0)


def _low_rank_gemm_shapes(x, weight, bias, h, b, gate, seed, dropout, x_scale=None, column_scale=None, keep_u=False):  # type: ignore[no-untyped-def]
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep_u else x.new_empty(0)


def _pre_expand_shapes(x, bias, a, b, gate, seed, scale, dropout):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


def _adapter_grads_shapes(  # type: ignore[no-untyped-def]
    dy, x, h, b, gate, seed, scale, dropout, dtype_a, dtype_b, column_scale=None, norm=None, u=None, dtype_m=None
):
    return (
        dy.new_empty(0) if b is None else dy.new_empty(dy.shape[0], b.shape[1]),
        dy.new_empty(0) if b is None or x is None else dy.new_empty(b.shape[1], x.shape[1], dtype=dtype_a),
        dy.new_empty(0) if h is None else dy.new_empty(dy.shape[1], h.shape[1], dtype=dtype_b),
        dy.new_empty(0) if h is None or u is None else dy.new_empty(dy.shape[1], dtype=dtype_m or dy.dtype),
    )


def _norm_shapes(weight, a, b, scale, norm, magnitude, gate):  # type: ignore[no-untyped-def]
    return tuple(weight.new_empty(weight.shape[0], dtype=torch.float32) for _ in range(2))


def _factor_shapes(dy, x, weight, a, b, gate, seed, scale, dropout, dtype_a, dtype_b):  # type: ignore[no-untyped-def]
    return torch.empty(a.shape, dtype=dtype_a, device=a.device), torch.empty(b.shape, dtype=dtype_b, device=b.device)


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "one_pass": (_one_pass, _linear_shapes),
    "pre_expand": (_pre_expand, _pre_expand_shapes),
    "shrink": (_shrink, lambda x, a, gate, seed, scale, dropout: x.new_empty(x.shape[0], a.shape[0])),
    "low_rank_gemm": (_low_rank_gemm, _low_rank_gemm_shapes),
    "expand": (_expand, lambda p, a, add, gate, seed, dropout: p.new_empty(p.shape[0], a.shape[1])),
    "adapter_grads": (_adapter_grads, _adapter_grads_shapes),
    "gram": (grads.factor_grad, lambda x, p, gate, dtype: x.new_empty(p.shape[1], x.shape[1], dtype=dtype)),
    "row_norm": (norms.row_norm, _norm_shapes),
    "hira": (_hira, lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0])),
    "hira_grads": (_hira_grads, _factor_shapes),
}
for _name, (_launch, _shapes) in _IMPLEMENTATIONS.items():
    _library.define(_name + SCHEMAS[_name])
    # on a CPU only Triton's interpreter can run it, which why_not_fused checks
    _again = replayed(_launch, {}, elsewhere=_launch)
    _library.impl(_name, _again, "CPU")
    _library.impl(_name, _again, "CUDA")
    torch.library.register_fake(f"cotolora::{_name}", _shapes, lib=_library)

# bypasses the dispatcher, which takes as long as a small launch
direct = SimpleNamespace(**{_name: _launch for _name, (_launch, _) in _IMPLEMENTATIONS.items()})


def _missing() -> None:
    raise NotPreparedError("no such call has launched these kernels in this process")


def directly(function: Callable[..., Any], only_prepared: bool) -> Callable[..., Any]:
    """See `cotolora.backends.fused.common.repeatable`."""
    replays = _REPLAYS.setdefault(function, {})
    registered = partial(function, torch.ops.cotolora)
    return replayed(partial(function, direct), replays, registered, _missing if only_prepared else None)


_REPLAYS: dict[Callable[..., Any], dict[tuple[Any, ...], Any]] = {}
