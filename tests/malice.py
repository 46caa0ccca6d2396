"""Files that would do something if they were unpickled as Python does."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Deed:
    """Becomes a call of `function` when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def edit_metadata(checkpoint: Path, change: Callable[[Any], Any], protocol: int | None = None) -> None:
    """Change a checkpoint's .metadata. change: in place, or gives what is to be there instead."""
    file = checkpoint / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    other = change(metadata)
    file.write_bytes(pickle.dumps(metadata if other is None or isinstance(other, list) else other, protocol))
