"""Gate, loss, taboo and sampled supports of the eager loss, where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from dense_reference import make_batch, sparse
from loss_cases import (
    BLENDED,
    DIVERGENCES,
    GOLD_FALLBACK,
    SKIP,
    T1_ONLY,
    TEMPERATURES,
    WEIGHTS,
    full_case,
    gradient,
    teacher,
)

from logitcache_kernels import DistillOutput, DistillSpec, SparseTeacher, capture, distill_loss

pytestmark = pytest.mark.usefixtures("one_thread")


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
