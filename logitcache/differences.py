"""How far two runs of a teacher, or a run and a store, are apart, and how far they may be.

Used by ``rescore``. P positions, K entries. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_FLOOR = 1e-7  # below, a tail is a rounding error of float32 sums
STATISTICS = ("kl", "entropy", "top1_logp", "gold_logp")
# What a store's difference may be: 2 times that of quantisation, and of the noise, which is drawn
# anew, 4 times (KL is of second order: 8). The constants are float32's own blur, and what one
# position of a short row may do. Supports change where a probability lies on a bound: a few always
# may.
_TIMES_QUANTISATION = 2.0
_TIMES_NOISE = {"kl": 8.0, "entropy": 4.0, "top1_logp": 4.0, "gold_logp": 4.0}
_ALLOWED = {"kl": 1e-5, "entropy": 1e-3, "top1_logp": 1e-3, "gold_logp": 1e-3}
_ALLOWED_IN_A_ROW = 1e-3
_SUPPORTS_NOISE, _SUPPORTS_SHARE, _SUPPORTS = 2.0, 0.02, 3


@dataclass
class Rescored:
    """Sums over the positions of one teacher's rows. differences: by "store", "quantisation",
    "noise", then by statistic."""

    name: str
    folder: Path
    dtype: str
    device: str
    positions: int = 0
    unlike_positions: int = 0  # stored, and not to be computed, or the other way round
    supports: dict[str, int] = field(default_factory=lambda: {"store": 0, "noise": 0})
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    largest: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: dict[int, dict[str, float]] = field(default_factory=dict)  # mean KL of each

    @property
    def alike(self) -> bool:
        return not self.reasons

    def add(self, against: str, statistic: str, values_P: np.ndarray) -> None:
        sums = self.differences.setdefault(against, dict.fromkeys(STATISTICS, 0.0))
        sums[statistic] += float(values_P.sum())
        most = self.largest.setdefault(against, dict.fromkeys(STATISTICS, 0.0))
        most[statistic] = max(most[statistic], float(values_P.max(initial=0.0)))

    def mean(self, against: str, statistic: str) -> float:
        total = self.differences.get(against, {}).get(statistic, 0.0)
        return total / max(self.positions, 1)

    def limit(self, statistic: str) -> float:
        """What the mean difference of the store may be."""
        return (
            _TIMES_QUANTISATION * self.mean("quantisation", statistic)
            + _TIMES_NOISE[statistic] * self.mean("noise", statistic)
            + _ALLOWED[statistic]
        )

    @property
    def supports_limit(self) -> float:
        """How many positions may have another certain support."""
        share = _SUPPORTS_SHARE * self.positions
        return _SUPPORTS_NOISE * self.supports["noise"] + share + _SUPPORTS

    @property
    def unlike_rows(self) -> list[int]:
        """Rows whose own mean KL is beyond what their quantisation and noise allow."""
        noise = self.mean("noise", "kl")
        return [
            row
            for row, kl in self.rows.items()
            if kl["store"]
            > _TIMES_QUANTISATION * kl["quantisation"]
            + _TIMES_NOISE["kl"] * max(kl["noise"], noise)
            + _ALLOWED_IN_A_ROW
        ]

    @property
    def reasons(self) -> list[str]:
        """Why this is not the teacher, or the text, of the store; none: it is."""
        found = []
        if self.unlike_positions:
            found.append(
                f"{self.unlike_positions} positions are stored and not computed, or computed and "
                "not stored"
            )
        for name in STATISTICS:
            mean, limit = self.mean("store", name), self.limit(name)
            if not mean <= limit:
                found.append(
                    f"{name}: expected a mean difference up to {limit:.2g}, found {mean:.2g}"
                )
        if self.supports["store"] > self.supports_limit:
            found.append(
                f"certain support: expected up to {int(self.supports_limit)} positions with "
                f"another one, found {self.supports['store']} of {self.positions}"
            )
        if self.unlike_rows:
            some = ", ".join(map(str, self.unlike_rows[:8]))
            more = ", ..." if len(self.unlike_rows) > 8 else ""
            found.append(f"{len(self.unlike_rows)} of {len(self.rows)} rows differ: {some}{more}")
        return found

    def describe(self) -> dict[str, Any]:
        """The result as JSON: of each statistic the mean differences, and the store's largest."""
        document: dict[str, Any] = {
            "name": self.name,
            "folder": str(self.folder),
            "dtype": self.dtype,
            "device": self.device,
            "positions": self.positions,
            "alike": self.alike,
            "reasons": self.reasons,
            "unlike_rows": self.unlike_rows,
        }
        for name in STATISTICS:
            means = {a: self.mean(a, name) for a in ("store", "quantisation", "noise")}
            largest = {a: most.get(name, 0.0) for a, most in self.largest.items()}
            document[name] = {**means, "limit": self.limit(name), "largest": largest}
        shares = {a: count / max(self.positions, 1) for a, count in self.supports.items()}
        limit = self.supports_limit / max(self.positions, 1)
        document["support_differs"] = {**shares, "limit": limit}
        return document

    def render(self) -> str:
        """The result as a person reads it."""
        verdict = "as stored" if self.alike else "NOT what is stored"
        lines = [
            f"{self.name}: {verdict}: {len(self.rows)} rows, {self.positions:,} positions, "
            f"{self.dtype} on {self.device}, {self.folder}",
            f"  {'mean difference':16}{'store':>11}{'quantised':>11}{'noise':>11}{'limit':>11}"
            f"{'largest':>11}",
        ]
        document = self.describe()
        for name in (*STATISTICS, "support_differs"):
            values = document[name]
            numbers = [values["store"], values.get("quantisation", 0.0), values["noise"]]
            numbers.append(values["limit"])
            if "largest" in values:
                numbers.append(values["largest"].get("store", 0.0))
            lines.append(f"  {name:16}" + "".join(f"{number:11.3g}" for number in numbers))
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons)])


