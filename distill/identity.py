"""What makes two runs the same; checkpoints and run records hold it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitcache.errors import UsageError
from logitcache.files import file_sha256, to_json
from logitcache.reader import StoreReader

if TYPE_CHECKING:
    from .config import DistillConfig

# Settings that change neither weights nor metrics: a run may be continued with others.
_NO_IDENTITY = (
    *("output_dir", "dataloader_", "logging_", "report_to", "disable_tqdm", "run_name"),
    *("save_", "hub_", "push_to_hub"),
)
_IDENTITY = ("dataloader_drop_last",)
_FILE_SETTINGS = ("taboo_words", "laws", "suite")


def plain(value: Any) -> Any:
    """A value as JSON gives it back, whatever it was."""
    return json.loads(json.dumps(value, default=str))


def store_identity(reader: StoreReader) -> dict[str, Any]:
    """Its contents, whatever its folder is called: rows, documents, estimator, teachers."""
    return {
        "manifest_sha256": hashlib.sha256(to_json(reader.manifest).encode()).hexdigest(),
        "data": reader.manifest["data_sha256"],
        "teachers": reader.store.teachers,
    }


def settings_identity(config: DistillConfig) -> dict[str, Any]:
    """Settings, and the number of processes, of which a batch consists."""
    kept = {
        key: value
        for key, value in config.to_dict().items()
        if key in _IDENTITY or not key.startswith(_NO_IDENTITY)
    }
    for name in _FILE_SETTINGS:  # what is in a file counts, not where it lies
        if kept.get(name) is not None:
            path = Path(kept[name])
            if not path.is_file():
                raise UsageError(f"{name}: {path}: no such file", f"check the setting {name}")
            kept[name] = f"sha256 {file_sha256(path)}"
    return plain({**kept, "processes": config.world_size})
