#!/usr/bin/env bash
# From text to a pretrained LLaMA, exported to Hugging Face, on a laptop without a GPU.
#
#   bash examples/quickstart.sh [TEXT_OR_JSONL ...]
#
# Trains two tokenizers and merges them, preprocesses the text (by default this project's own bilingual
# documentation), pretrains a tiny model in 8 processes at TP 2 x PP 2 x DP 2 with ZeRO-1, stops, resumes in
# 4 processes at another layout, exports the model and checks it with transformers. Everything that is made lands
# in quickstart-output/ (or $OUTPUT). Installs what it needs into .venv first, if that is not there.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

texts=()
for text in "$@"; do
    [[ "$text" == /* ]] || text=$caller/$text
    [[ -f "$text" ]] || { echo "error: $text: no such file" >&2; exit 2; }
    texts+=("$text")
done
base_texts=("${texts[@]}") chinese_texts=("${texts[@]}")
if [[ ${#texts[@]} -eq 0 ]]; then
    base_texts=(README.md CONTRIBUTING.md docs/*.md)
    chinese_texts=(README_zh.md docs/zh/*.md)
    texts=("${base_texts[@]}" "${chinese_texts[@]}")
fi
out=${OUTPUT:-$PWD/quickstart-output}
[[ "$out" == /* ]] || out=$caller/$out
first_part=60 total=100

source tools/environment.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
started=$SECONDS
rm -rf "$out"
mkdir -p "$out"

say "1/6 tokenizers: a base one, a Chinese one, and their merge"
"$PYTHON" -m tokenizer train --input "${base_texts[@]}" --output "$out/base.model" --vocab-size 2000 \
    --character-coverage 0.995 --no-hard-vocab-limit --quiet
"$PYTHON" -m tokenizer train --input "${chinese_texts[@]}" --output "$out/chinese.model" --vocab-size 4000 \
    --model-type unigram --character-coverage 0.995 --no-hard-vocab-limit --quiet
"$PYTHON" -m tokenizer merge --base "$out/base.model" --extra "$out/chinese.model" --output "$out/tokenizer"

say "2/6 text to tokens, in megatron-core's format"
"$PYTHON" -m tools.preprocess_data --input "${texts[@]}" --tokenizer-model "$out/tokenizer/tokenizer.model" \
    --output-prefix "$out/corpus" --append-eod --workers 2

# The vocabulary is the tokenizer's, whatever its size: it is never padded.
settings=(
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 344 --num-attention-heads 4 --num-query-groups 2
    --seq-length 128 --tokenizer-model "$out/tokenizer/tokenizer.model" --data-path "$out/corpus" --split 95,5,0
    --micro-batch-size 2 --global-batch-size 16 --train-iters "$total" --lr 3e-3 --lr-warmup-iters 5
    --min-lr 3e-4 --eval-interval 50 --eval-iters 1 --log-interval 10
    --save "$out/checkpoints" --metrics "$out/metrics.jsonl"
)
pretrain() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$1" -m pretrain "${settings[@]}" "${@:2}"
}

say "3/6 pretraining: 8 processes, TP 2 x PP 2 x DP 2 with sequence parallelism, 1F1B, ZeRO-1"
pretrain 8 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --zero-stage 1 \
    --exit-interval "$first_part"

say "4/6 the same run goes on at another layout: 4 processes, PP 2 interleaved x DP 2, ZeRO-2"
pretrain 4 --pipeline-model-parallel-size 2 --pipeline-schedule interleaved --zero-stage 2 --load "$out/checkpoints"

say "5/6 export to Hugging Face"
"$PYTHON" -m tools.convert_checkpoint --from native --to hf --input "$out/checkpoints" --output "$out/huggingface" \
    --tokenizer "$out/tokenizer"

say "6/6 the exported model in transformers: the same loss?"
"$PYTHON" -m tools.check_export --native "$out/checkpoints" --hf "$out/huggingface" --text "${texts[0]}" \
    --prompt "Megatron-ZH"
"$PYTHON" -m tools.plot_metrics --metrics "$out/metrics.jsonl" --mark "$first_part" --output "$out/loss.png"

"$PYTHON" - "$out" "$first_part" <<'PYTHON'
import json, sys
out, restart = sys.argv[1], int(sys.argv[2])
losses = {r["iteration"]: r["lm_loss"] for r in map(json.loads, open(f"{out}/metrics.jsonl"))}
print(f"\nloss {losses[1]:.3f} at the start, {losses[restart]:.3f} before and {losses[restart + 1]:.3f} after the change "
      f"of layout, {losses[max(losses)]:.3f} at the end")
PYTHON
say "done in $((SECONDS - started)) s (installation not counted); in $out:"
cat <<END
  tokenizer/      the merged tokenizer
  corpus.bin/.idx the token ids, megatron-core's format
  checkpoints/    native checkpoints, loadable at any layout; run.yaml is the resolved configuration
  metrics.jsonl   one object per iteration      loss.png   the loss curve over both layouts
  huggingface/    the model for transformers: AutoModelForCausalLM.from_pretrained("$out/huggingface")
END
