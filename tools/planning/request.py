"""What a planner is asked: flags of its own, and those of `python -m pretrain` for the run that is planned."""

import argparse
import dataclasses
import re
from typing import Any

from megatron_ext.engine import EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import ParallelConfig
from megatron_ext.option import field_of, flag_of
from megatron_ext.pipeline import PipelineConfig
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.gpus import Gpu, gpu_named
from megatron_ext.zero import ZeroConfig
from pretrain.flags import all_flags, read_settings, resolve
from tools.planning.script import LAYOUT_GROUPS

_FIELDS = {  # of planner.choices.Choice, and the flags that settle them
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "zero_stage": "zero",
    "pipeline_schedule": "schedule",
    "num_virtual_stages_per_pipeline_rank": "chunks",
    "micro_batch_size": "micro_batch",
    "recompute_granularity": "recompute",
    "sequence_parallel": "sequence_parallel",
}
_LAYOUT = (*_FIELDS, "pipeline_layers", "zero_shard_size")  # in a file these are no decisions
_OF_A_RUN = ("data_path", "load", "save", "save_interval", "metrics", "dry_run", "world_size", "callback")
_SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "sp": "sequence_parallel",
    "zero": "zero_stage",
    "schedule": "pipeline_schedule",
    "chunks": "num_virtual_stages_per_pipeline_rank",
    "mb": "micro_batch_size",
    "recompute": "recompute_granularity",
    "layers": "pipeline_layers",
}
LAYOUT_HELP = (
    "predict this layout instead of searching: tp=4,pp=3,zero=1,mb=2,schedule=interleaved,chunks=2,recompute=full,"
    "sp=true,layers=22/21/21, or other flags of the layout by name; what is not named is pretrain's default. Alone, "
    "--layout given: as the flags and --config have it"
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """The run to plan. base: not validated, in the layout of its flags. allowed: what the command line settled."""

    base: EngineConfig
    allowed: dict[str, tuple[Any, ...]]
    settings: dict[str, Any]  # as resolved from, for the flags of a script
    assumed: list[str]  # what was not asked for, in words


def read_run(options: argparse.Namespace, gpu: Gpu) -> Planned:
    """Read the run that is planned. options: with what the planner's own parser left in `rest`. Raises RequestError."""
    layout = options.layout
    file, given = read_settings(options.rest, options.own)
    for name in given:
        if name in _OF_A_RUN:
            raise RequestError(f"{flag_of(name)} says nothing about a layout: leave it to pretrain")
    if layout is None:
        file = {name: value for name, value in file.items() if name not in _LAYOUT}
    elif layout != "given":
        given |= _read_layout(layout)
    settings = file | given
    assumed = []
    if not any(name in settings for name in ("bf16", "fp16", "params_dtype")):
        name = "bf16" if gpu.has_bf16 else "fp16"
        settings[name] = True
        assumed.append(f"--{name}")
    of_model = {name: value for name, value in settings.items() if name not in ("load", "pretrained_checkpoint")}
    base = resolve(settings if settings.get("use_checkpoint_args") else of_model).engine
    if settings.get("global_batch_size") is None:
        raise RequestError("--global-batch-size is required: the sequences of one step, which a layout is planned for")
    if base.precision.bf16 and not gpu.has_bf16:
        raise RequestError(f"--bf16: {gpu.name} computes in fp16 only: give --fp16")
    _without_layout(base).validate(1)
    allowed = {_FIELDS[name]: (_read(name, value),) for name, value in given.items() if name in _FIELDS}
    return Planned(base, allowed, settings, assumed)


def _without_layout(config: EngineConfig) -> EngineConfig:
    """The same run on one rank: to find what is wrong with it whatever the layout."""
    return dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, micro_batch_size=1),
        parallel=ParallelConfig(),
        pipeline=PipelineConfig(),
        zero=ZeroConfig(),
    )


def _read_layout(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    flags = all_flags()
    for part in text.split(","):
        key, equals, value = part.partition("=")
        name = _SHORT.get(key.strip(), field_of(key.strip()))
        if not equals or name not in flags or flags[name].group not in LAYOUT_GROUPS:
            raise RequestError(
                f"--layout {text}: {part!r} is not KEY=VALUE with one of {', '.join(_SHORT)}, or the name of another "
                "flag of the layout"
            )
        if name in found:
            raise RequestError(f"--layout {text}: names {key.strip()} twice")
        value = value.strip()
        if flags[name].kind is bool:
            if value not in ("true", "false"):
                raise RequestError(f"--layout {text}: {key}={value} must be true or false")
            found[name] = value == "true"
        elif name == "recompute_granularity" and value == "none":
            found[name] = None
        else:
            found[name] = value.replace("/", ",") if flags[name].listed else value
    return found


def _read(name: str, value: Any) -> Any:
    found = all_flags()[name].read(value)
    if isinstance(found, int) and not isinstance(found, bool) and found < 1 and name != "zero_stage":
        raise RequestError(f"{flag_of(name)} {found}: must be at least 1")
    return found


def read_cluster(options: argparse.Namespace) -> Cluster:
    """Read the GPUs of --gpu, with what single flags say otherwise. Raises RequestError."""
    own = ("peak_tflops", "memory_gb", "bandwidth")
    if options.gpu is not None:
        gpu = gpu_named(options.gpu)
    else:
        missing = [flag_of(name) for name in own if getattr(options, name) is None]
        if missing:
            raise RequestError(f"--gpu is missing; or describe the device: {', '.join(missing)} missing")
        like = gpu_named("a100-80g")  # shares of the datasheet; its links are those of a PCIe 4.0 board
        gpu = dataclasses.replace(like, name="device", link_gb_s=32.0, network_gb_s=12.5)
    for flag in ("gpus", "gpus_per_node", *own, "link"):
        value = getattr(options, flag)
        if value is not None and not 0 < value < float("inf"):
            raise RequestError(f"{flag_of(flag)} {value}: must be above 0")
    if options.gpus > options.gpus_per_node and options.gpus % options.gpus_per_node:
        raise RequestError(
            f"--gpus {options.gpus} does not fill nodes of {options.gpus_per_node}: give whole ones, or --gpus-per-node"
        )
    said = {
        "peak_tflops": options.peak_tflops,
        "memory_gib": options.memory_gb,
        "bandwidth_gb_s": options.bandwidth,
        "link_gb_s": options.link,
        "network_gb_s": _network(options.interconnect, options.gpus_per_node),
    }
    gpu = dataclasses.replace(gpu, **{field: value for field, value in said.items() if value is not None})
    return Cluster(gpu, options.gpus, options.gpus_per_node)


def _network(text: str | None, gpus_per_node: int) -> float | None:
    """GB/s of a GPU to other nodes: as it stands, or of a node's adapters, NUMBERxGIGABITS."""
    if text is None:
        return None
    found = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)", text)
    value = 0.0 if found is None else float(found[2])
    if found is not None and found[1]:
        value = int(found[1]) * value / 8 / gpus_per_node
    if value <= 0:
        raise RequestError(
            f"--interconnect {text}: give the GB/s of one GPU to other nodes, such as 25, or a node's adapters as "
            "NUMBERxGIGABITS, such as 8x200"
        )
    return value
