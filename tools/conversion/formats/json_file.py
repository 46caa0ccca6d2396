"""A JSON file that is a table of fields."""

import json
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError


def read_table(folder: Path, name: str, flag: str = "--input") -> dict[str, Any]:
    """Read the fields of a file. Raises RequestError, a line that starts with the flag, unless it is one such table."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{flag} {folder}: {name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise RequestError(f"{flag} {folder}: {name} cannot be read (it is no table of fields)")
    return content
