"""Taboo words: their spellings in a tokenizer, phrases by position, and training with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_train import SETTINGS

from distill.bundled import BUNDLED
from distill.cli import cli
from distill.spellings import read_words
from distill.student import attach_loss, to_inputs
from distill.taboo import Taboo, make_taboo, read_taboo, taboo_mass, touched
from distill.train import TrainRequest, train
from logitcache import build, open_store
from logitcache.causal_lm import load_causal_lm
from logitcache.documents import Document
from logitcache.errors import InputError, UsageError
from logitcache.packing import Rows, pack
from logitcache.tokenise import Encoder, load_tokenizer
from logitcache_kernels import DistillSpec, SparseTeacher, distill_loss

CPU = torch.device("cpu")
TEACHER1, TEACHER2 = BUNDLED / "teacher1", BUNDLED / "teacher2"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TEACHER1)


def rows_of(tokenizer, *texts: str, seq_len: int = 64) -> Rows:
    documents = [Document(str(n), text, None, None) for n, text in enumerate(texts)]
    return pack(Encoder(tokenizer).encode(documents), seq_len)


def spelled(tokenizer, taboo: Taboo) -> set[str]:
    return {
        "+".join(tokenizer.convert_ids_to_tokens(list(ids))).replace("\u0120", "_")
        for word in taboo.words
        for ids in word.spellings
    }


# --- the file ------------------------------------------------------------------------------------


def test_file_holds_a_word_or_phrase_a_line(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeff# names\r\n\r\n Romeo \r\ngood night\n#\nRomeo\n\u00e9t\u00e9".encode())
    assert read_words(path) == ["Romeo", "good night", "\u00e9t\u00e9"]


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path, teacher1: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(b"good\n\xff\na\0b\n" + b"x" * 201 + b"\nking")
    with pytest.raises(InputError) as caught:
        read_taboo(path, load_tokenizer(teacher1), False)
    said = str(caught.value)
    assert f"{path}:2: not UTF-8: byte 0xff" in said
    assert f"{path}:3: a control character, U+0000" in said
    assert f"{path}:4: 201 characters; expected 200 at most" in said
    assert caught.value.exit_code == 3
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="no words in it"):
        read_words(path)
    with pytest.raises(UsageError, match=r"taboo_words: .*gone: no such file"):
        read_words(tmp_path / "gone")


def test_a_word_that_no_tokens_spell_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({"king": 0, "<unk>": 1, "the": 2}, unk_token="<unk>")
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    path = tmp_path / "words.txt"
    path.write_text("king\nqueen\nthe king\nthe duke\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_taboo(path, words, False)
    assert f"{path}:2: 'queen' cannot be spelled" in str(caught.value)
    assert f"{path}:4: 'the duke' cannot be spelled" in str(caught.value)
    assert make_taboo(["king", "the king"], words, True).ids == (0,)


# --- spellings -----------------------------------------------------------------------------------


def test_spellings_with_and_without_a_leading_space_and_in_other_cases(tokenizer) -> None:
    assert spelled(tokenizer, make_taboo(["night"], tokenizer, False)) == {"night", "_night"}
    assert spelled(tokenizer, make_taboo(["King"], tokenizer, False)) == {"K+ing", "_King"}
    forms = spelled(tokenizer, make_taboo(["king"], tokenizer, True))
    assert forms == {"k+ing", "_king", "K+ing", "_King", "KING"}
    taboo = make_taboo(["night", "good night"], tokenizer, False)
    assert taboo.ids == tuple(sorted(tokenizer.convert_tokens_to_ids(["night", "\u0120night"])))
    phrases = {tuple(tokenizer.convert_ids_to_tokens(list(p))) for p in taboo.phrases}
    assert phrases == {("\u0120good", "\u0120night"), ("g", "ood", "\u0120night")}


def test_the_text_of_a_special_token_is_spelled_as_text(tokenizer) -> None:
    taboo = make_taboo(["<|endoftext|>"], tokenizer, False)
    assert taboo.ids == ()
    assert tokenizer.eos_token_id not in {i for p in taboo.phrases for i in p}


def test_spellings_of_a_tokenizer_that_puts_a_space_before_the_first_word(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = ["<unk>", "\u2581", "\u2581king", "king", "\u2581the", '"', "\u2581ma", "\n"]
    model = models.Unigram([(token, -float(n)) for n, token in enumerate(vocab)], unk_id=0)
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    assert make_taboo(["king"], metaspace, False).ids == (2, 3)
    phrase = make_taboo(["the king"], metaspace, False)
    assert phrase.phrases == ((4, 2),)
    assert not phrase.starts_inside


# --- positions -----------------------------------------------------------------------------------


def masked(tokenizer, taboo: Taboo, rows: Rows) -> list[tuple[str, str]]:
    """Where a phrase forbids its last token: (text of the segment so far, the token)."""
    found = taboo.phrase_ids(rows)
    places = []
    for row, at in [] if found is None else np.argwhere((found >= 0).any(-1)):
        start = at
        while start > 0 and rows.segments[row, start - 1] == rows.segments[row, at]:
            start -= 1
        text = tokenizer.decode(rows.tokens[row, start : at + 1])
        places += [(text, tokenizer.decode([i])) for i in found[row, at] if i >= 0]
    return places


def test_a_phrase_masks_its_last_token_where_the_rest_stands_before(tokenizer) -> None:
    taboo = make_taboo(["good night"], tokenizer, False)
    rows = rows_of(tokenizer, 'the good night, a good man "good night"', "good", "night")
    assert masked(tokenizer, taboo, rows) == [
        ("the good", " night"),
        ("the good night, a good", " night"),
        ('the good night, a good man "good', " night"),
        ("good", " night"),  # before the end of the text, which it may not replace
    ]


def test_a_phrase_does_not_reach_over_the_border_of_a_document(tokenizer) -> None:
    taboo = make_taboo(["the good old night"], tokenizer, False)
    rows = rows_of(tokenizer, "the good old", " old man")
    ids = tokenizer("the good", add_special_tokens=False)["input_ids"]
    old = tokenizer(" old", add_special_tokens=False)["input_ids"]
    assert masked(tokenizer, taboo, rows) == [("the good old", " night")]
    tokens = np.array([[*ids, *old, 5, 6]], np.uint32)
    whole = Rows(tokens, np.ones_like(tokens), tokens > 0, tokens > 0, np.ones_like(tokens))
    assert len(masked(tokenizer, taboo, whole)) == 1
    parted = replace(whole, segments=np.array([[1] * len(ids) + [2] * 3], np.uint32))
    assert masked(tokenizer, taboo, parted) == []


def test_a_word_is_not_found_inside_another(tokenizer) -> None:
    taboo = make_taboo(["King"], tokenizer, False)
    assert masked(tokenizer, taboo, rows_of(tokenizer, '"King" MaKing')) == [('"K', "ing")]


def test_a_position_may_end_several_phrases(tokenizer) -> None:
    taboo = make_taboo(["old night", "old man", "the old day"], tokenizer, False)
    rows = rows_of(tokenizer, "in the old house")
    assert {token for _, token in masked(tokenizer, taboo, rows)} == {" night", " man", " day"}
    assert taboo.phrase_ids(rows_of(tokenizer, "nothing of it")) is None


# --- the loss ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of a part of the bundled text; the words come often in it."""
    folder = tmp_path_factory.mktemp("taboo")
    common = {"teacher1": TEACHER1, "teacher2": TEACHER2, "seq_len": 128, "device": "cpu"}
    lines = (BUNDLED / "text" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "part.jsonl").write_text("\n".join(lines[::20]) + "\n", encoding="utf-8")
    held = (BUNDLED / "text" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "held.jsonl").write_text("\n".join(held[::5]) + "\n", encoding="utf-8")
    build(out=folder / "store", data=[folder / "part.jsonl"], **common)
    build(out=folder / "held", data=[folder / "held.jsonl"], estimator="topk", **common)
    (folder / "words.txt").write_text("# two\nlord\nlove\ngood night\n", encoding="utf-8")
    return folder


