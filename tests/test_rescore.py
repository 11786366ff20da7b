"""verify --rescore: the teachers' own stores pass, another teacher's or another text's do not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import make_model, sentences, write_jsonl

import logitcache.layout
from logitcache import build
from logitcache.cli import cli
from logitcache.errors import UsageError
from logitcache.files import to_json
from logitcache.rescore import rescore_drawn, teacher_folders
from logitcache.store import digest, load_store

SEQ_LEN = 48


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def perturb(folder: Path, share: float) -> None:
    """Change a model's weights by this share of their size."""
    weights = load_file(folder / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, values in weights.items():
        weights[name] = values + share * values.std() * torch.randn(values.shape, generator=noise)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    records = [{"text": t} for t in sentences(20, seed=5) + sentences(3, seed=6, words=90)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", records)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sample_temperature": 1.3, "precision": "high"},
        {"estimator": "topk", "top_k": 9},
        {"estimator": "topk", "min_prob": 0.0, "top_k": 9},
        {"estimator": "full"},
    ],
    ids=str,
)
def test_a_store_is_as_far_from_its_teachers_as_quantisation_is(
    tmp_path, teacher1, teacher2, data, settings
):
    given = {"teacher1": teacher1, "teacher2": teacher2}
    store = build(data=(data,), seq_len=SEQ_LEN, out=tmp_path / "store", **given, **settings)
    result = rescore_drawn(store, teacher_folders(store, given), 5, seed=1)
    assert result.alike
    for teacher in result.teachers:
        assert teacher.positions > 100
        assert teacher.unlike_positions == 0
        assert teacher.supports["store"] <= 1
        assert teacher.mean("quantisation", "kl") > 1e-6
        for name in ("kl", "entropy", "top1_logp", "gold_logp"):
            found, quantised = teacher.mean("store", name), teacher.mean("quantisation", name)
            assert found == pytest.approx(quantised, rel=0.02)
            assert teacher.mean("noise", name) < 1e-5


def test_rescore_finds_folders_and_rows_itself_and_prints_what_it_found(built):
    first = run("verify", built.path, "--rescore", 3, "--json")
    assert first.exit_code == 0, first.output
    document = json.loads(first.stdout)
    assert document["whole"]
    found = document["rescore"]
    assert found["alike"]
    assert len(found["rows"]) == 3
    assert [t["name"] for t in found["teachers"]] == ["teacher1", "teacher2"]
    assert found["teachers"][1]["folder"] == str(built.settings["teacher2"])
    assert 0 < found["teachers"][0]["kl"]["store"] < found["teachers"][0]["kl"]["limit"]
    assert run("verify", built.path, "--rescore", 3, "--json").stdout == first.stdout
    other = json.loads(run("verify", built.path, "--rescore", 3, "--seed", 7, "--json").stdout)
    assert other["rescore"]["rows"] != found["rows"]
    text = run("verify", built.path, "--rescore", 10**6)
    assert text.exit_code == 0
    rows = load_store(built.path).manifest["rows"]
    assert f"teacher2: as stored: {rows} rows" in text.stdout


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_a_store_of_a_teacher_whose_weights_were_others_is_found(tmp_path, teacher2, data, share):
    """Somebody writes to the model's folder after it was hashed and before it is loaded."""
    folder = Path(shutil.copytree(teacher2, tmp_path / "teacher"))
    swapped = []

    def stop() -> bool:  # asked while documents are read, between those two
        if not swapped:
            perturb(folder, share)
            swapped.append(True)
        return False

    build(teacher1=folder, data=(data,), seq_len=SEQ_LEN, out=tmp_path / "store", stop=stop)
    assert swapped
    shutil.copy(teacher2 / "model.safetensors", folder / "model.safetensors")
    assert run("verify", tmp_path / "store").exit_code == 0
    result = run("verify", tmp_path / "store", "--rescore", 6, "--json")
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert document["whole"]
    (teacher,) = document["rescore"]["teachers"]
    assert not teacher["alike"]
    assert teacher["reasons"]
    if share > 0.1:
        assert teacher["kl"]["store"] > teacher["kl"]["limit"]
        assert len(teacher["unlike_rows"]) == 6
    text = run("verify", tmp_path / "store", "--rescore", 6).stdout
    assert "NOT what is stored" in text
    assert "--fresh" in text


