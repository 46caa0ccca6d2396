#!/usr/bin/env bash
# OPT 66B on 24 GPUs.
#
#   DATA_PATH=corpus TOKENIZER_MODEL=tokenizer.model OUTPUT=run NODE_RANK=0 MASTER_ADDR=node0 \
#     bash examples/opt/66b_24gpu.sh [FLAG ...]      on every node, or with examples/slurm/pretrain.sbatch
#
# Shape and hyperparameters: arXiv 2205.01068, table 1 and sections 2.1-2.2 (2M tokens a step, a linear decay to a tenth
# over 300B tokens after 375M of warm-up, initial weights of 0.006). There is no dropout here. The matrix has 50,272
# rows, as the published one.
# Written for 3 nodes of 8 A800-80GB, and all 24 GPUs of them: 64 layers do not divide by six, but stages need not be
# equal. python -m tools.plan: the first stage has the embedding and keeps most microbatches, the last one has the head;
# both have a layer less (LAYERS). Three stages (PP=3 ZERO_STAGE=3 MICRO_BATCH_SIZE=4 LAYERS=19,22,23) take 3% longer.
# Variables: examples/model.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../model.sh"

: "${NNODES:=3}" "${GPUS_PER_NODE:=8}"
: "${TP:=4}" "${PP:=6}" "${MICRO_BATCH_SIZE:=2}" "${ZERO_STAGE:=1}" "${RECOMPUTE:=none}"
: "${LAYERS:=10,11,11,11,11,10}"
published=(
    --model opt-66b --vocab-size 50272 --seq-length 2048 --global-batch-size 1024 --train-iters 143051
    --lr 8e-5 --min-lr 8e-6 --lr-decay-style linear --lr-warmup-iters 179
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --init-method-std 0.006
)

train "${published[@]}" --pipeline-layers "$LAYERS" "$@"