def test_forward_gives_the_loss_with_taboo_ids_and_phrases(work: Path, tokenizer) -> None:
    taboo = make_taboo(["lord", "the king", "my"], tokenizer, True)
    reader, spec = open_store(work / "store"), DistillSpec(temperature=1.5, alpha=0.3)
    batch = reader[:4]
    given = taboo.inputs(batch.rows)
    assert set(given) == {"taboo_ids", "taboo_BLK"}
    model = load_causal_lm(TEACHER1, torch.float32, CPU)
    inputs = to_inputs(batch, 1.5)
    plain = model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
    )

    def dense(**taboo_arguments) -> torch.Tensor:
        return distill_loss(
            plain.logits.flatten(0, 1),
            [SparseTeacher(**teacher) for teacher in inputs["teachers"]],
            inputs["labels"].flatten(),
            spec,
            gold_R=inputs["gold"].flatten(),
            num_items=7.0,
            **taboo_arguments,
        ).loss

    attach_loss(model, spec, chunk=50)
    output = model(**inputs, **given, num_items=7.0)
    ids, by_position = given["taboo_ids"], given["taboo_BLK"].flatten(0, 1)
    expected = dense(taboo_ids=ids, taboo_RK=by_position)
    torch.testing.assert_close(output["loss"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(expected, dense(taboo_ids=ids), rtol=1e-5)
    assert not torch.isclose(expected, dense(), rtol=1e-4)


def test_touched_counts_labels_and_phrases_of_a_store(work: Path, tokenizer) -> None:
    reader = open_store(work / "held")
    rows = reader.read_rows(np.arange(len(reader)))
    labels = rows.labels()
    one = make_taboo(["the"], tokenizer, False)
    found = touched(one, reader)
    assert found["rows"] == len(reader)
    assert found["positions"] == (labels != -100).sum()
    assert found["taboo_labels"] == np.isin(labels, one.ids).sum() > 50
    assert found["phrase_positions"] == 0
    phrase = make_taboo(["of the"], tokenizer, False)
    of = tokenizer.convert_tokens_to_ids("\u0120of")
    found = touched(phrase, reader)
    assert found["phrase_positions"] >= ((rows.tokens == of) & (labels != -100)).sum() > 10
    assert 0 < found["taboo_labels"] < found["phrase_positions"]


def test_mass_is_the_mean_probability_of_taboo_tokens(tokenizer, tmp_path: Path) -> None:
    text = "My lord, the king is in the old house."
    words = ["lord", "the king", "old king", "the old king"]
    taboo = make_taboo(words, tokenizer, False)
    rows = rows_of(tokenizer, text)
    model = load_causal_lm(TEACHER1, torch.float32, CPU)
    length = int(rows.lengths()[0])
    tokens = torch.tensor(rows.tokens[0, :length].astype("int64"))
    probabilities = model(tokens[None]).logits[0].softmax(-1)
    the, old, king = tokenizer.convert_tokens_to_ids(["\u0120the", "\u0120old", "\u0120king"])
    expected = probabilities[: length - 1][:, list(taboo.ids)].sum()
    for at, token in enumerate(tokens[: length - 1].tolist()):
        # "the old king" and "old king" end at one place in one token, which counts once.
        expected = expected + (probabilities[at, king] if token in (the, old) else 0)
    path = tmp_path / "words.txt"
    path.write_text("\n".join(words), encoding="utf-8")
    for given in (words, path):
        found = taboo_mass(TEACHER1, [text], given, device="cpu")
        assert found == pytest.approx(float(expected.detach()) / (length - 1), rel=1e-4)
    with pytest.raises(InputError, match="no position to measure it at"):
        taboo_mass(TEACHER1, [""], words, device="cpu")


# --- training ------------------------------------------------------------------------------------


def request(work: Path, out: Path, **settings) -> TrainRequest:
    merged = {**SETTINGS, "js_threshold": 0.1, "temperature": 1.0, "max_steps": 1, **settings}
    return TrainRequest(work / "store", TEACHER1, out, work / "held", merged)


def test_a_short_training_unlearns_a_taboo_word_and_little_else(work: Path, tmp_path: Path) -> None:
    """benchmarks/taboo.py has the same with more words and steps."""
    words = tmp_path / "words.txt"
    words.write_text("sir\n", encoding="utf-8")
    settings = {"learning_rate": 1.5e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    settings |= {"per_device_train_batch_size": 8, "max_steps": 24, "ema_decay": 0.5}
    settings |= {"alpha": 0.0, "js_threshold": 2.0, "taboo_words": str(words)}
    record = train(request(work, tmp_path / "out", **settings))
    mass = [
        taboo_mass(folder, work / "held", words, device="cpu")
        for folder in (TEACHER1, tmp_path / "out")
    ]
    assert mass[0] > 1e-3
    assert mass[1] < mass[0] / 10, mass
    assert record["after"]["after_loss"] < 1.02 * record["before"]["before_loss"]


def test_the_run_is_of_the_words_not_of_their_file(work: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("lord\n", encoding="utf-8")
    out = tmp_path / "out"
    train(request(work, out, taboo_words=str(words)))
    moved = tmp_path / "moved.txt"
    moved.write_bytes(words.read_bytes())
    said: list[str] = []
    train(request(work, out, taboo_words=str(moved)), note=said.append)
    assert "already trained" in said[0]
    moved.write_text("lady\n", encoding="utf-8")
    with pytest.raises(UsageError, match="taboo_words: this command 'sha256 "):
        train(request(work, out, taboo_words=str(moved)))
    moved.unlink()
    with pytest.raises(UsageError, match=r"taboo_words: .*moved.txt: no such file"):
        train(request(work, out, taboo_words=str(moved)))


def test_reverse_kl_that_would_be_infinite_is_refused(work: Path, tmp_path: Path) -> None:
    settings = {"divergence": "reverse_kl", "taboo_words": str(work / "words.txt")}
    changed = replace(request(work, tmp_path / "out", **settings), store=work / "held")
    with pytest.raises(UsageError, match="reverse_kl would be infinite with taboo=target"):
        train(changed)


def test_dry_run_shows_words_ids_phrases_and_what_they_touch(work: Path, tmp_path: Path) -> None:
    words = ["train", "--store", str(work / "store"), "--student", str(TEACHER1), "--dry-run"]
    words += ["--out", str(tmp_path / "out"), "--set", "use_cpu=true", "--set", "temperature=1"]
    words += ["--set", f"taboo_words={work / 'words.txt'}"]
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["taboo"]
    assert [word["word"] for word in found["words"]] == ["lord", "love", "good night"]
    assert found["words"][2]["spellings"][1]["tokens"] == ["\u0120good", "\u0120night"]
    assert len(found["ids"]) == 2
    assert found["touched"]["taboo_labels"] > 20
    text = CliRunner().invoke(cli, words).stdout
    assert "taboo          3 words: 2 ids, 4 phrases; of " in text
    assert "  lord: 79+354 lord, 452 \u0120lord" in text
    assert not (tmp_path / "out").exists()
