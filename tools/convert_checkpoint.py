"""`python -m tools.convert_checkpoint`: checkpoints between Hugging Face, Meta, megatron-core and this project.

    --from hf --to native               LLaMA, Mistral, Qwen2/3, GLM, BLOOM, OPT, Falcon: safetensors or .bin, one file
                                        or shards; continue with `pretrain --load DIR --finetune`
    --from native --to hf               a checkpoint of `pretrain --save` -> config.json, safetensors, tokenizer files
    --from meta --to native             LLaMA as Meta gives it away: params.json, consolidated.NN.pth
    --from native --to megatron-core    a distributed checkpoint that Megatron-LM's --load takes; and the reverse
    --from native --to peft             LoRA adapters alone, for peft
    --from X --to X                     the same form again in another --dtype, with a larger vocabulary, without
                                        adapters or optimizer, in shards of another size

    --base-tokenizer OLD --tokenizer NEW --embedding-init METHOD      on any of these ways: rows for NEW's pieces
        mean-subtoken      mean of the rows of the old pieces that a new one was before
        weighted-subtoken  the same, each counted by the characters that it stood for
        mean-normal        mean of all old rows with a little noise of their covariance, as transformers draws it
        mean               mean of all old rows
        random             as a model's weights start

Any source goes to any target (to peft: native only). LoRA adapters of a native checkpoint are merged into its weights,
and its optimizer's state is left behind. Nothing is padded. The result is checked before it appears under its name:
every tensor is read back, and its logits are compared with the source's on a fixed prompt, on Hugging Face's side by
transformers itself. Memory holds a small piece of the weights at a time, the check a tensor.
Exit codes: 0 done, 1 the check failed, 2 the request is wrong (also: the input has values that are NaN or infinite),
130 interrupted. Only 0 leaves a result.
"""

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_ext.errors import RequestError
from megatron_ext.models.expand import METHODS
from megatron_ext.option import flag_of
from tools.command import Parser, run_to_write
from tools.conversion.changes.resize import Resized, resize, write_report
from tools.conversion.changes.tokenizer import detect_tokenizer, read_given
from tools.conversion.changes.weights import CastWeights, FiniteWeights
from tools.conversion.families import FAMILIES
from tools.conversion.formats import tokenizer_files
from tools.conversion.formats.hf_folder import open_hf, write_hf
from tools.conversion.formats.megatron_core import open_megatron, write_megatron
from tools.conversion.formats.meta import open_meta
from tools.conversion.formats.native import open_native, write_native
from tools.conversion.formats.peft_folder import ADAPTER_WEIGHTS, open_adapters, write_peft
from tools.conversion.formats.safetensors_file import SafetensorsFiles
from tools.conversion.proof.prove import Form, NotEqual, prove, prove_weights
from tools.conversion.source import Source, WatchedWeights
from tools.output_folder import appearing, check_new, check_room, writing

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_GB = 5.0
_SEED = 1234
# flags that mean something on one side only: flag -> which side, and its name
_OF_ONE_FORM = {
    "max_shard_gb": ("target", "hf"),
    "model_type": ("target", "hf"),
    "base_model": ("target", "peft"),
    "vocab_size": ("source", "megatron-core"),
    "max_position_embeddings": ("source", "meta"),
}


