"""One run, described: the engine's configuration, the data's, and what is only the run's own."""

import dataclasses
from pathlib import Path

from megatron_ext.checkpoint import find_checkpoint, has_checkpoints
from megatron_ext.engine import BatchConfig, EngineConfig, RecomputeConfig
from megatron_ext.errors import RequestError
from megatron_ext.kernels import KernelConfig
from megatron_ext.launch import world_size_from_environment
from megatron_ext.mesh import ParallelConfig
from megatron_ext.models import ModelConfig
from megatron_ext.models.expand import METHODS
from megatron_ext.optim import OptimizerConfig, PrecisionConfig, TrainableConfig
from megatron_ext.option import option, refuse_unused
from megatron_ext.pipeline import PipelineConfig
from megatron_ext.tensor_parallel import LoraConfig
from megatron_ext.zero import ZeroConfig
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
                raise RequestError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.eval_interval is None:
            refuse_unused(self, ("eval_iters",), "--eval-interval")
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"--seed {self.seed}: must be from 0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    save: str | None = option(None, "folder of checkpoints to write", metavar="DIR")
    load: str | None = option(None, "folder of checkpoints, or one checkpoint, to continue from", metavar="DIR")
    save_interval: int | None = option(None, "iterations between checkpoints (default: only at the end)")
    async_save: bool = option(False, "write checkpoints in the background")
    finetune: bool = option(False, "take only the weights from --load, and start at iteration 0")
    embedding_init: str | None = option(
        None, "--load has a smaller vocabulary: how the rows of the tokenizer's new pieces begin", choices=METHODS
    )
    base_tokenizer_model: str | None = option(
        None, "SentencePiece model of the checkpoint, which --tokenizer-model extends", metavar="FILE"
    )
    embedding_norm_correction: bool = option(False, "scale new rows to the mean norm of the old ones")
    change_tokenizer: bool = option(
        False, "with --finetune: train on with another tokenizer than the checkpoint's, whose ids mean other pieces"
    )

    def validate(self) -> None:
        if self.save is None:
            for name in ("save_interval", "async_save"):
                if getattr(self, name):
                    raise RequestError(f"--{name.replace('_', '-')} needs --save")
        if self.save_interval is not None and self.save_interval < 1:
            raise RequestError(f"--save-interval {self.save_interval}: must be at least 1")
        if self.finetune and self.load is None:
            raise RequestError("--finetune needs --load")
        if self.change_tokenizer and not self.finetune:
            raise RequestError(
                "--change-tokenizer needs --load and --finetune: optimizer states and the place in the data belong to "
                "the old tokenizer and cannot go on"
            )
        if self.change_tokenizer and self.embedding_init is not None:
            raise RequestError("--change-tokenizer has no effect with --embedding-init, which changes it too")
        self._validate_resize()
        if self.save is not None and has_checkpoints(self.save) and not self.continues_in_place:
            raise RequestError(
                f"--save {self.save} holds checkpoints of another run: continue it with --load {self.save}, "
                "or choose another folder"
            )

    def _validate_resize(self) -> None:
        if self.embedding_init is None:
            refuse_unused(self, ("base_tokenizer_model", "embedding_norm_correction"), "--embedding-init")
            return
        if not self.finetune:
            raise RequestError(
                f"--embedding-init {self.embedding_init} needs --load and --finetune: optimizer states and the place "
                "in the data belong to the old vocabulary and cannot go on"
            )
        if self.continues_in_place:
            raise RequestError(f"--save {self.save}: with --embedding-init choose another folder than --load's")
        if self.base_tokenizer_model is None:
            raise RequestError(
                f"--embedding-init {self.embedding_init} needs --base-tokenizer-model: the tokenizer that the "
                "checkpoint was trained with"
            )

    @property
    def continues_in_place(self) -> bool:
        """Checkpoints go where they come from: the command with which a run is both started and restarted."""
        if self.save is None or self.load is None:
            return False
        return Path(self.save).resolve() in (Path(self.load).resolve(), Path(self.load).resolve().parent)

    def find(self) -> Path | None:
        """The checkpoint to load, None to start anew. Raises RequestError where --load names none.

        A restartable command names one folder for --save and --load; the first time there is nothing in it.
        """
        if self.load is None or (self.continues_in_place and not has_checkpoints(self.load)):
            return None
        return find_checkpoint(self.load)


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

    model: ModelConfig
    batch: BatchConfig
    parallel: ParallelConfig
    pipeline: PipelineConfig
    zero: ZeroConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    kernels: KernelConfig
    recompute: RecomputeConfig
    trainable: TrainableConfig
    lora: LoraConfig
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    dry: DryRunConfig

    def engine(self) -> EngineConfig:
        shared = {field.name for field in dataclasses.fields(EngineConfig)} - {"seed"}
        return EngineConfig(**{name: getattr(self, name) for name in shared}, seed=self.training.seed)
