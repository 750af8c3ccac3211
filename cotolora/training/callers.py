"""Finds out from the stack which package makes a call, where that package offers no other way."""

from __future__ import annotations

import sys

# modules that copy a model to hold the moving average of its weights
AVERAGES = ("torch.optim.swa_utils", "timm.utils.model_ema")


def called_from(*modules: str) -> bool:
    """Whether the call stack contains a function of one of `modules` or of their submodules."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