def build_parser() -> Parser:
    parser = Parser("convert_checkpoint", __doc__)
    sources, targets = ("native", "hf", "meta", "megatron-core"), ("native", "hf", "megatron-core", "peft")
    parser.add_argument("--from", dest="source", choices=sources, required=True)
    parser.add_argument("--to", dest="target", choices=targets, required=True)
    parser.add_argument("--input", required=True, metavar="DIR", help="a checkpoint, or a folder with a `latest` one")
    parser.add_argument("--output", required=True, metavar="DIR", help="must not exist yet")
    parser.add_argument(
        "--tokenizer", metavar="DIR|FILE", help="of the model, is noted in the result; to hf: its files go beside it"
    )
    parser.add_argument(
        "--change-tokenizer", action="store_true", help="--tokenizer is the model's from now on, and was not before"
    )
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard-gb", type=float, help=f"to hf: size of a safetensors file (default: {_SHARD_GB})")
    parser.add_argument(
        "--model-type", choices=tuple(FAMILIES), help="to hf: what the model is there (default: as it came, or fits)"
    )
    parser.add_argument("--base-model", metavar="DIR|NAME", help="to peft: the model that the adapters belong to")
    parser.add_argument(
        "--vocab-size", type=int, help="from megatron-core: rows of the embedding that are not padding (default: args')"
    )
    parser.add_argument(
        "--max-position-embeddings", type=int, help="from meta, which does not say it (default: of the known models)"
    )
    parser.add_argument("--embedding-init", choices=METHODS, help="how the rows of new pieces begin")
    parser.add_argument("--base-tokenizer", metavar="DIR|FILE", help="of the input, which --tokenizer extends")
    parser.add_argument(
        "--embedding-norm-correction", action="store_true", help="scale new rows to the mean norm of the old ones"
    )
    parser.add_argument("--seed", type=int, help=f"of all noise in new rows (default: {_SEED}, as pretrain's)")
    parser.add_argument("--no-verify", action="store_true", help="do not check the result against the source")
    return parser


