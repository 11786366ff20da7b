"""What a run ran on, for run records."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

_PACKAGES = (
    "logitcache",
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "zarr",
    "zstandard",
    "triton",
)


def gpu_memory_peak_bytes() -> int | None:
    """Most memory that torch has held on the GPU of this process; None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return int(torch.cuda.max_memory_allocated())


def describe_environment() -> dict[str, Any]:
    """Versions and hardware. Imports torch only if it has been imported."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "gpus": gpus,
    }
