"""Checkpoint directories: their names, their manifest, and how one becomes visible all at once."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.digest import sha256_of
from megatron_ext.errors import RequestError

FORMAT_VERSION = 1
LATEST = "latest"
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    trainable: fields of the TrainableConfig with which it was trained. precision: of its PrecisionConfig; both None
    where they are not known. lora: of its adapters' LoraConfig, None where there are none. hugging_face: contents of
    config.json and generation_config.json, by file name, of the Hugging Face model that the weights came from, for the
    way back. tokenizer: plain fields that say on which tokenizer's ids the model was trained; None where nobody knows.
    files: size in bytes of every other file in it. sha256: hex digest of each of `files`; empty in checkpoints of older
    versions.
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
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def checkpoint_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def partial_path(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return root / f".{checkpoint_name(iteration)}.tmp"


def replaced_path(root: Path, name: str) -> Path:
    """Where a checkpoint stands aside while another of the same iteration takes its place."""
    return root / f".{name}.old"


def leftovers(root: Path) -> list[Path]:
    """What a killed run left unfinished: checkpoints that were being written or stood aside."""
    return [path for kind in ("old", "tmp") for path in sorted(root.glob(f".iter_*.{kind}"))]


def remove_partials(root: Path) -> None:
    """Clear away what a killed run left unfinished."""
    for path in leftovers(root):
        final = root / path.name.removeprefix(".").removesuffix(".old")
        if path.suffix == ".tmp" or final.exists():
            shutil.rmtree(path)
        else:  # killed between the two renames
            os.replace(path, final)


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

    manifest: its `files` are filled in here, and in `sha256` the digests that are not there yet.
    """
    partial = partial_path(root, manifest.iteration)
    final = root / checkpoint_name(manifest.iteration)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    digests = {name: manifest.sha256.get(name) or sha256_of(partial / name) for name in sizes}
    complete = dataclasses.replace(manifest, files=sizes, sha256=digests)
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


def find_checkpoint(path: str | Path, flag: str = "--load") -> Path:
    """The checkpoint that `flag PATH` means: PATH itself, or the one that PATH/latest names."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if not path.is_dir():
        raise RequestError(f"{flag} {path}: no such directory")
    if not (path / LATEST).is_file():
        raise RequestError(f"{flag} {path}: neither a checkpoint ({MANIFEST}) nor a folder of checkpoints ({LATEST})")
    try:
        name = (path / LATEST).read_text(encoding="utf-8").strip()
        for checkpoint in (path / name, replaced_path(path, name)):
            if (checkpoint / MANIFEST).is_file():
                return checkpoint
    except (OSError, ValueError) as error:  # no text, or longer than a path can be
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{flag} {path}: its '{LATEST}' names no checkpoint ({reason})") from error
    raise RequestError(f"{flag} {path}: its '{LATEST}' names {name!r}, which is not a complete checkpoint there")


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
        raise RequestError(
            f"{flag} {checkpoint}: format version {manifest.format_version}, this program reads {FORMAT_VERSION}"
        )
    return manifest


def _check_tables(manifest: Manifest) -> None:
    needed = ("model", "layout", "files", "sha256")
    others = ("trainable", "precision", "lora", "hugging_face", "tokenizer")
    tables = {name: getattr(manifest, name) for name in (*needed, *others)}
    if isinstance(manifest.hugging_face, dict):
        tables |= {f"hugging_face.{name}": content for name, content in manifest.hugging_face.items()}
    for name, table in tables.items():
        if not isinstance(table, dict) and not (table is None and name in others):
            raise TypeError(f"its {name} is no table")
    for name in ("iteration", "consumed_samples", "consumed_tokens"):
        if type(getattr(manifest, name)) is not int:
            raise TypeError(f"its {name} is no whole number")


def incomplete_files(checkpoint: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Every file that is missing or has not its full size, and what is wrong with it."""
    for name, size in manifest.files.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            yield name, "is missing" if found is None else f"has {found} bytes instead of {size}"
