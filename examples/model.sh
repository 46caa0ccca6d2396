# Source this file from a model's launch script, which says what is trained, how, and on what; for all of them:
#
#   DATA_PATH         corpora as for pretrain --data-path, written by tools.preprocess_data
#   TOKENIZER_MODEL   the tokenizer that encoded them
#   OUTPUT            folder of checkpoints; a run goes on from the last one there, so that a job that was ended is
#                     simply started again. Figures go to OUTPUT.jsonl
#   SAVE_INTERVAL     steps between checkpoints (500)
#   TP, PP            tensor- and pipeline-parallel degrees; what is left is data parallelism
#   MICRO_BATCH_SIZE, ZERO_STAGE, RECOMPUTE: none, selective or full
#
# and those of launch.sh. Flags of the script go to pretrain, come last, and so win. --dry-run needs no variables.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# train FLAG ...: the model with these flags, in the layout of the variables above.
train() {
    local flags=(--bf16)
    : "${SAVE_INTERVAL:=500}"
    require_numbers TP PP MICRO_BATCH_SIZE SAVE_INTERVAL
    require_one_of ZERO_STAGE 0 1 2 3
    require_one_of RECOMPUTE none selective full
    require_cluster
    if ! $dry_run; then
        require DATA_PATH "corpora written by python -m tools.preprocess_data"
        require TOKENIZER_MODEL "the tokenizer that encoded them"
        require OUTPUT "a folder for checkpoints, which all nodes see"
    fi
    flags+=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --zero-stage "$ZERO_STAGE")
    flags+=(--micro-batch-size "$MICRO_BATCH_SIZE")
    if [[ $TP -gt 1 ]]; then
        flags+=(--sequence-parallel)
        # Kernels start in the order in which they are launched: a message before the product that it hides behind.
        # FSDP's gathers at stage 3 would wait for each other so.
        [[ $ZERO_STAGE -eq 3 ]] || export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    fi
    [[ $RECOMPUTE == none ]] || flags+=(--recompute-granularity "$RECOMPUTE")
    # shellcheck disable=SC2206  # DATA_PATH is a list
    [[ -z "${DATA_PATH:-}" ]] || flags+=(--data-path $DATA_PATH)
    [[ -z "${TOKENIZER_MODEL:-}" ]] || flags+=(--tokenizer-model "$TOKENIZER_MODEL")
    if [[ -n "${OUTPUT:-}" ]]; then
        flags+=(--load "$OUTPUT" --save "$OUTPUT" --save-interval "$SAVE_INTERVAL" --metrics "$OUTPUT.jsonl")
    fi
    source "$repository/tools/environment.sh"
    pretrain "${flags[@]}" "$@"
}
