"""Reading text and models, and writing results that are complete or absent."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.errors import TokenizerError


def read_model(flag: str, path: Path) -> ModelProto:
    """Parse a SentencePiece model.

    Raises:
        TokenizerError: it cannot be read, or is something else.
    """
    try:
        proto = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{flag} {path}: cannot read it: {error.strerror}") from None
    except Exception:  # protobuf's DecodeError, whose module differs between its implementations
        proto = ModelProto()
    if not proto.pieces:
        raise TokenizerError(f"{flag} {path} is not a SentencePiece model")
    return proto


def read_documents(paths: Sequence[Path], key: str, advance: Callable[[int], object]) -> Iterator[str]:
    """The documents of JSON lines files (`.jsonl`, `.json`) and the lines of any other file.

    Args:
        paths: files in UTF-8.
        key: of the text in a JSON line.
        advance: told how many bytes were read since the last call.

    Raises:
        TokenizerError: a file cannot be read; the message says file:line.
    """
    for path in paths:
        json_lines = path.suffix in (".jsonl", ".json")
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    advance(len(line))
                    yield _text(line, f"{path}:{number}", key) if json_lines else line.decode("utf-8-sig")
        except OSError as error:
            raise TokenizerError(f"--input {path}: cannot read it: {error.strerror}") from None
        except UnicodeError:
            raise TokenizerError(f"--input {path}:{number}: not valid UTF-8") from None


def _text(line: bytes, where: str, key: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except UnicodeError:
        raise
    except ValueError as error:
        raise TokenizerError(f"--input {where}: not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise TokenizerError(f"--input {where}: no text under the key {key!r}; name another with --json-key")
    return record[key]


def refuse_existing(flag: str, paths: Sequence[Path], overwrite: bool) -> None:
    """Raise TokenizerError when one of `paths` exists and may not be replaced, or has no directory to go to."""
    for path in paths:
        if path.exists() and not overwrite:
            raise TokenizerError(f"{flag}: {path} exists; choose another place, or add --overwrite")
        if path.is_dir():
            raise TokenizerError(f"{flag}: {path} is a directory")


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
