"""What has to be told to DeepSpeed, beside its settings, before it runs as one part of a larger program."""

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from megatron_ext.errors import RequestError
from megatron_ext.optim import squared_norms
from megatron_ext.zero.deepspeed.check import quiet


def prepare(data_parallel: dist.ProcessGroup) -> None:
    """Ready this process for `deepspeed.initialize`. data_parallel: the ranks that share this rank's stage.

    Its messages of every start are silenced below errors. On a CPU its shared-memory collectives, which a compiler
    would build for more than a minute, are left out: gloo is there.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # one process alone was started without torchrun
    with quiet():
        import deepspeed
        from deepspeed.runtime.zero import partitioned_param_coordinator
        from deepspeed.utils import logger
    logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # before DeepSpeed looks for itself, which would start compilers to see what each operator needs
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)  # wraps the groups there are
    same = functools.partial(assert_same_on_ranks, data_parallel)
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = same


def use_disk(folder: str) -> FileLock:
    """Lock this rank's files under --nvme-path, whose names are the same in every run, until the lock is forgotten.

    Raises RequestError where another run holds it: each would overwrite the other's optimizer.
    """
    lock = FileLock(Path(folder) / f"rank{dist.get_rank()}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RequestError(f"--nvme-path {folder} is in use by another run: give every run a folder") from None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("DeepSpeed's I/O for --nvme-path is compiled at its first use, for about a minute", file=sys.stderr)
    return lock


@contextlib.contextmanager
def quiet_unless_it_fails() -> Iterator[None]:
    """Without what DeepSpeed prints about memory and compiling; if it raises, that comes first."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except Exception:
        print(said.getvalue(), file=sys.stderr)
        raise


def sum_norm_once(optimizer: Any, device: torch.device) -> None:
    """Let stage 3's optimizer sum the squared norm over pipeline and tensor parallelism once, not by sub-group.

    Stages of a pipeline have as many sub-groups as they have parameters for, and would wait for each other for ever.
    device: the one that messages leave from.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    norms_of_sub_groups, all_reduce = optimizer._get_norm_groups, optimizer._model_parallel_all_reduce

    def norm_of_all() -> list[torch.Tensor]:
        optimizer._model_parallel_all_reduce = lambda tensor, op: None
        try:
            mine = combine_grad_norm_groups(norms_of_sub_groups())  # infinite where one is not a number
        finally:
            optimizer._model_parallel_all_reduce = all_reduce
        square = mine.to(device).square()
        all_reduce(tensor=square, op=dist.ReduceOp.SUM)
        return [square.sqrt()]

    optimizer._get_norm_groups = norm_of_all


def take_norms_exactly(optimizer: Any) -> None:
    """Let stage 1's optimizer in bf16 take its norm of our norms: its own are too small of long tensors on a CPU."""
    gradients_for = optimizer.get_grads_for_norm

    def norms(for_clipping: bool = False) -> Any:
        if for_clipping:
            return gradients_for(for_clipping=True)
        gradients, of_experts = gradients_for()
        return ([squared_norms(gradients).sqrt()] if gradients else []), of_experts

    optimizer.get_grads_for_norm = norms


def assert_same_on_ranks(group: dist.ProcessGroup, numbers: list[int]) -> None:
    """Raise where the ranks of `group` hold different numbers.

    ZeRO-3 records in which order modules run, and compares the records of all ranks of the *world* with rank 0's.
    Stages of a pipeline run different modules, and reach that comparison different numbers of times: it hangs.
    What must agree is the order among the ranks that gather parameters together, and those are one stage's.
    """
    records: list[list[int] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(records, numbers, group=group)
    if any(record != numbers for record in records):
        raise RuntimeError("ZeRO-3: the ranks of one pipeline stage ran its modules in different orders")
