"""Make the bundled material again: text, tokenizer and the two generations of the demo.

    python -m distill.bundled.make --out DIR [--text input.txt]

* The text (tinyshakespeare, public domain) is cut between speeches into documents of 200 to 4000
  characters. Every 20th document is held out, so the held-out text comes from all over it; no
  tokenizer and no model here ever sees it.
* Teacher 2 (generation N-1) is trained from scratch on the earlier plays. Teacher 1 (generation N)
  starts as teacher 2 and is trained on the later ones, with an overlap: it predicts held-out text
  better, and has forgotten a little of the plays that only its parent saw. Every fifth document is
  kept from both: news for the student.
* Measured, as saved (two CPU cores, 2026-11): held-out loss 4.068 for teacher 2 and 3.909 for
  teacher 1 (3.97 to 3.99 on the first half of the held-out text, 4.17 to 3.82 on the second). At
  the default thresholds the gate blends 80 % of held-out positions and 81 % of the corpus's:
  longer or faster training of teacher 1 (250 steps at 1e-3) leaves 49 %, and a student then
  follows mostly the text and not its teachers.

Without --text the bundled documents are joined again, so a clone is all that it needs. On one
machine and thread count a second run gives the same bytes; elsewhere the weights differ in
rounding.
"""

import copy
import json
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distill.bundled import BUNDLED

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

# Shape suffixes: B rows of a batch, L row length, N tokens of a stream.

SEED = 20251024
DOCUMENT_CHARS = (200, 4000)  # several to a row of 256 tokens, and several rows to one
HELD_OUT_EVERY = 20  # 5 % of the documents
FRESH_EVERY = 5  # of the others: never shown to a teacher
VOCAB_SIZE = 2048  # at 192 dimensions the embedding is a fifth of the model
BATCH_ROWS, ROW_TOKENS = 8, 512  # the row is as long as the longest position that is promised
EOS, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
EOS_ID, PAD_ID = 0, 1  # the trainer numbers special tokens first, in the order given
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """How one generation is trained: which stretch of the corpus (fractions), and for how long."""

    name: str
    part: tuple[float, float]
    steps: int
    learning_rate: float
    seed: int


RECIPES = (
    Recipe("teacher2", (0.0, 0.6), steps=500, learning_rate=2e-3, seed=2),
    Recipe("teacher1", (0.4, 1.0), steps=150, learning_rate=5e-4, seed=1),
)


def cut_documents(text: str) -> list[str]:
    """Cut a text between speeches into documents whose lengths are spread evenly on a log scale.

    Cutting the documents' own join ("\\n\\n" between them) gives the same documents again.
    """
    rng = random.Random(SEED)
    low, high = DOCUMENT_CHARS
    documents: list[str] = []
    speeches: list[str] = []
    wanted_chars = 0.0
    for speech in re.split(r"\n\s*\n", text.strip()):
        if not speeches:
            wanted_chars = low * (high / low) ** rng.random()
        speeches.append(speech.strip())
        if len("\n\n".join(speeches)) >= wanted_chars:
            documents.append("\n\n".join(speeches))
            speeches = []
    if speeches:
        documents.append("\n\n".join(speeches))
    return documents


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (corpus, held-out): every 20th document is held out, from the tenth on."""
    held_out = documents[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    kept = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return kept, held_out


def join_bundled(folder: Path) -> str:
    """Put the bundled documents back into their order: the text that they were cut from."""
    documents = read_documents(folder / "corpus.jsonl")
    for i, document in enumerate(read_documents(folder / "heldout.jsonl")):
        documents.insert(HELD_OUT_EVERY // 2 + i * HELD_OUT_EVERY, document)
    return "\n\n".join(documents)


def read_documents(path: Path) -> list[str]:
    """Read the `text` of every line of a JSONL file."""
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def train_tokenizer(documents: list[str]) -> "Tokenizer":
    """Train a byte-level BPE; the special tokens take the ids 0 to 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def new_model() -> "LlamaForCausalLM":
    """Return an untrained Llama of 2.2 million parameters: 4.3 MB in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=ROW_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def join_tokens(tokenizer: "Tokenizer", documents: list[str]) -> "torch.Tensor":
    """Return the documents' token ids as one int64 stream, an end-of-text after each."""
    import torch

    stream: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        stream += [*encoding.ids, EOS_ID]
    return torch.tensor(stream)


