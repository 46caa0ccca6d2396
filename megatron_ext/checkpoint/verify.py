"""Whether a native checkpoint is whole: its files, their digests, and every tensor that its model asks for."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_ext.checkpoint.compatible import model_of
from megatron_ext.checkpoint.digest import sha256_of
from megatron_ext.checkpoint.directory import MANIFEST, Manifest, incomplete_files
from megatron_ext.checkpoint.metadata import METADATA, objects_of, read_metadata
from megatron_ext.checkpoint.read import StoredSlice, WeightReader, Weights
from megatron_ext.checkpoint.state import LOSS_SCALER, MODEL, OPTIMIZER, STEPS, optimizer_key, random_key
from megatron_ext.checkpoint.write import row_pieces
from megatron_ext.errors import RequestError
from megatron_ext.models import parameter_shapes
from megatron_ext.optim import TrainableConfig, algorithm_named
from megatron_ext.optim.algorithm import stored_states

Problem = tuple[str, str]  # a file of the checkpoint or a tensor in it, and what is wrong with it
Shapes = dict[str, tuple[int, ...] | None]


def find_problems(
    checkpoint: Path, manifest: Manifest, checksums: bool, advance: Callable[[int], object]
) -> Iterator[Problem]:
    """All that is wrong with a checkpoint: files first, then, if .metadata is whole, tensors, and if these are, values.

    manifest: as `parse_manifest` gives it. checksums: read every file, for its digest and for its values; `advance` is
    told of the bytes as they are read.
    """
    spoiled: set[str] = set()
    for problem in _file_problems(checkpoint, manifest, checksums, advance):
        spoiled.add(problem[0])
        yield problem
    if METADATA in spoiled:
        return
    try:
        asked = asked_tensors(manifest)
    except RequestError as error:
        yield MANIFEST, str(error).removeprefix(f"{MANIFEST} ")
        return
    except TypeError as error:
        yield MANIFEST, f"describes a run that this program does not know ({error})"
        return
    try:
        metadata = read_metadata(checkpoint)
    except RequestError as error:
        yield METADATA, str(error).removeprefix(str(checkpoint / METADATA)).lstrip(": ")
        return
    problems = list(_tensor_problems(metadata, asked, manifest))
    yield from ((METADATA, what) for what in problems)
    if checksums and not spoiled and not problems:
        yield from _value_problems(checkpoint, advance)


def asked_tensors(manifest: Manifest) -> Shapes:
    """Key -> shape of every tensor that a checkpoint with this manifest must have; None: any.

    All weights; with optimizer state also what the algorithm declares of whatever is trained, and the random state of
    every rank that wrote, whose length depends on its device. Raises as `model_of` and `algorithm_named`, and TypeError
    where the manifest describes no run.
    """
    shapes = parameter_shapes(*model_of(manifest))
    asked: Shapes = {MODEL + name: tuple(shape) for name, shape in shapes.items()}
    if manifest.has_optimizer:
        trainable = TrainableConfig(**(manifest.trainable or {}))
        trained = [name for name in shapes if trainable.trains(name)]
        algorithm = algorithm_named(manifest.optimizer)
        for name in trained:
            kept = stored_states(algorithm, shapes[name], torch.float32)
            asked |= {optimizer_key(kind, name): tuple(spec.shape) for kind, spec in kept.items()}
        ranks = range(manifest.layout.get("world_size", 0))
        asked |= {STEPS: (), LOSS_SCALER: None} | {random_key(rank): None for rank in ranks}
    return asked


def _file_problems(
    checkpoint: Path, manifest: Manifest, checksums: bool, advance: Callable[[int], object]
) -> Iterator[Problem]:
    incomplete = dict(incomplete_files(checkpoint, manifest))
    yield from incomplete.items()
    if METADATA not in manifest.files:
        yield METADATA, f"is not in the list of {MANIFEST}"
    if not manifest.sha256:
        return
    for name in sorted(manifest.files.keys() ^ manifest.sha256.keys()):
        yield name, f"has only one of size and digest in {MANIFEST}"
    for name in manifest.sha256 if checksums else ():
        if name in incomplete or name not in manifest.files:
            continue
        try:
            if sha256_of(checkpoint / name, advance) != manifest.sha256[name]:
                yield name, "differs from its digest"
        except OSError as error:
            yield name, f"cannot be read ({error.strerror})"


def _tensor_problems(metadata: Metadata, asked: Shapes, manifest: Manifest) -> Iterator[str]:
    entries = metadata.state_dict_metadata
    if missing := [key for key in asked if key not in entries]:
        yield f"lacks {_several(missing)}"
    if unknown := [key for key in entries if key.startswith((MODEL, OPTIMIZER)) and key not in asked]:
        yield f"has {_several(unknown)}, which the model does not"
    if objects := objects_of(metadata):
        yield f"has {_several(objects)} stored as a pickled object and not as a tensor: nothing of it is loaded"
    for key, entry in entries.items():
        if key not in asked or not isinstance(entry, TensorStorageMetadata):
            continue
        shape, wanted = tuple(entry.size), asked[key]
        if wanted is not None and shape != wanted:
            yield f"{key} is {shape}, the model asks for {wanted}"
        elif not _is_stored(key, entry, metadata.storage_data, manifest.files):
            yield f"{key} is not stored whole in the files of {MANIFEST}"


def _is_stored(key: str, entry: TensorStorageMetadata, storage: Any, sizes: dict[str, int]) -> bool:
    """Whether the pieces of a tensor are as many elements as it has, and each lies within a file."""
    elements = 0
    for chunk in entry.chunks:
        place = storage.get(MetadataIndex(key, chunk.offsets))
        if place is not None and place.offset + place.length <= sizes.get(place.relative_path, 0):
            elements += chunk.sizes.numel()
    return elements == entry.size.numel()


def _value_problems(checkpoint: Path, advance: Callable[[int], object]) -> Iterator[Problem]:
    """Weights and optimizer states with values that are not finite, or that cannot be read."""
    stored = WeightReader(checkpoint, _weights_and_states)
    for key, dtype in stored.dtypes.items():
        if not dtype.is_floating_point:
            continue
        try:
            if count := count_not_finite(stored, key, advance):
                yield key, not_finite(count, stored, key)
        except RequestError as error:
            yield key, f"cannot be read: {error}"


def _weights_and_states(sizes: dict[str, torch.Size]) -> dict[str, StoredSlice]:
    return {
        key: StoredSlice(key) for key, size in sizes.items() if key.startswith((MODEL, OPTIMIZER)) and len(size) > 0
    }


def _several(keys: list[str]) -> str:
    first, *rest = keys
    return first if not rest else f"{first} and {len(rest)} more"


def count_not_finite(weights: Weights, name: str, advance: Callable[[int], object] = lambda _: None) -> int:
    """How many values of a tensor are NaN or infinite; reads it a piece at a time. `advance` is told of its bytes."""
    count = 0
    for rows in row_pieces(weights, name):
        piece = weights.read_rows(name, *rows)
        count += piece.numel() - int(piece.isfinite().sum())
        advance(piece.nbytes)
    return count


def not_finite(count: int, weights: Weights, name: str) -> str:
    """In words, after the tensor's name."""
    return f"has {count:,} of {weights.shapes[name].numel():,} values that are not finite (NaN or infinite)"
