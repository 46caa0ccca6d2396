"""transformers' own implementation of a model's folder, straight from disk.

Nobody here wrote it: a mistake in our mapping cannot cancel itself out in it.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from megatron_ext.checkpoint.read import Weights
from megatron_ext.errors import RequestError
from megatron_ext.torch_private import put_parameter
from tools.conversion.proof.outputs import Outputs, record_outputs
from tools.conversion.proof.stored_weight import StoredWeight
from tools.conversion.source import CONFIG

_OLDEST = 5  # major version


class NotRunnable(Exception):
    """Nothing is known to be wrong, but this model cannot be run here; the text says why, and what would do."""


def run_transformers(folder: Path, tensors: Weights, ids: torch.Tensor) -> Outputs:
    """Compute what the model that `folder`'s config.json describes makes of ids [1, s], in float32.

    Memory: a piece of a tensor, or (where a module does more with it than a product) the tensor.

    Args:
        tensors: the folder's, by the names in its files.

    Raises:
        NotRunnable: transformers is not there, or has no such model.
        RequestError: it has, and the folder is not one of it.
    """
    model = _without_values(folder)
    for module, names in _stored_names(folder, model, tensors).items():
        for own, stored in names.items():
            put_parameter(module, own, StoredWeight(tensors, stored))
    layers = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )
    options = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        return record_outputs(layers, lambda: model(input_ids=ids, **options).logits, "running transformers' model")
    except RequestError:
        raise
    except Exception as error:  # of many kinds, by model
        raise RequestError(f"{folder}: transformers cannot run what {CONFIG} describes ({error})") from error


def _without_values(folder: Path) -> Any:
    """The model with its parameters on the meta device; what it computes of its configuration, it has."""
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, __version__
    except ImportError as error:
        raise NotRunnable("transformers is not installed: pip install transformers") from error
    if int(__version__.split(".")[0]) < _OLDEST:
        raise NotRunnable(f"transformers {__version__} is too old: pip install 'transformers>={_OLDEST}'")
    model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise NotRunnable(f"transformers has no model of its own of the type {model_type}")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with _parameters_on_meta():
            return AutoModelForCausalLM.from_config(config, **options).eval()
    except Exception as error:  # of many kinds, by model
        raise RequestError(f"{folder}: transformers cannot build what {CONFIG} describes ({error})") from error


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made within have no memory for their parameters, and have their buffers.

    (Under `torch.device("meta")` the buffers, such as frequencies of the rotation, would be lost.)
    """

    def move(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # its stub forgets the result
    try:
        yield
    finally:
        handle.remove()


def _stored_names(folder: Path, model: Any, tensors: Weights) -> dict[nn.Module, dict[str, str]]:
    """Of every module with parameters of its own: their names in it -> their names in the files.

    Files may lack the prefix of the model within the model with a head, and all but one name of a tied tensor.
    """
    tied = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied[parameter].append(name)
    found: dict[nn.Module, dict[str, str]] = defaultdict(dict)
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            names = [name, *tied[parameter]]
            names += [each.removeprefix(f"{model.base_model_prefix}.") for each in names]
            stored = next((each for each in names if each in tensors.shapes), None)
            if stored is None:
                raise RequestError(f"{folder}: lacks {name}, which transformers' {type(model).__name__} has")
            if tensors.shapes[stored] != parameter.shape:
                wanted = f"{type(model).__name__} has {tuple(parameter.shape)}"
                raise RequestError(f"{folder}: {stored} is {tuple(tensors.shapes[stored])}, transformers' {wanted}")
            found[module][own] = stored
    return found
