"""Reading a checkpoint's weights in one process, whatever layout wrote it, as much at a time as is asked for."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.checkpoint.piece import StoredPiece
from megatron_ext.checkpoint.state import MODEL
from megatron_ext.errors import RequestError

METADATA = ".metadata"


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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a weight lies in a checkpoint.

    Attributes:
        key: name of the stored tensor that it is, or that it is a slice of.
        index, count: it is the `index`-th of `count` weights of one shape, which the stored tensor stacks along a
            leading dimension. None and 1: the stored tensor is the weight.
    """

    key: str
    index: int | None = None
    count: int = 1

    def rows(self, start: int, shape: torch.Size) -> ChunkStorageMetadata:
        """The part of the stored tensor that is `shape[0]` rows of the weight, from `start` on."""
        offsets = [start, *[0] * (len(shape) - 1)]
        if self.index is None:
            return ChunkStorageMetadata(torch.Size(offsets), shape)
        return ChunkStorageMetadata(torch.Size([self.index, *offsets]), torch.Size([1, *shape]))


def _native(sizes: dict[str, torch.Size]) -> dict[str, Place]:
    return {key.removeprefix(MODEL): Place(key) for key in sizes if key.startswith(MODEL)}


class WeightReader:
    """The `Weights` of one checkpoint. Needs no process group.

    places: sizes of the stored tensors -> where the weights lie, by name. By default as in native checkpoints.
    check_values: compare every stored piece with its checksum when it is first read.
    Raises RequestError where .metadata, which says what is stored and where, is damaged or missing.
    """

    def __init__(
        self,
        checkpoint: Path,
        places: Callable[[dict[str, torch.Size]], dict[str, Place]] = _native,
        check_values: bool = False,
    ):
        self._checkpoint, self._reader = checkpoint, dcp.FileSystemReader(checkpoint)
        self._check_values, self._pieces = check_values, dict[MetadataIndex, StoredPiece]()
        try:
            self._entries = self._read_entries()
            sizes = {key: entry.size for key, entry in self._entries.items()}
            dtypes = {key: entry.properties.dtype for key, entry in self._entries.items()}
        except Exception as error:  # a damaged pickle fails in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RequestError(f"{checkpoint / METADATA} cannot be read ({reason})") from error
        self._places = places(sizes)
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, place in self._places.items():
            size = sizes[place.key]
            self.shapes[name] = size if place.index is None else size[1:]
            self.dtypes[name] = dtypes[place.key]

    def _read_entries(self) -> dict[str, TensorStorageMetadata]:
        """What is stored, by key; from then on the reader knows where."""
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata.items()
        return {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def check_whole(self, where: str) -> None:
        """Raise RequestError, a line that starts with `where`, where files are missing or short, or lack rows."""
        keys = {place.key for place in self._places.values()}
        ends: dict[str, int] = {}
        for index, info in self._reader.storage_data.items():
            if index.fqn in keys:
                ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            file = self._checkpoint / name
            size = file.stat().st_size if file.is_file() else None
            if size is None or size < end:
                problem = "is missing" if size is None else f"has {size} bytes instead of at least {end}"
                raise RequestError(f"{where}: incomplete checkpoint, {name} {problem}")
        for key in sorted(keys):
            entry = self._entries[key]
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) < math.prod(entry.size):
                raise RequestError(f"{where}: incomplete checkpoint, parts of {key} are missing")

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a weight, in memory of their own and no more, however large the stored pieces."""
        place = self._places[name]
        rows = torch.empty([stop - start, *self.shapes[name][1:]], dtype=self.dtypes[name])
        part = place.rows(start, rows.shape)
        target = rows.view(part.sizes)
        for item in create_read_items_for_chunk_list(place.key, self._entries[place.key], [part]):
            block = self._piece(item.storage_index).read(item.storage_offsets, item.lengths)
            target[tuple(slice(o, o + n) for o, n in zip(item.dest_offsets, item.lengths, strict=True))] = block
        return rows

    def _piece(self, index: MetadataIndex) -> StoredPiece:
        if index not in self._pieces:
            info = self._reader.storage_data[index]
            piece = StoredPiece(self._checkpoint / info.relative_path, info.offset, info.length, index.fqn)
            if self._check_values:
                piece.check_values()
            self._pieces[index] = piece
        return self._pieces[index]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU, in their stored dtype."""
        return {name: self.read_rows(name, 0, self.shapes[name][0]) for name in names}
