"""``logitcache repair``: make again what ``verify`` finds damaged or missing, and nothing else.

Everything in a store is a pure function of the teachers, the data and the settings, so a shard that
is made again is the same, byte for byte. The unit is a shard of one part: the other shards, and the
other teacher, are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .builder import Plan, Report, build_planned, locked, plan, record_path, refuse_other
from .config import BuildConfig, build_config
from .errors import StoreError, UsageError
from .files import delete
from .remote import remote_url
from .store import Store, parse_json, read_small
from .verify import Finding, verify_store
from .writing import restore_metadata


def repair_settings(path: Path, given: Mapping[str, Any]) -> BuildConfig:
    """The settings that a store was built with: from its run record, unless given anew."""
    url = remote_url(path)
    if url is not None:
        raise UsageError(
            f"{url}: repair works on stores in a folder",
            "delete the objects that verify names, then run the build command again: it makes what "
            "is missing",
        )
    record = record_path(path)
    if not record.is_file() and ("teacher1" not in given or "data" not in given):
        raise UsageError(
            f"{record}: no such run record, which would say what the store was built from",
            "give the settings of its build command: --teacher1, --teacher2, --data, ...",
        )
    recorded = recorded_settings(path)
    return build_config({**recorded, **given, "out": path, "shard": None})


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings in the run record beside a store; none where there is no record."""
    record = record_path(path)
    if not record.is_file():
        return {}
    found = parse_json(read_small(record), record)
    return found.get("config", {}) if isinstance(found, dict) else {}


def repair(
    config: BuildConfig,
    *,
    report: Report | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Store, list[Finding]]:
    """Repair the store config.out. Gives it and what was wrong (nothing: nothing was changed).

    Raises StoreError if it is still damaged afterwards, UsageError if these settings are of another
    store, and what ``build`` raises.
    """
    path = config.out
    if not path.is_dir():
        raise StoreError(f"{path}: no such store", "logitcache build --out makes one")
    with locked(config):
        store, findings = verify_store(path)
        if store is not None and not findings:
            return store, []
        planned = plan(config, stop)
        if store is not None:
            if "sources" not in store.manifest:  # one from before they were kept stays as it was
                planned.manifest.pop("sources", None)
            refuse_other(path, "", store.manifest, planned.manifest)
            for name in set(store.teachers) & set(planned.teachers):
                refuse_other(path, f"{name}: ", store.teachers[name], planned.teachers[name])
        _clear(path, planned, findings)
        if store is None or any(finding.shard is None for finding in findings):
            store = restore_metadata(path, planned.manifest, planned.teachers, planned.tokenizer)
            _, found = verify_store(path)  # it may hide damaged shards
            _clear(path, planned, found)
        build_planned(config, planned, report, stop)
        store, left = verify_store(path)
        if store is None or left:
            worst = left[0]
            raise StoreError(
                f"{path}: still damaged: {worst.part}: {worst.file}: {worst.problem}",
                "copy what you need of it, then build it again with --fresh",
            )
    return store, findings


def _clear(path: Path, planned: Plan, findings: list[Finding]) -> None:
    """Take damaged shards out of the journal, and away what no store has in its folders."""
    ours = {"commits", "rows", *planned.teachers}
    for finding in findings:
        if finding.shard is not None:
            delete(path / "commits" / f"{finding.part}-{finding.shard:06d}.json")
        elif (
            finding.part == "store"
            and Path(finding.file).parts[:1]
            and (Path(finding.file).parts[0] in ours)
        ):
            delete(path / finding.file)