def work(options: argparse.Namespace) -> int:
    _check_flags(options)
    output = Path(options.output)
    check_new(output)
    try:
        (_export_adapters if options.target == "peft" else _convert)(options, output)
    except NotEqual as error:
        print(f"error: the result is not the source, and was removed: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


def _convert(options: argparse.Namespace, output: Path) -> None:
    original = _open(options)
    where = f"--input {options.input}"
    original = dataclasses.replace(original, weights=FiniteWeights(original.weights, where))
    _check_changes(options, original)
    beside = options.tokenizer is None and options.source == options.target == "hf"  # comes along as it is
    if not beside:
        original = detect_tokenizer(original, asked=options.tokenizer is not None)
    dtype = None if options.dtype is None else _DTYPES[options.dtype]
    source = original
    if dtype is not None:
        source = dataclasses.replace(source, weights=CastWeights(source.weights, dtype))
    resized = _resize(source, options) if options.embedding_init is not None else None
    if resized is not None:
        source = resized.source
    if options.tokenizer is not None:
        path, base = Path(options.tokenizer), options.base_tokenizer and Path(options.base_tokenizer)
        record = read_given(path, source, options.change_tokenizer, base, f"--input {options.input}")
        source = dataclasses.replace(source, tokenizer=path, record=record)
    check_room(output, source.weights)
    with appearing(output) as folder:
        _write(source, folder, options)
        if options.target == "hf":
            _write_tokenizer(source, folder, beside)
        if resized is not None:
            write_report(resized.report(), folder)
        if not options.no_verify:
            before = Form(original, Path(options.input) if options.source == "hf" else None)
            after = Form(_OPEN[options.target](folder), folder if options.target == "hf" else None)
            print(prove(before, dtype, source, after))


def _write_tokenizer(source: Source, folder: Path, beside: bool) -> None:
    """Put the tokenizer's files beside the weights, and say what transformers makes of them."""
    if source.tokenizer is None:
        status = "is not known, so config.json names no ids of its special tokens"
        if source.record is not None:
            status = f"is {source.record}; config.json has the ids of its special tokens"
        print(f"no tokenizer files are written: the model's tokenizer {status}; give it with --tokenizer")
    elif beside or source.record is None:
        tokenizer_files.copy(source.tokenizer, folder)
    else:
        rows = source.model.vocab_size
        print(tokenizer_files.write("--tokenizer", source.tokenizer, source.record, folder, rows))


def _export_adapters(options: argparse.Namespace, output: Path) -> None:
    adapters = open_adapters(Path(options.input), options.base_model)
    adapters = dataclasses.replace(adapters, weights=FiniteWeights(adapters.weights, f"--input {options.input}"))
    check_room(output, adapters.weights)
    with appearing(output) as folder:
        watched = WatchedWeights(adapters.weights)
        with watched.bar, writing(output):
            write_peft(dataclasses.replace(adapters, weights=watched), folder)
        if not options.no_verify:
            print(prove_weights(adapters.weights, SafetensorsFiles(folder, [ADAPTER_WEIGHTS])))


_OPEN: dict[str, Callable[[Path], Source]] = {"native": open_native, "hf": open_hf, "megatron-core": open_megatron}


def _open(options: argparse.Namespace) -> Source:
    opening = dict(_OPEN)
    opening["megatron-core"] = functools.partial(open_megatron, vocab_size=options.vocab_size)
    opening["meta"] = functools.partial(open_meta, max_position_embeddings=options.max_position_embeddings)
    return opening[options.source](Path(options.input))


def _check_flags(options: argparse.Namespace) -> None:
    """Raise RequestError for flags that contradict each other or would be ignored."""
    for name, (side, form) in _OF_ONE_FORM.items():
        if getattr(options, name) is not None and getattr(options, side) != form:
            preposition = {"source": "from", "target": "to"}[side]
            raise RequestError(
                f"{flag_of(name)} has no effect with --{preposition} {getattr(options, side)}: "
                f"it belongs to --{preposition} {form}"
            )
    if options.max_shard_gb is not None and not 0 < options.max_shard_gb * 1e9 < math.inf:
        raise RequestError(f"--max-shard-gb {options.max_shard_gb}: must be a finite number above 0")
    if options.target == "peft":
        if options.source != "native":
            raise RequestError(f"--from {options.source} --to peft: adapters are exported from native checkpoints only")
        for name in ("tokenizer", "dtype", "embedding_init", "change_tokenizer"):
            if getattr(options, name) not in (None, False):
                raise RequestError(f"{flag_of(name)} has no effect with --to peft")
    if options.embedding_init is None:
        for name in ("base_tokenizer", "embedding_norm_correction", "seed"):
            if getattr(options, name) not in (None, False):
                raise RequestError(f"{flag_of(name)} has no effect without --embedding-init")
        if options.change_tokenizer and options.tokenizer is None:
            raise RequestError("--change-tokenizer needs --tokenizer: the model's tokenizer from now on")
        return
    if options.change_tokenizer:
        raise RequestError("--change-tokenizer has no effect with --embedding-init, which changes it too")
    for name, what in (("base_tokenizer", "that the model has"), ("tokenizer", "that it is to have")):
        if getattr(options, name) is None:
            asked = f"--embedding-init {options.embedding_init}"
            raise RequestError(f"{asked} needs {flag_of(name)}: the tokenizer {what}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise RequestError(f"--seed {options.seed}: must be from 0 to 2**32 - 1")


def _check_changes(options: argparse.Namespace, source: Source) -> None:
    """Say what stays behind; raise RequestError where the result would be the source once more."""
    if source.merged_adapters:
        print(f"merging {source.merged_adapters} LoRA adapters into the weights beside them")
    if source.has_optimizer:
        print("leaving the optimizer's state behind")
    if source.merged_adapters or source.has_optimizer:
        return
    changes = ["dtype", "embedding_init", *(name for name, (_, form) in _OF_ONE_FORM.items() if form == options.source)]
    changes.append("tokenizer")
    if options.source == options.target and all(getattr(options, name) is None for name in changes):
        *flags, last = (flag_of(name) for name in changes)
        way = f"--from {options.source} --to {options.target}"
        raise RequestError(f"{way}: nothing to convert without {', '.join(flags)} or {last}")


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
    with watched.bar, writing(options.output):
        if options.target == "native":
            write_native(source, folder)
        elif options.target == "megatron-core":
            write_megatron(source, folder)
        else:
            write_hf(source, folder, int((options.max_shard_gb or _SHARD_GB) * 1e9), options.model_type)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    return run_to_write(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
