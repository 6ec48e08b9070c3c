#!/usr/bin/env bash
# Continue the dialogues of one dataset with one model, method and cache size:
#
#   MODEL_PATH=models/mpt-7b-chat-keyformer DATASET_PATH=conversation/data/soda_eval.json \
#   ATTENTION=keyformer KV_CACHE=90 RECENT=30 bash conversation/run_conversation_task.sh --n_obs 100
#
# Without any settings, the bundled model on the bundled dialogues.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
task=conversation
script=dialogue.py
texts=dialogues.txt
. "$here/../models/keyformer_evaluation/tasks/run_task.sh"
