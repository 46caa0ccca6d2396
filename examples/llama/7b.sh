#!/usr/bin/env bash
# LLaMA 7B.
#
#   DATA_PATH=corpus TOKENIZER_MODEL=tokenizer.model OUTPUT=run bash examples/llama/7b.sh [FLAG ...]
#
# Shape and hyperparameters: arXiv 2302.13971, table 2 and section 2.3 (4M tokens a step, 1.0T tokens in all;
# the rate falls to a tenth). The vocabulary is the tokenizer's: 32,000 pieces there.
# Written for one node of 8 A800-80GB. python -m tools.plan: two stages leave room for microbatches of 4 without
# recomputation; data parallelism alone (PP=1 ZERO_STAGE=2) takes 2% longer.
# Variables: examples/model.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../model.sh"

: "${NNODES:=1}" "${GPUS_PER_NODE:=8}"
: "${TP:=1}" "${PP:=2}" "${MICRO_BATCH_SIZE:=4}" "${ZERO_STAGE:=1}" "${RECOMPUTE:=none}"
published=(
    --model llama-7b --seq-length 2048 --global-batch-size 2048 --train-iters 238419
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
)

train "${published[@]}" "$@"
