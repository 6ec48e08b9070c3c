"""Write CNN/DailyMail 3.0.0 (news articles, bullet-point highlights) for the summarization task."""

from collections.abc import Sequence

from keyformer_evaluation.tasks.download import (
    Example,
    Row,
    build_parser,
    data_file,
    export,
    load_rows,
)
from keyformer_evaluation.tasks.flags import run_main

INSTRUCTION = "Summarize the following news article:"
"""That of the authors' data files."""


def convert(row: Row) -> Example:
    """One dataset row as an example."""
    return {"instruction": INSTRUCTION, "input": row["article"], "output": row["highlights"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Download and write."""
    # The validation split, because the authors' runs and the MLPerf GPT-J benchmark report on it.
    flags = build_parser(__doc__, "abisee/cnn_dailymail", "validation").parse_args(argv)
    export(
        flags,
        data_file(__file__, "cnndm_eval.json"),
        lambda: load_rows(flags.dataset_path, flags.split, config="3.0.0"),
        ("article", "highlights"),
        convert,
    )


if __name__ == "__main__":
    run_main(main)
