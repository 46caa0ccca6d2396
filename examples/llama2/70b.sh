#!/usr/bin/env bash
# Llama 2 70B.
#
#   DATA_PATH=corpus TOKENIZER_MODEL=tokenizer.model OUTPUT=run NODE_RANK=0 MASTER_ADDR=node0 \
#     bash examples/llama2/70b.sh [FLAG ...]      on every node, or with examples/slurm/pretrain.sbatch
#
# Shape and hyperparameters: arXiv 2307.09288, section 2.2 and table 1 (4M tokens a step, 2.0T tokens in all; the rate
# falls to a tenth).
# Written for 16 nodes of 8 H800. python -m tools.plan: the links of H800 make TP dear, so TP 2 and sixteen stages of 5
# layers, one microbatch of one sequence at a time.
# Variables: examples/model.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../model.sh"

: "${NNODES:=16}" "${GPUS_PER_NODE:=8}"
: "${TP:=2}" "${PP:=16}" "${MICRO_BATCH_SIZE:=1}" "${ZERO_STAGE:=1}" "${RECOMPUTE:=none}"
published=(
    --model llama2-70b --seq-length 4096 --global-batch-size 1024 --train-iters 476837
    --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --clip-grad 1.0
)

train "${published[@]}" "$@"
