"""Maths on tensors: capture, two-teacher distillation loss. Knows nothing of files."""

from .capture import capture
from .distill import distill_loss
from .linear import head_logits, linear_distill_loss
from .log_partition import log_partition, spline_weights
from .types import (
    IGNORED_LABEL,
    STRATEGY_NAMES,
    TEMPERATURES,
    Capture,
    DistillOutput,
    DistillSpec,
    SparseTeacher,
)

__all__ = [
    "IGNORED_LABEL",
    "STRATEGY_NAMES",
    "TEMPERATURES",
    "Capture",
    "DistillOutput",
    "DistillSpec",
    "SparseTeacher",
    "capture",
    "distill_loss",
    "head_logits",
    "linear_distill_loss",
    "log_partition",
    "spline_weights",
]
