"""Methods over the size of the cache, in percent of the prompt."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from keyformer.config import METHODS, KeyformerConfig
from keyformer_evaluation.studies.pictures import Figure, method_curves
from keyformer_evaluation.studies.study import Results, Study
from keyformer_evaluation.studies.sweep import Cell, Steps, plain
from keyformer_evaluation.studies.tables import labelled, print_differences, print_tables
from keyformer_evaluation.tasks import flags as flag

PAPER = ("window", "h2o", "keyformer")
"""What the paper's figures compare."""

COMPARED = ("window", "streaming_llm", "h2o", "keyformer")
SIZES = (10, 20, 30, 50, 70, 90)

RIVALS = ("full", "h2o")
"""What every row's difference to is told."""


def cells(flags: argparse.Namespace) -> list[Cell]:
    """Full attention, then each method at each size that :func:`compared_flags` has."""
    return _cells(flags.methods, flags.sizes[-1:] if flags.quick else flags.sizes)


def _cells(methods: Iterable[str], sizes: Sequence[float]) -> list[Cell]:
    full = Cell({"method": "full", "kv_cache": ""}, KeyformerConfig.preset("full"))
    return [
        full,
        *(
            Cell(
                {"method": method, "kv_cache": plain(size)},
                KeyformerConfig.preset(method, kv_cache=size),
            )
            for method in methods
            for size in sizes
        ),
    ]


def compared_flags(parser: flag.Parser) -> None:
    """Flags of methods and sizes."""
    choices = [method for method in METHODS if method != "full"]
    parser.add_argument("--methods", nargs="+", choices=choices, default=list(COMPARED))
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=flag.PERCENT_ABOVE_0,
        default=list(SIZES),
        help="of the cache, in %% of the prompt",
    )


def sweep_sizes(
    study: Study, sizes: Sequence[float], title: str, compared_at: Sequence[float]
) -> Steps:
    """Figures 7 and 8: measure full attention and ``PAPER`` at each size, print, write.

    Parameters
    ----------
    compared_at
        Sizes at which Keyformer's differences from the others are printed.
    """
    results = yield from study.measure(_cells(PAPER, sizes))
    print_tables(results)
    for size in compared_at:
        for other in ("h2o", "window"):
            print_differences(
                results,
                f"At {size} % of the cache, keyformer - {other}",
                labelled(method="keyformer", kv_cache=size),
                labelled(method=other, kv_cache=size),
            )
    study.write(results, size_curves(results, title))


def size_curves(results: Results, title: str) -> Figure:
    """A panel each: every method over the size of the cache."""
    return method_curves(results, "kv_cache", "cache, % of the prompt", title)
