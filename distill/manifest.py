"""The evolution manifest: one JSON document that says what a lineage turn is to do.

Everything that is wrong with one is found at once: what pydantic finds (unknown, missing and wrong
fields), what contradicts something else, settings that training or building would refuse, and files
that are not there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logitcache.config import BuildConfig
from logitcache.errors import UsageError

from .gate_settings import GateSettings
from .lineage import ID_PATTERN
from .replay import FRACTION

METHOD, TRAINING_METHOD = "logit_blending_kd", "teacher_student_distillation"
_MAX_MANIFEST_BYTES = 1 << 20
_AVERAGES_WEIGHTS = re.compile(
    r"averag|slerp|merg|soup|fisher|arithmetic|interpol|stock|(?<![a-z])(ties|dare|lerp)(?![a-z])",
    re.IGNORECASE,
)
NO_AVERAGE = (
    "averages weights, which breaks a model: two generations lie in different basins, and their "
    "neurons are ordered differently (permutation symmetry); here their predictions are blended"
)
# What the manifest calls a setting, and what DistillConfig does.
PARAMETERS = {
    **{name: name for name in ("alpha", "beta", "gamma", "temperature")},
    "steps": "max_steps",
    "lr": "learning_rate",
}
_SET_ELSEWHERE = {
    **{field: f"training_params.{name}" for name, field in PARAMETERS.items()},
    "ema_decay": "stabilizers.ema_decay",
    "taboo": "taboo.mode",
    "taboo_words": "taboo.words",
    "taboo_variants": "taboo.variants",
    "laws": "laws",
    "suite": "data.suite",
}
_BUILD_ELSEWHERE = ("teacher1", "teacher2", "data", "out", "shard")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class EvolutionRequest(_Section):
    parent_gen: str = Field(pattern=f"^{ID_PATTERN}$", description="id of teacher 1's generation")
    grandparent_gen: str = Field(
        pattern=f"^{ID_PATTERN}$", description="id of teacher 2's generation"
    )
    child_gen: str = Field(pattern=f"^{ID_PATTERN}$", description="id of the generation to raise")
    training_method: Literal["teacher_student_distillation"]


class Teacher1(_Section):
    gen: int = Field(ge=0, description="number of the generation")
    role: Literal["primary"]
    path: Path = Field(description="transformers folder")


class Teacher2(_Section):
    gen: int = Field(ge=0, description="number of the generation")
    role: Literal["stabilizing_critic"]
    path: Path = Field(description="transformers folder")


class Teachers(_Section):
    teacher1: Teacher1
    teacher2: Teacher2


class TrainingParams(_Section):
    method: Literal["logit_blending_kd"]
    alpha: float = Field(ge=0, description="weight of cross entropy with gold labels")
    beta: float = Field(ge=0, description="weight of T^2 * divergence from the gated target")
    gamma: float = Field(ge=0, description="weight of the agreement term")
    temperature: float = Field(gt=0, description="T of the divergence")
    steps: int = Field(ge=1, description="optimizer steps")
    lr: float = Field(gt=0, description="learning rate")


class Stabilizers(_Section):
    ema: bool = Field(description="whether averaged weights are evaluated and promoted")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="needed with ema")
    replay_buffer: bool = Field(description="whether data of earlier generations is replayed")
    replay_size: int | None = Field(
        None, ge=1, description="documents of each earlier generation; needed with replay_buffer"
    )
    token_masking: bool = Field(description="whether the words of the section taboo are masked")


class Data(_Section):
    train: tuple[Path, ...] = Field(
        default=(), description="texts to learn from, as of logitcache build"
    )
    gold: tuple[Path, ...] = Field(
        default=(), description="curated texts: only their labels are gold"
    )
    suite: Path | None = Field(
        default=None, description="JSONL of the gates; else that of the parent"
    )


class Replay(_Section):
    fraction: float = Field(
        default=FRACTION, gt=0, lt=1, description="of the mix that is replayed, at most"
    )
    seed: int = Field(default=0, ge=0, description="of the sample")
    data: dict[str, tuple[Path, ...]] = Field(
        default={},
        description="what the two teachers were trained on, by id, when they are registered",
    )


class Taboo(_Section):
    words: Path = Field(description="file with one word or phrase a line")
    variants: bool = Field(False, description="case variants too")
    mode: Literal["target", "neutral"] = Field("target", description="as DistillSpec.taboo")


class Manifest(_Section):
    """One turn of a lineage, from its two youngest generations to the next. Paths are relative to
    the manifest's folder."""

    evolution_request: EvolutionRequest
    teachers: Teachers
    training_params: TrainingParams
    stabilizers: Stabilizers
    lineage: Path = Field(Path("lineage"), description="folder of the lineage")
    data: Data = Field(Data(), description="files")
    replay: Replay | None = Field(None, description="how data of earlier generations is replayed")
    taboo: Taboo | None = Field(None, description="words that the child is to keep from")
    gates: GateSettings = Field(GateSettings(), description="settings of the four gates")
    laws: Path | None = Field(None, description="JSON or YAML file of rules")
    store: dict[str, Any] = Field(
        {}, description="options of logitcache build, such as seq_len or estimator"
    )
    train: dict[str, Any] = Field({}, description="fields of TrainingArguments and DistillSpec")
    output: Path | None = Field(None, description="work folder; runs/CHILD_GEN unless given")


