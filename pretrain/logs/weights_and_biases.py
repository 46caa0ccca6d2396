"""Weights & Biases, and which of its runs a training run is."""

import os
import secrets
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError
from pretrain.config import LoggingConfig
from pretrain.logs.log import Record

NOTE = "wandb-run.txt"


class WandB:
    """One run of Weights & Biases for all restarts: `folder`/wandb-run.txt has its id and the last iteration in it.

    Its steps only grow, so iterations that it has are not logged again when the run repeats them after a crash.

    Args:
        settings: of the run, shown with it.
        folder: of --save, None where nothing is saved.
        continues: whether this run goes on with the one that left its note there.
    """

    def __init__(self, logging: LoggingConfig, settings: dict[str, Any], folder: Path | None, continues: bool):
        import wandb

        note = None if folder is None else folder / NOTE
        identifier, self._last = (_read(note) if continues and note is not None else None) or (secrets.token_hex(4), 0)
        self._id = os.environ.get("WANDB_RUN_ID") or identifier
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name,
                dir=logging.wandb_save_dir,
                config=settings,
                allow_val_change=True,
                id=self._id,
                resume="allow",
            )
        except Exception as error:  # not logged in, no network, a folder that cannot be written
            raise RequestError(
                f"--wandb-project {logging.wandb_project}: {' '.join(str(error).split())}; log in with wandb login, or "
                "keep it local with WANDB_MODE=offline"
            ) from error
        self._last = max(self._last, self._run.starting_step - 1)  # what the server has
        self._note: int | None = None
        if note is not None:
            self._note = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            self._write_note()

    def write(self, record: Record) -> None:
        iteration = record["iteration"]
        if iteration <= self._last:
            return
        self._run.log(record, step=iteration, commit=True)
        self._last = iteration
        self._write_note()

    def _write_note(self) -> None:
        if self._note is not None:
            os.pwrite(self._note, f"{self._id} {self._last:012d}\n".encode(), 0)

    def close(self) -> None:
        if self._note is not None:
            os.close(self._note)
        self._run.finish()


def _read(note: Path) -> tuple[str, int] | None:
    try:
        identifier, last = note.read_text(encoding="utf-8").split()
        return identifier, int(last)
    except (OSError, ValueError):
        return None
