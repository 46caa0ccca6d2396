#!/usr/bin/env bash
# BLOOM 176B.
#
#   DATA_PATH=corpus TOKENIZER_MODEL=tokenizer.model OUTPUT=run NODE_RANK=0 MASTER_ADDR=node0 \
#     bash examples/bloom/176b.sh [FLAG ...]      on every node, or with examples/slurm/pretrain.sbatch
#
# Shape and hyperparameters: arXiv 2211.05100, table 3 (2048 sequences a step, 375M tokens of warm-up, a decay over
# 410B, 366B trained on); the deviation of initial weights is that of its authors' script. Their batch grew to this size
# at first; here it is constant. The matrix has 250,880 rows, as the published one; the tokenizer has fewer pieces.
# Written for 48 nodes of 8 A100-80GB, in the published layout: TP 4, PP 12, DP 8, ZeRO-1. The matrix is tied, and
# stands on the first and on the last of the twelve stages, which have one layer less (LAYERS). Attention is computed
# again, for its scores must not be kept, and the rest need not be.
# Variables: examples/model.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../model.sh"

: "${NNODES:=48}" "${GPUS_PER_NODE:=8}"
: "${TP:=4}" "${PP:=12}" "${MICRO_BATCH_SIZE:=2}" "${ZERO_STAGE:=1}" "${RECOMPUTE:=selective}"
: "${LAYERS:=5,6,6,6,6,6,6,6,6,6,6,5}"
published=(
    --model bloom-176b --vocab-size 250880 --seq-length 2048 --global-batch-size 2048 --train-iters 87261
    --lr 6e-5 --min-lr 6e-6 --lr-decay-style cosine --lr-warmup-iters 90 --lr-decay-iters 97752
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.0048
)

train "${published[@]}" --pipeline-layers "$LAYERS" "$@"
