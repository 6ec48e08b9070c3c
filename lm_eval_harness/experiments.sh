#!/usr/bin/env bash
# Table 2: each task at 0 and 5 shots, full attention and Keyformer with half of the cache.
#
#   experiments.sh [MODEL_NAME MODEL_PATH MODEL_TYPE DTYPE]
#
# TASKS in the environment are others than the bundled ones, as in the paper's
#
#   TASKS="copa openbookqa winogrande piqa" \
#       experiments.sh mpt-7b models/mpt-7b-keyformer mpt bfloat16
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model_name=${1:-mpt-tiny-keyformer}
for task in ${TASKS:-tiny_copa tiny_openbookqa tiny_winogrande tiny_piqa}; do
    for shots in 0 5; do
        for keyformer in 0 1; do
            bash "$here/run.sh" "$task" "$shots" "$model_name" "${2:-$here/../models/$model_name}" \
                "${3:-mpt}" "${4:-auto}" "$keyformer" 50 30
        done
    done
done
