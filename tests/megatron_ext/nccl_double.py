"""NCCL's rules for point-to-point messages, kept by ranks that talk over gloo.

A send is complete when its receive has begun, not when its bytes are on their way. A communicator has one stream on
every rank, on which operations run in the order in which they were issued; those of one `batch_isend_irecv` run
together. Which communicator: a batch has its group's, and so has everything where a device is bound to the world
(`eager`); else an operation issued alone has that of the two ranks. A communicator is made at its first use, for which
its ranks wait, and a group's first use may not be a batch, which need not concern all of its ranks.

`Work.wait` holds up the host here and the device's stream there. For the order of messages that is the same: whatever
is issued later waits on the device for what was waited for. Only the host's own business could still go on there, so
that nothing passes here that would stand still there.

No message is really on its way. Every rank notes in a store what it issues and what it waits for, and works out from
everybody's notes which operations have met. So it also sees when ranks wait for each other in vain.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_OPPOSITE = {"send": "recv", "recv": "send", "connect": "connect"}
_LEFT = "left"
_PATIENCE_SECONDS = 100.0  # for ranks that are held up by something else than messages


class Deadlock(RuntimeError):
    """Ranks wait for each other; the message says for what."""


@contextlib.contextmanager
def nccl_rules(eager: bool = False) -> Iterator[None]:
    """Every rank of the world enters together; within, point-to-point messages of all groups follow the rules."""
    rank = _Rank(eager)
    ours = {
        "isend": rank.isend,
        "irecv": rank.irecv,
        "batch_isend_irecv": rank.batch_isend_irecv,
        **{name: rank.collective(getattr(dist, name)) for name in ("all_reduce", "broadcast", "barrier")},
    }
    with mock.patch.multiple(dist, **ours), mock.patch.multiple(distributed_c10d, **ours):
        yield
        rank.leave()


@dataclasses.dataclass
class _Op:
    """kind: "send", "recv", "connect". met: the rank, batch and place of the operation that it ran with."""

    kind: str
    peer: int
    size: str
    met: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        way = "to" if self.kind == "send" else "from" if self.kind == "recv" else "with"
        return f"{self.kind} {way} rank {self.peer}" + (f" of {self.size}" if self.size else "")


@dataclasses.dataclass
class _Stream:
    """What one rank has issued on one communicator: batches, of which all before `head` have run."""

    batches: list[list[_Op]] = dataclasses.field(default_factory=list)
    head: int = 0

    @property
    def running(self) -> list[_Op]:
        return [op for op in self.batches[self.head] if op.met is None] if self.head < len(self.batches) else []


class _Notes:
    """All that the ranks have issued, and what of it has met; the same on every rank that has read the same."""

    def __init__(self, world_size: int):
        self.count = [0] * world_size
        self.streams: dict[tuple[str, int], _Stream] = {}

    def add(self, rank: int, communicator: str, ops: list[list[Any]]) -> None:
        self.count[rank] += 1
        self.streams.setdefault((communicator, rank), _Stream()).batches.append([_Op(*op) for op in ops])

    def run(self) -> None:
        """Let meet what can."""
        moved = True
        while moved:
            moved = False
            for (communicator, rank), stream in self.streams.items():
                for op in stream.running:
                    moved |= self._meet(communicator, rank, stream, op)
                if stream.head < len(stream.batches) and not stream.running:
                    stream.head += 1
                    moved = True

    def _meet(self, communicator: str, rank: int, stream: _Stream, op: _Op) -> bool:
        theirs = self.streams.get((communicator, op.peer))
        fitting = (o for o in theirs.running if (o.kind, o.peer) == (_OPPOSITE[op.kind], rank)) if theirs else ()
        other = next(iter(fitting), None)
        if theirs is None or other is None:
            return False
        if other.size != op.size:
            raise RuntimeError(f"{communicator}: rank {rank}: {op} meets rank {op.peer}: {other}")
        op.met = op.peer, theirs.head, _place(theirs, other)
        other.met = rank, stream.head, _place(stream, op)
        return True


def _place(stream: _Stream, op: _Op) -> int:
    return next(i for i, other in enumerate(stream.batches[stream.head]) if other is op)


@dataclasses.dataclass
class _Work:
    """Of one batch, the `index`-th that this rank has issued on a communicator."""

    rank: "_Rank"
    communicator: str
    index: int
    tensors: list[torch.Tensor | None]

    def wait(self, timeout: Any = None) -> bool:
        self.rank.finish(self)
        return True


class _Rank:
    def __init__(self, eager: bool):
        self._eager, self._me, self._world = eager, dist.get_rank(), dist.get_world_size()
        self._notes = _Notes(self._world)
        self._met: set[str] = set()  # communicators that are there
        self._unfinished: list[_Work] = []
        self._issued = 0
        store = distributed_c10d._get_default_store().clone()
        entries = int(store.add(f"nccl/entries{self._me}", 1))
        self._store = dist.PrefixStore(f"nccl{entries}", store)
        self._store.set(f"count{self._me}", "0")
        self._store.set(f"waits{self._me}", "")
        dist.barrier()

    def isend(
        self,
        tensor: torch.Tensor,
        dst: int | None = None,
        group: Any = None,
        tag: int = 0,
        group_dst: int | None = None,
    ) -> _Work:
        return self._alone("send", tensor, dst, group, group_dst)

    def irecv(
        self,
        tensor: torch.Tensor,
        src: int | None = None,
        group: Any = None,
        tag: int = 0,
        group_src: int | None = None,
    ) -> _Work:
        return self._alone("recv", tensor, src, group, group_src)

    def _alone(self, kind: str, tensor: torch.Tensor, peer: int | None, group: Any, group_peer: int | None) -> _Work:
        group = group or distributed_c10d._get_default_group()
        peer = dist.get_global_rank(group, group_peer) if peer is None else peer
        assert peer is not None
        assert peer != self._me, "NCCL sends to itself in batches only"
        communicator = _name(group)
        if not self._eager:
            low, high = sorted((peer, self._me))
            communicator += f", ranks {low} and {high}"
            if communicator not in self._met:
                self._issue(communicator, [_Op("connect", peer, "")], [None]).wait()
                self._met.add(communicator)
        return self._issue(communicator, [_Op(kind, peer, _size(tensor))], [tensor])

    def batch_isend_irecv(self, p2p_op_list: list[dist.P2POp]) -> list[_Work]:
        group = p2p_op_list[0].group
        if not self._eager and _name(group) not in self._met:
            raise RuntimeError(
                f"{_name(group)}: its first use is a batch, which not all of its ranks need take part in"
            )
        ops = [
            _Op("send" if op.op == self.isend else "recv", dist.get_global_rank(group, op.group_peer), _size(op.tensor))
            for op in p2p_op_list
        ]
        return [self._issue(_name(group), ops, [op.tensor for op in p2p_op_list])]

    def collective(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """As gloo does it, but after what was issued on the group's communicator before."""

        def in_order(*args: Any, **kwargs: Any) -> Any:
            group = next((a for a in (*args, *kwargs.values()) if isinstance(a, dist.ProcessGroup)), None)
            communicator = _name(group or distributed_c10d._get_default_group())
            for work in [work for work in self._unfinished if work.communicator == communicator]:
                work.wait()
            self._met.add(communicator)
            return run(*args, **kwargs)

        return in_order

    def _issue(self, communicator: str, ops: list[_Op], tensors: list[torch.Tensor | None]) -> _Work:
        index = len(self._notes.streams.get((communicator, self._me), _Stream()).batches)
        for place, (op, tensor) in enumerate(zip(ops, tensors, strict=True)):
            if op.kind == "send":
                assert tensor is not None
                flat = tensor.detach().reshape(-1).view(torch.uint8)
                self._store.set(_letter(communicator, self._me, index, place), flat.numpy().tobytes())
        noted = communicator, [[op.kind, op.peer, op.size] for op in ops]
        self._notes.add(self._me, *noted)
        self._store.set(f"note{self._me}-{self._issued}", json.dumps(noted))
        self._issued += 1
        self._store.set(f"count{self._me}", str(self._issued))
        work = _Work(self, communicator, index, tensors)
        self._unfinished.append(work)
        return work

    def finish(self, work: _Work) -> None:
        """Hold this rank up until the batch has run, and deliver what it receives."""
        if work not in self._unfinished:
            return
        stream = self._notes.streams[work.communicator, self._me]
        deadline = time.monotonic() + _PATIENCE_SECONDS
        pause = 0.0
        while stream.head <= work.index:
            waits = self._read()
            if stream.head <= work.index:
                mine = json.dumps([self._issued, work.communicator, work.index])
                if pause == 0.0:
                    self._store.set(f"waits{self._me}", mine)
                waits[self._me] = mine
                self._look_for_deadlock(waits, late=time.monotonic() > deadline)
                pause = min(0.005, pause + 0.0005)
                time.sleep(pause)
        if pause:
            self._store.set(f"waits{self._me}", "")
        self._unfinished.remove(work)
        for op, tensor in zip(stream.batches[work.index], work.tensors, strict=True):
            if op.kind == "recv":
                assert op.met is not None
                assert tensor is not None
                assert tensor.is_contiguous()
                letter = _letter(work.communicator, *op.met)
                flat = torch.frombuffer(bytearray(self._store.get(letter)), dtype=torch.uint8)
                tensor.detach().reshape(-1).view(torch.uint8).copy_(flat)
                self._store.delete_key(letter)

    def _read(self) -> list[str]:
        """Take in what others have issued, and let run what can. Gives what every rank waits for, "" for nothing."""
        ranks = range(self._world)
        keys = [f"waits{rank}" for rank in ranks] + [f"count{rank}" for rank in ranks]
        values = [value.decode() for value in self._store.multi_get(keys)]
        for rank, count in zip(ranks, values[self._world :], strict=True):
            for i in range(self._notes.count[rank], int(count)):
                self._notes.add(rank, *json.loads(self._store.get(f"note{rank}-{i}")))
        self._notes.run()
        return values[: self._world]

    def _look_for_deadlock(self, waits: list[str], late: bool) -> None:
        """Raise if this rank waits for ranks that wait, directly or not, for it or for one that has left."""
        told: dict[int, str] = {}
        ahead = [self._me]
        while ahead:
            rank = ahead.pop()
            if rank in told:
                continue
            if waits[rank] == _LEFT:
                told[rank] = f"rank {rank} has left"
                continue
            count, communicator, index = json.loads(waits[rank]) if waits[rank] else (-1, "", 0)
            stream = self._notes.streams.get((communicator, rank), _Stream())
            if count != self._notes.count[rank] or stream.head > index:
                if late:
                    told[rank] = f"rank {rank} is held up by something else"
                    continue
                return  # it is under way
            told[rank] = f"rank {rank} waits for {_listed(stream.batches[index])}"
            if stream.head < index:
                told[rank] += f" behind {_listed(stream.running)}"
            told[rank] += f" on {communicator}"
            ahead += [op.peer for op in stream.running]
        raise Deadlock("on NCCL this stands still: " + "; ".join(told[rank] for rank in sorted(told)))

    def leave(self) -> None:
        for work in list(self._unfinished):
            self.finish(work)
        self._store.set(f"waits{self._me}", _LEFT)


def _listed(ops: list[_Op]) -> str:
    return ", ".join(map(str, ops))


def _name(group: dist.ProcessGroup) -> str:
    return f"group {group.group_name}"


def _size(tensor: torch.Tensor) -> str:
    return f"{tensor.nbytes} bytes"


def _letter(communicator: str, rank: int, index: int, place: int) -> str:
    return f"{communicator}/{rank}/{index}/{place}"