@dataclass(frozen=True)
class Rescoring:
    """What came out of all teachers of a store on the same rows."""

    store: Path
    rows: list[int]
    seed: int
    teachers: list[Rescored]

    @property
    def alike(self) -> bool:
        return all(teacher.alike for teacher in self.teachers)

    def describe(self) -> dict[str, Any]:
        return {
            "alike": self.alike,
            "rows": self.rows,
            "seed": self.seed,
            "teachers": [teacher.describe() for teacher in self.teachers],
        }

    def render(self) -> str:
        lines = [teacher.render() for teacher in self.teachers]
        if not self.alike:
            lines.append("next: look whether data, transformers or torch have changed since, then")
            lines.append(f"      logitcache build ... --out {self.store} --fresh")
        return "\n".join(lines)


def by_id(captured: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Certain entries' ids, rising, and logp; -1 and -inf behind them. As wide as need be."""
    last = np.iinfo(np.int64).max
    keys_PK = np.where(captured["certain"], captured["ids"].astype(np.int64), last)
    width = max(int(captured["certain"].sum(1).max(initial=0)), 1)
    order_PK = keys_PK.argsort(1, kind="stable")[:, :width]
    ids_PK = np.take_along_axis(keys_PK, order_PK, 1)
    logp_PK = np.take_along_axis(captured["logp"], order_PK, 1)
    empty_PK = ids_PK == last
    return np.where(empty_PK, -1, ids_PK), np.where(empty_PK, -np.inf, logp_PK)


def kl(p_logp_PK: np.ndarray, q_logp_PK: np.ndarray, q_tail_P: np.ndarray | None) -> np.ndarray:
    """KL(p || q) in nats over the same certain entries, -inf padding, and the tail bucket.

    q_tail_P: None: what q's entries leave.
    """
    has_PK = np.isfinite(p_logp_PK) & np.isfinite(q_logp_PK)
    p_PK = np.where(has_PK, np.exp(p_logp_PK.astype(np.float64)), 0.0)
    q_PK = np.where(has_PK, np.exp(q_logp_PK.astype(np.float64)), 0.0)
    ratio_PK = np.subtract(p_logp_PK, q_logp_PK, where=has_PK, out=np.zeros(p_PK.shape))
    p_tail_P = np.maximum(1 - p_PK.sum(1), _FLOOR)
    q_tail_P = np.maximum(1 - q_PK.sum(1) if q_tail_P is None else q_tail_P, _FLOOR)
    return np.maximum((p_PK * ratio_PK).sum(1) + p_tail_P * np.log(p_tail_P / q_tail_P), 0.0)


def unlike(one_PK: np.ndarray, other_PK: np.ndarray) -> np.ndarray:
    """Where two lists of rising ids, -1 behind them, are not the same."""
    width = max(one_PK.shape[1], other_PK.shape[1])
    wide = [
        np.pad(ids_PK, ((0, 0), (0, width - ids_PK.shape[1])), constant_values=-1)
        for ids_PK in (one_PK, other_PK)
    ]
    return (wide[0] != wide[1]).any(1)
