"""Text to token ids in megatron-core's `.bin/.idx` format.

    python -m tools.preprocess_data --input corpus.jsonl --tokenizer-model tokenizer.model \\
        --output-prefix data/corpus --append-eod

Input is JSON lines (`.jsonl`, `.json`, any other name whose content is that, and `-` for standard input: the text under
--json-keys) or plain text (the file is one document); each also compressed by gzip, Zstandard, bzip2 or xz. A document
stays whole; what of a text is left out is counted. Beside the dataset lies PREFIX.json, which says how it was made;
training checks its flags against it.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_ext.errors import RequestError
from tokenizer.formats.record import record_of
from tools.command import Parser, run_to_write
from tools.preprocessing.documents import read_chunks, size_on_disk
from tools.preprocessing.encode import SKIPPED, Recipe, encode_all, open_encoder
from tools.preprocessing.writer import SUFFIXES, DatasetWriter


def parser() -> Parser:
    """Build the command line."""
    flags = Parser("preprocess_data", __doc__)
    flags.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines or text; - reads stdin")
    flags.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="FILE",
        help="SentencePiece .model, tokenizer.json, or a directory with one",
    )
    flags.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, PREFIX.idx and PREFIX.json; nothing is added to the name (Megatron-LM's own "
        "tool adds _text_document)",
    )
    flags.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="where the text is in a JSON line; several are joined by a newline into one document (default: text)",
    )
    flags.add_argument("--append-eod", action="store_true", help="end each document with the end-of-sentence id")
    flags.add_argument("--prepend-bos", action="store_true", help="begin each document with the begin-of-sentence id")
    flags.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        metavar="N",
        help="processes that encode; the output is the same for any number (default: one per CPU)",
    )
    flags.add_argument("--overwrite", action="store_true", help="replace an existing dataset of this name")
    return flags


def preprocess(args: argparse.Namespace) -> str:
    """Write the dataset; gives the closing line.

    Raises:
        RequestError, TokenizerError: something about the request is wrong; nothing is written.
    """
    if args.workers < 1:
        raise RequestError(f"--workers {args.workers}: give 1 or more")
    total = size_on_disk(args.input)
    outputs = {Path(f"{args.output_prefix}.{suffix}").resolve() for suffix in SUFFIXES}
    for name in args.input:
        if Path(name).resolve() in outputs:
            raise RequestError(f"--output-prefix {args.output_prefix} would write over --input {name}; choose another")
    encoder = open_encoder(args.tokenizer_model)
    for flag, given, token in (("eod", args.append_eod, encoder.eos_id), ("bos", args.prepend_bos, encoder.bos_id)):
        if given and token is None:
            name = "--append-eod" if flag == "eod" else "--prepend-bos"
            raise RequestError(f"{name}: --tokenizer-model {args.tokenizer_model} has no such token")
    recipe = Recipe(str(encoder.path), tuple(args.json_keys), args.prepend_bos, args.append_eod)

    start = time.monotonic()
    tokens, max_id = 0, -1
    counts: Counter[str] = Counter()
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with (
        DatasetWriter(args.output_prefix, encoder.dtype, args.overwrite) as writer,
        tqdm(
            total=total, unit="B", unit_scale=True, desc="preprocess", mininterval=interval, delay=0.5, leave=False
        ) as bar,
    ):
        try:
            for encoded in encode_all(read_chunks(args.input), encoder, recipe, args.workers):
                writer.add(encoded.tokens, encoded.lengths)
                tokens += len(encoded.tokens) // encoder.dtype.itemsize
                max_id = max(max_id, encoded.max_id)
                counts += encoded.counts
                bar.update(encoded.consumed)
                bar.set_postfix(documents=len(writer.lengths), refresh=False)
            if not writer.lengths:
                raise RequestError(f"--input {' '.join(args.input)}: no documents with text ({_left_out(counts)})")
            documents = len(writer.lengths)
            writer.finish(
                {
                    "documents": documents,
                    "tokens": tokens,
                    **{name: counts[name] for name in (*SKIPPED, "text_bytes")},
                    "dtype": encoder.dtype.name,
                    "max_token_id": max_id,
                    "vocab_size": encoder.vocab_size,
                    "tokenizer": encoder.path.name,
                    "tokenizer_sha256": encoder.sha256,
                    "tokenizer_record": record_of(encoder).plain(),
                    "append_eod": args.append_eod,
                    "prepend_bos": args.prepend_bos,
                    "eod_token_id": encoder.eos_id,
                }
            )
        except OSError as error:
            raise RequestError(f"--output-prefix {args.output_prefix}: {error.strerror or error}") from None
    seconds, megabytes = time.monotonic() - start, counts["text_bytes"] / 1e6
    return (
        f"{args.output_prefix}: {documents:,} documents ({_left_out(counts)}), {tokens:,} tokens, "
        f"{megabytes:.2f} MB of text in {seconds:.1f} s ({megabytes / seconds:.2f} MB/s)"
    )


def _left_out(counts: Counter[str]) -> str:
    """Empty documents in any case, and whatever else there was."""
    always = next(iter(SKIPPED))
    return ", ".join(f"{counts[name]:,} {said}" for name, said in SKIPPED.items() if counts[name] or name == always)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code: 0 done, 2 the request is wrong, 130 interrupted."""
    return run_to_write(parser(), work, argv)


def work(args: argparse.Namespace) -> int:
    print(preprocess(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
