#!/usr/bin/env bash
# Summarize one dataset with one model, method and cache size:
#
#   MODEL_PATH=models/mpt-7b-keyformer DATASET_PATH=summarization/data/cnndm_eval.json \
#   ATTENTION=keyformer KV_CACHE=60 RECENT=30 bash summarization/run_summarization_task.sh --n_obs 100
#
# Without any settings, the bundled model on the bundled reports.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
task=summarization
script=summarize.py
texts=summaries.txt
. "$here/../models/keyformer_evaluation/tasks/run_task.sh"
