"""The four gates: thresholds to the digit, too little evidence, failures of a gate, records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import regex
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, sentences, write_jsonl

from distill.gates import GateSettings, judge
from distill.generate import load_speaker
from distill.laws import Violation
from distill.suite import ToneItem
from logitcache.errors import InputError, Interrupted, StoreError, UsageError

NEW = 8
SETTINGS = GateSettings(theta=2.0, max_new_tokens=NEW, bootstrap_samples=200)
PROMPTS = sentences(20, seed=11, words=5)
IMPOSSIBLE = "no model says this"


@pytest.fixture(scope="module")
def said(teacher1: Path, teacher2: Path) -> dict[str, list[str]]:
    """What the reference (teacher 1) and the candidate (teacher 2) answer to PROMPTS."""
    items = [ToneItem(kind="tone", prompt=p, id=str(n)) for n, p in enumerate(PROMPTS)]
    answers = {
        name: [output.text for output in load_speaker(folder, "cpu").answer(items, NEW)]
        for name, folder in (("child", teacher2), ("teacher", teacher1))
    }
    for mine, theirs in zip(answers["child"], answers["teacher"], strict=True):
        assert mine.strip()
        assert theirs.strip()
        assert mine.strip() not in theirs
        assert theirs.strip() not in mine
    return answers


def _items(said: dict[str, list[str]], kind: str, child: int, teacher: int, total: int = 20):
    """Items of which the candidate and the reference have so many right, none together."""
    expects = [*said["child"][:child], *said["teacher"][child : child + teacher]]
    expects += [IMPOSSIBLE] * (total - len(expects))
    return [
        {"kind": kind, "prompt": prompt, "expect": expect, "score": "contains"}
        for prompt, expect in zip(PROMPTS, expects, strict=False)
    ]


def _tones(number: int = 4) -> list[dict]:
    return [{"kind": "tone", "prompt": prompt} for prompt in PROMPTS[:number]]


def _judge(tmp_path: Path, teacher2: Path, teacher1: Path, records: list[dict], **changes: object):
    suite = write_jsonl(tmp_path / "suite.jsonl", records)
    changes = {"settings": SETTINGS, "device": "cpu", **changes}
    document = judge(teacher2, teacher1, suite, **changes)
    return document, {gate["name"]: gate for gate in document["gates"]}


@pytest.mark.parametrize(
    ("recall", "generalize", "passed"),
    [
        ((9, 10), (6, 5), (True, True)),  # 0.45 against 0.5 - 0.05: on the threshold
        ((8, 10), (6, 6), (False, False)),
        ((10, 9), (12, 8), (True, True)),
    ],
)
def test_verdict_follows_the_point_estimate_up_to_the_threshold_itself(
    tmp_path: Path,
    teacher1: Path,
    teacher2: Path,
    said: dict,
    recall: tuple[int, int],
    generalize: tuple[int, int],
    passed: tuple[bool, bool],
) -> None:
    records = _items(said, "recall", *recall) + _items(said, "generalize", *generalize) + _tones()
    document, gates = _judge(tmp_path, teacher2, teacher1, records)
    assert [gate["name"] for gate in document["gates"]] == ["recall", "generalize", "tone", "laws"]
    assert (gates["recall"]["passed"], gates["generalize"]["passed"]) == passed
    for name, (mine, theirs), step in (("recall", recall, -0.05), ("generalize", generalize, 0.02)):
        gate = gates[name]
        assert gate["score"] == pytest.approx(mine / 20)
        assert gate["teacher_score"] == pytest.approx(theirs / 20)
        assert gate["threshold"] == pytest.approx(theirs / 20 + step)
        assert gate["items"] == 20
        low, high = gate["interval"]
        assert low <= gate["score"] <= high
        assert high - low > 0.1
        assert len(gate["failing"]) == 20 - mine
        assert gate["failing"][0]["output"] != gate["failing"][0]["expect"]
        assert gate["failing"][0]["teacher_output"] == said["teacher"][mine]
    assert gates["tone"]["passed"]
    assert gates["laws"] | {"note": ""} == {
        "name": "laws",
        "passed": True,
        "score": 0.0,
        "teacher_score": None,
        "threshold": 0.0,
        "items": 0,
        "interval": None,
        "failing": [],
        "note": "",
    }
    assert document["verdict"] == ("promoted" if all(passed) else "rejected")
    assert len(document["reasons"]) == 2 - sum(passed)


def test_candidate_equal_to_the_reference_learned_nothing_and_is_rejected(
    tmp_path: Path, teacher1: Path
) -> None:
    same = shutil.copytree(teacher1, tmp_path / "same")
    texts = [
        {"kind": kind, "prompt": p[:15], "expect": p[15:], "score": "tokens"}
        for kind in ("recall", "generalize")
        for p in PROMPTS[:8]
    ]
    tones = [record | {"reference": PROMPTS[9]} for record in _tones()]
    document, gates = _judge(tmp_path, same, teacher1, texts + tones)
    assert document["verdict"] == "rejected"
    assert gates["recall"]["passed"]
    assert 0 < gates["recall"]["score"] == gates["recall"]["teacher_score"] < 1
    assert gates["recall"]["interval"] == [gates["recall"]["score"]] * 2
    assert gates["tone"]["score"] == 0.0
    assert not gates["generalize"]["passed"]
    assert "0.02 more than teacher 1's" in document["reasons"][0]
    assert "nothing was learned" in document["reasons"][1]


def test_too_few_items_reject_however_well_they_are_answered(
    tmp_path: Path, teacher1: Path, teacher2: Path, said: dict
) -> None:
    records = _items(said, "recall", 7, 0, total=7) + _tones(3)
    document, gates = _judge(tmp_path, teacher2, teacher1, records)
    assert document["verdict"] == "rejected"
    assert document["reasons"][:3] == [
        "recall: too little evidence: 7 items, expected at least 8",
        "generalize: too little evidence: 0 items, expected at least 8",
        f"tone: {gates['tone']['note']}",
    ]
    assert gates["recall"]["score"] == 1.0
    assert gates["generalize"]["score"] is None
    assert gates["tone"]["note"].startswith("too little evidence: 3 items, expected at least 4; ")
    one = _items(said, "recall", 1, 0, total=1)
    _, gates = _judge(tmp_path, teacher2, teacher1, one)
    assert (gates["recall"]["passed"], gates["recall"]["interval"]) == (False, None)


def test_threshold_above_one_says_that_the_suite_is_too_easy(
    tmp_path: Path, teacher1: Path, teacher2: Path, said: dict
) -> None:
    records = _items(said, "generalize", 0, 8, total=8)
    _, gates = _judge(tmp_path, teacher2, teacher1, records)
    assert not gates["generalize"]["passed"]
    assert "the suite needs harder items" in gates["generalize"]["note"]


def test_candidate_of_nan_fails_every_gate_with_its_reason(
    tmp_path: Path, teacher1: Path, said: dict
) -> None:
    broken = shutil.copytree(teacher1, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    laws = tmp_path / "laws.json"
    laws.write_text('[{"id": "a", "description": "d", "kind": "forbid", "pattern": "x"}]')
    records = _items(said, "recall", 5, 5) + _items(said, "generalize", 5, 5) + _tones()
    records[0] |= {"score": "tokens"}
    out = tmp_path / "out"
    document, gates = _judge(tmp_path, broken, teacher1, records, laws=laws, out=out)
    for gate in gates.values():
        assert not gate["passed"]
        assert gate["score"] is None
        assert gate["note"].startswith("the gate crashed: NonFiniteError: the model's logits")
    assert [reason.split(":")[0] for reason in document["reasons"]] == list(gates)
    assert json.loads((out / "verdict.json").read_text()) == document


def test_gate_that_runs_out_of_its_time_is_not_passed(
    tmp_path: Path, teacher1: Path, teacher2: Path, said: dict
) -> None:
    settings = SETTINGS.model_copy(update={"time_limit_s": 1e-9})
    records = _items(said, "recall", 20, 0) + _items(said, "generalize", 20, 0) + _tones()
    document, gates = _judge(tmp_path, teacher2, teacher1, records, settings=settings)
    assert document["verdict"] == "rejected"
    for name in ("recall", "generalize", "tone"):
        assert "the gate ran out of time" in gates[name]["note"], gates[name]
    assert gates["laws"]["passed"]


def test_violations_now_and_in_training_fail_the_gate_of_laws(
    tmp_path: Path, teacher1: Path, teacher2: Path, said: dict
) -> None:
    word = said["child"][2].strip()
    laws = tmp_path / "laws.yaml"
    rules = [
        {"id": "word", "description": "d", "kind": "forbid", "pattern": regex.escape(word)},
        {"id": "sign", "description": "d", "kind": "require", "pattern": "yours"},
        {"id": "no", "description": "d", "kind": "must_refuse", "pattern": "x", "prompts": ["a"]},
    ]
    laws.write_text(json.dumps(rules))
    records = [
        *_items(said, "recall", 8, 0, total=8),
        *_items(said, "generalize", 8, 0, total=8),
        *_tones(),
        {"kind": "law", "prompt": PROMPTS[2], "rules": ["word"], "id": "law-a"},
        {"kind": "law", "prompt": PROMPTS[3], "id": "law-b"},
    ]
    earlier = [Violation("old", "p", "o", "d")]
    document, gates = _judge(
        tmp_path, teacher2, teacher1, records, laws=laws, training_violations=earlier
    )
    gate = gates["laws"]
    assert not gate["passed"]
    found = [(entry["rule"], entry["id"]) for entry in gate["failing"]]
    # The word: in its law item, and wherever else the suite asks the same.
    assert found == [
        ("word", "law-a"),
        ("sign", "law-b"),
        ("no", "no/1"),
        ("word", "recall-3"),
        ("word", "generalize-11"),
        ("word", "tone-19"),
        ("old", "training"),
    ]
    assert gate["score"] == 7.0
    assert gate["teacher_score"] == 2.0  # teacher 1 signs and refuses no better
    assert gate["items"] == 8 + 8 + 4 + 2 + 1
    assert gate["failing"][0]["teacher_output"] == said["teacher"][2]
    assert document["reasons"] == ["laws: 7 violations of no, old, sign, word; expected none"]
    # Without laws, those of training count all the same.
    _, gates = _judge(tmp_path, teacher2, teacher1, records[:-2], training_violations=earlier)
    assert (gates["laws"]["passed"], gates["laws"]["score"]) == (False, 1.0)


def test_records_hold_each_item_and_what_each_model_said(
    tmp_path: Path, teacher1: Path, teacher2: Path, said: dict
) -> None:
    records = _items(said, "recall", 2, 2, total=4) + _tones(2)
    records.append({"kind": "law", "prompt": PROMPTS[5]})
    out = tmp_path / "work"
    document, gates = _judge(tmp_path, teacher2, teacher1, records, out=out, earlier=teacher1)
    assert gates["laws"]["note"] == "no laws were given: the suite's 1 law items were not judged"
    lines = (out / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [entry["id"] for entry in found] == [
        *(f"recall-{n}" for n in (1, 2, 3, 4)),
        "tone-5",
        "tone-6",
        "law-7",
    ]
    assert found[1] == {
        "id": "recall-2",
        "kind": "recall",
        "prompt": PROMPTS[1],
        "expect": said["child"][1],
        "outputs": {
            "child": said["child"][1],
            "teacher1": said["teacher"][1],
            "teacher2": said["teacher"][1],
        },
    }
    assert set(found[-1]["outputs"]) == {"child", "teacher1", "teacher2"}
    assert json.loads((out / "verdict.json").read_text()) == document
    first = (out / "verdict.json").read_bytes()
    _judge(tmp_path, teacher2, teacher1, records, out=out, earlier=teacher1)
    assert (out / "verdict.json").read_bytes() == first
    assert (out / "generations.jsonl").read_text(encoding="utf-8").splitlines() == lines


def test_what_cannot_be_judged_is_refused_before_a_verdict(
    tmp_path: Path, teacher1: Path, teacher2: Path
) -> None:
    long = [{"kind": "tone", "prompt": " ".join(PROMPTS * 3)}]
    with pytest.raises(InputError, match=r"tone-1: \d+ tokens of prompt and 8 to come; .* 128"):
        _judge(tmp_path, teacher2, teacher1, long)
    chat = [{"kind": "tone", "messages": [{"role": "user", "content": "hi"}]}]
    for folder in ("a", "b"):
        shutil.copytree(teacher1, tmp_path / folder)
        make_tokenizer(tmp_path / folder, template=None)
        (tmp_path / folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="need a chat template"):
        _judge(tmp_path, tmp_path / "a", tmp_path / "b", chat)
    with pytest.raises(StoreError, match="chat_template differ"):
        _judge(tmp_path, tmp_path / "a", teacher1, chat)
    with pytest.raises(UsageError, match="no such model folder"):
        _judge(tmp_path, tmp_path / "c", teacher1, chat)
    with pytest.raises(Interrupted):
        _judge(tmp_path, teacher2, teacher1, _tones(), stop=lambda: True)
    assert not (tmp_path / "verdict.json").exists()


def test_padded_vocabulary_is_never_generated_nor_counted(tmp_path: Path) -> None:
    from distill.suite import AnswerItem

    folder = make_model(tmp_path / "padded", seed=1, vocab_size=320, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][300:] = 100 * weights["lm_head.weight"][:20]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    speaker = load_speaker(folder, "cpu")
    item = AnswerItem(kind="recall", prompt=PROMPTS[0], expect=PROMPTS[1], score="tokens", id="i")
    (output,) = speaker.answer([item], 12)
    assert max(output.token_ids) < 300
    ((logits_NV, target_N),) = speaker.read([(item.document(), item.expect)])
    assert logits_NV.shape == (len(target_N), 300)
