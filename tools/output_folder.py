"""A folder of results that appears whole or not at all, and that one process at a time writes."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from megatron_ext.checkpoint.read import Weights
from megatron_ext.errors import RequestError
from tools.conversion.source import bytes_of

_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)  # what file systems without locks answer


def check_new(output: Path) -> None:
    """Raise RequestError unless a folder of this name could be made: nothing has it, not even a dangling link."""
    with writing(output):
        if os.path.lexists(output):
            raise RequestError(f"--output {output} exists already: remove it or choose another name")
        if not output.parent.is_dir():
            raise RequestError(f"--output {output}: {output.parent} is not a directory")
        with contextlib.suppress(FileNotFoundError):
            _partial(output).lstat()  # the longer of the two names: either may be too long


def check_room(output: Path, weights: Weights) -> None:
    """Raise RequestError if the disk of `output`, which need not exist, has too little room for `weights`."""
    size = sum(bytes_of(weights, name) for name in weights.shapes)
    free = shutil.disk_usage(output.parent).free
    if size > free:
        needed, there = (tqdm.format_sizeof(value, "B") for value in (size, free))
        raise RequestError(f"--output {output}: needs {needed}, and {there} are free on its disk")


@contextlib.contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Blame the result for what goes wrong with files within. (Sources raise RequestErrors of their own.)"""
    try:
        yield
    except (OSError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RequestError(f"--output {output}: cannot be written ({reason})") from error


@contextlib.contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the name `output` when the block has ended well, or else goes.

    Raises RequestError if another process is filling it. What a killed one has left is cleared: its lock died with it.
    """
    partial = _partial(output)
    with writing(output):
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with writing(output):
            _lock(descriptor, partial, output)
        try:
            with writing(output):
                _clear(partial)
            yield partial
            with writing(output):
                os.replace(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)  # and with it the lock


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.tmp")


def _lock(descriptor: int, partial: Path, output: Path) -> None:
    occupied = RequestError(f"--output {output}: another conversion is writing it")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise occupied from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    # another process may have published or removed the folder between our opening and our locking it
    if not (partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())):
        raise occupied


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
