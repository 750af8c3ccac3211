"""``python -m cotolora``: versions, devices, and which backend would run on them and why."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import cotolora


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Prints the report."""
    packages = " · ".join(f"{name} {_version(name)}" for name in ("triton", "safetensors", "peft", "transformers"))
    print(
        f"cotolora {cotolora.__version__} · torch {torch.__version__} · python {platform.python_version()} · {packages}"
    )
    devices = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
        devices.append("cuda")
    else:
        print("no CUDA device")
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            print(cotolora.explain((2048, 4096, 4096, 16), dtype=dtype, device=device))


if __name__ == "__main__":
    main()
