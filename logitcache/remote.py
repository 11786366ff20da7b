"""Stores at s3:// or gs://, read and written through a folder of this machine. Imports no torch.

Opening one fetches its metadata and journal; a shard's files come when its first row is read, whole
and checked against the journal's SHA-256, and stay for the next run. So a store is fetched once,
however many epochs read it, and everything that the reader refuses it refuses here too. A build
writes each file there first and then here: what it made is here to be read, and what is not there
does not look finished here. The folder is LOGITCACHE_HOME (~/.cache/logitcache unless
set)/remote/..., one a store; delete it at any time when nobody uses it. It grows to the size of the
store. Memory: one shard's files, some ten megabytes.

Where and who one is comes from the variables that object stores know (AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from .errors import ResourceError, StoreError
from .files import failpoint, lock, write_durable
from .shards import ShardFile
from .store import Store, load_store

_URL = re.compile(r"(s3|gs):/{1,2}([^/].*)")  # pathlib makes one slash of two
_METADATA = re.compile(
    r"zarr\.json|tokenizer\.json|(rows|teacher[12])/(\w+/)?zarr\.json|commits/[\w-]+\.json"
)
_MAX_METADATA_BYTES = 128 << 20  # a tokenizer; load_store has a limit for each
_AT_ONCE = 16  # requests
_OPTIONS: Any = {"timeout": "30s", "connect_timeout": "5s", "allow_http": True}
# A request is tried again by obstore on 5xx and refused connections, and the file as a whole by us,
# for bodies that end too early.
_RETRY: Any = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=5),
        "base": 2,
    },
}
_TRIES = 4
_owner: list[int] = []  # the process whose threads obstore's requests run in


@dataclass(frozen=True)
class RemoteStore(Store):
    """A store whose path is the folder that holds what was fetched of it so far.

    sizes: bytes of each object of the remote store, by its path within.
    """

    url: str = ""
    sizes: dict[str, int] = field(default_factory=dict)

    def put(self, files: Mapping[str, bytes]) -> None:
        with lock(self.path.with_suffix(".lock"), wait=True):
            _put(self.url, files)
            super().put(files)
        self.sizes.update({name: len(content) for name, content in files.items()})

    def remove(self, *names: str) -> None:
        gone = [n for n in self.sizes if any(n == m or n.startswith(f"{m}/") for m in names)]
        with lock(self.path.with_suffix(".lock"), wait=True):
            delete_objects(self.url, gone)
            super().remove(*names)
        for name in gone:
            del self.sizes[name]

    def again(self) -> RemoteStore:
        found = load_store(self.path)
        return replace(self, manifest=found.manifest, teachers=found.teachers)

    def sizes_of(self, part: str = "") -> dict[str, int]:
        return {n: size for n, size in self.sizes.items() if not part or n.startswith(f"{part}/")}

    def damaged_files(self, record: Mapping[str, Any]) -> list[str]:
        """Files of a commit record that the remote store lacks or has in another size."""
        return [n for n, file in record["files"].items() if self.sizes.get(n) != file["bytes"]]

    def read_object(self, name: str) -> bytes:
        """A file of the store as it is there now."""
        return _fetch(self.url, [name])[name]

    def open_shard(self, part: str, shard: int) -> dict[str, ShardFile]:
        """Open a shard's files, fetched where they are not here yet."""
        record = self.checked_commit(part, shard)
        if super().damaged_files(record):
            self._fetch_shard(record)
        try:
            return super().open_shard(part, shard)
        except StoreError:  # damaged here
            self._fetch_shard(record, again=True)
            return super().open_shard(part, shard)

    def _fetch_shard(self, record: Mapping[str, Any], again: bool = False) -> None:
        with lock(self.path.with_suffix(".lock"), wait=True):  # of all readers of this machine
            names = list(record["files"]) if again else super().damaged_files(record)
            contents = _fetch(self.url, names)
            for name, content in contents.items():
                wanted = record["files"][name]
                if hashlib.sha256(content).hexdigest() != wanted["sha256"]:
                    raise StoreError(
                        f"{self.url}/{name}: not the file of its commit record: expected "
                        f"{wanted['bytes']} bytes with its SHA-256, found {len(content)}",
                        "copy the store there again",
                    )
            write_durable(self.path, contents)


def remote_url(path: str | Path) -> str | None:
    """The URL that a path is meant as; None if it is a path of this machine."""
    found = _URL.fullmatch(str(path))
    return None if found is None else f"{found[1]}://{found[2].rstrip('/')}"


