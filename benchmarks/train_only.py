"""`python -m benchmarks.train_only`: what training a part of the model saves, beside transformers in the same run.

Every kind of --train-only takes its steps in turn with the others, so that a busy machine slows all of them alike.
Prints for each: tokens/s and its ratio to full training, and bytes of weights, of gradients just before the update, of
Adam's moments, and of what one microbatch keeps for its backward pass (tensors saved by autograd, weights left out).
One device; a small shape on a CPU, LLaMA 2's layers on a GPU.

    python -m benchmarks.train_only
    python -m benchmarks.train_only --model llama2-7b --num-layers 8 --seq-length 2048
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.device import on_device
from benchmarks.peer import transformers_model
from megatron_ext.engine import BatchConfig, Engine, EngineConfig
from megatron_ext.mesh import ParallelConfig, build_grid
from megatron_ext.models import ModelConfig, preset, preset_names
from megatron_ext.optim import PrecisionConfig, ShardedOptimizer, TrainableConfig
from megatron_ext.optim.algorithm import STEP
from megatron_ext.zero import ZeroConfig

_NEW_SHARE = 0.36  # of the rows: 17,953 of 49,953, as in Chinese-LLaMA
_CPU_SHAPE = ModelConfig(
    num_layers=6, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=8, vocab_size=8000
)  # embeddings are a quarter of it, in a 7B model with 49,953 rows 6 %


@dataclasses.dataclass
class Contender:
    """A step, and what it holds. look: called just before the update."""

    step: Callable[[], object]
    weights: list[torch.Tensor]
    trained: list[torch.Tensor]
    moments: Callable[[], Iterable[torch.Tensor]]
    flops_per_token: float
    gradients: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)

    def look(self) -> None:
        self.gradients = sum(_local(p.grad).nbytes for p in self.trained if p.grad is not None)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def kinds(vocab_size: int) -> dict[str, TrainableConfig]:
    base = round(vocab_size * (1 - _NEW_SHARE))
    return {
        "full": TrainableConfig(),
        "embeddings": TrainableConfig("embeddings", True),
        "input embedding": TrainableConfig("embeddings"),
        "new-rows": TrainableConfig("new-rows", True, base),
        "lora": TrainableConfig("lora"),
    }


def ours(model: ModelConfig, batch: BatchConfig, trainable: TrainableConfig, device: torch.device) -> Contender:
    precision = PrecisionConfig(bf16=device.type == "cuda")
    config = EngineConfig(model, batch, trainable=trainable, precision=precision, zero=ZeroConfig(zero_stage=0))
    engine = Engine(config, build_grid(ParallelConfig(), device))
    optimizer = engine.optimizer
    assert isinstance(optimizer, ShardedOptimizer)
    ids = tokens(model, batch, device)
    data = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    contender = Contender(
        step=lambda: engine.train_step(data, lr=1e-4),
        weights=[_local(p) for p in engine.parameters.values()],
        trained=list(optimizer.params.values()),
        moments=lambda: (v for s in optimizer.local_states.values() for kind, v in s.items() if kind != STEP),
        flops_per_token=config.flops_per_token(causal=False),
    )
    update = optimizer.update

    def watched(*arguments: Any) -> Any:
        contender.look()
        return update(*arguments)

    optimizer.update = watched  # type: ignore[method-assign, assignment]
    return contender


def peer(model: ModelConfig, batch: BatchConfig, trainable: TrainableConfig, device: torch.device) -> Contender:
    """transformers with the same parameters frozen, and torch's AdamW over the others."""
    llama = transformers_model(model, device)
    for name, param in llama.named_parameters():
        param.requires_grad_(trainable.trains(name.removeprefix("model.")))
    trained = [param for param in llama.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    assert batch.global_batch_size is not None
    microbatches = tokens(model, batch, device).split(batch.micro_batch_size)

    def step() -> None:
        for ids in microbatches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = llama(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            (loss / len(microbatches)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        contender.look()
        optimizer.step()
        optimizer.zero_grad()

    contender = Contender(
        step,
        weights=list(llama.parameters()),
        trained=trained,
        moments=lambda: (v for s in optimizer.state.values() for key, v in s.items() if key != "step"),
        flops_per_token=0.0,
    )
    return contender


def tokens(model: ModelConfig, batch: BatchConfig, device: torch.device) -> torch.Tensor:
    assert batch.global_batch_size is not None
    generator = torch.Generator().manual_seed(0)
    shape = (batch.global_batch_size, batch.seq_length + 1)
    return torch.randint(model.vocab_size, shape, generator=generator).to(device)


def saved_bytes(contender: Contender, microbatches: int) -> int:
    """Distinct storage that autograd keeps in a step, by microbatch, without the weights'."""
    weights = {w.untyped_storage().data_ptr() for w in contender.weights}
    seen: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = _local(tensor).untyped_storage()
        if storage.data_ptr() not in weights:
            seen[id(storage)] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contender.step()
    by_address = {storage.data_ptr(): storage.nbytes() for storage in seen.values()}
    return sum(by_address.values()) // microbatches


def run(options: argparse.Namespace, device: torch.device) -> None:
    model = preset(options.model) if options.model else _CPU_SHAPE
    if options.num_layers:
        model = dataclasses.replace(model, num_layers=options.num_layers)
    batch = BatchConfig(options.micro_batch_size, options.micro_batch_size * options.microbatches, options.seq_length)
    model.validate_length(batch.seq_length)
    contenders: dict[str, Contender] = {}
    for name, trainable in kinds(model.vocab_size).items():
        contenders[name] = ours(model, batch, trainable, device)
        if options.peer and name in ("full", "embeddings", "input embedding"):
            contenders[f"transformers, {name}"] = peer(model, batch, trainable, device)
    kept = {name: saved_bytes(contender, options.microbatches) for name, contender in contenders.items()}
    gc.collect()
    for _ in range(options.steps):
        for contender in contenders.values():
            start = _now(device)
            contender.step()
            contender.seconds.append(_now(device) - start)
    report(contenders, kept, options)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(contenders: dict[str, Contender], kept: dict[str, int], options: argparse.Namespace) -> None:
    per_step = options.micro_batch_size * options.microbatches * options.seq_length
    full = statistics.median(contenders["full"].seconds)
    flops = contenders["full"].flops_per_token
    print("MB: weights, gradients, moments, kept by a microbatch; speed and FLOPs by those of full training")
    print(f"{'':30s}{'tokens/s':>9s}{'speed':>8s}{'FLOPs':>8s}{'weights':>9s}{'grads':>8s}{'moments':>9s}{'kept':>8s}")
    for name, c in contenders.items():
        seconds = statistics.median(c.seconds)
        held = (sum(w.nbytes for w in c.weights), c.gradients, sum(m.nbytes for m in c.moments()), kept[name])
        share = f"{c.flops_per_token / flops:8.2f}" if c.flops_per_token else f"{'':8s}"
        sizes = "".join(f"{value / 1e6:{width}.1f}" for value, width in zip(held, (9, 8, 9, 8), strict=True))
        print(f"{name:30s}{per_step / seconds:9.0f}{full / seconds:8.2f}{share}{sizes}")


def main(arguments: list[str]) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_only", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=preset_names(), default="llama2-7b" if cuda else None, help="a preset")
    parser.add_argument("--num-layers", type=int, default=4 if cuda else None, help="instead of the preset's own")
    parser.add_argument("--seq-length", type=int, default=2048 if cuda else 256)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure transformers too")
    options = parser.parse_args(arguments)
    return on_device(lambda device: run(options, device))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
