"""What a checkpoint says is stored in it, and where: torch DCP's .metadata, read without running anything it names.

The file is a pickle, and a pickle may name any function there is. This reader admits the classes that DCP's and
megatron-core's writers put there, of torch 2.0 and later; of each it takes the fields alone, into objects of its own,
and makes torch's from these once every field is of the kind that it must be.
"""

import io
import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ext.errors import RequestError
from megatron_ext.torch_private import StorageInfo

METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where some of them were before torch 2.3
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_PLANNER, _FILES = "torch.distributed.checkpoint.planner", "torch.distributed.checkpoint.filesystem"
_RECORDS = {
    (_DCP, "Metadata"): "Metadata",
    (_DCP, "MetadataIndex"): "MetadataIndex",
    (_DCP, "StorageMeta"): "StorageMeta",
    (_DCP, "TensorStorageMetadata"): "TensorStorageMetadata",
    (_DCP, "BytesStorageMetadata"): "BytesStorageMetadata",
    (_DCP, "ChunkStorageMetadata"): "ChunkStorageMetadata",
    (_DCP, "TensorProperties"): "TensorProperties",
    (_SHARDED, "TensorProperties"): "TensorProperties",
    (_FILES, "_StorageInfo"): "_StorageInfo",
    (_MCORE, "MCoreMetadata"): "Metadata",
    # the plans of a save, which megatron-core keeps for its next one; of no use to a reader
    (_MCORE, "MCoreSavePlan"): "SavePlan",
    (_PLANNER, "SavePlan"): "SavePlan",
    (_PLANNER, "WriteItem"): "WriteItem",
    (_PLANNER, "TensorWriteData"): "TensorWriteData",
    (_PLANNER, "BytesIOWriteData"): "BytesIOWriteData",
    (_FILES, "_StoragePrefix"): "_StoragePrefix",
}
_VALUES = {
    ("torch.serialization", "_get_layout"),
    (_DCP, "_MEM_FORMAT_ENCODING"),
    (_SHARDED, "MEM_FORMAT_ENCODING"),
    (_PLANNER, "WriteItemType"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Foreign(pickle.UnpicklingError):
    """A file asks for something that has no place in it."""


class _Record:
    """The fields of an object, whatever they are. Its subclasses live as long as one file is read."""

    fields: Any = None

    def __setstate__(self, state: Any) -> None:
        self.fields = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any):
        super().__init__(file)
        self._known: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            kind = _RECORDS[module, name]
            return self._known.setdefault(kind, type(kind, (_Record,), {}))
        if (module, name) in _VALUES:  # of which nothing is used
            return lambda *_: None
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise _Foreign(f"it asks for {module}.{name}, which has no place there: nothing that a file names is run")


def read_metadata(checkpoint: Path, flag: str = "") -> Metadata:
    """The metadata of a checkpoint's folder.

    Raises RequestError, a line that starts with `flag` and the file, where it is missing or damaged, asks for a class
    or function that has no place in it, or says that something is stored outside the folder.
    """
    where = f"{flag} {checkpoint / METADATA}".strip()
    try:
        with open(checkpoint / METADATA, "rb") as stream:
            content = _Unpickler(io.BytesIO(stream.read())).load()
        metadata = _metadata(content)
        _check_inside(checkpoint, {info.relative_path for info in metadata.storage_data.values()})
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    except Exception as error:  # a damaged pickle fails in any way
        plain = isinstance(error, pickle.UnpicklingError | OSError)
        reason = " ".join((str(error) if plain else f"{type(error).__name__}: {error}").split())
        raise RequestError(f"{where} cannot be read ({reason})") from error
    return metadata


def _metadata(content: Any) -> Metadata:
    fields = _fields(content, "Metadata")
    entries = {_of(key, str): _entry(entry) for key, entry in _of(fields["state_dict_metadata"], dict).items()}
    storage = {}
    for index, info in _of(fields["storage_data"], dict).items():
        place, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        offset = None if place.get("offset") is None else _size(place["offset"])
        if where.get("transform_descriptors"):
            raise pickle.UnpicklingError(f"{place['fqn']} is stored through {where['transform_descriptors']}")
        storage[MetadataIndex(_of(place["fqn"], str), offset)] = StorageInfo(
            _of(where["relative_path"], str), _count(where["offset"]), _count(where["length"])
        )
    return Metadata(entries, storage_data=storage, storage_meta=StorageMeta(), version=fields.get("version"))


def _entry(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(entry).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in _of(fields["chunks"], list)]
    properties = fields["properties"].fields
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    return TensorStorageMetadata(
        TensorProperties(_of(dtype, torch.dtype)),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise pickle.UnpicklingError(f"{type(record).__name__} where {kind} is expected")
    return _of(record.fields, dict)


def _of(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise pickle.UnpicklingError(f"{type(value).__name__} where {kind.__name__} is expected")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise pickle.UnpicklingError(f"{value!r:.40} where a number of bytes or elements is expected")
    return value


def _size(value: Any) -> torch.Size:
    return torch.Size([_count(number) for number in _of(value, tuple)])


def _check_inside(checkpoint: Path, names: set[str]) -> None:
    """Raise RequestError unless every name is of a file in the folder, also after links are followed."""
    folder = checkpoint.resolve()
    for name in sorted(names):
        path = PurePosixPath(name)
        leaves = path.is_absolute() or ".." in path.parts or not path.parts
        if leaves or not (folder / path).resolve().is_relative_to(folder):
            raise RequestError(f"it says that tensors are stored in {name!r}, which is outside the checkpoint's folder")


def objects_of(metadata: Metadata) -> list[str]:
    """Keys of what is stored as pickled objects, which nothing here loads, and not as tensors."""
    return [key for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]


def not_a_tensor(checkpoint: Path, key: str, flag: str = "") -> RequestError:
    where = f"{flag} {checkpoint / METADATA}".strip()
    return RequestError(f"{where}: {key} is stored as a pickled object and not as a tensor: nothing of it is loaded")


class TensorReader(dcp.FileSystemReader):
    """torch's reader for `dcp.load`, of a checkpoint that holds tensors alone, as native ones do.

    Raises RequestError as `read_metadata`, and where something is stored as a pickled object.
    """

    def __init__(self, checkpoint: Path, flag: str = ""):
        super().__init__(checkpoint)
        self._metadata = read_metadata(checkpoint, flag)
        for key in objects_of(self._metadata):
            raise not_a_tensor(checkpoint, key, flag)

    def size_of(self, key: str) -> torch.Size | None:
        """The shape of a stored tensor; None where there is none of this name."""
        entry = self._metadata.state_dict_metadata.get(key)
        return entry.size if isinstance(entry, TensorStorageMetadata) else None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata
