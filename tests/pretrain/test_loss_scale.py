"""Which loss scale a continued run begins with, and that none makes a step of numbers that are not finite."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.engine import Engine
from megatron_ext.mesh import build_grid
from megatron_ext.optim import LossScaler, PrecisionConfig
from tests.distributed import Pool
from tests.megatron_ext.training import LR, global_batch, tiny, whole_parameters
from tests.pretrain.support import command, metrics, train
from tests.pretrain.test_data import write_corpus

FP16: dict[str, Any] = {"fp16": True}
GROWS: dict[str, Any] = {"fp16": True, "initial_loss_scale": 1024, "loss_scale_window": 1}  # with every step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c")


def scales_at_start(folder: Path, corpus: str) -> dict[str, tuple[float, str]]:
    """The scale of the first step of runs that continue others, and what the run says of it."""

    def begin(flags: dict[str, Any], load: str | None = None, save: str | None = None) -> tuple[float, str]:
        iterations = {None: 1, "float32": 2}.get(load, 3)
        paths = {"data_path": corpus, "metrics": folder / "m.jsonl", "save": save, "load": load}
        said = train(command(**paths, train_iters=iterations, lr_warmup_iters=0, **flags))
        record = metrics(folder / "m.jsonl")[-1]
        return record["loss_scale"], next((line for line in said.splitlines() if line.startswith(" loss scale")), "")

    os.chdir(folder)
    begin({}, save="float32")
    return {
        "of float32": begin(GROWS, "float32", save="dynamic"),
        "of dynamic": begin(GROWS, "dynamic"),
        "of dynamic, constant": begin(FP16 | {"loss_scale": 128}, "dynamic"),
    }


def test_flags_beat_the_checkpoints_scale(pool: Pool, corpus: str, tmp_path: Path) -> None:
    (found,) = pool.run(scales_at_start, 1, tmp_path, corpus)
    assert {name: (scale, line.strip()) for name, (scale, line) in found.items()} == {
        "of float32": (1024, "loss scale 1024, dynamic, as --initial-loss-scale says"),
        "of dynamic": (2048, "loss scale 2048, dynamic, as the checkpoint left it"),  # it doubled
        "of dynamic, constant": (128, "loss scale 128, constant"),
    }


WRITTEN = {
    "in float32": PrecisionConfig(),
    "constant": PrecisionConfig(fp16=True, loss_scale=64.0),
    "from 1024": PrecisionConfig(fp16=True, initial_loss_scale=1024.0),
    "from the default": PrecisionConfig(fp16=True),
}


@pytest.mark.parametrize(
    "written, flags, expected",
    [
        ("in float32", {}, "loss scale 4.29497e+09, dynamic, as --initial-loss-scale says"),
        ("in float32", {"loss_scale": 128.0}, "loss scale 128, constant"),
        ("constant", {"initial_loss_scale": 256.0}, "loss scale 256, dynamic, as --initial-loss-scale says"),
        ("from 1024", {"initial_loss_scale": 1024.0}, "loss scale 2048, dynamic, as the checkpoint left it"),
        ("from 1024", {}, "loss scale 2048, dynamic, as the checkpoint left it"),
        ("from 1024", {"initial_loss_scale": 64.0}, "loss scale 64, dynamic, as --initial-loss-scale says"),
        ("from the default", {"initial_loss_scale": 64.0}, "loss scale 64, dynamic, as --initial-loss-scale says"),
        ("from 1024", {"min_loss_scale": 8192.0}, "loss scale 8192, dynamic, raised to --min-loss-scale"),
    ],
)
def test_what_a_continued_run_takes_over(written: str, flags: dict[str, float], expected: str) -> None:
    scaler = LossScaler(PrecisionConfig(fp16=True, **flags), torch.device("cpu"))
    scaler.resume(torch.tensor([2048.0, 3.0, 2.0]), WRITTEN[written])
    assert scaler.describe() == expected


def test_good_steps_and_tolerance_go_on() -> None:
    now = PrecisionConfig(fp16=True, hysteresis=3, min_loss_scale=16.0)
    scaler = LossScaler(now, torch.device("cpu"))
    scaler.resume(torch.tensor([8.0, 7.0, -2.0]), PrecisionConfig(fp16=True, hysteresis=5))
    assert scaler.state.tolist() == [16, 7, -2]
    scaler.resume(torch.tensor([64.0, 7.0, 5.0]), PrecisionConfig(fp16=True, hysteresis=5))
    assert scaler.state.tolist() == [64, 7, 3]


def test_a_scale_stays_within_float32() -> None:
    scaler = LossScaler(
        PrecisionConfig(fp16=True, initial_loss_scale=2.0**126, loss_scale_window=1), torch.device("cpu")
    )
    for _ in range(3):  # good ones, as those of batches that are masked whole
        scaler.update(torch.zeros(()))
    assert scaler.scale == 2.0**127


def step_of_scale(scale: float) -> tuple[list[float], bool]:
    """A step with this scale, however it came about: its figures, and whether it changed anything."""
    config = tiny(fp16=True, initial_loss_scale=1.0, min_loss_scale=1e-30)
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    before = {name: weight.clone() for name, weight in whole_parameters(engine).items()}
    engine.loss_scaler.state[0] = scale
    figures = engine.train_step(global_batch(config, 0), LR).tolist()
    return figures, any(not torch.equal(weight, before[name]) for name, weight in whole_parameters(engine).items())


@pytest.mark.parametrize("scale, trains", [(1e-42, False), (float("inf"), False), (float("nan"), False), (1.0, True)])
def test_a_step_whose_factor_is_not_finite_changes_nothing(pool: Pool, scale: float, trains: bool) -> None:
    ((*_, skipped), changed), = pool.run(step_of_scale, 1, scale)  # fmt: skip
    assert (skipped == 0, changed) == (trains, trains)
