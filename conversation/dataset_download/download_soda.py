"""Write SODA (everyday dialogues made by a language model) for the conversation task."""

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

FIELDS = ("narrative", "dialogue", "speakers")


def usable(row: Row) -> bool:
    """Whether there is a situation, and two turns or more with one speaker each."""
    return bool(row["narrative"].strip()) and len(row["dialogue"]) == len(row["speakers"]) >= 2


def convert(row: Row) -> Example:
    """One dataset row as an example; the names are the same."""
    return {name: row[name] for name in FIELDS}


def main(argv: Sequence[str] | None = None) -> None:
    """Download and write."""
    flags = build_parser(__doc__, "allenai/soda", "test").parse_args(argv)
    export(
        flags,
        data_file(__file__, "soda_eval.json"),
        lambda: load_rows(flags.dataset_path, flags.split),
        FIELDS,
        convert,
        usable,
    )


if __name__ == "__main__":
    run_main(main)
