"""Arrays that are built once and then shared as memory maps by every process that can see the directory."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from megatron_ext.errors import RequestError

_RECORD = "crc32.json"  # of every file: name -> CRC-32
_READ_BYTES = 4 << 20


class _NotWhole(Exception):
    """A set of arrays is not there (no text), or not as it was written (what is wrong)."""


def cached_arrays(
    directory: Path, key: str, names: Sequence[str], build: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of `directory/key`, built first when they are not there or no longer what was written.

    Any number of processes, on one node or many, may call this at once and in any order; it needs no process
    group. One of them builds, the others wait for the file lock and read. The set of arrays appears by renaming
    one directory, so a process killed while building leaves nothing that could be read. Where a file system
    does not honour locks the work may be done twice, the outcome is the same. Whoever opens the arrays compares their
    checksums; whoever has to build them again says so, on stderr.

    Args:
        directory: of the cache; made when missing.
        key: names the content: the same key must always mean the same arrays.
        names: of the arrays.
        build: gives the arrays by name.

    Returns:
        The arrays, read-only memory maps.

    Raises:
        RequestError: the cache is not there, or damaged, and cannot be written.
    """
    target = directory / key
    try:
        return _read(target, names)
    except _NotWhole:
        pass
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / f"{key}.lock"):
            try:
                return _read(target, names)  # another process was faster
            except _NotWhole as damage:
                if str(damage):
                    print(f"{target}: {damage}; building this index again", file=sys.stderr, flush=True)
                    _remove(target)
            _write(target, build())
            return _read(target, names)
    except OSError as error:
        reason = f"cannot write the sample index to {directory}: {error.strerror or error}"
    except _NotWhole as damage:
        reason = f"the sample index {target} is damaged as soon as it is written ({damage})"
    raise RequestError(f"{reason}; name a writable directory with --data-cache-path")


def _read(target: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    if not os.path.lexists(target):
        raise _NotWhole
    try:
        record = json.loads((target / _RECORD).read_bytes())
        for name in names:
            if record.get(name) != _crc32(target / f"{name}.npy"):
                raise _NotWhole(f"{name}.npy is damaged")
        return {name: np.load(target / f"{name}.npy", mmap_mode="r") for name in names}
    except FileNotFoundError as error:
        raise _NotWhole(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _NotWhole(f"it cannot be read ({error})") from error


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def _remove(target: Path) -> None:
    """Take away what is damaged, in one step for whoever looks."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        target.rename(aside / target.name)
    except FileNotFoundError:  # another node was faster where locks do not reach
        pass
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(target: Path, arrays: Mapping[str, np.ndarray]) -> None:
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        record = {}
        for name, array in arrays.items():
            with (building / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            record[name] = _crc32(building / f"{name}.npy")
        with (building / _RECORD).open("w", encoding="utf-8") as text:
            json.dump(record, text)
            text.flush()
            os.fsync(text.fileno())
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
