"""Reading a checkpoint's weights in one process, whatever layout wrote it, as much at a time as is asked for."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.checkpoint.state import MODEL


class Weights(Protocol):
    """A model's weights by global name, read as they are needed.

    Attributes:
        shapes, dtypes: of every weight; the keys are the names, in the order in which to go through them.
    """

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive; elements of a vector) on the CPU, in the weight's dtype."""
        ...


class WeightReader:
    """The `Weights` of one native checkpoint. Needs no process group."""

    def __init__(self, checkpoint: Path):
        self._reader = dcp.FileSystemReader(checkpoint)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._entries = {
            key.removeprefix(MODEL): entry
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith(MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: entry.size for name, entry in self._entries.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in self._entries.items()}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a weight; the memory is theirs and that of one stored piece of it at a time."""
        shape = self.shapes[name]
        offsets = torch.Size([start, *[0] * (len(shape) - 1)])
        rows = torch.empty([stop - start, *shape[1:]], dtype=self.dtypes[name])
        window = ChunkStorageMetadata(offsets=offsets, sizes=rows.shape)
        items = create_read_items_for_chunk_list(MODEL + name, self._entries[name], [window])
        self._reader.read_data(LoadPlan(items), _Into(rows)).wait()
        return rows

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU, in their stored dtype."""
        return {name: self.read_rows(name, 0, self.shapes[name][0]) for name in names}


class _Into(DefaultLoadPlanner):
    """Puts all that is read into one tensor."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: object) -> torch.Tensor:
        return self._target
