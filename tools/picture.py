"""What every program that draws asks of the file that it is to write."""

import importlib.util
from pathlib import Path

from megatron_ext.errors import RequestError


def check_picture(file: str) -> None:
    """Raise RequestError where --plot names a file that could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"--plot {file}: matplotlib is not installed: pip install matplotlib")
    if Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise RequestError(f"--plot {file}: must end in .png, .svg or .pdf")
