"""What a run is, in the lines with which it begins."""

from megatron_ext.engine import EngineConfig
from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import parameter_shapes
from megatron_ext.optim.trainable import describe as describe_selections
from megatron_ext.optim.trainable import select


def describe(config: EngineConfig, grid: ProcessGrid) -> list[str]:
    """The model and how it is spread; then, where only some parameters are trained, which. config: validated."""
    selections = select(config.trainable, parameter_shapes(config.model, config.adapters))
    total = sum(s.trained + s.frozen for s in selections)
    compute = str(config.precision.compute).removeprefix("torch.")
    if grid.device.type != "meta":
        compute += f" on {grid.device.type}"
    return [
        f"{total:,} parameters, vocabulary {config.model.vocab_size} | {grid.describe} | {config.zero.describe} | "
        f"{config.batch.microbatches(grid.dp_size)} microbatches of {config.batch.micro_batch_size} x "
        f"{config.batch.seq_length} tokens per rank | compute in {compute}",
        *describe_selections(selections),
    ]
