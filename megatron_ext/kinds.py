"""Whether a configuration's values are what its fields say, wherever they come from: JSON, YAML or Python."""

import dataclasses
import sys
import types
import typing
from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.option import flag_of

_LARGEST = 2**31 - 1  # sizes are C ints somewhere
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_kinds(config: Any) -> None:
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
