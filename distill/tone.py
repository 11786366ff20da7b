"""Tone: how far a model's voice has moved from teacher 1's. docs/evaluation.md has the formulas.

drift = style + tokens, in bits.

style: Jensen-Shannon divergence between the style profiles of both models' generations on the same
prompts (mean of three profiles: characters, pairs of characters, function words), less the noise
floor, and never below 0. The floor is what texts of this size differ by chance: teacher 1 against
itself on other halves of the prompts, halved, since a half has half the text and the divergence of
samples of one distribution falls with their size.

tokens: mean Jensen-Shannon divergence between both models' next-token distributions at the tokens
of the reference texts; 0 where the suite has none.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from logitcache.errors import NonFiniteError

from .generate import Speaker
from .suite import ToneItem

# Shapes: I items, F features of a profile, S resamples, N tokens, V vocabulary.

_HALVINGS = 32
# English closed-class words, old forms included. Text in other languages has none of them: this
# profile is then the same for all, and the characters tell.
_FUNCTION_WORDS = frozenset(
    """
    a about above after again against all am an and any are art as at be because been before being
    below between both but by can could did didst do does doing dost doth down during each ere few
    for from further had hadst has hast hath have having he her here hers herself him himself his
    how i if in into is it its itself just may me might more most must my myself nay never no nor
    not now o of off oft on once only or other ought our ours ourselves out over own same shall
    shalt she should so some still such than that the thee their theirs them themselves then there
    these they thine this those thou though through thus thy thyself till to too unto under until up
    upon us very was wast we were wert what when where which while who whom whose why will wilt with
    would yea ye yet you your yours yourself yourselves
    """.split()  # noqa: SIM905  (a word a line would be a page)
)
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Drift:
    """In bits: total = style + tokens, style = max(0, raw_style - floor); per_item is that of each
    prompt alone, without a floor. interval is of total, or None."""

    total: float
    style: float
    raw_style: float
    floor: float
    tokens: float
    per_item: list[float]
    interval: tuple[float, float] | None


def profiles(text: str) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Counts of characters, of pairs of characters, and of function words (all other words are one)
    of a text, in Unicode's composed form."""
    text = unicodedata.normalize("NFC", text)
    words = (word.lower() for word in _WORD.findall(text))
    return (
        Counter(text),
        Counter(a + b for a, b in itertools.pairwise(text)),
        Counter(word if word in _FUNCTION_WORDS else "" for word in words),
    )


