"""Callbacks of the user's own, which --callback names on the command line."""

import importlib
import re
from collections.abc import Sequence

from megatron_ext.errors import RequestError
from pretrain.callbacks.callback import Callback


def load_callbacks(names: Sequence[str]) -> list[type[Callback]]:
    """Import the classes that --callback names, MODULE:CLASS each. Raises RequestError where there is no such class."""
    return [_load(name) for name in names]


def _load(name: str) -> type[Callback]:
    flag = f"--callback {name}"
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise RequestError(f"{flag}: must be MODULE:CLASS, such as stop_below:StopBelow")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:  # whatever its code raises
        reason = f"{type(error).__name__}: {error}"
        raise RequestError(f"{flag}: {module} cannot be imported ({reason}); is its folder in PYTHONPATH?") from error
    if found is None:
        raise RequestError(f"{flag}: {module} has no {attribute}")
    if not isinstance(found, type) or not issubclass(found, Callback):
        raise RequestError(f"{flag}: {attribute} is no subclass of pretrain.callbacks.Callback")
    return found
