"""Every flag, those to come too: each value has an effect or is refused in one line; none is a traceback."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import RequestError
from pretrain.flags import all_flags, parse
from pretrain.validate import validate
from tests.pretrain.support import command
from tests.pretrain.test_data import write_corpus
from tokenizer.errors import TokenizerError

LLAMA3 = {"rope_scaling": "llama3", "rope_scaling_factor": 8}
# what a flag needs beside it to have an effect at all
BESIDE: dict[str, dict[str, Any]] = {
    **{name: {"fp16": True} for name in ("loss_scale", "initial_loss_scale", "min_loss_scale")},
    **{name: {"fp16": True} for name in ("loss_scale_window", "hysteresis")},
    **{name: {"train_only": "lora"} for name in ("lora_rank", "lora_alpha", "lora_dropout")},
    **dict.fromkeys(("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position"), LLAMA3),
    "rope_scaling_factor": {"rope_scaling": "linear"},
    "position_embedding_offset": {"position_embedding_type": "learned_absolute"},
    "lr_wsd_decay_iters": {"lr_decay_style": "WSD"},
    "save_interval": {"save": "new"},
    "eval_iters": {"eval_interval": 5},
    "base_vocab_size": {"train_only": "new-rows"},
    "eod_token_id": {"reset_position_ids": True},
    "world_size": {"dry_run": True},
}
# where zero says something of its own: off, none, the first one
ZERO = {
    "position_embedding_offset", "zero_stage", "lr", "min_lr", "lr_warmup_iters", "lr_warmup_init", "weight_decay",
    "adam_beta1", "adam_beta2", "clip_grad", "lora_dropout", "num_workers", "seed",
}  # fmt: skip
NUMBERS = [name for name, flag in all_flags().items() if flag.kind in (int, float)]
TEXTS = [name for name, flag in all_flags().items() if flag.kind is str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    write_corpus(folder / "c")
    return folder


def refusal(name: str, value: str) -> str | None:
    """The line with which a run with --name=value is refused; None if it would begin."""
    flag = f"--{name.replace('_', '-')}"
    words = [f"{flag}={value}"] if name != "data_path" else [flag, value]
    try:
        validate(parse([*command(**{"data_path": "c"} | BESIDE.get(name, {})), *words]))
    except (RequestError, TokenizerError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    flag = f"--{name.replace('_', '-')}"
    for value in ("-1", "nan", "inf", "", "1e400"):
        said = refusal(name, value)
        assert said is not None, value
        assert said.startswith(flag) or name.replace("_", "-") in said, said
    said = refusal(name, "0")
    if name in ZERO:
        assert said is None
    else:
        assert said is not None
        assert name.replace("_", "-") in said, said
    for value in ("1000000000", "1" + "0" * 30):  # beyond any total: taken as it is, or refused
        said = refusal(name, value)
        assert said is None or name.replace("_", "-") in said or "data-parallel" in said, said
    if all_flags()[name].kind is int:
        assert (refusal(name, "1" + "0" * 30) or "").startswith(flag)


@pytest.mark.parametrize("name", TEXTS)
def test_texts(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder)
    assert (refusal(name, "") or "").startswith(f"--{name.replace('_', '-')}")
    for value in ("c.bin", "none", ".", "c.bin/none", "x" * 5000):
        refusal(name, value)  # whatever it says, it is one line


def test_a_cache_that_is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert refusal("data_cache_path", "c.bin") == "--data-cache-path c.bin: c.bin is not a writable directory"
