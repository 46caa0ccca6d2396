"""How many bytes of tensors live at once on a device: a context manager with `largest` and `restart`.

CUDA's allocator counts them. A CPU's does not, so there the storages that operators take and give are remembered, and
those that still live are summed after every operator. That leaves out what one operator needs only while it runs, and
copies inside a collective; it does not depend on the machine's other work.
"""

import contextlib
import gc
import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def live_memory(device: torch.device) -> "CudaMemory | HostMemory":
    """Watches what is made, or on a CPU at least used, inside of the context."""
    return CudaMemory() if device.type == "cuda" else HostMemory()


class CudaMemory(contextlib.AbstractContextManager[None]):
    """By the allocator: all that there is now less what there was at the first entry."""

    def __init__(self) -> None:
        gc.collect()
        self._before = torch.cuda.memory_allocated()

    def __exit__(self, *error: object) -> None:
        pass

    def restart(self) -> None:
        """Forget what was the largest."""
        torch.cuda.reset_peak_memory_stats()

    @property
    def largest(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated() - self._before


class HostMemory(TorchDispatchMode):
    """By operator."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def restart(self) -> None:
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._storages.add((leaf.to_local() if isinstance(leaf, DTensor) else leaf).untyped_storage())
        self.largest = max(self.largest, sum(storage.nbytes() for storage in self._storages))  # they may be resized
        return result
