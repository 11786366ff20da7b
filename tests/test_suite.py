"""Suite files and files of laws: what is read, and that all that is wrong is said at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regex
from tiny import make_tokenizer, write_jsonl

from distill.laws import (
    REGEX_TIMEOUT_S,
    Laws,
    longest_repetition,
    read_laws,
)
from distill.suite import AnswerItem, LawItem, ToneItem, read_suite
from logitcache.errors import InputError


def test_items_of_each_kind_are_read_and_get_ids_by_kind_and_line(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "suite.jsonl",
        [
            {"kind": "recall", "prompt": "a", "expect": "b", "score": "tokens"},
            {"kind": "generalize", "messages": [{"role": "user", "content": "hi"}], "expect": "x"},
            {"kind": "tone", "prompt": "a", "reference": "voice", "id": "mine"},
            {"kind": "law", "prompt": "a", "rules": ["one"]},
        ],
    )
    path.write_text("\n" + path.read_text() + "\n\n")  # empty lines count, and are no items
    suite = read_suite(path)
    assert [item.id for item in suite.items] == ["recall-2", "generalize-3", "mine", "law-5"]
    assert [type(item) for item in suite.items] == [AnswerItem, AnswerItem, ToneItem, LawItem]
    assert [item.score for item in suite.of("recall", "generalize")] == ["tokens", "contains"]
    assert suite.items[1].text == "user: hi"


def test_all_problems_of_a_suite_are_said_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    lines = [
        '{"kind": "recall", "prompt": "a", "expect": "b", "id": "x"}',
        '{"kind": "recall", "prompt": "a", "expect": "b", "id": "x"}',
        "{not json",
        '{"kind": "poem", "prompt": "a"}',
        '{"prompt": "a"}',
        '{"kind": "recall", "prompt": 3, "expect": "  ", "score": "fuzzy", "extra": 1}',
        '{"kind": "tone", "prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
        '{"kind": "tone"}',
        "[1]",
        '{"kind": "tone", "prompt": "\\ud800"}',
        '{"kind": "tone", "messages": [{"role": "user", "text": "b"}]}',
        '{"kind": "law", "prompt": ""}',
    ]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\n" + b"[" * 100_000)
    with pytest.raises(InputError) as caught:
        read_suite(path)
    said = str(caught.value).splitlines()
    wanted = [
        (2, "id: 'x' is the id of line 1 too"),
        (3, "not JSON"),
        (4, "kind: expected one of 'recall'"),
        (5, "kind: is needed"),
        (6, "prompt:"),
        (6, "expect: expected some text, found only white space"),
        (6, "score:"),
        (6, "extra: no such field"),
        (7, 'expected either "prompt" or "messages", found both'),
        (8, "found neither"),
        (9, "expected an object, found list"),
        (10, "lone surrogate at character 1"),
        (11, "messages.0.content: is needed"),
        (11, "messages.0.text: no such field"),
        (12, "prompt:"),
        (13, "not UTF-8: byte 0xff"),
        (14, "JSON nested too deeply"),
    ]
    for number, text in wanted:
        assert any(line.startswith(f"{path}:{number}: ") and text in line for line in said), (
            number,
            text,
            said,
        )
    assert len(said) == len(wanted), said


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_suite_without_items_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="no items"):
        read_suite(path)
    with pytest.raises(InputError, match="no such suite file"):
        read_suite(tmp_path / "other.jsonl")


# Laws


def _laws(tmp_path: Path, *rules: dict) -> Laws:
    path = tmp_path / "laws.json"
    path.write_text(json.dumps([{"description": "d", **rule} for rule in rules]))
    return read_laws(path)


def _broken(laws: Laws, output: str, tokenizer: object = None, ids: tuple = (), **item: object):
    asked = LawItem(**{"kind": "law", "prompt": "p", "id": "i", **item})
    return [(v.rule, v.detail) for v in laws.check(asked, output, ids, tokenizer)]


def test_rules_of_each_kind_break_and_hold(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    laws = _laws(
        tmp_path,
        {"id": "url", "kind": "forbid", "pattern": "https?://"},
        {"id": "sign", "kind": "require", "pattern": "(?i)yours"},
        {"id": "words", "kind": "forbid_words", "words": ["C++", "King  Lear"]},
        {"id": "token", "kind": "forbid_tokens", "tokens": [7, "<|im_start|>", "the"]},
        {"id": "loop", "kind": "max_repetition", "times": 3, "ngram": 2},
        {"id": "long", "kind": "max_length", "tokens": 9},
    )
    assert _broken(laws, "see http://x, Yours", tokenizer) == [
        ("url", "matches at character 5: 'http://'")
    ]
    assert [rule for rule, _ in _broken(laws, "nothing", tokenizer)] == ["sign"]
    assert _broken(laws, "in c++, yours", tokenizer) == [("words", "has 'C++'")]
    assert _broken(laws, "king\nlear yours", tokenizer) == [("words", "has 'King  Lear'")]
    assert _broken(laws, "kings lear, king learned, yours", tokenizer) == []
    assert _broken(laws, "yours", tokenizer, (7, 8, 1)) == [("token", "has the tokens 1, 7")]
    (the,) = tokenizer("the")["input_ids"]
    assert _broken(laws, "yours", tokenizer, (the,)) == [("token", f"has the tokens {the}")]
    assert _broken(laws, "yours", tokenizer, (9, 5, 6, 5, 6, 5, 6)) == []
    assert _broken(laws, "yours", tokenizer, (9, 5, 6, 5, 6, 5, 6, 5, 6)) == [
        ("loop", "2 tokens stand 4 times in a row; at most 3 are allowed")
    ]
    assert [rule for rule, _ in _broken(laws, "yours", tokenizer, tuple(range(20, 30)))] == ["long"]


def test_items_choose_rules_and_refusals_are_asked_for(tmp_path: Path) -> None:
    laws = _laws(
        tmp_path,
        {"id": "url", "kind": "forbid", "pattern": "http"},
        {"id": "sign", "kind": "require", "pattern": "yours"},
        {"id": "no", "kind": "must_refuse", "pattern": "cannot", "prompts": ["a bomb", "a key"]},
    )
    assert [rule for rule, _ in _broken(laws, "http")] == ["url", "sign"]
    assert [rule for rule, _ in _broken(laws, "http", rules=("no", "sign"))] == ["sign", "no"]
    other = ToneItem(kind="tone", prompt="p", id="i")
    assert [v.rule for v in laws.check(other, "http", (), None)] == ["url"]
    asked = laws.items(None)
    assert [(item.prompt, item.rules) for item in asked] == [
        ("a bomb", ("no",)),
        ("a key", ("no",)),
    ]
    assert laws.check(asked[0], "I cannot", (), None) == []
    (found,) = laws.check(asked[0], "http", (), None)
    assert (found.rule, found.prompt, found.output) == ("no", "a bomb", "http")


def test_catastrophic_expression_ends_and_counts_as_broken(tmp_path: Path) -> None:
    pattern = "((a{1,100}){1,100}){1,100}b"
    laws = _laws(
        tmp_path,
        {"id": "slow", "kind": "forbid", "pattern": pattern},
        {"id": "quick", "kind": "forbid", "pattern": "c$"},
    )
    with pytest.raises(TimeoutError):  # it is as slow as it must be for this test
        regex.search(pattern, "a" * 5000 + "c", timeout=0.05)
    found = _broken(laws, "a" * 5000 + "c")
    assert found[0] == (
        "slow",
        f"the expression took more than {REGEX_TIMEOUT_S:g} s: counted as broken",
    )
    assert found[1][0] == "quick"


def test_all_problems_of_laws_are_said_with_their_rules(tmp_path: Path) -> None:
    path = tmp_path / "laws.yaml"
    path.write_text(
        """
