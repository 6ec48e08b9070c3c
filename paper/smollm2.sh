#!/usr/bin/env bash
# The paper's claims and retrieval, which it does not test, on a real pretrained model:
#   python models/model_download/download_model.py --model_name smollm2-135m
#   paper/smollm2.sh --bs 48               on a GPU; on several, PYTHON="accelerate launch ..."
#   DATASETS="a.json b.json" paper/smollm2.sh --bs 48
#                                          and summaries of other datasets in the same format
# Results go to RESULTS, by default paper/results/local/smollm2, those of a dataset to a folder of
# its name in there. Flags are passed to each script. What was measured before a stop is not
# measured again.
set -euo pipefail
stop() { echo "smollm2.sh: error: $1" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
datasets=()
for dataset in ${DATASETS:-}; do
    [ -f "$dataset" ] || stop "DATASETS: there is no file $dataset"
    datasets+=("$(realpath "$dataset")")
done
names=$(for dataset in "${datasets[@]}"; do basename "$dataset" .json; done)
[ -z "$(uniq -d <<<"$(sort <<<"$names")")" ] || stop "DATASETS must have different names, got $DATASETS"
case " $*" in *" --out"*) stop "the folder of results is RESULTS, not --out" ;; esac
out=$(realpath -m "${RESULTS:-$here/results/local/smollm2}")
cd "$here/.."
flags=(--model_path models/smollm2-135m --store "$out/measured.sqlite")
${PYTHON:-python} paper/together.py paper/smollm2.txt "${flags[@]}" --out "$out" "$@"
for dataset in "${datasets[@]}"; do
    ${PYTHON:-python} paper/summaries.py --dataset_path "$dataset" --max_new_tokens 128 \
        --measure reference rouge continued "${flags[@]}" --out "$out/$(basename "$dataset" .json)" "$@"
done
