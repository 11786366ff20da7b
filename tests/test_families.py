"""The usual families of decoders as students: the loss inside their forward, without whole logits,
is the loss on the model's own logits; packed documents do not see one another."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from distill.student import attach_loss, compile_layers
from logitcache import causal_lm
from logitcache.causal_lm import fits_decoder_and_head
from logitcache.errors import UsageError
from logitcache_kernels import DistillSpec, SparseTeacher, capture, distill_loss

V, L = 61, 24
SPEC = DistillSpec(temperature=1.5, alpha=0.3, gamma=0.2, js_threshold=0.5)
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
GEMMA = {**SMALL, "head_dim": 8, "pad_token_id": 0, "sliding_window": 16}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= {f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", SMALL),
    "Llama tied": ("Llama", {**SMALL, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", SMALL),
    "Qwen3": ("Qwen3", {**SMALL, "head_dim": 8}),
    "Gemma2 softcap": ("Gemma2", {**GEMMA, "final_logit_softcapping": 3.0}),
    "Gemma3": ("Gemma3", GEMMA),
    "Gemma3 softcap": ("Gemma3", {**GEMMA, "final_logit_softcapping": 3.0}),
    "Mistral": ("Mistral", {**SMALL, "sliding_window": None}),
    "GPT-2 tied": ("GPT2", GPT2),
    "GPT-2 untied": ("GPT2", {**GPT2, "tie_word_embeddings": False}),
    "GPT-NeoX tied": ("GPTNeoX", {**SMALL, "tie_word_embeddings": True}),
    "GPT-NeoX untied": ("GPTNeoX", {**SMALL, "tie_word_embeddings": False}),
    "Granite scaled": ("Granite", {**SMALL, "logits_scaling": 4.0}),
    "Cohere scaled": ("Cohere", {**SMALL, "logit_scale": 0.5, "pad_token_id": 0}),
    "Phi biased head": ("Phi", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
}


def make(name: str) -> Any:
    family, settings = FAMILIES[name]
    config_name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**settings)
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of one and biases of zero hide mistakes
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.train()


def make_inputs() -> dict[str, Any]:
    """Two rows of two documents each, with two teachers' top-k supports."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (2, L), generator=generator)
    ends = (10, 17)
    positions = torch.stack([torch.cat((torch.arange(n), torch.arange(L - n))) for n in ends])
    labels = torch.roll(tokens, -1, 1)
    for row, end in enumerate(ends):
        labels[row, [end - 1, L - 1]] = -100
    logits = 2 * torch.randn(2 * L, V, generator=generator)
    teachers = []
    for part in (logits, logits + 0.3 * torch.randn(2 * L, V, generator=generator)):
        kept = capture(part, estimator="topk", top_k=20, min_prob=0.0, temperatures=(1.0, 1.5))
        tempered = (part.log_softmax(-1) / SPEC.temperature).logsumexp(-1)
        teachers.append(SparseTeacher(kept.ids_RK, kept.logp_RK, tempered, kept.entropy_R))
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "labels": labels,
        "gold": torch.rand(2, L, generator=generator) < 0.5,
        "teachers": [teacher._asdict() for teacher in teachers],
    }


INPUTS = make_inputs()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def dense(model: Any) -> torch.Tensor:
    logits = model(
        input_ids=INPUTS["input_ids"], position_ids=INPUTS["position_ids"], use_cache=False
    ).logits
    teachers = [SparseTeacher(**teacher) for teacher in INPUTS["teachers"]]
    labels_R, gold_R = INPUTS["labels"].flatten(), INPUTS["gold"].flatten()
    return distill_loss(
        logits.flatten(0, 1), teachers, labels_R, SPEC, gold_R=gold_R, num_items=40.0
    ).loss


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_inside_the_forward_is_that_of_the_models_own_logits(name: str) -> None:
    model = make(name)
    assert fits_decoder_and_head(model, Path(name))
    plain = copy.deepcopy(model)
    attach_loss(model, SPEC, chunk=7)
    output = model(**INPUTS, num_items=40.0)
    expected = dense(plain)
    torch.testing.assert_close(output["loss"], expected, rtol=1e-5, atol=1e-6)
    assert float(expected.detach()) > 0.1
    ours, theirs = gradients(model, output["loss"]), gradients(plain, expected)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-5, msg=key)
    spread = output["row_losses"].sum() / 40.0
    expected = expected.detach()
    assert float(spread) <= float(expected) + 1e-5  # the agreement term is of no row


