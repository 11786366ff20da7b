"""Asking a model: greedy generation in batches, and what it expects at each token of a text.

Deterministic: prompts go longest first, those of one length in their order, into batches of a fixed
number of tokens, padded on the left where there is no attention. What is computed for a prompt does
not depend on its neighbours except through rounding (float32 on a CPU), which decides only where
two tokens are equally likely to six digits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from logitcache.causal_lm import choose_device, choose_dtype, load_causal_lm
from logitcache.documents import Document
from logitcache.errors import InputError, NonFiniteError
from logitcache.tokenise import Encoder, load_tokenizer

from .suite import Item

# Tokens of a batch with those to come.
_BATCH_TOKENS = {"cpu": 2**12, "cuda": 2**15}

# Shapes: B prompts, L longest prompt, N tokens of an answer, V vocabulary (the tokenizer's).


@dataclass(frozen=True)
class Output:
    """What a model said: its tokens without the one that ended it, and their text without special
    tokens."""

    text: str
    token_ids: tuple[int, ...]


class Speaker:
    """A model and its tokenizer, to be asked in batches; it may be in training, and is left so.

    check is called at each step; what it raises ends the generation.
    """

    def __init__(self, model: Any, tokenizer: Any, check: Callable[[], None] = lambda: None):
        self.model, self.tokenizer, self.check = model, tokenizer, check
        self.encoder = Encoder(tokenizer)
        self.num_tokens = len(tokenizer)  # ids above are padding of the embeddings
        self.stop_ids = stop_ids(model, tokenizer)
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[Output]:
        """Greedy generations for items of a suite, in their order."""
        prompts = [self.encoder.prompt(item.document()) for item in items]
        for item, prompt in zip(items, prompts, strict=True):
            self.check_length(f"suite item {item.id}", len(prompt), max_new_tokens)
        return self.generate(prompts, max_new_tokens)

    def check_length(self, name: str, length: int, max_new_tokens: int) -> None:
        """Refuse a prompt that is empty or, with its answer, longer than the model can read."""
        if length == 0:
            raise InputError(f"{name}: its prompt has no tokens")
        if self.context is not None and length + max_new_tokens > self.context:
            raise InputError(
                f"{name}: {length} tokens of prompt and {max_new_tokens} to come; the "
                f"model reads at most {self.context}",
                "shorten the prompt, or lower max_new_tokens",
            )

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Output]:
        """The tokens that the model puts first, one after the other (the lowest id of equal ones),
        up to the end that it sets or max_new_tokens. NonFiniteError for NaN or infinite logits."""
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=min(self.stop_ids, default=0),
        )
        outputs: dict[int, Output] = {}
        for batch in _batches([len(p) + max_new_tokens for p in prompts], self._budget()):
            made = self.generate_with([prompts[index] for index in batch], config)
            outputs.update(zip(batch, made, strict=True))
        return [outputs[index] for index in range(len(prompts))]

    @torch.no_grad()
    def generate_with(
        self, prompts: Sequence[list[int]], config: GenerationConfig, streamer: Any = None
    ) -> list[Output]:
        """Go on with prompts in one batch, by settings that name the tokens of end and padding."""
        pad, length = config.pad_token_id, max(map(len, prompts))
        tokens_BL = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])
        mask_BL = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
        with _plain(self.model, config) as model:
            made_BN = model.generate(
                input_ids=tokens_BL.to(self.device),
                attention_mask=mask_BL.to(self.device),
                logits_processor=LogitsProcessorList([_Checked(self.num_tokens, self.check)]),
                streamer=streamer,
            )[:, length:].tolist()
        return [self._output(token_ids) for token_ids in made_BN]

    def token_accuracy(self, texts: Sequence[tuple[Document, str]]) -> list[float]:
        """Share of the tokens of each answer that the model puts first when it reads the prompt and
        the answer's tokens before; padding of the vocabulary is no token."""
        accuracies: list[float] = []
        for logits_NV, target_N in self.read(texts):
            if not bool(logits_NV.isfinite().all()):
                raise NonFiniteError("the model's logits are NaN or infinite")
            accuracies.append(float((logits_NV.argmax(-1) == target_N).float().mean()))
        return accuracies

    @torch.no_grad()
    def read(
        self, texts: Sequence[tuple[Document, str]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits [N, V] in float32 and token ids [N] at the tokens of each answer after its prompt,
        in order. InputError for an answer that is too long for the model."""
        for document, answer in texts:
            self.check()
            ids, first = self.encoder.continuation(document, answer)
            if first == 0:  # the model cannot be asked for what nothing comes before
                first = 1
            if first >= len(ids):
                raise InputError(f"{document.where}: its answer has no tokens after the prompt")
            if self.context is not None and len(ids) > self.context:
                raise InputError(
                    f"{document.where}: prompt and answer have {len(ids)} tokens; the model reads "
                    f"at most {self.context}"
                )
            tokens_1L = torch.tensor([ids], device=self.device)
            needed = len(ids) - first + 1  # the last one foretells what comes after the answer
            with _plain(self.model, self.model.generation_config) as model:
                takes = "logits_to_keep" in inspect.signature(model.forward).parameters
                kept = {"logits_to_keep": needed} if takes else {}
                logits_1LV = model(input_ids=tokens_1L, use_cache=False, **kept).logits
            logits_NV = logits_1LV[0, -needed:-1, : self.num_tokens].float()
            yield logits_NV, tokens_1L[0, first:]

    def _budget(self) -> int:
        return _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cpu"])

    def _output(self, token_ids: list[int]) -> Output:
        for index, token in enumerate(token_ids):
            if token in self.stop_ids:
                token_ids = token_ids[:index]
                break
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return Output(text, tuple(token_ids))


def load_speaker(
    folder: Path, device: str = "auto", check: Callable[[], None] = lambda: None
) -> Speaker:
    """Load a model folder to be asked: float32 on a CPU, bfloat16 on a GPU."""
    tokenizer = load_tokenizer(folder)
    chosen = choose_device(device)
    model = load_causal_lm(folder, choose_dtype("auto", chosen), chosen)
    return Speaker(model, tokenizer, check)


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a generation: the model's own, the tokenizer's end of sequence, and the
    special token that ends an assistant's turn in the chat template."""
    found: set[int] = set()
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for token in [eos] if isinstance(eos, int) else eos or []:
        found.add(int(token))
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if tokenizer.chat_template:
        turn_end = _turn_end(tokenizer)
        if turn_end is not None:
            found.add(turn_end)
    return frozenset(found)


def _turn_end(tokenizer: Any) -> int | None:
    said = "logitcache"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # a template raises whatever its author chose; it then ends no turn for us
        return None
    after = text.rpartition(said)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return next((int(i) for i in ids if i in special), None)


class _Checked(LogitsProcessor):
    """Refuses NaN and infinity, never chooses a padded id, and lets the caller stop."""

    def __init__(self, num_tokens: int, check: Callable[[], None]):
        self.num_tokens, self.check = num_tokens, check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.check()
        if bool(scores.isnan().any() | scores.isposinf().any()):
            raise NonFiniteError("the model's logits are NaN or infinite")
        scores[:, self.num_tokens :] = -torch.inf
        return scores


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _plain(model: Any, config: GenerationConfig) -> Iterator[Any]:
    """The model with these settings of generation alone (a folder may bring a repetition penalty of
    its own) and, in training, with the forward of its class: generate() looks at its signature."""
    before = model.generation_config
    replaced = {
        module: module.__dict__.pop("forward")
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and "forward" in module.__dict__
        and not hasattr(module, "_hf_hook")  # accelerate moves weights in its forward
    }
    model.generation_config = config
    try:
        with _evaluating(model):
            yield model
    finally:
        model.generation_config = before
        for module, forward in replaced.items():
            module.forward = forward


def _batches(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of at most ``budget`` tokens, the longest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not batches or (len(batches[-1]) + 1) * sizes[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches
