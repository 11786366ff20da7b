"""Two questions about lineages, on the bundled generations and a CPU; docs/lineage.md has the
answers.

python -m benchmarks.lineage --out WORK --json FILE     about ten minutes of one core

turns:   three turns in a row, each with texts of a new style (shouted, without punctuation, words
         in reverse order). How much of what the first generation learned is left, with replay and
         without? The gates stand wide open here, so that the lineage without replay goes on too.
methods: what is the same budget of training worth with gated blending, teacher 1 alone, or ungated
         blending? Beside them, for the record only, the mean of the two generations' weights: as
         they are, and with the neurons of one in another order, which changes none of its
         predictions. The product averages no generations.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.bundled import BUNDLED
from distill.bundled.make import FRESH_EVERY, RECIPES, read_documents
from distill.bundled.make_suite import places
from distill.config import DistillConfig
from distill.demo import TRAIN_SETTINGS
from distill.evaluate import evaluate_on_store
from distill.evolve import evolve
from distill.train import TrainRequest, train
from logitcache import build, open_store
from logitcache.causal_lm import load_causal_lm
from logitcache.environment import describe_environment

SEQ_LEN, SEEDS, CPU = 256, (0, 1, 2), torch.device("cpu")
TEACHERS = {"Luna-G009": BUNDLED / "teacher2", "Luna-G010": BUNDLED / "teacher1"}
DOCUMENTS, DOCUMENT_CHARS, ITEMS = 100, 600, 24
TURN = {"steps": 60, "lr": 1e-3}
TURN_TRAIN = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "use_cpu": True}
METHOD_TRAIN = {**TRAIN_SETTINGS, "per_device_train_batch_size": 8}
METHODS: dict[str, dict[str, Any]] = {
    "gated blending": {},
    "teacher 1 alone": {},
    "ungated blending": {"js_threshold": 1.01},  # JS is at most 1 bit
}
EPSILON = 0.05  # the recall gate's


def _shouted(text: str) -> str:
    return text.upper()


def _unpunctuated(text: str) -> str:
    return re.sub(r"[^a-z ]+", "", re.sub(r"\s+", " ", text.lower()))


def _reversed_words(text: str) -> str:
    return "\n".join(" ".join(reversed(line.split())) for line in text.split("\n"))


STYLES: dict[str, Callable[[str], str]] = {
    "Luna-G011": _shouted,
    "Luna-G012": _unpunctuated,
    "Luna-G013": _reversed_words,
}


def _corpus() -> tuple[list[str], list[str], list[str]]:
    """What the teachers were shown, what nobody was, and held-out documents."""
    corpus = read_documents(BUNDLED / "text" / "corpus.jsonl")
    shown = [d for i, d in enumerate(corpus) if i % FRESH_EVERY != FRESH_EVERY - 1]
    fresh = [d for i, d in enumerate(corpus) if i % FRESH_EVERY == FRESH_EVERY - 1]
    return shown, fresh, read_documents(BUNDLED / "text" / "heldout.jsonl")


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _write_turn_files(work: Path) -> None:
    """Texts of the generations and of the turns, and a suite for each turn."""
    shown, fresh, held_out = _corpus()
    (_, end9), (start10, _) = (recipe.part for recipe in RECIPES)
    own = {"Luna-G009": shown[: round(end9 * len(shown))]}
    own["Luna-G010"] = shown[round(start10 * len(shown)) :]
    for name, documents in own.items():
        _write_jsonl(work / f"{name}.jsonl", [{"text": text} for text in documents])
    # Places that the first generation was trained on, and the second was not.
    only9 = shown[: round(start10 * len(shown))]
    known = [p for d in only9[:: len(only9) // ITEMS] for p in list(places(d, 250, 160))[:1]]
    recall = [{"kind": "recall", "prompt": p, "expect": e, "score": "tokens"} for p, e in known]
    for name, style in STYLES.items():
        texts = [style(d[:DOCUMENT_CHARS]) for d in fresh[:DOCUMENTS]]
        _write_jsonl(work / f"{name}.jsonl", [{"text": text} for text in texts])
        items = list(recall[:ITEMS])
        for prompt, answer in (p for d in held_out[:12] for p in list(places(d, 250, 160))[:1]):
            styled = {"prompt": style(prompt), "expect": " " + style(answer).strip()}
            items.append({"kind": "generalize", "score": "tokens", **styled})
        items += [{"kind": "tone", "prompt": style(d[:100])} for d in held_out[12:16]]
        _write_jsonl(work / f"suite-{name}.jsonl", items)


def _manifest(number: int, replay: bool, arm: Path) -> dict[str, Any]:
    names = [f"Luna-G{n:03}" for n in (number, number - 1, number - 2)]
    child, parent, grandparent = names

    def path(name: str) -> str:
        return str(TEACHERS.get(name, arm / "lineage" / "generations" / name))

    return {
        "evolution_request": {
            "parent_gen": parent,
            "grandparent_gen": grandparent,
            "child_gen": child,
            "training_method": "teacher_student_distillation",
        },
        "teachers": {
            "teacher1": {"gen": number - 1, "role": "primary", "path": path(parent)},
            "teacher2": {
                "gen": number - 2,
                "role": "stabilizing_critic",
                "path": path(grandparent),
            },
        },
        "training_params": {
            "method": "logit_blending_kd",
            "alpha": 0.1,
            "beta": 0.9,
            "gamma": 0.0,
            "temperature": 2.0,
            **TURN,
        },
        "stabilizers": {
            "ema": True,
            "ema_decay": 0.999,
            "replay_buffer": replay,
            "replay_size": 100,
            "token_masking": False,
        },
        "data": {"train": [f"../{child}.jsonl"], "suite": f"../suite-{child}.jsonl"},
        "replay": {"data": {n: [f"../{n}.jsonl"] for n in (parent, grandparent) if n in TEACHERS}},
        "gates": {"epsilon": 1.0, "delta": 0.0, "theta": 2.0, "max_new_tokens": 4},
        "store": {"seq_len": SEQ_LEN, "device": "cpu"},
        "train": {**TURN_TRAIN, "save_strategy": "no"},
    }


def three_turns(work: Path) -> list[dict[str, Any]]:
    """Recall on the first generation's items after each turn, with replay and without."""
    _write_turn_files(work)
    records = []
    for replay in (True, False):
        arm = work / ("with-replay" if replay else "without-replay")
        arm.mkdir(exist_ok=True)
        for number in (11, 12, 13):
            path = arm / f"{number}.json"
            path.write_text(json.dumps(_manifest(number, replay, arm)), encoding="utf-8")
            outcome = evolve(path, note=print)
            out = arm / "runs" / f"Luna-G{number:03}"
            stages = json.loads((out / "evolve.json").read_text(encoding="utf-8"))["stages"]
            gates = {gate["name"]: gate for gate in outcome.verdict["gates"]}
            records.append(
                {
                    "child": f"Luna-G{number:03}",
                    "replay": replay,
                    "verdict": outcome.verdict["verdict"],
                    "sources": stages["build"]["sources"],
                    **{name: gates[name]["score"] for name in ("recall", "generalize")},
                    **{
                        f"teacher1_{n}": gates[n]["teacher_score"] for n in ("recall", "generalize")
                    },
                    "items": gates["recall"]["items"],
                }
            )
    return records


