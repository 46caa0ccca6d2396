"""One training run of the experiment, in one process: start, train a part, measure on the way."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.expansion.texts import Documents, encode, flat, mixed, read_text, sample, vocabulary
from megatron_ext.engine import BatchConfig, Engine, EngineConfig
from megatron_ext.mesh import ParallelConfig, build_grid, init_distributed
from megatron_ext.models import ModelConfig
from megatron_ext.models.expand import Expansion
from megatron_ext.optim import OptimizerConfig, TrainableConfig, learning_rate
from megatron_ext.tensor_parallel import LoraConfig, adapter_product
from megatron_ext.zero import ZeroConfig
from tokenizer.merge.decompose import decompose

SEQ_LENGTH, BATCH = 128, 16
SHAPE: dict[str, Any] = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 4}
REGIMES: dict[str, dict[str, Any]] = {
    "full": {},
    "embeddings": {"train_only": "embeddings", "train_output_embeddings": True},
    "input embedding only": {"train_only": "embeddings"},
    "new rows": {"train_only": "new-rows", "train_output_embeddings": True},
    "LoRA + embeddings": {"train_only": "lora"},
}
_WARMUP = 10


@dataclasses.dataclass(frozen=True)
class Trial:
    """Stages of (regime, learning rate, steps), from the base model. init: of its new rows; None: not expanded."""

    name: str
    init: str | None
    stages: tuple[tuple[str, float, int], ...]
    measure_every: int = 10


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all trials share: folder with base.model, expanded/ and base.pt, files of text, characters to measure on."""

    folder: Path
    english: tuple[Path, ...]
    chinese: tuple[Path, ...]
    measured_characters: int
    seed: int = 1234

    def tokenizer(self, expanded: bool) -> Path:
        return self.folder / "expanded" / "tokenizer.model" if expanded else self.folder / "base.model"


def start_process() -> None:
    """A world of one, once per process."""
    if not dist.is_initialized():
        torch.set_num_threads(1)
        init_distributed()


def build(vocab_size: int, regime: str, base_vocab_size: int, lr: float, seed: int) -> Engine:
    options = dict(REGIMES[regime])
    if options.get("train_only") == "new-rows":
        options["base_vocab_size"] = base_vocab_size
    config = EngineConfig(
        model=ModelConfig(vocab_size=vocab_size, **SHAPE),
        batch=BatchConfig(BATCH, BATCH, SEQ_LENGTH),
        zero=ZeroConfig(zero_stage=0),
        optimizer=OptimizerConfig(lr=lr),
        trainable=TrainableConfig(**options),
        lora=LoraConfig(),
        seed=seed,
    )
    return Engine(config, build_grid(ParallelConfig(), torch.device("cpu")))


