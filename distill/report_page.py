"""The page of ``distill report``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from logitcache.errors import LogitCacheError, UsageError
from logitcache.inspect import Measured, measure
from logitcache.inspect_page import COLOURS, confidence_plot, js_plot
from logitcache.page import number, render_page
from logitcache.plots import Series, area_chart, interval, line_chart
from logitcache.reader import open_store
from logitcache.remote import remote_url
from logitcache_kernels import DistillSpec

from .identity import store_identity
from .report import FILES, MOST_ITEMS, Gate, Generation, Log, Run, RunRecord, finite

_MOST_POSITIONS = 1 << 15  # of the store, for the histograms
_LINES = ("c1", "c2", "c3", "c4", "c5", "c6")
_FIRST_SETTINGS = (  # the others of some hundred fields are folded away
    *("temperature", "alpha", "beta", "gamma", "divergence", "js_threshold"),
    *("confidence_threshold", "confidence", "gold_weight", "tail", "taboo", "taboo_words", "laws"),
    *("suite", "ema_decay", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim"),
    *("weight_decay", "max_grad_norm", "bf16", "seed"),
)
_STAGES = ("replay", "build", "train", "evaluate", "promote")
_METRICS = {
    "loss": "loss, nats per token",
    "kl": "KL to the gated target, nats",
    "mean_js": "mean JS, bits",
    "share_blended": "BLENDED",
    "share_t1_only": "T1_ONLY",
    "share_gold_fallback": "GOLD_FALLBACK",
    "share_skip": "SKIP",
}
_WANTED = {"recall": "at least", "generalize": "at least", "tone": "at most", "laws": "at most"}
MODELS = {"teacher2": "teacher 2", "teacher1": "teacher 1", "child": "child"}


def make_page(run: Run) -> str:
    """The page as HTML."""
    found, why_not = _store_measured(run)
    log = run.log or Log()
    return render_page(
        "distill",
        "report",
        run=run,
        files=FILES,
        most=MOST_ITEMS,
        facts=_facts(run),
        gates=[_gate(gate) for gate in run.verdict.gates] if run.verdict else [],
        plots=_plots(log, run.record),
        held_out=_held_out(run.record),
        sources=_sources(log),
        strategies=COLOURS,
        measured=found,
        js_plot=None if found is None or len(found.sum_confidence) == 1 else js_plot(found),
        confidence_plot=None if found is None else confidence_plot(found),
        absent=_absent(run, why_not),
        models=_models(run),
        kinds=_by_kind(run.generations or []),
        taboo=_taboo(run),
        settings=_settings(run),
        stages=_stages(run),
        manifest=_flat(run.turn.manifest) if run.turn else {},
        text=as_text,
    )


def as_text(value: Any) -> str:
    """Anything of a JSON document as a person reads it."""
    if value is None:
        return "\u2013"
    if isinstance(value, str):
        return value.strip() or "(empty)"
    if value in ([], {}):
        return "none"
    if isinstance(value, list) and value and all(_is_message(entry) for entry in value):
        return "\n".join(f"{entry['role']}: {entry['content']}" for entry in value)
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """Title, value and unit of the figures at the top."""
    facts: list[tuple[str, str, str]] = []
    record = run.record
    if record is None:
        return facts
    steps = "\u2013" if record.steps is None else number(record.steps)
    facts.append(("steps", steps, "" if record.complete else "not finished"))
    before, after = record.before or {}, record.after or {}
    for title, key in (("held-out loss, nats", "loss"), ("held-out KL, nats", "kl")):
        old, new = finite(before.get(f"before_{key}")), finite(after.get(f"after_{key}"))
        if old is not None and new is not None:
            facts.append((title, f"{number(old)} \u2192 {number(new)}", ""))
    last = record.metrics.get("last")
    if isinstance(last, dict) and finite(last.get("loss")) is not None:
        facts.append(("last training loss", number(finite(last["loss"])), "nats"))
    rate = finite(record.metrics.get("median_tokens_per_second"))
    if rate is not None:
        facts.append(("speed, median", number(round(rate)), "tokens/s"))
    if record.seconds is not None:
        facts.append(("time", number(round(record.seconds)), "s"))
    return facts


def _absent(run: Run, why_no_histograms: str) -> list[tuple[str, str]]:
    """What the page does not show, and why."""
    absent = [(FILES[name], f"no {name} here") for name in run.missing]
    if why_no_histograms:
        absent.append(("histograms of JS and confidence", why_no_histograms))
    if run.log is not None and not any(n.startswith("source_loss/") for n in run.log.columns):
        absent.append(("loss by source", "the store has one source, or none was recorded"))
    return absent


def _gate(gate: Gate) -> dict[str, Any]:
    """A gate's line: texts and its drawing."""
    score, threshold = finite(gate.score), finite(gate.threshold)
    low, high = (finite(end) for end in gate.interval) if gate.interval else (None, None)
    drawing = Markup("")
    if score is not None and threshold is not None and gate.name != "laws":
        drawing = interval(score, low, high, threshold)
    return {
        "gate": gate,
        "wanted": _WANTED.get(gate.name, ""),
        "drawing": drawing,
        "form": _count if gate.name == "laws" else number,
        "low": low,
        "high": high,
        "failing": gate.failing[:MOST_ITEMS],
    }


