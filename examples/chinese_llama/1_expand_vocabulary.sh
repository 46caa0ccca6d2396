#!/usr/bin/env bash
# Chinese-LLaMA's recipe, stage 0: a larger vocabulary, and a model whose matrices have rows for it.
#
#   BASE_MODEL=llama-7b CHINESE_MODEL=chinese_sp.model CORPUS="zh.jsonl en.jsonl" \
#       bash examples/chinese_llama/1_expand_vocabulary.sh [FLAG of `python -m tokenizer merge` ...]
#
# Merges the two vocabularies, audits the result, gives the model rows for the new pieces, and turns the corpus into
# tokens. Lists are separated by spaces; patterns are allowed.
#
#   BASE_MODEL        a Hugging Face LLaMA with its tokenizer.model
#   CHINESE_MODEL     a SentencePiece model with Chinese pieces, or
#   CHINESE_TEXT      text files from which to train one, of VOCAB_SIZE (20000) pieces, unigram, as published
#   OUTPUT            folder of all that the recipe makes; must not exist (chinese-llama)
#   BASE_TOKENIZER    the model's SentencePiece model, if it does not lie beside it
#   MODE              clean, or chinese-llama: the published rule (clean)
#   EMBEDDING_INIT    how new rows begin, see tools.convert_checkpoint --help (mean-subtoken)
#   TEXT              files on which the tokenizers are compared
#   CORPUS            files to train on, see tools.preprocess_data --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require BASE_MODEL "a folder with a Hugging Face LLaMA"
require_paths BASE_MODEL
: "${BASE_TOKENIZER:=$BASE_MODEL}" "${VOCAB_SIZE:=20000}" "${MODE:=clean}" "${EMBEDDING_INIT:=mean-subtoken}"
: "${CHINESE_MODEL:=}" "${CHINESE_TEXT:=}" "${TEXT:=}" "${CORPUS:=}"
[[ -n "$CHINESE_MODEL$CHINESE_TEXT" ]] || fail "CHINESE_MODEL is not set: give it, or CHINESE_TEXT to train one"
[[ -z "$CHINESE_MODEL" || -z "$CHINESE_TEXT" ]] || fail "CHINESE_MODEL and CHINESE_TEXT exclude each other"
for name in BASE_TOKENIZER CHINESE_MODEL CHINESE_TEXT TEXT CORPUS; do
    require_paths "$name"
done
require_numbers VOCAB_SIZE
require_one_of MODE clean chinese-llama
require_one_of EMBEDDING_INIT mean-subtoken weighted-subtoken mean-normal mean random
[[ ! -e "$OUTPUT" ]] || fail "OUTPUT $OUTPUT exists already: remove it or choose another folder"
[[ -d "$(dirname "$OUTPUT")" ]] || fail "OUTPUT $OUTPUT: $(dirname "$OUTPUT") is not a folder"
source "$repository/tools/environment.sh"

mkdir "$OUTPUT"
trap '[[ -f "$OUTPUT/model.yaml" ]] || rm -rf "$OUTPUT"' EXIT  # the last file that is written: all or nothing
# shellcheck disable=SC2206  # lists
chinese=($CHINESE_TEXT) texts=($TEXT) corpus=($CORPUS)

if [[ ${#chinese[@]} -gt 0 ]]; then
    say "a Chinese tokenizer of $VOCAB_SIZE pieces"
    CHINESE_MODEL=$OUTPUT/chinese.model
    "$PYTHON" -m tokenizer train --input "${chinese[@]}" --vocab-size "$VOCAB_SIZE" --model-type unigram \
        --output "$CHINESE_MODEL"
fi

say "the merged tokenizer"
"$PYTHON" -m tokenizer merge --base "$BASE_TOKENIZER" --extra "$CHINESE_MODEL" --mode "$MODE" \
    --output "$OUTPUT/tokenizer" "$@"
audit=(--tokenizer "$OUTPUT/tokenizer" --base "$BASE_TOKENIZER")
[[ ${#texts[@]} -eq 0 ]] || audit+=(--input "${texts[@]}")
"$PYTHON" -m tokenizer audit "${audit[@]}" --markdown "$OUTPUT/audit.md" --json "$OUTPUT/audit.json"
if [[ ${#texts[@]} -gt 0 ]]; then
    "$PYTHON" -m tokenizer compare --tokenizer "$BASE_TOKENIZER" "$OUTPUT/tokenizer" --input "${texts[@]}" \
        --markdown "$OUTPUT/compare.md" --json "$OUTPUT/compare.json"
fi

say "the model with new rows"
"$PYTHON" -m tools.convert_checkpoint --from hf --to native --input "$BASE_MODEL" --output "$OUTPUT/0-expanded" \
    --base-tokenizer "$BASE_TOKENIZER" --tokenizer "$OUTPUT/tokenizer" --embedding-init "$EMBEDDING_INIT"

if [[ ${#corpus[@]} -gt 0 ]]; then
    say "the corpus in tokens"
    "$PYTHON" -m tools.preprocess_data --input "${corpus[@]}" --tokenizer-model "$OUTPUT/tokenizer" \
        --output-prefix "$OUTPUT/corpus" --prepend-bos --append-eod
fi
# The later stages take the model's shape from here: it may be any LLaMA, not only one with a preset.
shape=$("$PYTHON" -c 'import json, sys, yaml; print(yaml.safe_dump(json.load(sys.stdin)["model"]))' \
    <"$OUTPUT/0-expanded/$(cat "$OUTPUT/0-expanded/latest")/manifest.json")
echo "$shape" >"$OUTPUT/model.yaml"
say "done; in $OUTPUT:"
cat <<END
  tokenizer/                 the merged tokenizer; audit.md: what is wrong with it
  0-expanded/, model.yaml    the model with new rows, and its shape
  corpus.bin/.idx/.json      what to train on, if CORPUS was given
END
