"""Plans in words, tables and JSON."""

import dataclasses
from typing import Any

from megatron_ext.engine import EngineConfig
from megatron_ext.models.count import parameters
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.plan import Plan
from megatron_ext.planner.reasons import Alternative, costs
from tokenizer.output import text_table
from tools.planning.script import layout_flags

_GIB = 2**30
_HEAD = ("TP", "PP", "DP", "ZeRO", "schedule", "layers of stages", "microbatch", "recompute")
_FIGURES = ("step s", "tokens/s/GPU", "MFU full", "causal", "bubble", "fullest GiB")


def introduction(base: EngineConfig, cluster: Cluster, name: str) -> str:
    gpu, batch = cluster.gpu, base.batch
    nodes = -(-cluster.gpus // cluster.gpus_per_node)
    compute = str(base.precision.compute).removeprefix("torch.")
    return (
        f"{name}: {parameters(base.model):,} parameters, vocabulary {base.model.vocab_size} | {cluster.gpus} "
        f"{gpu.name} ({gpu.peak_tflops:g} TFLOP/s, {gpu.memory_gib:g} GiB) in {nodes} node{'s' * (nodes > 1)}; links "
        f"{gpu.link_gb_s:g} GB/s, network {gpu.network_gb_s:g} GB/s a GPU | a step is {batch.global_batch_size} "
        f"sequences of {batch.seq_length} tokens, computed in {compute}"
    )


def table(plans: list[Plan]) -> str:
    return text_table([*_HEAD, *_FIGURES], [[*_cells(plan), *_figures(plan)] for plan in plans])


def _cells(plan: Plan) -> list[str]:
    """The layout."""
    config, parallel, layout = plan.config, plan.config.parallel, plan.layout
    return [
        str(parallel.tensor_model_parallel_size) + ("+SP" if parallel.sequence_parallel else ""),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.data_parallel_size(plan.cluster.gpus)),
        str(config.zero.zero_stage),
        layout.schedule,
        _layers([stage.last - stage.first for stage in layout.stages]),
        str(config.batch.micro_batch_size),
        config.recompute.recompute_granularity or "none",
    ]


def _figures(plan: Plan) -> list[str]:
    return [
        f"{plan.step.seconds:.4g}",
        f"{plan.tokens_per_second / plan.cluster.gpus:.0f}",
        f"{plan.mfu():.1%}",
        f"{plan.mfu(causal=True):.1%}",
        f"{plan.step.timeline.bubble:.1%}",
        f"{plan.fullest / _GIB:.1f}",
    ]


def _layers(counts: list[int]) -> str:
    """[10, 10, 9, 10] -> "2x10,9,10"."""
    parts: list[tuple[int, int]] = []
    for count in counts:
        if parts and parts[-1][1] == count:
            parts[-1] = (parts[-1][0] + 1, count)
        else:
            parts.append((1, count))
    return ",".join(str(layers) if times == 1 else f"{times}x{layers}" for times, layers in parts)


def verdict(plan: Plan, memory_share: float) -> str:
    used = f"{plan.fullest / _GIB:.1f} of {plan.cluster.gpu.memory_gib:g} GiB ({plan.memory_share:.0%})"
    if plan.memory_share <= memory_share:
        return f"fits: {used} on the fullest rank"
    if plan.memory_share <= 1:
        return f"may not fit: {used} on the fullest rank, and up to {memory_share:.0%} is safe"
    return f"does not fit: {used} on the fullest rank"


def explanation(plan: Plan, memory_share: float) -> list[str]:
    """Say where the time and the memory go."""
    lines = [verdict(plan, memory_share)]
    shares = sorted(((s / plan.step.seconds, name) for name, s in plan.step.parts.items()), reverse=True)
    lines.append("the step: " + ", ".join(f"{name} {share:.1%}" for share, name in shares if share >= 0.0005))
    rows = []
    for rank, memory in enumerate(plan.memory):
        parts = [memory.states.weights, memory.states.gradients, memory.states.optimizer]
        parts += [memory.working, memory.activations, memory.head, memory.buffers, memory.total]
        rows.append([str(rank), ", ".join(map(str, plan.layout.on_rank(rank))), *(f"{p / _GIB:.2f}" for p in parts)])
    head = ["pipeline rank", "stages", "weights", "gradients", "optimizer", "within a step", "activations", "logits"]
    lines.append("GiB on the fullest rank of each pipeline rank:")
    return [*lines, text_table([*head, "buffers", "total"], rows)]


_NAMES = {"tp": "TP", "pp": "PP", "zero": "ZeRO-", "micro_batch": "microbatch", "recompute": "recompute"}


def explain_alternative(best: Plan, alternative: Alternative, objective: str) -> str:
    """Say in one line what this other decision would cost at its best."""
    name = _NAMES.get(alternative.aspect, "")
    value = alternative.value or "none"
    head = f"why not {name}{'' if name.endswith('-') else ' '}{value}: ".replace("  ", " ")
    other = alternative.plan
    if not alternative.fits:
        return head + f"does not fit; the least is {other.fullest / _GIB:.1f} GiB ({_short(other)})"
    if objective == "memory":
        return head + f"{(other.fullest - best.fullest) / _GIB:.1f} GiB more at least ({_short(other)})"
    slower = other.step.seconds / best.step.seconds - 1
    reasons = ", ".join(f"{part} +{share:.1%}" for part, share in costs(best, other)[:3])
    return head + f"{slower:.1%} slower at best ({_short(other)})" + (f": {reasons}" if reasons else "")


def _short(plan: Plan) -> str:
    tp, pp, dp, zero, schedule, _, size, recompute = _cells(plan)
    return f"TP {tp} PP {pp} DP {dp} ZeRO-{zero} {schedule} microbatch {size} recompute {recompute}"


def as_json(plan: Plan, memory_share: float) -> dict[str, Any]:
    """Give bytes and seconds; flags as for `python -m pretrain`."""
    config = plan.config
    layout = plan.layout
    return {
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "data_parallel_size": config.parallel.data_parallel_size(plan.cluster.gpus),
        "sequence_parallel": config.parallel.sequence_parallel,
        "zero_stage": config.zero.zero_stage,
        "pipeline_schedule": layout.schedule,
        "pipeline_layers": [stage.last - stage.first for stage in layout.stages],
        "micro_batch_size": config.batch.micro_batch_size,
        "recompute_granularity": config.recompute.recompute_granularity,
        "flags": [word for flag in layout_flags(config) for word in flag],
        "step_seconds": plan.step.seconds,
        "step_parts_seconds": plan.step.parts,
        "bubble": plan.step.timeline.bubble,
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_gpu": plan.tokens_per_second / plan.cluster.gpus,
        "tflops_per_gpu": plan.tflops_per_gpu(),
        "mfu_full": plan.mfu(),
        "mfu_causal": plan.mfu(causal=True),
        "fits": plan.memory_share <= memory_share,
        "memory_share": plan.memory_share,
        "memory_bytes": [_memory(rank) for rank in plan.memory],
    }


def _memory(rank: Any) -> dict[str, float]:
    flat = dataclasses.asdict(rank)
    return flat.pop("states") | flat | {"total": rank.total}