def load_remote(url: str) -> RemoteStore:
    """Fetch a store's metadata and open it.

    StoreError if there is none or it is damaged, ResourceError if it cannot be reached.
    """
    folder = cache_folder(url)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_suffix(".lock"), wait=True):
        sizes = list_objects(url)
        if "zarr.json" not in sizes:
            raise StoreError(f"{url}: no such store", "copy or build one there, or look at the URL")
        names = [name for name in sizes if _METADATA.fullmatch(name)]
        for name in names:
            if sizes[name] > _MAX_METADATA_BYTES:
                raise StoreError(f"{url}/{name}: {sizes[name]} bytes, not a file of a store")
        contents = _fetch(url, names)
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*.json")
        }
        if any(contents.get(name) != old for name, old in found.items()):
            # An earlier store was at this URL. All of it goes at once: files that are here are
            # trusted to be those of the journal that is here.
            forget(folder)
            folder.mkdir()
            found = {}
        write_durable(folder, {n: data for n, data in contents.items() if n not in found})
        store = load_store(folder)
    return RemoteStore(folder, store.manifest, store.teachers, url, sizes)


def forget(folder: Path) -> None:
    """Delete a folder of fetched files, all of it at once."""
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
        shutil.rmtree(old)


def cache_folder(url: str) -> Path:
    """Where files of the store at a URL are kept on this machine."""
    home = os.environ.get("LOGITCACHE_HOME") or Path.home() / ".cache" / "logitcache"
    name = url.rpartition("/")[2]
    name = name.replace(".", "_")  # else with_suffix would cut off what tells stores apart
    return Path(home) / "remote" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


@functools.cache
def _client(url: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise ResourceError(
            f"{url}: remote stores need the package obstore", "pip install 'logitcache[remote]'"
        ) from None
    _owner[:] = [os.getpid()]
    return from_url(url, client_options=_OPTIONS, retry_config=_RETRY)


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[Any]:
    """A client for the URL; what it raises as errors of ours."""
    client = _client(url)
    if _owner != [os.getpid()]:
        # The threads that its requests run in are not in a forked process.
        raise ResourceError(
            f"{url}: opened before this process was forked, and cannot be read here",
            "start data workers with multiprocessing_context='spawn', or use none",
        )
    from obstore.exceptions import BaseError

    try:
        yield client
    except FileNotFoundError:
        raise StoreError(f"{url}: gone, or no such store", "look at the URL") from None
    except (BaseError, OSError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise ResourceError(
            f"{url}: cannot be reached: {first}",
            "look at network and credentials (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), then run "
            "the same command again",
        ) from None


def list_objects(url: str) -> dict[str, int]:
    """Bytes of each object below the URL, by its path from there."""
    with _reaching(url) as client:
        import obstore

        pages = obstore.list(client)
        return {str(item["path"]): int(item["size"]) for page in pages for item in page}


def _fetch(url: str, names: list[str]) -> dict[str, bytes]:
    """Whole objects, several at once."""
    with _reaching(url) as client, ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(lambda name: _get(client, name), names), strict=True))


def _put(url: str, files: Mapping[str, bytes]) -> None:
    """Write whole objects, several at once; each is there whole or not at all."""
    with _reaching(url) as client, ThreadPoolExecutor(_AT_ONCE) as pool:
        import obstore

        under_way = []
        for name, content in files.items():
            failpoint("put object", Path(url) / name)
            under_way.append(pool.submit(obstore.put, client, name, content))
        for future in under_way:
            future.result()


def delete_objects(url: str, names: list[str]) -> None:
    """Delete objects, in this order, below the URL."""
    with _reaching(url) as client:
        import obstore

        for name in names:
            failpoint("delete object", Path(url) / name)
            obstore.delete(client, name)


def put_beside(url: str, content: str) -> None:
    """Write an object beside a store: at URL.run.json."""
    parent, _, name = url.rpartition("/")
    if parent.count("/") >= 2:  # else the URL is a bucket's
        _put(parent, {f"{name}.run.json": content.encode()})


def _get(client: Any, name: str) -> bytes:
    import obstore
    from obstore.exceptions import BaseError

    for left in range(_TRIES - 1, -1, -1):
        try:
            found = obstore.get(client, name)
            content = bytes(found.bytes())
            if len(content) == found.meta["size"]:
                return content
        except FileNotFoundError:
            raise
        except (BaseError, OSError):
            if not left:
                raise
        time.sleep(0.2 * (_TRIES - 1 - left))
    raise OSError(f"{name}: its body ends too early, {_TRIES} times")
