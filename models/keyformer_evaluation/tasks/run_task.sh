# Sourced by the run_*_task.sh scripts, which set task, script, here and their defaults:
# one model, method and cache size over one dataset, with the values of the scripts that the
# paper's authors released. Settings are environment variables; what follows the script's name on
# the command line is passed on.
model_path=${MODEL_PATH:-$here/../models/mpt-tiny-keyformer}
model_name=${MODEL_NAME:-$(basename "$model_path")}
dataset_path=${DATASET_PATH:-$here/data/sample_eval.json}
attention=${ATTENTION:-keyformer}
kv_cache=${KV_CACHE:-60}
max_new_tokens=${MAX_NEW_TOKENS:-128}
out=${OUT_DIR:-$here/out}/$model_name/$(basename "$dataset_path" .json)/$attention-$kv_cache

"${PYTHON:-python}" "$here/$script" \
    --task "$task" \
    --model_name "$model_name" \
    --model_path "$model_path" \
    --dataset_path "$dataset_path" \
    --save_path "$out/$texts" \
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
    --max_tokenizer_length "${MAX_TOKENIZER_LENGTH:-1920}" \
    --max_new_tokens "$max_new_tokens" \
    --min_gen_length "${MIN_GEN_LENGTH:-$((max_new_tokens < 30 ? max_new_tokens : 30))}" \
    --seed "${SEED:-0}" \
    "$@"
