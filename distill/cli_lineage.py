"""``distill promote``, ``evolve`` and ``lineage``: the commands that move HEAD."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from logitcache.command import Options, common_options, quiet_libraries, stop_on_signal
from logitcache.errors import UsageError

if TYPE_CHECKING:
    from .promote import Outcome

LINEAGE = click.option("--lineage", "root", type=Path, required=True, help="Folder of a lineage.")


@click.command()
@LINEAGE
@click.option("--candidate", type=Path, required=True, help="Model folder: an --out of train.")
@click.option("--suite", type=Path, required=True, help="JSONL file of the gates' items.")
@click.option("--laws", type=Path, help="JSON or YAML file of rules.")
@click.option("--data", type=Path, multiple=True, help="What it was trained on, to replay later.")
@click.option("--id", "name", help="The generation's id.  [default: the candidate folder's name]")
@click.option("--config", type=Path, help="YAML or JSON file of the gates' settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@common_options
def promote(
    options: Options,
    root: Path,
    candidate: Path,
    suite: Path,
    laws: Path | None,
    data: tuple[Path, ...],
    name: str | None,
    config: Path | None,
    assignments: tuple[str, ...],
    device: str,
) -> None:
    """Judge a candidate by four gates against HEAD; promote it to HEAD, or archive it as failed.

    Exit code 10 if it is rejected; HEAD then stays where it is.
    """
    from logitcache.config import read_settings

    from .gate_settings import gate_settings
    from .lineage import open_lineage

    settings = gate_settings(read_settings(config, assignments, {}))
    open_lineage(root)  # before torch takes its seconds to load
    quiet_libraries()
    from .promote import promote as run_promote

    with stop_on_signal() as stop:
        outcome = run_promote(
            root,
            candidate,
            suite,
            name=name,
            laws=laws,
            data=data,
            settings=settings,
            device=device,
            stop=stop,
            note=options.note,
        )
    _finish(options, outcome)


@click.command()
@click.argument("manifest", type=Path, required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a manifest.")
@click.option("--fresh", is_flag=True, help="Delete the work of another turn in the output folder.")
@common_options
def evolve(options: Options, manifest: Path | None, schema: bool, fresh: bool) -> None:
    """Take a lineage from one generation to the next: build, train, evaluate, promote or archive.

    The same command continues a turn that was interrupted. Exit code 10 if the child is rejected;
    HEAD then stays where it is.
    """
    if schema:
        from .manifest import schema as manifest_schema

        click.echo(json.dumps(manifest_schema(), indent=1))
        return
    if manifest is None:
        raise UsageError("MANIFEST: expected the file of a turn, found none", "see --schema")
    from .manifest import read_manifest

    read_manifest(manifest)  # before the models' libraries take their seconds to load
    quiet_libraries()
    from .evolve import evolve as run_evolve

    with stop_on_signal() as stop:
        outcome = run_evolve(manifest, fresh=fresh, stop=stop, note=options.note)
    _finish(options, outcome)


@click.group()
def lineage() -> None:
    """Look after a lineage: its generations, its log, and HEAD, the one in force."""


@lineage.command()
@LINEAGE
@click.option(
    "--add", multiple=True, required=True, metavar="ID=DIR", help="A generation; oldest first."
)
@click.option("--data", multiple=True, metavar="ID=FILE", help="What it was trained on, to replay.")
@common_options
def init(options: Options, root: Path, add: tuple[str, ...], data: tuple[str, ...]) -> None:
    """Register generations, each the parent of the next; the last one added becomes HEAD."""
    quiet_libraries()
    from .lineage import Member, describe_data, register, writing

    folders = _assigned("--add", add)
    twice = {name for name, _ in folders if [n for n, _ in folders].count(name) > 1}
    if twice:
        raise UsageError(f"--add {min(twice)}: given twice")
    files: dict[str, list[Path]] = {name: [] for name, _ in folders}
    for name, path in _assigned("--data", data):
        if name not in files:
            raise UsageError(f"--data {name}={path}: no --add of that id")
        files[name].append(path)
    members, parent = [], None
    for name, folder in folders:
        members.append(Member(name, folder, tuple(files[name]), parent))
        parent = name
    with writing(root, create=True, note=options.note) as found:
        known = found.generations()
        for member in members:
            described = describe_data(member.data, root)
            if member.data and described != known.get(member.name, {"data": described})["data"]:
                raise UsageError(
                    f"--data {member.name}=...: {member.name} is registered with other data",
                    "init adds generations, and changes none that is there",
                )
        added = register(found, members)
        head = found.head
    if not added:
        options.note(f"{root}: all are registered already; nothing was changed")
    text = f"{root}: registered {', '.join(added) or 'nothing new'}; HEAD is {head}"
    options.result({"registered": added, "head": head}, text)


@lineage.command()
@LINEAGE
@common_options
def show(options: Options, root: Path) -> None:
    """Print the tree of generations with their gates, and HEAD."""
    from .family import describe_lineage, render_tree
    from .lineage import open_lineage

    document = describe_lineage(open_lineage(root))
    del document["log"]
    options.result(document, render_tree(document))


@lineage.command()
@LINEAGE
@common_options
def log(options: Options, root: Path) -> None:
    """Print what happened, oldest first."""
    from .family import render_log
    from .lineage import open_lineage

    entries = open_lineage(root).log()
    options.result({"log": entries}, render_log(entries))


@lineage.command()
@LINEAGE
@click.option(
    "--to",
    "kind",
    type=click.Choice(["json", "graphviz", "mermaid"]),
    default="json",
    show_default=True,
    help="The format.",
)
@common_options
def export(options: Options, root: Path, kind: str) -> None:
    """Print the whole lineage for other tools: JSON, or a graph for Graphviz or Mermaid."""
    from .family import describe_lineage, to_graphviz, to_mermaid
    from .lineage import open_lineage

    document = describe_lineage(open_lineage(root))
    if kind == "json":
        options.result(document, json.dumps(document, indent=1))
        return
    text = to_graphviz(document) if kind == "graphviz" else to_mermaid(document)
    options.result({"format": kind, "text": text}, text)


@lineage.command()
@LINEAGE
@click.option("--to", "name", required=True, metavar="ID", help="The generation to put in force.")
@click.option("--reason", required=True, help="Why; kept in the log.")
@common_options
def rollback(options: Options, root: Path, name: str, reason: str) -> None:
    """Put an earlier generation in force again; nothing is deleted."""
    from .lineage import rollback as roll_back
    from .lineage import writing

    with writing(root, note=options.note) as found:
        before = found.head
        moved = roll_back(found, name, reason)
    if not moved:
        options.note(f"{name} is HEAD already; nothing was changed")
    text = f"HEAD {before} -> {name}" if moved else f"HEAD is {name}"
    options.result({"head": name, "head_before": before, "moved": moved}, text)


def _assigned(flag: str, values: Iterable[str]) -> list[tuple[str, Path]]:
    pairs = []
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise UsageError(f"{flag} {value}: expected ID=PATH")
        pairs.append((name, Path(path)))
    return pairs


def _finish(options: Options, outcome: Outcome) -> None:
    from .promote import EXIT_REJECTED

    options.result(outcome.document(), outcome.text())
    if not outcome.promoted:
        raise click.exceptions.Exit(EXIT_REJECTED)
