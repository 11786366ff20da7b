"""An export holds what the reader gives, whole or not at all, and datasets and pyarrow read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny import sentences, write_jsonl

import logitcache.export
import logitcache.layout
from logitcache import build, open_store
from logitcache.cli import cli
from logitcache.errors import Interrupted, StoreError, UsageError
from logitcache.export import export_parquet


@pytest.fixture(scope="module")
def stores(tmp_path_factory, teacher1, teacher2):
    """Stores of several shards: two sampled teachers, and one top-k teacher."""
    folder = tmp_path_factory.mktemp("stores")
    records = [{"text": t, "gold": n < 2} for n, t in enumerate(sentences(15, seed=5))]
    data = write_jsonl(folder / "data.jsonl", records)
    settings = {"teacher1": teacher1, "data": (data,), "seq_len": 48}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logitcache.layout, "SHARD_POSITIONS", 48 * 2)
        build(teacher2=teacher2, out=folder / "sampled", **settings)
        build(estimator="topk", top_k=9, out=folder / "topk", **settings)
    return folder


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def padded(lists: list, width: int, fill: float, dtype) -> np.ndarray:
    """Lists of a row's positions as an array [L, width]."""
    out = np.full((len(lists), width), fill, dtype)
    for position, values in enumerate(lists):
        out[position, : len(values)] = values
    return out


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_datasets_reads_exactly_what_the_reader_gives(stores, tmp_path, kind, monkeypatch):
    import datasets

    monkeypatch.setattr(logitcache.export, "_GROUP_ENTRIES", 1)  # row groups of one row
    export_parquet(stores / kind, tmp_path / "out")
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    reader = open_store(stores / kind)
    assert loaded["row"][:] == list(range(len(reader)))
    different = 0
    for row, record in enumerate(loaded):
        batch = reader[row]
        for name in ("tokens", "segments", "documents"):
            np.testing.assert_array_equal(record[name], getattr(batch.rows, name)[0])
        for name in ("positions", "labels", "gold"):
            np.testing.assert_array_equal(record[name], getattr(batch, name)[0])
        for name, teacher in zip(reader.store.teachers, batch.teachers, strict=True):
            width = teacher.ids_PK.shape[1]
            for field, fill in {"ids": -1, "logp": -np.inf, "inclusion": 0, "flat": False}.items():
                expected = getattr(teacher, f"{field}_PK")
                if expected is None:
                    assert f"{name}_{field}" not in record
                    continue
                found = padded(record[f"{name}_{field}"], width, fill, expected.dtype)
                np.testing.assert_array_equal(found, expected)
                different += len(expected)
            for field, expected in {
                "tail_log_partition": teacher.tail_PT,
                "entropy": teacher.entropy_P,
                "top1_logp": teacher.top1_logp_P,
                "gold_logp": teacher.gold_logp_P,
            }.items():
                found = np.array(record[f"{name}_{field}"], np.float32)
                np.testing.assert_array_equal(found, expected)
    assert different > 500


def test_pyarrow_finds_a_file_a_shard_and_what_the_store_was_in_their_metadata(stores, tmp_path):
    made = export_parquet(stores / "sampled", tmp_path / "out")
    reader = open_store(stores / "sampled")
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == made.files == len(reader.store.ranges) > 2
    assert made.size_bytes == sum(file.stat().st_size for file in files)
    table = pa.concat_tables([pq.read_table(file) for file in files])
    assert table.num_rows == made.rows == len(reader)
    record = json.loads(table.schema.metadata[b"logitcache"])
    assert record["store"] == reader.manifest
    assert record["teachers"] == reader.store.teachers


def test_row_groups_are_bounded_by_their_entries(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(logitcache.export, "_GROUP_ENTRIES", 48 * 9)  # top_k * seq_len: one row
    export_parquet(stores / "topk", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        metadata = pq.read_metadata(file)
        assert metadata.num_row_groups == metadata.num_rows


def test_the_same_command_on_a_finished_export_says_so_and_changes_nothing(stores, tmp_path):
    out = tmp_path / "out"
    command = ("export", stores / "topk", "--to", "parquet", "--out", out, "--json")
    first = run(*command)
    assert first.exit_code == 0, first.output
    document = json.loads(first.stdout)
    assert document["written"]
    assert document["rows"] == len(open_store(stores / "topk"))
    before = contents(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(*command)
    assert again.exit_code == 0
    assert json.loads(again.stdout) == {**document, "written": False}
    assert "already exported" in again.stderr
    after = contents(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert after == before


def test_two_exports_of_a_store_are_the_same_bytes(stores, tmp_path):
    for name in ("one", "two"):
        export_parquet(stores / "sampled", tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_part_of_an_export_is_not_taken_for_all_of_it(stores, tmp_path):
    out = tmp_path / "out"
    export_parquet(stores / "sampled", out)
    last = max(out.iterdir())
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(StoreError, match="not whole") as caught:
        export_parquet(stores / "sampled", out)
    assert "delete" in caught.value.hint
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match="no file of an export"):
        export_parquet(stores / "sampled", out)


def test_a_stopped_export_leaves_nothing_and_exits_with_75(stores, tmp_path):
    answers = iter([False, False, True])
    with pytest.raises(Interrupted) as caught:
        export_parquet(stores / "sampled", tmp_path / "out", stop=lambda: next(answers))
    assert caught.value.exit_code == 75
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_killed_export_leaves_no_folder_of_that_name_and_the_next_one_finishes(stores, tmp_path):
    out = tmp_path / "out"
    script = (
        "import os, pathlib, sys; from logitcache.export import export_parquet as e; "
        "e(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), "
        "report=lambda done, rows: done < 3 or os.kill(os.getpid(), 9))"
    )
    words = [sys.executable, "-c", script, str(stores / "sampled"), str(out)]
    assert subprocess.run(words).returncode == -9
    assert not out.exists()
    assert (tmp_path / ".out.tmp").is_dir()
    assert export_parquet(stores / "sampled", out).written
    assert not (tmp_path / ".out.tmp").exists()


def test_folders_that_hold_something_else_are_refused_and_left_alone(stores, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    result = run("export", stores / "topk", "--to", "parquet", "--out", out)
    assert result.exit_code == 2
    assert "found other files (mine" in result.stderr
    assert contents(out) == {"mine": b"x"}
    inside = run("export", stores / "topk", "--to", "parquet", "--out", stores / "topk" / "out")
    assert inside.exit_code == 2
    assert not (stores / "topk" / "out").exists()
    (out / "mine").unlink()
    assert export_parquet(stores / "topk", out).written  # an empty folder will do
    with pytest.raises(UsageError, match="another store"):
        export_parquet(stores / "sampled", out)


def test_a_damaged_store_is_not_exported(stores, tmp_path):
    import shutil

    copy = Path(shutil.copytree(stores / "topk", tmp_path / "store"))
    path = copy / "teacher1" / "certain" / "c.1.0.0"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    result = run("export", copy, "--to", "parquet", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "row 2" in result.stderr
    assert not (tmp_path / "out").exists()
    assert not os.path.lexists(tmp_path / ".out.tmp")
