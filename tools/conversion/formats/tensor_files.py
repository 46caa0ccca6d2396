"""Files of tensors in a folder, one after the other in each, as `Weights`."""

import abc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ext.errors import RequestError
from tools.conversion.source import read_table


class Entry(NamedTuple):
    """A tensor in a file. offset: of its first element, in bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int


class TensorFiles(abc.ABC):
    """The `Weights` of several files of one folder, by the names in them.

    Files are read, not mapped into memory: what is held is what was asked for, whatever the size of the file. Raises
    RequestError for a file that is missing or not whole, and for a tensor in two files.

    Attributes:
        files: the file of every tensor.
    """

    index: str  # name of the file that says which tensor is in which file
    single: str  # name of the only file where there is no index
    what: str  # that a file should be

    def __init__(self, folder: Path, files: list[str]):
        self._folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.files: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        for file in files:
            for name, shape, dtype, offset in self._entries(file):
                if name in self.files:
                    raise self._error(f"{name} is both in {self.files[name]} and in {file}")
                self.shapes[name], self.dtypes[name], self.files[name] = shape, dtype, file
                self._offsets[name] = offset

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return any((folder / name).is_file() for name in (cls.index, cls.single))

    @classmethod
    def open_folder(cls, folder: Path) -> "TensorFiles":
        """Open the tensors of a model's folder: of the shards that its index names, or of its only file.

        Raises RequestError where the index, a file, or a tensor of the index is missing or broken, and where there is
        a file beside the index that transformers would read instead.
        """
        if not (folder / cls.index).is_file():
            return cls(folder, [cls.single])
        places = read_table(folder, cls.index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise RequestError(
                f"--input {folder}: {cls.index} cannot be read (it has no weight_map of tensors to files)"
            )
        files = sorted(set(places.values()))
        for file in files:
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise RequestError(f"--input {folder}: {cls.index} names {file!r}, which is not in this folder")
        if (folder / cls.single).is_file() and files != [cls.single]:
            raise RequestError(
                f"--input {folder}: {cls.single} lies beside {cls.index}, which does not mean it; transformers would "
                "read it alone: move away the one that does not belong to the model"
            )
        weights = cls(folder, files)
        for name, file in places.items():
            if weights.files.get(name) != file:
                raise RequestError(f"--input {folder}: {cls.index} says that {name} is in {file}, which lacks it")
        return weights

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = self.shapes[name]
        rows = torch.empty([stop - start, *shape[1:]], dtype=self.dtypes[name])
        with (self._folder / self.files[name]).open("rb") as stream:
            stream.seek(self._offsets[name] + start * math.prod(shape[1:]) * rows.itemsize)
            if stream.readinto(rows.flatten().view(torch.uint8).numpy().data) != rows.nbytes:
                raise self._broken(self.files[name], f"it ends within {name}")
        return rows

    @abc.abstractmethod
    def _entries(self, file: str) -> Iterator[Entry]:
        """The tensors in a file."""

    def _error(self, text: str) -> RequestError:
        return RequestError(f"--input {self._folder}: {text}")

    def _broken(self, file: str, reason: str) -> RequestError:
        return self._error(f"{file} is not a whole {self.what} ({reason})")
