"""A piece of a tensor as torch.distributed.checkpoint stores it: a file of torch.save within a file."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_ext.errors import RequestError
from megatron_ext.torch_private import offset_in_file


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