@dataclass(frozen=True)
class Turn:
    """A manifest whose paths are resolved. document: as it was written."""

    manifest: Manifest
    document: dict[str, Any]
    folder: Path

    def path(self, path: Path) -> Path:
        return self.folder / path

    @property
    def lineage(self) -> Path:
        return self.path(self.manifest.lineage)

    @property
    def output(self) -> Path:
        child = self.manifest.evolution_request.child_gen
        return self.path(self.manifest.output or Path("runs") / child)

    def training_settings(self) -> dict[str, Any]:
        """Settings of DistillConfig."""
        given, stabilizers = self.manifest.training_params, self.manifest.stabilizers
        settings = {field: getattr(given, name) for name, field in PARAMETERS.items()}
        settings["ema_decay"] = stabilizers.ema_decay if stabilizers.ema else 0.0
        taboo = self.manifest.taboo
        if stabilizers.token_masking and taboo is not None:
            settings["taboo"] = taboo.mode
            settings["taboo_words"] = str(self.path(taboo.words))
            settings["taboo_variants"] = taboo.variants
        if self.manifest.laws is not None:
            settings["laws"] = str(self.path(self.manifest.laws))
        return {**settings, **self.manifest.train}


def schema() -> dict[str, Any]:
    """JSON Schema of a manifest."""
    return Manifest.model_json_schema()


