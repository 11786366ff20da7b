"""DistillTrainer: a transformers.Trainer whose data is a store and whose loss is the gated
two-teacher loss."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from logitcache import StoreReader, open_store
from logitcache.causal_lm import Head, check_model
from logitcache.errors import NonFiniteError, StoreError, UsageError
from logitcache.tokenise import content_sha256, describe_difference, tokenizer_content

from .config import DistillConfig
from .ema import WeightAverage
from .evaluate import evaluation_spec, held_out_metrics, summed
from .source_loss import reported_sources, source_inputs, source_metrics
from .student import SUM_NAMES, as_metrics, attach_loss, to_inputs, zero_sums
from .taboo import Taboo, configured_taboo


class _RowNumbers(Dataset[int]):
    """The rows of a store by number; the collator reads them."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> int:
        return index


class _Collator:
    def __init__(
        self, reader: StoreReader, temperature: float, num_sources: int, taboo: Taboo | None = None
    ):
        self.reader, self.temperature = reader, temperature
        self.num_sources, self.taboo = num_sources, taboo

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        batch = self.reader[rows]
        inputs = to_inputs(batch, self.temperature)
        inputs |= source_inputs(self.reader, batch, self.num_sources)
        return inputs if self.taboo is None else inputs | self.taboo.inputs(batch.rows)


