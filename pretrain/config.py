"""One run, described: the engine's configuration, the data's, and what is only the run's own."""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.engine import EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.launch import world_size_from_environment
from megatron_ext.option import flag_of, option, refuse_unused
from pretrain.checkpoints import CheckpointConfig
from pretrain.data import DataConfig


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    train_iters: int | None = option(None, "optimizer steps of the whole run (required)")
    exit_interval: int | None = option(None, "stop after an iteration divisible by this, saving if --save is given")
    eval_interval: int | None = option(None, "iterations between evaluations on the validation split (default: none)")
    eval_iters: int = option(10, "batches of one evaluation")
    seed: int = option(1234, "of the initial weights and of the order of the samples")

    def validate(self) -> None:
        if self.train_iters is None:
            raise RequestError("--train-iters is required: the number of optimizer steps of the whole run")
        for name in ("train_iters", "exit_interval", "eval_interval", "eval_iters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{flag_of(name)} {value}: must be at least 1")
        if self.eval_interval is None:
            refuse_unused(self, ("eval_iters",), "--eval-interval")
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"--seed {self.seed}: must be from 0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    log_interval: int = option(1, "iterations between lines on the console")
    metrics: str | None = option(None, "file that gets one JSON object per iteration", metavar="FILE.jsonl")
    tensorboard_dir: str | None = option(None, "folder of TensorBoard event files", metavar="DIR")
    wandb_project: str | None = option(None, "Weights & Biases project (WANDB_MODE=offline keeps it local)")
    wandb_exp_name: str | None = option(None, "name of the run in Weights & Biases")
    wandb_save_dir: str | None = option(None, "folder of Weights & Biases files", metavar="DIR")
    peak_tflops: float | None = option(
        None, "dense peak of one device, for MFU (default: known from the GPU's name, in bf16)"
    )
    report_memory: bool = option(
        False, "measure weights, gradients, optimizer states and the peak on every pipeline rank, beside the formula"
    )

    def validate(self) -> None:
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise RequestError(f"--peak-tflops {self.peak_tflops}: must be above 0")
        if self.log_interval < 1:
            raise RequestError(f"--log-interval {self.log_interval}: must be at least 1")
        if self.wandb_project is None and (self.wandb_exp_name or self.wandb_save_dir):
            raise RequestError("--wandb-exp-name and --wandb-save-dir need --wandb-project")
        if self.metrics is not None and not Path(self.metrics).resolve().parent.is_dir():
            raise RequestError(f"--metrics {self.metrics}: its folder does not exist")
        if self.metrics is not None and Path(self.metrics).is_dir():
            raise RequestError(f"--metrics {self.metrics}: is a folder; name a file in it")


@dataclasses.dataclass(frozen=True)
class DryRunConfig:
    dry_run: bool = option(False, "check everything, show what every rank would hold, and end; needs no GPU")
    world_size: int | None = option(
        None, "with --dry-run: how many ranks there would be (default: as many as there are)"
    )

    def validate(self) -> None:
        if not self.dry_run:
            refuse_unused(self, ("world_size",), "--dry-run: torchrun says how many ranks there are")
        if self.world_size is not None and self.world_size < 1:
            raise RequestError(f"--world-size {self.world_size}: must be at least 1")

    @property
    def ranks(self) -> int:
        """Ranks of the run, real or not."""
        return world_size_from_environment() if self.world_size is None else self.world_size


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run was asked for, resolved: presets and files applied, nothing left to guess."""

    engine: EngineConfig
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    dry: DryRunConfig
    callbacks: tuple[str, ...] = ()  # MODULE:CLASS each, of the command line alone

    @classmethod
    def kinds(cls) -> dict[str, type]:
        """List the groups of flags by name, the engine's first."""
        fields = typing.get_type_hints(EngineConfig) | typing.get_type_hints(cls)
        groups = {name: kind for name, kind in fields.items() if name != "engine" and isinstance(kind, type)}
        return {name: kind for name, kind in groups.items() if dataclasses.is_dataclass(kind)}

    @classmethod
    def of(cls, groups: Mapping[str, Any], callbacks: tuple[str, ...] = ()) -> "RunConfig":
        """Put a run together of its groups."""
        own = {field.name for field in dataclasses.fields(cls)} & groups.keys()
        engine = {name: group for name, group in groups.items() if name not in own}
        training: TrainingConfig = groups["training"]
        own_groups = {name: groups[name] for name in own}
        return cls(EngineConfig(**engine, seed=training.seed), **own_groups, callbacks=callbacks)

    def groups(self) -> dict[str, Any]:
        """The groups by name, in the order of `kinds`."""
        known = vars(self.engine) | vars(self)
        return {name: known[name] for name in self.kinds()}
