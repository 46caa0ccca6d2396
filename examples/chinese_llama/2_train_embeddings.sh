#!/usr/bin/env bash
# Chinese-LLaMA's recipe, stage 1: the embeddings learn the new pieces, and all else stays as it is.
#
#   OUTPUT=chinese-llama bash examples/chinese_llama/2_train_embeddings.sh [FLAG of `python -m pretrain` ...]
#
# Goes on where it was when it is started again. On several nodes start it on each, with one OUTPUT that all of them
# see. Flags come last and so win; --recompute-granularity full and --zero-stage 2 save memory. Default values in
# parentheses: those of Cui et al., arXiv 2304.08177, where it gives them; it computed in fp16.
#
#   OUTPUT            the folder that 1_expand_vocabulary.sh made (chinese-llama)
#   DATA_PATH         corpora as for pretrain --data-path, encoded with OUTPUT/tokenizer (OUTPUT/corpus)
#   TRAIN_ITERS       steps (one pass over OUTPUT/corpus; required with DATA_PATH)
#   TRAIN_ONLY        embeddings, all their rows, or new-rows (embeddings)
#   LR (2e-4), SEQ_LENGTH (512), GLOBAL_BATCH_SIZE (1024), MICRO_BATCH_SIZE (4), PRECISION: bf16, fp16 or fp32 (bf16)
#   TP (1), PP (1)    tensor- and pipeline-parallel degrees; what is left is data parallelism
#   GPUS_PER_NODE (8), NNODES (1), and for several nodes NODE_RANK, MASTER_ADDR and MASTER_PORT (29500)
#   SAVE_INTERVAL     steps between checkpoints (200)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${TRAIN_ONLY:=embeddings}"
require_one_of TRAIN_ONLY embeddings new-rows
settings 2e-4
base=$OUTPUT/0-expanded
# The published stage trains the input matrix alone. The rows of new pieces in the output matrix then stay at their
# initial values, and the loss on these pieces stays high. A model with tied embeddings has one matrix for both: give
# it --no-train-output-embeddings.
trained=(--train-only "$TRAIN_ONLY" --train-output-embeddings)
[[ $TRAIN_ONLY != new-rows ]] || trained+=(--base-vocab-size "$(json_number "$base/embedding_init.json" old_rows)")
source "$repository/tools/environment.sh"

train "$base" "$OUTPUT/1-embeddings" "${trained[@]}" "$@"
