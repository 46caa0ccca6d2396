"""Files that grow record by record, and files of earlier runs that must not be lost to them."""

import contextlib
import errno
import os
from pathlib import Path


class GrowingFile:
    """A file to whose end whole records are written, each at once: after a failure there is no half of one.

    A file that was removed in the meantime, or could not be written, is opened again by `append`.
    """

    def __init__(self, path: str | Path):
        self._path = path
        self._descriptor: int | None = None
        self._open()

    @property
    def is_lost(self) -> bool:
        """Whether the next record begins another file, or the same one anew."""
        return self._descriptor is None or os.fstat(self._descriptor).st_nlink == 0

    def append(self, record: bytes) -> None:
        """Raises OSError: then nothing was written."""
        if self.is_lost:
            self.close()
            self._open()
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):  # a pipe has no size
                os.ftruncate(self._descriptor, size)
            self.close()
            raise

    def _open(self) -> None:
        # a pipe that nobody reads should fail, not wait
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o644)

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):
                os.close(descriptor)
