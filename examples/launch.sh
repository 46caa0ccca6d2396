# Source this file from a script that trains: how it says what is wrong, and how it starts `python -m pretrain`.
#
#   NNODES, GPUS_PER_NODE        the cluster; the script that sources this one has defaults for it. On several nodes
#                                start the script on each of them, and give
#   NODE_RANK                    the number of this node, from 0
#   MASTER_ADDR, MASTER_PORT     where node 0 is reached (port 29500)
#
# With --dry-run among the script's flags nothing is started on any node: one process checks the run and shows it.

fail() {
    echo "error: $*" >&2
    exit 2
}

# require NAME WHAT: the variable must be set to something.
require() { [[ -n "${!1:-}" ]] || fail "$1 is not set: give $2"; }

# require_paths NAME: every word of the variable must be a file or a folder that exists. Patterns are words, too.
require_paths() {
    local path
    for path in ${!1}; do
        [[ -e "$path" ]] || fail "$1 $path: no such file or folder"
    done
}

# require_numbers NAME ...: they must be whole numbers above 0.
require_numbers() {
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name ${!name}: must be a whole number above 0"
    done
}

# require_one_of NAME VALUE ...: of these values it must have one.
require_one_of() {
    local name=$1 value
    shift
    for value in "$@"; do
        [[ "${!name}" != "$value" ]] || return 0
    done
    fail "$name ${!name}: must be one of $*"
}

dry_run=false
for word in "$@"; do # the flags of the script that sources this one
    [[ $word != --dry-run ]] || dry_run=true
done
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The scripts may be started from any folder: a `tools` or `tokenizer` of its own must not be taken for ours.
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false

# require_cluster: its variables must be right, or left to the defaults of the script.
require_cluster() {
    : "${MASTER_PORT:=29500}"
    require_numbers GPUS_PER_NODE NNODES MASTER_PORT
    if [[ $NNODES -eq 1 ]] || $dry_run; then
        : "${NODE_RANK:=0}"
    else
        require NODE_RANK "the number of this node, from 0"
        require MASTER_ADDR "the address of node 0"
    fi
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ && $NODE_RANK -lt $NNODES ]] ||
        fail "NODE_RANK $NODE_RANK: must be from 0 to $((NNODES - 1))"
}

# pretrain FLAG ...: on every GPU of this node, together with the other nodes. $PYTHON is tools/environment.sh's.
pretrain() {
    local rendezvous=(--standalone)
    if $dry_run; then
        "$PYTHON" -m pretrain --world-size $((NNODES * GPUS_PER_NODE)) "$@"
        return
    fi
    if [[ $NNODES -gt 1 ]]; then
        rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK")
        rendezvous+=(--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    fi
    "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$GPUS_PER_NODE" -m pretrain "$@"
}
