"""Launch settings of the loss kernels, each against one read and one write of the logits.

    python -m benchmarks.sweep [--vocab V] [--rows R] [--temperature T]

For whoever has another GPU than ``gpu_config`` was made for: prints, for each setting, the time
of both kernels over the floor, and each kernel's own milliseconds from the profiler. Needs a CUDA
GPU; exits 6 without one. Nothing is tuned at run time: a setting goes into ``gpu_config`` by
hand, for a kernel that overwrites its input must not be tried out on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import triton

from logitcache_kernels import DistillSpec

from .common import Bench
from .inputs import teacher_logits
from .kernels import EXIT_NO_GPU
from .loss import HEAD_START, make_teachers

_KEPT = 64
_PROFILED = 4


def _settings() -> list[tuple[int, ...]]:
    """Tile, most tiles of a slice, warps, programs a multiprocessor, registers a thread."""
    return [
        (512, 15, 2, 4, 255),
        (512, 14, 2, 4, 255),
        (512, 13, 2, 4, 255),
        (512, 9, 2, 6, 168),
        (1024, 14, 4, 2, 255),
        (2048, 4, 4, 3, 168),
    ]


def _kernel_ms(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the plan and the row kernel in one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(_PROFILED):
            call()
        torch.cuda.synchronize()
    return {
        event.key.removesuffix("_kernel"): event.device_time_total / _PROFILED / 1e3
        for event in found.key_averages()
        if event.key in ("plan_kernel", "rows_kernel")
    }


def main(argv: list[str] | None = None) -> int:
    """Print one line for each setting; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--temperature", type=float, default=2.0)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.sweep: no CUDA GPU on this machine, nothing measured.", file=sys.stderr)
        return EXIT_NO_GPU
    from logitcache_kernels.distill_fused import prepare
    from logitcache_kernels.distill_launch import RowConfig, launch, new_diagnostics

    bench = Bench(torch.device("cuda"), rounds=9, budget_ms=200)
    teacher_RV = teacher_logits(options.rows, options.vocab, seed=options.vocab)
    logits_RV = teacher_RV + torch.randn_like(teacher_RV)
    teachers = make_teachers(teacher_RV, _KEPT, options.temperature)
    spec = DistillSpec(temperature=options.temperature)
    row = prepare(teachers, teacher_RV.argmax(-1), None, None, None, None, spec)
    del teacher_RV
    work_RV = torch.empty_like(logits_RV)
    floor_ms = bench.copy_ms(2 * logits_RV.numel() * logits_RV.element_size())
    print(f"{torch.cuda.get_device_name()}, copy {bench.copy_bandwidth / 1e12:.2f} TB/s, ", end="")
    print(f"R={options.rows} V={options.vocab} T={options.temperature}, floor {floor_ms:.3f} ms")
    print("tile x tiles  warps  per SM  registers   over floor  plan ms  rows ms")

    def setup() -> None:
        work_RV.copy_(logits_RV)
        torch.cuda._sleep(HEAD_START)

    for setting in _settings():
        config = RowConfig(*setting)

        if triton.cdiv(options.vocab, config.tile * config.tiles) > 16 * config.warps:
            continue  # cannot be compiled: see gpu_config

        def call(config: RowConfig = config) -> None:
            diagnostics = new_diagnostics(options.rows, work_RV.device)
            launch(work_RV, work_RV, row, diagnostics, config=config)

        milliseconds = bench.time({"call": call}, setup)["call"].median
        setup()
        kernels = _kernel_ms(call)
        print(
            f"{config.tile:5} x {config.tiles}  {config.warps:7}  {config.per_multiprocessor:6}  "
            f"{config.registers:9}  {milliseconds / floor_ms:11.3f}  "
            f"{kernels['plan']:7.3f}  {kernels['rows']:7.3f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
