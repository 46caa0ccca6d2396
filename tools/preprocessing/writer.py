"""Writes PREFIX.bin, PREFIX.idx and PREFIX.json, all or none.

The first two are the format of megatron-core's IndexedDataset: the `.bin` is the tokens of all documents one
after the other; the `.idx`, little-endian, is 9 bytes magic, u64 version 1, u8 dtype code, u64 documents, u64
marks (documents + 1), then int32 lengths, int64 byte offsets, int64 marks 0 .. documents.
"""

import array
import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ext.errors import RequestError

_DTYPE_CODES = {"uint16": 8, "int32": 4}
SUFFIXES = ("bin", "json", "idx")
_STRIDE = 1 << 20  # documents at a time while the index is written


class DatasetWriter:
    """A dataset in the making; it lies in PREFIX.*.tmp until `finish` renames it.

    As a context manager it removes the temporary files when it is left without `finish`.

    Args:
        prefix: path without suffix; its directory must exist.
        dtype: of a token: uint16 or int32.
        overwrite: replace a dataset of this name.

    Raises:
        RequestError: the dataset exists already, or the directory is missing or cannot be written.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], overwrite: bool) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.lengths = array.array("i")
        directory = Path(prefix).parent
        if not directory.is_dir():
            raise RequestError(f"--output-prefix {prefix}: the directory {directory} does not exist")
        existing = [self._path(suffix) for suffix in SUFFIXES if self._path(suffix).exists()]
        if existing and not overwrite:
            raise RequestError(f"--output-prefix {prefix}: {existing[0]} exists; choose another, or add --overwrite")
        try:
            self._bin: BinaryIO = self._temporary("bin").open("wb")
        except OSError as error:
            raise RequestError(f"--output-prefix {prefix}: cannot write to {directory}: {error.strerror}") from None

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bin.close()
        for suffix in SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def add(self, tokens: bytes, lengths: array.array) -> None:
        """Append documents: their tokens as bytes of `dtype`, and how many tokens each has."""
        self._bin.write(tokens)
        self.lengths.extend(lengths)

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the index and `facts` (as JSON), and give the three files their names."""
        _sync(self._bin)
        with self._temporary("json").open("wb") as file:
            file.write(json.dumps(facts, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            _sync(file)
        with self._temporary("idx").open("wb") as file:
            self._write_index(file)
            _sync(file)
        # Without an index nothing reads the rest: it goes first and comes last, so old and new never mix.
        self._path("idx").unlink(missing_ok=True)
        for suffix in SUFFIXES:
            self._temporary(suffix).replace(self._path(suffix))
        directory = os.open(Path(self.prefix).parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _write_index(self, file: BinaryIO) -> None:
        lengths = np.frombuffer(self.lengths, dtype="<i4")
        count = len(lengths)
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<QBQQ", 1, _DTYPE_CODES[self.dtype.name], count, count + 1))
        file.write(lengths.data)
        offset = 0
        for start in range(0, count, _STRIDE):
            ends = lengths[start : start + _STRIDE].cumsum(dtype="<i8") * self.dtype.itemsize + offset
            file.write(np.concatenate(([offset], ends[:-1])).astype("<i8").data)
            offset = int(ends[-1])
        for start in range(0, count + 1, _STRIDE):
            file.write(np.arange(start, min(start + _STRIDE, count + 1), dtype="<i8").data)

    def _path(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.{suffix}")

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.{suffix}.{os.getpid()}.tmp")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
