"""Two GPUs end where one does: DDP, FSDP2, adapters, exact resume, a teacher in shards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA GPUs", allow_module_level=True)

from safetensors.torch import load_file
from training_runs import CASES, RESUMED, case_request, make_inputs

from distill.ema import trained_weights
from distill.train import make_trainer
from logitcache import build, open_store
from logitcache.verify import verify_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]
WORKER = Path(__file__).parent.parent / "ddp_worker.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def double(inputs: Path) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(WORKER), str(inputs), str(inputs / "double")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return inputs / "double"


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_end_where_one_does(inputs: Path, double: Path, tmp_path: Path, name: str) -> None:
    asked = case_request(inputs, tmp_path, name, processes=1, on_gpu=True)
    trainer = make_trainer(asked, asked.config())
    start = {n: p.detach().clone() for n, p in trained_weights(trainer._core).items()}
    trainer.train()
    records, _ = json.loads((double / name / "log.json").read_text(encoding="utf-8"))
    ours = [entry for entry in trainer.state.log_history if "loss_kd" in entry]
    assert [entry["step"] for entry in records] == [1, 2, 3, 4]
    for entry, expected in zip(records, ours, strict=True):
        for key in ("loss", "grad_norm", "share_blended"):
            assert entry[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
    weights = load_file(double / name / "weights.safetensors")
    for key, weight in trained_weights(trainer._core).items():
        moved = float((weight.detach() - start[key]).abs().max())
        found = weights[key].to(weight.device)
        torch.testing.assert_close(found, weight.detach(), rtol=0, atol=1e-2 * moved)


@pytest.mark.parametrize("name", RESUMED)
def test_two_gpus_go_on_to_the_same_bits(double: Path, name: str) -> None:
    for part in ("weights", "averages"):
        whole, parts = (
            load_file(double / folder / f"{part}.safetensors")
            for folder in (name, f"{name} resumed")
        )
        assert all(torch.equal(whole[key], parts[key]) for key in whole), part


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
