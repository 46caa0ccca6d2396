"""Running a function on several ranks from a test, without paying for imports each time.

A fork server imports torch and the engine once; every call forks fresh ranks from it, so that no state of one
test (process groups, caches of DTensor, random numbers) reaches the next.
"""

import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.fake_world import destroy_fake_world, init_fake_world
from tests.megatron_ext.fake_device import prepare_steps

MAX_RANKS = 8
_GRACE_SECONDS = 3.0  # for ranks to say where a collective waited in vain, and what they know when one has failed


class RankError(AssertionError):
    """A rank raised, died or hung. The message holds the rank and its traceback."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """Runs functions on ranks that talk over gloo. Get it from the session fixture `pool`.

        def total(x: float) -> float:                  # top level of a module: ranks import it
            t = torch.tensor(x + dist.get_rank())
            dist.all_reduce(t)
            return t.item()

        def test_total(pool):
            assert pool.run(total, 2, 1.0) == [3.0, 3.0]      # one result per rank

    Every call gets new processes and a new default process group, and ends both. RANK, WORLD_SIZE, LOCAL_RANK and
    LOCAL_WORLD_SIZE are set as torchrun sets them. Arguments and results travel pickled (keyword arguments: with
    functools.partial). If a rank raises or dies, or any is not done within the timeout, all are killed and RankError
    tells which one and why.
    """

    store: dist.TCPStore
    context: Any
    timeout: float = 180.0

    @classmethod
    def start(cls) -> "Pool":
        context = multiprocessing.get_context("forkserver")
        # whatever ranks import, once; an import that fails is passed over: DeepSpeed may not be there
        context.set_forkserver_preload(
            [
                *("pretrain.train", "pretrain.data.gpt_source", "tests.distributed"),
                *("deepspeed", "torch._inductor.compile_fx"),  # which DeepSpeed imports when it makes an engine
                *("pytest", "hypothesis", "sentencepiece", "tools.convert_checkpoint"),
                *("transformers", "tests.megatron_ext.hugging_face", "tests.families", "tests.pretrain.support"),
            ]
        )
        return cls(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), context)

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float | None = None) -> list[Any]:
        """fn(*args) on ranks 0 .. world_size - 1; their results in that order. `timeout` in seconds."""
        assert 1 <= world_size <= MAX_RANKS
        timeout = timeout or self.timeout
        job = f"job{self.store.add('jobs', 1)}"
        task = pickle.dumps((fn, args))
        ranks = []
        pipes: dict[Connection, int] = {}
        for rank in range(world_size):
            ours, theirs = self.context.Pipe(duplex=False)
            process = self.context.Process(
                target=_rank_main, args=(theirs, self.store.port, job, rank, world_size, timeout, task), daemon=True
            )
            process.start()
            theirs.close()
            pipes[ours] = rank
            ranks.append(process)
        try:
            return self._collect(pipes, ranks, time.monotonic() + timeout + _GRACE_SECONDS)
        finally:
            for process in ranks:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()

    def run_fake(self, fn: Callable[..., Any], world_size: int, *args: Any, ranks: Sequence[int] | None = None) -> Any:
        """Run fn(*args) as ranks of a fake world (megatron_ext/fake_world.py), all in one process, and give their
        results. Of messages there is all but what is in them. ranks: by default the first and the last."""
        return self.run(_as_ranks, 1, fn, world_size, args, ranks or sorted({0, world_size - 1}))[0]

    def _collect(self, pipes: dict[Connection, int], ranks: list[Any], deadline: float) -> list[Any]:
        waiting = dict(pipes)
        results: dict[int, Any] = {}
        failures: list[str] = []
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                failures += [f"rank {rank} of {len(ranks)}: did not finish in time" for rank in waiting.values()]
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ranks[rank].join(_GRACE_SECONDS)
                    ok, value = False, f"died with exit code {ranks[rank].exitcode}"
                if ok:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {len(ranks)}: {value}")
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if failures:
            raise RankError("\n".join(failures))
        return [results[rank] for rank in range(len(ranks))]


def _as_ranks(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], ranks: Sequence[int]) -> list[Any]:
    dist.destroy_process_group()
    results = []
    for rank in ranks:
        init_fake_world(rank, world_size)
        try:
            with prepare_steps(world_size):
                results.append(fn(*args))
        finally:
            destroy_fake_world()
        gc.collect()
    return results


def _rank_main(pipe: Connection, port: int, job: str, rank: int, world: int, timeout: float, task: bytes) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the fork server has imported: a collection need not look at it
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
    }
    try:
        store = dist.PrefixStore(job, dist.TCPStore("127.0.0.1", port, is_master=False))
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        fn, args = pickle.loads(task)
        answer = pickle.dumps((True, fn(*args)))
        if dist.is_initialized():  # one that stepped into a fake world has left this one
            dist.barrier()  # nobody leaves while another still talks to it
            dist.destroy_process_group()
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)
    pipe.close()
