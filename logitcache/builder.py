"""``logitcache build``: documents -> rows -> each teacher once over the rows -> store."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import BuildConfig, build_config
from .documents import Document, input_files, read_documents
from .errors import InputError, Interrupted, ResourceError, StoreError, UsageError
from .files import (
    DISK_FULL,
    file_sha256,
    lock,
    make_durable_folder,
    to_json,
    write_atomic,
)
from .layout import FORMAT, TEACHERS, shard_rows
from .packing import Rows, pack
from .place import clear, empty_store, is_there, load, local_folder, lock_folder, shown
from .remote import list_objects, put_beside, remote_url
from .sources import describe_sources
from .store import Store
from .writing import create_store, create_teacher, write_rows

log = logging.getLogger(__name__)

TEMPERATURES = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
_MOST_ENTRIES = 255


@dataclass(frozen=True)
class Plan:
    """What a build will do, known before any teacher is loaded."""

    rows: Rows
    manifest: dict[str, Any]
    teachers: dict[str, dict[str, Any]]  # attributes of each teacher group
    folders: dict[str, Path]
    tokenizer: dict[str, Any]


Report = Callable[[str, int, int, int, int], None]
"""Called as report(teacher, tokens done, tokens in all, bytes written, shard) after each batch and
each shard written, from threads in turn."""


def build(
    config: BuildConfig | None = None,
    *,
    fresh: bool = False,
    report: Report | None = None,
    stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Store:
    """Build a store, or go on with one that was interrupted; a finished one is left as it is.

    Settings are those of BuildConfig, as one object or as keywords. fresh: delete a store that is
    there before. stop: asked after every batch; when it says yes, Interrupted is raised with all
    finished shards safe.

    Raises UsageError, InputError, StoreError, LockedError, ResourceError, NonFiniteError.
    """
    config = config or build_config(settings)
    check_out(config, fresh)
    planned = plan(config, stop)
    if config.tp_plan is not None:
        from . import several

        several.join(config)
        stop = several.all_stop(stop)
        if not several.is_first():
            store = Store(config.out, planned.manifest, planned.teachers)
            _run_teachers(config, planned, store, several.told(None), None, stop)
            several.wait_for_all()
            return load(config.out)
    make_durable_folder(lock_folder(config.out))
    with locked(config):
        if fresh:
            clear(config.out)
        build_planned(config, planned, report, stop)
    if config.tp_plan is not None:
        several.wait_for_all()
    return load(config.out)


def build_planned(
    config: BuildConfig, planned: Plan, report: Report | None, stop: Callable[[], bool]
) -> None:
    """Make what a store lacks of a plan; the caller holds its lock."""
    try:
        _build_planned(config, planned, report, stop)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise ResourceError(
            f"{DISK_FULL[error.errno]}: {shown(config.out)}: {_progress(config.out)}",
            "free some space (--dry-run says how much), then run the same command again",
        ) from error


def _build_planned(
    config: BuildConfig, planned: Plan, report: Report | None, stop: Callable[[], bool]
) -> None:
    started = time.monotonic()
    create_lock = lock_folder(config.out) / "create.lock"
    with lock(create_lock, wait=True):  # workers that start at once
        store = _open_or_create(config.out, planned)
    work = _work(store, planned, config)
    if config.tp_plan is not None:
        from . import several

        several.told(work)
    for shard in work["rows"]:
        write_rows(store, planned.rows, shard)
    _run_teachers(config, planned, store, work, report, stop)
    if any(work.values()) or not record_path(config.out).exists():
        # Workers that end at once write it in turn.
        with lock(create_lock, wait=True):
            _write_record(config, time.monotonic() - started)


def _run_teachers(
    config: BuildConfig,
    planned: Plan,
    store: Store,
    work: Mapping[str, list[int]],
    report: Report | None,
    stop: Callable[[], bool],
) -> None:
    """Run each teacher over its shards; with tp_plan in every process, and the first writes."""
    for part, shards in work.items():
        if part == "rows" or not shards:
            continue
        from .several import is_first
        from .teacher import TeacherRun

        writes = config.tp_plan is None or is_first()
        run = TeacherRun(planned.folders[part], part, store, planned.rows, config, report, writes)
        done = run.shards(shards, stop)
        if done < len(shards):
            raise Interrupted(
                f"{shown(config.out)}: stopped; {part}: {done} of {len(shards)} "
                "shards written this time",
                "run the same command again to continue",
            )
        run.close()


def _progress(path: Path) -> str:
    """How far a build has come, in words."""
    with contextlib.suppress(StoreError):
        store = load(path)
        parts = ("rows", *store.teachers)
        total = len(parts) * len(store.ranges)
        return f"{total - sum(len(store.missing(p)) for p in parts)} of {total} shards are safe"
    return "nothing is written yet"


def check_out(config: BuildConfig, fresh: bool) -> None:
    """Refuse an output folder that cannot be used, before anything slow is done."""
    path = config.out
    if fresh and config.shard is not None:
        raise UsageError(
            "--fresh and --shard: one worker would delete what the others have written",
            f"delete {shown(path)}, then start every worker without --fresh",
        )
    url = remote_url(path)
    if url is not None:
        _refuse_others(path, list_objects(url), is_there(path))
        path = lock_folder(path)  # what it is written through
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"{there}: expected a folder, found a file", "give --out a new folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ResourceError(f"{there}: no permission to write there", "give --out another folder")
    free = shutil.disk_usage(there).free
    if free < 1 << 20:
        raise ResourceError(f"disk full: {free} bytes free at {there}", "free some space")
    if url is None and there == path:
        _refuse_others(path, [p.name for p in path.iterdir()], _holds_store(path, fresh))


def _refuse_others(path: Path, names: Iterable[str], holds_store: bool) -> None:
    """Refuse a place that holds what is no store's."""
    # A build that was killed while it created the store left some of these, and no manifest.
    ours = {"commits", "tokenizer.json", "rows", *TEACHERS}
    first = {name.partition("/")[0] for name in names if not name.endswith((".lock", ".tmp"))}
    if not holds_store and first - ours:
        raise UsageError(
            f"{shown(path)}: expected an empty folder or a store, found other files "
            f"({min(first - ours)}, ...)",
            "give --out a new folder",
        )


