"""Figure 7: ROUGE against the size of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer_evaluation.studies.pictures import Figure
from keyformer_evaluation.studies.sizes import size_curves, sweep_sizes
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Steps
from keyformer_evaluation.studies.written import Written

SIZES = (20, 30, 40, 50, 60, 70, 80, 90)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("fig7", __doc__, argv, PICTURES)
    yield from sweep_sizes(study, SIZES, compared_at=(20, 50, 70))


def picture(written: Written) -> Figure:
    """Every method over the size of the cache."""
    return size_curves(written, "What each method keeps of ROUGE, by the size of the cache")


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
