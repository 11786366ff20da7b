"""Make docs/inspect.png and docs/report.png again, from the bundled text and generations.

    python tests/screenshots.py [WORK_FOLDER]

Builds a store of a part of the text, trains a student for 60 steps, judges it (two minutes on two
cores), writes both pages and takes their pictures in a headless Chromium. What the verdict says is
what ``judge`` says of that student.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import click
from browser import Browser, Page, find_chromium
from click.testing import CliRunner

import distill.cli
import logitcache.cli
from distill.bundled import BUNDLED
from distill.demo import SEQ_LEN, TEACHER1, TEACHER2, TRAIN_SETTINGS

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH = 1180
G010, G009, STORE, RUN = Path("Luna-G010"), Path("Luna-G009"), Path("store"), Path("Luna-G011")
LAWS = [
    {"id": "no-markup", "description": "Plain text only.", "kind": "forbid", "pattern": "<[a-z]+>"},
    {
        "id": "no-loops",
        "description": "Nothing is said over and over.",
        "kind": "max_repetition",
        "times": 6,
    },
]


def documents(name: str) -> list[str]:
    lines = (BUNDLED / "text" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def question(text: str, kind: str) -> dict:
    """The beginning of a document, and how it goes on: scored token by token."""
    middle = text.rindex(" ", 0, 160)
    return {
        "kind": kind,
        "prompt": text[:middle],
        "expect": text[middle : text.index(" ", middle + 60)],
        "score": "tokens",
    }


def suite(corpus: list[str], held_out: list[str]) -> list[dict]:
    items = [question(text, "recall") for text in corpus[:96:8]]
    items += [question(text, "generalize") for text in held_out[:12]]
    tone = [text[: text.index("\n", 20) + 1] for text in held_out[12:18]]
    items += [{"kind": "tone", "prompt": prompt} for prompt in tone]
    return items + [{"kind": "law", "prompt": text[:60]} for text in held_out[18:22]]


def make_run() -> None:
    """A store, and a student trained from it and judged, in the present folder."""
    from distill.gates import GateSettings, judge
    from distill.train import TrainRequest, train
    from logitcache import build

    for name, folder in ((G010, TEACHER1), (G009, TEACHER2)):
        shutil.copytree(folder, name)
    corpus, held_out = documents("corpus.jsonl"), documents("heldout.jsonl")
    data = [
        write_lines(Path(name), [{"text": text} for text in part])
        for name, part in (("new.jsonl", corpus[:170]), ("Luna-G009.jsonl", corpus[600:630]))
    ]
    common = {"teacher1": G010, "teacher2": G009, "seq_len": SEQ_LEN, "device": "cpu"}
    build(**common, data=data, out=STORE)
    held = {"estimator": "topk", "top_k": 256, "min_prob": 0.0, "precision": "high"}
    build(**common, **held, data=[BUNDLED / "text" / "heldout.jsonl"], out=Path("heldout"))
    settings = {**TRAIN_SETTINGS, "eval_strategy": "steps", "eval_steps": 15}
    train(TrainRequest(STORE, G010, RUN, Path("heldout"), settings), note=print)
    Path("laws.json").write_text(json.dumps(LAWS), encoding="utf-8")
    judge(
        RUN,
        G010,
        write_lines(Path("suite.jsonl"), suite(corpus, held_out)),
        laws=Path("laws.json"),
        settings=GateSettings(max_new_tokens=32),
        earlier=G009,
        out=RUN,
        device="cpu",
        note=print,
    )


def picture(page: Page, path: Path, last: str) -> None:
    """Of a page from its top to the end of an element."""
    bottom = page.run(f"{last}.getBoundingClientRect().bottom + window.scrollY")
    page.screenshot(path, {"x": 0, "y": 0, "width": WIDTH, "height": round(bottom) + 12})
    print(f"{path}: {path.stat().st_size:,} bytes")


def run(cli: click.Group, *arguments: object) -> None:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def main() -> None:
    chromium = find_chromium()
    if chromium is None:
        sys.exit("no chromium found: apt-get install chromium")
    work = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    if not (RUN / "verdict.json").is_file():
        make_run()
    pages = Path("inspect.html"), Path("report.html")
    run(logitcache.cli.cli, "inspect", STORE, "--html", pages[0])
    run(distill.cli.cli, "report", RUN, "--html", pages[1])
    with Browser(chromium) as browser:
        page = browser.open(pages[0], width=WIDTH, height=1900)
        spot = page.run(
            "(() => { const box = document.querySelectorAll('.row .t.s2')[9]"
            ".getBoundingClientRect(); return [box.left + 3, box.top + 8]; })()"
        )
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=spot[0], y=spot[1])
        picture(page, DOCS / "inspect.png", "document.querySelector('.row')")
        page = browser.open(pages[1], width=WIDTH, height=1900)
        picture(page, DOCS / "report.png", "document.querySelectorAll('.plot')[3]")


if __name__ == "__main__":
    main()
