"""Tokenizers: their identity, and documents turned into tokens with a loss mask."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .documents import Document
from .errors import InputError, StoreError
from .packing import EncodedDocument

_FIRST_STAND_IN = 0xF0000
_STAND_IN = re.compile("([\U000f0000-\U000ffffd])")
_BATCH = 256  # documents tokenised at once; the tokenizer spreads a batch over the cores


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a local folder. StoreError if there is none, or none with a fast
    backend."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise many kinds for a bad folder
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{folder}: no tokenizer can be loaded from it: {first}") from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise StoreError(
            f"{folder}: expected a tokenizer with a tokenizer.json, found a pure Python one",
            "convert it to a fast tokenizer and save it beside the model",
        )
    return tokenizer


def tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer is: vocabulary, merges, rules, special tokens and chat template, as plain
    data.

    Left out is what no token depends on: truncation, padding, names and paths.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None
    return {
        "backend": backend,
        "special_tokens": {
            name: str(token)
            for name in ("bos_token", "eos_token", "unk_token")
            if (token := getattr(tokenizer, name, None)) is not None
        },
        "chat_template": tokenizer.chat_template,
    }


def content_sha256(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def vocabulary(content: dict[str, Any]) -> dict[int, str]:
    """Token of each id, added tokens included."""
    model = content["backend"]["model"]
    vocab = model.get("vocab", {})
    if isinstance(vocab, list):  # unigram models list (token, score)
        tokens = {number: entry[0] for number, entry in enumerate(vocab)}
    else:
        tokens = {number: token for token, number in vocab.items()}
    for added in content["backend"].get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
    return tokens


def describe_difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Say how two tokenizers differ: the first differing ids and their strings, or which part it
    is."""
    left, right = vocabulary(expected), vocabulary(found)
    ids = [i for i in sorted(set(left) | set(right)) if left.get(i) != right.get(i)]
    if ids:
        shown = ", ".join(f"{i}: {left.get(i)!r} / {right.get(i)!r}" for i in ids[:3])
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        return f"{len(ids)} ids differ (expected / found): {shown}{more}"
    merges = [c["backend"]["model"].get("merges") or [] for c in (expected, found)]
    if merges[0] != merges[1]:
        for number, (a, b) in enumerate(itertools.zip_longest(*merges)):
            if a != b:
                return f"merge {number} differs: expected {a!r}, found {b!r}"
    for part in ("special_tokens", "chat_template"):
        if expected[part] != found[part]:
            return f"{part} differ: expected {_short(expected[part])}, found {_short(found[part])}"
    for part in sorted(expected["backend"]):
        if expected["backend"][part] != found["backend"].get(part):
            return (
                f"{part} differs: expected {_short(expected['backend'][part])}, "
                f"found {_short(found['backend'].get(part))}"
            )
    return "they differ in a part that this version does not name"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 80 else text[:77] + "...")


