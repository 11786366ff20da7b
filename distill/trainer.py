"""DistillTrainer: a transformers.Trainer whose data is a store and whose loss is the gated
two-teacher loss."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from logitcache import StoreReader, open_store
from logitcache.causal_lm import fits_decoder_and_head
from logitcache.errors import UsageError
from logitcache.reader import TeacherBatch

from .ahead import deaths_explained
from .checkpoint import rotate, write_checkpoint
from .config import DistillConfig
from .data import Feed, RowOrder, row_loader, share_of
from .ema import WeightAverage
from .evaluate import evaluation_spec, held_out_metrics, summed
from .finite import FiniteCheck, skip_if
from .fit import check_adapters, check_model_fits, check_store, core_model, split_rows
from .identity import plain, settings_identity, store_identity
from .processes import agreed, set_up
from .source_loss import reported_sources, source_inputs, source_metrics
from .state import SavedState, checkpoint_files
from .student import (
    CHUNK_BESIDE_RECOMPUTED,
    SUM_NAMES,
    as_metrics,
    attach_loss,
    compile_layers,
    zero_sums,
)
from .taboo import configured_taboo


class DistillTrainer(Trainer):
    """Train a student on a store.

    model: a causal language model (PEFT models too). args: DistillConfig. store, eval_store: a
    StoreReader or a path. processing_class: the student's tokenizer, whose content must be that of
    the store. Everything else is transformers.Trainer's. evaluate() uses the averaged weights and
    reports, on the eval store or on the held-out rows of the store (args.eval_rows), loss (held-out
    cross entropy), kl (to the gated target at T = 1) and the shares of the strategies.

    Raises UsageError or StoreError if store, student and settings do not fit; NonFiniteError before
    anything is saved of a step whose loss or gradient is not finite (on a CPU, and with fused
    optimizers, before the step is taken).
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
        self.num_train_rows, held_out = split_rows(self.reader, args, eval_store is not None)
        self.eval_reader = self.reader if held_out else None
        self._eval_start = self.num_train_rows if held_out else 0
        if eval_store is not None:
            self.eval_reader = _opened(eval_store)
        core = core_model(model)
        check_adapters(model)
        for reader in {self.reader, self.eval_reader} - {None}:
            assert reader is not None
            check_store(reader, processing_class, core.config, args)
            check_model_fits(reader, core)
        self._dense = not fits_decoder_and_head(
            core, Path(getattr(core.config, "_name_or_path", "") or "student")
        )
        if self._dense:
            warnings.warn(
                f"{type(core).__name__}: its logits are not those of its decoder and output head; "
                "the loss is computed from whole logits, which takes more memory",
                stacklevel=2,
            )
        self.spec = args.spec()
        self.sources = reported_sources(self.reader)
        self.taboo = configured_taboo(args, processing_class)
        self._core = core
        self.attention = str(core.config._attn_implementation)
        self._plain_forward = core.forward
        self._num_weights = int(core.num_parameters(exclude_embeddings=True))
        self._loss_options: dict[str, Any] = {
            "chunk": args.loss_chunk,
            "max_chunk": CHUNK_BESIDE_RECOMPUTED if args.gradient_checkpointing else None,
            "dense": self._dense,
        }
        attach_loss(core, self.spec, **self._loss_options)
        if args.fsdp and args.world_size == 1:
            raise UsageError("fsdp: shards need several processes", "start them with torchrun")
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.reader,
            eval_dataset=self.eval_reader,
            processing_class=processing_class,
            **kwargs,
        )
        set_up(self.accelerator, args)
        if args.torch_compile:
            compile_layers(core, args.torch_compile_backend, args.torch_compile_mode)
        self.model_accepts_loss_kwargs = True
        self.average: WeightAverage | None = None
        self.finite = FiniteCheck(args.device)
        self.add_callback(_Hooks(self))
        self._saved: SavedState | None = None
        self._norm: Any = None
        self._feed = Feed(
            self.reader,
            self.spec.temperature,
            args.device,
            args.dataloader_num_workers or 0,
            self._more_inputs,
        )
        self._batches: tuple[Any, Generator[dict[str, Any]]] | None = None
        self._reset_sums()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it."""
        return plain(
            {"store": store_identity(self.reader), "settings": settings_identity(self.args)}
        )

    # ---- data ----

    def _more_inputs(self, batch: TeacherBatch) -> dict[str, Any]:
        """Where each position is from, and what the student must not say there."""
        more = source_inputs(self.reader, batch, len(self.sources))
        return more if self.taboo is None else more | self.taboo.inputs(batch.rows)

    def row_order(self) -> RowOrder:
        """Which rows this process trains on, epoch by epoch."""
        return RowOrder(
            self.num_train_rows,
            self._train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            shuffle=self.args.train_sampling_strategy != "sequential",
            drop_last=self.args.dataloader_drop_last,
            process_index=self.args.process_index,
            num_processes=self.args.world_size,
        )

    def get_train_dataloader(self) -> DataLoader[int]:
        self._order = self.row_order()
        return row_loader(self._order)

    def set_epoch(self, global_step: int) -> None:
        """The epoch follows from the step: the state of the data's order is that one integer."""
        accumulated = self.args.gradient_accumulation_steps
        self._order.set_epoch(global_step // max(-(-len(self._order) // accumulated), 1))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Inputs of one optimizer step and the valid positions in them, the mean over ranks, as DDP
        averages gradients over them. A factor of the loss itself would have to be brought to the
        gradients that were made with it."""
        if self._batches is None or self._batches[0] is not epoch_iterator:
            self.close_feed()
            self._batches = epoch_iterator, self._feed.inputs(epoch_iterator)
        if self.state.global_step >= self.state.max_steps:  # taken up after its last step
            self.control.should_training_stop = True
            num_batches = 0
        inputs = list(itertools.islice(self._batches[1], num_batches))
        valid = sum(part.pop("num_valid") for part in inputs)
        # Filled on the device: a copy from the host would have to be waited for.
        count = torch.full((), float(valid), device=self.args.device)
        processes = self.accelerator.num_processes
        if processes > 1:
            count = self.accelerator.reduce(count, "mean")
        return inputs, count.clamp_min(1.0 / processes)

    def close_feed(self) -> None:
        """End the processes that read ahead."""
        if self._batches is not None:
            self._batches[1].close()
            self._batches = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers.Trainer."""
        # What is there by now stays: else Python's collector goes through all of it in the middle
        # of a step, 0.2 to 0.4 s, and with it every process that waits for this one.
        gc.collect()
        gc.freeze()
        with deaths_explained():
            try:
                return super().train(*args, **kwargs)
            finally:
                self.close_feed()
                gc.unfreeze()

    # ---- loss ----

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of a micro-batch: its sum over num_items_in_batch, see get_batch_samples."""
        rows = inputs.pop("rows")
        output = model(**inputs, num_items=num_items_in_batch)
        self._sums += output["sums"].detach()
        self._tokens += inputs["num_tokens"]
        self.finite.add(rows, output["row_losses"])
        return (output["loss"], output) if return_outputs else output["loss"]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers.Trainer's, which counts the weights anew at every step."""
        return 6 * inputs["input_ids"].numel() * self._num_weights

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._norm

    def check_step(self) -> None:
        """Before the optimizer step; see FiniteCheck."""
        norm = self._norm
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        # With fp16 an infinite gradient is the scaler's business: it skips the step.
        has_scaler = self.accelerator.scaler is not None
        is_finite = self.finite.close_step(self.state.global_step + 1, None if has_scaler else norm)
        if self.finite.on_gpu and not has_scaler:
            skip_if(self.optimizer, is_finite)

    # ---- metrics ----

    def _reset_sums(self) -> None:
        self._sums = zero_sums(len(self.sources), self.args.device)
        self._tokens, self._since = 0, time.monotonic()
        self._feed.seconds_waited = 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the loss knows to a training record."""
        if "loss" in logs:
            self.finite.wait()
            self.finite.last_losses.append(logs["loss"])
            sums = self._sums
            tokens = torch.tensor(float(self._tokens), device=sums.device, dtype=torch.float64)
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, "sum")
                tokens = self.accelerator.reduce(tokens, "sum")
            sums = sums.cpu()  # one wait for all that is read of it
            logs.update(as_metrics(sums))
            logs.update(source_metrics(sums[len(SUM_NAMES) :], self.sources))
            logs["loss_agreement"] = logs["loss"] - logs["loss_ce"] - logs["loss_kd"]
            elapsed = max(time.monotonic() - self._since, 1e-9)
            logs["tokens_per_second"] = float(tokens) / elapsed
            logs["data_wait_share"] = self._feed.seconds_waited / elapsed
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
        """Held-out metrics, with the averaged weights if there are any."""
        if self.eval_reader is None:
            raise UsageError(
                "evaluate: no held-out rows were given", "give --eval-store, or set eval_rows"
            )
        self.finite.wait()
        started = time.monotonic()
        assert self.model is not None
        was_training, with_loss = self._core.training, self._core.forward
        self.model.eval()
        self._core.forward = self._plain_forward
        attach_loss(self._core, evaluation_spec(self.spec), **self._loss_options)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = share_of(
            len(self.eval_reader) - self._eval_start,
            self.args.per_device_eval_batch_size,
            rank,
            world,
        )
        rows = [[row + self._eval_start for row in batch] for batch in rows]
        reader = self.eval_reader
        sources = reported_sources(reader)
        feed = Feed(
            reader,
            1.0,
            self.args.device,
            self.args.dataloader_num_workers or 0,
            lambda batch: source_inputs(reader, batch, len(sources)),
        )
        try:
            with (
                self.averaged_weights(),
                self.accelerator.autocast(),
                deaths_explained(),
                contextlib.closing(feed.inputs(rows)) as batches,
            ):
                # Not the core model alone: what FSDP keeps in shards is put together for a call of
                # the module that it wrapped.
                sums = summed(self.model, batches, self.args.device, len(sources))
        finally:
            self._core.forward = with_loss
            self.model.train(was_training)
        if world > 1:
            sums = self.accelerator.reduce(sums, "sum")
        found = held_out_metrics(sums) | source_metrics(sums[len(SUM_NAMES) :], sources)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in found.items()}
        self.log(metrics)
        self._since += time.monotonic() - started  # of no step
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its averaged weights, while the context lasts."""
        with self.average.swapped() if self.average else contextlib.nullcontext():
            yield

    # ---- checkpoints: state.py and checkpoint.py instead of the Trainer's pickles ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.finite.wait()
        self.store_flos()
        folder = Path(self._get_output_dir(trial=trial))
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states: Any = self.state.stateful_callbacks
                states[type(callback).__name__] = callback.state()
        files = checkpoint_files(self)

        def write() -> str:
            path = write_checkpoint(folder, self.state.global_step, files)
            kept = self.state.best_model_checkpoint
            rotate(folder, self.args.save_total_limit, None if kept is None else Path(kept))
            return str(path)

        path = agreed(self.args, write)
        if self.args.push_to_hub:
            self._push_from_checkpoint(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._saved = SavedState(Path(resume_from_checkpoint))
        self._saved.check_identity(self.identity())
        self._saved.load_weights(self._core)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._saved is not None:
            self._saved.load_optimizer(self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._saved is not None:
            self._saved.load_scaler(self.accelerator.scaler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._saved is not None:
            self._saved.load_random_state(self.args.process_index)
            self._saved = None  # the last of it

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        best = SavedState(Path(self.state.best_model_checkpoint))
        best.load_weights(self._core)
        if self.average is not None:
            best.load_average(self.average)

    def start_average(self) -> None:
        """Begin averaging at the weights as they are, or where a checkpoint left off."""
        if self.args.ema_decay == 0:
            return
        self.average = WeightAverage(self._core, self.args.ema_decay)
        if self._saved is not None:
            self._saved.load_average(self.average)


class _Hooks(TrainerCallback):
    """What the trainer does at moments that only callbacks see."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.start_average()
        self.trainer._reset_sums()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.set_epoch(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finite.wait()


def _opened(store: StoreReader | str | Path) -> StoreReader:
    return open_store(store) if isinstance(store, (str, Path)) else store
