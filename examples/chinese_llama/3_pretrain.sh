#!/usr/bin/env bash
# Chinese-LLaMA's recipe, stage 2: LoRA adapters and the embeddings, or the whole model; then export to Hugging Face.
#
#   OUTPUT=chinese-llama bash examples/chinese_llama/3_pretrain.sh [FLAG of `python -m pretrain` ...]
#   LOAD=chinese-llama/0-expanded bash examples/chinese_llama/3_pretrain.sh      without stage 1
#
# Its authors left stage 1 out for 13B and 33B, and advise to do so where compute is short: the embeddings are trained
# here too. Starting again, several nodes and flags: as 2_train_embeddings.sh says, and the same variables but for
#
#   LOAD              the checkpoint to begin with (OUTPUT/1-embeddings)
#   TRAIN_ONLY        lora, nothing for the whole model, or what else pretrain --train-only takes (lora)
#   LR                (1e-4; the authors' script has 2e-4)
#   EXPORT_DTYPE      of the Hugging Face model: bfloat16, float16 or float32 (bfloat16)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

: "${TRAIN_ONLY=lora}" "${LOAD:=$OUTPUT/1-embeddings}" "${EXPORT_DTYPE:=bfloat16}"
settings 1e-4
[[ -d "$LOAD" ]] || fail "LOAD $LOAD: no such folder; run 2_train_embeddings.sh, or give LOAD=$OUTPUT/0-expanded"
[[ ! -e "$OUTPUT/huggingface" ]] || fail "OUTPUT $OUTPUT: has an exported model already; remove $OUTPUT/huggingface"
require_one_of EXPORT_DTYPE bfloat16 float16 float32
# The adapters are by default the published ones: rank 8, alpha 32, dropout 0.05, beside all seven linear layers.
trained=()
[[ -z "$TRAIN_ONLY" ]] || trained=(--train-only "$TRAIN_ONLY")
source "$repository/tools/environment.sh"

train "$LOAD" "$OUTPUT/2-pretrain" "${trained[@]}" "$@"

if [[ $NODE_RANK == 0 ]] && ! $dry_run; then
    say "the model for transformers, adapters merged into the weights"
    "$PYTHON" -m tools.convert_checkpoint --from native --to hf --input "$OUTPUT/2-pretrain" \
        --output "$OUTPUT/huggingface" --tokenizer "$OUTPUT/tokenizer" --dtype "$EXPORT_DTYPE"
fi
