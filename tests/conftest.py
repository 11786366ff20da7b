"""Fixtures that several test files share: two tiny teachers, stores of them, a browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browser import Browser, find_chromium
from hypothesis import settings
from page_checks import HOSTILE
from tiny import make_model, sentences, write_jsonl

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, by whatever test comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, and no limit on time: a busy machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def teacher1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher1"), seed=1)


@pytest.fixture(scope="session")
def teacher2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher2"), seed=2)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of which some share a row and some take several; two are gold."""
    records = [{"text": text, "gold": n < 2} for n, text in enumerate(sentences(24, seed=3))]
    records += [{"text": text, "gold": False} for text in sentences(3, seed=4, words=90)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", records)


@pytest.fixture(scope="session")
def built(
    tmp_path_factory: pytest.TempPathFactory, teacher1: Path, teacher2: Path, corpus: Path
) -> SimpleNamespace:
    """A finished store and the settings that it was built with. Not to be written to."""
    from logitcache import build

    settings = {"teacher1": teacher1, "teacher2": teacher2, "data": (corpus,), "seq_len": 48}
    path = tmp_path_factory.mktemp("built") / "store"
    build(out=path, **settings)
    return SimpleNamespace(path=path, settings=settings)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small operations in many threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, teacher1, teacher2) -> SimpleNamespace:
    """A store of hostile documents."""
    from logitcache import build

    folder = tmp_path_factory.mktemp("hostile")
    data = write_jsonl(folder / "data.jsonl", [{"text": text} for text in HOSTILE])
    store = folder / "a <b>'store' & more"
    build(teacher1=teacher1, teacher2=teacher2, data=(data,), seq_len=128, out=store)
    return SimpleNamespace(store=store, folder=folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        reason = "no chromium found (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(path) as opened:
        yield opened
