"""A fake world, in PyTorch's word for it: process groups and shapes as in a real one, neither messages nor values.

One process can so be any rank of thousands, and build what that rank would build.
"""

import types
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.torch_private import fake_process_group, forget_placements


def init_fake_world(rank: int, world_size: int) -> torch.device:
    """Make this process `rank` of `world_size`, until `destroy_fake_world`; it must not be in a world already.

    Returns the rank's device, torch's meta device, whose tensors have shapes alone. Collectives do nothing.
    """
    dist.Backend.register_backend("fake_world", _no_messages, extended_api=True, devices=["cpu", "meta"])
    dist.init_process_group("fake_world", store=dist.HashStore(), rank=rank, world_size=world_size)
    # what FSDP asks of torch.cuda, if that is where it is, before the first step
    torch.meta = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True, current_device=lambda: 0, device_count=lambda: world_size
    )
    return torch.device("meta")


def destroy_fake_world() -> None:
    """Leave it, so that this process can join another world."""
    del torch.meta  # type: ignore[attr-defined]
    dist.destroy_process_group()
    forget_placements()  # a mesh equals that of another rank, and DTensor would give it to the next one


def _no_messages(options: Any, _: Any) -> Any:
    return fake_process_group(options.group_rank, options.group_size)
