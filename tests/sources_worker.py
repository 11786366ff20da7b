"""Run by torchrun in test_sources: one step and an evaluation on two CPU processes; rank 0 saves
what they log."""

import json
import sys
from pathlib import Path

from test_sources import _trainer

from distill.train import leave_group

if __name__ == "__main__":
    store, student, out = map(Path, sys.argv[1:])
    trainer = _trainer(
        store, student, out.parent / "work", per_device_train_batch_size=3, ddp_backend="gloo"
    )
    trainer.train()
    found = {"train": trainer.state.log_history[0], "eval": trainer.evaluate()}
    if trainer.is_world_process_zero():
        out.write_text(json.dumps(found), encoding="utf-8")
    del trainer
    leave_group()
