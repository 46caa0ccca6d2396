"""A tiny run of pretrain: its command line by keywords, how to run it, and what it leaves behind."""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ext.checkpoint.metadata import TensorReader
from pretrain.__main__ import main
from pretrain.flags import parse
from pretrain.train import run
from pretrain.validate import validate
from tests.pretrain.test_data import VOCAB

ROOT = Path(__file__).parents[2]
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": VOCAB,
    "init_method_std": 0.1,
}
RUN: dict[str, Any] = {
    **MODEL,
    "seq_length": 16,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 20,
    "lr": 1e-3,
    "lr_warmup_iters": 3,
    "log_interval": 1000,
}


def command(**flags: Any) -> list[str]:
    """The tiny run's command line: `command(lr=1e-2, bf16=True, seq_length=None)` sets two flags, leaves out one."""
    words: list[str] = []
    for name, value in (RUN | flags).items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


def train(arguments: list[str]) -> str:
    """What `python -m pretrain` does, on a rank whose process group is there already (tests.distributed.Pool).

    Returns what it printed.
    """
    config = parse(arguments)
    validate(config)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(config, torch.device("cpu"))
    return printed.getvalue()


def start(arguments: Iterable[str], **environment: str) -> subprocess.Popen[str]:
    """`python -m pretrain` as a real process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_main(rank: int, ranks: int, port: int, words: list[str], folder: Path) -> None:
    """Be a rank of `python -m pretrain` as Slurm may start it, without torchrun, in a process that the pool's fork
    server made: what goes to the terminal goes to files, and the process ends with the exit code."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.exit(main(words))


def metrics(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def curve(file: Path) -> list[tuple[float, ...]]:
    """What of a run's metrics must not depend on interruptions."""
    keys = ("iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples", "loss_scale", "skipped")
    return [tuple(record[key] for key in keys) for record in metrics(file)]


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = TensorReader(checkpoint)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a single process that loads
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bitwise, name by name."""
    assert tensors.keys() == expected.keys()
    differ = [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]
    assert not differ, differ


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
