"""The composition: one decoder, cut and sharded in a fixed order, and its optimizer step.

    stages (pp) -> adapters, freezing -> tensor parallelism -> ZeRO -> storage -> initial weights
        -> pipeline schedule -> optimizer

A step runs every microbatch, makes one collective of three scalars, and updates. It never waits for the device,
unless the update is on the host (--offload-optimizer) or DeepSpeed's.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from megatron_ext.attention import Choice
from megatron_ext.errors import RequestError
from megatron_ext.footprint import ModelStates
from megatron_ext.kernels import KernelConfig, load_kernels
from megatron_ext.mesh import ParallelConfig, ProcessGrid
from megatron_ext.models import AttentionInputs, Decoder, ModelConfig, initialize_weights, parameter_shapes
from megatron_ext.models.attention_inputs import chosen_attention
from megatron_ext.models.count import flops_per_token
from megatron_ext.models.names import is_adapter
from megatron_ext.optim import LossScaler, OptimizerConfig, PrecisionConfig, ShardedOptimizer, States, TrainableConfig
from megatron_ext.optim.trainable import select, trained_in_products
from megatron_ext.option import option, refuse_unused
from megatron_ext.pipeline import Pipeline, PipelineConfig, StageLayout, TiedEmbedding, copies_of_tied, plan_stages
from megatron_ext.tensor_parallel import LoraConfig, TensorParallel, add_adapters, distribute_parameters
from megatron_ext.zero import DataParallel, DataParallelStage, DeepSpeedSettings, Optimizer, ZeroConfig

Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    micro_batch_size: int = option(1, "sequences a rank computes at once")
    global_batch_size: int | None = option(None, "sequences of one optimizer step (default: one microbatch per rank)")
    seq_length: int = option(2048, "tokens of a sequence")

    def resolve(self, dp: int) -> "BatchConfig":
        """With the global batch size filled in. Raises RequestError where it cannot be divided."""
        if self.micro_batch_size < 1 or self.seq_length < 1:
            raise RequestError("--micro-batch-size and --seq-length must be at least 1")
        size = self.micro_batch_size * dp if self.global_batch_size is None else self.global_batch_size
        if size < 1 or size % (self.micro_batch_size * dp):
            raise RequestError(
                f"--global-batch-size {size} is not a multiple of --micro-batch-size {self.micro_batch_size} x "
                f"data-parallel size {dp}"
            )
        return dataclasses.replace(self, global_batch_size=size)

    def microbatches(self, dp: int) -> int:
        assert self.global_batch_size is not None
        return self.global_batch_size // (self.micro_batch_size * dp)


@dataclasses.dataclass(frozen=True)
class RecomputeConfig:
    recompute_granularity: str | None = option(
        None, "what is computed again instead of kept: attention cores, or whole layers", choices=("selective", "full")
    )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Everything the engine needs. `validate` refuses what cannot run, before any memory is allocated."""

    model: ModelConfig
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = dataclasses.field(default_factory=PipelineConfig)
    zero: ZeroConfig = dataclasses.field(default_factory=ZeroConfig)
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    kernels: KernelConfig = dataclasses.field(default_factory=KernelConfig)
    recompute: RecomputeConfig = dataclasses.field(default_factory=RecomputeConfig)
    trainable: TrainableConfig = dataclasses.field(default_factory=TrainableConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    seed: int = 1234

    def validate(self, world_size: int) -> "EngineConfig":
        """The same configuration with the global batch size resolved; raises RequestError."""
        self.model.validate()
        self.model.validate_length(self.batch.seq_length)
        if self.zero.zero_stage == 0:
            refuse_unused(self.parallel, ("zero_shard_size",), "--zero-stage 1, 2 or 3")
        dp = self.parallel.data_parallel_size(world_size)
        batch = self.batch.resolve(dp)
        tp = self.parallel.tensor_model_parallel_size
        self.model.validate_tensor_parallel(tp, self.parallel.sequence_parallel, batch.seq_length)
        self.precision.validate()
        self.zero.validate_flags(self.precision.bf16)
        self._validate_trainable()
        self.attention(torch.device("cuda"), torch.device("cpu"))
        pp = self.parallel.pipeline_model_parallel_size
        layout = plan_stages(self.pipeline, self.model, pp, batch.microbatches(dp))
        if tp > 1 and layout.order.splits_backward:
            require_split_backward(layout.schedule)
        resolved = dataclasses.replace(self, batch=batch)
        if self.zero.zero_engine == "deepspeed":
            resolved._validate_deepspeed(dp, layout)
        else:
            self.zero.validate_torch(self.model, tp, self.parallel.zero_shard_size or dp)
        return resolved

    def _validate_trainable(self) -> None:
        if self.adapters is None:
            refuse_unused(self.lora, tuple(f.name for f in dataclasses.fields(self.lora)), "--train-only lora")
        else:
            self.adapters.validate()
            if self.adapters.lora_rank > self.model.hidden_size:
                raise RequestError(
                    f"--lora-rank {self.adapters.lora_rank}: must be at most --hidden-size {self.model.hidden_size}, "
                    "the rank of what it adapts"
                )
        self.trainable.validate(self.model.vocab_size, self.model.tied, parameter_shapes(self.model, self.adapters))

    def _validate_deepspeed(self, dp: int, layout: StageLayout) -> None:
        from megatron_ext.zero.deepspeed.check import check_installed, check_run, check_zero

        check_installed()
        tp, pp = self.parallel.tensor_model_parallel_size, self.parallel.pipeline_model_parallel_size
        refuse_unused(self.parallel, ("zero_shard_size",), "--zero-engine torch")
        check_run(
            pp=pp,
            schedule=layout.schedule,
            one_stage=layout.order.one_stage,
            tied=self.model.tied,
            train_only=self.trainable.train_only,
            compute=self.precision.compute,
            optimizer=self.optimizer.optimizer,
        )
        check_zero(self.zero, self.deepspeed_settings(dp), tp=tp, pp=pp, dp=dp)

    def deepspeed_settings(self, dp: int) -> DeepSpeedSettings:
        """What DeepSpeed gets of this configuration (validated) at this data-parallel size."""
        from megatron_ext.zero.deepspeed.settings import deepspeed_settings

        assert self.batch.global_batch_size is not None
        return deepspeed_settings(
            self.zero,
            micro_batch_size=self.batch.micro_batch_size,
            global_batch_size=self.batch.global_batch_size,
            microbatches=self.batch.microbatches(dp),
            clip_grad=self.optimizer.clip_grad,
            bf16=self.precision.bf16,
        )

    def attention(self, *devices: torch.device, documents: bool = False) -> Choice:
        """The attention backend on the first of `devices` that can, and why. documents: attention stays within them.

        Raises RequestError where that which was asked for can on none of them.
        """
        tp, length = self.parallel.tensor_model_parallel_size, self.batch.seq_length
        kernels, dtype = load_kernels(self.kernels), self.precision.compute
        return chosen_attention(kernels, self.model, length, documents, tp, devices, dtype)

    def flops_per_token(self, causal: bool) -> float:
        """Model FLOPs of what is trained, adapters included; see `models.count.flops_per_token`."""
        trained, adapters = _weights_in_products(self.model, self.adapters, self.trainable)
        return flops_per_token(self.model, self.batch.seq_length, causal, trained, adapters)

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that the model has, if any."""
        return self.lora if self.trainable.train_only == "lora" else None


@functools.lru_cache(maxsize=64)
def _weights_in_products(
    model: ModelConfig, adapters: LoraConfig | None, trainable: TrainableConfig
) -> tuple[int, int]:
    """Those that are trained, and those of adapters."""
    shapes = parameter_shapes(model, adapters)
    trained = trained_in_products(select(trainable, shapes), model.tied)
    return trained, sum(shape.numel() for name, shape in shapes.items() if is_adapter(name))


def require_split_backward(schedule: str) -> None:
    """torch 2.11 cannot split a backward pass at a Python autograd function, which tensor parallelism is made of."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        raise RequestError(
            f"--pipeline-schedule {schedule} with tensor parallelism needs torch 2.13, this is {torch.__version__}: "
            "use --pipeline-schedule 1f1b or interleaved"
        )


