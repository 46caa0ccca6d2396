"""`python -m benchmarks.train`: training speed and memory of one device, beside transformers in the same run.

Both train the same LLaMA shape on the same random tokens with AdamW (fused), float32 master weights and, on a GPU,
bf16 products. Prints tokens/s, MFU with all attention scores counted ("full") and with half of them ("causal"),
peak memory, and the ratio of tokens/s. Without a GPU it runs a small shape, to show that the script works.

    python -m benchmarks.train                                   # every case that suits the device
    python -m benchmarks.train --case llama2-7b --no-peer
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.device import on_device
from benchmarks.peer import transformers_model
from megatron_ext.engine import BatchConfig, Engine, EngineConfig, RecomputeConfig
from megatron_ext.kernels import KernelConfig
from megatron_ext.mesh import ParallelConfig, build_grid
from megatron_ext.models import preset
from megatron_ext.models.count import flops_per_token, parameters
from megatron_ext.optim import PrecisionConfig
from pretrain.throughput import peak_tflops


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    seq_length: int
    micro_batch_size: int
    microbatches: int
    recompute: str | None = None


GPU_CASES = {
    "tinyllama-1.1b": Case("tinyllama-1.1b", 2048, 8, 4),
    "llama2-7b": Case("llama2-7b", 4096, 1, 8, recompute="full"),
}
CPU_CASES = {"tiny": Case("tiny", 256, 2, 4)}


def measure(step: Callable[[], None], warmup: int, repeats: int, device: torch.device) -> float:
    """Median seconds of a step."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(warmup):
        step()
    times = []
    for _ in range(repeats):
        start = now()
        step()
        times.append(now() - start)
    return statistics.median(times)


def tokens_of(case: Case, device: torch.device) -> torch.Tensor:
    vocabulary = preset(case.model).vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (case.micro_batch_size * case.microbatches, case.seq_length + 1)
    return torch.randint(vocabulary, shape, generator=generator).to(device)


def ours(case: Case, device: torch.device, attention: str) -> Callable[[], None]:
    """A step of this project's engine."""
    config = EngineConfig(
        model=preset(case.model),
        batch=BatchConfig(case.micro_batch_size, case.micro_batch_size * case.microbatches, case.seq_length),
        precision=PrecisionConfig(bf16=device.type == "cuda"),
        kernels=KernelConfig(attention_backend=attention),
        recompute=RecomputeConfig(case.recompute),
    )
    engine = Engine(config, build_grid(ParallelConfig(), device))
    ids = tokens_of(case, device)
    batch = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    return lambda: _forget(engine.train_step(batch, lr=1e-4))


def peer(case: Case, device: torch.device) -> Callable[[], None]:
    """The same step with transformers' model under autocast."""
    model = transformers_model(preset(case.model), device)
    if case.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    microbatches = tokens_of(case, device).chunk(case.microbatches)

    def step() -> None:
        for ids in microbatches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            (loss / case.microbatches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _forget(_: object) -> None:
    """The figures of a step stay on the device; nothing here waits for them."""


def report(
    name: str, case: Case, seconds: float, device: torch.device, peak: float | None, tokens_per_step: int
) -> float:
    rate = tokens_per_step / seconds
    model = preset(case.model)
    mfu = []
    for convention, causal in (("full", False), ("causal", True)):
        tflops = rate * flops_per_token(model, case.seq_length, causal) / 1e12
        share = f"{tflops / peak:.1%}" if peak else "n/a"
        mfu.append(f"{tflops:.4g} TFLOP/s, MFU {share} ({convention})")
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(f"  {name:14s} {rate:12,.0f} tokens/s, {seconds * 1e3:.1f} ms/step, {', '.join(mfu)}{memory}", flush=True)
    return rate


def run_case(case: Case, options: argparse.Namespace, device: torch.device) -> None:
    tokens_per_step = case.micro_batch_size * case.microbatches * case.seq_length
    peak = options.peak_tflops or peak_tflops(device)
    print(
        f"{case.model}: {parameters(preset(case.model)):,} parameters, sequences of {case.seq_length}, "
        f"{case.microbatches} microbatches of {case.micro_batch_size}, recomputation {case.recompute or 'none'}"
    )
    contenders = {"megatron-zh": lambda: ours(case, device, options.attention_backend)}
    if options.peer:
        contenders["transformers"] = lambda: peer(case, device)
    rates = {}
    for name, build in contenders.items():
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = build()
        seconds = measure(step, options.warmup, options.steps, device)
        rates[name] = report(name, case, seconds, device, peak, tokens_per_step)
        del step
    if options.peer:
        print(f"  ratio of tokens/s: {rates['megatron-zh'] / rates['transformers']:.3f}")


def main(arguments: list[str]) -> int:
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--case", nargs="+", choices=tuple(cases), default=list(cases), help="which shapes")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before measuring")
    parser.add_argument("--micro-batch-size", type=int, help="instead of the case's own")
    parser.add_argument("--attention-backend", default="auto", help="as for pretrain")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device, where its name is unknown")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure transformers too")
    options = parser.parse_args(arguments)

    def work(device: torch.device) -> None:
        for key in options.case:
            case = cases[key]
            if options.micro_batch_size:
                case = dataclasses.replace(case, micro_batch_size=options.micro_batch_size)
            run_case(case, options, device)

    return on_device(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
