"""The store of teacher distributions and its builder. Knows nothing of students."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .builder import build
    from .config import BuildConfig
    from .errors import LogitCacheError
    from .reader import StoreReader, TeacherBatch, open_store
    from .torch_dataset import as_torch_dataset

__all__ = [
    "BuildConfig",
    "LogitCacheError",
    "StoreReader",
    "TeacherBatch",
    "as_torch_dataset",
    "build",
    "open_store",
]

# Loaded on first use: `logitcache --help` must not import zarr, and info not torch.
_HOME = {
    "as_torch_dataset": "torch_dataset",
    "build": "builder",
    "BuildConfig": "config",
    "LogitCacheError": "errors",
    "StoreReader": "reader",
    "TeacherBatch": "reader",
    "open_store": "reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
