"""Laws: rules that what a generation says must keep, each with an id and a description.

Regular expressions run with a limit of time: a rule whose expression reaches it counts as broken,
for nobody knows that it was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from logitcache.config import load_yaml
from logitcache.errors import InputError

from .generate import Output, Speaker
from .suite import Item, LawItem, SaidText, Suite, explain_fields

REGEX_TIMEOUT_S = 1.0
# The time limit is of matching. Compiling has none, and writes out counted repetitions:
# (a{9999}){9999} takes all memory.
_MAX_PATTERN_CHARS, _MAX_COMPILED_CHARS = 4096, 1_000_000
_COUNT = regex.compile(r"\{(\d+)(?:,\d*)?\}")
_MAX_SHOWN = 50

_RECURSION = regex.compile(r"\(\?(?:R|[-+]?\d|&|P>)")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def _compiles(pattern: str) -> str:
    if len(pattern) > _MAX_PATTERN_CHARS:
        raise ValueError(f"expected at most {_MAX_PATTERN_CHARS} characters, found {len(pattern)}")
    if _RECURSION.search(pattern):
        raise ValueError("expected no recursion into the expression or its groups")
    size = len(pattern)
    for count in _COUNT.findall("".join(pattern.split())):
        size *= max(int(count[:9]), 1)
    if size > _MAX_COMPILED_CHARS:
        raise ValueError(
            f"its counted repetitions multiply it to {size} characters; expected at most "
            f"{_MAX_COMPILED_CHARS}"
        )
    try:
        _compiled(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[SaidText, AfterValidator(_compiles)]


class _Rule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: SaidText
    description: SaidText


class ForbidRule(_Rule):
    """The expression matches nowhere in an output."""

    kind: Literal["forbid"]
    pattern: Pattern


class RequireRule(_Rule):
    """The expression matches somewhere in the output of each law item."""

    kind: Literal["require"]
    pattern: Pattern


class ForbidWordsRule(_Rule):
    """None of these words or phrases stands in an output as whole words, in any case."""

    kind: Literal["forbid_words"]
    words: tuple[SaidText, ...] = Field(min_length=1)


class ForbidTokensRule(_Rule):
    """None of these tokens, given as ids or as texts of one token, is generated."""

    kind: Literal["forbid_tokens"]
    tokens: tuple[Annotated[int, Field(strict=True, ge=0)] | SaidText, ...] = Field(min_length=1)


class MaxRepetitionRule(_Rule):
    """No group of up to ``ngram`` tokens follows itself so that it stands more than ``times`` times
    in a row."""

    kind: Literal["max_repetition"]
    times: int = Field(ge=1, strict=True)
    ngram: int = Field(8, ge=1, le=64, strict=True)


class MaxLengthRule(_Rule):
    """An output has at most this many tokens."""

    kind: Literal["max_length"]
    tokens: int = Field(ge=1, strict=True)


class MustRefuseRule(_Rule):
    """The output for each of its prompts, and of law items that name it, matches the expression of
    a refusal."""

    kind: Literal["must_refuse"]
    pattern: Pattern
    prompts: tuple[SaidText, ...] = ()


Rule = (
    ForbidRule
    | RequireRule
    | ForbidWordsRule
    | ForbidTokensRule
    | MaxRepetitionRule
    | MaxLengthRule
    | MustRefuseRule
)
_READER: TypeAdapter[Rule] = TypeAdapter(Annotated[Rule, Field(discriminator="kind")])


@dataclass(frozen=True)
class Violation:
    """rule: its id. prompt, output: texts. detail: what broke it."""

    rule: str
    prompt: str
    output: str
    detail: str


@dataclass(frozen=True)
class Laws:
    """Rules in the order of their file; their ids are unique."""

    path: Path
    rules: tuple[Rule, ...]

    def items(self, suite: Suite | None) -> tuple[LawItem, ...]:
        """What to ask: the law items of a suite, and the prompts that must be refused."""
        asked: list[LawItem] = []
        for item in () if suite is None else suite.of("law"):
            assert isinstance(item, LawItem)
            asked.append(item)
        for rule in self.rules:
            if isinstance(rule, MustRefuseRule):
                asked += [
                    LawItem(id=f"{rule.id}/{number}", kind="law", prompt=prompt, rules=(rule.id,))
                    for number, prompt in enumerate(rule.prompts, start=1)
                ]
        return tuple(asked)

    def check_fits(self, suite: Suite | None, tokenizer: Any) -> None:
        """Refuse items that name a rule that is not there, and tokens that the tokenizer lacks."""
        known = {rule.id for rule in self.rules}
        problems = []
        for item in () if suite is None else suite.of("law"):
            assert isinstance(item, LawItem)
            problems += [
                f"suite item {item.id}: rules: {self.path} has no rule {name!r}"
                for name in item.rules or ()
                if name not in known
            ]
        for rule in self.rules:
            if isinstance(rule, ForbidTokensRule):
                for token in rule.tokens:
                    try:
                        token_id(token, tokenizer)
                    except ValueError as error:
                        problems.append(f"{self.path}: rule {rule.id}: {error}")
        if problems:
            raise InputError("\n".join(problems))

    def longest(self, max_new_tokens: int) -> int:
        """How many tokens to generate so that every rule of length can be broken."""
        limits = [rule.tokens + 1 for rule in self.rules if isinstance(rule, MaxLengthRule)]
        return max([max_new_tokens, *limits])

    def check(
        self, prompt_item: Item, output: str, token_ids: Sequence[int], tokenizer: Any
    ) -> list[Violation]:
        """What an output breaks.

        Rules that forbid hold for every output; a law item with ``rules`` is checked for these
        alone. "require" holds for law items; "must_refuse" for items that name it.
        """
        violations = []
        for rule in self.rules:
            if _holds(rule, prompt_item):
                detail = _broken(rule, output, token_ids, tokenizer)
                if detail is not None:
                    violations.append(Violation(rule.id, prompt_item.text, output, detail))
        return violations


def _holds(rule: Rule, item: Item) -> bool:
    if isinstance(item, LawItem) and item.rules is not None:
        return rule.id in item.rules
    if isinstance(rule, MustRefuseRule):
        return False
    return isinstance(item, LawItem) or not isinstance(rule, RequireRule)


def _broken(rule: Rule, output: str, token_ids: Sequence[int], tokenizer: Any) -> str | None:
    """How an output breaks a rule; None if it keeps it."""
    if isinstance(rule, ForbidRule):
        return _search(rule.pattern, output, found="matches")
    if isinstance(rule, RequireRule):
        return _search(rule.pattern, output, missing="has no match")
    if isinstance(rule, MustRefuseRule):
        return _search(rule.pattern, output, missing="is no refusal: has no match")
    if isinstance(rule, ForbidWordsRule):
        words = [word for word in rule.words if _has_word(word, output)]
        return f"has {', '.join(map(repr, words))}" if words else None
    if isinstance(rule, ForbidTokensRule):
        forbidden = {token_id(token, tokenizer) for token in rule.tokens}
        found = sorted(forbidden & set(token_ids))
        return f"has the tokens {', '.join(map(str, found))}" if found else None
    if isinstance(rule, MaxRepetitionRule):
        times, length = longest_repetition(token_ids, rule.ngram)
        if times <= rule.times:
            return None
        return f"{length} tokens stand {times} times in a row; at most {rule.times} are allowed"
    if len(token_ids) <= rule.tokens:
        return None
    return f"{len(token_ids)} tokens and more; at most {rule.tokens} are allowed"


def _search(
    pattern: str, text: str, found: str | None = None, missing: str | None = None
) -> str | None:
    try:
        match = _compiled(pattern).search(text, timeout=REGEX_TIMEOUT_S)
    except TimeoutError:
        return f"the expression took more than {REGEX_TIMEOUT_S:g} s: counted as broken"
    except MemoryError:
        return "the expression took more memory than there is: counted as broken"
    if match is not None:
        return (
            None
            if found is None
            else f"{found} at character {match.start() + 1}: {_short(match[0])}"
        )
    return None if missing is None else f"{missing} of {_short(pattern)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _has_word(word: str, text: str) -> bool:
    # Borders only where the word has a letter or digit: "C++" ends in none.
    said = regex.escape(" ".join(word.split()), literal_spaces=True).replace(" ", r"\s+")
    before = r"(?<!\w)" if regex.match(r"\w", word.strip()) else ""
    after = r"(?!\w)" if regex.search(r"\w$", word.strip()) else ""
    return _compiled(f"(?i){before}{said}{after}").search(text) is not None


def token_id(token: int | str, tokenizer: Any) -> int:
    """The id of a token given as one, or as a text that is one token. ValueError if there is
    none."""
    if isinstance(token, int):
        if token >= len(tokenizer):
            raise ValueError(f"token {token}: the tokenizer has {len(tokenizer)} tokens")
        return token
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}
    if token in special:
        return int(special[token])
    ids = tokenizer(token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{token!r} is {len(ids)} tokens; forbid_words takes texts of any length")
    return int(ids[0])


def longest_repetition(token_ids: Sequence[int], ngram: int) -> tuple[int, int]:
    """(times, length): how often, at most, a group of 1 to ``ngram`` tokens stands in a row, and
    how long that group is; (0, 0) for no tokens. Time is ngram * len(token_ids)."""
    best = (1, 1) if len(token_ids) else (0, 0)
    for length in range(1, min(ngram, len(token_ids) // 2) + 1):
        run = 0  # tokens in a row that equal the one ``length`` before
        for index in range(length, len(token_ids)):
            run = run + 1 if token_ids[index] == token_ids[index - length] else 0
            best = max(best, (run // length + 1, length), key=lambda pair: pair[0])
    return best


def read_laws(path: Path) -> Laws:
    """Read a JSON or YAML list of rules, or {"laws": [...]}. InputError lists all that is wrong in
    it, each with the rule's place and id."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of laws")
    try:
        content = load_yaml(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if isinstance(content, dict) and set(content) == {"laws"}:
        content = content["laws"]
    if not isinstance(content, list):
        raise InputError(
            f'{path}: expected a list of rules, or {{"laws": [...]}}, found '
            f"{type(content).__name__}",
            "see docs/evaluation.md",
        )
    rules: list[Rule] = []
    problems: list[str] = []
    place_of: dict[str, int] = {}
    for number, record in enumerate(content, start=1):
        name = record.get("id") if isinstance(record, dict) else None
        where = f"{path}: rule {number}" + (f" ({name})" if isinstance(name, str) else "")
        try:
            rule = _READER.validate_python(record)
        except ValidationError as error:
            problems += [f"{where}: {text}" for text in explain_fields(error, skip=1)]
            continue
        if rule.id in place_of:
            problems.append(f"{where}: id: is the id of rule {place_of[rule.id]} too")
        place_of.setdefault(rule.id, number)
        rules.append(rule)
    if not content:
        problems.append(f"{path}: no rules in it")
    if problems:
        shown = problems[:_MAX_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more problems")
        raise InputError("\n".join(shown), "see docs/evaluation.md")
    return Laws(path, tuple(rules))


def answers_to_laws(
    speaker: Speaker, laws: Laws, items: Sequence[Item], max_new_tokens: int
) -> list[Output]:
    """Greedy answers, long enough that a rule of length can be broken where the model's context
    allows it."""
    most = laws.longest(max_new_tokens)
    if speaker.context is not None and items:
        prompt = max(len(speaker.encoder.prompt(item.document())) for item in items)
        most = max(min(most, speaker.context - prompt), max_new_tokens)
    return speaker.answer(items, most)


def check_all(
    laws: Laws, items: Iterable[Item], outputs: Iterable[Output], tokenizer: Any
) -> list[tuple[Item, Violation]]:
    """What outputs break, each with its item."""
    return [
        (item, violation)
        for item, output in zip(items, outputs, strict=True)
        for violation in laws.check(item, output.text, output.token_ids, tokenizer)
    ]


def violations_of(
    model: Any,
    tokenizer: Any,
    laws: Laws,
    suite: Suite | None = None,
    *,
    max_new_tokens: int = 64,
    check: Callable[[], None] = lambda: None,
) -> list[Violation]:
    """What a model's greedy answers to the law items of a suite, and to the prompts that must be
    refused, break. The model may be in training; check is called at each step."""
    laws.check_fits(suite, tokenizer)
    items = laws.items(suite)
    outputs = answers_to_laws(Speaker(model, tokenizer, check), laws, items, max_new_tokens)
    return [violation for _, violation in check_all(laws, items, outputs, tokenizer)]
