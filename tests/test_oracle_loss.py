"""The eager distillation loss against the dense formulation, and against facts known by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from dense_reference import Batch, dense_loss, make_batch, sparse

from logitcache_kernels import DistillOutput, DistillSpec, SparseTeacher, capture, distill_loss

TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 4.0)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
WEIGHTS = {"alpha": 0.3, "beta": 0.7, "gamma": 0.4}
BLENDED, T1_ONLY, GOLD_FALLBACK, SKIP = range(4)
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(batch: Batch, spec: DistillSpec, *, num_teachers: int = 2, taboo=None, **options):
    """Run both formulations; assert equal loss, gradient and diagnostics; give the oracle's output.

    taboo: (ids for all, one set per position). options go to distill_loss.
    """
    teachers = batch.teachers[:num_teachers]
    everywhere, each = taboo if taboo is not None else ([], [set()] * len(batch.labels))
    if taboo is not None:
        width = max(len(s) for s in each)
        rows = [[*sorted(s), *([-1] * (width - len(s)))] for s in each]
        options["taboo_ids"] = torch.tensor(everywhere)
        options["taboo_RK"] = torch.tensor(rows, dtype=torch.int32)
    z1 = batch.logits_RV.clone().requires_grad_()
    z2 = batch.logits_RV.clone().requires_grad_()
    gold_R = options.pop("gold_R", torch.tensor(batch.gold))
    out = distill_loss(z1, teachers, torch.tensor(batch.labels), spec, gold_R=gold_R, **options)
    expected = dense_loss(
        z2,
        teachers,
        batch.labels,
        spec,
        gold=None if gold_R is None else gold_R.tolist(),
        taboo=[s | set(everywhere) for s in each],
        num_items=options.get("num_items"),
    )
    out.loss.backward()
    expected.loss.backward()
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(out.loss, expected.loss, **close)
    torch.testing.assert_close(z1.grad, z2.grad, **close)
    assert torch.isfinite(z1.grad).all()
    assert out.strategy_R.dtype == torch.int8
    assert out.strategy_R.tolist() == expected.strategy
    for name in ("js", "kd", "ce", "weight"):
        value = getattr(out, f"{name}_R")
        wanted = torch.tensor(getattr(expected, name), dtype=torch.float64)
        torch.testing.assert_close(value, wanted, **close, msg=lambda m, name=name: f"{name}: {m}")
        assert not value.requires_grad
    return out


def teacher(probabilities, temperature=1.0, support=None, **options) -> SparseTeacher:
    """A teacher from rows of probabilities, all tokens kept unless a support is given."""
    logp_RV = torch.tensor(probabilities, dtype=torch.float64).log()
    tokens = list(range(logp_RV.shape[1])) if support is None else support
    return sparse(logp_RV, [tokens] * len(logp_RV), temperature, junk=False, **options)


def gradient(logits_RV, *args, **options) -> torch.Tensor:
    z = logits_RV.detach().clone().requires_grad_()
    distill_loss(z, *args, **options).loss.backward()
    return z.grad


# --- against the dense formulation -------------------------------------------------------------


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_topk_supports_equal_the_dense_formulation(temperature, divergence, tail):
    spec = DistillSpec(temperature, divergence=divergence, tail=tail, jsd_beta=0.3, **WEIGHTS)
    out = compare(make_batch(1, temperature), spec)
    assert set(out.strategy_R.tolist()) == {BLENDED, T1_ONLY, GOLD_FALLBACK, SKIP}


@pytest.mark.parametrize("support", ["random", "disjoint"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_random_and_disjoint_supports_equal_the_dense_formulation(divergence, support):
    spec = DistillSpec(1.5, divergence=divergence, js_threshold=0.3, **WEIGHTS)
    compare(make_batch(2, 1.5, support=support, kinds=(6, 4)), spec)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sampled_supports_equal_the_dense_formulation(temperature):
    out = compare(make_batch(3, temperature, sampled=True), DistillSpec(temperature, **WEIGHTS))
    assert set(out.strategy_R.tolist()) == {BLENDED, T1_ONLY, GOLD_FALLBACK, SKIP}
    spec = DistillSpec(temperature, js_threshold=0.4, **WEIGHTS)
    compare(make_batch(4, temperature, sampled=True, support="random"), spec)


@pytest.mark.parametrize(
    ("sampled", "divergence"), [(False, d) for d in DIVERGENCES] + [(True, "forward_kl")]
)
def test_one_teacher_equals_the_dense_formulation(sampled, divergence):
    batch = make_batch(5, 2.0, sampled=sampled)
    out = compare(batch, DistillSpec(divergence=divergence, **WEIGHTS), num_teachers=1)
    ignored = torch.tensor(batch.labels) == -100
    assert (out.strategy_R[~ignored] == T1_ONLY).all()
    assert (out.strategy_R[ignored] == SKIP).all()
    assert (out.js_R == 0).all()


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (case, mode)
        for case in ("forward_kl", "reverse_kl", "jsd", "renormalise", "sampled")
        for mode in ("target", "neutral")
        if (case, mode) != ("reverse_kl", "target")  # refused: its value would be infinite
    ],
)
def test_taboo_ids_equal_the_dense_formulation(case, mode):
    options = {"divergence": case} if case in DIVERGENCES else {}
    if case == "renormalise":
        options["tail"] = case
    batch = make_batch(6, 1.5, sampled=case == "sampled")
    # Labels among them; rows with many, with one, with none, with one that is taboo for all.
    each = [{batch.labels[0]}, {1, 2, 3}, {batch.labels[2], 12}, set()] * 4
    each = each[: len(batch.labels)]
    spec = DistillSpec(1.5, taboo=mode, **options, **WEIGHTS)
    compare(batch, spec, taboo=([0, 4, 9, 12, 99], each))


@pytest.mark.parametrize("taboo", ["none", "target"])
def test_student_without_masked_tokens_equals_the_dense_formulation(taboo):
    batch = make_batch(7, 3.0, student_masks=False)
    each = [{r % 13} for r in range(len(batch.labels))]
    compare(batch, DistillSpec(3.0, **WEIGHTS), taboo=None if taboo == "none" else ([5], each))


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_entropy_confidence_equals_the_dense_formulation(threshold):
    spec = DistillSpec(confidence="entropy", confidence_threshold=threshold, **WEIGHTS)
    out = compare(make_batch(8, 2.0), spec)
    top1 = compare(make_batch(8, 2.0), DistillSpec(confidence_threshold=threshold, **WEIGHTS))
    assert not torch.equal(out.kd_R, top1.kd_R)


def test_gold_mask_and_its_absence_equal_the_dense_formulation():
    batch, spec = make_batch(9, 2.0), DistillSpec(**WEIGHTS)
    masked = compare(batch, spec)
    every = compare(batch, spec, gold_R=None)
    none = compare(batch, spec, gold_R=torch.zeros(len(batch.labels), dtype=torch.bool))
    assert (none.ce_R == 0).all()
    assert GOLD_FALLBACK not in none.strategy_R.tolist()
    fallbacks = [(x.strategy_R == GOLD_FALLBACK).sum() for x in (none, masked, every)]
    assert fallbacks[0] < fallbacks[1] < fallbacks[2]


def test_thresholds_and_gold_weight_equal_the_dense_formulation():
    batch = make_batch(10, 2.0)
    for js, conf, weight in [(0.0, 0.5, 0.25), (2.0, 0.9, 0.5), (0.1, 1.0, 0.0), (0.01, 0.0, 2.0)]:
        compare(batch, DistillSpec(js_threshold=js, confidence_threshold=conf, gold_weight=weight))


def test_num_items_divides_the_sum():
    batch, spec = make_batch(11, 2.0), DistillSpec(**WEIGHTS)
    by_count = compare(batch, spec)
    by_number = compare(batch, spec, num_items=37)
    valid = sum(y != -100 for y in batch.labels)
    assert valid < len(batch.labels)
    torch.testing.assert_close(by_count.loss * valid, by_number.loss * 37)


def test_micro_batches_add_up_to_the_whole_batch():
    batch, spec = make_batch(12, 2.0), DistillSpec(**WEIGHTS)
    labels, gold = torch.tensor(batch.labels), torch.tensor(batch.gold)
    whole = gradient(batch.logits_RV, batch.teachers, labels, spec, gold_R=gold)
    valid = (labels != -100).sum()
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, None)):
        teachers = [
            SparseTeacher(*(x if x is None else x[rows] for x in t)) for t in batch.teachers
        ]
        z = batch.logits_RV[rows]
        parts.append(gradient(z, teachers, labels[rows], spec, gold_R=gold[rows], num_items=valid))
    torch.testing.assert_close(torch.cat(parts), whole)


# --- gradients against finite differences ------------------------------------------------------


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "sampled"])
@pytest.mark.parametrize("weights", list(itertools.product((0.0, 0.3), (0.0, 0.7), (0.0, 0.4)))[1:])
def test_every_weight_combination_passes_gradcheck(weights, divergence):
    sampled = divergence == "sampled"
    batch = make_batch(13, 1.5, vocab_size=8, kinds=(3, 4), repeats=1, sampled=sampled)
    alpha, beta, gamma = weights
    spec = DistillSpec(
        1.5,
        alpha,
        beta,
        gamma,
        divergence="forward_kl" if sampled else divergence,
        js_threshold=0.2,
    )
    taboo = torch.tensor([6]) if divergence != "reverse_kl" else None

    def loss(z):
        labels, gold = torch.tensor(batch.labels), torch.tensor(batch.gold)
        return distill_loss(z, batch.teachers, labels, spec, gold_R=gold, taboo_ids=taboo).loss

    # Masked logits stay out of it: a step from minus infinity is no step.
    z_RV = batch.logits_RV.clone()
    free = torch.isfinite(z_RV)
    x = z_RV[free].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss(z_RV.masked_scatter(free, x)),
        (x,),
        eps=1e-6,
        atol=1e-7,
        fast_mode=sum(weights) < 1,
    )


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "none"])
def test_tails_pass_gradcheck(tail):
    batch = make_batch(14, 2.0, vocab_size=8, kinds=(3, 4), repeats=1, student_masks=False)
    for divergence, mode in itertools.product(DIVERGENCES, ("target", "neutral")):
        if (divergence, mode) == ("reverse_kl", "target"):
            continue
        spec = DistillSpec(divergence=divergence, tail=tail, taboo=mode, **WEIGHTS)

        def loss(z, spec=spec):
            labels = torch.tensor(batch.labels)
            return distill_loss(z, batch.teachers, labels, spec, taboo_ids=torch.tensor([2])).loss

        z = batch.logits_RV.clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, (z,), eps=1e-6, atol=1e-7, fast_mode=True)


# --- the gate ----------------------------------------------------------------------------------


def gate(p1, p2, **options) -> DistillOutput:
    first = teacher([p1], support=options.pop("support1", None))
    second = teacher([p2], support=options.pop("support2", None))
    z = torch.zeros(1, len(p1), dtype=torch.float64)
    return distill_loss(z, (first, second), torch.tensor([0]), DistillSpec(1.0, **options))


def test_js_is_in_bits_from_zero_for_identical_to_one_for_disjoint_teachers():
    assert float(gate([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]).js_R) == 0.0
    assert float(gate([0.4, 0.6, 0.0, 0.0], [0.0, 0.0, 0.7, 0.3]).js_R) == pytest.approx(1.0)


def test_js_measures_each_teacher_against_the_mean_and_not_the_reverse():
    # H(mean) - mean of H, with H(0.9, 0.1) = 0.468996 bits; swapped arguments would give 0.737.
    js = float(gate([0.9, 0.1], [0.1, 0.9]).js_R)
    assert js == pytest.approx(1 - 0.4689955935892812, abs=1e-12)


def test_js_lumps_what_neither_keeps_and_charges_what_only_one_keeps_to_the_others_tail():
    p = [0.6, 0.2, 0.1, 0.1]
    # S1 = {0, 1}, S2 = {0, 2}: (.6, .2, 0 | .2) against (.6, 0, .1 | .3).
    js = float(gate(p, p, support1=[0, 1], support2=[0, 2]).js_R)
    expected = 0.5 * (0.2 * 1 + 0.2 * math.log2(0.2 / 0.25) + 0.1 * 1 + 0.3 * math.log2(0.3 / 0.25))
    assert js == pytest.approx(expected, abs=1e-12)


def test_gate_sees_certain_entries_only():
    full = teacher([[0.7, 0.2, 0.05, 0.05]])
    drawn = full._replace(inclusion_RK=torch.tensor([[1.0, 1.0, 0.5, 0.25]]).double())
    other = teacher([[0.6, 0.2, 0.15, 0.05]])
    other = other._replace(inclusion_RK=torch.tensor([[1.0, 0.5, 0.5, 0.25]]).double())
    z, label = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0])
    js = float(distill_loss(z, (drawn, other), label, DistillSpec(1.0)).js_R)
    a, b = (0.7, 0.2, 0.1), (0.6, 0.0, 0.4)  # two certain tokens and the tail
    m = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    terms = [x * math.log2(x / c) for p in (a, b) for x, c in zip(p, m, strict=True) if x > 0]
    assert js == pytest.approx(sum(terms) / 2, abs=1e-12)


def test_strategy_is_decided_per_position():
    sure, unsure, other = [0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.0, 0.1, 0.9]
    first = teacher([sure, sure, unsure, unsure, unsure])
    second = teacher([sure, other, other, other, other])
    labels, gold = torch.tensor([0, 0, 1, 1, -100]), torch.tensor([True, True, True, False, True])
    z = torch.zeros(5, 3, dtype=torch.float64)
    out = distill_loss(z, (first, second), labels, DistillSpec(1.0), gold_R=gold)
    assert out.strategy_R.tolist() == [BLENDED, T1_ONLY, GOLD_FALLBACK, SKIP, SKIP]
    assert out.weight_R.tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert out.kd_R[2] == out.ce_R[2]


def test_js_threshold_zero_never_blends_and_above_one_always_does():
    p, q = [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]
    assert gate(p, p, js_threshold=0.0).strategy_R.item() != BLENDED
    assert gate(p, q, js_threshold=2.0).strategy_R.item() == BLENDED


def test_blend_weights_are_the_confidences():
    p1, p2 = [0.6, 0.3, 0.1], [0.5, 0.3, 0.2]
    z = torch.zeros(1, 3, dtype=torch.float64)
    spec = DistillSpec(1.0, alpha=0.0, beta=1.0, js_threshold=2.0)
    grad = gradient(z, (teacher([p1]), teacher([p2])), torch.tensor([0]), spec)
    blend = [(0.6 * a + 0.5 * b) / 1.1 for a, b in zip(p1, p2, strict=True)]
    torch.testing.assert_close(grad, torch.softmax(z, -1) - torch.tensor([blend]).double())


# --- the loss, where the answer is known -------------------------------------------------------


def full_case(temperature: float, seed: int = 0, vocab_size: int = 9):
    g = torch.Generator().manual_seed(seed)
    logp = torch.log_softmax(2 * torch.randn(1, vocab_size, generator=g, dtype=torch.float64), -1)
    z = torch.randn(1, vocab_size, generator=g, dtype=torch.float64)
    return logp, z, sparse(logp, [list(range(vocab_size))], temperature, junk=False)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_temperature_squared_is_on_the_gradient_of_the_divergence_and_not_on_ce(temperature):
    logp, z, full = full_case(temperature)
    label = torch.tensor([3])
    p_t, q_t = torch.softmax(logp / temperature, -1), torch.softmax(z / temperature, -1)
    only_kd = DistillSpec(temperature, alpha=0.0, beta=1.0)
    torch.testing.assert_close(gradient(z, (full,), label, only_kd), temperature * (q_t - p_t))
    only_ce = DistillSpec(temperature, alpha=1.0, beta=0.0)
    expected = torch.softmax(z, -1) - torch.nn.functional.one_hot(label, 9)
    torch.testing.assert_close(gradient(z, (full,), label, only_ce), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_of_a_full_support_are_the_textbook_ones(temperature):
    logp, z, full = full_case(temperature)
    log_p = torch.log_softmax(logp / temperature, -1)
    log_q = torch.log_softmax(z / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    b = 0.3
    log_m = (b * p + (1 - b) * q).log()
    expected = {
        "forward_kl": (p * (log_p - log_q)).sum(),
        "reverse_kl": (q * (log_q - log_p)).sum(),
        "jsd": b * (p * (log_p - log_m)).sum() + (1 - b) * (q * (log_q - log_m)).sum(),
    }
    assert expected["forward_kl"] != pytest.approx(float(expected["reverse_kl"]), rel=0.05)
    for divergence, value in expected.items():
        spec = DistillSpec(temperature, alpha=0.0, beta=1.0, divergence=divergence, jsd_beta=b)
        out = distill_loss(z, (full,), torch.tensor([0]), spec)
        assert float(out.kd_R) == pytest.approx(temperature**2 * float(value), rel=1e-10)
        assert out.loss.item() == pytest.approx(float(out.kd_R), rel=1e-12)


def test_gradient_outside_the_support_follows_the_ratio_of_tails():
    temperature = 2.0
    logp, z, _ = full_case(temperature)
    support = [1, 4, 6]
    top = sparse(logp, [support], temperature)
    spec = DistillSpec(temperature, alpha=0.0, beta=1.0)
    grad = gradient(z, (top,), torch.tensor([0]), spec)[0]
    p, q = torch.softmax(logp[0] / temperature, -1), torch.softmax(z[0] / temperature, -1)
    outside = [v for v in range(9) if v not in support]
    ratio = p[outside].sum() / q[outside].sum()
    torch.testing.assert_close(grad[outside], temperature * q[outside] * (1 - ratio))
    torch.testing.assert_close(grad[support], temperature * (q[support] - p[support]))


def test_student_equal_to_the_teacher_has_neither_loss_nor_gradient():
    logp, _, _ = full_case(2.0)
    top = sparse(logp, [[0, 2, 5]], 2.0)
    for divergence in DIVERGENCES:
        spec = DistillSpec(2.0, alpha=0.0, beta=1.0, divergence=divergence)
        z = (logp + 3.0).requires_grad_()
        out = distill_loss(z, (top,), torch.tensor([0]), spec)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(0.0, abs=1e-12)
        torch.testing.assert_close(z.grad, torch.zeros_like(z), rtol=0, atol=1e-12)


def test_agreement_term_pulls_to_teacher_one_without_temperature_squared():
    temperature = 2.0
    logp, z, full = full_case(temperature)
    other = sparse(torch.log_softmax(logp + 0.2 * z, -1), [list(range(9))], temperature)
    spec = DistillSpec(temperature, alpha=0.0, beta=0.0, gamma=1.0)
    x = z.clone().requires_grad_()
    out = distill_loss(x, (full, other), torch.tensor([0]), spec)
    assert out.strategy_R.item() == BLENDED
    assert 0 < float(out.js_R) < 0.1
    log_p = torch.log_softmax(logp / temperature, -1)
    kl = (log_p.exp() * (log_p - torch.log_softmax(z / temperature, -1))).sum()
    assert out.loss.item() == pytest.approx(float((1 - out.js_R) * kl), rel=1e-10)
    out = distill_loss(x, (full,), torch.tensor([0]), spec)  # one teacher: nothing to agree with
    assert out.loss.item() == 0.0


# --- taboo -------------------------------------------------------------------------------------


def test_taboo_target_pushes_the_student_off_and_neutral_leaves_it_alone():
    batch = make_batch(15, 2.0, student_masks=False)
    labels, taboo = torch.tensor(batch.labels), torch.tensor([2, 7])
    for mode in ("target", "neutral"):
        spec = DistillSpec(taboo=mode, **WEIGHTS)
        z = batch.logits_RV.clone().requires_grad_()
        out = distill_loss(z, batch.teachers, labels, spec, taboo_ids=taboo)
        out.loss.backward()
        live = (out.strategy_R == BLENDED) | (out.strategy_R == T1_ONLY)
        assert live.any()
        pushed = z.grad[live][:, taboo]
        assert (pushed > 0).all() if mode == "target" else (pushed == 0).all()


def test_taboo_target_is_renormalised_over_what_is_left():
    p, z = [[0.5, 0.3, 0.15, 0.05]], torch.zeros(1, 4, dtype=torch.float64)
    left = torch.tensor([[0.0, 0.6, 0.3, 0.1]]).double()
    spec = DistillSpec(1.0, alpha=0.0, beta=1.0)
    grad = gradient(z, (teacher(p),), torch.tensor([1]), spec, taboo_ids=torch.tensor([0]))
    torch.testing.assert_close(grad, torch.full((1, 4), 0.25).double() - left)
    neutral = DistillSpec(1.0, alpha=0.0, beta=1.0, taboo="neutral")
    grad = gradient(z, (teacher(p),), torch.tensor([1]), neutral, taboo_ids=torch.tensor([0]))
    student = torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3]]).double()
    torch.testing.assert_close(grad, student - left)


def test_sampled_taboo_target_is_renormalised_by_the_certain_taboo_mass():
    p, inclusion = [[0.5, 0.3, 0.15, 0.05]], torch.tensor([[1.0, 1.0, 0.5, 0.25]]).double()
    drawn = teacher(p)._replace(inclusion_RK=inclusion)
    z = torch.zeros(1, 4, dtype=torch.float64)
    spec = DistillSpec(1.0, alpha=0.0, beta=1.0)
    grad = gradient(z, (drawn,), torch.tensor([1]), spec, taboo_ids=torch.tensor([0, 2]))
    # 0.5 is certain and lost, 0.15 is not certain: what is left is 1 - 0.5.
    q = torch.tensor([[0.0, 0.3 / 0.5, 0.0, 0.05 / 0.5 / 0.25]]).double()
    torch.testing.assert_close(grad, q.sum() * 0.25 - q)


def test_taboo_gold_is_no_gold():
    batch, spec = make_batch(16, 2.0), DistillSpec(**WEIGHTS)
    labels, gold = torch.tensor(batch.labels), torch.tensor(batch.gold)
    plain = distill_loss(batch.logits_RV, batch.teachers, labels, spec, gold_R=gold)
    own = labels.clamp_min(0)[:, None]  # every label is taboo at its own position
    out = distill_loss(batch.logits_RV, batch.teachers, labels, spec, gold_R=gold, taboo_RK=own)
    assert (out.ce_R == 0).all()
    fallback = plain.strategy_R == GOLD_FALLBACK
    assert fallback.any()
    assert (out.strategy_R[fallback] == SKIP).all()
    assert torch.equal(out.strategy_R[~fallback], plain.strategy_R[~fallback])
    assert torch.equal(out.js_R, plain.js_R)  # the gate sees the teachers as they are


def test_taboo_ids_for_all_equal_the_same_ids_per_position():
    batch = make_batch(17, 2.0)
    labels = torch.tensor(batch.labels)
    for mode in ("target", "neutral"):
        spec = DistillSpec(taboo=mode, **WEIGHTS)
        args = (batch.logits_RV, batch.teachers, labels, spec)
        rows = torch.tensor([[3, -1, 8, 3]]).expand(len(labels), -1)  # unordered, doubled, padded
        everywhere = gradient(*args, taboo_ids=torch.tensor([8, 3]))
        torch.testing.assert_close(gradient(*args, taboo_RK=rows), everywhere)
        torch.testing.assert_close(
            gradient(*args, taboo_ids=torch.tensor([3]), taboo_RK=rows), everywhere
        )
        empty = gradient(*args, taboo_ids=torch.tensor([], dtype=torch.int64))
        torch.testing.assert_close(empty, gradient(*args))


# --- sampled supports --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_sampled_gradient_is_unbiased(temperature):
    """The mean over draws approaches the gradient of the whole distributions.

    Bound: five standard errors. An entry kept with probability i carries p/i: variance
    p^2 (1-i)/i.
    """
    num_draws, vocab_size = 4000, 80
    g = torch.Generator().manual_seed(20)
    base = 2.0 * torch.randn(vocab_size, generator=g, dtype=torch.float64)
    near = base + 0.15 * torch.randn(vocab_size, generator=g, dtype=torch.float64)
    z = torch.randn(vocab_size, generator=g, dtype=torch.float64)
    logp = [torch.log_softmax(x, -1) for x in (base, near)]
    teachers, variance_V, temper = [], torch.zeros(vocab_size).double(), []
    for number, x in enumerate(logp):
        kept = capture(
            x.expand(num_draws, -1),
            min_prob=0.05,
            threshold=0.1,
            temperatures=(temperature,),
            seed=number,
        )
        inclusion = torch.where(kept.ids_RK >= 0, kept.inclusion_RK, 0.0)
        assert (inclusion == 1).sum() < (inclusion > 0).sum()
        partition = (x / temperature).logsumexp(-1).expand(num_draws)
        teachers.append(
            SparseTeacher(kept.ids_RK, kept.logp_RK, partition, kept.entropy_R, kept.inclusion_RK)
        )
        p, soft = x.exp(), torch.softmax(x / 2.0, -1)
        ratio = torch.maximum(p, soft) / 0.1
        sure = (p >= 0.05) | (ratio >= 1) | (torch.arange(vocab_size) == x.argmax())
        p_t = torch.softmax(x / temperature, -1)
        temper.append(p_t)
        share = [y.exp().max() for y in logp]
        w = share[number] / sum(share)
        variance_V += torch.where(sure, 0.0, (w * p_t) ** 2 * (1 - ratio) / ratio)
    spec = DistillSpec(temperature, alpha=0.0, beta=1.0, js_threshold=2.0)
    labels = torch.zeros(num_draws, dtype=torch.int64)
    student = torch.softmax(z / temperature, -1)
    grads = gradient(z.expand(num_draws, -1), tuple(teachers), labels, spec, num_items=1)
    target = (share[0] * temper[0] + share[1] * temper[1]) / (share[0] + share[1])
    exact = temperature * (student - target)
    # d/dz_v = T (s_v sum q - q_v): q_v enters with s_v - 1, every other q_u with s_v.
    spread = student**2 * (variance_V.sum() - variance_V) + (student - 1) ** 2 * variance_V
    bound = 5 * temperature * (spread / num_draws).sqrt()
    assert ((grads.mean(0) - exact).abs() <= bound + 1e-12).all()
    assert bound.max() < 0.25 * exact.abs().max()  # else the bound would accept anything


def test_sampled_value_is_unbiased_for_one_teacher():
    num_draws, temperature = 4000, 2.0
    logp, z, _ = full_case(temperature, vocab_size=80)
    kept = capture(logp.expand(num_draws, -1), min_prob=0.05, threshold=0.1, seed=5)
    partition = (logp / temperature).logsumexp(-1).expand(num_draws)
    drawn = SparseTeacher(kept.ids_RK, kept.logp_RK, partition, None, kept.inclusion_RK)
    labels = torch.zeros(num_draws, dtype=torch.int64)
    kd = distill_loss(z.expand(num_draws, -1), (drawn,), labels, DistillSpec(temperature)).kd_R
    log_p, log_q = (torch.log_softmax(x[0] / temperature, -1) for x in (logp, z))
    exact = float(temperature**2 * (log_p.exp() * (log_p - log_q)).sum())
    standard_error = float(kd.std()) / math.sqrt(num_draws)
    assert abs(float(kd.mean()) - exact) < 5 * standard_error
    assert standard_error < 0.02 * exact


def test_inclusion_of_one_everywhere_is_the_whole_distribution():
    temperature = 1.5
    _, z, full = full_case(temperature)
    drawn = full._replace(inclusion_RK=torch.ones_like(full.logp_RK))
    spec, label = DistillSpec(temperature, **WEIGHTS), torch.tensor([2])
    torch.testing.assert_close(
        gradient(z, (drawn,), label, spec), gradient(z, (full,), label, spec)
    )


# --- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
def test_ignored_and_skipped_positions_may_hold_anything(sampled):
    batch = make_batch(18, 2.0, sampled=sampled)
    labels, gold = torch.tensor(batch.labels), torch.tensor(batch.gold)
    spec = DistillSpec(**WEIGHTS)
    clean = distill_loss(batch.logits_RV, batch.teachers, labels, spec, gold_R=gold)
    clean_grad = gradient(batch.logits_RV, batch.teachers, labels, spec, gold_R=gold)
    idle = clean.strategy_R == SKIP
    z = batch.logits_RV.clone()
    z[idle] = NAN
    ignored = labels == -100
    spoilt = [t._replace(logp_RK=t.logp_RK.clone()) for t in batch.teachers]
    for t in spoilt:
        t.logp_RK[ignored] = NAN
    out = distill_loss(z, spoilt, labels, spec, gold_R=gold)
    torch.testing.assert_close(out.loss, clean.loss)
    grad = gradient(z, spoilt, labels, spec, gold_R=gold)
    torch.testing.assert_close(grad, clean_grad)
    assert (grad[idle] == 0).all()
    for name in ("js_R", "kd_R", "ce_R", "weight_R"):
        assert (getattr(out, name)[ignored] == 0).all()


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("case", [*DIVERGENCES, "renormalise", "sampled"])
def test_non_finite_student_logits_reach_the_loss(case, poison):
    batch = make_batch(19, 2.0, sampled=case == "sampled", student_masks=False)
    options = {"divergence": case} if case in DIVERGENCES else {}
    if case == "renormalise":
        options["tail"] = case
    spec = DistillSpec(alpha=0.0, beta=1.0, **options)
    z = batch.logits_RV.clone()
    z[0, 3] = poison
    out = distill_loss(z, batch.teachers, torch.tensor(batch.labels), spec)
    assert not math.isfinite(out.loss.item())
    assert not math.isfinite(float(out.kd_R[0]))


@pytest.mark.parametrize("case", [*DIVERGENCES, "sampled"])
def test_fully_masked_rows_give_nothing_and_are_counted(case):
    batch = make_batch(20, 2.0, sampled=case == "sampled")
    spec = DistillSpec(divergence="forward_kl" if case == "sampled" else case, **WEIGHTS)
    labels = torch.tensor(batch.labels)
    z = batch.logits_RV.clone()
    masked = torch.tensor([0, 1, 2])
    whole = distill_loss(z, batch.teachers, labels, spec)
    z[masked] = -INF
    z = z.requires_grad_()
    out = distill_loss(z, batch.teachers, labels, spec)
    out.loss.backward()
    assert (z.grad[masked] == 0).all()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().sum() > 0
    assert (out.kd_R[masked] == 0).all()
    assert (out.ce_R[masked] == 0).all()
    assert torch.equal(out.kd_R[3:], whole.kd_R[3:])
    only = labels.clone()
    only[masked] = -100
    valid, fewer = (labels != -100).sum(), (only != -100).sum()
    rest = distill_loss(z, batch.teachers, only, spec)
    torch.testing.assert_close(out.loss * valid, rest.loss * fewer)


def test_all_support_tokens_masked_in_the_student_give_a_finite_loss():
    logp, z, _ = full_case(2.0)
    z[0, [1, 4]] = -INF
    top = sparse(logp, [[1, 4]], 2.0)
    for divergence, tail in itertools.product(DIVERGENCES, ("bucket", "renormalise", "none")):
        spec = DistillSpec(divergence=divergence, tail=tail)
        x = z.clone().requires_grad_()
        out = distill_loss(x, (top,), torch.tensor([0]), spec)
        out.loss.backward()
        assert math.isfinite(out.loss.item())
        assert torch.isfinite(x.grad).all()


def test_labels_outside_the_vocabulary_are_no_gold():
    _, z, full = full_case(2.0)
    for label in (9, 50_000, -1):
        out = distill_loss(z, (full,), torch.tensor([label]), DistillSpec(**WEIGHTS))
        assert float(out.ce_R) == 0.0
        assert float(out.kd_R) > 0.0


def test_order_of_the_support_does_not_matter():
    batch, spec = make_batch(21, 2.0), DistillSpec(divergence="jsd", **WEIGHTS)
    labels = torch.tensor(batch.labels)
    turned = [
        t._replace(ids_RK=t.ids_RK.flip(-1), logp_RK=t.logp_RK.flip(-1)) for t in batch.teachers
    ]
    torch.testing.assert_close(
        gradient(batch.logits_RV, turned, labels, spec),
        gradient(batch.logits_RV, batch.teachers, labels, spec),
    )


def test_gradient_flows_to_the_logits_alone():
    _, z, full = full_case(2.0)
    leaf = full.logp_RK.clone().requires_grad_()
    partition = full.log_partition_R.clone().requires_grad_()
    watched = full._replace(logp_RK=leaf, log_partition_R=partition)
    z = z.requires_grad_()
    distill_loss(z, (watched, full), torch.tensor([1]), DistillSpec(gamma=1.0)).loss.backward()
    assert z.grad is not None
    assert leaf.grad is None
    assert partition.grad is None


def test_no_rows_and_no_valid_rows_give_zero():
    batch, spec = make_batch(22, 2.0), DistillSpec(**WEIGHTS)
    none = [SparseTeacher(*(x if x is None else x[:0] for x in t)) for t in batch.teachers]
    z = batch.logits_RV[:0].clone().requires_grad_()
    out = distill_loss(z, none, torch.tensor([], dtype=torch.int64), spec)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert z.grad.shape == (0, 13)
    labels = torch.full((len(batch.labels),), -100)
    z = batch.logits_RV.clone().requires_grad_()
    out = distill_loss(z, batch.teachers, labels, spec)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert (z.grad == 0).all()


def test_low_precision_logits_are_computed_in_float32_and_get_their_gradient_back():
    batch, spec = make_batch(23, 2.0), DistillSpec(**WEIGHTS)
    labels = torch.tensor(batch.labels)
    exact = gradient(batch.logits_RV.bfloat16().double(), batch.teachers, labels, spec)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        z = batch.logits_RV.bfloat16().to(dtype).requires_grad_()
        out = distill_loss(z, batch.teachers, labels, spec)
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        assert z.grad.dtype == dtype
        torch.testing.assert_close(z.grad.double(), exact, rtol=tolerance, atol=tolerance / 10)


def test_strided_logits_equal_packed_ones():
    batch, spec = make_batch(24, 2.0), DistillSpec(**WEIGHTS)
    labels = torch.tensor(batch.labels)
    wide = torch.full((len(labels), 30), NAN, dtype=torch.float64)
    wide[:, ::2][:, :13] = batch.logits_RV
    torch.testing.assert_close(
        distill_loss(wide[:, ::2][:, :13], batch.teachers, labels, spec).loss,
        distill_loss(batch.logits_RV, batch.teachers, labels, spec).loss,
    )


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.0),
        ("temperature", NAN),
        ("alpha", -0.1),
        ("beta", INF),
        ("gamma", -1.0),
        ("gold_weight", -0.5),
        ("js_threshold", -0.1),
        ("confidence_threshold", 1.5),
        ("jsd_beta", 0.0),
        ("jsd_beta", 1.0),
        ("divergence", "kl"),
        ("confidence", "max"),
        ("tail", "renormalize"),
        ("taboo", "mask"),
    ],
)
def test_options_out_of_range_say_what_was_expected_and_found(option, value):
    with pytest.raises(ValueError, match=rf"{option}: expected .*found.*{value}"):
        DistillSpec(**{option: value})


def test_spec_is_frozen_and_has_the_documented_defaults():
    spec = DistillSpec()
    with pytest.raises(AttributeError):
        spec.alpha = 1.0
    assert (spec.temperature, spec.alpha, spec.beta, spec.gamma) == (2.0, 0.1, 0.9, 0.0)
    assert (spec.divergence, spec.tail, spec.taboo) == ("forward_kl", "bucket", "target")
    assert (spec.js_threshold, spec.confidence_threshold, spec.gold_weight) == (0.1, 0.8, 0.5)
    assert (spec.confidence, spec.jsd_beta) == ("top1", 0.5)


def test_shapes_that_do_not_fit_say_what_was_expected_and_found():
    batch, spec = make_batch(25, 2.0), DistillSpec()
    z, labels = batch.logits_RV, torch.tensor(batch.labels)
    first, second = batch.teachers
    with pytest.raises(ValueError, match="expected one or two SparseTeacher, found 3"):
        distill_loss(z, (first, first, second), labels, spec)
    with pytest.raises(ValueError, match=r"labels_R: expected shape \(14,\), found \(13,\)"):
        distill_loss(z, batch.teachers, labels[1:], spec)
    with pytest.raises(ValueError, match=r"gold_R: expected shape \(14,\), found \(2,\)"):
        distill_loss(z, batch.teachers, labels, spec, gold_R=torch.ones(2, dtype=torch.bool))
    short = SparseTeacher(*(x if x is None else x[1:] for x in second))
    with pytest.raises(ValueError, match=r"teacher 2: ids_RK: expected 14 rows.*found \(13, 10\)"):
        distill_loss(z, (first, short), labels, spec)
    with pytest.raises(ValueError, match="teacher 1: logp_RK: expected"):
        distill_loss(z, (first._replace(logp_RK=first.logp_RK[:, 1:]), second), labels, spec)


def test_combinations_that_no_estimator_supports_are_refused():
    batch, drawn = make_batch(26, 2.0), make_batch(26, 2.0, sampled=True)
    z, labels = batch.logits_RV, torch.tensor(batch.labels)
    with pytest.raises(ValueError, match="same estimator"):
        distill_loss(z, (batch.teachers[0], drawn.teachers[1]), labels, DistillSpec())
    for divergence in ("reverse_kl", "jsd"):
        with pytest.raises(ValueError, match=f'divergence="{divergence}" needs a top-k support'):
            distill_loss(z, drawn.teachers, labels, DistillSpec(divergence=divergence))
    spec = DistillSpec(divergence="reverse_kl")
    with pytest.raises(ValueError, match='use taboo="neutral"'):
        distill_loss(z, batch.teachers, labels, spec, taboo_ids=torch.tensor([1]))
    bare = batch.teachers[1]._replace(entropy_R=None)
    with pytest.raises(ValueError, match=r"teacher 2.*entropy_R"):
        distill_loss(z, (batch.teachers[0], bare), labels, DistillSpec(confidence="entropy"))
    with pytest.raises(ValueError, match="impl: expected one of auto, triton, eager, found 'cuda'"):
        distill_loss(z, batch.teachers, labels, DistillSpec(), impl="cuda")
