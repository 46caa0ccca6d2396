"""What a run is, in the lines with which it begins."""

import dataclasses

import yaml

from megatron_ext.attention import Choice
from megatron_ext.checkpoint import Manifest, differences, model_of
from megatron_ext.engine import EngineConfig
from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import parameter_shapes
from megatron_ext.optim.trainable import describe as describe_selections
from megatron_ext.optim.trainable import select
from megatron_ext.option import flag_of
from pretrain.checkpoints import Start
from pretrain.config import RunConfig
from pretrain.run import Run

_TRAINING = ("batch", "precision", "optimizer", "lora", "data", "training")
_SCHEDULE = {
    "train_iters", "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_init",
    "lr_wsd_decay_style", "lr_wsd_decay_iters",
}  # fmt: skip


def describe(config: EngineConfig, grid: ProcessGrid, attention: Choice) -> list[str]:
    """The model and how it is spread, how attention is computed; then, where only some parameters are trained, which.

    config: validated.
    """
    selections = select(config.trainable, parameter_shapes(config.model, config.adapters))
    total = sum(s.trained + s.frozen for s in selections)
    compute = str(config.precision.compute).removeprefix("torch.")
    if grid.device.type != "meta":
        compute += f" on {grid.device.type}"
    return [
        f"{total:,} parameters, vocabulary {config.model.vocab_size} | {grid.describe} | {config.zero.describe} | "
        f"{config.batch.microbatches(grid.dp_size)} microbatches of {config.batch.micro_batch_size} x "
        f"{config.batch.seq_length} tokens per rank | compute in {compute}",
        f"attention: {attention.why}",
        *describe_selections(selections),
    ]


def introduction(run: Run) -> list[str]:
    """Say what a run is, and where it begins, in the lines before its first step."""
    config, layout = run.config, run.engine.layout
    attention = config.engine.attention(run.grid.device, documents=config.data.reset_attention_mask)
    lines = describe(config.engine, run.grid, attention)
    if len(layout.stages) > 1:
        cut = " | ".join(
            f"stage {i} (rank {rank}): layers {stage.first}-{stage.last - 1}"
            for i, (stage, rank) in enumerate(zip(layout.stages, layout.rank_of, strict=True))
        )
        lines.append(f"{layout.schedule}: {cut}")
    lines += [f"tokenizer: {run.tokenizer or 'not known, and not noted in checkpoints'}", *run.data.describe()]
    if config.engine.precision.fp16:
        lines.append(run.engine.loss_scaler.describe())
    valid = sum(corpus.samples("valid", config.engine.batch.seq_length) for corpus in run.data.corpora)
    lines += describe_limits(config, valid)
    if run.loaded is not None:
        lines += describe_start(config, run.start, run.loaded, run.resolved)
    return [*lines, run.place] if run.place else lines


def describe_start(config: RunConfig, start: Start, manifest: Manifest, resolved: str) -> list[str]:
    """How the run's checkpoint was found, which model it is of, and what goes on otherwise than it was.

    manifest: the checkpoint's. resolved: the run's configuration as YAML.
    """
    options, stored = config.checkpoint, model_of(manifest)[0]
    model = dataclasses.asdict(config.engine.model)
    told = ", ".join(
        f"{field.name} {model[field.name]}"
        for field in dataclasses.fields(stored)
        if model[field.name] != field.default
    )
    lines = [*start.remarks, f"the model is that of {start.checkpoint}: {told}"]
    for name in [name for name in differences(stored, config.engine.model) if name in options.overridden]:
        lines.append(f"{name} {model[name]} and not {getattr(stored, name)}, by --override-checkpoint-args")
    if options.embedding_init is not None and start.weights_only:
        lines.append(f"new rows of the vocabulary beside those of {start.checkpoint}: {options.embedding_init}")
    if not start.weights_only:
        lines += _changes(config, start, resolved)
    if not start.weights_only and manifest.iteration:
        lines.append(f"continuing from iteration {manifest.iteration} of {options.load}")
    return lines


def describe_limits(config: RunConfig, valid_samples: int) -> list[str]:
    """What was asked for and will not come to pass, or more than once. valid_samples: in the validation split."""
    training, lines = config.training, []
    intervals = {
        "eval_interval": (training.eval_interval, "no evaluation"),
        "exit_interval": (training.exit_interval, "it ends at its end"),
        "save_interval": (config.checkpoint.save_interval, "it saves at its end alone"),
    }
    assert training.train_iters is not None
    for name, (interval, instead) in intervals.items():
        if interval is not None and interval > training.train_iters:
            flag = f"{flag_of(name)} {interval}"
            lines.append(f"{flag} is beyond the run's --train-iters {training.train_iters}: {instead}")
    assert config.engine.batch.global_batch_size is not None
    needed = training.eval_iters * config.engine.batch.global_batch_size
    if training.eval_interval is not None and needed > valid_samples:
        lines.append(
            f"--eval-iters {training.eval_iters}: an evaluation of {needed:,} samples goes over the validation split's "
            f"{valid_samples:,} more than once"
        )
    return lines


def _changes(config: RunConfig, start: Start, resolved: str) -> list[str]:
    """Flags that say how training goes and that the run which wrote the checkpoint had otherwise, if it is known."""
    assert start.checkpoint is not None
    try:
        before = yaml.safe_load((start.checkpoint / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # none, of a conversion, or no YAML any more
        return []
    if not isinstance(before, dict):
        return []
    now = yaml.safe_load(resolved)
    fields = [field.name for group in _TRAINING for field in dataclasses.fields(config.groups()[group])]
    names = [name for name in fields if name in before and before[name] != now[name]]
    if not names:
        return []
    changed = ", ".join(f"{name} {now[name]} (was {before[name]})" for name in names)
    rate = "; the learning rate is the new schedule's from here on"
    return [f"changed since the checkpoint: {changed}{rate if _SCHEDULE & set(names) else ''}"]
