"""What every program in this room does alike: a parser with one-line errors, and exit code 2 for a wrong request."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_ext.errors import RequestError
from megatron_ext.launch import refuse_ranks
from tokenizer.errors import TokenizerError
from tokenizer.output import keep_streams_open, output_is_incomplete


class Parser(argparse.ArgumentParser):
    """Of `python -m tools.NAME`; shows the module's docstring as it is written. Raises RequestError."""

    def __init__(self, name: str, description: str | None):
        super().__init__(
            prog=f"python -m tools.{name}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


def run(parser: Parser, work: Callable[[argparse.Namespace], int], arguments: Sequence[str] | None) -> int:
    """Parse and work; gives the exit code: what `work` returns, or 2 after one line that says what is wrong.

    A reader that has seen enough (| head) ends nothing; output that did not fit on a disk makes a 0 a 1.
    """
    keep_streams_open()
    try:
        options = parser.parse_args(arguments)
        refuse_ranks()
        return work(options) or int(output_is_incomplete())
    except (RequestError, TokenizerError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run_to_write(parser: Parser, work: Callable[[argparse.Namespace], int], arguments: Sequence[str] | None) -> int:
    """The same of a program that cleans up when it is interrupted, by Ctrl-C or SIGTERM: the exit code is then 130."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(parser, work, arguments)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
