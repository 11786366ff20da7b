"""The loss on hidden states and an output projection equals the loss on its dense logits."""

from __future__ import annotations

import ast
import itertools
import sys
from pathlib import Path

import pytest
import torch
from dense_reference import Batch, make_batch

import logitcache_kernels
from logitcache_kernels import (
    DistillSpec,
    SparseTeacher,
    distill_loss,
    head_logits,
    linear,
    linear_distill_loss,
)

WEIGHTS = {"alpha": 0.3, "beta": 0.7, "gamma": 0.4}
DIAGNOSTICS = ("strategy_R", "js_R", "kd_R", "ce_R", "weight_R")


class Case:
    """A batch of 14 positions with hidden states (R x 5), weight (13 x 5) and bias for it."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64, sampled: bool = False):
        g = torch.Generator().manual_seed(seed)
        self.batch: Batch = make_batch(seed, 2.0, sampled=sampled)
        shapes = {"hidden": (len(self.batch.labels), 5), "weight": (13, 5), "bias": (13,)}
        for name, shape in shapes.items():
            setattr(self, name, torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype))
        self.labels, self.gold = torch.tensor(self.batch.labels), torch.tensor(self.batch.gold)

    def leaves(self, frozen: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        names = ("hidden", "weight", "bias")
        return {x: getattr(self, x).clone().requires_grad_(x not in frozen) for x in names}

    def linear(self, leaves, spec, **options):
        return linear_distill_loss(
            leaves["hidden"],
            leaves["weight"],
            self.batch.teachers,
            self.labels,
            spec,
            bias_V=leaves["bias"],
            gold_R=self.gold,
            **options,
        )

    def dense(self, leaves, spec, softcap=None, scale=1.0, **options):
        """The plain road: all logits at once, autograd through them."""
        logits = scale * (leaves["hidden"] @ leaves["weight"].T + leaves["bias"])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return distill_loss(
            logits, self.batch.teachers, self.labels, spec, gold_R=self.gold, **options
        )


def assert_equal_losses(case: Case, spec: DistillSpec, head=None, chunk=None, **options):
    head = head or {}
    a, b = case.leaves(), case.leaves()
    linear = case.linear(a, spec, chunk=chunk, **head, **options)
    dense = case.dense(b, spec, **head, **options)
    linear.loss.backward()
    dense.loss.backward()
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(linear.loss, dense.loss, **close)
    for name in DIAGNOSTICS:
        torch.testing.assert_close(getattr(linear, name), getattr(dense, name), **close)
        assert not getattr(linear, name).requires_grad
    for name, leaf in a.items():
        assert leaf.grad.abs().sum() > 0
        torch.testing.assert_close(leaf.grad, b[name].grad, **close)


@pytest.mark.parametrize("chunk", [3, None])
def test_a_chosen_chunk_has_its_most(monkeypatch, chunk):
    seen = []

    def logits(hidden_RD, *args, **kwargs):
        seen.append(len(hidden_RD))
        return head_logits(hidden_RD, *args, **kwargs)

    monkeypatch.setattr(linear, "head_logits", logits)
    case = Case(1)
    found = case.linear(case.leaves(), DistillSpec(**WEIGHTS), max_chunk=chunk)
    assert max(seen) == 3 if chunk else len(seen) == 1
    expected = case.linear(case.leaves(), DistillSpec(**WEIGHTS))
    torch.testing.assert_close(found.loss, expected.loss)
    with pytest.raises(ValueError, match="max_chunk: expected a positive number"):
        case.linear(case.leaves(), DistillSpec(**WEIGHTS), max_chunk=0)


@pytest.mark.parametrize("chunk", [1, 3, 14, 100, None])
def test_any_chunk_equals_the_dense_loss(chunk):
    case = Case(1)
    assert_equal_losses(case, DistillSpec(**WEIGHTS), chunk=chunk)
    out = case.linear(case.leaves(), DistillSpec(**WEIGHTS), chunk=chunk)
    assert set(out.strategy_R.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("softcap", "scale"), list(itertools.product((None, 2.0, 30.0), (1.0, 0.25, -3.0)))
)
def test_softcap_and_scale_equal_the_dense_loss(softcap, scale):
    head = {"softcap": softcap, "scale": scale}
    assert_equal_losses(Case(2), DistillSpec(**WEIGHTS), head, chunk=4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "sampled"])
def test_divergences_and_options_equal_the_dense_loss(divergence):
    sampled = divergence == "sampled"
    case = Case(3, sampled=sampled)
    spec = DistillSpec(
        divergence="forward_kl" if sampled else divergence,
        taboo="neutral",
        tail="bucket",
        **WEIGHTS,
    )
    taboo = {
        "taboo_ids": torch.tensor([2, 99]),
        "taboo_RK": torch.arange(14)[:, None] % 13,
        "num_items": torch.tensor(31),
    }
    assert_equal_losses(case, spec, {"softcap": 5.0}, chunk=3, **taboo)


def test_no_bias_and_one_teacher_equal_the_dense_loss():
    case = Case(4)
    for spec in (DistillSpec(**WEIGHTS), DistillSpec(1.0, taboo="target", **WEIGHTS)):
        a, b = case.leaves(), case.leaves()
        teachers = case.batch.teachers[:1]
        linear = linear_distill_loss(a["hidden"], a["weight"], teachers, case.labels, spec, chunk=5)
        dense = distill_loss(b["hidden"] @ b["weight"].T, teachers, case.labels, spec)
        linear.loss.backward()
        dense.loss.backward()
        torch.testing.assert_close(linear.loss, dense.loss)
        for name in ("hidden", "weight"):
            torch.testing.assert_close(a[name].grad, b[name].grad)


def test_gradients_pass_finite_differences():
    case, spec = Case(5), DistillSpec(**WEIGHTS)
    inputs = tuple(case.leaves().values())

    def loss(hidden, weight, bias):
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        return case.linear(leaves, spec, chunk=4, softcap=3.0, scale=0.5).loss

    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize(
    "frozen", [("weight",), ("weight", "bias"), ("hidden",), ("hidden", "bias")]
)
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen):
    case, spec = Case(6), DistillSpec(**WEIGHTS)
    all_of_it, part = case.leaves(), case.leaves(frozen)
    case.linear(all_of_it, spec, chunk=4).loss.backward()
    case.linear(part, spec, chunk=4).loss.backward()
    for name, leaf in part.items():
        assert (leaf.grad is None) == (name in frozen)
        if name not in frozen:
            assert torch.equal(leaf.grad, all_of_it[name].grad)


def test_no_gradient_asked_gives_the_same_value_and_no_graph():
    case, spec = Case(7), DistillSpec(**WEIGHTS)
    leaves = case.leaves()
    expected = case.linear(leaves, spec).loss
    assert expected.requires_grad
    with torch.no_grad():
        quiet = case.linear(leaves, spec, chunk=3)
    frozen = case.linear(case.leaves(("hidden", "weight", "bias")), spec, chunk=3)
    for out in (quiet, frozen):
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, expected.detach())
    assert all(leaf.grad is None for leaf in leaves.values())


def test_no_gradient_asked_makes_no_gradient():
    """Evaluation under no_grad of weights that want a gradient must not pay for one."""
    case, leaves = Case(8), Case(8).leaves()
    calls = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        case.linear(leaves, DistillSpec(**WEIGHTS))
    assert torch.logsumexp in calls or torch.Tensor.logsumexp in calls
    assert torch.autograd.grad not in calls


def test_gradients_add_up_over_micro_batches():
    case, spec = Case(9), DistillSpec(**WEIGHTS)
    whole, parts = case.leaves(), case.leaves()
    case.linear(whole, spec).loss.backward()
    valid = (case.labels != -100).sum()
    for rows in (slice(0, 5), slice(5, 6), slice(6, None)):
        teachers = [
            SparseTeacher(*(x if x is None else x[rows] for x in t)) for t in case.batch.teachers
        ]
        linear_distill_loss(
            parts["hidden"][rows],
            parts["weight"],
            teachers,
            case.labels[rows],
            spec,
            bias_V=parts["bias"],
            gold_R=case.gold[rows],
            num_items=valid,
            chunk=2,
        ).loss.backward()
    for name, leaf in whole.items():
        torch.testing.assert_close(parts[name].grad, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_incoming_gradient_scales_all_gradients(dtype):
    case, spec = Case(10, dtype), DistillSpec(**WEIGHTS)
    plain, scaled = case.leaves(), case.leaves()
    case.linear(plain, spec).loss.backward()
    case.linear(scaled, spec).loss.backward(
        torch.tensor(0.37, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    )
    for name, leaf in plain.items():
        # One rounding of the product, not a second one of 0.37 to the gradient's dtype.
        expected = (leaf.grad.double() * 0.37).to(dtype)
        torch.testing.assert_close(scaled[name].grad, expected, rtol=1e-7, atol=0)


def test_loss_times_a_factor_and_retained_graphs_scale_too():
    case, spec = Case(11), DistillSpec(**WEIGHTS)
    plain, twice = case.leaves(), case.leaves()
    case.linear(plain, spec).loss.backward()
    loss = case.linear(twice, spec).loss * 0.5
    loss.backward(retain_graph=True)
    loss.backward()
    for name, leaf in plain.items():
        torch.testing.assert_close(twice[name].grad, leaf.grad)


def test_bfloat16_hidden_states_with_a_float32_weight():
    case, spec = Case(12, torch.bfloat16), DistillSpec(**WEIGHTS)
    exact = {name: x.detach().double().requires_grad_() for name, x in case.leaves().items()}
    case.dense(exact, spec).loss.backward()
    for logits_dtype, tolerance in ((torch.float32, 2**-7), (None, 2**-4)):
        mixed = case.leaves()
        mixed["weight"] = mixed["weight"].detach().float().requires_grad_()
        out = case.linear(mixed, spec, chunk=4, logits_dtype=logits_dtype)
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        for name, leaf in mixed.items():
            assert leaf.grad.dtype == leaf.dtype
            error = (leaf.grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
            assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_neither_values_nor_gradients(dtype):
    case, spec = Case(13, dtype), DistillSpec(**WEIGHTS)
    plain, cast = case.leaves(), case.leaves()
    expected = case.linear(plain, spec, chunk=4)
    expected.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = case.linear(cast, spec, chunk=4)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)
    for name, leaf in plain.items():
        assert cast[name].grad.dtype == dtype
        assert torch.equal(cast[name].grad, leaf.grad)


def test_float32_logits_of_float64_hidden_states_decide_as_the_dense_loss_does():
    case, spec = Case(14), DistillSpec(**WEIGHTS)
    out = case.linear(case.leaves(), spec, logits_dtype=torch.float32)
    logits = (case.hidden.float() @ case.weight.float().T + case.bias.float()).float()
    dense = distill_loss(logits, case.batch.teachers, case.labels, spec, gold_R=case.gold)
    for name in DIAGNOSTICS:
        value, wanted = getattr(out, name), getattr(dense, name)
        torch.testing.assert_close(value, wanted, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.js_R.double(), dense.js_R.double())


def test_positions_without_loss_may_hold_anything():
    case, spec = Case(15), DistillSpec(**WEIGHTS)
    clean = case.leaves()
    out = case.linear(clean, spec, chunk=3)
    out.loss.backward()
    idle = out.strategy_R == 3
    assert idle.any()
    spoilt = case.leaves()
    with torch.no_grad():
        spoilt["hidden"][idle] = float("nan")
    again = case.linear(spoilt, spec, chunk=3)
    again.loss.backward()
    assert torch.equal(again.loss, out.loss)
    for name, leaf in clean.items():
        assert torch.equal(spoilt[name].grad, leaf.grad)
    assert (clean["hidden"].grad[idle] == 0).all()


def test_no_rows_and_no_valid_rows_give_zero():
    case, spec = Case(16), DistillSpec(**WEIGHTS)
    empty = [SparseTeacher(*(x if x is None else x[:0] for x in t)) for t in case.batch.teachers]
    for rows, teachers in ((slice(0, 0), empty), (slice(None), case.batch.teachers)):
        leaves = case.leaves()
        labels = torch.full_like(case.labels[rows], -100)
        hidden = leaves["hidden"][rows]
        out = linear_distill_loss(hidden, leaves["weight"], teachers, labels, spec)
        out.loss.backward()
        assert out.loss.item() == 0.0
        assert len(out.strategy_R) == len(labels)
        assert (leaves["weight"].grad == 0).all()
        assert (leaves["hidden"].grad == 0).all()


def test_repeated_calls_are_bitwise_equal():
    case, spec = Case(17, torch.float32), DistillSpec(**WEIGHTS)
    first, second = case.leaves(), case.leaves()
    a, b = case.linear(first, spec, chunk=3), case.linear(second, spec, chunk=3)
    a.loss.backward()
    b.loss.backward()
    assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(first[name].grad, second[name].grad) for name in first)


# --- arguments ---------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_say_what_was_expected_and_found():
    case, spec = Case(18), DistillSpec()
    args = (case.batch.teachers, case.labels, spec)
    hidden, weight = case.hidden, case.weight
    with pytest.raises(
        ValueError, match=r"expected shapes \(R, D\) and \(V, D\), found .*\(13, 4\)"
    ):
        linear_distill_loss(hidden, weight[:, :4], *args)
    with pytest.raises(ValueError, match=r"expected shapes .*found \(14, 5, 1\) and"):
        linear_distill_loss(hidden[..., None], weight, *args)
    with pytest.raises(ValueError, match=r"bias_V: expected shape \(13,\), found \(12,\)"):
        linear_distill_loss(hidden, weight, *args, bias_V=case.bias[:12])
    with pytest.raises(ValueError, match=r"chunk: expected a positive .*found 0"):
        linear_distill_loss(hidden, weight, *args, chunk=0)
    with pytest.raises(ValueError, match=r"softcap: expected a positive .*found 0\.0"):
        linear_distill_loss(hidden, weight, *args, softcap=0.0)
    with pytest.raises(ValueError, match=r"labels_R: expected shape \(14,\), found \(3,\)"):
        linear_distill_loss(hidden, weight, case.batch.teachers, case.labels[:3], spec)
    with pytest.raises(ValueError, match=r"impl: expected one of .*found 'cuda'"):
        linear_distill_loss(hidden, weight, *args, impl="cuda")
    with pytest.raises(ValueError, match='use taboo="neutral"'):
        linear_distill_loss(
            hidden,
            weight,
            case.batch.teachers,
            case.labels,
            DistillSpec(divergence="reverse_kl"),
            taboo_ids=torch.tensor([1]),
        )


# --- the package -------------------------------------------------------------------------------


def test_the_package_imports_torch_triton_and_the_standard_library_only():
    allowed = {"torch", "triton", "logitcache_kernels", *sys.stdlib_module_names}
    sources = sorted(Path(logitcache_kernels.__file__).parent.rglob("*.py"))
    assert len(sources) > 5
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name}:{node.lineno} imports {name}"


def test_the_folder_of_the_package_is_no_package_itself():
    """Hugging Face publishes a package named "kernels", which transformers imports."""
    assert not (Path(logitcache_kernels.__file__).parent.parent / "__init__.py").exists()
