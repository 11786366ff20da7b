"""``logitcache info``: what is in a store, from its manifest and commit records alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .place import load, shown
from .store import Store

if TYPE_CHECKING:
    from .verify import Finding

_MOST_DOCUMENTS = 1000  # named of one damaged shard
_MOST_SOURCES = 20  # named for a person


def describe_store(path: Path) -> dict[str, Any]:
    """Summarise a store, finished or not. StoreError if it is none."""
    store = load(path)
    manifest = store.manifest
    missing = {part: store.missing(part) for part in ("rows", *store.teachers)}
    teachers = []
    for name, attributes in store.teachers.items():
        records = [store.commit(name, shard) for shard in range(len(store.ranges))]
        done = [record for record in records if record is not None]
        positions = sum(record["positions"] for record in done)
        data_bytes = sum(store.sizes_of(name).values())
        tokens = manifest["tokens"] * len(done) / max(len(records), 1)
        teachers.append(
            {
                "name": name,
                "bytes_per_token": round(data_bytes / tokens, 3) if tokens else None,
                "mean_support": _ratio(sum(r["entries"] for r in done), positions),
                "mass_covered": _ratio(sum(r["certain_mass"] for r in done), positions),
                "positions": positions,
                "skipped": sum(record["skipped"] for record in done),
                "shards": len(records),
                "shards_missing": len(missing[name]),
                **attributes,
            }
        )
    return {
        "store": shown(path),
        "complete": bool(store.teachers) and not any(missing.values()) and not store.unfinished(),
        "rows": manifest["rows"],
        "seq_len": manifest["seq_len"],
        "tokens": manifest["tokens"],
        "valid_tokens": manifest["valid_tokens"],
        "documents": manifest["documents"],
        "sources": manifest.get("sources"),
        "bytes": sum(store.sizes_of().values()),
        "vocab_size": manifest["vocab_size"],
        "estimator": teachers[0]["estimator"] if teachers else None,
        "temperatures": manifest["temperatures"],
        "format": manifest["format"],
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "data_sha256": manifest["data_sha256"],
        "teachers": teachers,
    }


def _ratio(total: float, count: int) -> float | None:
    return round(total / count, 4) if count else None


def render_info(info: dict[str, Any], shard: str | None = None) -> str:
    """The summary as a person reads it. shard: the share I/N that a worker has just built."""
    lines = [
        f"store       {info['store']}  (format {info['format']}, "
        f"{'complete' if info['complete'] else 'INCOMPLETE'})",
        f"rows        {info['rows']:,} of {info['seq_len']} tokens; "
        f"{info['documents']:,} documents",
        f"tokens      {info['tokens']:,}, of which trained on {info['valid_tokens']:,}",
        f"vocabulary  {info['vocab_size']:,}",
        f"bytes       {info['bytes']:,}",
        *_source_lines(info["sources"] or []),
    ]
    for teacher in info["teachers"]:
        lines.append(
            f"{teacher['name']}    {teacher['estimator']}, {teacher['precision']}: "
            + (
                f"{teacher['bytes_per_token']:.1f} bytes/token, "
                f"{teacher['mean_support']:.1f} entries, "
                f"{teacher['mass_covered']:.1%} of the mass for certain"
                if teacher["positions"]
                else "nothing written yet"
            )
            + (f"; {teacher['shards_missing']} shards missing" if teacher["shards_missing"] else "")
            + (f"; {teacher['skipped']} positions skipped" if teacher["skipped"] else "")
        )
    if not info["complete"] and shard is not None:
        lines.append(f"next: share {shard} is done; build the other shares")
    elif not info["complete"]:
        lines.append("next: run the same build command again to finish it")
    return "\n".join(lines)


def _source_lines(sources: list[dict[str, Any]]) -> list[str]:
    """Where the text comes from, if it is from more than one place."""
    if len(sources) < 2:
        return []
    lines = [
        f"source      {source['name']}: {source['documents']:,} documents, "
        f"{source['tokens']:,} tokens"
        for source in sources[:_MOST_SOURCES]
    ]
    if len(sources) > _MOST_SOURCES:
        lines.append(f"source      ... and {len(sources) - _MOST_SOURCES} more (--json has all)")
    return lines


def render_plan(document: dict[str, Any]) -> str:
    """What a build would take, as a person reads it."""
    lines = [
        "would build:",
        f"rows        {document['rows']:,} of {document['seq_len']} tokens",
        f"tokens      {document['tokens']:,}, of which trained on {document['valid_tokens']:,}",
    ]
    lines += [
        f"{teacher['name']}    {teacher['bytes_per_token']:.1f} bytes/token, "
        f"{teacher['tokens_per_second']:,.0f} tokens/s, "
        f"{teacher['tokens_to_do']:,} tokens to do: {teacher['estimated_seconds']:,.0f} s"
        for teacher in document["teachers"]
    ]
    lines += [
        f"bytes       {document['estimated_bytes']:,} in all, {document['bytes_to_write']:,} to "
        f"write, {document['free_bytes']:,} free",
        f"time        {document['estimated_seconds']:,.0f} s",
        "nothing was written",
    ]
    return "\n".join(lines)


def describe_findings(path: Path, store: Store | None, findings: list[Finding]) -> dict[str, Any]:
    """What ``verify`` found, with the rows and documents that cannot be trusted."""
    from .verify import documents_in

    listed = []
    for finding in findings:
        entry: dict[str, Any] = {
            "part": finding.part,
            "file": finding.file,
            "problem": finding.problem,
            "shard": finding.shard,
            "rows": None if finding.rows is None else [finding.rows[0], finding.rows[1] - 1],
        }
        if store is not None and finding.rows is not None:
            documents = documents_in(store, finding.rows)
            entry["documents"] = documents[:_MOST_DOCUMENTS]
            entry["num_documents"] = len(documents)
        listed.append(entry)
    return {"store": shown(path), "whole": not findings, "findings": listed}


def render_findings(document: dict[str, Any]) -> str:
    """The findings as a person reads them."""
    if document["whole"]:
        return f"{document['store']}: whole: every file, checksum and value is as it should be"
    lines = [f"{document['store']}: DAMAGED: {len(document['findings'])} problems"]
    for entry in document["findings"]:
        lines.append(f"  {entry['part']}: {entry['file']}: {entry['problem']}")
        if entry["rows"] is not None:
            line = f"    rows {entry['rows'][0]} to {entry['rows'][1]}"
            if entry.get("num_documents"):
                some = entry["documents"]
                line += f", {entry['num_documents']} documents: {', '.join(map(str, some[:8]))}"
                line += ", ..." if entry["num_documents"] > 8 else ""
            lines.append(line)
    lines.append(f"next: logitcache repair {document['store']}")
    return "\n".join(lines)
