"""Where a run's figures go. A record is a flat dict of one iteration; only the first rank writes any."""

import datetime
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron_ext.checkpoint.directory import write_text
from pretrain.config import LoggingConfig, RunConfig

Record = dict[str, Any]


class Log(Protocol):
    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


class Console:
    """Lines that a Megatron user recognises; on a terminal a live progress bar below them."""

    def __init__(self, interval: int, first: int, total: int):
        self._interval, self._total = interval, total
        self._since_last_line: list[Record] = []
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first, unit="it", dynamic_ncols=True) if live else None

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def write(self, record: Record) -> None:
        iteration = record["iteration"]
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['lm_loss']:.4f}", refresh=False)
            self._bar.update(1)
        self._since_last_line.append(record)
        if iteration % self._interval == 0 or iteration == self._total or record["skipped"]:
            self.say(self._line(record | self._means()))
            self._since_last_line.clear()
        if "valid_loss" in record:
            self.say(
                f" validation loss at iteration {iteration} | lm loss value: {record['valid_loss']:.6E} | "
                f"lm loss PPL: {math.exp(min(record['valid_loss'], 80.0)):.6E}"
            )

    def _means(self) -> Record:
        """Speed over the iterations since the last line, which is steadier than the last iteration's."""
        names = ("elapsed_ms", "tokens_per_second", "tflops_per_device", "mfu_full", "mfu_causal")
        steps = self._since_last_line
        seconds = sum(step["elapsed_ms"] for step in steps)
        weighted = {
            name: None if steps[0][name] is None else sum(step[name] * step["elapsed_ms"] for step in steps) / seconds
            for name in names
        }
        return weighted | {"elapsed_ms": seconds / len(steps)}

    def _line(self, record: Record) -> str:
        mfu = "n/a"
        if record["mfu_full"] is not None:
            mfu = f"{record['mfu_full']:.1%} (causal {record['mfu_causal']:.1%})"
        remaining = (self._total - record["iteration"]) * record["elapsed_ms"] / 1e3
        parts = [
            f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S}] iteration {record['iteration']:8d}/{self._total:8d}",
            f"consumed samples: {record['consumed_samples']:12d}",
            f"elapsed time per iteration (ms): {record['elapsed_ms']:.1f}",
            f"tokens/s: {record['tokens_per_second']:.0f}",
            f"TFLOP/s/device: {record['tflops_per_device']:.3g}",
            f"MFU: {mfu}",
            f"learning rate: {record['learning_rate']:.6E}",
            f"global batch size: {record['global_batch_size']:5d}",
            f"lm loss: {record['lm_loss']:.6E}",
            f"loss scale: {record['loss_scale']:.1f}",
            f"grad norm: {record['grad_norm']:.3f}",
            f"memory (GiB): {record['memory_gib']:.2f}",
            f"ETA: {datetime.timedelta(seconds=int(remaining))}",
        ]
        if record["skipped"]:
            parts.append("SKIPPED: gradient not finite")
        return " | ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class MetricsFile:
    """One JSON object a line; a record is on its way to the disk as soon as it is known."""

    def __init__(self, path: str):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # open for the whole run

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, folder: str):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "iteration" and value is not None:
                self._writer.add_scalar(name, value, record["iteration"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, config: RunConfig, resolved: dict[str, Any]):
        import wandb

        logging = config.logging
        self._run = wandb.init(
            project=logging.wandb_project, name=logging.wandb_exp_name, dir=logging.wandb_save_dir, config=resolved
        )

    def write(self, record: Record) -> None:
        self._run.log(record, step=record["iteration"])

    def close(self) -> None:
        self._run.finish()


def open_logs(
    config: RunConfig, resolved: dict[str, Any], first: int, is_writer: bool
) -> tuple[Console | None, list[Log]]:
    """The logs that were asked for, the console among them; none on ranks that do not write.

    A record has an iteration's figures, with `valid_loss` where it was evaluated.
    """
    if not is_writer:
        return None, []
    logging: LoggingConfig = config.logging
    assert config.training.train_iters is not None
    console = Console(logging.log_interval, first, config.training.train_iters)
    logs: list[Log] = [console]
    if logging.metrics is not None:
        logs.append(MetricsFile(logging.metrics))
    if logging.tensorboard_dir is not None:
        logs.append(TensorBoard(logging.tensorboard_dir))
    if logging.wandb_project is not None:
        logs.append(WandB(config, resolved))
    return console, logs


def trim_metrics(path: str | None, iteration: int) -> None:
    """Forget what an interrupted run wrote past the iteration that is continued from; all else is kept.

    A run that starts anew sets an earlier one's file aside as FILE.old.
    """
    if path is None or not Path(path).is_file():
        return
    if iteration == 0:
        os.replace(path, f"{path}.old")
        return
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _iteration_of(line) <= iteration]
    if len(kept) != len(lines):
        write_text(Path(path), "".join(line + "\n" for line in kept))


def _iteration_of(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a crash
