"""LoRA-Pro: adjusts the gradients of A and B so that a step moves B A as full fine-tuning would move the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cotolora.checks import number
from cotolora.groups import adapters
from cotolora.operands import check_tensors
from cotolora.training.stepping import register_before_step


def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Makes every step of `optimizer` use `adjusted` gradients; returns a handle that undoes this.

    Adapters without a gradient are skipped, such as those that CoTo has made inactive. Gradient clipping runs before
    the adjustment. With plain SGD this is the paper's algorithm. The paper's AdamW keeps moments of the whole
    ``[out_features, in_features]`` matrix; here any optimizer continues from the adjusted gradients of A and B.

    Args:
        model: a model with adapters, of any variant.
        optimizer: may be wrapped by accelerate or Lightning, and may run backward in a closure.

    Raises:
        TypeError: `model` is not a module, or `optimizer` is not a torch optimizer.
        ValueError: `model` has no adapters, or FSDP2 has sharded them: the adjustment needs whole factors.

    Source: LoRA-Pro, Wang et al. 2024, algorithm 1 (arXiv:2407.18242).
    """
    layers = adapters(model)
    if not layers:
        raise ValueError(f"model must have adapters; {type(model).__name__} has none (call inject first)")

    if sharded := [name for name, layer in layers.items() if hasattr(layer.lora_a, "device_mesh")]:
        raise ValueError(f"model must have whole factors; these are sharded: {sharded}")

    def adjust() -> None:
        for layer in layers.values():
            a, b = layer.lora_a, layer.lora_b
            # with a scale of 0 no step changes the update, so there is nothing to adjust
            if a.grad is not None and b.grad is not None and layer.scale != 0:
                a.grad, b.grad = adjusted(a.detach(), b.detach(), a.grad, b.grad, layer.scale)

    return register_before_step(optimizer, adjust)


def adjusted(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    r"""Gradients of A and B whose step is nearest to that of full fine-tuning; of these, the nearest to the given ones.

    A step along (g_A, g_B) moves ``scale · B A`` by ``g = scale · (g_B A + B g_A)`` to first order. The pairs whose g
    is nearest to the gradient of the full matrix are

        g_A = (Bᵀ B)⁻¹ grad_a / scale² + X A
        g_B = (I - B (Bᵀ B)⁻¹ Bᵀ) grad_b (A Aᵀ)⁻¹ / scale² - B X

    for any X. This function takes the X that solves ``Bᵀ B X + X A Aᵀ = -(Bᵀ B)⁻¹ grad_a Aᵀ / scale²``. The inverses
    are pseudo-inverses, so B may be zero, as it is initially. Computed in float64 if the device supports it.

    Args:
        a: A, ``[rank, in_features]``.
        b: B, ``[out_features, rank]``.
        grad_a, grad_b: their gradients, in their shapes.
        scale: of the update, as in `coto_lora_linear`; not 0.

    Returns:
        g_A and g_B, in the dtypes of `grad_a` and `grad_b`.

    Raises:
        TypeError: a factor or a gradient is not a floating tensor.
        ValueError: they are on different devices or their shapes do not fit, or `scale` is 0 or not finite.

    Source: LoRA-Pro, Wang et al. 2024, theorems 2.1 and 2.3 (arXiv:2407.18242).

    >>> one = torch.ones(1, 1)
    >>> adjusted(one, 0 * one, 0 * one, one, scale=0.5)  # B is zero: only B moves, by grad_b / scale²
    (tensor([[0.]]), tensor([[4.]]))
    """
    _check(a, b, grad_a, grad_b)
    # the formulas divide by its square
    scale = number("scale", scale, "a finite number whose square is not 0", lambda scale: 0 < scale * scale < math.inf)
    exact = torch.float32 if a.device.type == "mps" else torch.float64
    a, b, for_a, for_b = (t.to(exact) for t in (a, b, grad_a, grad_b))
    (lambda_b, u), (lambda_a, v) = torch.linalg.eigh(b.T @ b), torch.linalg.eigh(a @ a.T)
    inverse_b, inverse_a = (u * _inverse(lambda_b)) @ u.T, (v * _inverse(lambda_a)) @ v.T
    g_a = inverse_b @ for_a / scale**2
    g_b = for_b @ inverse_a / scale**2
    g_b = g_b - b @ (inverse_b @ (b.T @ g_b))
    # in the eigenbases the Sylvester equation is a division; where both eigenvalues are 0 the result ignores X
    x = u @ ((u.T @ (-g_a @ a.T) @ v) * _inverse(lambda_b[:, None] + lambda_a[None, :])) @ v.T
    return (g_a + x @ a).to(grad_a.dtype), (g_b - b @ x).to(grad_b.dtype)


def _check(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> None:
    check_tensors(("a", a), ("b", b), ("grad_a", grad_a), ("grad_b", grad_b))
    if a.dim() != 2:
        raise ValueError(f"a must be [rank, in_features]; got shape {tuple(a.shape)}")
    if b.dim() != 2 or b.shape[1] != a.shape[0]:
        shapes = f"{tuple(b.shape)} with a of shape {tuple(a.shape)}"
        raise ValueError(f"b must be [out_features, {a.shape[0]}] to fit a; got shape {shapes}")
    for name, grad, factor in (("grad_a", grad_a, a), ("grad_b", grad_b, b)):
        if grad.shape != factor.shape:
            raise ValueError(f"{name} must be of shape {tuple(factor.shape)}; got shape {tuple(grad.shape)}")


def _inverse(eigenvalues: Tensor) -> Tensor:
    """1 / λ, or 0 for eigenvalues that are zero up to rounding."""
    smallest = eigenvalues.abs().max() * torch.finfo(eigenvalues.dtype).eps * eigenvalues.shape[-1]
    return torch.where(eigenvalues > smallest, 1 / eigenvalues, 0)