def test_a_store_whose_teacher_read_other_rows_is_found_though_all_checksums_fit(
    tmp_path, teacher1, monkeypatch
):
    monkeypatch.setattr(logitcache.layout, "SHARD_POSITIONS", SEQ_LEN * 2)
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": " ".join(sentences(20, seed=8))}])
    path = tmp_path / "store"
    store = build(teacher1=teacher1, data=(long,), seq_len=SEQ_LEN, out=path)
    assert len(store.ranges) > 2
    # The rows of shards 0 and 1 change places, the teacher's stay.
    records = [json.loads(store.commit_path("rows", shard).read_text()) for shard in (0, 1)]
    for spec in store.specs["rows"].values():
        contents = [(path / spec.shard_name(shard)).read_bytes() for shard in (1, 0)]
        for shard, content in enumerate(contents):
            (path / spec.shard_name(shard)).write_bytes(content)
            records[shard]["files"][spec.shard_name(shard)] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "index_crc32c": int.from_bytes(content[-4:], "little"),
            }
    for shard, record in enumerate(records):
        text = to_json({**record, "digest": digest(record)})
        store.commit_path("rows", shard).write_text(text)
    assert run("verify", path).exit_code == 0
    result = rescore_drawn(store, {"teacher1": teacher1}, 10**6, seed=0)
    assert not result.alike
    assert result.teachers[0].unlike_rows == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_has_its_own_noise_as_control(tmp_path, teacher1, data, dtype):
    settings = {"teacher1": teacher1, "data": (data,), "seq_len": SEQ_LEN}
    store = build(out=tmp_path / "store", dtype=dtype, **settings)
    result = rescore_drawn(store, {"teacher1": teacher1}, 5, seed=0)
    (teacher,) = result.teachers
    assert result.alike
    assert teacher.dtype == dtype
    assert teacher.mean("noise", "kl") > 1e-7
    folder = Path(shutil.copytree(teacher1, tmp_path / "other"))
    perturb(folder, 0.3)
    assert not rescore_drawn(store, {"teacher1": folder}, 5, seed=0).alike


def test_positions_that_were_skipped_are_no_difference_and_lost_ones_are(tmp_path, data):
    broken = make_model(tmp_path / "broken", seed=3, tie_word_embeddings=False)
    whole = Path(shutil.copytree(broken, tmp_path / "whole"))
    weights = load_file(broken / "model.safetensors")
    clean = build(teacher1=whole, data=(data,), seq_len=SEQ_LEN, out=tmp_path / "clean")
    token = int(np.bincount(_tokens(clean)).argsort()[-8])
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = {"data": (data,), "seq_len": SEQ_LEN, "on_nonfinite": "skip"}
    store = build(teacher1=broken, out=tmp_path / "store", **settings)
    assert store.checked_commit("teacher1", 0)["skipped"] > 0
    assert rescore_drawn(store, {"teacher1": broken}, 6, seed=0).alike
    (teacher,) = rescore_drawn(store, {"teacher1": whole}, 10**6, seed=0).teachers
    assert teacher.unlike_positions == store.checked_commit("teacher1", 0)["skipped"]
    assert "not stored" in teacher.reasons[0]


def _tokens(store) -> np.ndarray:
    from logitcache import open_store

    reader = open_store(store.path)
    return reader.read_rows(np.arange(len(reader))).tokens.ravel()


def test_a_folder_that_holds_another_model_is_refused_with_the_reason(built):
    wrong = built.settings["teacher2"]
    result = run("verify", built.path, "--rescore", 2, "--teacher1", wrong)
    assert result.exit_code == 2
    assert f"{wrong}: not the model that {built.path} has as teacher1: weights_sha256" in (
        result.stderr
    )
    assert "--teacher1" in result.stderr


def test_folders_that_nobody_names_or_that_are_gone_are_asked_for(tmp_path, built):
    copy = Path(shutil.copytree(built.path, tmp_path / "store"))
    result = run("verify", copy, "--rescore", 2)
    assert result.exit_code == 2
    assert "no run record names it" in result.stderr
    settings = {name: str(tmp_path / "gone") for name in ("teacher1", "teacher2")}
    (tmp_path / "store.run.json").write_text(json.dumps({"config": settings}))
    result = run("verify", copy, "--rescore", 2)
    assert result.exit_code == 2
    assert "is not there" in result.stderr
    folders = [f"--{n}={built.settings[n]}" for n in ("teacher1", "teacher2")]
    assert run("verify", copy, "--rescore", 2, *folders).exit_code == 0
    assert run("verify", copy, *folders).exit_code == 2
    shutil.rmtree(copy / "teacher2")
    for record in (copy / "commits").glob("teacher2*"):
        record.unlink()
    with pytest.raises(UsageError, match="has no teacher2"):
        teacher_folders(load_store(copy), {"teacher2": built.settings["teacher2"]})


def test_a_damaged_store_is_reported_and_not_rescored(tmp_path, built):
    copy = Path(shutil.copytree(built.path, tmp_path / "store"))
    shutil.copy(built.path.with_name("store.run.json"), tmp_path / "store.run.json")
    (copy / "teacher1" / "certain" / "c.0.0.0").unlink()
    result = run("verify", copy, "--rescore", 2, "--json")
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert document["findings"]
    assert "rescore" not in document
