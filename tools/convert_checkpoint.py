"""`python -m tools.convert_checkpoint`: LLaMA checkpoints between Hugging Face and this project.

    --from native --to hf      a checkpoint of `pretrain --save` -> config.json, safetensors, tokenizer files
    --from hf --to native      the reverse; continue with `pretrain --load DIR --finetune`
    --from X --to X            the same form again in another --dtype, with a larger vocabulary, or without adapters

    --base-tokenizer OLD --tokenizer NEW --embedding-init METHOD      on any of these ways: rows for NEW's pieces
        mean-subtoken      mean of the rows of the old pieces that a new one was before
        weighted-subtoken  the same, each counted by the characters that it stood for
        mean-normal        mean of all old rows with a little noise of their covariance, as transformers draws it
        mean               mean of all old rows
        random             as a model's weights start

LoRA adapters of a native checkpoint are merged into its weights. The result appears under its name only when it is
whole. Memory holds a small piece of the weights at a time.
Exit codes: 0 done, 2 the request is wrong.
"""

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.errors import RequestError
from megatron_ext.models.expand import METHODS
from tools.command import Parser, run
from tools.conversion import tokenizer_files
from tools.conversion.hf_folder import open_hf, write_hf
from tools.conversion.native import open_native, write_native
from tools.conversion.resize import Resized, resize, write_report
from tools.conversion.source import CastWeights, Source, WatchedWeights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_GB = 5.0
_SEED = 1234


def build_parser() -> Parser:
    parser = Parser("convert_checkpoint", __doc__)
    parser.add_argument("--from", dest="source", choices=("native", "hf"), required=True)
    parser.add_argument("--to", dest="target", choices=("native", "hf"), required=True)
    parser.add_argument("--input", required=True, metavar="DIR", help="a checkpoint, or a folder with a `latest` one")
    parser.add_argument("--output", required=True, metavar="DIR", help="must not exist yet")
    parser.add_argument("--tokenizer", metavar="DIR|FILE", help="of the result; to hf: its files go beside the weights")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard-gb", type=float, help=f"to hf: size of a safetensors file (default: {_SHARD_GB})")
    parser.add_argument("--embedding-init", choices=METHODS, help="how the rows of new pieces begin")
    parser.add_argument("--base-tokenizer", metavar="DIR|FILE", help="of the input, which --tokenizer extends")
    parser.add_argument(
        "--embedding-norm-correction", action="store_true", help="scale new rows to the mean norm of the old ones"
    )
    parser.add_argument("--seed", type=int, help=f"of all noise in new rows (default: {_SEED}, as pretrain's)")
    return parser


def work(options: argparse.Namespace) -> int:
    _check_flags(options)
    output = Path(options.output)
    if output.exists():
        raise RequestError(f"--output {output} exists already: remove it or choose another name")
    if not output.resolve().parent.is_dir():
        raise RequestError(f"--output {output}: {output.resolve().parent} is not a directory")
    source = open_native(Path(options.input)) if options.source == "native" else open_hf(Path(options.input))
    if source.merged_adapters:
        print(f"merging {source.merged_adapters} LoRA adapters into the weights beside them")
    elif options.source == options.target and options.dtype is None and options.embedding_init is None:
        way = f"--from {options.source} --to {options.target}"
        raise RequestError(f"{way}: nothing to convert without --dtype or --embedding-init")
    if options.dtype is not None:
        source = dataclasses.replace(source, weights=CastWeights(source.weights, _DTYPES[options.dtype]))
    resized = _resize(source, options) if options.embedding_init is not None else None
    if resized is not None:
        source = resized.source
    if options.tokenizer is not None:
        tokenizer = Path(options.tokenizer)
        ids = tokenizer_files.token_ids(tokenizer_files.read(tokenizer, source.model.vocab_size))
        source = source.with_tokenizer(tokenizer, ids)
    with _appearing(output) as folder:
        _write(source, folder, options)
        if resized is not None:
            write_report(resized.report(), folder)
    print(f"wrote {output}")
    return 0


def _check_flags(options: argparse.Namespace) -> None:
    """Raise RequestError for flags that contradict each other or would be ignored."""
    if options.target == "native" and options.max_shard_gb is not None:
        raise RequestError("--max-shard-gb has no effect with --to native")
    if options.max_shard_gb is not None and not options.max_shard_gb > 0:
        raise RequestError(f"--max-shard-gb {options.max_shard_gb}: must be above 0")
    if options.embedding_init is None:
        for name in ("base_tokenizer", "embedding_norm_correction", "seed"):
            if getattr(options, name) not in (None, False):
                raise RequestError(f"--{name.replace('_', '-')} has no effect without --embedding-init")
        if options.target == "native" and options.tokenizer is not None:
            raise RequestError("--tokenizer has no effect with --to native unless --embedding-init is given")
        return
    for name, what in (("base_tokenizer", "that the model has"), ("tokenizer", "that it is to have")):
        if getattr(options, name) is None:
            flag = name.replace("_", "-")
            raise RequestError(f"--embedding-init {options.embedding_init} needs --{flag}: the tokenizer {what}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise RequestError(f"--seed {options.seed}: must be from 0 to 2**32 - 1")


def _resize(source: Source, options: argparse.Namespace) -> Resized:
    return resize(
        source,
        f"--input {options.input}",
        Path(options.base_tokenizer),
        Path(options.tokenizer),
        options.embedding_init,
        options.embedding_norm_correction,
        _SEED if options.seed is None else options.seed,
    )


def _write(source: Source, folder: Path, options: argparse.Namespace) -> None:
    watched = WatchedWeights(source.weights)
    source = dataclasses.replace(source, weights=watched)
    try:
        with watched.bar:
            if options.target == "native":
                write_native(source, folder)
                return
            write_hf(source, folder, int((options.max_shard_gb or _SHARD_GB) * 1e9))
        if source.tokenizer is not None:
            tokenizer_files.copy(source.tokenizer, folder)
    except (OSError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RequestError(f"--output {options.output}: cannot be written ({reason})") from error


class _appearing:
    """A folder that exists under its name only once the block has ended well."""

    def __init__(self, final: Path):
        self._final, self._partial = final, final.with_name(f".{final.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        return self._partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self._partial, self._final)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run(build_parser(), work, None))
