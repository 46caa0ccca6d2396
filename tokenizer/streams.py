"""Standard output and standard error that never end a program, and file encodings that no locale changes.

For programs at their start, in their own process; also for those of the other rooms.
"""

import errno
import io
import locale
import os
import select
import sys
from typing import Any


def begin_in_utf8() -> None:
    """Start this program again in Python's UTF-8 mode if the locale has another encoding.

    Libraries read their own files with the locale's encoding, torch its sources among them. What is printed keeps the
    terminal's encoding. Children are in UTF-8 mode too.
    """
    if sys.flags.utf8_mode or locale.getencoding().lower() in ("utf-8", "utf8"):
        return
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def keep_streams_open(*, tell_closed: bool = False) -> None:
    """Make `sys.stdout` and `sys.stderr` lose what cannot be written, where they would raise.

    A pipe that its reader has closed (`| head`), a full disk below a log, a terminal that is gone: the program goes on.
    The first loss of standard output is told on standard error, that to a closed pipe only if asked for. What the
    encoding lacks appears as \\uXXXX. Streams that a caller has put in place of the process's own stay as they are.
    """
    for name, number, title in (("stdout", 1, "standard output"), ("stderr", 2, None)):
        stream = getattr(sys, name)
        if stream is None:  # closed before we began: the next file that is opened would take its number
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            encoding, by_line = "utf-8", True
        elif stream is not getattr(sys, f"__{name}__") or isinstance(_raw(stream), _KeptOpen):
            continue
        else:
            encoding, by_line = stream.encoding, stream.line_buffering or stream.write_through
        buffer = io.BufferedWriter(_KeptOpen(number, title, tell_closed))
        lasting = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=by_line)
        setattr(sys, name, lasting)
        setattr(sys, f"__{name}__", lasting)


def output_is_incomplete() -> bool:
    """Whether something printed got lost though somebody may wait for it: not where the reader has seen enough."""
    if sys.stdout is not None:
        sys.stdout.flush()
    raw = _raw(sys.stdout)
    return isinstance(raw, _KeptOpen) and raw.failure is not None and raw.failure.errno != errno.EPIPE


def _raw(stream: Any) -> Any:
    return getattr(getattr(stream, "buffer", None), "raw", None)


class _KeptOpen(io.FileIO):
    """A file descriptor that takes whatever is written. title: of it, said with the first error if there is one."""

    def __init__(self, number: int, title: str | None, tell_closed: bool) -> None:
        super().__init__(number, "wb", closefd=False)
        self._title, self._tell_closed = title, tell_closed
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        sent = 0
        try:
            while sent < len(view):
                count = super().write(view[sent:])
                if count is None:  # a pipe that somebody has set to not block, and that is full
                    select.select([], [self.fileno()], [])
                sent += count or 0
        except OSError as error:
            if self.failure is None:
                self.failure = error
                if self._title is not None and (self._tell_closed or error.errno != errno.EPIPE):
                    print(f"{self._title}: {error.strerror}; the program goes on without it", file=sys.stderr)
        return len(view)
