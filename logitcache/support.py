"""One teacher on one row: what the capture kept, as byte planes and back. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .codec import (
    Entries,
    decode_certain,
    decode_sampled,
    encode_certain,
    encode_sampled,
    has_floor,
)
from .draws import position_keys
from .fields import PLANES, CertainLogp, Fields, decode_fields, encode_fields, joined, top1_levels
from .words import runs_of, spread_floats


@dataclass(frozen=True)
class Support:
    """A teacher at the L positions of a row. sampled: None for estimators without any.

    Positions at which nothing was kept have no entries. After ``decode_row`` certain entries and
    tail add up to 1.
    """

    certain: Entries
    sampled: Entries | None
    fields: Fields


def support_of(
    captured: Mapping[str, np.ndarray],
    at: np.ndarray,
    seq_len: int,
    attributes: Mapping[str, Any],
) -> Support:
    """One row from a capture of some of its positions, which are its tokens ``at``.

    captured: ids, logp, inclusion, certain [P, K], tail [P, T], entropy, top1, gold [P]; entries
    of a position by falling logp, ids -1 where it was skipped.
    """
    ids_PK, certain_PK, logp_PK = captured["ids"], captured["certain"], captured["logp"]

    def entries(mask_PK: np.ndarray, flat_PK: np.ndarray | None) -> Entries:
        count = np.zeros(seq_len, np.int64)
        count[at] = mask_PK.sum(1)
        flat = None if flat_PK is None else flat_PK[mask_PK]
        return Entries(count, ids_PK[mask_PK].astype(np.uint32), logp_PK[mask_PK], flat)

    def field(name: str, absent: float) -> np.ndarray:
        values = captured[name]
        whole = np.full((seq_len, *values.shape[1:]), absent, np.float32)
        whole[at] = values
        return whole

    sampled = None
    if attributes["estimator"] == "sampled":
        # inclusion = max(p, p^S) / threshold: is p the larger?
        ratio_PK = captured["inclusion"] * np.float32(attributes["threshold"])
        flat_PK = ratio_PK <= np.exp(logp_PK) * np.float32(1 + 1e-5)
        sampled = entries((ids_PK >= 0) & ~certain_PK, flat_PK)
    fields = Fields(
        field("tail", -np.inf), field("entropy", 0.0), field("top1", 0.0), field("gold", np.nan)
    )
    return Support(entries(certain_PK, None), sampled, fields)


def encode_row(
    support: Support,
    attributes: Mapping[str, Any],
    temperatures: list[float],
    rank_of_id: np.ndarray,
    row: int,
) -> dict[str, np.ndarray]:
    """Give the planes of each array of a teacher: uint8 or uint16 [planes, elements]."""
    return encode_rows([support], attributes, temperatures, rank_of_id, row)[0]


def encode_rows(
    supports: Sequence[Support],
    attributes: Mapping[str, Any],
    temperatures: list[float],
    rank_of_id: np.ndarray,
    start: int,
) -> list[dict[str, np.ndarray]]:
    """Do encode_row for the rows from ``start`` on.

    Small arrays cost by the call: what there is once a position is made for all rows in one go.
    What there is for each entry is made row by row, as it should stay in the processor's cache.
    """
    floor, precision = has_floor(attributes), attributes["precision"]
    number, seq_len = len(supports), len(supports[0].certain.count_P)
    kept = np.concatenate([support.certain.count_P for support in supports]) > 0
    fields = joined([support.fields for support in supports])
    top1 = top1_levels(fields.top1_P, kept)
    top1_RP = top1.reshape(number, seq_len)
    keys_RP = _keys(attributes, start, number, seq_len).reshape(number, seq_len)
    rows, floors, certain_logp = [], [], []
    for support, top1_P, keys_P in zip(supports, top1_RP, keys_RP, strict=True):
        certain, counts = support.certain, [support.certain.count_P]
        planes = {}
        planes["certain"], floor_P, found = encode_certain(
            certain, top1_P, rank_of_id, precision, floor
        )
        floors.append(floor_P)
        certain_logp.append(CertainLogp(certain.count_P, certain.logp, found))
        if support.sampled is not None:
            counts.append(support.sampled.count_P)
            planes["sampled"] = encode_sampled(support.sampled, keys_P, len(rank_of_id), precision)
        planes["count"] = np.concatenate(counts)[None]
        rows.append(planes)
    all_floors = np.concatenate(floors) if floor else None
    encoded = encode_fields(fields, certain_logp, top1, all_floors, temperatures, precision)
    encoded = encoded.reshape(PLANES, -1, number, seq_len)
    for index, planes in enumerate(rows):
        planes["fields"] = encoded[:, :, index].reshape(PLANES, -1)
    return rows


def decode_row(
    planes: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any],
    temperatures: list[float],
    id_of_rank: np.ndarray,
    row: int,
) -> Support:
    """Undo encode_row."""
    floor, precision = has_floor(attributes), attributes["precision"]
    count_KP = planes["count"].reshape(1 + ("sampled" in planes), -1).astype(np.int64)
    count_P = count_KP[0]
    fields, floor_P = decode_fields(
        planes["fields"].reshape(PLANES, -1, len(count_P)), temperatures, precision, floor
    )
    has, runs = count_P > 0, runs_of(count_P)
    certain = decode_certain(
        planes["certain"], count_P, floor_P, fields.top1_P, id_of_rank, precision
    )
    # F(1) is 0: take it off, so that certain entries and tail add up to 1. Sampled entries stay as
    # they are: F(T) above 1 is stored for the exact values (see encode_fields), and so are they.
    one = temperatures.index(1.0)
    total_P = np.exp(fields.tail_PT[:, one])
    if len(certain.logp):
        total_P[runs.kept] += np.add.reduceat(np.exp(certain.logp), runs.first)
    shift_P = np.log(total_P, where=has, out=np.zeros_like(total_P))
    shift = spread_floats(shift_P.take(runs.kept), runs, len(certain.logp))
    np.subtract(certain.logp, shift, out=certain.logp)
    sampled = None
    if "sampled" in planes:
        keys = _keys(attributes, row, 1, len(count_P))
        sampled = decode_sampled(planes["sampled"], count_KP[1], keys, len(id_of_rank), precision)
    tail_TP = fields.tail_PT.T  # as it lies in memory
    inverse_T = np.array([1 / temperature for temperature in temperatures], np.float32)
    tail_TP -= shift_P * inverse_T[:, None]
    top1_P = np.where(has, fields.top1_P - shift_P, np.float32(np.nan))
    gold_P = np.where(has, fields.gold_P, np.float32(np.nan))
    return Support(certain, sampled, Fields(fields.tail_PT, fields.entropy_P, top1_P, gold_P))


def _keys(attributes: Mapping[str, Any], start: int, number: int, seq_len: int) -> np.ndarray:
    positions = np.arange(start * seq_len, (start + number) * seq_len, dtype=np.int64)
    return position_keys(int(attributes["seed"]), positions)
