"""What processes of torchrun do together: how accelerate lets them, decide as one, and gather what
is spread over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from logitcache.errors import UsageError


def set_up(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Have accelerate do what the settings say, and no more. UsageError where it does not."""
    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if args.fsdp and plugin is None:
        raise UsageError(
            f"fsdp: accelerate puts weights into shards on GPUs only, found {args.device.type}",
            "leave fsdp out: processes without GPUs each hold all weights (DDP)",
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise UsageError(
            f"fsdp: the environment asks for version {plugin.fsdp_version}, expected 2",
            "unset ACCELERATE_USE_FSDP and --set fsdp=true, or FSDP_VERSION=2",
        )
    if args.torch_compile:
        state.dynamo_plugin.backend = DynamoBackend.NO  # layers are compiled, not the whole model
    ddp = accelerator.ddp_handler
    if ddp is not None:
        ddp.gradient_as_bucket_view = True  # no second copy of all gradients
        if args.ddp_broadcast_buffers is None:
            ddp.broadcast_buffers = False  # a decoder's are the same in every process


def agreed(args: TrainingArguments, action: Callable[[], Any]) -> Any:
    """Do something in the first process alone; every process gets its result or its error."""
    if args.world_size == 1:
        return action()
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # whatever it is, the others must not wait for ever
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, device=args.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Tensors without shards, those that had some in host memory; kept by the process that wants
    them. One after the other, so that no device holds more than one whole tensor."""
    result = {}
    for name, tensor in tensors.items():
        full = tensor.detach()
        if hasattr(full, "full_tensor"):
            full = full.full_tensor()  # every process takes part
            full = full.cpu() if keep else full
        if keep:
            result[name] = full
    return result


def like(full: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor, spread over processes as another one is."""
    mesh = getattr(model, "device_mesh", None)
    if mesh is None:
        return full
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole: none needs to send its part to another.
    return distribute_tensor(full.to(model.device), mesh, model.placements, src_data_rank=None)  # type: ignore[attr-defined]
