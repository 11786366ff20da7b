"""The page of ``logitcache inspect``: figures, the gate over its two thresholds, rows token by
token."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from logitcache_kernels import STRATEGY_NAMES

from .inspect import Extreme, Measured, gate_positions, rows_to_show
from .padded import TeacherSupport
from .page import render_page, visible
from .pieces import Pieces
from .plots import histogram
from .reader import StoreReader, TeacherBatch

MOST_TOKENS = 2048  # of a row, on the page
_DEFAULT_TOKENS = 1536  # of all rows, where none are named
_TOP = 5  # tokens of each teacher in a tooltip
_BEFORE = 12  # tokens of context in the list of the largest JS
_BARS = 40  # of a histogram
_MAP_CELLS = (50, 25)  # of the map of JS and confidence
COLOURS = {"BLENDED": "s0", "T1_ONLY": "s1", "GOLD_FALLBACK": "s2", "SKIP": "s3"}
# Steps of shading: smallest value of each. JS piles up near 0, confidence does not.
JS_LEVELS = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75)
CONFIDENCE_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)


def make_page(
    reader: StoreReader,
    found: Measured,
    document: dict[str, Any],
    info: dict[str, Any],
    rows: list[int] | None,
    seed: int,
) -> str:
    """The page as HTML. document: the figures, info: of ``describe_store``. rows: what --rows
    named, None for those with the largest mean JS."""
    seq_len = int(reader.manifest["seq_len"])
    chosen = rows
    if chosen is None:
        chosen = rows_to_show(found, min(max(_DEFAULT_TOKENS // seq_len, 1), 8))
    pieces = Pieces(reader.tokenizer_content)
    shown = _Shown(reader, found, pieces)
    both = len(reader.store.teachers) == 2
    extremes = [_extreme(reader, pieces, entry) for entry in found.extremes] if both else []
    return render_page(
        "logitcache",
        "inspect",
        document=document,
        info=info,
        both=both,
        sampled=len(found.rows) < found.store_rows,
        seed=seed,
        named=rows is not None,
        rows=[shown.row(row) for row in chosen],
        most_tokens=MOST_TOKENS,
        cut=seq_len > MOST_TOKENS,
        levels=list(JS_LEVELS if both else CONFIDENCE_LEVELS),
        strategies=list(zip(STRATEGY_NAMES, COLOURS.values(), strict=True)),
        extremes=extremes,
        map_cells=_map(found) if both else [],
        js_plot=js_plot(found),
        confidence_plot=confidence_plot(found),
        data={
            "js_edges": document["js_histogram"]["edges"],
            "confidence_edges": document["confidence_histogram"]["edges"],
            "cells": _cells(found),
            "start": _thresholds(found),
            "bars": _BARS,
            "rows": shown.tokens,
            "pieces": {str(i): _spell(pieces.text(i)) for i in sorted(shown.used)},
            "teachers": list(reader.store.teachers),
        },
    )


def _cells(found: Measured) -> list[int]:
    """The cells that hold something: JS, confidence, gold and count of each, end to end."""
    j, c, gold = np.nonzero(found.counts_JC2)
    return np.stack([j, c, gold, found.counts_JC2[j, c, gold]], 1).ravel().tolist()


def _thresholds(found: Measured) -> list[int]:
    """Which edges the thresholds are: JS and confidence."""
    spec = found.spec
    return [
        int(np.searchsorted(found.js_edges, np.float32(spec.js_threshold))),
        int(np.searchsorted(found.confidence_edges, np.float32(spec.confidence_threshold))),
    ]


def split_by_strategy(found: Measured) -> np.ndarray:
    """The histogram with each cell under the strategy it has at the thresholds: [4, J, C]."""
    spec = found.spec
    both = len(found.sum_confidence) == 2
    apart_J1 = (found.js_edges >= np.float32(spec.js_threshold))[:, None]
    upper = np.append(found.confidence_edges[1:], np.inf)
    sure_C = np.append(False, upper > np.float32(spec.confidence_threshold))
    plain_JC, gold_JC = found.counts_JC2[:, :, 0], found.counts_JC2[:, :, 1]
    both_JC = plain_JC + gold_JC
    if not both:
        return np.stack([both_JC * 0, both_JC, both_JC * 0, both_JC * 0])
    return np.stack(
        [
            both_JC * ~apart_J1,
            both_JC * (apart_J1 & sure_C),
            gold_JC * (apart_J1 & ~sure_C),
            plain_JC * (apart_J1 & ~sure_C),
        ]
    )


def _bars(
    values_SX: np.ndarray, bins: np.ndarray, total: int
) -> dict[tuple[str, str], list[float]]:
    """Shares per bar and strategy of values along one axis, whose cells belong to ``bins``."""
    return {
        (name, COLOURS[name]): (
            np.bincount(bins, values_SX[number], minlength=_BARS)[:_BARS] / max(total, 1)
        ).tolist()
        for number, name in enumerate(STRATEGY_NAMES)
    }


def js_plot(found: Measured) -> Markup:
    """Histogram of JS, each bar by strategy at the thresholds."""
    bins = np.clip((found.js_edges.astype(float) * _BARS + 1e-6).astype(int), 0, _BARS - 1)
    stacks = _bars(split_by_strategy(found).sum(2), bins, found.positions)
    edges = (np.arange(_BARS + 1) / _BARS).tolist()
    return histogram(edges, stacks, "JS, bits", "share of positions", "js-plot")


def confidence_plot(found: Measured) -> Markup:
    """Histogram of teacher 1's confidence, each bar by strategy at the thresholds."""
    lower = np.append(0.0, found.confidence_edges.astype(float))
    bins = np.clip((lower * _BARS + 1e-6).astype(int), 0, _BARS - 1)
    stacks = _bars(split_by_strategy(found).sum(1), bins, found.positions)
    edges = (np.arange(_BARS + 1) / _BARS).tolist()
    return histogram(
        edges, stacks, "confidence of teacher 1", "share of positions", "confidence-plot"
    )


