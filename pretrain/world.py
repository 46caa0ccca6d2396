"""The world that a run joins; and how it leaves: all ranks together at the end, or all within seconds of a failure.

What a rank that fails leaves behind is not the same everywhere. On gloo its closed connections raise in the ranks that
wait for it; on NCCL those wait on, until --distributed-timeout-minutes have passed or torchrun ends them. So the first
rank that fails says so in the store at which the world met, and a thread of every rank looks there.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_ext.errors import RequestError
from megatron_ext.mesh import init_distributed
from megatron_ext.torch_private import default_store
from tokenizer.errors import TokenizerError

_CLAIM, _REPORT = "failure/claim", "failure/report"  # keys: the rank that failed first; what it reports, once it has
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 10.0


@contextlib.contextmanager
def joined_world(timeout_minutes: int) -> Iterator[torch.device]:
    """Be in the world that torchrun started, or alone; gives this rank's device.

    If the body raises on one of several ranks, none returns from here: that rank prints why (the traceback; of a
    refusal its one line) and its process ends, with exit code 1 (or 2), and so do the others, in a line each.
    """
    device = init_distributed(timeout_minutes)
    lookout = None if dist.get_world_size() == 1 else _Lookout()
    try:
        yield device
    except BaseException as error:
        if lookout is not None:
            lookout.fail(error)
        dist.destroy_process_group()
        raise
    if lookout is not None:
        lookout.close()
    dist.destroy_process_group()  # after a failure it would wait for messages that never come


class _Lookout:
    """One rank's eye on the store, and its way out."""

    def __init__(self) -> None:
        self._rank = str(dist.get_rank())
        # over a connection of its own: one that waits for a key serves nobody else
        self._store: dist.Store = default_store().clone()
        self._store.set_timeout(timedelta(seconds=_GRACE_SECONDS))
        # without torchrun the first rank's process keeps the store
        self._keeps_store = self._rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._over = threading.Event()
        self._ending = threading.Lock()  # taken by the one thread that has the last word
        self._thread = threading.Thread(target=self._watch, name="lookout", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The run has succeeded, and what becomes of the other ranks is their own affair."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        """End this rank when another one has failed."""
        try:
            while not self._over.wait(_LOOK_SECONDS):
                if self._store.check([_REPORT]):
                    with self._ending:  # let go of if the store goes meanwhile
                        self._follow()
        except RuntimeError:
            # who kept the store has ended: before us, for all is done, or without a word
            if not self._over.wait(_GRACE_SECONDS):
                _say(f"rank {self._rank}: ends, because the process that kept the store of the run is gone\n")
                self._end(1)

    def fail(self, error: BaseException) -> NoReturn:
        """End this rank for an error of its own, which is the run's unless another rank was first."""
        self._over.set()
        self._ending.acquire()
        code, brief = (2, str(error)) if isinstance(error, (RequestError, TokenizerError)) else (1, _root(error))
        brief = " ".join(brief.split())
        text = f"error: {brief}\n" if code == 2 else "".join(traceback.format_exception(error))
        with contextlib.suppress(RuntimeError):  # the store is gone, or the first has died before it could report
            first = self._store.compare_set(_CLAIM, "", self._rank).decode()
            if first != self._rank:
                self._store.wait([_REPORT])
                self._follow(brief)
        _say(text)
        with contextlib.suppress(RuntimeError):
            self._store.set(_REPORT, f"{code}\n{self._rank}\n{brief[:400]}")
        self._end(code)

    def _follow(self, mine: str = "") -> NoReturn:
        """End as the first one that failed did, with a line that points to it; silently if both refused the same.

        mine: what this rank met with, likely for the lack of the other.
        """
        code, rank, reason = self._store.get(_REPORT).decode().split("\n")
        if code != "2" or mine[:400] != reason:
            here = f"; here: {mine[:200]}" if mine[:200] != reason[:200] and mine else ""
            _say(f"rank {self._rank}: ends, because rank {rank} has failed ({reason}){here}\n")
        self._end(int(code))

    def _end(self, code: int) -> NoReturn:
        """End the process here and now: at the interpreter's end, threads and process groups would be waited for."""
        _say("")  # what was printed
        if self._keeps_store:
            time.sleep(3 * _LOOK_SECONDS)  # the others are still to read it
        os._exit(code)


def _root(error: BaseException) -> str:
    """The error in a line: the innermost of those it was raised from that has only one, for torch wraps what stages
    raise in a page."""
    root, cause = error, error.__cause__
    while cause is not None:
        root, cause = cause if "\n" not in str(cause).strip() else root, cause.__cause__
    return f"{type(root).__name__}: {root}"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()
