"""Reading documents, and turning them into tokens with a loss mask."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny import make_tokenizer

from logitcache.documents import Document, read_documents
from logitcache.errors import InputError
from logitcache.tokenise import Encoder, content_sha256, describe_difference, tokenizer_content


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def write(tmp_path):
    """Write a file; gives its path."""

    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def texts(path) -> list[str | None]:
    return [document.text for document in read_documents((path,))]


def encode(tokenizer, *documents: Document):
    return list(Encoder(tokenizer).encode(documents))


def chat(*turns: tuple[str, str]) -> Document:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Document("chat", None, messages, None)


# --- files that can be read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param('{"text":"a"}\n{"text":"b"}\n', ["a", "b"], id="lf"),
        pytest.param('{"text":"a"}\r\n{"text":"b"}\r\n', ["a", "b"], id="crlf"),
        pytest.param('{"text":"a"}\n\n  \n{"text":"b"}', ["a", "b"], id="blank-lines-no-end"),
        pytest.param(b'\xef\xbb\xbf{"text":"a"}\n', ["a"], id="byte-order-mark"),
        pytest.param('{"text":"a\u2028b\u0085c"}\n', ["a\u2028b\u0085c"], id="unicode-line-ends"),
        pytest.param('{"text":"a\\u0000\\ud83d\\ude00"}\n', ["a\0\U0001f600"], id="escapes"),
        pytest.param('{"text":"","id":3}\n', [""], id="empty-text-other-keys"),
        pytest.param('{"text":"a","messages":null}\n', ["a"], id="messages-null-beside-text"),
    ],
)
def test_jsonl_gives_one_document_per_line_that_ends_in_lf(write, content, expected):
    assert texts(write("data.jsonl", content)) == expected


def test_line_numbers_count_lf_only(write):
    path = write(
        "data.jsonl", '{"text":"a\u2028b\u0085c\u000b"}\n\n{"text":null}\n'.replace("\v", "")
    )
    with pytest.raises(InputError, match=r'data.jsonl:3: "text" is null'):
        texts(path)


@pytest.mark.parametrize("name", ["DATA.JSONL", "data.ndjson", "data.json"])
def test_endings_of_json_lines_in_any_case(write, name):
    assert texts(write(name, '{"text":"a"}\n')) == ["a"]


def test_a_text_file_is_one_document(write):
    assert texts(write("book.txt", b"\xef\xbb\xbfline\r\nline\n")) == ["line\r\nline\n"]


def test_parquet_and_datasets_folders_give_the_same_documents_as_jsonl(write, tmp_path):
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    records = [{"text": "the king", "gold": True}, {"text": "of france", "gold": False}]
    lines = write("data.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet")
    Dataset.from_list(records).save_to_disk(tmp_path / "folder")
    expected = [(d.text, d.messages, d.gold) for d in read_documents((lines,))]
    assert expected == [("the king", None, True), ("of france", None, False)]
    for path in (tmp_path / "data.parquet", tmp_path / "folder"):
        assert [(d.text, d.messages, d.gold) for d in read_documents((path,))] == expected


def test_messages_from_parquet_equal_those_from_jsonl(write, tmp_path):
    record = {"messages": [{"role": "user", "content": "hi"}]}
    lines = write("data.jsonl", json.dumps(record) + "\n")
    parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "data.parquet")
    (one,), (other,) = (list(read_documents((p,))) for p in (lines, tmp_path / "data.parquet"))
    assert one.messages == other.messages == record["messages"]


# --- files that cannot ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a.jsonl: the file is empty"),
        ("a.jsonl", "\n \n", r"a.jsonl: no documents"),
        ("a.txt", " \n", r"a.txt: the file is empty"),
        ("a.parquet", "", r"a.parquet: not a Parquet file"),
        ("a.parquet", "PAR1 and no more", r"a.parquet: not a Parquet file"),
        ("a.jsonl", '{"text":"a"}\n{"text":null}\n', r'a.jsonl:2: "text" is null'),
        ("a.jsonl", '{"text":3}\n', r'a.jsonl:1: "text": expected a string, found 3'),
        ("a.jsonl", '{"content":"a"}\n', r"a.jsonl:1: expected a column .* found \['content'\]"),
        ("a.jsonl", '{"text":"a"}\n{"text":"b', r"a.jsonl:2: not JSON"),
        ("a.jsonl", '[{"text":"a"}]', r"a.jsonl:1: expected an object, found list"),
        ("a.json", '[\n {"text":"a"}\n]', r"a.json:1: not JSON"),
        ("a.jsonl", '{"text":"a","n":' + "1" * 5000 + "}", r"a.jsonl:1: not JSON"),
        ("a.jsonl", '{"text":' + "[" * 200_000, r"a.jsonl:1: .*nested too deeply"),
        ("a.jsonl", b'{"text":"a"}\n{"text":"\xff"}', r"a.jsonl:2:10: not UTF-8: byte 0xff"),
        ("a.txt", b"abc\nde\xff", r"a.txt:2:3: not UTF-8: byte 0xff"),
        ("a.jsonl", '{"text":"a\\ud800"}', r'a.jsonl:1: "text": lone surrogate at character 2'),
        ("a.jsonl.gz", gzip.compress(b'{"text":"a"}', mtime=0), r"expected text, found binary"),
        ("a.jsonl", '{"text":"a","gold":null}', r'"gold": expected true or false, found null'),
        ("a.jsonl", '{"text":"a","gold":1}', r'"gold": expected true or false, found 1'),
        ("a.jsonl", '{"messages":"hi"}', r'"messages": expected a list of messages, found "hi"'),
        ("a.jsonl", '{"messages":[]}', r'"messages": expected a list of messages'),
        ("a.jsonl", '{"messages":[{"role":"user"}]}', r'"messages"\[0\].content: .* found null'),
    ],
)
def test_what_cannot_be_used_is_refused_with_file_and_line(write, name, content, message):
    with pytest.raises(InputError, match=message):
        texts(write(name, content))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a", None]}, r'row 2: "text" is null'),
        ({"text": [1]}, r'row 1: "text": expected a string, found 1'),
        ({"other": ["a"]}, r"expected a column .* found \['other'\]"),
    ],
)
def test_parquet_rows_that_cannot_be_used_are_refused(tmp_path, table, message):
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        texts(tmp_path / "a.parquet")


def test_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["the king", "of france"]}), path)
    raw = bytearray(path.read_bytes())
    raw[8:40] = b"x" * 32
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"a.parquet: damaged after row 0"):
        texts(path)


def test_folders_that_are_no_dataset_or_hold_splits_are_refused(tmp_path):
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.jsonl").write_text('{"text":"a"}\n')
    with pytest.raises(InputError, match="not a folder written by datasets"):
        texts(tmp_path / "plain")
    DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match="several splits") as caught:
        texts(tmp_path / "splits")
    assert str(tmp_path / "splits" / "train") in caught.value.hint


# --- tokens --------------------------------------------------------------------------------------


def test_a_text_ends_in_the_end_token_and_all_of_it_is_trained_on(tokenizer):
    (encoded,) = encode(tokenizer, Document("a", "the king of france", None, None))
    assert encoded.tokens.tolist() == [*tokenizer("the king of france")["input_ids"], 0]
    assert encoded.loss_mask.all()
    assert encoded.gold is None


def test_special_tokens_spelt_in_a_text_are_text(tokenizer):
    text = "a<|endoftext|>b <|im_start|>"
    (encoded,) = encode(tokenizer, Document("a", text, None, None))
    assert np.flatnonzero(encoded.tokens < 3).tolist() == [len(encoded.tokens) - 1]
    assert tokenizer.decode(encoded.tokens[:-1]) == text


def test_only_assistant_turns_and_their_end_mark_are_trained_on(tokenizer):
    document = chat(
        ("user", "hi"), ("assistant", "yes the king"), ("user", "and"), ("assistant", "no")
    )
    (encoded,) = encode(tokenizer, document)
    rendered = tokenizer.apply_chat_template(document.messages, tokenize=False)
    assert tokenizer.decode(encoded.tokens) == rendered
    trained = tokenizer.decode(encoded.tokens[encoded.loss_mask])
    assert trained == "yes the king<|im_end|>no<|im_end|>"
    assert encoded.tokens.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_special_tokens_spelt_in_a_message_are_text(tokenizer):
    document = chat(
        ("user", "hi<|im_end|>\n<|im_start|>assistant\n"), ("assistant", "a<|endoftext|>b")
    )
    (encoded,) = encode(tokenizer, document)
    rendered = tokenizer.apply_chat_template(document.messages, tokenize=False)
    assert tokenizer.decode(encoded.tokens) == rendered
    assert encoded.tokens[encoded.tokens < 3].tolist() == [1, 2, 1, 2]
    assert tokenizer.decode(encoded.tokens[encoded.loss_mask]) == "a<|endoftext|>b<|im_end|>"


def test_documents_without_text_or_targets_are_counted_and_left_out(tokenizer):
    encoder = Encoder(tokenizer)
    documents = [
        Document("a", "", None, None),
        Document("b", " \n", None, None),
        chat(("user", "hi")),
        Document("d", "x", None, None),
    ]
    assert len(list(encoder.encode(documents))) == 1
    assert (encoder.num_documents, encoder.num_empty, encoder.num_without_targets) == (4, 2, 1)


def test_messages_without_a_chat_template_are_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path, template=None)
    with pytest.raises(InputError, match='chat: "messages" need a chat template'):
        encode(tokenizer, chat(("user", "hi"), ("assistant", "yes")))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{% if messages|length > 1 %}{{ messages[-1].content }}{% endif %}", "rewrites earlier"),
    ],
)
def test_templates_that_refuse_or_rewrite_are_refused(tmp_path, template, message):
    tokenizer = make_tokenizer(tmp_path, template=template)
    with pytest.raises(InputError, match=message):
        encode(
            tokenizer,
            chat(("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")),
        )


def test_tokenizers_are_told_apart_by_content_and_the_difference_is_named(tmp_path, tokenizer):
    content = tokenizer_content(tokenizer)
    same = tokenizer_content(make_tokenizer(tmp_path / "same"))
    assert content_sha256(same) == content_sha256(content)
    merges = tokenizer_content(make_tokenizer(tmp_path / "merges", merges_seed=5))
    assert content_sha256(merges) != content_sha256(content)
    assert "ids differ (expected / found): " in describe_difference(content, merges)
    template = tokenizer_content(make_tokenizer(tmp_path / "template", template="x"))
    assert content_sha256(template) != content_sha256(content)
    assert describe_difference(content, template).startswith("chat_template differ")
    swapped = json.loads(json.dumps(content))
    swapped["backend"]["model"]["merges"][:2] = swapped["backend"]["model"]["merges"][1::-1]
    assert describe_difference(content, swapped).startswith("merge 0 differs")
