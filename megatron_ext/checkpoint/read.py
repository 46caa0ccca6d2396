"""Reading a checkpoint's weights in one process, whatever layout wrote it, as much at a time as is asked for."""

import dataclasses
import functools
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.checkpoint.metadata import METADATA, not_a_tensor, objects_of, read_metadata
from megatron_ext.checkpoint.state import MODEL
from megatron_ext.errors import RequestError
from megatron_ext.models.expand import Expansion, NewRows
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.torch_private import offset_in_file


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
class StoredSlice:
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


def values_offset(described: torch.Tensor) -> int | None:
    """Where in its file the values of a tensor begin, in bytes, that torch.load put on the device "meta".

    None: there are none.
    """
    start = offset_in_file(described.untyped_storage())
    return None if start is None else start + int(described.storage_offset()) * described.itemsize


class StoredPiece:
    """One stored piece, of which any block of consecutive elements can be read without the rest.

    file, offset, length: where it lies, in bytes. name: of the tensor, for messages.
    """

    def __init__(self, file: Path, offset: int, length: int, name: str):
        self._file, self._offset, self._length, self._name = file, offset, length, name
        described = self._load("meta")
        self.shape: torch.Size = described.shape
        self._dtype = described.dtype
        start = values_offset(described)
        if start is None:
            raise RequestError(f"{file}: damaged, {name} was stored without values")
        self._values = offset + start
        self._contiguous = described.is_contiguous()

    def check_values(self) -> None:
        """Raise RequestError unless the values have the checksum that torch.save left beside them.

        (torch.load does not compare it.)
        """
        try:
            with open(self._file, "rb") as stream:
                damaged = zipfile.ZipFile(_Window(stream, self._offset, self._length)).testzip()
        except (OSError, zipfile.BadZipFile) as error:
            damaged = str(error)
        if damaged is not None:
            raise RequestError(f"{self._file}: damaged, {self._name} does not have its checksum ({damaged})")

    def read(self, offsets: torch.Size, lengths: torch.Size) -> torch.Tensor:
        """The block of shape `lengths` at `offsets`. It must be whole in every dimension after the first one it cuts.

        (As a block of rows is, also of one layer in a stack of layers.)
        """
        if not self._contiguous:
            return self._load("cpu")[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
        block = torch.empty(lengths, dtype=self._dtype)
        first = 0
        for offset, size in zip(offsets, self.shape, strict=True):
            first = first * size + offset
        with open(self._file, "rb") as stream:
            stream.seek(self._values + first * block.itemsize)
            count = stream.readinto(block.view(-1).view(torch.uint8).numpy().data)
        if count != block.nbytes:
            raise RequestError(f"{self._file}: damaged, it ends within {self._name}")
        return block

    def _load(self, device: str) -> torch.Tensor:
        """The tensor, or on the device "meta" its description, which takes no memory."""
        try:
            with open(self._file, "rb") as stream:
                window: Any = _Window(stream, self._offset, self._length)
                tensor: torch.Tensor = torch.load(window, map_location=device, weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]  # then torch advises to trust the file
            raise RequestError(f"{self._file}: damaged, {self._name} cannot be read ({reason})") from error
        return tensor


class _Window(io.RawIOBase):
    """A part of a file that looks like a file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(self._length - self._at, 0)])  # type: ignore[attr-defined]
        self._at += count
        return int(count)


VOCABULARY_MATRICES = (EMBEDDING, HEAD)


def _native(sizes: dict[str, torch.Size]) -> dict[str, StoredSlice]:
    return {key.removeprefix(MODEL): StoredSlice(key) for key in sizes if key.startswith(MODEL)}


class WeightReader:
    """The `Weights` of one checkpoint. Needs no process group.

    places: sizes of the stored tensors -> where the weights lie, by name. By default as in native checkpoints.
    check_values: compare every stored piece with its checksum when it is first read.
    Raises RequestError as `read_metadata`, and where a weight is stored as a pickled object.
    """

    def __init__(
        self,
        checkpoint: Path,
        places: Callable[[dict[str, torch.Size]], dict[str, StoredSlice]] = _native,
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


class ResizedWeights:
    """`Weights` of a model with a larger vocabulary: old rows as they are stored, then new ones.

    weights: of the model with `expansion.old_size` rows; a tied model has one of the two matrices.
    progress: show a bar while the new rows of a matrix are computed.
    """

    def __init__(self, weights: Weights, expansion: Expansion, progress: bool = False):
        self._weights, self._expansion, self._progress = weights, expansion, progress
        self._new: dict[str, NewRows] = {}
        self.dtypes = weights.dtypes
        self.shapes = {
            name: torch.Size([expansion.new_size, *shape[1:]]) if name in VOCABULARY_MATRICES else shape
            for name, shape in weights.shapes.items()
        }

    def new_rows(self, name: str) -> NewRows:
        """The rows that `name`, one of VOCABULARY_MATRICES, gets. Computed once."""
        if name not in self._new:
            read = functools.partial(self._weights.read_rows, name)
            self._new[name] = self._expansion.new_rows(name, read, self._progress)
        return self._new[name]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        old_size = self._expansion.old_size
        if name not in VOCABULARY_MATRICES or stop <= old_size:
            return self._weights.read_rows(name, start, stop)
        new = self.new_rows(name).values[max(start - old_size, 0) : stop - old_size]
        return new if start >= old_size else torch.cat([self._weights.read_rows(name, start, old_size), new])
