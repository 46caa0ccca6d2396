"""Writing checkpoints: sharded, atomic, and in the background on request."""

import dataclasses
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpoint.digest import HashingWriter
from megatron_ext.checkpoint.directory import Manifest, partial_path, publish, remove_partials, write_text
from megatron_ext.checkpoint.lock import FolderLock
from megatron_ext.checkpoint.state import model_state, optimizer_state, random_key, random_state
from megatron_ext.engine import Engine
from megatron_ext.errors import RequestError


class CheckpointWriter:
    """Writes an engine's checkpoints into one folder. All ranks construct and call it together.

    A checkpoint is either complete and named by `latest`, or does not exist. With `background` the state is copied
    and written by a thread while training goes on; `poll` publishes it when every rank has finished.

    lock: on the first rank, that of the folder; it is looked at before anything is written or published.
    """

    def __init__(self, root: str | Path, engine: Engine, background: bool = False, lock: FolderLock | None = None):
        self.root, self.engine, self.background, self._lock = Path(root), engine, background, lock
        self._is_first = dist.get_rank() == 0
        # its own gloo group: planning talks between hosts, and must not mix with a training step's collectives
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[Any, HashingWriter, Manifest] | None = None
        if self._is_first:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_partials(self.root)
        dist.barrier(group=self._group)

    def save(self, manifest: Manifest, texts: dict[str, str]) -> None:
        """Write one checkpoint. texts: further small files by name, such as run.yaml.

        Raises RequestError on every rank if any rank could not write; nothing then remains.
        """
        self.wait()
        partial = partial_path(self.root, manifest.iteration)
        self._agree(self._prepare(partial, texts) if self._is_first else "")
        states = self.engine.state_dict()
        state = model_state(self.engine, states, for_saving=True)
        state |= optimizer_state(self.engine, states, for_saving=True)
        state[random_key()] = random_state(self.engine)
        writer = HashingWriter(partial)
        if self.background:
            future = dcp.async_save(state, storage_writer=writer, process_group=self._group)
            self._pending = (future, writer, manifest)
            return
        future = Future()
        try:
            future.set_result(dcp.save(state, storage_writer=writer, process_group=self._group))
        except (Exception, CheckpointException) as error:
            future.set_exception(error)
        self._pending = (future, writer, manifest)
        self.wait()

    def _prepare(self, partial: Path, texts: dict[str, str]) -> str:
        """Make the partial directory. Returns what went wrong, or nothing."""
        try:
            self._check_lock()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, text in texts.items():
                write_text(partial / name, text)
        except RequestError as error:
            return str(error)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return str(error)
        return ""

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def poll(self) -> None:
        """Publish a background checkpoint that has been written. Cheap: call it at every step, on every rank.

        Only the first rank needs to: it coordinates, so its part ends after everyone's.
        """
        if self._is_first and self._pending is not None and self._pending[0].done():
            self._raise(self._finish())

    def wait(self) -> None:
        """Return when no checkpoint is being written any more."""
        self._agree(self._finish() if self._pending is not None else "")

    def _finish(self) -> str:
        """Publish what has been written, or clear it away. Returns what went wrong, or nothing."""
        assert self._pending is not None
        future, writer, manifest = self._pending
        self._pending = None
        try:
            future.result()
            if self._is_first:
                self._check_lock()
                publish(self.root, dataclasses.replace(manifest, sha256=writer.sha256))
        except RequestError as error:  # the folder is another run's by now, and what lies in it
            return str(error)
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            if self._is_first:
                shutil.rmtree(partial_path(self.root, manifest.iteration), ignore_errors=True)
            problem = str(error).strip().splitlines()[-1]
            if not _is_of_files(error):
                raise RuntimeError(f"the checkpoint could not be written ({problem})") from error
            return problem
        return ""

    def _agree(self, problem: str) -> None:
        """Wait for all ranks; raise on every one if any has a problem."""
        problems = [""] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        self._raise(next(filter(None, problems), ""))

    def _raise(self, problem: str) -> None:
        if problem:
            raise RequestError(f"--save {self.root}: the checkpoint could not be written ({problem})")


def _is_of_files(error: BaseException) -> bool:
    """Whether a save failed at the files, not by a fault of the program, of which the traceback is wanted."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    # torch.save's own writer has no class of its own for what a disk refuses
    return all(isinstance(cause, OSError) or "inline_container" in str(cause) for cause in causes)


def check_writable(root: str | Path, flag: str = "--save") -> None:
    """Raise RequestError where a folder could not be made or written; leaves nothing behind."""
    path = Path(root)
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise RequestError(f"{flag} {root}: {path} is not a writable directory")