def _holds_store(path: Path, fresh: bool) -> bool:
    """Whether a folder is a store's; one with a damaged manifest only where it is to be deleted."""
    try:
        return is_there(path)
    except StoreError:
        if fresh and (path / "commits" / "store.json").is_file():
            return True
        raise


@contextlib.contextmanager
def locked(config: BuildConfig) -> Iterator[None]:
    """Hold the store for this process, or this worker's share of it."""
    index, count = config.worker
    folder = lock_folder(config.out)
    with lock(folder / "build.lock", shared=config.shard is not None):
        if config.shard is None:
            yield
        else:
            with lock(folder / f"build-{index}-of-{count}.lock"):
                yield


def _until(documents: Iterable[Document], stop: Callable[[], bool]) -> Iterator[Document]:
    for document in documents:
        if stop():
            raise Interrupted(
                "stopped while reading the data; nothing was written", "run the same command again"
            )
        yield document


def plan(config: BuildConfig, stop: Callable[[], bool] = lambda: False) -> Plan:
    """Read, tokenise and pack the data and identify the teachers, without loading a model."""
    from .causal_lm import check_fits, choose_device, choose_dtype, model_identity
    from .tokenise import (
        Encoder,
        content_sha256,
        describe_difference,
        load_tokenizer,
        tokenizer_content,
        vocabulary,
    )

    folders = {"teacher1": config.teacher1}
    if config.teacher2 is not None:
        folders["teacher2"] = config.teacher2
    identities = {name: model_identity(folder) for name, folder in folders.items()}
    tokenizer = load_tokenizer(config.teacher1)
    content = tokenizer_content(tokenizer)
    if config.teacher2 is not None:
        other = tokenizer_content(load_tokenizer(config.teacher2))
        if content_sha256(other) != content_sha256(content):
            raise StoreError(
                f"{config.teacher2}: its tokenizer is not teacher 1's: "
                f"{describe_difference(content, other)}",
                "both teachers must share one tokenizer, token for token",
            )
    vocab_size = max(vocabulary(content)) + 1
    for name, folder in folders.items():
        check_fits(folder, name, vocab_size, config.seq_len)

    files = input_files(config.data)
    encoder = Encoder(tokenizer)
    counts: list[int] = []
    documents = _until(read_documents(config.data, counts), stop)
    rows = pack(encoder.encode(documents), config.seq_len)
    if len(rows.tokens) == 0:
        raise InputError(
            f"{', '.join(map(str, config.data))}: nothing to train on: of "
            f"{encoder.num_documents} documents "
            f"{encoder.num_empty} are empty and {encoder.num_without_targets} have no "
            "token to predict",
        )
    manifest = {
        "format": FORMAT,
        "rows": len(rows.tokens),
        "seq_len": config.seq_len,
        "shard_rows": shard_rows(len(rows.tokens), config.seq_len),
        "tokens": int(rows.lengths().sum()),
        "valid_tokens": int((rows.labels() != -100).sum()),
        "documents": encoder.num_documents,
        "documents_empty": encoder.num_empty,
        "documents_without_targets": encoder.num_without_targets,
        "vocab_size": vocab_size,
        "tokenizer_sha256": content_sha256(content),
        "data_sha256": rows.fingerprint(),
        "data_files": [{"name": p.name, "sha256": file_sha256(p)} for p in files],
        "sources": describe_sources(config.data, counts, rows.documents),
        "temperatures": TEMPERATURES,
    }
    most = {"topk": config.top_k, "full": vocab_size}.get(config.estimator, _MOST_ENTRIES)
    estimator = {
        "estimator": config.estimator,
        "min_prob": config.min_prob,
        "precision": config.precision,
        "max_entries": min(most, vocab_size),
        "seed": config.seed,
        "on_nonfinite": config.on_nonfinite,
        **({"top_k": config.top_k} if config.estimator == "topk" else {}),
        **(
            {"threshold": config.threshold, "sample_temperature": config.sample_temperature}
            if config.estimator == "sampled"
            else {}
        ),
    }
    if config.estimator == "full" and vocab_size > 65535:
        raise UsageError(
            f"estimator: full keeps {vocab_size} entries a position; it is for "
            "vocabularies below 65536"
        )
    dtype = str(choose_dtype(config.dtype, choose_device(config.device))).removeprefix("torch.")
    teachers = {
        name: {"model": identity, "dtype": dtype, **estimator}
        for name, identity in identities.items()
    }
    return Plan(rows, manifest, teachers, folders, content)


