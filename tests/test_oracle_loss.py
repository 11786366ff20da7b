"""The eager distillation loss against the dense formulation and against finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from dense_reference import Batch, dense_loss, make_batch
from loss_cases import (
    BLENDED,
    DIVERGENCES,
    GOLD_FALLBACK,
    SKIP,
    T1_ONLY,
    TEMPERATURES,
    WEIGHTS,
    gradient,
)

from logitcache_kernels import DistillSpec, SparseTeacher, distill_loss

pytestmark = pytest.mark.usefixtures("one_thread")


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
