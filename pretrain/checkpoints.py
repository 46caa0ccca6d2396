"""Where a run's checkpoints come from and go to, and where it therefore begins."""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.checkpoint import has_checkpoints, locate_checkpoint, read_manifest
from megatron_ext.checkpoint.directory import LATEST, MANIFEST, later_checkpoints, set_aside
from megatron_ext.checkpoint.lock import FolderLock
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.models.expand import METHODS
from megatron_ext.option import field_of, flag_of, option, refuse_unused


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: None: with new weights, at iteration 0.
        weights_only: nothing but the weights is the checkpoint's: iteration 0 too.
        flag, asked: that names the checkpoint, alone and with its value.
        remarks: what is to be said aloud of how it was found.
    """

    checkpoint: Path | None = None
    weights_only: bool = False
    flag: str = "--load"
    asked: str = ""
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    save: str | None = option(None, "folder of checkpoints to write", metavar="DIR")
    load: str | None = option(None, "folder of checkpoints, or one checkpoint, to continue from", metavar="DIR")
    pretrained_checkpoint: str | None = option(
        None, "take the weights from here and start at iteration 0, while --load has no checkpoint", metavar="DIR"
    )
    save_interval: int | None = option(None, "iterations between checkpoints (default: only at the end)")
    async_save: bool = option(False, "write checkpoints in the background")
    finetune: bool = option(False, "take only the weights from --load, and start at iteration 0")
    override_checkpoint_args: tuple[str, ...] = option(
        (), "fields of the model, such as rotary_base, in which the run departs from its checkpoint", metavar="FIELD"
    )
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
                    raise RequestError(f"{flag_of(name)} needs --save")
        if self.save_interval is not None and self.save_interval < 1:
            raise RequestError(f"--save-interval {self.save_interval}: must be at least 1")
        self._validate_start()
        self._validate_resize()
        if self.save is not None and has_checkpoints(self.save):
            self._validate_place(Path(self.save))

    def _validate_start(self) -> None:
        if self.finetune and self.load is None:
            raise RequestError("--finetune needs --load")
        if self.finetune and self.pretrained_checkpoint is not None:
            raise RequestError(
                f"--finetune contradicts --pretrained-checkpoint {self.pretrained_checkpoint}: either says where the "
                "weights come from; leave out --finetune"
            )
        if self.finetune and self.continues_in_place:
            raise RequestError(
                f"--finetune with --load {self.load} where the run saves would begin it anew: leave out --finetune to "
                f"go on (--no-finetune, if a file says it), or choose another --save; a command that starts from BASE "
                f"and can be started again has --load {self.save} --save {self.save} --pretrained-checkpoint BASE"
            )
        if self.change_tokenizer and not self.takes_weights:
            raise RequestError(
                "--change-tokenizer needs --load and --finetune, or --pretrained-checkpoint: optimizer states and the "
                "place in the data belong to the old tokenizer and cannot go on"
            )
        if self.change_tokenizer and self.embedding_init is not None:
            raise RequestError("--change-tokenizer has no effect with --embedding-init, which changes it too")
        if self.load is None and self.pretrained_checkpoint is None:
            refuse_unused(self, ("override_checkpoint_args",), "--load or --pretrained-checkpoint")

    def _validate_place(self, save: Path) -> None:
        """Raise RequestError where checkpoints that are there would be mixed with another run's, or written over."""
        if (save / MANIFEST).exists():
            raise RequestError(f"--save {save} is a checkpoint itself: give the folder that it is in")
        if (save / LATEST).is_dir():
            raise RequestError(f"--save {save}: its '{LATEST}' is a folder and cannot be written: move it away")
        if not self.continues_in_place:
            base = self.pretrained_checkpoint or (self.load if self.finetune else None)
            again = "" if base is None else f" --pretrained-checkpoint {base}"
            raise RequestError(
                f"--save {save} holds checkpoints of another run: continue it with --load {save}{again}, "
                "or choose another folder"
            )
        later = self.left_behind()
        if later and not self._names_one_folder:  # every restart of this command would go back
            raise RequestError(
                f"--save {save} holds {later[0].name}, which comes after --load {self.load}: to go back, write the "
                f"older one's name into {save / LATEST} and give --load {save}; or choose another --save"
            )

    def left_behind(self) -> list[Path]:
        """Whole checkpoints where the run saves that come after the one that it goes on from, the newest first."""
        checkpoint = self.start().checkpoint
        if self.save is None or checkpoint is None or not self.continues_in_place:
            return []
        return later_checkpoints(Path(self.save), read_manifest(checkpoint).iteration)

    def _validate_resize(self) -> None:
        if self.embedding_init is None:
            refuse_unused(self, ("base_tokenizer_model", "embedding_norm_correction"), "--embedding-init")
            return
        if not self.takes_weights:
            raise RequestError(
                f"--embedding-init {self.embedding_init} needs --load and --finetune, or --pretrained-checkpoint: "
                "optimizer states and the place in the data belong to the old vocabulary and cannot go on"
            )
        if self.base_tokenizer_model is None:
            raise RequestError(
                f"--embedding-init {self.embedding_init} needs --base-tokenizer-model: the tokenizer that the "
                "checkpoint was trained with"
            )

    @property
    def takes_weights(self) -> bool:
        """Whether the run begins, or began, with nothing but the weights of a checkpoint."""
        return self.finetune or self.pretrained_checkpoint is not None

    @property
    def continues_in_place(self) -> bool:
        """Checkpoints go where they come from: the command with which a run is both started and restarted."""
        if self.save is None or self.load is None:
            return False
        return Path(self.save).resolve() in (Path(self.load).resolve(), Path(self.load).resolve().parent)

    def start(self) -> Start:
        """Where the run begins, as the folders are now. Raises RequestError where a flag names no checkpoint.

        A restartable command names one folder for --save and --load; the first time there is nothing in it.
        """
        if self.load is not None and not self._is_first_time(self.load):
            return _start_at("--load", self.load, self.finetune)
        if self.pretrained_checkpoint is not None:
            return _start_at("--pretrained-checkpoint", self.pretrained_checkpoint, True)
        return Start()

    def _is_first_time(self, load: str) -> bool:
        return self._names_one_folder and not has_checkpoints(load)

    @property
    def _names_one_folder(self) -> bool:
        """Whether --load is the folder of --save, and not a checkpoint in it."""
        return (
            self.save is not None and self.load is not None and Path(self.save).resolve() == Path(self.load).resolve()
        )

    @property
    def overridden(self) -> frozenset[str]:
        """Fields of the model that need not be the checkpoint's. Raises RequestError for what is none."""
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        names = [field_of(name) for name in self.override_checkpoint_args]
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ", such as rotary_base"
                raise RequestError(f"--override-checkpoint-args {name}: must be a field of the model{hint}")
        return frozenset(names)

    def as_begun(self) -> "CheckpointConfig":
        """The same request as a file is to keep it, so that --config FILE --load SAVE goes on with the run."""
        if not self.finetune:
            return self
        return dataclasses.replace(self, load=None, finetune=False, pretrained_checkpoint=self.load)


