"""A device that is not the host, on a machine without one."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining import schedules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.fake_world import init_fake_world


@contextlib.contextmanager
def prepare_steps(world_size: int) -> Iterator[None]:
    """In a fake world: let steps be taken. Streams do nothing; FSDP takes the device for a real one; neighbours in
    a pipeline are not greeted, of whom torch would read an answer before the first batch."""

    def agree(schedule: Any, stages: Any, *_: Any) -> None:
        for stage in stages:
            stage._inference_mode = schedules.InferenceMode.STATIC  # type: ignore[attr-defined]

    greets = hasattr(schedules._PipelineSchedule, "_warmup_p2p")  # torch 2.13
    with (
        mock.patch.object(torch, "meta", _device_module(world_size)),
        mock.patch.object(FSDPParamGroup, "_validate_no_meta_params"),
        mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", agree) if greets else contextlib.nullcontext(),
    ):
        yield


def _device_module(world_size: int) -> mock.MagicMock:
    """What FSDP asks of torch.cuda, if that is where it is."""
    module = mock.MagicMock()
    module.current_device.return_value = 0
    module.device_count.return_value = world_size
    return module


class Crossings(TorchDispatchMode):
    """found: copies between the host and the device. Any other operator that mixes them torch refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._opname in ("_to_copy", "copy_", "_foreach_copy_"):
            tensors = tree_leaves((args, result))
            if len({tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}) > 1:
                self.found.append(str(func))
        return result


def init_fake_device(world_size: int) -> tuple[torch.device, list[int]]:
    """Make this process rank 0 of a fake world, for good, in which steps can be taken.

    Torch refuses to mix tensors of its device with the host's in one operation, and to look at one. Streams do
    nothing. Only copies to the host are made to work, as zeros; the second result is the list of their sizes.
    """
    dist.destroy_process_group()
    device = init_fake_world(0, world_size)
    torch.meta = _device_module(world_size)  # type: ignore[attr-defined]
    copied: list[int] = []
    to = torch.Tensor.to

    def noted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.is_meta or torch.device("cpu") not in args:
            return to(self, *args, **kwargs)
        copied.append(self.numel())
        return torch.zeros(self.shape, dtype=next((a for a in args if isinstance(a, torch.dtype)), self.dtype))

    torch.Tensor.to = noted  # type: ignore[assignment,method-assign]
    return device, copied
