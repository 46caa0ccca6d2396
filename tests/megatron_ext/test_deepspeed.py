"""DeepSpeed's ZeRO under our layers and our schedule trains what one process does."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron_ext.checkpoint import CheckpointWriter, Manifest, find_checkpoint, load_checkpoint
from megatron_ext.checkpoint.load import mesh_sizes
from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.footprint import ModelStates
from megatron_ext.mesh import build_grid
from megatron_ext.models.count import parameters
from megatron_ext.zero.deepspeed.adapt import use_disk
from tests.distributed import Pool
from tests.megatron_ext.layouts import Layout, Reference, assert_parity, layout
from tests.megatron_ext.test_communication import GATHER, REDUCE, SCATTER, Collectives, volume
from tests.megatron_ext.training import LR, STEPS, global_batch, one_process, share, tiny, train, worst
from tests.slow import sweep

pytest.importorskip("deepspeed")

CPU = {"offload_optimizer": "cpu"}


def deepspeed(*degrees: int, **options: Any) -> Layout:
    return layout(*degrees, zero_engine="deepspeed", **options)


LAYOUTS: dict[str, Layout] = {
    **{f"TP2 PP2 DP2 SP ZeRO-{zero}": deepspeed(2, 2, 2, zero=zero, sp=True) for zero in (1, 2, 3)},
    "DP4 ZeRO-3": deepspeed(dp=4, zero=3),
    "DP8 ZeRO-3, norms that seven ranks fill": deepspeed(dp=8, zero=3, hidden_size=20, num_attention_heads=2),
    "TP4 SP, 2 KV heads": deepspeed(tp=4, sp=True, num_query_groups=2, zero=2),
    "DP2 ZeRO-1, tied": deepspeed(dp=2, zero=1, untie_embeddings_and_output_weights=False),
    "DP2 ZeRO-3, tied": deepspeed(dp=2, zero=3, untie_embeddings_and_output_weights=False),
    "PP2 DP2 gpipe ZeRO-3, recompute full": deepspeed(
        pp=2, dp=2, schedule="gpipe", zero=3, recompute_granularity="full", documents=True
    ),
    "TP2 PP2 SP ZeRO-1, documents and masks": deepspeed(tp=2, pp=2, sp=True, zero=1, documents=True),
    **{
        f"PP2 DP2 ZeRO-{zero}, offload": deepspeed(pp=2, dp=2, zero=zero, documents=zero == 3, **CPU)
        for zero in (1, 2, 3)
    },
    "one process ZeRO-2, offload": deepspeed(zero=2, **CPU),
    "DP2 ZeRO-3, offload of parameters too": deepspeed(dp=2, zero=3, offload_param="cpu", **CPU),
}


# Stage 3 in a pipeline is in the default cases below: of checkpoints, and of gradients that are not finite.
BY_DEFAULT = {
    *("TP2 PP2 SP ZeRO-1, documents and masks", "one process ZeRO-2, offload"),
    "DP2 ZeRO-3, offload of parameters too",
}


@pytest.mark.parametrize("name", sweep(LAYOUTS, BY_DEFAULT))
def test_layout_equals_one_process(pool: Pool, reference: Reference, name: str) -> None:
    case = LAYOUTS[name]
    config = tiny(**case.options)
    expected = reference(config, case.documents)
    runs = pool.run(train, case.ranks, config, case.documents, (0, STEPS // 2))
    assert_parity(runs, expected, name, "float32")


@pytest.mark.parametrize(
    "options",
    sweep(
        [
            {"pp": 2, "dp": 2, "num_layers": 5, "pipeline_layers": (4, 1)},
            {"pp": 2, "dp": 2, "num_layers": 5, "pipeline_layers": (4, 1), **CPU},
            {"tp": 2, "dp": 2, "sp": True, "recompute_granularity": "full"},
        ],
        [],
    ),
    ids=str,
)
def test_stage_3_with_every_parameter_sharded(
    pool: Pool, reference: Reference, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Else all parameters of so small a model stay whole; and in several sub-groups, not as many on each stage."""
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 3000}})
    )
    case = deepspeed(zero=3, deepspeed_config=str(file), **options)
    runs = pool.run(train, case.ranks, tiny(**case.options), False, (0, STEPS // 2))
    assert_parity(runs, reference(tiny(**case.options)), str(options), "float32")


@pytest.mark.parametrize("zero", sweep((1, 2, 3), {1}))
def test_bf16_stays_close_to_float32(pool: Pool, reference: Reference, zero: int) -> None:
    """By as much as torch's engine may (test_parity.py): masters and accumulated gradients are float32."""
    case = deepspeed(pp=2, dp=2, zero=zero)
    expected = reference(tiny(**case.options))
    runs = pool.run(train, case.ranks, tiny(**case.options, bf16=True))
    assert worst(runs[0].losses, expected.losses) <= 1e-3
    assert worst(runs[0].norms, expected.norms) <= 1e-2


def second_copies(config: EngineConfig) -> bool:
    """Whether this rank has a second copy of some weights after a forward pass, cut over two ranks."""
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    engine.evaluate([share(global_batch(config, 0), engine.grid, config.batch.micro_batch_size)])
    copies = [(p.ds_secondary_tensor, p.ds_numel) for p in engine.parameters.values()]  # type: ignore[attr-defined]
    return any(copy is not None and copy.numel() == numel // 2 for copy, numel in copies)


@pytest.mark.slow
def test_secondary_partition_of_zero_plus_plus(pool: Pool, reference: Reference, tmp_path: Path) -> None:
    """hpZ (arXiv 2306.10209): weights for backward are gathered within groups of two."""
    file = tmp_path / "ds.json"
    zero = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = tiny(**deepspeed(dp=4, zero=3, deepspeed_config=str(file)).options)
    assert all(pool.run(second_copies, 4, config))
    assert_parity(pool.run(train, 4, config, False, (0, STEPS // 2)), reference(config), "hpZ", "float32")
    ((_, went_on),) = pool.run(write, 1, one_process(config), tmp_path)
    for _, goes_on in pool.run(read, 4, config, tmp_path):  # loaded over the copies of other weights
        assert torch.tensor(goes_on) == pytest.approx(torch.tensor(went_on), rel=2e-5)


def disk_twice(folder: str) -> str:
    lock = use_disk(folder)
    with pytest.raises(RequestError) as error:
        use_disk(folder)
    lock.release()
    use_disk(folder)
    return str(error.value)


def test_two_runs_cannot_share_a_disk(pool: Pool, tmp_path: Path) -> None:
    (line,) = pool.run(disk_twice, 1, str(tmp_path))
    assert line == f"--nvme-path {tmp_path} is in use by another run: give every run a folder"


def overflow(config: EngineConfig) -> tuple[list[float], list[str], tuple[float, float]]:
    """A step whose gradient is not finite on one rank: its figures, what it changed, and the next, a good step's."""
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    before = states_of(engine)
    batch = share(global_batch(config, 0), engine.grid, config.batch.micro_batch_size)
    batch["loss_mask"] = torch.full(batch["tokens"].shape, 1.0 if engine.grid.dp_rank else float("inf"))
    figures = engine.train_step(batch, LR)
    after = states_of(engine)
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    return figures.tolist(), changed, steps(engine, config, range(1))[0]


@pytest.mark.parametrize(
    "options",
    sweep(
        [{"zero": 1}, {"zero": 2, "bf16": True, **CPU}, {"zero": 3}, {"zero": 3, "bf16": True}],
        [{"zero": 3, "bf16": True}],
    ),
    ids=str,
)
def test_a_gradient_that_is_not_finite_changes_nothing(pool: Pool, options: dict[str, Any]) -> None:
    config = tiny(**deepspeed(pp=2, dp=2, **options).options)
    for (_, norm, _, skipped), changed, (loss, next_norm) in pool.run(overflow, 4, config):
        assert not math.isfinite(norm)
        assert skipped == 1
        assert not changed
        assert math.isfinite(loss)
        assert 1 < next_norm < 2


def bytes_held(config: EngineConfig) -> tuple[ModelStates, int]:
    """After a step, and the parameters that this rank's data-parallel group shares."""
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    steps(engine, config, range(1))
    return engine.model_states(), sum(weight.to_local().numel() for weight in engine.stages[0].stored.values())


# by parameter: weights, gradients, masters with moments; and whether each is divided by the ranks
HELD = {
    "ZeRO-1": ({"zero": 1}, (4, 4, 12), (False, True, True)),
    "ZeRO-2": ({"zero": 2}, (4, 4, 12), (False, True, True)),
    "ZeRO-3": ({"zero": 3}, (4, 4, 12), (True, True, True)),
    "ZeRO-1 bf16": ({"zero": 1, "bf16": True}, (2, 6, 12), (False, False, True)),
    "ZeRO-2 bf16": ({"zero": 2, "bf16": True}, (2, 4, 12), (False, True, True)),
    "ZeRO-3 bf16": ({"zero": 3, "bf16": True}, (2, 4, 12), (True, True, True)),
    # gradients are on the host, and where the last microbatches put them
    "ZeRO-2, offload": ({"zero": 2, **CPU}, (4, 8, 12), (False, True, True)),
}


@pytest.mark.parametrize("name", sweep(HELD, {"ZeRO-3", "ZeRO-1 bf16"}))
def test_bytes_held(pool: Pool, tmp_path: Path, name: str) -> None:
    options, per_parameter, divided = HELD[name]
    if options["zero"] == 3:  # else small parameters stay whole
        file = tmp_path / "ds.json"
        file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
        options = options | {"deepspeed_config": str(file)}
    # many layers, for at stages 1 and 2 a rank holds the whole gradient of a matrix that it has the first part of
    config = tiny(**deepspeed(dp=4, num_layers=16, **options).options)
    for states, psi in pool.run_fake(bytes_held, 4, config):
        for size, total, is_divided in zip(dataclasses.astuple(states), per_parameter, divided, strict=True):
            assert size == pytest.approx(psi * total / (4 if is_divided else 1), rel=0.02)


def messages(config: EngineConfig) -> dict[str, int]:
    """Elements of the second step, by collective; in the first stage 3 also compares the order of modules."""
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    steps(engine, config, range(1))
    with Collectives(engine.grid) as collectives:
        steps(engine, config, range(1, 2))
    return volume(collectives.messages, "dp_shard")


SHARDED = {"stage3_param_persistence_threshold": 0}  # small parameters too
AT_ONCE = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}  # given back after use, not kept


@pytest.mark.parametrize(
    "stage, settings, times",
    sweep(
        [
            (1, {}, {REDUCE: 1, GATHER: 1}),
            (2, {}, {REDUCE: 4, GATHER: 1}),
            (3, SHARDED, {GATHER: 4, SCATTER: 4}),
            (3, SHARDED | AT_ONCE, {GATHER: 2 * 4, SCATTER: 4}),
        ],
        [(2, {}, {REDUCE: 4, GATHER: 1}), (3, SHARDED, {GATHER: 4, SCATTER: 4})],
    ),
)
def test_messages(pool: Pool, tmp_path: Path, stage: int, settings: dict[str, Any], times: dict[str, int]) -> None:
    """Of four microbatches. Whole buckets are all-reduced; stage 3 keeps what will soon be used again."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": settings}))
    config = tiny(**deepspeed(dp=4, zero=stage, micro_batch_size=1, deepspeed_config=str(file)).options)
    psi = parameters(config.model)
    for found in pool.run_fake(messages, 4, config):
        large = {kind: n for kind, n in found.items() if n > 10}  # stage 3 sums its norm apart
        assert large == pytest.approx({kind: n * psi for kind, n in times.items()}, rel=0.01)


def states_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of everything that a checkpoint holds of this rank's parameters, whole."""

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    states = engine.state_dict()
    named = {f"weight {name}": value for name, value in states.weights.items()}
    for name, moments in states.optimizer.items():
        named |= {f"{moment} {name}": value for moment, value in moments.items()}
    named["steps"] = engine.optimizer.step_count
    return {name: whole(value).clone() for name, value in named.items()}


def steps(engine: Engine, config: EngineConfig, numbers: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of these steps."""
    batches = (share(global_batch(config, step), engine.grid, config.batch.micro_batch_size) for step in numbers)
    return [tuple(engine.train_step(batch, LR, measure=True)[:2].tolist()) for batch in batches]


def write(config: EngineConfig, folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """Train 3 steps, save, go on for 3: what was saved, and how it went on."""
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    steps(engine, config, range(3))
    saved = states_of(engine)
    manifest = Manifest(3, 48, 768, dataclasses.asdict(config.model), mesh_sizes(grid), has_optimizer=True)
    CheckpointWriter(folder, engine).save(manifest, {})
    return saved, steps(engine, config, range(3, 6))


def read(config: EngineConfig, folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """Load, after a step that must leave no trace, and go on for 3."""
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    steps(engine, config, range(7, 8))
    load_checkpoint(engine, find_checkpoint(folder))
    return states_of(engine), steps(engine, config, range(3, 6))


CHECKPOINTS: dict[str, tuple[Layout, Layout]] = {
    "torch DP2 ZeRO-1 -> TP2 DP2 SP ZeRO-3": (layout(dp=2, zero=1), deepspeed(2, 1, 2, sp=True, zero=3)),
    "TP2 DP2 ZeRO-1 -> torch PP2": (deepspeed(2, 1, 2, zero=1), layout(pp=2)),
    "PP2 DP2 ZeRO-3, offload -> torch TP2 DP2 ZeRO-3": (deepspeed(pp=2, dp=2, zero=3, **CPU), layout(2, 1, 2, zero=3)),
    "torch one process -> PP2 DP2 ZeRO-2, offload": (layout(), deepspeed(pp=2, dp=2, zero=2, **CPU)),
    "DP4 ZeRO-3 -> TP2 PP2 ZeRO-1, vocabulary 997": (
        deepspeed(dp=4, zero=3, vocab_size=997),
        deepspeed(2, 2, 1, zero=1, vocab_size=997),
    ),
    "DP2 ZeRO-3, biases -> torch TP2 DP2": (
        deepspeed(dp=2, zero=3, add_bias_linear=True, add_qkv_bias=True),
        layout(2, 1, 2, zero=1, add_bias_linear=True, add_qkv_bias=True),
    ),
    "TP2 DP2 ZeRO-2, biases -> DP2 ZeRO-3": (
        deepspeed(2, 1, 2, zero=2, add_bias_linear=True, add_qkv_bias=True),
        deepspeed(dp=2, zero=3, add_bias_linear=True, add_qkv_bias=True),
    ),
}


@pytest.mark.parametrize("name", sweep(CHECKPOINTS, {"PP2 DP2 ZeRO-3, offload -> torch TP2 DP2 ZeRO-3"}))
def test_checkpoints_pass_between_engines_bitwise(pool: Pool, tmp_path: Path, name: str) -> None:
    source, target = CHECKPOINTS[name]
    same = {"num_layers": 4, "clip_grad": 1.5}  # layouts with and without a pipeline have their own
    written = pool.run(write, source.ranks, tiny(**source.options | same), tmp_path)
    loaded = pool.run(read, target.ranks, tiny(**target.options | same), tmp_path)
    saved = {key: value for rank, _ in written for key, value in rank.items()}
    assert set().union(*(rank for rank, _ in loaded)) == set(saved)
    for rank, _ in loaded:
        for key, value in rank.items():
            assert torch.equal(value, saved[key]), key
    for (_, went_on), (_, expected) in itertools.product(loaded, written[:1]):
        assert torch.tensor(went_on) == pytest.approx(torch.tensor(expected), rel=2e-5)
