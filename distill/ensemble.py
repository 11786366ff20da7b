"""Several generations answering as one: the weighted average of what they predict.

Predictions are averaged, never weights: the average of two models' weights is a broken model.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from logitcache.causal_lm import check_model_folder, choose_device, choose_dtype, load_causal_lm
from logitcache.errors import StoreError, UsageError
from logitcache.tokenise import describe_difference, load_tokenizer, tokenizer_content

from .generate import stop_ids

# Shapes: B rows, L tokens, V vocabulary (the tokenizer's).

MIXES = ("logits", "probs")


class EnsembleCache(Cache):
    """The cache of each model, kept in step."""

    def __init__(self, caches: Sequence[Any]):
        super().__init__(layers=[])
        self.caches = list(caches)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.caches[0].get_seq_length())

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Each beam goes on from the beam that it came from, in every model."""
        for cache in self.caches:
            cache.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        for cache in self.caches:
            cache.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for cache in self.caches:
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for cache in self.caches:
            cache.batch_select_indices(indices)

    def reset(self) -> None:
        for cache in self.caches:
            cache.reset()


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language models with one tokenizer as one model: generate() and forward() as of any.

    mix "logits": logits = sum_g w_g logits_g (a geometric mean of the distributions, normalised);
    mix "probs": logits = log sum_g w_g softmax(logits_g). Weights are positive and are divided by
    their sum. Logits are float32 [B, L, V]; padding of a model's vocabulary is cut off.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "models"

    def __init__(
        self,
        models: Sequence[Any],
        tokenizer: Any,
        weights: Sequence[float] | None = None,
        mix: str = "logits",
    ):
        weights = [1.0] * len(models) if weights is None else weights
        check_mix(len(models), weights, mix)
        config = copy.deepcopy(models[0].config.get_text_config())
        config.vocab_size = len(tokenizer)
        config._attn_implementation = "eager"  # this class has no attention of its own
        super().__init__(config)
        self.models = torch.nn.ModuleList(models)
        self.mix = mix
        self.weights = [weight / math.fsum(weights) for weight in weights]
        found = sorted(frozenset().union(*(stop_ids(model, tokenizer) for model in models)))
        self.generation_config = GenerationConfig(
            eos_token_id=found or None, pad_token_id=min(found, default=0)
        )
        lengths = [
            getattr(model.config.get_text_config(), "max_position_embeddings", None)
            for model in models
        ]
        config.max_position_embeddings = min((n for n in lengths if n is not None), default=None)
        self._takes_part = [
            "logits_to_keep" in inspect.signature(model.forward).parameters for model in models
        ]

    @classmethod
    def from_folders(
        cls,
        folders: Sequence[Path],
        weights: Sequence[float] | None = None,
        mix: str = "logits",
        device: str = "auto",
    ) -> tuple[EnsembleForCausalLM, Any]:
        """Load an ensemble and its tokenizer. StoreError if the tokenizers differ, by content."""
        check_mix(len(folders), [1.0] * len(folders) if weights is None else weights, mix)
        check_same_tokenizer(folders)
        chosen = choose_device(device)
        dtype = choose_dtype("auto", chosen)
        models = [load_causal_lm(folder, dtype, chosen) for folder in folders]
        tokenizer = load_tokenizer(folders[0])
        return cls(models, tokenizer, weights, mix).eval(), tokenizer

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() makes no cache: each model makes its own at the first step

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("an ensemble is several models and is not saved as one; keep their folders")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, V] of the mix (the last logits_to_keep positions; 0: all), and the
        caches."""
        caches = [None] * len(self.models) if past_key_values is None else past_key_values.caches
        mixed_BLV: torch.Tensor | None = None
        after = []
        for number, (model, weight, cache) in enumerate(
            zip(self.models, self.weights, caches, strict=True)
        ):
            kept = {"logits_to_keep": logits_to_keep} if self._takes_part[number] else {}
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=use_cache,
                **kept,
            )
            logits_BLV = output.logits[:, -logits_to_keep:, : self.config.vocab_size].float()
            if self.mix == "logits":
                part_BLV = weight * logits_BLV
                mixed_BLV = part_BLV if mixed_BLV is None else mixed_BLV + part_BLV
            else:
                part_BLV = logits_BLV.log_softmax(-1) + math.log(weight)
                mixed_BLV = part_BLV if mixed_BLV is None else mixed_BLV.logaddexp(part_BLV)
            after.append(output.past_key_values)
        together = EnsembleCache(after) if use_cache and None not in after else None
        return CausalLMOutputWithPast(logits=mixed_BLV, past_key_values=together)


def check_mix(number: int, weights: Sequence[float], mix: str) -> None:
    """UsageError for weights that do not go with so many models, or a mix that is none."""
    problems = []
    if number == 0:
        problems.append("expected at least one model, found none")
    if len(weights) != number:
        problems.append(f"expected a weight for each of {number} models, found {len(weights)}")
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        problems.append(f"weights: expected positive numbers, found {wrong[0]:g}")
    if mix not in MIXES:
        problems.append(f"mix: expected {' or '.join(MIXES)}, found {mix!r}")
    if problems:
        raise UsageError("\n".join(problems))


def check_same_tokenizer(folders: Sequence[Path]) -> None:
    """Refuse what is no model folder, and models that would not read the same tokens."""
    for folder in folders:
        check_model_folder(folder)
    contents = [tokenizer_content(load_tokenizer(folder)) for folder in folders]
    for folder, content in zip(folders[1:], contents[1:], strict=True):
        if content != contents[0]:
            raise StoreError(
                f"{folder}: its tokenizer is not that of {folders[0]}: "
                f"{describe_difference(contents[0], content)}",
                "models of one lineage have the same tokenizer",
            )


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in memory, from the headers of its files alone."""
    check_model_folder(folder)
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (a file is not a mapping)
                    total += math.prod(file.get_slice(name).get_shape())
        except Exception as error:  # safetensors raises a kind of its own
            raise StoreError(f"{path}: its header cannot be read: {error}") from None
    return total * dtype.itemsize
