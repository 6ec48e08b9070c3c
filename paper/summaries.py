"""Methods over the size of the cache, by four measures.

ROUGE of greedy summaries (``rouge``), the negative log-likelihood of a token of the reference
after the prompt was evicted (``reference``), how many tokens of the full cache's own summary
each method would write too (``agreement``), and the negative log-likelihood of a token of the
document's end after what comes before it (``continued``).
"""

from __future__ import annotations

from collections.abc import Sequence

from keyformer_evaluation.studies.measures import SUMMARIES
from keyformer_evaluation.studies.pictures import Figure
from keyformer_evaluation.studies.sizes import RIVALS, cells, compared_flags, size_curves
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Steps
from keyformer_evaluation.studies.tables import print_tables, with_differences
from keyformer_evaluation.studies.written import Written


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study(
        "summaries", __doc__, argv, PICTURES, measures=list(SUMMARIES), more_flags=compared_flags
    )
    measures = {
        (model, name if len(study.items) == 1 else f"{task}, {name}"): measure
        for name in study.flags.measure
        for (model, task), measure in study.measures(SUMMARIES[name]).items()
    }
    results = yield from study.measure(cells(study.flags), measures)
    results = with_differences(results, RIVALS)
    print_tables(results)
    study.write(results)


def picture(written: Written) -> Figure:
    """Every method over the size of the cache."""
    return size_curves(written, "Summaries, by the size of the cache")


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
