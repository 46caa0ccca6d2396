#!/usr/bin/env bash
# Style, types and tests. Makes its own environment if there is none.
#   bash tests/run.sh            the default run
#   bash tests/run.sh --slow     with the long sweeps; what measures time runs after the rest, alone
#   bash tests/run.sh --compiles only what first builds operators of DeepSpeed (needs a compiler and libaio)
#   bash tests/run.sh tests/pretrain -k resume      anything else goes to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh

select="not slow and not compiles"
case "${1:-}" in
    --slow) select="not compiles"; shift ;;
    --compiles) select=compiles; shift ;;
esac
export OMP_NUM_THREADS=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false

say "ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .

types=$(mktemp)  # mypy knows one core only: its half minute is beside the tests, and what it found is shown after them
trap 'rm -f "$types"' EXIT
"$PYTHON" -m mypy >"$types" 2>&1 &
mypy=$! failed=0
say "pytest"
if (($#)) || [[ $select == compiles ]]; then
    "$PYTHON" -m pytest -m "$select" "$@" || failed=$?
else
    "$PYTHON" -m pytest -m "$select and not alone" --numprocesses 2 --dist worksteal || failed=$?
    if ((failed == 0)) && [[ $select == "not compiles" ]]; then
        "$PYTHON" -m pytest -m alone || failed=$?
    fi
fi
say "mypy"
wait "$mypy" || failed=$?
cat "$types"
exit "$failed"
