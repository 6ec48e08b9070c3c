#!/usr/bin/env bash
# Every table and figure of the paper that is about accuracy, on the bundled models:
#   paper/all.sh --bs 200                  on a GPU; on several, PYTHON="accelerate launch ..."
#   paper/all.sh --quick                   a minute on a CPU, only to see all of it work
# Flags are passed to each script. What was measured before a stop is not measured again.
# table2.py, which needs lm-eval, runs by itself.
set -euo pipefail
${PYTHON:-python} "$(dirname "$0")/together.py" "$(dirname "$0")/all.txt" "$@"
