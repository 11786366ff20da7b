"""``distill``: train students from a store."""

from __future__ import annotations

import os
from pathlib import Path

import click

from logitcache.command import Options, common_options, quiet_libraries, run_group, stop_on_signal

from .cli_evaluate import evaluate, generate
from .cli_lineage import evolve, lineage, promote


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitcache")
def cli() -> None:
    """Train the next generation of a language model from a store of two teachers.

    \b
    distill demo
    distill train --store store --student GEN_N --out child
    distill evolve evolution.json
    """


for command in (evaluate, generate, promote, evolve, lineage):
    cli.add_command(command)


@cli.command()
@click.option("--store", type=Path, required=True, help="Store that logitcache build made.")
@click.option("--student", type=Path, required=True, help="Model folder to start from.")
@click.option("--out", type=Path, required=True, help="Folder of the trained student.")
@click.option("--eval-store", type=Path, help="Store of held-out text, evaluated before and after.")
@click.option("--config", type=Path, help="YAML or JSON file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting.")
@click.option("--dry-run", is_flag=True, help="Try one step, say what it takes.")
@click.option("--fresh", is_flag=True, help="Delete a run that is there and train anew.")
@click.option("--strict", is_flag=True, help="Stop at a damaged checkpoint; else the one before.")
@common_options
def train(
    options: Options,
    store: Path,
    student: Path,
    out: Path,
    eval_store: Path | None,
    config: Path | None,
    assignments: tuple[str, ...],
    dry_run: bool,
    fresh: bool,
    strict: bool,
) -> None:
    """Train a student; the same command continues a run that was interrupted.

    Settings are the fields of transformers.TrainingArguments and of DistillSpec:
    --set max_steps=200 --set learning_rate=1e-4 --set temperature=1.5 --set alpha=0.1
    """
    from logitcache.config import read_settings

    settings = read_settings(config, assignments, {})
    # Store, student and settings are looked at before torch takes its seconds to load.
    from logitcache.reader import open_store

    for path in filter(None, (store, eval_store)):
        open_store(path)
    quiet_libraries()
    from logitcache.causal_lm import check_model_folder
    from logitcache.several import leave_group

    from .progress import TrainProgress
    from .train import TrainRequest
    from .train import train as run_train

    check_model_folder(student)
    request = TrainRequest(store, student, out, eval_store, settings)
    try:
        if dry_run:
            from .plan import dry_run as try_out

            document = try_out(request, fresh)
            lines = ["store, student and settings fit; would train:"]
            lines += [f"{key:18} {value}" for key, value in document.items() if key != "taboo"]
            if "taboo" in document:
                from .taboo import render_taboo

                lines += render_taboo(document["taboo"])
            options.result(document, "\n".join(lines))
            return
        quiet = options.quiet or os.environ.get("RANK", "0") != "0"
        with stop_on_signal() as stop, TrainProgress(quiet) as progress:
            record = run_train(
                request,
                fresh=fresh,
                strict=strict,
                stop=stop,
                note=progress.note,
                report=progress,
            )
    finally:
        leave_group()
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        return
    document = {
        **record["metrics"],
        "before": record["before"],
        "after": record["after"],
        "steps": record["steps"],
        "output": record["output"],
    }
    lines = [
        f"student    {out}  ({record['steps']} steps; averaged weights, raw ones in {out / 'raw'})",
        f"log        {out / 'log.jsonl'}",
        f"loss       {record['metrics']['last'].get('loss', float('nan')):.4f} at the last step",
    ]
    if record["after"]:
        before, after = record["before"], record["after"]
        lines.append(
            f"held out   loss {before['before_loss']:.4f} -> {after['after_loss']:.4f}, "
            f"KL to the teachers {before['before_kl']:.4f} -> {after['after_kl']:.4f}"
        )
    options.result(document, "\n".join(lines))


@cli.command()
@click.option(
    "--out", type=Path, help="Folder for what it makes.  [default: demo, here or in /tmp]"
)
@common_options
def demo(options: Options, out: Path | None) -> None:
    """Run the main job on bundled text and two small bundled generations: on a CPU, offline.

    Capture both teachers, train a student from the store, compare all of them on held-out text.
    """
    quiet_libraries()
    from .demo import default_folder, run_demo

    out = out or default_folder()
    with stop_on_signal():  # what runs below saves its work and ends; so does this then
        document, text = run_demo(out, options)
    options.result(document, text)


@cli.command()
@click.argument("run_dir", type=Path)
@click.option("--html", type=Path, required=True, metavar="F", help="File of the page.")
@common_options
def report(options: Options, run_dir: Path, html: Path) -> None:
    """Write a page about a run: loss, strategies, gates, generations, settings.

    RUN_DIR is the --out of train or the output of evolve; what is not in it is left out, and said.
    """
    from logitcache.page import check_target, write_page

    from .report import read_run

    run = read_run(run_dir)
    check_target(html)
    from .report_page import make_page

    write_page(html, make_page(run))
    verdict = None if run.verdict is None else run.verdict.verdict
    document = {
        "run": str(run_dir),
        "page": str(html),
        "complete": bool(run.record and run.record.complete),
        "steps": None if run.record is None else run.record.steps,
        "verdict": verdict,
        "missing": run.missing,
        "notes": run.notes,
    }
    lines = [f"page     {html}"]
    if verdict is not None:
        lines.append(f"verdict  {verdict}")
    if run.missing:
        lines.append(f"missing  {', '.join(run.missing)}")
    lines += [f"note     {note}" for note in run.notes]
    options.result(document, "\n".join(lines))


def main() -> None:
    run_group(cli, "distill")
