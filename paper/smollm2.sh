#!/usr/bin/env bash
# The paper's claims and retrieval, which it does not test, on a real pretrained model:
#   python models/model_download/download_model.py --model_name smollm2-135m
#   paper/smollm2.sh --bs 48               on a GPU; on several, PYTHON="accelerate launch ..."
#   DATASETS="a.json b.json" paper/smollm2.sh --bs 48
#                                          and summaries of other datasets in the same format
# Flags are passed to each script. What was measured before a stop is not measured again.
set -euo pipefail
cd "$(dirname "$0")/.."
out=paper/results/local/smollm2
flags=(--model_path models/smollm2-135m --store "$out/measured.sqlite")
${PYTHON:-python} paper/together.py paper/smollm2.txt "${flags[@]}" --out "$out" "$@"
for dataset in ${DATASETS:-}; do
    ${PYTHON:-python} paper/summaries.py --dataset_path "$dataset" --max_new_tokens 128 \
        --measure reference rouge "${flags[@]}" --out "$out/$(basename "$dataset" .json)" "$@"
done
