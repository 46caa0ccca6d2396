"""Reading a checkpoint's weights in one process, whatever layout wrote it, as much at a time as is asked for."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ext.checkpoint.state import MODEL


class WeightReader:
    """The weights of one native checkpoint by global name. Needs no process group."""

    def __init__(self, checkpoint: Path):
        self._path = checkpoint
        entries = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, entry in entries.items():
            if key.startswith(MODEL) and isinstance(entry, TensorStorageMetadata):
                name = key.removeprefix(MODEL)
                self.shapes[name] = entry.size
                self.dtypes[name] = entry.properties.dtype

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU, in their stored dtype."""
        state = {MODEL + name: torch.empty(self.shapes[name], dtype=self.dtypes[name]) for name in names}
        with _quietly():
            dcp.load(state, storage_reader=dcp.FileSystemReader(self._path), no_dist=True)
        return {key.removeprefix(MODEL): tensor for key, tensor in state.items()}


def write_weights(root: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write weights by global name as the tensors of a checkpoint, in one process."""
    state = {MODEL + name: tensor for name, tensor in weights.items()}
    with _quietly():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(root), no_dist=True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch warns that one process is at work, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
