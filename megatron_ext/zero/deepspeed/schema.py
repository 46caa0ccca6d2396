"""DeepSpeed's settings (0.19), one by one: which of them have an effect here and where, and what does it instead.

Those that the flags of this program speak of are in settings.py.
"""

import dataclasses
from typing import Any

# sections whose keys are judged one by one; another section is one setting
SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "bf16",
    "data_types",
    "aio",
    "optimizer",
    "optimizer.params",
)

# DeepSpeed has an optimizer of its own for stage 1 in bf16 on the device, which knows little of what the others know
BF16_STAGE_1 = "1 with --bf16"
_BUCKETS = ("1", "2", "3")

# what a setting may need; worded for "it has no effect without ..."
BF16 = "--bf16"
OFFLOAD_OPTIMIZER, OFFLOAD_PARAM = "--offload-optimizer", "--offload-param"
OPTIMIZER_ON_NVME, PARAM_ON_NVME = "--offload-optimizer nvme", "--offload-param nvme"
NVME = f"{OPTIMIZER_ON_NVME} or {PARAM_ON_NVME}"
GPU = "a CUDA device"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a setting has an effect.

    stages: of ZeRO. needs: what else there must be. idle: values that ask for nothing that would not be anyway, and
    are accepted everywhere. values: what it may be, a type or a choice, where DeepSpeed itself does not look.
    instead: it never has an effect, or the wrong one, and this is why, or what does it here.
    """

    stages: tuple[str, ...] = (*_BUCKETS, BF16_STAGE_1)
    needs: tuple[str, ...] = ()
    idle: tuple[Any, ...] = ()
    values: type | tuple[str, ...] | None = None
    instead: str | None = None


def _never(instead: str, *idle: Any) -> Setting:
    return Setting(instead=instead, idle=idle)


_ADAMW = "the optimizer is torch's AdamW"
_BY_FLAG = 'a flag says it: write "auto", or leave out '
_NO_ONE_ASKS = "nobody asks for it here"

_TOP = {
    "log_level": Setting(values=("debug", "info", "warning", "error", "critical")),
    "wall_clock_breakdown": Setting(values=bool, idle=(False,)),
    "steps_per_print": _never("use --log-interval"),
    "memory_breakdown": _never("use --report-memory", False),
    "dump_state": _never("log_level info shows all settings", False),
    "zero_allow_untested_optimizer": _never(_ADAMW, True),
    "zero_force_ds_cpu_optimizer": _never(_ADAMW, False),
    "prescale_gradients": _never("ZeRO averages gradients in its own way", False),
    "gradient_predivide_factor": _never("ZeRO averages gradients in its own way", 1),
    "gradient_allreduce_op": _never("the loss is a mean over the global batch", "mean"),
    "managed_gradient_accumulation": _never("the pipeline's schedule says when a step is complete", True),
    "disable_allgather": _never("it has no effect in DeepSpeed 0.19", False),
    "disable_python_gc": _never("nothing here collects garbage instead", False),
    "dataloader_drop_last": _never("the data is not read by DeepSpeed", False),
    "scheduler": _never("the learning rate follows --lr-decay-style, --lr-warmup-iters and --min-lr"),
    "fp16": _never("--fp16 is not built with --zero-engine deepspeed: use --bf16"),
    "bfloat16": _never("its name is bf16"),
    "amp": _never("use --bf16"),
    "torch_autocast": _never("use --bf16"),
    "activation_checkpointing": _never("use --recompute-granularity"),
    "tensor_parallel": _never("use --tensor-model-parallel-size"),
    "sequence_parallel_size": _never("use --sequence-parallel", 1),
    "pipeline": _never("use --pipeline-model-parallel-size"),
    "checkpoint": _never("use --save and --load"),
    "tensorboard": _never("use --tensorboard-dir"),
    "wandb": _never("use --wandb-project"),
    "csv_monitor": _never("use --metrics"),
    "comet": _never("use --wandb-project or --tensorboard-dir"),
    "flops_profiler": _never("it miscounts microbatches here; --metrics has tokens_per_second"),
    "comms_logger": _never(_NO_ONE_ASKS),
    "autotuning": _never(_NO_ONE_ASKS),
    "compile": _never("the model is not compiled"),
    "data_efficiency": _never("the data is not read by DeepSpeed"),
    "curriculum_learning": _never("the data is not read by DeepSpeed"),
    "elasticity": _never("not in DeepSpeed 0.19: give --global-batch-size"),
}

_BF16 = {
    "check_grad_overflow": Setting(("1", "2"), needs=(BF16,), idle=(True,)),
    "immediate_grad_update": Setting((BF16_STAGE_1,), idle=(False,)),
    "bf16_master_weights_and_grads": _never("master weights are float32", False),
    "bf16_optimizer_states": _never("optimizer states are float32", False),
}

_DATA_TYPES = {
    "grad_accum_dtype": _never("gradients are accumulated in float32", "fp32"),
    "buffer_dtype": _never("the model has no buffers"),
    "keep_in_fp32_modules": _never("the model has no buffers"),
}

_ZERO = {
    "contiguous_gradients": _never("DeepSpeed overrules it with offload", True),
    "reduce_scatter": Setting(_BUCKETS, idle=(True,)),
    "reduce_bucket_size": Setting(_BUCKETS),
    "overlap_comm": Setting(_BUCKETS, idle=(False,)),
    "use_multi_rank_bucket_allreduce": Setting(("1", "2"), idle=(True,)),
    "allgather_bucket_size": Setting(("1", BF16_STAGE_1, "2")),
    "parameter_alignment": Setting(("1", "2"), idle=(False,)),
    "round_robin_gradients": _never("DeepSpeed 0.19 then mistakes whose float32 weights are whose", False),
    "ignore_unused_parameters": _never("every parameter is used", True),
    "sub_group_size": Setting(("3",)),
    "stage3_prefetch_bucket_size": Setting(("3",)),
    "stage3_param_persistence_threshold": Setting(("3",)),
    "stage3_model_persistence_threshold": Setting(("3",)),
    "stage3_max_live_parameters": Setting(("3",)),
    "stage3_max_reuse_distance": Setting(("3",)),
    "stage3_module_granularity_threshold": Setting(("3",), idle=(0,)),
    "stage3_use_all_reduce_for_fetch_params": Setting(("3",), idle=(False,)),
    "stage3_allgather_sequential": Setting(("3",), idle=(False,)),
    "memory_efficient_linear": Setting(("3",), idle=(False,)),
    "log_trace_cache_warnings": Setting(("3",), idle=(False,)),
    "zero_hpz_partition_size": Setting(("3",), idle=(1,)),
    "zero_quantized_weights": Setting(("3",), idle=(False,)),
    "zero_quantized_gradients": Setting(("3",), idle=(False,)),
    "zero_quantized_nontrainable_weights": _never("every weight is trained", False),
    "leaf_module": _never("use stage3_module_granularity_threshold"),
    "zenflow": _never("not built: use --offload-optimizer cpu"),
    "cpu_offload": _never("use --offload-optimizer cpu", False),
    "cpu_offload_param": _never("use --offload-param cpu", False),
    "cpu_offload_use_pin_memory": _never("use pin_memory in offload_optimizer and offload_param", False),
    "stage3_gather_16bit_weights_on_model_save": _never("--save writes whole weights by itself", False),
    "stage3_gather_fp16_weights_on_model_save": _never("--save writes whole weights by itself", False),
    "allgather_partitions": _never("it has no effect in DeepSpeed 0.19", True),
    "compute_grad_norm": _never("the gradient norm is logged", True),
    "load_from_fp32_weights": _never("use --load", True),
    "elastic_checkpoint": _never("--load reads every layout", False),
    "pipeline_loading_checkpoint": _never("use --load", False),
    "override_module_apply": _never("nothing here applies a function to modules", True),
    "enable_sanity_checks": _never("it compares the ranks of different pipeline stages", False),
    "legacy_stage1": _never("not in DeepSpeed 0.19", False),
    "save_muon_momentum_buffer_in_memory": _never(_ADAMW, False),
}

_OFFLOAD_OPTIMIZER = {
    "pin_memory": Setting(needs=(OFFLOAD_OPTIMIZER, GPU), idle=(False,)),
    "buffer_count": Setting(needs=(OPTIMIZER_ON_NVME,)),
    "pipeline_read": Setting(needs=(OPTIMIZER_ON_NVME,), idle=(False,)),
    "pipeline_write": Setting(needs=(OPTIMIZER_ON_NVME,), idle=(False,)),
    "fast_init": Setting(needs=(OPTIMIZER_ON_NVME,), idle=(False,)),
    "ratio": _never(f"{_ADAMW}, which is offloaded whole", 1),
    "super_offload": _never(_ADAMW, False),
    "cpuadam_cores_perc": _never(_ADAMW),
}

_OFFLOAD_PARAM = {
    "pin_memory": Setting(needs=(OFFLOAD_PARAM, GPU), idle=(False,)),
    "buffer_count": Setting(needs=(PARAM_ON_NVME,)),
    "buffer_size": Setting(needs=(PARAM_ON_NVME,)),
    "max_in_cpu": Setting(needs=(PARAM_ON_NVME,)),
}

_AIO = {
    "block_size": Setting(needs=(NVME,), values=int),
    "queue_depth": Setting(needs=(NVME,), values=int),
    "intra_op_parallelism": Setting(needs=(NVME,), values=int),
    "thread_count": _never("its name is intra_op_parallelism"),
    "single_submit": Setting(needs=(NVME,), values=bool, idle=(False,)),
    "overlap_events": Setting(needs=(NVME,), values=bool, idle=(True,)),
    "use_gds": _never("GPUDirect Storage is not built", False),
}

_OPTIMIZER = {
    "type": _never(_ADAMW, "AdamW", "Adam"),  # DeepSpeed's Adam is AdamW unless adam_w_mode says otherwise
    "legacy_fusion": _never(_ADAMW, False),
    "params.lr": _never(_BY_FLAG + "optimizer"),
    "params.betas": _never(_BY_FLAG + "optimizer"),
    "params.eps": _never(_BY_FLAG + "optimizer"),
    "params.weight_decay": _never(_BY_FLAG + "optimizer"),
    "params.torch_adam": _never(_ADAMW, True),
    "params.adam_w_mode": _never(_ADAMW, True),
    "params.bias_correction": _never(_ADAMW, True),
    "params.amsgrad": _never(_ADAMW, False),
}

_PARTS: dict[str, dict[str, Setting]] = {
    "": _TOP,
    "bf16.": _BF16,
    "data_types.": _DATA_TYPES,
    "zero_optimization.": _ZERO,
    "zero_optimization.offload_optimizer.": _OFFLOAD_OPTIMIZER,
    "zero_optimization.offload_param.": _OFFLOAD_PARAM,
    "aio.": _AIO,
    "optimizer.": _OPTIMIZER,
}
SETTINGS = {prefix + name: setting for prefix, part in _PARTS.items() for name, setting in part.items()}