class Engine:
    """One rank of a training run: its decoder stages, their schedule and their optimizer. Collective throughout."""

    def __init__(self, config: EngineConfig, grid: ProcessGrid):
        config = config.validate(grid.world_size)
        self.config, self.grid = config, grid
        n_microbatches = config.batch.microbatches(grid.dp_size)
        self.layout = plan_stages(config.pipeline, config.model, grid.size("pp"), n_microbatches)
        tp = TensorParallel.from_grid(grid, config.parallel.sequence_parallel)
        inputs = AttentionInputs(config.model, tp, config.precision.compute, load_kernels(config.kernels))
        if grid.device.type != "meta":
            config.attention(grid.device)
        decoders = {i: self._build_decoder(i, tp, inputs) for i in self.layout.on_rank(grid.rank("pp"))}
        self.stages, self.optimizer = self._with_optimizer(decoders)
        self.parameters = _named_parameters(decoders.values())
        self.tied = TiedEmbedding(list(decoders.values()), grid)
        self.pipeline = Pipeline(
            self.layout, self.stages, grid, n_microbatches, config.batch.micro_batch_size, config.batch.seq_length
        )
        self.loss_scaler = LossScaler(config.precision, grid.device)

    def _build_decoder(self, index: int, tp: TensorParallel, inputs: AttentionInputs) -> Decoder:
        """A stage's decoder on the meta device, cut over tp."""
        config = self.config
        with torch.device("meta"):
            decoder = Decoder(
                config.model,
                self.layout.stages[index],
                tp,
                inputs.kernels,
                config.precision.compute,
                config.recompute.recompute_granularity,
                inputs,
            ).to(config.precision.stored)
            if config.adapters is not None:
                add_adapters(decoder, config.adapters)
        config.trainable.freeze(decoder, config.model.tied)
        distribute_parameters(decoder, self.grid.mesh["tp"])
        return decoder

    def _with_optimizer(self, decoders: dict[int, Decoder]) -> tuple[Mapping[int, DataParallelStage], Optimizer]:
        """The decoders sharded as ZeRO says and with their initial weights, and what updates them."""
        config, grid = self.config, self.grid
        if config.zero.zero_engine == "deepspeed":
            from megatron_ext.zero.deepspeed import DeepSpeedOptimizer, DeepSpeedStage

            ((index, decoder),) = decoders.items()
            settings = config.deepspeed_settings(grid.dp_size)
            only = DeepSpeedStage(decoder, grid, settings, config.optimizer, config.zero.nvme_path)
            return {index: only}, DeepSpeedOptimizer(only, config.model, config.seed)
        stages = {index: DataParallel(decoder, grid, config.zero) for index, decoder in decoders.items()}
        for stage in stages.values():
            stage.decoder.to_empty(device=stage.device)
            initialize_weights(stage.decoder, config.model, config.seed, grid.device)
        named, copies = _named_parameters(decoders.values()), copies_of_tied(decoders.values())
        return stages, ShardedOptimizer(config.optimizer, named, grid, copies, config.trainable.first_row)

    def copies(self) -> frozenset[str]:
        """Names of parameters that are copies of one on another stage (the tied head)."""
        return copies_of_tied(stage.decoder for stage in self.stages.values())

    def state_dict(self, empty: bool = False) -> States:
        """What a checkpoint holds of this rank; `empty`: the values do not matter, they will be written over."""
        return self.optimizer.state_dict(empty)

    def load_state_dict(self, states: States) -> None:
        """Go on from these states, which `state_dict` gave and a checkpoint filled."""
        self.optimizer.load_state_dict(states)

    def model_states(self) -> ModelStates:
        """Bytes that this rank holds: weights and optimizer states now, gradients as the last update found them that
        was to measure them (none yet: 0)."""
        return self.optimizer.model_states()

    def train_step(self, batch: Batch, lr: float, stop: bool = False, measure: bool = False) -> torch.Tensor:
        """Forward, backward and update for one global batch, by the mean loss over its unmasked tokens.

        batch: "tokens" and "labels" [global batch / dp, s] int64 on the device, optionally (on all ranks or on none)
        "loss_mask", 0 or a weight for each token, "document_ids", "position_ids". `stop`: this rank wishes to stop.
        `measure`: note what gradients take.
        Returns float64 [loss, gradient norm before clipping, ranks that wish to stop, 1 if the step was skipped
        for a gradient that is not finite], equal on every rank, still on the device.
        """
        scale = self.loss_scaler.scale
        loss = self.pipeline.forward_backward(batch, scale)
        self.tied.sum_gradients()
        wish = torch.full((), float(stop), dtype=torch.float64, device=self.grid.device)
        sums = torch.stack([loss, wish])
        (mean_loss, wishes), norm, skipped = self.optimizer.update(sums, lr, scale, measure)
        self.loss_scaler.update(skipped)
        return torch.stack([mean_loss, norm, wishes, skipped.double()])

    def evaluate(self, batches: Iterable[Batch]) -> torch.Tensor:
        """Mean loss over the (unmasked) tokens of all batches, at least one, without training on them.

        Returns a float64 scalar on the device, equal on every rank: NaN if all is masked, else infinite if not finite.
        """
        sums = torch.stack([self.pipeline.evaluate(batch) for batch in batches]).sum(0)
        dist.all_reduce(sums)
        loss, tokens = sums
        return torch.where(tokens == 0, torch.nan, torch.nan_to_num(loss / tokens, torch.inf, torch.inf))


def _named_parameters(decoders: Iterable[Decoder]) -> dict[str, nn.Parameter]:
    """Parameters under their global names. The head that copies a tied embedding keeps its own."""
    return {name: p for decoder in decoders for name, p in decoder.named_parameters()}
