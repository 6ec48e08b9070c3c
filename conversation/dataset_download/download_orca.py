"""Write questions of OpenOrca and GPT-4's answers to them for the conversation task.

OpenOrca is 4 GB, so the examples are drawn from the first 10,000 rows of one of its two files (from
the first N, if --n_obs N is more), and little more than these rows is downloaded.
"""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow
from huggingface_hub import HfFileSystem, errors
from pyarrow.parquet import ParquetFile

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

FILE = "1M-GPT4-Augmented.parquet"  # what the MLPerf Llama 2 benchmark is drawn from too
POOL = 10_000
NARRATIVE = "A user asks an assistant."


def load_head(path: str, split: str, count: int) -> Sequence[Row]:
    """The first rows of FILE or, of a mirror without it, all rows of the split.

    Raises
    ------
    InputError
        If the hub is not reachable, or dataset or split do not exist or cannot be read.
    """
    if FILE not in list_files(path):
        return load_rows(path, split)
    if split != "train":
        raise InputError(f"OpenOrca has the split train only, not {split}")
    local, url = Path(path) / FILE, f"datasets/{path}/{FILE}"
    try:
        file = local.open("rb") if local.exists() else HfFileSystem().open(url, cache_type="none")
        # The datasets library reads whole row groups, even to stream, and these are very large.
        # With a buffer and no pre_buffer, pyarrow reads 1 MB of a column when it needs it.
        with file, ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            rows = chain.from_iterable(b.to_pylist() for b in table.iter_batches(batch_size=count))
            return list(islice(rows, count))
    except (errors.HTTPError, OSError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read {FILE} of {path}: {one_line(error)}") from error


def usable(row: Row) -> bool:
    """Whether there are both a question and a response."""
    return bool(row["question"] and row["response"])


def convert(row: Row) -> Example:
    """One dataset row as a dialogue of two turns; the system prompt is its situation."""
    return {
        "narrative": (row["system_prompt"] or "").strip() or NARRATIVE,
        "dialogue": [row["question"], row["response"]],
        "speakers": ["User", "Assistant"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Download and write."""
    flags = build_parser(__doc__, "Open-Orca/OpenOrca", "train", n_obs=1000).parse_args(argv)
    export(
        flags,
        data_file(__file__, "orca_eval.json"),
        lambda: load_head(flags.dataset_path, flags.split, max(POOL, flags.n_obs)),
        ("system_prompt", "question", "response"),
        convert,
        usable,
    )


if __name__ == "__main__":
    run_main(main)
