"""`coto_lora_linear` and `add_low_rank`: check the arguments, look up a plan, cast as autocast would, and run it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora.backends import choice
from cotolora.backends.autograd import (
    LowRankLinear,
    apply_always_on,
    apply_directly,
    autocasts,
    compute,
    without_autocast,
)
from cotolora.backends.choice import Plan
from cotolora.backends.types import NOTHING, Call, Operands, Options, transforming
from cotolora.checks import one_of, shown
from cotolora.operands import (
    check_dtypes,
    check_extra,
    check_factors,
    check_gate,
    check_linear_shapes,
    check_list,
    check_numbers,
    check_tensors,
    refuse_nested,
    surely_right,
)
from cotolora.reference import Gate
from cotolora.variants import VARIANTS
from cotolora.variants.base import Variant


def coto_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    gate: Gate = True,
    dropout: float = 0.0,
    variant: str = "lora",
    magnitude: Tensor | None = None,
    extra: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor:
    r"""Linear layer plus a gated low-rank update: ``y = x Wᵀ + bias + δ · scale · (dropout(x) Aᵀ) Bᵀ``.

    Gradients, with δ = 1 on gated rows and no dropout:

        dx = dy W + scale · (dy B) A      dA = scale · (dy B)ᵀ x      dB = scale · dyᵀ (x Aᵀ)

    W and bias get gradients only if they require them. Only the reference backend supports double backward.

    `variant` selects another update, with the same gates, dropout and dtypes. Where the adapter is active,

        dora:  y = c ∘ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + bias,   c = m / ‖W + scale · B A‖ per row, no gradient of the norm
        hira:  y = x (W ∘ (1 + scale · B A))ᵀ + bias

    `cotolora.reference` defines all variants and names their sources.

    Args:
        x: inputs, ``[..., in_features]``, with any strides and any leading dimensions, also none or of size 0; or a
            jagged nested tensor, whose values are computed like the rows of a dense one.
        weight: base weight W, ``[out_features, in_features]``, in the dtype of `x`.
        bias: base bias, ``[out_features]``, in the dtype of `x`, or None.
        lora_a: A, ``[rank, in_features]``, floating, usually float32 master weights. Cast to the dtype of `x` for
            the computation; its gradient has its own dtype.
        lora_b: B, ``[out_features, rank]``, likewise.
        scale: ``alpha / rank``; for rsLoRA ``alpha / √rank``.
        gate: δ.

            - ``True``: ordinary LoRA. ``False``: exactly ``F.linear(x, weight, bias)``; A and B do not
              enter the graph and get no gradient.
            - 0-dim bool or integer tensor on the device of `x`: read on the device, without a
              sync, so allowed in CUDA graphs; when 0, the gradients of A and B are zeros.
            - bool or integer tensor ``[batch]`` with ``batch = x.shape[0]``: one gate per sample.

            A gate of 0 gives the base output even if A or B is not finite.
        dropout: probability in [0, 1] of zeroing an entry of the adapter's input, in every call. Masks are drawn from
            torch's generator; the fused kernels draw only a seed from it, so their masks differ.
        variant: "lora" or another name in `cotolora.variants.VARIANTS`, each of which has a definition in
            `cotolora.reference`.
        magnitude: m of DoRA, ``[out_features]``, floating, as A and B; None for the other variants.
        extra: the further tensors of a variant after A and B, in its order; for DoRA the same as ``magnitude=``.
        backend: "auto", "reference", "addmm", "triton" or another name as in `set_backend`; None
            follows `set_backend`, then the environment variable ``COTOLORA_BACKEND``, then "auto".

    Returns:
        ``[..., out_features]``, in the dtype of `x`. Under autocast `x`, `weight` and `bias` are
        first cast as `F.linear` would cast them.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.
        RuntimeError: a backend requested by name cannot run this call; the message lists every reason.

    Source: LoRA, Hu et al. 2021, eq. 3 (arXiv:2106.09685); δ is the activation indicator of CoTo,
    Zhuang et al. 2025, section 3 (arXiv:2506.05713).

    >>> x, weight = torch.ones(2, 3), torch.eye(3)
    >>> lora_a, lora_b = torch.ones(1, 3), torch.ones(3, 1)
    >>> coto_lora_linear(x, weight, None, lora_a, lora_b, scale=0.5, gate=torch.tensor([1, 0]))
    tensor([[2.5000, 2.5000, 2.5000],
            [1.0000, 1.0000, 1.0000]])
    """
    if torch.compiler.is_compiling() or not surely_right(x, weight, bias, lora_a, lora_b):
        check_operands(x, weight, bias, lora_a, lora_b)
    kind = VARIANTS[one_of("variant", variant, VARIANTS)]
    extra = _with_magnitude(kind, magnitude, check_list("extra", extra))
    if extra or kind.extra:
        check_extra(kind, extra, lora_a.shape[0], weight.shape[1], weight.shape[0], x.device)
    check_gate(gate, x)
    scale = check_numbers(scale, dropout)
    if gate is False:
        if backend is not None:
            choice.check_name(backend, "backend")
        return F.linear(x, weight, bias)
    if x.is_nested:
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "variant": variant, "extra": extra}
        return _of_jagged(
            x, gate, lambda values, rows: coto_lora_linear(
                values, weight, bias, lora_a, lora_b, gate=rows, backend=backend, **options
            )
        )  # fmt: skip
    plan_for = new_plan if torch.compiler.is_compiling() else planned
    plan = plan_for(kind, x, lora_a.shape[0], weight.shape[1], weight.shape[0], scale, dropout, backend, None)
    return run(plan, x, weight, bias, lora_a, lora_b, extra, None if gate is True else gate)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    gate: Gate = True,
    dropout: float = 0.0,
    variant: str = "lora",
    extra: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor:
    r"""Adds the low-rank update to a base output, without reading W: ``y + δ · scale · (dropout(x) Aᵀ) Bᵀ``.

    `y` is the output of the base for `x`. It is never written to, and its gradient is that of the result; dx, dA and
    dB are those of `coto_lora_linear` without the term ``dy W``.

    ``h = scale · dropout(x) Aᵀ`` is computed in the dtype of `x` (under autocast in the dtype to which `F.linear` would
    cast it) and rounded to the dtype of `y`; ``h Bᵀ`` and the sum are computed in the dtype of `y`. So a base whose
    output has another dtype than `x` keeps it.

    Args:
        y: ``[..., out_features]``, with the leading dimensions and the device of `x`.
        x, lora_a, lora_b, scale, gate, dropout, backend: as in `coto_lora_linear`; ``gate=False`` returns `y` itself.
            There is one form of fused kernel for this, which every "triton" backend selects; x and y must have the same
            dtype for it.

    Returns:
        ``[..., out_features]``, in the dtype of `y`.

    Raises:
        TypeError, ValueError, RuntimeError: as `coto_lora_linear`.

    >>> y, x = torch.zeros(2, 3), torch.ones(2, 3)
    >>> add_low_rank(y, x, torch.ones(1, 3), torch.ones(3, 1), scale=0.5, gate=torch.tensor([1, 0]))
    tensor([[1.5000, 1.5000, 1.5000],
            [0.0000, 0.0000, 0.0000]])
    """
    check_tensors(("x", x), ("y", y), ("lora_a", lora_a), ("lora_b", lora_b))
    if x.dim() == 0 or y.dim() == 0 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must have the leading dimensions of x {tuple(x.shape)}; got shape {tuple(y.shape)}")
    check_factors(lora_a, lora_b, y.shape[-1], x.shape[-1], "x and y")
    adding = [name for name, kind in VARIANTS.items() if kind.addition is not None]
    kind = VARIANTS[one_of("variant", variant, adding)]
    if check_list("extra", extra) or kind.extra:
        check_extra(kind, extra, lora_a.shape[0], x.shape[-1], y.shape[-1], x.device)
    check_gate(gate, x)
    scale = check_numbers(scale, dropout)
    if gate is False:
        if backend is not None:
            choice.check_name(backend, "backend")
        return y
    if x.is_nested:
        options: dict[str, Any] = {"scale": scale, "dropout": dropout, "variant": variant, "extra": extra}
        return _of_jagged(
            x, gate, lambda values, rows: add_low_rank(
                y.values(), values, lora_a, lora_b, gate=rows, backend=backend, **options
            )
        )  # fmt: skip
    plan_for = new_plan if torch.compiler.is_compiling() else planned
    plan = plan_for(kind, x, lora_a.shape[0], x.shape[-1], y.shape[-1], scale, dropout, backend, y.dtype)
    return run(plan, x, None, None, lora_a, lora_b, extra, None if gate is True else gate, y)


def _of_jagged(x: Tensor, gate: Gate, compute: Callable[[Tensor, Gate], Tensor]) -> Tensor:
    """Applies `compute` to the values of a jagged `x` and the gates of their rows; the result is jagged like `x`."""
    values, offsets, ragged = x.values(), x.offsets(), x._ragged_idx  # type: ignore[attr-defined]
    if isinstance(gate, Tensor) and gate.dim():
        if ragged != 1:
            raise ValueError(f"a row gate [batch] needs x jagged in dimension 1; got x jagged in dimension {ragged}")
        gate = gate.repeat_interleave(offsets.diff(), output_size=values.shape[0])
    # passes on the known sequence lengths, which attention would otherwise have to read from the device
    known = {f"{end}_seqlen": getattr(x, f"_maybe_{end}_seqlen", None) for end in ("min", "max")}
    lengths = x.lengths()  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(compute(values, gate), offsets, lengths, ragged, **known)


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    """Raises unless these tensors fit together as the operands of one low-rank layer.

    Raises:
        TypeError, ValueError: as `coto_lora_linear`.
    """
    check_tensors(("x", x), ("weight", weight), ("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b))
    check_linear_shapes(x, weight, bias)
    check_factors(lora_a, lora_b, weight.shape[0], weight.shape[1], "weight")
    if not autocasts(x.device):
        check_dtypes(x, weight, bias)


def _with_magnitude(kind: Variant, magnitude: Tensor | None, extra: Sequence[Tensor]) -> Sequence[Tensor]:
    takes_it = bool(kind.extra) and kind.extra[0].argument == "magnitude"
    if magnitude is not None and not takes_it:
        got = f"one with variant={kind.name!r}, {shown(magnitude)}"
        raise ValueError(f"magnitude belongs to variant='dora'; got {got}")
    if magnitude is not None and extra:
        raise ValueError("magnitude and extra must not both be given; got both")
    return (magnitude,) if takes_it and not extra else extra  # type: ignore[return-value]


def planned(
    kind: Variant,
    x: Tensor,
    rank: int,
    in_features: int,
    out_features: int,
    scale: float,
    dropout: float,
    backend: str | None = None,
    base_dtype: torch.dtype | None = None,
) -> Plan:
    """The plan for such a call, cached by its properties. Not for a trace, which uses `new_plan`.

    Raises:
        ValueError, RuntimeError: as `coto_lora_linear`, because of `backend`.
    """
    usual = (
        backend is None and x.is_cpu and not choice.ever_set and not torch._C._is_any_autocast_enabled()
        and not transforming()
    )  # fmt: skip
    # on a CPU vendor GEMMs are chosen for every number of rows
    key: tuple[object, ...] = (
        kind, x.dtype, rank, in_features, out_features, scale, dropout, torch.is_grad_enabled(), base_dtype
    )  # fmt: skip
    if not usual:
        key += (
            x.device,
            None if x.is_cpu and not choice.requested(backend)[0].startswith("triton") else math.prod(x.shape[:-1]),
            torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else None,
            choice.requested(backend),
            transforming(),
            x.is_cuda and torch.cuda.is_current_stream_capturing(),
        )
    found = choice.plans.get(key)
    if found is None:
        found = new_plan(kind, x, rank, in_features, out_features, scale, dropout, backend, base_dtype)
        choice.keep(key, found)
    return found


def new_plan(
    kind: Variant,
    x: Tensor,
    rank: int,
    in_features: int,
    out_features: int,
    scale: float,
    dropout: float,
    backend: str | None,
    base_dtype: torch.dtype | None,
) -> Plan:
    """The plan for such a call, without the cache. In a trace it ignores the number of rows, which may be symbolic."""
    refuse_nested(x)
    cast_to = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else None
    rows = None if torch.compiler.is_compiling() else math.prod(x.shape[:-1])
    dtype = x.dtype if cast_to is None or x.dtype == torch.float64 else cast_to
    grad = torch.is_grad_enabled()
    call = Call(kind, x.device, dtype, rank, dropout, rows, in_features, out_features, grad, base_dtype)
    return choice.plan(backend, call, Options(scale, dropout), cast_to)


def run(
    plan: Plan,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    extra: Sequence[Tensor],
    gate: Tensor | None,
    base: Tensor | None = None,
) -> Tensor:
    """Runs a plan on the operands of such a call, without checking them. A `gate` of None means active."""
    if plan.cast_to is not None:
        return _run_cast(plan, x, weight, bias, a, b, extra, gate, base)
    if plan.backend is None:
        return _run_reference(plan, x, weight, bias, a, b, extra, gate, base)
    if (
        plan.always_on is not None and gate is None and a.requires_grad and b.requires_grad
        and (plan.always_on.casts or (a.dtype is x.dtype and b.dtype is x.dtype))
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))  # type: ignore[union-attr]
    ):  # fmt: skip
        return apply_always_on(plan, x, weight, bias, a, b)
    if not plan.call.backward:
        return compute(plan, Operands(x, weight, bias, a, b, tuple(extra), base), gate, NOTHING)[0]
    function = LowRankLinear.apply if plan.traced else apply_directly
    return function(plan, x, weight, bias, a, b, base, gate, *extra)


def _run_cast(
    plan: Plan,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    extra: Sequence[Tensor],
    gate: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    """Casts the operands as autocast would and runs the plan; a sum with a base output keeps the dtype of that."""
    cast_to, variant = plan.cast_to, plan.call.variant
    assert cast_to is not None
    with without_autocast(x.device):
        if weight is not None:
            if weight.dtype != plan.call.dtype:
                extra = (*extra, *variant.constants(plan.backend, weight, a, b, plan.options.scale))
            weight, bias = autocast(weight, cast_to), None if bias is None else autocast(bias, cast_to)
        x = autocast(x, cast_to)
        if weight is not None:
            check_dtypes(x, weight, bias)
        return run(plan._replace(cast_to=None), x, weight, bias, a, b, extra, gate, base)


def _run_reference(
    plan: Plan,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    extra: Sequence[Tensor],
    gate: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    refuse_nested(x)
    variant, (scale, dropout, _) = plan.call.variant, plan.options
    options = {"scale": scale, "gate": True if gate is None else gate, "dropout": dropout}
    if base is None:
        return variant.definition(x, weight, bias, a, b, *extra, **options)
    assert variant.addition is not None
    return variant.addition(base, x, a, b, *extra, **options)


def autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` as autocast to `dtype` would cast it for F.linear."""
    # autocast does not cast float64 operands of its lower-precision operations, such as F.linear
    return t if t.dtype == torch.float64 else t.to(dtype)
