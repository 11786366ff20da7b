"""Taboo words on the bundled generations: what a child no longer says, and what it costs.

python -m benchmarks.taboo --out FOLDER --json FILE [--steps 120]

A child of both generations is trained with taboo words and one without, all else alike, on a CPU.
Mass: mean probability of taboo tokens over the held-out text. Loss: cross entropy on the same text,
in nats per token, taboo words included. What is there in FOLDER already is used.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

WORDS = ("lord", "love", "death", "good night")
SETTINGS: dict[str, Any] = {
    "learning_rate": 1.2e-3,
    "warmup_steps": 5,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 16,
    "temperature": 1.0,
    "alpha": 0.05,
    "gold_weight": 0.1,
    "ema_decay": 0.9,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


def run(out: Path, steps: int) -> dict[str, Any]:
    """Build the stores, train both children, measure; gives the record."""
    import torch

    from distill.bundled import BUNDLED
    from distill.config import DistillConfig
    from distill.evaluate import evaluate_on_store
    from distill.taboo import describe_taboo, read_taboo, taboo_mass
    from distill.train import TrainRequest, train
    from logitcache import build, open_store
    from logitcache.causal_lm import load_causal_lm
    from logitcache.environment import describe_environment
    from logitcache.tokenise import load_tokenizer

    started = time.monotonic()
    teachers = {name: BUNDLED / name for name in ("teacher1", "teacher2")}
    common: dict[str, Any] = {**teachers, "seq_len": 256, "device": "cpu"}
    build(out=out / "store", data=[BUNDLED / "text" / "corpus.jsonl"], **common)
    whole = {"estimator": "topk", "top_k": 256, "min_prob": 0.0, "precision": "high"}
    held = out / "heldout-store"
    build(out=held, data=[BUNDLED / "text" / "heldout.jsonl"], **whole, **common)
    words = out / "words.txt"
    words.write_text("\n".join(WORDS) + "\n", encoding="utf-8")

    folders = dict(teachers)
    for name, taboo in (
        ("child", {"taboo_words": str(words), "taboo_variants": True}),
        ("plain", {}),
    ):
        folders[name] = out / name
        settings = {**SETTINGS, **taboo, "max_steps": steps}
        print(f"training {name}: {steps} steps", flush=True)
        train(TrainRequest(out / "store", teachers["teacher1"], folders[name], None, settings))
    spec = DistillConfig(output_dir=str(out), **SETTINGS).spec()
    reader = open_store(held)
    models: dict[str, Any] = {}
    for name, folder in folders.items():
        model = load_causal_lm(folder, torch.float32, torch.device("cpu"))
        models[name] = {
            "taboo_mass": taboo_mass(folder, held, words, variants=True, device="cpu"),
            "loss": evaluate_on_store(model, reader, spec)["loss"],
        }
    taboo = read_taboo(words, load_tokenizer(teachers["teacher1"]), True)
    described = describe_taboo(taboo, load_tokenizer(teachers["teacher1"]), reader)
    first, child = models["teacher1"], models["child"]
    return {
        "benchmark": "taboo",
        "words": list(WORDS),
        "ids": described["ids"],
        "phrases": described["phrases"],
        "heldout_touched": described["touched"],
        "settings": {**SETTINGS, "steps": steps, "taboo_variants": True},
        "models": models,
        "mass_child_over_teacher1": child["taboo_mass"] / first["taboo_mass"],
        "loss_child_over_teacher1": child["loss"] / first["loss"],
        "loss_child_over_plain": child["loss"] / models["plain"]["loss"],
        "environment": describe_environment(),
        "seconds": round(time.monotonic() - started, 1),
    }


def table(record: dict[str, Any]) -> str:
    lines = [f"{'':10}{'taboo mass':>12}{'held-out loss':>15}"]
    lines += [
        f"{name:10}{model['taboo_mass']:12.2e}{model['loss']:15.4f}"
        for name, model in record["models"].items()
    ]
    lines.append(
        f"child / teacher 1: mass {record['mass_child_over_teacher1']:.3f}, loss "
        f"{record['loss_child_over_teacher1']:.4f}; child / plain: loss "
        f"{record['loss_child_over_plain']:.4f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for what it makes")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    from logitcache.command import quiet_libraries
    from logitcache.files import to_json

    quiet_libraries()
    record = run(arguments.out, arguments.steps)
    print(table(record))
    if arguments.json:
        arguments.json.write_text(to_json(record), encoding="utf-8")


if __name__ == "__main__":
    main()
