"""Benchmarks: ``python -m benchmarks.kernels [--suite NAME] [--json FILE] [--quick]``.

Needs a CUDA GPU; exits 6 without one. ``--table FILE...`` and ``--plot FILE.png`` make the Markdown
tables and the plot from JSON files, with or without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

SUITES = ("loss", "linear", "capture")
EXIT_NO_GPU = 6


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--quick", action="store_true", help="the shapes of the README only")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="JSON", help="print the tables of these files"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot the records (matplotlib)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run, and give the exit code."""
    options = _arguments().parse_args(argv)
    from .report import plot, table

    if options.table is not None:
        documents = [json.loads(path.read_text(encoding="utf-8")) for path in options.table]
    else:
        import torch

        if not torch.cuda.is_available():
            print(
                "benchmarks.kernels: no CUDA GPU on this machine, nothing measured. "
                "Run it where torch.cuda.is_available(), or --table FILE for a committed result.",
                file=sys.stderr,
            )
            return EXIT_NO_GPU
        document = _measure(SUITES if options.suite == "all" else (options.suite,), options.quick)
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        documents = [document]
    print("\n\n".join(map(table, documents)))
    if options.plot is not None:
        plot(documents, options.plot)
    return 0


def _measure(suites: tuple[str, ...], quick: bool) -> dict[str, object]:
    import torch

    from .common import Bench, machine

    bench = Bench(torch.device("cuda"), quick=quick)
    document = {"machine": machine(), "copy_bandwidth": bench.copy_bandwidth, "quick": quick}
    records = []
    for suite in suites:
        module = importlib.import_module(f"benchmarks.{suite}")
        records += [record.as_json() for record in module.run(bench)]
    document["records"] = records
    return document


if __name__ == "__main__":
    sys.exit(main())
