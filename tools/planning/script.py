"""A plan as something to run: the flags of `python -m pretrain`, and a launch script."""

import dataclasses
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_ext.engine import EngineConfig
from megatron_ext.option import flag_of
from megatron_ext.planner.plan import Plan

LAYOUT_GROUPS = ("batch", "parallel", "pipeline", "zero", "recompute")
_GIVEN = ("global_batch_size", "seq_length")  # of these groups, but no layout's to decide
_VARIABLES = {  # of examples/model.sh, which makes flags of them
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "micro_batch_size": "MICRO_BATCH_SIZE",
    "zero_stage": "ZERO_STAGE",
    "recompute_granularity": "RECOMPUTE",
}
_OF_A_RUN = ("data_path", "tokenizer_model", "load", "save", "save_interval", "metrics", "train_iters", "bf16")


def layout_flags(config: EngineConfig, without: Collection[str] = ()) -> list[list[str]]:
    """List a flag and its value for whatever differs from pretrain's defaults; degrees, microbatch and ZeRO always."""
    flags = []
    for group in LAYOUT_GROUPS:
        part = getattr(config, group)
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            always = field.name in _VARIABLES and value is not None
            if field.name not in (*_GIVEN, *without) and (always or value != field.default):
                flags.append(_spell(field.name, value))
    return flags


def launch_script(plan: Plan, settings: dict[str, Any], title: str) -> str:
    """Write a script like those in examples/. settings: what was asked for by field name, and no layout decides."""
    config, cluster = plan.config, plan.cluster
    decided = {field.name for group in LAYOUT_GROUPS for field in dataclasses.fields(getattr(config, group))} - {
        *_GIVEN
    }
    flags = [
        _spell(name, value)
        for name, value in settings.items()
        if value is not None and name not in decided and name not in _OF_A_RUN
    ]
    if not config.precision.bf16:
        flags.append(["--no-bf16"])  # examples/model.sh's choice
    flags += layout_flags(config, without=[*_VARIABLES, "sequence_parallel"])
    if config.parallel.tensor_model_parallel_size > 1 and not config.parallel.sequence_parallel:
        flags.append(["--no-sequence-parallel"])
    values = {flag[0]: flag[-1] for flag in layout_flags(config)}
    nodes = {
        "NNODES": -(-cluster.gpus // cluster.gpus_per_node),
        "GPUS_PER_NODE": min(cluster.gpus, cluster.gpus_per_node),
    }
    layout = {variable: values.get(flag_of(name), "none") for name, variable in _VARIABLES.items()}
    steps = settings.get("train_iters") or 1000
    lines = [
        "#!/usr/bin/env bash",
        f"# {title}",
        "# Data, tokenizer, output and nodes are variables: examples/model.sh. TRAIN_ITERS: steps; --lr and the like",
        "# as flags. Try it with --dry-run first.",
        "set -euo pipefail",
        f"source {shlex.quote(str(Path(__file__).resolve().parents[2] / 'examples' / 'model.sh'))}",
        "",
        _defaults(nodes),
        _defaults(layout | {"TRAIN_ITERS": steps}),
        "",
        "train \\",
        *(f"    {shlex.join(flag)} \\" for flag in flags),
        '    --train-iters "$TRAIN_ITERS" "$@"',
    ]
    return "\n".join(lines) + "\n"


def _defaults(values: dict[str, Any]) -> str:
    return ": " + " ".join(f'"${{{name}:={value}}}"' for name, value in values.items())


def _spell(name: str, value: Any) -> list[str]:
    flag = flag_of(name)
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)] if value and isinstance(value[0], str) else [flag, ",".join(map(str, value))]
    return [flag, str(value)]
