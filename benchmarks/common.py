"""What every suite shares: interleaved timing, floors measured in the same run, peers, records.

A suite is a module with

    def run(bench: Bench) -> list[Record]

which asks ``bench.quick`` whether to take the few shapes or the full grid, times everything that
is to be compared in *one* call of ``bench.time`` (interleaved, so that clocks and neighbours hit
all alike), takes its floor from ``bench.copy_ms`` or ``bench.gemm_ms`` (measured in the same run),
and gives one Record for each shape and option set. Records become JSON; the table and the plot are
made from the JSON alone.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

VOCABULARIES = (32000, 49152, 128256, 151936, 262144)
ROWS = (2048, 8192, 16384)
KEPT = (16, 64, 128)
TEMPERATURES = (1.0, 1.5, 2.0)
_FLUSH_BYTES = 256 * 2**20  # several times the L2 of any present GPU
# The device waits this long (0.5 ms at 2 GHz), so that a function's launches are queued when it
# starts.
_LEAD_CYCLES = 1_000_000
_PEERS = {
    "liger": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}
_IMPORT_NAMES = {"liger": "liger_kernel"}


class Timing(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float


@dataclass
class Record:
    """One measured case.

    shape: R, V and where they apply K, D. options: whatever else tells cases apart (T, divergence,
    ...). floor: what floor_ms is, in words ("read once", "read once + write once", "three GEMMs").
    peak_bytes: memory above what was allocated before the call. error: largest error against
    float64 on the same inputs, by name. peers: the same work, or less, by others; timed
    interleaved with ours.
    """

    suite: str
    name: str
    shape: dict[str, int]
    options: dict[str, Any]
    timing: Timing
    floor: str
    floor_ms: float
    peak_bytes: int | None = None
    error: dict[str, float] = field(default_factory=dict)
    peers: dict[str, Timing] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Give plain JSON types, with the two ratios that readers look for."""
        document = asdict(self)
        document["timing"] = self.timing._asdict()
        document["peers"] = {
            name: {**timing._asdict(), "over_ours": timing.median / self.timing.median}
            for name, timing in self.peers.items()
        }
        document["over_floor"] = self.timing.median / self.floor_ms
        return document


@dataclass
class Bench:
    """A CUDA device, and how long to look at each case."""

    device: torch.device
    quick: bool = False
    rounds: int = 25  # timed rounds of a case; fewer where a round takes long
    budget_ms: float = 1500.0  # about what one interleaved comparison may take

    def __post_init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._copy_bandwidth: float | None = None
        self._gemm_ms: dict[tuple[int, int, int, bool], float] = {}

    def _once(self, function: Callable[[], object], setup: Callable[[], object] | None) -> float:
        if setup is not None:
            setup()
        self._flush.zero_()
        torch.cuda._sleep(_LEAD_CYCLES)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def time(
        self,
        functions: Mapping[str, Callable[[], object]],
        setup: Callable[[], object] | None = None,
    ) -> dict[str, Timing]:
        """Time each function once per round, in turn, the L2 flushed before each.

        setup runs untimed before every call (to restore inputs that a function overwrites).
        """
        first = {}
        for name, function in functions.items():
            self._once(function, setup)
            first[name] = min(self._once(function, setup), self._once(function, setup))
        rounds = int(self.budget_ms / max(sum(first.values()), 1e-3))
        rounds = max(5, min(rounds, self.rounds))
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(self._once(function, setup))
        result = {}
        for name, values in times.items():
            fifths = statistics.quantiles(values, n=5, method="inclusive")
            result[name] = Timing(statistics.median(values), fifths[0], fifths[-1])
        return result

    @property
    def copy_bandwidth(self) -> float:
        """Bytes per second, read plus written, of a device-to-device copy of 2 GiB."""
        if self._copy_bandwidth is None:
            source = torch.empty(2**31, dtype=torch.uint8, device=self.device).random_()
            target = torch.empty_like(source)
            timing = self.time({"copy": lambda: target.copy_(source)})["copy"]
            self._copy_bandwidth = 2 * source.numel() / (timing.median * 1e-3)
        return self._copy_bandwidth

    def copy_ms(self, size_bytes: int) -> float:
        """Milliseconds to move size_bytes (read plus written) at the copy's bandwidth."""
        return size_bytes / self.copy_bandwidth * 1e3

    def gemm_ms(self, num_rows: int, vocab: int, hidden: int, train_head: bool = True) -> float:
        """Milliseconds of the bare bf16 GEMMs of a linear loss: logits, dX, and dW if train_head.

        6 R V D operations (4 R V D with a frozen head). The largest product is held in one piece.
        """
        key = (num_rows, vocab, hidden, train_head)
        if key not in self._gemm_ms:

            def draw(*size: int) -> torch.Tensor:
                return torch.randn(*size, device=self.device, dtype=torch.bfloat16)

            hidden_RD, weight_VD, logits_RV = (
                draw(num_rows, hidden),
                draw(vocab, hidden),
                draw(num_rows, vocab),
            )
            functions: dict[str, Callable[[], object]] = {
                "logits": lambda: hidden_RD @ weight_VD.T,
                "dX": lambda: logits_RV @ weight_VD,
            }
            if train_head:
                functions["dW"] = lambda: logits_RV.T @ hidden_RD
            self._gemm_ms[key] = sum(timing.median for timing in self.time(functions).values())
        return self._gemm_ms[key]

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """Bytes that a call allocates at its peak above what was there; the result counts."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return int(peak)


def wait() -> None:
    """Until the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def blocks_in_turn(
    names: Iterable[str], run: Callable[[str, int], None], blocks: int, steps: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step (median, p20, p80) and peak bytes (0 without a GPU) by name, where
    ``run(name, n)`` takes n steps: blocks of steps of each in turn, after two for compilations."""
    names = list(names)

    def block(name: str, count: int) -> float:
        wait()
        started = time.perf_counter()
        run(name, count)
        wait()
        return (time.perf_counter() - started) / count * 1e3

    peaks, times = dict.fromkeys(names, 0.0), {name: list[float]() for name in names}
    for name in names:
        block(name, 2)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            block(name, 1)
            peaks[name] = float(torch.cuda.max_memory_allocated())
    for _ in range(blocks):
        for name in names:
            times[name].append(block(name, steps))
    found = {}
    for name, values in times.items():
        fifths = statistics.quantiles(values * 2, n=5, method="inclusive")
        timing = Timing(statistics.median(values), fifths[0], fifths[-1])
        found[name] = timing._asdict() | {"peak": peaks[name]}
    return found


def peers() -> dict[str, str]:
    """Versions of the installed peers: "liger", "cut_cross_entropy", "quack"."""
    found = {}
    for name, distribution in _PEERS.items():
        if importlib.util.find_spec(_IMPORT_NAMES.get(name, name)) is not None:
            found[name] = importlib.metadata.version(distribution)
    return found


def largest_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference, computed in float64; NaN is an error of infinity."""
    difference = (values.double() - reference.double()).abs()
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def machine() -> dict[str, Any]:
    """Where, with what and when: what a figure means nothing without."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = "none"
    document: dict[str, Any] = {"versions": {**versions, **peers()}, "commit": _commit()}
    document["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        document["gpu"] = properties.name
        document["gpu_memory_bytes"] = properties.total_memory
        document["multiprocessors"] = properties.multi_processor_count
        document["cuda"] = torch.version.cuda
    return document


def _commit() -> str:
    """The commit that was measured, "+changes" where the tree differs; "unknown" outside git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return "unknown"
    return (commit + ("+changes" if changed else "")) if commit else "unknown"
