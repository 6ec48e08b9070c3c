"""Methods over the size of the cache, in percent of the prompt."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from keyformer.budgets import POLICIES
from keyformer.config import METHODS, PLAIN, KeyformerConfig
from keyformer.rules import formula, shares
from keyformer_evaluation.studies.pictures import Figure, method_curves
from keyformer_evaluation.studies.study import Study
from keyformer_evaluation.studies.sweep import Cell, Steps, plain
from keyformer_evaluation.studies.tables import labelled, print_differences, print_tables
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks import flags as flag

PAPER = ("window", "h2o", "keyformer")
"""What the paper's figures compare."""

COMPARED = ("window", "streaming_llm", "h2o", "keyformer")
SIZES = (10, 20, 30, 50, 70, 90)

RIVALS = ("full", "h2o")
"""What every row's difference to is told."""


def cells(flags: argparse.Namespace) -> list[Cell]:
    """Full attention, then each method and rule at each size that :func:`compared_flags` has."""
    sizes = flags.sizes[-1:] if flags.quick else flags.sizes
    settings = {name: getattr(flags, name) for name in ("recent", "sinks", "budgets")}
    by_rule = {
        formula(shares(rule)): KeyformerConfig(**{"rule": rule, **PLAIN, **settings})
        for rule in flags.rules
    }
    return [*_cells(flags.methods, sizes), *_sized(by_rule, sizes)]


def _cells(methods: Iterable[str], sizes: Sequence[float]) -> list[Cell]:
    full = Cell({"method": "full", "kv_cache": ""}, KeyformerConfig.preset("full"))
    return [full, *_sized({of: KeyformerConfig.preset(of) for of in methods}, sizes)]


def _sized(configs: dict[str, KeyformerConfig], sizes: Sequence[float]) -> Iterable[Cell]:
    for name, config in configs.items():
        for size in sizes:
            yield Cell({"method": name, "kv_cache": plain(size)}, replace(config, kv_cache=size))


def compared_flags(parser: flag.Parser) -> None:
    """Flags of methods, rules and sizes."""
    choices = [method for method in METHODS if method != "full"]
    parser.add_argument("--methods", nargs="+", choices=choices, default=list(COMPARED))
    parser.add_argument(
        "--rules",
        nargs="+",
        default=[],
        help="also these, as --rule of the task scripts has them, under the model's own softmax and"
        " the next three flags",
    )
    parser.add_argument("--recent", type=flag.PERCENT, default=KeyformerConfig().recent)
    parser.add_argument("--sinks", type=flag.whole(0), default=0)
    parser.add_argument("--budgets", choices=POLICIES, default="uniform")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=flag.PERCENT_ABOVE_0,
        default=list(SIZES),
        help="of the cache, in %% of the prompt",
    )


def sweep_sizes(study: Study, sizes: Sequence[float], compared_at: Sequence[float]) -> Steps:
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
            study.differences += print_differences(
                results,
                f"At {size} % of the cache, keyformer - {other}",
                labelled(method="keyformer", kv_cache=size),
                labelled(method=other, kv_cache=size),
            )
    study.write(results)


def size_curves(
    written: Written, title: str, *about: str, names: Mapping[str, str] | None = None
) -> Figure:
    """A panel each: every method over the size of the cache."""
    xlabel = "cache size (% of the prompt)"
    return method_curves(written, "kv_cache", xlabel, title, *about, names=names)
