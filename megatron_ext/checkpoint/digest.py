"""SHA-256 of files: of one that is there, and of those that a rank of a save is writing."""

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

_READ_BYTES = 4 << 20


def sha256_of(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """Hex digest of a file. `advance` is told of the bytes as they are read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


class HashingWriter(dcp.FileSystemWriter):
    """Hashes what a rank writes while it is written, so that nothing is read back.

    The digests travel with the results that every rank reports to the coordinator anyway; they are in the coordinator's
    `sha256` when the save has ended: file name -> hex digest, of every file with tensors.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self.fs: _HashingFileSystem = _HashingFileSystem()
        self.sha256: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        return super().write_data(plan, planner).then(lambda done: [self.hashed(result) for result in done.value()])

    def hashed(self, result: WriteResult) -> WriteResult:
        """A result of a file that has been written through `fs`, with its digest."""
        digest = self.fs.sha256[result.storage_data.relative_path]
        return _HashedResult(result.index, result.size_in_bytes, result.storage_data, digest)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        for result in (result for of_rank in results for result in of_rank):
            assert isinstance(result, _HashedResult)
            self.sha256[result.storage_data.relative_path] = result.sha256


@dataclasses.dataclass(frozen=True)
class _HashedResult(WriteResult):
    """sha256: of the file in which the result lies."""

    sha256: str


class _HashingFileSystem(FileSystem):
    """sha256: of every file that was written through it, by name."""

    def __init__(self) -> None:
        self.sha256: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _HashingFile(io.FileIO(path, "w")) as file:
            yield file
        self.sha256[Path(path).name] = file.digest.hexdigest()


class _HashingFile(io.BufferedWriter):
    """A new file that is hashed as it grows, and only grows."""

    def __init__(self, raw: io.FileIO):
        super().__init__(raw)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)

    def close(self) -> None:
        if not self.closed:  # torch syncs .metadata before its buffer is flushed
            self.flush()
            os.fsync(self.fileno())
        super().close()

    def seek(self, *_: object) -> int:
        raise io.UnsupportedOperation("a file that is hashed while it is written has no way back")
