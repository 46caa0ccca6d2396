#!/usr/bin/env bash
# LLaMA 65B.
#
#   DATA_PATH=corpus TOKENIZER_MODEL=tokenizer.model OUTPUT=run NODE_RANK=0 MASTER_ADDR=node0 \
#     bash examples/llama/65b.sh [FLAG ...]      on every node, or with examples/slurm/pretrain.sbatch
#
# Shape and hyperparameters: arXiv 2302.13971, table 2 and section 2.3 (4M tokens a step, 1.4T tokens in all;
# the rate falls to a tenth). The vocabulary is the tokenizer's: 32,000 pieces there.
# Written for 16 nodes of 8 A800-80GB. python -m tools.plan: TP 4 and eight stages of 10 layers take 11% less time
# than TP 8, whose messages are twice as many bytes for a GPU.
# Variables: examples/model.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../model.sh"

: "${NNODES:=16}" "${GPUS_PER_NODE:=8}"
: "${TP:=4}" "${PP:=8}" "${MICRO_BATCH_SIZE:=4}" "${ZERO_STAGE:=1}" "${RECOMPUTE:=none}"
published=(
    --model llama-65b --seq-length 2048 --global-batch-size 2048 --train-iters 333786
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
)

train "${published[@]}" "$@"
