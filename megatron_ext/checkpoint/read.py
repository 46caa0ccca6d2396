"""Reading a checkpoint's weights in one process, whatever layout wrote it, as much at a time as is asked for."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.checkpoint.metadata import METADATA, not_a_tensor, objects_of, read_metadata
from megatron_ext.checkpoint.piece import StoredPiece
from megatron_ext.checkpoint.state import MODEL
from megatron_ext.errors import RequestError


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
    Raises RequestError as `read_metadata`, and where a weight is stored as a pickled object.
    """

    def __init__(
        self,
        checkpoint: Path,
        places: Callable[[dict[str, torch.Size]], dict[str, Place]] = _native,
        check_values: bool = False,
    ):
        self._checkpoint = checkpoint
        self._check_values, self._pieces = check_values, dict[MetadataIndex, StoredPiece]()
        metadata = read_metadata(checkpoint)
        self._stored = metadata.storage_data
        entries = metadata.state_dict_metadata.items()
        self._entries = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        for key in objects_of(metadata):
            if places({key: torch.Size([1])}):
                raise not_a_tensor(checkpoint, key)
        sizes = {key: entry.size for key, entry in self._entries.items()}
        self._places = places(sizes)
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for name, place in self._places.items():
            size = sizes[place.key]
            self.shapes[name] = size if place.index is None else size[1:]
            self.dtypes[name] = self._entries[place.key].properties.dtype

    def check_whole(self, where: str) -> None:
        """Raise RequestError, a line that starts with `where`, where files are missing or short, or lack rows."""
        keys = {place.key for place in self._places.values()}
        ends: dict[str, int] = {}
        for index, info in self._stored.items():
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
            info = self._stored.get(index)
            if info is None:
                raise RequestError(
                    f"{self._checkpoint}: damaged, its {METADATA} does not say where all of {index.fqn} is"
                )
            piece = StoredPiece(self._checkpoint / info.relative_path, info.offset, info.length, index.fqn)
            if self._check_values:
                piece.check_values()
            self._pieces[index] = piece
        return self._pieces[index]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors on the CPU, in their stored dtype."""
        return {name: self.read_rows(name, 0, self.shapes[name][0]) for name in names}
