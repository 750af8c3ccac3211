"""The autograd Functions that connect a backend's forward with its backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cotolora.backends.choice import Plan, note_failure
from cotolora.backends.off import OFF
from cotolora.backends.types import Needs, Operands


class LowRankLinear(torch.autograd.Function):
    """A gated low-rank layer, computed by the backend of a plan.

    The forward takes the context (old style), which has half the eager overhead of a Function with setup_context.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        plan: Plan,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        base: Tensor | None,
        gate: Tensor | None,
        *extra: Tensor,
    ) -> Tensor:
        """Runs the backend and saves the tensors that the required gradients need."""
        needs, for_base, hides_x = (asked.__wrapped__ if plan.traced else asked)(ctx.needs_input_grad)
        gate_is_open = False
        if gate is not None and not plan.fused and readable(gate):
            if gate:
                gate_is_open = True
            else:
                plan = plan._replace(backend=OFF, instead=None)
        operands = Operands(x, weight, bias, a, b, extra, base)
        y, saved, plan = compute(plan, operands, None if gate_is_open else gate, needs)
        ctx.state = plan, type(saved), needs, for_base, gate_is_open
        # the extra tensors are saved too, so that a second differentiation with respect to them is detected
        ctx.save_for_backward(gate, _link_to(x) if hides_x else None, *extra, *saved)
        # autograd forbids writing in place to a view made in a Function, such as a y of three dimensions
        return y if plan.traced or not y._is_view() else y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients, which raise if they are differentiated again."""
        return differentiable_once(_gradients, ctx, dy, ctx.state[0].name)


class AlwaysOnLowRankLinear(torch.autograd.Function):
    """As `LowRankLinear`, by a plan with `always_on`: for calls without a gate in which only A and B train."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        """As `LowRankLinear.forward`."""
        scale = plan.options.scale
        y, h = plan.always_on.forward(x, weight, bias, a, b, scale)  # type: ignore[union-attr]
        ctx.plan = plan
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[1] else None, a, b, h)
        return y.detach() if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """As `LowRankLinear.backward`."""
        return differentiable_once(_always_on_gradients, ctx, dy, ctx.plan.name)


def _always_on_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    plan = ctx.plan
    dx, da, db = plan.always_on.backward(dy, *ctx.saved_tensors, plan.options.scale)
    return None, dx, None, None, da, db


# Function.apply also searches the arguments for torch.func wrappers, which takes a tenth of a tiny layer's time; it is
# not needed, because under torch.func transforms the reference runs
apply_directly = super(torch.autograd.Function, LowRankLinear).apply
apply_always_on = super(torch.autograd.Function, AlwaysOnLowRankLinear).apply


@functools.cache
def asked(needs_input_grad: tuple[bool, ...]) -> tuple[Needs, bool, bool]:
    """Which gradients are required, whether that of `base` is, and whether one depends on an x that is not saved."""
    _, for_x, for_weight, for_bias, for_a, for_b, for_base, _, *for_extra = needs_input_grad
    needs = Needs(for_x, for_weight, for_bias, for_a, for_b, tuple(for_extra))
    return needs, for_base, for_x and not for_a and (for_b or any(for_extra))


def compute(plan: Plan, operands: Operands, gate: Tensor | None, needs: Needs) -> tuple[Tensor, Any, Plan]:
    """The result of the plan's backend, the tensors for its backward, and the plan that was finally used.

    If the plan has an alternative (`instead`), vendor GEMMs replace a kernel that cannot run.
    """
    assert plan.backend is not None
    options = plan.options if gate is None else plan.options._replace(gate=gate)
    try:
        y, saved = plan.backend.forward(operands, options, needs)
    except Exception as error:
        if plan.instead is None or isinstance(error, torch.OutOfMemoryError):
            raise
        note_failure(plan, error)
        plan = plan.instead
        assert plan.backend is not None
        y, saved = plan.backend.forward(operands, options, needs)
    return y, saved, plan


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    plan, saved_type, needs, for_base, gate_is_open = ctx.state
    gate, _, *saved = ctx.saved_tensors
    saved = saved_type._make(saved[len(needs.extra) :])
    options = plan.options if gate is None or gate_is_open else plan.options._replace(gate=gate)
    try:
        found = plan.backend.backward(dy, saved, options, needs)
    except Exception as error:
        if plan.instead is None or isinstance(error, torch.OutOfMemoryError):
            raise
        note_failure(plan, error)
        saved = plan.backend.saved_elsewhere(saved, dy, options)
        found = plan.instead.backend.backward(dy, saved, options, needs)
    x, weight, bias, a, b, extra = found
    if needs.extra:
        extra = (*extra, *[None] * len(needs.extra))[: len(needs.extra)]
    return None, x, weight, bias, a, b, dy if for_base else None, None, *extra


def differentiable_once(
    gradients: Callable[[Any, Tensor], tuple[Tensor | None, ...]], ctx: Any, dy: Tensor, name: str, *others: Tensor
) -> tuple[Tensor | None, ...]:
    """``gradients(ctx, dy)``, outside autocast and the graph. All but dy itself raise if they are differentiated.

    `name` is that of the backend; `others` are further tensors that the gradients depend on.
    """
    recorded = torch.is_grad_enabled()
    if not recorded and not torch._C._is_any_autocast_enabled() and (dy.is_cpu or dy.is_cuda):
        return gradients(ctx, dy)
    # backward may be called inside an autocast region, which must not change the dtypes that forward chose
    with torch.no_grad(), without_autocast(dy.device):
        found = gradients(ctx, dy)
    if not recorded:
        return found
    # requires_grad marks the gradients as dependent on the inputs, which no_grad has hidden from autograd. The saved
    # tensors are inputs because autograd.grad visits only nodes that lead to the tensors it is given
    marked = [None if g is None or g is dy else g.detach().requires_grad_() for g in found]
    marked = _DifferentiableOnce.apply(name, len(marked), *marked, dy, *others, *ctx.saved_tensors)
    return tuple(dy if g is dy else m for g, m in zip(found, marked, strict=True))


def _link_to(x: Tensor) -> Tensor | None:
    """An empty slice of x, which connects a backward to x in the graph if x itself is not saved, as without dA."""
    if torch.compiler.is_compiling():
        return None
    with torch.enable_grad():
        return x[:0].clone()


def readable(gate: Tensor) -> bool:
    """Whether `gate` is 0-dim and the host can read it without a device sync and without breaking a trace."""
    return gate.dim() == 0 and gate.device.type == "cpu" and type(gate) is Tensor and not torch.compiler.is_compiling()


class _DifferentiableOnce(torch.autograd.Function):
    """Returns `count` gradients unchanged and raises if they are differentiated with respect to any input."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        raise RuntimeError(
            f"backend={ctx.name.partition(':')[0]!r} has no double backward; to differentiate twice, call "
            "coto_lora_linear with backend='reference', or use set_backend('reference')"
        )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for `device`."""
    # a tenth of the time of the check below, but it does not cover every device
    if not torch._C._is_any_autocast_enabled() and device.type in ("cpu", "cuda"):
        return False
    # is_autocast_enabled raises for meta, which has no autocast
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast on `device`."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
