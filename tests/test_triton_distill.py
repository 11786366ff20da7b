"""The fused losses against the eager oracle in float64, in Triton's interpreter on the CPU."""

import os
from itertools import product

import pytest
import torch
from distill_checks import check_linear, check_loss, random_spec, run, two_teachers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from logitcache_kernels import DistillSpec, SparseTeacher, distill_loss

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are first imported, in a test
pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the same checks run compiled, in tests/gpu", allow_module_level=True)

# numpy, which the interpreter computes with, warns where hardware gives the value that is meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def case(seed=0, num_rows=5, vocab=300, kept=8, temperature=2.0, **options):
    return two_teachers(num_rows, vocab, kept, temperature, generator(seed), **options)


# No shrinking: in the interpreter it takes minutes to make a failing example a little smaller.
@settings(
    max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(st.data())
def test_every_option_matches_the_oracle(data):
    def pick(values):
        return data.draw(st.sampled_from(values))

    sampled, number = pick([False, True]), pick([2, 2, 1])
    spec = random_spec(pick, sampled)
    vocab, kept = pick([(300, 8), (129, 20), (64, 5), (70, 40)])
    logits_RV, teachers, labels_R = case(
        pick(range(50)), 4, vocab, kept, spec.temperature, sampled=sampled, number=number
    )
    options = {"num_items": pick([None, 7.0])}
    if pick([False, True]):
        options["gold_R"] = torch.arange(len(labels_R)) % 3 != 0
    if pick([False, True]):
        listed = teachers[-1].ids_RK[:, 2]
        options["taboo_ids"] = torch.tensor([3, int(teachers[0].ids_RK[0, 0]), vocab + 5])
        if pick([False, True]):
            options["taboo_RK"] = torch.stack((listed, labels_R.int(), listed), dim=1)
    dtype = pick([torch.float32, torch.bfloat16])
    check_loss(
        logits_RV.to(dtype), teachers, labels_R, spec, inplace=pick([True, False]),
        factor=pick([1.0, 0.37]), **options,
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 3.0, 4.0, 2.5])
def test_a_logit_far_above_the_support_does_not_overflow(temperature):
    logits_RV, teachers, labels_R = case(temperature=temperature)
    logits_RV[:, 299] = 200.0
    check_loss(logits_RV, teachers, labels_R, DistillSpec(temperature=temperature, gamma=0.3))


def test_masked_logits_and_fully_masked_rows():
    logits_RV, teachers, labels_R = case()
    logits_RV[0] = -torch.inf
    logits_RV[1, teachers[0].ids_RK[1, 0].long()] = -torch.inf
    logits_RV[3, labels_R[3]] = -torch.inf
    for divergence in ("forward_kl", "jsd"):
        check_loss(logits_RV, teachers, labels_R, DistillSpec(divergence=divergence))


def test_logits_of_minus_a_hundred():
    logits_RV, teachers, labels_R = case()
    # Without hardware's fused multiply-add the interpreter rounds z log2(e), here 144, by 2^-24.
    check_loss(logits_RV - 100.0, teachers, labels_R, DistillSpec(), tolerance=2e-4, rounding=2e-5)


def test_nan_in_a_row_reaches_the_loss_but_not_from_an_ignored_row():
    logits_RV, teachers, labels_R = case()
    logits_RV[2] = torch.nan  # ignored
    output, gradient_RV = run(logits_RV, teachers, labels_R, DistillSpec(), impl="triton")
    assert torch.isfinite(output.loss)
    assert (gradient_RV[2] == 0).all()
    logits_RV[0, 17] = torch.nan
    assert distill_loss(logits_RV, teachers, labels_R, DistillSpec(), impl="triton").loss.isnan()


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 1 - 1e-6])
def test_gradient_of_a_sure_gold_label_keeps_its_precision(probability):
    logits_RV, teachers, _ = case(num_rows=2)
    logits_RV.zero_()
    labels_R = torch.full((2,), 150)
    others = torch.tensor((1 - probability) / probability / 299).log()
    logits_RV += others
    logits_RV[:, 150] = 0.0
    spec = DistillSpec(alpha=1.0, beta=0.0)
    _, exact_RV = run(logits_RV.double(), teachers, labels_R, spec, impl="eager")
    _, found_RV = run(logits_RV, teachers, labels_R, spec, impl="triton", inplace=True)
    torch.testing.assert_close(found_RV[:, 150].double(), exact_RV[:, 150], rtol=2**-8, atol=0.0)


