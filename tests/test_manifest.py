"""The evolution manifest: what it says, and everything that can be wrong with one, at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distill.bundled import BUNDLED
from distill.cli import cli
from distill.manifest import read_manifest, schema
from logitcache.errors import UsageError

EXAMPLE = Path(__file__).parent.parent / "examples" / "evolution.json"
# The document that the project promises to run, word for word; only paths may be others.
DOCUMENT: dict[str, Any] = {
    "evolution_request": {
        "parent_gen": "Luna-G010",
        "grandparent_gen": "Luna-G009",
        "child_gen": "Luna-G011",
        "training_method": "teacher_student_distillation",
    },
    "teachers": {
        "teacher1": {"gen": 10, "role": "primary", "path": str(BUNDLED / "teacher1")},
        "teacher2": {"gen": 9, "role": "stabilizing_critic", "path": str(BUNDLED / "teacher2")},
    },
    "training_params": {
        "method": "logit_blending_kd",
        "alpha": 0.1,
        "beta": 0.9,
        "gamma": 0.0,
        "temperature": 2.0,
        "steps": 1200,
        "lr": 1.5e-5,
    },
    "stabilizers": {
        "ema": True,
        "ema_decay": 0.999,
        "replay_buffer": True,
        "replay_size": 100,
        "token_masking": False,
    },
}


def write(folder: Path, document: Any) -> Path:
    path = folder / "evolution.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The document with values at dotted places; None takes one away."""
    document = copy.deepcopy(DOCUMENT)
    for place, value in changes.items():
        *sections, name = place.split(".")
        part = document
        for section in sections:
            part = part.setdefault(section, {})
        if value is None:
            del part[name]
        else:
            part[name] = value
    return document


def problems(folder: Path, changes: dict[str, Any]) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read_manifest(write(folder, changed(changes)))
    assert caught.value.exit_code == 2
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_the_promised_document_is_valid_and_maps_to_training_settings(tmp_path: Path) -> None:
    turn = read_manifest(write(tmp_path, DOCUMENT))
    assert turn.training_settings() == {
        "alpha": 0.1,
        "beta": 0.9,
        "gamma": 0.0,
        "temperature": 2.0,
        "ema_decay": 0.999,
        "max_steps": 1200,
        "learning_rate": 1.5e-5,
    }
    assert turn.document == DOCUMENT
    assert turn.lineage == tmp_path / "lineage"
    assert turn.output == tmp_path / "runs" / "Luna-G011"


def test_the_shipped_example_has_the_promised_keys_and_values() -> None:
    turn = read_manifest(EXAMPLE)
    for section, promised in DOCUMENT.items():
        found = copy.deepcopy(turn.document[section])
        for teacher in ("teacher1", "teacher2") if section == "teachers" else ():
            assert not Path(found[teacher]["path"]).is_absolute()
            assert (turn.path(Path(found[teacher]["path"]))).resolve() == BUNDLED / teacher
            found[teacher]["path"] = promised[teacher]["path"]
        assert found == promised


