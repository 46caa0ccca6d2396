"""A device that is not the host, on a machine without one."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from megatron_ext.models import initialize


def pretend_device(world_size: int) -> tuple[torch.device, list[int]]:
    """Make this process rank 0 of a world whose device is torch's meta device, for good.

    Tensors there have no values: torch refuses to mix them with the host's in one operation, and to look at one.
    Streams and collectives do nothing, and initial weights, which it cannot draw, are zeros. Only copies to the host
    are made to work, as zeros too; the second result is the list of their sizes.
    """
    dist.destroy_process_group()
    dist.Backend.register_backend("pretended", _no_messages, extended_api=True, devices=["cpu", "meta"])
    dist.init_process_group("pretended", store=dist.HashStore(), rank=0, world_size=world_size)
    module = mock.MagicMock()
    module.current_device.return_value = 0
    module.device_count.return_value = world_size
    torch.meta = module  # type: ignore[attr-defined]
    copied: list[int] = []
    to = torch.Tensor.to

    def noted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.is_meta or torch.device("cpu") not in args:
            return to(self, *args, **kwargs)
        copied.append(self.numel())
        return torch.zeros(self.shape, dtype=next((a for a in args if isinstance(a, torch.dtype)), self.dtype))

    torch.Tensor.to = noted  # type: ignore[assignment,method-assign]
    initialize.normal_slice = lambda shape, offset, local, *_: local.zero_()
    return torch.device("meta"), copied


def _no_messages(options: Any, _: Any) -> Any:
    return FakeProcessGroup._create_internal(options.group_rank, options.group_size, None)
