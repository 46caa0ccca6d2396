"""A device that is not the host, on a machine without one."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_ext.pretended import join_pretended_world


def pretend_device(world_size: int) -> tuple[torch.device, list[int]]:
    """Make this process rank 0 of a pretended world, for good, in which steps can be taken.

    Torch refuses to mix tensors of its device with the host's in one operation, and to look at one. Streams do
    nothing. Only copies to the host are made to work, as zeros; the second result is the list of their sizes.
    """
    dist.destroy_process_group()
    device = join_pretended_world(0, world_size)
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
    return device, copied
