"""What a model makes of one fixed prompt, step by step; and this project's decoder run on it, straight from disk."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from megatron_ext.checkpoint.read import Weights
from megatron_ext.models import ModelConfig
from megatron_ext.models.decoder import whole_model
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.torch_private import put_parameter
from tools.conversion.proof.stored_weight import StoredWeight

# By name, in the order of computation, all float32: EMBEDDED (what the first layer reads, [1, s, h]), `layer(0)` and
# on (what each gives, [1, s, h]), LOGITS [1, s, V].
Outputs = dict[str, torch.Tensor]
EMBEDDED, LOGITS = "embedding", "logits"

_LENGTH = 128


def layer(number: int) -> str:
    return f"layer {number}"


def prompt(vocab_size: int, longest: int) -> torch.Tensor:
    """Make the same ids for every model of this vocabulary: the first, the last, others in between.

    Those in between are multiples of the golden ratio, modulo the vocabulary: they spread evenly however many there
    are (Knuth, The Art of Computer Programming 3, 6.4), so that every shard's rows are looked at. The length is that
    at which a wrong stretch of the rotation shows: after 32 positions Llama 3.2's is like Llama 3.1's.

    longest: the model's longest sequence.
    Returns int64 [1, at most 128].
    """
    ratio = (5**0.5 - 1) / 2
    between = [int(i * ratio % 1 * vocab_size) for i in range(1, _LENGTH - 1)]
    return torch.tensor([[0, vocab_size - 1, *between][:longest]])


@torch.no_grad()
def record_outputs(layers: Iterable[nn.Module], run: Callable[[], torch.Tensor], title: str) -> Outputs:
    """Run a model and keep what its decoder layers read and give. run: gives the logits."""
    outputs: Outputs = {}
    modules = list(layers)
    with tqdm(total=len(modules), desc=title, unit="layer") as bar:
        for number, module in enumerate(modules):
            _keep(module, number, outputs, bar)
        outputs[LOGITS] = run()
    return outputs


def _keep(module: nn.Module, number: int, outputs: Outputs, bar: tqdm) -> None:
    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outputs[EMBEDDED] = args[0] if args else kwargs["hidden_states"]

    def keep_output(_: nn.Module, args: Any, output: Any) -> None:
        outputs[layer(number)] = output[0] if isinstance(output, tuple) else output
        bar.update()

    if number == 0:
        module.register_forward_pre_hook(keep_input, with_kwargs=True)
    module.register_forward_hook(keep_output)


def run_ours(model: ModelConfig, weights: Weights, ids: torch.Tensor) -> Outputs:
    """Compute what the model makes of ids [1, s], in float32, a piece of a weight in memory at a time."""
    decoder = whole_model(model)
    for path, module in decoder.named_modules():
        for own, _ in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            name = f"{path}.{own}"
            put_parameter(module, own, StoredWeight(weights, EMBEDDING if model.tied and name == HEAD else name))
    return record_outputs(decoder.layers.values(), lambda: decoder(ids), "running this project's decoder")
