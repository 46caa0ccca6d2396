"""One writer per folder, whether the other lives, was killed, or is on another node."""

import json
import multiprocessing
import os
import signal
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import megatron_ext.checkpoint.lock
from megatron_ext.checkpoint import CheckpointWriter
from megatron_ext.checkpoint.lock import LOCK, FolderLock
from megatron_ext.errors import RequestError
from tests.distributed import Pool
from tests.megatron_ext.test_checkpoint import build, manifest_of


def hold(root: Path, pipe: Connection) -> None:
    lock = FolderLock(root)
    pipe.send(os.getpid())
    pipe.recv()
    lock.release()
    pipe.send("released")


def test_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8899")
    root = tmp_path / "new" / "run"
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(root, theirs))
    holder.start()
    pid = ours.recv()
    for _ in range(2):
        with pytest.raises(RequestError) as error:
            FolderLock(root)
        assert str(error.value).startswith(
            f"--save {root}: another run is writing there, process {pid} on {socket.gethostname()} (since 20"
        )
        assert str(error.value).endswith(", job 8899): wait for it or end it, or choose another folder")
    ours.send("release")
    assert ours.recv() == "released"
    holder.join()
    assert not (tmp_path / "new").exists()  # nothing was written into it

    holder = multiprocessing.get_context("fork").Process(target=hold, args=(root, theirs))
    holder.start()
    pid = ours.recv()
    os.kill(pid, signal.SIGKILL)
    holder.join()
    lock = FolderLock(root)
    assert lock.remark.startswith(f"--save {root}: process {pid} on ")
    assert lock.remark.endswith(" held its lock and is gone; taken over")
    lock.check()
    lock.release()
    assert os.listdir(root) == []


ELSEWHERE = {"host": "node17", "pid": 4711, "boot": "another", "since": "yesterday", "job": None}


def test_another_node_where_locks_do_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_ext.checkpoint.lock, "DEAD_AFTER", 1.0)
    file = tmp_path / LOCK
    file.write_text(json.dumps(ELSEWHERE))
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.05):
            os.utime(file)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(RequestError, match="another run is writing there, process 4711 on node17 "):
            FolderLock(tmp_path)
        assert json.loads(file.read_text()) == ELSEWHERE
    finally:
        stop.set()
        renewing.join()
    lock = FolderLock(tmp_path)
    assert "process 4711 on node17 (since yesterday) held its lock and is gone" in lock.remark
    lock.release()


@pytest.mark.parametrize("record", [ELSEWHERE | {"host": socket.gethostname()}, None])
def test_a_restarted_machine_and_a_torn_record(tmp_path: Path, record: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_ext.checkpoint.lock, "DEAD_AFTER", 1.0 if record is None else 1e9)
    (tmp_path / LOCK).write_text("" if record is None else json.dumps(record))
    lock = FolderLock(tmp_path)
    assert "is gone; taken over" in lock.remark
    lock.release()


def take_over(root: Path) -> None:
    """As a run on another node would that believes the holder dead."""
    (root / "other").write_text(json.dumps(ELSEWHERE))
    os.replace(root / "other", root / LOCK)


def save_while_another_takes_over(root: Path) -> str:
    """Save in the background, and lose the folder to a run that writes the same iteration. What is refused."""
    engine, lock = build(), FolderLock(root)
    writer = CheckpointWriter(root, engine, background=True, lock=lock)
    writer.save(manifest_of(engine, 3), {})
    take_over(root)
    try:
        writer.wait()
    except RequestError as error:
        return str(error)
    finally:
        lock.release()
    return ""


def test_what_another_run_writes_is_not_cleared_away(pool: Pool, tmp_path: Path) -> None:
    (said,) = pool.run(save_while_another_takes_over, 1, tmp_path)
    assert "could not be written" in said
    assert "another run has taken the folder over from this one" in said
    assert sorted(os.listdir(tmp_path)) == [".iter_0000003.tmp", LOCK]


def test_who_was_taken_for_dead_notices(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    take_over(tmp_path)
    with pytest.raises(RequestError, match="another run has taken the folder over from this one"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text()) == ELSEWHERE  # the other's
