"""Suite files: the questions that a generation is judged by, one JSON record a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from logitcache.documents import Document
from logitcache.errors import InputError

KINDS = ("recall", "generalize", "tone", "law")
_MAX_LINE_BYTES = 1 << 20
_MAX_SHOWN = 50  # problems of one file


def _unicode(text: str) -> str:
    # JSON can spell half of a surrogate pair, which is no character.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate at character {error.start + 1}") from None
    return text


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text, found only white space")
    return text


Text = Annotated[str, AfterValidator(_unicode)]
SaidText = Annotated[Text, AfterValidator(_said)]


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: SaidText
    content: Text


class _Item(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: SaidText = ""  # read_suite gives those without one KIND-LINE
    prompt: Text | None = Field(default=None, min_length=1)
    messages: tuple[Message, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_prompt(self) -> _Item:
        if (self.prompt is None) == (self.messages is None):
            found = "neither" if self.prompt is None else "both"
            raise ValueError(f'expected either "prompt" or "messages", found {found}')
        return self

    @property
    def text(self) -> str:
        """The prompt as a person reads it; of messages, a line per turn."""
        if self.messages is None:
            return self.prompt or ""
        return "\n".join(f"{turn.role}: {turn.content}" for turn in self.messages)

    def document(self) -> Document:
        """The prompt as the tokenizer's encoder takes it."""
        messages = None if self.messages is None else [turn.model_dump() for turn in self.messages]
        return Document(f"suite item {self.id}", self.prompt, messages, None)


class AnswerItem(_Item):
    """A question with its answer: recall of what was learned, or generalisation beyond it.

    score: "contains" or "exact" compare the greedy generation with ``expect``, both without the
    white space around them; "tokens" is the share of the tokens of ``expect`` that the model puts
    first when it reads the prompt and the ones before (``expect`` follows the prompt as it is:
    write the space between them).
    """

    kind: Literal["recall", "generalize"]
    expect: SaidText
    score: Literal["contains", "exact", "tokens"] = "contains"


class ToneItem(_Item):
    """A prompt to hear the voice of a model, with a reference of the wanted voice if there is
    one."""

    kind: Literal["tone"]
    reference: SaidText | None = None


class LawItem(_Item):
    """A prompt for the laws: for those named in ``rules``, else for all that hold everywhere."""

    kind: Literal["law"]
    rules: tuple[SaidText, ...] | None = Field(default=None, min_length=1)


Item = AnswerItem | ToneItem | LawItem
_READER: TypeAdapter[Item] = TypeAdapter(Annotated[Item, Field(discriminator="kind")])


@dataclass(frozen=True)
class Suite:
    """Items in the order of the file; their ids are unique."""

    path: Path
    items: tuple[Item, ...]

    def of(self, *kinds: str) -> tuple[Item, ...]:
        """Items of these kinds, in the order of the file."""
        return tuple(item for item in self.items if item.kind in kinds)


def read_suite(path: Path) -> Suite:
    """Read a suite file. InputError lists all that is wrong in it, each with its line."""
    if not path.is_file():
        raise InputError(f"{path}: no such suite file", "give a JSONL file, one item a line")
    items: list[Item] = []
    problems: list[str] = []
    line_of_id: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                item = _read_item(raw, number)
            except _ProblemsError as found:
                problems += [f"{path}:{number}: {text}" for text in found.args]
                continue
            if item.id in line_of_id:
                first = line_of_id[item.id]
                problems.append(f"{path}:{number}: id: {item.id!r} is the id of line {first} too")
            else:
                line_of_id[item.id] = number
                items.append(item)
    if not items and not problems:
        problems.append(f"{path}: no items in it")
    if problems:
        shown = problems[:_MAX_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more problems")
        raise InputError(
            "\n".join(shown),
            f"each line is an item: its kind is one of {', '.join(KINDS)}; see docs/evaluation.md",
        )
    return Suite(path, tuple(items))


class _ProblemsError(Exception):
    """Problems of one line, as args."""


def _read_item(raw: bytes, number: int) -> Item:
    if len(raw) > _MAX_LINE_BYTES:
        raise _ProblemsError(f"a line of {len(raw)} bytes; expected at most {_MAX_LINE_BYTES}")
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _ProblemsError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
        ) from None
    except RecursionError:
        raise _ProblemsError("JSON nested too deeply") from None
    except ValueError as error:  # also a number of more than 4300 digits
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise _ProblemsError(f"not JSON: {what}") from None
    if not isinstance(record, dict):
        raise _ProblemsError(f"expected an object, found {type(record).__name__}")
    try:
        item = _READER.validate_python(record)
    except ValidationError as error:
        raise _ProblemsError(*explain_fields(error, skip=1)) from None
    return item if item.id else item.model_copy(update={"id": f"{item.kind}-{number}"})


def explain_fields(error: ValidationError, skip: int = 0) -> list[str]:
    """A text per problem of a record; the first ``skip`` parts of a place are names of ours."""
    texts = []
    places = [problem["loc"] for problem in error.errors()]
    for problem in error.errors():
        place = problem["loc"]
        if any(len(p) > len(place) and p[: len(place)] == place for p in places):
            continue  # a list is "too short" for what is wrong with its parts
        kind, found = problem["type"], problem.get("input")
        where = ".".join(str(part) for part in problem["loc"][skip:])
        if kind == "union_tag_not_found":
            texts.append("kind: is needed, and was not given")
        elif kind == "union_tag_invalid":
            tag, tags = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
            texts.append(f"kind: expected one of {tags}, found {tag!r}")
        elif kind == "extra_forbidden":
            texts.append(f"{where}: no such field")
        elif kind == "missing":
            texts.append(f"{where}: is needed, and was not given")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if where:
                message = f"{where}: {message}, found {_show(found)}"
            texts.append(message)
    return texts


def _show(value: Any) -> str:
    text = "null" if value is None else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
