"""The Triton capture kernels against the oracle in float64, in Triton's interpreter."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are first imported

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the same checks run compiled, in tests/gpu", allow_module_level=True)

from capture_checks import assert_matches, peaked_logits  # noqa: E402

from logitcache_kernels import capture  # noqa: E402
from logitcache_kernels.capture_reference import capture_reference  # noqa: E402
from logitcache_kernels.capture_triton import capture_triton  # noqa: E402

# numpy, which the interpreter computes with, warns where hardware gives the NaN that is meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS = {
    "estimator": "sampled",
    "min_prob": 0.005,
    "threshold": 0.05,
    "sample_temperature": 2.0,
    "top_k": 16,
    "temperatures": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    "labels_R": None,
    "seed": 0,
}


def check(logits_RV, careful=False, **changes):
    """Compare with the oracle in float64; give the kernels' result."""
    options = {**OPTIONS, "num_tokens": logits_RV.shape[1], **changes}
    options.setdefault("position_ids_R", torch.arange(len(logits_RV)))
    found = capture_triton(logits_RV, careful=careful, **options)
    assert_matches(found, capture_reference(logits_RV.double(), **options))
    return found


@settings(
    max_examples=14, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.data())
def test_every_option_matches_the_oracle(data):
    estimator = data.draw(st.sampled_from(["sampled", "topk"]))
    vocab = data.draw(st.sampled_from([1, 7, 300, 4096, 9001]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits_RV = peaked_logits(2, vocab + 3, generator)
    logits_RV = logits_RV.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    logits_RV[:, vocab:] = torch.nan  # beyond the tokenizer: never looked at
    labels_R = torch.tensor([vocab - 1, data.draw(st.sampled_from([-100, vocab, 0]))])
    check(
        logits_RV,
        careful=data.draw(st.booleans()),
        estimator=estimator,
        num_tokens=vocab,
        min_prob=data.draw(
            st.sampled_from([0.005, 0.05] if estimator == "sampled" else [0, 0.005])
        ),
        threshold=data.draw(st.sampled_from([0.05, 0.2])),
        sample_temperature=data.draw(st.sampled_from([1.0, 1.5, 2.0, 2.5])),
        top_k=data.draw(st.sampled_from([1, 5, 40])),
        temperatures=data.draw(st.sampled_from([(0.5, 1, 1.5, 2, 3, 4), (2, 1), (0.7, 2.0, 3.5)])),
        labels_R=labels_R,
        seed=data.draw(st.integers(0, 2**63 - 1)),
        position_ids_R=torch.tensor([0, data.draw(st.integers(0, 2**62))]),
    )


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_ordinary_rows_need_no_second_sweep(estimator, monkeypatch):
    """The fast kernel alone, without the fallback."""
    from logitcache_kernels import capture_triton as module

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "capture_careful", Nothing())
    logits_RV = peaked_logits(4, 12000, torch.Generator().manual_seed(5)).bfloat16()
    found = check(logits_RV, estimator=estimator, min_prob=0.005 if estimator == "sampled" else 0.0)
    assert (found.count_R > 0).all()


def test_a_clip_below_zero_under_a_top_above_it_matches_the_oracle():
    """Their ordered bits are further apart than 32 bits can say."""
    logits_RV = peaked_logits(4, 12000, torch.Generator().manual_seed(6), scale=3.0)
    logits_RV -= logits_RV.topk(60).values[:, -1:]
    check(logits_RV.bfloat16(), estimator="topk", top_k=40, min_prob=0.0)


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_rows_with_banned_tokens_need_no_fallback(estimator, monkeypatch):
    """Minus infinity in the part of the row that is read without a mask."""
    from logitcache_kernels import capture_triton as module

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "capture_careful", Nothing())
    logits_RV = peaked_logits(4, 12000, torch.Generator().manual_seed(6))
    logits_RV[::2, 5:9000:7] = -torch.inf
    min_prob = 0.005 if estimator == "sampled" else 0.0
    found = check(logits_RV.bfloat16(), estimator=estimator, top_k=40, min_prob=min_prob)
    assert (found.count_R > 0).all()


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_hard_rows_match_the_oracle(estimator):
    """One-hot, constant, two-level, sorted rows, minus infinities, a tail far below 1e-30."""
    vocab = 5000
    logits_RV = torch.zeros(7, vocab)
    logits_RV[0, 4321] = 60.0
    logits_RV[2, 100:400] = 5.0
    logits_RV[3] = torch.linspace(-20, 9, vocab)
    logits_RV[4] = peaked_logits(1, vocab, torch.Generator().manual_seed(1))[0]
    logits_RV[4, ::3] = -torch.inf
    logits_RV[5] = -1e4
    logits_RV[6] = -300.0
    logits_RV[6, 17] = 300.0
    check(logits_RV, estimator=estimator, top_k=50, min_prob=0.005 if estimator == "sampled" else 0)


def test_bad_rows_are_flagged_and_the_others_are_not_touched():
    logits_RV = peaked_logits(5, 4500, torch.Generator().manual_seed(2))
    logits_RV[0, 4400] = torch.nan
    logits_RV[1, 3] = torch.inf
    logits_RV[2] = -torch.inf
    logits_RV[3, 11] = -torch.inf
    assert check(logits_RV).count_R.ge(0).tolist() == [False, False, False, True, True]


def test_more_than_256_kept_are_cut_to_the_largest():
    logits_RV = torch.randn(2, 3000, generator=torch.Generator().manual_seed(3))
    assert check(logits_RV, threshold=0.004).count_R.min() > 256


def test_strides_no_rows_and_the_public_call():
    logits_RV = peaked_logits(3, 1000, torch.Generator().manual_seed(4))
    wide = torch.zeros(6, 1200)
    wide[::2, 100:1100] = logits_RV
    transposed = logits_RV.T.contiguous().T
    results = [
        capture(tensor, impl="triton", seed=9)
        for tensor in (logits_RV, wide[::2, 100:1100], transposed)
    ]
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert capture(logits_RV[:0], impl="triton").ids_RK.shape == (0, 256)
    full = capture(logits_RV, estimator="full", impl="triton")
    assert full.ids_RK.shape == (3, 1000)
