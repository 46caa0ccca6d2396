"""This project's decoder straight from disk."""

import torch

from megatron_ext.checkpoint.read import Weights
from megatron_ext.models import ModelConfig
from megatron_ext.models.decoder import whole_model
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.torch_private import put_parameter
from tools.conversion.proof.outputs import Outputs, record
from tools.conversion.proof.stored_weight import StoredWeight


def run_ours(model: ModelConfig, weights: Weights, ids: torch.Tensor) -> Outputs:
    """Compute what the model makes of ids [1, s], in float32, a piece of a weight in memory at a time."""
    decoder = whole_model(model)
    for path, module in decoder.named_modules():
        for own, _ in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            name = f"{path}.{own}"
            put_parameter(module, own, StoredWeight(weights, EMBEDDING if model.tied and name == HEAD else name))
    return record(decoder.layers.values(), lambda: decoder(ids), "running this project's decoder")
