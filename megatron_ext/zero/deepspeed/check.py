"""What DeepSpeed's engine cannot do here, refused before anything starts."""

import importlib.metadata
import os
from pathlib import Path

import torch

from megatron_ext.errors import RequestError
from megatron_ext.zero.config import ZeroConfig
from megatron_ext.zero.deepspeed.settings import Settings

_VERSION = "0.19"
_SCHEDULES = ("none", "gpipe", "1f1b")
_USE = "use --zero-engine torch"


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


def check_run(*, tp: int, pp: int, schedule: str, tied: bool, train_only: str | None, compute: torch.dtype) -> None:
    """Raise RequestError where the rest of the run does not go with this engine."""
    if compute not in (torch.float32, torch.bfloat16):
        name = str(compute).removeprefix("torch.")
        raise RequestError(f"--zero-engine deepspeed is built for float32 and --bf16, not for {name}: {_USE}")
    if schedule not in _SCHEDULES:
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
    ours = settings["zero_optimization"]
    stage, half, on_cpu = zero.zero_stage, settings["bf16"]["enabled"], not torch.cuda.is_available()
    if stage == 0:
        raise RequestError("--zero-engine deepspeed shards: use --zero-stage 1, 2 or 3, or --zero-engine torch")
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
    if "nvme" in (zero.offload_optimizer, zero.offload_param):
        _check_nvme(zero.nvme_path)
    _check_plus_plus(ours, stage, on_cpu, tp * pp, dp)
    _check_spelling(ours, zero.deepspeed_config)


def _check_plus_plus(ours: Settings, stage: int, on_cpu: bool, model_parallel: int, dp: int) -> None:
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if ours.get(key) and on_cpu:
            raise RequestError(f"{key}: its kernels need a CUDA device")
        if ours.get(key) and stage != 3:
            raise RequestError(f"{key} needs --zero-stage 3")
    size = ours.get("zero_hpz_partition_size", 1)
    if size == 1:
        return
    if stage != 3:
        raise RequestError("zero_hpz_partition_size needs --zero-stage 3")
    if model_parallel > 1:
        raise RequestError(
            "zero_hpz_partition_size: DeepSpeed groups neighbouring ranks of the world, which with tensor or pipeline "
            "parallelism do not hold the same parameters: use --zero-engine torch with --zero-shard-size"
        )
    if not isinstance(size, int) or size < 1 or dp % size:
        raise RequestError(f"zero_hpz_partition_size {size} does not divide the data-parallel size {dp}")


def _check_nvme(path: str | None) -> None:
    if path is None:
        raise RequestError("nvme needs --nvme-path: a folder on the disk to use")
    if not Path(path).is_dir() or not os.access(path, os.W_OK):
        raise RequestError(f"--nvme-path {path}: is not a writable folder")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise RequestError("--nvme-path needs libaio and a C++ compiler: apt-get install libaio-dev g++")


def _check_spelling(ours: Settings, file: str | None) -> None:
    """DeepSpeed's own reading of the section, which refuses names and values it does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**ours)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise RequestError(f"--deepspeed-config {file}: {where}: {first['msg']}") from None
