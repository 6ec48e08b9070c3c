"""Write GovReport (long US government reports and their summaries) for the summarization task."""

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

INSTRUCTION = "Write a summary of the following government report that covers its main findings."


def convert(row: Row) -> Example:
    """One dataset row as an example."""
    return {"instruction": INSTRUCTION, "input": row["report"], "output": row["summary"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Download and write."""
    flags = build_parser(__doc__, "ccdv/govreport-summarization", "test").parse_args(argv)
    export(
        flags,
        data_file(__file__, "govreport_eval.json"),
        lambda: load_rows(flags.dataset_path, flags.split),
        ("report", "summary"),
        convert,
    )


if __name__ == "__main__":
    run_main(main)
