"""``distill evaluate`` and ``distill generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from logitcache.command import Options, common_options, quiet_libraries, stop_on_signal
from logitcache.errors import InputError, UsageError


@click.command()
@click.option("--model", type=Path, required=True, help="Model folder to evaluate.")
@click.option("--suite", type=Path, required=True, help="JSONL of questions.")
@click.option("--reference", type=Path, help="Teacher 1's folder: gives gates and a verdict.")
@click.option("--laws", type=Path, help="YAML or JSON file of rules for what is said.")
@click.option("--out", type=Path, help="File for all that was found, as JSON.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@common_options
def evaluate(
    options: Options,
    model: Path,
    suite: Path,
    reference: Path | None,
    laws: Path | None,
    out: Path | None,
    assignments: tuple[str, ...],
    device: str,
) -> None:
    """Score a model on a suite; with --reference, judge it by the four gates.

    The exit code is 0 whatever the verdict: promote and evolve act on it, this command tells it.
    Settings: epsilon, delta, theta, min_items, min_tone_items, max_new_tokens, bootstrap_samples,
    confidence, seed, time_limit_s.
    """
    from logitcache.config import read_settings
    from logitcache.files import to_json, write_atomic

    from .gate_settings import gate_settings
    from .suite import read_suite

    settings = gate_settings(read_settings(None, assignments, {}))
    read_suite(suite)  # before torch takes its seconds to load
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out}: expected a file, found a folder")
    quiet_libraries()
    from .gates import Watch, judge
    from .law_watch import training_violations
    from .scoring import score_alone

    with stop_on_signal() as stop:
        if reference is None:
            watch = Watch(stop, None)
            document = score_alone(
                model, suite, laws=laws, settings=settings, device=device, check=watch
            )
        else:
            document = judge(
                model,
                reference,
                suite,
                laws=laws,
                settings=settings,
                training_violations=training_violations(model),
                device=device,
                stop=stop,
                note=options.note,
            )
    if out is not None:
        write_atomic(out, to_json(document))
    options.result(document, _scores(document) if reference is None else verdict_text(document))


def _scores(document: dict[str, Any]) -> str:
    lines = [f"{'':12}{'score':>8}{'items':>8}   interval"]
    for name, entry in document["scores"].items():
        lines.append(
            f"{name:12}{_number(entry['score']):>8}{entry['items']:8}   "
            f"{_interval(entry['interval'])}"
        )
    for broken in document["violations"]:
        lines.append(f"law {broken['rule']} broken by {broken['id']}: {plain(broken['detail'])}")
    return "\n".join(lines)


def verdict_text(document: dict[str, Any]) -> str:
    """The verdict and its gates as a table."""
    lines = [
        f"{'gate':12}{'score':>8}{'teacher 1':>11}{'threshold':>11}{'items':>7}   "
        f"{'interval':18}passed"
    ]
    for gate in document["gates"]:
        sign = {"tone": "<=", "laws": "<="}.get(gate["name"], ">=")
        threshold = "" if gate["threshold"] is None else f"{sign} {gate['threshold']:.3f}"
        lines.append(
            f"{gate['name']:12}{_number(gate['score']):>8}{_number(gate['teacher_score']):>11}"
            f"{threshold:>11}{gate['items']:7}   {_interval(gate['interval']):18}"
            f"{'yes' if gate['passed'] else 'NO'}"
        )
    lines += ["", f"{document['candidate']} against {document['reference']}: {document['verdict']}"]
    lines += [f"  {plain(reason)}" for reason in document["reasons"]]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"


@click.command()
@click.option(
    "--model", "models", type=Path, multiple=True, required=True, help="Model folder; or several."
)
@click.option("--weight", "weights", type=float, multiple=True, help="Of each model.  [default: 1]")
@click.option(
    "--mix",
    type=click.Choice(("logits", "probs")),
    default="logits",
    show_default=True,
    help="What is averaged over several models.",
)
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text; or several.")
@click.option("--chat", is_flag=True, help="The prompt is a user's turn: use the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--sample", is_flag=True, help="Draw tokens by chance; else the likeliest is taken.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="With --sample.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="With --sample.")
@click.option("--seed", type=click.IntRange(0), help="With --sample.  [default: 0]")
@click.option("--beams", type=click.IntRange(1), default=1, show_default=True)
@click.option("--stream", is_flag=True, help="Print the text as it is made.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@common_options
def generate(
    options: Options,
    models: tuple[Path, ...],
    weights: tuple[float, ...],
    mix: str,
    prompts: tuple[str, ...],
    chat: bool,
    max_new_tokens: int,
    sample: bool,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    beams: int,
    stream: bool,
    device: str,
) -> None:
    """Go on with a text: one model, or several generations as one (never their weights averaged).

    \b
    distill generate --model GEN10 --prompt "Once upon a time"
    distill generate --model GEN10 --weight 3 --model GEN9 --weight 1 --prompt "Once upon a time"
    """
    drawn = {"--temperature": temperature, "--top-p": top_p, "--seed": seed}
    problems = [
        f"{name}: expected --sample with it"
        for name, value in drawn.items()
        if value is not None and not sample
    ]
    if stream and (options.as_json or beams > 1 or len(prompts) > 1):
        problems.append("--stream: expected one --prompt, and neither --beams nor --json")
    if weights and len(weights) != len(models):
        problems.append(f"--weight: expected one for each of {len(models)} models, {len(weights)}")
    if problems:
        raise UsageError("\n".join(problems))
    quiet_libraries()
    import torch
    from transformers import GenerationConfig

    from logitcache.causal_lm import choose_device, choose_dtype

    from .ensemble import EnsembleForCausalLM, check_mix, check_same_tokenizer, weight_bytes
    from .generate import Speaker

    shares = list(weights) or [1.0] * len(models)
    check_mix(len(models), shares, mix)
    check_same_tokenizer(models)
    dtype = choose_dtype("auto", choose_device(device))
    sizes = [weight_bytes(folder, dtype) for folder in models]
    if len(models) > 1:
        parts = ", ".join(
            f"{folder.resolve().name} {size / 1e6:,.1f}"
            for folder, size in zip(models, sizes, strict=True)
        )
        options.note(f"weights in memory: {sum(sizes) / 1e6:,.1f} MB ({parts})")
    ensemble, tokenizer = EnsembleForCausalLM.from_folders(models, shares, mix, device)
    speaker = Speaker(ensemble, tokenizer)
    rows = [_tokens(speaker, prompt, chat, max_new_tokens) for prompt in prompts]
    # Neutral where not asked for: transformers would draw from the first 50 tokens.
    chance = {"temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=sample,
        eos_token_id=sorted(speaker.stop_ids) or None,
        pad_token_id=min(speaker.stop_ids, default=0),
        **(chance if sample else {}),
    )
    if sample:
        torch.manual_seed(seed or 0)
    streamer = _streamer(tokenizer) if stream else None
    outputs = speaker.generate_with(rows, config, streamer)
    document = {
        "outputs": [
            {"prompt": prompt, "text": output.text, "tokens": len(output.token_ids)}
            for prompt, output in zip(prompts, outputs, strict=True)
        ],
        "models": [
            {"name": folder.resolve().name, "weight": share / sum(shares), "bytes": size}
            for folder, share, size in zip(models, shares, sizes, strict=True)
        ],
        "mix": mix,
    }
    if not stream:
        options.result(document, "\n\n".join(plain(output.text) for output in outputs))


def _tokens(speaker: Any, prompt: str, chat: bool, max_new_tokens: int) -> list[int]:
    from logitcache.documents import Document

    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("--prompt: not UTF-8") from None
    turn = [{"role": "user", "content": prompt}]
    document = Document("--prompt", None if chat else prompt, turn if chat else None, None)
    tokens: list[int] = speaker.encoder.prompt(document)
    speaker.check_length("--prompt", len(tokens), max_new_tokens)
    return tokens


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            click.echo(plain(text), nl=stream_end)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def plain(text: str) -> str:
    """A text without control characters, which a terminal would obey: \\x1b stands for one."""
    return "".join(
        c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}"
        for c in text
    )
