"""The store: what is read back is what the teachers said of each document by itself."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_jsonl

import logitcache.layout
from logitcache import build, open_store
from logitcache.causal_lm import load_causal_lm
from logitcache.errors import Interrupted, LockedError, NonFiniteError, StoreError
from logitcache.fields import ENTROPY_STEPS
from logitcache.files import lock
from logitcache.store import load_store
from logitcache_kernels import capture, log_partition

BUNDLED = Path(__file__).parents[1] / "distill" / "bundled"
SMALL_SHARDS = 48 * 4  # positions: four rows of 48 tokens


def contents(store: Path) -> dict[str, bytes]:
    """All files of a store but its locks."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def exact_logits(folder: Path, rows) -> torch.Tensor:
    """Logits [N, L, V] of each document piece run by itself, unpacked; NaN at padding."""
    model = load_causal_lm(folder, torch.float32, torch.device("cpu"))
    num_rows, seq_len = rows.tokens.shape
    logits = torch.full((num_rows, seq_len, model.config.vocab_size), torch.nan)
    with torch.inference_mode():
        for row in range(num_rows):
            for segment in range(1, int(rows.segments[row].max()) + 1):
                where = np.flatnonzero(rows.segments[row] == segment)
                tokens = torch.from_numpy(rows.tokens[row, where].astype(np.int64))
                logits[row, where] = model(input_ids=tokens[None]).logits[0]
    return logits


@pytest.fixture(scope="module")
def batch(built):
    """All rows of the shared store."""
    return open_store(built.path)[:]


@pytest.fixture(scope="module")
def exact(built, batch):
    """Of each teacher the direct capture at the labelled positions, and their numbers P."""
    labels = torch.from_numpy(batch.labels.reshape(-1))
    at = (labels != -100).nonzero().flatten()
    captures = []
    for name in ("teacher1", "teacher2"):
        logits = exact_logits(built.settings[name], batch.rows).flatten(0, 1)[at]
        captures.append(
            (logits, capture(logits, labels_R=labels[at], position_ids_R=at, impl="eager"))
        )
    return at.numpy(), captures


# --- read what the teacher said ------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_supports_and_certain_sets_are_those_of_each_document_run_by_itself(batch, exact, number):
    at, captures = exact
    teacher, (_, kept) = batch.teachers[number], captures[number]
    assert len(at) > 400
    assert batch.rows.segments.max() > 1  # else there would be nothing to leak
    different = 0
    for p, r in zip(at, range(len(at)), strict=True):
        found = {
            (int(i), bool(q >= 1))
            for i, q in zip(teacher.ids_PK[p], teacher.inclusion_PK[p], strict=True)
            if i >= 0
        }
        expected = {
            (int(i), bool(q >= 1))
            for i, q in zip(kept.ids_RK[r], kept.inclusion_RK[r], strict=True)
            if i >= 0
        }
        different += found != expected
    # One draw may fall between two roundings of the same probability.
    assert different <= 1


@pytest.mark.parametrize("number", [0, 1])
def test_gold_logp_and_entropy_are_within_half_a_step_of_the_exact_ones(batch, exact, number):
    at, captures = exact
    teacher, (logits, _) = batch.teachers[number], captures[number]
    logp = logits.double().log_softmax(-1)
    gold = logp.gather(-1, torch.from_numpy(batch.labels.reshape(-1)[at])[:, None])[:, 0].numpy()
    entropy = -(logp.exp() * logp).sum(-1).numpy()
    root = np.abs(np.exp(teacher.gold_logp_P[at] / 2) - np.exp(gold / 2))
    nats = np.abs(teacher.gold_logp_P[at] - gold)
    assert ((root <= 0.5 / 128 + 5e-4) | (nats <= 1 / 16 + 1e-3)).all()
    assert np.abs(teacher.entropy_P[at] - entropy).max() <= 0.5 / ENTROPY_STEPS + 1e-4


