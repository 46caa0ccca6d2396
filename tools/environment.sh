# Source this file from a script in the repository: afterwards $PYTHON runs with everything in requirements.txt.
#
# Uses, in this order: $MEGATRON_ZH_PYTHON if set; .venv if it was made from the present requirements.txt; else it
# makes .venv with the newest python3 >= 3.11 on the PATH.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

unset PYTHONDONTWRITEBYTECODE  # many processes start from here: each would compile the project anew

say() { printf '\n== %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 with venv was found; install one (Debian: apt install python3-venv)" >&2
    return 2
}

make_environment() {
    local base
    base=$(find_python) || return 2
    say "making .venv with $("$base" --version) (once; several minutes)"
    rm -rf "$repository/.venv"
    "$base" -m venv "$repository/.venv"
    "$repository/.venv/bin/python" -m pip install --upgrade pip --quiet
    # torch before the rest: a package that needs "some torch" must find this one
    # not compiled: most of it is never imported, and what is, is compiled then
    grep '^torch==' "$repository/requirements.txt" | xargs "$repository/.venv/bin/python" -m pip install --no-compile
    "$repository/.venv/bin/python" -m pip install --no-compile -r "$repository/requirements.txt"
    cp "$repository/requirements.txt" "$repository/.venv/requirements.installed"
}

if [[ -n "${MEGATRON_ZH_PYTHON:-}" ]]; then
    PYTHON=$MEGATRON_ZH_PYTHON
else
    if ! cmp -s "$repository/requirements.txt" "$repository/.venv/requirements.installed"; then
        make_environment || exit $?
    fi
    PYTHON=$repository/.venv/bin/python
fi
export PYTHON
