#!/usr/bin/env bash
# LLaMA 30B.
#
#   DATA_PATH=corpus TOKENIZER_MODEL=tokenizer.model OUTPUT=run NODE_RANK=0 MASTER_ADDR=node0 \
#     bash examples/llama/30b.sh [FLAG ...]      on every node, or with examples/slurm/pretrain.sbatch
#
# Shape and hyperparameters: arXiv 2302.13971, table 2 and section 2.3 (4M tokens a step, 1.4T tokens in all;
# the rate falls to a tenth). The vocabulary is the tokenizer's: 32,000 pieces there.
# Written for 4 nodes of 8 A800-80GB. python -m tools.plan: TP 2 (8 does not divide the 52 heads), four stages of 15
# layers, and nothing is computed again.
# Variables: examples/model.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../model.sh"

: "${NNODES:=4}" "${GPUS_PER_NODE:=8}"
: "${TP:=2}" "${PP:=4}" "${MICRO_BATCH_SIZE:=2}" "${ZERO_STAGE:=1}" "${RECOMPUTE:=none}"
published=(
    --model llama-30b --seq-length 2048 --global-batch-size 2048 --train-iters 333786
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
)

train "${published[@]}" "$@"
