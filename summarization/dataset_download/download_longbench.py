"""Write one summarization subset of LongBench (long inputs, about 200 each) for the task scripts.

LongBench ships one data.zip of .jsonl files, which is read directly: the loading script next to
it no longer runs in the datasets library.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import errors, hf_hub_download

from keyformer import InputError
from keyformer_evaluation.tasks.download import (
    Example,
    Row,
    build_parser,
    data_file,
    export,
    list_files,
    load_rows,
    one_line,
)
from keyformer_evaluation.tasks.flags import run_main

ARCHIVE = "data.zip"
INSTRUCTIONS = {
    "gov_report": "Write a summary of the following government report.",
    "qmsum": "Read the following meeting transcript and answer the query that comes after it.",
    "multi_news": "Write one summary of all of the following news articles.",
    "vcsum": "请为下面的会议记录写一段总结。",
    "samsum": "Summarize the last dialogue in a few short sentences, as the examples before it do.",
}


def load_subset(path: str, subset: str, split: str) -> Sequence[Row]:
    """A subset from data.zip or, of a mirror without it, the configuration of that name.

    Raises
    ------
    InputError
        If the hub is not reachable, or dataset, subset or split do not exist.
    """
    if ARCHIVE not in list_files(path):
        return load_rows(path, split, config=subset)
    if split != "test":
        raise InputError(f"LongBench has the split test only, not {split}")
    try:
        local = Path(path) / ARCHIVE
        archive = local if local.exists() else hf_hub_download(path, ARCHIVE, repo_type="dataset")
        with zipfile.ZipFile(archive) as files, files.open(f"data/{subset}.jsonl") as lines:
            return [json.loads(line) for line in lines]
    except (errors.HTTPError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {subset} of {path}: {one_line(error)}") from error


def convert(row: Row, subset: str) -> Example:
    """One row as an example; a query or a last dialogue follows the long context."""
    text = "\n\n".join(part for part in (row["context"], row["input"]) if part)
    return {"instruction": INSTRUCTIONS[subset], "input": text, "output": row["answers"][0]}


def main(argv: Sequence[str] | None = None) -> None:
    """Download and write."""
    parser = build_parser(__doc__, "zai-org/LongBench", "test")
    parser.add_argument("--subset", choices=INSTRUCTIONS, default="gov_report")
    flags = parser.parse_args(argv)
    export(
        flags,
        data_file(__file__, f"{flags.subset}_eval.json"),
        lambda: load_subset(flags.dataset_path, flags.subset, flags.split),
        ("context", "input", "answers"),
        lambda row: convert(row, flags.subset),
    )


if __name__ == "__main__":
    run_main(main)
