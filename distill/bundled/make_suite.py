"""Make the bundled suite again: python -m distill.bundled.make_suite > suite.jsonl

Every item is a place in the bundled text: about 250 characters as prompt, the lines that follow as
the answer (or as reference of the voice).

* recall: places that teacher 1 was trained on and teacher 2 was not, drawn at random (seeded).
* generalize: places of held-out text, those that teacher 2 knows better than teacher 1: what a
  child can learn from both. No model has seen them, and no child should: they are not in
  corpus.jsonl.
* tone: held-out beginnings of documents; law: first lines of documents that no teacher saw.

Measured (2026-11): teacher 1 scores 0.234 on recall and 0.265 on generalize, teacher 2 0.181 and
0.332; teacher 2's drift from teacher 1 is 0.217 bits. The student of ``distill demo`` passes all
gates: 0.226, 0.296, 0.036 bits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import click

from distill.bundled import BUNDLED
from distill.bundled.make import FRESH_EVERY, RECIPES, SEED, read_documents

PROMPT_CHARS, ANSWER_CHARS, REFERENCE_CHARS = 250, 160, 300
NUM_RECALL, NUM_GENERALIZE, NUM_TONE, NUM_LAW = 16, 12, 12, 6
MOST_OF_A_DOCUMENT = 2


def places(document: str, prompt_chars: int, answer_chars: int) -> Iterator[tuple[str, str]]:
    """Prompts of whole lines, one after the other, each with the lines that follow it."""
    lines = document.splitlines(keepends=True)
    start = 0
    while start < len(lines):
        middle = _end(lines, start, prompt_chars)
        while middle < len(lines) and not lines[middle].strip():
            middle += 1  # an answer begins with a word
        end = _end(lines, middle, answer_chars)
        prompt, answer = "".join(lines[start:middle]), "".join(lines[middle:end]).rstrip("\n")
        if len(prompt) >= prompt_chars and len(answer) >= answer_chars:
            yield prompt, answer
        start = end


def _end(lines: list[str], start: int, chars: int) -> int:
    """The line before which at least so many characters have come from ``start`` on."""
    length = 0
    for index in range(start, len(lines)):
        length += len(lines[index])
        if length > chars:
            return index + 1
    return len(lines)


def make_items() -> list[dict[str, Any]]:
    """Items of the suite, in the order of the file."""
    from distill.generate import load_speaker
    from logitcache.documents import Document

    corpus = read_documents(BUNDLED / "text" / "corpus.jsonl")
    held_out = read_documents(BUNDLED / "text" / "heldout.jsonl")
    shown = [d for i, d in enumerate(corpus) if i % FRESH_EVERY != FRESH_EVERY - 1]
    fresh = [d for i, d in enumerate(corpus) if i % FRESH_EVERY == FRESH_EVERY - 1]
    (_, parent_end), (_, own_end) = (recipe.part for recipe in RECIPES)
    learned = shown[round(parent_end * len(shown)) : round(own_end * len(shown))]
    rng = random.Random(SEED)

    def answers(kind: str, found: list[tuple[str, str]]) -> list[dict[str, Any]]:
        return [
            {
                "id": f"{kind}-{number:02}",
                "kind": kind,
                "prompt": prompt,
                "expect": answer,
                "score": "tokens",
            }
            for number, (prompt, answer) in enumerate(found, start=1)
        ]

    known = [place for d in learned for place in places(d, PROMPT_CHARS, ANSWER_CHARS)]
    items = answers("recall", rng.sample(known, NUM_RECALL))

    speakers = [load_speaker(BUNDLED / name, "cpu") for name in ("teacher1", "teacher2")]
    by_gap: list[tuple[float, int, tuple[str, str]]] = []
    for number, document in enumerate(held_out):
        found = list(places(document, PROMPT_CHARS, ANSWER_CHARS))
        texts = [(Document("suite", prompt, None, None), answer) for prompt, answer in found]
        first, second = (speaker.token_accuracy(texts) for speaker in speakers)
        gaps = sorted(zip((a - b for a, b in zip(first, second, strict=True)), found, strict=True))
        by_gap += [(gap, number, place) for gap, place in gaps[:MOST_OF_A_DOCUMENT]]
    chosen = sorted(by_gap)[:NUM_GENERALIZE]
    items += answers("generalize", [place for _, _, place in sorted(chosen, key=lambda c: c[1])])

    voices = [next(places(d, PROMPT_CHARS, REFERENCE_CHARS), None) for d in held_out]
    heard = [place for place in voices if place is not None and place not in {c[2] for c in chosen}]
    for number, (prompt, reference) in enumerate(rng.sample(heard, NUM_TONE), start=1):
        items.append(
            {"id": f"tone-{number:02}", "kind": "tone", "prompt": prompt, "reference": reference}
        )
    for number, document in enumerate(rng.sample(fresh, NUM_LAW), start=1):
        prompt = "".join(document.splitlines(keepends=True)[:2])
        items.append({"id": f"law-{number:02}", "kind": "law", "prompt": prompt})
    return items


@click.command()
def main() -> None:
    """Print the suite."""
    for item in make_items():
        click.echo(json.dumps(item, ensure_ascii=False))


if __name__ == "__main__":
    main()
