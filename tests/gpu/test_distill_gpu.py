"""The fused losses compiled for the GPU: against the oracle in float64, at real sizes."""

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from distill_checks import (
    assert_output,
    assert_within,
    check_linear,
    check_loss,
    random_spec,
    run,
    two_teachers,
    wide,
)

from logitcache_kernels import DistillSpec, SparseTeacher, distill_loss, linear_distill_loss

pytestmark = [
    pytest.mark.gpu,
    # Said whenever the mode is set, by which a test sees that nothing waits for the GPU.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]


def generator(seed):
    return torch.Generator("cuda").manual_seed(seed)


def case(seed=0, num_rows=24, vocab=32000, kept=64, temperature=2.0, dtype=torch.bfloat16, **more):
    logits_RV, teachers, labels_R = two_teachers(
        num_rows, vocab, kept, temperature, generator(seed), **more
    )
    return logits_RV.to(dtype), teachers, labels_R


# Vocabularies of Llama 2, SmolLM2, Llama 3, Qwen 2.5, Gemma; 50257 and 128257 have rows that no
# vector load may assume aligned, 32001 ends one past a tile, 1000 is less than a tile.
@pytest.mark.parametrize(
    "vocab", [1000, 32000, 32001, 49152, 50257, 128256, 128257, 151936, 262144]
)
def test_every_vocabulary(vocab):
    check_loss(*case(num_rows=12, vocab=vocab), DistillSpec(), tolerance=1e-4)


# Rows of Gemma 3 in float32, and of the largest vocabulary that a store takes.
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(262208, torch.float32), (2**20, torch.bfloat16), (2**20, torch.float32)]
)
def test_very_large_vocabularies(vocab, dtype):
    check_loss(*case(num_rows=6, vocab=vocab, dtype=dtype), DistillSpec(), tolerance=1e-4)


