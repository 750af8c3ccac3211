"""Fits the host's part of the model in `cotolora.backends.cost` to what `python -m benchmarks host` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from cotolora.backends.cost import by_whom
from cotolora.backends.types import Sizes
from cotolora.variants import VARIANTS

# the numbers of launches that are modelled do not depend on sizes of so many rows
SIZES = Sizes(512, 256, 256, 16)
SUFFIX = ", f32 A and B"  # as layers have them
KINDS = {"lora", "dora", "hira"}
PARAMETERS = ("vendor_launch", "triton_launch", "fused_host")


class Row(Protocol):
    """Microseconds of one contender."""

    name: str
    forward: float
    both: float


def equations(found: Mapping[str, Sequence[Row]]) -> tuple[list[list[int]], list[float]]:
    """How often each of `PARAMETERS` is in each time of the forms of `KINDS`, and the times."""
    factors, times = [], []
    for kind in sorted(KINDS):
        for row in found[kind]:
            backend = VARIANTS[kind].backends.get(row.name.removeprefix("ours ").removesuffix(SUFFIX))
            if row.name.endswith(SUFFIX) and backend is not None:
                forward, backward, _ = backend.launches(SIZES.call(VARIANTS[kind]))
                fused = backend is not VARIANTS[kind].addmm
                factors += [[*by_whom(forward), fused], [*by_whom(forward + backward), 2 * fused]]
                times += [row.forward, row.both]
    return factors, times


def fit(found: Mapping[str, Sequence[Row]]) -> tuple[dict[str, float], list[float]]:
    """Microseconds of `PARAMETERS` by least squares of the relative errors, and measured over modelled times."""
    factors, times = (torch.tensor(t, dtype=torch.float64) for t in equations(found))
    relative = factors / times[:, None]
    made = torch.linalg.lstsq(relative, torch.ones(len(times), 1, dtype=torch.float64)).solution[:, 0]
    return dict(zip(PARAMETERS, made.tolist(), strict=True)), (1 / (relative @ made)).tolist()


def line(found: Mapping[str, Sequence[Row]]) -> str:
    """The fit as text."""
    made, ratios = fit(found)
    values = ", ".join(f"{name} {value:.0f}" for name, value in made.items())
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"fitted to {len(ratios)} times{SUFFIX}: {values}; measured over modelled {spread}"
