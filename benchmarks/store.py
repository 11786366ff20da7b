"""Benchmark of the store: ``python -m benchmarks.store [--teacher FOLDER] [--text FILE...]``.

Builds a store for each profile from a real teacher's outputs (the bundled one unless given) and
prints bytes, fidelity and speed beside what was asked for. Peers are byte formulas, with the values
that they would keep taken as exact. Builds lie in --work and are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.bundled import BUNDLED

# Random Sampling KD draws 50: this threshold is as exact.
PURE = {"min_prob": 0.039, "threshold": 0.039, "sample_temperature": 1.0}
PROFILES: dict[str, dict[str, Any]] = {
    "sampled, S = 2": {},
    "sampled, S = 1": {"sample_temperature": 1.0},
    "topk 128 / 0.002": {"estimator": "topk"},
    "plain top-64": {"estimator": "topk", "top_k": 64, "min_prob": 0.0},
    "high, 5e-4": {
        "estimator": "topk",
        "top_k": 256,
        "min_prob": 5e-4,
        "precision": "high",
    },
    "topk 256 / 0.001": {"estimator": "topk", "top_k": 256, "min_prob": 1e-3},
    "topk 256 / 5e-4": {
        "estimator": "topk",
        "top_k": 256,
        "min_prob": 5e-4,
        "precision": "standard",
    },
    "pure sampling, 0.039": PURE,
}
BYTES = {  # must, aim
    "sampled, S = 2": (55, 40),
    "sampled, S = 1": (40, 28),
    "topk 128 / 0.002": (48, 36),
    "plain top-64": (95, 80),
    "high, 5e-4": (150, None),
}


def main(argv: list[str] | None = None) -> int:
    """Run, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--teacher", type=Path, default=BUNDLED / "teacher1")
    parser.add_argument("--text", type=Path, nargs="+", default=[BUNDLED / "text" / "corpus.jsonl"])
    parser.add_argument("--tokens", type=int, default=1 << 15)
    parser.add_argument("--probe", type=int, default=768, help="positions compared exactly")
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--work", type=Path, default=Path("build") / "benchmark-store")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(argv)
    document = measure(options)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(table(document))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain data."""
    from logitcache import open_store
    from logitcache.info import describe_store

    from . import store_fidelity as fidelity
    from . import store_speed as speed
    from .common import machine

    options.work.mkdir(parents=True, exist_ok=True)
    data, seq_len = prepare(options)
    probed = None
    profiles: dict[str, Any] = {}
    for name, settings in PROFILES.items():
        path = options.work / name.replace(" ", "").replace("/", "-").replace(",", "-")
        build_profile(path, options.teacher, data, seq_len, settings)
        reader = open_store(path)
        described = describe_store(path)["teachers"][0]
        if probed is None:
            probed = fidelity.probe(options.teacher, reader, options.probe)
        profiles[name] = {
            "bytes_per_token": described["bytes_per_token"],
            "mean_support": described["mean_support"],
            "fields_bytes": _bytes(path, "fields") / reader.manifest["tokens"],
            **fidelity.kl_of_store(probed, reader),
        }
        print(f"{name}: {profiles[name]}", flush=True)
        if settings is PURE:
            profiles[name]["effective_draws"] = fidelity.effective_draws(probed, reader)
    assert probed is not None
    default = open_store(options.work / "sampled-S=2")
    vocab_size = default.manifest["vocab_size"]
    bits = math.ceil(math.log2(vocab_size))
    import torch

    return {
        "machine": machine(),
        "teacher": options.teacher.name,
        "vocab_size": vocab_size,
        "tokens": default.manifest["tokens"],
        "profiles": profiles,
        "peers": {
            "distillkit_128": {
                "bytes": 128 * bits / 8 + 56,
                "kl": fidelity.kl_of_top_k(probed, 128),
            },
            "bf16_top_64": {
                "bytes": 64 * bits / 8 + 128,
                "kl": fidelity.kl_of_top_k(probed, 64, torch.bfloat16),
            },
            "rskd_50": {"bytes": fidelity.rskd_bytes(probed), "draws": fidelity.RSKD_DRAWS},
        },
        "bias": fidelity.bias_of_sampling(),
        "speed": {
            **speed.decoding(default),
            "encode_tokens_per_s": speed.encoding(default),
            "epoch_tokens_per_s": speed.epoch(default, options.work / "two-teachers"),
        },
        "flips": {
            "tried": options.flips,
            "missed": speed.flips_missed(
                _small(options, data), options.work / "flipped", options.flips
            ),
        },
    }


def prepare(options: argparse.Namespace) -> tuple[Path, int]:
    """A data file of about the tokens asked for, and the length of rows."""
    from transformers import AutoConfig

    from logitcache.documents import read_documents
    from logitcache.tokenise import load_tokenizer

    config = AutoConfig.from_pretrained(options.teacher, local_files_only=True)
    path = options.work / "data.jsonl"
    if not path.exists():
        tokenizer, left, lines = load_tokenizer(options.teacher), options.tokens, []
        each = options.tokens // len(options.text)
        for file in options.text:
            left = each
            for document in read_documents((file,)):
                text = (document.text or "")[: left * 8]
                number = len(tokenizer(text)["input_ids"])
                if number > left:
                    text = text[: int(len(text) * left / number)]
                lines.append(json.dumps({"text": text}))
                left -= number
                if left <= 0:
                    break
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path, min(2048, getattr(config, "max_position_embeddings", 2048))


def build_profile(
    path: Path, teacher: Path, data: Path, seq_len: int, settings: dict[str, Any]
) -> None:
    from logitcache import build

    build(teacher1=teacher, data=(data,), seq_len=seq_len, out=path, **settings)


def _small(options: argparse.Namespace, data: Path) -> Path:
    """A store of a few short rows, whose every bit can be tried."""
    short = options.work / "short.jsonl"
    text = json.loads(data.read_text(encoding="utf-8").splitlines()[0])["text"]
    short.write_text(json.dumps({"text": text[:600]}) + "\n", encoding="utf-8")
    build_profile(options.work / "small", BUNDLED / "teacher1", short, 64, {})
    return options.work / "small"


def _bytes(path: Path, array: str) -> int:
    return sum(p.stat().st_size for p in (path / "teacher1" / array).iterdir())


def bytes_at(kl: float, profiles: dict[str, Any]) -> float:
    """Our bytes at a KL of the full vocabulary, between (or beyond) the topk profiles, on log
    scales."""
    names = ("topk 128 / 0.002", "topk 256 / 0.001", "topk 256 / 5e-4")
    points = sorted((profiles[n]["kl_full"], profiles[n]["bytes_per_token"]) for n in names)
    x, y = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    left = min(max(int(np.searchsorted(x, np.log(kl))) - 1, 0), len(x) - 2)
    slope = (y[left + 1] - y[left]) / (x[left + 1] - x[left])
    return float(np.exp(y[left] + slope * (np.log(kl) - x[left])))


def table(document: dict[str, Any]) -> str:
    """The Markdown table of a document of ``measure``."""
    profiles, peers, speed = document["profiles"], document["peers"], document["speed"]
    rows: list[Sequence[object]] = []
    for name, (must, aim) in BYTES.items():
        found = profiles[name]
        rows.append((f"{name}: bytes/token", must, aim, f"{found['bytes_per_token']:.1f}"))
        limits = (5e-4, None) if name.startswith("high") else (7e-3, 3e-3)
        rows.append((f"{name}: KL of quantisation", *limits, f"{found['kl_quantised']:.1e}"))
    worst = max(abs(z) for z in document["bias"].values())
    rows.append(("bias of sampled mass over 2^20 draws, standard errors", 3, None, f"{worst:.1f}"))
    for key, label, must, aim in (
        ("distillkit_128", "DistillKit k = 128", 1 / 2.6, 1 / 3.5),
        ("bf16_top_64", "bf16 top-64", 1 / 3.7, 1 / 5),
    ):
        ours = bytes_at(peers[key]["kl"], profiles)
        share = ours / peers[key]["bytes"]
        shown = (
            f"{share:.3f} ({ours:.0f} of {peers[key]['bytes']:.0f} B at KL {peers[key]['kl']:.3f})"
        )
        rows.append((f"bytes at the KL of {label}", f"{must:.3f}", f"{aim:.3f}", shown))
    pure = profiles["pure sampling, 0.039"]
    support = pure["bytes_per_token"] - pure["fields_bytes"]
    shown = f"{support:.1f} at {pure['effective_draws']:.0f} draws (RS-KD-50: "
    shown += f"{peers['rskd_50']['bytes']:.1f} at 50)"
    rows.append(("pure sampling: support bytes", 18, 14, shown))
    for key, label, must, aim in (
        ("decode_tokens_per_s", "decode planes to ids and logp, tokens/s", 3e6, 6e6),
        ("unpack_and_decode_tokens_per_s", "the same with reading, crc32c and zstd", None, None),
        ("encode_tokens_per_s", "encode, zstd and crc32c, tokens/s", 2e6, 4e6),
        ("epoch_tokens_per_s", "shuffled epoch, two teachers, tokens/s", 6e5, 1.5e6),
    ):
        limits = tuple("" if x is None else f"{x:.1e}" for x in (must, aim))
        rows.append((label, *limits, f"{speed[key]:.2e}"))
    overhead = f"{speed['read_row_overhead_us']:.0f}"
    rows.append(("one row at random, overhead in us", 100, 20, overhead))
    rows.append(("integrity's share of reading", "5 %", "", f"{speed['integrity_share']:.1%}"))
    flips = document["flips"]
    rows.append((f"bit flips missed, of {flips['tried']}", 0, None, flips["missed"]))
    machine = document["machine"]
    lines = [
        f"{document['teacher']}, V = {document['vocab_size']}, {document['tokens']:,} tokens; "
        f"{machine['date']}, commit {machine['commit']}",
        "",
        "| what | must | aim | got |",
        "|---|---|---|---|",
    ]
    lines += ["| " + " | ".join("" if c is None else str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
