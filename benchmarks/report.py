"""The Markdown table and the plot, made from the JSON of a run and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(document: dict[str, Any]) -> str:
    """Give a heading with the machine and one Markdown table for each suite."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine.get('gpu', 'no GPU')}, {machine['date']}, commit {machine['commit']}, "
        f"{versions}. Copy bandwidth in this run {document['copy_bandwidth'] / 1e12:.2f} TB/s. "
        "Medians (20th to 80th percentile); peers as multiples of our time.",
    ]
    for suite in sorted({record["suite"] for record in document["records"]}):
        records = [record for record in document["records"] if record["suite"] == suite]
        lines += ["", *_suite_table(records)]
    return "\n".join(lines)


def _suite_table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| kernel | shape | options | ms | floor ms | over floor | extra MiB | error | peers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        timing = record["timing"]
        peak = record["peak_bytes"]
        cells = [
            record["name"],
            " ".join(f"{name}={size}" for name, size in record["shape"].items()),
            " ".join(f"{name}={value}" for name, value in record["options"].items()),
            f"{timing['median']:.3f} ({timing['p20']:.3f} to {timing['p80']:.3f})",
            f"{record['floor_ms']:.3f} ({record['floor']})",
            f"{record['over_floor']:.2f}",
            "" if peak is None else f"{peak / 2**20:.0f}",
            ", ".join(f"{name} {value:.1e}" for name, value in record["error"].items()),
            ", ".join(f"{name} {peer['over_ours']:.2f}" for name, peer in record["peers"].items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(documents: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the fraction of the floor reached, against V: a line for each suite, R, K and options
    that have several V. R differs along a line where the largest V are too large for the others'.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in (record for document in documents for record in document["records"]):
        shape = {name: size for name, size in record["shape"].items() if name not in "RV"}
        parts = {**shape, **record["options"]}
        label = " ".join([record["name"], *(f"{name}={value}" for name, value in parts.items())])
        lines.setdefault(label, []).append((record["shape"]["V"], 1 / record["over_floor"]))
    for label, points in lines.items():
        if len(points) > 1:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", linewidth=1, label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("vocabulary V")
    axes.set_ylabel("floor / time (1 is the bound)")
    axes.grid(alpha=0.3)
    if len(axes.get_lines()) <= 24:
        axes.legend(fontsize="x-small", loc="lower right")
    machines = (document["machine"] for document in documents)
    titles = {f"{m.get('gpu', '')}, {m['date']}, commit {m['commit']}" for m in machines}
    axes.set_title("; ".join(sorted(titles)))
    figure.savefig(path, dpi=110)
