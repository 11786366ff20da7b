"""Sources of a store: where they are kept and checked, and the loss by source in training."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_train import SETTINGS
from tiny import sentences, write_jsonl

from distill import DistillConfig, DistillTrainer
from distill.source_loss import MOST_SOURCES, reported_sources
from distill.student import attach_loss, to_inputs
from logitcache import build, open_store
from logitcache.causal_lm import load_causal_lm
from logitcache.cli import cli as logitcache_cli
from logitcache.errors import StoreError, UsageError
from logitcache.layout import check_manifest
from logitcache.repair import repair
from logitcache.sources import source_names
from logitcache.store import Store
from logitcache.tokenise import load_tokenizer
from logitcache.verify import verify_store
from logitcache.writing import create_store, create_teacher, write_rows

CPU = torch.device("cpu")
WORKER = Path(__file__).with_name("sources_worker.py")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, teacher1: Path, teacher2: Path) -> Path:
    """A store of three sources: a JSONL file with an empty document, its namesake, a text file."""
    folder = tmp_path_factory.mktemp("mixed")
    records = [{"text": text} for text in sentences(9, seed=11)]
    (folder / "b").mkdir()
    paths = [
        write_jsonl(folder / "old.jsonl", [*records[:4], {"text": " "}]),
        write_jsonl(folder / "b" / "old.jsonl", records[4:]),
        folder / "plain.txt",
    ]
    paths[2].write_text(" ".join(sentences(4, seed=12)), encoding="utf-8")
    common = {"teacher1": teacher1, "teacher2": teacher2, "seq_len": 48, "device": "cpu"}
    build(out=folder / "store", data=paths, **common)
    return folder


def test_names_are_stems_made_unique_and_fit_for_any_record() -> None:
    paths = ["a/part.jsonl", "b/part.jsonl", "part-2.txt", "c/part.txt", ".", "bad\udc80 na/me\t.x"]
    names = ["part", "part-2", "part-2-2", "part-3", "data", "me_"]
    assert source_names([Path(p) for p in paths]) == names
    assert source_names([Path("bad\udc80 name.txt")]) == ["bad__name"]
    assert len(source_names([Path("x" * 240)])[0]) < 100


def test_info_lists_sources_with_documents_and_tokens(mixed: Path) -> None:
    result = CliRunner().invoke(logitcache_cli, ["info", str(mixed / "store"), "--json"])
    document = json.loads(result.stdout)
    listed = {s["name"]: s["documents"] for s in document["sources"]}
    assert listed == {"old": 5, "old-2": 5, "plain": 1}
    assert sum(s["tokens"] for s in document["sources"]) == document["tokens"]
    text = CliRunner().invoke(logitcache_cli, ["info", str(mixed / "store")]).stdout
    assert f"source      plain: 1 documents, {document['sources'][2]['tokens']} tokens" in text


def test_reader_knows_the_source_of_each_position(mixed: Path) -> None:
    reader = open_store(mixed / "store")
    assert reader.source_names == ("old", "old-2", "plain")
    rows = reader[:].rows
    numbers = reader.source_numbers(rows)
    assert ((numbers == -1) == (rows.segments == 0)).all()
    counts = [int((numbers == n).sum()) for n in range(3)]
    assert counts == [source["tokens"] for source in reader.manifest["sources"]]
    # A token and the one it predicts are of one document, hence of one source.
    same = rows.segments[:, 1:] == rows.segments[:, :-1]
    assert (numbers[:, 1:] == numbers[:, :-1])[same].all()
    broken = replace(rows, documents=rows.documents + np.uint32(99))
    with pytest.raises(StoreError, match="documents: expected numbers up to 11, found 110"):
        reader.source_numbers(broken)


@pytest.mark.parametrize(
    "change",
    [
        {"sources": []},
        {"sources": None},
        {"sources": [{"name": "a", "documents": 5, "tokens": 1}]},  # not all documents
        {"sources": [{"name": "a", "documents": True, "tokens": 1}]},
        {"sources": [{"name": "a", "documents": 27}]},
        {"sources": [{"name": "", "documents": 27, "tokens": 1}]},
        {"sources": [{"name": "a\n", "documents": 27, "tokens": 1}]},
        {"sources": [{"name": "a" * 101, "documents": 27, "tokens": 1}]},
        {"sources": [{"name": "a", "documents": n, "tokens": 1} for n in (20, 7)]},
        {"sources": [{"name": "a", "documents": 28, "tokens": 1}, {"name": "b", "documents": -1}]},
    ],
)
def test_impossible_sources_in_a_manifest_are_refused(built, change: dict) -> None:
    manifest = open_store(built.path).manifest
    assert check_manifest(dict(manifest), "x") == manifest
    with pytest.raises(StoreError, match="damaged manifest: sources: expected a possible value"):
        check_manifest({**manifest, **change}, "x")


def test_a_store_without_sources_is_whole_and_taken_up_by_the_same_build(
    built, tmp_path: Path
) -> None:
    """One that an earlier version has begun: its manifest stays, the build goes on."""
    from logitcache.builder import plan
    from logitcache.config import build_config
    from logitcache.place import empty_store

    settings = {**built.settings, "out": tmp_path / "store"}
    planned = plan(build_config(settings))
    manifest = {key: value for key, value in planned.manifest.items() if key != "sources"}
    store = create_store(empty_store(tmp_path / "store", manifest), planned.tokenizer)
    store = create_teacher(store, "teacher1", planned.teachers["teacher1"])
    write_rows(Store(store.path, store.manifest, store.teachers), planned.rows, 0)
    done = build(**settings)
    assert "sources" not in done.manifest
    assert verify_store(done.path)[1] == []
    reader = open_store(done.path)
    assert reader.source_names == ()
    assert reported_sources(reader) == ()
    (done.path / "tokenizer.json").unlink()
    repaired, findings = repair(build_config(settings))
    assert findings
    assert "sources" not in repaired.manifest


def test_a_build_from_other_paths_is_another_build(mixed: Path, teacher1, teacher2) -> None:
    paths = [mixed / "b" / "old.jsonl", mixed / "old.jsonl", mixed / "plain.txt"]
    common = {"teacher1": teacher1, "teacher2": teacher2, "seq_len": 48, "device": "cpu"}
    with pytest.raises(UsageError, match="sources: this command"):
        build(out=mixed / "store", data=paths, **common)


def _by_hand(folder: Path, teacher1: Path, spec, evaluate: bool) -> dict[str, float]:
    """Loss of each source from runs of the loss on the positions of that source alone."""
    reader = open_store(folder)
    model = load_causal_lm(teacher1, torch.float32, CPU)
    attach_loss(model, spec)
    batch = reader[:]
    inputs = to_inputs(batch, spec.temperature)
    numbers = torch.from_numpy(reader.source_numbers(batch.rows))
    found = {}
    for number, name in enumerate(reader.source_names):
        labels = inputs["labels"].masked_fill(numbers != number, -100)
        valid = int((labels != -100).sum())
        if evaluate:
            logits = model(
                input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
            ).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        else:
            loss = model(**{**inputs, "labels": labels}, num_items=float(valid))["loss"]
        found[name] = float(loss.detach())
    return found


def _trainer(store: Path, teacher1: Path, out: Path, **settings) -> DistillTrainer:
    config = DistillConfig(
        output_dir=str(out),
        **{**SETTINGS, "max_steps": 1, "learning_rate": 0.0, "js_threshold": 0.6, **settings},
    )
    model = load_causal_lm(teacher1, torch.float32, CPU).train()
    tokenizer = load_tokenizer(teacher1)
    return DistillTrainer(model, config, store, eval_store=store, processing_class=tokenizer)


def _source_losses(record: dict) -> dict[str, float]:
    return {k.partition("/")[2]: v for k, v in record.items() if "source_loss/" in k}


@pytest.mark.parametrize("shape", [(64, 1), (1, 64)], ids=["one-batch", "accumulated"])
def test_loss_by_source_is_that_of_the_source_alone(
    mixed: Path, teacher1: Path, tmp_path: Path, shape: tuple[int, int]
) -> None:
    trainer = _trainer(
        mixed / "store",
        teacher1,
        tmp_path,
        per_device_train_batch_size=shape[0],
        gradient_accumulation_steps=shape[1],
        alpha=0.3,
    )
    trainer.train()
    record = trainer.state.log_history[0]
    expected = _by_hand(mixed / "store", teacher1, trainer.spec, evaluate=False)
    assert _source_losses(record) == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 3
    held_out = trainer.evaluate()
    expected = _by_hand(mixed / "store", teacher1, trainer.spec, evaluate=True)
    assert _source_losses(held_out) == pytest.approx(expected, rel=1e-5)
    assert set(held_out) >= {f"eval_source_loss/{name}" for name in expected}


def test_two_processes_log_the_loss_by_source_of_one(
    mixed: Path, teacher1: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(WORKER), str(mixed / "store"), str(teacher1)]
    command.append(str(tmp_path / "log.json"))
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    double = json.loads((tmp_path / "log.json").read_text(encoding="utf-8"))
    trainer = _trainer(mixed / "store", teacher1, tmp_path, per_device_train_batch_size=6)
    trainer.train()
    single = _source_losses(trainer.state.log_history[0])
    assert len(single) == 3
    assert _source_losses(double["train"]) == pytest.approx(single, rel=1e-5)
    held_out = _source_losses(trainer.evaluate())
    assert _source_losses(double["eval"]) == pytest.approx(held_out, rel=1e-5)


def test_one_source_adds_nothing_and_too_many_are_said_to_be_left_out(
    built, mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from distill.source_loss import source_inputs

    one = open_store(built.path)
    assert reported_sources(one) == ()
    assert source_inputs(one, one[[0]], 0) == {}
    several = open_store(mixed / "store")
    assert "sources" in source_inputs(several, several[[0]], 3)
    many = open_store(mixed / "store")
    sources = [{"name": str(n), "documents": 1, "tokens": 1} for n in range(MOST_SOURCES + 1)]
    many.manifest = {**many.manifest, "sources": sources}
    assert reported_sources(many) == ()
    assert "65 sources: no loss by source is logged" in caplog.text
