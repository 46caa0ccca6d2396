"""Checkpoint directories: their names, their manifest, and how one becomes visible all at once."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError

FORMAT_VERSION = 1
LATEST = "latest"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    trainable: fields of the TrainableConfig with which it was trained. lora: fields of its adapters' LoraConfig, None
    where there are none. files: size in bytes of every other file in it.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    model: dict[str, Any]
    layout: dict[str, Any]
    has_optimizer: bool
    trainable: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def checkpoint_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def partial_path(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root / f".{checkpoint_name(iteration)}.tmp"


def replaced_path(root: Path, name: str) -> Path:
    """Where a checkpoint stands aside while another of the same iteration takes its place."""
    return root / f".{name}.old"


def remove_partials(root: Path) -> None:
    """Clear away what a killed run left unfinished."""
    for old in root.glob(".iter_*.old"):
        final = root / old.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(old)
        else:  # killed between the two renames
            os.replace(old, final)
    for path in root.glob(".iter_*.tmp"):
        shutil.rmtree(path)


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
    """Turn the finished partial directory into the checkpoint, and make it the latest."""
    partial = partial_path(root, manifest.iteration)
    final = root / checkpoint_name(manifest.iteration)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    complete = dataclasses.replace(manifest, files=sizes)
    write_text(partial / MANIFEST, json.dumps(dataclasses.asdict(complete), indent=2) + "\n")
    replaced = replaced_path(root, final.name)
    if final.exists():
        os.replace(final, replaced)
    os.replace(partial, final)
    _sync_directory(root)
    write_text(root / LATEST, final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot sync a directory
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def has_checkpoints(path: str | Path) -> bool:
    """Whether there is a complete checkpoint in, or at, this folder."""
    return (Path(path) / LATEST).is_file() or (Path(path) / MANIFEST).is_file()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `--load PATH` means: PATH itself, or the one that PATH/latest names."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise RequestError(f"--load {path}: no such directory")
    if not (path / LATEST).is_file():
        raise RequestError(f"--load {path}: neither a checkpoint ({MANIFEST}) nor a folder of checkpoints ({LATEST})")
    name = (path / LATEST).read_text(encoding="utf-8").strip()
    for checkpoint in (path / name, replaced_path(path, name)):
        if (checkpoint / MANIFEST).is_file():
            return checkpoint
    raise RequestError(f"--load {path}: its '{LATEST}' names {name!r}, which is not a complete checkpoint there")


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check a checkpoint's manifest: version, and that every file is there with its full size."""
    try:
        fields = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**fields)
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(f"--load {checkpoint}: unreadable {MANIFEST} ({error})") from error
    if manifest.format_version != FORMAT_VERSION:
        raise RequestError(
            f"--load {checkpoint}: format version {manifest.format_version}, this program reads {FORMAT_VERSION}"
        )
    for name, size in manifest.files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            problem = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise RequestError(f"--load {checkpoint}: incomplete checkpoint, {name} {problem}")
    return manifest
