"""Whether a store, a student and the settings of a run go together; asked before weights are
loaded, as far as configuration and tokenizer can tell."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import IntervalStrategy

from logitcache.errors import StoreError, UsageError
from logitcache.reader import StoreReader
from logitcache.tokenise import content_sha256, describe_difference, tokenizer_content

from .config import DistillConfig


def check_store(
    reader: StoreReader, tokenizer: Any, model_config: Any, config: DistillConfig
) -> None:
    """Refuse a store that was not made for this student or these settings, saying what differs:
    StoreError, UsageError. model_config: the student's, of transformers."""
    store, manifest = reader.store.path, reader.manifest
    content = tokenizer_content(tokenizer)
    if content_sha256(content) != manifest["tokenizer_sha256"]:
        difference = describe_difference(reader.tokenizer_content, content)
        raise StoreError(
            f"{store}: was built with another tokenizer than the student's: {difference}",
            "train a student that has the teachers' tokenizer, or build a store with this one",
        )
    text_config = model_config.get_text_config()
    _check_width(reader, getattr(text_config, "vocab_size", None))
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and longest < manifest["seq_len"]:
        raise UsageError(
            f"{store}: rows have {manifest['seq_len']} tokens, the student reads at most {longest}",
            f"build a store with --seq-len {longest} or less",
        )
    if config.temperature > reader.max_temperature or config.temperature < min(reader.temperatures):
        raise UsageError(
            f"{store}: temperature: expected {min(reader.temperatures):g} to "
            f"{reader.max_temperature:g}, "
            f"found {config.temperature:g}",
            "choose a smaller one, or build with a larger --sample-temperature",
        )
    sampled = [a["estimator"] for a in reader.store.teachers.values()].count("sampled")
    if sampled and config.divergence != "forward_kl":
        raise UsageError(
            f"{store}: divergence: sampled supports allow forward_kl only, found "
            f"{config.divergence}",
            "build the store with --estimator topk",
        )


def split_rows(reader: StoreReader, args: DistillConfig, has_eval_store: bool) -> tuple[int, int]:
    """Rows to train on, the first ones, and rows that are held out, the last."""
    if args.eval_rows and has_eval_store:
        raise UsageError("eval_rows: expected 0 with an eval store: one of them is evaluated")
    if args.eval_rows >= len(reader):
        raise UsageError(
            f"eval_rows: expected fewer than the store's {len(reader)} rows, found {args.eval_rows}"
        )
    if args.eval_strategy != "no" and not args.eval_rows and not has_eval_store:
        raise UsageError(
            f"eval_strategy: {IntervalStrategy(args.eval_strategy).value} needs held-out rows",
            "give --eval-store, or set eval_rows",
        )
    return len(reader) - args.eval_rows, args.eval_rows


def core_model(model: Any) -> Any:
    """The transformers model inside adapters."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if get_base is not None else model


def check_adapters(model: Any) -> None:
    """Refuse adapters, of PEFT, that the loss would not see. UsageError."""
    if hasattr(core_model(model).get_output_embeddings(), "base_layer"):
        raise UsageError(
            "model: an adapter on the output head, whose weight alone the loss reads",
            "leave the output head out of the adapter's target modules",
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UsageError("model: learned prompts are not supported; expected LoRA or its like")


def check_model_fits(reader: StoreReader, model: Any) -> None:
    """The same of the model itself, a transformers causal language model: its output rows."""
    head = model.get_output_embeddings()
    _check_width(reader, None if head is None else head.weight.shape[0])


def _check_width(reader: StoreReader, width: int | None) -> None:
    if width is not None and width < reader.manifest["vocab_size"]:
        raise StoreError(
            f"{reader.store.path}: vocabulary: expected a student with at least "
            f"{reader.manifest['vocab_size']} output rows, found {width}",
            "resize the student's embeddings",
        )
