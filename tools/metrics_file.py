"""The file that `python -m pretrain --metrics` writes."""

import contextlib
import json
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError


def read_metrics(path: str, flag: str) -> list[dict[str, Any]]:
    """Read its records, at least one, each of an iteration; figures that were no numbers are None, and half a record at
    the end, of a run that goes on or was killed, is left out. Raises RequestError where `flag` names no such file."""
    try:
        *lines, last = Path(path).read_bytes().split(b"\n")
        records = [json.loads(line) for line in lines if line.strip()]
        with contextlib.suppress(ValueError):
            records.append(json.loads(last))
        if not records or not all(isinstance(record, dict) and "iteration" in record for record in records):
            raise ValueError("no iterations in it")
    except (OSError, ValueError) as error:
        raise RequestError(f"{flag} {path}: not a metrics file of pretrain ({error})") from error
    return records
