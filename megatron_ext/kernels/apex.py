"""NVIDIA's apex, and the other project of that name."""

import importlib.util
from pathlib import Path

from megatron_ext.errors import RequestError

_OF_NVIDIA = "normalization/fused_layer_norm.py"


def check_apex() -> None:
    """Raise RequestError where the installed `apex` is not NVIDIA's. It is looked at and not imported.

    PyPI's `apex` is a toolkit for the web framework Pyramid; NVIDIA's is not on PyPI (README, "First real use").
    """
    spec = importlib.util.find_spec("apex")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    if spec is not None and not any((folder / _OF_NVIDIA).is_file() for folder in folders):
        where = folders[0] if folders else spec.origin
        raise RequestError(
            f"--transformer-impl apex: the `apex` in {where} is not NVIDIA's but another project, which PyPI has under "
            "this name: pip uninstall apex, and install NVIDIA's from its source (README)"
        )
