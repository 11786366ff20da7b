"""docs/format.md is enough to read a store: a reader of its own, plain Python on zarr's arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import zarr

from logitcache import build, open_store

CHAIN = [
    (1.0, 32, -256 * 112, {}),
    (2.0, 64, 256 * 270, {1.0: 348}),
    (4.0, 64, 256 * 257, {1.0: -74, 2.0: 188}),
    (1.5, 128, 256 * 302, {1.0: 229, 2.0: 646, 4.0: -364}),
    (3.0, 64, -256 * 95, {2.0: 52, 4.0: 241}),
    (0.5, 8, -256 * 10, {1.0: 183, 1.5: -28}),
]
MASK = 0xFFFFFFFF


def level_logp(level: int, step: float, nats: float, first: int) -> float:
    y = level - first
    bend = (1 - 2 * step / nats) / step
    if y <= bend:
        r = 1 - y * step
        return 2 * math.log(r - (step**2 / (8 * r) if y > 0 else 0))
    return 2 * math.log(2 * step / nats) - nats * (y - bend) - nats**2 / 24


def dither(i: int) -> float:
    return ((i * 0x9E3779B9) % 2**32 // 256) / 2**24 - 0.5


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def sampled_id(group: int, rank: int, seed: int, position: int) -> int:
    low, high = position & MASK, position >> 32
    key = mix(mix((seed & MASK) ^ 0x9E3779B9) ^ (seed >> 32))
    key = mix(mix(mix(key ^ low) ^ high) ^ low ^ 0x2545F491)
    holder = mix(key - (group + 1) * 0x85EBCA6B & MASK) >> 27
    member = holder ^ rank
    return group // 128 * 4096 + member // 8 * 1024 + group % 128 * 8 + member % 8


def words(planes, bits: int, wide: int, largest: int):
    """Give a function of the entry's number, to be called in order: value, gap, extra number."""
    gap_bits = 8 * wide - bits - 1
    rest_bits = max(largest.bit_length() - gap_bits, 0)
    at_rare = 0

    def read(at: int) -> tuple[int, int, int]:
        nonlocal at_rare
        word = sum(int(planes[p][at]) << 8 * p for p in range(wide))
        rare = 0
        if word >> bits & 1:
            rare = sum(int(plane[at_rare]) << 8 * p for p, plane in enumerate(planes[wide:]))
            at_rare += 1
        gap = word >> bits + 1 | (rare & (1 << rest_bits) - 1) << gap_bits
        return word & (1 << bits) - 1, gap, rare >> rest_bits

    return read


