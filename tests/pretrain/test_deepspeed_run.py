"""A run with a file of DeepSpeed's settings, written as Hugging Face's users write it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.engine import Engine
from megatron_ext.mesh import build_grid
from pretrain.flags import parse
from tests.distributed import Pool
from tests.pretrain.support import command, curve, train
from tests.pretrain.test_data import write_corpus
from tests.slow import sweep

pytest.importorskip("deepspeed")

AUTO = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
# with everything that has an effect at the stage set to other than its default
BUCKETS = {"contiguous_gradients": True, "reduce_bucket_size": 1e3}
PARTITIONS = {"use_multi_rank_bucket_allreduce": False, "allgather_bucket_size": 5e2, "parameter_alignment": True}
ZERO: dict[int, dict[str, Any]] = {
    1: {"stage": 1, **BUCKETS, **PARTITIONS, "overlap_comm": True, "reduce_scatter": False},
    2: {
        "stage": 2,
        **BUCKETS,
        **PARTITIONS,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "allgather_partitions": True,
        "overlap_comm": True,
    },
    3: {
        "stage": 3,
        **BUCKETS,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
        "overlap_comm": False,
        "reduce_scatter": False,
        "sub_group_size": 1e3,
        "memory_efficient_linear": True,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0,
        "stage3_model_persistence_threshold": 1e3,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_module_granularity_threshold": 100,
        "stage3_use_all_reduce_for_fetch_params": True,
        "stage3_allgather_sequential": True,
    },
}


def train_and_look(arguments: list[str]) -> tuple[int, int]:
    """The size of DeepSpeed's reduction buckets, and how many parameters it does not shard, after a run."""
    train(arguments)
    engine = Engine(parse(arguments).engine, build_grid(parse(arguments).engine.parallel, torch.device("cpu")))
    (stage,) = engine.stages.values()
    whole = [getattr(p, "ds_persist", True) for p in engine.parameters.values()]
    return stage.engine.zero_reduce_bucket_size(), sum(whole)


@pytest.mark.parametrize("stage", sweep(ZERO, {3}))
def test_a_file_of_settings(pool: Pool, tmp_path: Path, stage: int) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(AUTO | {"zero_optimization": ZERO[stage]}))
    flags: dict[str, Any] = {
        "data_path": write_corpus(tmp_path / "c"),
        "train_iters": 3,
        "zero_engine": "deepspeed",
        "zero_stage": stage,
        "offload_optimizer": "cpu" if stage == 2 else None,
    }
    plain, with_file = tmp_path / "plain.jsonl", tmp_path / "file.jsonl"
    (default_buckets, default_whole), _ = pool.run(train_and_look, 2, command(**flags, metrics=plain))
    (buckets, whole), _ = pool.run(train_and_look, 2, command(**flags, metrics=with_file, deepspeed_config=file))
    assert (default_buckets, buckets) == (50_000_000, 1000)
    assert default_whole > 0
    assert whole == (0 if stage == 3 else default_whole)
    assert len(curve(plain)) == 3
    for step, expected in zip(curve(with_file), curve(plain), strict=True):
        assert step == pytest.approx(expected, rel=1e-5)
