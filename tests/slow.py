"""Which cases of a sweep the default run takes, and which wait for `--slow`."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], default: Container[Any]) -> list[Any]:
    """For pytest.mark.parametrize: all cases (a tuple: one with several values), what is not in `default` as slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if case in default else [pytest.mark.slow]
        )
        for case in cases
    ]