@pytest.mark.parametrize("number", [0, 1])
def test_probabilities_are_within_their_quantisation_of_the_exact_ones(batch, exact, number):
    at, captures = exact
    teacher, (logits, kept) = batch.teachers[number], captures[number]
    logp = logits.double().log_softmax(-1).numpy()
    ids = teacher.ids_PK[at]
    expected = np.take_along_axis(logp, np.maximum(ids, 0), axis=1)
    certain = (ids >= 0) & (teacher.inclusion_PK[at] >= 1)
    sampled = (ids >= 0) & ~certain
    found = teacher.logp_PK[at]
    # Steps of 1/24 in sqrt(p), of 1 nat below p = 1/144, of 3 nats for sampled entries; then the
    # sum is set to 1, which moves sqrt(p) by some 3 % at most here.
    error = np.abs(np.exp(found / 2) - np.exp(expected / 2))
    near_top = expected > expected.max(1, keepdims=True) - 1  # kept below the top-1 entry
    bound = np.where(near_top, 1.08, 0.58) / 24 + 0.03 * np.exp(expected / 2)
    assert (error[certain] <= bound[certain]).all()
    assert np.abs(found - expected)[sampled].max() <= 1.5 + 0.07
    root = np.abs(np.exp(teacher.top1_logp_P[at] / 2) - np.exp(kept.top1_logp_R.numpy() / 2))
    assert root.max() <= 0.5 / 128 + 0.03
    np.testing.assert_allclose(found.max(1), teacher.top1_logp_P[at], atol=1e-6)
    assert (teacher.inclusion_PK[at][sampled] < 1).all()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_sampled_target_adds_up_to_the_exact_one_on_average(batch, exact, number, temperature):
    """Mass of p^T / inclusion over all positions against the tail's exact mass: no bias."""
    at, captures = exact
    teacher = batch.teachers[number]
    sparse = teacher.sparse_teacher(temperature)
    logits, _ = captures[number]
    p = (logits.double() / temperature).softmax(-1)
    certain = (sparse.ids_RK >= 0) & (sparse.inclusion_RK >= 1)
    target = (sparse.logp_RK / temperature - sparse.log_partition_R[:, None]).double().exp()
    target = target / sparse.inclusion_RK.clamp_min(1e-9)
    drawn = torch.where((sparse.ids_RK >= 0) & ~certain, target, 0.0).sum(1)[at]
    mask = torch.zeros_like(p, dtype=torch.bool)
    rows, columns = certain[at].nonzero(as_tuple=True)
    mask[rows, sparse.ids_RK[at][rows, columns].long()] = True
    difference = drawn - p.masked_fill(mask, 0.0).sum(1)
    assert abs(difference.mean()) <= 3 * difference.std() / len(at) ** 0.5


def test_certain_entries_and_tail_add_up_to_one(batch):
    labelled = batch.labels.reshape(-1) != -100
    for teacher in batch.teachers:
        certain = np.where(teacher.inclusion_PK >= 1, np.exp(teacher.logp_PK), 0).sum(1)
        tail = np.exp(teacher.tail_PT[:, teacher.temperatures.index(1.0)])
        np.testing.assert_allclose((certain + tail)[labelled], 1, atol=2e-6)


def test_positions_that_are_not_trained_on_hold_nothing(batch):
    unlabelled = batch.labels.reshape(-1) == -100
    assert unlabelled.any()
    for teacher in batch.teachers:
        assert (teacher.ids_PK[unlabelled] == -1).all()
        assert np.isneginf(teacher.logp_PK[unlabelled]).all()
        assert np.isneginf(teacher.tail_PT[unlabelled]).all()


