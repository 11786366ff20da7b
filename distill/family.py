"""A lineage drawn: the tree for people, and JSON, Graphviz and Mermaid for other tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .lineage import Lineage


def describe_lineage(lineage: Lineage) -> dict[str, Any]:
    """All that there is: HEAD, generations and failed candidates with their gates, the log."""
    nodes = []
    for part, records in (
        ("generation", lineage.generations()),
        ("failed", lineage.failed()),
    ):
        for folder, record in records.items():
            verdict = record["verdict"]
            nodes.append(
                {
                    "id": record["id"],
                    "folder": folder,
                    "state": part,
                    "parent": record["parent"],
                    "grandparent": record.get("grandparent"),
                    "head": part == "generation" and record["id"] == lineage.head,
                    "verdict": verdict and verdict["verdict"],
                    "reasons": verdict["reasons"] if verdict else [],
                    "gates": [_brief_gate(gate) for gate in verdict["gates"]] if verdict else [],
                    "data": record.get("data", []),
                    "weights_sha256": record["model"]["weights_sha256"],
                }
            )
    return {"head": lineage.head, "generations": nodes, "log": lineage.log()}


def render_tree(document: Mapping[str, Any]) -> str:
    """The generations below their parents, with gates and HEAD."""
    nodes = document["generations"]
    names = {node["id"] for node in nodes if node["state"] == "generation"}
    lines: list[str] = []

    def add(node: Mapping[str, Any], indent: str, branch: str) -> None:
        mark = "  <- HEAD" if node["head"] else ""
        title = node["id"] if node["state"] == "generation" else f"{node['folder']}  FAILED"
        lines.append(f"{indent}{branch}{title}{mark}")
        below = indent + ("" if not branch else "   " if branch == "`- " else "|  ")
        children = [n for n in nodes if node["state"] == "generation" and n["parent"] == node["id"]]
        bar = "|  " if children else "   "
        if node["gates"]:
            lines.append(f"{below}{bar}{'  '.join(map(_gate_text, node['gates']))}")
        for number, child in enumerate(children, start=1):
            add(child, below, "`- " if number == len(children) else "+- ")

    for node in nodes:
        if node["parent"] not in names:
            add(node, "", "")
    if document["head"] is None:
        lines.append("no HEAD: init was interrupted; run it again")
    return "\n".join(lines)


def render_log(entries: list[dict[str, Any]]) -> str:
    """A line an entry."""
    lines = []
    for entry in entries:
        line = f"{entry['seq']:>4}  {entry.get('time', ''):25}  {entry['event']:9}"
        line += f" {entry['generation']}"
        if "head_before" in entry:
            line += f"  HEAD {entry['head_before']} -> {entry['head']}"
        elif "head" in entry:
            line += f"  HEAD -> {entry['head']}"
        for key in ("reason", "note"):
            if entry.get(key):
                line += f"  ({_one_line(entry[key])})"
        if entry["event"] == "reject":
            line += f"  ({_one_line('; '.join(entry['reasons']))})"
        lines.append(line)
    return "\n".join(lines)


def to_graphviz(document: Mapping[str, Any]) -> str:
    """A digraph in the DOT language; the second parent's edge is dashed."""
    lines = ["digraph lineage {", "  rankdir=TB;", "  node [shape=box];"]
    for node in document["generations"]:
        style = ' style=bold label="' if node["head"] else ' label="'
        if node["state"] == "failed":
            style = ' style=dashed color=gray label="'
        lines.append(f'  "{node["folder"]}" [{(style + _label(node, chr(92) + "n")).strip()}"];')
    for start, end, dashed in _edges(document):
        lines.append(f'  "{start}" -> "{end}"{" [style=dashed]" if dashed else ""};')
    return "\n".join([*lines, "}"])


def to_mermaid(document: Mapping[str, Any]) -> str:
    """A Mermaid flowchart; the second parent's edge is dotted."""
    lines = ["flowchart TD"]
    numbers = {node["folder"]: f"n{i}" for i, node in enumerate(document["generations"])}
    for node in document["generations"]:
        state = "head" if node["head"] else node["state"]
        lines.append(f'  {numbers[node["folder"]]}["{_label(node, "<br/>")}"]:::{state}')
    for start, end, dashed in _edges(document):
        lines.append(f"  {numbers[start]} {'-.->' if dashed else '-->'} {numbers[end]}")
    lines += ["  classDef head stroke-width:3px", "  classDef failed stroke-dasharray:4"]
    return "\n".join(lines)


def _edges(document: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    nodes = document["generations"]
    known = {node["folder"] for node in nodes if node["state"] == "generation"}
    return [
        (node[key], node["folder"], key == "grandparent")
        for node in nodes
        for key in ("parent", "grandparent")
        if node[key] in known and (key == "parent" or node["verdict"] is not None)
    ]


def _label(node: Mapping[str, Any], line_break: str) -> str:
    """Ids, names of gates and numbers only: nothing that would need escaping."""
    first = node["folder"] + (" (HEAD)" if node["head"] else "")
    first += " FAILED" if node["state"] == "failed" else ""
    return line_break.join([first, *map(_gate_text, node["gates"])])


def _brief_gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("name", "passed", "score", "teacher_score", "threshold", "items", "interval")
    return {key: gate.get(key) for key in keys}


def _gate_text(gate: Mapping[str, Any]) -> str:
    score = "-" if gate["score"] is None else f"{gate['score']:.3f}"
    return f"{gate['name']} {score} {'passed' if gate['passed'] else 'FAILED'}"


def _one_line(text: str) -> str:
    """Text of others, without line breaks and terminal control codes."""
    return "".join(c if c.isprintable() else " " for c in text)
