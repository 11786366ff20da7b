"""Models of given shapes with random weights, and text, for benchmarks that need no real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.bundled import BUNDLED

SPREAD = 4.0  # standard deviation of real teachers' logits

# hidden, intermediate, layers, heads, key-value heads, vocabulary; Qwen2's shapes, V of Qwen2.5.
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "135M": (576, 1536, 30, 9, 3, 49152),
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "0.4B teacher": (960, 2560, 32, 15, 5, 49152),
    "4.6B teacher": (2560, 11008, 40, 20, 4, 151936),
    "smoke": (16, 32, 2, 2, 1, 2048),
    "smoke teacher": (32, 32, 2, 2, 1, 2048),
}


def make_model(shape: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A model of random weights whose logits are as peaked as real ones."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        # Normalised hidden states have a length of sqrt(hidden).
        model.lm_head.weight.normal_(0.0, SPREAD / hidden**0.5)
    return model


def save_model(model: Any, folder: Path) -> None:
    """Save a model with the bundled tokenizer, made as large as the model's vocabulary, so that a
    store keeps ids of all of it."""
    from logitcache.tokenise import load_tokenizer

    model.save_pretrained(folder)
    load_tokenizer(BUNDLED / "teacher1").save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]  # as added tokens they would take seconds to load
    for number in range(len(vocab), model.config.vocab_size):
        vocab[f"<unused{number}>"] = number
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_text(teacher: Path, path: Path, tokens: int) -> None:
    """The bundled text, again and again in other orders, until there are enough tokens."""
    from logitcache.documents import read_documents
    from logitcache.tokenise import load_tokenizer

    tokenizer = load_tokenizer(teacher)
    source = BUNDLED / "text" / "corpus.jsonl"
    texts = [document.text or "" for document in read_documents((source,))]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    random, lines, left = np.random.default_rng(0), [], tokens
    while left > 0:
        for number in random.permutation(len(texts)):
            lines.append(json.dumps({"text": texts[number]}))
            left -= lengths[number]
            if left <= 0:
                break
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
