"""Faults of the machine: what a build and a reader say of them, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import logitcache.files
import logitcache.layout
from logitcache import build, open_store
from logitcache.cli import cli
from logitcache.errors import ResourceError, StoreError
from logitcache.verify import verify_store

NOBODY = 65534


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def copied(tmp_path, built) -> Path:
    return Path(shutil.copytree(built.path, tmp_path / "store"))


@pytest.fixture
def as_nobody(teacher1, corpus):
    """Run a build without the rights of root, in a folder that everybody may enter."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory(prefix="logitcache-nobody-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(teacher1, folder / "teacher1")
        shutil.copy(corpus, folder / "corpus.jsonl")
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)

        def command(out: Path) -> Result:
            os.setresuid(NOBODY, NOBODY, 0)
            try:
                return run(
                    *("build", "--teacher1", folder / "teacher1", "--seq-len", 48),
                    *("--data", folder / "corpus.jsonl", "--out", out),
                )
            finally:
                os.setresuid(0, 0, 0)

        yield folder, command


# --- permission ----------------------------------------------------------------------------------


def test_a_folder_that_may_not_be_written_exits_with_6_before_a_model_is_loaded(
    as_nobody, monkeypatch
):
    folder, command = as_nobody
    monkeypatch.setattr("logitcache.causal_lm.load_causal_lm", None)
    for out in (folder / "store", folder / "theirs"):
        if out.name == "theirs":
            out.mkdir(mode=0o755)
        result = command(out)
        assert result.exit_code == 6, result.output
        assert "no permission to write there" in result.stderr
        assert str(folder) in result.stderr


def test_a_lock_of_somebody_else_exits_with_6_and_names_it(as_nobody):
    folder, command = as_nobody
    out = folder / "store"
    out.mkdir()
    out.chmod(0o777)
    (out / "build.lock").touch(mode=0o600)
    result = command(out)
    assert result.exit_code == 6, result.output
    assert f"no permission: {out}/build.lock" in result.stderr


def test_a_store_that_may_not_be_read_is_no_damage(as_nobody, built):
    folder, _ = as_nobody
    shutil.copytree(built.path, folder / "store")
    (folder / "store" / "teacher1" / "fields" / "c.0.0.0").chmod(0o600)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        assert "Permission denied" in run("verify", folder / "store").stderr
        with pytest.raises(ResourceError, match="Permission denied"):
            open_store(folder / "store")[:]
    finally:
        os.setresuid(0, 0, 0)


# --- a failing disk ------------------------------------------------------------------------------


def failing_pread(monkeypatch, failures: int, code: int = errno.EIO) -> list[int]:
    """os.pread fails a number of times, and then gives a byte at first, as a network mount may."""
    calls: list[int] = []
    pread = os.pread

    def read(descriptor: int, length: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) <= failures:
            raise OSError(code, os.strerror(code))
        return pread(descriptor, min(length, 1 + len(calls) ** 2), offset)

    monkeypatch.setattr(logitcache.files, "_READ_PAUSE_S", 0.001)
    monkeypatch.setattr(os, "pread", read)
    return calls


def test_reads_that_fail_twice_or_give_less_than_asked_for_are_made_good(built, monkeypatch):
    expected = open_store(built.path)[:]
    failing_pread(monkeypatch, failures=2)
    found = open_store(built.path)[:]
    for one, other in zip(found.teachers, expected.teachers, strict=True):
        assert one.logp_PK.tobytes() == other.logp_PK.tobytes()


def test_a_disk_that_cannot_be_read_exits_with_6_after_three_tries_and_never_gives_zeros(
    built, monkeypatch
):
    reader = open_store(built.path)
    calls = failing_pread(monkeypatch, failures=10**9)
    with pytest.raises(ResourceError, match=r"tried 3 times: .*\(errno 5\)"):
        reader[0]
    assert len(calls) == 3
    for command in ("info", "verify"):
        result = run(command, built.path)
        assert result.exit_code == 6, result.output
        assert "tried 3 times" in result.stderr


def test_too_many_open_files_exits_with_6_and_names_the_limit(built):
    reader = open_store(built.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        with pytest.raises(ResourceError, match=r"Too many open files.*may open 64"):
            reader[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
    reader[0]


# Runs verify where the process may take so many bytes more than it has after its imports.
_LITTLE_MEMORY = """
import resource, sys
import logitcache.info, logitcache.verify
from logitcache.cli import main
room = int(sys.argv.pop(1))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + room
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""


@pytest.mark.parametrize(("room", "code"), [(0, 6), (64 << 20, 0)])
def test_memory_is_bounded_and_too_little_of_it_exits_with_6(built, room, code):
    words = [sys.executable, "-c", _LITTLE_MEMORY, str(room), "verify", str(built.path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert ("out of memory" in done.stderr) == (code == 6)


def test_a_full_disk_says_how_many_shards_are_safe(tmp_path, built, monkeypatch):
    monkeypatch.setattr(logitcache.layout, "SHARD_POSITIONS", 48 * 4)
    write = logitcache.files._write

    def full(path: Path, content: bytes) -> None:
        if path.name == ".c.2.0.0.tmp" and path.parent.parent.name == "teacher1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(logitcache.files, "_write", full)
    with pytest.raises(ResourceError, match=r"disk full: .*store: 8 of \d+ shards are safe"):
        build(out=tmp_path / "store", **built.settings)


# --- unfinished and strange stores ---------------------------------------------------------------


def test_a_torn_last_record_is_dropped_and_its_shard_made_again(copied, built):
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    record = copied / "commits" / "teacher2-000000.json"
    whole = record.read_bytes()
    for torn in (whole[:-20], whole + b"garbage", whole[:10], b""):
        record.write_bytes(torn)
        with pytest.raises(StoreError, match="incomplete: teacher2"):
            open_store(copied)
        assert verify_store(copied)[1]
        build(out=copied, **built.settings)
        assert {p: p.read_bytes() for p in before} == before


def test_a_reader_during_a_build_gets_incomplete_until_the_last_record(
    tmp_path, built, monkeypatch
):
    monkeypatch.setattr(logitcache.layout, "SHARD_POSITIONS", 48 * 4)
    out, said, ended = tmp_path / "store", set(), threading.Event()

    def read() -> None:
        while not ended.is_set():
            try:
                open_store(out)
                said.add("complete")
            except StoreError as error:
                said.add("incomplete" if "incomplete" in str(error) else str(error)[:99])

    def report(teacher: str, done: int, total: int, written: int, shard: int) -> None:
        if shard >= 0 and not (teacher == "teacher2" and done == total):
            assert "complete" not in said

    thread = threading.Thread(target=read)
    thread.start()
    try:
        build(out=out, report=report, **built.settings)
    finally:
        ended.set()
        thread.join()
    assert "incomplete" in said
    open_store(out)


def test_fresh_builds_over_a_store_whose_manifest_is_damaged(copied, built):
    (copied / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        build(out=copied, **built.settings)
    build(out=copied, fresh=True, **built.settings)
    assert json.loads(run("info", copied, "--json").stdout)["complete"] is True


def test_a_build_whose_run_record_was_lost_writes_it_again(copied, built):
    build(out=copied, **built.settings)
    record = json.loads(copied.with_name("store.run.json").read_text())
    assert record["config"]["seq_len"] == 48
