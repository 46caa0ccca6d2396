"""How a configuration field says what its command-line flag looks like.

A configuration is a frozen dataclass beside the code that uses it. The flag of a field is its name with
dashes (`num_layers` -> `--num-layers`), as in Megatron-LM; only `pretrain/` turns these into a parser.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Sequence[Any] | None = None,
    factory: Any = dataclasses.MISSING,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with a help line, and the values it may take."""
    metadata = {"help": help, "choices": choices, "metavar": metavar}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