def test_labels_and_gold_come_from_the_corpus(built, batch):
    tokens, labels = batch.rows.tokens.astype(np.int64), batch.labels
    at = labels != -100
    assert (labels[:, :-1][at[:, :-1]] == tokens[:, 1:][at[:, :-1]]).all()
    manifest = open_store(built.path).manifest
    assert at.sum() == manifest["valid_tokens"]
    gold_documents = 2  # of 27: each some 30 tokens
    assert 0 < batch.gold[at].sum() < 60 * gold_documents < at.sum() / 2


def test_rows_can_be_read_in_any_order_and_by_any_index(built, batch):
    reader = open_store(str(built.path))
    picked = reader[[3, 0, 3]]
    np.testing.assert_array_equal(picked.labels, batch.labels[[3, 0, 3]])
    seq_len = batch.labels.shape[1]
    one = pickle.loads(pickle.dumps(reader))[3]
    for teacher, whole in zip(one.teachers, batch.teachers, strict=True):
        span = slice(3 * seq_len, 4 * seq_len)
        np.testing.assert_array_equal(teacher.gold_logp_P, whole.gold_logp_P[span])
        width = teacher.ids_PK.shape[1]
        np.testing.assert_array_equal(teacher.ids_PK, whole.ids_PK[span, :width])
        assert (whole.ids_PK[span, width:] == -1).all()


# --- the log-partition ---------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_log_partition_through_the_store_at_any_temperature_on_the_bundled_model(
    tmp_path, estimator
):
    lines = (BUNDLED / "text" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": json.loads(lines[0])["text"][:2500]}])
    settings = {"teacher1": BUNDLED / "teacher1", "data": (data,), "seq_len": 128}
    build(out=tmp_path / "store", estimator=estimator, **settings)
    batch = open_store(tmp_path / "store")[:]
    at = np.flatnonzero(batch.labels.reshape(-1) != -100)
    logits = exact_logits(BUNDLED / "teacher1", batch.rows).flatten(0, 1)[at]
    logp = logits.double().log_softmax(-1)
    assert len(at) > 500
    for temperature in (1.0, 1.1, 1.25, 1.4, 1.5, 1.75, 2.0, 2.3, 2.7, 3.0, 3.5, 4.0):
        found = batch.teachers[0].sparse_teacher(temperature).log_partition_R[at]
        error = (found - (logp / temperature).logsumexp(-1)).abs()
        assert error.mean() <= 5e-3, temperature
        assert error.max() <= 3e-2, temperature


def test_log_partition_at_one_is_zero(batch):
    at = np.flatnonzero(batch.labels.reshape(-1) != -100)
    for teacher in batch.teachers:
        assert teacher.sparse_teacher(1.0).log_partition_R[at].abs().max() <= 2e-6


def test_max_temperature_is_the_least_that_all_teachers_allow(built, batch):
    assert open_store(built.path).max_temperature == 2.0
    with pytest.raises(ValueError, match="temperature"):
        log_partition(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 6), 4.5)


# --- padded vocabularies, what a teacher cannot say ----------------------------------------------


