#!/usr/bin/env bash
# The paper's claims and retrieval, which it does not test, on a real pretrained model:
#   python models/model_download/download_model.py --model_name smollm2-135m
#   paper/smollm2.sh --bs 48               on a GPU; on several, PYTHON="accelerate launch ..."
# Flags are passed to each script. What was measured before a stop is not measured again.
set -euo pipefail
cd "$(dirname "$0")/.."
${PYTHON:-python} paper/together.py paper/smollm2.txt --model_path models/smollm2-135m \
    --out paper/results/local/smollm2 "$@"
