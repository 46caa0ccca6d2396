"""`python -m tokenizer {train,merge,audit,compare}`.

Exit codes: 0 done, 1 an audit with --strict found something, 2 the request is wrong (one line says how).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import sentencepiece
from tqdm import tqdm

from tokenizer.audit import report as audit_report
from tokenizer.audit.run import audit
from tokenizer.compare import report as compare_report
from tokenizer.compare.run import compare
from tokenizer.errors import TokenizerError
from tokenizer.formats.huggingface import HUGGINGFACE_FILES, huggingface_files
from tokenizer.formats.load import open_tokenizer
from tokenizer.formats.sentencepiece_model import read_model
from tokenizer.merge import report as merge_report
from tokenizer.merge.chinese_llama import MODES, PAD, merge_chinese_llama
from tokenizer.merge.clean import STEPS, merge_clean
from tokenizer.output import check_outputs, keep_streams_open, output_is_incomplete, refuse_existing, write_files
from tokenizer.text.documents import Tally, progress_bar, read_lines
from tokenizer.train import train

_ODD_NAMES = "backslashreplace"  # of files, that are not UTF-8
_TOKENIZER = "a SentencePiece model, a tokenizer.json, or a directory with one"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TokenizerError(message)


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
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
    both.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets tokenizer.model, what "
                      "transformers needs to load it, and a report")  # fmt: skip
    both.add_argument("--mode", choices=MODES, default=MODES[0], help="clean: texts without Chinese stay as they are "
                      "(default); chinese-llama: the published rule")  # fmt: skip
    both.add_argument("--add-pad-token", action="store_true", help="append [PAD], as Chinese-Alpaca")
    both.add_argument("--target-size", type=int, metavar="N", help="clean: pieces in all (default: as the published "
                      "rule gives)")  # fmt: skip
    both.add_argument("--corpus", nargs="+", type=Path, metavar="FILE", help="clean: text to tune for, as train's")
    both.add_argument("--json-key", metavar="KEY", help="where the corpus has its text (default: text)")
    both.add_argument("--quiet", action="store_true", help="no progress bar")

    checks = commands.add_parser("audit", allow_abbrev=False, help="what is wrong with a tokenizer")
    checks.add_argument("--tokenizer", required=True, type=Path, metavar="T", help=f"the one to examine: {_TOKENIZER}")
    checks.add_argument("--base", type=Path, metavar="B", help="what it extends: finds lost pieces and changed lines")
    checks.add_argument(
        "--input", nargs="+", default=[], type=Path, metavar="FILE", help="text to try it on, as train's"
    )
    checks.add_argument("--strict", action="store_true", help="exit with 1 if anything is found")

    sizes = commands.add_parser("compare", allow_abbrev=False, help="how long texts become with several tokenizers")
    sizes.add_argument(
        "--tokenizer",
        nargs="+",
        action="extend",
        required=True,
        type=Path,
        metavar="T",
        help=f"may be repeated; the first is what the others are measured against: {_TOKENIZER}",
    )
    sizes.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE", help="the texts, as train's")
    sizes.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the figures; .png or .svg")

    for command in (checks, sizes):
        command.add_argument("--json-key", metavar="KEY", help="where the text is (default: text)")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures for programs")
        command.add_argument("--markdown", type=Path, metavar="FILE", help="write the report as a page")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    for command in (new, both, checks, sizes):
        command.add_argument("--overwrite", action="store_true", help="replace existing files")
    return flags


def run_train(args: argparse.Namespace) -> int:
    """Train and write a model; gives the exit code."""
    if args.output.suffix != ".model":
        raise TokenizerError(f"--output {args.output}: the name must end in .model")
    check_outputs({"--output": args.output}, args.overwrite)
    tally = Tally()
    content = train(
        args.input,
        args.vocab_size,
        model_type=args.model_type,
        character_coverage=args.character_coverage,
        hard_vocab_limit=args.hard_vocab_limit,
        json_key=args.json_key,
        quiet=args.quiet,
        tally=tally,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    write_files("--output", {args.output: content})
    print(f"{args.output}: {args.model_type} model of {pieces:,} pieces; {tally.as_text()}")
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Merge two models and write the directory; gives the exit code."""
    if args.mode != "clean":
        for flag, value in (("--target-size", args.target_size), ("--corpus", args.corpus)):
            if value is not None:
                raise TokenizerError(f"{flag} has no meaning with --mode {args.mode}, which adds every new piece")
    if args.json_key and not args.corpus:
        raise TokenizerError("--json-key says where --corpus has its text, and there is no --corpus")
    names = ("tokenizer.model", *HUGGINGFACE_FILES, "merge_report.md", "merge_report.json")
    refuse_existing("--output", [args.output / name for name in names], args.overwrite)
    base, extra = read_model("--base", args.base), read_model("--extra", args.extra)

    tally = Tally()

    def corpus() -> Iterator[str]:
        nonlocal tally
        tally = Tally()  # it is read several times
        with progress_bar("--corpus", args.corpus, args.quiet) as bar:
            yield from read_lines(args.corpus, args.json_key or "text", bar.update, "--corpus", tally)

    given = corpus if args.corpus else None
    if args.mode == "clean":
        with tqdm(total=STEPS, desc="merging", delay=0.5, disable=args.quiet, file=sys.stderr) as bar:
            merged = merge_clean(
                base, extra, bar.update, target_size=args.target_size, pad=args.add_pad_token, corpus=given
            )
    else:
        merged = merge_chinese_llama(base, extra, pad=args.add_pad_token)
    record = merge_report.as_json(merged, base, extra, given)
    report = {
        "merge_report.md": merge_report.as_markdown(record).encode(errors=_ODD_NAMES),
        "merge_report.json": _json(record),
    }
    # The configuration comes last: only then does the directory look like a tokenizer to transformers.
    model = {"tokenizer.model": merged.proto.SerializeToString()}
    contents = {**report, **model, **huggingface_files(merged.proto, PAD if args.add_pad_token else None)}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name not in contents:  # of an earlier merge; transformers would prefer its tokenizer.json
                (args.output / name).unlink(missing_ok=True)
    except OSError as error:
        raise TokenizerError(f"--output {args.output}: cannot make this directory: {error.strerror}") from None
    write_files("--output", {args.output / name: content for name, content in contents.items()})
    print(f"{args.output}: {merge_report.as_line(record)}" + (f"; corpus: {tally.as_text()}" if args.corpus else ""))
    return 0


