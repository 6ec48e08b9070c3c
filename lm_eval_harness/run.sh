#!/usr/bin/env bash
# One task under one method:
#
#   run.sh TASK SHOTS MODEL_NAME MODEL_PATH MODEL_TYPE DTYPE KEYFORMER KV_CACHE RECENT [flag ...]
#
# KEYFORMER is 1, or 0 for full attention; KV_CACHE is in percent of the prompt, RECENT in percent
# of that. What is left out is the bundled question task, 0 shots, the bundled model and Keyformer
# with half of the cache. More flags go to run_lm_eval_harness.py, which --help lists.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
task=${1:-tiny_copa}
shots=${2:-0}
model_name=${3:-mpt-tiny-keyformer}
model_path=${4:-$here/../models/$model_name}
model_type=${5:-mpt}
dtype=${6:-auto}
keyformer=${7:-1}
kv_cache=${8:-50}
recent=${9:-30}
shift $(($# < 9 ? $# : 9))

case $keyformer in
    1) attention=keyformer out=keyformer-$kv_cache ;;
    0) attention=full out=full ;;
    *) echo "run.sh: error: KEYFORMER must be 1 or 0, got '$keyformer'" >&2; exit 2 ;;
esac

"${PYTHON:-python}" "$here/run_lm_eval_harness.py" \
    --tasks "$task" \
    --num_fewshot "$shots" \
    --model_name "$model_name" \
    --model_path "$model_path" \
    --model_type "$model_type" \
    --dtype "$dtype" \
    --attention "$attention" \
    --kv_cache "$kv_cache" \
    --recent "$recent" \
    --out "${OUT_DIR:-$here/out}/$model_name/$task-$shots/$out" \
    "$@"
