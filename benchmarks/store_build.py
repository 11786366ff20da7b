"""How much of a build is the teacher: ``python -m benchmarks.store_build [--teacher FOLDER]``.

A build (forward, capture, encoding, writing, synced to disk) over the bare forward of the same
rows, in turn: the decoder's hidden states and the head's logits of all labelled positions in chunks
as a build makes them, and nothing done with them. Without --teacher: a model of 1.5 billion
parameters with V = 151936 made from a config, whose logits are scaled to the spread of real ones
(standard deviation 4). The model is loaded before either starts.

Under torchrun: the build alone, the teacher on the GPU of every process and each with its share of
the shards, as ``torchrun -m logitcache build`` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MUST, AIM = 1.05, 1.02  # build over forward


def main(argv: list[str] | None = None) -> int:
    """Run, and give the exit code: 6 where the device is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store_build", description=__doc__)
    parser.add_argument("--teacher", type=Path, help="a real model's folder")
    parser.add_argument("--tokens", type=int, default=3 << 20)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("build") / "benchmark-build")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "no CUDA GPU here: this benchmark needs one (--device cpu to try it)", file=sys.stderr
        )
        return 6
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    document = measure(options) if processes == 1 else measure_several(options)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    if processes > 1:
        rate = document["build_tokens_per_s"]
        print(f"build: {rate:,.0f} tokens/s on {processes} processes")
        return 0
    print(
        f"{document['teacher']}: {document['parameters'] / 1e9:.2f}e9 parameters, V = "
        f"{document['vocab_size']}, {document['tokens']:,} tokens\n"
        f"forward {document['forward_tokens_per_s']:,.0f} tokens/s, build "
        f"{document['build_tokens_per_s']:,.0f} tokens/s: build over forward "
        f"{document['build_over_forward']:.3f} (must {MUST}, aim {AIM})"
    )
    return 0


def _inputs(options: argparse.Namespace) -> tuple[Path, Path]:
    """The teacher and its text, made where missing."""
    from .models import write_text

    options.work.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or _made(options)
    data = options.work / f"data-{options.tokens}.jsonl"
    if not data.exists():
        write_text(teacher, data, options.tokens)
    return teacher, data


def _planned(options: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """Configuration and plan of the build."""
    from logitcache.builder import plan
    from logitcache.config import BuildConfig

    teacher, data = _inputs(options)
    config = BuildConfig(
        teacher1=teacher,
        data=(data,),
        out=options.work / "store",
        seq_len=options.seq_len,
        device=device,
    )
    return config, plan(config)


def _new_store(planned: Any, out: Path) -> Any:
    from logitcache.place import empty_store
    from logitcache.writing import create_store, create_teacher

    shutil.rmtree(out, ignore_errors=True)
    store = create_store(empty_store(out, planned.manifest), planned.tokenizer)
    return create_teacher(store, "teacher1", planned.teachers["teacher1"])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain data."""
    from logitcache.teacher import TeacherRun

    from .common import machine

    config, planned = _planned(options, options.device)
    store = _new_store(planned, config.out)
    run = TeacherRun(config.teacher1, "teacher1", store, planned.rows, config, None)
    shards = range(len(store.ranges))

    def build(shards: range = shards) -> None:
        run.store = _new_store(planned, config.out)
        run.shards(shards, lambda: False)

    def forward(shards: range = shards) -> None:
        for shard in shards:
            for batch in run.batches(*store.ranges[shard]):
                run.forward(batch)

    seconds: dict[str, list[float]] = {"forward": [], "build": []}
    for function in (forward, build):  # compilations and first allocations
        _seconds(lambda function=function: function(range(1)))
    for _ in range(options.rounds):
        seconds["forward"].append(_seconds(forward))
        seconds["build"].append(_seconds(build))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = int(planned.rows.lengths().sum())
    return {
        "machine": machine(),
        "teacher": config.teacher1.name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "vocab_size": planned.manifest["vocab_size"],
        "tokens": tokens,
        "shards": len(shards),
        "seconds": seconds,
        "forward_tokens_per_s": tokens / median["forward"],
        "build_tokens_per_s": tokens / median["build"],
        "build_over_forward": median["build"] / median["forward"],
    }


def measure_several(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of all processes together, from when all start to when all have written."""
    import torch

    from logitcache.place import load
    from logitcache.teacher import TeacherRun

    from .common import machine

    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rank == 0:
        _inputs(options)
    torch.distributed.barrier()
    on_gpu = options.device.startswith("cuda")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    config, planned = _planned(options, device)
    if rank == 0:
        _new_store(planned, config.out)
    torch.distributed.barrier()
    store = load(config.out)
    run = TeacherRun(config.teacher1, "teacher1", store, planned.rows, config, None)
    shards = range(rank, len(store.ranges), processes)
    seconds = []
    for _ in range(1 + options.rounds):  # one for compilations

        def build() -> None:
            torch.distributed.barrier()
            run.shards(shards, lambda: False)
            torch.distributed.barrier()

        seconds.append(_seconds(build))
    torch.distributed.destroy_process_group()
    tokens = int(planned.rows.lengths().sum())
    return {
        "machine": machine(),
        "processes": processes,
        "tokens": tokens,
        "seconds": seconds[1:],
        "build_tokens_per_s": tokens / statistics.median(seconds[1:]),
    }


def _seconds(function: Callable[[], None]) -> float:
    from .common import wait

    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


def _made(options: argparse.Namespace) -> Path:
    """A model of Qwen2.5-1.5B's shape."""
    import torch

    from .models import make_model, save_model

    folder: Path = options.work / "teacher"
    if not (folder / "tokenizer.json").exists():
        save_model(make_model("1.5B", torch.bfloat16, torch.device(options.device)), folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
