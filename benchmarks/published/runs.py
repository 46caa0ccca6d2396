"""Published runs as configurations: `runs.csv`, a run a line with its source, and vTrain's file of 1,440."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

from megatron_ext.engine import BatchConfig, EngineConfig, RecomputeConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import ParallelConfig
from megatron_ext.models import ModelConfig
from megatron_ext.optim import PrecisionConfig
from megatron_ext.pipeline import PipelineConfig
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.gpus import gpu_named
from megatron_ext.planner.plan import Plan
from megatron_ext.planner.program import program_named
from megatron_ext.zero import ZeroConfig

_LAYER_NORM = {"normalization": "LayerNorm", "activation": "gelu-tanh"}
_LEARNED = {"position_embedding_type": "learned_absolute", "untie_embeddings_and_output_weights": False}
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {**_LAYER_NORM, **_LEARNED, "add_bias_linear": True},
    "mpt": {**_LAYER_NORM, **_LEARNED},
    "glm": {"normalization": "LayerNorm", "add_bias_linear": True},
    "nemotron": _LAYER_NORM,
    "llama": {},
}
_NODE = 8
_INTEGERS = (
    *("layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "seq", "gpus", "tp", "pp", "chunks"),
    *("sequence_parallel", "zero", "micro_batch", "global_batch"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """seconds: of a step, as published."""

    group: str
    source: str
    model: str
    seconds: float
    plan: Plan

    @property
    def error(self) -> float:
        """Of the predicted step time, as a share of the published."""
        return self.plan.step.seconds / self.seconds - 1


def published_runs() -> list[Run]:
    with (Path(__file__).parent / "runs.csv").open(encoding="utf-8", newline="") as file:
        return [_run(row) for row in csv.DictReader(file)]


def vtrain_runs(file: str) -> list[Run]:
    """The runs of one of vTrain's tables (arXiv 2312.12391; data/ground_truth_*.csv of its code): Megatron-DeepSpeed on
    A100-80GB, full recomputation, 50,257 tokens; nodes with 800 Gb/s (its configurations). Raises RequestError."""
    columns = ["gpus", "global_batch", "micro_batch", "hidden", "heads", "layers", "seq", "tp", "dp", "pp", "ms"]
    fixed = {"program": "megatron-lm-2021", "family": "gpt", "source": "arXiv 2312.12391"}
    fixed |= {"vocab": "50257", "gpu": "a100-80g", "chunks": "1", "sequence_parallel": "0", "zero": "0"}
    try:
        with Path(file).open(encoding="utf-8-sig", newline="") as lines:
            # the table of several nodes begins with the billions of parameters
            rows = [dict(zip(columns, line[-len(columns) :], strict=True)) for line in csv.reader(lines)][1:]
        runs = []
        for row in rows:
            several = int(row["gpus"]) > _NODE
            group = {"group": "vTrain, several nodes" if several else "vTrain, one node"}
            hidden, seconds = int(row["hidden"]), float(row["ms"]) / 1e3
            more = {"ffn": str(4 * hidden), "kv_heads": row["heads"], "recompute": "full", "seconds": str(seconds)}
            row = row | fixed | group | more | {"model": f"h{hidden} L{row['layers']}"}
            runs.append(_run(row, network_gb_s=12.5 if several else None))
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"--vtrain {file}: not a table of vTrain's ({error})") from error
    return runs


def _run(row: dict[str, str], network_gb_s: float | None = None) -> Run:
    n = {name: int(row[name]) for name in _INTEGERS}
    model = ModelConfig(
        num_layers=n["layers"],
        hidden_size=n["hidden"],
        ffn_hidden_size=n["ffn"],
        num_attention_heads=n["heads"],
        num_query_groups=n["kv_heads"],
        vocab_size=n["vocab"],
        max_position_embeddings=n["seq"],
        **_FAMILIES[row["family"]],
    )
    microbatches = n["global_batch"] * n["tp"] * n["pp"] // (n["gpus"] * n["micro_batch"])
    config = EngineConfig(
        model,
        batch=BatchConfig(n["micro_batch"], n["global_batch"], n["seq"]),
        parallel=ParallelConfig(n["tp"], n["pp"], bool(n["sequence_parallel"])),
        pipeline=_pipeline(n["layers"], n["pp"], n["chunks"], microbatches),
        zero=ZeroConfig(n["zero"]),
        precision=PrecisionConfig(bf16=True),
        recompute=RecomputeConfig(None if row["recompute"] == "none" else row["recompute"]),
    )
    gpu = gpu_named(row["gpu"])
    if network_gb_s is not None:
        gpu = dataclasses.replace(gpu, network_gb_s=network_gb_s)
    cluster = Cluster(gpu, n["gpus"], _NODE)
    plan = Plan(config, cluster, program_named(row["program"]))
    return Run(row["group"], row["source"], row["model"], float(row["seconds"]), plan)


def _pipeline(layers: int, pp: int, chunks: int, microbatches: int) -> PipelineConfig:
    """As many layers everywhere, as those programs have it, the first stages with one more where it must be.

    1F1B of fewer microbatches than stages, which torch's cannot run, takes as long as GPipe.
    """
    if pp == 1:
        return PipelineConfig()
    each, more = divmod(layers, pp * chunks)
    counts = tuple(each + (i < more) for i in range(pp * chunks))
    if chunks > 1:
        return PipelineConfig("interleaved", chunks, counts)
    return PipelineConfig("1f1b" if microbatches >= pp else "gpipe", None, counts)