def _count(value: float | None) -> str:
    """A number of violations."""
    return number(value if value is None or not value.is_integer() else int(value))


def _line(log: Log, name: str, column: str, colour: str) -> Series:
    x, y = log.merged(column)
    return Series(name, x, y, colour)


def _plots(log: Log, record: RunRecord | None) -> dict[str, Markup]:
    """The drawings of a log; those for which it has no numbers are empty."""
    parts = [
        _line(log, "loss", "loss", "c1"),
        _line(log, "divergence part", "loss_kd", "c2"),
        _line(log, "cross entropy part", "loss_ce", "c3"),
    ]
    agreement = _line(log, "agreement part", "loss_agreement", "c4")
    if any(abs(value) > 1e-6 for value in agreement.y):  # gamma is 0: rounding alone
        parts.append(agreement)
    shares = [_line(log, name, f"share_{name.lower()}", colour) for name, colour in COLOURS.items()]
    rate = [_line(log, "learning rate", "learning_rate", "c1")]
    return {
        "loss": line_chart(_there(parts), "step", "nats per position", zero=True),
        "shares": area_chart(_there(shares), "step", "share of positions"),
        "js": line_chart(
            _there([_line(log, "mean JS", "mean_js", "c4")]), "step", "bits", zero=True
        ),
        "held_out": _held_out_line(log, record, "loss", "nats per token", "c3"),
        "kl": _held_out_line(log, record, "kl", "nats per position", "c2"),
        "rate": line_chart(_there(rate), "step", "learning rate", zero=True),
    }


def _held_out_line(log: Log, record: RunRecord | None, name: str, unit: str, colour: str) -> Markup:
    """A held-out metric over the steps at which it was measured; of two, a table says all."""
    x, y = log.merged(f"before_{name}", f"eval_{name}", f"after_{name}")
    before = finite((record.before or {}).get(f"before_{name}")) if record else None
    if before is not None and f"before_{name}" not in log.columns:  # logged before step 1
        x, y = [0.0, *x], [before, *y]
    return line_chart([Series(name, x, y, colour)], "step", unit) if len(x) > 2 else Markup("")


def _there(series: list[Series]) -> list[Series]:
    return [line for line in series if len(line.x)]


def _sources(log: Log) -> Markup:
    """Loss of each source, where there are several."""
    prefix = "source_loss/"
    names = sorted(name.removeprefix(prefix) for name in log.columns if name.startswith(prefix))
    lines = [
        _line(log, name, prefix + name, colour) for name, colour in zip(names, _LINES, strict=False)
    ]
    drawn = line_chart(lines, "step", "nats per position")
    if len(names) > len(_LINES):
        more = Markup('<p class="note">and {} more in log.jsonl</p>')
        drawn += more.format(len(names) - len(_LINES))
    return drawn


