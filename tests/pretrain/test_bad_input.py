"""Wrong requests: one line that names the flag or the file and its value, exit code 2, nothing written."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from pretrain.__main__ import main
from tests.distributed import Pool
from tests.pretrain.support import ROOT, command, start, train, tree
from tests.pretrain.test_data import write_corpus

VOCAB = 1000
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
FP16 = {"fp16": True}
SMALL_SCALE = {"initial_loss_scale": 32, "min_loss_scale": 64}
NO_SHAPE = dict.fromkeys(
    ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
)


@pytest.fixture(scope="module")
def made(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the requests are about: a corpus `c`, a tokenizer `t.model` with 300 pieces, checkpoints in `saved`."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "c")
    with (folder / "t.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some text"]), model_writer=file, vocab_size=300, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    pool.run(train, 1, command(data_path=folder / "c", train_iters=1, lr_warmup_iters=0, save=folder / "saved"))
    shutil.rmtree(folder / "cache")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with all that was made, for a test to spoil."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def refuse(
    capfd: pytest.CaptureFixture[str], here: Path, arguments: list[str], message: str, monkeypatch: Any, ranks: int = 1
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    before = tree(here)
    assert main(arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert tree(here) == before


FLAGS: list[tuple[str, dict[str, Any], int]] = [
    # how the model is divided
    ("--num-attention-heads 4 is not divisible by --tensor-model-parallel-size 3", {TP: 3}, 3),
    ("--ffn-hidden-size 50 is not divisible by --tensor-model-parallel-size 4", {"ffn_hidden_size": 50, TP: 4}, 4),
    (
        "--num-query-groups 3 neither divides nor is divided by --tensor-model-parallel-size 2",
        {"num_attention_heads": 6, "hidden_size": 48, "num_query_groups": 3, TP: 2},
        2,
    ),
    ("--vocab-size 5 leaves a rank without a row at --tensor-model-parallel-size 4", {"vocab_size": 5, TP: 4}, 4),
    ("--tensor-model-parallel-size 0: must be at least 1", {TP: 0}, 1),
    ("--pipeline-model-parallel-size -1: must be at least 1", {PP: -1}, 1),
    ("--pipeline-model-parallel-size 8 x 1 stages per rank = 8 stages for --num-layers 4", {PP: 8}, 8),
    ("= 8 stages for --num-layers 4", {PP: 4, "pipeline_schedule": "zbv"}, 4),
    ("--pipeline-layers 3,2 sums to 5, but --num-layers is 4", {PP: 2, "pipeline_layers": "3,2"}, 2),
    ("--pipeline-layers 4,0 sums to 4", {PP: 2, "pipeline_layers": "4,0"}, 2),
    ("--pipeline-layers 2,1,1 names 3 stages, but PP 2 x 1", {PP: 2, "pipeline_layers": "2,1,1"}, 2),
    ("--pipeline-layers two: must be a whole number", {PP: 2, "pipeline_layers": "two,2"}, 2),
    ("world size 6 is not a multiple of TP x PP = 2 x 2 = 4", {TP: 2, PP: 2}, 6),
    ("world size 1 is not a multiple of TP x PP = 2 x 1 = 2", {TP: 2}, 1),
    ("--zero-shard-size 3 does not divide the data-parallel size 4", {"zero_shard_size": 3}, 4),
    ("--zero-shard-size 0 does not divide", {"zero_shard_size": 0}, 4),
    ("--zero-stage 4: must be one of 0, 1, 2, 3", {"zero_stage": 4}, 1),
    ("--offload-optimizer nvme needs --zero-engine deepspeed", {"offload_optimizer": "nvme", "nvme_path": "."}, 1),
    ("--offload-optimizer cpu needs --zero-stage 1, 2 or 3", {"offload_optimizer": "cpu", "zero_stage": 0}, 1),
    ("--offload-param cpu needs --zero-engine deepspeed", {"offload_param": "cpu", "zero_stage": 3}, 1),
    ("--accumulate-then-reduce needs --zero-stage 3", {"accumulate_then_reduce": True}, 1),
    ("--grad-reduce-in-bf16 needs --bf16", {"grad_reduce_in_bf16": True}, 1),
    # what would be accepted and ignored
    ("--nvme-path saved has no effect without --offload-optimizer nvme", {"nvme_path": "saved"}, 1),
    ("--deepspeed-config c.bin has no effect without --zero-engine deepspeed", {"deepspeed_config": "c.bin"}, 1),
    ("--zero-shard-size 2 has no effect without --zero-stage 1", {"zero_shard_size": 2, "zero_stage": 0}, 4),
    ("--rope-scaling-factor 8.0 has no effect without --rope-scaling", {"rope_scaling_factor": 8}, 1),
    ("--rope-scaling linear has no effect with --rope-scaling-factor 1", {"rope_scaling": "linear"}, 1),
    ("--rope-low-freq-factor 2.0 has no effect without --rope-scaling llama3", {"rope_low_freq_factor": 2}, 1),
    ("--loss-scale 128.0 has no effect without --fp16", {"loss_scale": 128}, 1),
    ("--hysteresis 4 has no effect without --fp16", {"hysteresis": 4, "bf16": True}, 1),
    ("--lr-wsd-decay-iters 5 has no effect without --lr-decay-style WSD", {"lr_wsd_decay_iters": 5}, 1),
    ("--eval-iters 3 has no effect without --eval-interval", {"eval_iters": 3}, 1),
    ("--eod-token-id 2 has no effect without --reset-position-ids", {"eod_token_id": 2}, 1),
    ("--seq-length 4096 is longer than --max-position-embeddings 2048", {"seq_length": 4096}, 1),
    ("--attention-backend flash cannot mask", {"attention_backend": "flash", "reset_attention_mask": True}, 1),
    (
        "--hidden-size 36 is not divisible by the 8 ranks that --zero-stage 3 shards over",
        {"hidden_size": 36, "num_attention_heads": 2, TP: 2, "zero_stage": 3, "micro_batch_size": 1},
        16,
    ),
    (
        "biases of ffn-hidden-size 50 cannot be cut evenly over TP 2 x 2 ZeRO ranks",
        {"ffn_hidden_size": 50, "add_bias_linear": True, TP: 2},
        4,
    ),
    (
        "--global-batch-size 6 is not a multiple of --micro-batch-size 2 x data-parallel",
        {"global_batch_size": 6},
        4,
    ),
    ("--global-batch-size 0", {"global_batch_size": 0}, 1),
    ("--micro-batch-size and --seq-length must be at least 1", {"micro_batch_size": 0}, 1),
    (
        "--pipeline-schedule 1f1b needs at least as many microbatches as stages: 2",
        {PP: 4, "global_batch_size": 4},
        4,
    ),
    (
        "--pipeline-schedule interleaved needs at least PP 2 microbatches",
        {PP: 2, "pipeline_schedule": "interleaved", "global_batch_size": 10},
        2,
    ),
    (
        "--pipeline-schedule dualpipev needs at least 4 microbatches, not 2",
        {PP: 2, "pipeline_schedule": "dualpipev", "global_batch_size": 4},
        2,
    ),
    ("--pipeline-schedule needs --pipeline-model-parallel-size of at least 2", {"pipeline_schedule": "gpipe"}, 1),
    ("--pipeline-layers needs --pipeline-model-parallel-size of at least 2", {"pipeline_layers": "4"}, 1),
    (
        "--num-virtual-stages-per-pipeline-rank 2: --pipeline-schedule 1f1b always has 1",
        {PP: 2, "num_virtual_stages_per_pipeline_rank": 2},
        2,
    ),
    (
        "--num-virtual-stages-per-pipeline-rank 1: --pipeline-schedule interleaved needs at least 2",
        {PP: 2, "pipeline_schedule": "interleaved", "num_virtual_stages_per_pipeline_rank": 1},
        2,
    ),
    ("--sequence-parallel needs --tensor-model-parallel-size of at least 2", {"sequence_parallel": True}, 1),
    (
        "--seq-length (with --sequence-parallel) 15 is not divisible by --tensor-model-parallel-size 2",
        {"seq_length": 15, "sequence_parallel": True, TP: 2},
        2,
    ),
    # the model
    ("--model gpt-5: unknown; known are tiny, ", {"model": "gpt-5"}, 1),
    ("--num-layers, --hidden-size, --ffn-hidden-size, --num-attention-heads, --vocab-size missing", NO_SHAPE, 1),
    ("--hidden-size 34 is not a multiple of --num-attention-heads 4", {"hidden_size": 34}, 1),
    ("--num-query-groups 3 does not divide --num-attention-heads 4", {"num_query_groups": 3}, 1),
    ("--num-query-groups -1: must be at least 1", {"num_query_groups": -1}, 1),
    ("--num-query-groups 0: must be at least 1", {"num_query_groups": 0}, 1),
    ("--kv-channels 0: must be at least 1", {"kv_channels": 0}, 1),
    ("head size 7 is odd", {"kv_channels": 7}, 1),
    ("head size 8 x --rotary-percent 0.4 = 3 is odd", {"rotary_percent": 0.4}, 1),
    ("--window-size 0: must be at least 1", {"window_size": 0}, 1),
    ("--rotary-percent 0.5 has no effect without", {"rotary_percent": 0.5, "position_embedding_type": "alibi"}, 1),
    ("--position-embedding-offset 2 has no effect", {"position_embedding_offset": 2}, 1),
    ("--num-layers 0: must be at least 1", {"num_layers": 0}, 1),
    ("--num-layers 10001: must be at most 10000", {"num_layers": 10001}, 1),
    (f"--hidden-size {2**31}: must be at most 2147483647", {"hidden_size": 2**31}, 1),
    (f"--hidden-size {10**30}: must be at most ", {"hidden_size": 10**30}, 1),
    ("--norm-epsilon 0.0: must be above 0", {"norm_epsilon": 0}, 1),
    # what is computed with
    ("--bf16 and --fp16 exclude each other", {"bf16": True, "fp16": True}, 1),
    ("--bf16 keeps float32 master weights: drop --params-dtype float64", {"bf16": True, "params_dtype": "float64"}, 1),
    ("--params-dtype float16: must be one of float32, float64", {"params_dtype": "float16"}, 1),
    ("--transformer-impl transformer_engine: this backend is not built", {"transformer_impl": "transformer_engine"}, 1),
    ("--recompute-granularity some: must be one of selective, full", {"recompute_granularity": "some"}, 1),
    # the optimizer
    ("--lr abc: must be a number", {"lr": "abc"}, 1),
    ("--lr nan: must be a number", {"lr": "nan"}, 1),
    ("--lr -0.001: must not be negative", {"lr": -0.001, "min_lr": -0.002}, 1),
    ("--min-lr 0.01 is larger than --lr 0.001", {"min_lr": 0.01}, 1),
    ("--adam-beta2 1.0: must be in [0, 1)", {"adam_beta2": 1}, 1),
    ("--adam-eps 0.0: must be above 0", {"adam_eps": 0}, 1),
    ("--adam-eps 1e-60: must be at least 1.2e-38, or float32", {"adam_eps": 1e-60}, 1),
    ("--lr 1e+40: must be a number that float32 has", {"lr": 1e40}, 1),
    ("--clip-grad -1.0: must not be negative", {"clip_grad": -1}, 1),
    ("--clip-grad inf: must be a number", {"clip_grad": "inf"}, 1),
    ("--weight-decay 2000.0 x --lr 0.001 is what a step takes of every weight", {"weight_decay": 2000}, 1),
    ("--lr-decay-iters 0: must be at least 1", {"lr_decay_iters": 0}, 1),
    ("--lr-warmup-init 0.1 is larger than --lr 0.001", {"lr_warmup_init": 0.1}, 1),
    (
        "--lr-warmup-init 1e-05 has no effect without --lr-warmup-iters",
        {"lr_warmup_init": 1e-5, "lr_warmup_iters": 0},
        1,
    ),
    ("--min-lr 0.0001 has no effect without a decay", {"min_lr": 1e-4, "lr_decay_style": "constant"}, 1),
    ("--loss-scale 0.0: must be above 0; for a dynamic scale leave it out", FP16 | {"loss_scale": 0}, 1),
    ("--loss-scale -1.0: must be above 0", FP16 | {"loss_scale": -1}, 1),
    ("--loss-scale 1e+39: must be a number that float32 has", FP16 | {"loss_scale": 1e39}, 1),
    ("--loss-scale nan: must be a number", FP16 | {"loss_scale": "nan"}, 1),
    ("--hysteresis 3 has no effect without a dynamic loss scale", FP16 | {"loss_scale": 128, "hysteresis": 3}, 1),
    ("--initial-loss-scale 0.0: must be above 0", FP16 | {"initial_loss_scale": 0}, 1),
    ("--min-loss-scale -1.0: must be above 0", FP16 | {"min_loss_scale": -1}, 1),
    ("--min-loss-scale 64.0 is larger than --initial-loss-scale 32.0", FP16 | SMALL_SCALE, 1),
    ("--loss-scale-window 0: must be a whole number from 1 to 16777215", FP16 | {"loss_scale_window": 0}, 1),
    ("--hysteresis 0: must be a whole number from 1", FP16 | {"hysteresis": 0}, 1),
    ("--hysteresis 1.5: must be a whole number", FP16 | {"hysteresis": 1.5}, 1),
    ("--calculate-per-token-loss: drop it, it is always so here", {"calculate_per_token_loss": True}, 1),
    ("--lr-warmup-iters 21 is beyond the end of the decay (20)", {"lr_warmup_iters": 21}, 1),
    ("--lr-decay-style WSD needs --lr-wsd-decay-iters", {"lr_decay_style": "WSD"}, 1),
    ("--lr-wsd-decay-iters 18 does not fit", {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 18}, 1),
    ("--lr-decay-style cosin: must be one of constant, linear, cosine", {"lr_decay_style": "cosin"}, 1),
    # the run
    ("--train-iters is required", {"train_iters": None}, 1),
    ("--train-iters 1.5: must be a whole number", {"train_iters": 1.5}, 1),
    ("--eval-interval 0: must be at least 1", {"eval_interval": 0}, 1),
    ("--seed -1", {"seed": -1}, 1),
    ("--save-interval needs --save", {"save": None, "save_interval": 5}, 1),
    ("--save-interval 0: must be at least 1", {"save_interval": 0}, 1),
    ("--finetune needs --load", {"finetune": True}, 1),
    ("--save c.bin/new: c.bin is not a writable directory", {"save": "c.bin/new"}, 1),
    ("--metrics none/m.jsonl: its folder does not exist", {"metrics": "none/m.jsonl"}, 1),
    ("--metrics saved: is a folder", {"metrics": "saved"}, 1),
    ("--tensorboard-dir c.bin/events: c.bin is not a writable directory", {"tensorboard_dir": "c.bin/events"}, 1),
    ("--wandb-exp-name and --wandb-save-dir need --wandb-project", {"wandb_exp_name": "x"}, 1),
    # the data
    ("--data-path is required", {"data_path": None}, 1),
    ("--data-path none: none.idx does not exist", {"data_path": "none"}, 1),
    ("give the prefix without the suffix: c", {"data_path": "c.bin"}, 1),
    ("an odd list with weights", {"data_path": ["0.5", "c", "c"]}, 1),
    ("token id 999 is outside the vocabulary of 500", {"vocab_size": 500}, 1),
    ("tokenizer larger than the vocabulary", {"tokenizer_model": "t.model", "vocab_size": 200}, 1),
    ("--tokenizer-model none.model: cannot read it", {"tokenizer_model": "none.model"}, 1),
    ("--tokenizer-model c.bin is not a SentencePiece model", {"tokenizer_model": "c.bin", "vocab_size": None}, 1),
    ("--split a,b: give up to three", {"split": "a,b"}, 1),
    ("--split 1 leaves no sample of 16 tokens for the valid split", {"split": "1", "eval_interval": 5}, 1),
    ("too few for one sample of --seq-length 100000", {"seq_length": 100000, "max_position_embeddings": 100000}, 1),
    ("--num-workers -1: give 0 or more", {"num_workers": -1}, 1),
    ("--reset-position-ids: which token ends a document?", {"reset_position_ids": True}, 1),
    # a checkpoint
    ("--load none: no such directory", {"load": "none"}, 1),
    ("--load .: neither a checkpoint (manifest.json) nor a folder of checkpoints (latest)", {"load": "."}, 1),
    ("its model has hidden_size 32, the run asks for 64 (--hidden-size)", {"load": "saved", "hidden_size": 64}, 1),
    # words
    ("--micro-batchsize: unknown flag; did you mean --micro-batch-size?", {"micro_batchsize": 1}, 1),
    ("--frobnicate: unknown flag; see python -m pretrain --help", {"frobnicate": True}, 1),
    ("--use-distributed-optimizer: use --zero-stage 1", {"use_distributed_optimizer": True}, 1),
    ("--train-samples: use --train-iters", {"train_samples": 100}, 1),
    ("--optimizer-cpu-offload: use --offload-optimizer cpu", {"optimizer_cpu_offload": True}, 1),
    ("--config none.yaml: cannot be read (FileNotFoundError", {"config": "none.yaml"}, 1),
    ("--config c.bin: cannot be read (UnicodeDecodeError", {"config": "c.bin"}, 1),
]


@pytest.mark.parametrize("message, flags, ranks", [pytest.param(*case, id=case[0]) for case in FLAGS])
def test_flags(capfd, here: Path, monkeypatch, message: str, flags: dict[str, Any], ranks: int) -> None:
    arguments = command(**{"data_path": "c", "save": "new/save"} | flags)
    refuse(capfd, here, arguments, message, monkeypatch, ranks)


DEEPSPEED: list[tuple[str, dict[str, Any], int]] = [
    ("--zero-stage 0: --zero-engine deepspeed shards", {"zero_stage": 0}, 1),
    ("--zero-shard-size 2 has no effect without --zero-engine torch", {"zero_shard_size": 2}, 4),
    ("--params-dtype float64: --zero-engine deepspeed is built for", {"params_dtype": "float64"}, 1),
    ("--pipeline-schedule dualpipev: --zero-engine deepspeed", {PP: 2, "pipeline_schedule": "dualpipev"}, 2),
    ("--train-only embeddings is not built with --zero-engine deepspeed", {"train_only": "embeddings"}, 1),
    (
        "a tied embedding on two stages could be added: use --pipeline-model-parallel-size 1",
        {PP: 2, "no_untie_embeddings_and_output_weights": True},
        2,
    ),
    (
        "--nvme-path c.bin: is not a writable folder",
        {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "c.bin"},
        1,
    ),
    ("--deepspeed-config none.json: cannot be read (", {"deepspeed_config": "none.json"}, 1),
    (
        "--deepspeed-config ds.json: zero_optimization.stage is 2, but --zero-stage 1 makes it 1: change one of them; "
        "remove steps_per_print: use --log-interval",
        {"deepspeed_config": "ds.json"},
        1,
    ),
    (
        "--deepspeed-config odd.json: zero_optimization.reduce_bucket_size: Input should be greater than 0",
        {"deepspeed_config": "odd.json"},
        1,
    ),
]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("message, flags, ranks", [pytest.param(*case, id=case[0]) for case in DEEPSPEED])
def test_deepspeed(capfd, here: Path, monkeypatch, message: str, flags: dict[str, Any], ranks: int) -> None:
    (here / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "steps_per_print": 10}')
    (here / "odd.json").write_text('{"zero_optimization": {"reduce_bucket_size": 0, "cpu_offload": false}}')
    arguments = command(data_path="c", save="new", zero_engine="deepspeed", **flags)
    refuse(capfd, here, arguments, message, monkeypatch, ranks)


def test_deepspeed_is_not_there(capfd, here: Path, monkeypatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    arguments = command(data_path="c", save="new", zero_engine="deepspeed")
    refuse(capfd, here, arguments, "DeepSpeed is not installed: pip install 'deepspeed==0.19.*'", monkeypatch)


def test_a_flag_of_megatron_deepspeed(capfd, here: Path, monkeypatch) -> None:
    arguments = [*command(data_path="c"), "--deepspeed", "--deepspeed_config", "ds.json"]
    refuse(capfd, here, arguments, "--deepspeed: use --zero-engine deepspeed", monkeypatch)
    arguments.remove("--deepspeed")
    refuse(capfd, here, arguments, "--deepspeed_config: use --deepspeed-config", monkeypatch)


CONFIGS = {
    "{": "--config run.yaml: not valid YAML (",
    "- lr": "--config run.yaml: must be a mapping of flag names to values",
    "": "--config run.yaml: must be a mapping of flag names to values",
    "lrr: 1": "--config run.yaml: unknown setting lrr; did you mean lr?",
    "seed: [1, 2]": "--seed [1, 2]: must be a whole number",
    "seed: true": "--seed True: must be a whole number",
    "bf16: 1": "--bf16 1: must be true or false",
    "save: {a: b}": "--save {'a': 'b'}: must be a text",
    'use_checkpoint_args: "no"': "--use-checkpoint-args no: must be true or false",
    "use-checkpoint-args: 0": "--use-checkpoint-args 0: must be true or false",
    "{use_checkpoint_args: true, load: 5}": "--load 5: no such directory",
    "{use_checkpoint_args: true, load: [saved]}": "--load ['saved']: must be a text",
    "zero-stage: 7": "--zero-stage 7: must be one of 0, 1, 2, 3",
}


@pytest.mark.parametrize("content", CONFIGS)
def test_config_file(capfd, here: Path, monkeypatch, content: str) -> None:
    (here / "run.yaml").write_text(content)
    refuse(capfd, here, command(config="run.yaml", data_path="c"), CONFIGS[content], monkeypatch)


def cut(file: Path, end: int) -> None:
    os.truncate(file, file.stat().st_size + end if end < 0 else end)


def overwrite(file: Path, content: bytes) -> None:
    file.write_bytes(content + file.read_bytes()[len(content) :])


def edit(manifest: Path, **fields: Any) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text(encoding="utf-8")) | fields), encoding="utf-8")


ITER = "saved/iter_0000001"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "c.bin does not exist": lambda here: (here / "c.bin").unlink(),
    "c.idx does not exist": lambda here: (here / "c.idx").unlink(),
    "bytes, its index says": lambda here: cut(here / "c.bin", -2),
    "c.bin has 0 bytes": lambda here: cut(here / "c.bin", 0),
    "c.idx is truncated: ": lambda here: cut(here / "c.idx", -4),
    "c.idx is truncated at 20 bytes": lambda here: cut(here / "c.idx", 20),
    "c.idx is not a Megatron index": lambda here: overwrite(here / "c.idx", b"NOTMMIDX"),
    "its 'latest' names 'iter_0000001', which is not": lambda here: shutil.rmtree(here / ITER),
    "iter_0000001: incomplete checkpoint, __0_0.distcp has": lambda here: cut(here / ITER / "__0_0.distcp", -1),
    "iter_0000001: incomplete checkpoint, .metadata is missing": lambda here: (here / ITER / ".metadata").unlink(),
    "iter_0000001: unreadable manifest.json": lambda here: cut(here / ITER / "manifest.json", -9),
    f"{ITER}: format version 99, this program reads 1": lambda here: edit(
        here / ITER / "manifest.json", format_version=99
    ),
    f"{ITER}: manifest.json describes a model that this program does not know (": lambda here: edit(
        here / ITER / "manifest.json", model={"experts": 8}
    ),
    "it has no 'latest'; iter_0000001: incomplete checkpoint, .metadata is missing; no": lambda here: (
        (here / ITER / ".metadata").unlink(),
        (here / "saved/latest").unlink(),
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_files(capfd, here: Path, monkeypatch, message: str) -> None:
    DAMAGE[message](here)
    refuse(capfd, here, command(data_path="c", load="saved", save="saved"), message, monkeypatch)


@pytest.mark.slow
def test_real_process(here: Path) -> None:
    before = tree(here)
    process = start(command(data_path="c", save="new", tensor_model_parallel_size=2))
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("error: world size 1 is not a multiple of TP x PP = 2 x 1 = 2")
    assert errors.count("\n") == 1
    assert tree(here) == before


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_deepspeed_says_nothing_beside_the_line(here: Path) -> None:
    (here / "ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": 0}}')
    process = start(command(data_path="c", save="new", zero_engine="deepspeed", deepspeed_config="ds.json"))
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output == ""
    assert errors.startswith("error: --deepspeed-config ds.json: zero_optimization.reduce_bucket_size: Input should be")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_under_torchrun_one_rank_speaks(here: Path) -> None:
    before = tree(here)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pretrain"]
    done = subprocess.run(
        [*torchrun, *command(data_path="none", save="new")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1  # torchrun's own; it reports the 2 of the rank
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [
        "error: --data-path none: none.idx does not exist; write both files with tools.preprocess_data --output-prefix"
    ]
    assert "RequestError" not in done.stderr  # no traceback of ours, beside torchrun's own
    assert tree(here) == before
