"""One run, top to bottom: build, load, then step until the end; what happens beside the steps is callbacks'."""

from collections.abc import Iterable, Sequence

import torch

from megatron_ext.mesh import build_grid
from megatron_ext.optim import learning_rate
from pretrain.callbacks import Callback, Decision, Stop, built_in, load_callbacks
from pretrain.checkpoints import beginning
from pretrain.config import RunConfig
from pretrain.describe import introduction
from pretrain.logs import Record
from pretrain.results import StepResult
from pretrain.run import Batch, Run
from pretrain.stop import StopRequest
from pretrain.throughput import Throughput


def run(config: RunConfig, device: torch.device) -> None:
    """Train as `config` (validated) says. Every rank calls it, with torch.distributed initialised."""
    grid = build_grid(config.engine.parallel, device)
    torch.manual_seed(config.training.seed + grid.random_stream)
    with beginning(config.checkpoint) as (start, lock):
        run, stop = Run(config, grid, start), StopRequest()
        callbacks = built_in(run, lock, stop)
        for line in introduction(run) if run.console is not None else ():
            run.say(line)
        trainer = Trainer(run, [*callbacks, *(kind(run) for kind in load_callbacks(config.callbacks))])
        try:
            with stop:
                trainer.train()
                trainer.close()
        except BaseException as error:
            trainer.on_error(error)
            raise


class Trainer:
    """The steps of a run, and the callbacks beside them."""

    def __init__(self, run: Run, callbacks: Sequence[Callback]):
        self.run, self.callbacks = run, callbacks
        self.throughput = Throughput(run.engine.config, run.grid, run.config.logging.peak_tflops)
        self.wish: Stop | None = None  # this rank's, of which all ranks hear with the next step

    def train(self) -> None:
        """Step until the last iteration, or until a wish to stop has reached all ranks."""
        run, ends = self.run, False
        if run.iteration >= run.train_iters:
            run.say(f"nothing to do: iteration {run.iteration} of {run.train_iters} is already reached")
        batches = run.data.train_batches(run.position)
        run.results.restart()
        while run.iteration < run.train_iters and not ends:
            self._hear(callback.before_step(run.iteration + 1) for callback in self.callbacks)
            self._step(next(batches))
            due = any(callback.due(run.iteration) for callback in self.callbacks)
            ends = self._settle(keep=0 if due else 1)
            if due:
                run.results.restart()
        self._settle(keep=0)
        if ends:
            run.say(f"stopping at iteration {run.iteration} {self._why()}".rstrip())

    def _step(self, batch: Batch) -> None:
        run, engine = self.run, self.run.engine
        rate = learning_rate(run.config.engine.optimizer, run.iteration, run.train_iters)
        scale, measure = engine.loss_scaler.scale, run.config.logging.report_memory
        figures = engine.train_step(run.to_device(batch), rate, stop=self.wish is not None, measure=measure)
        run.advance()
        run.results.put(run.iteration, rate, figures, scale)

    def _settle(self, keep: int) -> bool:
        """Give the callbacks the records that have arrived, of all steps but the newest `keep`; waits for these.

        True once any rank wishes to stop: the same on every rank.
        """
        results = self.run.results.pop(keep)
        for result in results:
            record = self._record(result)
            self._hear(callback.after_step(record) for callback in self.callbacks)
        return any(result.stop_wishes > 0 for result in results)

    def _record(self, result: StepResult) -> Record:
        behind = self.run.iteration - result.iteration
        return {
            "iteration": result.iteration,
            "lm_loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "consumed_samples": self.run.consumed_samples - behind * self.run.batch_size,
            "global_batch_size": self.run.batch_size,
            "world_size": self.run.grid.world_size,
            "loss_scale": result.loss_scale,
            "skipped": result.skipped,
            **self.throughput.figures(result.seconds),
        }

    def _hear(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            if not isinstance(decision, Stop | None):
                raise TypeError(f"a callback decides by Stop(...) or None, not by {decision!r}")
            self.wish = self.wish or decision

    def _why(self) -> str:
        if self.wish is not None:
            return self.wish.why
        return "as asked by another rank" if self.run.config.callbacks else "as asked by a signal"

    def on_error(self, error: BaseException) -> None:
        for callback in self.callbacks:
            callback.on_error(error)

    def close(self) -> None:
        for callback in reversed(self.callbacks):
            callback.close()
