"""Run by torchrun in test_train: one SGD step on two CPU processes; rank 0 saves the weights and
its log."""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from test_train import _trainer

if __name__ == "__main__":
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
