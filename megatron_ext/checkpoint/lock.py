"""One writer per folder of checkpoints: who it is, and whether it is still there.

DIR/.lock exists while a run writes into DIR. It names the run, and the run holds a POSIX record lock on it, which the
kernel lets go when the process ends, however it ends, and which file systems shared between nodes pass on (NFS; Lustre
and others if mounted so). Where they do not, a holder on another node is known to live by the file's time, which it
renews; one that has stopped doing so is dead, and one that was taken for dead notices before it saves.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError

LOCK = ".lock"
RENEWED_EVERY = 10.0  # seconds
DEAD_AFTER = 45.0  # seconds without renewal
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)  # what file systems without locks answer
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class FolderLock:
    """The right to write checkpoints into `root`, from construction to `release`.

    Attributes:
        remark: what is to be said of a dead run that held it before, if one did.

    Raises:
        RequestError: another run has it; nothing was written.
    """

    def __init__(self, root: str | Path, flag: str = "--save"):
        self.root, self.remark = Path(root), ""
        self._path, self._flag = self.root / LOCK, flag
        self._made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self._descriptor, self._myself = -1, _myself()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
        except OSError as error:
            raise RequestError(f"{flag} {root}: cannot be locked ({error.strerror})") from error
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="checkpoint lock", daemon=True)
        self._thread.start()

    def _try(self) -> bool:
        """Take the lock; False if the file went or changed meanwhile. Raises RequestError where it is another's."""
        try:
            descriptor, is_new = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), True
        except FileExistsError:
            try:
                descriptor, is_new = os.open(self._path, os.O_RDWR | os.O_CLOEXEC), False
            except FileNotFoundError:
                return False
        try:
            has_locks = _lock(descriptor)
            if has_locks is None or not is_new:
                holder = _read(descriptor)
                if has_locks is None or (not _is_dead(holder, has_locks) and self._renews(descriptor)):
                    raise RequestError(f"{self._flag} {self.root}: {_living(holder)}")
                self.remark = f"{self._flag} {self.root}: {_dead(holder)}"
            if not _same(descriptor, self._path):
                return False
            _write(descriptor, self._myself)
            self._descriptor, descriptor = descriptor, -1
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _renews(self, descriptor: int) -> bool:
        """Whether somebody renews the file, by the clock of its file system; waits for that as long as it may take."""
        with tempfile.TemporaryFile(dir=self.root) as now:
            age = os.fstat(now.fileno()).st_mtime - os.fstat(descriptor).st_mtime
        first, until = os.fstat(descriptor).st_mtime_ns, time.monotonic() + DEAD_AFTER - max(0.0, age)
        while time.monotonic() < until:
            time.sleep(min(1.0, DEAD_AFTER / 10))
            with contextlib.suppress(OSError):
                if os.stat(self._path).st_mtime_ns != first:
                    return True
        return False

    def _renew(self) -> None:
        while not self._stop.wait(RENEWED_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def check(self) -> None:
        """Raise RequestError if another run has taken the folder, believing this one dead."""
        if not _same(self._descriptor, self._path) or _read(self._descriptor) != self._myself:
            raise RequestError(f"{self._flag} {self.root}: another run has taken the folder over from this one")

    def release(self) -> None:
        """Let others write. Removes the folder again if this made it and nothing has come into it."""
        if self._descriptor < 0:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError, RequestError):
            self.check()
            self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1
        with contextlib.suppress(OSError):
            for path in self._made:
                path.rmdir()


def _lock(descriptor: int) -> bool | None:
    """Whether the kernel gave the lock: None if it is another's, False if there are none on this file system.

    Of the process, not of the descriptor: a forked child (a data worker that outlives its parent) does not hold it.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        if error.errno in _NO_LOCKS:
            return False
        raise


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    """What a holder wrote of itself; nothing where it was killed before it had."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(descriptor: int, holder: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    os.fsync(descriptor)


def _myself() -> dict[str, Any]:
    job = next((os.environ[name] for name in _JOBS if os.environ.get(name)), None)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "since": now, "job": job}


def _boot() -> str:
    """Names this start of this machine's kernel, in containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _is_dead(holder: dict[str, Any], has_locks: bool) -> bool:
    """Whether a holder is certainly gone: its kernel would have kept the lock, or is another one by now."""
    same_kernel = bool(holder.get("boot")) and holder["boot"] == _boot()
    if same_kernel:
        return has_locks
    return holder.get("host") == socket.gethostname() and bool(holder.get("boot"))


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that left no name"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')}{job})"


def _living(holder: dict[str, Any]) -> str:
    return f"another run is writing there, {_who(holder)}: wait for it or end it, or choose another folder"


def _dead(holder: dict[str, Any]) -> str:
    return f"{_who(holder)} held its lock and is gone; taken over"