def test_padded_output_rows_are_never_kept_and_do_not_change_the_rest(tmp_path, built):
    """A teacher with 20 more output rows than tokens, all far above the rest."""
    from safetensors.torch import load_file, save_file

    padded = tmp_path / "padded"
    shutil.copytree(built.settings["teacher1"], padded)
    config = json.loads((padded / "config.json").read_text())
    config.update(vocab_size=320, tie_word_embeddings=False)
    (padded / "config.json").write_text(json.dumps(config))
    weights = load_file(padded / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat((embedding, torch.zeros(20, 64)))
    weights["lm_head.weight"] = torch.cat((embedding, 5.0 * embedding[:20]))
    save_file(weights, padded / "model.safetensors", metadata={"format": "pt"})
    build(
        out=tmp_path / "store",
        **{**built.settings, "teacher1": padded, "teacher2": None},
    )
    one, other = open_store(tmp_path / "store")[:], open_store(built.path)[:]
    assert one.teachers[0].ids_PK.max() < 300
    np.testing.assert_allclose(
        one.teachers[0].gold_logp_P, other.teachers[0].gold_logp_P, atol=1 / 8
    )


def test_positions_where_a_teacher_says_nan_are_skipped_on_request_and_lose_their_label(
    tmp_path, built
):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(built.settings["teacher1"], broken)
    weights = load_file(broken / "model.safetensors")
    tokens = open_store(built.path)[:].rows.tokens
    token = min(set(tokens.ravel().tolist()) - {0}, key=lambda t: (tokens == t).any(1).sum())
    # NaN in the embedding of one token, which spoils the rows it is in, not the head.
    config = json.loads((broken / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (broken / "config.json").write_text(json.dumps(config))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    settings = {**built.settings, "teacher2": broken}
    with pytest.raises(NonFiniteError, match=r"teacher2: NaN or infinity in the logits at row"):
        build(out=tmp_path / "fail", **settings)
    build(out=tmp_path / "store", on_nonfinite="skip", **settings)
    batch, whole = open_store(tmp_path / "store")[:], open_store(built.path)[:]
    lost = (batch.labels == -100) & (whole.labels != -100)
    assert 0 < lost.sum() < (whole.labels != -100).sum()
    assert lost[(whole.labels != -100) & (batch.rows.tokens == token)].all()
    record = load_store(tmp_path / "store").commit("teacher2", 0)
    assert record["skipped"] == lost.sum()
    at = (batch.labels != -100).reshape(-1)
    assert (batch.teachers[1].ids_PK[at] >= 0).any(1).all()
    assert np.isfinite(batch.teachers[1].gold_logp_P[at]).all()


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, built) -> Path:
    return Path(shutil.copytree(built.path, tmp_path / "store"))


def shard_files(store: Path) -> list[Path]:
    return sorted(
        path for path in store.rglob("*") if path.is_file() and path.name.startswith("c.")
    )


def test_every_shard_file_is_committed_with_its_hash(built):
    store = load_store(built.path)
    files = {
        name for part in ("rows", "teacher1", "teacher2") for name in store.commit(part, 0)["files"]
    }
    found = {path.relative_to(built.path).as_posix() for path in shard_files(built.path)}
    assert found == files


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "deleted"])
def test_a_damaged_shard_file_is_an_error_and_never_zeros(copied, damage):
    good = open_store(copied)
    everything = list(range(len(good)))
    expected = good[everything]
    for path in shard_files(copied):
        content = path.read_bytes()
        if damage == "flipped":
            at = len(content) // 3
            path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        elif damage == "truncated":
            path.write_bytes(content[:-5])
        elif damage == "emptied":
            path.write_bytes(b"")
        else:
            path.unlink()
        with pytest.raises(StoreError):
            open_store(copied)[everything]
        # A reader that has the file open notices, or reads what was there.
        again = None
        with contextlib.suppress(StoreError):
            again = good[everything]
        if again is not None:
            np.testing.assert_array_equal(again.rows.tokens, expected.rows.tokens)
            for one, other in zip(again.teachers, expected.teachers, strict=True):
                np.testing.assert_array_equal(one.logp_PK, other.logp_PK)
        path.write_bytes(content)
    open_store(copied)[everything]


def test_any_flipped_byte_of_a_shard_is_noticed_or_changes_nothing(copied):
    """Chunks and the shard's index carry checksums; every byte belongs to one of them."""
    path = copied / "teacher1" / "fields" / "c.0.0.0"
    content = path.read_bytes()
    expected = open_store(copied)[:].teachers[0].gold_logp_P
    for at in np.random.default_rng(0).integers(0, len(content), 25).tolist() + [len(content) - 1]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            found = open_store(copied)[:].teachers[0].gold_logp_P
        except StoreError:
            continue
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "commits/store.json",
        "commits/teacher1.json",
        "rows/tokens/zarr.json",
        "teacher1/zarr.json",
        "teacher1/certain/zarr.json",
        "commits/rows-000000.json",
        "commits/teacher2-000000.json",
    ],
)
@pytest.mark.parametrize("damage", ["deleted", "not json", "other json"])
def test_damaged_metadata_is_an_error(copied, name, damage):
    if damage == "deleted":
        (copied / name).unlink()
    else:
        (copied / name).write_text("{" if damage == "not json" else "[1]")
    with pytest.raises(StoreError):
        open_store(copied)[:]


