"""How a configuration field says what its command-line flag looks like, and whether values are what fields say.

A configuration is a frozen dataclass beside the code that uses it. The flag of a field is its name with
dashes, as in Megatron-LM; only `pretrain/` turns these into a parser.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

from megatron_ext.errors import RequestError

_LARGEST = 2**31 - 1  # sizes are C ints somewhere
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


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


def check_types(config: Any) -> None:
    """Raise RequestError naming the first field of a dataclass that is not of its annotation, or none of its choices.

    Whole numbers do for a float, and a list for a tuple; whole numbers are at most 2**31 - 1.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind: Any = field.type
        if isinstance(kind, types.UnionType):
            if value is None:
                continue
            (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        several = typing.get_origin(kind) is tuple
        if several and not isinstance(value, (list, tuple)):
            raise RequestError(f"{_said(field.name, value)}: must be a list")
        kind = typing.get_args(kind)[0] if several else kind
        for item in value if several else [value]:
            if not _is_a(kind, item):
                raise RequestError(f"{_said(field.name, item)}: must be {_EXPECTED[kind]}")
            if kind is int and abs(item) > _LARGEST:
                raise RequestError(f"{_said(field.name, item)}: must be at most {_LARGEST}")
            choices = field.metadata["choices"]
            if choices is not None and item not in choices:
                raise RequestError(f"{_said(field.name, item)}: must be one of {', '.join(map(str, choices))}")


def _is_a(kind: Any, value: Any) -> bool:
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # false of NaN
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _said(name: str, value: Any) -> str:
    """The flag and its value, on one line whatever the value is."""
    text = " ".join(str(value).split())
    return f"{flag_of(name)} {text if len(text) <= 80 else text[:80] + '...'}"
