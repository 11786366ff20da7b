"""Scores of one model on a suite: greedy answers and token accuracy, asked once and remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.files import file_sha256

from .gate_settings import GateSettings
from .generate import Output, Speaker, load_speaker
from .laws import Laws, Violation, answers_to_laws, check_all, read_laws
from .suite import AnswerItem, Item, LawItem, Suite, read_suite


class Scorer:
    """A model's answers to a suite; each item is answered at most once."""

    def __init__(self, speaker: Speaker, max_new_tokens: int):
        self.speaker, self.max_new_tokens = speaker, max_new_tokens
        self._outputs: dict[Item, Output] = {}
        self._law_outputs: dict[Item, Output] = {}

    def release(self) -> None:
        """Let the model's memory go; what it answered is kept."""
        self.speaker.model = None

    def outputs(self, items: Sequence[Item]) -> list[Output]:
        """Greedy answers, in the order of the items."""
        asked = [item for item in items if item not in self._outputs]
        answers = self.speaker.answer(asked, self.max_new_tokens) if asked else []
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


def score_alone(
    folder: Path,
    suite: Path,
    *,
    laws: Path | None = None,
    settings: GateSettings,
    device: str = "auto",
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Scores of one model without a reference: of each kind with its interval, the number of
    violations, and each item with what was said. NonFiniteError for a model of NaN."""
    questions = read_suite(suite)
    rules = None if laws is None else read_laws(laws)
    speaker = load_speaker(folder, device, check)
    if rules is not None:
        rules.check_fits(questions, speaker.tokenizer)
    scorer = Scorer(speaker, settings.max_new_tokens)
    scores: dict[str, Any] = {}
    score_of: dict[Item, float] = {}
    for kind in ("recall", "generalize"):
        items = [item for item in questions.of(kind) if isinstance(item, AnswerItem)]
        values = scorer.scores(items)
        score_of.update(zip(items, values, strict=True))
        interval = mean_interval(
            values,
            samples=settings.bootstrap_samples,
            confidence=settings.confidence,
            seed=settings.seed,
        )
        scores[kind] = {
            "score": mean(values),
            "items": len(items),
            "interval": None if interval is None else [*interval],
        }
    found: list[tuple[Item, Violation]] = []
    if rules is not None:
        found, asked = scorer.violations(rules, questions)
        scores["laws"] = {"score": len(found), "items": asked, "interval": None}
    scorer.outputs([item for item in questions.items if scorer.known(item) is None])
    records = [
        {**record, "score": score_of.get(item), "output": record.pop("outputs")["model"]}
        for item, record in zip(
            questions.items, generations(questions, {"model": scorer}), strict=True
        )
    ]
    return {
        "model": folder_name(folder),
        "scores": scores,
        "violations": [{"id": item.id, **violation.__dict__} for item, violation in found],
        "items": records,
        "settings": settings.model_dump(),
        "suite_sha256": file_sha256(suite),
        "laws_sha256": None if laws is None else file_sha256(laws),
    }


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
