#!/usr/bin/env bash
# Llama 2 7B.
#
#   DATA_PATH=corpus TOKENIZER_MODEL=tokenizer.model OUTPUT=run bash examples/llama2/7b.sh [FLAG ...]
#
# Shape and hyperparameters: arXiv 2307.09288, section 2.2 and table 1 (4M tokens a step, 2.0T tokens in all; the rate
# falls to a tenth).
# Written for one node of 8 A800-80GB. python -m tools.plan: two stages leave room for microbatches of 2 without
# recomputation; data parallelism alone (PP=1 ZERO_STAGE=2) takes 1% longer.
# Variables: examples/model.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../model.sh"

: "${NNODES:=1}" "${GPUS_PER_NODE:=8}"
: "${TP:=1}" "${PP:=2}" "${MICRO_BATCH_SIZE:=2}" "${ZERO_STAGE:=1}" "${RECOMPUTE:=none}"
published=(
    --model llama2-7b --seq-length 4096 --global-batch-size 1024 --train-iters 476837
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0
)

train "${published[@]}" "$@"
