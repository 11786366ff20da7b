"""Training from a store: the loss, its data, averaged weights, checkpoints, refusals."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer, sentences, write_jsonl
from transformers import Trainer, TrainerCallback

from distill import DistillConfig, DistillTrainer
from distill.bundled import BUNDLED
from distill.cli import cli
from distill.config import distill_config
from distill.ema import WeightAverage
from distill.student import attach_loss, to_inputs
from distill.train import TrainRequest, train
from logitcache import build, open_store
from logitcache.causal_lm import hidden_states, load_causal_lm
from logitcache.errors import NonFiniteError, StoreError, UsageError
from logitcache.tokenise import load_tokenizer
from logitcache_kernels import DistillSpec, SparseTeacher, distill_loss, linear_distill_loss

CPU = torch.device("cpu")
SETTINGS = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "temperature": 1.5,
    "js_threshold": 0.4,
    "save_strategy": "no",
    "seed": 3,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny generations of one family and a sampled and a top-k store of them."""
    folder = tmp_path_factory.mktemp("train")
    make_model(folder / "one", seed=1)
    two = make_model(folder / "two", seed=1)
    weights = load_file(two / "model.safetensors")
    torch.manual_seed(5)
    from safetensors.torch import save_file

    noisy = {name: w + 0.02 * torch.randn_like(w) for name, w in weights.items()}
    save_file(noisy, two / "model.safetensors", metadata={"format": "pt"})
    data = write_jsonl(folder / "data.jsonl", [{"text": s} for s in sentences(50, 7, words=16)])
    common = {"teacher1": folder / "one", "teacher2": two, "data": [data], "seq_len": 48}
    build(**common, out=folder / "sampled", device="cpu")
    build(**common, out=folder / "topk", estimator="topk", device="cpu")
    return folder


