"""A rank that fails ends the whole run, with its traceback and no other, whatever the others wait for."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import world
from tests.distributed import Pool
from tests.pretrain.failing_rank import fail_in
from tests.pretrain.support import ROOT, command, rank_main
from tests.pretrain.test_data import write_corpus

LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "zero_stage": 2,
    "train_iters": 3,
    "lr_warmup_iters": 0,
}


def arguments(folder: Path, place: str) -> list[str]:
    write_corpus(folder / "c")
    saving = {"save": folder / "saved", "save_interval": 1, "async_save": place == "async save"}
    return command(data_path=folder / "c", **LAYOUT, **(saving if "save" in place else {}))


def failing_main(rank: int, ranks: int, failing: int, place: str, words: list[str], port: int, folder: Path) -> None:
    if rank == failing:
        fail_in(place)
    rank_main(rank, ranks, port, words, folder)


@pytest.mark.parametrize(
    "place, failing, ranks",
    [
        ("forward", 5, 8),
        pytest.param("async save", 0, 4, marks=pytest.mark.slow),
        ("late refusal", 0, 4),
        *[pytest.param(place, 5, 8, marks=pytest.mark.slow) for place in ("backward", "data", "save", "async save")],
    ],
)
def test_the_others_end_too(pool: Pool, tmp_path: Path, place: str, failing: int, ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = arguments(tmp_path, place)
    said = [tmp_path / f"stderr{rank}" for rank in range(ranks)]
    processes = [
        pool.context.Process(
            target=failing_main, args=(rank, ranks, failing, place, words, port, tmp_path), daemon=True
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [2 if place == "late refusal" else 1] * ranks
    texts = [path.read_text() for path in said]
    # what fails in a save is told to all ranks, and any may be the first to say it
    teller = (
        next(rank for rank, text in enumerate(texts) if "ends, because" not in text) if "save" in place else failing
    )
    ending = "error: no bread\n" if place == "late refusal" else "Traceback (?s:.*)ValueError: no bread(?s:.*)"
    assert re.fullmatch(ending, texts.pop(teller))
    for text in texts:
        assert re.fullmatch(rf"rank \d: ends, because rank {teller} has failed \(.*no bread.*\).*\n", text)


class StoreThatGoes:
    """Of a first rank that ended as soon as it had been seen to fail."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def clone(self) -> "StoreThatGoes":
        return self

    def set_timeout(self, _: Any) -> None:
        pass

    def check(self, _: list[str]) -> bool:
        return True

    def get(self, *_: Any) -> bytes:
        self.asked.set()
        raise RuntimeError("Connection reset by peer")

    compare_set = wait = set = get


def test_the_store_may_go_while_it_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store, codes = StoreThatGoes(), list[int]()
    monkeypatch.setattr(world, "default_store", lambda: store)
    monkeypatch.setattr(world.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(world, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(world.os, "_exit", codes.append)
    lookout = world._Lookout()
    assert store.asked.wait(10)
    main = threading.Thread(target=lookout.fail, args=(ValueError("no bread"),), daemon=True)
    main.start()
    main.join(10)
    assert codes == [1]
    assert "ValueError: no bread" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("place", ["forward", "backward", "data", "save", "async save"])
def test_under_torchrun_too(tmp_path: Path, place: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "8"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.pretrain.failing_rank", "5", place, *arguments(tmp_path, place)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "ValueError: no bread" in done.stderr
    lines = done.stderr.splitlines()
    assert not [line for line in lines if "Connection closed" in line and not line.startswith("rank ")]
    assert len(set(re.findall(r"^rank \d: ends, because rank (\d) has failed", done.stderr, re.MULTILINE))) <= 1
