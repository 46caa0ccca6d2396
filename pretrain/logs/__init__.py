"""Where a run's figures go. A record is a flat dict of one iteration; only the first rank writes any.

Each place is a `Log`, and each is `Guarded`: what fails in it is said once, and the run goes on.
"""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.directory import set_aside, write_text
from megatron_ext.errors import RequestError
from pretrain.config import RunConfig
from pretrain.logs.console import Console
from pretrain.logs.log import Guarded, Log, Record
from pretrain.logs.metrics_file import MetricsFile, trim_metrics
from pretrain.logs.tensorboard import TensorBoard
from pretrain.logs.weights_and_biases import WandB

__all__ = ["Console", "Guarded", "Log", "Record", "open_logs"]


def open_logs(
    config: RunConfig, resolved: str, iteration: int, is_writer: bool
) -> tuple[Console | None, list[Guarded]]:
    """The logs that were asked for, the console among them; none on ranks that do not write.

    A record has an iteration's figures, with `valid_loss` where it was evaluated.

    Args:
        resolved: the configuration, as `run.yaml` is to have it.
        iteration: that the run stands at; the logs of an interrupted run forget what came after it.

    Raises:
        RequestError: one of them cannot be opened.
    """
    if not is_writer:
        return None, []
    logging, train_iters = config.logging, config.training.train_iters
    assert train_iters is not None
    save = None if config.checkpoint.save is None else Path(config.checkpoint.save)
    in_place = iteration > 0 and config.checkpoint.continues_in_place
    console = Console(logging.log_interval, iteration, train_iters)
    logs = [Guarded("console", console)]
    flag = "--save"
    try:
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
        if logging.wandb_project is not None:
            flag = "--wandb-project"
            logs.append(Guarded(flag, WandB(logging, _flat(config), save, in_place)))
        if logging.tensorboard_dir is not None:
            flag = f"--tensorboard-dir {logging.tensorboard_dir}"
            logs.append(Guarded(flag, TensorBoard(logging.tensorboard_dir, iteration + 1)))
        if logging.metrics is not None:
            flag = f"--metrics {logging.metrics}"
            trim_metrics(logging.metrics, iteration, in_place)
            logs.append(Guarded(flag, MetricsFile(logging.metrics)))
        flag = "run.yaml"
        _write_settings(config, resolved, in_place)
    except OSError as error:
        raise RequestError(f"{flag}: cannot be written: {error.strerror or error}") from error
    return console, logs


def _write_settings(config: RunConfig, resolved: str, in_place: bool) -> None:
    """The configuration, with the checkpoints or the figures. Another run's is set aside."""
    logging = config.logging
    home = config.checkpoint.save or logging.tensorboard_dir
    if home is not None:
        file = Path(home) / "run.yaml"
    elif logging.metrics is not None:
        file = Path(logging.metrics).with_suffix(".run.yaml")
    else:
        return
    if not in_place and file.is_file() and file.read_bytes() != resolved.encode():
        set_aside(file)
    write_text(file, resolved)


def _flat(config: RunConfig) -> dict[str, Any]:
    return {name: value for group in config.groups().values() for name, value in dataclasses.asdict(group).items()}
