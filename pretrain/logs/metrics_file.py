"""The file of --metrics: one JSON object a line."""

import json
import math
from pathlib import Path

from megatron_ext.checkpoint.directory import set_aside, write_text
from pretrain.logs.growing_file import GrowingFile
from pretrain.logs.log import Record


class MetricsFile:
    """A record is on its way to the disk as soon as it is known. What is no number in JSON (NaN, infinity) is null."""

    def __init__(self, path: str):
        self._file = GrowingFile(path)

    def write(self, record: Record) -> None:
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._file.append(json.dumps(plain, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def trim_metrics(path: str, iteration: int, in_place: bool) -> None:
    """Make a file ready to be continued at `iteration`: forget what an interrupted run wrote past it, or half.

    A run that starts anew sets an earlier one's file aside as FILE.old, and so does one that continues another run's
    checkpoint (not `in_place`) if that has gone further. So is a file that has no records.
    """
    file = Path(path).resolve()
    if not file.is_file() or file.stat().st_size == 0:
        return
    content = file.read_bytes()
    steps = {line: _iteration_of(line) for line in content.split(b"\n")}
    kept = [line for line, step in steps.items() if step is not None and step <= iteration]
    is_metrics = any(step is not None for step in steps.values())
    goes_further = any(step is not None and step > iteration for step in steps.values())
    if iteration == 0 or not is_metrics or (goes_further and not in_place):
        set_aside(file)
    if iteration > 0 and (trimmed := b"".join(line + b"\n" for line in kept)) != content:
        write_text(file, trimmed.decode())


def _iteration_of(line: bytes) -> float | None:
    """None where the line is no record: torn by a crash, or of another kind of file."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
