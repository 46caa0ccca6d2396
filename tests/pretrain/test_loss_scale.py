"""Which loss scale a continued run begins with, and that none makes a step of numbers that are not finite."""

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

    def begin(name: str, flags: dict[str, Any], load: str | None = None, iterations: int = 2) -> tuple[float, str]:
        file = folder / f"{name}.jsonl"
        paths = {"data_path": corpus, "metrics": file, "save": folder / name, "load": load and folder / load}
        said = train(command(**paths, train_iters=iterations, lr_warmup_iters=0, **flags))
        return metrics(file)[0]["loss_scale"], next((line for line in said.splitlines() if "loss scale" in line), "")

    begin("float32", {})
    return {
        "of float32": begin("dynamic", GROWS, "float32", 4),
        "of float32, constant": begin("constant", FP16 | {"loss_scale": 128}, "float32", 4),
        "of dynamic, same command": begin("same", GROWS, "dynamic", 5),
        "of dynamic, flag left out": begin("left", FP16, "dynamic", 5),
        "of dynamic, flag changed": begin("changed", GROWS | {"initial_loss_scale": 64}, "dynamic", 5),
        "of dynamic, larger least": begin("least", FP16 | {"min_loss_scale": 8192}, "dynamic", 5),
        "of dynamic, constant": begin("held", FP16 | {"loss_scale": 128}, "dynamic", 5),
        "of dynamic, bf16": begin("bf16", {"bf16": True}, "dynamic", 5),
        "of constant": begin("anew", FP16 | {"initial_loss_scale": 256}, "constant", 5),
    }


def test_flags_beat_the_checkpoints_scale(pool: Pool, corpus: str, tmp_path: Path) -> None:
    (found,) = pool.run(scales_at_start, 1, tmp_path, corpus)
    anew, continued = "dynamic, as --initial-loss-scale says", "dynamic, as the checkpoint left it"
    assert {name: (scale, line.strip()) for name, (scale, line) in found.items()} == {
        "of float32": (1024, f"loss scale 1024, {anew}"),
        "of float32, constant": (128, "loss scale 128, constant"),
        "of dynamic, same command": (4096, f"loss scale 4096, {continued}"),  # it doubled twice
        "of dynamic, flag left out": (4096, f"loss scale 4096, {continued}"),
        "of dynamic, flag changed": (64, f"loss scale 64, {anew}"),
        "of dynamic, larger least": (8192, "loss scale 8192, dynamic, raised to --min-loss-scale"),
        "of dynamic, constant": (128, "loss scale 128, constant"),
        "of dynamic, bf16": (1, ""),
        "of constant": (256, f"loss scale 256, {anew}"),
    }


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
