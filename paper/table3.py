"""Table 3: methods, positions and the sharing of scores, at 60 % of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.pictures import Figure, method_bars
from keyformer_evaluation.studies.study import Published, Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import labelled, print_differences, print_tables
from keyformer_evaluation.studies.written import Written

PAPER: Published = {
    ("MPT-7B", "summarization"): {
        ("full", "", ""): (38.6373, 17.6329, 24.506),
        ("window", "", ""): (18.1296, 4.2655, 11.5288),
        ("h2o", "original", "per_layer"): (36.9616, 16.3865, 24.2301),
        ("streaming_llm", "", ""): (1.3572, 0.0179, 1.0281),
        ("keyformer", "new", "per_layer"): (36.9152, 16.9092, 23.7218),
        ("keyformer", "original", "per_layer"): (38.7134, 17.5976, 24.5724),
        ("keyformer", "original", "shared"): (38.2537, 17.3732, 24.2579),
    }
}
SCORED = (
    ("h2o", "original", "per_layer"),
    ("keyformer", "new", "per_layer"),
    ("keyformer", "original", "per_layer"),
    ("keyformer", "original", "shared"),
)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("table3", __doc__, argv, PICTURES)
    cells = [
        Cell(
            {"method": method, "positions": "", "score": ""},
            KeyformerConfig.preset(method, kv_cache=60),
        )
        for method in ("full", "window", "streaming_llm")
    ]
    cells += [
        Cell(
            {"method": method, "positions": positions, "score": score},
            KeyformerConfig.preset(method, kv_cache=60, positions=positions, score=score),
        )
        for method, positions, score in SCORED
    ]
    results = yield from study.measure(cells)
    print_tables(results, study.beside(results, PAPER))
    paper = labelled(method="keyformer", positions="original", score="per_layer")
    for question, other in (
        ("Is a score of each layer better? per layer - shared", labelled(score="shared")),
        ("Are positions in the text better? original - new", labelled(positions="new")),
        ("Is Keyformer better than H2O?", labelled(method="h2o")),
        ("Is Keyformer better than a window?", labelled(method="window")),
    ):
        study.differences += print_differences(results, question, paper, other)
    study.write(results)


NAMES = {
    "original": "",
    "new": "positions in the cache",
    "per_layer": "",
    "shared": "one score for all layers",
}
"""Of what is not Algorithm 1."""


def picture(written: Written) -> Figure:
    """A bar for each method and variant."""
    title = "Methods, and variants of Keyformer"
    return method_bars(written, title, "cache 60 % of the prompt", names=NAMES)


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
