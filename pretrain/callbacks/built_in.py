"""What every run does beside its steps, in the order in which it is done after each."""

import dataclasses

from megatron_ext.checkpoint import CheckpointWriter, Manifest
from megatron_ext.checkpoint.load import mesh_sizes
from megatron_ext.checkpoint.lock import FolderLock
from pretrain.callbacks.callback import Callback, Decision, Stop
from pretrain.data.resume import describe_order
from pretrain.logs import Record
from pretrain.memory import memory_figures, memory_table
from pretrain.run import Run
from pretrain.stop import StopRequest


def built_in(run: Run, lock: FolderLock | None, stop: StopRequest) -> list[Callback]:
    """Make the callbacks that a run was asked for. Collective. lock: on the first rank, of the folder of --save."""
    config = run.config
    evaluates, saves = config.training.eval_interval is not None, config.checkpoint.save is not None
    return [
        *([MemoryFigures(run)] if config.logging.report_memory else []),
        *([Evaluation(run)] if evaluates else []),
        Logging(run),
        *([MemoryTable(run)] if config.logging.report_memory else []),
        *([Saving(run, lock)] if saves else []),
        Stopping(run, stop),
    ]


class MemoryFigures(Callback):
    """Adds to every record what ranks hold, for --report-memory."""

    def after_step(self, record: Record) -> Decision:
        record |= memory_figures(self.run.engine)
        return None


class Evaluation(Callback):
    """Adds the mean loss over the tokens of the validation batches, the same ones every time, as `valid_loss`."""

    def due(self, iteration: int) -> bool:
        return _falls(iteration, self.run.config.training.eval_interval)

    def after_step(self, record: Record) -> Decision:
        if self.due(record["iteration"]):
            batches = self.run.data.valid_batches(self.run.config.training.eval_iters)
            record["valid_loss"] = self.run.engine.evaluate(map(self.run.to_device, batches)).item()
        return None


class Logging(Callback):
    """Gives every record to the console and the other logs."""

    def after_step(self, record: Record) -> Decision:
        for log in self.run.logs:
            log.write(record)
        return None

    def close(self) -> None:
        for log in self.run.logs:
            log.close()


class MemoryTable(Callback):
    """Shows after the first step what ranks hold beside what was predicted."""

    def after_step(self, record: Record) -> Decision:
        if self.run.console is not None and record["iteration"] == self.run.started_at + 1:
            for line in memory_table(self.run.engine, record):
                self.run.say(line)
        return None


class Saving(Callback):
    """Writes a checkpoint every --save-interval steps, and one at the end."""

    def __init__(self, run: Run, lock: FolderLock | None):
        super().__init__(run)
        options = run.config.checkpoint
        assert options.save is not None
        self._writer = CheckpointWriter(options.save, run.engine, options.async_save, lock)
        self._saved_at = run.started_at

    def before_step(self, iteration: int) -> Decision:
        self._writer.poll()
        return None

    def due(self, iteration: int) -> bool:
        return _falls(iteration, self.run.config.checkpoint.save_interval)

    def after_step(self, record: Record) -> Decision:
        if self.due(record["iteration"]):
            self._save()
        return None

    def close(self) -> None:
        if self._saved_at != self.run.iteration:
            self._save()
        self._writer.wait()

    def _save(self) -> None:
        run, config, engine = self.run, self.run.config, self.run.config.engine
        manifest = Manifest(
            iteration=run.iteration,
            consumed_samples=run.consumed_samples,
            consumed_tokens=run.consumed_tokens,
            model=dataclasses.asdict(engine.model),
            layout=mesh_sizes(run.grid),
            has_optimizer=True,
            optimizer=engine.optimizer.optimizer,
            trainable=dataclasses.asdict(engine.trainable),
            precision=dataclasses.asdict(engine.precision),
            lora=None if engine.adapters is None else dataclasses.asdict(engine.adapters),
            hugging_face=None if run.loaded is None else run.loaded.hugging_face,
            data=describe_order(run.data) | {"position": run.position},
            tokenizer=None if run.tokenizer is None else run.tokenizer.plain(),
        )
        self._writer.save(manifest, {"run.yaml": run.resolved})
        self._saved_at = run.iteration
        how = "writing" if config.checkpoint.async_save else "saved"
        run.say(f"{how} checkpoint at iteration {run.iteration} to {config.checkpoint.save}")


class Stopping(Callback):
    """Ends the run for a signal, and after an iteration that --exit-interval divides."""

    def __init__(self, run: Run, asked: StopRequest):
        super().__init__(run)
        self._asked = asked

    def before_step(self, iteration: int) -> Decision:
        if self._asked:
            return Stop("as asked by a signal")
        return Stop() if self.due(iteration) else None

    def due(self, iteration: int) -> bool:
        return _falls(iteration, self.run.config.training.exit_interval)


def _falls(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0
