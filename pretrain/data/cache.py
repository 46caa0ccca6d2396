"""Arrays that are built once and then shared as memory maps by every process that can see the directory."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock

from megatron_ext.errors import RequestError


def cached_arrays(directory: Path, key: str, build: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of `directory/key`, built first when they are not there.

    Any number of processes, on one node or many, may call this at once and in any order; it needs no process
    group. One of them builds, the others wait for the file lock and read. The set of arrays appears by renaming
    one directory, so a process killed while building leaves nothing that could be read. Where a file system
    does not honour locks the work may be done twice, the outcome is the same.

    Args:
        directory: of the cache; made when missing.
        key: names the content: the same key must always mean the same arrays.
        build: gives the arrays by name.

    Returns:
        The arrays, read-only memory maps.

    Raises:
        RequestError: the cache is not there and cannot be written.
    """
    target = directory / key
    if not target.is_dir():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(directory / f"{key}.lock"):
                if not target.is_dir():
                    _write(target, build())
        except OSError as error:
            raise RequestError(
                f"cannot write the sample index to {directory}: {error.strerror or error}; "
                "name a writable directory with --data-cache-path"
            ) from None
    return {file.stem: np.load(file, mmap_mode="r") for file in sorted(target.glob("*.npy"))}


def _write(target: Path, arrays: Mapping[str, np.ndarray]) -> None:
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, array in arrays.items():
            with (building / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        building.chmod(0o755)  # mkdtemp's 0700 would shut out a colleague who shares the corpus
        try:
            building.rename(target)
        except OSError:
            if not target.is_dir():  # another node was faster where locks do not reach: its arrays are the same
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def digest(*parts: object) -> str:
    """A short name for what `parts` say, the same on every machine."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
