"""The eager distillation loss at its edges: ignored, masked, non-finite, empty; its arguments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from dense_reference import make_batch, sparse
from loss_cases import (
    DIVERGENCES,
    INF,
    NAN,
    SKIP,
    WEIGHTS,
    full_case,
    gradient,
)

from logitcache_kernels import DistillSpec, SparseTeacher, distill_loss

pytestmark = pytest.mark.usefixtures("one_thread")


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
