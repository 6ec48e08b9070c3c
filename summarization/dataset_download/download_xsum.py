"""Write XSum (BBC articles, one-sentence summaries) for the summarization task."""

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

INSTRUCTION = "Summarize the following article in one sentence."


def convert(row: Row) -> Example:
    """One dataset row as an example."""
    return {"instruction": INSTRUCTION, "input": row["document"], "output": row["summary"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Download and write."""
    flags = build_parser(__doc__, "EdinburghNLP/xsum", "test").parse_args(argv)
    export(
        flags,
        data_file(__file__, "xsum_eval.json"),
        lambda: load_rows(flags.dataset_path, flags.split),
        ("document", "summary"),
        convert,
    )


if __name__ == "__main__":
    run_main(main)
