"""Reading models, and writing results that are complete or absent."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.errors import TokenizerError
from tokenizer.load import find, read_bytes
from tokenizer.tokenizer_json import is_json, why_not_a_model


def read_model(flag: str, path: Path) -> ModelProto:
    """Parse a SentencePiece model: a `.model`, or a directory with a tokenizer.model.

    Raises:
        TokenizerError: it cannot be read, is cut off, or is something else; of a tokenizer.json the message says
            why it cannot stand in for a model.
    """
    file = find(flag, path)
    content = read_bytes(flag, file)
    if is_json(file, content):
        raise TokenizerError(f"{flag} {file} {why_not_a_model(content)}")
    try:
        proto = ModelProto.FromString(content)
    except Exception:  # protobuf's DecodeError, whose module differs between its implementations
        proto = ModelProto()
    if not proto.pieces:
        raise TokenizerError(f"{flag} {file} is not a SentencePiece model, or not the whole of one")
    if not proto.HasField("trainer_spec"):  # follows the pieces: a cut between two fields parses well
        raise TokenizerError(f"{flag} {file}: the end of this SentencePiece model is missing; copy it again")
    return proto


def refuse_existing(flag: str, paths: Sequence[Path], overwrite: bool) -> None:
    """Raise TokenizerError when one of `paths` exists and may not be replaced, or has no directory to go to."""
    for path in paths:
        if path.exists() and not overwrite:
            raise TokenizerError(f"{flag}: {path} exists; choose another place, or add --overwrite")
        if path.is_dir():
            raise TokenizerError(f"{flag}: {path} is a directory")


def check_outputs(outputs: Mapping[str, Path], overwrite: bool) -> None:
    """Refuse files that cannot be written, by the flags that name them.

    Raises:
        TokenizerError: a directory is missing, two flags name one file, or one exists and may not be replaced.
    """
    flags: dict[Path, str] = {}
    for flag, path in outputs.items():
        if not path.parent.is_dir():
            raise TokenizerError(f"{flag} {path}: the directory {path.parent} does not exist")
        if (other := flags.setdefault(path.resolve(), flag)) != flag:
            raise TokenizerError(f"{flag} {path} is the file of {other} too; give it another name")
        refuse_existing(flag, [path], overwrite)


def write_files(flag: str, contents: Mapping[Path, bytes]) -> None:
    """Write files by renaming finished ones into place, in the order given.

    Raises:
        TokenizerError: the directory is missing or cannot be written; nothing of this call remains.
    """
    finished: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            finished.append((Path(name), path))
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.chmod(name, 0o644)  # mkstemp's 0600 is for secrets
        for temporary, path in finished:
            temporary.replace(path)
    except OSError as error:
        raise TokenizerError(f"{flag}: cannot write to {path.parent}: {error.strerror}") from None
    finally:
        for temporary, _ in finished:
            temporary.unlink(missing_ok=True)
