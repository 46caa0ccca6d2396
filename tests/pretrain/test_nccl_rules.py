"""Every schedule trains, evaluates between its steps and resumes under NCCL's rules for messages, and evaluation leaves
no trace: tests/megatron_ext/nccl_double.py."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Pool
from tests.megatron_ext.nccl_double import nccl_rules
from tests.pretrain.support import command, curve, metrics, train
from tests.pretrain.test_data import write_corpus

TIED: dict[str, Any] = {"no-untie_embeddings_and_output_weights": True}
EAGER = "a device bound to the world"


def run_thrice(folder: Path, flags: dict[str, Any], eager: bool) -> None:
    """Without evaluation, and in two parts with it. The second only under NCCL's rules."""
    flags = {"num_layers": 4, "train_iters": 3, "lr_warmup_iters": 0, "data_path": folder / "c", **flags}
    train(command(**flags, metrics=folder / "plain.jsonl"))
    flags |= {"save": folder / "saved", "load": folder / "saved", "metrics": folder / "ruled.jsonl"}
    flags |= {"eval_interval": 1, "eval_iters": 1}
    with nccl_rules(eager):
        train(command(**flags, exit_interval=2))
        train(command(**flags))


@pytest.mark.parametrize(
    "schedule, pp, dp, more",
    [
        ("gpipe", 2, 1, TIED),
        ("1f1b", 4, 1, TIED),
        ("interleaved", 2, 2, {"zero_stage": 3}),
        ("zero-bubble", 2, 1, {"num_virtual_stages_per_pipeline_rank": 2, **TIED}),
        ("zbv", 2, 1, TIED),
        ("dualpipev", 2, 1, {}),
        *(
            pytest.param(schedule, pp, dp, more, marks=pytest.mark.slow)
            for schedule, pp, dp, more in (
                ("gpipe", 4, 2, {"zero_stage": 2}),
                ("1f1b", 2, 2, {"zero_stage": 3, **TIED}),
                ("1f1b", 2, 1, {EAGER: True, **TIED}),
                ("interleaved", 4, 1, {"num_layers": 8, **TIED}),
                ("interleaved", 4, 1, {"num_layers": 8, EAGER: True}),
                ("zero-bubble", 4, 2, {"zero_stage": 3, **TIED}),
                ("zero-bubble", 4, 1, {"num_layers": 8, "num_virtual_stages_per_pipeline_rank": 2, EAGER: True}),
                ("zbv", 2, 2, {"zero_stage": 3}),
                ("zbv", 4, 1, {"num_layers": 8, **TIED}),
                ("zbv", 2, 1, {EAGER: True}),
                ("dualpipev", 2, 2, {"zero_stage": 2}),
                ("dualpipev", 4, 1, {"num_layers": 8, **TIED}),
                ("dualpipev", 4, 1, {"num_layers": 8, EAGER: True}),
            )
        ),
    ],
)
def test_schedules_run_and_resume(
    pool: Pool, tmp_path: Path, schedule: str, pp: int, dp: int, more: dict[str, Any]
) -> None:
    write_corpus(tmp_path / "c")
    batch = 2 * pp * dp  # as few microbatches as dualpipev takes
    flags = {"pipeline_schedule": schedule, "pipeline_model_parallel_size": pp, "global_batch_size": batch, **more}
    flags["micro_batch_size"] = 1
    eager = flags.pop(EAGER, False)
    pool.run(run_thrice, pp * dp, tmp_path, flags, eager)
    assert curve(tmp_path / "ruled.jsonl") == curve(tmp_path / "plain.jsonl")
    assert all("valid_loss" in record for record in metrics(tmp_path / "ruled.jsonl"))
