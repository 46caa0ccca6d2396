"""What DeepSpeed is told: our flags in its words, a user's file beside them, and what of either is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.errors import RequestError
from megatron_ext.zero import ZeroConfig
from megatron_ext.zero.deepspeed.schema import SETTINGS
from megatron_ext.zero.deepspeed.settings import Settings, deepspeed_settings

BATCH = {"micro_batch_size": 2, "global_batch_size": 16, "microbatches": 4, "clip_grad": 1.0}  # on 2 ranks


def read(folder: Path, content: Any, bf16: bool = False, **zero: Any) -> Settings:
    """The settings of a run with this file: its text, or what is to be in it."""
    file = folder / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    zero = {"zero_engine": "deepspeed", "zero_stage": 2} | zero
    return deepspeed_settings(ZeroConfig(deepspeed_config=str(file), **zero), **BATCH, bf16=bf16)


def refused(run: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as error:
        run()
    assert "\n" not in str(error.value)
    return str(error.value)


# after Hugging Face's documentation of its DeepSpeed integration, with what has no effect here taken out
TYPICAL = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": False},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_the_flags_in_deepspeeds_words() -> None:
    zero = ZeroConfig(zero_engine="deepspeed", zero_stage=3, offload_optimizer="cpu", grad_reduce_in_bf16=True)
    assert deepspeed_settings(zero, **BATCH, bf16=True) == {
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "communication_data_type": "bf16",
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 50_000_000,
            "memory_efficient_linear": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
        },
    }


@pytest.mark.parametrize("bf16", [False, True])
def test_a_typical_file_adds_what_only_it_says(tmp_path: Path, bf16: bool) -> None:
    plain = read(tmp_path, {}, bf16, zero_stage=3)
    settings = read(tmp_path, TYPICAL, bf16, zero_stage=3)
    added = ("overlap_comm", "sub_group_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters")
    asked = {key: TYPICAL["zero_optimization"][key] for key in (*added, "stage3_max_reuse_distance")}
    assert settings.pop("zero_optimization") == plain.pop("zero_optimization") | asked
    assert settings.pop("wall_clock_breakdown") is False
    assert settings == plain


AGREEING: list[tuple[Any, dict[str, Any]]] = [
    ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2.0, "gradient_accumulation_steps": 4}, {}),
    ({"gradient_clipping": 1}, {}),
    ({"communication_data_type": "FP32"}, {}),
    ({"communication_data_type": None}, {}),
    ({"communication_data_type": "bf16", "bf16": {"enabled": True}}, {"bf16": True, "grad_reduce_in_bf16": True}),
    ({"data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16"}}, {"bf16": True}),
    ({"zero_optimization": {"stage": 2.0, "offload_optimizer": {"device": "none"}, "offload_param": None}}, {}),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {"offload_optimizer": "cpu"}),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}},
        {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/disk"},
    ),
    ({"optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True, "adam_w_mode": True}}}, {}),
    ({"fp16": {"enabled": False, "loss_scale": 128}, "amp": {"enabled": "auto"}}, {}),
    ({"flops_profiler": {"enabled": False, "profile_step": 1}, "tensorboard": {"enabled": False}}, {}),
    ({"zero_optimization": {"allgather_partitions": True, "stage3_gather_16bit_weights_on_model_save": False}}, {}),
    ({"zero_optimization": {"round_robin_gradients": False, "overlap_comm": "auto", "cpu_offload": False}}, {}),
    ({"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "prescale_gradients": False}, {}),
    ("{}", {}),
]


@pytest.mark.parametrize("content, options", AGREEING)
def test_what_says_the_same_changes_nothing(tmp_path: Path, content: Any, options: dict[str, Any]) -> None:
    assert read(tmp_path, content, **options) == read(tmp_path, {}, **options)


def test_the_file_overrules_what_no_flag_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = {"zero_optimization": {"offload_param": {"pin_memory": False}, "memory_efficient_linear": True}}
    settings = read(
        tmp_path, file | {"aio": {"queue_depth": 32}}, zero_stage=3, offload_param="nvme", nvme_path="/disk"
    )
    assert settings["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 50_000_000,
        "memory_efficient_linear": True,
        "offload_param": {"device": "nvme", "nvme_path": "/disk", "pin_memory": False},
    }
    assert settings["aio"] == {"queue_depth": 32}


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


REFUSED: list[tuple[str, Any, dict[str, Any]]] = [
    # the file against a flag: both are named
    ("zero_optimization.stage is 3, but --zero-stage 2 makes it 2: change one of them", zero(stage=3), {}),
    ('zero_optimization.stage is "2", but --zero-stage 2 makes it 2', zero(stage="2"), {}),
    ("zero_optimization.stage is true, but --zero-stage 1 makes it 1", zero(stage=True), {"zero_stage": 1}),
    ("train_batch_size is 32, but --global-batch-size 16 makes it 16", {"train_batch_size": 32}, {}),
    (
        "gradient_accumulation_steps is 8, but --global-batch-size 16 / (--micro-batch-size 2 x data-parallel size 2) "
        "makes it 4",
        {"gradient_accumulation_steps": 8},
        {},
    ),
    ("gradient_clipping is 0.5, but --clip-grad 1.0 makes it 1.0", {"gradient_clipping": 0.5}, {}),
    ("gradient_clipping is true, but --clip-grad 1.0 makes it 1.0", {"gradient_clipping": True}, {}),
    ("bf16.enabled is true, but the absence of --bf16 makes it false", {"bf16": {"enabled": True}}, {}),
    ("bf16.enabled is false, but --bf16 makes it true", {"bf16": {"enabled": False}}, {"bf16": True}),
    ("bf16.enabled is 1, but --bf16 makes it true", {"bf16": {"enabled": 1}}, {"bf16": True}),
    (
        'data_types.param_dtype is "fp16", but --bf16 makes it "bf16"',
        {"data_types": {"param_dtype": "fp16"}},
        {"bf16": True},
    ),
    (
        'communication_data_type is "fp16", but the absence of --grad-reduce-in-bf16 makes it "fp32"',
        {"communication_data_type": "fp16"},
        {},
    ),
    (
        'zero_optimization.offload_optimizer.device is "cpu", but the absence of --offload-optimizer makes it "none"',
        zero(offload_optimizer={"device": "cpu"}),
        {},
    ),
    (
        'offload_optimizer.device is "none", but --offload-optimizer cpu makes it "cpu"',
        zero(offload_optimizer={"device": "none"}),
        {"offload_optimizer": "cpu"},
    ),
    (
        'offload_optimizer.nvme_path is "/b", but --nvme-path /a makes it "/a"',
        zero(offload_optimizer={"nvme_path": "/b"}),
        {"offload_optimizer": "nvme", "nvme_path": "/a"},
    ),
    (
        'offload_param.nvme_path is "/a", but --offload-param cpu makes it null',
        zero(offload_param={"nvme_path": "/a"}),
        {"offload_optimizer": "nvme", "offload_param": "cpu", "nvme_path": "/a"},
    ),
    # what would be accepted and ignored
    ("remove steps_per_print: use --log-interval", {"steps_per_print": 2000}, {}),
    ("remove scheduler: the learning rate follows --lr-decay-style", {"scheduler": {"type": "WarmupLR"}}, {}),
    ("remove fp16: --fp16 is not built with --zero-engine deepspeed: use --bf16", {"fp16": {"enabled": True}}, {}),
    ("remove optimizer.type: the optimizer is torch's AdamW", {"optimizer": {"type": "Lamb"}}, {}),
    ('remove optimizer.params.lr: a flag says it: write "auto"', {"optimizer": {"params": {"lr": 1e-3}}}, {}),
    ("remove optimizer.params.adam_w_mode", {"optimizer": {"params": {"adam_w_mode": False}}}, {}),
    ("remove zero_force_ds_cpu_optimizer", {"zero_force_ds_cpu_optimizer": True}, {}),
    ("remove data_types.grad_accum_dtype: gradients are accumulated", {"data_types": {"grad_accum_dtype": "bf16"}}, {}),
    ("remove bf16.bf16_master_weights_and_grads: master", {"bf16": {"bf16_master_weights_and_grads": True}}, {}),
    ("remove elasticity: ", {"elasticity": {"enabled": True}}, {}),
    ("remove autotuning: ", {"autotuning": {}}, {}),
    ("remove compile: ", {"compile": {"deepcompile": True}}, {}),
    ("remove activation_checkpointing: use --recompute", {"activation_checkpointing": {}}, {}),
    ("remove zero_optimization.round_robin_gradients: ", zero(round_robin_gradients=True), {}),
    ("remove zero_optimization.contiguous_gradients: ", zero(contiguous_gradients=False), {}),
    ("remove zero_optimization.zenflow: ", zero(zenflow={"topk_ratio": 0.1}), {}),
    ("remove zero_optimization.cpu_offload: use --offload-optimizer cpu", zero(cpu_offload=True), {}),
    ("remove zero_optimization.leaf_module: ", zero(leaf_module={"classes": ["X"]}), {}),
    (
        "remove zero_optimization.offload_optimizer.ratio: ",
        zero(offload_optimizer={"ratio": 0.5}),
        {"offload_optimizer": "cpu"},
    ),
    (
        "offload_optimizer.super_offload: ",
        zero(offload_optimizer={"super_offload": True}),
        {"offload_optimizer": "cpu"},
    ),
    (
        "remove zero_optimization.sub_group_size: it has no effect at --zero-stage 2; "
        "remove zero_optimization.stage3_max_live_parameters: it has no effect at --zero-stage 2",
        zero(sub_group_size=1e9, stage3_max_live_parameters=1e9),
        {},
    ),
    (
        "remove zero_optimization.overlap_comm: it has no effect at --zero-stage 1 with --bf16",
        zero(overlap_comm=True),
        {"zero_stage": 1, "bf16": True},
    ),
    ("remove bf16.check_grad_overflow: it has no effect without --bf16", {"bf16": {"check_grad_overflow": False}}, {}),
    (
        "remove zero_optimization.offload_optimizer.buffer_count: it has no effect without --offload-optimizer nvme",
        zero(offload_optimizer={"buffer_count": 5}),
        {"offload_optimizer": "cpu"},
    ),
    (
        "remove aio.block_size: it has no effect without --offload-optimizer nvme or --offload-param nvme",
        {"aio": {"block_size": 1048576}},
        {},
    ),
    ("remove zero_optimization.offload_param.pin_memory: it has no", zero(offload_param={"pin_memory": True}), {}),
    # names and values
    ("remove zero_optimisation: no setting that has an effect here; did you mean zero_", {"zero_optimisation": {}}, {}),
    (
        "remove zero_optimization.prefetch_bucket_size: no setting that has an effect here; did you mean "
        "zero_optimization.stage3_prefetch_bucket_size?",
        zero(prefetch_bucket_size=0),
        {},
    ),
    ('remove "zero_optimization.stage": no setting that', {"zero_optimization.stage": 2}, {}),
    ("cannot be read (zero_optimization must be an object, not true)", {"zero_optimization": True}, {}),
    ('cannot be read (optimizer must be an object, not "AdamW")', {"optimizer": "AdamW"}, {}),
    ('log_level is "verbose": must be one of debug, info, ', {"log_level": "verbose"}, {}),
    ("wall_clock_breakdown is 1: must be true or false", {"wall_clock_breakdown": 1}, {}),
    (
        "aio.queue_depth is 0: must be a whole number of at least 1; aio.single_submit is 0: must be true or false",
        {"aio": {"queue_depth": 0, "single_submit": 0}},
        {"offload_optimizer": "nvme", "nvme_path": "/a"},
    ),
    # all of it at once
    (
        "remove steps_per_print: use --log-interval; zero_optimization.stage is 3",
        {"steps_per_print": 1} | zero(stage=3),
        {},
    ),
]


@pytest.mark.parametrize("message, content, options", [pytest.param(*case, id=case[0][:80]) for case in REFUSED])
def test_refused(tmp_path: Path, message: str, content: Any, options: dict[str, Any]) -> None:
    line = refused(lambda: read(tmp_path, content, **options))
    assert line.startswith("--deepspeed-config ")
    assert message in line


UNREADABLE = {
    "": "cannot be read (Expecting value: line 1 column 1 (char 0))",
    "{'stage': 2}": "cannot be read (Expecting property name",
    "[]": "cannot be read (it must be a JSON object)",
    '{"gradient_clipping": 1, "gradient_clipping": 1}': "cannot be read (gradient_clipping is given twice)",
    '{"zero_optimization": {"stage": 2, "stage": 3}}': "cannot be read (stage is given twice)",
    '{"gradient_clipping": NaN}': "cannot be read (NaN is not a finite number)",
    '{"zero_optimization": {"reduce_bucket_size": 5e800}}': "cannot be read (5e800 is not a finite number)",
    '{"a": ' * 100_000 + "1" + "}" * 100_000: "nested too deeply",
    '{"zero_optimization": {"leaf_module": ' + "[" * 900 + "]" * 900 + "}}": "leaf_module",
}


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda text: text[:40])
def test_unreadable(tmp_path: Path, text: str) -> None:
    assert UNREADABLE[text] in refused(lambda: read(tmp_path, text))


def test_a_folder_and_no_file_are_unreadable(tmp_path: Path) -> None:
    for file, reason in ((tmp_path, "Is a directory"), (tmp_path / "none.json", "No such file")):
        config = ZeroConfig(zero_stage=2, deepspeed_config=str(file))
        line = refused(lambda config=config: deepspeed_settings(config, **BATCH, bf16=False))
        assert line.startswith(f"--deepspeed-config {file}: cannot be read (")
        assert reason in line


def test_every_setting_of_zero_is_known() -> None:
    """A new field of DeepSpeed's has to be judged before it may be used."""
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    sections = {
        "zero_optimization.": config.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer.": config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param.": config.DeepSpeedZeroOffloadParamConfig,
        "bf16.": precision.DeepSpeedBF16Config,
    }
    theirs = {
        prefix + (field.alias or name)
        for prefix, model in sections.items()
        for name, field in model.model_fields.items()
    }
    by_flags = {"zero_optimization.stage", "bf16.enabled"}
    for what in ("offload_optimizer", "offload_param"):
        by_flags |= {f"zero_optimization.{what}{part}" for part in ("", ".device", ".nvme_path")}
    ours = {key for key in SETTINGS if key.startswith(tuple(sections))}
    assert theirs - by_flags == ours
