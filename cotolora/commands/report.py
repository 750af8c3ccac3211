"""What runs here: versions, devices, and the backend of a typical layer."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections import Counter

import torch

import cotolora
from cotolora.backends import choice, measured

_PACKAGES = ("triton", "safetensors", "peft", "transformers")
_TYPICAL = (2048, 4096, 4096, 16)  # rows, in_features, out_features, rank
_DTYPES = (torch.float32, torch.bfloat16)


def run(options: argparse.Namespace) -> int:
    """Prints the report."""
    print("\n".join(lines(options.verbose)))
    return 0


def lines(verbose: bool) -> list[str]:
    """The report: at most ten lines, unless `verbose`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [
        f"cotolora {cotolora.__version__} · torch {torch.__version__} · python {platform.python_version()}",
        " · ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        _devices(),
    ]
    if verbose:
        for kind in dict.fromkeys(("cpu", device)):
            for dtype in (*_DTYPES, torch.float64):
                found += str(cotolora.explain(_TYPICAL, dtype=dtype, device=kind)).splitlines()
    else:
        for dtype in _DTYPES:
            found += str(cotolora.explain(_TYPICAL, dtype=dtype, device=device)).splitlines()[:1]
    found += _tables()
    return found if verbose else [*found, "python -m cotolora --verbose says more, --help names the commands"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "device: cpu (torch finds no CUDA device)"
    kinds = Counter(
        f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    )
    return "device: cuda, " + "; ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _tables() -> list[str]:
    """Of each kind of CUDA device, whether `python -m benchmarks tune` has left a table."""
    if not torch.cuda.is_available():
        return ["tuned table: none, as there is no CUDA device to tune for"]
    known = {name.removeprefix("triton:") for name in choice.names()}
    found = []
    for name in dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())):
        path = measured.cache_path(name)
        rows = len(measured.load_table(path, known))
        state = f"{rows} rows in {path}" if rows else f"none in {path}; `python -m benchmarks tune` makes one"
        found.append(f"tuned table: {state}")
    return found
