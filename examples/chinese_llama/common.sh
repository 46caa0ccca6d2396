# Source this file from the scripts beside it: what the stages of Chinese-LLaMA's recipe share.

source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"

# json_number FILE KEY: of a flat object.
json_number() { sed -nE "s/.*\"$2\": ([0-9]+).*/\\1/p" "$1"; }

: "${OUTPUT:=chinese-llama}"

# settings LR: of a training stage, into the variables that 2_train_embeddings.sh describes.
settings() {
    : "${LR:=$1}" "${SEQ_LENGTH:=512}" "${GLOBAL_BATCH_SIZE:=1024}" "${MICRO_BATCH_SIZE:=4}" "${PRECISION:=bf16}"
    : "${TP:=1}" "${PP:=1}" "${GPUS_PER_NODE:=8}" "${NNODES:=1}" "${SAVE_INTERVAL:=200}"
    require_numbers SEQ_LENGTH GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE TP PP SAVE_INTERVAL
    require_one_of PRECISION bf16 fp16 fp32
    require_cluster
    [[ -f "$OUTPUT/model.yaml" ]] || fail "OUTPUT $OUTPUT: has no model.yaml; run 1_expand_vocabulary.sh first"
    if [[ -z "${DATA_PATH:-}" ]]; then
        DATA_PATH=$OUTPUT/corpus
        [[ -f "$DATA_PATH.json" ]] || fail "DATA_PATH is not set, and there is no $DATA_PATH: give encoded corpora"
        : "${TRAIN_ITERS:=$(steps_of_one_pass)}"
    fi
    require TRAIN_ITERS "the number of steps"
    require_numbers TRAIN_ITERS
}

# The published runs pass once over their text; 969 of 1000 documents are for training (pretrain --split). At least 1.
steps_of_one_pass() {
    echo $(($(json_number "$DATA_PATH.json" tokens) * 969 / 1000 / (SEQ_LENGTH * GLOBAL_BATCH_SIZE) + 1))
}

# train FROM SAVE [FLAG ...]: a stage, from the weights of FROM. If SAVE has checkpoints already it goes on with the
# last of them, so that a job that was ended can simply be started again.
train() {
    local from=$1 save=$2 flags=()
    shift 2
    [[ $TP -eq 1 ]] || flags+=(--sequence-parallel)
    [[ $PRECISION == fp32 ]] || flags+=("--$PRECISION")
    # shellcheck disable=SC2086  # DATA_PATH is a list
    pretrain --config "$OUTPUT/model.yaml" --tokenizer-model "$OUTPUT/tokenizer" --data-path $DATA_PATH \
        --pretrained-checkpoint "$from" --load "$save" --save "$save" --save-interval "$SAVE_INTERVAL" \
        --metrics "$save.jsonl" --seq-length "$SEQ_LENGTH" \
        --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-iters "$TRAIN_ITERS" \
        --lr "$LR" --lr-decay-style cosine --lr-warmup-iters $((TRAIN_ITERS * 5 / 100)) --weight-decay 0.01 \
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "${flags[@]}" "$@"
}
