"""`python -m tokenizer {train,merge}`. Exit codes: 0 done, 2 the request is wrong (one line says how)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import sentencepiece

from tokenizer.errors import TokenizerError
from tokenizer.files import read_model, refuse_existing, write_files
from tokenizer.huggingface import huggingface_files
from tokenizer.merge import MODES, merge_chinese_llama
from tokenizer.train import train


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TokenizerError(message)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = _Parser(prog="python -m tokenizer", description="Vocabulary work.", allow_abbrev=False)
    commands = flags.add_subparsers(dest="command", required=True)

    new = commands.add_parser("train", allow_abbrev=False, help="a new model from text, with LLaMA's conventions")
    new.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE", help="JSON lines or plain text")
    new.add_argument("--vocab-size", required=True, type=int, metavar="N", help="pieces in all")
    new.add_argument("--output", required=True, type=Path, metavar="PREFIX.model", help="the file to write")
    new.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe, as LLaMA's")
    new.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="of the characters that get a piece; the rest becomes bytes (default: 0.9995)",
    )
    new.add_argument(
        "--hard-vocab-limit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="refuse a corpus that does not yield N pieces (default), or make as many as it yields",
    )
    new.add_argument("--json-key", default="text", metavar="KEY", help="where the text is (default: text)")
    new.add_argument("--quiet", action="store_true", help="no progress bar and no log of the trainer")

    both = commands.add_parser("merge", allow_abbrev=False, help="a base model and what another adds to it")
    both.add_argument("--base", required=True, type=Path, metavar="BASE.model", help="its ids stay as they are")
    both.add_argument("--extra", required=True, type=Path, metavar="ZH.model", help="the model to take pieces from")
    both.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets tokenizer.model and what "
                      "transformers needs to load it")  # fmt: skip
    both.add_argument("--mode", choices=MODES, default=MODES[0], help="the rule (default: as Chinese-LLaMA's)")

    for command in (new, both):
        command.add_argument("--overwrite", action="store_true", help="replace existing files")
    return flags


def run_train(args: argparse.Namespace) -> str:
    """Train and write a model; gives the closing line."""
    if args.output.suffix != ".model":
        raise TokenizerError(f"--output {args.output}: the name must end in .model")
    if not args.output.parent.is_dir():
        raise TokenizerError(f"--output {args.output}: the directory {args.output.parent} does not exist")
    refuse_existing("--output", [args.output], args.overwrite)
    content = train(
        args.input,
        args.vocab_size,
        model_type=args.model_type,
        character_coverage=args.character_coverage,
        hard_vocab_limit=args.hard_vocab_limit,
        json_key=args.json_key,
        quiet=args.quiet,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    write_files("--output", {args.output: content})
    return f"{args.output}: {args.model_type} model of {pieces:,} pieces"


def run_merge(args: argparse.Namespace) -> str:
    """Merge two models and write the directory; gives the closing line."""
    base, extra = read_model("--base", args.base), read_model("--extra", args.extra)
    merged = merge_chinese_llama(base, extra)
    # The configuration comes last: only then does the directory look like a tokenizer to transformers.
    contents = {"tokenizer.model": merged.proto.SerializeToString(), **huggingface_files(merged.proto)}
    files = {args.output / name: content for name, content in contents.items()}
    refuse_existing("--output", list(files), args.overwrite)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokenizerError(f"--output {args.output}: cannot make this directory: {error.strerror}") from None
    write_files("--output", files)
    return (
        f"{args.output}: {len(merged.proto.pieces):,} pieces = {merged.base:,} of the base + {merged.extra:,} of the "
        f"extra model - {merged.duplicates:,} that both have ({merged.added:,} new)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    try:
        args = parser().parse_args(argv)
        print({"train": run_train, "merge": run_merge}[args.command](args))
    except TokenizerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
