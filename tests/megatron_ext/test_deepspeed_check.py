"""What DeepSpeed's engine cannot do here is refused, in one line, before anything starts."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.zero import ZeroConfig
from megatron_ext.zero.deepspeed.check import check_installed, check_run, check_zero
from megatron_ext.zero.deepspeed.settings import deepspeed_settings
from tests.megatron_ext.test_deepspeed_settings import BATCH, TYPICAL, read, refused, zero

RUN: dict[str, Any] = {
    "pp": 2,
    "schedule": "1f1b",
    "one_stage": True,
    "tied": False,
    "train_only": None,
    "compute": torch.float32,
    "optimizer": "adam",
}
RUNS: dict[str, dict[str, Any]] = {
    "--fp16: --zero-engine deepspeed is built for float32 and --bf16": {"compute": torch.float16},
    "--params-dtype float64: --zero-engine deepspeed is built for": {"compute": torch.float64},
    "--pipeline-schedule zero-bubble: ": {"schedule": "zero-bubble", "one_stage": False},
    "a tied embedding on two stages": {"tied": True},
    "--train-only lora is not built with": {"train_only": "lora"},
    "--optimizer lion: --zero-engine deepspeed is built for --optimizer adam": {"optimizer": "lion"},
}


@pytest.mark.parametrize("message", RUNS)
def test_the_rest_of_the_run(message: str) -> None:
    check_run(**RUN)
    check_run(**RUN | {"pp": 1, "tied": True, "schedule": "none", "compute": torch.bfloat16})
    line = refused(lambda: check_run(**RUN | RUNS[message]))
    assert message in line
    assert "use --zero-engine torch" in line


FLAGS: dict[str, dict[str, Any]] = {
    "--zero-stage 0: --zero-engine deepspeed shards": {"zero_stage": 0},
    "--accumulate-then-reduce: DeepSpeed's stage 3": {"zero_stage": 3, "accumulate_then_reduce": True},
    "--offload-param cpu needs --zero-stage 3": {"zero_stage": 2, "offload_param": "cpu"},
    "--offload-param nvme gives wrong numbers": {"zero_stage": 3, "offload_param": "nvme", "nvme_path": "."},
    "--offload-optimizer nvme with --zero-stage 2": {"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "."},
    "--offload-optimizer nvme needs --nvme-path": {"zero_stage": 3, "offload_optimizer": "nvme"},
    "--nvme-path none: is not a writable folder": {
        "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "none"
    },
}  # fmt: skip


@pytest.mark.parametrize("message", FLAGS)
def test_flags_that_deepspeed_cannot_do(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # float32 parameters on NVMe are refused there too
    config = ZeroConfig(zero_engine="deepspeed", **FLAGS[message])
    settings = deepspeed_settings(config, **BATCH, bf16=False)
    assert message in refused(lambda: check_zero(config, settings, tp=1, pp=1, dp=2))


NO_ENGINE: dict[str, tuple[dict[str, Any], bool]] = {
    "--nvme-path . has no effect without --offload-optimizer nvme or --offload-param nvme": (
        {"offload_optimizer": "cpu", "nvme_path": "."}, False,
    ),
    "--grad-reduce-in-bf16 needs --bf16": ({"grad_reduce_in_bf16": True}, False),
    "--accumulate-then-reduce needs --zero-stage 3": ({"zero_stage": 2, "accumulate_then_reduce": True}, True),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
@pytest.mark.parametrize("message", NO_ENGINE)
def test_flags_that_no_engine_can_do(message: str, engine: str) -> None:
    options, bf16 = NO_ENGINE[message]
    assert message in refused(lambda: ZeroConfig(zero_engine=engine, **options).validate_flags(bf16))


def test_another_version_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "DeepSpeed is not installed: pip install 'deepspeed==0.19.*', or use" in refused(check_installed)
    for version in ("0.18.9", "0.190.0", "1.0.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert f"works with DeepSpeed 0.19, this is {version}: pip install" in refused(check_installed)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.0")
    check_installed()


READ_BY_DEEPSPEED: list[tuple[str, Any, int]] = [
    ("zero_optimization.reduce_bucket_size: Input should be greater than 0", zero(reduce_bucket_size=0), 2),
    ("zero_optimization.reduce_bucket_size: Input should be a valid integer", zero(reduce_bucket_size=1.5), 2),
    ("zero_optimization.overlap_comm: Input should be a valid boolean", zero(overlap_comm="maybe"), 2),
    ("bf16.check_grad_overflow: Input should be", {"bf16": {"check_grad_overflow": []}}, 2),
    ("zero_optimization.stage3_max_live_parameters: Input should be g", zero(stage3_max_live_parameters=-1), 3),
    ("zero_optimization.allgather_bucket_size is 333: must be even", zero(allgather_bucket_size=333), 2),
    ("zero_optimization.zero_hpz_partition_size is 3: must divide", zero(zero_hpz_partition_size=3), 3),
    ("zero_optimization.zero_hpz_partition_size is 0: must divide", zero(zero_hpz_partition_size=0), 3),
    ("zero_quantized_weights is true: its kernels need a CUDA", zero(zero_quantized_weights=True), 3),
    ("zero_quantized_gradients is true: its kernels need a CUDA", zero(zero_quantized_gradients=True), 3),
]


@pytest.mark.parametrize("message, content, stage", [pytest.param(*case, id=case[0]) for case in READ_BY_DEEPSPEED])
def test_what_deepspeed_would_refuse_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, content: Any, stage: int
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = ZeroConfig(zero_stage=stage, deepspeed_config=str(tmp_path / "ds.json"))
    check_zero(config, read(tmp_path, TYPICAL | zero(), bf16=True, zero_stage=stage), tp=1, pp=1, dp=2)
    settings = read(tmp_path, content, bf16=True, zero_stage=stage)
    line = refused(lambda: check_zero(config, settings, tp=1, pp=1, dp=2))
    assert line.startswith(f"--deepspeed-config {tmp_path / 'ds.json'}: ")
    assert message in line


@pytest.mark.parametrize("key, value", [("zero_hpz_partition_size", 2), ("zero_quantized_gradients", True)])
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
def test_zero_plus_plus_groups_need_data_parallelism_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, tp: int, pp: int
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = read(tmp_path, zero(**{key: value}), zero_stage=3)
    check_zero(ZeroConfig(zero_stage=3), settings, tp=1, pp=1, dp=4)
    line = refused(lambda: check_zero(ZeroConfig(zero_stage=3), settings, tp=tp, pp=pp, dp=4))
    assert f"zero_optimization.{key} is " in line
    assert "DeepSpeed groups neighbouring ranks of the world" in line


def test_too_few_buffers_for_nvme(tmp_path: Path) -> None:
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        pytest.skip("needs libaio")
    flags = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    settings = read(tmp_path, zero(offload_optimizer={"buffer_count": 3}), **flags)
    line = refused(lambda: check_zero(ZeroConfig(**flags), settings, tp=1, pp=1, dp=2))
    assert "zero_optimization.offload_optimizer.buffer_count is 3: must be at least 4" in line
