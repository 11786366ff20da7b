"""Run by test_sources: one step and an evaluation on two CPU processes; the first saves what they
log. They are forked when all is imported, which takes half the time of torchrun's two."""

import json
import os
import socket
import sys
from pathlib import Path

from test_sources import _trainer

from logitcache.several import leave_group


def one_of_two(rank: int, port: int, store: Path, student: Path, out: Path) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    trainer = _trainer(
        store, student, out.parent / "work", per_device_train_batch_size=3, ddp_backend="gloo"
    )
    trainer.train()
    found = {"train": trainer.state.log_history[0], "eval": trainer.evaluate()}
    assert trainer.accelerator.num_processes == 2
    if trainer.is_world_process_zero():
        out.write_text(json.dumps(found), encoding="utf-8")
    del trainer
    leave_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = os.fork()
    one_of_two(int(child == 0), port, *map(Path, sys.argv[1:]))
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
