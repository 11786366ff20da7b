"""What users expect around a training run: a dry run, held-out rows, progress, a model card,
reports, options of transformers, and errors that name what is wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import losses, make_inputs, request, train_words
from transformers import LlamaForCausalLM, TrainerCallback

from distill import DistillTrainer, student
from distill.card import escaped, model_card
from distill.cli import cli
from distill.config import distill_config
from distill.finite import FiniteCheck, skip_if
from distill.processes import set_up
from distill.progress import TrainProgress
from distill.train import make_trainer, train
from logitcache import open_store
from logitcache.errors import NonFiniteError, UsageError
from logitcache.tokenise import load_tokenizer
from logitcache_kernels import linear_distill_loss

LOGS = {"loss": 1.25, "tokens_per_second": 1234.0} | {
    f"share_{name}": share
    for name, share in (("blended", 0.5), ("t1_only", 0.3), ("gold_fallback", 0.2), ("skip", 0.0))
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("options"))


def run(inputs: Path, out: Path, *words: str, **settings: object) -> tuple[int, dict, str]:
    result = CliRunner().invoke(cli, [*train_words(inputs, out, **settings), "--json", *words])
    return result.exit_code, json.loads(result.stdout), result.stderr


def test_a_dry_run_takes_a_step_and_says_what_a_run_would_take(
    inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {"max_steps": -1, "num_train_epochs": 3, "eval_rows": 1}
    code, said, _ = run(inputs, out, "--dry-run", **settings)
    assert code == 0, said
    rows = len(open_store(inputs / "store"))
    assert (said["rows"], said["held_out_rows"]) == (rows - 1, 1)
    assert said["steps"] == 3 * -(-(rows - 1) // 2)
    assert said["estimated_seconds"] == pytest.approx(
        said["seconds_per_step"] * said["steps"], abs=0.1
    )
    assert said["peak_memory_bytes"] > 2**20
    assert not out.exists()
    train(
        request(inputs, tmp_path / "real", max_steps=1, **{k: settings[k] for k in ["eval_rows"]})
    )
    assert said["loss"] == losses(tmp_path / "real")[0][1]  # the very step that a run begins with
    checkpoint = tmp_path / "real" / "checkpoints" / "checkpoint-1"
    size = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    assert said["checkpoint_bytes"] == pytest.approx(size, rel=0.2)


def test_a_dry_run_says_that_checkpoints_do_not_fit(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("distill.plan.shutil.disk_usage", lambda _: free)
    code, said, _ = run(inputs, tmp_path / "out", "--dry-run")
    assert code == 6
    assert "3 checkpoints of 0.00 GB do not fit into the 0.00 GB that are free" in said["error"]
    code, said, _ = run(inputs, tmp_path / "out", "--dry-run", save_strategy="no")
    assert code == 0


def test_held_out_rows_are_evaluated_during_training_and_never_trained_on(
    inputs: Path, tmp_path: Path
) -> None:
    settings = {"eval_rows": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    code, said, _ = run(inputs, tmp_path / "out", **settings)
    assert code == 0, said
    lines = (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    evaluated = [r for r in records if "eval_kl" in r]
    assert [r["step"] for r in evaluated] == [2, 4]
    assert evaluated[-1]["eval_loss"] == pytest.approx(said["after"]["after_loss"])
    asked = request(inputs, tmp_path / "t", **settings)
    order = make_trainer(asked, asked.config()).row_order()
    rows = len(open_store(inputs / "store"))
    assert {row for batch in order for row in batch} == set(range(rows - 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy: steps needs held-out rows"),
        ({"eval_rows": 1000}, "eval_rows: expected fewer than the store's"),
        ({"lora_rank": 2, "lora_targets": "nosuch"}, "lora_targets: "),
        ({"fsdp": True}, "fsdp"),
        ({"deepspeed": "x.json"}, "deepspeed"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: expected 0 or more"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    inputs: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    code, said, _ = run(inputs, tmp_path / "out", **settings)
    assert code == 2, said
    assert message in said["error"]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (None, None)),
        ({"gradient_checkpointing": True}, (None, 1024)),
        ({"gradient_checkpointing": True, "loss_chunk": 7}, (7, 1024)),
    ],
)
def test_a_chunk_of_logits_is_small_where_activations_are_recomputed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, expected: tuple
) -> None:
    given = []

    def loss(*args: Any, chunk: int | None, max_chunk: int | None, **kwargs: Any) -> Any:
        given.append((chunk, max_chunk))
        return linear_distill_loss(*args, chunk=chunk, max_chunk=max_chunk, **kwargs)

    monkeypatch.setattr(student, "linear_distill_loss", loss)
    train(request(inputs, tmp_path / "out", max_steps=1, **settings))
    assert set(given) == {expected}


def test_attention_that_a_student_cannot_have_is_refused(inputs: Path, tmp_path: Path) -> None:
    code, said, _ = run(inputs, tmp_path / "out", attn_implementation="varlen")
    assert code == 2
    assert "attn_implementation: varlen gives this student on cpu something else" in said["error"]


def test_fsdp_of_another_version_from_the_environment_is_refused(
    inputs: Path, tmp_path: Path
) -> None:
    config = request(inputs, tmp_path / "out").config()
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(UsageError, match="the environment asks for version 1, expected 2"):
        set_up(SimpleNamespace(state=state, ddp_handler=None), config)


def test_what_does_not_fit_is_said_before_weights_are_loaded(inputs: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(inputs / "student", student)
    (student / "model.safetensors").write_bytes(b"not weights")
    code, said, _ = run(
        inputs, tmp_path / "out", "--student", str(student), "--dry-run", temperature=3.5
    )
    assert code == 2
    assert "temperature: expected 0.5 to 2, found 3.5" in said["error"]


def test_progress_is_a_line_at_the_end_and_after_30_s(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("distill.progress.time.monotonic", lambda: now[0])
    with TrainProgress(quiet=False) as progress:
        for step in range(1, 9):
            now[0] += 10
            progress(step, 8, None)
            progress(step, 8, LOGS)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "step 3 of 8",
        "step 6 of 8",
        "step 8 of 8",
    ]
    shares = "BLENDED 50%, T1_ONLY 30%, GOLD_FALLBACK 20%, SKIP 0%"
    assert lines[0].endswith(f"loss 1.2500, {shares}, 1,234 tokens/s, 50 s left")
    with TrainProgress(quiet=True) as progress:
        progress(1, 1, LOGS)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with TrainProgress(quiet=False) as progress:
        progress(3, 8, LOGS)
        progress.note("kept [aside]")
    assert "3/8" in screen.getvalue()
    assert "GOLD_FALLBACK 20%" in screen.getvalue()
    assert "kept [aside]" in screen.getvalue()


def test_the_card_says_what_a_student_was_distilled_from(inputs: Path, tmp_path: Path) -> None:
    train(request(inputs, tmp_path / "out", eval_rows=1, max_steps=1))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    store = open_store(inputs / "store")
    for teacher in store.store.teachers.values():
        assert teacher["model"]["weights_sha256"] in card
    assert 'base_model: "student"' in card
    assert "| temperature | 1\\.5 |" in card
    assert "for 1 steps" in card
    assert f"{store.manifest['documents']} documents" in card
    assert "data\\.jsonl, SHA-256" in card
    assert "KL to the gated target" in card
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    hostile = "a|b`c\n# <script>[x](y)\u202e.jsonl"
    manifest = {**store.manifest, "data_files": [{"name": hostile, "sha256": "0"}]}
    changed = model_card({**record, "student": f"/x/{hostile}"}, manifest)
    assert "<script>" not in changed
    assert "\u202e" not in changed
    assert changed.count("\n# ") == 1
    assert escaped("a_b") == "a\\_b"


# Its protobuf and ours of numpy are of other years.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reports_go_to_tensorboard(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(request(inputs, tmp_path / "out", report_to="tensorboard", save_strategy="no"))
    (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    assert b"share_blended" in events.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"attn_implementation": "eager"},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda settings: next(iter(settings)) + "-" + str(next(iter(settings.values()))),
)
def test_options_of_transformers_train_and_resume(
    inputs: Path, tmp_path: Path, settings: dict
) -> None:
    train(request(inputs, tmp_path / "whole", **settings))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 2

    with pytest.raises(ValueError, match="saved step 2 of 3"):
        train(request(inputs, tmp_path / "parts", **settings), stop=stop)
    train(request(inputs, tmp_path / "parts", **settings))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    if "torch_compile" in settings:
        asked_again = request(inputs, tmp_path / "again", **settings)
        trainer = make_trainer(asked_again, asked_again.config())
        assert all(layer._compiled_call_impl for layer in trainer._core.model.layers)
        trainer.train()
        assert trainer.model_wrapped is trainer._core, "the whole model was compiled too"
        train(request(inputs, tmp_path / "plain"))
        plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "whole")
        assert [x[1] for x in compiled] == pytest.approx([x[1] for x in plain], rel=1e-4)


def test_a_loss_that_is_not_finite_names_its_row(inputs: Path, tmp_path: Path) -> None:
    asked = request(inputs, tmp_path / "out", per_device_train_batch_size=3)
    asked = type(asked)(asked.store, inputs / "even", asked.out, None, asked.settings)
    trainer = make_trainer(asked, asked.config())
    first = next(iter(trainer.row_order()))
    tokens = trainer.reader.read_rows(torch.tensor(first).numpy()).tokens
    positions = trainer.reader[first].labels
    bad = 1
    other = {*tokens[0].tolist(), *tokens[2].tolist()}
    at = [t for t, label in zip(tokens[bad], positions[bad], strict=True) if label != -100]
    token = next(int(t) for t in at if int(t) not in other)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[token] = torch.nan
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=rf"step 1: loss is nan in row {first[bad]};") as error:
        trainer.train()
    assert error.value.exit_code == 7
    for name, p in trainer.model.named_parameters():  # no step was taken
        assert torch.equal(p.nan_to_num(9), before[name].nan_to_num(9))


def test_a_gradient_that_is_not_finite_names_the_rows_of_its_step(
    inputs: Path, tmp_path: Path
) -> None:
    asked = request(inputs, tmp_path / "out", gradient_accumulation_steps=2, max_steps=2)
    trainer = make_trainer(asked, asked.config())
    weight = next(iter(trainer.model.parameters()))
    weight.register_hook(
        lambda gradient: gradient * (torch.inf if trainer.state.global_step == 1 else 1)
    )
    rows = [row for batch in list(trainer.row_order())[2:4] for row in batch]
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert "step 2: the gradient norm is" in str(error.value)
    assert f"the rows of this step are {', '.join(map(str, rows))};" in str(error.value)
    assert "last losses: " in str(error.value)
    assert "none" not in str(error.value)


def test_an_optimizer_skips_a_step_on_the_device() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for is_finite, moves in ((True, True), (False, False), (True, True)):
        weight.grad = torch.full((3,), 1.0 if is_finite else torch.nan)
        before = weight.detach().clone()
        skip_if(optimizer, torch.tensor(is_finite))
        optimizer.step()
        assert bool((weight != before).all()) == moves
        assert bool(weight.isfinite().all())


def test_a_part_without_rows_is_no_fault_of_a_row() -> None:
    check = FiniteCheck(torch.device("cpu"))
    check.add([], torch.zeros(1))
    check.add([4, 7], torch.tensor([1.0, torch.inf]))
    with pytest.raises(NonFiniteError, match="loss is inf in row 7; "):
        check.close_step(1, torch.tensor(1.0))
    check.add([4], torch.tensor([1.0]))
    assert bool(check.close_step(2, 0.5))


class _Reads(TorchDispatchMode):
    """Notes from where a tensor's value is read by the host: on a GPU it would have to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = traceback.extract_stack()
            ours = [f for f in frames if "/torch/" not in f.filename]
            self.places.append(f"{Path(ours[-2].filename).name}:{ours[-2].name}")
        return func(*args, **(kwargs or {}))


