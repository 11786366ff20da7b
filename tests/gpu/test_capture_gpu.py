"""Capture compiled for the GPU: against the oracle in float64, at real sizes."""

import warnings

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from capture_checks import assert_matches, peaked_logits

from logitcache_kernels import capture
from logitcache_kernels.capture_reference import capture_reference
from logitcache_kernels.capture_triton import capture_triton

pytestmark = [
    pytest.mark.gpu,
    # Said whenever the mode is set, by which a test sees that nothing waits for the GPU.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
OPTIONS = {
    "estimator": "sampled",
    "min_prob": 0.005,
    "threshold": 0.05,
    "sample_temperature": 2.0,
    "top_k": 64,
    "temperatures": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
    "labels_R": None,
    "seed": 0,
}


def generator(seed):
    return torch.Generator("cuda").manual_seed(seed)


def check(logits_RV, careful=False, **changes):
    options = {**OPTIONS, "num_tokens": logits_RV.shape[1], **changes}
    options.setdefault("position_ids_R", torch.arange(len(logits_RV), device="cuda"))
    found = capture_triton(logits_RV, careful=careful, **options)
    assert_matches(found, capture_reference(logits_RV.double(), **options))
    return found


# 32001 and 50257: rows that no vector load may assume aligned. 262144: Gemma. 151936: Qwen.
@pytest.mark.parametrize("vocab", [1000, 32000, 32001, 50257, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_real_sizes_match_the_oracle(vocab, dtype, estimator):
    logits_RV = peaked_logits(24, vocab, generator(vocab)).to(dtype)
    labels_R = torch.randint(-1, vocab, (24,), generator=generator(1), device="cuda")
    min_prob = 0.005 if estimator == "sampled" else 0.0
    check(logits_RV, estimator=estimator, min_prob=min_prob, labels_R=labels_R, seed=2**40 + 5)


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.5, 3.0, 4.0])
def test_other_options_match_the_oracle(estimator, temperature):
    logits_RV = peaked_logits(16, 40000, generator(3)).bfloat16()
    check(logits_RV, estimator=estimator, sample_temperature=temperature, top_k=256)
    check(logits_RV, estimator=estimator, temperatures=(2.0, 0.7), num_tokens=39000, careful=True)


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_hard_rows_match_the_oracle(estimator):
    vocab = 33000
    logits_RV = torch.zeros(9, vocab, device="cuda")
    logits_RV[0, 4321] = 60.0
    logits_RV[2, 100:400] = 5.0
    logits_RV[3] = torch.linspace(-20, 9, vocab)
    logits_RV[4] = peaked_logits(1, vocab, generator(1))[0]
    logits_RV[4, ::3] = -torch.inf
    logits_RV[5] = -1e4
    logits_RV[6] = -300.0
    logits_RV[6, 17] = 300.0
    logits_RV[7, 32999] = torch.nan
    logits_RV[8, 5] = torch.inf
    found = check(logits_RV, estimator=estimator, min_prob=0.005 if estimator == "sampled" else 0)
    assert found.count_R.lt(0).tolist() == [False] * 7 + [True] * 2


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_no_host_synchronisation_and_the_same_bits_again(estimator):
    logits_RV = peaked_logits(300, 49152, generator(4)).bfloat16()
    positions_R = torch.arange(300, device="cuda")
    options = {"estimator": estimator, "position_ids_R": positions_R, "impl": "triton"}
    first = capture(logits_RV, **options)
    with warnings.catch_warnings():  # that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = capture(logits_RV, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_a_graph_and_another_stream_give_the_same_bits(estimator):
    logits_RV = peaked_logits(200, 32000, generator(8)).bfloat16()
    positions_R = torch.arange(200, device="cuda")
    options = {"estimator": estimator, "position_ids_R": positions_R, "impl": "triton"}
    expected = capture(logits_RV, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = capture(logits_RV, **options)
    torch.cuda.current_stream().wait_stream(side)
    buffer_RV = torch.zeros_like(logits_RV)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = capture(buffer_RV, **options)
    buffer_RV.copy_(logits_RV)
    graph.replay()
    for found in (on_side, replayed):
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_banned_tokens_need_no_fallback(estimator, monkeypatch):
    from logitcache_kernels import capture_triton as module

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "capture_careful", Nothing())
    logits_RV = peaked_logits(32, 151936, generator(9)).bfloat16()
    logits_RV[:, 100::50] = -torch.inf
    found = check(logits_RV, estimator=estimator, min_prob=0.005 if estimator == "sampled" else 0.0)
    assert (found.count_R > 0).all()


def test_more_than_two_to_the_31_elements():
    num_rows, vocab = 14200, 151936
    logits_RV = torch.zeros(num_rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits_RV[-8:] = peaked_logits(8, vocab, generator(5)).bfloat16()
    logits_RV[:-8].uniform_(-3, 3, generator=generator(6))
    positions_R = torch.arange(num_rows, device="cuda")
    last = capture(logits_RV[-8:], estimator="sampled", position_ids_R=positions_R[-8:])
    whole = capture(logits_RV, estimator="sampled", position_ids_R=positions_R)
    assert torch.equal(whole.ids_RK[-8:], last.ids_RK)
    assert torch.equal(whole.tail_log_partition_RT[-8:], last.tail_log_partition_RT)


def test_rows_shaped_like_a_teachers_rarely_need_the_fallback():
    """Fewer than 3 % of rows; more would show in the time."""
    from logitcache_kernels import capture_triton as module

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    careful, module.capture_careful = module.capture_careful, Nothing()
    try:
        logits_RV = peaked_logits(2000, 151936, generator(7)).bfloat16()
        for estimator in ("sampled", "topk"):
            options = {**OPTIONS, "estimator": estimator, "num_tokens": 151936}
            options["position_ids_R"] = torch.arange(2000, device="cuda")
            found = module.capture_triton(logits_RV, **options)
            assert (found.count_R == -2).float().mean() < 0.03
    finally:
        module.capture_careful = careful
