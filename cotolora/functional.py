"""The operation itself: checks its arguments once, casts as autocast would, and runs one backend."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cotolora import reference
from cotolora.backends import choice as dispatch
from cotolora.backends.autograd import LowRankLinear, autocasts, without_autocast
from cotolora.reference import Gate

VARIANTS = ("lora", "dora", "hira")


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
    norm: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Linear layer plus a gated low-rank update: ``y = x Wᵀ + bias + δ · scale · (dropout(x) Aᵀ) Bᵀ``.

    Gradients, with δ = 1 on gated rows and no dropout:

        dx = dy W + scale · (dy B) A      dA = scale · (dy B)ᵀ x      dB = scale · dyᵀ (x Aᵀ)

    W and bias get none unless they require it. No double backward except by the reference.

    Or a variant of it, with the same gates, dropout and dtypes; of one that is on,

        dora:  y = c ∘ (x Wᵀ + scale · (x Aᵀ) Bᵀ) + bias,   c = m / ‖W + scale · B A‖ by rows, the norm a constant
        hira:  y = x (W ∘ (1 + scale · B A))ᵀ + bias

    which `cotolora.reference` defines, with their sources.

    Args:
        x: inputs, ``[..., in_features]``; any strides, any leading dimensions, also none or empty.
        weight: base weight W, ``[out_features, in_features]``, in the dtype of `x`.
        bias: base bias, ``[out_features]``, in the dtype of `x`, or None.
        lora_a: A, ``[rank, in_features]``, floating; float32 masters are usual. Cast to the dtype of `x` for
            compute, its gradient is in its own dtype.
        lora_b: B, ``[out_features, rank]``, likewise.
        scale: ``alpha / rank``; for rsLoRA ``alpha / √rank``.
        gate: δ.

            - ``True``: ordinary LoRA. ``False``: exactly ``F.linear(x, weight, bias)``; A and B do not
              enter the graph and get no gradient.
            - 0-dim bool or integer tensor on the device of `x`: read by the device, without a
              sync, so legal in CUDA graphs; when 0, A and B get zeros.
            - bool or integer tensor ``[batch]`` with ``batch = x.shape[0]``: one gate per sample.

            Off selects the base, also where A or B is not finite.
        dropout: probability in [0, 1] of zeroing an entry of the adapter's input; always acts. Masks are
            drawn from torch's generator; the fused kernels draw a seed from it, so their masks are others.
        variant: "lora", "dora" or "hira".
        magnitude: m of DoRA, ``[out_features]``, floating, as A and B; None for the others.
        norm: of DoRA, `row_norms` of these W, A and B, which a caller may keep as long as they stay the same; None
            computes it.
        backend: "auto", "reference", "addmm", "triton" or one of its forms as in `set_backend`; None
            follows `set_backend`, then the environment variable ``COTOLORA_BACKEND``, then "auto".

    Returns:
        ``[..., out_features]``, in the dtype of `x`. Under autocast `x`, `weight` and `bias` are
        first cast as `F.linear` would cast them.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.
        RuntimeError: the backend asked for by name cannot run this call; lists every reason.

    Source: LoRA, Hu et al. 2021, eq. 3 (arXiv:2106.09685); δ is the activation indicator of CoTo,
    Zhuang et al. 2025, section 3 (arXiv:2506.05713).

    >>> x, weight = torch.ones(2, 3), torch.eye(3)
    >>> lora_a, lora_b = torch.ones(1, 3), torch.ones(3, 1)
    >>> coto_lora_linear(x, weight, None, lora_a, lora_b, scale=0.5, gate=torch.tensor([1, 0]))
    tensor([[2.5000, 2.5000, 2.5000],
            [1.0000, 1.0000, 1.0000]])
    """
    compiling = torch.compiler.is_compiling()
    if compiling or not _plainly_right(x, weight, bias, lora_a, lora_b):
        _check_tensors(("x", x), ("weight", weight), ("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b))
        _check_linear_shapes(x, weight, bias)
        _check_factors(lora_a, lora_b, weight.shape[0], weight.shape[1], "weight")
        if not autocasts(x.device):
            _check_dtypes(x, weight, bias)
    if variant != "lora" or magnitude is not None or norm is not None:
        _check_variant(variant, weight, magnitude, norm)
    _check_gate(gate, x)
    _check_numbers(scale, dropout)

    autocast = autocasts(x.device)
    if gate is False:
        if backend is not None:
            dispatch.check_name(backend, "backend")
        return F.linear(x, weight, bias)
    uncast = weight
    if autocast:
        x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
        _check_dtypes(x, weight, bias)
    rows = None if compiling else math.prod(x.shape[:-1])
    out_features, in_features = weight.shape
    call = dispatch.Call(
        x.device, x.dtype, lora_a.shape[0], dropout, rows, in_features, out_features, torch.is_grad_enabled(), variant
    )
    name = dispatch.choose(backend, call)
    if variant == "dora" and norm is None and autocast and not name.startswith("triton"):
        # of W as it was; without autocast the forward computes it
        norm = _row_norms(uncast, lora_a, lora_b, scale, name)
    if name == "reference":
        return _reference(
            x, weight, bias, lora_a, lora_b, magnitude, norm, scale=scale, gate=gate, dropout=dropout, variant=variant
        )
    fall_back = name.startswith("triton") and dispatch.requested(backend)[0] == "auto"
    return LowRankLinear.apply(
        x, weight, bias, lora_a, lora_b, magnitude, None, norm, scale, gate, dropout, variant, name, fall_back
    )


def add_low_rank(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    gate: Gate = True,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    r"""The low-rank update alone, for a base whose weight is not there to read: ``y + δ · scale · (dropout(x) Aᵀ) Bᵀ``.

    `y` is what the base has made of `x`. It is never written, and gets the gradient of the result as it is; dx, dA and
    dB are those of `coto_lora_linear` less ``dy W``.

    ``h = scale · dropout(x) Aᵀ`` is computed in the dtype of `x` (under autocast in that to which `F.linear` would cast
    it) and rounded to the dtype of `y`; ``h Bᵀ`` and the sum are computed in that. So a base that answers in a dtype
    of its own keeps it.

    Args:
        y: ``[..., out_features]``, with the leading dimensions and the device of `x`.
        x, lora_a, lora_b, scale, gate, dropout, backend: as in `coto_lora_linear`; ``gate=False`` gives `y` itself.
            Every form of the fused kernels stands for the one that there is here, which wants one dtype for x and y.

    Returns:
        ``[..., out_features]``, in the dtype of `y`.

    Raises:
        TypeError, ValueError, RuntimeError: as `coto_lora_linear`.

    >>> y, x = torch.zeros(2, 3), torch.ones(2, 3)
    >>> add_low_rank(y, x, torch.ones(1, 3), torch.ones(3, 1), scale=0.5, gate=torch.tensor([1, 0]))
    tensor([[1.5000, 1.5000, 1.5000],
            [0.0000, 0.0000, 0.0000]])
    """
    _check_tensors(("x", x), ("y", y), ("lora_a", lora_a), ("lora_b", lora_b))
    if x.dim() == 0 or y.dim() == 0 or y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y must have the leading dimensions of x {tuple(x.shape)}; got shape {tuple(y.shape)}")
    _check_factors(lora_a, lora_b, y.shape[-1], x.shape[-1], "x and y")
    _check_gate(gate, x)
    _check_numbers(scale, dropout)
    if gate is False:
        if backend is not None:
            dispatch.check_name(backend, "backend")
        return y
    if autocasts(x.device):
        x = _autocast(x)
    rows = None if torch.compiler.is_compiling() else math.prod(x.shape[:-1])
    call = dispatch.Call(
        x.device, x.dtype, lora_a.shape[0], dropout, rows, x.shape[-1], y.shape[-1], torch.is_grad_enabled(),
        adds_to=y.dtype,
    )  # fmt: skip
    name = dispatch.choose(backend, call)
    # autocast would take a sum in float32 away from y
    with without_autocast(x.device):
        if name == "reference":
            return reference.add_low_rank(y, x, lora_a, lora_b, scale=scale, gate=gate, dropout=dropout)
        fall_back = name.startswith("triton") and dispatch.requested(backend)[0] == "auto"
        return LowRankLinear.apply(
            x, None, None, lora_a, lora_b, None, y, None, scale, gate, dropout, "lora", name, fall_back
        )


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, backend: str | None = None) -> Tensor:
    """``‖W + scale · B A‖`` of every row ``[out_features]``: DoRA's norm, which no gradient passes.

    The arguments are those of `coto_lora_linear`; the result is float32, or float64 if `weight` is.
    """
    _check_tensors(("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b))
    call = dispatch.Call(weight.device, weight.dtype, lora_a.shape[0], variant="dora")
    return _row_norms(weight, lora_a, lora_b, scale, dispatch.choose(backend, call))


def _row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, name: str) -> Tensor:
    by = reference if name == "reference" else dispatch.kernels(name, "dora")
    with torch.no_grad(), without_autocast(weight.device):
        return by.row_norms(weight, lora_a, lora_b, scale)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    norm: Tensor | None,
    *,
    scale: float,
    gate: Gate,
    dropout: float,
    variant: str,
) -> Tensor:
    if magnitude is not None:
        return reference.dora_linear(
            x, weight, bias, lora_a, lora_b, magnitude, scale=scale, gate=gate, dropout=dropout, norm=norm
        )
    define = reference.lora_linear if variant == "lora" else reference.hira_linear
    return define(x, weight, bias, lora_a, lora_b, scale=scale, gate=gate, dropout=dropout)


_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def _plainly_right(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether the checks below would find nothing, in a third of their time, which small layers spend on Python."""
    try:
        dtype, device, (out_features, in_features), (rank, columns) = x.dtype, x.device, weight.shape, lora_a.shape
        return (
            dtype in _FLOATING
            and dtype is weight.dtype
            and lora_a.dtype in _FLOATING
            and lora_b.dtype in _FLOATING
            and x.shape[-1] == in_features == columns
            and lora_b.shape == (out_features, rank)
            and rank > 0
            and device == weight.device == lora_a.device == lora_b.device
            and (bias is None or (bias.dtype is dtype and bias.shape == (out_features,) and bias.device == device))
        )
    except (AttributeError, IndexError, TypeError, ValueError):  # of what is no tensor or has too few dimensions
        return False


def _check_tensors(*tensors: tuple[str, Tensor | None]) -> None:
    device = None
    for name, t in tensors:
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype; got {t.dtype}")
        device = device or t.device
        if t.device != device:
            raise ValueError(f"{name} must be on the device of x, {device}; got {t.device}")


def _check_linear_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features]; got shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}] to fit weight; got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}] to fit weight; got shape {tuple(bias.shape)}")


def _check_factors(lora_a: Tensor, lora_b: Tensor, out_features: int, in_features: int, base: str) -> None:
    if lora_a.dim() != 2 or lora_a.shape[1] != in_features or lora_a.shape[0] == 0:
        raise ValueError(f"lora_a must be [rank, {in_features}] with rank at least 1; got shape {tuple(lora_a.shape)}")
    if lora_b.shape != (out_features, lora_a.shape[0]):
        raise ValueError(
            f"lora_b must be [{out_features}, {lora_a.shape[0]}] to fit {base} and lora_a; "
            f"got shape {tuple(lora_b.shape)}"
        )


def _check_variant(variant: str, weight: Tensor, magnitude: Tensor | None, norm: Tensor | None) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}; got {variant!r}")
    for name, t in (("magnitude", magnitude), ("norm", norm)):
        if variant != "dora":
            if t is not None:
                raise ValueError(f"{name} belongs to variant='dora'; got one with variant={variant!r}")
            continue
        if t is None and name == "norm":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor with variant='dora'; got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype; got {t.dtype}")
        if t.device != weight.device:
            raise ValueError(f"{name} must be on the device of x, {weight.device}; got {t.device}")
        if t.shape != weight.shape[:1]:
            raise ValueError(f"{name} must be [{weight.shape[0]}] to fit weight; got shape {tuple(t.shape)}")


def _check_gate(gate: Gate, x: Tensor) -> None:
    if isinstance(gate, bool):
        return
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate must be a bool or a bool or integer tensor; got {type(gate).__name__} {gate!r}")
    if gate.is_floating_point() or gate.is_complex():
        raise TypeError(f"gate must be a bool or a bool or integer tensor; got a tensor of {gate.dtype}")
    if gate.device != x.device:
        raise ValueError(f"gate must be on the device of x, {x.device}; got {gate.device}")
    if gate.dim() > 1:
        raise ValueError(f"gate must be 0-dim or [batch]; got shape {tuple(gate.shape)}")
    if gate.dim() == 1 and (x.dim() < 2 or gate.shape[0] != x.shape[0]):
        raise ValueError(
            f"a row gate [batch] needs x [batch, ..., in_features] with the same batch; "
            f"got gate of shape {tuple(gate.shape)}, x of shape {tuple(x.shape)}"
        )


def _check_numbers(scale: float, dropout: float) -> None:
    for name, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__} {value!r}")
    # not math.isfinite, which torch.compile cannot trace once it takes a changing scale for a symbol
    if not abs(scale) < math.inf:
        raise ValueError(f"scale must be finite; got {scale!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1]; got {dropout!r}")


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtype = x.dtype
    if weight.dtype != dtype:
        raise TypeError(f"weight must be of the dtype of x, {dtype}; got {weight.dtype}")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias must be of the dtype of x, {dtype}; got {bias.dtype}")


def _autocast(t: Tensor) -> Tensor:
    # F.linear is on autocast's list of lower-precision operations, which leaves float64 alone
    return t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype(t.device.type))
