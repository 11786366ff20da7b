"""How much of a build is the teacher: ``python -m benchmarks.store_build [--teacher FOLDER]``.

A build (forward, capture, encoding, writing, synced to disk) over the bare forward of the same
rows, in turn: the decoder's hidden states and the head's logits of all labelled positions in chunks
as a build makes them, and nothing done with them. Without --teacher: a model of 1.5 billion
parameters with V = 151936 made from a config, whose logits are scaled to the spread of real ones
(standard deviation 4). The model is loaded before either starts.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--tokens", type=int, default=1 << 21)
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
    document = measure(options)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(
        f"{document['teacher']}: {document['parameters'] / 1e9:.2f}e9 parameters, V = "
        f"{document['vocab_size']}, {document['tokens']:,} tokens\n"
        f"forward {document['forward_tokens_per_s']:,.0f} tokens/s, build "
        f"{document['build_tokens_per_s']:,.0f} tokens/s: build over forward "
        f"{document['build_over_forward']:.3f} (must {MUST}, aim {AIM})"
    )
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain data."""
    from logitcache.builder import plan
    from logitcache.config import BuildConfig
    from logitcache.place import empty_store
    from logitcache.teacher import TeacherRun
    from logitcache.writing import create_store, create_teacher

    from .common import machine
    from .models import write_text

    options.work.mkdir(parents=True, exist_ok=True)
    teacher = options.teacher or _made(options)
    data = options.work / "data.jsonl"
    write_text(teacher, data, options.tokens)
    out = options.work / "store"
    config = BuildConfig(
        teacher1=teacher,
        data=(data,),
        out=out,
        seq_len=options.seq_len,
        device=options.device,
    )
    planned = plan(config)

    def new_store() -> Any:
        shutil.rmtree(out, ignore_errors=True)
        store = create_store(empty_store(out, planned.manifest), planned.tokenizer)
        return create_teacher(store, "teacher1", planned.teachers["teacher1"])

    run = TeacherRun(teacher, "teacher1", new_store(), planned.rows, config, None)
    shards = range(len(run.store.ranges))

    def build(shards: range = shards) -> None:
        run.store = new_store()
        run.shards(shards, lambda: False)

    def forward(shards: range = shards) -> None:
        for shard in shards:
            for batch in run.batches(*run.store.ranges[shard]):
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
        "teacher": teacher.name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "vocab_size": planned.manifest["vocab_size"],
        "tokens": tokens,
        "shards": len(shards),
        "seconds": seconds,
        "forward_tokens_per_s": tokens / median["forward"],
        "build_tokens_per_s": tokens / median["build"],
        "build_over_forward": median["build"] / median["forward"],
    }


def _seconds(function: Callable[[], None]) -> float:
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

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