def check_fit(
    reader: StoreReader, model: Any, tokenizer: Any, config: DistillConfig, name: str = "student"
) -> None:
    """Refuse a store that was not made for this student or these settings, saying what differs."""
    store, manifest = reader.store.path, reader.manifest
    content = tokenizer_content(tokenizer)
    if content_sha256(content) != manifest["tokenizer_sha256"]:
        difference = describe_difference(reader.tokenizer_content, content)
        raise StoreError(
            f"{store}: was built with another tokenizer than the {name}'s: {difference}",
            "train a student that has the teachers' tokenizer, or build a store with this one",
        )
    width = Head.of(model).weight_VD.shape[0]
    if width < manifest["vocab_size"]:
        raise StoreError(
            f"{store}: vocabulary: expected a {name} with at least "
            f"{manifest['vocab_size']} output rows, "
            f"found {width}",
            "resize the student's embeddings",
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < manifest["seq_len"]:
        raise UsageError(
            f"{store}: rows have {manifest['seq_len']} tokens, the {name} reads at most {longest}",
            f"build a store with --seq-len {longest} or less",
        )
    if config.temperature > reader.max_temperature or config.temperature < min(reader.temperatures):
        raise UsageError(
            f"{store}: temperature: expected {min(reader.temperatures):g} to "
            f"{reader.max_temperature:g}, "
            f"found {config.temperature:g}",
            "choose a smaller one, or build with a larger --sample-temperature",
        )
    sampled = [a["estimator"] for a in reader.store.teachers.values()].count("sampled")
    if sampled and config.divergence != "forward_kl":
        raise UsageError(
            f"{store}: divergence: sampled supports allow forward_kl only, found "
            f"{config.divergence}",
            "build the store with --estimator topk",
        )


class DistillTrainer(Trainer):
    """Train a student on a store.

    model: a causal language model (PEFT models too). args: DistillConfig. store, eval_store: a
    StoreReader or a path. processing_class: the student's tokenizer, whose content must be that of
    the store. Everything else is transformers.Trainer's. evaluate() uses the averaged weights and
    reports, on the eval store, loss (held-out cross entropy), kl (to the gated target at T = 1) and
    the shares of the strategies.

    Raises UsageError or StoreError if store, student and settings do not fit; NonFiniteError before
    a step would be taken with a loss or gradient that is not finite.
    """

    args: DistillConfig
    model_accepts_loss_kwargs: bool
    loss_is_scaled_for_ga = (
        True  # the sum is divided by the valid positions of the whole global batch
    )

    def __init__(
        self,
        model: Any,
        args: DistillConfig,
        store: StoreReader | str | Path,
        eval_store: StoreReader | str | Path | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        if processing_class is None:
            raise UsageError(
                "processing_class: the student's tokenizer is needed to check the store"
            )
        self.reader = _opened(store)
        self.eval_reader = None if eval_store is None else _opened(eval_store)
        core = _core_model(model)
        if hasattr(core.get_output_embeddings(), "base_layer"):
            raise UsageError(
                "model: an adapter on the output head, whose weight alone the loss reads",
                "leave the output head out of the adapter's target modules",
            )
        for reader in (self.reader, self.eval_reader):
            if reader is not None:
                check_fit(reader, core, processing_class, args)
        check_model(core, Path(getattr(core.config, "_name_or_path", "") or "student"))
        self.spec = args.spec()
        self.sources = reported_sources(self.reader)
        self.taboo = configured_taboo(args, processing_class)
        self._core = core
        self._plain_forward = core.forward
        attach_loss(core, self.spec, args.loss_chunk)
        super().__init__(
            model=model,
            args=args,
            data_collator=_Collator(
                self.reader, self.spec.temperature, len(self.sources), self.taboo
            ),
            train_dataset=_RowNumbers(len(self.reader)),
            eval_dataset=None if self.eval_reader is None else _RowNumbers(len(self.eval_reader)),
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        self.average: WeightAverage | None = None
        self.add_callback(_Hooks(self))
        self._resume_from: Path | None = None
        self._reset_sums()

    # ---- loss ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Batches of one optimizer step and the valid positions in them, over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        valid = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        count = torch.tensor(float(max(valid, 0)), device=self.args.device)
        if self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count, "sum")
        return batches, count.clamp_min(1.0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of a micro-batch: its sum over the global batch's valid positions."""
        output = model(**inputs, num_items=num_items_in_batch)
        self._sums += output["sums"].detach()
        self._tokens += inputs["num_tokens"]
        # DDP averages gradients over ranks; the divisor above already counts all of them.
        loss = output["loss"] * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            self._refuse_nonfinite(f"loss is {float(loss)}")
        return loss

    def _refuse_nonfinite(self, what: str) -> None:
        last = [f"{r['loss']:.4g}" for r in self.state.log_history if "loss" in r][-20:]
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: {what}; no step was taken with it; "
            f"last losses: {', '.join(last) or 'none'}",
            "lower learning_rate, or look at the rows of this step; checkpoints are as they were",
        )

    def check_gradients(self) -> None:
        """Stop before the optimizer step if any gradient is not finite."""
        gradients = [p.grad for p in self._core.parameters() if p.grad is not None]
        # With fp16 an infinite gradient is the scaler's business: it skips the step.
        if not gradients or self.accelerator.scaler is not None:
            return
        norms = torch.stack(
            [n.float().to(gradients[0].device) for n in torch._foreach_norm(gradients)]
        )
        if not bool(torch.isfinite(norms).all()):
            self._refuse_nonfinite("a gradient is not finite")

    # ---- metrics ----

    def _reset_sums(self) -> None:
        self._sums = zero_sums(len(self.sources), self.args.device)
        self._tokens, self._since = 0, time.monotonic()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss knows to a training record."""
        if "loss" in logs:
            sums = self._sums
            tokens = torch.tensor(float(self._tokens), device=sums.device, dtype=torch.float64)
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, "sum")
                tokens = self.accelerator.reduce(tokens, "sum")
            sums = sums.cpu()  # one wait for all that is read of it
            logs.update(as_metrics(sums))
            logs.update(source_metrics(sums[len(SUM_NAMES) :], self.sources))
            logs["loss_agreement"] = logs["loss"] - logs["loss_ce"] - logs["loss_kd"]
            elapsed = time.monotonic() - self._since
            logs["tokens_per_second"] = float(tokens) / elapsed if elapsed > 0 else 0.0
            if torch.cuda.is_available():
                logs["gpu_memory_peak_bytes"] = float(torch.cuda.max_memory_allocated())
            self._reset_sums()
        super().log(logs, start_time)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out metrics on the eval store, with the averaged weights if there are any."""
        if self.eval_reader is None:
            raise UsageError("evaluate: no eval_store was given", "give one with --eval-store")
        model = self._core
        was_training, with_loss = model.training, model.forward
        model.eval()
        model.forward = self._plain_forward
        attach_loss(model, evaluation_spec(self.spec), self.args.loss_chunk)
        sources = reported_sources(self.eval_reader)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        loader = DataLoader(
            _RowNumbers(len(self.eval_reader)),
            batch_size=self.args.per_device_eval_batch_size,
            sampler=list(range(rank, len(self.eval_reader), world)),
            collate_fn=_Collator(self.eval_reader, 1.0, len(sources)),
            num_workers=self.args.dataloader_num_workers,
        )
        try:
            with self.averaged_weights(), self.accelerator.autocast():
                sums = summed(model, loader, self.args.device, len(sources))
        finally:
            model.forward = with_loss
            model.train(was_training)
        if world > 1:
            sums = self.accelerator.reduce(sums, "sum")
        found = held_out_metrics(sums) | source_metrics(sums[len(SUM_NAMES) :], sources)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
        self.log(metrics)
        self._since = time.monotonic()
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its averaged weights, while the context lasts."""
        with self.average.swapped() if self.average else contextlib.nullcontext():
            yield

    # ---- averaged weights in checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial))
        folder = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.average is not None and self.args.should_save:
            # Before the Trainer's own files: trainer_state.json, written last, makes a checkpoint
            # whole.
            folder.mkdir(parents=True, exist_ok=True)
            self.average.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resume_from = Path(resume_from_checkpoint)
        with _reading(self._resume_from):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def start_average(self) -> None:
        """Begin averaging at the weights as they are, or where a checkpoint left off."""
        if self.args.ema_decay == 0:
            return
        self.average = WeightAverage(self._core, self.args.ema_decay)
        if self._resume_from is not None:
            with _reading(self._resume_from):
                self.average.load(self._resume_from)


class _Hooks(TrainerCallback):
    """What the trainer does at moments that only callbacks see."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.start_average()
        self.trainer._reset_sums()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update()


def _opened(store: StoreReader | str | Path) -> StoreReader:
    return open_store(store) if isinstance(store, (str, Path)) else store


@contextlib.contextmanager
def _reading(checkpoint: Path | str | None) -> Iterator[None]:
    """Turn whatever a damaged checkpoint raises into a StoreError."""
    try:
        yield
    except Exception as error:  # safetensors, pickle, torch and json raise many kinds
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(
            f"{checkpoint}: the checkpoint cannot be read: {first}",
            "delete it: the same command then continues from the one before it, or from the start",
        ) from error


def _core_model(model: Any) -> Any:
    """The transformers model inside adapters."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if get_base is not None else model