def _request(work: Path, out: Path, store: str = "sampled", **settings: object) -> TrainRequest:
    merged = {**SETTINGS, "max_steps": 4, **settings}
    return TrainRequest(work / store, work / "one", out, work / "topk", merged)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _steps(out: Path) -> list[dict]:
    """Records of training steps in a run's log."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss_kd" in entry]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _trainer(work: Path, out: Path, store: str = "sampled", **settings: object) -> DistillTrainer:
    config = DistillConfig(output_dir=str(out), **{**SETTINGS, "max_steps": 1, **settings})
    model = load_causal_lm(work / "one", torch.float32, CPU).train()
    tokenizer = load_tokenizer(work / "one")
    return DistillTrainer(model, config, work / store, processing_class=tokenizer)


def test_training_on_the_bundled_generations_reduces_the_loss(tmp_path: Path) -> None:
    lines = (BUNDLED / "text" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "part.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    build(
        teacher1=BUNDLED / "teacher1",
        teacher2=BUNDLED / "teacher2",
        data=[tmp_path / "part.jsonl"],
        out=tmp_path / "store",
        seq_len=256,
        device="cpu",
    )
    rows = len(open_store(tmp_path / "store"))
    settings = {**SETTINGS, "js_threshold": 0.1, "per_device_train_batch_size": rows}
    request = TrainRequest(
        tmp_path / "store",
        BUNDLED / "teacher1",
        tmp_path / "student",
        tmp_path / "store",
        {**settings, "learning_rate": 3e-4, "max_steps": 5, "ema_decay": 0.9},
    )
    record = train(request)
    losses = [entry["loss"] for entry in _steps(tmp_path / "student")]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.02, losses
    # The averaged weights, evaluated on the very rows, moved towards the target too.
    assert record["after"]["after_kl"] < record["before"]["before_kl"]
    assert record["after"]["after_loss"] < record["before"]["before_loss"]


def test_every_step_logs_loss_parts_shares_and_speed(work: Path, tmp_path: Path) -> None:
    record = train(_request(work, tmp_path / "out"))
    steps = _steps(tmp_path / "out")
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    for entry in steps:
        names = ("blended", "t1_only", "gold_fallback", "skip")
        assert sum(entry[f"share_{name}"] for name in names) == pytest.approx(1.0)
        parts = entry["loss_ce"] + entry["loss_kd"] + entry["loss_agreement"]
        assert parts == pytest.approx(entry["loss"], abs=1e-6)
        assert abs(entry["loss_agreement"]) < 1e-6  # gamma is 0
        assert 0 < entry["mean_js"] < 1
        assert entry["tokens_per_second"] > 0
    assert record["complete"]
    assert record["steps"] == 4


def test_student_is_a_transformers_folder_with_averaged_and_raw_weights(
    work: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    train(_request(work, out))
    averaged, raw, start = _weights(out), _weights(out / "raw"), _weights(work / "one")
    assert not _same(averaged, raw)
    assert not _same(averaged, start)
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out)("the king").input_ids
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["identity"]["settings"]["temperature"] == 1.5
    assert record["environment"]["versions"]["torch"] == importlib.metadata.version("torch")


def test_loss_in_forward_equals_the_loss_on_full_logits(work: Path) -> None:
    model = load_causal_lm(work / "one", torch.float32, CPU)
    spec = DistillSpec(temperature=1.5, js_threshold=0.4, gamma=0.2)
    inputs = to_inputs(open_store(work / "sampled")[[0, 3]], 1.5)
    plain = model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
    )
    expected = distill_loss(
        plain.logits.flatten(0, 1),
        [SparseTeacher(**teacher) for teacher in inputs["teachers"]],
        inputs["labels"].flatten(),
        spec,
        gold_R=inputs["gold"].flatten(),
        num_items=7.0,
    )
    attach_loss(model, spec, chunk=5)
    output = model(**inputs, num_items=7.0)
    torch.testing.assert_close(output["loss"], expected.loss, rtol=1e-5, atol=1e-6)
    again = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])
    assert again.logits.shape == plain.logits.shape  # other calls are as before


def _one_sgd_step(work: Path, out: Path, **settings: object) -> dict[str, torch.Tensor]:
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **settings}
    trainer = _trainer(work, out, **settings)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_gradient_accumulation_gives_the_gradients_of_one_batch(work: Path, tmp_path: Path) -> None:
    whole = _one_sgd_step(work, tmp_path / "a", per_device_train_batch_size=4)
    parts = _one_sgd_step(
        work, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)


def test_under_autocast_the_loss_computes_in_the_dtype_of_a_linear_layer(work: Path) -> None:
    """The residual stream of float32 weights is float32 under autocast too."""
    model, spec = load_causal_lm(work / "one", torch.float32, CPU), DistillSpec(temperature=1.5)
    inputs = to_inputs(open_store(work / "sampled")[[0, 1]], 1.5)
    teachers = [SparseTeacher(**teacher) for teacher in inputs["teachers"]]
    labels_R, gold_R = inputs["labels"].flatten(), inputs["gold"].flatten()
    attach_loss(model, spec)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs)["loss"]
        hidden_RD = hidden_states(model, inputs["input_ids"], inputs["position_ids"]).flatten(0, 1)
    assert hidden_RD.dtype == torch.float32
    weight_VD = model.get_output_embeddings().weight
    narrow, wide = (
        linear_distill_loss(
            hidden_RD, weight_VD, teachers, labels_R, spec, gold_R=gold_R, logits_dtype=dtype
        ).loss
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(loss, narrow)
    assert not torch.equal(loss, wide)


# The name that every transformers 5 knows; from 5.23 on it is announced to be renamed.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(work: Path, tmp_path: Path) -> None:
    plain = _one_sgd_step(work, tmp_path / "a")
    recomputed = _one_sgd_step(work, tmp_path / "b", gradient_checkpointing=True)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-6)


def test_finished_run_is_left_alone_and_another_run_is_refused(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(_request(work, out, max_steps=1))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix != ".lock"}
    said: list[str] = []
    train(_request(work, out, max_steps=1), note=said.append)
    assert "already trained" in said[0]
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix != ".lock"}
    with pytest.raises(UsageError, match=r"alpha: this command 0\.3, run 0\.1"):
        train(_request(work, out, max_steps=1, alpha=0.3))
    train(_request(work, out, max_steps=1, alpha=0.3), fresh=True)
    request = _request(work, out, max_steps=1, alpha=0.3)
    other = TrainRequest(request.store, work / "two", out, request.eval_store, request.settings)
    with pytest.raises(UsageError, match="student: not the one of the run"):
        train(other)


def test_run_folder_that_holds_other_files_is_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(UsageError, match=r"mine\.txt|found other files"):
            train(_request(work, tmp_path), fresh=fresh)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_input_folders_are_never_the_output(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "family" / "student"
    train(_request(work, out, max_steps=1))
    before = _weights(out)
    base = _request(work, out, max_steps=1)
    for name, place in (
        ("student", out),
        ("student", out.parent),
        ("store", work / "sampled" / "x"),
    ):
        request = replace(base, out=place, student=out if name == "student" else base.student)
        with pytest.raises(UsageError, match=rf"--out (holds|lies in) the {name}"):
            train(request, fresh=True)
    assert _same(before, _weights(out))
    assert not (work / "sampled" / "x").exists()


def test_fresh_run_that_does_not_fit_deletes_nothing(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(_request(work, out, max_steps=1))
    before = _weights(out)
    with pytest.raises(UsageError, match=r"temperature: expected 0.5 to 2, found 3"):
        train(_request(work, out, max_steps=1, temperature=3.0), fresh=True)
    assert _same(before, _weights(out))


def test_run_killed_before_its_first_checkpoint_starts_again(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)  # killed while the model was loaded
    (out / "train.lock").touch()
    train(_request(work, out, max_steps=1))
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    (out / "run.json").write_text(json.dumps({**record, "complete": False}), encoding="utf-8")
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 1, "lo')  # and while it logged
    again = train(_request(work, out, max_steps=1))
    assert again["complete"]
    assert len(_steps(out)) == 1


def test_settings_of_a_run_record_can_be_read_again(work: Path, tmp_path: Path) -> None:
    train(_request(work, tmp_path / "out", max_steps=1, gamma=0.25))
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    config = distill_config(record["settings"], str(tmp_path))
    assert (config.gamma, config.temperature, config.max_steps) == (0.25, 1.5, 1)


def test_arguments_that_adapters_pass_on_as_none_are_allowed(work: Path) -> None:
    model = load_causal_lm(work / "one", torch.float32, CPU)
    attach_loss(model, DistillSpec(temperature=1.5))
    inputs = to_inputs(open_store(work / "sampled")[[0]], 1.5)
    plain = model(**inputs)["loss"]
    none = dict.fromkeys(("attention_mask", "inputs_embeds", "output_attentions", "return_dict"))
    assert torch.equal(model(**inputs, **none)["loss"], plain)
    with pytest.raises(TypeError, match="unexpected with teachers: attention_mask"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))


def test_the_collector_leaves_alone_what_a_training_started_with(
    work: Path, tmp_path: Path
) -> None:
    frozen = []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            frozen.append(gc.get_freeze_count())
            raise KeyboardInterrupt

    trainer = _trainer(work, tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0


def test_operations_are_counted_as_transformers_counts_them(work: Path, tmp_path: Path) -> None:
    trainer, inputs = _trainer(work, tmp_path), {"input_ids": torch.zeros(2, 5)}
    assert trainer.floating_point_ops(inputs) == Trainer.floating_point_ops(trainer, inputs) > 1000


def test_loss_that_is_not_finite_stops_before_the_step(work: Path, tmp_path: Path) -> None:
    trainer = _trainer(work, tmp_path)
    norm = trainer.model.model.norm.weight
    with torch.no_grad():
        norm[0] = torch.nan
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(
        NonFiniteError, match=r"step 1: loss is nan in row \d+, .*nothing of it was"
    ):
        trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[n].nan_to_num(9), after[n].nan_to_num(9)) for n in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges_seed": 9}, r"ids differ \(expected / found\)"),
        ({"template": "{{ messages }}"}, "chat_template differ"),
    ],
)
def test_store_of_another_tokenizer_is_refused(
    work: Path, tmp_path: Path, change: dict, message: str
) -> None:
    shutil.copytree(work / "one", tmp_path / "other")
    for stale in ("chat_template.jinja", "tokenizer.json"):
        (tmp_path / "other" / stale).unlink(missing_ok=True)
    make_tokenizer(tmp_path / "other", **change)
    request = _request(work, tmp_path / "out")
    with pytest.raises(StoreError, match=message) as caught:
        train(TrainRequest(request.store, tmp_path / "other", request.out, None, request.settings))
    assert caught.value.exit_code == 4


def test_student_with_a_smaller_vocabulary_is_refused(work: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "small", seed=4, vocab_size=290)
    request = _request(work, tmp_path / "out")
    with pytest.raises(
        StoreError, match="expected a student with at least 300 output rows, found 290"
    ):
        train(TrainRequest(request.store, tmp_path / "small", request.out, None, request.settings))


def test_student_that_reads_shorter_rows_is_refused(work: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "short", seed=4, max_position_embeddings=32)
    request = _request(work, tmp_path / "out")
    with pytest.raises(UsageError, match="rows have 48 tokens, the student reads at most 32"):
        train(TrainRequest(request.store, tmp_path / "short", request.out, None, request.settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 2.5}, r"temperature: expected 0.5 to 2, found 2.5"),
        ({"divergence": "jsd"}, "sampled supports allow forward_kl only"),
    ],
)
def test_settings_that_the_store_cannot_serve_are_refused(
    work: Path, tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(_request(work, tmp_path / "out", **settings))


def test_top_k_store_trains_with_every_divergence_and_temperature(
    work: Path, tmp_path: Path
) -> None:
    for divergence, temperature in (("reverse_kl", 4.0), ("jsd", 1.0)):
        trainer = _trainer(
            work, tmp_path, "topk", divergence=divergence, temperature=temperature, gamma=0.1
        )
        trainer.train()
        assert 0 < trainer.state.log_history[0]["loss"] < 20


def test_average_of_bfloat16_weights_moves_as_in_float64() -> None:
    model = torch.nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    average = WeightAverage(model, 0.999)
    expected = model.weight.detach().double()
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        with torch.no_grad():
            model.weight += 0.01 * torch.randn(8, 8, generator=generator).to(torch.bfloat16)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
        average.update()
    error = (average.weights["weight"].double() - expected).norm() / expected.norm()
    assert error < 1e-6
    raw = model.weight.detach().clone()
    with average.swapped():
        assert torch.equal(model.weight, expected.to(torch.bfloat16))
    assert torch.equal(model.weight, raw)


def test_command_refuses_unknown_settings_and_missing_folders(work: Path, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, dict]:
        result = CliRunner().invoke(cli, ["train", *words, "--json"])
        return result.exit_code, json.loads(result.stdout)

    good = ["--store", str(work / "sampled"), "--student", str(work / "one")]
    out = ["--out", str(tmp_path / "out")]
    code, document = run(*good, *out, "--set", "learning_rat=1e-4")
    assert code == 2
    assert "learning_rat: no such setting; is it learning_rate?" in document["error"]
    code, document = run(*good, *out, "--set", "alpha=much")
    assert code == 2
    code, document = run("--store", str(work / "none"), *good[2:], *out)
    assert code == 4
    assert "no such store" in document["error"]
    code, document = run(*good[:2], "--student", str(work / "none"), *out)
    assert code == 2
    assert not (tmp_path / "out").exists()
    code, document = run(*good, *out, "--dry-run", "--set", "use_cpu=true", "--set", "max_steps=9")
    assert code == 0
    assert document["steps"] == 9
    code, document = run(*good, *out, "--dry-run", "--set", "per_device_train_batch_size=3")
    assert document["steps"] == 3 * -(-len(open_store(work / "sampled")) // 3)  # three epochs
    assert not (tmp_path / "out").exists()  # a dry run writes nothing


def test_wrong_flags_give_one_json_document_too() -> None:

    command = [sys.executable, "-m", "distill", "train", "--json", "--nosuch"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    document = json.loads(run.stdout)
    assert document["exit_code"] == 2
    assert "--nosuch" in document["error"]
