"""Continue the same dialogues under several methods and cache sizes, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keyformer_evaluation.tasks.compare import compare
from keyformer_evaluation.tasks.flags import run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison that the flags ask for."""
    compare(argv, __doc__, "conversation", Path(__file__).parent)


if __name__ == "__main__":
    run_main(main)
