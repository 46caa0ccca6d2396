#!/usr/bin/env bash
# Llama 3 70B.
#
#   DATA_PATH=corpus TOKENIZER_MODEL=tokenizer.model OUTPUT=run NODE_RANK=0 MASTER_ADDR=node0 \
#     bash examples/llama3/70b.sh [FLAG ...]      on every node, or with examples/slurm/pretrain.sbatch
#
# Shape and peak rate: arXiv 2407.21783, table 3. Warm-up, decay to a hundredth and the batch of 8M tokens are those of
# section 3.4.1 for 405B, and there are none for other sizes; weight decay, betas and clipping, of which the paper says
# nothing, are Llama 2's.
# Written for 16 nodes of 8 H800. python -m tools.plan: TP 4 and eight stages of 10 layers, one sequence at a time.
# Variables: examples/model.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../model.sh"

: "${NNODES:=16}" "${GPUS_PER_NODE:=8}"
: "${TP:=4}" "${PP:=8}" "${MICRO_BATCH_SIZE:=1}" "${ZERO_STAGE:=1}" "${RECOMPUTE:=none}"
published=(
    --model llama3-70b --seq-length 8192 --global-batch-size 1024 --train-iters 1200000
    --lr 1.5e-4 --min-lr 1.5e-6 --lr-decay-style cosine --lr-warmup-iters 8000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0
)

train "${published[@]}" "$@"
