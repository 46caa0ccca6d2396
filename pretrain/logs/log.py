"""What a place for figures is, and how its failures stay its own."""

import contextlib
import sys
import time
from collections import deque
from typing import Any, Protocol

Record = dict[str, Any]
_MOST_WAITING = 10_000  # records; some 10 MB


class Log(Protocol):
    """A place for figures. Both may raise anything; a record that `write` raised on is given again."""

    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


class Guarded:
    """A log that cannot end the run.

    When it fails that is said once, on standard error. Its records wait, and are tried again with later ones, so that
    nothing is missing once there is room again; the tries take at most a tenth of the time. title: of it, in messages.
    """

    def __init__(self, title: str, log: Log):
        self._title, self._log = title, log
        self._waiting: deque[Record] = deque()
        self._lost = 0
        self._failed = False
        self._retry_at = 0.0

    def write(self, record: Record) -> None:
        if len(self._waiting) == _MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(record)
        if time.monotonic() >= self._retry_at:
            self._write_waiting()

    def _write_waiting(self) -> None:
        start = time.monotonic()
        try:
            while self._waiting:
                self._log.write(self._waiting[0])
                self._waiting.popleft()
        except Exception as error:  # whatever a library raises: the run is worth more than its figures
            end = time.monotonic()
            self._retry_at = end + 10 * (end - start)
            if not self._failed:
                said = error.strerror if isinstance(error, OSError) else str(error)
                reason = " ".join((said or "").split()) or type(error).__name__
                self._say(f"{reason}; the run goes on, and what is missing is written when it can be")
            self._failed = True
            return
        if self._failed:
            self._say("written again" + (f", without {self._lost} records" if self._lost else ", nothing is missing"))
        self._failed, self._lost = False, 0

    def close(self) -> None:
        self._write_waiting()
        if missing := len(self._waiting) + self._lost:
            self._say(f"{missing} records were not written")
        with contextlib.suppress(Exception):
            self._log.close()

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception):
            print(f"{self._title}: {text}", file=sys.stderr, flush=True)
