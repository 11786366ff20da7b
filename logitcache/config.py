"""Settings of a command: flag > --set > file > default, unknown keys refused."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UsageError

_MAX_CONFIG_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without the surprises of its version 1.1: no, off and their kin are text, 5e-5 is a
    number."""

    yaml_implicit_resolvers: ClassVar = {
        letter: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:bool"]
        for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.I), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
)


def read_settings(
    file: Path | None, assignments: Sequence[str], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge a YAML or JSON file, key=value assignments and flags (None or () = not given) into one
    dict."""
    settings: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise UsageError(f"--config {file}: no such file")
        try:
            content = load_yaml(file)
        except ValueError as error:
            raise UsageError(f"--config {file}: {error}") from None
        if content is not None and not isinstance(content, dict):
            raise UsageError(
                f"--config {file}: expected keys and values, found {type(content).__name__}"
            )
        settings.update(content or {})
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {assignment}: expected key=value")
        try:
            settings[key.strip()] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {assignment}: {error}") from None
    settings.update(
        {key: value for key, value in flags.items() if value is not None and value != ()}
    )
    return settings


def load_yaml(file: Path) -> Any:
    """The content of a YAML or JSON file; ValueError if it is neither, or larger than 1 MB."""
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"larger than {_MAX_CONFIG_BYTES} bytes")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"not YAML or JSON: {what}") from None


def explain(error: ValidationError) -> str:
    """One line per problem of a pydantic validation."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: no such setting")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "missing":
                message = "this setting is needed, and was not given"
            elif where:
                message += f", found {problem['input']!r}"
            lines.append(f"{where}: {message}" if where else message)
    return "\n".join(lines)


class BuildConfig(BaseModel):
    """Settings of ``logitcache build``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher1: Path = Field(description="folder of the current generation, the primary teacher")
    teacher2: Path | None = Field(
        None, description="folder of the generation before it, the critic"
    )
    data: tuple[Path, ...] = Field(
        min_length=1, description="JSONL, Parquet, text, datasets folders"
    )
    out: Path = Field(description="folder of the store")
    estimator: Literal["sampled", "topk", "full"] = Field("sampled", description="what is kept")
    min_prob: float | None = Field(
        None, ge=0, le=1, description="kept for certain from here; 0.005 (sampled) or 0.002 (topk)"
    )
    threshold: float = Field(0.05, ge=1e-6, le=1, description="sampled: inclusion is r / threshold")
    sample_temperature: float = Field(2.0, ge=1, le=4, description="sampled: largest T of training")
    top_k: int = Field(128, ge=1, le=256, description="topk: entries kept at most")
    precision: Literal["standard", "high"] = Field(
        "standard",
        description="of kept probabilities: KL of rounding some 3e-3, or below 5e-4",
    )
    seq_len: int = Field(2048, ge=2, le=1 << 20, description="tokens in a row")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the sampled estimator")
    on_nonfinite: Literal["fail", "skip"] = Field(
        "fail", description="NaN or infinity from a teacher"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of a teacher's weights: bfloat16 on a GPU, float32 on a CPU"
    )
    device_map: Literal["auto"] | None = Field(
        None, description="auto: a teacher's layers over all GPUs of one process"
    )
    tp_plan: Literal["auto"] | None = Field(
        None, description="auto: a teacher's layers in shards over all processes of torchrun"
    )
    batch_tokens: int | None = Field(None, ge=1, description="tokens in a teacher's forward pass")
    shard: str | None = Field(
        None, pattern=r"^\d+/[1-9]\d*$", description="I/N: this worker's share"
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            if isinstance(values.get("data"), (str, Path)):
                values["data"] = [values["data"]]
            if values.get("min_prob") is None:
                values["min_prob"] = {"topk": 0.002, "full": 0.0}.get(
                    str(values.get("estimator", "sampled")), 0.005
                )
        return values

    @model_validator(mode="after")
    def _check(self) -> BuildConfig:
        if self.estimator == "sampled":
            # Positions that keep more than 256 entries cannot be stored; these bounds make that a
            # five-sigma event: 1/min_prob certain ones, or 2/threshold drawn ones.
            assert self.min_prob is not None
            most = 1 / max(self.min_prob, self.threshold / 50)
            if most > 220 or 2 / self.threshold + 5 * (2 / self.threshold) ** 0.5 > 250:
                raise ValueError(
                    "sampled supports hold at most 256 entries: expected min_prob >= 0.0046 and "
                    f"threshold >= 0.0115, found {self.min_prob:g} and {self.threshold:g}"
                )
        if self.device_map is not None and self.tp_plan is not None:
            raise ValueError("device_map, tp_plan: expected one of them, found both")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.device_map is not None and (self.device != "auto" or world > 1):
            raise ValueError(
                "device_map: takes all GPUs in one process; expected device auto and no torchrun, "
                f"found device {self.device} and {world} processes"
            )
        if self.tp_plan is not None and (self.shard is not None or world < 2):
            raise ValueError(
                "tp_plan: one teacher over all processes; expected torchrun with two or more and "
                f"no shard, found {world} and shard {self.shard}"
            )
        if self.shard is not None:
            index, count = self.worker
            if index >= count:
                raise ValueError(f"shard: expected I/N with I < N, found {self.shard}")
        return self

    @property
    def worker(self) -> tuple[int, int]:
        """This worker's number and how many there are."""
        index, _, count = (self.shard or "0/1").partition("/")
        return int(index), int(count)


def torchrun_share() -> str | None:
    """The share I/N of a process that torchrun has started; None elsewhere."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}"


def build_config(settings: Mapping[str, Any]) -> BuildConfig:
    """Validate settings; UsageError names each wrong one."""
    try:
        return BuildConfig(**settings)
    except ValidationError as error:
        raise UsageError(explain(error), "see `logitcache build --help`") from None
