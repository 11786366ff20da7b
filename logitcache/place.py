"""Where a store is: a folder of this machine, or a URL behind one. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import clear_folder, delete
from .remote import (
    RemoteStore,
    cache_folder,
    delete_objects,
    forget,
    list_objects,
    load_remote,
    remote_url,
)
from .store import Store, is_store, load_store


def shown(path: str | Path) -> str:
    """A path or URL as a person writes it; pathlib makes one slash of two."""
    return remote_url(path) or str(path)


def load(path: str | Path) -> Store:
    """Open a store's metadata, complete or not. StoreError if there is none, it is damaged or of
    another version."""
    url = remote_url(path)
    return load_store(Path(path)) if url is None else load_remote(url)


def is_there(path: Path) -> bool:
    """Whether a store is there, of any version."""
    url = remote_url(path)
    return is_store(path) if url is None else "zarr.json" in list_objects(url)


def local_folder(path: Path) -> Path:
    """The folder of this machine in which a store is, or through which it is written."""
    url = remote_url(path)
    return path if url is None else cache_folder(url)


def lock_folder(path: Path) -> Path:
    """Where the locks of builders are. Those of other machines are elsewhere: each owns its
    shards."""
    url = remote_url(path)
    return path if url is None else cache_folder(url).with_suffix(".locks")


def empty_store(path: Path, manifest: Mapping[str, Any]) -> Store:
    """A store that is yet to be created."""
    url = remote_url(path)
    if url is None:
        return Store(path, dict(manifest), {})
    forget(cache_folder(url))  # of a build that died before its store was one
    return RemoteStore(cache_folder(url), dict(manifest), {}, url, list_objects(url))


def clear(path: Path) -> None:
    """Delete a store, or what is left of one; its manifest goes first, so that a half-deleted one
    is not taken for a store."""
    url = remote_url(path)
    if url is None:
        delete(path / "zarr.json")
        clear_folder(path)
        return
    names = list_objects(url)
    delete_objects(url, sorted(names, key=lambda name: (name != "zarr.json", name)))
    forget(cache_folder(url))