def _stores(work: Path) -> dict[str, Path]:
    """A store of both teachers, one of teacher 1, and one of held-out text."""
    _, fresh, _ = _corpus()
    _write_jsonl(work / "news.jsonl", [{"text": text} for text in fresh])
    held_out = {"estimator": "topk", "top_k": 256, "min_prob": 0.0, "precision": "high"}
    teacher1, teacher2 = TEACHERS["Luna-G010"], TEACHERS["Luna-G009"]
    news, unseen = (work / "news.jsonl",), (BUNDLED / "text" / "heldout.jsonl",)
    common = {"teacher1": teacher1, "seq_len": SEQ_LEN, "device": "cpu"}
    build(**common, teacher2=teacher2, data=news, out=work / "both")
    build(**common, data=news, out=work / "one")
    build(**common, teacher2=teacher2, data=unseen, out=work / "held-out", **held_out)
    return {name: work / name for name in ("both", "one", "held-out")}


def methods(work: Path) -> dict[str, Any]:
    """Held-out loss and KL to the gated target of each method, and of the models as they are."""
    stores = _stores(work)
    reader = open_store(stores["held-out"])
    spec = DistillConfig(output_dir=str(work), **METHOD_TRAIN).spec()
    keys = ("loss", "kl")
    found: dict[str, Any] = {}

    def measure(name: str, model: Any) -> None:
        metrics = evaluate_on_store(model, reader, spec)
        found[name] = [{key: metrics[key] for key in keys}]

    for name, folder in TEACHERS.items():
        measure(name, load_causal_lm(folder, torch.float32, CPU))
    measure("mean of the weights", _mean_of_weights(reorder=False))
    measure("mean of the weights, neurons reordered", _mean_of_weights(reorder=True))
    for name, changes in METHODS.items():
        found[name] = []
        for seed in SEEDS:
            store = stores["one" if name == "teacher 1 alone" else "both"]
            settings = {**METHOD_TRAIN, **changes, "seed": seed}
            out = work / f"{name.replace(' ', '-')}-{seed}"
            request = TrainRequest(store, TEACHERS["Luna-G010"], out, None, settings)
            train(request, note=print)
            model = load_causal_lm(out, torch.float32, CPU)
            metrics = evaluate_on_store(model, reader, spec)
            found[name].append({key: metrics[key] for key in keys})
    return {
        name: {
            "runs": runs,
            **{f"mean_{key}": statistics.mean(run[key] for run in runs) for key in keys},
            "spread_loss": max(r["loss"] for r in runs) - min(r["loss"] for r in runs),
        }
        for name, runs in found.items()
    }


