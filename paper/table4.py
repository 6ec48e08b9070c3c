"""Table 4: which noise is added to the logits, at 60 % of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import NOISES, KeyformerConfig
from keyformer.evaluation.flags import run_main
from keyformer.evaluation.study import Published, Study, draw_bars, panels, print_tables
from keyformer.evaluation.sweep import Cell

PAPER: Published = {
    "gptj-keyformer": {
        ("gumbel",): 19.44, ("gaussian",): 14.53, ("constant",): 12.49, ("none",): 18.87,
    },
    "cerebras-keyformer": {
        ("gumbel",): 15.25, ("gaussian",): 9.54, ("constant",): 8.98, ("none",): 12.73,
    },
    "mpt-7b-keyformer": {
        ("gumbel",): 17.57, ("gaussian",): 10.17, ("constant",): 7.56, ("none",): 16.38,
    },
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    study = Study("table4", __doc__, argv)
    results = study.measure(
        Cell({"noise": noise}, KeyformerConfig(kv_cache=60, recent=30, noise=noise))
        for noise in NOISES
    )
    print_tables(results, PAPER)
    figure, axes = panels(results, "Logit adjustment, 60 % of the cache")
    for ax, rows in zip(axes, results.values(), strict=True):
        draw_bars(ax, rows)
    study.write(results, figure)


if __name__ == "__main__":
    run_main(main)
