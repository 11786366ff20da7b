"""A causal language model taken apart: decoder with segment-aware attention, and output head.

transformers keeps attention inside segments when position ids restart and neither an attention mask
nor a cache is given; whether a model obeys, and whether decoder and head put together give its
logits, is checked on the model itself before anything is built on it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from logitcache_kernels import head_logits

from .errors import StoreError, UsageError
from .files import file_sha256
from .packed_attention import TRIAL_ENDS, known_bounds, trial_batch


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), the cap optional."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    softcap: float | None
    scale: float
    module: Any = None  # the layer itself, where only a call of it puts its shards together

    @staticmethod
    def of(model: Any) -> Head:
        """The head of a transformers causal language model."""
        config = model.config.get_text_config()
        linear = model.get_output_embeddings()
        scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies,
        divisor = getattr(config, "logits_scaling", None)  # Granite divides
        if divisor:
            scale /= float(divisor)
        softcap = getattr(config, "final_logit_softcapping", None)
        module = linear if hasattr(linear.weight, "full_tensor") else None
        return Head(linear.weight, getattr(linear, "bias", None), softcap, scale, module)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        if self.module is not None:
            logits_RV = self.scale * self.module(hidden_RD)
            if self.softcap is not None:
                logits_RV = self.softcap * torch.tanh(logits_RV / self.softcap)
            return logits_RV
        hidden_RD = hidden_RD.to(self.weight_VD.device)  # of another GPU, with device_map
        return head_logits(hidden_RD, self.weight_VD, self.bias_V, self.softcap, self.scale)


def choose_device(name: str) -> torch.device:
    """The device to run on; "auto" takes a GPU if there is one: under torchrun the rank's, else the
    first."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK")
        if rank is None:
            return torch.device("cuda")
        return torch.device("cuda", int(rank) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu or cuda[:N], found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu or cuda[:N], found {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {name} asked for, and torch {torch.__version__} sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: {name} asked for, found {torch.cuda.device_count()} GPUs")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a teacher's weights; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def check_model_folder(folder: Path) -> None:
    """Refuse what is not a local transformers folder with safetensors weights."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such model folder", "give a local transformers folder")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: expected a transformers folder, found no config.json in it")
    if not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder}: expected weights as safetensors, found none",
            "save the model again with save_pretrained",
        )


def check_fits(folder: Path, name: str, vocab_size: int, seq_len: int) -> None:
    """Refuse a model that, by its configuration, lacks outputs or cannot read rows this long."""
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a bad folder
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{folder}: its config.json cannot be used: {first}") from error
    config = loaded.get_text_config()
    width = getattr(config, "vocab_size", None)
    if width is not None and width < vocab_size:
        raise StoreError(
            f"{folder}: {name} has {width} output rows, its tokenizer {vocab_size} tokens",
            "resize its embeddings, or use the tokenizer that belongs to it",
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < seq_len:
        raise UsageError(
            f"{folder}: {name} reads at most {longest} tokens, --seq-len is {seq_len}",
            f"use --seq-len {longest} or less",
        )


def load_causal_lm(
    folder: Path, dtype: torch.dtype | str, device: torch.device, **options: Any
) -> Any:
    """Load a model for inference from a local folder; pickled weights and remote code are never
    run. options: of from_pretrained; those of ``several`` decide on devices instead of device."""
    from transformers import AutoModelForCausalLM

    check_model_folder(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a bad folder
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{folder}: the model cannot be loaded: {first}") from error
    if not options.keys() & {"device_map", "distributed_config"}:
        model = model.to(device)  # type: ignore[arg-type]
    return model.eval()


def model_identity(folder: Path) -> dict[str, Any]:
    """Which model it is: hashes of its configuration and weights, whatever the folder is called."""
    check_model_folder(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return {
        "weights_sha256": digest.hexdigest(),
        "config_sha256": file_sha256(folder / "config.json"),
    }


def hidden_states(
    model: Any,
    tokens_BL: torch.Tensor,
    positions_BL: torch.Tensor,
    bounds: torch.Tensor | None = None,
    longest: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Last hidden states [B, L, D]; attention stays within segments, which positions tell apart.

    bounds: the segments on the model's device, as ``segment_bounds`` gives them; else transformers
    asks the positions, and the host waits for the GPU, at every call. longest: positions in the
    longest of them, where it is known.
    """
    with known_bounds(bounds, len(tokens_BL), longest):
        output = model.get_decoder()(
            input_ids=tokens_BL, position_ids=positions_BL, use_cache=False, **kwargs
        )
    return output.last_hidden_state


def check_model(model: Any, folder: Path) -> None:
    """Prove on a small input that decoder and head give the model's logits and that segments do not
    leak."""
    if not fits_decoder_and_head(model, folder):
        raise UsageError(
            f"{folder}: {type(model).__name__}: decoder and output head do not give "
            "the model's logits",
            "this architecture is not supported yet",
        )


def _blurs_float32(device: torch.device) -> bool:
    """Whether products of float32 keep fewer bits there, as with TF32. Tried, for torch has several
    ways to ask for it and raises where they are mixed."""
    value = 1 + 2**-12
    product = torch.full((256, 256), value, device=device) @ torch.eye(256, device=device)
    return bool((product != value).any())


@torch.no_grad()
def fits_decoder_and_head(model: Any, folder: Path) -> bool:
    """Whether decoder and head give the model's logits, tried on a small input. UsageError if its
    segments leak, by that way or by the model's own forward where the answer is no."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    tokens, positions, bounds = trial_batch(model)
    apart = [
        [model(input_ids=part[None], use_cache=False).logits[0].float() for part in (t[:n], t[n:])]
        for t, n in zip(tokens, TRIAL_ENDS, strict=True)
    ]
    # Low precision blurs logits by its epsilon times their size; a leak or a wrong head is far
    # above.
    low = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    low = low or _blurs_float32(device)
    tolerance = (0.1 if low else 1e-3) * float(apart[0][0].std().clamp_min(1e-3))
    try:
        hidden = hidden_states(model, tokens, positions, bounds)
        packed = [Head.of(model).logits(row).float() for row in hidden]
        fits = bool((packed[0][: TRIAL_ENDS[0]] - apart[0][0]).abs().mean() <= tolerance)
    except (AttributeError, TypeError, RuntimeError):  # no such parts, or of other shapes
        fits = False
    if not fits:
        whole = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        packed = [row.float() for row in whole]
    model.train(was_training)
    rows = zip(packed, apart, TRIAL_ENDS, strict=True)
    if any((row[n:] - parts[1]).abs().mean() > tolerance for row, parts, n in rows):
        raise UsageError(
            f"{folder}: {type(model).__name__}: attention leaks between packed documents",
            "this architecture or attention implementation cannot read packed rows",
        )
    return fits