def _mean_of_weights(reorder: bool) -> Any:
    """The mean of both generations' weights: what this project refuses to make of a lineage.

    reorder: teacher 2's hidden neurons in another order first. Its predictions stay the same, bit
    for bit but for rounding: nothing tells which neuron of one model belongs to which of another.
    """
    one, two = (load_causal_lm(f, torch.float32, CPU) for f in reversed(TEACHERS.values()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in two.model.layers if reorder else ():
            order = torch.randperm(layer.mlp.up_proj.weight.shape[0], generator=generator)
            for linear in (layer.mlp.up_proj, layer.mlp.gate_proj):
                linear.weight.copy_(linear.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
        for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
            mine.copy_((mine + theirs) / 2)
    return one


def tables(document: dict[str, Any]) -> str:
    """Both answers as text."""
    lines = ["turns: token accuracy", f"{'':12}{'replay':>8}{'first items':>13}{'new style':>11}"]
    for turn in document["turns"]:
        label = "yes" if turn["replay"] else "no"
        lines.append(
            f"{turn['child']:12}{label:>8}{turn['recall']:13.3f}{turn['generalize']:11.3f}"
        )
        if turn["child"] == "Luna-G011":
            lines.insert(-1, f"{'Luna-G010':12}{'':8}{turn['teacher1_recall']:13.3f}")
    lines += ["", f"{'methods, held-out text':42}{'loss':>8}{'spread':>8}{'KL':>9}"]
    for name, values in document["methods"].items():
        lines.append(
            f"{name:42}{values['mean_loss']:8.4f}{values['spread_loss']:8.4f}"
            f"{values['mean_kl']:9.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    for part in ("turns", "methods"):
        (given.out / part).mkdir(parents=True, exist_ok=True)
    document = {
        "environment": describe_environment(),
        "epsilon": EPSILON,
        "settings": {"turn": {**TURN, **TURN_TRAIN}, "methods": METHOD_TRAIN, "seeds": SEEDS},
        "turns": three_turns(given.out / "turns"),
        "methods": methods(given.out / "methods"),
    }
    given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(tables(document))


if __name__ == "__main__":
    main()
