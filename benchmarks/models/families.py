"""A small model of every family of timm; a family is a module that registers models."""

from __future__ import annotations

import importlib
import inspect
import re

import torch

from benchmarks.models.tiny import perturbed
from benchmarks.models.trial import NotBuiltError, Subject, outputs, seed
from benchmarks.workload import reason

# parts of the names of small models, smallest first
SMALL = (
    "test",
    "atto",
    "femto",
    "pico",
    "nano",
    "zepto",
    "xxs",
    "_xxt",
    "tiny",
    "_t0",
    "micro",
    "xs",
    "mini",
    "small",
    "_s",
    "_t",
)
CANDIDATES = 6
LIMIT = 60_000_000  # parameters; more than for transformers, because timm's sizes are fixed by the model name


def why_not() -> str:
    """The reason why timm cannot be used; an empty string if it can."""
    try:
        importlib.import_module("timm")
    except Exception as error:  # a torchvision for another version of torch raises other errors than ImportError
        return reason(error)
    return ""


def families() -> dict[str, list[str]]:
    """The models of each family, smallest first as far as the names tell."""
    if why_not():
        return {}
    import timm
    from timm.models import _registry

    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(_registry._model_to_module[name], []).append(name)

    def size(name: str) -> tuple[int, list[int], int, str]:
        kind = next((i for i, part in enumerate(SMALL) if part in name), len(SMALL))
        return kind, [int(digits) for digits in re.findall(r"\d+", name)], len(name), name

    return {family: sorted(names, key=size) for family, names in found.items()}


def architectures() -> dict[str, str]:
    """The first model to try of each family."""
    return {family: names[0] for family, names in families().items()}


def subject(family: str, name: str) -> Subject:
    """A small model of a family and an image for it."""
    reasons = []
    for candidate in families()[family][:CANDIDATES]:
        try:
            return _subject(candidate)
        except NotBuiltError as error:
            reasons.append(f"{candidate}: {error}")
    raise NotBuiltError(reasons[0])


def _subject(name: str) -> Subject:
    import timm

    too_large = why = ""
    sizes: list[tuple[dict[str, int], int | None]] = [({"img_size": 64}, 64), ({}, 64), ({}, None)]
    # then with two layers, for models that are too large otherwise and take a depth
    for options, side in [*sizes, *(({"depth": 2, **options}, side) for options, side in sizes)]:
        try:
            with torch.device("meta"):
                made = timm.create_model(name, pretrained=False, **options)
            size = sum(p.numel() for p in made.parameters())
            if size > LIMIT:
                too_large = too_large or f"too large: {size:,d} parameters"
                continue
            seed()
            model = perturbed(timm.create_model(name, pretrained=False, **options).eval())
            channels, height, width = model.default_cfg.get("input_size", (3, 64, 64))
            seed()
            image = torch.randn(2, channels, *((height, width) if side is None else (side, side)))
            inputs = {next(iter(inspect.signature(model.forward).parameters)): image}
            outputs(model, inputs)
            return Subject(model, inputs)
        except Exception as error:
            why = f"cannot be made or called: {reason(error)}"
    raise NotBuiltError(too_large or why)