def _map(found: Measured) -> list[dict[str, float]]:
    """Cells of the map of JS (across) and confidence (up) with a level from 1 to 8 by the logarithm
    of their count."""
    across, up = _MAP_CELLS
    x = np.clip((found.js_edges.astype(float) * across + 1e-6).astype(int), 0, across - 1)
    lower = np.append(0.0, found.confidence_edges.astype(float))
    y = np.clip((lower * up + 1e-6).astype(int), 0, up - 1)
    counts = np.zeros((across, up), np.int64)
    np.add.at(counts, (x[:, None], y[None, :]), found.counts_JC2.sum(2))
    most = np.log1p(max(int(counts.max()), 1))
    return [
        {
            "x": i / across,
            "y": 1 - (j + 1) / up,
            "level": int(np.ceil(8 * np.log1p(counts[i, j]) / most)),
            "count": int(counts[i, j]),
        }
        for i, j in zip(*np.nonzero(counts), strict=True)
    ]


def _spell(text: str) -> str:
    """A token by itself, with what would not show: line feeds and tabs as arrows."""
    return visible(text).replace("\n", "\u21b5").replace("\t", "\u21e5")


def _probability(logp: float) -> float:
    return float(f"{np.exp(logp):.4g}") if np.isfinite(logp) else 0.0


def _top(teacher: TeacherSupport, at: int) -> list[Any]:
    """Id and probability of a teacher's likeliest certain tokens, end to end."""
    ids, logp = teacher.ids_PK[at], teacher.logp_PK[at]
    certain = ids >= 0
    if teacher.inclusion_PK is not None:
        certain &= teacher.inclusion_PK[at] >= 1
    order = np.argsort(np.where(certain, -logp, np.inf), kind="stable")[:_TOP]
    return [v for i in order if certain[i] for v in (int(ids[i]), _probability(float(logp[i])))]


