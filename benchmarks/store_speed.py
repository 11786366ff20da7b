"""How fast a store is written and read, on one core and on two, with the page cache warm."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np

from logitcache import open_store
from logitcache.layout import SHARD_POSITIONS
from logitcache.place import empty_store
from logitcache.reader import StoreReader
from logitcache.store import Store
from logitcache.support import decode_row
from logitcache.verify import verify_store
from logitcache.writing import create_store, create_teacher, pack_teacher, write_rows, write_teacher


def median_s(function: Callable[[], object], repeats: int = 30) -> float:
    """Median seconds of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def decoding(reader: StoreReader) -> dict[str, float]:
    """Tokens per second of one teacher on one core, and the parts that are not decoding."""
    name, length = next(iter(reader.store.teachers)), reader.manifest["seq_len"]
    attributes = reader.store.teachers[name]
    files, order = reader._shards.get(name, 0)
    planes = {array: files[array].read(0) for array in ("count", "fields")}
    kinds = [kind for kind in ("certain", "sampled") if kind in files]
    totals = planes["count"].reshape(len(kinds), -1).sum(1, dtype=np.int64)
    needed: dict[str, int | None] = {"count": None, "fields": None}
    for array, total in zip(kinds, totals, strict=True):
        planes[array] = files[array].read(0, int(total))
        needed[array] = int(total)
    grid = reader.manifest["temperatures"]
    transform = median_s(lambda: decode_row(planes, attributes, grid, order, 0))
    unpack = median_s(lambda: [files[array].read(0, n) for array, n in needed.items()])
    whole = median_s(lambda: reader.read_support(name, 0))
    stored = [reader.store.path / files[array].spec.shard_name(0) for array in needed]
    row_bytes = sum(path.stat().st_size for path in stored) / files["count"].spec.shard_rows
    block = bytes(int(row_bytes))
    checksum = median_s(lambda: google_crc32c.value(block))
    return {
        "decode_tokens_per_s": length / transform,
        "unpack_and_decode_tokens_per_s": length / (transform + unpack),
        "read_row_overhead_us": (whole - transform - unpack) * 1e6,
        "integrity_share": checksum / whole,
    }


def encoding(reader: StoreReader) -> float:
    """Tokens per second of one core from captured arrays to the bytes of a whole shard, of as many
    rows as one has, the reader's over and over."""
    name, length = next(iter(reader.store.teachers)), reader.manifest["seq_len"]
    supports = [reader.read_support(name, row) for row in range(min(len(reader), 8))]
    for support in supports:  # a decoded row's entries lie by rank; an encoder wants the top first
        _top_first(support)
    rows = SHARD_POSITIONS // length
    manifest = {**reader.manifest, "rows": rows, "shard_rows": rows}
    store = Store(reader.store.path, manifest, reader.store.teachers)
    shard = [supports[row % len(supports)] for row in range(rows)]
    seconds = median_s(lambda: pack_teacher(store, name, 0, shard), 5)
    return rows * length / seconds


def _top_first(support: object) -> None:
    certain = support.certain  # type: ignore[attr-defined]
    owner = np.repeat(np.arange(len(certain.count_P)), certain.count_P)
    order = np.lexsort((-certain.logp, owner))
    certain.ids[:] = certain.ids[order]
    certain.logp[:] = certain.logp[order]


def epoch(source: StoreReader, folder: Path, rows: int = 128, workers: int = 1) -> float:
    """Tokens per second of a shuffled epoch with two teachers, from a store of repeated rows, read
    by one thread while another takes the batches."""
    if folder.exists():
        shutil.rmtree(folder)
    length, number = source.manifest["seq_len"], len(source)
    rows = min(rows, max(number, 16))
    manifest = {**source.manifest, "rows": number, "tokens": number * length}
    manifest["shard_rows"] = number
    store = create_store(empty_store(folder, manifest), {})
    name = next(iter(source.store.teachers))
    for teacher in ("teacher1", "teacher2"):
        store = create_teacher(store, teacher, source.store.teachers[name])
    write_rows(store, source.read_rows(np.arange(number)), 0)
    supports = [source.read_support(name, row) for row in range(number)]
    for support in supports:
        _top_first(support)
    summary = {"positions": 0, "entries": 0, "certain_mass": 0.0, "skipped": 0}
    for teacher in ("teacher1", "teacher2"):
        write_teacher(store, teacher, 0, supports, summary)
    reader = open_store(folder)
    order = np.random.default_rng(0).permutation(np.arange(rows * 4) % number).reshape(-1, 4)
    for batch in reader.batches(order[:4], workers):
        del batch
    started = time.perf_counter()
    for batch in reader.batches(order, workers):
        del batch
    return order.size * length / (time.perf_counter() - started)


def flips_missed(path: Path, copy: Path, flips: int) -> int:
    """Single-bit flips, spread evenly over all bytes of a store, that verify does not find."""
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(path, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
    ends = np.cumsum([p.stat().st_size * 8 for p in files])
    random, missed = np.random.default_rng(0), 0
    for bit in random.integers(0, ends[-1], flips):
        which = int(np.searchsorted(ends, bit, side="right"))
        within = int(bit - (ends[which - 1] if which else 0))
        with open(files[which], "r+b") as file:
            file.seek(within // 8)
            byte = file.read(1)[0]
            file.seek(within // 8)
            file.write(bytes([byte ^ 1 << within % 8]))
            file.flush()
            missed += not verify_store(copy)[1]
            file.seek(within // 8)
            file.write(bytes([byte]))
    return missed