def js_bits(counts_SF: np.ndarray, other_SF: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits [S] between the distributions that rows of counts make; 0
    for two empty rows, 1 for one."""
    totals = [c.sum(-1, keepdims=True) for c in (counts_SF, other_SF)]
    p, q = (c / np.maximum(t, 1) for c, t in zip((counts_SF, other_SF), totals, strict=True))
    m = (p + q) / 2

    def divergence(x: np.ndarray) -> np.ndarray:
        ratio = np.divide(x, m, out=np.ones_like(x), where=x > 0)
        return (x * np.log2(ratio)).sum(-1)

    js_S = np.clip((divergence(p) + divergence(q)) / 2, 0.0, 1.0)
    empty = [t[..., 0] == 0 for t in totals]
    return np.where(empty[0] & empty[1], 0.0, np.where(empty[0] | empty[1], 1.0, js_S))


class _Styles:
    """Counts of each profile [I, F] of two models' texts, over the features that either has."""

    def __init__(self, child: Sequence[str], teacher: Sequence[str]):
        both = [[profiles(text) for text in texts] for texts in (child, teacher)]
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for kind in range(3):
            columns = {
                key: i
                for i, key in enumerate(sorted({k for t in both for c in t for k in c[kind]}))
            }
            matrices = []
            for texts in both:
                counts_IF = np.zeros((len(texts), len(columns)))
                for row, counters in enumerate(texts):
                    for key, count in counters[kind].items():
                        counts_IF[row, columns[key]] = count
                matrices.append(counts_IF)
            self.pairs.append((matrices[0], matrices[1]))

    def between(self, weights_SI: np.ndarray) -> np.ndarray:
        """Style divergence [S] of child and teacher where each item counts as often as said."""
        return self._mean([js_bits(weights_SI @ c, weights_SI @ t) for c, t in self.pairs])

    def within_teacher(self, half_SI: np.ndarray) -> np.ndarray:
        """Style divergence [S] of the teacher between halves of the items: 1 is one, 0 the
        other."""
        return self._mean([js_bits(half_SI @ t, (1 - half_SI) @ t) for _, t in self.pairs])

    @staticmethod
    def _mean(parts: list[np.ndarray]) -> np.ndarray:
        return np.mean(parts, axis=0)


def tone_drift(
    child: Sequence[str],
    teacher: Sequence[str],
    token_js: Sequence[tuple[float, int]],
    *,
    seed: int = 0,
    samples: int = 1000,
    confidence: float = 0.95,
) -> Drift:
    """Drift of a child's generations from teacher 1's, item by item on the same prompts.

    token_js: of each item the sum over its reference's tokens, and how many (0: no reference); see
    token_divergence. samples: resamples of the items for the interval (the floor stays).
    """
    number = len(child)
    styles = _Styles(child, teacher)
    rng = np.random.default_rng(seed)
    floor = 0.0
    if number >= 2:
        half_SI = np.zeros((_HALVINGS, number))
        for row in half_SI:
            row[rng.permutation(number)[: number // 2]] = 1.0
        floor = float(styles.within_teacher(half_SI).mean()) / 2
    sums_I = np.array([total for total, _ in token_js], dtype=float)
    counts_I = np.array([count for _, count in token_js], dtype=float)

    def parts(weights_SI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = weights_SI @ counts_I
        tokens = np.divide(weights_SI @ sums_I, counts, out=np.zeros_like(counts), where=counts > 0)
        return styles.between(weights_SI), tokens

    raw, tokens = (float(part[0]) for part in parts(np.ones((1, number))))
    style = max(0.0, raw - floor)
    per_item = sum(parts(np.eye(number)), start=np.zeros(number)).tolist()
    interval = None
    if samples and number >= 2:
        weights_SI = rng.multinomial(number, np.full(number, 1 / number), size=samples)
        raw_S, tokens_S = parts(weights_SI.astype(float))
        edge = (1 - confidence) / 2
        low, high = np.quantile(np.maximum(raw_S - floor, 0.0) + tokens_S, (edge, 1 - edge))
        interval = (float(low), float(high))
    return Drift(style + tokens, style, raw, floor, tokens, per_item, interval)


@torch.no_grad()
def token_divergence(
    child: Speaker, teacher: Speaker, items: Sequence[ToneItem]
) -> list[tuple[float, int]]:
    """Of each item the sum over its reference's tokens of the Jensen-Shannon divergence in bits
    between both models' next-token distributions, and the number of tokens; (0, 0) without one.

    Both models have the same tokenizer; padding of the vocabulary has no probability.
    """
    texts = [(item.document(), item.reference) for item in items if item.reference is not None]
    results = []
    for (child_NV, _), (teacher_NV, _) in zip(child.read(texts), teacher.read(texts), strict=True):
        js_N = _token_js(child_NV.cpu().double(), teacher_NV.cpu().double())
        results.append((float(js_N.sum()), len(js_N)))
    found = iter(results)
    return [(0.0, 0) if item.reference is None else next(found) for item in items]


def _token_js(first_NV: torch.Tensor, second_NV: torch.Tensor) -> torch.Tensor:
    if not bool(first_NV.isfinite().all() & second_NV.isfinite().all()):
        raise NonFiniteError("a model's logits are NaN or infinite")
    logp, logq = first_NV.log_softmax(-1), second_NV.log_softmax(-1)
    logm = torch.logaddexp(logp, logq) - np.log(2)
    terms_NV = logp.exp() * (logp - logm) + logq.exp() * (logq - logm)
    js_N = (terms_NV.sum(-1) / (2 * np.log(2))).clamp(0.0, 1.0)
    return js_N.masked_fill((logp == logq).all(-1), 0.0)  # not what rounding leaves of it
