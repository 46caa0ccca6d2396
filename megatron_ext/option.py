"""How a configuration field says what its command-line flag looks like.

A configuration is a frozen dataclass beside the code that uses it. The flag of a field is its name with
dashes, as in Megatron-LM; only `pretrain/` turns these into a parser.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_ext.errors import RequestError


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


def flag_of(name: str) -> str:
    """Spell the flag of a field: `num_layers` is `--num-layers`."""
    return "--" + name.replace("_", "-")


def field_of(flag: str) -> str:
    """Name the field of a flag, which may stand without its dashes in front."""
    return flag.removeprefix("--").replace("-", "_")


def refuse_unused(config: Any, names: Sequence[str], needed: str) -> None:
    """Raise RequestError if any of these fields was given: without `needed` it would be accepted and ignored."""
    for field in dataclasses.fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise RequestError(f"{flag_of(field.name)} {getattr(config, field.name)} has no effect without {needed}")
