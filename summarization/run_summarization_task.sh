#!/usr/bin/env bash
# Summarize one dataset with one model, method and cache size, as the paper's runs did
# (beam 4, early stopping). Settings are environment variables; what follows the script's
# name is passed on to summarize.py:
#
#   MODEL_PATH=models/mpt-7b-keyformer DATASET_PATH=summarization/data/cnndm_eval.json \
#   ATTENTION=keyformer KV_CACHE=60 RECENT=30 bash summarization/run_summarization_task.sh --n_obs 100
#
# Without any, it runs the bundled model on the bundled reports.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

model_path=${MODEL_PATH:-$here/../models/mpt-tiny-keyformer}
model_name=${MODEL_NAME:-$(basename "$model_path")}
dataset_path=${DATASET_PATH:-$here/data/sample_eval.json}
attention=${ATTENTION:-keyformer}
kv_cache=${KV_CACHE:-60}
out=${OUT_DIR:-$here/out}/$model_name/$(basename "$dataset_path" .json)/$attention-$kv_cache

"${PYTHON:-python}" "$here/summarize.py" \
    --task summarization \
    --model_name "$model_name" \
    --model_path "$model_path" \
    --dataset_path "$dataset_path" \
    --save_path "$out/summaries.txt" \
    --score_path "$out/scores.json" \
    --attentions_path "$out/attentions" \
    --attention "$attention" \
    --kv_cache "$kv_cache" \
    --recent "${RECENT:-30}" \
    --tau_init "${TAU_INIT:-1}" \
    --tau_end "${TAU_END:-2}" \
    --bs "${BATCH_SIZE:-1}" \
    --beam "${BEAM:-4}" \
    --early_stopping \
    --dtype "${DTYPE:-auto}" \
    --max_new_tokens "${MAX_NEW_TOKENS:-128}" \
    --seed "${SEED:-0}" \
    "$@"
