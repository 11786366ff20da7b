"""The main job on SmolLM2-135M-Instruct and a fine-tuned generation of it; docs/first-run.md has
its figures.

python -m benchmarks.first_run prepare  --stories FOLDER --out DATA      chats as JSONL
python -m benchmarks.first_run finetune --model FOLDER --data DATA/finetune.jsonl --out GENERATION
python -m benchmarks.first_run run      --teacher1 FOLDER --teacher2 GENERATION --data DATA \\
                                        --out RUN --json FILE

FOLDER of prepare is the unpacked `virtual-stories` package (MIT): user and assistant chats with
tools, of which the system, user and final assistant turns are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_TURN = re.compile(r"^(system|user|assistant channel=final):\n", re.MULTILINE)
_ANY_TURN = re.compile(r"^(?:system|user|tool[^\n]*|assistant[^\n]*):\n", re.MULTILINE)
SEQ_LEN = 1024


def read_story(text: str) -> list[dict[str, str]]:
    """Turns of one story file, without tool calls and the assistant's private notes."""
    messages = []
    starts = [*_ANY_TURN.finditer(text)]
    for turn, following in zip(starts, [*starts[1:], None], strict=True):
        kept = _TURN.match(text, turn.start())
        if kept:
            content = text[turn.end() : following.start() if following else len(text)].strip()
            role = kept.group(1).split()[0]
            if content and not (messages and messages[-1]["role"] == role):
                messages.append({"role": role, "content": content})
    return messages


def prepare(stories: Path, out: Path) -> None:
    """Every second story fine-tunes, every fourth is captured, every 40th of the rest is held
    out."""
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"finetune": [], "capture": [], "heldout": []}
    for number, path in enumerate(sorted(stories.rglob("*_en.txt"))):
        messages = read_story(path.read_text(encoding="utf-8"))
        if not any(m["role"] == "assistant" for m in messages):
            continue
        part = ("finetune", "capture")[number % 2] if number % 4 < 3 else None
        if part is None and number % 40 == 3:
            part = "heldout"
        if part:
            parts[part].append(json.dumps({"messages": messages}, ensure_ascii=False))
    for part, lines in parts.items():
        (out / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{part}: {len(lines)} chats")


def finetune(model_folder: Path, data: Path, out: Path, steps: int, batch_rows: int = 16) -> None:
    """Fine-tune all weights on the assistants' turns: AdamW, 1e-4 with warm-up and linear decay."""
    import torch

    from logitcache.causal_lm import Head, choose_device, hidden_states, load_causal_lm
    from logitcache.documents import read_documents
    from logitcache.packing import pack
    from logitcache.tokenise import Encoder, load_tokenizer

    tokenizer = load_tokenizer(model_folder)
    rows = pack(Encoder(tokenizer).encode(read_documents((data,))), SEQ_LEN)
    device = choose_device("auto")
    model = load_causal_lm(model_folder, torch.float32, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    positions, labels = rows.positions(), rows.labels()
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * min((step + 1) / 20, (steps - step) / steps)
        pick = torch.randint(0, len(labels), (batch_rows,), generator=generator).numpy()
        tokens = torch.from_numpy(rows.tokens[pick].astype("int64")).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = hidden_states(model, tokens, torch.from_numpy(positions[pick]).to(device))
            target = torch.from_numpy(labels[pick]).to(device).flatten()
            kept = (target != -100).nonzero()[:, 0]
            logits = Head.of(model).logits(hidden.flatten(0, 1)[kept])
            loss = torch.nn.functional.cross_entropy(logits.float(), target[kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _command(*words: str) -> dict[str, Any]:
    print("$", *words, flush=True)
    run = subprocess.run(
        [sys.executable, "-m", *words, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def run(
    teacher1: Path, teacher2: Path, data: Path, out: Path, json_file: Path | None, steps: int
) -> None:
    """Build both stores, train, and compare; prints the figures and writes them as JSON."""
    from logitcache.environment import describe_environment

    build = ["logitcache", "build", "--teacher1", str(teacher1), "--teacher2", str(teacher2)]
    build += ["--seq-len", str(SEQ_LEN)]
    store = _command(*build, "--data", f"{data}/capture.jsonl", "--out", f"{out}/store")
    held_out = _command(
        *build,
        *("--data", f"{data}/heldout.jsonl", "--out", f"{out}/heldout-store"),
        *("--estimator", "topk", "--top-k", "256", "--min-prob", "0", "--precision", "high"),
    )
    settings = [
        f"max_steps={steps}",
        "per_device_train_batch_size=16",
        "learning_rate=5e-5",
        "warmup_steps=20",
        "temperature=1.5",
        "ema_decay=0.98",
        "save_strategy=no",
    ]
    trained = _command(
        *("distill", "train", "--store", f"{out}/store", "--student", str(teacher1)),
        *("--eval-store", f"{out}/heldout-store", "--out", f"{out}/student"),
        *(part for setting in settings for part in ("--set", setting)),
    )
    other = _evaluate(teacher2, out / "heldout-store")
    result = {
        "environment": describe_environment(),
        "store": store,
        "heldout_store": held_out,
        "train": trained,
        "teacher2": other,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for teacher in store["teachers"]:
        name = teacher["name"]
        print(
            f"{name}: {store['tokens_per_second'].get(name, 0):,.0f} tokens/s, "
            f"{teacher['bytes_per_token']:.1f} bytes/token, {teacher['mean_support']:.1f} entries"
        )
    print(f"tokens {store['tokens']:,}, trained on {store['valid_tokens']:,}")
    print(
        f"build peak {store['gpu_memory_peak_bytes']}, train peak "
        f"{trained['gpu_memory_peak_bytes']}"
    )
    print(f"train {trained['median_tokens_per_second']:,.0f} tokens/s, {trained['steps']} steps")
    for name, metrics in (("before", trained["before"]), ("after", trained["after"])):
        print(name, {k: round(v, 4) for k, v in metrics.items()})
    print("teacher2", {k: round(v, 4) for k, v in other.items()})


def _evaluate(folder: Path, store: Path) -> dict[str, float]:
    import torch

    from distill.evaluate import evaluate_on_store
    from logitcache import open_store
    from logitcache.causal_lm import choose_device, load_causal_lm
    from logitcache_kernels import DistillSpec

    device = choose_device("auto")
    model = load_causal_lm(folder, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return evaluate_on_store(model, open_store(store), DistillSpec())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("prepare")
    part.add_argument("--stories", type=Path, required=True)
    part.add_argument("--out", type=Path, required=True)
    part = commands.add_parser("finetune")
    part.add_argument("--model", type=Path, required=True)
    part.add_argument("--data", type=Path, required=True)
    part.add_argument("--out", type=Path, required=True)
    part.add_argument("--steps", type=int, default=400)
    part = commands.add_parser("run")
    for name in ("--teacher1", "--teacher2", "--data", "--out"):
        part.add_argument(name, type=Path, required=True)
    part.add_argument("--json", type=Path)
    part.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.stories, arguments.out)
    elif arguments.command == "finetune":
        finetune(arguments.model, arguments.data, arguments.out, arguments.steps)
    else:
        run(
            arguments.teacher1,
            arguments.teacher2,
            arguments.data,
            arguments.out,
            arguments.json,
            arguments.steps,
        )


if __name__ == "__main__":
    main()
