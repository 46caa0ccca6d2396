"""`--load` of a checkpoint with a smaller vocabulary: what converting it first gives, at every layout."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import find_checkpoint, read_manifest
from pretrain.__main__ import main
from tests.distributed import Pool
from tests.pretrain.support import assert_equal, command, stored, train, tree
from tests.pretrain.test_data import write_corpus
from tests.slow import sweep
from tests.tokenizer.extended import NEW, OLD, extended_model, write_models
from tests.tools.test_convert_checkpoint import convert, hf_model

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 88,
    "num_query_groups": None,
    "vocab_size": None,
    "norm_epsilon": 1e-6,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus `c` of the larger vocabulary, checkpoints `untied` and `tied` of the smaller one, both tokenizers."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "c")
    write_models(folder)
    for name in ("untied", "tied"):
        hf_model(folder / f"{name}-hf", vocab_size=OLD, tie_word_embeddings=name == "tied")
        paths = ("--input", folder / f"{name}-hf", "--output", folder / name)
        assert convert("--from", "hf", "--to", "native", *paths) == 0
    return folder


def flags(made: Path, **more: Any) -> dict[str, Any]:
    run = {"data_path": made / "c", "tokenizer_model": made / "extended.model", "finetune": True}
    return SHAPE | run | {"train_iters": 2, "lr_warmup_iters": 0, "data_cache_path": made / "cache"} | more


def resizing(made: Path, **more: Any) -> dict[str, Any]:
    asked = {"embedding_init": "mean-subtoken", "base_tokenizer_model": made / "base.model", "load": made / "untied"}
    return flags(made, **(asked | more))


def words(options: dict[str, Any]) -> list[str]:
    untied = options.get("untie_embeddings_and_output_weights", True)
    return command(**options) + ([] if untied else ["--no-untie-embeddings-and-output-weights"])


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {TP: 2}),
    "PP2": (2, {PP: 2, "embedding_init": "mean-normal"}),
    "DP2 ZeRO-3": (2, {"zero_stage": 3, "embedding_init": "weighted-subtoken", "embedding_norm_correction": True}),
    "tied PP2": (2, {PP: 2, "untie_embeddings_and_output_weights": False}),
}


@pytest.mark.parametrize("name", sweep(LAYOUTS, {"DP2 ZeRO-3"}))
def test_loading_equals_converting_first(pool: Pool, made: Path, tmp_path: Path, name: str) -> None:
    ranks, layout = LAYOUTS[name]
    old = made / ("tied" if "tied" in name else "untied")
    options = resizing(made, load=old, save=tmp_path / "loaded", **layout)
    printed = pool.run(train, ranks, words(options))[0]
    assert f"new rows of the vocabulary beside those of {old}/iter_0000000: {options['embedding_init']}\n" in printed

    names = ("--from", "native", "--to", "native", "--input", old, "--output", tmp_path / "grown")
    models = ("--base-tokenizer", options["base_tokenizer_model"], "--tokenizer", options["tokenizer_model"])
    correction = ("--embedding-norm-correction",) if "embedding_norm_correction" in layout else ()
    assert convert(*names, *models, "--embedding-init", options["embedding_init"], *correction) == 0
    plain = dict.fromkeys(("embedding_init", "base_tokenizer_model", "embedding_norm_correction"))
    pool.run(train, ranks, words(options | plain | {"load": tmp_path / "grown", "save": tmp_path / "converted"}))

    loaded, converted = (stored(find_checkpoint(tmp_path / run)) for run in ("loaded", "converted"))
    assert loaded["model.embed_tokens.weight"].shape == (NEW, 32)
    noted = [read_manifest(find_checkpoint(tmp_path / run)).tokenizer for run in ("loaded", "converted", "grown")]
    assert [record and record["name"] for record in noted] == ["extended.model"] * 3
    assert_equal(loaded, converted)


def wrong(made: Path, here: Path) -> dict[str, dict[str, Any]]:
    """What is asked for, by a part of the answer."""
    spoiled = extended_model()
    spoiled.pieces[500].piece = "other"
    (here / "spoiled.model").write_bytes(spoiled.SerializeToString())
    return {
        f"its model has vocab_size {OLD}, the run asks for {NEW} (--vocab-size); to give": flags(
            made, load=made / "untied"
        ),
        "add --finetune --embedding-init METHOD --base-tokenizer-model OLD": flags(made, load=made / "untied"),
        "with tools.convert_checkpoint --embedding-init": flags(made, load=made / "untied"),
        "--embedding-init mean-subtoken needs --load and --finetune": resizing(made, finetune=None),
        "--embedding-init mean-subtoken needs --base-tokenizer-model": resizing(made, base_tokenizer_model=None),
        "--embedding-init mean-subtoken needs --tokenizer-model": resizing(made, tokenizer_model=None, vocab_size=NEW),
        "--embedding-init zero: must be one of mean-subtoken, weighted-subtoken, mean-normal, mean, random": resizing(
            made, embedding_init="zero"
        ),
        "has no effect without --embedding-init": resizing(made, embedding_init=None),
        "--embedding-norm-correction True has no effect without --embedding-init": flags(
            made, load=made / "untied", embedding_norm_correction=True
        ),
        "adds nothing to --base-tokenizer-model": resizing(made, base_tokenizer_model=made / "extended.model"),
        "does not extend --base-tokenizer-model": resizing(made, tokenizer_model=here / "spoiled.model"),
        f"--vocab-size {NEW + 24}: --tokenizer-model": resizing(made, vocab_size=NEW + 24),
        f"has the new tokenizer's {NEW} pieces already, leave out --embedding-init": resizing(made, load="grown"),
        "where the run saves would begin it anew": resizing(made, save=made / "untied"),
        "none.model: cannot read it": resizing(made, base_tokenizer_model="none.model"),
    }


def test_what_does_not_fit_is_refused_before_anything_starts(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    requests = wrong(made, tmp_path)
    names = ("--from", "native", "--to", "native", "--input", made / "untied", "--output", "grown")
    models = ("--base-tokenizer", made / "base.model", "--tokenizer", made / "extended.model")
    with contextlib.redirect_stdout(None):
        assert convert(*names, *models, "--embedding-init", "mean") == 0
    before = tree(tmp_path), tree(made / "untied")
    capfd.readouterr()
    for message, request in requests.items():
        assert main(command(**({"save": "new/save"} | request))) == 2
        output, errors = capfd.readouterr()
        assert output == ""
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert message in errors
        assert (tree(tmp_path), tree(made / "untied")) == before


def test_half_precision_is_loaded_into_full(pool: Pool, made: Path, tmp_path: Path) -> None:
    """Resized or not: weights that were converted in bfloat16 train in float32 from exactly these values."""
    paths = ("--input", made / "untied-hf", "--output", tmp_path / "half", "--dtype", "bfloat16")
    assert convert("--from", "hf", "--to", "native", *paths) == 0
    still = {"load": tmp_path / "half", "train_iters": 1, "lr": 0, "data_path": made / "c", "save": tmp_path / "run"}
    pool.run(train, 1, command(**resizing(made, **still)))
    half, run = (stored(find_checkpoint(tmp_path / name)) for name in ("half", "run"))
    for name, tensor in half.items():
        assert tensor.dtype == torch.bfloat16
        assert run[name].dtype == torch.float32
        assert torch.equal(run[name][: len(tensor)], tensor.float()), name
