"""Writing weights as a checkpoint's tensors in one process, holding only a small piece of them at a time."""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_ext.checkpoint.digest import HashingWriter
from megatron_ext.checkpoint.read import StoredSlice, Weights
from megatron_ext.checkpoint.state import MODEL
from megatron_ext.errors import RequestError
from megatron_ext.torch_private import StorageInfo

# Every weight is stored in pieces of whole rows, none larger than this: what is held while writing, and later by a
# reader of a few rows, stays small. Above 32 MiB glibc returns memory to the system as soon as it is freed: mallopt(3).
_PIECE_BYTES = 40 << 20
_FILE = "__0_0.distcp"


def _native(name: str) -> StoredSlice:
    return StoredSlice(MODEL + name)


def write_weights(folder: Path, weights: Weights, place: Callable[[str], StoredSlice] = _native) -> dict[str, str]:
    """Write all of `weights` into an existing folder, reading them piece by piece.

    place: name -> where the weight is to lie. By default as in native checkpoints.
    Returns SHA-256 digests, file name -> hex, of the files with tensors.
    Raises what reading `weights` raises, if it is a RequestError; torch's CheckpointException if writing fails.
    """
    writer = _PieceWriter(folder)
    with warnings.catch_warnings():
        # torch warns that one process is at work, which is what was asked for
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=writer, planner=_PiecePlanner(weights, place), no_dist=True)
        except CheckpointException as error:
            raise _not_of_writing(error) or error from None
    return writer.sha256


def _not_of_writing(error: CheckpointException) -> BaseException | None:
    """What torch has wrapped, if it is the source's RequestError, or an interrupt, also one that a close hid."""
    for wrapped, _ in error.failures.values():
        failure: BaseException | None = wrapped
        while failure is not None:
            if isinstance(failure, (RequestError, KeyboardInterrupt)):
                return failure
            failure = failure.__context__
    return None


def row_pieces(weights: Weights, name: str) -> Iterator[tuple[int, int]]:
    """First and one-past-last row of consecutive pieces of a weight, none larger than 40 MiB or a row."""
    shape = weights.shapes[name]
    rows = max(1, _PIECE_BYTES // (math.prod(shape[1:]) * weights.dtypes[name].itemsize))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


class _PiecePlanner(DefaultSavePlanner):
    """Plans by shapes alone, and reads a piece when it is about to be written."""

    def __init__(self, weights: Weights, place: Callable[[str], StoredSlice]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights, self._place = weights, place
        self._rows: dict[MetadataIndex, tuple[str, int, int]] = {}

    def create_local_plan(self) -> SavePlan:
        weights = self._weights
        return SavePlan([self._piece(name, *rows) for name in weights.shapes for rows in row_pieces(weights, name)])

    def _piece(self, name: str, start: int, stop: int) -> WriteItem:
        place, shape = self._place(name), self._weights.shapes[name]
        chunk = place.rows(start, torch.Size([stop - start, *shape[1:]]))
        size = shape if place.index is None else torch.Size([place.count, *shape])
        index = MetadataIndex(place.key, chunk.offsets)
        self._rows[index] = name, start, stop
        data = TensorWriteData(chunk, TensorProperties(self._weights.dtypes[name]), size)
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None
        return self._weights.read_rows(*self._rows[write_item.index]).view(write_item.tensor_data.chunk.sizes)


class _PieceWriter(HashingWriter):
    """Writes one piece after the other into one file and keeps none. (torch's own keeps a piece of every tensor.)"""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with self.fs.create_stream(Path(self.path) / _FILE, "wb") as stream:
            file = cast(IO[bytes], stream)
            for item in plan.items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                offset = file.tell()
                if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
                    tensor = tensor.clone(memory_format=torch.contiguous_format)  # a view would bring all it views
                torch.save(tensor, file)
                length = file.tell() - offset
                results.append(WriteResult(item.index, length, StorageInfo(_FILE, offset, length)))
        future: Future[list[WriteResult]] = Future()
        future.set_result([self.hashed(result) for result in results])
        return future
