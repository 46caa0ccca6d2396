"""Files that torch.save wrote as `Weights`, read a piece of a tensor at a time.

Such a file is an uncompressed zip archive: a pickle that describes the tensors, and the bytes of each storage. The
description is loaded alone (onto the device "meta"), with torch's unpickler that makes nothing but tensors. It says
where the values lie, and they are then read from there. Files are not mapped into memory: Linux refuses a private
mapping that is larger than the machine's memory, and mapped pages would count as held.
"""

import json
import math
import pickle
from pathlib import Path

import torch

from megatron_ext.errors import RequestError

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"

_ZIP, _PICKLE = b"PK", b"\x80"  # how files begin that torch.save wrote since version 1.6, and before


def open_bin_folder(folder: Path) -> "TorchFiles":
    """The tensors of a Hugging Face folder, by the names there: of the shards of its index, or of its only file.

    Raises RequestError where the index, a file, or a tensor of the index is missing or broken.
    """
    if not (folder / INDEX).is_file():
        return TorchFiles(folder, [SINGLE])
    try:
        places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(map(str, places.values())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RequestError(f"--input {folder}: {INDEX} cannot be read ({error})") from error
    weights = TorchFiles(folder, files)
    for name, file in places.items():
        if weights.files.get(name) != file:
            raise RequestError(f"--input {folder}: {INDEX} says that {name} is in {file}, which lacks it")
    return weights


class TorchFiles:
    """The `Weights` of several files of one folder, each a saved dictionary of tensors, by the names in them.

    Raises RequestError for a file that is missing, not whole, or holds anything else, for a tensor whose rows do not
    lie one after the other, and for a tensor in two files.

    Attributes:
        files: the file of every tensor.
    """

    def __init__(self, folder: Path, files: list[str]):
        self._folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.files: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        for file in files:
            self._add(file)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = self.shapes[name]
        rows = torch.empty([stop - start, *shape[1:]], dtype=self.dtypes[name])
        with (self._folder / self.files[name]).open("rb") as stream:
            stream.seek(self._offsets[name] + start * math.prod(shape[1:]) * rows.itemsize)
            if stream.readinto(rows.flatten().view(torch.uint8).numpy().data) != rows.nbytes:
                raise self._broken(self.files[name], f"it ends within {name}")
        return rows

    def same_place(self, one: str, other: str) -> bool:
        """Whether two names stand for the same stored values, as torch.save keeps tied weights."""
        place, other_place = ((self.files[name], self._offsets[name], self.shapes[name]) for name in (one, other))
        return place == other_place

    def _add(self, file: str) -> None:
        tensors = self._load_description(file)
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise RequestError(
                    f"--input {self._folder}: the rows of {name} in {file} do not lie one after the other: "
                    "save it with .contiguous()"
                )
            if name in self.files:
                raise RequestError(f"--input {self._folder}: {name} is both in {self.files[name]} and in {file}")
            storage = tensor.untyped_storage()._checkpoint_offset  # as torch's GPUDirect Storage tutorial reads it
            assert storage is not None
            self.shapes[name], self.dtypes[name], self.files[name] = tensor.shape, tensor.dtype, file
            self._offsets[name] = storage + int(tensor.storage_offset()) * tensor.itemsize

    def _load_description(self, file: str) -> dict[str, torch.Tensor]:
        """The tensors of a file without their values."""
        path = self._folder / file
        try:
            with path.open("rb") as stream:
                beginning = stream.read(2)
            if not beginning.startswith(_ZIP):
                raise self._foreign(file, beginning)
            content = torch.load(path, map_location="meta", weights_only=True)
        except FileNotFoundError as error:
            raise RequestError(f"--input {self._folder}: {file} is missing") from error
        except pickle.UnpicklingError as error:
            raise self._other(file) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise self._broken(file, str(error).partition(". ")[0]) from error
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise self._other(file)
        return content

    def _foreign(self, file: str, beginning: bytes) -> RequestError:
        what = "is no file of torch.save"
        if beginning.startswith(_PICKLE):
            what = "was saved as torch did before 1.6, which is not read: torch.load it and torch.save it again"
        return RequestError(f"--input {self._folder}: {file} {what}")

    def _other(self, file: str) -> RequestError:
        return RequestError(
            f"--input {self._folder}: {file} holds something else than a dictionary of tensors: save a state_dict alone"
        )

    def _broken(self, file: str, reason: str) -> RequestError:
        return RequestError(f"--input {self._folder}: {file} is not a whole file of torch.save ({reason})")
