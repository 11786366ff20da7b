"""README.md of a student: what it was distilled from and how, as a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
_SPEC = ("temperature", "alpha", "beta", "gamma", "divergence", "tail", "js_threshold")
_GATE = ("confidence", "confidence_threshold", "gold_weight", "taboo")
_TRAINING = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
_OTHERS = ("ema_decay", "lora_rank", "seed")


def escaped(text: str) -> str:
    """A name of somebody else's as plain text in Markdown and HTML, on one line."""
    printable = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>&~:/@$^=\"'])", r"\\\1", printable)


def _quoted(text: str) -> str:
    """A string of YAML, which JSON is, without what HTML would take for a tag."""
    return re.sub(r"[<>&]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text))


def model_card(record: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The text of a card; record: of the run, see train.py. manifest: the store's."""
    student = Path(record["student"]).name
    teachers = record["identity"]["store"]["teachers"]
    settings = record["settings"]
    names = [*_SPEC, *_GATE, *_TRAINING, *_OTHERS]
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {_quoted(student)}",
        "tags: [distillation, logitcache]",
        "---",
        "",
        f"# Distilled from {len(teachers)} teacher{'s' if len(teachers) > 1 else ''}",
        "",
        f"Started from {escaped(student)} and trained for {record['steps']} steps on what these "
        "teachers, run once over the text, gave every token. The weights here are an exponential "
        "moving average of training; the last ones are in `raw/`."
        if settings.get("ema_decay")
        else f"Started from {escaped(student)} and trained for {record['steps']} steps on what "
        "these teachers, run once over the text, gave every token.",
        "",
        "| | SHA-256 of weights | kept of each distribution |",
        "|---|---|---|",
    ]
    for name, teacher in teachers.items():
        kept = f"{teacher['estimator']}, min_prob {teacher.get('min_prob')}"
        lines.append(f"| {name} | `{teacher['model']['weights_sha256']}` | {kept} |")
    lines += [
        "",
        f"Text: {manifest['documents']} documents, {manifest['tokens']} tokens in "
        f"{manifest['rows']} rows of {manifest['seq_len']}:",
        "",
        *(f"* {escaped(file['name'])}, SHA-256 `{file['sha256']}`" for file in _files(manifest)),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {escaped(str(settings[name]))} |" for name in names if name in settings),
        f"| processes | {record['identity']['settings']['processes']} |",
        "",
    ]
    before, after = record.get("before"), record.get("after")
    if before and after:
        lines += [
            "| held-out text | before | after |",
            "|---|---|---|",
            f"| loss (nats per token) | {before['before_loss']:.4f} | {after['after_loss']:.4f} |",
            f"| KL to the gated target | {before['before_kl']:.4f} | {after['after_kl']:.4f} |",
            "",
        ]
    lines.append("`run.json` holds all settings, versions and hardware; `log.jsonl` every step.")
    return "\n".join(lines) + "\n"


def _files(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    return list(manifest["data_files"])
