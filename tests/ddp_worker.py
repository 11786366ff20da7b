"""Run by torchrun in test_distributed on CPU processes, and where there are GPUs on one each. With
two folders: trainings of the cases by name, each of whose weights, averages and log the first
process writes. With a command line of distill: that, and which threads are left then."""

import atexit
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from training_runs import CASES, RESUMED, case_request

from distill import DistillConfig
from distill.cli import main
from distill.ema import trained_weights
from distill.processes import agreed, gathered
from distill.train import make_trainer, train
from logitcache import build
from logitcache.causal_lm import load_causal_lm
from logitcache.config import build_config
from logitcache.errors import Interrupted
from logitcache.several import leave_group, loading_options

ON_GPU = torch.cuda.is_available()


def _print_threads() -> None:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    sys.stderr.write(f"threads at the end: {sorted(names)}\n")  # in one piece


def choose_kind(config: DistillConfig) -> None:
    """Accelerate shards on accelerators alone, though torch can on CPUs; all else is its own. What
    it keeps of the training before goes."""
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if ON_GPU:
        return
    kind = DistributedType.FSDP if config.fsdp else DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = kind
    if config.fsdp:
        state = Accelerator(cpu=True, mixed_precision="no").state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**config.fsdp_plugin_args)


def run(inputs: Path, out: Path, name: str, folder: str, resume: Path | None = None) -> None:
    request = case_request(inputs, out / folder, name, processes=2, on_gpu=ON_GPU)
    config = request.config()
    choose_kind(config)
    trainer = make_trainer(request, config)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if name.startswith("ddp"):
        assert trainer.model_wrapped.gradient_as_bucket_view
        assert not trainer.model_wrapped.broadcast_buffers
    first = trainer.is_world_process_zero()
    shards = [hasattr(p, "full_tensor") for p in trainer._core.parameters()]
    kinds = (name, trainer.accelerator.state.distributed_type, shards)
    assert all(shards) if name.startswith("fsdp") else not any(shards), kinds
    weights = gathered(trained_weights(trainer._core), first)
    averages = gathered(trainer.average.weights, first)
    held_out = trainer.evaluate()
    records = [entry for entry in trainer.state.log_history if "loss_kd" in entry]

    def write() -> None:
        for part, tensors in (("weights", weights), ("averages", averages)):
            copied = {name: tensor.clone() for name, tensor in tensors.items()}
            save_file(copied, out / folder / f"{part}.safetensors")
        (out / folder / "log.json").write_text(json.dumps([records, held_out]), encoding="utf-8")

    agreed(config, write)


def stopped(inputs: Path, out: Path) -> None:
    """The second process alone is asked to stop; both do, and go on later."""
    request = case_request(inputs, out, "ddp", processes=2, on_gpu=ON_GPU)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 1 and torch.distributed.get_rank() == 1

    choose_kind(request.config())
    with pytest.raises(Interrupted, match="saved step 2 of 4"):
        train(request, stop=stop)
    train(request)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        atexit.register(_print_threads)
        main()
    torch.set_num_threads(1)
    inputs, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in CASES:
        run(inputs, out, name, name)
        if name in RESUMED:  # and again from the checkpoint after its second step
            run(inputs, out, name, f"{name} resumed", out / name / "checkpoints/checkpoint-2")
    stopped(inputs, out / "stopped")
    # One teacher in shards over both processes, of which the first writes.
    teachers = {"teacher1": inputs / "one", "teacher2": inputs / "two"}
    data = [inputs / "data.jsonl"]
    config = build_config({**teachers, "data": data, "out": out / "store", "tp_plan": "auto"})
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if ON_GPU else "cpu")
    several = loading_options(config)
    model = load_causal_lm(teachers["teacher1"], torch.float32, device, **several)
    assert any(hasattr(p, "full_tensor") for p in model.parameters()), "no shards"
    del model
    several = {"device": "auto" if ON_GPU else "cpu", "dtype": "float32", "tp_plan": "auto"}
    build(**teachers, data=data, seq_len=48, out=out / "store", **several)
    leave_group()
