"""What the CPU and GPU tests of the fused losses share: inputs, comparison with the oracle."""

import torch

from logitcache_kernels import DistillSpec, SparseTeacher, distill_loss, linear_distill_loss


def sparse_teacher(logits_RV, kept, temperature, sampled=False, padding=0):
    """Keep the largest entries of a distribution; sampled ones get an inclusion below 1."""
    logp_RV = torch.log_softmax(logits_RV.double(), -1)
    partition_R = torch.logsumexp(logp_RV / temperature, -1)
    entropy_R = -(logp_RV.exp() * logp_RV).sum(-1)
    logp_RK, ids_RK = logp_RV.topk(kept, -1)
    ids_RK = ids_RK.int()
    inclusion_RK = (logp_RK.exp() / 0.05).clamp(0.1, 1.0).float() if sampled else None
    if padding:
        ids_RK[:, -padding:] = -1
        logp_RK[:, -padding:] = -torch.inf
    return SparseTeacher(
        ids_RK, logp_RK.float(), partition_R.float(), entropy_R.float(), inclusion_RK
    )


def two_teachers(num_rows, vocab, kept, temperature, generator, *, sampled=False, number=2):
    """Logits that resemble both teachers, which agree at every second position; labels."""

    def normal(*size):
        return torch.randn(*size, generator=generator, device=generator.device)

    first_RV = 3.0 * normal(num_rows, vocab)
    apart_R1 = torch.where(torch.arange(num_rows, device=generator.device) % 2 == 0, 0.3, 2.0)
    second_RV = first_RV + apart_R1[:, None] * normal(num_rows, vocab)
    logits_RV = first_RV + normal(num_rows, vocab)
    teachers = (
        sparse_teacher(first_RV, kept, temperature, sampled, padding=min(2, kept - 1)),
        sparse_teacher(second_RV, min(kept + 3, vocab), temperature, sampled, padding=1),
    )
    labels_R = first_RV.argmax(-1)
    labels_R[1::3] = (labels_R[1::3] * 7 + 3) % vocab  # some that no teacher keeps
    labels_R[2::5] = -100
    return logits_RV, teachers[:number], labels_R


def wide(teachers):
    """The same teachers in float64."""
    return tuple(
        SparseTeacher(
            *(x.double() if x is not None and x.is_floating_point() else x for x in teacher)
        )
        for teacher in teachers
    )


def run(logits_RV, teachers, labels_R, spec, factor=1.0, **options):
    """Output, and the gradient of factor * loss divided by factor again (in float64 then)."""
    leaf_RV = logits_RV.detach().clone().requires_grad_()
    output = distill_loss(leaf_RV, teachers, labels_R, spec, **options)
    (gradient_RV,) = torch.autograd.grad(output.loss * factor, leaf_RV)
    return output, gradient_RV if factor == 1.0 else gradient_RV.double() / factor


def assert_output(found, expected, tolerance=3e-5):
    assert torch.equal(found.strategy_R, expected.strategy_R)
    for name in ("js_R", "kd_R", "ce_R", "weight_R", "loss"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name).double(), rtol=tolerance,
            atol=tolerance, msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


def assert_within(found_RV, exact_RV, eager_RV, rounding, smallest=0.0):
    """Element by element: no further from the exact value than eager float32 is, plus rounding.

    rounding is relative to the exact value: what storing the result in the logits' dtype costs. The
    largest eager error of a row counts for all of its elements (which ones cancel is chance).
    smallest is the step of the dtype's subnormal numbers.
    """
    assert torch.isfinite(found_RV).all()
    error = (found_RV.double() - exact_RV).abs()
    eager = (eager_RV.double() - exact_RV).abs().amax(-1, keepdim=True)
    scale = exact_RV.abs().amax(-1, keepdim=True)
    excess = error - (eager + rounding * exact_RV.abs() + 1e-6 * scale + smallest + 1e-12)
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"element {divmod(worst, exact_RV.shape[1])}: {found_RV.flatten()[worst]} "
        f"for {exact_RV.flatten()[worst]}"
    )


ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def check_loss(
    logits_RV, teachers, labels_R, spec, *, inplace=True, factor=1.0, tolerance=3e-5, rounding=0.0,
    **options,
):  # fmt: skip
    """Kernel against the oracle in float64 and float32, all on the same rounded logits.

    rounding: relative error of the gradient beyond that of its own dtype.
    """
    exact, exact_RV = run(
        logits_RV.double(), wide(teachers), labels_R, spec, impl="eager", **options
    )
    _, eager_RV = run(logits_RV.float(), teachers, labels_R, spec, impl="eager", **options)
    found, found_RV = run(
        logits_RV, teachers, labels_R, spec, factor, inplace=inplace, impl="triton", **options
    )
    assert_output(found, exact, tolerance)
    stored = ROUNDING[logits_RV.dtype] * (1.0 if factor == 1.0 else 2.0)
    if not logits_RV.is_cuda:
        stored *= 2.0  # Triton's interpreter cuts bits off where hardware rounds
    step = 2.0**-24 / abs(factor) if logits_RV.dtype == torch.float16 else 0.0
    assert_within(found_RV, exact_RV, eager_RV, stored + rounding, step)
    with torch.no_grad():
        assert_output(
            distill_loss(logits_RV, teachers, labels_R, spec, impl="triton", **options),
            exact,
            tolerance,
        )
    return found


def check_linear(
    hidden_RD, weight_VD, teachers, labels_R, spec, *, tolerance, bias_V=None, **options
):
    """Chunked kernel against the oracle in float64; only the kernel gets chunk, logits_dtype."""
    results = []
    kernel_only = {key: options.pop(key) for key in ("chunk", "logits_dtype") if key in options}
    for impl, more in (("eager", {}), ("triton", kernel_only)):
        dtype = torch.float64 if impl == "eager" else hidden_RD.dtype
        leaves = [
            None if x is None else x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)
            for x in (hidden_RD, weight_VD, bias_V)
        ]
        output = linear_distill_loss(
            leaves[0], leaves[1], teachers, labels_R, spec, bias_V=leaves[2], impl=impl,
            **options, **more,
        )  # fmt: skip
        (0.5 * output.loss).backward()
        results.append((output, [None if x is None else x.grad for x in leaves]))
    (exact, exact_grads), (found, found_grads) = results
    assert_output(found, exact, tolerance)
    for one, other in zip(found_grads, exact_grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close = tolerance * float(other.abs().max())
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=close)
    return found


def random_spec(draw_from, sampled=False):
    """One of every option; draw_from picks one of a list."""
    divergence = "forward_kl" if sampled else draw_from(["forward_kl", "reverse_kl", "jsd"])
    return DistillSpec(
        temperature=draw_from([1.0, 1.5, 2.0, 3.0, 4.0, 0.7, 2.5]),
        alpha=draw_from([0.1, 0.0]),
        beta=draw_from([0.9, 0.0]),
        gamma=draw_from([0.0, 0.6]),
        divergence=divergence,
        jsd_beta=draw_from([0.5, 0.2]),
        js_threshold=draw_from([0.05, 0.0, 2.0]),
        confidence_threshold=draw_from([0.3, 0.8]),
        confidence=draw_from(["top1", "entropy"]),
        gold_weight=draw_from([0.5, 0.0]),
        tail=draw_from(["bucket", "renormalise", "none"]),
        taboo="neutral" if divergence == "reverse_kl" else draw_from(["target", "neutral"]),
    )
