"""Replay and gold: what is taken of earlier generations' data, and which documents are curated."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from crash_worker import failpoints
from pyarrow import parquet
from tiny import sentences, write_jsonl

from distill.gold import mark_gold
from distill.replay import (
    count_documents,
    data_fingerprint,
    main_documents_for,
    replay_quota,
    sample_replay,
)
from logitcache import build, open_store
from logitcache.documents import read_documents
from logitcache.errors import InputError, UsageError


@pytest.fixture
def recorded(tmp_path: Path) -> dict[str, list[Path]]:
    """Two generations: one learned from JSON Lines with chats and a text, one from Parquet."""
    chat = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a k\u00efng"}]
    lines = [{"text": f"old {n}", "id": n} for n in range(20)]
    lines += [{"messages": chat, "gold": True}, {"text": " \n"}]
    nine = write_jsonl(tmp_path / "nine.jsonl", lines)
    (tmp_path / "nine.txt").write_text("plain\u2028text", encoding="utf-8")
    table = pa.table({"text": [f"new {n}" for n in range(30)]})
    parquet.write_table(table, tmp_path / "ten.parquet")
    return {"G009": [nine, tmp_path / "nine.txt"], "G010": [tmp_path / "ten.parquet"]}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_whole_documents_are_sampled_of_every_generation(recorded, tmp_path: Path) -> None:
    result = sample_replay(recorded, 22, 5, tmp_path / "replay")
    assert [path.name for path in result.files] == ["G009.jsonl", "G010.jsonl"]
    assert [(each.sampled, each.documents) for each in result.generations] == [(22, 22), (22, 30)]
    nine, ten = (lines(path) for path in result.files)
    # All of nine but the empty one, in order; silence beside a flag was "not gold" in its build.
    assert nine[:20] == [{"text": f"old {n}", "gold": False} for n in range(20)]
    assert nine[20]["gold"] is True
    assert nine[20]["messages"][1]["content"] == "a k\u00efng"
    assert nine[21] == {"text": "plain\u2028text", "gold": False}
    assert len({record["text"] for record in ten}) == 22
    assert all(set(record) == {"text"} for record in ten)
    assert [d.text for d in read_documents((result.files[1],))] == [r["text"] for r in ten]
    assert result.gone == []


def test_documents_of_curated_files_stay_gold_and_the_others_do_not(recorded, tmp_path) -> None:
    curated = write_jsonl(tmp_path / "curated.jsonl", [{"text": "a"}, {"text": "b", "gold": False}])
    family = {"G010": [curated, *recorded["G010"]]}
    gold = {"G010": {curated}}
    (file,) = sample_replay(family, 40, 5, tmp_path / "replay", gold=gold).files
    told = {record["text"]: record["gold"] for record in lines(file)}
    assert told.pop("a") is True
    assert set(told.values()) == {False}
    assert len(told) == 31


def test_the_sample_is_drawn_by_seed_and_generation(recorded, tmp_path: Path) -> None:
    def texts(size: int, seed: int, name: str = "G010") -> list[str]:
        files = sample_replay({name: recorded["G010"]}, size, seed, tmp_path / "r").files
        return [record["text"] for record in lines(files[0])]

    assert texts(8, 1) == texts(8, 1)
    assert texts(8, 1) != texts(8, 2)
    assert texts(8, 1) != texts(8, 1, "G008")
    assert set(texts(5, 1)) < set(texts(8, 1))
    # Any document may be drawn, the last as the first.
    drawn = {text for seed in range(16) for text in texts(8, seed)}
    assert drawn == {f"new {n}" for n in range(30)}


def test_sampling_again_touches_nothing(recorded, tmp_path: Path) -> None:
    first = sample_replay(recorded, 4, 1, tmp_path / "r")
    before = [path.stat().st_mtime_ns for path in first.files]
    assert sample_replay(recorded, 4, 1, tmp_path / "r") == first
    assert [path.stat().st_mtime_ns for path in first.files] == before
    first.files[0].write_text("torn", encoding="utf-8")
    sample_replay(recorded, 4, 1, tmp_path / "r")
    assert len(lines(first.files[0])) == 4


def test_data_that_is_gone_changed_or_damaged_is_told_and_the_rest_sampled(
    recorded, tmp_path: Path
) -> None:
    fingerprints = {path: data_fingerprint(path) for paths in recorded.values() for path in paths}
    with open(recorded["G009"][0], "a", encoding="utf-8") as file:
        file.write('{"text": "slipped in"}\n')
    damaged = write_jsonl(tmp_path / "eight.jsonl", [{"text": "good"}])
    damaged.write_text(damaged.read_text(encoding="utf-8") + '{"te', encoding="utf-8")
    family = {
        "G007": [tmp_path / "gone.jsonl", tmp_path / "gone too"],
        "G008": [damaged],
        **recorded,
        "G011": [],
    }
    result = sample_replay(family, 9, 1, tmp_path / "r", fingerprints=fingerprints)
    assert result.gone == ["G007", "G008"]
    assert [path.name for path in result.files] == ["G009.jsonl", "G010.jsonl"]
    assert lines(result.files[0]) == [{"text": "plain\u2028text"}]
    said = "\n".join(result.notes())
    assert f"replay: G007: {tmp_path / 'gone.jsonl'}: is gone" in said
    assert f"replay: G007: {tmp_path / 'gone too'}: is gone" in said
    assert f"replay: G008: cannot be used: {damaged}:2: not JSON" in said
    assert "nine.jsonl: has changed since it was recorded" in said
    assert "replay: G011: nothing to sample from, left out" in said
    assert "replay: G010: 9 of 30 documents" in said
    # A file that is gone does not change what the others give.
    alone = sample_replay({"G010": recorded["G010"]}, 9, 1, tmp_path / "alone")
    assert alone.files[0].read_bytes() == result.files[1].read_bytes()
    assert json.dumps(result.describe())


def test_nothing_left_of_any_generation_is_an_error_that_lists_all(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(InputError, match="nothing is left to replay") as caught:
        sample_replay({"A": [tmp_path / "no"], "B": [empty]}, 3, 0, tmp_path / "r")
    assert f"A: {tmp_path / 'no'}: is gone" in str(caught.value)
    assert f"B: {empty}: only empty documents in it" in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "r").exists()
    assert sample_replay({"A": []}, 3, 0, tmp_path / "r").files == []  # none was ever recorded


@pytest.mark.parametrize(
    ("recorded_", "size", "fraction", "message"),
    [
        ({}, 0, 0.1, "replay size: expected a number of documents from 1, found 0"),
        ({}, 1, 1.0, r"replay fraction: expected a number in \(0, 1\), found 1.0"),
        ({}, 1, float("nan"), "replay fraction: "),
        ({"../G1": []}, 1, 0.1, "expected a name that a file can have"),
        ({"": []}, 1, 0.1, "expected a name that a file can have"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    tmp_path: Path, recorded_, size, fraction, message
) -> None:
    with pytest.raises(UsageError, match=message):
        sample_replay(recorded_, size, 0, tmp_path / "r", fraction=fraction)


@pytest.mark.parametrize(
    ("size", "generations", "main", "fraction", "expected"),
    [
        (100, 2, None, 0.1, 100),
        (100, 2, 10_000, 0.1, 100),  # less than a tenth: no document is taken twice
        (100, 2, 900, 0.1, 50),  # 100 of 1000
        (100, 2, 90, 0.1, 5),
        (100, 3, 1, 0.1, 1),  # at least one: no generation is dropped unsaid
        (100, 0, 90, 0.1, 100),
        (10, 1, 10, 0.5, 10),
    ],
)
def test_quota_is_the_smaller_of_size_and_fraction(
    size, generations, main, fraction, expected
) -> None:
    assert replay_quota(size, generations, main, fraction) == expected


def test_fraction_limits_a_large_sample(recorded, tmp_path: Path) -> None:
    result = sample_replay(recorded, 20, 1, tmp_path / "r", main_documents=90)
    assert result.quota == 5
    assert [each.sampled for each in result.generations] == [5, 5]
    assert main_documents_for(result.sampled) == 90
    assert count_documents([recorded["G009"][0], recorded["G010"][0]]) == 51
    smaller = sample_replay({"G010": recorded["G010"]}, 5, 1, tmp_path / "s")
    assert smaller.files[0].read_bytes() == result.files[1].read_bytes()


def test_a_disk_that_fails_leaves_no_part_of_a_sample(recorded, tmp_path: Path) -> None:
    whole = sample_replay(recorded, 4, 1, tmp_path / "whole").files[0].read_bytes()
    for stop_at in range(100):
        passed = []

        def fail(name: str, path: Path, passed: list = passed, stop_at: int = stop_at) -> None:
            passed.append(name)
            if len(passed) == stop_at + 1:
                raise OSError(28, "disk full", str(path))

        out = tmp_path / f"r{stop_at}"
        with failpoints(fail):
            try:
                sample_replay(recorded, 4, 1, out)
            except OSError:
                assert not (out / "G009.jsonl").exists() or (
                    (out / "G009.jsonl").read_bytes() == whole
                )
            else:
                break
        assert sample_replay(recorded, 4, 1, out).files[0].read_bytes() == whole
    assert stop_at > 6, "failpoints of two folders and two files were expected"


# --- gold ----------------------------------------------------------------------------------------


def gold_of(tmp_path: Path, files: list[Path]) -> dict[str | None, bool]:
    """Of each text: whether a build takes it for gold."""
    from tiny import make_tokenizer

    from logitcache.packing import pack
    from logitcache.tokenise import Encoder

    documents = list(read_documents(files))
    rows = pack(Encoder(make_tokenizer(tmp_path / "tokenizer")).encode(documents), 32)
    return {
        document.text: bool(rows.gold_mask[rows.documents == number].all())
        for number, document in enumerate(documents, start=1)
        if (rows.documents == number).any()
    }


@pytest.fixture
def data(tmp_path: Path):
    """Write texts with flags (None: no flag) to a file."""

    def data(name: str, **flags: bool | None) -> Path:
        records = [
            {"text": f"the {key} king"} | ({} if flag is None else {"gold": flag})
            for key, flag in flags.items()
        ]
        return write_jsonl(tmp_path / name, records)

    return data


def test_gold_files_are_gold_and_all_others_are_not(data, tmp_path: Path) -> None:
    train, gold, replay = data("t.jsonl", a=None, b=None), data("g.jsonl", c=None), None
    replay = data("r.jsonl", d=None)
    marked = mark_gold([train], [gold], [replay], tmp_path / "out")
    found = gold_of(tmp_path, marked.files)
    assert found == {"the a king": False, "the b king": False, "the c king": True} | {
        "the d king": False
    }
    assert marked.train == [train]  # silence means the same beside a flag: nothing is copied
    assert marked.gold == [tmp_path / "out" / "g.jsonl"]
    assert marked.gold_documents == 1


def test_a_document_that_says_itself_whether_it_is_gold_is_believed(data, tmp_path: Path) -> None:
    train, gold = data("t.jsonl", a=True, b=None), data("g.jsonl", c=False, d=None, e=True)
    marked = mark_gold([train], [gold], [], tmp_path / "out")
    found = gold_of(tmp_path, marked.files)
    assert [found[f"the {key} king"] for key in "abcde"] == [True, False, False, True, True]
    assert marked.gold_documents == 3


def test_without_gold_files_a_corpus_without_flags_stays_gold(data, tmp_path: Path) -> None:
    train, replay = data("t.jsonl", a=None), data("r.jsonl", b=None)
    marked = mark_gold([train], [], [replay], tmp_path / "out")
    assert marked.files == [train, replay]
    assert marked.gold_documents is None
    # Replayed documents with flags would make it "not gold".
    replay = data("r.jsonl", b=True, c=False)
    assert gold_of(tmp_path, [train, replay])["the a king"] is False
    marked = mark_gold([train], [], [replay], tmp_path / "out")
    found = gold_of(tmp_path, marked.files)
    assert [found[f"the {key} king"] for key in "abc"] == [True, True, False]
    assert marked.replay == [replay]


def test_files_with_flags_keep_their_stems_and_never_overwrite_data(data, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    gold = [data("g.jsonl", a=None), data("x/g.jsonl", b=None)]
    marked = mark_gold([data("t.jsonl", c=None)], gold, [], tmp_path / "out")
    assert [path.name for path in marked.gold] == ["g.jsonl", "g-2.jsonl"]
    with pytest.raises(UsageError, match=r"holds g\.jsonl, one of the data files"):
        mark_gold([], gold[:1], [], tmp_path)
    assert "gold" not in lines(gold[0])[0]
    with pytest.raises(InputError, match="not JSON"):
        mark_gold([], [data("x.jsonl", a=None), _broken(tmp_path)], [], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _broken(folder: Path) -> Path:
    (folder / "broken.jsonl").write_text("{", encoding="utf-8")
    return folder / "broken.jsonl"


def test_replayed_and_gold_data_go_into_one_store_by_source(
    recorded, data, tmp_path: Path, teacher1: Path, teacher2: Path
) -> None:
    train = write_jsonl(tmp_path / "main.jsonl", [{"text": s} for s in sentences(18, seed=1)])
    replay = sample_replay(
        recorded, 100, 0, tmp_path / "replay", main_documents=count_documents([train])
    )
    marked = mark_gold([train], [data("gold.jsonl", a=None)], replay.files, tmp_path / "flags")
    build(
        teacher1=teacher1,
        teacher2=teacher2,
        data=marked.files,
        out=tmp_path / "store",
        seq_len=48,
        device="cpu",
    )
    reader = open_store(tmp_path / "store")
    assert reader.source_names == ("main", "gold", "G009", "G010")
    assert [s["documents"] for s in reader.manifest["sources"]] == [18, 1, 1, 1]
    rows = reader[:].rows
    assert set(reader.source_numbers(rows)[rows.gold_mask].tolist()) == {1}
