"""Attention in packed rows: ``python -m benchmarks.attention --json FILE [--students 0.5B 135M]``.

A decoder and its gradients (float32 weights, bf16 autocast) with SDPA and a mask, with flash
attention segment by segment (logitcache.packed_attention), and with transformers' FlexAttention;
times in turn, and peak memory. Documents' lengths are log-normal. --smoke: tiny, SDPA alone, on a
CPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.student import compile_layers
from logitcache.causal_lm import hidden_states
from logitcache.packed_attention import VARLEN, longest_segment, segment_bounds

from .common import blocks_in_turn, machine
from .models import make_model

WAYS = {"SDPA with a mask": "sdpa", "by segments": VARLEN, "FlexAttention": "flex_attention"}


def packed_positions(rows: int, length: int, mean: int, seed: int = 0) -> np.ndarray:
    """Position ids of rows of documents, the last of each cut off: int64 [rows, length]."""
    random, spread = np.random.default_rng(seed), 0.6
    found = np.empty((rows, length), dtype=np.int64)
    for row in found:
        at = 0
        while at < length:
            drawn = random.lognormal(np.log(mean) - spread**2 / 2, spread)
            size = min(max(int(drawn), 1), length - at)
            row[at : at + size] = np.arange(size)
            at += size
    return found


def measure(
    student: str, compiled: bool, options: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds of decoder and gradients, GiB at the peak, by way."""
    torch.compiler.reset()
    gc.collect()  # compiled layers of the model before refer to one another
    model = make_model(student, torch.float32, device).train()
    if compiled:
        compile_layers(model)
    positions = packed_positions(options.rows, options.seq_len, options.mean)
    ends = segment_bounds(positions)
    bounds, longest = torch.from_numpy(ends).to(device), longest_segment(ends)
    where = torch.from_numpy(positions).to(device)
    tokens = torch.randint(0, model.config.vocab_size, positions.shape, device=device)

    def run(way: str, steps: int) -> None:
        model.set_attn_implementation(WAYS[way])
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16):
                hidden = hidden_states(model, tokens, where, bounds, longest)
            hidden.float().square().mean().backward()
            model.zero_grad()

    ways = list(WAYS) if device.type == "cuda" else list(WAYS)[:1]
    found = blocks_in_turn(ways, run, options.blocks, options.steps)
    return {way: {"ms": at["median"], "peak": at["peak"] / 2**30} for way, at in found.items()}


def table(document: dict[str, Any]) -> str:
    """Markdown, from the figures alone."""
    lines = ["| ms, GiB |" + "".join(f" {way} |" for way in WAYS), "|---" * (1 + len(WAYS)) + "|"]
    for name, ways in document["students"].items():
        cells = [ways.get(way) for way in WAYS]
        shown = ("" if c is None else f"{c['ms']:.1f}, {c['peak']:.1f}" for c in cells)
        lines.append(f"| {name} |" + "".join(f" {cell} |" for cell in shown))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run, and give the exit code: 6 where a GPU is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--students", nargs="+", default=["0.5B", "135M"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--mean", type=int, default=400, help="tokens of a document")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="in a block")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and not options.smoke:
        print("no CUDA GPU here: this benchmark needs one (--smoke to try it)", file=sys.stderr)
        return 6
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.smoke:
        options.students, options.seq_len, options.blocks, options.steps = ["smoke"], 32, 1, 1
    document: dict[str, Any] = {"machine": machine(), "students": {}}
    document["options"] = {k: v for k, v in vars(options).items() if k != "json"}
    for student in options.students:
        for compiled in (False,) if options.smoke else (False, True):
            name = f"{student}, layers compiled" if compiled else student
            document["students"][name] = measure(student, compiled, options, device)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