@pytest.mark.parametrize("blurs", [False, True])
def test_a_model_is_tried_as_exactly_as_products_are_there(
    monkeypatch: pytest.MonkeyPatch, blurs: bool
) -> None:
    """With TF32, which torch_compile turns on, a model of 30 layers seemed to leak."""
    model, generator = make("Llama"), torch.Generator().manual_seed(2)
    model.get_decoder().norm.register_forward_hook(
        lambda *args: args[2] * (1 + 0.01 * torch.randn(args[2].shape, generator=generator))
    )
    assert not causal_lm._blurs_float32(torch.device("cpu"))
    monkeypatch.setattr(causal_lm, "_blurs_float32", lambda device: blurs)
    if blurs:
        assert fits_decoder_and_head(model, Path("llama"))
    else:
        with pytest.raises(UsageError, match="attention leaks"):
            fits_decoder_and_head(model, Path("llama"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_has_the_losses_of_its_documents_alone(name: str) -> None:
    """To 1e-5 in float32."""
    model = make(name).eval()
    attach_loss(model, SPEC)
    packed = model(**INPUTS, num_items=1.0)["loss"]
    alone = torch.zeros(())
    for row, end in enumerate((10, 17)):
        for start, stop in ((0, end), (end, L)):
            at = slice(row * L + start, row * L + stop)
            document = {
                key: INPUTS[key][row : row + 1, start:stop]
                for key in ("input_ids", "position_ids", "labels", "gold")
            }
            teachers = [
                {key: None if value is None else value[at] for key, value in teacher.items()}
                for teacher in INPUTS["teachers"]
            ]
            alone = alone + model(**document, teachers=teachers, num_items=1.0)["loss"]
    valid = int((INPUTS["labels"] != -100).sum())
    assert abs(float((packed - alone).detach())) / valid < 1e-5


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT-2 tied"])
def test_compiled_layers_share_a_graph_and_give_the_same_loss(name: str) -> None:
    model = make(name)
    attach_loss(model, SPEC, chunk=7)
    expected = model(**INPUTS, num_items=40.0)["loss"]
    torch.compiler.reset()
    counter = CompileCounter()
    compile_layers(model, counter)
    torch.testing.assert_close(model(**INPUTS, num_items=40.0)["loss"], expected)
    kinds = len(set(getattr(model.config, "layer_types", [None])))  # Gemma's see far or not
    assert counter.frame_count == kinds


def test_a_model_without_layers_is_not_compiled_in_silence() -> None:
    with pytest.raises(UsageError, match="torch_compile: Linear has no list of layers"):
        compile_layers(torch.nn.Linear(2, 2))


class _Odd(transformers.LlamaForCausalLM):
    """A model that does something of its own to its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.cumsum(-1) / 8
        return output


def test_a_family_of_its_own_gets_the_same_loss_from_whole_logits() -> None:
    torch.manual_seed(0)
    model = _Odd(transformers.LlamaConfig(**SMALL))
    assert not fits_decoder_and_head(model, Path("odd"))
    plain = copy.deepcopy(model)
    attach_loss(model, SPEC, dense=True)
    output = model(**INPUTS, num_items=40.0, evaluate=True)
    expected = dense(plain)
    torch.testing.assert_close(output["loss"], expected)
    ours, theirs = gradients(model, output["loss"]), gradients(plain, expected)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    logits = plain(
        input_ids=INPUTS["input_ids"], position_ids=INPUTS["position_ids"], use_cache=False
    ).logits
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), INPUTS["labels"].flatten(), reduction="sum"
    )
    assert float(output["sums"][8]) == pytest.approx(float(total.detach()), rel=1e-5)


def test_a_family_whose_documents_see_one_another_is_refused() -> None:
    config = transformers.BloomConfig(
        vocab_size=V, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UsageError, match="BloomForCausalLM: "):
            fits_decoder_and_head(transformers.BloomForCausalLM(config), Path("bloom"))
