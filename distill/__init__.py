"""Training students from a store, evaluating them, and keeping their lineage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DistillConfig
    from .trainer import DistillTrainer

__all__ = ["DistillConfig", "DistillTrainer"]

# Loaded on first use: `distill --help` must not import torch.
_HOME = {"DistillConfig": "config", "DistillTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
