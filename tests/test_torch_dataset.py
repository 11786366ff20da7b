"""A store as a torch Dataset: what it gives is what the reader gives, in every kind of worker."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_model
from torch.utils.data import DataLoader, Dataset

from logitcache import as_torch_dataset, build, open_store
from logitcache.errors import StoreError, UsageError

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def topk(tmp_path_factory, built):
    """A store of one top-k teacher."""
    path = tmp_path_factory.mktemp("topk") / "store"
    settings = {**built.settings, "teacher2": None, "estimator": "topk", "top_k": 9}
    build(out=path, **settings)
    return path


def test_a_row_is_what_the_reader_and_its_sparse_teacher_give(built, topk):
    for path, temperature in ((built.path, 1.5), (topk, 3.0)):
        dataset, reader = as_torch_dataset(path, temperature), open_store(path)
        assert isinstance(dataset, Dataset)
        assert len(dataset) == len(reader) > 3
        for row in (0, len(reader) - 1):
            found, batch = dataset[row], reader[row]
            assert found["row"] == row
            assert {v.dtype for k, v in found.items() if "_" not in k} == {torch.int64, torch.bool}
            for name in ("tokens", "segments"):
                np.testing.assert_array_equal(found[name], getattr(batch.rows, name)[0])
            for name in ("positions", "labels", "gold"):
                np.testing.assert_array_equal(found[name], getattr(batch, name)[0])
            pairs = zip(reader.store.teachers, batch.teachers, strict=True)
            for (name, teacher), flat in zip(pairs, dataset.sparse_teachers(found), strict=True):
                for one, other in zip(teacher.sparse_teacher(temperature), flat, strict=True):
                    assert one is other is None or torch.equal(one, other)
                for field in ("entropy", "top1_logp", "gold_logp"):
                    expected = getattr(teacher, f"{field}_P")
                    np.testing.assert_array_equal(found[f"{name}_{field}"], expected)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_two_workers_give_what_direct_reading_gives(built, start):
    dataset, reader = as_torch_dataset(built.path, 2.0), open_store(built.path)
    dataset[0]  # files open in the parent: a worker must not use them
    loader = DataLoader(
        dataset,
        batch_size=3,
        num_workers=2,
        collate_fn=dataset.collate,
        multiprocessing_context=start,
    )
    rows = 0
    for batch in loader:
        index = batch["row"].numpy()
        expected = reader[index]
        np.testing.assert_array_equal(batch["tokens"], expected.rows.tokens)
        np.testing.assert_array_equal(batch["labels"], expected.labels)
        for key, values in dataset.collate([dataset[row] for row in index]).items():
            np.testing.assert_array_equal(batch[key], values)
        found = dataset.sparse_teachers(batch)
        for sparse, teacher in zip(found, expected.teachers, strict=True):
            wanted = teacher.sparse_teacher(2.0)
            # Sums over supports padded to another width round differently in the last bit.
            torch.testing.assert_close(sparse.log_partition_R, wanted.log_partition_R)
            for one, other in zip(sparse, wanted, strict=True):
                assert one is sparse.log_partition_R or torch.equal(one, other)
        rows += len(index)
    assert rows == len(reader)


def test_each_process_opens_the_files_itself_and_a_pickle_holds_none(built):
    dataset = as_torch_dataset(built.path)
    unused = len(pickle.dumps(dataset))
    dataset[0]
    parent = dataset._reader()
    assert dataset._reader() is parent
    assert len(pickle.dumps(dataset)) == unused
    child = os.fork()
    if child == 0:
        os._exit(0 if dataset._reader() is not parent and len(dataset[1]) > 10 else 1)
    assert os.waitpid(child, 0)[1] == 0
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[1]["teacher2_logp"], dataset[1]["teacher2_logp"])


def test_temperatures_that_the_supports_do_not_allow_and_rows_that_are_not_there_are_refused(
    built, topk
):
    with pytest.raises(UsageError, match=r"expected 0\.5 to 2, found 3"):
        as_torch_dataset(built.path, 3.0)
    assert as_torch_dataset(topk, 4.0)[0]["teacher1_log_partition"].isfinite().all()
    with pytest.raises(IndexError):
        as_torch_dataset(topk)[len(open_store(topk))]
    with pytest.raises(StoreError, match="no such store"):
        as_torch_dataset(topk / "none")


def test_importing_logitcache_imports_no_torch():
    code = (
        "import logitcache, sys; assert 'as_torch_dataset' in logitcache.__all__; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_example_in_the_readme_runs(built, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    lines = README.read_text(encoding="utf-8").split("\n")
    start = lines.index("    from logitcache import as_torch_dataset")
    block = []
    for line in lines[start:]:
        if line and not line.startswith("    "):
            break
        block.append(line)
    (tmp_path / "store").symlink_to(built.path)
    monkeypatch.chdir(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "student", seed=7))
    names = {"student": student}
    exec(textwrap.dedent("\n".join(block)), names)
    assert names["out"].loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
