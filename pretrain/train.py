"""One run, top to bottom: build, load, train, evaluate, save."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.checkpoint import CheckpointWriter, Manifest, load_checkpoint
from megatron_ext.checkpoint.load import layout_of
from megatron_ext.checkpoint.lock import FolderLock
from megatron_ext.engine import Engine
from megatron_ext.mesh import ProcessGrid, build_grid
from megatron_ext.optim import learning_rate
from pretrain.checkpoints import Start, beginning
from pretrain.config import RunConfig
from pretrain.data import build_data
from pretrain.data.place import order_of, place_of
from pretrain.describe import describe, describe_limits, describe_start
from pretrain.flags import to_yaml
from pretrain.logs import open_logs
from pretrain.memory import memory_figures, memory_table
from pretrain.resize import plan_expansion
from pretrain.results import ResultQueue, StepResult
from pretrain.run_tokenizer import run_tokenizer
from pretrain.stop import StopRequest
from pretrain.throughput import Throughput

Batch = dict[str, torch.Tensor]


def run(config: RunConfig, device: torch.device) -> None:
    """Train as `config` (validated) says. Every rank calls it, with torch.distributed initialised."""
    grid = build_grid(config.engine.parallel, device)
    torch.manual_seed(config.training.seed + grid.random_stream)
    with beginning(config.checkpoint) as (start, lock):
        trainer = Trainer(config, grid, start, lock)
        with StopRequest() as stop:
            trainer.train(stop)
        trainer.close()


class Trainer:
    """The engine, the data and the logs of one run, and where the run stands."""

    def __init__(self, config: RunConfig, grid: ProcessGrid, start: Start, lock: FolderLock | None):
        self.engine = Engine(config.engine, grid)
        self.config = config = dataclasses.replace(config, engine=self.engine.config)
        self.grid, self.start = grid, start
        self.is_writer = dist.get_rank() == 0
        batch = config.engine.batch
        assert config.training.train_iters is not None
        assert batch.global_batch_size is not None
        self.train_iters, self.batch_size = config.training.train_iters, batch.global_batch_size
        self.loaded = self._load()
        self.hugging_face = None if self.loaded is None else self.loaded.hugging_face
        self.tokenizer = run_tokenizer(config, start, self.loaded)
        continued = None if start.weights_only else self.loaded
        self.iteration = self.started_at = 0 if continued is None else continued.iteration
        self.consumed_samples = 0 if continued is None else continued.consumed_samples
        self.consumed_tokens = 0 if continued is None else continued.consumed_tokens
        self.data = build_data(
            config.data,
            seq_length=batch.seq_length,
            vocab_size=config.engine.model.vocab_size,
            seed=config.training.seed,
            dp_rank=grid.dp_rank,
            dp_size=grid.dp_size,
            micro_batch_size=batch.micro_batch_size,
            global_batch_size=self.batch_size,
        )
        self.position, self.place = (
            (0, "") if continued is None else place_of(continued, self.data, f"{start.flag} {start.checkpoint}")
        )
        self.resolved = to_yaml(dataclasses.replace(config, checkpoint=config.checkpoint.as_begun()))
        save, in_background = config.checkpoint.save, config.checkpoint.async_save
        self.writer = CheckpointWriter(save, self.engine, in_background, lock) if save is not None else None
        self.saved_at = self.iteration if self.iteration and config.checkpoint.continues_in_place else None
        self.throughput = Throughput(self.engine.config, grid, config.logging.peak_tflops)
        self.results = ResultQueue(grid.device)
        self.console, self.logs = open_logs(config, self.resolved, self.iteration, self.is_writer)
        self._describe()

    def _load(self) -> Manifest | None:
        """The checkpoint that the run starts from, if any; the engine's weights and states are filled in."""
        start = self.start
        if start.checkpoint is None:
            return None
        expansion, overridden = plan_expansion(self.config, start), self.config.checkpoint.overridden
        return load_checkpoint(self.engine, start.checkpoint, start.weights_only, expansion, overridden, start.flag)

    def _describe(self) -> None:
        if self.console is None:
            return
        layout = self.engine.layout
        for line in describe(self.engine.config, self.grid):
            self.console.say(f" {line}")
        if len(layout.stages) > 1:
            cut = " | ".join(
                f"stage {i} (rank {rank}): layers {stage.first}-{stage.last - 1}"
                for i, (stage, rank) in enumerate(zip(layout.stages, layout.rank_of, strict=True))
            )
            self.console.say(f" {layout.schedule}: {cut}")
        self.console.say(f" tokenizer: {self.tokenizer or 'not known, and not noted in checkpoints'}")
        for line in self.data.describe():
            self.console.say(f" {line}")
        if self.config.engine.precision.fp16:
            self.console.say(f" {self.engine.loss_scaler.describe()}")
        valid = sum(corpus.samples("valid", self.config.engine.batch.seq_length) for corpus in self.data.corpora)
        for line in describe_limits(self.config, valid):
            self.console.say(f" {line}")
        if self.loaded is not None:
            for line in describe_start(self.config, self.start, self.loaded, self.resolved):
                self.console.say(f" {line}")
        if self.place:
            self.console.say(f" {self.place}")

    def train(self, stop: StopRequest) -> None:
        """Step until the last iteration, an exit interval, or a wish to stop."""
        if self.iteration >= self.train_iters:
            self._say(f" nothing to do: iteration {self.iteration} of {self.train_iters} is already reached")
            return
        batches = self.data.train_batches(self.position)
        self.results.restart()
        while self.iteration < self.train_iters:
            rate = learning_rate(self.config.engine.optimizer, self.iteration, self.train_iters)
            scale = self.engine.loss_scaler.scale
            batch = self._to_device(next(batches))
            figures = self.engine.train_step(batch, rate, stop=bool(stop), measure=self.config.logging.report_memory)
            self.iteration += 1
            self.consumed_samples += self.batch_size
            self.consumed_tokens += self.batch_size * self.config.engine.batch.seq_length
            self.position += self.batch_size
            self.results.put(self.iteration, rate, figures, scale)
            evaluate = self._due(self.config.training.eval_interval)
            stopping = self._settle(keep=0 if evaluate else 1, evaluate=evaluate)
            if self._due(self.config.checkpoint.save_interval):
                stopping |= self._settle(keep=0)
                self._save()
            if self.writer is not None:
                self.writer.poll()
            if stopping or self._due(self.config.training.exit_interval):
                self._settle(keep=0)
                self._say(f" stopping at iteration {self.iteration}" + (" as asked by a signal" if stopping else ""))
                break
        self._settle(keep=0)
        if self.writer is not None and self.saved_at != self.iteration:
            self._save()

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.iteration % interval == 0

    def _settle(self, keep: int, evaluate: bool = False) -> bool:
        """Log the steps whose figures have arrived, the newest with its validation loss if asked for.

        True once any rank wishes to stop: the same on every rank.
        """
        results = self.results.take(keep)
        records = [self._record(result) for result in results]
        if evaluate:
            records[-1]["valid_loss"] = self._validation_loss()
        for record in records:
            for log in self.logs:
                log.write(record)
            if record["iteration"] == self.started_at + 1:
                self._describe_memory(record)
        return any(result.stop_wishes > 0 for result in results)

    def _record(self, result: StepResult) -> dict[str, Any]:
        behind = self.iteration - result.iteration
        return {
            "iteration": result.iteration,
            "lm_loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "consumed_samples": self.consumed_samples - behind * self.batch_size,
            "global_batch_size": self.batch_size,
            "world_size": self.grid.world_size,
            "loss_scale": result.loss_scale,
            "skipped": result.skipped,
            **self.throughput.figures(result.seconds),
            **(memory_figures(self.engine) if self.config.logging.report_memory else {}),
        }

    def _describe_memory(self, record: dict[str, Any]) -> None:
        if self.console is not None and self.config.logging.report_memory:
            for line in memory_table(self.engine, record):
                self.console.say(f" {line}")

    def _validation_loss(self) -> float:
        """Mean loss over the tokens of the validation batches: the same ones every time."""
        batches = self.data.valid_batches(self.config.training.eval_iters)
        loss = self.engine.evaluate(self._to_device(batch) for batch in batches).item()
        self.results.restart()
        return loss

    def _save(self) -> None:
        assert self.writer is not None
        manifest = Manifest(
            iteration=self.iteration,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.consumed_tokens,
            model=dataclasses.asdict(self.config.engine.model),
            layout=layout_of(self.grid),
            has_optimizer=True,
            trainable=dataclasses.asdict(self.config.engine.trainable),
            precision=dataclasses.asdict(self.config.engine.precision),
            lora=None if self.engine.config.adapters is None else dataclasses.asdict(self.engine.config.adapters),
            hugging_face=self.hugging_face,
            data=order_of(self.data) | {"position": self.position},
            tokenizer=None if self.tokenizer is None else self.tokenizer.plain(),
        )
        self.writer.save(manifest, {"run.yaml": self.resolved})
        self.saved_at = self.iteration
        how = "writing" if self.config.checkpoint.async_save else "saved"
        self._say(f" {how} checkpoint at iteration {self.iteration} to {self.config.checkpoint.save}")
        self.results.restart()

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.grid.device, non_blocking=True) for name, tensor in batch.items()}

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.say(text)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.wait()
        for log in self.logs:
            log.close()
