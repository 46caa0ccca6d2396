"""Checkpoint directories: their names, their manifest, and how one becomes visible all at once."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.digest import sha256_of
from megatron_ext.errors import RequestError

FORMAT_VERSION = 1
LATEST = "latest"
MANIFEST = "manifest.json"
_NAME = re.compile(r"iter_\d{7,}")


class FormatError(RequestError):
    """A checkpoint that another version of this program wrote."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    trainable: fields of the TrainableConfig with which it was trained. precision: of its PrecisionConfig; both None
    where they are not known. lora: of its adapters' LoraConfig, None where there are none. hugging_face: contents of
    config.json and generation_config.json, by file name, of the Hugging Face model that the weights came from, for the
    way back. tokenizer: plain fields that say on which tokenizer's ids the model was trained; None where nobody knows.
    data: which samples were trained on, in which order, and how far; None where it is not known. optimizer: the
    algorithm, as --optimizer names it (older versions do not say, and had this one). files: size in bytes of every
    other file in it. sha256: hex digest of each of `files`; empty in checkpoints of older versions.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    model: dict[str, Any]
    layout: dict[str, Any]
    has_optimizer: bool
    trainable: dict[str, Any] | None = None
    precision: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    hugging_face: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    optimizer: str = "adam"
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def checkpoint_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def partial_path(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root / f".{checkpoint_name(iteration)}.tmp"


def leftovers(root: Path) -> list[Path]:
    """What a killed run left unfinished: checkpoints that were being written."""
    return sorted(root.glob(".iter_*.tmp"))


def remove_partials(root: Path) -> None:
    """Clear away what a killed run left unfinished."""
    for path in leftovers(root):
        shutil.rmtree(path)


def checkpoints_in(root: Path) -> list[Path]:
    """Every folder here that has a checkpoint's name, whole or not, the newest first."""
    found = [path for path in root.glob("iter_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(checkpoint: Path) -> int:
    """The iteration that the name of a checkpoint's folder says."""
    return int(checkpoint.name.removeprefix("iter_"))


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


def publish(root: Path, manifest: Manifest) -> Path:
    """Turn the finished partial directory into the checkpoint, and make it the latest.

    `latest` is written first: where the two disagree, a run was killed in between or somebody went back by hand. What
    has the checkpoint's name already, which is something damaged, is set aside as NAME.old and kept.

    manifest: its `files` are filled in here, and in `sha256` the digests that are not there yet.
    """
    partial = partial_path(root, manifest.iteration)
    final = root / checkpoint_name(manifest.iteration)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    digests = {name: manifest.sha256.get(name) or sha256_of(partial / name) for name in sizes}
    complete = dataclasses.replace(manifest, files=sizes, sha256=digests)
    write_text(partial / MANIFEST, json.dumps(dataclasses.asdict(complete), indent=2) + "\n")
    if final.exists():
        set_aside(final)
    write_text(root / LATEST, final.name + "\n")
    os.replace(partial, final)
    _sync_directory(root)
    return final


def set_aside(path: Path) -> Path:
    """Rename to NAME.old, or NAME.old.1 and so on, the first that is free; returns it."""
    number, target = 0, path.with_name(f"{path.name}.old")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.old.{number}")
    os.rename(path, target)
    return target


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot sync a directory
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def has_checkpoints(path: str | Path) -> bool:
    """Whether there is a checkpoint in, or at, this folder, or something that was one."""
    path = Path(path)
    return bool((path / LATEST).exists() or (path / MANIFEST).exists() or checkpoints_in(path))


def find_checkpoint(path: str | Path, flag: str = "--load") -> Path:
    """The checkpoint that `flag PATH` means; see `locate_checkpoint`."""
    return locate_checkpoint(path, flag)[0]


def locate_checkpoint(path: str | Path, flag: str = "--load") -> tuple[Path, str]:
    """The checkpoint that `flag PATH` means, and what is to be said of that, if anything.

    PATH itself, or the one that PATH/latest names; where that one is not whole or `latest` is lost, the newest that is.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path, ""
    if not path.is_dir():
        raise RequestError(f"{flag} {path}: no such directory")
    reason = _names_nothing(path, flag)
    if reason is None:
        return path / _read_latest(path), ""
    problems: list[str] = []
    for checkpoint in checkpoints_in(path):
        problem = _not_whole(checkpoint, flag)
        if problem is None:
            newest = f"{checkpoint.name} is the newest whole checkpoint there"
            return checkpoint, f"{flag} {path}: {_joined(reason, problems)}; {newest}"
        problems.append(problem)
    if problems:
        raise RequestError(f"{flag} {path}: {_joined(reason, problems)}; no checkpoint there is whole")
    raise RequestError(
        f"{flag} {path}: neither a checkpoint ({MANIFEST}) nor a folder of checkpoints ({LATEST}): {reason}"
    )


def _joined(reason: str, problems: list[str]) -> str:
    return "; ".join([reason, *(problem for problem in problems if problem not in reason)])


def _read_latest(root: Path) -> str:
    return (root / LATEST).read_text(encoding="utf-8").strip()


def _names_nothing(root: Path, flag: str) -> str | None:
    """Why `latest` names no whole checkpoint; None if it does."""
    try:
        name = _read_latest(root)
        if not name or Path(name).name != name or not (root / name / MANIFEST).is_file():
            return f"its '{LATEST}' names {name[:80]!r}, which is not a complete checkpoint there"
        return None if (problem := _not_whole(root / name, flag)) is None else f"its '{LATEST}' names {problem}"
    except FileNotFoundError:
        return f"it has no '{LATEST}'"
    except (OSError, ValueError) as error:  # no text, or longer than a path can be
        return f"its '{LATEST}' names no checkpoint ({error.strerror if isinstance(error, OSError) else error})"


def _not_whole(checkpoint: Path, flag: str) -> str | None:
    """What a checkpoint lacks, in words that begin with its name; None if it is whole. Raises FormatError."""
    try:
        manifest = read_manifest(checkpoint, flag)
    except FormatError:
        raise
    except RequestError as error:
        return str(error).removeprefix(f"{flag} {checkpoint.parent}/")
    if _NAME.fullmatch(checkpoint.name) and manifest.iteration != iteration_of(checkpoint):
        return f"{checkpoint.name}: its {MANIFEST} is of iteration {manifest.iteration}"
    return None


def later_checkpoints(root: Path, iteration: int, flag: str = "--save") -> list[Path]:
    """The whole checkpoints of a folder that come after an iteration, the newest first."""
    later = [path for path in checkpoints_in(root) if iteration_of(path) > iteration]
    return [path for path in later if _not_whole(path, flag) is None]


def read_manifest(checkpoint: Path, flag: str = "--load") -> Manifest:
    """Read and check a checkpoint's manifest: version, and that every file is there with its full size."""
    manifest = parse_manifest(checkpoint, flag)
    for name, problem in incomplete_files(checkpoint, manifest):
        raise RequestError(f"{flag} {checkpoint}: incomplete checkpoint, {name} {problem}")
    return manifest


def parse_manifest(checkpoint: Path, flag: str = "--load") -> Manifest:
    """The manifest, whatever has become of the files that it names."""
    try:
        manifest = Manifest(**json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
        _check_tables(manifest)
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"{flag} {checkpoint}: unreadable {MANIFEST} ({error})") from error
    if manifest.format_version != FORMAT_VERSION:
        raise FormatError(
            f"{flag} {checkpoint}: format version {manifest.format_version}, this program reads {FORMAT_VERSION}"
        )
    return manifest


def _check_tables(manifest: Manifest) -> None:
    needed = ("model", "layout", "files", "sha256")
    others = ("trainable", "precision", "lora", "hugging_face", "tokenizer", "data")
    tables = {name: getattr(manifest, name) for name in (*needed, *others)}
    if isinstance(manifest.hugging_face, dict):
        tables |= {f"hugging_face.{name}": content for name, content in manifest.hugging_face.items()}
    for name, table in tables.items():
        if not isinstance(table, dict) and not (table is None and name in others):
            raise TypeError(f"its {name} is no table")
    if not isinstance(manifest.optimizer, str):
        raise TypeError("its optimizer is no name")
    for name in ("iteration", "consumed_samples", "consumed_tokens"):
        if type(getattr(manifest, name)) is not int or getattr(manifest, name) < 0:
            raise TypeError(f"its {name} is no whole number of at least 0")


def incomplete_files(checkpoint: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Every file that is missing or has not its full size, and what is wrong with it."""
    for name, size in manifest.files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            yield name, "is missing" if found is None else f"has {found} bytes instead of {size}"
