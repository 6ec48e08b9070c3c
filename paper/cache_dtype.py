"""Beyond the paper: cache size x what slots hold keys and values in."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import CACHE_DTYPES, KeyformerConfig
from keyformer_evaluation.studies.pictures import method_curves
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import print_tables

SIZES = (30, 50, 70, 90, 100)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("cache_dtype", __doc__, argv)
    full = Cell({"method": "full", "cache %": ""}, KeyformerConfig.preset("full"))
    cells = (
        Cell(
            {"method": "keyformer" if kind == "auto" else f"keyformer, {kind}", "cache %": size},
            KeyformerConfig(kv_cache=size, cache_dtype=kind),
        )
        for kind in CACHE_DTYPES
        for size in SIZES
    )
    results = yield from study.measure([full, *cells])
    print_tables(results)
    title = "Keyformer with quantized slots"
    study.write(results, method_curves(results, "cache %", "cache, % of the prompt", title))


if __name__ == "__main__":
    run_study(main)