def _held_out(record: RunRecord | None) -> list[tuple[str, Any, Any, str]]:
    """Title, before, after and kind ("share" or "number") of the held-out metrics."""
    if record is None or not (record.before or record.after):
        return []
    before, after = record.before or {}, record.after or {}
    names = [name.removeprefix("before_") for name in before if name.startswith("before_")]
    names += [
        n
        for name in after
        if name.startswith("after_") and (n := name[len("after_") :]) not in names
    ]
    first = [name for name in _METRICS if name in names]
    return [
        (
            _METRICS.get(name, name),
            finite(before.get(f"before_{name}")),
            finite(after.get(f"after_{name}")),
            "share" if name.startswith("share_") else "number",
        )
        for name in [*first, *sorted(set(names) - set(first))]
    ]


def _models(run: Run) -> list[tuple[str, str]]:
    """Keys and titles of the models whose generations there are, teacher 2 first."""
    keys = {key for item in run.generations or [] for key in item.outputs}
    known = [(key, title) for key, title in MODELS.items() if key in keys]
    return known + [(key, key) for key in sorted(keys - set(MODELS))]


def _by_kind(items: list[Generation]) -> dict[str, list[Generation]]:
    """Items by their kind, kinds in order of their first item."""
    kinds: dict[str, list[Generation]] = {}
    for item in items:
        kinds.setdefault(item.kind or "others", []).append(item)
    return kinds


def _taboo(run: Run) -> dict[str, Any] | None:
    if run.taboo is None:
        return None
    names = [name for name in MODELS if name in run.taboo.mass]
    names += sorted(set(run.taboo.mass) - set(MODELS))
    mass = {MODELS.get(name, name): run.taboo.mass[name] for name in names}
    teacher, child = (finite(run.taboo.mass.get(key)) for key in ("teacher1", "child"))
    ratio = child / teacher if teacher and child is not None else None
    return {"words": run.taboo.words, "mass": mass, "ratio": ratio}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """What is in nested objects, by dotted name; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _stages(run: Run) -> dict[str, dict[str, Any]]:
    """The stages of a turn that are done, in their order, and what each recorded."""
    done = run.turn.stages if run.turn else {}
    names = [name for name in _STAGES if name in done]
    return {name: _flat(done[name]) for name in [*names, *sorted(set(done) - set(names))]}


def _settings(run: Run) -> dict[str, Mapping[str, Any]]:
    """Settings that matter, the others, and where it ran."""
    given = run.record.settings if run.record else {}
    environment = run.record.environment if run.record else {}
    if not environment and run.turn:
        environment = run.turn.environment
    versions = environment.get("versions")
    flat = {key: value for key, value in environment.items() if key != "versions"}
    if isinstance(versions, dict):
        flat |= versions
    return {
        "first": {name: given[name] for name in _FIRST_SETTINGS if name in given},
        "rest": {name: given[name] for name in sorted(given) if name not in _FIRST_SETTINGS},
        "environment": flat,
    }


def _store_measured(run: Run) -> tuple[Measured | None, str]:
    """JS and confidence over the store of a run, if that is here; else the reason why not."""
    record = run.record
    if record is None or record.store is None:
        return None, "no run.json names the store"
    expected = record.identity.get("store")
    names = [Path(record.store), run.path / "store", run.path.parent / "store"]
    if remote_url(record.store) is not None:
        return None, f"the store {record.store} is a remote one"
    for path in names:
        if not (path / "zarr.json").is_file():
            continue
        try:
            spec = _spec(record)
            reader = open_store(path)
            if store_identity(reader) != expected:
                continue
            sample = max(_MOST_POSITIONS // int(reader.manifest["seq_len"]), 1)
            return measure(reader, spec, sample=sample), ""
        except LogitCacheError as error:
            return None, str(error)
    return None, f"the store {record.store} is not here, or is not the one of this run"


def _spec(record: RunRecord) -> DistillSpec:
    """The gate of a run. UsageError if its settings name none."""
    names = ("js_threshold", "confidence_threshold", "confidence")
    given = {name: record.settings[name] for name in names if name in record.settings}
    try:
        return DistillSpec(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the settings of run.json: {error}") from None
