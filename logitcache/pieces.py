"""Tokens as text that a person can read: of one id alone, and of a row, in which a character may be
spread over several tokens. Imports no torch."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from .tokenise import vocabulary


class Pieces:
    """The texts of a tokenizer's ids, from its content (``tokenise.tokenizer_content``).

    Byte-level vocabularies spell bytes in an alphabet of their own (GPT-2's); others mark a space
    by U+2581 and single bytes as <0xE2>. Added tokens are spelled as they are.
    """

    def __init__(self, content: dict[str, Any]):
        self._tokens = vocabulary(content)
        added = content["backend"].get("added_tokens") or []
        self._added = {int(token["id"]) for token in added}
        parts = [content["backend"].get(part) for part in ("decoder", "pre_tokenizer")]
        self._byte_level = '"ByteLevel"' in json.dumps(parts)
        self._bytes = _byte_alphabet() if self._byte_level else {}

    def raw(self, token_id: int) -> bytes:
        """The bytes that an id stands for."""
        token = self._tokens.get(token_id)
        if token is None:
            return f"<id {token_id}>".encode()
        if token_id not in self._added:
            if self._byte_level and all(letter in self._bytes for letter in token):
                return bytes(self._bytes[letter] for letter in token)
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                try:
                    return bytes([int(token[3:5], 16)])
                except ValueError:
                    pass
            token = token.replace("\u2581", " ")
        return token.encode("utf-8", "surrogatepass")

    def text(self, token_id: int) -> str:
        """One id alone; bytes that are no whole character as \\xE2."""
        return self.raw(token_id).decode("utf-8", "backslashreplace")

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens of a row, which joined are its text: a character that is spread over several
        belongs to the last of them, and the others are empty."""
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        found = [decoder.decode(self.raw(token_id)) for token_id in token_ids]
        rest = decoder.decode(b"", final=True)
        return [*found[:-1], found[-1] + rest] if found else []


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it prints,
    else the next from U+0100 on (the rule of GPT-2's tokenizer)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
