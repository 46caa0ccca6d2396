"""Safetensors files as `Weights`, read and written a piece of a tensor at a time.

The format: the length of the header (8 bytes, little endian), the header in JSON, padded with spaces to a multiple of
8 bytes, the values (https://huggingface.co/docs/safetensors, "Format").
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.checkpoint.write import row_pieces
from tools.conversion.formats.tensor_files import Entry, TensorFiles
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


class SafetensorsFiles(TensorFiles):
    """Those of safetensors files. Raises RequestError also for a dtype that is not known."""

    index, single, what = INDEX, SINGLE, "safetensors file"

    def _entries(self, file: str) -> Iterator[Entry]:
        header, first, size = self._read_header(file)
        end = 0
        for name, entry in header.items():
            try:
                kind, shape, (start, stop) = entry["dtype"], torch.Size(entry["shape"]), entry["data_offsets"]
                dtype = _DTYPES.get(kind)
                end = max(end, stop)
                whole = dtype is None or (start >= 0 and stop - start == shape.numel() * dtype.itemsize)
            except (LookupError, TypeError, ValueError) as error:
                raise self._broken(file, f"its header says of {name}: {entry!s:.80}") from error
            if dtype is None:
                supported = ", ".join(kind for kind, dtype in _DTYPES.items() if dtype.is_floating_point)
                raise self._error(f"{name} in {file} is stored as {kind}, which cannot be converted; {supported} can")
            if not whole:
                raise self._broken(file, f"{name} of shape {tuple(shape)} in {kind} has {stop - start} bytes")
            yield Entry(name, shape, dtype, first + start)
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
            raise self._error(f"{file} is missing") from error
        except (OSError, ValueError, RecursionError) as error:
            raise self._broken(file, str(error)) from error
        if not isinstance(header, dict):
            raise self._broken(file, "its header is no table")
        header.pop("__metadata__", None)
        return header, 8 + length, size
