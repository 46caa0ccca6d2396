"""DeepSpeed's settings: what our flags say, in its words, joined with what a user's own file adds.

The flags are the truth. Where the file speaks of the same thing it must agree; where it speaks of what only
DeepSpeed knows, it is passed on; where it asks for what would not happen here, it is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import RequestError
from megatron_ext.zero.config import ZeroConfig

# settings that belong to DeepSpeed alone and work here as its documentation says
_PASSED_ON = (
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "aio",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "log_level",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
# what some files have, and the flag that does it here
_ADVICE = {
    "optimizer": "the optimizer is AdamW with --lr, --weight-decay, --adam-beta1, --adam-beta2 and --adam-eps",
    "scheduler": "the learning rate follows --lr-decay-style, --lr-warmup-iters and --min-lr",
    "fp16": "--fp16 is not built with --zero-engine deepspeed: use --bf16",
    "activation_checkpointing": "use --recompute-granularity",
    "tensor_parallel": "use --tensor-model-parallel-size",
    "pipeline": "use --pipeline-model-parallel-size",
    "checkpoint": "use --save and --load",
    "tensorboard": "use --tensorboard-dir",
    "wandb": "use --wandb-project",
    "csv_monitor": "use --metrics",
}
_REFUSED_IN_ZERO = ("zenflow", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "legacy_stage1")

# used where the file is silent
_DEFAULTS = {
    "zero_allow_untested_optimizer": True,  # torch's fused AdamW, which needs no compiler; also on the host
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization.memory_efficient_linear": False,  # would replace torch.nn.functional.linear in this process
    "data_types.grad_accum_dtype": "fp32",
    "bf16.check_grad_overflow": True,  # skip a step whose gradient is not finite, as the other engine does
}

Settings = dict[str, Any]


def deepspeed_settings(
    zero: ZeroConfig, *, micro_batch_size: int, global_batch_size: int, microbatches: int, clip_grad: float, bf16: bool
) -> Settings:
    """What `deepspeed.initialize` gets. Raises RequestError where --deepspeed-config cannot be joined with the flags.

    microbatches: of a rank, in one optimizer step.
    """
    reduced = "bf16" if zero.grad_reduce_in_bf16 else "fp32"
    ours: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (micro_batch_size, f"--micro-batch-size {micro_batch_size}"),
        "train_batch_size": (global_batch_size, f"--global-batch-size {global_batch_size}"),
        "gradient_accumulation_steps": (microbatches, f"--global-batch-size {global_batch_size} over all ranks"),
        "gradient_clipping": (clip_grad, f"--clip-grad {clip_grad}"),
        "bf16.enabled": (bf16, "--bf16" if bf16 else "the absence of --bf16"),
        "communication_data_type": (reduced, f"{_given('grad_reduce_in_bf16', zero)}"),
        "zero_optimization.stage": (zero.zero_stage, f"--zero-stage {zero.zero_stage}"),
    }
    for what in ("offload_optimizer", "offload_param"):
        device = getattr(zero, what)
        path = zero.nvme_path if device == "nvme" else None
        ours[f"zero_optimization.{what}.device"] = (device, _given(what, zero))
        ours[f"zero_optimization.{what}.nvme_path"] = (path, _given("nvme_path", zero))
        if device is not None:  # page-locked memory is for copies to a GPU
            ours[f"zero_optimization.{what}.pin_memory"] = (torch.cuda.is_available(), "the presence of a GPU or not")
    theirs = read_settings(zero.deepspeed_config) if zero.deepspeed_config is not None else {}
    return _reconcile(ours, theirs, str(zero.deepspeed_config))


def _given(field: str, zero: ZeroConfig) -> str:
    value, flag = getattr(zero, field), "--" + field.replace("_", "-")
    if value in (None, False):
        return f"the absence of {flag}"
    return flag if value is True else f"{flag} {value}"


def read_settings(file: str) -> Settings:
    """A user's DeepSpeed settings; values "auto" are left to the flags. Raises RequestError."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"--deepspeed-config {file}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise RequestError(f"--deepspeed-config {file}: must be a JSON object")
    return _without_auto(content)


def _reconcile(ours: dict[str, tuple[Any, str]], theirs: Settings, file: str) -> Settings:
    """One settings tree from both.

    ours: dotted key -> the value our flags say, and the flag to name. theirs: from `read_settings`. Raises
    RequestError for the first contradiction, naming both sides, and for what would be accepted and ignored.
    """
    for key in theirs:
        if key not in _PASSED_ON:
            advice = _ADVICE.get(key, "it would have no effect here")
            raise RequestError(f"--deepspeed-config {file}: remove {key}: {advice}")
    for key in _REFUSED_IN_ZERO:
        if key in theirs.get("zero_optimization", {}):
            raise RequestError(
                f"--deepspeed-config {file}: remove zero_optimization.{key}: "
                "use --offload-optimizer and --offload-param"
            )
    settings: Settings = json.loads(json.dumps(theirs))
    for key, value in _leaves(theirs):
        if key in ours and (None if value == "none" else value) != ours[key][0]:
            said, flag = ours[key]
            raise RequestError(
                f"--deepspeed-config {file}: {key} is {json.dumps(value)}, but {flag} makes it {json.dumps(said)}: "
                "change one of them"
            )
    said_by_file = dict(_leaves(theirs))
    for key, default in _DEFAULTS.items():
        if key not in said_by_file:
            _set(settings, key.split("."), default)
    for key, (value, _) in ours.items():
        _set(settings, key.split("."), value)
    return settings


def _leaves(tree: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _set(tree: Settings, path: list[str], value: Any) -> None:
    """None removes."""
    *parents, last = path
    for key in parents:
        if value is None and key not in tree:
            return
        tree = tree.setdefault(key, {})
    if value is None:
        tree.pop(last, None)
    else:
        tree[last] = value


def _without_auto(tree: Settings) -> Settings:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value != "auto"
    }
