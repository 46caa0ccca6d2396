"""What DeepSpeed's engine cannot do here, refused before anything starts."""

import contextlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import RequestError
from megatron_ext.option import flag_of
from megatron_ext.zero.config import ZeroConfig
from megatron_ext.zero.deepspeed.settings import Settings

_VERSION = "0.19"
_OPTIMIZER = "adam"
_USE = "use --zero-engine torch"
_BUFFERS = 4  # of a sub-group's swapping: the weights, their gradients, two moments
_OTHER_DTYPES = {torch.float16: "--fp16", torch.float64: "--params-dtype float64"}


def check_installed() -> None:
    """Raise RequestError unless there is a DeepSpeed whose parts are where this program looks for them."""
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise RequestError(
            f"--zero-engine deepspeed: DeepSpeed is not installed: pip install 'deepspeed=={_VERSION}.*', or {_USE}"
        ) from None
    if not version.startswith(_VERSION + "."):
        raise RequestError(
            f"--zero-engine deepspeed works with DeepSpeed {_VERSION}, this is {version}: "
            f"pip install 'deepspeed=={_VERSION}.*', or {_USE}"
        )


def check_run(
    *,
    pp: int,
    schedule: str,
    one_stage: bool,
    tied: bool,
    train_only: str | None,
    compute: torch.dtype,
    optimizer: str,
) -> None:
    """Raise RequestError where the rest of the run does not go with this engine.

    one_stage: whether the schedule has one stage to a rank.
    """
    if optimizer != _OPTIMIZER:
        raise RequestError(
            f"--optimizer {optimizer}: --zero-engine deepspeed is built for --optimizer {_OPTIMIZER}: use it, or {_USE}"
        )
    if compute in _OTHER_DTYPES:
        raise RequestError(
            f"{_OTHER_DTYPES[compute]}: --zero-engine deepspeed is built for float32 and --bf16: use these, or {_USE}"
        )
    if not one_stage:
        raise RequestError(
            f"--pipeline-schedule {schedule}: --zero-engine deepspeed holds one stage a rank and runs whole backward "
            f"passes: use 1f1b or gpipe, or {_USE}"
        )
    if tied and pp > 1:
        raise RequestError(
            "--zero-engine deepspeed reduces gradients before those of a tied embedding on two stages could be "
            f"added: use --pipeline-model-parallel-size 1, or {_USE}"
        )
    if train_only is not None:
        raise RequestError(f"--train-only {train_only} is not built with --zero-engine deepspeed: {_USE}")


def check_zero(zero: ZeroConfig, settings: Settings, *, tp: int, pp: int, dp: int) -> None:
    """Raise RequestError where DeepSpeed's own ZeRO cannot do what is asked, or is known to do it wrongly."""
    stage, half, on_cpu = zero.zero_stage, settings["bf16"]["enabled"], not torch.cuda.is_available()
    if stage == 0:
        raise RequestError(f"--zero-stage 0: --zero-engine deepspeed shards: use --zero-stage 1, 2 or 3, or {_USE}")
    if zero.accumulate_then_reduce:
        raise RequestError(f"--accumulate-then-reduce: DeepSpeed's stage 3 reduces every microbatch: {_USE}")
    if zero.offload_param is not None and stage != 3:
        raise RequestError(f"--offload-param {zero.offload_param} needs --zero-stage 3: below, parameters are whole")
    if zero.offload_param == "nvme" and (on_cpu or not half):
        raise RequestError(
            "--offload-param nvme gives wrong numbers in float32 on a CPU (DeepSpeed 0.19), and is only let through "
            "with --bf16 on a GPU: use --offload-param cpu"
        )
    if zero.offload_optimizer == "nvme" and stage != 3:
        raise RequestError(
            f"--offload-optimizer nvme with --zero-stage {stage}: DeepSpeed would silently keep the states in memory: "
            "use --zero-stage 3, or --offload-optimizer cpu"
        )
    for flag in ("offload_optimizer", "offload_param"):
        if getattr(zero, flag) == "nvme":
            _check_nvme(f"{flag_of(flag)} nvme", zero.nvme_path)
    _check_file(settings, zero.deepspeed_config, tp * pp, dp)


def _check_nvme(flag: str, path: str | None) -> None:
    if path is None:
        raise RequestError(f"{flag} needs --nvme-path: a folder on the disk to use")
    if not Path(path).is_dir() or not os.access(path, os.W_OK):
        raise RequestError(f"--nvme-path {path}: is not a writable folder")
    with quiet():
        from deepspeed.ops.op_builder import AsyncIOBuilder

        compatible = AsyncIOBuilder().is_compatible(verbose=False)
    if not compatible:
        raise RequestError("--nvme-path needs libaio and a C++ compiler: apt-get install libaio-dev g++")


def _check_file(settings: Settings, file: str | None, model_parallel: int, dp: int) -> None:
    """What DeepSpeed itself would refuse later, or do wrongly, of a user's settings."""
    zero = _read_by_deepspeed(settings, file).zero_config
    on_cpu, across = not torch.cuda.is_available(), model_parallel > 1
    kernels = "its kernels need a CUDA device"
    neighbours = (
        "DeepSpeed groups neighbouring ranks of the world, which with tensor or pipeline parallelism do not hold the "
        f"same parameters: remove it, or {_USE} with --zero-shard-size"
    )
    size, bucket = zero.zero_hpz_partition_size, zero.allgather_bucket_size
    offload = zero.offload_optimizer
    buffers, least = _BUFFERS, _BUFFERS
    if offload is not None:  # what is read ahead or still being written has buffers of its own
        buffers, least = offload.buffer_count, _BUFFERS * (1 + offload.pipeline_read + offload.pipeline_write)
    for key, value, wrong, reason in (
        ("zero_quantized_weights", "true", on_cpu and zero.zero_quantized_weights, kernels),
        ("zero_quantized_gradients", "true", on_cpu and zero.zero_quantized_gradients, kernels),
        ("zero_quantized_gradients", "true", across and zero.zero_quantized_gradients, neighbours),
        ("zero_hpz_partition_size", size, across and size != 1, neighbours),
        ("zero_hpz_partition_size", size, size < 1 or dp % size, f"must divide the data-parallel size {dp}"),
        ("allgather_bucket_size", bucket, bucket % 2, "must be even"),
        ("offload_optimizer.buffer_count", buffers, buffers < least, f"must be at least {least}"),
    ):
        if wrong:
            raise RequestError(f"--deepspeed-config {file}: zero_optimization.{key} is {value}: {reason}")


def _read_by_deepspeed(settings: Settings, file: str | None) -> Any:
    """DeepSpeed's own reading, which refuses values that it does not understand."""
    with quiet():
        from deepspeed.runtime.config import DeepSpeedConfig
        from pydantic import ValidationError

        single = {key: value for key, value in settings.items() if key != "train_batch_size"}  # of any number of ranks
        try:
            return DeepSpeedConfig(single)
        except ValidationError as error:
            first = error.errors()[0]
            section = "bf16" if error.title == "DeepSpeedBF16Config" else "zero_optimization"
            where = ".".join(map(str, (section, *first["loc"])))
            raise RequestError(f"--deepspeed-config {file}: {where}: {first['msg']}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without DeepSpeed's messages of every start on the standard output; its errors are let through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
