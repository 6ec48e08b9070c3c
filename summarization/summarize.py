"""Summarize a dataset under one attention method and score it with ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keyformer_evaluation.tasks.flags import run_main
from keyformer_evaluation.tasks.run import run_and_report, task_parser

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, run, and print the scores."""
    parser = task_parser(__doc__, "summarization", HERE, texts="summaries.txt")
    run_and_report(parser.parse_args(argv))


if __name__ == "__main__":
    run_main(main)