def _open_or_create(path: Path, planned: Plan) -> Store:
    store = check_same(path, planned)
    if store is None:
        store = create_store(empty_store(path, planned.manifest), planned.tokenizer)
    for name in TEACHERS:
        # Also one that failed to load and has changed since: nothing of it is in the store.
        if name in planned.teachers and store.teachers.get(name) != planned.teachers[name]:
            store = create_teacher(store, name, planned.teachers[name])
    return store


def check_same(path: Path, planned: Plan) -> Store | None:
    """The store that is there, if any; UsageError if it is not this build's."""
    if not is_there(path):
        return None
    store = load(path)
    refuse_other(path, "", store.manifest, planned.manifest)
    for name in set(store.teachers) & set(planned.teachers):
        if any(store.commit(name, shard) for shard in range(len(store.ranges))):
            refuse_other(path, f"{name}: ", store.teachers[name], planned.teachers[name])
    return store


def refuse_other(
    path: Path, where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    found, wanted = _flat(found), _flat(wanted)
    if "sources" not in found:  # a store from before they were kept: the same rows all the same
        wanted.pop("sources", None)
    changed = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if changed:
        lines = [
            f"  {where}{key}: this command {_brief(wanted.get(key))}, store "
            f"{_brief(found.get(key))}"
            for key in changed
        ]
        raise UsageError(
            f"{shown(path)}: holds another build:\n" + "\n".join(lines),
            "give --out another folder, or --fresh to delete this store and build anew",
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with the keys of a nested dict as key.key, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": found for inner, found in value.items()})
        else:
            flat[key] = value
    return flat


def _brief(value: Any) -> str:
    text = to_json(value).strip() if isinstance(value, (dict, list)) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 70 else text[:67] + "..."


def _work(store: Store, planned: Plan, config: BuildConfig) -> dict[str, list[int]]:
    """Shards to write, by part: this worker's share of what is not committed yet."""
    index, count = config.worker
    return {
        part: [shard for shard in store.missing(part) if shard % count == index]
        for part in ("rows", *planned.teachers)
    }


def record_path(out: Path) -> Path:
    """The run record lies beside the store, which itself holds no time, host or path; for one at a
    URL, here too."""
    folder = local_folder(out)
    return folder.with_name(folder.name + ".run.json")


def _write_record(config: BuildConfig, seconds: float) -> None:
    from .environment import describe_environment

    record = {
        "command": "logitcache build",
        "config": config.model_dump(mode="json"),
        "environment": describe_environment(),
        "seconds": round(seconds, 1),
    }
    with contextlib.suppress(PermissionError):  # the store is what was asked for
        write_atomic(record_path(config.out), to_json(record))
    url = remote_url(config.out)
    if url is not None:
        put_beside(url, to_json(record))
