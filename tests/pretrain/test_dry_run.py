"""--dry-run: a run of any size is checked and shown in one process, and nothing comes of it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_ext.engine
import megatron_ext.tensor_parallel.storage
import pretrain.dry_run
from megatron_ext.engine import Engine
from megatron_ext.footprint import ModelStates
from pretrain.__main__ import main
from pretrain.flags import parse
from tests.distributed import Pool
from tests.pretrain.support import RUN, command, start, train, tree
from tests.pretrain.test_bad_input import refuse
from tests.pretrain.test_data import write_corpus

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
PUBLISHED = dict.fromkeys(
    ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
)  # the preset's
TIED = {"no_untie_embeddings_and_output_weights": True}
BIASED = {"add_bias_linear": True, "normalization": "LayerNorm", "activation": "gelu"}


@pytest.fixture(autouse=True)
def nothing_comes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever a test does: nothing is written where it stands, and no fake world is left behind."""
    monkeypatch.chdir(tmp_path)
    yield
    assert tree(tmp_path) == {}
    assert not dist.is_initialized()
    assert not hasattr(torch, "meta")


def dry(capsys: pytest.CaptureFixture[str], **flags: Any) -> list[str]:
    """The lines of a dry run that must succeed."""
    assert main(command(dry_run=True, **flags)) == 0
    printed = capsys.readouterr()
    assert "error" not in printed.err
    return printed.out.splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    """Cells of the table."""
    (head,) = (i for i, line in enumerate(lines) if line.startswith(" rank  stages"))
    found = [re.split(r" {2,}", line.strip()) for line in lines[head:]]
    return [cells for cells in found if len(cells) == len(found[0])][1:]


@pytest.mark.slow
def test_a_published_model_on_384_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """BLOOM's layout (arXiv 2211.05100, section 3.4): TP 4, PP 12, DP 8."""
    layout: dict[str, Any] = {TP: 4, PP: 12, "micro_batch_size": 2, "global_batch_size": 2048, "seq_length": 2048}
    lines = dry(capsys, model="bloom-176b", world_size=384, bf16=True, **layout, init_method_std=None, **PUBLISHED)
    assert lines[0] == "dry run of 384 ranks: nothing is sent, written or trained"
    assert "176,247,271,424 parameters" in lines[1]
    assert "PP 12 x DP 8 x TP 4 | ZeRO-1 | 128 microbatches of 2 x 2048 tokens per rank" in lines[1]
    assert lines[-2].strip() == "built 12 of the ranks: shapes and cuts are right, states as predicted to the byte"
    assert lines[-1].strip() == "data: not given, not checked"
    table = rows(lines)
    assert [(rank, stage) for rank, stage, *_ in table] == [(str(i), str(i)) for i in range(12)]
    assert [cells[2] for cells in table[:2]] == ["embedding, 0-5", "6-11"]
    assert table[-1][2] == "66-69, head"
    hidden, tied = 14336, 250880 * 14336
    layer = 12 * hidden**2 // 4 + 7 * hidden // 4 + (2 + 4) * hidden  # four products; biases: cut, whole, and of norms
    assert [int(cells[3].replace(",", "")) for cells in table] == [
        6 * layer + tied // 4 + 2 * hidden, *[6 * layer] * 10, 4 * layer + tied // 4 + 2 * hidden
    ]  # fmt: skip
    for cells in table:
        parameters, weights, gradients, optimizer, *beside, total = (float(c.replace(",", "")) for c in cells[3:])
        assert weights == gradients == pytest.approx(4 * parameters / 8 / 2**30, abs=0.006)
        assert optimizer == pytest.approx(2 * weights, abs=0.011)
        assert total == pytest.approx(weights + gradients + optimizer + sum(beside), abs=0.05)
        assert total > weights + gradients + optimizer + 3.9 * parameters / 2**30  # whole weights and gradients