def train(model: "LlamaForCausalLM", tokens_N: "torch.Tensor", recipe: Recipe) -> None:
    """Train on rows cut from the stream at random offsets: AdamW, warm-up, cosine to a tenth."""
    import torch
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, recipe.steps // 10, recipe.steps, min_lr_rate=0.1
    )
    started = time.monotonic()
    model.train()
    for step in range(1, recipe.steps + 1):
        offsets_B = torch.randint(len(tokens_N) - ROW_TOKENS, (BATCH_ROWS,), generator=generator)
        ids_BL = torch.stack([tokens_N[offset : offset + ROW_TOKENS] for offset in offsets_B])
        loss = model(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            click.echo(f"{recipe.name} step {step} loss {loss:.3f} {seconds:.0f} s", err=True)


def held_out_loss(model: "LlamaForCausalLM", tokens_N: "torch.Tensor") -> float:
    """Return the mean cross-entropy in nats per token, over whole rows of the stream."""
    import torch

    model.train(False)
    num_rows = len(tokens_N) // ROW_TOKENS
    total = 0.0
    with torch.inference_mode():
        for ids_L in tokens_N[: num_rows * ROW_TOKENS].view(num_rows, ROW_TOKENS):
            ids_BL = ids_L[None]
            total += float(model(input_ids=ids_BL, labels=ids_BL).loss)
    return total / num_rows


def make_text(text: str, folder: Path) -> tuple[list[str], list[str]]:
    """Write corpus.jsonl and heldout.jsonl; return their documents."""
    corpus, held_out = split_documents(cut_documents(text))
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in (("corpus.jsonl", corpus), ("heldout.jsonl", held_out)):
        lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
        (folder / name).write_text("\n".join(lines) + "\n", "utf-8", newline="\n")
    return corpus, held_out


def make_teachers(corpus: list[str], held_out: list[str], out: Path) -> dict[str, float]:
    """Train and save both generations; return each one's held-out loss as saved, in bf16."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    bare_tokenizer = train_tokenizer(corpus)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare_tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    shown = [d for i, d in enumerate(corpus) if i % FRESH_EVERY != FRESH_EVERY - 1]
    held_out_N = join_tokens(bare_tokenizer, held_out)
    torch.manual_seed(SEED)
    model = new_model()
    losses = {}
    for recipe in RECIPES:
        start, stop = (round(fraction * len(shown)) for fraction in recipe.part)
        train(model, join_tokens(bare_tokenizer, shown[start:stop]), recipe)
        tokenizer.save_pretrained(out / recipe.name)
        # Deep copy: the next generation goes on from the full-precision weights.
        copy.deepcopy(model).bfloat16().save_pretrained(out / recipe.name)
        saved = LlamaForCausalLM.from_pretrained(out / recipe.name, dtype=torch.float32)
        losses[recipe.name] = round(held_out_loss(saved, held_out_N), 4)
        click.echo(f"{recipe.name} held-out loss {losses[recipe.name]}", err=True)
    return losses


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The text as one file; without it, the bundled documents are joined again.",
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(out: Path, text: Path | None, threads: int) -> None:
    """Write text/, teacher2/ and teacher1/ into a folder, in about ten minutes on two cores."""
    import torch

    torch.set_num_threads(threads)
    whole = text.read_text("utf-8") if text else join_bundled(BUNDLED / "text")
    corpus, held_out = make_text(whole, out / "text")
    click.echo(json.dumps(make_teachers(corpus, held_out, out)))


if __name__ == "__main__":
    main()