def test_disjoint_teachers_with_hopeless_entries():
    logits_RV, teachers, labels_R = case()
    ids_RK = torch.where(teachers[0].ids_RK < 0, -1, (teachers[0].ids_RK + 150) % 300)
    apart = SparseTeacher(ids_RK, torch.full_like(teachers[0].logp_RK, -120.0), *teachers[1][2:4])
    for divergence in ("forward_kl", "jsd", "reverse_kl"):
        spec = DistillSpec(divergence=divergence, js_threshold=2.0)
        check_loss(logits_RV, (teachers[0], apart), labels_R, spec)


def test_empty_supports_and_mass_above_one():
    logits_RV, teachers, labels_R = case()
    empty = teachers[0]._replace(
        ids_RK=torch.full_like(teachers[0].ids_RK, -1),
        logp_RK=torch.full_like(teachers[0].logp_RK, -torch.inf),
    )
    more = teachers[0]._replace(logp_RK=teachers[0].logp_RK + 1e-3)
    check_loss(logits_RV, (empty, empty), labels_R, DistillSpec())
    check_loss(logits_RV, (more, teachers[1]), labels_R, DistillSpec())
    check_loss(logits_RV, (empty, teachers[1]), labels_R, DistillSpec(js_threshold=2.0))


def test_supports_too_wide_for_one_table():
    logits_RV, teachers, labels_R = case(num_rows=2, vocab=700, kept=140)
    check_loss(logits_RV, teachers, labels_R, DistillSpec())


def test_strided_expanded_and_empty_rows():
    logits_RV, teachers, labels_R = case()
    spec = DistillSpec()
    apart_RV = torch.empty(5, 320)[:, :300].copy_(logits_RV)
    expected, gradient_RV = run(logits_RV, teachers, labels_R, spec, impl="triton")
    for same_RV in (apart_RV, logits_RV.T.contiguous().T):
        leaf_RV = same_RV.detach().requires_grad_()
        output = distill_loss(leaf_RV, teachers, labels_R, spec, impl="triton")
        output.loss.backward()
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(leaf_RV.grad, gradient_RV)
    one_V = logits_RV[0].clone().requires_grad_()
    expanded_RV = one_V.expand(5, -1)
    distill_loss(expanded_RV, teachers, labels_R, spec, inplace=True, impl="triton").loss.backward()
    assert torch.equal(one_V, logits_RV[0])
    none = [SparseTeacher(*(None if x is None else x[:0] for x in t)) for t in teachers]
    leaf_RV = logits_RV[:0].requires_grad_()
    output = distill_loss(leaf_RV, none, labels_R[:0], spec, impl="triton")
    output.loss.backward()
    assert output.loss == 0
    assert leaf_RV.grad.shape == (0, 300)


def test_in_place_gradients_are_safe_for_autograd():
    logits_RV, teachers, labels_R = case()
    weight = torch.ones(300, requires_grad=True)
    scaled_RV = logits_RV * weight
    normalised_RV = scaled_RV.exp()  # saves its own result, not what is overwritten
    loss = distill_loss(scaled_RV, teachers, labels_R, DistillSpec(), inplace=True, impl="triton")
    (loss.loss + normalised_RV.sum() * 0).backward()
    assert weight.grad is not None
    kept_RV = (logits_RV * weight).exp()  # saved for exp's backward pass, and overwritten
    loss = distill_loss(kept_RV, teachers, labels_R, DistillSpec(), inplace=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.loss.backward()


def test_a_second_backward_pass_and_a_double_one_are_refused():
    logits_RV, teachers, labels_R = case()
    for inplace in (True, False):
        leaf_RV = logits_RV.clone().requires_grad_()
        options = {"inplace": inplace, "impl": "triton"}
        loss = distill_loss(leaf_RV, teachers, labels_R, DistillSpec(), **options).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        leaf_RV = logits_RV.clone().requires_grad_()
        loss = distill_loss(leaf_RV, teachers, labels_R, DistillSpec(), **options).loss
        (gradient_RV,) = torch.autograd.grad(loss, leaf_RV, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient_RV.sum().backward()


@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is its own affair
def test_same_bits_each_time_and_compiled_whole():
    logits_RV, teachers, labels_R = case()

    def loss(leaf_RV):
        return distill_loss(leaf_RV * 1.0, teachers, labels_R, DistillSpec(), impl="triton").loss

    gradients = []
    for function in (loss, loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf_RV = logits_RV.clone().requires_grad_()
        (2.0 * function(leaf_RV)).backward()
        gradients.append(leaf_RV.grad)
    assert torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_a_per_token_vector_of_losses_by_weighting_num_items():
    logits_RV, teachers, labels_R = case()
    spec, options = DistillSpec(), {"impl": "triton"}
    whole, gradient_RV = run(logits_RV, teachers, labels_R, spec, num_items=10.0, **options)
    parts = torch.zeros_like(gradient_RV)
    total = 0.0
    for rows in (slice(0, 2), slice(2, 5)):  # gradient accumulation
        some = [SparseTeacher(*(None if x is None else x[rows] for x in t)) for t in teachers]
        items = torch.tensor(10)
        part, parts[rows] = run(
            logits_RV[rows], some, labels_R[rows], spec, num_items=items, **options
        )
        total += part.loss
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(parts, gradient_RV)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 2},
        {"chunk": 3, "bias": True, "softcap": 5.0, "scale": 0.7},
        {"softcap": 3.0, "number": 1, "chunk": 4},
        {"frozen": True, "chunk": 2},
        {"dtype": torch.bfloat16, "chunk": 4, "bias": True},
        {"dtype": torch.bfloat16, "logits_dtype": torch.float32, "bias": True},
        {"dtype": torch.float16, "chunk": 4},
    ],
)
def test_linear_loss_matches_the_oracle(options):
    options = dict(options)
    dtype, bias = options.pop("dtype", torch.float32), options.pop("bias", False)
    frozen, number = options.pop("frozen", False), options.pop("number", 2)
    _, teachers, labels_R = case(num_rows=7, number=number)
    draw = generator(1)
    hidden_RD = torch.randn(7, 16, generator=draw).to(dtype).requires_grad_()
    weight_VD = (0.5 * torch.randn(300, 16, generator=draw)).to(dtype).requires_grad_(not frozen)
    bias_V = torch.randn(300, generator=draw).to(dtype).requires_grad_() if bias else None
    check_linear(
        hidden_RD, weight_VD, teachers, labels_R, DistillSpec(js_threshold=0.05), bias_V=bias_V,
        tolerance=2e-4 if dtype == torch.float32 else 4e-2, **options,
    )  # fmt: skip