class Encoder:
    """Turns documents into tokens, counting what it leaves out.

    A text is one document: its tokens, then the end-of-sequence token; every token is a target. The
    text of a special token inside a document is text, not a control token. Of messages, rendered by
    the tokenizer's chat template, only what assistants say (with the mark that ends a turn) is a
    target.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        # Longest first: a special token may begin another.
        added = tokenizer.added_tokens_decoder.values()
        self.specials = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self.num_documents = self.num_empty = self.num_without_targets = 0

    def encode(self, documents: Iterable[Document]) -> Iterator[EncodedDocument]:
        documents = iter(documents)
        while batch := list(itertools.islice(documents, _BATCH)):
            first = self.num_documents + 1
            self.num_documents += len(batch)
            texts = [d.text for d in batch if d.text is not None and d.text.strip()]
            encoded = iter(self._encode_texts(texts))
            for number, document in enumerate(batch, start=first):
                if document.messages is not None:
                    tokens, loss_mask = self._encode_messages(document)
                elif document.text is not None and document.text.strip():
                    tokens = next(encoded)
                    loss_mask = np.ones(len(tokens), dtype=bool)
                else:
                    self.num_empty += 1
                    continue
                if not loss_mask[1:].any():
                    self.num_without_targets += 1
                    continue
                yield EncodedDocument(tokens, loss_mask, document.gold, number)

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        eos = self.tokenizer.eos_token_id
        result = []
        # verbose=False: "longer than the model's maximum" is no news, rows split documents.
        lists = self.tokenizer(
            texts, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        for ids in lists:
            if eos is not None and (not ids or ids[-1] != eos):
                ids = [*ids, eos]
            result.append(np.asarray(ids, dtype=np.int32))
        return result

    def prompt(self, document: Document) -> list[int]:
        """Tokens of a text to go on with, or of messages up to where the assistant answers: as
        encode() makes them of documents that begin like this."""
        return self._encode_prompt(document, "")[0]

    def continuation(self, document: Document, answer: str) -> tuple[list[int], int]:
        """Tokens of a prompt and the answer that follows it as it is, and the index of the first
        one in which a character of the answer is: no border is forced between the two."""
        ids, ends, length = self._encode_prompt(document, answer)
        return ids, next((i for i, end in enumerate(ends) if end > length), len(ids))

    def _encode_prompt(self, document: Document, answer: str) -> tuple[list[int], list[int], int]:
        """Tokens of a prompt and its answer, the character where each ends, and the prompt's
        length."""
        if document.messages is None:
            prompt = document.text or ""
            encoding = self.tokenizer(
                prompt + answer,
                split_special_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids, ends = encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]
            if ids and ids[-1] == self.tokenizer.eos_token_id:  # appended by the tokenizer's rules
                ids, ends = ids[:-1], ends[:-1]
            return ids, ends, len(prompt)
        self._check_template(document)
        said = {"role": "assistant", "content": answer}  # hidden along with the rest
        hidden = self._hide_specials(replace(document, messages=[*document.messages, said]))
        messages = hidden.messages or []
        prompt = self._render_part(hidden, len(messages) - 1, True)
        ids, offsets = self._encode_rendered(prompt + messages[-1]["content"])
        return ids, [end for _, end in offsets], len(prompt)

    def _check_template(self, document: Document) -> None:
        if not self.tokenizer.chat_template:
            raise InputError(
                f'{document.where}: "messages" need a chat template, and the tokenizer has none',
                'use a teacher with a chat template, or a "text" column',
            )

    def _encode_messages(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        self._check_template(document)
        text, spans = self._render(self._hide_specials(document))
        ids, offsets_ = self._encode_rendered(text)
        tokens = np.asarray(ids, dtype=np.int32)
        offsets = np.asarray(offsets_, dtype=np.int64).reshape(-1, 2)
        loss_mask = np.zeros(len(tokens), dtype=bool)
        for start, stop in spans:
            loss_mask |= (offsets[:, 0] >= start) & (offsets[:, 1] <= stop)
        return tokens, loss_mask

    def _encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a rendered chat, and the characters that each stands for."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for piece in _STAND_IN.split(text):
            if _STAND_IN.fullmatch(piece):
                said = self.specials[ord(piece) - _FIRST_STAND_IN]
                spelled = self.tokenizer(said, add_special_tokens=False, split_special_tokens=True)
                ids += spelled["input_ids"]
                offsets += [(at, at + 1)] * len(spelled["input_ids"])
            elif piece:
                encoding = self.tokenizer(
                    piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False
                )
                ids += encoding["input_ids"]
                offsets += [(at + start, at + stop) for start, stop in encoding["offset_mapping"]]
            at += len(piece)
        return ids, offsets

    def _hide_specials(self, document: Document) -> Document:
        """Put a stand-in character for each special token that a message spells: it is text."""
        messages = []
        for message in document.messages or []:
            content = message["content"]
            if _STAND_IN.search(content):
                raise InputError(
                    f"{document.where}: private-use characters from U+F0000 on in a message",
                    "remove or replace them",
                )
            for number, special in enumerate(self.specials):
                content = content.replace(special, chr(_FIRST_STAND_IN + number))
            messages.append({**message, "content": content})
        return replace(document, messages=messages)

    def _render(self, document: Document) -> tuple[str, list[tuple[int, int]]]:
        """The whole chat as text, and the character spans that assistants say."""
        messages = document.messages or []

        def render(number: int, prompt: bool) -> str:
            return self._render_part(document, number, prompt)

        text = render(len(messages), False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(number, True), render(number + 1, False)
            if not (text.startswith(after) and after.startswith(before)):
                raise InputError(
                    f"{document.where}: the chat template rewrites earlier turns, so "
                    "that assistant turn "
                    f"{number + 1} cannot be found in the whole",
                    "give one assistant turn per record, as the last message",
                )
            spans.append((len(before), len(after.rstrip("\n"))))
        return text, spans

    def _render_part(self, document: Document, number: int, prompt: bool) -> str:
        """The first turns of a chat as text, with the assistant's turn opened if it is a prompt."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    (document.messages or [])[:number], tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template raises whatever its author chose
            raise InputError(
                f"{document.where}: the chat template refuses these messages: {error}"
            ) from None
