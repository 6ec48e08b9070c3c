"""The sweep of figures 7 and 8: methods over the size of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer.evaluation.pictures import method_curves
from keyformer.evaluation.study import Study
from keyformer.evaluation.sweep import Cell, Steps
from keyformer.evaluation.tables import labelled, print_differences, print_tables

METHODS = ("window", "h2o", "keyformer")


def sweep_sizes(
    study: Study, sizes: Sequence[float], title: str, compared_at: Sequence[float]
) -> Steps:
    """Measure full attention and ``METHODS`` at each size, print, write.

    Parameters
    ----------
    sizes
        Of the cache, in percent of the prompt.
    compared_at
        Those at which Keyformer's differences from the others are printed.
    """
    full = Cell({"method": "full", "kv_cache": ""}, KeyformerConfig.preset("full"))
    smaller = (
        Cell({"method": method, "kv_cache": size}, KeyformerConfig.preset(method, kv_cache=size))
        for method in METHODS
        for size in sizes
    )
    results = yield from study.measure([full, *smaller])
    print_tables(results)
    for size in compared_at:
        for other in ("h2o", "window"):
            print_differences(
                results,
                f"At {size} % of the cache, keyformer - {other}",
                labelled(method="keyformer", kv_cache=size),
                labelled(method=other, kv_cache=size),
            )
    study.write(results, method_curves(results, "kv_cache", "cache, % of the prompt", title))