def test_linear_loss_without_any_position_that_counts():
    _, teachers, _ = case()
    hidden_RD = torch.randn(5, 16, requires_grad=True)
    weight_VD = torch.randn(300, 16, requires_grad=True)
    labels_R = torch.full((5,), -100)
    output = check_linear(hidden_RD, weight_VD, teachers, labels_R, DistillSpec(), tolerance=1e-6)
    assert output.loss == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 600), (1024, 128)])
def test_sums_are_narrowed_in_the_memory_they_lie_in(shape):
    from logitcache_kernels.linear_fused import _narrow

    sums = torch.randn(*shape, generator=generator(0))
    expected = sums.to(torch.bfloat16)
    found = _narrow(sums, torch.bfloat16)
    assert torch.equal(found, expected)
    assert found.untyped_storage().data_ptr() == sums.untyped_storage().data_ptr()


def test_launch_settings_fit_every_vocabulary_and_the_registers() -> None:
    import triton

    from logitcache_kernels.distill_launch import gpu_config

    vocabularies = (1, 1000, 32000, 151936, 229376, 229377, 262208, 786433, 2**20)
    for vocab, *kind in product(vocabularies, (False, True), (False, True)):
        config = gpu_config(vocab, *kind)
        threads = 32 * config.warps
        slices = triton.cdiv(vocab, config.tile * config.tiles)
        assert triton.next_power_of_2(slices) < threads, (vocab, kind)
        assert config.warps > 1, "a reduction within a warp is no barrier"
        assert config.per_multiprocessor * threads * config.registers <= 65536


class _Stop(torch.autograd.Function):
    """Passes a loss on, and nothing back."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        return None


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_no_gradient_comes_of_one_that_is_not_there(impl: str) -> None:
    logits_RV, teachers, labels_R = case()
    logits_RV.requires_grad_()
    loss = distill_loss(logits_RV, teachers, labels_R, DistillSpec(), impl=impl).loss
    _Stop.apply(loss).backward()
    assert logits_RV.grad is None


@pytest.mark.parametrize("num_rows", [1, 8191, 8192, 8193])
def test_positions_kept_are_those_that_are_not_skipped(num_rows: int) -> None:
    from logitcache_kernels.distill_launch import positions_kept

    generator = torch.Generator().manual_seed(num_rows)
    for skipped in (0.0, 0.3, 1.0):
        strategy_R = torch.randint(0, 3, (num_rows,), generator=generator, dtype=torch.int8)
        strategy_R[torch.rand(num_rows, generator=generator) < skipped] = 3
        index_R, count = positions_kept(strategy_R)
        (expected,) = (strategy_R != 3).nonzero(as_tuple=True)
        assert int(count) == len(expected)
        assert index_R[: len(expected)].tolist() == expected.tolist()
        assert (index_R[len(expected) :] == 0).all()
