"""Scores of one model on a suite: greedy answers and token accuracy, asked once and remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .generate import Output, Speaker
from .laws import Laws, Violation, answers_to_laws, check_all
from .suite import AnswerItem, Item, LawItem, Suite


class Scorer:
    """A model's answers to a suite; each item is answered at most once."""

    def __init__(self, speaker: Speaker, max_new_tokens: int):
        self.speaker, self.max_new_tokens = speaker, max_new_tokens
        self._outputs: dict[Item, Output] = {}
        self._law_outputs: dict[Item, Output] = {}

    def outputs(self, items: Sequence[Item]) -> list[Output]:
        """Greedy answers, in the order of the items."""
        asked = [item for item in items if item not in self._outputs]
        answers = self.speaker.answer(asked, self.max_new_tokens)
        for item, output in zip(asked, answers, strict=True):
            self._outputs[item] = output
        return [self._outputs[item] for item in items]

    def known(self, item: Item) -> str | None:
        """What the model answered, if it was asked and did answer."""
        output = self._law_outputs.get(item) or self._outputs.get(item)
        return None if output is None else output.text

    def scores(self, items: Sequence[AnswerItem]) -> list[float]:
        """A score in [0, 1] of each item; see AnswerItem."""
        outputs = self.outputs(items)
        read = [item for item in items if item.score == "tokens"]
        accuracy = iter(
            self.speaker.token_accuracy([(item.document(), item.expect) for item in read])
        )
        return [
            next(accuracy) if item.score == "tokens" else _compare(item, output.text)
            for item, output in zip(items, outputs, strict=True)
        ]

    def violations(self, laws: Laws, suite: Suite) -> tuple[list[tuple[Item, Violation]], int]:
        """What the answers to all items of the suite, and to prompts that must be refused, break;
        and how many answers were looked at."""
        asked = laws.items(suite)
        for item, output in zip(
            asked, answers_to_laws(self.speaker, laws, asked, self.max_new_tokens), strict=True
        ):
            self._law_outputs[item] = output
        others: list[Item] = [item for item in suite.items if not isinstance(item, LawItem)]
        items: list[Item] = [*asked, *others]
        outputs = [*(self._law_outputs[item] for item in asked), *self.outputs(others)]
        return check_all(laws, items, outputs, self.speaker.tokenizer), len(items)


def _compare(item: AnswerItem, output: str) -> float:
    said, expected = output.strip(), item.expect.strip()
    return float(said == expected if item.score == "exact" else expected in said)


def mean(values: Sequence[float]) -> float | None:
    """None for no values."""
    return float(np.mean(values)) if values else None


def mean_interval(
    values: Sequence[float], *, samples: int, confidence: float, seed: int
) -> tuple[float, float] | None:
    """Bootstrap interval of the mean over items; None for fewer than two of them."""
    if len(values) < 2 or not samples:
        return None
    rng = np.random.default_rng(seed)
    array = np.asarray(values, dtype=float)
    weights_SI = rng.multinomial(len(array), np.full(len(array), 1 / len(array)), size=samples)
    edge = (1 - confidence) / 2
    low, high = np.quantile(weights_SI @ array / len(array), (edge, 1 - edge))
    return float(low), float(high)


def generations(suite: Suite, scorers: Mapping[str, Scorer]) -> list[dict[str, Any]]:
    """A record per item of the suite with what each model answered."""
    records = []
    for item in suite.items:
        outputs = {name: text for name, s in scorers.items() if (text := s.known(item)) is not None}
        expect = item.expect if isinstance(item, AnswerItem) else None
        records.append(
            {
                "id": item.id,
                "kind": item.kind,
                "prompt": item.text,
                "expect": expect,
                "outputs": outputs,
            }
        )
    return records


def folder_name(folder: Path) -> str:
    """What a model is called in a record: the name of its folder, wherever that is."""
    return folder.resolve().name
