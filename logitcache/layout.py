"""Which arrays a store has, from its manifest alone. docs/format.md is the specification.

Everything a reader allocates follows from here, after ``check_manifest`` has bounded every number:
the metadata of a store from elsewhere is compared with what it must be, and never trusted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .codec import PRECISIONS, certain_planes, has_floor, sampled_planes
from .errors import StoreError
from .fields import PLANES, fields_width
from .shards import ArraySpec
from .sources import possible_sources

FORMAT = 1
TEACHERS = ("teacher1", "teacher2")
ROW_ARRAYS = {
    "tokens": "uint32",
    "segments": "uint32",
    "loss_mask": "bool",
    "gold_mask": "bool",
    "documents": "uint32",
}
SHARD_POSITIONS = 2**18
MAX_VOCAB, MAX_SEQ_LEN = 1 << 20, 1 << 20
_MAX_ROWS = 1 << 40
_CHUNK_ENTRIES = 1 << 20  # of a piece of a row's entries, at most
_COUNTS = ("rows", "seq_len", "shard_rows", "documents", "tokens", "valid_tokens", "vocab_size")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def shard_rows(num_rows: int, seq_len: int) -> int:
    """Rows in a shard file."""
    return max(1, min(num_rows, SHARD_POSITIONS // seq_len))


def shard_ranges(num_rows: int, rows_per_shard: int) -> list[tuple[int, int]]:
    starts = range(0, num_rows, rows_per_shard)
    return [(start, min(start + rows_per_shard, num_rows)) for start in starts]


def entries_per_row(attributes: Mapping[str, Any], seq_len: int) -> tuple[int, int]:
    """Room for the entries of one kind in a row, and how many of them one chunk holds.

    Sampled supports have 30 or so at a position; 128 on average over a row are refused.
    """
    chunk = min(32 * seq_len, _CHUNK_ENTRIES)
    most = attributes["max_entries"]
    room = (min(most, 128) if attributes["estimator"] == "sampled" else most) * seq_len
    return -(-room // chunk) * chunk, chunk


def row_specs(manifest: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """The arrays of the rows."""
    shape = (manifest["rows"], manifest["seq_len"])
    return {
        name: ArraySpec(f"rows/{name}", shape, (1, shape[1]), manifest["shard_rows"], dtype)
        for name, dtype in ROW_ARRAYS.items()
    }


def teacher_specs(
    name: str, attributes: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[str, ArraySpec]:
    """The arrays of a teacher."""
    rows, seq_len, vocab = manifest["rows"], manifest["seq_len"], manifest["vocab_size"]
    precision, sampled = attributes["precision"], attributes["estimator"] == "sampled"
    room, chunk = entries_per_row(attributes, seq_len)
    floor = has_floor(attributes)
    fields = fields_width(manifest["temperatures"], floor) * seq_len
    counts = "uint8" if attributes["max_entries"] < 256 else "uint16"

    def spec(array: str, planes: int, length: int, piece: int, dtype: str = "uint8") -> ArraySpec:
        shape, shape_of_chunk = (rows, planes, length), (1, 1, piece)
        return ArraySpec(f"{name}/{array}", shape, shape_of_chunk, manifest["shard_rows"], dtype)

    specs = {
        "count": spec("count", 1, (1 + sampled) * seq_len, (1 + sampled) * seq_len, counts),
        "fields": spec("fields", PLANES, fields, fields),
        "certain": spec("certain", certain_planes(vocab, precision, floor), room, chunk),
    }
    if sampled:
        specs["sampled"] = spec("sampled", sampled_planes(vocab, precision), room, chunk)
    shards = len(shard_ranges(rows, manifest["shard_rows"]))
    specs["order"] = ArraySpec(f"{name}/order", (shards, 3, vocab), (1, 1, vocab), 1)
    return specs


def group_metadata(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """zarr.json of a group; ours carry one attribute."""
    ours = {} if attributes is None else {"logitcache": attributes}
    return {"zarr_format": 3, "node_type": "group", "attributes": ours}


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def check_manifest(manifest: Any, where: object) -> dict[str, Any]:
    """Refuse a manifest of another format or with impossible values, naming the first."""
    found = manifest if isinstance(manifest, dict) else {}
    version = found.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise StoreError(
            f"{where}: format: written by format {version}, this version reads {FORMAT} and below",
            "upgrade logitcache, or build the store again",
        )
    if version != FORMAT:
        raise StoreError(
            f"{where}: format: expected {FORMAT}, found {version}",
            "use the version of logitcache that wrote it, or build it again",
        )
    limits = {
        "rows": (1, _MAX_ROWS),
        "seq_len": (2, MAX_SEQ_LEN),
        "shard_rows": (1, max(SHARD_POSITIONS, 1)),
        "vocab_size": (1, MAX_VOCAB),
    }
    good: dict[str, bool] = {
        key: _whole(found.get(key), *limits.get(key, (0, 1 << 62))) for key in _COUNTS
    }
    for key in ("tokenizer_sha256", "data_sha256"):
        good[key] = isinstance(found.get(key), str) and bool(_SHA256.fullmatch(found[key]))
    grid = found.get("temperatures")
    good["temperatures"] = (
        isinstance(grid, list)
        and 0 < len(grid) <= 64
        and all(_number(t, 0.01, 100) for t in grid)
        and 1.0 in grid
    )
    if "sources" in found:
        good["sources"] = possible_sources(found["sources"], found.get("documents"))
    if good["seq_len"] and good["shard_rows"]:
        good["shard_rows"] = found["shard_rows"] * found["seq_len"] <= 2 * MAX_SEQ_LEN
    _refuse(good, found, where)
    return found


def check_teacher(attributes: Any, where: object) -> dict[str, Any]:
    """Refuse attributes of a teacher with impossible values, naming the first."""
    found = attributes if isinstance(attributes, dict) else {}
    good = {
        "estimator": found.get("estimator") in ("sampled", "topk", "full"),
        "precision": found.get("precision") in PRECISIONS,
        "min_prob": _number(found.get("min_prob"), 0, 1),
        "max_entries": _whole(found.get("max_entries"), 1, 65535),
        "seed": _whole(found.get("seed"), 0, (1 << 63) - 1),
        "model": isinstance(found.get("model"), dict),
    }
    if found.get("estimator") == "sampled":
        good["threshold"] = _number(found.get("threshold"), 1e-6, 1)
        good["sample_temperature"] = _number(found.get("sample_temperature"), 1, 4)
        good["max_entries"] = good["max_entries"] and found["max_entries"] < 256
    _refuse(good, found, where)
    return found


def _refuse(good: Mapping[str, bool], found: Mapping[str, Any], where: object) -> None:
    for key, fine in good.items():
        if not fine:
            value = repr(found[key])[:60] if key in found else "none"
            raise StoreError(
                f"{where}: damaged manifest: {key}: expected a possible value, found {value}",
                "build the store again with --fresh",
            )
