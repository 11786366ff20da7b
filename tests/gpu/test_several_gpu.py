"""Two GPUs end where one does: DDP, FSDP2, adapters, exact resume, a teacher in shards."""

from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA GPUs", allow_module_level=True)

from several_checks import (
    assert_ends_where_one_does,
    assert_resumed_to_the_same_bits,
    train_all_cases,
)
from training_runs import CASES, RESUMED, make_inputs

from logitcache import build, open_store
from logitcache.verify import verify_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def double(inputs: Path) -> Path:
    return train_all_cases(inputs, on_gpu=True)


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_end_where_one_does(inputs: Path, double: Path, tmp_path: Path, name: str) -> None:
    assert_ends_where_one_does(
        inputs, double, tmp_path, name, on_gpu=True, relative=1e-3, of_moved=1e-2
    )


@pytest.mark.parametrize("name", RESUMED)
def test_two_gpus_go_on_to_the_same_bits(double: Path, name: str) -> None:
    assert_resumed_to_the_same_bits(double, name)


def test_a_teacher_in_shards_or_layer_by_layer_gives_the_store_of_one_gpu(
    inputs: Path, double: Path, tmp_path: Path
) -> None:
    common = {"data": [inputs / "data.jsonl"], "seq_len": 48, "dtype": "float32"}
    common |= {"teacher1": inputs / "one", "teacher2": inputs / "two"}
    build(**common, out=tmp_path / "one", device="cuda")
    build(**common, out=tmp_path / "layers", device_map="auto")
    one = open_store(tmp_path / "one")
    for path in (double / "store", tmp_path / "layers"):
        assert verify_store(path)[1] == []
        other = open_store(path)
        rows = slice(0, len(one))
        for ours, theirs in zip(one[rows].teachers, other[rows].teachers, strict=True):
            assert ours.entropy_P == pytest.approx(theirs.entropy_P, abs=0.02)
            assert (ours.ids_PK[:, 0] == theirs.ids_PK[:, 0]).mean() > 0.98
