"""Make the example's data again from the bundled text: python examples/make_data.py

news.jsonl are the documents that no bundled generation was trained on; luna-g009.jsonl and
luna-g010.jsonl a tenth of what each of the two was, for replay.
"""

from __future__ import annotations

import json
from pathlib import Path

from distill.bundled import BUNDLED
from distill.bundled.make import FRESH_EVERY, RECIPES, read_documents

NAMES = {"teacher2": "luna-g009.jsonl", "teacher1": "luna-g010.jsonl"}
KEPT_EVERY = 10


def example_data() -> dict[str, str]:
    """Contents of the files, by name."""
    corpus = read_documents(BUNDLED / "text" / "corpus.jsonl")
    last = FRESH_EVERY - 1
    shown = [d for i, d in enumerate(corpus) if i % FRESH_EVERY != last]
    files = {"news.jsonl": [d for i, d in enumerate(corpus) if i % FRESH_EVERY == last]}
    for recipe in RECIPES:
        start, stop = (round(fraction * len(shown)) for fraction in recipe.part)
        files[NAMES[recipe.name]] = shown[start:stop][::KEPT_EVERY]
    return {
        name: "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)
        for name, documents in files.items()
    }


if __name__ == "__main__":
    folder = Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    for name, content in example_data().items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
