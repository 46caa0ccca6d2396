"""The file that `python -m pretrain --metrics` writes."""

import json
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError


def read_metrics(path: str, flag: str) -> list[dict[str, Any]]:
    """Its records, one of an iteration, at least one. Raises RequestError where `flag` names no such file."""
    try:
        records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not records or not all(isinstance(record, dict) and "iteration" in record for record in records):
            raise ValueError("no iterations in it")
    except (OSError, ValueError) as error:
        raise RequestError(f"{flag} {path}: not a metrics file of pretrain ({error})") from error
    return records