class Batches:
    """Rows of SEQ_LENGTH + 1 tokens, in order, from the start again at the end."""

    def __init__(self, tokens: torch.Tensor):
        self._rows = tokens[: len(tokens) // SEQ_LENGTH * SEQ_LENGTH + 1].unfold(0, SEQ_LENGTH + 1, SEQ_LENGTH)
        self._next = 0

    def take(self) -> dict[str, torch.Tensor]:
        index = torch.arange(self._next, self._next + BATCH) % len(self._rows)
        self._next += BATCH
        return {"tokens": self._rows[index][:, :-1].contiguous(), "labels": self._rows[index][:, 1:].contiguous()}


class BitsPerCharacter:
    """-log2 p(text) / characters of held-out documents, in windows of SEQ_LENGTH: comparable across vocabularies."""

    def __init__(self, model: Path, documents: Documents, characters: int):
        taken = sample(documents, characters)
        self._characters = sum(map(len, taken))
        tokens = encode(model, taken)
        room = BATCH * SEQ_LENGTH
        filled = torch.zeros(-(-(len(tokens) - 1) // room) * room + 1, dtype=torch.int64)
        filled[: len(tokens)] = tokens
        mask = (torch.arange(len(filled) - 1) < len(tokens) - 1).float()
        parts = {"tokens": filled[:-1], "labels": filled[1:], "loss_mask": mask}
        split = {name: part.view(-1, BATCH, SEQ_LENGTH) for name, part in parts.items()}
        self._batches = [{name: part[i] for name, part in split.items()} for i in range(len(split["tokens"]))]

    def measure(self, engine: Engine) -> float:
        tokens = sum(batch["loss_mask"].sum().item() for batch in self._batches)
        return engine.evaluate(self._batches).item() * tokens / math.log(2) / self._characters


def train_base(
    setting: Setting, chinese_share: float, lr: float, steps: int, report: Callable[[float], object]
) -> dict[str, torch.Tensor]:
    """A model of the base vocabulary from nothing, on English with a share of Chinese. Its weights by name."""
    start_process()
    english, chinese = read_text(list(setting.english)), read_text(list(setting.chinese))
    tokenizer = setting.tokenizer(expanded=False)
    batches = Batches(encode(tokenizer, mixed(english, chinese, chinese_share), setting.seed))
    schedule = OptimizerConfig(lr=lr, min_lr=lr / 20, lr_warmup_iters=50)
    vocab_size = vocabulary(tokenizer)
    engine = build(vocab_size, "full", vocab_size, lr, setting.seed)
    for step in range(steps):
        report(engine.train_step(batches.take(), learning_rate(schedule, step, steps))[0].item())
    return merged(engine)


def start_weights(setting: Setting, init: str | None) -> dict[str, torch.Tensor]:
    """The base model's weights, with new rows where `init` asks for them."""
    weights: dict[str, torch.Tensor] = torch.load(setting.folder / "base.pt")
    if init is None:
        return weights
    new = decompose("--base", setting.tokenizer(False), "--tokenizer", setting.tokenizer(True))
    method, _, correction = init.partition(" + ")
    expansion = Expansion(new.old_size, new.parts, method, setting.seed, 0.02, norm_correction=bool(correction))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], expansion.new_rows(name, rows_of(weights[name])).values])
    return weights


def rows_of(matrix: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: matrix[start:stop]


def load(engine: Engine, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, param in engine.parameters.items():
            if name in weights:
                param.to_local().copy_(weights[name])  # type: ignore[attr-defined]


def merged(engine: Engine) -> dict[str, torch.Tensor]:
    """The engine's weights with its adapters, if any, added to what they adapt."""
    weights = {name: param.detach().to_local().clone() for name, param in engine.parameters.items()}  # type: ignore[attr-defined]
    for name in [name for name in weights if name.endswith(".lora.a")]:
        linear = name.removesuffix(".lora.a")
        a, b = weights.pop(name), weights.pop(f"{linear}.lora.b")
        weights[f"{linear}.weight"] += adapter_product(a, b, engine.config.lora.scale)
    return weights


def run_trial(setting: Setting, trial: Trial) -> dict[str, Any]:
    """Train as the trial says. Returns its measurements: step, bits per character by language."""
    start_process()
    torch.manual_seed(setting.seed)
    model = setting.tokenizer(trial.init is not None)
    english, chinese = read_text(list(setting.english)), read_text(list(setting.chinese))
    measures = {
        language: BitsPerCharacter(model, text.held_out, setting.measured_characters)
        for language, text in (("chinese", chinese), ("english", english))
    }
    batches = Batches(encode(model, flat(chinese.train), setting.seed))
    weights = start_weights(setting, trial.init)
    vocab_size = len(weights["embed_tokens.weight"])
    base_size = vocabulary(setting.tokenizer(expanded=False))
    points: list[dict[str, Any]] = []
    done = 0
    for regime, lr, steps in trial.stages:
        engine = build(vocab_size, regime, base_size, lr, setting.seed)
        load(engine, weights)
        for step in range(steps + 1):
            if step % trial.measure_every == 0 and (step or not points):
                figures = {language: measure.measure(engine) for language, measure in measures.items()}
                points.append({"step": done + step, **figures})
            if step < steps:
                engine.train_step(batches.take(), lr * min(1, (step + 1) / _WARMUP))
        done += steps
        weights = merged(engine)
    return {"trial": dataclasses.asdict(trial), "points": points}
