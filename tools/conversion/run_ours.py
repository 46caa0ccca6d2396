"""This project's decoder straight from disk, one layer of it in memory at a time."""

import torch
from tqdm import tqdm

from megatron_ext.checkpoint.read import Weights
from megatron_ext.kernels import KernelConfig, load_kernels
from megatron_ext.models import Decoder, ModelConfig, StageSpec
from megatron_ext.models.names import EMBEDDING as EMBEDDING_WEIGHT
from megatron_ext.models.names import HEAD as HEAD_WEIGHT
from megatron_ext.tensor_parallel import TensorParallel
from tools.conversion.outputs import EMBEDDING, LOGITS, Outputs, layer, read_float32


@torch.no_grad()
def run_ours(model: ModelConfig, weights: Weights, ids: torch.Tensor) -> Outputs:
    """What the model makes of ids [1, s], computed in float32 as the stages of a pipeline, one after the other.

    Memory: one layer, or the embedding, or the head, in float32.
    """
    last = model.num_layers
    stages = {EMBEDDING: StageSpec(0, 0, has_embedding=True, has_head=False)}
    stages |= {layer(i): StageSpec(i, i + 1, has_embedding=False, has_head=False) for i in range(last)}
    stages[LOGITS] = StageSpec(last, last, has_embedding=False, has_head=True)
    outputs: Outputs = {}
    x = ids
    for name, stage in tqdm(stages.items(), desc="running this project's decoder", unit="layer"):
        x = outputs[name] = _load(model, stage, weights)(x)
    return outputs


def _load(model: ModelConfig, stage: StageSpec, weights: Weights) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(model, stage, TensorParallel(), load_kernels(KernelConfig()), torch.float32)
    stored = {HEAD_WEIGHT: EMBEDDING_WEIGHT} if model.tied else {}
    state = {name: read_float32(weights, stored.get(name, name)) for name, _ in decoder.named_parameters()}
    decoder.load_state_dict(state, assign=True)
    return decoder
