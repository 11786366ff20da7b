"""Settings of the four gates: a module without torch, for whoever only checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.config import explain
from logitcache.errors import UsageError


class GateSettings(BaseModel):
    """Settings of the gates; scores are shares from 0 to 1, drift is in bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float = Field(default=0.05, ge=0, le=1, description="recall may fall this far")
    delta: float = Field(default=0.02, ge=0, le=1, description="generalize must rise this far")
    theta: float = Field(default=0.05, ge=0, le=2, description="drift may be this large")
    min_items: int = Field(default=8, ge=1, description="of recall and of generalize")
    min_tone_items: int = Field(default=4, ge=2, description="of tone; two halves are compared")
    max_new_tokens: int = Field(default=64, ge=1, le=1 << 16, description="of a greedy generation")
    bootstrap_samples: int = Field(
        default=1000, ge=0, le=100_000, description="resamples of the items"
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="of the intervals")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of resamples and halves")
    time_limit_s: float | None = Field(
        default=None, gt=0, description="of one gate; None: no limit"
    )


def gate_settings(values: Mapping[str, Any]) -> GateSettings:
    """Validate settings of the gates; UsageError names each wrong one."""
    try:
        return GateSettings(**values)
    except ValidationError as error:
        raise UsageError(
            explain(error), f"settings of the gates: {', '.join(GateSettings.model_fields)}"
        ) from None