def read_row(store, name: str, row: int):
    """Per position: {id: (kind, logp)}, G by temperature, entropy, top-1 and gold logp."""
    root = zarr.open_group(str(store), mode="r", zarr_format=3, use_consolidated=False)
    manifest = root.attrs["logitcache"]
    teacher, group = root[name].attrs["logitcache"], root[name]
    high = teacher["precision"] == "high"
    floor = teacher["estimator"] != "sampled" and teacher["min_prob"] == 0
    table = (1 / 100, 1 / 6, 1) if high else (1 / 36, 2, 1) if floor else (1 / 24, 1, 1)
    order = group["order"][row // manifest["shard_rows"]].astype(int)
    id_of_rank = np.cumsum(order[0] + 256 * order[1] + 65536 * order[2]) % 2**24
    count = group["count"][row].astype(int).reshape(-1, manifest["seq_len"])
    head, low, high_bytes = group["fields"][row].astype(int).reshape(3, -1, manifest["seq_len"])
    certain = group["certain"][row].astype(int)
    sampled = group["sampled"][row].astype(int) if "sampled" in group else None
    certain_bits, wide = (7, 3) if high else (6, 2) if floor else (5, 2)
    largest = manifest["vocab_size"] - 1
    certain_words = words(certain, certain_bits, wide, largest)
    bits, step, wide = (8, 0.5, 3) if high else (5, 3.0, 2)
    groups = largest // 4096 * 128 + min(largest % 4096 // 8, 127)
    sampled_words = words(sampled, bits, wide, groups)
    at_certain = at_sampled = 0
    positions = []
    for position in range(manifest["seq_len"]):
        column = head[:, position].tolist()
        top1 = column[0]
        gold = (column[1] + top1) % 256
        entropy = (column[2] + 3 * top1 // 4) % 256 / 16
        q, tail = {}, {}
        for number, (temperature, steps, constant, weights) in enumerate(CHAIN):
            code = int(low[number, position] + 256 * high_bytes[number, position])
            steps, constant = steps * (4 if high else 1), constant * (4 if high else 1)
            left = (code - 1) // 2 if code % 2 else -(code // 2)
            total = constant + 128 + sum(w * q[t] for t, w in weights.items())
            q[temperature] = left + total // 256 if code else 0
            tail[temperature] = (q[temperature] - dither(position)) / steps if code else -math.inf
        entries, rank = {}, -1
        top1_logp = level_logp(top1, 1 / 128, 1 / 8, 0)
        for _ in range(count[0][position]):
            value, gap, above = certain_words(at_certain)
            rank += gap + 1
            level = value | above << certain_bits
            if level and floor:
                level = column[3] - level + 1
            logp = level_logp(level, *table) if level else top1_logp
            entries[int(id_of_rank[rank])] = ("certain", logp)
            at_certain += 1
        if entries:
            shift = math.log(sum(math.exp(x) for _, x in entries.values()) + math.exp(tail[1.0]))
            entries = {token: (kind, x - shift) for token, (kind, x) in entries.items()}
            tail = {t: g - shift / t for t, g in tail.items()}
            top1_logp -= shift
        number = 0
        for _ in range(count[1][position] if sampled is not None else 0):
            value, gap, rank_in_group = sampled_words(at_sampled)
            number += gap
            where = row * manifest["seq_len"] + position
            token = sampled_id(number, rank_in_group, teacher["seed"], where)
            kind = "flat" if value >> bits - 1 else "tempered"
            level = value & (1 << bits - 1) - 1
            entries[token] = (kind, -step * (level - dither(at_sampled)))
            at_sampled += 1
        gold_logp = None if gold == 255 else level_logp(gold, 1 / 128, 1 / 8, 0)
        positions.append((entries, tail, entropy, top1_logp, gold_logp))
    return positions


def test_documents_say_of_which_source_a_token_is(tmp_path, built, teacher1):
    other = tmp_path / "other.txt"
    other.write_text("the king of france was away", encoding="utf-8")
    data = (*built.settings["data"], other)
    build(out=tmp_path / "store", **{**built.settings, "teacher2": None, "data": data})
    root = zarr.open_group(str(tmp_path / "store"), mode="r", zarr_format=3, use_consolidated=False)
    documents = root["rows/documents"][:]
    first = 1
    for source in root.attrs["logitcache"]["sources"]:
        last = first + source["documents"] - 1
        assert ((documents >= first) & (documents <= last)).sum() == source["tokens"]
        first = last + 1
    assert first - 1 == documents.max() == 28
    assert [s["name"] for s in root.attrs["logitcache"]["sources"]] == ["corpus", "other"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "high"},
        {"estimator": "topk"},
        {"estimator": "topk", "min_prob": 0.0, "top_k": 20},
        {"sample_temperature": 1.0, "min_prob": 0.05, "seed": (1 << 40) + 5},
    ],
)
def test_a_reader_written_from_the_document_finds_the_same_values(tmp_path, built, settings):
    path = tmp_path / "store"
    build(out=path, **{**built.settings, "teacher2": None, **settings})
    reader = open_store(path)
    for row in (0, len(reader) - 1):
        teacher = reader[row].teachers[0]
        for position, (entries, tail, entropy, top1, gold) in enumerate(
            read_row(path, "teacher1", row)
        ):
            kept = teacher.ids_PK[position] >= 0
            assert set(teacher.ids_PK[position][kept].tolist()) == entries.keys()
            if not entries:
                assert np.isneginf(teacher.tail_PT[position]).all()
                continue
            for slot in np.flatnonzero(kept):
                kind, logp = entries[int(teacher.ids_PK[position, slot])]
                assert teacher.logp_PK[position, slot] == pytest.approx(logp, abs=2e-4)
                if teacher.inclusion_PK is not None:
                    assert (teacher.inclusion_PK[position, slot] >= 1) == (kind == "certain")
                    assert teacher.flat_PK[position, slot] == (kind == "flat")
            expected = [tail[t] for t in teacher.temperatures]
            np.testing.assert_allclose(teacher.tail_PT[position], expected, atol=2e-4)
            assert teacher.entropy_P[position] == entropy
            assert teacher.top1_logp_P[position] == pytest.approx(top1, abs=2e-4)
            assert teacher.gold_logp_P[position] == pytest.approx(gold, abs=2e-4)
