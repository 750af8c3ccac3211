"""What other packages do not tell and only the stack shows: on whose behalf a call is made."""

from __future__ import annotations

import sys

# where models are copied to hold the moving average of another's weights
AVERAGES = ("torch.optim.swa_utils", "timm.utils.model_ema")


def called_from(*modules: str) -> bool:
    """Whether the stack holds a function of one of `modules` or of a module inside one."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