def _start_at(flag: str, folder: str, weights_only: bool) -> Start:
    checkpoint, remark = locate_checkpoint(folder, flag)
    return Start(checkpoint, weights_only, flag, f"{flag} {folder}", (remark,) if remark else ())


def go_back(config: CheckpointConfig) -> list[str]:
    """Set aside what `latest`, set back by hand, leaves behind, so that nothing is written over; says so."""
    try:
        aside = {path.name: set_aside(path).name for path in config.left_behind()}
    except OSError as error:
        raise RequestError(f"--save {config.save}: later checkpoints cannot be set aside ({error})") from error
    if not aside:
        return []
    names = ", ".join(f"{name} as {kept}" for name, kept in aside.items())
    return [f"--save {config.save}: its '{LATEST}' has been set back; what came after is set aside: {names}"]


@contextlib.contextmanager
def beginning(config: CheckpointConfig) -> Iterator[tuple[Start, FolderLock | None]]:
    """Where all ranks begin, as the first rank finds it; within, no other run writes where this one saves. Collective.

    The lock is the first rank's. Raises RequestError, on every rank, where the folder is another run's by now.
    """
    lock: FolderLock | None = None
    found: list[Start | str] = [""]
    try:
        if dist.get_rank() == 0:
            try:
                lock = FolderLock(config.save) if config.save is not None else None
                config.validate()  # again: another run may have written meanwhile
                start = config.start()
                remarks = [lock.remark] if lock is not None and lock.remark else []
                remarks += [*start.remarks, *go_back(config)]
                found = [dataclasses.replace(start, remarks=tuple(remarks))]
            except RequestError as error:
                found = [str(error)]
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        if isinstance(found[0], str):
            raise RequestError(found[0])
        yield found[0], lock
    finally:
        if lock is not None:
            lock.release()