def read_manifest(path: Path) -> Turn:
    """Read and check a manifest. UsageError names every problem, with its place and what was
    expected."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file", "give the manifest of a turn, a JSON file")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise UsageError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes")
    problems: list[str] = []

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        problems.extend(
            f"{key}: given twice" for key in sorted({k for k in keys if keys.count(k) > 1})
        )
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text, object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}", "see `distill evolve --schema`") from None
    if not isinstance(document, dict):
        raise UsageError(
            f"{path}: expected an object, found {type(document).__name__}",
            "see `distill evolve --schema`",
        )
    manifest = None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        problems += _explained(error)
    problems += _contradictions(document)
    problems += _wrong_settings(document)
    problems += _missing_files(document, path.absolute().parent)
    if problems or manifest is None:
        found = sorted(set(problems))
        count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise UsageError(
            f"{path}: {count}:\n  " + "\n  ".join(found),
            "see `distill evolve --schema`, and docs/lineage.md",
        )
    return Turn(manifest, document, path.absolute().parent)


def _explained(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
        if kind == "json_invalid":
            yield f"not JSON: {message}"
        elif kind == "extra_forbidden":
            yield f"{place}: no such key{_better_place(place)}"
        elif kind == "missing":
            yield f"{place}: is missing{_wanted(problem['loc'])}"
        elif kind == "literal_error" and place.endswith("method"):
            expected, found = problem["ctx"]["expected"], problem["input"]
            why = ""
            if isinstance(found, str) and _AVERAGES_WEIGHTS.search(found):
                why = f"; {found} {NO_AVERAGE}"
            yield f"{place}: expected {expected}, found {found!r}{why}"
        else:
            expected = message.replace("Input should be", "expected", 1)
            yield f"{place}: {expected}, found {_brief(problem['input'])}"


def _better_place(place: str) -> str:
    section, _, name = place.rpartition(".")
    if section not in ("training_params", "stabilizers"):
        return ""
    from .config import DistillConfig

    known = {field.name for field in dataclasses.fields(DistillConfig)}
    return "; it belongs into the section train" if name in known else ""


def _wanted(place: tuple[int | str, ...]) -> str:
    """What the schema says of a field, as '; expected ...'."""
    model: Any = Manifest
    for part in place[:-1]:
        field = model.model_fields.get(str(part))
        model = None if field is None else field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ""
    field = model.model_fields.get(str(place[-1]))
    if field is None:
        return ""
    kind = getattr(field.annotation, "__name__", str(field.annotation))
    described = f" ({field.description})" if field.description else ""
    if getattr(field.annotation, "__args__", None):
        kind = " or ".join(repr(value) for value in field.annotation.__args__)
    return f"; expected {kind}{described}"


def _contradictions(document: Mapping[str, Any]) -> Iterator[str]:
    """What does not go together, as far as the values concerned can be read."""
    request, stabilizers = _part(document, "evolution_request"), _part(document, "stabilizers")
    names = {key: request.get(key) for key in ("parent_gen", "grandparent_gen", "child_gen")}
    for key, other in (
        ("child_gen", "parent_gen"),
        ("child_gen", "grandparent_gen"),
        ("grandparent_gen", "parent_gen"),
    ):
        if names[key] is not None and names[key] == names[other]:
            yield f"evolution_request.{key}: expected another id than {other}, found {names[key]!r}"
    teachers = _part(document, "teachers")
    for teacher, key in (("teacher1", "parent_gen"), ("teacher2", "grandparent_gen")):
        number = _part(teachers, teacher).get("gen")
        named = re.search(r"G0*(\d+)$", str(names[key] or ""))
        if named and isinstance(number, int) and str(number) != named[1]:
            yield f"teachers.{teacher}.gen: expected {named[1]} as in {key}, found {number}"
    for switch, value in (("ema", "ema_decay"), ("replay_buffer", "replay_size")):
        if stabilizers.get(switch) is True and stabilizers.get(value) is None:
            yield f"stabilizers.{value}: is missing; expected a number, because {switch} is true"
    if stabilizers.get("token_masking") is True and not document.get("taboo"):
        yield "taboo: is missing; expected words, because stabilizers.token_masking is true"
    params = _part(document, "training_params")
    weights = [params.get(name) for name in ("alpha", "beta", "gamma")]
    if all(isinstance(w, (int, float)) and w == 0 for w in weights):
        yield "training_params: alpha, beta and gamma are all 0; expected something to learn from"
    known = {str(names["parent_gen"]), str(names["grandparent_gen"])}
    for name in _part(_part(document, "replay"), "data"):
        if name not in known:
            yield f"replay.data.{name}: expected parent_gen or grandparent_gen"
    for name in _part(document, "train"):
        if name in _SET_ELSEWHERE:
            yield f"train.{name}: is set by {_SET_ELSEWHERE[name]}"
    for name in _part(document, "store"):
        if name in _BUILD_ELSEWHERE:
            yield f"store.{name}: is set by the manifest's other sections"


def _wrong_settings(document: Mapping[str, Any]) -> Iterator[str]:
    """What `logitcache build` and `distill train` would refuse."""
    from .config import check_settings

    train = {k: v for k, v in _part(document, "train").items() if k not in _SET_ELSEWHERE}
    if train:
        try:
            check_settings(train)
        except UsageError as error:
            yield from (f"train.{line}" for line in str(error).splitlines())
    store = {k: v for k, v in _part(document, "store").items() if k not in _BUILD_ELSEWHERE}
    try:
        config = BuildConfig(teacher1=Path(), data=(Path(),), out=Path(), **store)
    except ValidationError as error:
        yield from (f"store.{line}" for line in _explained(error))
        return
    divergence = train.get("divergence", "forward_kl")
    if config.estimator == "sampled" and divergence != "forward_kl":
        yield (
            f"train.divergence: sampled stores allow forward_kl only, found {divergence!r}; "
            "or set store.estimator to topk"
        )
    masked = _part(document, "stabilizers").get("token_masking") is True
    mode = _part(document, "taboo").get("mode", "target")
    if divergence == "reverse_kl" and masked and mode == "target":
        yield "taboo.mode: expected neutral, because train.divergence is reverse_kl"
    if train.get("eval_strategy", "no") != "no" and not train.get("eval_rows"):
        yield "train.eval_strategy: needs held-out rows: expected train.eval_rows"
    temperature = _part(document, "training_params").get("temperature")
    if isinstance(temperature, (int, float)) and 0 < temperature < 0.5:
        yield (
            "training_params.temperature: expected at least 0.5, the smallest of a store, found "
            f"{temperature:g}"
        )
    highest = config.sample_temperature if config.estimator == "sampled" else 4.0
    if isinstance(temperature, (int, float)) and temperature > highest:
        yield (
            f"training_params.temperature: expected at most {highest:g}, "
            f"which the store allows, found {temperature:g}"
        )


def _missing_files(document: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Paths at which there is nothing of the kind."""
    teachers = _part(document, "teachers")
    for name in ("teacher1", "teacher2"):
        path = _part(teachers, name).get("path")
        if isinstance(path, str) and not (folder / path / "config.json").is_file():
            yield (
                f"teachers.{name}.path: expected a transformers folder, found "
                f"{'none' if not (folder / path).exists() else 'no config.json'} at {folder / path}"
            )
    data, replay = _part(document, "data"), _part(document, "replay")
    lists = {f"data.{key}": data.get(key) for key in ("train", "gold")}
    lists |= {f"replay.data.{name}": files for name, files in _part(replay, "data").items()}
    for place, paths in lists.items():
        for path in paths if isinstance(paths, list) else []:
            if isinstance(path, str) and not (folder / path).exists():
                yield f"{place}: expected a file or folder, found nothing at {folder / path}"
    single = {"data.suite": data.get("suite"), "laws": document.get("laws")}
    single["taboo.words"] = _part(document, "taboo").get("words")
    for place, path in single.items():
        if isinstance(path, str) and not (folder / path).is_file():
            yield f"{place}: expected a file, found none at {folder / path}"


def _part(document: Any, name: str) -> dict[str, Any]:
    part = document.get(name) if isinstance(document, Mapping) else None
    return part if isinstance(part, dict) else {}


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
