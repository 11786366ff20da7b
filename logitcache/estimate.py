"""``logitcache build --dry-run``: what a build will take, from a short probe of each teacher.

A probe is a build of a few rows in memory: the rows are taken evenly from all, each teacher runs
over them as it would, and the bytes of their shard are counted. Nothing is written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .builder import Plan, check_same
from .config import BuildConfig
from .errors import Interrupted, ResourceError
from .files import to_json
from .packing import Rows
from .place import local_folder
from .shards import ArraySpec
from .store import Store, creation_bytes
from .writing import pack_rows, pack_teacher

# Bytes per token differ by some 10 % from row to row: of 16 rows the mean is within 3 %.
_PROBE_ROWS = 16
_RESERVE_BYTES = 16 << 20  # one more shard: a file is whole before it replaces another
_PROBE_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 17}


@dataclass(frozen=True)
class Estimate:
    """Bytes of the whole store and of what is still to be written, by all workers; seconds of this
    worker."""

    total_bytes: int
    bytes_left: int
    seconds: float
    teachers: list[dict[str, Any]]


def estimate(
    config: BuildConfig, planned: Plan, fresh: bool, stop: Callable[[], bool] = lambda: False
) -> Estimate:
    """Probe each teacher, one at a time; UsageError if the store there is another one's."""
    from .causal_lm import choose_device

    there = None if fresh else check_same(config.out, planned)
    store = Store(config.out, planned.manifest, planned.teachers)
    shards = len(store.ranges)
    probe, rows = _probe(planned, _PROBE_TOKENS[choose_device(config.device).type])
    index, count = config.worker

    tokens = planned.rows.lengths().sum() / rows.lengths().sum()
    part_bytes = {"rows": _scaled(store, probe, "rows", pack_rows(probe, rows, 0), tokens)}
    seconds, teachers = 0.0, []
    for name in planned.teachers:
        content, rate, load_s = _run(config, planned, probe, rows, name, stop)
        part_bytes[name] = _scaled(store, probe, name, content, _positions(planned.rows, rows))
        missing = there.missing(name) if there and name in there.teachers else range(shards)
        mine = [store.ranges[shard] for shard in missing if shard % count == index]
        todo = sum(int(planned.rows.lengths()[start:end].sum()) for start, end in mine)
        took = load_s + todo / rate if todo else 0.0
        seconds += took
        teachers.append(
            {
                "name": name,
                "bytes_per_token": round(part_bytes[name] / planned.manifest["tokens"], 3),
                "tokens_per_second": round(rate, 1),
                "tokens_to_do": todo,
                "estimated_seconds": round(took, 1),
            }
        )
    left = 0.0
    for part, size in part_bytes.items():
        known = there is not None and (part == "rows" or part in there.teachers)
        left += size * (len(there.missing(part)) / shards if there is not None and known else 1)
    total = sum(part_bytes.values()) + len(to_json(planned.tokenizer).encode())
    return Estimate(int(total), int(left), seconds, teachers)


def check_disk(config: BuildConfig, found: Estimate) -> int:
    """Free bytes of the disk; ResourceError if the store will not fit on it."""
    out = local_folder(config.out)
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    needed = found.bytes_left + _RESERVE_BYTES
    if found.bytes_left and needed > free:
        raise ResourceError(
            f"disk full: {there}: the build needs {needed:,} bytes, {free:,} are free",
            f"free {needed - free:,} bytes more, or give --out on another disk",
        )
    return free


def _probe(planned: Plan, tokens: int) -> tuple[Store, Rows]:
    """Some rows, as a store of one shard that is nowhere on disk."""
    total = len(planned.rows.tokens)
    number = min(total, max(_PROBE_ROWS, tokens // planned.manifest["seq_len"]))
    index = (np.arange(number) * total) // number
    rows = planned.rows[index]
    manifest = {**planned.manifest, "rows": number, "shard_rows": number}
    # "gone" is under no folder: of a store that is there nothing is taken for the probe's.
    return Store(planned.folders["teacher1"] / "gone", manifest, planned.teachers), rows


def _positions(rows: Rows, probe: Rows) -> float:
    """How many times as many positions have labels in all as in the probe."""
    return float((rows.labels() != -100).sum() / max((probe.labels() != -100).sum(), 1))


def _run(
    config: BuildConfig,
    planned: Plan,
    probe: Store,
    rows: Rows,
    name: str,
    stop: Callable[[], bool],
) -> tuple[dict[str, bytes], float, float]:
    """A teacher's shard of the probe, tokens per second, and the seconds that loading took."""
    from .teacher import TeacherRun

    started = time.monotonic()
    run = TeacherRun(planned.folders[name], name, probe, rows, config, None)
    run.supports(0, 1, stop)  # what is made at the first use is no part of the rate
    loaded = time.monotonic()
    made = run.supports(0, len(rows.tokens), stop)
    if made is None:
        raise Interrupted("stopped; nothing was written", "run the same command again")
    content = pack_teacher(probe, name, 0, made[0])
    run.close()
    rate = float(rows.lengths().sum()) / max(time.monotonic() - loaded, 1e-9)
    return content, rate, loaded - started


def _scaled(
    store: Store, probe: Store, part: str, content: Mapping[str, bytes], times: float
) -> float:
    """Bytes of a part of the store of which ``content`` is the probe's, on disk all in all."""
    shards = len(store.ranges)
    total = float(creation_bytes(store, part))
    for array, spec in store.specs[part].items():
        data = len(content[array]) - probe.specs[part][array].index_bytes
        if array == "order":
            # One a shard, and it has the more ids the more rows are in it (Heaps: the square root).
            data *= shards * max(times / shards, 1.0) ** 0.5
        else:
            data = int(data * times)
        total += data + shards * (spec.index_bytes + _record_bytes(spec))
    return total


def _record_bytes(spec: ArraySpec) -> int:
    """What one file, of one shard, takes in the journal, with its share of the rest."""
    file = {"bytes": 10**6, "index_crc32c": 10**9, "sha256": "0" * 64}
    return len(to_json({"files": {spec.shard_name(0): file}})) + 60
