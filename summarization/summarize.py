"""Summarize a dataset under one attention method and score it with ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keyformer.evaluation import flags as flag
from keyformer.evaluation.run import run_task

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, run, and print the scores."""
    parser = flag.Parser(description=__doc__)
    flag.model_flags(parser)
    flag.method_flags(parser)
    flag.task_flags(
        parser,
        task="summarization",
        dataset_path=HERE / "data" / "sample_eval.json",
        out=HERE / "out",
    )
    flags = parser.parse_args(argv)
    result = run_task(flags)
    shown = ("rouge1", "rouge2", "rougeL", "rougeLsum", "tokens_per_second", "kv_bytes_end")
    print(f"{result['model']}, {result['method']}:")
    for name in shown:
        print(f"  {name:18} {result[name]:,}")
    print(f"summaries in {flags.save_path}, scores and record in {flags.score_path}")


if __name__ == "__main__":
    flag.run_main(main)