@pytest.mark.parametrize(
    "ranks, built, flags",
    [
        (1, 1, {}),
        (4, 1, {"zero_stage": 0, "bf16": True}),
        (6, 1, {"zero_stage": 3, "vocab_size": 1001, "global_batch_size": 12}),
        (4, 2, {TP: 2, "zero_stage": 2, "vocab_size": 1001, "sequence_parallel": True}),
        (8, 1, {TP: 2, "zero_stage": 1, "zero_shard_size": 2, **BIASED}),
        (4, 1, {TP: 4, **BIASED}),
        (4, 2, {PP: 2, "pipeline_layers": "3,1", "offload_optimizer": "cpu", **TIED}),
        (8, 4, {PP: 2, TP: 2, "pipeline_schedule": "zbv", "vocab_size": 1001, **TIED}),
        (4, 2, {PP: 2, "pipeline_schedule": "interleaved", "zero_stage": 3}),
        (4, 2, {TP: 2, "train_only": "embeddings", "train_output_embeddings": True, "vocab_size": 1001}),
        (4, 2, {TP: 2, "train_only": "new-rows", "base_vocab_size": 700, "vocab_size": 1001, "zero_stage": 3}),
        (4, 2, {PP: 2, "train_only": "lora", "bf16": True}),
        (4, 1, {TP: 2, "train_only": "layers.1.mlp.*"}),
    ],
    ids=str,
)
def test_ranks_are_built_as_predicted(
    capsys: pytest.CaptureFixture[str], ranks: int, built: int, flags: dict[str, Any]
) -> None:
    lines = dry(capsys, world_size=ranks, **flags)
    (checked,) = (line for line in lines if line.startswith(" built "))
    assert checked == f" built {built} of the ranks: shapes and cuts are right, states as predicted to the byte"
    table = rows(lines)
    assert len(table) == flags.get(PP, 1)
    layers = [part for cells in table for part in cells[2].split(", ")]
    assert layers.count("embedding") == layers.count("head") == 1
    bounds = (list(map(int, part.split("-"))) for part in layers if part[0].isdigit())
    assert sorted(i for ends in bounds for i in range(ends[0], ends[-1] + 1)) == [*range(RUN["num_layers"])]
    assert any("trainable" in line for line in lines) == ("train_only" in flags)


def test_a_smaller_last_rank_of_a_tensor_parallel_group_is_built_too() -> None:
    def built(**flags: Any) -> list[int]:
        config = parse(command(**{TP: 4, PP: 2}, **flags)).engine
        return pretrain.dry_run.ranks_to_build(config, 32)

    assert built(vocab_size=1000) == [0, 16]
    assert built(vocab_size=1001) == [0, 3, 16, 19]


@pytest.mark.parametrize("flags", [{}, {"offload_optimizer": "cpu"}, {"zero_stage": 0}], ids=str)
def test_nothing_is_given_memory(monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]) -> None:
    devices = set()

    def note(engine: Engine, _: Any) -> None:
        states = engine.state_dict()
        for tensors in (states.weights, *states.optimizer.values()):
            devices.update(tensor.device.type for tensor in tensors.values())

    monkeypatch.setattr(pretrain.dry_run, "check_shapes", note)
    assert main(command(dry_run=True, world_size=2, **flags)) == 0
    assert devices == {"meta"}


def test_deepspeed_is_said_not_to_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed")
    lines = dry(capsys, world_size=4, zero_engine="deepspeed", zero_stage=3, bf16=True, **{TP: 2})
    assert any("ZeRO-3 by DeepSpeed" in line for line in lines)
    assert " built 1 of the ranks without ZeRO, shapes and cuts are right; DeepSpeed's states by formula" in lines


def test_ranks_come_from_the_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert dry(capsys)[0].startswith("dry run of 1 rank:")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "DP 4 x TP 2" in dry(capsys, **{TP: 2})[1]
    monkeypatch.setenv("RANK", "0")
    assert "DP 8 x TP 2" in dry(capsys, **{TP: 2}, world_size=16, global_batch_size=16)[1]
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    assert dry(capsys, global_batch_size=16) == []