def test_a_store_of_a_newer_format_is_refused(copied, built):
    metadata = json.loads((copied / "zarr.json").read_text())
    metadata["attributes"]["logitcache"]["format"] += 1
    (copied / "zarr.json").write_text(json.dumps(metadata))
    before = contents(copied)
    with pytest.raises(StoreError, match=r"format: written by format 2, this version reads 1"):
        open_store(copied)
    with pytest.raises(StoreError, match=r"format: written by format 2, this version reads 1"):
        build(out=copied, **built.settings)
    assert contents(copied) == before


def test_what_is_damaged_is_built_again_to_the_same_bytes(copied, built):
    before = contents(copied)
    (copied / "teacher1" / "certain" / "c.0.0.0").write_bytes(b"")
    (copied / "teacher1" / "certain" / ".c.0.0.0.tmp").write_bytes(b"left by a kill")
    (copied / "rows" / "tokens" / "c.0.0").unlink()
    (copied / "commits" / "teacher2-000000.json").write_text("{")
    build(out=copied, **built.settings)
    assert contents(copied) == before


# --- the same bytes, however it was built --------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, built):
    """The shared store's settings with shards of four rows, and the finished store's files."""
    path = tmp_path_factory.mktemp("sharded") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logitcache.layout, "SHARD_POSITIONS", SMALL_SHARDS)
        build(out=path, **built.settings)
    assert len(load_store(path).ranges) >= 4
    return contents(path)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(logitcache.layout, "SHARD_POSITIONS", SMALL_SHARDS)


def test_two_builds_are_byte_identical(tmp_path, built):
    build(out=tmp_path / "again", **built.settings)
    assert contents(tmp_path / "again") == contents(built.path)


def test_shards_hold_what_one_shard_holds(tmp_path, built, sharded, small_shards):
    build(out=tmp_path / "store", **built.settings)
    one, other = open_store(tmp_path / "store")[:], open_store(built.path)[:]
    for a, b in zip(one.teachers, other.teachers, strict=True):
        np.testing.assert_allclose(a.gold_logp_P, b.gold_logp_P, atol=1 / 8)
        assert ((a.ids_PK >= 0).sum(1) == (b.ids_PK >= 0).sum(1)).mean() > 0.99


def test_a_second_teacher_can_be_added_later(tmp_path, built, sharded, small_shards):
    build(out=tmp_path / "store", **{**built.settings, "teacher2": None})
    assert list(load_store(tmp_path / "store").teachers) == ["teacher1"]
    build(out=tmp_path / "store", **built.settings)
    assert contents(tmp_path / "store") == sharded


def test_workers_that_build_a_share_each_make_the_whole(tmp_path, built, sharded, small_shards):
    build(out=tmp_path / "store", shard="1/2", **built.settings)
    with pytest.raises(StoreError, match="incomplete: rows"):
        open_store(tmp_path / "store")
    build(out=tmp_path / "store", shard="0/2", **built.settings)
    assert contents(tmp_path / "store") == sharded


