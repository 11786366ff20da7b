"""Ensembles against brute force: the mix of full forward passes, without any cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer, sentences

from distill.ensemble import EnsembleForCausalLM, weight_bytes
from logitcache.errors import StoreError, UsageError

WEIGHTS = (3.0, 1.0)
NEW = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one tokenizer, of which one has a padded vocabulary and other shapes."""
    folder = tmp_path_factory.mktemp("ensemble")
    soft = {"initializer_range": 0.06}  # several tokens are likely: beams have what to choose from
    second = make_model(
        folder / "two",
        seed=2,
        vocab_size=320,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        **soft,
    )
    return [make_model(folder / "one", seed=1, **soft), second]


@pytest.fixture(scope="module", params=["logits", "probs"])
def ensemble(request: pytest.FixtureRequest, folders: list[Path]):
    return EnsembleForCausalLM.from_folders(folders, WEIGHTS, request.param, "cpu")


def _brute_logp(model: EnsembleForCausalLM, ids: list[int]) -> torch.Tensor:
    """log of the mixed distribution [V] after ids, from each model's own full forward pass."""
    total = torch.zeros(300, dtype=torch.float64)
    for part, weight in zip(model.models, (0.75, 0.25), strict=True):
        with torch.no_grad():
            logits_V = part(torch.tensor([ids]), use_cache=False).logits[0, -1, :300].double()
        total += weight * (logits_V if model.mix == "logits" else logits_V.softmax(-1))
    return total.log_softmax(-1) if model.mix == "logits" else total.log()


def _greedy(model: EnsembleForCausalLM, ids: list[int]) -> list[int]:
    made: list[int] = []
    while len(made) < NEW and (not made or made[-1] not in model.generation_config.eos_token_id):
        made.append(int(_brute_logp(model, ids + made).argmax()))
    return made


def _beams(model: EnsembleForCausalLM, ids: list[int], width: int) -> list[int]:
    """Beam search by its definition: the ``width`` most likely continuations of the kept ones."""
    kept: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(NEW):
        grown = []
        for score, made in kept:
            logp_V = _brute_logp(model, ids + made)
            for token in logp_V.topk(width).indices.tolist():
                grown.append((score + float(logp_V[token]), [*made, token]))
        kept = sorted(grown, key=lambda pair: -pair[0])[:width]
    return kept[0][1]


def _left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
    }


def _rows(tokenizer, number: int = 4) -> list[list[int]]:
    """Prompts of different lengths."""
    texts = [" ".join(s.split()[: 3 + n]) for n, s in enumerate(sentences(number, seed=21))]
    return [tokenizer(text)["input_ids"] for text in texts]


def test_greedy_batch_with_caches_equals_brute_force(ensemble) -> None:
    model, tokenizer = ensemble
    rows = _rows(tokenizer)
    assert len({len(row) for row in rows}) > 1
    inputs = _left_padded(rows)
    made = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    for row, found in zip(rows, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        expected = _greedy(model, row)
        assert found[: len(expected)] == expected
    parts = [p.generate(**inputs, max_new_tokens=NEW, do_sample=False) for p in model.models]
    assert not all(torch.equal(made[:, : p.shape[1]], p) for p in parts)  # it is no single model


def test_beams_with_caches_equal_brute_force(ensemble) -> None:
    model, tokenizer = ensemble
    rows = _rows(tokenizer, 3)
    inputs = _left_padded(rows)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 299}
    made = model.generate(**inputs, num_beams=3, **settings)[:, inputs["input_ids"].shape[1] :]
    for row, found in zip(rows, made.tolist(), strict=True):
        assert found == _beams(model, row, 3)
    greedy = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert not torch.equal(made, greedy)  # the beams were reordered on the way


def test_logits_with_and_without_cache_are_the_weighted_mix(ensemble) -> None:
    model, tokenizer = ensemble
    (row,) = _rows(tokenizer, 1)
    with torch.no_grad():
        whole = model(torch.tensor([row]), use_cache=False)
        first = model(torch.tensor([row[:-2]]), use_cache=True)
        rest = model(
            torch.tensor([row[-2:]]), past_key_values=first.past_key_values, use_cache=True
        )
    assert whole.past_key_values is None
    assert whole.logits.shape == (1, len(row), 300)
    assert rest.past_key_values.get_seq_length() == len(row)
    for logits_V in (whole.logits[0, -1], rest.logits[0, -1]):
        torch.testing.assert_close(
            logits_V.double().log_softmax(-1), _brute_logp(model, row), rtol=0, atol=2e-5
        )


def test_sampling_follows_the_mixed_distribution_and_its_seed(ensemble) -> None:
    model, tokenizer = ensemble
    (row,) = _rows(tokenizer, 1)
    inputs = {"input_ids": torch.tensor([row] * 2000), "attention_mask": torch.ones(2000, len(row))}
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        made = model.generate(**inputs, max_new_tokens=1, do_sample=True, top_k=0)
        draws.append(made[:, -1])
    assert torch.equal(*draws)
    share_V = torch.bincount(draws[0], minlength=300) / 2000
    expected_V = _brute_logp(model, row).exp()
    error_V = (share_V - expected_V).abs()
    # Five standard deviations of a share, and one draw.
    assert (error_V <= 5 * (expected_V * (1 - expected_V) / 2000).sqrt() + 1 / 2000).all()


def test_streamed_tokens_are_those_that_are_returned(ensemble) -> None:
    model, tokenizer = ensemble

    class Collect:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    (row,) = _rows(tokenizer, 1)
    collect = Collect()
    inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))}
    made = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, streamer=collect)
    assert collect.tokens == [*made[0].tolist(), -1]


def test_ensemble_of_equal_models_is_the_model(folders: list[Path]) -> None:
    for mix in ("logits", "probs"):
        model, tokenizer = EnsembleForCausalLM.from_folders([folders[0]] * 2, (1, 5), mix, "cpu")
        (row,) = _rows(tokenizer, 1)
        with torch.no_grad():
            logp = model(torch.tensor([row])).logits.log_softmax(-1)
            alone = model.models[0](torch.tensor([row])).logits.log_softmax(-1)
        torch.testing.assert_close(logp, alone, rtol=0, atol=1e-5)


def test_what_does_not_go_together_is_refused(folders: list[Path], tmp_path: Path) -> None:
    other = shutil.copytree(folders[0], tmp_path / "other")
    make_tokenizer(other, merges_seed=9)
    with pytest.raises(StoreError, match=r"its tokenizer is not that of .*(ids differ|merge)"):
        EnsembleForCausalLM.from_folders([folders[0], other], device="cpu")
    for weights, message in (
        ((1.0,), "a weight for each of 2 models, found 1"),
        ((1.0, 0.0), "expected positive numbers, found 0"),
        ((1.0, float("nan")), "expected positive numbers, found nan"),
    ):
        with pytest.raises(UsageError, match=message):
            EnsembleForCausalLM.from_folders(folders, weights)
    with pytest.raises(UsageError, match="mix: expected logits or probs, found 'weights'"):
        EnsembleForCausalLM.from_folders(folders, mix="weights")
    model, _ = EnsembleForCausalLM.from_folders(folders, device="cpu")
    with pytest.raises(TypeError, match="not saved as one"):
        model.save_pretrained(tmp_path / "saved")


def test_memory_is_told_from_the_headers(folders: list[Path]) -> None:
    model, _ = EnsembleForCausalLM.from_folders(folders, device="cpu")
    for folder, part in zip(folders, model.models, strict=True):
        assert weight_bytes(folder, torch.float32) == 4 * sum(p.numel() for p in part.parameters())
