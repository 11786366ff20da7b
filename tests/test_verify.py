"""verify finds whatever was changed, repair makes it again, hostile stores are refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numcodecs import zstd
from tiny import sentences, write_jsonl

import logitcache.layout
from logitcache import build, open_store
from logitcache.cli import cli
from logitcache.errors import StoreError, UsageError
from logitcache.files import to_json
from logitcache.repair import repair, repair_settings
from logitcache.shards import ArraySpec, ShardFile, frame_content_size, pack_shard
from logitcache.store import digest, load_store
from logitcache.verify import verify_store

SMALL_SHARDS = 48 * 2  # positions: two rows of 48 tokens


def files_of(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("*") if p.is_file() and p.suffix != ".lock")


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in files_of(store)}


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def small(tmp_path_factory, teacher1, teacher2):
    """A store of two teachers in shards of two rows, and its run record beside it."""
    folder = tmp_path_factory.mktemp("small")
    data = write_jsonl(folder / "data.jsonl", [{"text": t} for t in sentences(15, seed=5)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logitcache.layout, "SHARD_POSITIONS", SMALL_SHARDS)
        build(teacher1=teacher1, teacher2=teacher2, data=(data,), seq_len=48, out=folder / "store")
    assert 4 <= len(load_store(folder / "store").ranges) <= 6
    return folder / "store"


@pytest.fixture
def copied(tmp_path, small) -> Path:
    shutil.copy(small.with_name("store.run.json"), tmp_path / "store.run.json")
    return Path(shutil.copytree(small, tmp_path / "store"))


def read_all(store: Path) -> None:
    reader = open_store(store)
    assert reader.tokenizer_content
    reader[:]


def findings(store: Path):
    return verify_store(store)[1]


# --- verify --------------------------------------------------------------------------------------


def test_a_whole_store_is_whole(small):
    assert findings(small) == []
    result = run("verify", small, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["whole"] is True


def test_every_flipped_bit_is_found_and_no_read_returns_other_values(copied):
    """Bits at random over all files, each file at its beginning and its end too; reading either
    fails or returns what was written."""
    random = np.random.default_rng(0)
    expected = open_store(copied)[:]
    flips = 0
    for path in files_of(copied):
        content = bytearray(path.read_bytes())
        most = 8 * len(content)
        for bit in {0, most - 1, *random.integers(0, most, 2).tolist()}:
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            assert findings(copied), f"{path}: bit {bit}"
            try:
                found = open_store(copied)[:]
            except StoreError:
                pass
            else:
                for one, other in zip(found.teachers, expected.teachers, strict=True):
                    np.testing.assert_array_equal(one.logp_PK, other.logp_PK)
                    np.testing.assert_array_equal(one.ids_PK, other.ids_PK)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            flips += 1
    assert flips > 250
    assert findings(copied) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_every_truncated_file_is_found(copied, share):
    for path in files_of(copied):
        content = path.read_bytes()
        path.write_bytes(content[: min(int(len(content) * share), len(content) - 1)])
        assert findings(copied), path
        with pytest.raises(StoreError):
            read_all(copied)
        path.write_bytes(content)


def test_every_deleted_file_and_folder_is_found(copied, tmp_path):
    folders = [p for p in copied.rglob("*") if p.is_dir()]
    for number, path in enumerate([*files_of(copied), *folders]):
        away = tmp_path / f"away{number}"
        path.rename(away)
        assert findings(copied), path
        with pytest.raises(StoreError):
            read_all(copied)
        away.rename(path)
    assert findings(copied) == []


def test_swapped_shards_copies_and_records_of_another_store_are_found(copied):
    one, two = copied / "teacher1/certain/c.0.0.0", copied / "teacher1/certain/c.1.0.0"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert {f.shard for f in findings(copied)} == {0, 1}
    with pytest.raises(StoreError):
        open_store(copied)[0]
    one.write_bytes(first)
    two.write_bytes(second)
    record = copied / "commits" / "teacher1-000001.json"
    text = record.read_bytes()
    record.write_bytes((copied / "commits" / "teacher1-000000.json").read_bytes())
    assert findings(copied)[0].shard == 1
    record.write_bytes(text)
    # Teacher 2's shard, with its record, in the place of teacher 1's.
    for path in (copied / "teacher2").rglob("c.0.*"):
        shutil.copy(path, copied / "teacher1" / path.parent.name / path.name)
    shutil.copy(copied / "commits/teacher2-000000.json", copied / "commits/teacher1-000000.json")
    assert {(f.part, f.shard) for f in findings(copied)} == {("teacher1", 0)}
    with pytest.raises(StoreError):
        open_store(copied)[0]


def test_files_that_no_store_has_are_found(copied):
    (copied / "teacher1" / "certain" / "c.99.0.0").write_bytes(b"x")
    (copied / "more").write_bytes(b"x")
    assert {f.file for f in findings(copied)} == {"teacher1/certain/c.99.0.0", "more"}


def test_verify_names_rows_and_documents_and_exits_with_4(copied):
    path = copied / "teacher2" / "sampled" / "c.1.0.0"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    result = run("verify", copied, "--json")
    assert result.exit_code == 4
    (found,) = json.loads(result.stdout)["findings"]
    assert (found["part"], found["shard"], found["rows"]) == ("teacher2", 1, [2, 3])
    documents = open_store(copied).read_rows(np.arange(2, 4)).documents
    assert found["documents"] == sorted(set(documents.ravel().tolist()) - {0})
    text = run("verify", copied)
    assert text.exit_code == 4
    assert "rows 2 to 3" in text.stdout
    assert f"next: logitcache repair {copied}" in text.stdout


def test_values_that_break_an_invariant_are_found_though_all_checksums_fit(copied):
    store = load_store(copied)
    spec = store.specs["teacher1"]["count"]
    name = spec.shard_name(0)
    record_path = store.commit_path("teacher1", 0)
    record = json.loads(record_path.read_text())
    rows = []
    opened = store.open_shard("teacher1", 0)["count"]
    for row in range(2):
        planes = [plane.copy() for plane in opened.read(row)]
        planes[0][48:] = 0  # no sampled entries, though they are there
        rows.append(planes)
    data = pack_shard(spec, rows)
    (copied / name).write_bytes(data)
    import hashlib

    record["files"][name] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "index_crc32c": int.from_bytes(data[-4:], "little"),
    }
    record["digest"] = digest(record)
    record_path.write_text(to_json(record))
    (found,) = findings(copied)
    assert "entries: expected" in found.problem


# --- repair --------------------------------------------------------------------------------------


def test_repair_of_a_whole_store_changes_nothing(copied):
    before = {path: path.stat().st_mtime_ns for path in files_of(copied)}
    result = run("repair", copied)
    assert result.exit_code == 0, result.output
    assert "nothing was changed" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in files_of(copied)} == before


def test_repair_makes_only_what_is_damaged_and_to_the_same_bytes(copied, monkeypatch):
    monkeypatch.setattr(logitcache.layout, "SHARD_POSITIONS", SMALL_SHARDS)
    before = contents(copied)
    times = {path: path.stat().st_mtime_ns for path in files_of(copied)}
    (copied / "teacher1/certain/c.1.0.0").write_bytes(b"")
    (copied / "rows/tokens/c.0.0").unlink()
    (copied / "commits/teacher2-000002.json").write_text("{")
    (copied / "teacher1/certain/c.77.0.0").write_bytes(b"stray")
    result = run("repair", copied, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["repaired"]) == 4
    assert contents(copied) == before
    untouched = [
        path
        for path in files_of(copied)
        if path.parent.parent.name.startswith("teacher") and path.name.startswith("c.3.")
    ]
    assert untouched
    assert all(path.stat().st_mtime_ns == times[path] for path in untouched)


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "tokenizer.json",
        "rows/tokens/zarr.json",
        "teacher1/zarr.json",
        "teacher2/order/zarr.json",
        "commits/store.json",
        "commits/teacher2.json",
    ],
)
def test_repair_writes_damaged_metadata_anew(copied, monkeypatch, name):
    monkeypatch.setattr(logitcache.layout, "SHARD_POSITIONS", SMALL_SHARDS)
    before = contents(copied)
    (copied / name).write_text("{")
    (copied / "teacher1/fields/c.0.0.0").write_bytes(b"")
    repair(repair_settings(copied, {}))
    assert contents(copied) == before


def test_repair_refuses_other_data_and_needs_to_know_what_was_built(copied, tmp_path):
    (copied / "teacher1/certain/c.1.0.0").write_bytes(b"")
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the king of france was there and there and there"}\n')
    with pytest.raises(UsageError, match="holds another build"):
        repair(repair_settings(copied, {"data": (other,)}))
    copied.with_name("store.run.json").unlink()
    with pytest.raises(UsageError, match=r"store\.run\.json: no such run record"):
        repair_settings(copied, {})


# --- hostile stores ------------------------------------------------------------------------------


def test_links_within_a_store_are_not_followed(copied, tmp_path):
    for name in ("teacher1/certain/c.0.0.0", "commits/store.json", "zarr.json", "teacher2"):
        path, away = copied / name, tmp_path / "elsewhere"
        path.rename(away)
        path.symlink_to(away)
        with pytest.raises(StoreError, match=r"link|leaves the store|cannot be"):
            open_store(copied)[:]
        assert findings(copied)
        path.unlink()
        away.rename(path)
    os.mkfifo(tmp_path / "pipe")
    path = copied / "teacher1/fields/c.0.0.0"
    path.unlink()
    shutil.move(tmp_path / "pipe", path)
    with pytest.raises(StoreError):
        open_store(copied)[:]
    assert findings(copied)


def test_names_that_leave_the_store_are_refused(copied):
    record_path = copied / "commits" / "teacher1-000000.json"
    record = json.loads(record_path.read_text())
    for name in ("../outside", "/etc/passwd", "teacher1\\..\\x", "teacher1/\0"):
        record["files"] = {name: {"bytes": 1, "sha256": "0" * 64, "index_crc32c": 0}}
        record["digest"] = digest(record)
        record_path.write_text(to_json(record))
        with pytest.raises(StoreError):
            open_store(copied)
        assert findings(copied)


def manifest_with(store: Path, **changes: object) -> None:
    path = store / "zarr.json"
    root = json.loads(path.read_text())
    root["attributes"]["logitcache"].update(changes)
    path.write_text(json.dumps(root))


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 10**12},
        {"rows": -1},
        {"rows": 1.5},
        {"rows": True},
        {"seq_len": 10**12},
        {"vocab_size": 2**40},
        {"shard_rows": 10**12},
        {"shard_rows": 0},
        {"temperatures": []},
        {"temperatures": [1.0] * 10**5},
        {"temperatures": ["1"]},
        {"tokenizer_sha256": "../x"},
        {"format": 2},
        {"format": "1"},
    ],
)
def test_impossible_manifests_are_refused_before_anything_is_allocated(copied, changes):
    manifest_with(copied, **changes)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError):
            open_store(copied)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert findings(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.update(shape=[10**12, 3, 10**12]),
        lambda z: z["chunk_grid"]["configuration"].update(chunk_shape=[10**12]),
        lambda z: z["codecs"].append({"name": "numcodecs.pickle"}),
        lambda z: z.update(zarr_format=2),
        lambda z: z.update(fill_value=1),
        lambda z: z.update(data_type="float64"),
    ],
)
def test_array_metadata_that_differ_are_refused_naming_the_first_difference(copied, change):
    path = copied / "teacher1" / "certain" / "zarr.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))
    with pytest.raises(StoreError, match=r"certain/zarr\.json: \w+.*expected .* found"):
        open_store(copied)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        "NaN",
        '{"attributes": {"logitcache": {"format": NaN}}}',
        "",
    ],
)
def test_strange_json_is_refused(copied, text):
    (copied / "zarr.json").write_text(text)
    with pytest.raises(StoreError):
        open_store(copied)


def test_huge_json_is_refused_unread(copied):
    with open(copied / "zarr.json", "ab") as file:
        file.truncate(1 << 34)  # a sparse file of 16 GB
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match="larger than"):
            open_store(copied)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_a_zstd_bomb_is_refused_before_it_is_unpacked(tmp_path):
    import google_crc32c

    spec = ArraySpec("a", (1, 1, 2048), (1, 1, 2048), 1)
    bomb = zstd.compress(bytes(1 << 30), 1)
    assert len(bomb) < 200_000
    packed = bomb[:5000] + google_crc32c.value(bomb[:5000]).to_bytes(4, "little")
    whole = bomb + google_crc32c.value(bomb).to_bytes(4, "little")
    for data in (packed, whole):
        index = np.array([0, len(data)], "<u8").tobytes()
        content = data + index + google_crc32c.value(index).to_bytes(4, "little")
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / spec.shard_name(0)).write_bytes(content)
        with pytest.raises(StoreError, match=r"does not unpack to|points outside"):
            ShardFile(tmp_path, spec, 0, len(content), int.from_bytes(content[-4:], "little")).read(
                0, 2048
            )


def test_an_index_that_points_outside_its_file_is_refused(tmp_path):
    import google_crc32c

    spec = ArraySpec("a", (1, 1, 2048), (1, 1, 2048), 1)
    (tmp_path / "a").mkdir()
    for entry in ([0, 2**63], [2**63, 100], [2**64 - 50, 100], [1, 8]):
        index = np.array(entry, np.uint64).astype("<u8").tobytes()
        content = bytes(8) + index + google_crc32c.value(index).to_bytes(4, "little")
        (tmp_path / spec.shard_name(0)).write_bytes(content)
        with pytest.raises(StoreError, match="points outside"):
            ShardFile(tmp_path, spec, 0, len(content), int.from_bytes(content[-4:], "little"))


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65535, 65536, 70000, 1 << 20])
def test_a_frame_says_how_much_it_holds(size):
    assert frame_content_size(zstd.compress(bytes(size), 1)[:18]) == size
    assert frame_content_size(b"") is None
    assert frame_content_size(bytes(18)) is None


# --- other readers -------------------------------------------------------------------------------


def test_any_zarr_reader_opens_the_arrays(small):
    group = zarr.open_group(str(small), mode="r", zarr_format=3, use_consolidated=False)
    store, reader = load_store(small), open_store(small)
    rows = reader.read_rows(np.arange(len(reader)))
    for name in ("tokens", "segments", "loss_mask", "gold_mask", "documents"):
        np.testing.assert_array_equal(group["rows"][name][:], getattr(rows, name))
    for part in store.teachers:
        opened = store.open_shard(part, 1)
        for array, spec in store.specs[part].items():
            if array == "order":
                np.testing.assert_array_equal(group[part][array][1], opened[array].read(0, 300))
                continue
            for row in range(2):
                direct = opened[array].read(row, spec.shape[-1])
                np.testing.assert_array_equal(group[part][array][2 + row], direct)


def test_batches_are_the_same_for_any_number_of_workers(small):
    reader = open_store(small)
    order = np.random.default_rng(0).permutation(len(reader))
    rows = [order[start : start + 3] for start in range(0, len(order), 3)]
    expected = list(reader.batches(rows, workers=0))
    for workers, ahead in ((1, 0), (2, 3), (5, 1)):
        found = list(reader.batches(rows, workers=workers, ahead=ahead))
        for one, other in zip(found, expected, strict=True):
            assert one.labels.tobytes() == other.labels.tobytes()
            for a, b in zip(one.teachers, other.teachers, strict=True):
                for name in ("ids_PK", "logp_PK", "inclusion_PK", "tail_PT", "gold_logp_P"):
                    assert getattr(a, name).tobytes() == getattr(b, name).tobytes()


def test_batches_read_no_further_ahead_than_they_may_and_stop_with_their_consumer(small):
    reader = open_store(small)
    asked = []

    def rows():
        for row in range(1000):
            asked.append(row)
            yield [row % len(reader)]

    batches = reader.batches(rows(), workers=2, ahead=3)
    next(batches)
    next(batches)
    assert len(asked) <= 2 + 5
    batches.close()
    assert len(asked) <= 2 + 5


def test_reading_needs_few_open_files_and_little_memory(small):
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
from logitcache import open_store
reader = open_store({str(small)!r})
for _ in range(3):
    for row in range(len(reader)):
        reader[row]
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 << 20  # in KB