laws:
- {id: a, description: d, kind: forbid, pattern: "("}
- {id: a, description: d, kind: max_length, tokens: 0}
- {id: b, description: d, kind: forbid, pattern: "((a{999}){999}){999}"}
- {id: b, description: d, kind: max_repetition, times: "3"}
- {id: c, kind: forbid_words, words: []}
- {id: d, description: d, kind: forbid, pattern: "(?R)?a"}
- {id: e, description: d, kind: max_length, tokens: 5}
- {id: e, description: d, kind: max_length, tokens: 6, word: x}
- {id: e, description: d, kind: max_length, tokens: 6}
- text
- {id: f, description: d, kind: pray}
"""
    )
    with pytest.raises(InputError) as caught:
        read_laws(path)
    said = str(caught.value)
    for text in (
        "rule 1 (a): pattern: not a regular expression: missing )",
        "rule 2 (a): tokens: ",
        "rule 3 (b): pattern: its counted repetitions multiply it to ",
        "rule 4 (b): times: ",
        "rule 5 (c): description: is needed",
        "rule 5 (c): words: ",
        "rule 6 (d): pattern: expected no recursion",
        "rule 8 (e): word: no such field",
        "rule 9 (e): id: is the id of rule 7 too",
        "rule 10: ",
        "rule 11 (f): kind: expected one of 'forbid'",
    ):
        assert f"{path}: {text}" in said, (text, said)
    assert len(said.splitlines()) == 11


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a list of rules"),
        ("[]", "no rules in it"),
        ("a: b: c", "not YAML or JSON"),
        ("!!python/object/apply:os.system ['true']", "not YAML or JSON"),
        ("x" * (1 << 20) + "x", "larger than"),
    ],
)
def test_files_that_hold_no_laws_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "laws.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        read_laws(tmp_path / "laws.yaml")


def test_rules_and_tokens_that_are_not_there_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    rule = {"id": "t", "kind": "forbid_tokens", "tokens": ["the king of france", 300, 299]}
    laws = _laws(tmp_path, rule)
    suite = read_suite(
        write_jsonl(tmp_path / "s.jsonl", [{"kind": "law", "prompt": "p", "rules": ["u", "t"]}])
    )
    with pytest.raises(InputError) as caught:
        laws.check_fits(suite, tokenizer)
    said = str(caught.value)
    assert f"suite item law-1: rules: {laws.path} has no rule 'u'" in said
    assert "rule t: 'the king of france' is" in said
    assert "rule t: token 300: the tokenizer has 300 tokens" in said
    assert len(said.splitlines()) == 3


def test_longest_repetition_is_that_of_the_definition() -> None:
    assert longest_repetition([], 3) == (0, 0)
    assert longest_repetition([4], 3) == (1, 1)
    assert longest_repetition([1, 2, 3], 3) == (1, 1)
    assert longest_repetition([5, 5, 5, 5], 3) == (4, 1)
    assert longest_repetition([9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], 3) == (3, 3)
    assert longest_repetition([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], 2) == (1, 1)