def test_a_step_that_is_not_logged_reads_nothing_back(inputs: Path, tmp_path: Path) -> None:
    """But for the check of FiniteCheck, which on a GPU is read one step later, and the number of
    averages, which is in host memory there too."""
    asked = request(inputs, tmp_path / "out", logging_steps=100, save_strategy="no", max_steps=6)
    trainer = make_trainer(asked, asked.config())
    by_step: dict[int, list[str]] = {}
    reads = _Reads()

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            by_step[state.global_step] = list(reads.places)
            reads.places.clear()

    trainer.add_callback(Steps())
    with reads:
        trainer.train()
    assert by_step[3] == by_step[4]
    allowed = {"finite.py:wait", "ema.py:update", "ema.py:updates"}
    assert set(by_step[3]) <= allowed, by_step[3]
    with pytest.raises(UsageError, match="no held-out rows"):
        trainer.evaluate()


class _Odd(LlamaForCausalLM):
    """A family that does something of its own to its logits."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_family_that_cannot_be_hooked_trains_on_whole_logits_and_says_so_once(
    inputs: Path, tmp_path: Path
) -> None:
    asked = request(inputs, tmp_path / "out", eval_rows=2, max_steps=1)
    model = _Odd.from_pretrained(inputs / "even")
    tokenizer = load_tokenizer(inputs / "even")
    with pytest.warns(UserWarning, match="_Odd: its logits are not those of its") as said:
        trainer = DistillTrainer(model, asked.config(), asked.store, processing_class=tokenizer)
    assert len(said) == 1
    before = trainer.evaluate()
    trainer.train()
    # The same as a head of twice the weights, which can be hooked.
    twice = LlamaForCausalLM.from_pretrained(inputs / "even")
    with torch.no_grad():
        twice.lm_head.weight *= 2
    asked = request(inputs, tmp_path / "twice", eval_rows=2, max_steps=1, learning_rate=0.0)
    plain = DistillTrainer(twice, asked.config(), asked.store, processing_class=tokenizer)
    assert plain.evaluate() == pytest.approx(before, rel=1e-4)
    assert before["eval_kl"] > 0.1
    plain.train()
    losses_of = [
        next(r["loss"] for r in t.state.log_history if "loss" in r) for t in (trainer, plain)
    ]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-5)


@pytest.mark.parametrize(
    ("cores", "processes", "readers"), [(2, 1, 2), (6, 1, 3), (64, 1, 4), (64, 8, 4), (16, 8, 2)]
)
def test_two_to_four_processes_read_for_one_that_trains_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, processes: int, readers: int
) -> None:
    on_cpu = distill_config({}, str(tmp_path))
    assert on_cpu.dataloader_num_workers == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert distill_config({"bf16": False}, str(tmp_path)).dataloader_num_workers == readers
