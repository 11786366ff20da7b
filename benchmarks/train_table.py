"""What benchmarks.train_step wants of its figures, and the table it prints."""

from __future__ import annotations

from typing import Any

# must, aim, and on which side of them a figure should lie
TARGETS: dict[str, tuple[float, float, str]] = {
    "step over CE by Liger": (0.85, 0.72, "<="),
    "step over the fastest CE": (1.05, 1.00, "<="),
    "online, teachers of its size, over ours": (1.5, 2.0, ">="),
    "online, teachers three times its size, over ours": (2.2, 3.0, ">="),
    "peak memory over CE by Liger": (1.06, 1.00, "<="),
    "peak memory over online": (0.55, 0.45, "<="),
    "peak memory over CE by Liger, activations recomputed": (1.06, 1.00, "<="),
    "peak memory over online, activations recomputed": (0.55, 0.45, "<="),
    "share of the step waiting for data": (0.01, 0.0, "<="),
    "DistillTrainer over a bare loop": (1.03, 1.01, "<="),
}

# must, aim: tokens/s of several processes over one
SEVERAL = {2: (1.9, 1.95), 4: (3.7, 3.85)}


def table(document: dict[str, Any]) -> str:
    """Markdown, from the figures alone."""
    lines = ["| what | must | aim |" + "".join(f" {name} |" for name in document["students"])]
    lines.append("|---" * (3 + len(document["students"])) + "|")
    for what, (must, aim, sign) in TARGETS.items():
        values = [part.get("ratios", {}).get(what) for part in document["students"].values()]
        cells = "".join(" not measured |" if v is None else f" {v:.3f} |" for v in values)
        lines.append(f"| {what} | {sign} {must:g} | {sign} {aim:g} |{cells}")
    for name, part in document["students"].items():
        if "one process" in part:
            lines += _of_several(name, part)
            continue
        trainer = part["trainer"]
        lines.append(f"{name}: {trainer['tokens_per_second']:,.0f} tokens/s")
        exact = trainer.get("deterministic_over_default")
        if exact is not None:
            lines.append(f"{name}: a step with deterministic algorithms takes {exact:.3f} times")
    return "\n".join(lines)


def _of_several(name: str, part: dict[str, Any]) -> list[str]:
    alone = part["one process"]["trainer"]["tokens_per_second"]
    lines = [f"{name}: {alone:,.0f} tokens/s, one process"]
    for buckets in ("buckets as they are", "one bucket"):
        rate, processes = (part[buckets][key] for key in ("tokens_per_second", "processes"))
        line = f"{name}: {rate:,.0f} tokens/s, {processes} processes, {buckets}: {rate / alone:.3f}"
        must, aim = SEVERAL.get(processes, (None, None))
        lines.append(line if must is None else f"{line} (must {must}, aim {aim})")
    return lines


def ratios(timings: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """The rows of the table that stand in TARGETS, None where something was not measured."""

    def over(one: str, other: str, key: str = "median") -> float | None:
        if one not in timings or other not in timings or not timings[other][key]:
            return None
        return timings[one][key] / timings[other][key]

    peers = [name for name in timings if name.startswith("ce ") and "," not in name]
    fastest = min(peers, key=lambda name: timings[name]["median"])
    return {
        "step over CE by Liger": over("ours", "ce liger"),
        "step over the fastest CE": over("ours", fastest),
        "online, teachers of its size, over ours": over("online, same size", "ours, same size"),
        "online, teachers three times its size, over ours": over(
            "online, three times", "ours, three times"
        ),
        "peak memory over CE by Liger": over("ours", "ce liger", "peak"),
        "peak memory over online": over("ours", "online, same size", "peak"),
        "peak memory over CE by Liger, activations recomputed": over(
            "ours alone, recomputed", "ce liger alone, recomputed", "peak"
        ),
        "peak memory over online, activations recomputed": over(
            "ours alone, recomputed", "online, recomputed", "peak"
        ),
    }