@pytest.mark.parametrize(
    "message, flags",
    [
        ("world size 6 is not a multiple of TP x PP = 4 x 1 = 4", {"world_size": 6, TP: 4}),
        ("--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 8", {"world_size": 8, TP: 8}),
        ("--global-batch-size 8 is not a multiple of", {"world_size": 16}),
        ("--pipeline-layers 3,2 sums to 5", {"world_size": 2, PP: 2, "pipeline_layers": "3,2"}),
        ("--pipeline-schedule 1f1b needs at least as many", {"world_size": 4, PP: 4, "micro_batch_size": 4}),
        ("--world-size 0: must be at least 1", {"world_size": 0}),
        ("--world-size 2 has no effect without --dry-run", {"world_size": 2, "no_dry_run": True}),
        ("--train-iters is required", {"train_iters": None}),
        ("--data-path none: none.idx does not exist", {"data_path": "none"}),
        ("--load none: no such directory", {"load": "none"}),
        ("--metrics none/m.jsonl: its folder does not exist", {"metrics": "none/m.jsonl"}),
        (f"--save {__file__}/new: {__file__} is not a writable directory", {"save": f"{__file__}/new"}),
        (
            f"--wandb-save-dir {__file__}: {__file__} is not a writable",
            {"wandb_project": "p", "wandb_save_dir": __file__},
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_request_is_refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, flags: Any
) -> None:
    refuse(capfd, tmp_path, command(**{"dry_run": True} | flags), message, monkeypatch)


def test_a_folder_to_save_to_is_checked_and_not_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "error" not in "".join(dry(capsys, save=tmp_path / "new", metrics=tmp_path / "m.jsonl", world_size=4))


@pytest.fixture(scope="module")
def made(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus `c`, and checkpoints in `saved`."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "c")
    pool.run(train, 1, command(data_path=folder / "c", train_iters=1, lr_warmup_iters=0, save=folder / "saved"))
    shutil.rmtree(folder / "cache")
    return folder


def test_data_and_checkpoint_are_checked(capfd: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(made)
    run = {"data_path": made / "c", "load": made / "saved", "save": made / "saved"}
    assert not any("not given" in line for line in dry(capfd, **run, world_size=4))
    for message, flags in (
        ("token id 999 is outside the vocabulary of 500", {"vocab_size": 500}),
        ("its model has hidden_size 32, the run asks for 64", {"hidden_size": 64}),
    ):
        refuse(capfd, made, command(dry_run=True, **run | flags), message, monkeypatch)
    assert tree(made) == before


def test_what_needs_a_gpu_is_left_to_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    note = " --attention-backend cudnn: not checked, there is no CUDA device here"
    assert note in dry(capsys, attention_backend="cudnn", bf16=True)
    gpu = type("Properties", (), {"name": "Some GPU", "total_memory": 2**20})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    lines = dry(capsys, attention_backend="cudnn", bf16=True)
    assert note not in lines
    assert lines[-1] == " 0.00 GiB does not fit into this machine's Some GPU of 0.00 GiB"
    gpu.total_memory = 2**40
    assert dry(capsys)[-1].endswith(" GiB fits into this machine's Some GPU of 1024.00 GiB")


def layers_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = megatron_ext.engine.plan_stages

    def wrong(*arguments: Any) -> Any:
        layout = plan(*arguments)
        second = layout.stages[1].__class__(0, 4, False, True)
        return layout.__class__(layout.schedule, (layout.stages[0], second), layout.rank_of)

    monkeypatch.setattr(megatron_ext.engine, "plan_stages", wrong)


def rows_of_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        megatron_ext.tensor_parallel.storage, "tp_shard_range", lambda size, ranks, rank: (0, size // ranks - 1)
    )


def another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = pretrain.dry_run.parameter_shapes
    monkeypatch.setattr(
        pretrain.dry_run, "parameter_shapes", lambda *given: shapes(*given) | {"norm.weight": torch.Size([33])}
    )


def other_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.dry_run, "rank_states", lambda *given: ModelStates(1, 2, 3))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (layers_twice, "layers.0.input_layernorm.weight stands on 2 pipeline ranks"),
        (rows_of_another_rank, r"embed_tokens.weight is cut to \(499, 32\), its placement says \(500, 32\)"),
        (another_model, r"norm.weight was built as \(32,\), the model has \(33,\)"),
        (other_states, r"rank 0 holds ModelStates\(.*\), predicted is ModelStates\(weights=1"),
    ],
)
def test_an_engine_that_is_not_the_model_is_found(
    monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None], message: str
) -> None:
    if break_it is layers_twice:  # of which the prediction knows as little as the check of names
        monkeypatch.setattr(pretrain.dry_run, "check_states", lambda *_: None)
    break_it(monkeypatch)
    with pytest.raises(RuntimeError, match=message):
        main(command(dry_run=True, world_size=4, **{TP: 2, PP: 2}))


@pytest.mark.slow
def test_real_process() -> None:
    process = start(command(dry_run=True, world_size=64, **{PP: 4}, global_batch_size=128))
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("dry run of 64 ranks")
