"""Safetensors files as `Weights`, read and written a piece of a tensor at a time.

The format: the length of the header (8 bytes, little endian), the header in JSON, padded with spaces to a multiple of
8 bytes, the values (https://huggingface.co/docs/safetensors, "Format"). Files are read, not mapped into memory: what
is held is what was asked for, whatever the size of the file.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces
from megatron_ext.errors import RequestError
from tools.conversion.source import bytes_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Also those that hold no weights: some folders store masks and counters beside them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit


def write_safetensors(path: Path, weights: Weights, names: list[str]) -> None:
    """Write one file of the tensors `names`, with a piece of one in memory at a time."""
    # Wide elements first, as the format's own library does: so every tensor begins at a multiple of its element.
    names = sorted(names, key=lambda name: -weights.dtypes[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + bytes_of(weights, name)
        kind, shape = _KINDS[weights.dtypes[name]], list(weights.shapes[name])
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for rows in row_pieces(weights, name):
                stream.write(weights.read_rows(name, *rows).contiguous().view(torch.uint8).numpy().data)


def open_folder(folder: Path) -> "SafetensorsFiles":
    """The tensors of a model's folder: of the shards that its index names, or of its only file.

    Raises RequestError where the index, a file, or a tensor of the index is missing or broken.
    """
    if not (folder / INDEX).is_file():
        return SafetensorsFiles(folder, [SINGLE])
    try:
        places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(map(str, places.values())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RequestError(f"--input {folder}: {INDEX} cannot be read ({error})") from error
    weights = SafetensorsFiles(folder, files)
    for name, file in places.items():
        if weights.files.get(name) != file:
            raise RequestError(f"--input {folder}: {INDEX} says that {name} is in {file}, which lacks it")
    return weights


class SafetensorsFiles:
    """The `Weights` of several safetensors files of one folder, by the names in them.

    Raises RequestError for a file that is missing or not whole, for a dtype that is not known, and for a tensor in two
    files.

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

    def _add(self, file: str) -> None:
        header, first, size = self._read_header(file)
        end = 0
        for name, entry in header.items():
            try:
                kind, shape, (start, stop) = entry["dtype"], torch.Size(entry["shape"]), entry["data_offsets"]
                known = _DTYPES.get(kind)
                end = max(end, stop)
                whole = known is None or (start >= 0 and stop - start == shape.numel() * known.itemsize)
            except (LookupError, TypeError, ValueError) as error:
                raise self._broken(file, f"its header says of {name}: {entry!s:.80}") from error
            if known is None:
                supported = ", ".join(kind for kind, dtype in _DTYPES.items() if dtype.is_floating_point)
                raise RequestError(
                    f"--input {self._folder}: {name} in {file} is stored as {kind}, which cannot be converted; "
                    f"{supported} can"
                )
            if not whole:
                raise self._broken(file, f"{name} of shape {tuple(shape)} in {kind} has {stop - start} bytes")
            if name in self.files:
                raise RequestError(f"--input {self._folder}: {name} is both in {self.files[name]} and in {file}")
            self.shapes[name], self.dtypes[name], self.files[name] = shape, known, file
            self._offsets[name] = first + start
        if size != first + end:
            raise self._broken(file, f"it has {size} bytes, its header asks for {first + end}")

    def _read_header(self, file: str) -> tuple[dict[str, Any], int, int]:
        """A file's entries by name, where its values begin, and its size; all in bytes."""
        path = self._folder / file
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                text = stream.read(min(length, _LONGEST_HEADER))
            header = json.loads(text)
        except FileNotFoundError as error:
            raise RequestError(f"--input {self._folder}: {file} is missing") from error
        except (OSError, ValueError) as error:
            raise self._broken(file, str(error)) from error
        if not isinstance(header, dict):
            raise self._broken(file, "its header is no table")
        header.pop("__metadata__", None)
        return header, 8 + length, size

    def _broken(self, file: str, reason: str) -> RequestError:
        return RequestError(f"--input {self._folder}: {file} is not a whole safetensors file ({reason})")