@pytest.mark.parametrize("vocab", [32000, 151936])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 3.0, 4.0, 2.5])
def test_every_temperature(vocab, temperature):
    case_ = case(num_rows=12, vocab=vocab, temperature=temperature)
    check_loss(*case_, DistillSpec(temperature=temperature), tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept", [1, 16, 128, 250])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_every_dtype_divergence_and_support(dtype, kept, divergence):
    case_ = case(num_rows=12, vocab=5000, kept=kept, dtype=dtype)
    check_loss(*case_, DistillSpec(divergence=divergence, gamma=0.2), factor=0.37, tolerance=1e-4)


@pytest.mark.parametrize("seed", range(25))
def test_options_at_random(seed):
    draw = random.Random(seed)
    sampled = draw.random() < 0.4
    spec = random_spec(draw.choice, sampled)
    logits_RV, teachers, labels_R = case(
        seed, 12, draw.choice([1000, 5000]), draw.choice([8, 40]), spec.temperature,
        draw.choice([torch.float32, torch.bfloat16]), sampled=sampled,
        number=draw.choice([1, 2, 2]),
    )  # fmt: skip
    options = {}
    if draw.random() < 0.6:
        options["taboo_ids"] = torch.tensor([3, int(teachers[0].ids_RK[0, 0])], device="cuda")
        options["taboo_RK"] = torch.stack((teachers[-1].ids_RK[:, 2], labels_R.int()), dim=1)
    if draw.random() < 0.5:
        options["gold_R"] = torch.arange(12, device="cuda") % 3 != 0
    check_loss(
        logits_RV, teachers, labels_R, spec, inplace=draw.random() < 0.5, tolerance=1e-4, **options
    )


# The numbers are the rows of the table of other kernels' errors in docs/kernels.md.
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 1 - 1e-6])
def test_1_gradient_of_a_sure_gold_label_keeps_its_precision(probability):
    _, teachers, _ = case(num_rows=2)
    # float32: bf16 logits cannot say 1 - 1e-6; what is stored in bf16 is the gradient below.
    logits_RV = torch.full((2, 32000), 0.0, device="cuda")
    logits_RV += torch.tensor((1 - probability) / probability / 31999).log()
    logits_RV[:, 150] = 0.0
    labels_R = torch.full((2,), 150, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        spec = DistillSpec(alpha=1.0, beta=0.0)
        rounded_RV = logits_RV.to(dtype)
        _, exact_RV = run(rounded_RV.double(), wide(teachers), labels_R, spec, impl="eager")
        _, found_RV = run(rounded_RV, teachers, labels_R, spec, inplace=True)
        torch.testing.assert_close(found_RV[:, 150].double(), exact_RV[:, 150], rtol=2**-8, atol=0)


@pytest.mark.parametrize("factor", [0.37, 0.0, -3.0])
def test_2_any_incoming_gradient(factor):
    logits_RV, teachers, labels_R = case()
    if factor:
        check_loss(logits_RV, teachers, labels_R, DistillSpec(), factor=factor)
    leaf_RV = logits_RV.clone().requires_grad_()
    (factor * distill_loss(leaf_RV, teachers, labels_R, DistillSpec()).loss).backward()
    assert torch.isfinite(leaf_RV.grad).all()
    assert (factor != 0) == bool(leaf_RV.grad.any())


def test_3_parts_of_a_batch_add_up_to_the_whole():
    logits_RV, teachers, labels_R = case(dtype=torch.float32)
    whole, gradient_RV = run(logits_RV, teachers, labels_R, DistillSpec(), num_items=20)
    parts, total = torch.zeros_like(gradient_RV), 0.0
    for rows in (slice(0, 7), slice(7, 24)):
        some = [SparseTeacher(*(None if x is None else x[rows] for x in t)) for t in teachers]
        items = torch.tensor(20, device="cuda")
        part, parts[rows] = run(
            logits_RV[rows], some, labels_R[rows], DistillSpec(), num_items=items
        )
        total += part.loss
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(parts, gradient_RV, rtol=1e-5, atol=1e-9)


def test_4_more_than_two_to_the_31_elements():
    num_rows, vocab = 16384, 151936
    logits_RV = torch.randn(num_rows, vocab, device="cuda", dtype=torch.bfloat16)
    some_RV, teachers, labels_R = case(num_rows=8, vocab=vocab)
    labels_R[:] = labels_R.clamp_min(0)
    last = slice(num_rows - 8, num_rows)
    logits_RV[last] = some_RV
    tiled = [SparseTeacher(*(None if x is None else x.repeat(2048, *[1] * (x.ndim - 1)) for x in t))
             for t in teachers]  # fmt: skip
    output = distill_loss(
        logits_RV.requires_grad_(), tiled, labels_R.repeat(2048), DistillSpec(), inplace=True
    )
    output.loss.backward()
    exact, exact_RV = run(
        some_RV.double(), wide(teachers), labels_R, DistillSpec(), impl="eager", num_items=num_rows
    )
    _, eager_RV = run(
        some_RV.float(), teachers, labels_R, DistillSpec(), impl="eager", num_items=num_rows
    )
    assert_within(logits_RV.grad[last], exact_RV, eager_RV, 2**-8)
    torch.testing.assert_close(output.kd_R[last].double(), exact.kd_R, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [151936, 50257, 32001, 128257])
def test_5_what_lies_behind_a_row_is_neither_read_nor_written(vocab):
    logits_RV, teachers, labels_R = case(num_rows=8, vocab=vocab)
    for poison in (torch.inf, torch.nan):
        room_RV = torch.full((8, vocab + 64), poison, device="cuda", dtype=torch.bfloat16)
        room_RV[:, :vocab] = logits_RV
        view_RV = room_RV[:, :vocab].detach().requires_grad_()
        output = distill_loss(view_RV, teachers, labels_R, DistillSpec(), inplace=True)
        (gradient_RV,) = torch.autograd.grad(output.loss, view_RV)
        exact, _ = run(logits_RV.double(), wide(teachers), labels_R, DistillSpec(), impl="eager")
        assert_output(output, exact, 1e-4)
        assert torch.isfinite(gradient_RV).all()
        rest = room_RV[:, vocab:]
        assert rest.isnan().all() if poison != poison else rest.isposinf().all()


def test_6_logits_of_minus_ten_thousand():
    logits_RV, teachers, labels_R = case(dtype=torch.float32)
    check_loss(logits_RV - 1e4, teachers, labels_R, DistillSpec(), tolerance=1e-3)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_7_disjoint_teachers_with_hopeless_entries(divergence):
    logits_RV, teachers, labels_R = case()
    ids_RK = torch.where(teachers[0].ids_RK < 0, -1, (teachers[0].ids_RK + 150) % 32000)
    ids_RK = torch.where((ids_RK[:, :, None] == teachers[0].ids_RK[:, None]).any(-1), -1, ids_RK)
    logp_RK = torch.where(ids_RK < 0, -torch.inf, torch.full_like(teachers[0].logp_RK, -120.0))
    apart = SparseTeacher(ids_RK, logp_RK, *teachers[1][2:4])
    spec = DistillSpec(divergence=divergence, js_threshold=2.0)
    check_loss(logits_RV, (teachers[0], apart), labels_R, spec, tolerance=1e-4)


def test_8_in_place_is_known_to_autograd():
    logits_RV, teachers, labels_R = case()
    leaf_RV = logits_RV.clone().requires_grad_()
    version = leaf_RV._version
    loss = distill_loss(leaf_RV, teachers, labels_R, DistillSpec(), inplace=True).loss
    assert leaf_RV._version > version
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = distill_loss(logits_RV.clone().requires_grad_(), teachers, labels_R, DistillSpec()).loss
    saved_RV = (logits_RV.float().requires_grad_() * 1.0).exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distill_loss(saved_RV, teachers, labels_R, DistillSpec(), inplace=True).loss.backward()


def test_9_nothing_waits_for_the_gpu_and_a_graph_captures_it():
    logits_RV, teachers, labels_R = case()
    spec = DistillSpec()
    expected, gradient_RV = run(logits_RV, teachers, labels_R, spec, inplace=True)
    static_RV = logits_RV.clone()
    taboo_ids = torch.tensor([5, 7], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for more in ({}, {"num_items": 20.0}, {"taboo_ids": taboo_ids, "inplace": True}):
            leaf_RV = logits_RV.clone().requires_grad_()
            distill_loss(leaf_RV, teachers, labels_R, spec, **more).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(logits_RV, teachers, labels_R, spec, inplace=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        leaf_RV = static_RV.detach().requires_grad_()  # the same memory
        output = distill_loss(leaf_RV, teachers, labels_R, spec, inplace=True)
        (captured_RV,) = torch.autograd.grad(output.loss, leaf_RV)
    for _ in range(2):
        static_RV.copy_(logits_RV)
        graph.replay()
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(captured_RV, gradient_RV)


@pytest.mark.filterwarnings("ignore")  # what the compiler warns of is its own affair
def test_11_compiles_into_one_graph():
    logits_RV, teachers, labels_R = case()

    def loss(leaf_RV):
        return distill_loss(leaf_RV * 1.0, teachers, labels_R, DistillSpec(), inplace=True).loss

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf_RV = logits_RV.clone().requires_grad_()
        (2.0 * function(leaf_RV)).backward()
        gradients.append(leaf_RV.grad)
    torch.testing.assert_close(*gradients)


def test_14_the_same_bits_each_time():
    logits_RV, teachers, labels_R = case(num_rows=300, vocab=151936)
    first, first_RV = run(logits_RV, teachers, labels_R, DistillSpec(), inplace=True)
    for _ in range(3):
        output, gradient_RV = run(logits_RV, teachers, labels_R, DistillSpec(), inplace=True)
        assert torch.equal(gradient_RV, first_RV)
        assert torch.equal(output.loss, first.loss)


def test_15_ids_outside_the_vocabulary_gold_in_the_support_and_empty_lists():
    logits_RV, teachers, labels_R = case()
    ids_RK = teachers[0].ids_RK.clone()
    ids_RK[:, 5] = 32000
    ids_RK[:, 6] = 2**30
    odd = teachers[0]._replace(ids_RK=ids_RK)
    labels_R[0], labels_R[1] = ids_RK[0, 0].long(), teachers[1].ids_RK[1, 60].long()
    labels_R[3] = 32000  # outside: not gold
    empty = teachers[0]._replace(
        ids_RK=torch.full_like(ids_RK, -1), logp_RK=torch.full_like(odd.logp_RK, -torch.inf)
    )
    more = teachers[0]._replace(logp_RK=teachers[0].logp_RK + 1e-3)  # adds up to more than 1
    for pair in ((odd, teachers[1]), (empty, empty), (empty, teachers[1]), (more, teachers[1])):
        check_loss(logits_RV, pair, labels_R, DistillSpec(js_threshold=0.5), tolerance=1e-4)


def test_16_strided_expanded_and_no_rows():
    logits_RV, teachers, labels_R = case()
    expected, gradient_RV = run(logits_RV, teachers, labels_R, DistillSpec())
    leaf_RV = logits_RV.T.contiguous().T.requires_grad_()
    output = distill_loss(leaf_RV, teachers, labels_R, DistillSpec())
    (found_RV,) = torch.autograd.grad(output.loss, leaf_RV)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(found_RV, gradient_RV)
    one_V = logits_RV[0].clone().requires_grad_()
    spread_RV = one_V.expand(24, -1)
    distill_loss(spread_RV, teachers, labels_R, DistillSpec(), inplace=True).loss.backward()
    assert torch.equal(one_V, logits_RV[0])
    assert torch.isfinite(one_V.grad).all()
    none = [SparseTeacher(*(None if x is None else x[:0] for x in t)) for t in teachers]
    leaf_RV = logits_RV[:0].requires_grad_()
    distill_loss(leaf_RV, none, labels_R[:0], DistillSpec()).loss.backward()
    assert leaf_RV.grad.shape == (0, 32000)


def linear_case(num_rows=200, vocab=5000, width=128, dtype=torch.bfloat16, seed=0, **more):
    draw = generator(seed + 100)
    _, teachers, labels_R = two_teachers(num_rows, vocab, 32, 2.0, draw, **more)
    hidden_RD = torch.randn(num_rows, width, device="cuda", generator=draw)
    weight_VD = 0.2 * torch.randn(vocab, width, device="cuda", generator=draw)
    return (
        hidden_RD.to(dtype).requires_grad_(),
        weight_VD.to(dtype).requires_grad_(),
        teachers,
        labels_R,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 64},
        {"chunk": 64, "bias": True, "softcap": 30.0, "scale": 0.5},
        {"vocab": 5001, "chunk": 33},
        {"number": 1, "logits_dtype": torch.float32, "bias": True},
        {"frozen": True, "chunk": 64, "dtype": torch.float16},
    ],
)
def test_linear_loss_matches_the_oracle(options):
    options = dict(options)
    bias, frozen = options.pop("bias", False), options.pop("frozen", False)
    shape = {key: options.pop(key) for key in ("vocab", "number", "dtype") if key in options}
    hidden_RD, weight_VD, teachers, labels_R = linear_case(**shape)
    weight_VD.requires_grad_(not frozen)
    bias_V = None
    if bias:
        bias_V = torch.randn(len(weight_VD), device="cuda", dtype=hidden_RD.dtype).requires_grad_()
    spec = DistillSpec(js_threshold=0.05)
    check_linear(
        hidden_RD, weight_VD, teachers, labels_R, spec, bias_V=bias_V, tolerance=4e-2, **options
    )


def test_12_linear_loss_under_autocast_with_accumulation_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    hidden_RD, weight_VD, teachers, labels_R = linear_case(dtype=torch.float32)
    gradients = []
    for checkpointed in (False, True):
        weight_VD.grad = None

        def loss(x):
            narrow = x.bfloat16()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return linear_distill_loss(
                    narrow, weight_VD, teachers, labels_R, DistillSpec(), chunk=64
                ).loss

        for _ in range(2):
            value = (
                checkpoint(loss, hidden_RD, use_reentrant=False)
                if checkpointed
                else loss(hidden_RD)
            )
            (0.5 * value).backward()
        assert weight_VD.grad.dtype == torch.float32
        gradients.append(weight_VD.grad)
    torch.testing.assert_close(*gradients)
    exact = check_linear(
        hidden_RD.detach().bfloat16().requires_grad_(), weight_VD.detach().bfloat16(), teachers,
        labels_R, DistillSpec(), tolerance=4e-2,
    )  # fmt: skip
    assert torch.isfinite(exact.loss)


def test_linear_loss_of_nothing_and_inside_a_graph():
    hidden_RD, weight_VD, teachers, labels_R = linear_case()
    nothing = linear_distill_loss(
        hidden_RD, weight_VD, teachers, torch.full_like(labels_R, -100), DistillSpec()
    )
    nothing.loss.backward()
    assert nothing.loss == 0
    assert not weight_VD.grad.any()

    def step():
        # Leaves of its own: autograd would wait for the stream that older ones were made on.
        leaves = [x.detach().requires_grad_() for x in (hidden_RD, weight_VD)]
        output = linear_distill_loss(*leaves, teachers, labels_R, DistillSpec())
        return output, torch.autograd.grad(output.loss, leaves)

    expected, expected_grads = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, grads = step()
    graph.replay()
    torch.testing.assert_close(output.loss, expected.loss)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))
