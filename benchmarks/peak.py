"""Seconds and peak resident memory of a command.

Linux counts what a process was before exec as its own, so the memory of the one that starts a command would be in the
command's figure. This module run as a program, which is small, starts it instead.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time

from megatron_ext.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Usage:
    """peak: bytes."""

    seconds: float
    peak: int


def measure(command: list[str]) -> Usage:
    """Run a command; raises RequestError, with the last line that it said, unless it ends well."""
    measured = [sys.executable, "-m", "benchmarks.peak", *command]
    result = subprocess.run(measured, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if result.returncode:
        said = result.stderr.strip().splitlines() or ["nothing said"]
        raise RequestError(f"{' '.join(command)}: exit code {result.returncode} ({said[-1]})")
    return Usage(**json.loads(result.stdout))


def main(command: list[str]) -> int:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": usage.ru_maxrss * 1024}))  # Linux counts in KiB
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