def run_audit(args: argparse.Namespace) -> int:
    """Print and write what is wrong with a tokenizer; gives the exit code."""
    outputs = _outputs(args)
    tally = Tally()
    result = audit(args.tokenizer, args.base, args.input, args.json_key or "text", args.quiet, tally)
    contents = {
        "--json": lambda: _json(audit_report.as_json(result)),
        "--markdown": lambda: audit_report.as_markdown(result).encode(errors=_ODD_NAMES),
    }
    write_files(", ".join(outputs), {path: contents[flag]() for flag, path in outputs.items()})
    print(audit_report.as_text(result))
    if args.input:
        print(tally.as_text())
    return 1 if args.strict and result.has_warnings else 0


def run_compare(args: argparse.Namespace) -> int:
    """Print, write and draw how long texts become; gives the exit code."""
    outputs = _outputs(args)
    suffix = args.picture.suffix.lstrip(".") if args.picture else ""
    if args.picture:
        if suffix not in ("png", "svg"):
            raise TokenizerError(f"--picture {args.picture}: the name must end in .png or .svg")
        compare_report.require_matplotlib()
    tokenizers = [open_tokenizer("--tokenizer", path) for path in args.tokenizer]
    tally = Tally()
    records = compare(tokenizers, args.input, args.json_key or "text", args.quiet, tally)
    contents = {
        "--json": lambda: _json(records),
        "--markdown": lambda: compare_report.as_markdown(records).encode(errors=_ODD_NAMES),
        "--picture": lambda: compare_report.draw(records, suffix),
    }
    write_files(", ".join(outputs), {path: contents[flag]() for flag, path in outputs.items()})
    print(compare_report.as_text(records))
    print(tally.as_text())
    return 0


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """The flags that name a file to write, checked."""
    named = {f"--{name}": getattr(args, name) for name in ("json", "markdown", "picture") if hasattr(args, name)}
    outputs = {flag: path for flag, path in named.items() if path}
    if args.overwrite and not outputs:
        raise TokenizerError(f"--overwrite has no effect without {', '.join(named)}")
    if args.json_key and not args.input:
        raise TokenizerError("--json-key has no effect without --input")
    check_outputs(outputs, args.overwrite)
    sources = {path.resolve() for path in args.input}
    for flag, path in outputs.items():
        if path.resolve() in sources:
            raise TokenizerError(f"{flag} {path} would write over --input; choose another name")
    return outputs


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode(errors=_ODD_NAMES) + b"\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; gives its exit code."""
    try:
        args = parser().parse_args(argv)
        return {"train": run_train, "merge": run_merge, "audit": run_audit, "compare": run_compare}[args.command](args)
    except TokenizerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    keep_streams_open()
    sys.exit(main() or int(output_is_incomplete()))
