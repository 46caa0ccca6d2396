"""What programs put out: streams that never end a program, tables, and files that are complete or absent.

Used at the start of programs, in their own process; also by those of the other rooms.
"""

import errno
import io
import locale
import os
import select
import sys
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizer.errors import TokenizerError


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
    """Tell whether something printed got lost though somebody may wait for it: not where the reader has seen enough."""
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


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns, as wide as their cells; what looks like a number is on the right."""
    lines = [head, *rows]
    widths = [max(_width(line[column]) for line in lines) for column in range(len(head))]
    right = [all(_is_number(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(_pad(cell, width, to) for cell, width, to in zip(line, widths, right, strict=True)).rstrip()
        for line in lines
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table of GitHub's Markdown."""
    right = [all(_is_number(row[column]) for row in rows) for column in range(len(head))]
    rule = ["---:" if to else "---" for to in right]
    lines = [head, rule, *([markdown_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """Escape text that Markdown is to show as it is."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|~" else letter for letter in text)


def _is_number(cell: str) -> bool:
    return cell.strip("0123456789.,%-+ ") == ""


def _pad(cell: str, width: int, right: bool) -> str:
    space = " " * (width - _width(cell))
    return space + cell if right else cell + space


def _width(text: str) -> int:
    """Columns in a terminal, where Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def refuse_existing(flag: str, paths: Sequence[Path], overwrite: bool) -> None:
    """Raise TokenizerError when one of `paths` exists and may not be replaced, or has no directory to go to."""
    for path in paths:
        if path.exists() and not overwrite:
            raise TokenizerError(f"{flag}: {path} exists; choose another place, or add --overwrite")
        if path.is_dir():
            raise TokenizerError(f"{flag}: {path} is a directory")


def check_outputs(outputs: Mapping[str, Path], overwrite: bool) -> None:
    """Refuse files that cannot be written, by the flags that name them.

    Raises:
        TokenizerError: a directory is missing, two flags name one file, or one exists and may not be replaced.
    """
    flags: dict[Path, str] = {}
    for flag, path in outputs.items():
        if not path.parent.is_dir():
            raise TokenizerError(f"{flag} {path}: the directory {path.parent} does not exist")
        if (other := flags.setdefault(path.resolve(), flag)) != flag:
            raise TokenizerError(f"{flag} {path} is the file of {other} too; give it another name")
        refuse_existing(flag, [path], overwrite)


def write_files(flag: str, contents: Mapping[Path, bytes]) -> None:
    """Write files by renaming finished ones into place, in the order given.

    Raises:
        TokenizerError: the directory is missing or cannot be written; nothing of this call remains.
    """
    finished: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            finished.append((Path(name), path))
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.chmod(name, 0o644)  # mkstemp's 0600 is for secrets
        for temporary, path in finished:
            temporary.replace(path)
    except OSError as error:
        raise TokenizerError(f"{flag}: cannot write to {path.parent}: {error.strerror}") from None
    finally:
        for temporary, _ in finished:
            temporary.unlink(missing_ok=True)
