"""``logitcache``: build stores of teacher distributions and say what is in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import ManyFiles, Options, common_options, quiet_libraries, run_group, stop_on_signal

if TYPE_CHECKING:
    from .config import BuildConfig


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitcache")
def cli() -> None:
    """Run two frozen teachers once over a corpus and keep each token's distribution sparsely.

    \b
    logitcache build --teacher1 GEN_N --teacher2 GEN_N_MINUS_1 --data corpus.jsonl --out store
    logitcache info store
    distill train --store store --student GEN_N --out child
    """


@cli.command(cls=ManyFiles)
@click.option("--teacher1", type=Path, help="Model folder of the current generation.")
@click.option("--teacher2", type=Path, help="Model folder of the generation before it.")
@click.option(
    "--data", type=Path, multiple=True, help="JSONL, Parquet, text, datasets folders; one or more."
)
@click.option("--out", type=Path, help="Folder of the store, or s3://..., gs://...")
@click.option("--config", type=Path, help="YAML or JSON file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting.")
@click.option("--estimator", type=click.Choice(["sampled", "topk", "full"]), help="What is kept.")
@click.option("--min-prob", type=float, help="Entries from this probability are kept for certain.")
@click.option(
    "--threshold", type=float, help="sampled: smaller ones are kept with odds p/threshold."
)
@click.option("--sample-temperature", type=float, help="sampled: largest temperature of training.")
@click.option("--top-k", type=int, help="topk: entries kept at most.")
@click.option("--precision", type=click.Choice(["standard", "high"]), help="Of kept probabilities.")
@click.option("--seq-len", type=int, help="Tokens in a row.  [default: 2048]")
@click.option("--shard", metavar="I/N", help="Build this worker's share; torchrun sets it.")
@click.option("--device-map", metavar="auto", help="Spread a teacher over all GPUs.")
@click.option("--tp-plan", metavar="auto", help="Shard a teacher over torchrun's processes.")
@click.option("--on-nonfinite", type=click.Choice(["fail", "skip"]), help="NaN from a teacher.")
@click.option("--dry-run", is_flag=True, help="Say what it would take; write nothing.")
@click.option("--fresh", is_flag=True, help="Delete a store that is there and build anew.")
@common_options
def build(
    options: Options,
    config: Path | None,
    assignments: tuple[str, ...],
    dry_run: bool,
    fresh: bool,
    **flags: Any,
) -> None:
    """Build a store; the same command continues one that was interrupted.

    A record is {"text": ...} or {"messages": [{"role", "content"}, ...]}, of which only assistants'
    turns are trained on; an optional boolean "gold" marks curated examples. A text file is one
    document.
    """
    from .config import build_config, read_settings, torchrun_share

    given = read_settings(config, assignments, flags)
    share = None if given.get("tp_plan") else torchrun_share()
    settings = build_config({"shard": share, **given})
    try:
        with stop_on_signal() as stop:
            _build(options, settings, dry_run, fresh, stop)
    finally:
        if settings.tp_plan is not None:
            from .several import leave_group

            leave_group()


def _build(
    options: Options, settings: BuildConfig, dry_run: bool, fresh: bool, stop: Callable[[], bool]
) -> None:
    from .builder import build as run_build
    from .builder import check_out, plan
    from .environment import gpu_memory_peak_bytes
    from .estimate import check_disk, estimate
    from .info import describe_store, render_info, render_plan
    from .place import is_there, load, shown
    from .progress import BuildProgress

    quiet_libraries()
    if dry_run:
        check_out(settings, fresh)
        planned = plan(settings, stop)
        found = estimate(settings, planned, fresh, stop)
        document = {
            **{k: planned.manifest[k] for k in ("rows", "seq_len", "tokens", "valid_tokens")},
            "teachers": found.teachers,
            "estimated_bytes": found.total_bytes,
            "bytes_to_write": found.bytes_left,
            "free_bytes": check_disk(settings, found),
            "estimated_seconds": round(found.seconds, 1),
            "store_exists": is_there(settings.out),
        }
        options.result(document, render_plan(document))
        return
    before = None
    if not fresh and is_there(settings.out):
        store = load(settings.out)
        before = {part: len(store.missing(part)) for part in ("rows", *store.teachers)}
        total = len(store.ranges)
        left = max(before.values())
        if left:
            options.note(f"resuming {shown(settings.out)}: up to {left} of {total} shards to do")
    with BuildProgress(options.quiet) as progress:
        store = run_build(settings, fresh=fresh, report=progress, stop=stop)
    document = describe_store(settings.out)
    document["tokens_per_second"] = {name: round(r, 1) for name, r in progress.rates.items()}
    document["gpu_memory_peak_bytes"] = gpu_memory_peak_bytes()
    nothing_done = (
        before is not None and not any(before.values()) and len(before) == 1 + len(store.teachers)
    )
    if nothing_done:
        options.note(f"{shown(settings.out)}: already complete; nothing was changed")
    text = render_info(document, settings.shard)
    if document["complete"]:
        text += f"\nnext: distill train --store {shown(settings.out)} "
        text += f"--student {settings.teacher1} --out child"
    options.result(document, text)


@cli.command()
@click.argument("store", type=Path)
@common_options
def info(options: Options, store: Path) -> None:
    """Say what is in a store: rows, tokens, teachers, bytes per token, completeness."""
    from .info import describe_store, render_info

    document = describe_store(store)
    options.result(document, render_info(document))


@cli.command()
@click.argument("store", type=Path)
@click.option(
    "--rescore", type=click.IntRange(min=1), metavar="N", help="Run the teachers on N rows again."
)
@click.option("--teacher1", type=Path, help="--rescore: folder; that of the build unless given.")
@click.option("--teacher2", type=Path, help="--rescore: folder; that of the build unless given.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="--rescore: draws the rows.")
@common_options
def verify(
    options: Options, store: Path, rescore: int | None, seed: int, **folders: Path | None
) -> None:
    """Check a store: every byte against the journal, every value against the format.

    --rescore then compares what N rows hold with what the teachers say of them now, beside what
    quantisation and the numeric noise of this machine account for.

    Exit code 4 if anything is damaged or missing, with its rows and documents, or differs.
    """
    from .errors import StoreError
    from .info import describe_findings, render_findings
    from .place import load
    from .progress import every_30_s
    from .verify import verify_store

    if rescore is None and any(folders.values()):
        raise click.UsageError("--teacher1 and --teacher2 are for --rescore N")
    models = None
    if rescore is not None:
        from .rescore import rescore_drawn, teacher_folders

        quiet_libraries()
        with contextlib.suppress(StoreError):  # which verify_store finds again
            models = teacher_folders(load(store), folders)  # before all that takes long
    found, findings = verify_store(store)
    document = describe_findings(store, found, findings)
    text = render_findings(document)
    failed = bool(findings)
    if rescore is not None and found is not None and models is not None and not findings:
        show = every_30_s(lambda done, rows: options.note(f"rescore: {done} of {rows} rows"))
        with stop_on_signal() as stop:
            rescored = rescore_drawn(found, models, rescore, seed, report=show, stop=stop)
        document["rescore"] = rescored.describe()
        text += "\n" + rescored.render()
        failed = not rescored.alike
    options.result(document, text)
    if failed:
        raise click.exceptions.Exit(4)


@cli.command()
@click.argument("store", type=Path)
@click.option("--html", type=Path, metavar="F", help="Write a page to this file.")
@click.option("--rows", metavar="0,4,7-9", help="Rows to show.  [default: largest mean JS]")
@click.option(
    "--js-threshold",
    type=click.FloatRange(0, 2),
    default=0.1,
    show_default=True,
    help="Bits below which teachers blend.",
)
@click.option(
    "--confidence-threshold",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="Confidence above which teacher 1 stands alone.",
)
@click.option(
    "--confidence",
    type=click.Choice(["top1", "entropy"]),
    default="top1",
    show_default=True,
    help="What confidence is.",
)
@click.option("--sample", type=click.IntRange(min=1), metavar="ROWS", help="Look at so many rows.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Draws the rows of --sample.")
@common_options
def inspect(
    options: Options,
    store: Path,
    html: Path | None,
    rows: str | None,
    sample: int | None,
    seed: int,
    **gate: Any,
) -> None:
    """Say where the teachers of a store disagree and what the gate makes of it.

    The page shows rows token by token with what each teacher expected, histograms, and the shares
    of the strategies at any two thresholds. Of a large store a sample of rows is looked at.
    """
    from .errors import UsageError
    from .page import check_target, write_page
    from .reader import open_store

    if html is None and rows is not None:
        raise UsageError("--rows: the rows are shown on a page", "give --html F, too")
    reader = open_store(store)
    if html is not None:
        check_target(html, store)
    from logitcache_kernels import DistillSpec

    from .info import describe_store
    from .inspect import figures, measure, parse_rows
    from .inspect_page import inspect_text, make_page
    from .progress import every_30_s

    chosen = None if rows is None else parse_rows(rows, len(reader))
    show = every_30_s(lambda done, total: options.note(f"inspect: {done} of {total} rows"))
    with stop_on_signal() as stop:
        found = measure(
            reader, DistillSpec(**gate), sample=sample, seed=seed, report=show, stop=stop
        )
    about = describe_store(store)
    document = {
        "store": about["store"],
        "page": None if html is None else str(html),
        **figures(found, about),
    }
    if html is not None:
        write_page(html, make_page(reader, found, document, about, chosen, seed))
    options.result(document, inspect_text(document))


@cli.command(cls=ManyFiles)
@click.argument("store", type=Path)
@click.option("--teacher1", type=Path, help="Model folder; that of the build unless given.")
@click.option("--teacher2", type=Path, help="Model folder; that of the build unless given.")
@click.option("--data", type=Path, multiple=True, help="Files; those of the build unless given.")
@click.option("--config", type=Path, help="YAML or JSON file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting.")
@common_options
def repair(
    options: Options,
    store: Path,
    config: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Make again what is damaged or missing, with the teachers, and touch nothing else.

    The settings are those of STORE.run.json, which build wrote beside the store.
    """
    from .config import read_settings
    from .info import describe_findings
    from .progress import BuildProgress
    from .repair import repair as run_repair
    from .repair import repair_settings

    quiet_libraries()
    settings = repair_settings(store, read_settings(config, assignments, flags))
    with stop_on_signal() as stop, BuildProgress(options.quiet) as progress:
        repaired, findings = run_repair(settings, report=progress, stop=stop)
    document = describe_findings(store, repaired, findings)
    shards = {(f.part, f.shard) for f in findings if f.shard is not None}
    text = f"{store}: {len(findings)} problems repaired, {len(shards)} shards made again"
    if not findings:
        text = f"{store}: nothing is damaged; nothing was changed"
    options.result({"repaired": document.pop("findings"), **document, "whole": True}, text)


@cli.command()
@click.argument("store", type=Path)
@click.option("--to", "kind", type=click.Choice(["parquet"]), required=True, help="The format.")
@click.option("--out", type=Path, required=True, help="Folder to make.")
@common_options
def export(options: Options, store: Path, kind: str, out: Path) -> None:
    """Write a store as Parquet files, which datasets, pandas or Spark can read.

    One record per row: tokens, labels, and per teacher and position ids, logp and inclusion.
    """
    from .export import export_parquet
    from .progress import every_30_s

    with stop_on_signal() as stop:
        show = every_30_s(lambda done, rows: options.note(f"export: {done} of {rows} rows"))
        made = export_parquet(store, out, report=show, stop=stop)
    if not made.written:
        options.note(f"{out}: already exported; nothing was changed")
    document = {
        "store": str(store),
        "output": str(out),
        "format": kind,
        "rows": made.rows,
        "files": made.files,
        "bytes": made.size_bytes,
        "written": made.written,
    }
    text = f"{out}: {made.rows:,} rows, {made.files} files, {made.size_bytes:,} bytes\n"
    text += f'next: datasets.load_dataset("parquet", data_dir="{out}")'
    options.result(document, text)


def main() -> None:
    run_group(cli, "logitcache")
