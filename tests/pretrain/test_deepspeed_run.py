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
COMMON = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 1e3}
FILES: dict[int, dict[str, Any]] = {
    2: AUTO
    | {
        "zero_optimization": COMMON
        | {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "reduce_scatter": True,
        }
    },
    3: AUTO
    | {
        "zero_optimization": COMMON
        | {
            "stage": 3,
            "offload_optimizer": {"device": "none"},
            "offload_param": {"device": "none"},
            "sub_group_size": 1e9,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
        }
    },
}


def held(arguments: list[str]) -> tuple[int, int]:
    """Trains, and says what DeepSpeed made of it: its reduction buckets, and how many parameters it does not shard."""
    train(arguments)
    engine = Engine(parse(arguments).engine(), build_grid(parse(arguments).parallel, torch.device("cpu")))
    (stage,) = engine.stages.values()
    whole = [getattr(p, "ds_persist", True) for p in engine.parameters.values()]
    return stage.engine.zero_reduce_bucket_size(), sum(whole)


@pytest.mark.parametrize("stage", FILES)
def test_a_file_of_settings(pool: Pool, tmp_path: Path, stage: int) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(FILES[stage]))
    flags: dict[str, Any] = {
        "data_path": write_corpus(tmp_path / "c"),
        "train_iters": 5,
        "zero_engine": "deepspeed",
        "zero_stage": stage,
        "offload_optimizer": "cpu" if stage == 2 else None,
    }
    plain, with_file = tmp_path / "plain.jsonl", tmp_path / "file.jsonl"
    (default_buckets, default_whole), _ = pool.run(held, 2, command(**flags, metrics=plain))
    (buckets, whole), _ = pool.run(held, 2, command(**flags, metrics=with_file, deepspeed_config=file))
    assert (default_buckets, buckets) == (500_000_000, 1000)
    assert default_whole > 0
    assert whole == (default_whole if stage == 2 else 0)
    assert len(curve(plain)) == 5
    for step, expected in zip(curve(with_file), curve(plain), strict=True):
        assert step == pytest.approx(expected, rel=1e-5)
