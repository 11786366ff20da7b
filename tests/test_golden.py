"""A store that was written once and for all: whoever changes the format must change its number.

``golden/format1.tar.xz``: four rows of 24 tokens, two tiny teachers (estimator "sampled", min_prob
0.02, threshold 0.2), and what reading its row 1 gave when it was written.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from logitcache import open_store
from logitcache.verify import verify_store

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def unpacked(tmp_path):
    with tarfile.open(GOLDEN / "format1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_store_of_format_1_still_opens_to_the_same_values(unpacked):
    reader = open_store(unpacked / "store")
    assert reader.manifest["format"] == 1
    assert len(reader) == 4
    batch, expected = reader[1], np.load(unpacked / "values.npz")
    np.testing.assert_array_equal(batch.rows.tokens, expected["tokens"])
    np.testing.assert_array_equal(batch.labels, expected["labels"])
    for name, teacher in zip(("teacher1", "teacher2"), batch.teachers, strict=True):
        np.testing.assert_array_equal(teacher.ids_PK, expected[f"{name}_ids"])
        for field, found in (
            ("logp", teacher.logp_PK),
            ("inclusion", teacher.inclusion_PK),
            ("tail", teacher.tail_PT),
            ("entropy", teacher.entropy_P),
            ("top1", teacher.top1_logp_P),
            ("gold", teacher.gold_logp_P),
        ):
            np.testing.assert_allclose(found, expected[f"{name}_{field}"], atol=1e-5, rtol=1e-5)


def test_the_golden_store_is_whole(unpacked):
    assert verify_store(unpacked / "store")[1] == []