def test_ranks_of_torchrun_make_what_one_process_makes(tmp_path, built, sharded):
    script = tmp_path / "build.py"
    script.write_text(
        "import logitcache.layout\n"
        f"logitcache.layout.SHARD_POSITIONS = {SMALL_SHARDS}\n"
        "from logitcache.cli import main\n"
        "main()\n"
    )
    settings = built.settings
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(script), "build", "--teacher1", str(settings["teacher1"]), "--seq-len=48"]
        + ["--teacher2", str(settings["teacher2"]), "--data", str(settings["data"][0])]
        + ["--set=device=cpu", "--json", "--out", str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == len(open_store(tmp_path / "store"))
    assert contents(tmp_path / "store") == sharded


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path, built, sharded, small_shards, after
):
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 27 + after  # 27 documents are read before the first batch

    with pytest.raises(Interrupted, match=r"shards written this time"):
        build(out=tmp_path / "store", stop=stop, **built.settings)
    with pytest.raises(StoreError, match=r"incomplete|no teacher"):
        open_store(tmp_path / "store")
    build(out=tmp_path / "store", **built.settings)
    assert contents(tmp_path / "store") == sharded


def test_the_next_batch_runs_while_the_one_before_is_written(
    tmp_path, built, sharded, small_shards
):
    asked, next_batch = [], threading.Event()

    def stop() -> bool:
        asked.append(1)
        if len(asked) == 27 + 2:  # 27 documents, the first batch, the second
            next_batch.set()
        return False

    def report(teacher, done, total, written, shard):
        if shard == 0 and not next_batch.is_set():  # what belongs to the first batch is fetched
            assert next_batch.wait(60), "the second batch waits for the writing of the first"

    build(out=tmp_path / "store", stop=stop, report=report, **built.settings)
    assert next_batch.is_set()
    assert contents(tmp_path / "store") == sharded


def test_a_build_stopped_while_it_reads_writes_nothing(tmp_path, built):
    with pytest.raises(Interrupted, match="nothing was written"):
        build(out=tmp_path / "store", stop=lambda: True, **built.settings)
    assert not (tmp_path / "store").exists()


def test_a_build_that_was_killed_goes_on_to_the_same_bytes(tmp_path, built, sharded, small_shards):
    script = f"""
import os, signal, sys, logitcache.layout
from pathlib import Path
logitcache.layout.SHARD_POSITIONS = {SMALL_SHARDS}
from logitcache import build
def report(teacher, done, total, written, shard):
    if teacher == "teacher2" and shard == 1:
        os.kill(os.getpid(), signal.SIGKILL)
build(teacher1=Path(sys.argv[1]), teacher2=Path(sys.argv[2]), data=(Path(sys.argv[3]),),
      seq_len=48, out=Path(sys.argv[4]), report=report)
"""
    settings = built.settings
    arguments = [settings["teacher1"], settings["teacher2"], settings["data"][0]]
    killed = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments), str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert load_store(tmp_path / "store").missing("teacher2")
    build(out=tmp_path / "store", **settings)
    assert contents(tmp_path / "store") == sharded


def test_fresh_builds_anew_over_other_settings(tmp_path, built):
    build(out=tmp_path / "store", **{**built.settings, "seq_len": 32, "teacher2": None})
    build(out=tmp_path / "store", fresh=True, **built.settings)
    assert contents(tmp_path / "store") == contents(built.path)


# --- locks ---------------------------------------------------------------------------------------


def test_one_builder_at_a_time_or_workers_with_different_shares(tmp_path, built):
    out = tmp_path / "store"
    out.mkdir()
    one = {**built.settings, "teacher2": None, "out": out}
    with lock(out / "build.lock"):
        with pytest.raises(LockedError, match=r"locked by process \d+ on \S+ since"):
            build(**one)
        with pytest.raises(LockedError):
            build(shard="0/2", **one)
    with lock(out / "build.lock", shared=True), lock(out / "build-0-of-2.lock"):
        with pytest.raises(LockedError):
            build(**one)
        with pytest.raises(LockedError):
            build(shard="0/2", **one)
        build(shard="1/2", **one)
    build(**one)
    before = contents(out)
    with lock(out / "build.lock"), pytest.raises(LockedError):
        build(fresh=True, **one)
    assert contents(out) == before
