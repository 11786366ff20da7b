"""Laws in training: checked at each evaluation and at the end, recorded once, and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_train import SETTINGS
from tiny import sentences, write_jsonl

from distill.law_watch import LAWS_FILE, MAX_NEW_TOKENS, LawWatch
from distill.train import TrainRequest, make_trainer, train
from logitcache import build
from logitcache.errors import InputError, Interrupted, UsageError

RULES = [
    {"id": "never", "description": "says nothing", "kind": "max_length", "tokens": 1},
    {"id": "keeps", "description": "x", "kind": "forbid", "pattern": "no such text \\d{9}"},
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, teacher1: Path, teacher2: Path) -> Path:
    """A store, a suite of two law items and a recall item, and laws of which one is broken."""
    folder = tmp_path_factory.mktemp("laws")
    data = write_jsonl(folder / "data.jsonl", [{"text": s} for s in sentences(20, 7)])
    common = {"teacher1": teacher1, "teacher2": teacher2, "data": [data], "seq_len": 48}
    build(**common, out=folder / "store", device="cpu")
    items = [{"kind": "law", "prompt": prompt} for prompt in ("the king", "a green\u2028field")]
    items.append({"kind": "recall", "prompt": "the king", "expect": "of"})
    write_jsonl(folder / "suite.jsonl", items)
    (folder / "laws.json").write_text(json.dumps(RULES), encoding="utf-8")
    return folder


def request(work: Path, teacher1: Path, out: Path, with_eval: bool, **settings) -> TrainRequest:
    merged = {**SETTINGS, "max_steps": 4, "laws": str(work / "laws.json")}
    merged["suite"] = str(work / "suite.jsonl")
    if with_eval:
        merged |= {"eval_strategy": "steps", "eval_steps": 2}
    store = work / "store"
    return TrainRequest(store, teacher1, out, store if with_eval else None, {**merged, **settings})


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def broken(out: Path) -> list[tuple[int, str, str]]:
    return [(r["step"], r["rule"], r["prompt"]) for r in records(out / LAWS_FILE)]


def counted(out: Path) -> list[tuple[int, float]]:
    log = records(out / "log.jsonl")
    return [(r["step"], r["law_violations"]) for r in log if "law_violations" in r]


BOTH = [("never", "the king"), ("never", "a green\u2028field")]


def test_laws_are_checked_at_each_evaluation_once_a_step(
    work: Path, teacher1: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(request(work, teacher1, out, True))
    # Not at step 0, where the model is teacher 1; at step 4 once, though it is evaluated twice.
    assert broken(out) == [(step, *of) for step in (2, 4) for of in BOTH]
    assert counted(out) == [(2, 2.0), (4, 2.0)]
    first = records(out / LAWS_FILE)[0]
    assert set(first) == {"step", "rule", "prompt", "output", "detail"}
    assert "at most 1 are allowed" in first["detail"]
    assert first["output"]


def test_laws_are_checked_at_the_end_where_nothing_is_evaluated(
    work: Path, teacher1: Path, tmp_path: Path
) -> None:
    train(request(work, teacher1, tmp_path / "out", False, max_steps=2))
    assert broken(tmp_path / "out") == [(2, *of) for of in BOTH]


def test_kept_laws_leave_an_empty_record(work: Path, teacher1: Path, tmp_path: Path) -> None:
    laws = tmp_path / "kept.json"
    laws.write_text(json.dumps(RULES[1:]), encoding="utf-8")
    out = tmp_path / "out"
    train(request(work, teacher1, out, False, max_steps=1, laws=str(laws)))
    assert broken(out) == []
    assert counted(out) == [(1, 0.0)]


def test_what_the_child_says_is_what_the_averaged_weights_say(
    work: Path, teacher1: Path, tmp_path: Path
) -> None:
    import torch

    from distill.laws import read_laws, violations_of
    from distill.suite import read_suite
    from logitcache.causal_lm import load_causal_lm
    from logitcache.tokenise import load_tokenizer

    out = tmp_path / "out"
    train(request(work, teacher1, out, False, max_steps=2, learning_rate=0.01))
    said = {}
    for name in (".", "raw"):
        model = load_causal_lm(out / name, torch.float32, torch.device("cpu"))
        found = violations_of(
            model,
            load_tokenizer(out),
            read_laws(work / "laws.json"),
            read_suite(work / "suite.jsonl"),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        said[name] = [violation.output for violation in found]
    assert [r["output"] for r in records(out / LAWS_FILE)] == said["."] != said["raw"]


def test_a_stopped_run_ends_with_the_records_of_one_that_was_not(
    work: Path, teacher1: Path, tmp_path: Path
) -> None:
    settings = {"eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    train(request(work, teacher1, tmp_path / "whole", True, **settings))
    out, asked = tmp_path / "parts", []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= 3

    with pytest.raises(Interrupted, match="saved step 3 of 4"):
        train(request(work, teacher1, out, True, **settings), stop=stop)
    assert {step for step, *_ in broken(out)} == {1, 2, 3}
    # As if it had been killed after an evaluation that no checkpoint followed.
    with open(out / LAWS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, **records(out / LAWS_FILE)[0]} | {"step": 4}) + "\n")
    train(request(work, teacher1, out, True, **settings))
    assert broken(out) == broken(tmp_path / "whole")
    assert (out / LAWS_FILE).read_bytes() == (tmp_path / "whole" / LAWS_FILE).read_bytes()


def test_a_step_that_is_looked_at_again_stands_there_once(
    work: Path, teacher1: Path, tmp_path: Path
) -> None:
    asked = request(work, teacher1, tmp_path / "out", False)
    (tmp_path / "out").mkdir()
    write_jsonl(tmp_path / "out" / LAWS_FILE, [{"step": s} for s in (2, 4, 4, 6)])
    for _ in range(2):
        trainer = make_trainer(asked, asked.config())
        (watch,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, LawWatch))
        watch.check(4)
        watch.check(4)
        found = records(tmp_path / "out" / LAWS_FILE)
        assert [record["step"] for record in found] == [2, 4, 4]
        assert [record.get("prompt") for record in found[1:]] == [prompt for _, prompt in BOTH]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"laws": None}, UsageError, "suite: training asks its law items alone"),
        ({"laws": "gone.json"}, UsageError, r"laws: gone.json: no such file"),
        ({"suite": None}, InputError, "nothing to ask: no rule has prompts, and there is no suite"),
    ],
)
def test_laws_that_cannot_be_checked_are_refused_before_training(
    work: Path, teacher1: Path, tmp_path: Path, change: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        train(request(work, teacher1, tmp_path / "out", False, **change))
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_prompt_that_is_too_long_is_refused_before_training(
    work: Path, teacher1: Path, tmp_path: Path
) -> None:
    suite = write_jsonl(tmp_path / "s.jsonl", [{"kind": "law", "prompt": "the king " * 60}])
    with pytest.raises(InputError, match="the model reads at most 128"):
        train(request(work, teacher1, tmp_path / "out", False, suite=str(suite)))
    assert not (tmp_path / "out" / "run.json").exists()


def test_other_laws_are_another_run(work: Path, teacher1: Path, tmp_path: Path) -> None:
    laws = tmp_path / "laws.json"
    laws.write_text(json.dumps(RULES), encoding="utf-8")
    out = tmp_path / "out"
    train(request(work, teacher1, out, False, max_steps=1, laws=str(laws)))
    laws.write_text(json.dumps(RULES[:1]), encoding="utf-8")
    with pytest.raises(UsageError, match="laws: this command 'sha256 "):
        train(request(work, teacher1, out, False, max_steps=1, laws=str(laws)))
