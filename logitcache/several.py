"""A teacher larger than one GPU: its layers one after the other on several (device_map), or each
layer in shards on all (tp_plan), and what the processes of tensor parallelism do together.

With tp_plan all processes of torchrun run the same forward passes over the same rows. The first one
holds the lock, captures and writes; it tells the others which shards are to be made.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from .config import BuildConfig
from .errors import ResourceError


def loading_options(config: BuildConfig) -> dict[str, Any]:
    """What from_pretrained is told of the devices; empty for a teacher on one."""
    if config.device_map is not None:
        return {"device_map": config.device_map}
    if config.tp_plan is not None:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan=config.tp_plan)}
    return {}


def refuse_offloaded(model: Any, folder: Any) -> None:
    """A teacher of which a part is on the disk or in host memory would run for weeks."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if places & {"disk", "meta"} or ("cpu" in places and len(places) > 1):
        raise ResourceError(
            f"{folder}: does not fit the GPUs together: device_map would put parts of it on "
            f"{', '.join(sorted(places & {'cpu', 'disk', 'meta'}))}",
            "use more GPUs, or a smaller dtype",
        )


def is_first() -> bool:
    """Whether this process writes."""
    return os.environ.get("RANK", "0") == "0"


def join(config: BuildConfig) -> None:
    """Meet the other processes of torchrun, where a teacher is in shards on all of them."""
    if config.tp_plan is not None and not torch.distributed.is_initialized():
        on_gpu = torch.cuda.is_available() and config.device != "cpu"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")


@functools.lru_cache(maxsize=1)
def _beside(_default: Any) -> Any:
    return torch.distributed.new_group(backend="gloo")


def hosts() -> Any:
    """A group of the processes whose collectives need no GPU, whoever has made the default one."""
    return _beside(torch.distributed.group.WORLD)


def told(work: dict[str, list[int]] | None) -> dict[str, list[int]]:
    """The shards to make, by part: what the first process gives, in every process."""
    box = [work]
    torch.distributed.broadcast_object_list(box, 0, hosts(), device=torch.device("cpu"))
    assert box[0] is not None
    return box[0]


def all_stop(stop: Callable[[], bool]) -> Callable[[], bool]:
    """A wish to stop that every process has at the same batch."""

    def asked() -> bool:
        flag = torch.tensor(float(stop()))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, hosts())
        return bool(flag)

    return asked


def wait_for_all() -> None:
    """Until every process is here: the store is whole then."""
    torch.distributed.all_reduce(torch.zeros(1), group=hosts())


def leave_group() -> None:
    """Under torchrun, at the end of a run that ended well or not: end the group and its threads.

    One that is still letting go of the last collective's tensors when the interpreter ends is
    cancelled in the middle of a C++ destructor, which aborts the process (torch 2.13 with gloo, on
    a busy machine). The group joins its threads when its last holder is gone: the trainer, which
    the frames of an error hold, and reference cycles.
    """
    if torch.distributed.is_initialized():
        _beside.cache_clear()
        torch.distributed.destroy_process_group()
        error = sys.exception()
        if error is not None:
            traceback.clear_frames(error.__traceback__)
        gc.collect()