class _Shown:
    """Rows as the page shows them: spans for the template, and what a script needs of each."""

    def __init__(self, reader: StoreReader, found: Measured, pieces: Pieces):
        self.reader, self.found, self.pieces = reader, found, pieces
        self.tokens: list[list[Any]] = []  # per row, per token: see _facts
        self.used: set[int] = set()

    def row(self, row: int) -> dict[str, Any]:
        """One row: its tokens with their classes, coloured by the position that predicts them."""
        batch = self.reader[row]
        length = min(int(batch.rows.lengths()[0]), MOST_TOKENS)
        texts = self.pieces.texts([int(i) for i in batch.rows.tokens[0, :length]])
        facts = self._facts(batch, length)
        self.tokens.append(facts)
        spans = []
        for at in range(length):
            text = _spell_in_row(texts[at])
            new = at > 0 and batch.rows.segments[0, at] != batch.rows.segments[0, at - 1]
            spans.append({"text": text, "class": self._class(facts[at]), "new": bool(new)})
        js = [fact[2] for fact in facts if fact]
        return {
            "number": row,
            "spans": spans,
            "documents": sorted({int(d) for d in batch.rows.documents[0, :length]}),
            "mean_js": sum(js) / len(js) if js else None,
            "positions": len(js),
        }

    def _facts(self, batch: TeacherBatch, length: int) -> list[Any]:
        """Per token null, or [cell along JS, along confidence, JS, gold, token id, then per teacher
        confidence, probability of the token, likeliest tokens]."""
        found, spec = self.found, self.found.spec
        gate = gate_positions(batch, spec, int(self.reader.manifest["vocab_size"]))
        facts: list[Any] = [None] * length
        j_P = np.searchsorted(found.js_edges, gate.js_P, side="right") - 1
        c_P = np.searchsorted(found.confidence_edges, gate.confidence_GP[0], side="left")
        for place, at in enumerate(gate.at_P):
            if at + 1 >= length:
                continue
            token = int(batch.rows.tokens[0, at + 1])
            fact: list[Any] = [
                int(j_P[place]),
                int(c_P[place]),
                round(float(gate.js_P[place]), 4),
                int(gate.gold_P[place]),
                token,
            ]
            self.used.add(token)
            for teacher, confidence_P in zip(batch.teachers, gate.confidence_GP, strict=True):
                top = _top(teacher, at)
                self.used |= {int(i) for i in top[::2]}
                fact += [
                    round(float(confidence_P[place]), 4),
                    _probability(float(teacher.gold_logp_P[at])),
                    top,
                ]
            facts[at + 1] = fact
        return facts

    def _class(self, fact: list[Any] | None) -> str:
        """The colours of a token: its strategy at the thresholds, and how dark."""
        if fact is None:
            return "none"
        js, confidence = _thresholds(self.found)
        if len(self.reader.store.teachers) == 1:
            return f"s1 h{np.searchsorted(CONFIDENCE_LEVELS, fact[5], side='right') - 1}"
        if fact[0] < js:
            strategy = 0
        elif fact[1] > confidence:
            strategy = 1
        else:
            strategy = 2 if fact[3] else 3
        return f"s{strategy} h{np.searchsorted(JS_LEVELS, fact[2], side='right') - 1}"


def _spell_in_row(text: str) -> str:
    """A token in running text: a line feed keeps its break."""
    return visible(text).replace("\n", "\u21b5\n").replace("\t", "\u21e5\t")


def _extreme(reader: StoreReader, pieces: Pieces, extreme: Extreme) -> dict[str, Any]:
    """A position with a large JS: what stands before it, what comes, what each teacher expected."""
    js, row, at, (_, token) = extreme
    batch = reader[row]
    segments = batch.rows.segments[0]
    start = max(at + 1 - _BEFORE, int(np.argmax(segments == segments[at])))
    tokens = [int(i) for i in batch.rows.tokens[0, start : at + 1]]
    expected = []
    for teacher in batch.teachers:
        top = _top(teacher, at)[:6]
        expected.append(
            [(_spell(pieces.text(int(i))), p) for i, p in zip(top[::2], top[1::2], strict=True)]
        )
    return {
        "js": js,
        "row": row,
        "before": _spell("".join(pieces.texts(tokens)).lstrip()),
        "token": _spell(pieces.text(token)),
        "expected": expected,
    }


def inspect_text(document: dict[str, Any]) -> str:
    """The figures as a person reads them in a terminal."""
    lines = [f"looked at  {document['positions']:,} positions in {document['rows_measured']:,} of "
             f"{document['rows']:,} rows"]  # fmt: skip
    if document["mean_js"] is not None:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in document["shares"].items())
        lines += [
            f"JS         {document['mean_js']:.4f} bits on average; the same likeliest token at "
            f"{document['same_top1']:.1%}",
            f"gate       {shares}",
            f"           at js_threshold {document['js_threshold']:g}, confidence_threshold "
            f"{document['confidence_threshold']:g}",
        ]
    else:
        lines.append(f"teachers   one only: {document['store']} has nothing to compare it with")
    for name, value in document["mean_confidence"].items():
        (kept,) = (teacher for teacher in document["teachers"] if teacher["name"] == name)
        lines.append(
            f"{name}   confidence {value:.4f} on average ({document['confidence']}); "
            f"{kept['bytes_per_token']:.1f} bytes/token, {kept['mass_covered']:.1%} of the mass "
            "for certain"
        )
    more = f"next: logitcache inspect {document['store']} --html F"
    lines.append(f"page       {document['page']}" if document["page"] else more)
    return "\n".join(lines)
