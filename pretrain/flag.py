"""What flags there are, and how the text of one is read."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.option import flag_of
from pretrain.config import RunConfig

_LARGEST = 2**32 - 1  # of a whole number: the largest --seed
_LONGEST_NAME = 255  # bytes, on every file system in use


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag: the field it sets, and how its text is read."""

    group: str
    name: str
    kind: type
    repeated: bool  # several words (PREFIX ...)
    listed: bool  # one word with commas (22,21,21)
    choices: Sequence[Any] | None
    default: Any
    help: str
    metavar: str | None

    @property
    def spelled(self) -> str:
        return flag_of(self.name)

    def read(self, value: Any) -> Any:
        """A value from YAML or the command line, as the field's type; RequestError where it is none."""
        if value is None:
            return None
        if self.listed or self.repeated:
            items = value.split(",") if isinstance(value, str) and self.listed else value
            items = items if isinstance(items, (list, tuple)) else [items]
            return tuple(self._read_one(item) for item in items)
        return self._read_one(value)

    def _read_one(self, value: Any) -> Any:
        if self.kind is bool:
            return read_switch(self.spelled, value)
        try:
            if not isinstance(value, (str, int, float)) or isinstance(value, bool):
                raise ValueError
            if self.kind is int and isinstance(value, float) and value != int(value):
                raise ValueError
            result = self.kind(value)
            if isinstance(result, float) and not math.isfinite(result):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            expected = {int: "a whole number", float: "a number"}.get(self.kind, "a text")
            raise RequestError(f"{self.spelled} {value}: must be {expected}") from None
        if isinstance(result, int) and abs(result) > _LARGEST:
            raise RequestError(f"{self.spelled} {value}: must be at most {_LARGEST}")
        if isinstance(result, str):
            self._check_text(result)
        if self.choices is not None and result not in self.choices:
            raise RequestError(f"{self.spelled} {value}: must be one of {', '.join(map(str, self.choices))}")
        return result

    def _check_text(self, text: str) -> None:
        if not text.strip():
            raise RequestError(f"{self.spelled}: its value is empty")
        if _is_no_name(text):
            raise RequestError(f"{self.spelled} {text[:80]!r}...: no file can have this name, it is too long")


def _is_no_name(text: str) -> bool:
    """Whether no file system could have a file of this name, or list of names."""
    return "\0" in text or any(len(part.encode()) > _LONGEST_NAME for part in re.split("[/,]", text))


def read_switch(spelled: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{spelled} {value}: must be true or false")
    return value


def all_flags() -> dict[str, Flag]:
    """Every flag by field name."""
    flags: dict[str, Flag] = {}
    for group, config in RunConfig.kinds().items():
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            kind, repeated, listed = _shape_of(hints[field.name])
            default = None if field.default is dataclasses.MISSING else field.default
            flags[field.name] = Flag(
                group,
                field.name,
                kind,
                repeated,
                listed,
                field.metadata["choices"],
                default,
                field.metadata["help"],
                field.metadata["metavar"],
            )
    return flags


def _shape_of(hint: Any) -> tuple[type, bool, bool]:
    """The scalar type of an annotation, and whether it takes several words or a comma-separated list."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return kind, kind is str, kind is not str
    return hint, False, False
