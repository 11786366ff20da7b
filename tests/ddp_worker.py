"""Run by torchrun in test_train. With two folders: one SGD step on two CPU processes; rank 0 saves
the weights and its log. With a command line of distill: that, and which threads are left then."""

import atexit
import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from test_train import _trainer

from distill.cli import main
from distill.processes import leave_group


def _print_threads() -> None:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"threads at the end: {sorted(names)}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        atexit.register(_print_threads)
        main()
    work, out = Path(sys.argv[1]), Path(sys.argv[2])
    trainer = _trainer(
        work,
        out,
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        ddp_backend="gloo",
    )
    trainer.train()
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        names = {name: p.detach() for name, p in trainer.model.named_parameters()}
        save_file({n: p.clone() for n, p in names.items()}, out / "weights.safetensors")
        (out / "log.json").write_text(json.dumps(trainer.state.log_history[0]), encoding="utf-8")
    del trainer
    leave_group()
