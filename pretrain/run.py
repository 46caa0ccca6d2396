"""One run: what it is made of, and where it stands."""

import dataclasses

import torch
import torch.distributed as dist

from megatron_ext.checkpoint import Manifest, load_checkpoint
from megatron_ext.engine import Engine
from megatron_ext.mesh import ProcessGrid
from pretrain.checkpoints import Start
from pretrain.config import RunConfig
from pretrain.data import build_data
from pretrain.data.resume import resume_position
from pretrain.flags import to_yaml
from pretrain.logs import open_logs
from pretrain.resize import plan_expansion
from pretrain.results import ResultQueue
from pretrain.run_tokenizer import run_tokenizer

Batch = dict[str, torch.Tensor]


class Run:
    """The engine, the data and the logs of one run, and how far its steps have come. Collective to make.

    Attributes:
        config: with the batch size resolved; `resolved` is its YAML, as the run's files have it.
        loaded: the manifest of the checkpoint that the weights came from, if any.
        started_at: the iteration that the run began at.
        iteration, consumed_samples, consumed_tokens, position: after the last step that was launched; the last one is
            the place in the order of the samples.
        console, logs: where figures go; None and none but on the first rank.
    """

    def __init__(self, config: RunConfig, grid: ProcessGrid, start: Start):
        self.engine = Engine(config.engine, grid)
        self.config = config = dataclasses.replace(config, engine=self.engine.config)
        self.grid, self.start, batch = grid, start, config.engine.batch
        assert config.training.train_iters is not None
        assert batch.global_batch_size is not None
        self.train_iters, self.batch_size = config.training.train_iters, batch.global_batch_size
        self.loaded = self._load()
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
            (0, "") if continued is None else resume_position(continued, self.data, f"{start.flag} {start.checkpoint}")
        )
        self.resolved = to_yaml(dataclasses.replace(config, checkpoint=config.checkpoint.as_begun()))
        self.results = ResultQueue(grid.device)
        self.console, self.logs = open_logs(config, self.resolved, self.iteration, dist.get_rank() == 0)

    def _load(self) -> Manifest | None:
        """Fill the engine's weights and states from the checkpoint that the run starts from, if any."""
        start = self.start
        if start.checkpoint is None:
            return None
        expansion, overridden = plan_expansion(self.config, start), self.config.checkpoint.overridden
        return load_checkpoint(self.engine, start.checkpoint, start.weights_only, expansion, overridden, start.flag)

    def advance(self) -> None:
        """Count a step that was launched."""
        self.iteration += 1
        self.consumed_samples += self.batch_size
        self.consumed_tokens += self.batch_size * self.config.engine.batch.seq_length
        self.position += self.batch_size

    def to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.grid.device, non_blocking=True) for name, tensor in batch.items()}

    def say(self, text: str) -> None:
        """Print a line, on the first rank."""
        if self.console is not None:
            self.console.say(f" {text}")
