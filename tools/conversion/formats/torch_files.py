"""Files that torch.save wrote as `Weights`, read a piece of a tensor at a time.

Such a file is an uncompressed zip archive: a pickle that describes the tensors, and the bytes of each storage. The
description is loaded alone (onto the device "meta"), with torch's unpickler that makes nothing but tensors. It says
where the values lie, and they are then read from there. Files are not mapped into memory: Linux refuses a private
mapping that is larger than the machine's memory, and mapped pages would count as held.
"""

import pickle
from collections.abc import Iterator

import torch

from megatron_ext.checkpoint.read import values_offset
from megatron_ext.errors import RequestError
from tools.conversion.formats.tensor_files import Entry, TensorFiles

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"

_ZIP, _PICKLE = b"PK", b"\x80"  # how files begin that torch.save wrote since version 1.6, and before


class TorchFiles(TensorFiles):
    """Those of files that each hold a saved dictionary of tensors.

    Raises RequestError also for a file that holds anything else, and for a tensor whose rows do not lie one after the
    other.
    """

    index, single, what = INDEX, SINGLE, "file of torch.save"

    def same_place(self, one: str, other: str) -> bool:
        """Tell whether two names stand for the same stored values, as torch.save keeps tied weights."""
        place, other_place = ((self.files[name], self._offsets[name], self.shapes[name]) for name in (one, other))
        return place == other_place

    def _entries(self, file: str) -> Iterator[Entry]:
        for name, tensor in self._load_description(file).items():
            if not tensor.is_contiguous():
                raise self._error(
                    f"the rows of {name} in {file} do not lie one after the other: save it with .contiguous()"
                )
            offset = values_offset(tensor)
            if offset is None:
                raise self._broken(file, f"{name} was saved without values, from the device meta")
            yield Entry(name, tensor.shape, tensor.dtype, offset)

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
            raise self._error(f"{file} is missing") from error
        except pickle.UnpicklingError as error:
            raise self._other(file) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise self._broken(file, str(error).partition(". ")[0]) from error
        tensors = isinstance(content, dict) and all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
        )
        if not tensors:
            raise self._other(file)
        return content

    def _foreign(self, file: str, beginning: bytes) -> RequestError:
        what = "is no file of torch.save"
        if beginning.startswith(_PICKLE):
            what = "was saved as torch did before 1.6, which is not read: torch.load it and torch.save it again"
        return self._error(f"{file} {what}")

    def _other(self, file: str) -> RequestError:
        return self._error(f"{file} holds something else than a dictionary of tensors: save a state_dict alone")
