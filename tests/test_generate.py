"""Asking a model in batches, and the drift of its tone: each against its definition."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, sentences, write_jsonl

from distill.generate import Speaker, load_speaker, stop_ids
from distill.laws import read_laws, violations_of
from distill.student import attach_loss
from distill.suite import AnswerItem, ToneItem, read_suite
from distill.tone import js_bits, profiles, token_divergence, tone_drift
from logitcache.documents import Document
from logitcache.errors import InputError, NonFiniteError
from logitcache.tokenise import Encoder
from logitcache_kernels import DistillSpec

PROMPTS = [" ".join(s.split()[: 2 + n % 7]) for n, s in enumerate(sentences(24, seed=41))]
NEW = 10


@pytest.fixture(scope="module")
def speaker(teacher1: Path) -> Speaker:
    return load_speaker(teacher1, "cpu")


def _greedy(model, ids: list[int], stop: frozenset[int]) -> list[int]:
    """Greedy generation by its definition: a whole forward pass for each token, no batch."""
    made: list[int] = []
    while len(made) < NEW:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        made.append(token)
    return made


def test_batches_of_any_composition_give_what_each_prompt_gives_alone(speaker: Speaker) -> None:
    rows = [speaker.tokenizer(text)["input_ids"] for text in PROMPTS]
    expected = [_greedy(speaker.model, row, speaker.stop_ids) for row in rows]
    assert len({len(row) for row in rows}) > 5
    together = speaker.generate(rows, NEW)
    assert [list(output.token_ids) for output in together] == expected
    order = random.Random(1).sample(range(len(rows)), len(rows))
    shuffled = speaker.generate([rows[index] for index in order], NEW)
    assert shuffled == [together[index] for index in order]
    assert speaker.generate(rows[:1], NEW) == together[:1]
    assert speaker.generate([], NEW) == []


def test_generation_ends_at_any_of_its_ends_and_leaves_them_out(speaker: Speaker) -> None:
    row = speaker.tokenizer(PROMPTS[3])["input_ids"]
    (whole,) = speaker.generate([row], NEW)
    assert len(set(whole.token_ids)) > 3
    ending = Speaker(speaker.model, speaker.tokenizer)
    end = whole.token_ids[3]
    ending.stop_ids = ending.stop_ids | {end}
    (short,) = ending.generate([row], NEW)
    assert short.token_ids == whole.token_ids[: whole.token_ids.index(end)]


def test_ends_are_those_of_model_tokenizer_and_chat_template(speaker: Speaker) -> None:
    tokenizer = speaker.tokenizer
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert stop_ids(speaker.model, tokenizer) == {0, 2}


def test_settings_of_a_folder_do_not_change_what_is_measured(
    speaker: Speaker, teacher1: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher1, tmp_path / "penalised")
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "repetition_penalty": 1.9, "no_repeat_ngram_size": 1}))
    rows = [speaker.tokenizer(text)["input_ids"] for text in PROMPTS[:4]]
    other = load_speaker(folder, "cpu")
    assert other.model.generation_config.repetition_penalty == 1.9
    assert other.generate(rows, NEW) == speaker.generate(rows, NEW)
    assert other.model.generation_config.repetition_penalty == 1.9


def test_model_in_training_answers_and_is_left_as_it_was(teacher1: Path, tmp_path: Path) -> None:
    speaker = load_speaker(teacher1, "cpu")
    rows = [speaker.tokenizer(text)["input_ids"] for text in PROMPTS[:5]]
    before = speaker.generate(rows, NEW)
    attach_loss(speaker.model, DistillSpec())
    speaker.model.train()
    forward = speaker.model.forward
    assert speaker.generate(rows, NEW) == before
    speaker.token_accuracy([(Document("x", "the", None, None), " king")])
    assert speaker.model.training
    assert speaker.model.forward is forward
    path = tmp_path / "laws.json"
    rule = {"id": "no", "description": "d", "kind": "must_refuse", "pattern": "I cannot"}
    path.write_text(json.dumps([rule | {"prompts": PROMPTS[:2]}]))
    suite = read_suite(
        write_jsonl(tmp_path / "s.jsonl", [{"kind": "law", "prompt": "a", "rules": ["no"]}])
    )
    found = violations_of(
        speaker.model, speaker.tokenizer, read_laws(path), suite, max_new_tokens=NEW
    )
    assert [(violation.rule, violation.prompt) for violation in found] == [
        ("no", "a"),
        ("no", PROMPTS[0]),
        ("no", PROMPTS[1]),
    ]
    assert found[1].output == before[0].text
    assert speaker.model.training
    assert violations_of(speaker.model, speaker.tokenizer, read_laws(path), None, max_new_tokens=2)


def test_chat_prompt_is_the_template_and_marks_in_it_are_text(speaker: Speaker) -> None:
    encoder, tokenizer = Encoder(speaker.tokenizer), speaker.tokenizer
    said = "the king<|im_end|>"
    document = Document("here", None, [{"role": "user", "content": said}], None)
    ids = encoder.prompt(document)
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    both, first = encoder.continuation(document, "a green field<|im_end|>")
    assert both[:first] == ids
    assert tokenizer.decode(both[first:]) == "a green field<|im_end|>"
    assert both[first:].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 0


def test_answer_is_read_as_the_tokenizer_reads_prompt_and_answer_together(
    speaker: Speaker,
) -> None:
    encoder, tokenizer = speaker.encoder, speaker.tokenizer
    for prompt, answer in (("the ki", "ng of france"), ("the king ", "of"), ("the king", " \n of")):
        ids, first = encoder.continuation(Document("x", prompt, None, None), answer)
        assert ids == tokenizer(prompt + answer)["input_ids"]
        assert tokenizer.decode(ids[first:]).endswith(answer)
        assert len(tokenizer.decode(ids[:first])) <= len(prompt)


def test_token_accuracy_is_the_share_of_tokens_put_first(speaker: Speaker) -> None:
    texts = [(Document("x", p, None, None), " " + a) for p, a in zip(PROMPTS, PROMPTS[5:])]  # noqa: B905
    for (document, answer), found in zip(texts, speaker.token_accuracy(texts), strict=True):
        ids, first = speaker.encoder.continuation(document, answer)
        right = 0
        for index in range(first, len(ids)):
            with torch.no_grad():
                logits = speaker.model(torch.tensor([ids[:index]]), use_cache=False).logits
            right += int(logits[0, -1].argmax()) == ids[index]
        assert found == pytest.approx(right / (len(ids) - first))


def test_answers_that_cannot_be_read_are_refused(speaker: Speaker) -> None:
    long = AnswerItem(kind="recall", prompt="a", expect="birds " * 200, score="tokens", id="i")
    with pytest.raises(InputError, match=r"item i: prompt and answer have \d+ tokens; .* 128"):
        speaker.token_accuracy([(long.document(), long.expect)])


# Tone


def test_js_of_counts_is_that_of_the_definition() -> None:
    a, b = np.array([[3.0, 1.0, 0.0]]), np.array([[1.0, 1.0, 2.0]])
    p, q = a / 4, b / 4
    expected = 0.0
    for x, y in zip(p[0], q[0], strict=True):
        m = (x + y) / 2
        expected += (x * math.log2(x / m) if x else 0) / 2 + (y * math.log2(y / m) if y else 0) / 2
    assert js_bits(a, b)[0] == pytest.approx(expected)
    assert js_bits(a, 5 * a)[0] == 0.0
    zero = np.zeros((1, 3))
    assert (js_bits(a, zero)[0], js_bits(zero, zero)[0]) == (1.0, 0.0)
    assert js_bits(np.array([[1.0, 0.0]]), np.array([[0.0, 7.0]]))[0] == 1.0


def test_profiles_count_characters_pairs_and_function_words() -> None:
    characters, pairs, words = profiles("Thou and thou, Cafe\u0301")
    assert characters["o"] == 2
    assert characters["\u00e9"] == 1  # composed
    assert pairs["ou"] == 2
    assert words == {"thou": 2, "and": 1, "": 1}


def _texts(words: str, number: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words.split(), k=30)) for _ in range(number)]


def test_drift_is_0_of_the_same_small_of_the_like_large_of_the_other() -> None:
    voice = "the king and of a green bird in his field with her"
    teacher = _texts(voice, 16, seed=1)
    none = [(0.0, 0)] * 16
    same = tone_drift(teacher, teacher, none)
    assert (same.total, same.raw_style, same.tokens) == (0.0, 0.0, 0.0)
    assert same.floor > 0
    assert same.interval == (0.0, 0.0)
    like = tone_drift(_texts(voice, 16, seed=2), teacher, none)
    assert like.raw_style > 0.001  # chance alone ...
    assert like.total < 0.002  # ... which the floor takes away
    other = tone_drift(_texts("BUT LO! YE GODS, HARK: now 1 2 3", 16, seed=3), teacher, none)
    assert other.total > 0.5
    assert other.interval is not None
    low, high = other.interval
    assert low <= other.total <= high
    silent = tone_drift([""] * 16, teacher, none)
    assert silent.style == pytest.approx(1 - silent.floor)


def test_floor_is_half_the_divergence_between_halves() -> None:
    teacher = ["aa", "aa", "bb", "bb"]
    drift = tone_drift(teacher, teacher, [(0.0, 0)] * 4)
    # A half holds both a's (2 of 6 halvings: js is 1 for all but the words, which are all alike)
    # or one of each (4 of 6: js 0), so the mean is 2/9, and half of it is 1/9, up to the draw.
    assert drift.floor == pytest.approx(1 / 9, abs=0.06)


def test_tokens_part_is_the_mean_js_at_the_tokens_of_the_references(
    teacher1: Path, teacher2: Path, speaker: Speaker
) -> None:
    child = load_speaker(teacher2, "cpu")
    items = [
        ToneItem(kind="tone", prompt=PROMPTS[0], reference=" " + PROMPTS[1], id="a"),
        ToneItem(kind="tone", prompt=PROMPTS[2], id="b"),
        ToneItem(kind="tone", prompt=PROMPTS[3], reference=" " + PROMPTS[4], id="c"),
    ]
    found = token_divergence(child, speaker, items)
    assert found[1] == (0.0, 0)
    ids, first = speaker.encoder.continuation(items[0].document(), " " + PROMPTS[1])
    total = 0.0
    for index in range(first, len(ids)):
        with torch.no_grad():
            p, q = (
                s.model(torch.tensor([ids[:index]])).logits[0, -1].double().softmax(-1)
                for s in (child, speaker)
            )
        m = (p + q) / 2
        total += float((p * (p / m).log2() + q * (q / m).log2()).sum()) / 2
    assert found[0] == (pytest.approx(total, rel=1e-4), len(ids) - first)
    assert token_divergence(speaker, speaker, items)[0] == (0.0, len(ids) - first)
    drift = tone_drift(["x"] * 3, ["x"] * 3, found)
    mean = (found[0][0] + found[2][0]) / (found[0][1] + found[2][1])
    assert drift.total == drift.tokens == pytest.approx(mean)


def test_nan_is_refused_wherever_a_model_is_asked(teacher1: Path) -> None:
    broken = load_speaker(teacher1, "cpu")
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(torch.nan)
    item = ToneItem(kind="tone", prompt="the", reference=" king", id="a")
    for ask in (
        lambda: broken.answer([item], 2),
        lambda: broken.token_accuracy([(item.document(), " king")]),
        lambda: token_divergence(broken, broken, [item]),
    ):
        with pytest.raises(NonFiniteError):
            ask()


def test_prompt_without_a_template_is_refused(tmp_path: Path) -> None:
    encoder = Encoder(make_tokenizer(tmp_path, template=None))
    chat = Document("suite item i", None, [{"role": "user", "content": "hi"}], None)
    with pytest.raises(InputError, match='suite item i: "messages" need a chat template'):
        encoder.prompt(chat)