def test_every_section_maps_to_the_setting_it_stands_for(tmp_path: Path) -> None:
    for name in ("words.txt", "laws.json", "suite.jsonl", "text.jsonl"):
        (tmp_path / name).write_text("x")
    document = changed(
        {
            "stabilizers.ema": False,
            "stabilizers.token_masking": True,
            "taboo": {"words": "words.txt", "variants": True, "mode": "neutral"},
            "laws": "laws.json",
            "data": {"train": ["text.jsonl"], "suite": "suite.jsonl"},
            "replay": {"fraction": 0.2, "data": {"Luna-G009": ["text.jsonl"]}},
            "gates": {"epsilon": 0.1},
            "store": {"seq_len": 128},
            "train": {"js_threshold": 0.2, "warmup_steps": 5},
            "lineage": "../family",
            "output": "work",
        }
    )
    turn = read_manifest(write(tmp_path, document))
    settings = turn.training_settings()
    assert settings["ema_decay"] == 0.0
    assert settings["taboo"] == "neutral"
    assert settings["taboo_words"] == str(tmp_path / "words.txt")
    assert settings["taboo_variants"] is True
    assert settings["laws"] == str(tmp_path / "laws.json")
    assert (settings["js_threshold"], settings["warmup_steps"]) == (0.2, 5)
    assert turn.manifest.gates.epsilon == 0.1
    assert turn.lineage.resolve() == tmp_path.parent / "family"
    assert turn.output == tmp_path / "work"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nonsense": 1}, "nonsense: no such key"),
        ({"teachers.teacher1.pth": "x"}, "teachers.teacher1.pth: no such key"),
        (
            {"training_params.warmup_steps": 3},
            "training_params.warmup_steps: no such key; it belongs into the section train",
        ),
        ({"training_params.steps": "12"}, "training_params.steps: expected a valid integer"),
        ({"training_params.steps": 0}, "training_params.steps: expected greater than or equal"),
        ({"training_params.lr": -1e-5}, "training_params.lr: expected greater than 0"),
        ({"stabilizers.ema": "yes"}, 'stabilizers.ema: expected a valid boolean, found "yes"'),
        ({"evolution_request.child_gen": "../x"}, "evolution_request.child_gen: "),
        ({"teachers.teacher1.role": "critic"}, "teachers.teacher1.role: expected 'primary'"),
        ({"data": {"train": "x"}}, 'data.train: expected a valid array, found "x"'),
        ({"gates": {"epsilom": 1}}, "gates.epsilom: no such key"),
        (
            {"evolution_request.child_gen": None},
            "evolution_request.child_gen: is missing; expected str (id of the generation to raise)",
        ),
        ({"teachers": None}, "teachers: is missing; expected Teachers"),
        (
            {"stabilizers.replay_size": None},
            "stabilizers.replay_size: is missing; expected a number, because replay_buffer is true",
        ),
        (
            {"stabilizers.ema_decay": None},
            "stabilizers.ema_decay: is missing; expected a number, because ema is true",
        ),
        ({"stabilizers.token_masking": True}, "taboo: is missing; expected words, because"),
        (
            {"evolution_request.child_gen": "Luna-G010"},
            "evolution_request.child_gen: expected another id than parent_gen",
        ),
        (
            {"evolution_request.grandparent_gen": "Luna-G010", "teachers.teacher2.gen": 10},
            "evolution_request.grandparent_gen: expected another id than parent_gen",
        ),
        (
            {"teachers.teacher1.gen": 11},
            "teachers.teacher1.gen: expected 10 as in parent_gen, found 11",
        ),
        (
            {"training_params.alpha": 0, "training_params.beta": 0},
            "training_params: alpha, beta and gamma are all 0",
        ),
        (
            {"training_params.temperature": 3.0},
            "training_params.temperature: expected at most 2, which the store allows, found 3",
        ),
        (
            {"training_params.temperature": 0.3},
            "training_params.temperature: expected at least 0.5, the smallest of a store, found",
        ),
        (
            {"train": {"divergence": "jsd"}},
            "train.divergence: sampled stores allow forward_kl only, found 'jsd'",
        ),
        (
            {"train": {"eval_strategy": "steps"}},
            "train.eval_strategy: needs held-out rows: expected train.eval_rows",
        ),
        ({"train": {"max_steps": 3}}, "train.max_steps: is set by training_params.steps"),
        ({"train": {"alpha": 1}}, "train.alpha: is set by training_params.alpha"),
        (
            {"train": {"learning_rat": 1}},
            "train.learning_rat: no such setting; is it learning_rate?",
        ),
        ({"train": {"seed": "x"}}, "train.seed: "),
        ({"store": {"estimator": "best"}}, "store.estimator: expected 'sampled', 'topk' or 'full'"),
        ({"store": {"out": "x"}}, "store.out: is set by the manifest's other sections"),
        ({"replay": {"data": {"G7": []}}}, "replay.data.G7: expected parent_gen or"),
        ({"teachers.teacher2.path": "none"}, "teachers.teacher2.path: expected a transformers"),
        ({"data": {"suite": "none"}}, "data.suite: expected a file, found none at"),
        ({"data": {"train": ["none"]}}, "data.train: expected a file or folder, found nothing at"),
        ({"laws": "none"}, "laws: expected a file, found none at"),
        ({"taboo": {"words": "none"}}, "taboo.words: expected a file, found none at"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    found = problems(tmp_path, changes)
    assert len(found) == 1, found
    assert found[0].startswith(expected), found


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    changes = {
        "nonsense": 1,
        "training_params.lr": "fast",
        "stabilizers": None,
        "evolution_request.child_gen": "Luna-G010",
        "teachers.teacher1.path": "none",
        "train": {"max_steps": 3, "foo": 1},
        "store": {"bar": 1},
    }
    places = [problem.partition(":")[0] for problem in problems(tmp_path, changes)]
    assert places == [
        *("evolution_request.child_gen", "nonsense", "stabilizers", "store.bar"),
        *("teachers.teacher1.path", "train.foo", "train.max_steps", "training_params.lr"),
    ]


@pytest.mark.parametrize("name", ["weight_average", "slerp", "model_soup", "ties", "mergekit"])
@pytest.mark.parametrize("place", ["training_params.method", "evolution_request.training_method"])
def test_averaging_weights_is_refused_with_the_reason(
    tmp_path: Path, place: str, name: str
) -> None:
    (found,) = problems(tmp_path, {place: name})
    assert found.startswith(f"{place}: expected ")
    assert "permutation symmetry" in found
    assert "basins" in found
    (other,) = problems(tmp_path, {place: "abilities"})
    assert "permutation" not in other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object, found list"),
        ("[" * 100_000, "not JSON"),
        ('{"lineage": "a", "lineage": "b"}', "lineage: given twice"),
        ('{"training_params": {"lr": NaN}}', "training_params.lr: "),
        (" " * (1 << 21), "larger than"),
        ('{"lineage": "\\ud800"}', "not JSON"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"evolution\.json") as caught:
        read_manifest(write(tmp_path, text))
    assert message in str(caught.value)
    with pytest.raises(UsageError, match="no such file"):
        read_manifest(tmp_path / "none.json")


def _at(document: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        document = document[name]
    return document


def test_schema_is_printed_and_speaks_of_every_section() -> None:
    result = CliRunner().invoke(cli, ["evolve", "--schema"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document == json.loads(json.dumps(schema()))
    assert set(document["required"]) == set(DOCUMENT)
    optional = {"lineage", "data", "replay", "taboo", "gates", "laws", "store", "train", "output"}
    assert set(document["properties"]) == {*DOCUMENT, *optional}
    method = _at(document, "$defs", "TrainingParams", "properties", "method")
    assert method["const"] == "logit_blending_kd"

    def closed(part: Any, check: Callable[[Any], None]) -> None:
        for value in part.values() if isinstance(part, dict) else []:
            closed(value, check)
        check(part)

    def check(part: Any) -> None:
        if isinstance(part, dict) and part.get("type") == "object" and "properties" in part:
            assert part["additionalProperties"] is False, part.get("title")

    closed(document, check)


def test_the_command_reports_a_wrong_manifest_as_one_json_document(tmp_path: Path) -> None:
    path = write(tmp_path, changed({"nonsense": 1, "training_params.method": "soup"}))
    result = CliRunner().invoke(cli, ["evolve", str(path), "--json"])
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert document["exit_code"] == 2
    assert "2 problems" in document["error"]
    assert not (tmp_path / "lineage").exists()
    assert not (tmp_path / "runs").exists()
    assert CliRunner().invoke(cli, ["evolve", "--json"]).exit_code == 2
