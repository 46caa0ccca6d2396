"""check_data: every wrong request is one clear line, in no time."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from megatron_ext.errors import RequestError
from pretrain.data import DataConfig, build_data, check_data
from tokenizer.errors import TokenizerError
from tools.preprocess_data import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny.model (300 pieces at most), and a corpus `c` of 60 documents made with it."""
    directory = tmp_path_factory.mktemp("made")
    texts = [f"document number {number} says 你好 and nothing else" for number in range(60)]
    with (directory / "tiny.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    (directory / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["--input", directory / "c.jsonl", "--tokenizer-model", directory / "tiny.model", "--workers", "1"]
    assert main([*map(str, command), "--output-prefix", str(directory / "c"), "--append-eod"]) == 0
    assert main([*map(str, command), "--output-prefix", str(directory / "noeod")]) == 0
    return directory


@pytest.fixture
def corpus(made: Path, tmp_path: Path) -> Path:
    """A copy of the corpus that a test may spoil: tmp_path/c."""
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"c{suffix}").write_bytes((made / f"c{suffix}").read_bytes())
    return tmp_path / "c"


def refuse(config: DataConfig, message: str, seq_length: int = 16, vocab_size: int = 300, **options) -> None:
    with pytest.raises((RequestError, TokenizerError)) as error:
        check_data(config, seq_length, vocab_size, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_good_request_passes(made: Path) -> None:
    config = DataConfig(
        data_path=("1", str(made / "c"), "2.5", str(made / "noeod")), tokenizer_model=str(made / "tiny.model")
    )
    check_data(config, 16, 300, splits=("train", "valid"))
    check_data(replace(config, tokenizer_model=None), 16, 300)
    flags = replace(config, data_path=(str(made / "c"),), reset_attention_mask=True, eod_mask_loss=True)
    check_data(flags, 16, 300)


def test_data_path_and_split(made: Path) -> None:
    good = str(made / "c")
    refuse(DataConfig(), "--data-path is missing")
    refuse(DataConfig(data_path=("none",)), "none.idx does not exist; write both files with tools.preprocess_data")
    refuse(DataConfig(data_path=(good + ".bin",)), f"give the prefix without the suffix: {good}")
    refuse(DataConfig(data_path=("0.5", good, good)), "an odd list with weights")
    refuse(DataConfig(data_path=("0.5", good, "half", good)), "'half' stands where a weight belongs")
    refuse(DataConfig(data_path=("0", good)), "weight 0 of")
    refuse(DataConfig(data_path=("nan", good)), "weight nan of")
    refuse(DataConfig(data_path=("-1", good)), "weight -1 of")
    for split in ("a,b", "1,2,3,4", "1;2", "-1,2", "", "nan"):
        refuse(DataConfig(data_path=(good,), split=split), f"--split {split}: give up to three")
    refuse(DataConfig(data_path=(good,), split="0,1,1"), "--split 0,1,1 leaves nothing for training")
    refuse(DataConfig(data_path=(good,), split="1,99"), "too few for one sample of --seq-length 32", 32)
    refuse(DataConfig(data_path=(good,)), "too few for one sample of --seq-length 100000", 100000)
    refuse(DataConfig(data_path=(good,), split="1"), "for the valid split", splits=("train", "valid"))
    refuse(DataConfig(data_path=(good,), num_workers=-1), "--num-workers -1")


def test_damaged_files(corpus: Path) -> None:
    config = DataConfig(data_path=(str(corpus),))
    idx, data = corpus.with_suffix(".idx"), corpus.with_suffix(".bin")
    index, tokens = idx.read_bytes(), data.read_bytes()
    for content, message in (
        (b"", "is not a Megatron index"),
        (b"x" * 400, "is not a Megatron index"),
        (index[:20], "is truncated at 20 bytes"),
        (index[:-8], "is truncated: "),
        (index[:9] + b"\x02" + index[10:], "version 2"),
        (index[:17] + b"\x06" + index[18:], "dtype code 6"),
        (index[:18] + bytes(8) + index[26:], "the corpus is empty"),
        (index[:34] + b"\xff\xff\xff\xff" + index[38:], "contradicts itself"),
    ):
        idx.write_bytes(content)
        refuse(config, message)
    idx.write_bytes(index)
    for content in (tokens[:-2], tokens + b"\x00\x00", b""):
        data.write_bytes(content)
        refuse(config, f"has {len(content)} bytes, its index says {len(tokens)}")
    data.unlink()
    refuse(config, "c.bin does not exist")
    data.write_bytes(tokens)
    idx.unlink()
    refuse(config, "c.idx does not exist")


def test_sidecar(corpus: Path, made: Path) -> None:
    config = DataConfig(data_path=(str(corpus),))
    sidecar = corpus.with_suffix(".json")
    facts = json.loads(sidecar.read_text())
    refuse(config, f"token id {facts['max_token_id']} is outside the vocabulary of 250", vocab_size=250)
    sidecar.write_text(json.dumps(facts | {"tokens": 1}))
    refuse(config, "c.json describes 60 documents of 1 tokens, the index 60 of ")
    for content in ("{", '{"text": "raw"}\n{"text": "data"}', "[]", " " * 100_000 + json.dumps(facts | {"tokens": 1})):
        sidecar.write_text(content)  # not ours: the tokens themselves are read
        refuse(config, f"token id {facts['max_token_id']} is outside the vocabulary of 250", vocab_size=250)
        check_data(config, 16, 300)
    sidecar.unlink()
    refuse(config, f"token id {facts['max_token_id']} is outside the vocabulary of 250", vocab_size=250)
    check_data(config, 16, 300)


def test_tokenizer(made: Path, tmp_path: Path) -> None:
    good = DataConfig(data_path=(str(made / "c"),))
    size = sentencepiece.SentencePieceProcessor(model_file=str(made / "tiny.model")).vocab_size()

    def given(path: Path) -> DataConfig:
        return replace(good, tokenizer_model=str(path))

    refuse(given(tmp_path / "none.model"), "cannot read it: No such file")
    refuse(given(tmp_path), "no tokenizer.model or tokenizer.json in this directory")
    (tmp_path / "bad.model").write_text("not a model")
    refuse(given(tmp_path / "bad.model"), "is not a SentencePiece model")
    (tmp_path / "bad.json").write_text("{}")
    refuse(given(tmp_path / "bad.json"), "is not a Hugging Face tokenizer.json")
    refuse(given(made / "tiny.model"), f"tokenizer larger than the vocabulary: it has {size}", vocab_size=size - 1)
    vocabulary = {"model": {"vocab": {"a": 0, "</s>": 1}}, "added_tokens": [{"id": 2, "content": "<x>"}]}
    (tmp_path / "other.json").write_text(json.dumps(vocabulary))
    refuse(given(tmp_path / "other.json"), "is not what made")


def test_end_of_document(made: Path, corpus: Path) -> None:
    config = DataConfig(data_path=(str(made / "c"),), reset_position_ids=True, eod_mask_loss=True)
    refuse(config, "--reset-position-ids, --eod-mask-loss: which token ends a document?")
    refuse(replace(config, eod_token_id=300), "--eod-token-id 300 is outside the vocabulary of 300")
    check_data(replace(config, eod_token_id=2), 16, 300)
    without = replace(config, data_path=(str(made / "noeod"),), tokenizer_model=str(made / "tiny.model"))
    refuse(without, "ends with token 2; preprocess it with --append-eod")
    corpus.with_suffix(".json").unlink()
    scanned = replace(config, data_path=(str(corpus),))
    check_data(replace(scanned, eod_token_id=2), 16, 300)
    refuse(replace(scanned, eod_token_id=1), "ends with token 1")


def test_batch_and_seed_of_build_data(made: Path) -> None:
    config = DataConfig(data_path=(str(made / "c"),))
    options = {"seq_length": 16, "vocab_size": 300, "dp_rank": 0, "dp_size": 2}
    with pytest.raises(RequestError, match="--global-batch-size 6 must be a multiple"):
        build_data(config, **options, seed=1, micro_batch_size=2, global_batch_size=6)
    with pytest.raises(RequestError, match="--seed -1"):
        build_data(config, **options, seed=-1, micro_batch_size=1, global_batch_size=2)


def test_the_check_does_not_import_megatron_core(made: Path) -> None:
    program = (
        "import sys; from pretrain.data import DataConfig, check_data; "
        f"check_data(DataConfig(data_path=({str(made / 'c')!r},)), 16, 300); "
        "sys.exit('megatron.core' in sys.modules)"
    )
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    assert time.monotonic() - start < 20
