"""The step of a student: ``python -m benchmarks.train_step --json FILE [--students 0.5B 135M]``.

The same student, data, batch and optimizer (fp32 weights, bf16 autocast, clipping, fused AdamW)
with our loss from a store, with cross entropy alone by whoever is fastest there, and with two
teachers in memory: times in turn, a block of steps each, and peak memory. Then what DistillTrainer
adds to a bare loop of the same operations, and how long it waits for data (--trainer: that alone).
Under torchrun: tokens/s of DistillTrainer on all processes over those of one, which goes first.
--compile: the layers of all models compiled, as torch_compile=true does it. --smoke: tiny shapes,
on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run, and give the exit code: 6 where a GPU is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--students", nargs="+", default=["0.5B", "135M", "1.5B"])
    parser.add_argument("--smollm", type=Path, help="folder of SmolLM2-135M, for 135M")
    parser.add_argument("--rows", type=int, help="in a batch; default: 8, of 135M 32")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=7, help="timed blocks of each")
    parser.add_argument("--steps", type=int, default=4, help="steps in a block")
    parser.add_argument("--work", type=Path, default=Path("build") / "benchmark-train")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--compile", action="store_true", help="compiled layers")
    parser.add_argument("--trainer", action="store_true", help="DistillTrainer's rows alone")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available() and not options.smoke:
        print("no CUDA GPU here: this benchmark needs one (--smoke to try it)", file=sys.stderr)
        return 6
    if options.smoke:
        options.students, options.seq_len = ["smoke"], 32
        options.blocks, options.steps = 1, 1
    from .common import machine
    from .train_loop import one_process
    from .train_table import table

    document: dict[str, Any] = {
        "machine": machine(),
        "smoke": options.smoke,
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "smollm", "work")},
        "students": {},
    }
    first = os.environ.get("RANK", "0") == "0"
    leads_several = first and int(os.environ.get("WORLD_SIZE", "1")) > 1
    for student in options.students:
        try:
            alone = one_process(options, student) if leads_several else None
            figures = Measurement(options, student).run()
            if alone is not None:
                figures["one process"] = alone
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        document["students"][student] = figures
    if first:
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        print(table(document))
    return 0


class Measurement:
    """All figures of one student."""

    def __init__(self, options: argparse.Namespace, student: str):
        import torch

        from .train_loop import Loops
        from .train_models import ROWS, make_folders, make_store

        self.options, self.student = options, student
        self.rows = options.rows or ROWS[student]
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        work = options.work / student
        run = os.environ.get("TORCHELASTIC_RUN_ID", "alone")
        made = work / f"made-{run}-{os.getppid()}"  # by a process of the same torchrun
        if local == 0:
            work.mkdir(parents=True, exist_ok=True)
            source = options.smollm if student == "135M" else None
            folders = make_folders(work, student, source, self.device)
            # An epoch is longer than a run: at its end a feed starts anew, and is waited for.
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            tokens = self.rows * options.seq_len * (options.steps + 1) * 8 * processes
            make_store(work, folders, tokens, options.seq_len, self.device)
            made.touch()
        while not made.exists():  # the first process of this host makes them
            time.sleep(1.0)
        self.folders, self.store = [work / "one", work / "two"], work / "store"
        self.loops = Loops(options, self.rows, self.folders[0], self.store, self.device)

    def run(self) -> dict[str, Any]:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return self.loops.on_all_processes()
        found = {"ratios": {}} if self.options.trainer else self.losses()
        found["ratios"] |= (trainer := self.loops.in_turn())["ratios"]
        return {**found, "trainer": {k: v for k, v in trainer.items() if k != "ratios"}}

    # ---- our loss, cross entropy, teachers in memory ----

    def losses(self) -> dict[str, Any]:
        import torch

        from distill.data import Feed
        from distill.student import CHUNK_BESIDE_RECOMPUTED, attach_loss, compile_layers
        from logitcache import open_store
        from logitcache.causal_lm import load_causal_lm
        from logitcache.packed_attention import use_varlen
        from logitcache_kernels import DistillSpec

        from .train_models import LARGE, cross_entropies, online_loss
        from .train_table import ratios

        spec = DistillSpec(temperature=2.0)
        model = load_causal_lm(self.folders[0], torch.float32, self.device).train()
        use_varlen(model)  # in every column
        if self.options.compile:
            torch.compiler.reset()  # what the student before has left
            compile_layers(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        feed = Feed(open_store(self.store), spec.temperature, self.device, 0)
        inputs = next(feed.inputs([list(range(self.rows))]))
        inputs.pop("rows")
        num_items = torch.full((), float(inputs.pop("num_valid")), device=self.device)
        attach_loss(model, spec)
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: model(**inputs, num_items=num_items)["loss"]
        }
        for name, loss in cross_entropies(self.options.smoke).items():
            calls[name] = lambda loss=loss: loss(model, inputs)
        timings = self.timed(calls, model, optimizer)
        dense = online_loss if self.options.smoke else torch.compile(online_loss)
        beside = partial(self.beside_teachers, model, optimizer, inputs, calls["ours"], dense, spec)
        timings |= beside(self.student, "same size")
        timings |= beside(LARGE[self.student], "three times")
        # Activations recomputed: last, for it stays so.
        if self.options.compile:
            torch.compiler.reset()  # it holds on to layers of the teachers
        recompute = getattr(model, "activation_checkpointing_enable", None)
        (recompute or model.gradient_checkpointing_enable)()
        attach_loss(model, spec, max_chunk=CHUNK_BESIDE_RECOMPUTED)
        alone = {name: calls[name] for name in ("ours", "ce liger") if name in calls}
        found = self.timed(alone, model, optimizer)
        timings |= {f"{name} alone, recomputed": value for name, value in found.items()}
        timings |= beside(self.student, "recomputed")
        return {
            "attention": model.config._attn_implementation,
            "parameters": sum(p.numel() for p in model.parameters()),
            "entries_in_a_batch": [t["ids_RK"].shape[1] for t in inputs["teachers"]],
            "timings": timings,
            "ratios": ratios(timings),
        }

    def beside_teachers(
        self, model: Any, optimizer: Any, inputs: Any, ours: Any, dense: Any, spec: Any,
        shape: str, name: str,
    ) -> dict[str, dict[str, float]]:  # fmt: skip
        """Our step and one with two teachers of a shape in memory, in turn; both with them there.

        Nothing where they do not fit. They are gone when this returns.
        """
        import torch

        from distill.student import compile_layers
        from logitcache.packed_attention import known_bounds, use_varlen

        from .models import make_model

        if self.on_gpu:
            torch.cuda.empty_cache()
        try:
            teachers = [make_model(shape, torch.bfloat16, self.device, n) for n in (1, 2)]
            for teacher in teachers:
                use_varlen(teacher)
                if self.options.compile:
                    compile_layers(teacher)
            at = {key: inputs[key] for key in ("input_ids", "position_ids")}

            def logits(model: Any) -> Any:
                segments = inputs["bounds"], len(inputs["input_ids"]), inputs["longest"]
                with known_bounds(*segments):
                    return model(**at, use_cache=False).logits.flatten(0, 1)

            def online() -> Any:
                with torch.no_grad():
                    given = [logits(teacher) for teacher in teachers]
                logits_RV = logits(model)
                return dense(logits_RV, *given, inputs["labels"].flatten(), spec)

            found = self.timed({"ours": ours, "online": online}, model, optimizer)
        except torch.OutOfMemoryError:
            return {}
        return {f"{key}, {name}": value for key, value in found.items()}

    def timed(
        self, calls: dict[str, Callable[[], Any]], model: Any, optimizer: Any
    ) -> dict[str, dict[str, float]]:
        """Milliseconds of a step and peak bytes of each, blocks in turn."""
        import torch

        from .common import blocks_in_turn

        gc.collect()  # compiled layers of teachers that are gone refer to one another

        def run(name: str, steps: int) -> None:
            for _ in range(steps):
                with torch.autocast(self.device.type, torch.bfloat16):
                    loss = calls[name]()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        return blocks_in_turn(calls, run, self.options.blocks, self.options.steps)


if __name__ == "__main__":
    raise SystemExit(main())
